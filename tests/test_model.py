"""The model against its own dense reference, and what may influence what. Parity with torch is in test_hf.py."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saess_jax import adapters, attention, config, masks, model
from saess_jax.config import LoraConfig
from saess_jax.masks import TokenKind

TINY = config.model_config("tiny", scan_layers=False)
A, Q, C, H, R, P = TokenKind.AUX, TokenKind.QUERY, TokenKind.CLS, TokenKind.HEADER, TokenKind.RESPONSE, TokenKind.PAD
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, TINY.vocab_size)
SFT_KINDS = jnp.asarray([[A, Q, Q, C, H, H, R, R, R, R, P, P], [A, A, Q, Q, Q, C, H, R, R, R, R, R]])
BLIND_KINDS = jnp.asarray([[A, Q, Q, H, H, C, R, R, R, R, P, P], [A, A, Q, Q, Q, H, C, R, R, R, R, R]])
PRETRAIN_KINDS = jnp.asarray([[A, Q, Q, H, H, R, R, R, R, C, P, P], [A, A, Q, Q, Q, H, R, R, R, R, R, C]])


def apply(params, shape=TINY, tokens=TOKENS, **how):
  return model.Llama(shape).apply({"params": params}, tokens, **how)


def test_without_kinds_it_is_a_plain_causal_model(tiny_params):
  out = apply(tiny_params)
  assert out.logits.shape == (2, 12, TINY.vocab_size) and out.logits.dtype == jnp.float32
  assert out.cls_logit is None and out.probe_logits is None and out.cache is None
  np.testing.assert_allclose(apply(tiny_params, tokens=TOKENS[:, :5]).logits, out.logits[:, :5], atol=1e-5)


@pytest.mark.parametrize("stage, kinds, sees", [
    ("sft", SFT_KINDS, True), ("sft", BLIND_KINDS, False), ("pretrain", PRETRAIN_KINDS, True)])
@pytest.mark.parametrize("scan", [False, True])
def test_fast_path_equals_dense_mask_in_values_and_gradients(tiny_params, stage, kinds, sees, scan):
  shape = TINY.replace(scan_layers=scan)
  params = model.stack_layers(tiny_params) if scan else tiny_params
  real = (kinds != P)[..., None]
  weight = jax.random.normal(jax.random.key(3), (2, 12, TINY.vocab_size))

  def loss(params, **how):
    out = apply(params, shape, kinds=kinds, **how)
    return jnp.sum(jnp.where(real, out.logits * weight, 0)) + jnp.sum(out.cls_logit * 50), (out.logits, out.cls_logit)

  (_, fast), fast_grads = jax.value_and_grad(loss, has_aux=True)(params, stage=stage)
  (_, dense), dense_grads = jax.value_and_grad(loss, has_aux=True)(
      params, mask=masks.attention_mask(kinds, stage, sees))
  np.testing.assert_allclose(jnp.where(real, fast[0], 0), jnp.where(real, dense[0], 0), atol=1e-5)
  np.testing.assert_allclose(fast[1], dense[1], atol=1e-5)

  def check(fast, dense):  # Beside the whole array: where large terms cancel, float32 keeps less of a single entry.
    assert np.linalg.norm(np.ravel(fast - dense)) <= 1e-5 * np.linalg.norm(np.ravel(dense))
  jax.tree.map(check, fast_grads, dense_grads)


@pytest.mark.parametrize("how", [{"stage": "sft"}, {"mask": masks.attention_mask(SFT_KINDS, "sft")}])
def test_ids_of_padding_and_cls_are_not_read(tiny_params, how):
  """Tokenizers pad with ids that the embeddings have no row for."""
  read = (SFT_KINDS != P) & (SFT_KINDS != C)
  expected, found = (
      apply(tiny_params, tokens=jnp.where(read, TOKENS, other), kinds=SFT_KINDS, **how)
      for other in (0, TINY.vocab_size))
  np.testing.assert_array_equal(found.logits[read], expected.logits[read])
  np.testing.assert_array_equal(found.cls_logit, expected.cls_logit)


@pytest.mark.parametrize("who", ["all", "malicious"])
def test_fast_path_with_the_released_code_s_visibility(tiny_params, who):
  label = jnp.asarray([True, False])
  mask = masks.attention_mask(SFT_KINDS, "sft", cls_sees_response=who, malicious=label)
  visible = masks.cls_visibility(SFT_KINDS, "sft", who, label)
  fast = apply(tiny_params, kinds=SFT_KINDS, stage="sft", cls_visible=visible)
  dense = apply(tiny_params, kinds=SFT_KINDS, mask=mask)
  np.testing.assert_allclose(fast.cls_logit, dense.cls_logit, atol=1e-5)
  assert jnp.abs(fast.cls_logit - apply(tiny_params, kinds=SFT_KINDS, stage="sft").cls_logit)[0] > 1e-3


def test_where_cls_is_stored_does_not_matter_to_the_dense_path(tiny_params):
  order = np.asarray([3, 0, 1, 2, *range(4, 12)])
  kinds, moved = SFT_KINDS[:1], SFT_KINDS[:1, order]
  there = apply(tiny_params, tokens=TOKENS[:1, order], kinds=moved, mask=masks.attention_mask(moved, "sft"))
  here = apply(tiny_params, tokens=TOKENS[:1], kinds=kinds, mask=masks.attention_mask(kinds, "sft"))
  np.testing.assert_allclose(there.logits[:, :10], here.logits[:, order][:, :10], atol=1e-5)
  np.testing.assert_allclose(there.cls_logit, here.cls_logit, atol=1e-5)


def _influence(tiny_params, kinds, stage, read):
  """[S]: how much each stored slot's embedding moves `read(output)`, by gradient."""
  embedding = tiny_params["embed"]["embedding"]
  def value(rows):
    # A vocabulary of its own for every slot, so that the gradient of a row is that of a slot.
    params = tiny_params | {"embed": {"embedding": jnp.concatenate([embedding, rows])}}
    slots = jnp.arange(len(rows))[None] + len(embedding)
    return read(apply(params, TINY.replace(vocab_size=len(embedding) + len(rows)), slots, kinds=kinds, stage=stage))
  return jnp.abs(jax.grad(value)(embedding[TOKENS[0, : kinds.shape[1]]])).sum(axis=1)


