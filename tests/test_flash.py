"""Causal attention without an S x S mask: equal to the mask, in memory linear in the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saess_jax import config, flash, sharding


def dense(q, k, v, window, segments):
  """The specification."""
  row = np.arange(q.shape[1])
  seen = row <= row[:, None]
  if window is not None:
    seen &= row[:, None] - row < window
  seen = np.broadcast_to(seen, (len(q), *seen.shape))
  if segments is not None:
    seen = seen & (segments[:, :, None] == segments[:, None])
  return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(seen)[:, None])


def values_and_gradients(attend, size, heads=6, kv_heads=2, dim=16, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, weight = (
      jax.random.normal(key, (2, size, n, dim), dtype) for key, n in zip(keys, (heads, kv_heads, kv_heads, heads)))
  def both(q, k, v, weight):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(weight)
  return jax.jit(both)(q, k, v, weight)


def assert_near(left, right, atol):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, rtol=atol), left, right)


def segments_of(size, seed):
  return np.sort(np.random.default_rng(seed).integers(0, 4, (2, size)), axis=1).astype(np.int32)


@pytest.mark.parametrize("size, block, window, packed", [
    (1, 8, None, False), (7, 8, 3, True), (16, 8, None, True), (20, 8, 11, False), (33, 8, 5, True),
    (33, 512, 5, True)])
def test_chunked_equals_the_mask_in_values_and_gradients(monkeypatch, size, block, window, packed):
  monkeypatch.setattr(flash, "BLOCK", block)
  segments = segments_of(size, 0) if packed else None
  ours = values_and_gradients(
      lambda q, k, v: flash.causal_attention(q, k, v, "chunked", window=window, segments=segments), size)
  assert_near(ours, values_and_gradients(lambda q, k, v: dense(q, k, v, window, segments), size), 2e-5)


@pytest.mark.parametrize("size, window, packed", [(128, None, False), (130, None, True), (200, 50, False)])
def test_splash_equals_the_mask_in_values_and_gradients(size, window, packed):
  """The TPU kernel, interpreted; its tiles are 128 wide, so these sizes have one and two of them."""
  segments = segments_of(size, 0) if packed else None
  how = dict(heads=4, dim=128)
  ours = values_and_gradients(
      lambda q, k, v: flash.causal_attention(q, k, v, "splash", window=window, segments=segments), size, **how)
  assert_near(ours, values_and_gradients(lambda q, k, v: dense(q, k, v, window, segments), size, **how), 1e-4)


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 3), (3, 3)])
def test_on_a_mesh_as_on_one_device(kernel, heads, kv_heads):
  """Rows over data and fsdp, heads over tensor where they divide."""
  how = dict(size=128 if kernel == "splash" else 12, heads=heads, kv_heads=kv_heads, dim=128)
  attend = lambda q, k, v: flash.causal_attention(q, k, v, kernel)
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])):
    ours = values_and_gradients(attend, **how)
  assert_near(jax.device_get(ours), values_and_gradients(lambda q, k, v: dense(q, k, v, None, None), **how), 1e-4)


def test_a_mesh_with_other_axes_is_refused():
  x = jnp.zeros((1, 128, 2, 128))
  with jax.set_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("x",))):
    with pytest.raises(ValueError, match=r"mesh has the axes \('x',\); expected data, fsdp, tensor among them"):
      flash.causal_attention(x, x, x, "splash")


def test_bfloat16_sums_in_float32():
  attend = lambda q, k, v: flash.causal_attention(q, k, v, "chunked")
  narrow = values_and_gradients(attend, 40, dtype=jnp.bfloat16)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrow))
  reference = values_and_gradients(lambda q, k, v: dense(q, k, v, None, None), 40, dtype=jnp.bfloat16)
  assert_near(narrow[1], reference[1], 0.06)
  widened = values_and_gradients(
      lambda q, k, v: dense(*(x.astype(jnp.float32) for x in (q, k, v)), None, None).astype(jnp.bfloat16), 40,
      dtype=jnp.bfloat16)
  assert_near(narrow[0], widened[0], 0.01)
  # Two products forward and five backward read bfloat16 and give float32; of one block all stand in the outer jaxpr.
  q, k = (jnp.zeros((2, 40, n, 16), jnp.bfloat16) for n in (6, 2))
  both = jax.make_jaxpr(lambda q, k, v, weight: jax.vjp(attend, q, k, v)[1](weight))(q, k, k, q)
  products = [equation for equation in both.jaxpr.eqns if equation.primitive.name == "dot_general"]
  assert len(products) == 7
  assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}
  assert {v.aval.dtype for e in products for v in e.outvars} == {jnp.dtype("float32")}


def test_memory_grows_with_the_length_and_not_with_its_square():
  def temporary(size):
    shapes = [jax.ShapeDtypeStruct((1, size, n, 16), jnp.float32) for n in (2, 1, 1)]
    attend = lambda q, k, v: jnp.sum(flash.causal_attention(q, k, v, "chunked"))
    return jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  short, middle, long = map(temporary, (2048, 8192, 32768))
  assert middle < 4.2 * short and long < 4.2 * middle


@pytest.mark.parametrize("where, dtype, expected", [
    ("tpu", "bfloat16", "splash"), ("tpu", "float32", "chunked"), ("gpu", "float32", "chunked"),
    ("cpu", "bfloat16", "chunked")])
def test_which_kernel_runs_of_itself(monkeypatch, where, dtype, expected):
  monkeypatch.setattr(flash, "platform", lambda: where)
  for name in ("splash", "chunked"):
    monkeypatch.setattr(flash, f"_{name}", lambda *given, name=name: name)
  x = jnp.zeros((1, 4, 2, 8), dtype)
  assert flash.causal_attention(x, x, x) == expected


@pytest.mark.parametrize("how, message", [
    ({"kernel": "flashy"}, "attention is 'flashy'; expected one of auto, chunked, cudnn, splash"),
    ({"kernel": "cudnn"}, "'cudnn' for float32 activations without segments"),
])
def test_bad_input(how, message):
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ValueError, match=message):
    flash.causal_attention(x, x, x, **how)
