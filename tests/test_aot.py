"""What is counted in programs for a pod; with libtpu, a step compiled for a TPU that is not there."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from saess_jax import aot, config, flash, sharding, train
from saess_jax.config import DataConfig, MeshConfig, ProbeConfig, RolloutConfig, SafetyConfig, TrainConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (pip install libtpu)")


def test_products_are_counted_and_loops_times_their_length():
  def layers(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]
  x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
  one = 2 * 4 * 8 * 8
  assert aot.flops_of(jax.make_jaxpr(layers)(x, w).jaxpr) == 5 * one
  backward = jax.grad(lambda w, x: jnp.sum(layers(x, w)))
  assert aot.flops_of(jax.make_jaxpr(backward)(w, x).jaxpr) == 3 * 5 * one
  recomputed = jax.grad(lambda w, x: jnp.sum(jax.checkpoint(layers)(x, w)))
  assert aot.flops_of(jax.make_jaxpr(recomputed)(w, x).jaxpr) >= 4 * 5 * one


@pytest.mark.parametrize("kernel", ["splash", "chunked"])
def test_attention_counts_half_a_square(kernel):
  q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
  attend = functools.partial(flash.causal_attention, kernel=kernel)
  square = 2 * 2 * 4 * 256 * 256 * 128  # One product over all pairs.
  counted = aot.flops_of(jax.make_jaxpr(attend)(q, q, q).jaxpr)
  assert counted == (square if kernel == "splash" else 2 * square)  # A sequence of one block is not cut.
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32))
  counted = aot.flops_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, q, q).jaxpr)
  # The kernel's backward pass also has a product of a row each: the row sums of weights and cotangents.
  assert counted == pytest.approx((1 + 1.5 + 2 if kernel == "splash" else 2 + 5) * square, rel=2e-3)


def test_collectives_are_read_from_the_program():
  hlo = """
%piece (p: bf16[8,128]) -> bf16[64,128] {
  %a.1 = bf16[64,128]{1,0} all-gather(bf16[8,128]{1,0} %p), channel_id=1, dimensions={0}
%all-reduce-scatter.2 (q: f32[64], r: f32[32]) -> (f32[8], f32[4]) {
  %s = (f32[64]{0}, f32[32]{0}) all-reduce(%q, %r), channel_id=2, to_apply=%sum
ENTRY %main (x: f32[16]) -> f32[32] {
  %a.2 = bf16[64,128]{1,0} all-gather(bf16[8,128]{1,0} %p), channel_id=1, dimensions={0}
  %b = (f32[16]{0}, f32[128]{0}) all-gather-start(f32[16]{0} %q), channel_id=3, dimensions={0}
  %c = f32[128]{0} all-gather-done((f32[16]{0}, f32[128]{0}) %b)
  %d = f32[32]{0} all-reduce(f32[32]{0} %r), channel_id=4, to_apply=%sum
  %e = f32[32]{0} all-reduce(f32[32]{0} %r), channel_id=5, to_apply=%sum
"""
  assert aot.collectives_of(hlo) == {
      "all-gather": 64 * 128 * 2 + 128 * 4, "reduce-scatter": (64 + 32) * 4, "all-reduce": 2 * (2 * 32 * 4)}


def small(**changes):
  return dataclasses.replace(TrainConfig(
      model="llama2_7b", model_overrides=dict(
          num_layers=2, embed_dim=256, num_heads=2, num_kv_heads=2, mlp_dim=256, vocab_size=1000),
      data=DataConfig(max_length=256, max_response=128, buckets=(256,), batch_size=4),
      probes=ProbeConfig(per_sequence=2), rollouts=RolloutConfig(enabled=False)), **changes)


def test_the_cost_of_cls_is_that_of_a_few_rows():
  """Traced only: no compiler is needed to count."""
  chosen = small()
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  shape = train.config_of_training(chosen, config.model_config(chosen.model, **chosen.model_overrides))
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    count = lambda chosen, **how: aot.flops_of(aot.train_program(chosen, shape, mesh, **how).trace().jaxpr)
    plain = count(chosen, loss_of=train.plain_loss)
    with_cls = count(dataclasses.replace(chosen, probes=ProbeConfig(per_sequence=0)))
    with_probes = count(chosen)
  assert 0 < with_cls / plain - 1 < 0.01
  assert 0.005 < with_probes / with_cls - 1 < 0.03  # Two rows more behind 256.


@pytest.mark.parametrize("topology, message", [
    ("v5e", "topology is 'v5e'; expected CHIP:AxB"), ("v9:2x2", "expected CHIP:AxB.*v4, v5e, v5p, v6e")])
def test_bad_topologies(topology, message):
  with pytest.raises(ValueError, match=message):
    aot.devices_of(topology)


@needs_libtpu
def test_a_mesh_that_does_not_fit_is_refused_before_compiling():
  with pytest.raises(ValueError, match="does not divide the 4 devices"):
    aot.report_train(small(mesh=MeshConfig(3, 1, 1)), "v5e:2x2")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(1, 4, 1), MeshConfig(1, 2, 2)])
def test_a_step_compiled_for_a_tpu(mesh):
  report = aot.report_train(small(mesh=mesh), "v5e:2x2")
  assert report["fits"] and 0 < report["hbm_gb_per_device"] < 1 and 0 < report["mfu_bound"] < 1
  assert report["collective_bytes_per_device"]["all-gather"] > 0 and 0 < report["cls_extra_flops_ratio"] < 0.01


@pytest.mark.parametrize("safety", [None, SafetyConfig(), SafetyConfig(dependency="high", schedule="annealing")])
def test_the_decoding_program_traces_with_any_settings(safety):
  shape = config.model_config("tiny", scan_layers=False)
  with jax.set_mesh(mesh := sharding.make_mesh(MeshConfig(2, 2, 2))), nn.logical_axis_rules(sharding.RULES):
    program = aot.decode_program(TrainConfig(), shape, mesh, safety, batch=4, prompt=32, tokens=16, one_step=True)
    state = jax.eval_shape(program.function, *program.arguments)
  assert state.result.tokens.shape == (4, 16)


@needs_libtpu
@pytest.mark.slow
def test_decoding_compiled_for_a_tpu():
  report = aot.report_decode(small(mesh=MeshConfig(1, 2, 2)), "v5e:2x2", batch=4, prompt=128, tokens=128)
  assert report["fits"] and 1 <= report["bytes_ratio_each_vs_off"] < 2
