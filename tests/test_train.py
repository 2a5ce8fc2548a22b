"""Whole runs of the tiny model: sharded as on one device, resumed as undisturbed, stopped before harm is done."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2
from xla_flags import CHEAP

from saess_jax import (
  aot,
  checkpoint,
  decode,
  generate,
  hf,
  losses,
  masks,
  model,
  preflight,
  pretrained,
  runs,
  sharding,
  snapshot,
  staging,
  subjects,
  train,
)
from saess_jax import config as config_lib
from saess_jax.config import (
  DataConfig,
  LoraConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  ProbeConfig,
  RolloutConfig,
  SafetyConfig,
  TrainConfig,
)
from saess_jax.data import chat, pipeline, sources
from saess_jax.export import export_hf
from saess_jax.state import TrainState, create_state

ROOT = pathlib.Path(__file__).parent.parent
ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def small_config(data, **changes):
  defaults = TrainConfig(
      model="tiny", model_overrides={"vocab_size": 260},
      data=DataConfig(source=str(data), max_length=128, max_response=12, buckets=(128,), batch_size=8),
      rollouts=RolloutConfig(tokens=6, batch_size=16), optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
      max_steps=6, eval_every=3, save_every=3)
  return dataclasses.replace(defaults, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "rows.jsonl"
  rows = [
      {"prompt": f"{'bad' if i % 2 else 'good'} request {i}", "response": f"answer {i}",
       "label": "malicious" if i % 2 else "benign"}
      for i in range(64)]
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def scalars(workdir):
  """{(tag, step): value} of all TensorBoard events."""
  found = {}
  for file in sorted((pathlib.Path(workdir) / "tensorboard").iterdir()):
    blob, at = file.read_bytes(), 0
    while at < len(blob):
      (size,) = struct.unpack("<Q", blob[at : at + 8])
      event = event_pb2.Event.FromString(blob[at + 12 : at + 12 + size])
      at += 16 + size
      found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
  return found


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """One undisturbed run on a 2 x 2 x 2 mesh."""
  workdir = tmp_path_factory.mktemp("run")
  config = small_config(data, mesh=MeshConfig(2, 2, 2), eval_every=2)
  return config, workdir, train.train_and_evaluate(config, workdir)


def test_a_run_leaves_what_it_promises(finished):
  config, workdir, validated = finished
  assert {p.name for p in workdir.iterdir()} == {
      "config.json", "data.json", "base.json", "checkpoints", "rollouts.jsonl", "tensorboard", "data", "lock"}
  assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"3", "6"}
  # Of the step itself, which is the last one's: the third is not validated.
  assert [(workdir / "checkpoints" / step / "metrics").exists() for step in ("3", "6")] == [False, True]
  assert runs.read_config(workdir) == config
  assert set(validated) == {"lm_loss", "cls_loss", "cls_accuracy", "probe_loss", "probe_accuracy"}
  seen = scalars(workdir)
  for tag in ("loss", "lm_loss", "cls_loss", "probe_loss", "cls_accuracy", "grad_norm", "learning_rate"):
    assert [step for name, step in seen if name == f"train/{tag}"] == [1, 2, 3, 4, 5, 6]
  assert seen["validation/cls_accuracy", 6] == pytest.approx(validated["cls_accuracy"])


def test_a_validation_that_a_stop_did_not_wait_for_is_made_up_for(finished, tmp_path):
  """Else another step than an undisturbed run's would be its best."""
  config, workdir, validated = finished
  shutil.copytree(workdir, tmp_path / "run")
  metrics = tmp_path / "run" / "checkpoints" / "6" / "metrics"
  before = json.loads((metrics / "metrics").read_text())
  shutil.rmtree(metrics)  # As SIGTERM in the last step leaves it.
  assert train.train_and_evaluate(config, tmp_path / "run") == validated
  assert json.loads((metrics / "metrics").read_text()) == before
  assert checkpoint.Saved(tmp_path / "run").best_step() == checkpoint.Saved(workdir).best_step()
  assert train.train_and_evaluate(config, tmp_path / "run") == {}


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(finished, tmp_path):
  config, workdir, validated = finished
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  again = train.train_and_evaluate(dataclasses.replace(config, mesh=MeshConfig(1, 4, 2)), tmp_path / "run")
  assert again == pytest.approx(validated, abs=1e-4)


def test_research_restore_decodes(finished):
  _, workdir, _ = finished
  llama, params, tokenizer, settings = pretrained.load_for_research(workdir)
  rows = [(np.asarray([5, 6, 0, 7]), np.asarray([2, 3, 1, 4]))]
  out = decode.decode(
      llama, params, decode.pad_prompts(rows), jax.random.key(0),
      decode.decode_config(tokenizer, settings, max_new_tokens=8))
  assert out.lengths.shape == (1,) and 0 <= out.initial_prob[0] <= 1
  with pytest.raises(ValueError, match="has no step 4; it has 3, 6"):
    pretrained.load_for_research(workdir, step=4)