def test_causality_by_gradient(tiny_params):
  kinds = jnp.asarray([[A, Q, Q, C, H, R, R, R]])
  for slot in (1, 2, 4, 6):
    weight = jax.random.normal(jax.random.key(slot), (TINY.embed_dim,))
    moved = _influence(tiny_params, kinds, "sft", lambda out, slot=slot, weight=weight: out.hidden[0, slot] @ weight)
    before = np.asarray([j <= slot and kinds[0, j] != C for j in range(8)])
    assert (moved[before] > 1e-6).all() and (moved[~before] == 0).all()


def test_cls_is_moved_by_what_is_read_before_the_response_only(tiny_params):
  moved = _influence(tiny_params, jnp.asarray([[A, Q, Q, C, H, R, R, P]]), "sft", lambda out: out.cls_logit[0])
  # AUX reaches it through QUERY's hidden states, though CLS attends to QUERY alone.
  assert (moved[:3] > 1e-6).all() and (moved[3:] == 0).all()


def test_the_signal_reaches_header_and_response_and_no_one_before(tiny_params):
  def hidden(cls):
    return apply(tiny_params | {"cls_embedding": cls}, kinds=SFT_KINDS[:1], tokens=TOKENS[:1], stage="sft").hidden[0]
  change = jnp.abs(hidden(tiny_params["cls_embedding"]) - hidden(tiny_params["cls_embedding"] + 1)).max(axis=-1)
  assert (change[:3] == 0).all() and (change[3:10] > 1e-4).all()


