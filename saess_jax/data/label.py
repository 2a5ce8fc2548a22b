"""Labels a text corpus with a guard model: the documents of the pretraining stage (paper: Wikipedia, by Llama Guard).

  python -m saess_jax.data.label --corpus wiki.jsonl --guard meta-llama/Llama-Guard-3-8B --out labelled.jsonl

A corpus is .jsonl with a column `text`, or .txt with a document a line. A document longer than `--max-tokens` is cut
into pieces [ours], each judged for itself, so that every label belongs to text that the guard has seen whole. The
output, which is `data.source` of the pretraining run, has a line a piece: text, label, p_unsafe, document, piece, idea.

P(unsafe) is that of the first token of "unsafe" against that of "safe" where the guard's answer begins, as Llama
Guard's model cards have it. Llama Guard 1 and 2 answer right behind their template; that of Llama Guard 3 ends in an
open header, which the model first closes with a blank line: that is put there for it. The same command goes on where it
was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from saess_jax import first_word, hf, staging
from saess_jax.config import LabelConfig, check_ranges
from saess_jax.data import chat, sources
from saess_jax.records import Records

CHUNK = 8  # Batches between two writes.
WORDS = (("safe",), ("unsafe",))  # What a guard answers; the index is the label.
_SLACK = 16  # Tokens by which a piece may grow when it is read apart from its neighbours.


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a document, or all of it, counted from 0 in the corpus and in the document.

  `idea` is the whole document's: its pieces stay in one split.
  """

  text: str
  document: int
  piece: int
  idea: str