def first_step(config, devices):
  """Loss and metrics of one step, Adam's first moments (0.1 times the clipped gradient) and the new state.

  Its weights are where they were: the warm-up begins at a rate of 0.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  shape, base, tokenizer = pretrained.load_base(config)
  rows = train.sources.load_split(config.data.source, "train")
  batch = pipeline.Batches(pipeline.build_examples(tokenizer, rows, None, config), config)[0]
  training = train.config_of_training(config, shape)
  llama, tx = model.Llama(training), train.optimizer(config.optimizer, 10)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    state, places = create_state(config, llama, model.stack_layers(base, config.frozen_layers), tx, mesh)
    # Zero heads and cold starts hide differences: give every [CLS] part and adapter some size first.
    stir = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape, x.dtype)
    state = state.replace(trainable=jax.tree_util.tree_map_with_path(stir, state.trainable))
    step = jax.jit(functools.partial(train.train_step, config, llama, tx), out_shardings=(places, None))
    state, metrics = step(jax.device_put(state, places), jax.device_put(batch, sharding.batch_sharding(mesh)))
  return metrics, jax.device_get(optax.tree.get(state.opt_state, "mu")), state


def assert_same_gradient(moments, other):
  """But for 1e-5 of a leaf's largest moment: ten times what another order of float32 sums makes of it."""
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())
  jax.tree.map(near, moments, other)
  assert all(leaf.any() for leaf in jax.tree.leaves(moments))


def test_a_run_resumes_in_the_memory_that_it_trains_in(data, tmp_path):
  """What it began with is off the devices before the checkpoint is read; the frozen base stays."""
  config = small_config(data, mesh=ONE, loss=LossConfig(kl_weight=0.5))
  _, _, state = first_step(config, jax.devices()[:1])
  loader = pipeline.Loader(pipeline.Batches(pipeline.build_examples(
      hf.byte_tokenizer(), sources.load_split(str(data), "train"), None, config), config))
  manager = checkpoint.Checkpoints(tmp_path)
  manager.save(1, state.saved(), loader.get_state(), config, None)
  manager.close()
  manager = checkpoint.Checkpoints(tmp_path)
  saved = jax.device_get(state.saved())
  resumed = train._resume(manager, state, loader)
  manager.close()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.saved()))
  jax.tree.map(np.testing.assert_array_equal, resumed.saved(), saved)
  assert resumed.frozen is state.frozen and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.frozen))


@pytest.mark.parametrize(
    "lora, accumulation", [(LoraConfig(), 1), pytest.param(LoraConfig(rank=4), 2, marks=pytest.mark.slow)])
def test_eight_devices_and_accumulation_update_as_one_device_does(data, lora, accumulation):
  one = small_config(data, mesh=ONE, lora=lora, loss=LossConfig(kl_weight=0.5))
  other = dataclasses.replace(
      one, mesh=MeshConfig(2, 2, 2), optimizer=dataclasses.replace(one.optimizer, accumulation=accumulation))
  metrics, moments, _ = first_step(one, jax.devices()[:1])
  other_metrics, other_moments, state = first_step(other, jax.devices())
  for name in metrics:
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, atol=1e-5)
  assert_same_gradient(moments, other_moments)
  assert metrics["kl_loss"] > 1e-3  # The weights were stirred, the base was not.
  assert bool(state.frozen["reference"]) != bool(lora.rank)  # Under adapters the base is there already.
  if not lora.rank:
    kernel = state.trainable["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size  # Over fsdp and tensor.
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)


def test_micro_batches_are_summed_in_float32():
  """In bfloat16 256 + 1 is 256."""
  how, tx = TrainConfig(optimizer=OptimizerConfig(accumulation=17)), optax.sgd(1.0)
  weights = {"params": {"w": jnp.zeros((), jnp.bfloat16)}}
  state = TrainState(
      step=jnp.zeros((), jnp.int32), trainable=weights, opt_state=tx.init(weights), rng=jnp.zeros(2, jnp.uint32),
      frozen={"params": {}})
  row = jnp.asarray([256.0] + 16 * [1.0])
  batch = {name: row for name in ("loss_weights", "label_weight", "probe_weights", "kl_weights")}
  def loss_of(config, model, variables, micro, total):
    loss = jnp.sum(variables["params"]["w"] * micro["loss_weights"])
    return loss, {"loss": loss}
  state, metrics = train.train_step(how, None, tx, state, batch, loss_of)
  assert metrics["grad_norm"] == 272 and state.trainable["params"]["w"].dtype == jnp.bfloat16
  assert state.trainable["params"]["w"] == -272


def test_packed_examples_give_the_loss_and_gradient_that_each_gives_alone(data):
  alone = small_config(data, mesh=ONE, loss=LossConfig(kl_weight=0.5))
  alone = dataclasses.replace(alone, data=dataclasses.replace(alone.data, batch_size=64, buckets=(64,)))
  packed = dataclasses.replace(alone, data=dataclasses.replace(
      alone.data, batch_size=16, buckets=(256,), examples_per_row=5))
  metrics, moments, _ = first_step(alone, jax.devices()[:1])
  packed_metrics, packed_moments, _ = first_step(packed, jax.devices()[:1])
  for name in metrics:
    np.testing.assert_allclose(packed_metrics[name], metrics[name], rtol=1e-5, atol=1e-5)
  assert_same_gradient(moments, packed_moments)


@pytest.mark.parametrize("changes", [
    {}, {"header_sees_cls": False}, {"cls_sees_response": "malicious"}, {"stage": "pretrain"}])
