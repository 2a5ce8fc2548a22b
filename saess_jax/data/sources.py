"""Rows of labelled prompts: the sets that ship with the package, and a user's CSV, JSONL and text files.

A file needs one prompt column; names are matched whatever their case, and where a file has several of them the first
in the order of `PROMPT_COLUMNS` is the prompt (`RESPONSE_COLUMNS` likewise, both optional and possibly empty); in stage
"pretrain" it is a document, by custom in a column `text`. A filled `input` column beside an `instruction` prompt
(Alpaca) is appended to it after a blank line, a filled `contextstring` beside a `behavior` (HarmBench's contextual
behaviors) stands before it as HarmBench puts it. `label` takes one of `LABEL_WORDS`. A `.txt` file holds one prompt a
line and no labels.

A column `split` (train, validation or test), of every row or of none, says where rows belong; without one
`split_rows` divides them.

A `target` beside a `goal` (AdvBench, JailbreakBench) is what white-box attacks want to hear in answer to it.

A row that names a request (`REQUEST_COLUMNS`) beside its prompt is an attack's: the prompt asks for what is named.
Training reads its prompt, as of any row (`read_rows`); an evaluation what it asks for (`read_requests`).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.resources
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging

SPLITS = ("train", "validation", "test")
LABELS = ("benign", "malicious")  # The index is `Row.label`.
SETS = ("plain", "subtle")  # Folders of this package beside "embedded", named like files (docs/data.md).
PROMPT_COLUMNS = ("prompt", "goal", "behavior", "instruction", "question", "forbidden_prompt", "text")
# What an attack's row asks for, by the first column that is filled, and what it sends for it; the last ones are PAP's.
REQUEST_COLUMNS = ("goal", "behavior", "forbidden_prompt", "bad_request")
ATTACK_COLUMNS = ("prompt", "ss_prompt")
RESPONSE_COLUMNS = ("response", "output", "answer", "refusal", "safe_response")
MAX_TARGET = 500
LABEL_WORDS = {
    "benign": 0, "safe": 0, "harmless": 0, "0": 0, "false": 0,
    "malicious": 1, "unsafe": 1, "harmful": 1, "1": 1, "true": 1,
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt. `response` is the refusal or answer to train on, "" where the file gives none."""

  prompt: str
  response: str
  label: int  # 1 malicious, 0 benign.
  category: str
  source: str  # File name, or what the embedded set says.
  # What it is about: rows of one idea, a request and its harmless twins, go into one split. "": the prompt.
  idea: str = dataclasses.field(default="", compare=False, repr=False)
  # What white-box attacks want an answer to begin with; "": the file names nothing.
  target: str = dataclasses.field(default="", compare=False, repr=False)
  # Where its file puts it; "": that is left to `split_rows`.
  split: str = dataclasses.field(default="", compare=False, repr=False)


def read_rows(paths: str, default_label: str | int | None = None) -> list[Row]:
  """Rows of one file, or of several separated by commas, in file order.

  Args:
    paths: "a.csv" or "a.csv,b.jsonl"; endings .csv, .jsonl, .txt; "~" is the home folder. One of `SETS` stands for all
      its files.
    default_label: the label (a word or number of `LABEL_WORDS`) of rows that have none.

  Raises:
    FileNotFoundError: a file that does not exist.
    ValueError: another ending, an empty file, a malformed row (file, line and fault are named), no prompt column, an
      unknown label word or split, two columns of one name, a missing label, without a `default_label` or in a file
      whose other rows have one, or a missing split in such a file.
  """
  names = [name.strip() for name in paths.split(",") if name.strip()]
  if not names:
    raise ValueError(f"No data file in {paths!r}; expected a path, or several separated by commas.")
  default = None if default_label is None else _label(default_label, "default_label")
  files = [file for name in names for file in _files_of(name)]
  return [row for file in files for row in _rows(read_records(file, _READERS), file.name, default)]


def read_requests(path: str, default_label: str | int) -> list[Row]:
  """Rows of one file, as `read_rows` gives them, but of attacks what they ask for, and each request of a label once, by
  its first row: white space at the ends and case aside, as attacks are matched to it. Also of a JailbreakBench artifact
  (.json).

  Raises:
    FileNotFoundError, ValueError: as `read_rows` and `read_artifact`.
  """
  file, default = pathlib.Path(path.strip()).expanduser(), _label(default_label, "default_label")
  records = []
  for number, record in read_records(file, _READERS | {".json": read_artifact}):
    fields = _distinct(record, f"{file.name}:{number}")
    request = request_of(fields) if any(column in fields for column in ATTACK_COLUMNS) else None
    if request is not None:  # A response beside it is one to the attack.
      kept = ("label", "category", "goal", "target")
      record = {"prompt": request} | {column: fields.get(column) for column in kept}
    # All rows are asked, wherever a training run would put them.
    records.append((number, {name: value for name, value in record.items() if name.strip().lower() != "split"}))
  rows: dict[tuple[str, int], Row] = {}
  for row in _rows(records, file.name, default):
    rows.setdefault((request_key(row.prompt), row.label), row)
  return list(rows.values())


