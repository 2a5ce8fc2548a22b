"""Streams equal whole responses, take nothing back, and the terminal shows them."""

import functools
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from saess_jax import config, decode, generate, hf, model, terminal
from saess_jax.config import SafetyConfig
from saess_jax.sampling import SamplingConfig

TINY = config.model_config("tiny", scan_layers=False)
REQUEST = "why?"


def make(params, safety, **changes):
  return generate.Generator(
      model.Llama(TINY), params, hf.byte_tokenizer(), safety, SamplingConfig(temperature=0.9), max_new_tokens=40,
      batch_size=1, **changes)


@pytest.fixture(scope="module")
def threshold(tiny_params):
  """Prefix -> one that most verdicts on windows pass, so that tau of them run, and the query's does not."""
  @functools.cache
  def of(prefix):
    response = make(tiny_params, SafetyConfig(threshold=1.0)).respond([REQUEST], [prefix])[0]
    return max(response.initial_prob + 1e-4, float(np.nanquantile(response.cls_prob, 0.2)))
  return of


CASES = [{"tau": 3, "dependency": "low"}] + [
    dict(rollback=rollback, tau=tau, **more) for rollback in (False, True)
    for tau, more in [(1, {}), (4, {}), (2, {"schedule": "periodic(3)"}), (3, {"dependency": "high"}),
                      (3, {"rule2_keeps_query": True})]]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.slow), "Sure, "])
def test_a_stream_is_the_response_in_pieces(tiny_params, threshold, case, prefix):
  generator = make(tiny_params, SafetyConfig(threshold=threshold(prefix), **case))
  whole, compiled = generator.respond([REQUEST], [prefix])[0], generator._advance._cache_size()
  assert (whole.intervened_at > 0) == (case.get("dependency") != "low")  # The case is not empty.
  for chunk in (1, 3, 64):
    pieces = list(generator.stream(REQUEST, prefix, chunk))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert all("".join(piece.tokens) == piece.text for piece in pieces)
    ids = [token for piece in pieces for token in piece.ids]
    assert ids == whole.ids[:len(ids)] and len(whole.ids) - len(ids) <= 1  # All but the end of the turn.
    assert len(ids) == sum(len(piece.cls_prob) for piece in pieces) == sum(len(piece.phase) for piece in pieces)
    assert pieces[-1].intervened_at == whole.intervened_at and pieces[0].initial_prob == whole.initial_prob
  assert generator._advance._cache_size() <= compiled + 1


def test_only_what_may_be_cut_is_held_back(tiny_params, threshold):
  """Token by token: an open alarm waits where rollback may cut it, and nowhere else."""
  def longest(**how):
    generator = make(tiny_params, SafetyConfig(threshold=threshold(""), tau=30, **how))
    return max(len(piece.ids) for piece in generator.stream(REQUEST, chunk=1))
  free = longest(rollback=False)  # Characters of several bytes wait too.
  assert longest(rollback=True) > free == longest(rollback=True, dependency="low")


def test_a_character_comes_whole(tiny_params):
  """The bytes of one character are several tokens: the first add nothing, the last adds it."""
  prefix, generator = "a\u00e9\u4e16", make(tiny_params, None)
  for chunk in (1, 2, 4):
    pieces = list(generator.stream(REQUEST, prefix, chunk))
    assert "".join(piece.text for piece in pieces).startswith(prefix)
    tokens = [text for piece in pieces for text in piece.tokens]
    assert tokens[:6] == ["a", "", "\u00e9", "", "", "\u4e16"]
    assert all(not piece.text.endswith("\ufffd") for piece in pieces[:-1])


def test_plain_streams_ask_no_verdicts(tiny_params):
  generator = make(tiny_params, None)
  pieces = list(generator.stream("hello"))
  assert "".join(piece.text for piece in pieces) == generator.respond(["hello"])[0].text
  assert all(np.isnan(p) for piece in pieces for p in piece.cls_prob)
  with pytest.raises(ValueError, match="chunk is 0"):
    next(generator.stream("hello", chunk=0))


@pytest.mark.slow
def test_pieces_are_a_whole(tiny_params):
  """start, advance by uneven steps and finish are decode."""
  llama, safety = model.Llama(TINY), SafetyConfig(threshold=0.5)
  prompt = decode.pad_prompts([(np.asarray([5, 6, 0, 7]), np.asarray([2, 3, 1, 4]))] * 2)
  how = decode.decode_config(hf.byte_tokenizer(), safety, SamplingConfig(1.0), 20)
  key = jax.random.key(3)
  state = decode.start(llama, tiny_params, prompt, key, how)
  for until in (1, 2, 9, 9, 400):
    state = decode.advance(llama, tiny_params, prompt, key, how, state, until)
  jax.tree.map(
      np.testing.assert_array_equal, decode.finish(state), decode.decode(llama, tiny_params, prompt, key, how))


NAN = float("nan")


