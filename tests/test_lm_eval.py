"""The harness's model: log-likelihoods against plain forward passes; without lm_eval, its parts alone."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import write_with_tokenizer
from tiny_tokenizer import tiny_tokenizer

from saess_jax import hf, lm_eval
from saess_jax.config import SafetyConfig
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama

CONTEXT = "How do I make bread at home?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Weights with a [CLS] that counts as trained."""
  folder = write_with_tokenizer(tmp_path_factory.mktemp("model"), tiny_tokenizer(), context=128)
  (folder / hf.SETTINGS_FILE).write_text(json.dumps({"safety": dataclasses.asdict(SafetyConfig()), "layout": {}}))
  return folder


def log_probs(folder, tokens, kinds=None):
  """float64 [S, V] of one sequence, unpadded."""
  loaded = hf.load_pretrained(str(folder))
  layout = {} if kinds is None else {"kinds": jnp.asarray(kinds[None]), "stage": "sft"}
  apply = jax.jit(lambda params, ids: Llama(loaded.config).apply({"params": params}, ids, **layout).logits)
  return np.asarray(jax.nn.log_softmax(apply(loaded.params, jnp.asarray(tokens[None])))[0], np.float64)


def likelihood(folder, continuation, safety, header_sees_cls=True, system_prompt=""):
  """log p, token by token, of what stands behind the chat template."""
  tokenizer = hf.load_pretrained(str(folder)).tokenizer
  tokens, kinds = chat.encode_prompt(tokenizer, CONTEXT, system_prompt=system_prompt)
  ids = tokenizer(continuation, add_special_tokens=False).input_ids
  tokens = np.append(tokens, ids).astype(np.int32)
  kinds = np.append(kinds, [TokenKind.RESPONSE] * len(ids)).astype(np.int32)
  if safety:
    tokens, kinds = chat.insert_cls(tokens, kinds, "sft", header_sees_cls)
  table = log_probs(folder, tokens, kinds if safety else None)
  at = np.arange(len(tokens) - len(ids), len(tokens))
  before = at - 1 - (safety and kinds[at - 1] == TokenKind.CLS)
  return table[before, tokens[at]].sum(), tokens, kinds, at, table


@pytest.mark.parametrize("safety", [False, True])
def test_scores_of_padded_rows(folder, safety):
  expected, tokens, kinds, at, table = likelihood(folder, "Take flour", safety)
  loaded = hf.load_pretrained(str(folder))
  pad = lambda array: np.pad(array, (0, 128 - len(array)))[None]
  scored = np.zeros(len(tokens), bool)
  scored[at] = True
  score = jax.jit(lm_eval._score, static_argnums=(0, 1))
  total, greedy = score(Llama(loaded.config), safety, loaded.params, pad(tokens), pad(kinds), pad(scored))
  assert float(total[0]) == pytest.approx(expected, abs=1e-4) and not greedy[0]
  tokens[at[0]] = table[at[0] - 1].argmax()
  scored[at[1:]] = False
  assert score(Llama(loaded.config), safety, loaded.params, pad(tokens), pad(kinds), pad(scored))[1][0]


def test_stop_strings():
  assert lm_eval.cut("one\n\ntwo. three", [".", "\n\n"]) == "one"
  assert lm_eval.cut("one", ["two", ""]) == "one"


def test_bad_settings(folder):
  for checkpoint, weights in (("", ""), ("runs/a", "b")):
    with pytest.raises(ValueError, match=f"checkpoint is '{checkpoint}' and weights is '{weights}'; expected one"):
      lm_eval.load(checkpoint, weights)


def test_results_that_have_no_place_are_told_before_anything_is_asked(tmp_path, capsys):
  with pytest.raises(SystemExit):
    lm_eval.main(["--weights", "nowhere", "--tasks", "x", "--out", str(tmp_path / "absent" / "results.json")])
  assert "results.json, and there is no folder to write it into" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="about machines without lm_eval; it is here")
def test_without_the_harness(folder, capsys):
  with pytest.raises(ImportError, match="pip install lm_eval"):
    lm_eval.model_class()
  with pytest.raises(SystemExit):
    lm_eval.main(["--weights", str(folder), "--tasks", "any"])
  assert "pip install lm_eval" in capsys.readouterr().err


