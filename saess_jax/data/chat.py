"""Chat messages -> tokens and their kinds, through the tokenizer's own chat template; documents without one.

Which text is the user's is found by rendering the template with unguessable placeholders for the contents, never by
looking for words of a template in the result: those a user can type. Axis: S tokens.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import pathlib
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np
import tokenizers
import transformers

from saess_jax.masks import TokenKind, cls_slot

Messages = str | Sequence[dict[str, str]]  # A str is one user turn.

_TEMPLATES = importlib.resources.files(__package__) / "templates"


def use_template(tokenizer: transformers.PreTrainedTokenizerBase, template: str) -> None:
  """Gives the tokenizer another chat template.

  Args:
    template: "" leaves its own; alpaca (Llama 2's system marks around Alpaca's instruction, as the paper's code asks),
      chatml, llama2, llama3 or mistral; the path of a .jinja file; or the text of one.

  Raises:
    ValueError: another name, or a template that cannot be parsed or does not show a user's text.
    FileNotFoundError: no such file.
  """
  if not template:
    return
  if "{" in template:
    text = template
  elif template.endswith(".jinja"):
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
  except ValueError as error:
    raise ValueError(f"data.chat_template {template[:60]} does not render a user's turn: {error}") from error


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
      messages, no chat template, or one that does not take these messages (turns out of order, say), drops, repeats or
      reorders contents, or changes its own text with them.
  """
  tokens, owners = encode_spans(tokenizer, *_render(tokenizer, check_messages(messages, system_prompt)))
  kinds = np.where(owners, TokenKind.QUERY, TokenKind.AUX)
  kinds[np.flatnonzero(owners)[-1] + 1:] = TokenKind.HEADER
  return np.asarray(tokens, np.int32), kinds.astype(np.int32)


def conversation(pairs: Sequence[tuple[str, str]], request: str) -> list[dict[str, str]]:
  """Messages: requests with their answers, in turns, and then the request that is to be answered."""
  history = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
  return [*history, {"role": "user", "content": request}]


def encode_exchange(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, response: str
) -> np.ndarray:
  """Prompt and response as the template of a guard shows them, up to where its verdict begins: token ids int32 [S].

  Contents are plain text, as in `encode_prompt`, whose errors these are; an empty response is one too.
  """
  if not response.strip():
    raise ValueError(f"The response is {response!r}; expected text.")
  whole = [*check_messages(messages), {"role": "assistant", "content": response}]
  return np.asarray(encode_spans(tokenizer, *_render(tokenizer, whole))[0], np.int32)


def encode_spans(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], np.ndarray]:
  """Ids of a text whose spans, [start, stop) in characters and in order, are contents: no special token is read there.

  All else is as if those words were no special tokens at all: a "</s>" in a span moves no border and no word start.

  Returns:
    ids, and for each a bool: it holds a character of a span.
  """
  words = _control_words(tokenizer)
  if not any(word in text[start:stop] for start, stop in spans for word in words):
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding.input_ids, _owners(encoding.offset_mapping, spans)
  backend, names = _renamed(tokenizer, words)
  pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
  rename = lambda template: re.sub(pattern, lambda word: names[word[0]], template)
  renamed, moved, end = "", [], 0
  for start, stop in spans:
    renamed += rename(text[end:start])
    moved.append((len(renamed), len(renamed) + stop - start))
    renamed, end = renamed + text[start:stop], stop
  encoding = backend.encode(renamed + rename(text[end:]), add_special_tokens=False)
  return encoding.ids, _owners(encoding.offsets, moved)