def test_the_loss_of_a_batch_is_that_of_the_dense_mask(tiny_params, tmp_path, changes):
  """In training and in validation; of a malicious and a benign row."""
  config = small_config(tmp_path, probes=ProbeConfig(per_sequence=0), **changes)
  config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, max_length=64, buckets=(64,), batch_size=2))
  answer = "" if config.stage == "pretrain" else "answer"
  rows = [sources.Row("bad request", answer, 1, "", ""), sources.Row("good request", answer, 0, "", "")]
  examples = pipeline.build_examples(hf.byte_tokenizer(), rows, None, config)
  batch = jax.tree.map(jnp.asarray, pipeline.Batches(examples, config)[0])
  assert sorted(batch["label"].tolist()) == [0, 1] and batch["loss_weights"].any(axis=1).all()
  llama = model.Llama(config_lib.model_config("tiny", scan_layers=False))
  mask = masks.attention_mask(
      batch["kinds"], config.stage, config.header_sees_cls, config.cls_sees_response, batch["label"] == 1)
  out = llama.apply({"params": tiny_params}, batch["tokens"], kinds=batch["kinds"], mask=mask)
  total = losses.totals(batch)
  loss, parts = losses.loss_sums(out, model.output_head(tiny_params), batch, total, config.loss)
  ours, our_parts = train.loss_of_batch(config, llama, {"params": tiny_params}, batch, total)
  assert ours == pytest.approx(float(loss), rel=1e-5)
  assert our_parts == {name: pytest.approx(float(value), rel=1e-5) for name, value in parts.items()}
  state = TrainState(0, {"params": tiny_params}, None, None, {"params": {}})
  validated = train._evaluate(functools.partial(train.eval_step, config, llama), state, [batch])
  assert validated == {name: pytest.approx(float(parts[name]), rel=1e-5) for name in parts if name != "loss"}


def test_validation_divides_sums_over_all_batches_by_what_is_counted():
  batches = [
      ({"loss": 99.0, "lm_loss": 6.0, "cls_loss": 1.0, "cls_accuracy": 2.0, "probe_loss": 3.0, "probe_accuracy": 0.0,
        "kl_loss": 8.0, "dpo_loss": 1.5}, losses.Totals(tokens=10.0, sequences=3.0, probes=5.0, compared=2.0)),
      ({"loss": 99.0, "lm_loss": 2.0, "cls_loss": 1.0, "cls_accuracy": 1.0, "probe_loss": 0.5, "probe_accuracy": 2.0,
        "kl_loss": 1.0, "dpo_loss": 0.5}, losses.Totals(tokens=6.0, sequences=1.0, probes=2.0, compared=1.0))]
  assert train._evaluate(lambda state, batch: batch, None, batches) == {
      "lm_loss": 8 / 16, "cls_loss": 2 / 4, "cls_accuracy": 3 / 4, "probe_loss": 3.5 / 7, "probe_accuracy": 2 / 7,
      "kl_loss": 9 / 3, "dpo_loss": 2 / 4}


def test_the_rate_warms_up_and_falls_to_its_last_fraction():
  rate = train.learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=2, final_fraction=0.1), 10)
  np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 6, 10, 99)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)


def test_only_matrices_decay_and_a_large_gradient_is_clipped():
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, clip_norm=2.0)
  tx = train.optimizer(config, 10)
  ones = lambda *names: {name: jnp.ones(2) for name in names}
  weights = {
      "params": {"embed": ones("embedding"), "cls_embedding": jnp.ones(2), "cls_head": ones("kernel", "bias"),
                 "final_norm": ones("scale")}, "lora": {"q": ones("a", "b")}}
  state = tx.init(weights)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), state, weights)
  moved = {path[-1]: update.tolist() for path, update in flax.traverse_util.flatten_dict(updates).items()}
  still, decayed = [0.0, 0.0], pytest.approx([-0.05, -0.05])
  assert moved == {"embedding": decayed, "kernel": decayed, "a": decayed, "b": decayed,
                   "cls_embedding": still, "bias": still, "scale": still}
  _, state = tx.update(jax.tree.map(lambda x: 100 * x, weights), state, weights)
  assert optax.global_norm(optax.tree.get(state, "mu")) == pytest.approx(0.1 * 2.0, rel=1e-5)


def test_rollouts_answer_behind_the_run_s_system_prompt(data, tmp_path):
  config = small_config(data, rollouts=RolloutConfig(tokens=6, batch_size=1, temperature=0.0))
  shape, base, tokenizer = pretrained.load_base(config)
  rows = [sources.Row("good request", "", 0, "", "")]
  def sampled(name, system_prompt):
    (tmp_path / name).mkdir()
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, system_prompt=system_prompt))
    return train._sample_rollouts(asked, tmp_path / name, rows, shape, base, tokenizer)
  said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "good request"}]
  (by_hand,) = generate.Generator(
      model.Llama(shape), jax.tree.map(jnp.asarray, base), tokenizer, None, max_new_tokens=6, batch_size=1
  ).respond([said])
  assert sampled("kind", "Be kind.") == {"good request": by_hand.ids} != sampled("plain", "")