def request_of(fields: dict[str, Any]) -> Any:
  """What an attack's row says that it asks for, by its columns in lower case; None where it does not."""
  column = next((column for column in REQUEST_COLUMNS if fields.get(column)), None)
  return None if column is None else _in_context(fields, column)


def _in_context(fields: dict[str, Any], column: str) -> Any:
  """A column's text with what else belongs to it: Alpaca's input behind, HarmBench's context before."""
  text = fields[column]
  if column == "instruction" and fields.get("input"):
    return f"{text}\n\n{fields['input']}"
  if column == "behavior" and fields.get("contextstring"):
    return f"{fields['contextstring']}\n\n---\n\n{text}"
  return text


def request_key(request: str) -> str:
  """Equal for requests that count as the same."""
  return request.strip().casefold()


def embedded_rows(split: str, path: str | None = None) -> list[Row]:
  """Rows of the set that ships with the package, a file a harm category; `path` names another folder of the same form.

  Raises:
    ValueError: an unknown split, a malformed row, or a split without rows.
  """
  _check_split(split)
  rows = _embedded_splits(path)[split]
  if not rows:
    raise ValueError(f"{pathlib.Path(path or 'embedded').name} has no {split} rows.")
  return rows


def split_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Divides rows 80/10/10 into train, validation and test by a hash of the idea, or else the prompt, but for rows whose
  file says where they belong.

  A prompt stays in its split when rows are added or reordered, and equal ones (`request_key`) are never on both sides:
  they go where a file puts one of them, or else where the first of them is. Nor are rows of one idea, but for such
  prompts and where files say so. The shares of a small file are therefore approximate; a split without rows is left
  out.

  Raises:
    ValueError: a prompt that files put into two splits.
  """
  at: dict[bytes, str] = {}
  for row in (row for row in rows if row.split):
    if (split := at.setdefault(_digest(row), row.split)) != row.split:
      raise ValueError(
          f"The prompt {row.prompt[:100]!r} is for {split} in one row and for {row.split} in another, of {row.source}; "
          "keep one of them.")
  for row in rows:
    at.setdefault(_digest(row), _split_of(request_key(row.idea or row.prompt)))
  by_split = {split: [row for row in rows if at[_digest(row)] == split] for split in SPLITS}
  return {split: kept for split, kept in by_split.items() if kept}


def read_splits(source: str) -> dict[str, list[Row]]:
  """Rows by split of "embedded", of files (`read_rows`, `split_rows`), or of both: "embedded,plain,mine.csv".

  A warning says how many rows of files' train split are prompts of the embedded test split.

  Raises:
    ValueError, FileNotFoundError: what `read_rows` raises.
  """
  names = [name.strip() for name in source.split(",")]
  files = ",".join(name for name in names if name != "embedded")
  by_split, embedded = split_rows(read_rows(files)) if files else {}, _embedded_splits()
  tests = {request_key(row.prompt) for row in embedded["test"]}
  known = [row for row in by_split.get("train", ()) if request_key(row.prompt) in tests]
  if known:
    logging.warning(
        "%d training rows of %s are prompts of the embedded test split, the first of them %r (%s): figures of a model "
        "that is trained on them say nothing on that split.", len(known), files, known[0].prompt[:100], known[0].source)
  if "embedded" not in names:
    return by_split
  return {split: rows + by_split.get(split, []) for split, rows in embedded.items()}


def load_split(source: str, split: str) -> list[Row]:
  """One split of what `read_splits` reads.

  Raises:
    ValueError, FileNotFoundError: an unknown split, one without rows, or what `read_splits` raises.
  """
  _check_split(split)
  by_split = read_splits(source)
  if split not in by_split:
    rows = sum(map(len, by_split.values()))
    raise ValueError(f"None of the {rows} rows of {source} falls into the {split} split; add rows.")
  return by_split[split]


def require_two_classes(rows: Sequence[Row], where: str) -> None:
  """Raises ValueError unless `rows` holds both labels: a classifier cannot be trained on one."""
  counts = [sum(row.label == label for row in rows) for label in range(len(LABELS))]
  if not all(counts):
    raise ValueError(
        f"{where} has {counts[0]} benign and {counts[1]} malicious rows; training needs both. Name a second file in "
        "data.source, separated by a comma, or check the label column.")


def require_one_label(rows: Iterable[Row]) -> None:
  """Raises ValueError for a prompt that is there under both labels, white space at the ends and case aside."""
  first: dict[bytes, Row] = {}
  for row in rows:
    other = first.setdefault(_digest(row), row)
    if row.label != other.label:
      raise ValueError(
          f"The prompt {row.prompt[:100]!r} is {LABELS[other.label]} in {other.source} and {LABELS[row.label]} in "
          f"{row.source}; keep one of them.")


def draw_evenly(rows: Sequence[Row], per_label: int, seed: int = 0, written: float = 0.0) -> list[Row]:
  """At most `per_label` rows of each label, drawn at random and kept in order. 0: all rows.

  `written` is the least share of `per_label` that have a response, where there are as many.
  """
  if not per_label:
    return list(rows)
  rng, kept = np.random.default_rng(seed), []
  for label in range(len(LABELS)):
    drawn = [int(i) for i in rng.permutation([i for i, row in enumerate(rows) if row.label == label])]
    first = [i for i in drawn if rows[i].response][: round(written * per_label)]
    kept.extend(list(dict.fromkeys(first + drawn))[:per_label])
  return [rows[i] for i in sorted(kept)]


def _embedded_splits(path: str | None = None) -> dict[str, list[Row]]:
  """All rows of `embedded_rows` by their split, each file read once."""
  folder = importlib.resources.files(__package__) / "embedded" if path is None else pathlib.Path(path)
  by_split = {split: [] for split in SPLITS}
  for file in sorted((entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")), key=lambda f: f.name):
    for line, record in read_jsonl(file.read_text(encoding="utf-8"), file.name):
      _check_split(record.get("split"), f"{file.name}:{line}: ")
      by_split[record["split"]].append(dataclasses.replace(
          _row(record, file.name, line, None), source=str(record.get("source", file.name))))
  return by_split


def _files_of(name: str) -> list[pathlib.Path]:
  if name in SETS:
    return sorted((pathlib.Path(__file__).parent / name).glob("*.jsonl"))
  return [pathlib.Path(name).expanduser()]


def _check_split(split: Any, where: str = "") -> None:
  if split not in SPLITS:
    raise ValueError(f"{where}split is {split!r}; expected one of {', '.join(SPLITS)}.")


def _digest(row: Row) -> bytes:
  """Equal for rows whose prompts count as the same; a prompt may be a whole document."""
  return hashlib.sha256(request_key(row.prompt).encode()).digest()


def _split_of(about: str) -> str:
  share = int.from_bytes(hashlib.sha256(f"0\n{about}".encode()).digest()[:8], "big") / 2**64
  return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def read_records(path: pathlib.Path, readers: dict[str, Callable]) -> list[tuple[int, dict[str, Any]]]:
  """The rows of a file by column, each with its number, as the reader of its ending gives them.

  Raises:
    ValueError: an ending without a reader, text that is not UTF-8, no rows, or what the reader raises.
    FileNotFoundError: no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected one file, {', '.join(readers)}.")
  if path.suffix.lower() not in readers:
    raise ValueError(f"{path} ends in {path.suffix!r}; expected {', '.join(readers)}.")
  try:
    text = path.read_text(encoding="utf-8-sig")  # A byte order mark would become part of the first column's name.
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
  records = readers[path.suffix.lower()](text, path.name)
  if not records:
    raise ValueError(f"{path} is empty: it has no rows.")
  return records


