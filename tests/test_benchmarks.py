"""Benchmarks are run by hand: here only that they still fit the library that they import."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py") if path.name != "side_by_side.py"))
def test_a_benchmark_begins(name):
  run = subprocess.run(
      [sys.executable, FOLDER / name, "--help"], cwd=FOLDER.parent, capture_output=True, text=True, check=False)
  assert run.returncode == 0 and "usage" in run.stdout, run.stderr[-2000:]