def test_no_device_gathers_the_model_or_holds_all_logits(data):
  """Shapes in a partitioned program are one device's: 8 rows over 4, 512 columns of the head over 2."""
  config = small_config(
      data, mesh=MeshConfig(2, 2, 2), model_overrides={"vocab_size": 500, "num_layers": 6, "remat": "full"})
  mesh = sharding.make_mesh(config.mesh)
  shape = train.config_of_training(config, config_lib.model_config(config.model, **config.model_overrides))
  assert shape.vocab_padding == 12
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    hlo = aot.train_program(config, shape, mesh).compile().as_text()
  gathered = [tuple(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", hlo)]
  layer = shape.embed_dim * shape.mlp_dim // 2
  assert gathered and max(map(math.prod, gathered)) <= max(layer, 512 // 2 * shape.embed_dim)
  assert not any(dims[0] == shape.num_layers and len(dims) > 2 for dims in gathered)
  losses_a_row = config.data.max_response + 1
  assert f"f32[2,{losses_a_row},256]" in hlo and f"{losses_a_row},512]" not in hlo and f"[8,{losses_a_row}" not in hlo


@pytest.mark.parametrize("master", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_bfloat16_compute_with_either_master_weights(data, master):
  config = small_config(
      data, mesh=ONE, model_overrides={"vocab_size": 260, "dtype": "bfloat16", "param_dtype": master})
  metrics, _, state = first_step(config, jax.devices()[:1])
  kernels = [leaf for leaf in jax.tree.leaves(state.trainable["params"]["layers"]) if leaf.ndim > 2]
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 2]
  assert kernels and all(str(leaf.dtype) == master for leaf in kernels + moments)
  assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


def kl_by_hand(llama, params, batch):
  """Mean KL at the batch's places where both are the same weights: the base has read text, the model [CLS] besides."""
  values = []
  for tokens, kinds, at in zip(batch["tokens"], batch["kinds"], batch["kl_positions"]):
    ours = llama.apply({"params": params}, tokens[None], kinds=kinds[None], stage="sft").logits[0]
    text = kinds != masks.TokenKind.CLS
    base = llama.apply({"params": params}, tokens[text][None]).logits[0]
    p, q = jax.nn.log_softmax(base[np.cumsum(text)[at] - 1]), jax.nn.log_softmax(ours[at])
    values.append(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    assert not (kinds[at] == masks.TokenKind.CLS).any()
  return float(jnp.mean(jnp.stack(values)))


@pytest.mark.parametrize("frozen_layers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_kl_term_compares_with_the_weights_that_the_run_starts_from(data, frozen_layers):
  config = small_config(data, mesh=ONE, frozen_layers=frozen_layers, loss=LossConfig(kl_weight=1.0))
  shape, base, tokenizer = pretrained.load_base(config)
  rows = train.sources.load_split(config.data.source, "train")[:8]
  batch = pipeline.Batches(pipeline.build_examples(tokenizer, rows, None, config), config)[0]
  training = train.config_of_training(config, shape)
  llama, tx = model.Llama(training), train.optimizer(config.optimizer, 10)
  step = jax.jit(functools.partial(train.train_step, config, llama, tx), donate_argnums=0)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    state, _ = create_state(config, llama, model.stack_layers(base, frozen_layers), tx, mesh)
    kept = jax.device_get(state.frozen)
    expected = kl_by_hand(llama, {**state.frozen["params"], **state.trainable["params"]}, batch)
    seen = []
    for _ in range(3):
      state, metrics = step(state, batch)
      seen.append(float(metrics["kl_loss"]))
  assert seen[0] == pytest.approx(expected, rel=1e-3) and seen[-1] > seen[0] > 1e-6
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), kept)


@pytest.mark.parametrize("objective, rank", [
    pytest.param("sft", 0, marks=pytest.mark.slow), ("dpo", 0), pytest.param("dpo", 4, marks=pytest.mark.slow)])
def test_rivals_train_from_end_to_end(data, tmp_path, objective, rank):
  config = small_config(
      data, objective=objective, lora=LoraConfig(rank=rank), probes=ProbeConfig(per_sequence=0), epochs=2,
      max_steps=12, eval_every=6, save_every=6, mesh=MeshConfig(2, 2, 2),
      optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, accumulation=2))
  validated = train.train_and_evaluate(config, tmp_path / "run")
  seen = scalars(tmp_path / "run")
  assert set(validated) == ({"lm_loss"} if objective == "sft" else {"dpo_loss", "dpo_accuracy"})
  if objective == "dpo":
    assert seen["train/dpo_loss", 1] == pytest.approx(math.log(2), abs=1e-5)  # The reference is where it starts.
    assert validated["dpo_accuracy"] > 0.9 and validated["dpo_loss"] < 0.66
  else:
    assert validated["lm_loss"] < seen["train/lm_loss", 1]
  before, after = (pretrained.load_for_research(tmp_path / "run", step)[1] for step in (6, 12))
  assert not np.array_equal(before["layers_0"]["attn"]["q"]["kernel"], after["layers_0"]["attn"]["q"]["kernel"])


@pytest.mark.slow
def test_a_rival_of_few_rollouts_and_one_that_goes_on_from_it(data, tmp_path, capsys):
  """No validation row has a rollout; the second run prefers by the rollouts that the first one sampled."""
  first = small_config(
      data, objective="sft", probes=ProbeConfig(per_sequence=0), max_steps=1,
      rollouts=RolloutConfig(max_prompts=2, tokens=6, batch_size=2), seed=2)
  first = dataclasses.replace(first, data=dataclasses.replace(first.data, responses="rollouts"))
  assert train.train_and_evaluate(first, tmp_path / "sft") == {}
  second = dataclasses.replace(first, objective="dpo", model="", model_overrides={}, weights=str(tmp_path / "sft"))
  train.train_and_evaluate(second, tmp_path / "dpo")
  sampled = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("sft", "dpo")]
  assert sampled[0] == sampled[1]
  with pytest.raises(ValueError, match=r"has no trained .CLS.,.*; expected --config.models=.\('base','plain'\)"):
    subjects.load_models(config_lib.EvalConfig(checkpoint=str(tmp_path / "sft")))
  subjects.load_models(config_lib.EvalConfig(checkpoint=str(tmp_path / "sft"), models=("plain",)))
  published = dataclasses.replace(first, weights="somewhere/base")
  (tmp_path / "sft" / "config.json").write_text(json.dumps(dataclasses.asdict(published)))
  with pytest.raises(ValueError, match="trained with objective 'sft': it has no .CLS., and an adapter is one"):
    pretrained.read_adapter(tmp_path / "sft", rank=4)


@pytest.mark.slow
def test_adapters_above_a_frozen_layer(data):
  """[CLS]'s embedding is frozen with the others, its head is not."""
  config = small_config(data, mesh=ONE, lora=LoraConfig(rank=4), frozen_layers=1)
  _, _, state = first_step(config, jax.devices()[:1])
  assert set(state.trainable["params"]) == {"cls_head"} and "cls_embedding" in state.frozen["params"]


def test_lora_trains_the_adapter_and_cls_alone(data):
  _, _, state = first_step(small_config(data, mesh=ONE, lora=LoraConfig(rank=4)), jax.devices()[:1])
  assert set(state.trainable["params"]) == {"cls_embedding", "cls_head"}
  assert set(state.trainable["lora"]) == {"layers"}
  assert not any(name.startswith("cls") for name in state.frozen["params"])
  assert "frozen" not in state.saved()


@pytest.mark.slow
def test_what_is_frozen_is_in_no_checkpoint_and_back_for_research(data, tmp_path):
  config = small_config(
      data, frozen_layers=1, max_steps=2, rollouts=RolloutConfig(max_prompts=8, tokens=6, batch_size=8))
  config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, buckets=(64, 128), responses="rollouts", refusal_depth=4))
  train.train_and_evaluate(config, tmp_path / "run")
  saved = checkpoint.Saved(tmp_path / "run").restore_trainable(2)
  assert set(saved["params"]) == {"cls_head", "final_norm", "layers"}
  _, base, _ = pretrained.load_base(config)
  _, params, _, _ = pretrained.load_for_research(tmp_path / "run")
  same = {name: all(jax.tree.leaves(jax.tree.map(np.array_equal, leaf, base[name]))) for name, leaf in params.items()}
  assert {name for name, equal in same.items() if equal} == {"embed", "cls_embedding", "layers_0"}


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_checkpoint(data, tmp_path):
  config = small_config(
      data, save_every=1, eval_every=0, probes=ProbeConfig(per_sequence=0), rollouts=RolloutConfig(enabled=False),
      optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=3, clip_norm=1e30))
  with pytest.raises(train.Diverged, match=r"At step (\d) the loss is") as error:
    train.train_and_evaluate(config, tmp_path / "run")
  failed = int(str(error.value).split()[2])
  steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
  assert steps and steps[-1] == failed - 1 and f"step {failed - 1} in" in str(error.value)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_a_run_that_is_told_to_stop_saves_and_leaves(data, tmp_path, number, status):
  workdir = tmp_path / "run"
  file = tmp_path / "config.py"
  file.write_text(
      "from saess_jax.config import *\n"
      "def get_config():\n  return to_config_dict(TrainConfig(model='tiny', model_overrides={'vocab_size': 260}, "
      f"data=DataConfig(source={str(data)!r}, max_length=128, max_response=12, buckets=(128,), batch_size=8), "
      "rollouts=RolloutConfig(enabled=False), epochs=1000, eval_every=0, save_every=100000))\n")
  heeding = (  # Tests that a script has started in the background would hand on that Ctrl-C is ignored.
      "import runpy, signal, sys; sys.argv = sys.argv[1:]; signal.signal(signal.SIGINT, signal.default_int_handler); "
      "runpy.run_path(sys.argv[0], run_name='__main__')")
  run = subprocess.Popen(
      [sys.executable, "-c", heeding, ROOT / "train.py", "--config", str(file), "--workdir", str(workdir)], cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": CHEAP}, stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
  try:
    deadline = time.time() + 120
    # Into the steps: what they write reaches the file a buffer at a time.
    while time.time() < deadline and not any(file.stat().st_size for file in (workdir / "tensorboard").glob("*")):
      time.sleep(0.1)
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
  finally:
    run.kill()
  assert run.returncode == status, output.decode()[-2000:]
  assert b"Stopped: saved step" in output and b"Traceback" not in output
  saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  assert len(saved) == 1 and 0 < saved[0] < 7000


@pytest.mark.parametrize("change, message", [
    (lambda c: {"mesh": MeshConfig(3, 1, 1)}, "does not divide the 8 devices"),
    (lambda c: {"mesh": MeshConfig(-1, -1, 1)}, "at most one of them -1"),
    (lambda c: {"optimizer": OptimizerConfig(accumulation=3)},
     r"not divisible by 24 \(mesh data 1 x fsdp 8 x optimizer.accumulation 3\)"),
    (lambda c: {"stage": "pretrain"}, "set probes.per_sequence to 0"),
    (lambda c: {"model": "gpt5"}, "model is 'gpt5'; expected one of tiny"),
    (lambda c: {"weights": "/nowhere/weights"}, "nowhere"),
    (lambda c: {"data": dataclasses.replace(c.data, source="/nowhere.jsonl")}, "nowhere.jsonl"),
    (lambda c: {"data": dataclasses.replace(c.data, max_length=30, buckets=(30,))}, "tokens"),
    (lambda c: {"data": dataclasses.replace(c.data, buckets=(40,))}, "longest of data.buckets"),
    (lambda c: {"data": dataclasses.replace(c.data, responses="rollouts"), "rollouts": RolloutConfig(enabled=False)},
     "no response would be read"),
    (lambda c: {"data": dataclasses.replace(c.data, opener_depth=8)}, "opener_depth is 8, but data.refusal_depth is 0"),
    (lambda c: {"data": dataclasses.replace(c.data, opener_depth=-8, refusal_depth=8)}, "data.opener_depth is -8"),
    (lambda c: {"data": dataclasses.replace(c.data, histories=1.5)}, "data.histories is 1.5; expected 0 to 1"),
    (lambda c: {"data": dataclasses.replace(c.data, history_turns=0)}, "data.history_turns is 0; expected 1 or more"),
    (lambda c: {"data": dataclasses.replace(c.data, batch_size=0)}, "data.batch_size is 0; expected 1 or more"),
    (lambda c: {"data": dataclasses.replace(c.data, max_length=300, buckets=(300,))},
     "data.max_length is 300, .CLS. included, and the model's context 256 tokens; lower it to 257"),
    (lambda c: {"model_overrides": {"sliding_window": 64}}, "Rows are padded to up to 128 tokens .* window is 64"),
    (lambda c: {"save_every": 0}, "save_every is 0; expected 1 or more"),
    (lambda c: {"seed": -1}, "seed is -1; expected 0 or more"),
    (lambda c: {"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "learning_rate is nan; expected 0 or more"),
    (lambda c: {"optimizer": OptimizerConfig(clip_norm=0.0)}, "clip_norm is 0.0, b1 0.9 and b2 0.95; expected"),
    (lambda c: {"optimizer": OptimizerConfig(accumulation=0)}, "optimizer.accumulation is 0; expected 1 or more"),
    (lambda c: {"rollouts": RolloutConfig(max_prompts=1)}, "rollouts.max_prompts is 1; expected 0 for all, or 2 or"),
    (lambda c: {"safety": SafetyConfig(schedule=np.ones(9, bool))}, "safety.schedule is an array; name one"),
    (lambda c: {"data": dataclasses.replace(c.data, histories=0.5)}, "histories is 0.5, but data.responses is 'all'"),
    (lambda c: {"data": dataclasses.replace(c.data, histories=0.5, responses="rollouts", max_length=999)},
     "With rollouts sequences grow up to data.max_length 999, more than the longest"),
    (lambda c: {"data": dataclasses.replace(c.data, histories=0.5, responses="rollouts"), "objective": "sft",
                "probes": ProbeConfig(per_sequence=0), "loss": LossConfig(cls_weight=0.0)},
     "for .CLS.. Set them to"),
    (lambda c: {"data": dataclasses.replace(c.data, disguises=-0.1)}, "data.disguises is -0.1; expected 0 to 1"),
    (lambda c: {"data": dataclasses.replace(c.data, disguises=0.6, frames=0.5)}, "and data.frames 0.5; expected"),
    (lambda c: {"data": dataclasses.replace(c.data, frames=0.1)}, "frames is 0.1, but data.responses is 'all'"),
    (lambda c: {"rollouts": RolloutConfig(written=1.5)}, "rollouts.written is 1.5; expected 0 to 1"),
    (lambda c: {"data": dataclasses.replace(c.data, disguises=0.1)}, "disguises is 0.1, but data.responses is 'all'"),
    (lambda c: {"loss": LossConfig(kl_weight=-1.0)}, "loss.kl_weight is -1.0; expected 0 or more"),
    (lambda c: {"loss": LossConfig(kl_weight=1.0, kl_positions=0)}, "loss.kl_positions is 0; expected 1 or more"),
    (lambda c: {"objective": "rlhf"}, "objective is 'rlhf'; expected one of saess, sft, dpo"),
    (lambda c: {"objective": "sft"}, r"objective 'sft' knows no .CLS.: .* found ..sft., 1, 0.0, 4"),
    (lambda c: {"objective": "dpo", "probes": ProbeConfig(per_sequence=0), "rollouts": RolloutConfig(enabled=False)},
     "at loss.dpo_beta above 0; found rollouts.enabled False and loss.dpo_beta 0.1"),
    (lambda c: {"objective": "dpo", "probes": ProbeConfig(per_sequence=0), "loss": LossConfig(dpo_beta=0.0)},
     "found rollouts.enabled True and loss.dpo_beta 0.0"),
    (lambda c: {"stage": "pretrain", "probes": ProbeConfig(per_sequence=0), "rollouts": RolloutConfig(enabled=False),
                "loss": LossConfig(kl_weight=1.0)}, "documents have none; set loss.kl_weight to 0"),
    (lambda c: {"safety": SafetyConfig(r2=2)}, "min_window is 3, and a window of Rule 2 holds safety.r2 2 tokens"),
    (lambda c: {"model_overrides": {"vocab_size": 100}}, "token id 2[0-9]+, and the model has 100 tokens; is this its"),
    (lambda c: {"frozen_layers": 2}, "frozen_layers is 2; the model has 2 layers: expected 0 to 1"),
    (lambda c: {"lora": LoraConfig(2, ("q", "x"))}, r"lora is rank 2 on \('q', 'x'\); expected"),
    (lambda c: {"model_overrides": {"remat": "dot"}}, "remat is 'dot'; expected one of none"),
    (lambda c: {"model_overrides": {"dtype": "float16"}}, "dtype is 'float16'; expected"),
    (lambda c: {"model_overrides": {"attention": "flash"}}, "attention is 'flash'; expected one of"),
    (lambda c: {"model_overrides": {"frozen_layers": 1}}, "has frozen_layers, which would do nothing: leave it"),
    (lambda c: {"model_overrides": {"vocab_padding": 8}}, "has vocab_padding, which would do nothing: leave it out"),
])
def test_bad_settings_stop_before_anything_is_written(data, tmp_path, change, message):
  config = small_config(data)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train_and_evaluate(dataclasses.replace(config, **change(config)), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run"])
def test_an_address_is_no_workdir(data, tmp_path, workdir, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="bucket/run is an address; expected a path. Mount the bucket"):
    train.train_and_evaluate(small_config(data), workdir)
  assert not list(tmp_path.iterdir())


def test_one_class_data_is_refused(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "response": "r", "label": "benign"}) for i in range(40)))
  with pytest.raises(ValueError, match="malicious"):
    train.train_and_evaluate(small_config(path), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_of_a_start_that_was_trained_whole_only_the_shape_is_read(finished, data, tmp_path):
  llama, params, tokenizer, _ = pretrained.load_for_research(finished[1])
  export_hf(tmp_path / "start", llama.config, params, tokenizer, None)
  config = small_config(
      data, model="", model_overrides={}, weights=str(tmp_path / "start"), max_steps=1, eval_every=0,
      probes=ProbeConfig(per_sequence=0), rollouts=RolloutConfig(enabled=False))
  train.train_and_evaluate(config, tmp_path / "run")
  shape, _, words = pretrained.load_base(config)
  found, same_words = pretrained.start_of(config)
  assert found == shape and same_words.chat_template == words.chat_template
  (tmp_path / "start" / "model.safetensors").unlink()
  again, learned, _, _ = pretrained.load_for_research(tmp_path / "run")
  assert again.config == shape
  assert jax.tree.map(jnp.shape, learned) == jax.tree.map(jnp.shape, params)


def test_two_runs_do_not_share_a_workdir(data, tmp_path):
  (tmp_path / "run").mkdir()
  with staging.alone(tmp_path / "run"), pytest.raises(ValueError, match="Another process is at work in .*run; wait"):
    train.train_and_evaluate(small_config(data, rollouts=RolloutConfig(enabled=False)), tmp_path / "run")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]  # What it is a run of is not its to say.


def test_a_request_that_leaves_no_room_for_its_rollout_is_told_at_once(tmp_path):
  """Not when it is that request's turn: by then the workdir is of these settings."""
  rows = "".join(f"{'bad' if i % 2 else 'good'} request {i},{i % 2}\n" for i in range(24))
  (tmp_path / "rows.csv").write_text(f"prompt,label\n{rows}{'a long one' * 8},1\n")
  longest = len(chat.encode_prompt(hf.byte_tokenizer(), "a long one" * 8)[0])
  room = 256 - longest
  config = small_config(tmp_path / "rows.csv", rollouts=RolloutConfig(tokens=room + 1))
  with pytest.raises(ValueError, match=f"rollouts.tokens is {room + 1}, a .* has {longest} tokens.*to {room} or less"):
    train.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  fitting = dataclasses.replace(config, rollouts=RolloutConfig(tokens=room))
  preflight.check_rollouts(fitting, [10, longest], config_lib.model_config("tiny"))
  none = dataclasses.replace(config, rollouts=RolloutConfig(enabled=False, tokens=999))
  preflight.check_rollouts(none, [], config_lib.model_config("tiny"))


def test_a_run_does_not_go_on_with_other_rollouts(finished, tmp_path):
  """A step's number would mean other batches."""
  config, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  file = tmp_path / "run" / "rollouts.jsonl"
  first, *others = file.read_text().splitlines()
  record = json.loads(first)
  file.write_text("\n".join([json.dumps(record | {"tokens": record["tokens"][::-1]}), *others]) + "\n")
  with pytest.raises(ValueError, match="examples of this run were others when it was stopped .*its rollouts.jsonl"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_a_run_is_known_by_what_it_saved(finished, tmp_path):
  """Not by when that was: an evaluation goes on with files that were put back, and not with other weights."""
  identity = lambda path: subjects.load_models(config_lib.EvalConfig(checkpoint=str(path))).identity
  shutil.copytree(finished[1], tmp_path / "copy")
  for folder in (tmp_path / "copy" / "checkpoints").iterdir():
    os.utime(folder, (0, 0))
  assert identity(tmp_path / "copy") == identity(finished[1])
  saved = checkpoint.Saved(tmp_path / "copy")
  assert saved.fingerprint(3) != saved.fingerprint(6)
  shutil.rmtree(saved.folder / str(saved.best_step()))
  assert identity(tmp_path / "copy") != identity(finished[1])


def test_the_base_of_a_chain_of_runs_is_what_the_first_began_with(finished, tmp_path):
  """Else an attack in the base's own words would be in those of a model that has learned to refuse."""
  config, workdir, _ = finished
  llama, learned, tokenizer, safety = pretrained.load_for_research(workdir)
  published = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.125, learned)
  snapshot.write(tmp_path / "published", llama.config, published, tokenizer, safety, "random", {})

  def copied(name, **changes):
    run = dataclasses.replace(config, **{"model": "", "model_overrides": {}} | changes)
    shutil.copytree(workdir, tmp_path / name)
    (tmp_path / name / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    (tmp_path / name / "base.json").unlink()  # What the copy began with is another.
    return tmp_path / name

  base = lambda path: subjects.load_models(config_lib.EvalConfig(checkpoint=str(path))).weights("base")
  same = lambda found, params: jax.tree.map(np.testing.assert_array_equal, found.params, params)
  first = copied("first", weights=str(tmp_path / "published"))
  second = copied("second", weights=str(first), data=dataclasses.replace(config.data, chat_template="alpaca"))
  third = copied("third", weights=str(second), model_overrides={"max_seq_len": 96},
                 data=dataclasses.replace(config.data, chat_template="alpaca"))
  for run in (first, second, third):
    same(base(run), published)
  assert base(third).tokenizer.chat_template == pretrained.load_for_research(third)[2].chat_template
  assert base(third).tokenizer.chat_template != base(first).tokenizer.chat_template
  assert base(third).model.config.max_seq_len == 96  # As the model that it stands beside.
  same(base(copied("late", weights=str(workdir))), learned)  # That run began with noise.
  (second / "base.json").write_text(json.dumps({"fingerprint": "0" * 16}))
  with pytest.raises(ValueError, match="The run in .*second began from other weights than .*first holds now"):
    base(third)


@pytest.mark.parametrize("exported", [False, True])
def test_an_aligned_run_answers_no_prompts_for_its_base(finished, data, tmp_path, exported):
  config, workdir, _ = finished
  if exported:
    llama, params, tokenizer, safety = pretrained.load_for_research(workdir)
    workdir = tmp_path / "snapshot"
    snapshot.write(workdir, llama.config, params, tokenizer, safety, "a run", {})
  more = tmp_path / "more.jsonl"
  more.write_text(json.dumps({"prompt": "a new request", "response": "", "label": "malicious"}))
  rollouts = RolloutConfig(tokens=6, batch_size=16)
  config = dataclasses.replace(
      config, weights=str(workdir), rollouts=rollouts, data=dataclasses.replace(config.data, source=f"{data},{more}"))
  with pytest.raises(ValueError, match="lacks answers of the unaligned base to [0-9]+ prompts, and .* is aligned"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_another_run_s_workdir_is_refused_untouched(finished):
  config, workdir, _ = finished
  before = sorted((p, p.stat().st_mtime) for p in workdir.rglob("*"))
  with pytest.raises(ValueError, match="seed is 1 now and 0 there"):
    train.train_and_evaluate(dataclasses.replace(config, seed=1), workdir)
  assert before == sorted((p, p.stat().st_mtime) for p in workdir.rglob("*"))


def test_a_run_that_did_not_know_a_setting_had_its_default(tmp_path):
  config = config_lib.TrainConfig()
  (tmp_path / "run").mkdir()
  runs.claim(tmp_path / "run", config, {})
  file = tmp_path / "run" / "config.json"
  values = json.loads(file.read_text())
  del values["data"]["disguises"], values["safety"]["heeds_query"]
  file.write_text(json.dumps(values))
  runs.claim(tmp_path / "run", config, {})
  disguised = dataclasses.replace(config, data=dataclasses.replace(config.data, disguises=0.5))
  with pytest.raises(ValueError, match="holds another run: data.disguises is 0.5 now and 0.0 there[.]"):
    runs.claim(tmp_path / "run", disguised, {})


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
  config, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  wider = dataclasses.replace(config, model_overrides={"vocab_size": 260, "mlp_dim": 64})
  (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(wider)))
  with pytest.raises(ValueError, match=r"another model: .*mlp/down/kernel is \(2, 96, 48\) there, and \(2, 64, 48\)"):
    train.train_and_evaluate(wider, tmp_path / "run")


@pytest.mark.parametrize("values, message", [
    ({"optimiser": {}}, "config.optimiser does not exist.*Did you mean config.optimizer"),
    ({"data": {"bucket": [1]}}, "config.data.bucket does not exist"),
    ({"epochs": "three"}, "config.epochs is 'three'; expected a value of type int"),
    ({"data": {"buckets": 64}}, "config.data.buckets is 64"),
    ({"data": {"buckets": (256, 512.5)}}, "config.data.buckets is .256, 512.5., and 512.5 in it is no value of type"),
    ({"lora": {"projections": ("q", 1)}}, "config.lora.projections is .'q', 1., and 1 in it is no value of type str"),
])
def test_config_keys_and_types_are_checked(values, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_config_dict(TrainConfig, values)


def test_config_survives_its_dict():
  config = TrainConfig(data=DataConfig(buckets=(8, 16)), safety=config_lib.SAFETY_PRESETS["released"])
  assert config_lib.from_config_dict(TrainConfig, config_lib.to_config_dict(config)) == config
  assert config_lib.from_config_dict(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_an_axis_that_does_not_divide_is_replicated():
  shape = config_lib.model_config("smollm2_135m", num_layers=2)
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  boxed = jax.eval_shape(model.Llama(shape).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  places = sharding.shardings(boxed, mesh)
  attn = places["layers"]["attn"]
  assert attn["k"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp", None, None)  # 3 kv heads over 2.
  assert places["embed"]["embedding"].spec == jax.sharding.PartitionSpec("tensor", "fsdp")