def piece(text, tokens, probabilities, intervened_at=-1, initial=0.25, benign=9):
  """The first `benign` of its tokens are that, the others came when the alarm was confirmed."""
  phase = ["benign" if i < benign else "confirmed" for i in range(len(tokens))]
  return generate.Chunk(text, [1] * len(tokens), tokens, probabilities, phase, initial, intervened_at)


def test_terminal_text():
  out = io.StringIO()
  said = terminal.show(
      [piece("The ", ["The", " "], [0.0, 1.0]), piece("wa", ["wa"], [0.9], 3, benign=0),
       piece("y", ["y"], [NAN], 3, benign=0)],
      out, colours=False)
  assert said == "The way"
  assert out.getvalue() == "[query: P(malicious) 0.25]\nThe wa [intervention after token 3] y\n"
  out = io.StringIO()  # The second token brought the verdict; where rollback cut it, the refusal stands in its place.
  terminal.show([piece("abc", ["a", "b", "c"], [0.0, 0.9, NAN], 2, benign=1)], out, colours=False)
  terminal.show([piece("Sorry", ["So", "rry"], [NAN, NAN], 3, benign=0)], out, colours=False)
  terminal.show([piece("abSorry", ["a", "b", "So", "rry"], [0.0, 0.1, NAN, NAN], 3, benign=2)], out, colours=False)
  assert out.getvalue().split("\n")[1::2] == [
      "ab [intervention after token 2] c", " [intervention after token 3] Sorry",
      "ab [intervention after token 3] Sorry"]
  out = io.StringIO()
  terminal.show([piece("ab", ["a", "b"], [0.0, 1.0], 0)], out, colours=True)
  assert out.getvalue() == (
      "[query: P(malicious) 0.25]\n[intervention by the query]\n"
      "\x1b[38;2;60;190;80ma\x1b[0m\x1b[38;2;230;60;80mb\x1b[0m\n")
  out = io.StringIO()  # A model does not steer the terminal.
  said = terminal.show([piece("a\x1b[2Jb\n", ["a\x1b[2Jb\n"], [NAN])], out, colours=False)
  assert said == "a\x1b[2Jb\n" and out.getvalue().endswith("\na\N{REPLACEMENT CHARACTER}[2Jb\n\n")
  # A first piece without text, none at all, and an intervention that the last, empty piece tells of.
  out = io.StringIO()
  terminal.show([piece("", [""], [0.1]), piece("\u00e9", ["\u00e9"], [0.2]), piece("", [], [], 2)], out, colours=False)
  assert out.getvalue() == "[query: P(malicious) 0.25]\n\u00e9 [intervention after token 2] \n"
  out = io.StringIO()
  terminal.show([piece("", [], [])], out, colours=True)
  assert out.getvalue() == "[query: P(malicious) 0.25]\n\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of a run of one step."""
  folder = tmp_path_factory.mktemp("run")
  rows = [{"prompt": f"request {i}", "response": "no", "label": i % 2} for i in range(40)]
  (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  from saess_jax import train
  train.train_and_evaluate(config.TrainConfig(
      model="tiny", model_overrides={"vocab_size": 260}, max_steps=1, rollouts=config.RolloutConfig(enabled=False),
      data=config.DataConfig(
          source=str(folder / "rows.jsonl"), max_length=128, max_response=8, buckets=(128,), batch_size=8),
      mesh=config.MeshConfig(1, 1, 1) if jax.device_count() == 1 else config.MeshConfig()), folder / "run")
  return folder / "run"


def ask(*arguments, stdin=""):
  return subprocess.run(
      [sys.executable, "-m", "saess_jax.generate", *arguments], input=stdin, capture_output=True, text=True,
      timeout=300, check=False)


@pytest.mark.slow
def test_command_line(trained):
  one = ask("--checkpoint", str(trained), "--prompt", "hello", "--max-new-tokens", "8")
  assert one.returncode == 0 and one.stdout.startswith("[query: P(malicious) 0."), one.stderr
  assert "\x1b" not in one.stdout  # No terminal, no colours.
  chat = ask("--checkpoint", str(trained), "--no-safety", "--max_new_tokens", "8", "chat",
             stdin="hello\n\nand?\n/new\nhello\n/quit\nnot read\n")
  answers = chat.stdout.split("\n")
  assert chat.returncode == 0 and "query" not in chat.stdout and answers[0] == answers[2] != ""
  missing = ask("--checkpoint", str(trained / "nowhere"), "--prompt", "hello")
  assert missing.returncode == 2 and "what a training run or saess_jax.convert wrote" in missing.stderr
  assert "does not exist; expected" in missing.stderr
  assert "Traceback" not in missing.stderr
  empty = ask("--checkpoint", str(trained), "--prompt", " ")
  assert empty.returncode == 2 and "expected text" in empty.stderr
  cold = ask("--checkpoint", str(trained), "--prompt", "hello", "--temperature", "-1")
  assert cold.returncode == 2 and "temperature is -1.0; expected 0 or more" in cold.stderr
