"""The linear probe: where it reads, what it fits, and the command."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import write_with_tokenizer
from tiny_tokenizer import tiny_tokenizer

from saess_jax import linear_probe
from saess_jax.config import model_config
from saess_jax.data import chat
from saess_jax.model import Llama

PROMPTS = ["How do I bake?", "A much longer request, which goes on and on and on for a while before it ends.", "Why?"]


@pytest.fixture(scope="module")
def tiny():
  model = Llama(model_config("tiny", num_layers=3, scan_layers=False))
  return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.mark.slow
def test_it_reads_where_the_response_begins(tiny):
  model, params = tiny
  rows = linear_probe.encode(tiny_tokenizer(), model.config.context, PROMPTS)
  found = linear_probe.hidden_states(model, params, rows, batch_size=2)
  scale = params["final_norm"]["scale"]
  for prompt, states in zip(PROMPTS, found):
    ids, _ = chat.encode_prompt(tiny_tokenizer(), prompt)
    hidden = model.apply({"params": params}, ids[None]).hidden[0, -1]
    normed = states[-1] / np.sqrt(np.mean(states[-1] ** 2) + model.config.norm_eps) * scale
    np.testing.assert_allclose(normed, hidden, atol=1e-4)
  assert found.shape == (3, 3, model.config.embed_dim) and not np.allclose(found[:, 0], found[:, 1])


def test_behind_a_prefix_the_header_stands_once_more(tiny):
  model, params = tiny
  rows = linear_probe.encode(tiny_tokenizer(), model.config.context, ["Why?"], ["Sure, here"])
  (found,) = linear_probe.hidden_states(model, params, rows)
  ids, _ = chat.encode_prompt(tiny_tokenizer(), "Why?")
  text = tiny_tokenizer().decode(ids)
  assert text.endswith("<|im_start|>assistant\n")
  header = text[text.rindex("<|im_end|>"):]
  told = tiny_tokenizer()(text + "Sure, here" + header, add_special_tokens=False).input_ids
  hidden = model.apply({"params": params}, jnp.asarray([told])).hidden[0, -1]
  normed = found[-1] / np.sqrt(np.mean(found[-1] ** 2) + model.config.norm_eps) * params["final_norm"]["scale"]
  np.testing.assert_allclose(normed, hidden, atol=1e-4)


def test_the_fit_finds_the_layer_that_tells_and_keeps_the_false_alarms():
  rng = np.random.default_rng(0)
  def rows(n):
    x, y = rng.normal(size=(n, 3, 8)).astype(np.float32) * 5 + 2, np.arange(n) % 2
    x[:, 1, 4] += 8 * y  # The middle layer knows, not quite.
    return x, y
  train, validation, test = rows(400), rows(200), rows(2000)
  probe = linear_probe.fit(train, validation, 0.1)
  assert probe.layer == 1
  benign = probe(validation[0])[validation[1] == 0]
  assert np.mean(benign > probe.threshold) == pytest.approx(0.1)
  p, y = probe(test[0]), test[1]
  assert abs(np.mean(p[y == 0] > probe.threshold) - 0.1) < 0.05 and np.mean(p[y == 1] > probe.threshold) > 0.55
  none = linear_probe.fit(train, validation, 0.0)
  assert not (none(validation[0])[validation[1] == 0] > none.threshold).any()


def test_one_attempt_that_passes_is_enough():
  logits = [np.array(of) for of in ([3.0, 1.0], [2.5, 4.0], [1.0, 2.0], [5.0, 0.0])]
  found = linear_probe.figures(logits, np.array([1, 1, 0, 0]), 2.0)
  counts = {name: (rate["count"], rate["n"]) for name, rate in found.items()}
  assert counts == {"not stopped": (1, 2), "benign stopped": (1, 4)}  # No area: attempts at one request go together.
  single = linear_probe.figures([of[:1] for of in logits], np.array([1, 1, 0, 0]), 2.0)
  assert single["area"][0] == 0.5 and single["not stopped"]["count"] == 0


def test_the_command(tmp_path, capsys):
  folder = write_with_tokenizer(tmp_path / "model", tiny_tokenizer(), context=512)
  linear_probe.main(["--weights", str(folder), "--rows", "6", "--attacks", "direct,prefill_5"])
  said = capsys.readouterr().out.strip().splitlines()
  figures = json.loads(said[-1])["suites"]["embedded"]
  ways = ("direct", "prefill_5")
  assert set(figures) == {f"{name}, {way}" for name in ("not stopped", "benign stopped", "area") for way in ways}
  assert all(figures[name]["n"] == 6 for name in figures if "stopped" in name) and len(said) == 2 + 6
  linear_probe.main(["--weights", str(folder), "--rows", "6", "--attacks", "prefill_5,direct"])
  assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["embedded"] == figures
  linear_probe.main(["--weights", str(folder), "--rows", "6", "--attacks", "direct,roleplay,sampling_3"])
  forms = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["suites"]["embedded"]
  assert {name: value["n"] for name, value in forms.items() if "stopped" in name} == {
      "not stopped, direct": 6, "benign stopped, direct": 6, "not stopped, roleplay": 6, "benign stopped, roleplay": 18,
      "not stopped, sampling_3": 6, "benign stopped, sampling_3": 6}  # To a probe three draws of a prompt are one.
  assert forms["area, direct"] == figures["area, direct"] and "area, roleplay" not in forms
  (tmp_path / "long.txt").write_text("Bake bread. " * 200)
  with pytest.raises(SystemExit):
    linear_probe.main(["--weights", str(folder), "--rows", "6", "--suites", f"malicious:{tmp_path / 'long.txt'}"])
  assert "the model's context is 512: 'Bake bread." in capsys.readouterr().err
  for wrong in (["--attacks", "prefill_2001"], ["--attacks", "direct,gcg_2"], ["--attacks", "prefill_own_5"],
                ["--suites", "nowhere.csv"], ["--false_alarms", "1"], ["--rows", "-1"]):
    with pytest.raises(SystemExit):
      linear_probe.main(["--weights", str(folder), *wrong])
