"""SA-ESS in torch, to check the JAX implementation by: the method's rules as dense masks, no cache, no cleverness.

  python saess_torch.py FOLDER --query "How do I bake bread?" --response "First, take flour"

FOLDER is what `saess_jax.export.export_hf` writes: a Hugging Face model, with the [CLS] embedding and head in
saess.safetensors and the settings in saess_config.json. Needs torch, transformers and safetensors, nothing else.

One token [CLS] stands beside the text. Its position is 0, all others count from 1 in reading order. Its last hidden
state h (behind the final norm) says P(malicious) = sigmoid(w h + b). Before the response it sees itself and QUERY.
AUX and QUERY see what stands before them and themselves; HEADER (if header_sees_cls) and RESPONSE see [CLS] too.

After each response token t (from 0) [CLS] is asked again and sees, never AUX or HEADER (Rule 4), but itself and

  Rule 1, the query was judged malicious: QUERY and the first r1 response tokens, as far as t; frozen from t = r1 on
  Rule 2, benign: the newest r2 response tokens (QUERY too if rule2_keeps_query)
  Rule 3, since a verdict turned malicious at S: response tokens S - r2 to S + r3, as far as t, then frozen; a benign
          verdict meanwhile: back to Rule 2

A response token sees the [CLS] of its own step, and what it made of it is fixed from then on. So here each step's [CLS]
is a row of its own, which the HEADER (step 0) or the response tokens of that step see, and no others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import secrets

import torch
import transformers
from safetensors.torch import load_file

AUX, QUERY, HEADER, RESPONSE = "AUX", "QUERY", "HEADER", "RESPONSE"


class Saess:
  """The folder's model, tokenizer and settings; float32."""

  def __init__(self, folder: str | pathlib.Path):
    folder = pathlib.Path(folder)
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "saess_config.json").read_text())
    self.rules, layout = settings["safety"], settings["layout"]
    self.header_sees_cls, self.system_prompt = layout["header_sees_cls"], layout.get("system_prompt", "")
    stored = {name: tensor.float() for name, tensor in load_file(folder / "saess.safetensors").items()}
    self.embedding = stored["cls_embedding"]
    self.weight, self.bias = stored["cls_head/kernel"], stored["cls_head/bias"]

  def encode(self, messages: list[dict[str, str]] | str) -> tuple[list[int], list[str]]:
    """Ids and kinds of a chat that the user spoke last in, up to where the response begins; in front the folder's
    system prompt, if it has one, unless the chat begins with another.

    Which text is the user's is told by marks put in place of the contents, never by words of the template. Contents
    must not hold the tokenizer's special words, which the JAX implementation reads as plain text and this does not.
    """
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if self.system_prompt and messages[0]["role"] != "system":
      messages = [{"role": "system", "content": self.system_prompt}, *messages]
    special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
    if any(word in message["content"] for word in special for message in messages):
      raise ValueError(f"A message holds one of the special words {special}; this reference does not take those.")
    mark = secrets.token_hex(16)
    marked = [m if m["role"] == "system" else {**m, "content": f"{mark}{i};"} for i, m in enumerate(messages)]
    text = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    spans = []
    for i, message in enumerate(messages):
      if message["role"] != "system":
        before, after = text.split(f"{mark}{i};")
        spans.append((len(before), len(before) + len(message["content"])))
        text = before + message["content"] + after
    encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_query = [any(start < stop and end > begin for begin, stop in spans)
                for start, end in ((min(s, e - 1), e) for s, e in encoding["offset_mapping"])]
    last = max(i for i, own in enumerate(is_query) if own)
    kinds = [QUERY if own else HEADER if i > last else AUX for i, own in enumerate(is_query)]
    return encoding["input_ids"], kinds

  @torch.no_grad()
  def ask(self, ids: list[int], kinds: list[str], views: list[list[bool]], current: list[int]) -> list[float]:
    """P(malicious) of every [CLS] row: the text's rows come first, then one row for each view.

    Args:
      ids, kinds: of the text, S tokens.
      views: what each [CLS] row sees of the text, [C][S].
      current: which [CLS] row each text token sees, if its kind lets it see one, [S].
    """
    size, rows = len(ids), len(views)
    sees = torch.zeros(size + rows, size + rows, dtype=torch.bool)
    sees[:size, :size] = torch.ones(size, size).tril()
    for i, kind in enumerate(kinds):
      if kind == RESPONSE or (kind == HEADER and self.header_sees_cls):
        sees[i, size + current[i]] = True
    sees[size:, :size] = torch.tensor(views)
    sees[size:, size:] = torch.eye(rows)
    words = self.model.get_input_embeddings()(torch.tensor(ids))
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    hidden = self.model.model(
        inputs_embeds=torch.cat([words, self.embedding.expand(rows, -1)])[None], attention_mask=mask[None, None],
        position_ids=torch.tensor([[*range(1, size + 1), *[0] * rows]]), use_cache=False).last_hidden_state[0]
    return torch.sigmoid(hidden[size:] @ self.weight + self.bias)[:, 0].tolist()

  def initial(self, messages: list[dict[str, str]] | str) -> float:
    """P(malicious) of a chat before any response."""
    ids, kinds = self.encode(messages)
    return self.ask(ids, kinds, [[kind == QUERY for kind in kinds]], [0] * len(ids))[0]

  def trace(self, messages: list[dict[str, str]] | str, response: list[int]) -> tuple[float, list[float | None]]:
    """The initial P(malicious), and that after each response token; None where [CLS] is frozen.

    Args:
      response: token ids, given, hence never cut or replaced (dependency "low"); [CLS] is asked at each.
    """
    ids, kinds = self.encode(messages)
    views, current = [[kind == QUERY for kind in kinds]], [0] * len(ids)
    initial = self.ask(ids, kinds, views, current)[0]
    rules, turned, probs = self.rules, None, []  # turned: S of Rule 3.
    malicious_query = initial >= rules["threshold"] and rules.get("heeds_query", True)
    prompt = len(ids)
    for t, token in enumerate(response):
      ids, kinds, views = [*ids, token], [*kinds, RESPONSE], [[*view, False] for view in views]
      if malicious_query:
        with_query, first, last = True, 0, rules["r1"] - 1
      elif turned is None:
        with_query, first, last = rules["rule2_keeps_query"], t + 1 - rules["r2"], t
      else:
        with_query, first, last = False, turned - rules["r2"], turned + rules["r3"]
      if rules.get("sees_all"):  # Folders written before there were these settings lack them.
        with_query, first, last = True, 0, t
      if t > last:  # Frozen: the token sees the [CLS] that was asked last.
        current.append(len(views) - 1)
        probs.append(None)
        continue
      views.append([(kind == QUERY and with_query) or (kind == RESPONSE and first <= i - prompt <= last)
                    for i, kind in enumerate(kinds)])
      current.append(len(views) - 1)
      probs.append(self.ask(ids, kinds, views, current)[-1])
      if not malicious_query:
        malicious = probs[-1] >= rules["threshold"]
        turned = (t if turned is None else turned) if malicious else None
    return initial, probs


def main():
  parser = argparse.ArgumentParser(description="P(malicious) of a query, and after each token of a response.")
  parser.add_argument("folder", help="what saess_jax.export.export_hf wrote")
  parser.add_argument("--query", required=True)
  parser.add_argument("--response", default="")
  options = parser.parse_args()
  saess = Saess(options.folder)
  response = saess.tokenizer(options.response, add_special_tokens=False)["input_ids"]
  initial, probs = saess.trace(options.query, response)
  print(f"{initial:.4f}  (query)")
  for token, prob in zip(response, probs):
    print("frozen" if prob is None else f"{prob:.4f}", repr(saess.tokenizer.decode([token])))


if __name__ == "__main__":
  main()
