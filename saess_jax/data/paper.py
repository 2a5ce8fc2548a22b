"""The paper's SFT data (section on experiments), read from the files as their publishers ship them.

Benign: LIMA, and Alpaca without its safety items. Malicious: ALERT's prompts with their refusals. As many of each
label, 14,763 in the paper: all of ALERT. The files lie in one folder, `data.manual_dir`:

  python -m saess_jax.data.paper --manual-dir DIR               what is there, and where the rest comes from
  python -m saess_jax.data.paper --manual-dir DIR --download    fetches the rest

What the paper leaves open, and our choices [ours]: LIMA is kept whole, unless that leaves Alpaca less than half, and
Alpaca fills up by a seeded draw; of a dialogue the first exchange counts; a safety item is a row whose answer refuses,
or whose prompt is in ALERT; a hundredth of the rows, by a hash of the prompt, is the validation split; there is no test
split.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import types
import urllib.request
from typing import Any

import huggingface_hub
from absl import logging

from saess_jax.config import DataConfig
from saess_jax.data import sources
from saess_jax.data.sources import Row
from saess_jax.judges import PrefixJudge, RefusalJudge

SEED = 0  # Of the draws: the data set does not change with a run's seed.
VALIDATION = 100  # One row in so many.
_OPENING = 80  # Characters in which the phrases of `PrefixJudge` are looked for.


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where one file comes from.

  Attributes:
    names: what it may be called in the folder; a download takes the first.
    page: for people.
    hub: data set and file on the Hugging Face Hub; None: `url` is the file itself.
    licence: as its publisher states it; `how`: what has to be done before it can be fetched.
    rows: it has as published.
  """

  names: tuple[str, ...]
  page: str
  hub: tuple[str, str] | None
  url: str
  licence: str
  how: str
  rows: int


ORIGINS = types.MappingProxyType({
    "LIMA": Origin(
        ("lima.jsonl", "train.jsonl"), "https://huggingface.co/datasets/GAIR/lima", ("GAIR/lima", "train.jsonl"), "",
        "CC BY-NC-SA, or stricter where a source of it is", "accept its terms on the page and log in (`hf auth login`)",
        1030),
    "Alpaca": Origin(
        ("alpaca_data.json",), "https://github.com/tatsu-lab/stanford_alpaca", None,
        "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json", "CC BY-NC 4.0", "", 52002),
    "ALERT": Origin(
        ("alert_dpo.jsonl", "alert.jsonl"), "https://huggingface.co/datasets/Babelscape/ALERT_DPO",
        ("Babelscape/ALERT_DPO", "alert_dpo.jsonl"), "", "CC BY-NC-SA 4.0", "", 14763),
})


def locate(manual_dir: str | pathlib.Path) -> dict[str, pathlib.Path | None]:
  """The file of each of `ORIGINS` in the folder, None for what is not there."""
  folder = pathlib.Path(manual_dir).expanduser()
  found = {}
  for name, origin in ORIGINS.items():
    found[name] = next((folder / file for file in origin.names if (folder / file).is_file()), None)
  return found