def requests(kind, *arguments):
  instance = pytest.importorskip("lm_eval.api.instance", reason="the harness is an optional install")
  return [instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("safety", ["off", "on"])
def test_likelihoods_of_the_harness(folder, safety):
  asked = requests("loglikelihood", (CONTEXT, " Take flour"), (CONTEXT, "Sure"), (CONTEXT, " water and salt"))
  model = lm_eval.model_class()(weights=str(folder), safety=safety, batch_size=2)
  for request, (total, _) in zip(asked, model.loglikelihood(asked), strict=True):
    expected = likelihood(folder, request.args[1].strip(), safety == "on")[0]
    assert total == pytest.approx(expected, abs=1e-4)
  with pytest.raises(ValueError, match="the model's context is 128. Lower the number of examples"):
    model.loglikelihood(requests("loglikelihood", (CONTEXT * 30, "Sure")))


def test_with_the_signal_a_request_has_to_fit_the_window(folder, tmp_path):
  """Beyond it [CLS] would be lost; it is told before others are computed."""
  copy = shutil.copytree(folder, tmp_path / "model")
  settings = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(
      settings | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}))
  make = lambda safety: lm_eval.model_class()(weights=str(copy), safety=safety)
  asked = requests("loglikelihood", (CONTEXT * 6, "Sure"))
  assert make("off").loglikelihood(asked)
  for on in ("on", True):
    with pytest.raises(ValueError, match="the model's context is 63. Lower the number of examples"):
      make(on).loglikelihood(asked)
  tokenizer = hf.load_pretrained(str(copy)).tokenizer
  length = lambda text: len(chat.encode_prompt(tokenizer, text)[0]) + len(chat.encode_text(tokenizer, "Sure"))
  fills = next(text for n in range(1, 64) if length(text := "q" * n) == 63)  # The window, with [CLS].
  assert make("on").loglikelihood(requests("loglikelihood", (fills, "Sure")))
  text = requests("loglikelihood_rolling", (CONTEXT * 8,))
  assert make("on").loglikelihood_rolling(text) == pytest.approx(make("off").loglikelihood_rolling(text), abs=1e-3)


def test_a_run_is_asked_as_it_was_trained(folder, tmp_path):
  """With its system prompt, and [CLS] behind a header that does not see it."""
  copy = shutil.copytree(folder, tmp_path / "model")
  layout = {"header_sees_cls": False, "system_prompt": "Be kind."}
  (copy / hf.SETTINGS_FILE).write_text(json.dumps(
      {"safety": dataclasses.asdict(SafetyConfig()), "layout": layout}))
  asked = requests("loglikelihood", (CONTEXT, " Take flour"))
  model = lm_eval.model_class()(weights=str(copy), safety="on")
  expected, _, kinds, at, _ = likelihood(copy, "Take flour", True, **layout)
  assert kinds[at[0] - 1] == TokenKind.CLS
  assert model.loglikelihood(asked)[0][0] == pytest.approx(expected, abs=1e-4)
  assert expected != pytest.approx(likelihood(copy, "Take flour", True)[0], abs=1e-3)


def test_rolling_likelihood_is_of_whole_texts(folder):
  short, long = "How do I kill a Python process?", "Take flour, water and salt. " * 30
  asked = requests("loglikelihood_rolling", (short,), (long,))
  model = lm_eval.model_class()(weights=str(folder))
  tokenizer = tiny_tokenizer()
  one, other = model.loglikelihood_rolling(asked)
  ids = np.asarray([tokenizer.bos_token_id, *tokenizer(short).input_ids], np.int32)
  assert one == pytest.approx(log_probs(folder, ids)[np.arange(len(ids) - 1), ids[1:]].sum(), abs=1e-4)
  assert len(tokenizer(long).input_ids) > 128 and other < one