def test_probes_equal_a_cls_of_that_view_and_are_seen_by_nobody(tiny_params):
  views = jnp.asarray([[[1, 0, 2], [0, 1, 4], [1, 0, 0]]] * 2)
  visible = masks.view_visibility(SFT_KINDS, views)
  plain = apply(tiny_params, kinds=SFT_KINDS, stage="sft")
  probed = apply(tiny_params, kinds=SFT_KINDS, stage="sft", probe_visible=visible)
  np.testing.assert_array_equal(plain.logits, probed.logits)
  np.testing.assert_array_equal(plain.cls_logit, probed.cls_logit)
  np.testing.assert_allclose(probed.probe_logits[:, 2], plain.cls_logit, atol=1e-5)  # That view is training's own.
  # The dense reference: a probe is one more CLS row, stored last, with its view as its row of the mask.
  for p in range(3):
    kinds = jnp.pad(SFT_KINDS, ((0, 0), (0, 1)), constant_values=int(C))
    mask = jnp.zeros((2, 13, 13), bool).at[:, :12, :12].set(masks.attention_mask(SFT_KINDS, "sft"))
    mask = mask.at[:, 12, :12].set(visible[:, p]).at[:, 12, 12].set(True)
    tokens = jnp.pad(TOKENS, ((0, 0), (0, 1)))
    positions = jnp.pad(masks.rope_positions(SFT_KINDS), ((0, 0), (0, 1)))
    out = apply(tiny_params, tokens=tokens, kinds=kinds, positions=positions, mask=mask)
    head = tiny_params["cls_head"]
    np.testing.assert_allclose(
        probed.probe_logits[:, p], (out.hidden[:, 12] @ head["kernel"] + head["bias"])[:, 0], atol=1e-5)


def test_scanned_and_unrolled_layers_agree(tiny_params):
  stacked = model.stack_layers(tiny_params)
  np.testing.assert_allclose(
      apply(stacked, TINY.replace(scan_layers=True)).logits, apply(tiny_params).logits, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, model.unstack_layers(stacked), tiny_params)


@pytest.mark.parametrize("scan", [True, False])
def test_no_gradient_reaches_frozen_layers(tiny_params, scan):
  shape = TINY.replace(scan_layers=scan, frozen_layers=1)
  params = model.stack_layers(tiny_params, frozen=1) if scan else tiny_params
  jax.tree.map(np.testing.assert_array_equal, model.unstack_layers(params), tiny_params)
  loss = lambda params, shape: jnp.sum(jnp.sin(apply(params, shape).hidden))
  whole = jax.grad(loss)(tiny_params, TINY)
  part = model.unstack_layers(jax.grad(loss)(params, shape))
  for name, gradient in part.items():
    expected = jax.tree.map(jnp.zeros_like, gradient) if model.is_frozen(name, shape) else whole[name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
  assert [name for name in tiny_params if model.is_frozen(name, shape)] == ["cls_embedding", "embed", "layers_0"]
  cache = model.init_cache(shape, 2, 12)
  filled = apply(params, shape, cache=cache).cache
  assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, cache)


def test_remat_changes_no_gradient(tiny_params):
  loss = lambda params, shape: jnp.sum(jnp.sin(apply(params, shape).logits))
  plain, *remat = (jax.grad(loss)(tiny_params, TINY.replace(remat=policy)) for policy in ("none", "dots", "full"))
  for other in remat:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, other)


@pytest.mark.parametrize("matmul_dtype", ["", "bfloat16"])
def test_remat_computes_again_what_it_says(tiny_params, matmul_dtype):
  def products(policy):
    shape = TINY.replace(remat=policy, matmul_dtype=matmul_dtype, scan_layers=True)
    loss = lambda params: jnp.sum(apply(params, shape).hidden)
    return str(jax.make_jaxpr(jax.grad(loss))(model.stack_layers(tiny_params))).count("dot_general[")
  plain = products("none")
  assert products("dots") - plain == 2  # Scores, and what they weigh.
  assert products("full") - plain == 8  # Those, q, k, v, o, gate and up; nothing reads down's again.


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steps_on_a_cache_equal_one_pass(tiny_params, scan):
  shape = TINY.replace(scan_layers=scan)
  params = model.stack_layers(tiny_params) if scan else tiny_params
  whole = apply(params, shape).logits
  out = apply(params, shape, tokens=TOKENS[:, :5], cache=model.init_cache(shape, 2, 12))
  np.testing.assert_allclose(out.logits, whole[:, :5], atol=1e-5)
  for i in range(5, 12):
    step = attention.Step(
        slot=jnp.asarray(i), visible=jnp.broadcast_to(jnp.arange(12) <= i, (2, 1, 12)), refresh=jnp.zeros(2, bool),
        sees_cls=jnp.zeros(2, bool))
    out = apply(params, shape, tokens=TOKENS[:, i : i + 1], positions=jnp.full((2, 1), i), cache=out.cache, step=step)
    np.testing.assert_allclose(out.logits[:, 0], whole[:, i], atol=1e-5)