def read_csv(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
  """The rows of a CSV text by column, each with the number of its last line.

  Raises:
    ValueError: malformed CSV, or a row with more or fewer fields than columns, with its line and `name`.
  """
  reader = csv.DictReader(io.StringIO(text), strict=True)
  records = []
  try:
    columns = [column for column in reader.fieldnames or () if column.strip()]
    if len(set(columns)) < len(columns):
      raise ValueError(f"{name}: two columns have one name, of {', '.join(columns)}.")
    for record in reader:
      if None in record:
        raise ValueError(
            f"{name}:{reader.line_num}: {len(record[None])} more fields than the {len(reader.fieldnames)} columns; "
            "put text that contains commas in double quotes.")
      missing = [column for column, value in record.items() if value is None]
      if missing:
        raise ValueError(f"{name}:{reader.line_num}: no field for column {', '.join(missing)}.")
      records.append((reader.line_num, record))
  except csv.Error as error:
    raise ValueError(f"{name}:{reader.reader.line_num}: malformed CSV: {error}.") from error
  return records


def read_jsonl(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
  """The objects of a JSONL text with their line numbers; blank lines are left out.

  Raises:
    ValueError: a line that is no JSON object, with its number and `name`.
  """
  records = []
  for line, content in enumerate(text.split("\n"), 1):  # Not splitlines: JSON strings may hold U+2028 as it is.
    if not content.strip():
      continue
    try:
      record = json.loads(content)
    except json.JSONDecodeError as error:
      raise ValueError(f"{name}:{line}: malformed JSON: {error}.") from error
    if not isinstance(record, dict):
      raise ValueError(f"{name}:{line}: a JSON {type(record).__name__}; expected one object a line.")
    records.append((line, record))
  return records


def _read_txt(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
  del name
  return [(line, {"prompt": content}) for line, content in enumerate(text.split("\n"), 1) if content.strip()]


def read_artifact(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
  """The attacks of a JailbreakBench artifact (Chao et al. 2024) with their numbers, from 1: {"parameters": ...,
  "jailbreaks": [{"index", "goal", "behavior", "prompt", ...}, ...]}.

  Raises:
    ValueError: malformed JSON, or another schema.
  """
  try:
    whole = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"{name} is malformed JSON: {error}.") from error
  rows = whole.get("jailbreaks") if isinstance(whole, dict) else None
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{name} is no JailbreakBench artifact; expected {{"jailbreaks": [{{"goal", "prompt"}}, ...]}}.')
  return list(enumerate(rows, 1))


_READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".txt": _read_txt}


def fields_of(record: dict[str, Any]) -> dict[str, Any]:
  """A row by its columns' names in lower case, without the white space around them."""
  return {str(column).strip().lower(): value for column, value in record.items()}


def _distinct(record: dict[str, Any], where: str) -> dict[str, Any]:
  """`fields_of`; ValueError for two columns that it would make one."""
  fields = fields_of(record)
  if len(fields) < len(record):
    raise ValueError(f"{where}: two columns have one name, case and white space aside, of {', '.join(record)}.")
  return fields


def _rows(records: Sequence[tuple[int, dict[str, Any]]], name: str, default_label: int | None) -> list[Row]:
  """The rows of one file: where any has a label, all must, and where any has a split."""
  labelled = any(fields_of(record).get("label") not in (None, "") for _, record in records)
  rows = [_row(record, name, line, None if labelled else default_label) for line, record in records]
  if any(row.split for row in rows) and not all(row.split for row in rows):
    line = next(line for (line, _), row in zip(records, rows) if not row.split)
    raise ValueError(f"{name}:{line}: no split, which other rows have; fill the column, or leave it out.")
  return rows


def _row(record: dict[str, Any], name: str, line: int, default_label: int | None) -> Row:
  where = f"{name}:{line}"
  fields = _distinct(record, where)
  column = next((column for column in PROMPT_COLUMNS if column in fields), None)
  if column is None:
    raise ValueError(
        f"{where}: no prompt column; expected one of {', '.join(PROMPT_COLUMNS)}, found {', '.join(record)}.")
  if not isinstance(fields[column], str) or not fields[column].strip():
    raise ValueError(f"{where}: {column} is {fields[column]!r}; expected text.")
  prompt = _in_context(fields, column)
  check_unicode(prompt, f"{where}: {column}")
  response = next((fields[column] for column in RESPONSE_COLUMNS if str(fields.get(column) or "").strip()), "")
  if not isinstance(response, str):
    raise ValueError(f"{where}: the response is {response!r}; expected text.")
  check_unicode(response, f"{where}: the response")
  label = default_label
  if fields.get("label") not in (None, ""):
    label = _label(fields["label"], where)
  if label is None:
    raise ValueError(
        f"{where}: no label. Fill a column label ({' or '.join(LABELS)}) in every row or, where all have the same, "
        "give a default_label and no column.")
  target = fields.get("target") or "" if fields.get("goal") else ""  # Beside anything else it may be a number.
  if not isinstance(target, str) or len(target) > MAX_TARGET:
    raise ValueError(
        f"{where}: target is {target!r:.60}; expected what an answer to the goal begins with, a text of {MAX_TARGET} "
        "characters at most.")
  category, idea = (str(fields.get(column) or "") for column in ("category", "idea"))
  for column, text in (("target", target), ("category", category), ("idea", idea)):
    check_unicode(text, f"{where}: {column}")
  if (split := str(fields.get("split") or "").strip().lower()):
    _check_split(split, f"{where}: ")
  return Row(prompt, response, label, category, name, idea, target.strip(), split)


def check_unicode(text: str, what: str) -> None:
  """Raises ValueError for half a surrogate pair, which an emoji that was cut leaves in JSON: no tokenizer reads it."""
  if any("\ud800" <= character <= "\udfff" for character in text):
    raise ValueError(f"{what} is {text!r}, with half a surrogate pair in it, which is no character; take it out.")


def _label(value: str | int, where: str) -> int:
  word = str(value).strip().lower()
  if word not in LABEL_WORDS:
    raise ValueError(f"{where}: label is {value!r}; expected one of {', '.join(LABEL_WORDS)}.")
  return LABEL_WORDS[word]