def test_generation_of_the_harness(folder):
  asked = requests(
      "generate_until", (CONTEXT, {"until": ["\n\n"], "max_gen_toks": 12}), (CONTEXT, {"until": [], "max_gen_toks": 5}),
      (CONTEXT, {"max_gen_toks": 5, "do_sample": True, "temperature": 0.7}))
  model = lm_eval.model_class()(weights=str(folder), safety="off")
  longer, shorter, _ = model.generate_until(asked)
  assert longer.startswith(shorter) or shorter.startswith(longer)
  drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9}
  said = model.generate_until(requests("generate_until", ("Why?", drawn), (CONTEXT, drawn), (CONTEXT, drawn)))
  assert said[1] != said[2]  # Two draws, and the first whatever is asked beside it.
  assert model.generate_until(requests("generate_until", (CONTEXT, drawn))) == [said[1]]
  with pytest.raises(ValueError, match="safety is 'maybe'; expected on or off"):
    lm_eval.model_class()(weights=str(folder), safety="maybe")
  with pytest.raises(TypeError, match="saftey"):
    lm_eval.model_class()(weights=str(folder), saftey="on")


def test_safety_without_a_signal_is_refused(folder, tmp_path):
  pytest.importorskip("lm_eval", reason="the harness is an optional install")
  plain = shutil.copytree(folder, tmp_path / "model")
  (plain / hf.SETTINGS_FILE).unlink()
  with pytest.raises(ValueError, match="model has no trained .CLS., .* give safety=off"):
    lm_eval.model_class()(weights=str(plain), safety="on")
  lm_eval.model_class()(weights=str(plain), safety="off")


def test_the_harness_finds_it_by_its_name(folder):
  registry = pytest.importorskip("lm_eval.api.registry", reason="the harness is an optional install")
  kind = registry.get_model(lm_eval.NAME)
  assert kind is lm_eval.model_class()
  asked = requests("loglikelihood", (CONTEXT, " Take flour"))
  model = kind.create_from_arg_obj({"weights": str(folder), "safety": "on"}, {"batch_size": "auto", "device": None})
  assert model.loglikelihood(asked)[0][0] == pytest.approx(likelihood(folder, "Take flour", True)[0], abs=1e-4)


def test_the_task_files_that_ship_run_in_the_harness(folder, tmp_path, monkeypatch):
  pytest.importorskip("lm_eval", reason="the harness is an optional install")
  answers = ["A", "B", "C", "D", "A", "B"]
  with open(tmp_path / "mmlu.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["prompt", "answer"])
    table.writerows([f"Which one is {i}?\nA. 0\nB. 1\nC. 2\nD. 3", answer] for i, answer in enumerate(answers))
  (tmp_path / "gsm8k.jsonl").write_text("".join(
      json.dumps({"question": f"What is {i} and 1?", "answer": f"One more. #### {i + 1}"}) + "\n" for i in range(2)))
  monkeypatch.setenv("SAESS_MMLU", str(tmp_path / "mmlu.csv"))
  monkeypatch.setenv("SAESS_GSM8K", str(tmp_path / "gsm8k.jsonl"))
  tasks = pathlib.Path(__file__).parents[1] / "benchmarks" / "lm_eval"
  out = tmp_path / "results.json"
  # The tiny context has no room for 160 new tokens.
  copy = shutil.copytree(folder, tmp_path / "model")
  settings = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 512}))
  lm_eval.main(["--weights", str(copy), "--safety", "on", "--include", str(tasks), "--tasks", "saess_mmlu,saess_gsm8k",
                "--out", str(out)])
  kept = json.loads(out.read_text())
  assert {name: n["effective"] for name, n in kept["n"].items()} == {"saess_mmlu": 6, "saess_gsm8k": 2}
  # By hand: the letter that is likeliest behind the same context.
  rows = list(csv.DictReader(open(tmp_path / "mmlu.csv", newline="")))
  model = lm_eval.model_class()(weights=str(copy), safety="on")
  said = [max("ABCD", key=lambda letter: model.loglikelihood(requests(
      "loglikelihood", (f"{row['prompt']}\n\nAnswer with one letter.", f" {letter}")))[0][0]) for row in rows]
  assert kept["results"]["saess_mmlu"]["acc,none"] == pytest.approx(np.mean([a == b for a, b in zip(said, answers)]))
  assert kept["results"]["saess_gsm8k"]["exact_match,last_number"] == 0  # Random weights name no number.
