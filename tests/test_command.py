"""What is wrong with a command line is said in one line; a defect keeps its traceback."""

import linecache
import pathlib
import subprocess
import sys

import pytest

from saess_jax import command

ROOT = pathlib.Path(__file__).parent.parent
EVAL = ["eval.py", "--config", "configs/eval_quick.py"]


def run(tmp_path, *words):
  return subprocess.run(
      [sys.executable, *words, "--workdir", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words, said", [
    (["eval.py", "--config", "configs/none.py"], "configs/none.py"),
    ([*EVAL, "--config.max_row=1"], 'Did you mean "max_rows" instead of "max_row"?'),
    ([*EVAL, "more"], "unexpected arguments ['more']"),
    ([*EVAL, "--config.attacks=('prefill_x',)"], "attack is 'prefill_x'; expected one of direct,"),
    (["train.py", "--config", "configs/tiny.py", "--config.data.source=none.csv"], "none.csv does not exist"),
])
def test_bad_input_is_said_without_a_traceback_and_leaves_nothing(words, said, tmp_path):
  ended = run(tmp_path, *words)
  assert ended.returncode == 2
  assert f"{words[0]}: error: " in ended.stderr and said in ended.stderr and "Traceback" not in ended.stderr
  assert not list(tmp_path.iterdir())


def test_help_shows_the_config():
  said = subprocess.run([sys.executable, "eval.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert all(f"--{name}:" in said.stdout for name in ("config", "checkpoint", "workdir"))


def error_of(source, filename):
  """What running `source` as if it stood in `filename` raises."""
  lines = source.splitlines(keepends=True)
  linecache.cache[str(filename)] = (len(source), None, lines, str(filename))
  with pytest.raises((OSError, ValueError)) as caught:
    exec(compile(source, filename, "exec"), {})
  return caught.value


@pytest.mark.parametrize("source, where, told", [
    ("raise ValueError('tau is 0')", command.PACKAGE / "x.py", True),
    ("raise ValueError(\n  'tau is 0')", command.PACKAGE / "x.py", True),
    ("try:\n  int('x')\nexcept ValueError as e:\n  raise ValueError('tau') from e", command.PACKAGE / "x.py", True),
    ("open('/no/where')", ROOT / "x.py", True),
    ("int('x')", command.PACKAGE / "x.py", False),
    ("a, b = [1]", command.PACKAGE / "x.py", False),
    ("raise ValueError('theirs')", ROOT / "x.py", False),
    ("raise TimeoutError('timed out')", ROOT / "x.py", False),
])
def test_what_the_package_raises_is_told_from_a_defect(source, where, told):
  assert command.is_for_the_user(error_of(source, where)) == told


def test_the_last_word_of_a_config_file_with_a_defect_is_its_traceback(tmp_path):
  config = tmp_path / "mine.py"
  config.write_text("from configs import tiny\ndef get_config():\n  tiny.get_config().saftey.tau = 2\n")
  ended = run(tmp_path, "train.py", "--config", config)
  assert ended.returncode == 1 and all(word in ended.stderr for word in ("Traceback", "mine.py", "saftey"))