def test_a_prompt_read_by_its_mask_leaves_cls_in_the_cache_too(tiny_params):
  mask = masks.attention_mask(SFT_KINDS, "sft")
  by_mask, fast = (
      apply(tiny_params, kinds=SFT_KINDS, cache=model.init_cache(TINY, 2, 12), **how).cache
      for how in ({"mask": mask}, {"stage": "sft"}))
  for ours, theirs in zip(by_mask, fast):
    np.testing.assert_allclose(ours.k[..., 0], theirs.k[..., 0], atol=1e-5)
    assert jnp.abs(ours.k[..., 0]).max() > 0.1


def test_bfloat16_compute_keeps_float32_logits_and_stays_near(tiny_params):
  low = apply(tiny_params, TINY.replace(dtype="bfloat16"), kinds=SFT_KINDS, stage="sft")
  high = apply(tiny_params, kinds=SFT_KINDS, stage="sft")
  assert low.logits.dtype == low.cls_logit.dtype == jnp.float32 and low.hidden.dtype == jnp.bfloat16
  assert jnp.abs(low.logits - high.logits).mean() < 0.05 * jnp.abs(high.logits).mean()


def test_contract_reads_bfloat16_and_sums_in_float32_forward_and_backward():
  x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 3, 4)), jax.random.normal(jax.random.key(1), (3, 4, 6, 7))
  cotangent = jax.random.normal(jax.random.key(2), (2, 5, 6, 7))
  plain = lambda x, kernel: jnp.tensordot(x, kernel, 2)
  out, pull = jax.vjp(plain, x, kernel)
  ours, ours_pull = jax.vjp(lambda x, kernel: model.contract(x, kernel, 2, "float32"), x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (ours, *ours_pull(cotangent)),
               (out, *pull(cotangent)))
  # In bfloat16: each of the three products is the float32 product of its rounded operands.
  rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
  low, low_pull = jax.vjp(lambda x, kernel: model.contract(x, kernel, 2, "bfloat16"), x, kernel)
  to_x, to_kernel = low_pull(cotangent)
  wanted, pull = jax.vjp(plain, rounded(x), rounded(kernel))
  np.testing.assert_allclose(low, wanted, rtol=1e-5, atol=1e-5)
  for got, want in zip((to_x, to_kernel), pull(rounded(cotangent))):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  # And no product reads anything wider, which is the point of it.
  backward = jax.make_jaxpr(lambda x, kernel, g: jax.vjp(
      lambda *inputs: model.contract(*inputs, 2, "bfloat16"), x, kernel)[1](g))(x, kernel, cotangent)
  products = [e for e in jax.tree.leaves(backward.jaxpr.eqns) if e.primitive.name == "dot_general"]
  assert len(products) >= 2
  assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}


