"""What is wrong with a command line is said in one line; a defect keeps its traceback."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EVAL = ["eval.py", "--config", "configs/eval_quick.py"]


def run(tmp_path, *command):
  return subprocess.run(
      [sys.executable, *command, "--workdir", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command, said", [
    (["eval.py", "--config", "configs/none.py"], "configs/none.py"),
    ([*EVAL, "--config.max_row=1"], 'Did you mean "max_rows" instead of "max_row"?'),
    ([*EVAL, "more"], "unexpected arguments ['more']"),
    ([*EVAL, "--config.attacks=('prefill_x',)"], "attack is 'prefill_x'; expected one of direct,"),
    (["train.py", "--config", "configs/tiny.py", "--config.data.source=none.csv"], "none.csv does not exist"),
])
def test_bad_input_is_said_without_a_traceback_and_leaves_nothing(command, said, tmp_path):
  ended = run(tmp_path, *command)
  assert ended.returncode == 2
  assert f"{command[0]}: error: " in ended.stderr and said in ended.stderr and "Traceback" not in ended.stderr
  assert not list(tmp_path.iterdir())


def test_a_defect_keeps_its_traceback(tmp_path):
  program = tmp_path / "defect.py"
  program.write_text("from saess_jax import command\ncommand.run(lambda config: int('x'))\n")
  ended = subprocess.run(
      [sys.executable, program, "--config", "configs/tiny.py"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
      capture_output=True, text=True, check=False)
  assert ended.returncode == 1 and "Traceback" in ended.stderr and "invalid literal" in ended.stderr
