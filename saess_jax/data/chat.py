"""Chat messages -> tokens and their kinds, through the tokenizer's own chat template; documents without one.

Which text is the user's is found by rendering the template with unguessable placeholders for the contents, never by
looking for words of a template in the result: those a user can type. Axis: S tokens.
"""

from __future__ import annotations

import importlib.resources
import itertools
import pathlib
import re
import secrets
from collections.abc import Sequence

import jinja2
import numpy as np
import transformers

from saess_jax.masks import TokenKind, cls_slot

Messages = str | Sequence[dict[str, str]]  # A str is one user turn.

_TEMPLATES = importlib.resources.files(__package__) / "templates"


def use_template(tokenizer: transformers.PreTrainedTokenizerBase, template: str) -> None:
  """Gives the tokenizer another chat template.

  Args:
    template: "" leaves its own; alpaca (Llama 2's system marks around Alpaca's instruction, as the paper's code asks),
      chatml, llama2, llama3 or mistral; or the path of a .jinja file.

  Raises:
    ValueError: another name, or a template that cannot be parsed or does not show a user's text.
    FileNotFoundError: no such file.
  """
  if not template:
    return
  if template.endswith(".jinja"):
    path = pathlib.Path(template).expanduser()
    if not path.is_file():
      raise FileNotFoundError(f"data.chat_template: {template} does not exist; expected a file with a Jinja template.")
    text = path.read_text(encoding="utf-8")
  else:
    names = sorted(entry.name.removesuffix(".jinja") for entry in _TEMPLATES.iterdir())
    if template not in names:
      raise ValueError(f"data.chat_template is {template!r}; expected one of {', '.join(names)}, or a .jinja file.")
    text = (_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
  tokenizer.chat_template = text
  try:
    _render(tokenizer, [{"role": "user", "content": "x"}])
  except (jinja2.TemplateError, TypeError, ValueError) as error:
    raise ValueError(f"data.chat_template {template} does not render a user's turn: {error}") from error


def encode_prompt(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, *, system_prompt: str = ""
) -> tuple[np.ndarray, np.ndarray]:
  """Everything that stands before the response, without [CLS].

  The contents of user and assistant turns are QUERY, what follows the last of them is HEADER, all else (BOS, role
  headers, system text) is AUX. Contents are tokenised with special tokens off: "<|im_end|>" typed by a user is plain
  text. Without such words the ids equal those of `apply_chat_template(..., add_generation_prompt=True)`.

  Args:
    tokenizer: a fast tokenizer with a chat template.
    messages: {"role", "content"} each, the last from the user; or the one user turn as str.
    system_prompt: put in front as a system message; "" leaves what the template puts in by itself.

  Returns:
    tokens int32 [S], kinds int32 [S].

  Raises:
    ValueError: no messages, an unknown role, empty content, a last message that is not the user's, two system
      messages, no chat template, or a template that drops, repeats or reorders contents.
  """
  tokens, owners = encode_spans(tokenizer, *_render(tokenizer, _check_messages(messages, system_prompt)))
  kinds = np.where(owners, TokenKind.QUERY, TokenKind.AUX)
  kinds[np.flatnonzero(owners)[-1] + 1:] = TokenKind.HEADER
  return np.asarray(tokens, np.int32), kinds.astype(np.int32)


def encode_exchange(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, response: str
) -> np.ndarray:
  """Prompt and response as the template of a guard shows them, up to where its verdict begins: token ids int32 [S].

  Contents are plain text, as in `encode_prompt`, whose errors these are; an empty response is one too.
  """
  if not response.strip():
    raise ValueError(f"The response is {response!r}; expected text.")
  whole = [*_check_messages(messages, ""), {"role": "assistant", "content": response}]
  return np.asarray(encode_spans(tokenizer, *_render(tokenizer, whole))[0], np.int32)


def encode_spans(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], np.ndarray]:
  """Ids of a text whose spans, [start, stop) in characters and in order, are contents: no special token is read there.

  Returns:
    ids, and for each a bool: it holds a character of a span.
  """
  if any(word in text[start:stop] for start, stop in spans for word in _special_words(tokenizer)):
    return _encode_in_pieces(tokenizer, text, spans)
  return _encode_at_once(tokenizer, text, spans)


def encode_response(
    tokenizer: transformers.PreTrainedTokenizerBase, response: str | Sequence[int], max_tokens: int
) -> np.ndarray:
  """Response tokens int32: a str with the end-of-turn token behind it, sampled ids as they are.

  At most `max_tokens` before the end-of-turn token; what is longer is cut and then has none. "" is no tokens at all.
  """
  tokens = list(response)
  if isinstance(response, str):
    tokens = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    tokens += [tokenizer.eos_token_id] if tokens else []
  ended = bool(tokens) and tokens[-1] == tokenizer.eos_token_id
  return np.asarray(tokens if len(tokens) <= max_tokens + ended else tokens[:max_tokens], np.int32)