def test_sliding_window_is_a_band(tiny_params):
  out = apply(tiny_params, TINY.replace(sliding_window=4))
  row, column = jnp.arange(12)[:, None], jnp.arange(12)
  band = jnp.broadcast_to((column <= row) & (column > row - 4), (2, 12, 12))
  np.testing.assert_allclose(out.logits, apply(tiny_params, mask=band).logits, atol=1e-5)
  assert jnp.abs(out.logits - apply(tiny_params).logits).max() > 1e-2


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lora_starts_as_nothing_and_merges_into_the_weights(tiny_params, scan):
  shape = TINY.replace(scan_layers=scan)
  boxed = jax.eval_shape(model.Llama(shape).init, jax.random.key(0), TOKENS)["params"]
  lora = nn.unbox(adapters.init_lora(boxed, LoraConfig(rank=3), jax.random.key(5)))
  params = model.stack_layers(tiny_params) if scan else tiny_params
  out = lambda params, lora: model.Llama(shape).apply({"params": params, "lora": lora}, TOKENS).logits
  np.testing.assert_array_equal(out(params, lora), apply(params, shape).logits)
  lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(6), x.shape), lora)
  merged = adapters.merge_lora(params, lora)
  assert jnp.abs(out(params, lora) - apply(params, shape).logits).max() > 1e-2
  np.testing.assert_allclose(apply(merged, shape).logits, out(params, lora), atol=1e-4)


@pytest.mark.parametrize("how, message", [
    ({"kinds": SFT_KINDS}, "neither stage"),
    ({"kinds": SFT_KINDS, "mask": jnp.ones((2, 12, 12), bool), "probe_visible": jnp.ones((2, 1, 12), bool)},
     "fast path"),
    ({"kinds": SFT_KINDS, "stage": "rlhf"}, "stage is 'rlhf'"),
    # RoPE would go on counting from one packed example to the next.
    ({"kinds": SFT_KINDS, "stage": "sft", "segments": jnp.ones((2, 12), jnp.int32),
      "cls_visible": jnp.ones((2, 1, 12), bool)}, "segments go with kinds, positions and cls_visible"),
    ({"kinds": SFT_KINDS, "positions": jnp.zeros((2, 12), jnp.int32),
      "step": attention.Step(slot=0, visible=None, refresh=None, sees_cls=None)},
     "A step goes with positions and a cache"),
    ({"probe_visible": jnp.ones((2, 1, 12), bool)}, "cls_visible and probe_visible go with kinds"),
    ({"cls_visible": jnp.ones((2, 12), bool)}, "cls_visible and probe_visible go with kinds"),
])
def test_bad_input(tiny_params, how, message):
  with pytest.raises(ValueError, match=message):
    apply(tiny_params, **how)


@pytest.mark.parametrize("changes, message", [
    ({"sliding_window": 0}, "sliding_window is 0; expected 1 or more"), ({"num_layers": 2.0}, "num_layers is 2.0; exp"),
    ({"num_kv_heads": 4}, "num_heads is 6, num_kv_heads 4 and head_dim 8; expected the first to be a multiple"),
    ({"head_dim": 7}, "and head_dim 7; expected .* the third to be even")])
def test_a_shape_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    TINY.replace(**changes)


@pytest.mark.parametrize("overrides, message", [
    ({"max_seq_len": "1024"}, "max_seq_len is '1024'; expected a value of type int"),
    ({"scan_layers": "False"}, "scan_layers is 'False'; expected a value of type bool"),
    ({"sliding_window": "none"}, "sliding_window is 'none'; expected a value of type int . None"),
    ({"layers": 3}, "ModelConfig has no field layers")])
def test_an_override_that_cannot_be(overrides, message):
  with pytest.raises(ValueError, match=message):
    config.model_config("tiny", **overrides)
  config.check_overrides({
      "rope_theta": 5, "sliding_window": None, "rope_scaling": {"factor": 2.0}, "scan_layers": False})


def test_the_dense_reference_multiplies_float32_as_such(tiny_params):
  """It is what the fast path is held against, on every device."""
  mask = jnp.ones((2, 12, 12), bool)
  program = jax.make_jaxpr(lambda: model.Llama(TINY).apply({"params": tiny_params}, TOKENS, mask=mask).logits)()
  found = re.findall("precision=(.*)", str(program))
  assert len(found) > 14 and all("HIGHEST" in precision for precision in found), found


def test_unknown_lora_projection():
  boxed = jax.eval_shape(model.Llama(TINY).init, jax.random.key(0), TOKENS)["params"]
  with pytest.raises(ValueError, match="some of"):
    adapters.init_lora(boxed, LoraConfig(rank=2, projections=("q", "router")), jax.random.key(0))