def read(manual_dir: str | pathlib.Path, per_label: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
  """The rows, by split ("train", "validation"), and the sha256 of each file they come from.

  As many rows of each label: `per_label`, or what the files hold, which is said.

  Raises:
    FileNotFoundError: files are missing; each is named with its origin and licence.
    ValueError: `per_label` below 2, a malformed row (file, line and fault are named), or a label without two rows.
  """
  if per_label < 2:
    raise ValueError(f"data.paper_rows is {per_label}; expected 2 or more, of which one is for validation.")
  paths = locate(manual_dir)
  missing = [f"  {_describe(name)}" for name, path in paths.items() if path is None]
  if missing:
    raise FileNotFoundError(
        f"data.manual_dir {manual_dir} lacks\n" + "\n".join(missing) + "\nPut them there under one of these names, or "
        f"fetch them: python -m saess_jax.data.paper --manual-dir {manual_dir} --download")
  files = {name: path.read_bytes() for name, path in paths.items()}
  digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
  return _rows(*((paths[name].name, files[name]) for name in ("LIMA", "Alpaca", "ALERT")), per_label), digests


@functools.lru_cache(maxsize=1)  # Each split asks, and judging Alpaca's answers takes some seconds.
def _rows(lima: tuple[str, bytes], alpaca: tuple[str, bytes], alert: tuple[str, bytes], per_label: int):
  malicious = _unique(_alert(*alert))
  known = {sources.request_key(row.prompt) for row in malicious}
  dialogues, instructions = _unique(_lima(*lima)), _unique(_alpaca(*alpaca))
  for name, rows in (("LIMA", dialogues), ("Alpaca", instructions), ("ALERT", malicious)):
    if len(rows) != ORIGINS[name].rows:
      logging.warning("%s has %d different prompts; as published it has %d.", name, len(rows), ORIGINS[name].rows)
  dialogues = [row for row in dialogues if not is_safety_item(row, known)]
  said = {sources.request_key(row.prompt) for row in dialogues}
  instructions = [
      row for row in instructions if sources.request_key(row.prompt) not in said and not is_safety_item(row, known)]
  count = min(per_label, len(malicious), len(dialogues) + len(instructions))
  if count < per_label:
    logging.warning(
        "data.paper_rows asks for %d rows of each label; the files hold %d benign ones, safety items removed, and %d "
        "malicious ones: %d of each are taken.", per_label, len(dialogues) + len(instructions), len(malicious), count)
  if count < 2:
    raise ValueError(
        f"The files hold {len(dialogues) + len(instructions)} benign rows, safety items removed, and {len(malicious)} "
        "malicious ones; expected two of each at least. See `python -m saess_jax.data.paper` for the whole files.")
  whole = min(len(dialogues), max(count - len(instructions), count // 2))
  drawn = [
      row for rows, size in ((dialogues, whole), (instructions, count - whole), (malicious, count)) if size
      for row in sources.draw_evenly(rows, size, SEED)]
  return _hold_out(drawn)


def _hold_out(rows: list[Row]) -> dict[str, list[Row]]:
  """Of each label the rows whose prompts (`sources.request_key`) have the lowest hashes are for validation."""
  validation = set()
  for label in range(len(sources.LABELS)):
    prompts = [sources.request_key(row.prompt) for row in rows if row.label == label]
    prompts.sort(key=lambda prompt: hashlib.sha256(f"{SEED}\n{prompt}".encode()).digest())
    validation.update(prompts[: max(1, len(prompts) // VALIDATION)])
  held_out = [sources.request_key(row.prompt) in validation for row in rows]
  return {
      "train": [row for row, out in zip(rows, held_out) if not out],
      "validation": [row for row, out in zip(rows, held_out) if out]}


def is_safety_item(row: Row, malicious: set[str]) -> bool:
  """Whether a row of a benign set is none: its answer refuses, or its prompt is `malicious` (`sources.request_key`s).

  Words of a prompt decide nothing: without "How do I kill a process?" among the benign rows the words would be learned.
  """
  opening = row.response[:_OPENING]
  return (
      sources.request_key(row.prompt) in malicious or RefusalJudge().is_refusal(row.prompt, row.response)
      or PrefixJudge().is_refusal(row.prompt, opening))


def _lima(name: str, content: bytes) -> list[Row]:
  rows = []
  for line, record in sources.read_jsonl(_text(name, content), name):
    said = record.get("conversations")
    if not isinstance(said, list) or len(said) < 2 or not all(isinstance(turn, str) for turn in said):
      raise ValueError(
          f"{name}:{line}: conversations is {said!r:.60}; expected a list of two texts or more, as in LIMA's "
          "train.jsonl.")
    prompt, answer = (_filled(turn, f"{name}:{line}: turn {i} of conversations") for i, turn in enumerate(said[:2]))
    rows.append(Row(prompt, answer, 0, str(record.get("source") or ""), name))
  return rows


def _alpaca(name: str, content: bytes) -> list[Row]:
  try:
    records = json.loads(_text(name, content))
  except json.JSONDecodeError as error:
    raise ValueError(f"{name}:{error.lineno}: malformed JSON: {error}.") from error
  if not isinstance(records, list):
    raise ValueError(f"{name} holds a JSON {type(records).__name__}; expected a list, as in alpaca_data.json.")
  rows = []
  for number, record in enumerate(records, 1):
    where = f"{name}, item {number}"
    if not isinstance(record, dict):
      raise ValueError(f"{where} is a JSON {type(record).__name__}; expected an object.")
    prompt = _filled(record.get("instruction"), f"{where}: instruction")
    if record.get("input"):
      prompt = f"{prompt}\n\n{_filled(record['input'], f'{where}: input')}"
    if not isinstance(record.get("output"), str):
      raise ValueError(f"{where}: output is {record.get('output')!r}; expected text.")
    if record["output"].strip():  # A few have no answer, and so nothing to learn from.
      rows.append(Row(prompt, _filled(record["output"], f"{where}: output"), 0, "", name))
  return rows


def _alert(name: str, content: bytes) -> list[Row]:
  rows = []
  for line, record in sources.read_jsonl(_text(name, content), name):
    where = f"{name}:{line}"
    column = next((column for column in ("response", "chosen") if record.get(column)), None)
    if column is None:
      raise ValueError(
          f"{where}: no refusal; expected a column response or chosen, found {', '.join(record)}. The benchmark's file "
          f"has prompts alone: take {ORIGINS['ALERT'].page}.")
    prompt = _filled(record.get("prompt"), f"{where}: prompt")
    # Alpaca's template around these prompts alone would give their label away.
    bare = re.fullmatch(r"\s*### Instruction:\s*(.+?)\s*### Response:\s*", prompt, flags=re.S)
    answer = _filled(record[column], f"{where}: {column}")
    rows.append(Row(bare[1] if bare else prompt, answer, 1, str(record.get("category") or ""), name))
  return rows


def _text(name: str, content: bytes) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{name} is not UTF-8 text ({error}); fetch it again.") from error


def _filled(value: Any, where: str) -> str:
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{where} is {value!r:.60}; expected text.")
  sources.check_unicode(value, where)
  return value


def _unique(rows: list[Row]) -> list[Row]:
  """The first row of each prompt."""
  return list({row.prompt: row for row in reversed(rows)}.values())[::-1]


def _describe(name: str) -> str:
  origin = ORIGINS[name]
  how = f"; {origin.how}" if origin.how else ""
  return f"{name} ({' or '.join(origin.names)}): {origin.page}, licence {origin.licence}{how}"


def download(manual_dir: str | pathlib.Path) -> None:
  """Fetches what the folder lacks. Who calls this has accepted the licences.

  Raises:
    OSError: a publisher did not give a file; the others are fetched all the same.
  """
  folder, failed = pathlib.Path(manual_dir).expanduser(), []
  folder.mkdir(parents=True, exist_ok=True)
  for name in (name for name, path in locate(folder).items() if path is None):
    origin = ORIGINS[name]
    unfinished = folder / f"{origin.names[0]}.tmp"
    try:
      if origin.hub:
        fetched = huggingface_hub.hf_hub_download(*origin.hub, repo_type="dataset")
        unfinished.write_bytes(pathlib.Path(fetched).read_bytes())
      else:
        urllib.request.urlretrieve(origin.url, unfinished)
      unfinished.replace(folder / origin.names[0])
    except (OSError, ValueError) as error:
      failed.append(f"  {_describe(name)}\n    {str(error).strip().splitlines()[0]}")
  if failed:
    raise OSError("Not fetched:\n" + "\n".join(failed))


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.data.paper", description="The files of data.source=paper: state, origins, licences.")
  parser.add_argument("--manual-dir", "--manual_dir", default=DataConfig.manual_dir, help="folder of the files")
  parser.add_argument("--paper-rows", "--paper_rows", type=int, default=DataConfig.paper_rows, help="of each label")
  parser.add_argument("--download", action="store_true", help="fetch what is missing; you accept the licences")
  options = parser.parse_args(argv)
  try:
    if options.download:
      download(options.manual_dir)
    rows, digests = read(options.manual_dir, options.paper_rows)
  except (OSError, ValueError) as error:
    parser.exit(1, f"{error}\n")
  for name, path in locate(options.manual_dir).items():
    print(f"{_describe(name)}\n  {path}, sha256 {digests[name]}")
  for split, kept in rows.items():
    counts = collections.Counter((sources.LABELS[row.label], row.source) for row in kept)
    print(f"{split}: " + ", ".join(f"{count} {label} of {file}" for (label, file), count in sorted(counts.items())))


if __name__ == "__main__":
  main()
