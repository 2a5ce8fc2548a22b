"""How sure the next token is: literal distributions, and stored rows against one pass of the model over them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import write_with_tokenizer
from tiny_tokenizer import tiny_tokenizer

from saess_jax import hf, masks, sharpness, subjects
from saess_jax.attacks import Weights
from saess_jax.config import EvalConfig, SafetyConfig, model_config
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama


def test_literal_distributions():
  logits = jnp.log(jnp.asarray([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.6, 0.2, 0.1, 0.1]]))
  entropy, sharp = sharpness.top_k_statistics(logits, 2)
  np.testing.assert_allclose(sharp, [0.875, 0.5, 0.75], atol=1e-6)
  np.testing.assert_allclose(entropy, [0.376770, 0.693147, 0.562335], atol=1e-6)
  entropy, sharp = sharpness.top_k_statistics(logits, 4)
  np.testing.assert_allclose(sharp, [0.7, 0.25, 0.6], atol=1e-6)
  assert entropy[1] == pytest.approx(np.log(4))


def test_a_plain_model_is_read_as_in_one_pass(tiny_params):
  llama, tokenizer = Llama(model_config("tiny", scan_layers=False)), hf.byte_tokenizer()
  row = {"prompt": "bread", "response": "Sure, flour", "prefix_tokens": 6, "tokens": list("Sure, flour"),
         "intervened_at": -1}
  (values,) = sharpness.of_responses(Weights(llama, tiny_params, tokenizer, None), [row], 5, 512)
  ids = tokenizer.apply_chat_template(
      [{"role": "user", "content": "bread"}], add_generation_prompt=True, return_dict=False)
  ids += tokenizer("Sure, flour", add_special_tokens=False).input_ids
  logits = llama.apply({"params": tiny_params}, jnp.asarray([ids])).logits[0, -6:-1]  # Before each of " flour"[1:].
  np.testing.assert_allclose(values[:, 1], jax.nn.softmax(logits).max(axis=-1), atol=1e-6)


@pytest.mark.parametrize("header_sees_cls", [True, False])
def test_a_model_with_cls_is_read_as_by_the_dense_mask(tiny_params, header_sees_cls):
  """From the first token of the response on, before which [CLS] is stored where no header sees it."""
  llama, tokenizer = Llama(model_config("tiny", scan_layers=False)), hf.byte_tokenizer()
  weights = Weights(llama, tiny_params, tokenizer, SafetyConfig(), header_sees_cls=header_sees_cls)
  row = {"prompt": "bread", "response": "Flour", "prefix_tokens": 0, "tokens": list("Flour"), "intervened_at": -1}
  (values,) = sharpness.of_responses(weights, [row], 5, 512)
  ids, kinds = chat.encode_prompt(tokenizer, "bread")
  ids = [0, *ids, *tokenizer("Flour", add_special_tokens=False).input_ids]  # [CLS] in front: a mask serves any order.
  kinds = jnp.asarray([[TokenKind.CLS, *kinds, *[TokenKind.RESPONSE] * 5]])
  logits = llama.apply(
      {"params": tiny_params}, jnp.asarray([ids]), kinds=kinds,
      mask=masks.attention_mask(kinds, "sft", header_sees_cls)).logits[0, -6:-1]
  np.testing.assert_allclose(values[:, 1], jax.nn.softmax(logits).max(axis=-1), atol=1e-6)


def test_what_the_decoder_put_in_is_not_read(tiny_params):
  weights = Weights(Llama(model_config("tiny", scan_layers=False)), tiny_params, hf.byte_tokenizer(), None)
  whole = {"prompt": "bread", "response": "Sure, flour", "prefix_tokens": 4, "tokens": list("Sure, flour"),
           "intervened_at": -1}
  read = lambda **changes: int(np.isfinite(sharpness.of_responses(weights, [whole | changes], 9, 8)[0, :, 0]).sum())
  assert read() == 8  # " flour" and the end of the turn.
  assert read(intervened_at=6) == 2  # The fifth and sixth token are its own.
  assert read(intervened_at=0) == read(intervened_at=4) == 0  # A caller's prefix is finished first.
  # Rollback took two of eight steps back: one of its own stands, and behind it what was put in.
  assert read(intervened_at=7, tokens=list("Sure, flour12")) == 1


ROW = dict(suite="embedded", method="direct", model="base", index=0, attempt=0, label=1, prompt="bread",
           prefix_tokens=0, intervened_at=-1)


def claim(folder, checkpoint=None, models=None):
  """What evaluation.json says of an evaluation of the weights in `folder`."""
  config = dict(
      checkpoint=checkpoint or folder, suites="embedded", attacks=["direct", "nested"], models=["base"])
  identity = subjects.load_models(EvalConfig(checkpoint=folder, models=("base",))).identity
  return {"config": config, "models": models or identity}


def test_the_command_over_an_evaluation(tmp_path, capsys):
  folder = str(write_with_tokenizer(tmp_path / "model", tiny_tokenizer(), context=256))
  rows = [
      ROW | {"response": "Take", "tokens": list("Take")},
      ROW | {"index": 1, "response": "No", "tokens": list("No")},
      ROW | {"index": 1, "response": "No", "tokens": list("No")},  # Written twice, it counts once.
      ROW | {"method": "nested", "response": "", "tokens": []},
      ROW | {"method": "past", "response": "Took", "tokens": list("Took")},  # An attack that was left out since.
      ROW | {"index": 2, "label": 0, "response": "Yes", "tokens": list("Yes")}]
  (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "evaluation.json").write_text(json.dumps(claim(folder)))
  sharpness.main(["--checkpoint", folder, "--evaluation", str(tmp_path), "--tokens", "9"])
  assert "no response holds a token of the model's own" in capsys.readouterr().out
  said = json.loads((tmp_path / "sharpness.json").read_text(), parse_constant=pytest.fail)  # No NaN in it.
  figures = said["by_model"]["base"]["direct"]
  assert said["by_model"].keys() == {"base"} and said["by_model"]["base"].keys() == {"direct"} and figures["n"] == 2
  assert len(figures["entropy"]) == len(figures["sharpness"]) < 9 and all(0.1 <= x <= 1 for x in figures["sharpness"])


@pytest.mark.parametrize("change, words", [
    ({"checkpoint": "other"}, "is an evaluation of 'other' .*give the checkpoint that was evaluated"),
    ({"models": "step 3 of yesterday"}, r"is an evaluation of '\S+' \(step 3 of yesterday\), and --checkpoint is"),
    (None, "holds no evaluation; expected the --workdir of one")])
def test_an_evaluation_of_another_checkpoint_is_refused(change, words, tmp_path, capsys):
  folder = str(write_with_tokenizer(tmp_path / "model", tiny_tokenizer(), context=256))
  (tmp_path / "responses.jsonl").write_text(json.dumps(ROW | {"response": "Take", "tokens": ["Take"]}) + "\n")
  if change is not None:
    (tmp_path / "evaluation.json").write_text(json.dumps(claim(folder, **change)))
  with pytest.raises(SystemExit):
    sharpness.main(["--checkpoint", folder, "--evaluation", str(tmp_path)])
  assert re.search(words, capsys.readouterr().err)
  assert not (tmp_path / "sharpness.json").exists()


def test_an_evaluation_without_responses_is_named(tmp_path, capsys):
  folder = str(write_with_tokenizer(tmp_path / "model", tiny_tokenizer(), context=256))
  (tmp_path / "evaluation.json").write_text(json.dumps(claim(folder)))
  with pytest.raises(SystemExit):
    sharpness.main(["--checkpoint", folder, "--evaluation", str(tmp_path)])
  assert "holds no responses yet; let its evaluation" in capsys.readouterr().err
