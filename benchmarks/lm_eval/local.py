"""Local files as the harness's data sets; the environment says where they are, for none of them is in the project."""

from __future__ import annotations

import csv
import json
import os

import datasets


def _path(variable: str, what: str) -> str:
  path = os.environ.get(variable, "")
  if not path:
    raise ValueError(f"{variable} is not set; export the path of {what}.")
  return path


def mmlu(**_):
  """A CSV with the columns prompt (question and choices A to D) and answer (a letter)."""
  with open(_path("SAESS_MMLU", "a CSV with prompt and answer"), encoding="utf-8", newline="") as file:
    rows = [{"prompt": row["prompt"], "answer": row["answer"].strip()} for row in csv.DictReader(file)]
  return {"test": datasets.Dataset.from_list(rows)}


def gsm8k(**_):
  """JSONL with question and answer ("... #### 42")."""
  with open(_path("SAESS_GSM8K", "a JSONL file with question and answer"), encoding="utf-8") as file:
    rows = [json.loads(line) for line in file if line.strip()]
  rows = [{"question": row["question"], "answer": row["answer"].split("####")[-1].strip()} for row in rows]
  return {"test": datasets.Dataset.from_list(rows)}