def encode_text(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
  """Token ids of text alone: nothing is added, and special tokens in it are plain text.

  Added ones that are not marked special stay tokens, unlike in what a user types (`encode_spans`): a model writes its
  own "</think>" as one.
  """
  return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def encode_behind(tokenizer: transformers.PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
  """Token ids of text as it stands behind another: by itself it may get a word start more (SentencePiece)."""
  head, whole = encode_text(tokenizer, before), encode_text(tokenizer, before + text)
  # Where the two share a token, each has its own: what stands before is there already.
  return whole[len(head):] if whole[: len(head)] == head else encode_text(tokenizer, text)


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
  """The token that ends a response: the control word that the chat template puts behind an assistant's content.

  Where it puts none there it is the tokenizer's end of sequence. They differ where that is still the one of documents:
  "<|end_of_text|>" beside "<|eot_id|>" in GGUF files of Llama 3, "<|endoftext|>" beside "<|im_end|>" in Qwen2's bases.

  Raises:
    ValueError: there is neither.
  """
  behind = _behind_an_answer(tokenizer, tokenizer.chat_template) if tokenizer.chat_template else ""
  ends = [word for word in _control_words(tokenizer) if behind.startswith(word)] if behind else []
  if ends:
    return tokenizer.convert_tokens_to_ids(max(ends, key=len))
  if tokenizer.eos_token_id is None:
    raise ValueError(
        f"{type(tokenizer).__name__} has no end-of-sequence token, and its chat template puts none behind an answer: "
        "no response would end. Set tokenizer.eos_token.")
  return tokenizer.eos_token_id


def stop_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
  """What a model ends a response with: `end_of_turn` and the tokenizer's end of sequence. Its ValueError."""
  return sorted({end_of_turn(tokenizer), tokenizer.eos_token_id} - {None})


@functools.lru_cache(maxsize=8)
def _behind_an_answer(tokenizer, template: str) -> str:
  mark = secrets.token_hex(16)
  messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
  try:
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
  except (jinja2.TemplateError, TypeError):  # It has no form for an assistant's turn.
    return ""
  return rendered.rpartition(mark)[2].lstrip() if mark in rendered else ""


def encode_response(
    tokenizer: transformers.PreTrainedTokenizerBase, response: str | Sequence[int], max_tokens: int
) -> np.ndarray:
  """Response tokens int32: a str with `end_of_turn` behind it, sampled ids as they are.

  At most `max_tokens` before the end-of-turn token; what is longer is cut and then has none. "" is no tokens at all.
  """
  tokens = list(response)
  if isinstance(response, str):
    tokens = encode_text(tokenizer, response)
    tokens += [end_of_turn(tokenizer)] if tokens else []
  ended = bool(tokens) and tokens[-1] == end_of_turn(tokenizer)
  return np.asarray(tokens if len(tokens) <= max_tokens + ended else tokens[:max_tokens], np.int32)


def insert_cls(
    tokens: np.ndarray, kinds: np.ndarray, stage: str, header_sees_cls: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """The stored layout: `tokens` and `kinds` with [CLS] (id 0, never read) put into its slot (`masks.cls_slot`)."""
  slot = cls_slot(kinds, stage, header_sees_cls)
  return np.insert(tokens, slot, 0), np.insert(kinds, slot, TokenKind.CLS)


def encode_request(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, *, system_prompt: str = "",
    header_sees_cls: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """A request as the decoder reads it: `encode_prompt` with [CLS] in its slot, (tokens, kinds), int32 [S] both."""
  return insert_cls(*encode_prompt(tokenizer, messages, system_prompt=system_prompt), "sft", header_sees_cls)


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
  ids = encode_text(tokenizer, text)
  room, chunks = max_length - 1 - len(start), []
  for at in range(0, len(ids), room):
    tokens = np.asarray(start + ids[at : at + room], np.int32)
    kinds = np.full(len(tokens), TokenKind.RESPONSE, np.int32)
    kinds[0] = TokenKind.AUX
    chunks.append(insert_cls(tokens, kinds, "pretrain"))
  return chunks


def check_messages(messages: Messages, system_prompt: str = "") -> list[dict[str, str]]:
  """The messages as a list, behind the system prompt; the ValueErrors of `encode_prompt` that no template raises."""
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
  if sum(message["role"] == "system" for message in messages) > 1:
    raise ValueError("More than one system message is given; join them.")
  if messages[-1]["role"] != "user":
    raise ValueError(f"The last message has role {messages[-1]['role']!r}; a response follows on a user message.")
  return messages


def _render(tokenizer, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
  """The rendered template, and where in it each user or assistant content stands, [start, stop) in characters.

  What the template makes of a content (it may trim it, or cut a train of thought off) is read from a rendering in which
  all others are marks, between the texts that stand around its own mark where it is one too.
  """
  if not tokenizer.chat_template:
    raise ValueError(f"{type(tokenizer).__name__} has no chat template; set tokenizer.chat_template.")
  mark = secrets.token_hex(16)
  marks = [message["content"] if message["role"] == "system" else f"{mark}-{index};"
           for index, message in enumerate(messages)]
  form = lambda content: content
  rendered = _apply(tokenizer, messages, marks, form)
  if mark not in rendered and re.search(r"\btype['\"\]]*\s*==\s*['\"]text", tokenizer.chat_template):
    # It takes a content in parts (Llama Guard 3 1B), and drops a plain str without a word.
    form = lambda content: [{"type": "text", "text": content}]
    rendered = _apply(tokenizer, messages, marks, form)
  places = list(re.finditer(rf"{mark}-(\d+);", rendered))
  found = [int(place[1]) for place in places]
  expected = [index for index, message in enumerate(messages) if message["role"] != "system"]
  if found != expected:
    raise ValueError(f"The chat template renders the contents of messages {found}; expected {expected}, each once.")
  text, spans, end = "", [], 0
  for index, place in zip(found, places):
    before, after = rendered[: place.start()], rendered[place.end() :]
    alone = _apply(tokenizer, messages, [*marks[:index], messages[index]["content"], *marks[index + 1 :]], form)
    said = alone[len(before) : len(alone) - len(after)]
    if before + said + after != alone or not said:
      raise ValueError(
          f"The chat template leaves nothing of message {index}, or changes its own text with what that says: "
          f"{messages[index]['content'][:60]!r}")
    text += rendered[end : place.start()]
    spans.append((len(text), len(text) + len(said)))
    text, end = text + said, place.end()
  text += rendered[end:]
  if len(found) > 1 and text != _apply(tokenizer, messages, [message["content"] for message in messages], form):
    raise ValueError("The chat template renders these messages together otherwise than each alone.")
  return text, spans


def _apply(tokenizer, messages: list[dict[str, str]], contents: list[str], form: Callable[[str], Any]) -> str:
  given = [{**message, "content": form(content)} for message, content in zip(messages, contents)]
  try:
    return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
  except (jinja2.TemplateError, TypeError) as error:  # TypeError: a bos_token that is None, above all.
    roles = ", ".join(message["role"] for message in messages)
    raise ValueError(f"The chat template does not take these messages ({roles}): {error}") from error


def _control_words(tokenizer) -> tuple[str, ...]:
  """What a template may say and a user not: special tokens, and added ones that stand in the template's source and are
  not marked so, as "<｜User｜>" of DeepSeek's distilled models. A plain word or white space is none.
  """
  template = tokenizer.chat_template or ""
  return tuple(
      token.content for token in tokenizer.added_tokens_decoder.values()
      if token.special or token.content in template and re.search(r"[^\w\s]", token.content))


@functools.lru_cache(maxsize=2)
def _renamed(tokenizer, words: tuple[str, ...]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """The tokenizer with these of its tokens under names that nobody can type, and those names."""
  mark = secrets.token_hex(16)
  names = {word: f"{mark}-{index};" for index, word in enumerate(words)}
  state = json.loads(tokenizer.backend_tokenizer.to_str())
  for token in state["added_tokens"]:
    token["content"] = names.get(token["content"], token["content"])
  model = state["model"]
  if isinstance(model["vocab"], dict):
    model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
  else:  # Unigram: pairs of piece and score.
    model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
  if "merges" in model:
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
  if "unk_token" in model:
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
  # The post-processor names tokens too, and only adds some or trims offsets.
  state |= {"post_processor": None, "truncation": None, "padding": None}
  return tokenizers.Tokenizer.from_str(json.dumps(state)), names


def _owners(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """bool [S]: which tokens, of those characters, hold one of a span."""
  starts, stops = np.asarray(offsets).T
  starts = np.minimum(starts, stops - 1)  # Byte-level tokenizers may report a token of white space as empty.
  return np.any([(starts < stop) & (stops > start) for start, stop in spans], axis=0)