class Guard:
  """A model that answers "safe" or "unsafe" in its chat template."""

  def __init__(self, loaded: hf.Pretrained, config: LabelConfig):
    """Lays the weights out over this process's devices.

    Raises:
      ValueError: the tokenizer begins both words alike; the template with `max_tokens` exceeds the model's context; a
        template that does not show the document.
    """
    self.tokenizer, self.config = loaded.tokenizer, config
    needed = len(self._encode("x")) + config.max_tokens + _SLACK
    if needed > loaded.config.max_seq_len:
      raise ValueError(
          f"A piece of {config.max_tokens} tokens makes {needed} in the guard's template; its context is "
          f"{loaded.config.max_seq_len}. Lower --max-tokens to "
          f"{loaded.config.max_seq_len - needed + config.max_tokens} or less.")
    self._ask = first_word.FirstWord(loaded, WORDS, config.dtype, config.batch_size)

  def _encode(self, text: str) -> np.ndarray:
    """The prompt up to where the answer begins; nothing that a document says is read as a special token."""
    return first_word.close_header(self.tokenizer, chat.encode_prompt(self.tokenizer, text)[0])

  def cut(self, text: str) -> list[str]:
    """Pieces of at most about `max_tokens` tokens, cut at white space where the second half of one has any."""
    limit = self.config.max_tokens
    offsets = self.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True).offset_mapping
    pieces, start, token = [], 0, 0
    while token + limit < len(offsets):
      stop = offsets[token + limit][0]
      half = offsets[token + limit // 2][0]
      spaces = [at for at in range(half, stop) if text[at].isspace()]
      stop = max(spaces[-1] + 1 if spaces else stop, start + 1)
      pieces.append(text[start:stop])
      start = stop
      while token < len(offsets) and offsets[token][0] < start:
        token += 1
    return [piece for piece in [*pieces, text[start:]] if piece.strip()]

  def p_unsafe(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """P(unsafe) of each text, and the share of probability that the answer words have in all; float32 both.

    Raises:
      ValueError: a P(unsafe) that is no number, which no threshold could call malicious.
    """
    p, share, _ = self._ask([self._encode(text) for text in texts])
    if np.isnan(p).any():
      raise ValueError(
          f"P(unsafe) is no number for {np.isnan(p).sum()} of {len(texts)} pieces, the first of them "
          f"{texts[int(np.argmax(np.isnan(p)))]!r:.60}; are the guard's weights whole? Try --dtype float32.")
    return p, share


def documents(corpus: str) -> Iterator[str]:
  """The texts of a corpus, of several files where commas separate them; nothing is kept in memory.

  Raises:
    FileNotFoundError: a file that does not exist.
    ValueError: an ending other than .jsonl and .txt, a malformed line, or a row without text (file and line are named).
  """
  for path in _paths(corpus):
    with path.open(encoding="utf-8-sig") as file:
      try:
        for number, line in enumerate(file, 1):
          if line.strip():
            yield line.strip() if path.suffix == ".txt" else _document(line, f"{path.name}:{number}")
      except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _document(line: str, where: str) -> str:
  try:
    text = json.loads(line)["text"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{where} is no JSON object with a column text ({type(error).__name__}: {error}).") from error
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"{where}: text is {text!r:.60}; expected text.")
  sources.check_unicode(text, f"{where}: text")
  return text


def _paths(corpus: str) -> list[pathlib.Path]:
  paths = [pathlib.Path(name.strip()).expanduser() for name in corpus.split(",") if name.strip()]
  if not paths:
    raise ValueError(f"No corpus in {corpus!r}; expected a path, or several separated by commas.")
  for path in paths:
    if path.suffix not in (".jsonl", ".txt"):
      raise ValueError(f"{path} ends in {path.suffix!r}; expected .jsonl with a column text, or .txt.")
    if not path.is_file():
      raise FileNotFoundError(f"Corpus {path} does not exist; several files are separated by commas.")
  return paths


def label(config: LabelConfig, shard: int = 0, shards: int = 1) -> pathlib.Path:
  """Labels what is not labelled yet of this shard's documents (every `shards`-th), and returns the output's path.

  Raises:
    ValueError: bad settings or corpus, an output that holds something else, before the guard is loaded; or that another
      process writes.
    FileNotFoundError: no such corpus or guard.
  """
  if not 0 <= shard < shards:
    raise ValueError(f"shard is {shard} of {shards}; expected 0 to {shards - 1}.")
  check_ranges(config, {"threshold": (0, 1), "max_tokens": (2, math.inf), "batch_size": (1, math.inf)})
  count = sum(1 for _ in documents(config.corpus))  # The whole corpus is checked before any work.
  if not count:
    raise ValueError(f"{config.corpus} has no documents; nothing to label.")
  if shards > count:
    raise ValueError(f"{config.corpus} has {count} documents and shards is {shards}; expected as many at most.")
  path = staging.local(config.out)
  if path.suffix.lower() != ".jsonl":
    raise ValueError(f"out is {config.out}; expected a name that ends in .jsonl, by which training reads it.")
  if shards > 1:
    path = path.with_name(f"{path.stem}-{shard:05d}-of-{shards:05d}{path.suffix}")
  claim = {name: getattr(config, name) for name in ("guard", "threshold", "max_tokens", "dtype")} | {
      "sha256": [_sha256(name) for name in _paths(config.corpus)], "shard": shard, "shards": shards}
  _check_own(path, claim)
  guard = Guard(hf.load_pretrained(config.guard, config.dtype), config)
  path.parent.mkdir(parents=True, exist_ok=True)
  with staging.alone(path.parent, f"{path.name}.{staging.LOCK}"):
    _check_own(path, claim)  # Another process may have been there meanwhile.
    _label_rest(config, guard, path, claim, count)
  return path


def _label_rest(config: LabelConfig, guard: Guard, path: pathlib.Path, claim: dict[str, Any], count: int) -> None:
  """Of so many documents, what is not labelled yet; `claim` says what of."""
  shard, shards = claim["shard"], claim["shards"]
  records = Records(path)
  done = records.read()
  staging.write_text(_record(path), json.dumps(claim, indent=2) + "\n")

  mine = ((i, text) for i, text in enumerate(documents(config.corpus)) if i % shards == shard)
  pieces = (
      Piece(text, i, j, hashlib.sha256(whole.encode()).hexdigest()[:16])
      for i, whole in mine for j, text in enumerate(guard.cut(whole)))
  for record in done:
    piece = next(pieces, None)
    if piece is None or (piece.text, piece.idea) != (record["text"], record.get("idea")):
      raise ValueError(
          f"{path} and the corpus, as this guard cuts it, part at document {record['document']}; give another --out.")
  total = len(range(shard, count, shards))
  with tqdm.tqdm(total=total, desc="label", unit="document") as bar:
    malicious, labelled = _malicious(done), len(done)
    bar.update(done[-1]["document"] // shards if done else 0)
    while chunk := list(itertools.islice(pieces, CHUNK * config.batch_size)):
      probabilities, shares = guard.p_unsafe([piece.text for piece in chunk])
      if not labelled and np.median(shares) < 0.5:
        bar.write(
            f'The guard gives "safe" and "unsafe" together {np.median(shares):.0%} of the probability of its first '
            "token: is it a guard, and is its chat template its own?")
      lines = [
          {"text": piece.text, "label": sources.LABELS[p >= config.threshold], "p_unsafe": p,
           "document": piece.document, "piece": piece.piece, "idea": piece.idea}
          for piece, p in zip(chunk, (round(p, 6) for p in probabilities.tolist()))]
      records.append(lines)
      malicious += _malicious(lines)
      labelled += len(lines)
      bar.update(chunk[-1].document // shards + 1 - bar.n)
    bar.update(total - bar.n)
  print(f"{path}: {total} documents in {labelled} pieces, {malicious} malicious ({malicious / labelled:.2%}).")


def _malicious(lines: Sequence[dict[str, Any]]) -> int:
  return sum(line["label"] == sources.LABELS[1] for line in lines)


def _record(path: pathlib.Path) -> pathlib.Path:
  """The file that says what `path` is made from."""
  return path.with_name(f"{path.name}.json")


def _check_own(path: pathlib.Path, claim: dict[str, Any]) -> None:
  """Raises ValueError unless `path` is not there yet, or was begun by this job."""
  if not path.exists():
    return
  if not _record(path).exists():
    raise ValueError(
        f"{path} exists, and {_record(path).name}, which says what it is made from, does not; give another --out.")
  there = json.loads(_record(path).read_text(encoding="utf-8"))
  different = [
      f"{key} is {value!r} now and {there.get(key)!r} there" for key, value in claim.items() if value != there.get(key)]
  if different:
    raise ValueError(
        f"{path} was begun with another corpus or other settings: {'; '.join(different)}. Give another --out, or what "
        "was given then to go on.")


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m saess_jax.data.label", description="Labels a corpus with a guard.")
  parser.add_argument("--corpus", required=True, help=".jsonl with a column text, or .txt; several with commas")
  parser.add_argument("--guard", required=True, help="Hub id or folder of a Llama Guard, or a .gguf file")
  parser.add_argument("--out", required=True, help="JSONL to write; with shards, -00000-of-00004 goes into its name")
  parser.add_argument("--threshold", type=float, default=LabelConfig.threshold, help="P(unsafe) that is malicious")
  parser.add_argument("--max-tokens", "--max_tokens", type=int, default=LabelConfig.max_tokens, help="of a piece")
  parser.add_argument("--batch-size", "--batch_size", type=int, default=LabelConfig.batch_size)
  parser.add_argument("--dtype", default=LabelConfig.dtype, help="bfloat16 or float32")
  parser.add_argument("--shard", type=int, default=0, help="which of --shards this job labels, from 0")
  parser.add_argument("--shards", type=int, default=1, help="jobs that divide the documents among them")
  options = vars(parser.parse_args(argv))
  shard, shards = options.pop("shard"), options.pop("shards")
  try:
    label(LabelConfig(**options), shard, shards)
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