def insert_cls(
    tokens: np.ndarray, kinds: np.ndarray, stage: str, header_sees_cls: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """The stored layout: `tokens` and `kinds` with [CLS] (id 0, never read) put into its slot (`masks.cls_slot`)."""
  slot = cls_slot(kinds, stage, header_sees_cls)
  return np.insert(tokens, slot, 0), np.insert(kinds, slot, TokenKind.CLS)


def encode_example(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: Messages,
    response: Sequence[int] | None,
    *,
    stage: str,
    header_sees_cls: bool,
    max_length: int,
    system_prompt: str = "",
) -> tuple[np.ndarray, np.ndarray]:
  """Prompt, [CLS] and response in the stored layout, without padding.

  Args:
    response: token ids (`encode_response` makes them of a text); None: the prompt ends at [CLS], without its HEADER.
    max_length: of the result, [CLS] included; the response is cut to fit.

  Returns:
    tokens int32 [S], kinds int32 [S].

  Raises:
    ValueError: a prompt that leaves no room for [CLS] and one response token; else as `encode_prompt`.
  """
  tokens, kinds = encode_prompt(tokenizer, prompt, system_prompt=system_prompt)
  room = max_length - len(tokens) - 1
  if room < 1:
    raise ValueError(
        f"The prompt has {len(tokens)} tokens with its template; max_length {max_length} holds {max_length - 2} beside "
        f"[CLS] and one response token. Raise data.max_length (and data.buckets) or shorten it: {str(prompt)[:60]!r}")
  if response is None:
    tokens, kinds, response = tokens[kinds != TokenKind.HEADER], kinds[kinds != TokenKind.HEADER], []
  answer = np.asarray(response, np.int32)[:room]
  tokens = np.concatenate([tokens, answer])
  kinds = np.concatenate([kinds, np.full(len(answer), TokenKind.RESPONSE, np.int32)])
  return insert_cls(tokens, kinds, stage, header_sees_cls)


def encode_document(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, max_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  """A document of the pretraining stage in the stored layout, in chunks of at most `max_length` tokens, [CLS] included.

  No template: each chunk is BOS (AUX, where the tokenizer has one) and text, which is RESPONSE, so that all of it is
  trained on but a first token that nothing predicts. Special tokens in the text are plain text. [CLS] stands last.

  Returns:
    (tokens int32 [S], kinds int32 [S]) of each chunk.

  Raises:
    ValueError: `max_length` holds less than [CLS], a first token and one to predict.
  """
  if max_length < 3:
    raise ValueError(f"max_length is {max_length}; expected 3 or more: [CLS], a first token and one to predict.")
  start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
  ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
  room, chunks = max_length - 1 - len(start), []
  for at in range(0, len(ids), room):
    tokens = np.asarray(start + ids[at : at + room], np.int32)
    kinds = np.full(len(tokens), TokenKind.RESPONSE, np.int32)
    kinds[0] = TokenKind.AUX
    chunks.append(insert_cls(tokens, kinds, "pretrain"))
  return chunks


def _check_messages(messages: Messages, system_prompt: str) -> list[dict[str, str]]:
  messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
  if system_prompt:
    if messages and messages[0].get("role") == "system":
      raise ValueError("Both system_prompt and a system message are given; drop one of them.")
    messages = [{"role": "system", "content": system_prompt}, *messages]
  if not messages:
    raise ValueError("No messages; expected at least one of role user.")
  for index, message in enumerate(messages):
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
      raise ValueError(f"Message {index} has role {role!r}; expected system, user or assistant.")
    if not isinstance(content, str) or not content.strip():
      raise ValueError(f"Message {index} ({role}) has content {content!r}; expected text.")
  if messages[-1]["role"] != "user":
    raise ValueError(f"The last message has role {messages[-1]['role']!r}; a response follows on a user message.")
  return messages


def _render(tokenizer, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
  """The rendered template, and where in it each user or assistant content stands, [start, stop) in characters."""
  if not tokenizer.chat_template:
    raise ValueError(f"{type(tokenizer).__name__} has no chat template; set tokenizer.chat_template.")
  mark = secrets.token_hex(16)
  # Tabs around a mark that are gone from the rendering show that the template trims contents there (Llama).
  marked = [
      message if message["role"] == "system" else {**message, "content": f"\t{mark}-{index};\t"}
      for index, message in enumerate(messages)
  ]
  rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
  if mark not in rendered and re.search(r"\btype['\"\]]*\s*==\s*['\"]text", tokenizer.chat_template):
    # It takes a content in parts (Llama Guard 3 1B), and drops a plain str without a word.
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in marked]
    rendered = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
  # [template text, tab or not, index, tab or not, template text, ...]
  pieces = re.split(rf"(\t?){mark}-(\d+);(\t?)", rendered)
  found = [int(index) for index in pieces[2::4]]
  expected = [index for index, message in enumerate(messages) if message["role"] != "system"]
  if found != expected:
    raise ValueError(f"The chat template renders the contents of messages {found}; expected {expected}, each once.")
  text, spans = pieces[0], []
  for left, index, right, template in zip(*(pieces[i::4] for i in range(1, 5))):
    content = messages[int(index)]["content"]
    content = content if left else content.lstrip()
    content = content if right else content.rstrip()
    spans.append((len(text), len(text) + len(content)))
    text += content + template
  return text, spans


def _special_words(tokenizer) -> list[str]:
  return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _encode_at_once(tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
  """Ids, and for each whether it holds a character of a span.

  Exact also where a tokenizer marks word starts (Llama).
  """
  encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
  starts, stops = np.asarray(encoding.offset_mapping).T
  starts = np.minimum(starts, stops - 1)  # Byte-level tokenizers may report a token of white space as empty.
  return encoding.input_ids, np.any([(starts < stop) & (stops > start) for start, stop in spans], axis=0)


def _encode_in_pieces(tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
  """As `_encode_at_once`, with special tokens off inside the spans and no token across their borders."""
  tokens, owners = [], []
  cuts = [0, *(cut for span in spans for cut in span), len(text)]
  for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
    is_content = index % 2 == 1
    ids = tokenizer(text[start:stop], add_special_tokens=False, split_special_tokens=is_content).input_ids
    tokens += ids
    owners += [is_content] * len(ids)
  return tokens, np.asarray(owners)
