"""A Llama in linen: pure functions of params, with one [CLS] row that says how malicious things are.

`Llama(config).apply({"params": params}, tokens)` with nothing else is the plain causal language model. With `kinds` and
`stage` the [CLS] takes part. Architecture here, numbers in `config.py`, sharding in `sharding.py`: a parameter carries
logical axis names only.

Axes: B batch, S stored sequence, E examples packed into a row, P probes, D embed, N query heads, K kv heads, H head
dim, F mlp, V vocab, L layers.

Params, unrolled form (`stack_layers` makes `layers` with a leading L axis out of `layers_0`, `layers_1`, ...):

  embed/embedding [V, D]        cls_embedding [D]        final_norm/scale [D]
  layers_0/attn_norm/scale [D]  cls_head/kernel [D, 1]   lm_head/kernel [D, V] (absent when tied)
  layers_0/attn/{q [D, N, H], k, v [D, K, H], o [N, H, D]}/kernel
  layers_0/mlp_norm/scale [D]   cls_head/bias [1]
  layers_0/mlp/{gate, up [D, F], down [F, D]}/kernel
  layers_0/attn/{q [N, H], k, v [K, H]}/bias (with `config.attention_bias` alone)

With `config.frozen_layers` the lowest layers are stacked as `frozen_layers`, apart from the `layers` that are trained.
Any projection also takes a low-rank update from the collection "lora" (`adapters.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import attention, masks
from saess_jax.config import CLS_HEAD_DEVIATION, ModelConfig, dtype_of, precision_of

Params = dict[str, Any]
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Output:
  """What one call returns.

  Attributes:
    hidden: [B, S, D] after the final norm, in the compute dtype.
    logits: float32 [B, S, V]. A jitted caller that does not read them does not pay for them.
    cls_logit: float32 [B], log-odds of malicious from the stored CLS; [B, E] of packed rows; None without kinds. A row
      without CLS gives a number that means nothing.
    probe_logits: float32 [B, P], the same from each probe; None without probes.
    cache: `LayerCache` stacked on L, or a tuple of L of them when layers are unrolled; None without one.
  """

  hidden: jax.Array
  logits: jax.Array
  cls_logit: jax.Array | None = None
  probe_logits: jax.Array | None = None
  cache: Any = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x: jax.Array, kernel: jax.Array, axes: int, dtype: str) -> jax.Array:
  """The product of x's last `axes` axes with the kernel's first, of operands rounded to `dtype` and summed in float32.

  The two products of the backward pass read `dtype` too, which automatic differentiation would not do: the cotangent of
  a float32 sum is float32, and a product of two dtypes runs in the wider one.

  Returns:
    [..., the kernel's other axes] in x's dtype.
  """
  return _contract(x, kernel, axes, dtype)


def _contract(x, kernel, axes, dtype):
  return _product(x, kernel, dtype, range(x.ndim - axes, x.ndim), range(axes)).astype(x.dtype)


def _product(a, b, dtype, a_axes, b_axes):
  dtype = dtype_of(dtype)
  return jax.lax.dot_general(
      a.astype(dtype), b.astype(dtype), ((tuple(a_axes), tuple(b_axes)), ((), ())), precision=precision_of(dtype),
      preferred_element_type=jnp.float32)


def _contract_forward(x, kernel, axes, dtype):
  # Not `contract`: as a call of its own the product would be hidden from the policy that saves products ("dots").
  return _contract(x, kernel, axes, dtype), (x.astype(dtype_of(dtype)), kernel)


def _contract_backward(axes, dtype, saved, cotangent):
  x, kernel = saved
  batch, free = x.ndim - axes, kernel.ndim - axes
  to_x = _product(cotangent, kernel, dtype, range(batch, batch + free), range(axes, kernel.ndim))
  to_kernel = _product(x, cotangent, dtype, range(batch), range(batch))
  return to_x.astype(cotangent.dtype), to_kernel.astype(kernel.dtype)


contract.defvjp(_contract_forward, _contract_backward)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
        "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],),
        dtype_of(self.config.param_dtype))
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.norm_eps)
    return (wide * scale).astype(x.dtype)


class Projection(nn.Module):
  """Contracts the last `contracted` axes of x with a kernel of shape `shape`,
  plus a low-rank update if one is given, plus a bias over the kernel's other axes if asked for.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  config: ModelConfig
  contracted: int = 1
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in = math.prod(self.shape[: self.contracted])
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), self.axes)
    kernel = self.param("kernel", init, self.shape, dtype_of(self.config.param_dtype))
    dtype = self.config.matmul_dtype or self.config.dtype
    out = contract(x, kernel, self.contracted, dtype)
    if self.has_variable("lora", "a"):
      a, b = (self.get_variable("lora", name) for name in ("a", "b"))
      out += contract(contract(x, a, self.contracted, dtype), b, 1, dtype)
    if self.bias:
      free = slice(self.contracted, None)
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[free])
      bias = self.param("bias", init, self.shape[free], dtype_of(self.config.param_dtype))
      out += jnp.broadcast_to(bias.astype(out.dtype), out.shape)
    return out


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, angles, sight, step, cache):
    c = self.config
    project = lambda heads, axis, name: Projection(
        (c.embed_dim, heads, c.head_dim), ("embed", axis, "head_dim"), c, bias=c.attention_bias, name=name)(x)
    q = attention.apply_rope(project(c.num_heads, "heads", "q"), angles)
    k = attention.apply_rope(project(c.num_kv_heads, "kv_heads", "k"), angles)
    v = project(c.num_kv_heads, "kv_heads", "v")
    if step is not None:
      out, cache = attention.attend_step(q, k, v, step, cache)
    else:
      out = attention.attend(q, k, v, sight, c)
      cache = None if cache is None else _fill(cache, k, v, sight)
    output = Projection(
        (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed"), c, contracted=2, name="o")
    return output(out), cache


def _fill(cache: attention.LayerCache, k: jax.Array, v: jax.Array, sight: attention.Sight) -> attention.LayerCache:
  """Writes the K and V [B, S, K, H] of a whole prompt to slots 0..S-1, those of CLS to its own place too."""
  def write(places, new, axis):
    if sight.cls_index is not None:
      cls = new.at[jnp.arange(len(new)), sight.cls_index[:, 0]].get(mode="clip")
      places = jax.lax.dynamic_update_slice_in_dim(places, jnp.expand_dims(cls, axis), 0, axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(places, jnp.moveaxis(new, 1, axis), 1, axis=axis)
  return attention.LayerCache(k=write(cache.k, k, 3), v=write(cache.v, v, 2))


class Mlp(nn.Module):
  """SwiGLU."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    into = lambda name: Projection((c.embed_dim, c.mlp_dim), ("embed", "mlp"), c, name=name)(x)
    return Projection((c.mlp_dim, c.embed_dim), ("mlp", "embed"), c, name="down")(nn.silu(into("gate")) * into("up"))


class Block(nn.Module):
  """One layer, pre-norm."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, cache, angles, sight, step):
    mixed, cache = Attention(self.config, name="attn")(
        RMSNorm(self.config, name="attn_norm")(x), angles, sight, step, cache)
    x = nn.with_logical_constraint(x + mixed, ("batch", "length", "activation"))
    x += Mlp(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
    return nn.with_logical_constraint(x, ("batch", "length", "activation")), cache


class Llama(nn.Module):
  """See the module docstring."""

  config: ModelConfig

  @nn.compact
  def __call__(
      self, tokens: jax.Array, *, kinds: jax.Array | None = None, positions: jax.Array | None = None,
      stage: str | None = None, mask: jax.Array | None = None, cls_visible: jax.Array | None = None,
      probe_visible: jax.Array | None = None, segments: jax.Array | None = None, cache: Any = None,
      step: attention.Step | None = None,
  ) -> Output:
    """Runs the model over full sequences, or over one decoding step.

    Args:
      tokens: int32 [B, S]; ids at CLS and PAD slots are not read.
      kinds: int32 [B, S] of TokenKind. None: every token is plain text, no CLS.
      positions: int32 [B, S] of RoPE. None: `masks.rope_positions(kinds)`, or 0, 1, ... without kinds.
      stage: "sft" or "pretrain" with kinds in a full sequence. CLS must be stored at `masks.cls_slot` and PAD at the
        right, which makes causal attention exact; for any other order give the dense `mask`.
      mask: bool [B, S, S], the dense reference path; `masks.attention_mask` makes it.
      cls_visible: bool [B, S], what CLS sees, in place of the stage's rule; [B, E, S] with segments, of each CLS.
      probe_visible: bool [B, P, S], what each of P probes sees; nobody sees a probe, and they cost P tokens.
      segments: int32 [B, S], which of the packed examples a token belongs to, from 1; 0 is padding. Then give
        positions and cls_visible too (`masks.apart` helps).
      cache: from `init_cache`; a full sequence fills slots 0..S-1, a step one more.
      step: decoding: tokens are [B, 1], or [B, 2] with CLS first and kinds; needs positions and cache.

    Raises:
      ValueError: kinds in a full sequence with neither stage nor mask, probes together with a mask, segments, a step or
        what [CLS] sees without what belongs to them, [CLS] or a mask in sequences beyond the sliding window, or an
        unknown remat.
    """
    if kinds is None and (cls_visible is not None or probe_visible is not None):
      raise ValueError("cls_visible and probe_visible go with kinds: without them every token is plain text.")
    if segments is not None and (kinds is None or positions is None or cls_visible is None or cls_visible.ndim != 3):
      raise ValueError(
          "segments go with kinds, positions and cls_visible [B, E, S], one row for each packed example.")
    if step is not None and (positions is None or cache is None):
      raise ValueError("A step goes with positions and a cache.")
    c, dtype = self.config, dtype_of(self.config.dtype)
    embedding = self.param(
        "embed", lambda key: {"embedding": nn.with_logical_partitioning(
            nn.initializers.normal(0.02), ("vocab", "embed"))(
                key, (c.vocab_size + c.vocab_padding, c.embed_dim), dtype_of(c.param_dtype))}
    )["embedding"]
    cls_embedding = self.param(
        "cls_embedding", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("norm",)), (c.embed_dim,),
        dtype_of(c.param_dtype))

    if kinds is not None:  # An id that is no row would make NaN, which weights of 0 do not take out of a sum.
      tokens = jnp.where((kinds == masks.TokenKind.PAD) | (kinds == masks.TokenKind.CLS), 0, tokens)
    x = jnp.take(embedding, tokens, axis=0).astype(dtype)
    if kinds is not None:
      x = jnp.where((kinds == masks.TokenKind.CLS)[..., None], cls_embedding.astype(dtype), x)
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None] if kinds is None else masks.rope_positions(kinds)
    positions = jnp.broadcast_to(positions, tokens.shape)
    if probe_visible is not None:
      probes = probe_visible.shape[1]
      x = jnp.concatenate([x, jnp.broadcast_to(cls_embedding.astype(dtype), (x.shape[0], probes, c.embed_dim))], axis=1)
      positions = jnp.pad(positions, ((0, 0), (0, probes)))
    x = nn.with_logical_constraint(x, ("batch", "length", "activation"))
    is_cls = _places_of_cls(tokens, kinds, segments, cls_visible)
    sight = None if step is not None else self._sight(
        tokens, kinds, stage, mask, is_cls, cls_visible, probe_visible, segments)

    x, cache = self._layers(x, cache, attention.rope_angles(positions, c), sight, step)
    hidden = RMSNorm(c, name="final_norm")(x)
    size = tokens.shape[1]
    if c.tie_embeddings:
      head = embedding.T
    else:
      head = self.param("lm_head", lambda key: {"kernel": nn.with_logical_partitioning(
          nn.initializers.normal(c.embed_dim**-0.5), ("embed", "vocab"))(
              key, (c.embed_dim, c.vocab_size + c.vocab_padding), dtype_of(c.param_dtype))})["kernel"]
    logits = logits_of(hidden[:, :size], head, c.vocab_size)

    classify = ClsHead(name="cls_head")
    cls_logit = probe_logits = None
    if kinds is not None or self.is_initializing():
      at_cls = jnp.take_along_axis(hidden[:, :size], jnp.argmax(is_cls, axis=2)[..., None], axis=1)
      cls_logit = classify(at_cls) if segments is not None else classify(at_cls)[:, 0]
    if probe_visible is not None:
      probe_logits = classify(hidden[:, size:])
    return Output(hidden[:, :size], logits, cls_logit, probe_logits, cache)

  def _sight(
      self, tokens, kinds, stage, mask, is_cls, cls_visible, probe_visible, segments) -> attention.Sight:
    """Turns the caller's words about visibility into what the layers read."""
    size, window = tokens.shape[1], self.config.sliding_window
    if window is not None and size > window and (mask is not None or kinds is not None):
      raise ValueError(
          f"{size} stored tokens exceed the sliding window of {window}, in which [CLS] would be lost and of which no "
          "mask of the caller knows; shorten the sequence, or set sliding_window to None.")
    if mask is not None and probe_visible is not None:
      raise ValueError("probe_visible goes with the fast path; with a dense mask, store the probes as CLS rows of it.")
    cls_index = None if kinds is None else jnp.where(is_cls.any(axis=2), jnp.argmax(is_cls, axis=2), size)
    if mask is not None:
      return attention.Sight(mask=mask, cls_index=cls_index)
    if kinds is None:
      return attention.Sight()
    if stage is None:
      raise ValueError('kinds were given with neither stage ("sft", "pretrain") nor mask: who may see [CLS]?')
    if cls_visible is None:
      cls_visible = masks.cls_visibility(kinds, stage)
    rows = cls_visible if cls_visible.ndim == 3 else cls_visible[:, None]
    if probe_visible is not None:
      rows = jnp.concatenate([rows, probe_visible], axis=1)
    return attention.Sight(
        cls_index=cls_index, rows=rows & (kinds != masks.TokenKind.CLS)[:, None], segments=segments)

  def _layers(self, x, cache, angles, sight, step):
    c = self.config
    if c.remat not in REMAT_POLICIES:
      raise ValueError(f"remat is {c.remat!r}; expected one of {', '.join(REMAT_POLICIES)}.")
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=not c.scan_layers, policy=REMAT_POLICIES[c.remat])
    if c.scan_layers:
      stack = lambda length, name: nn.scan(
          block, variable_axes={"params": 0, "lora": 0, "intermediates": 0}, split_rngs={"params": True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast), length=length,
          metadata_params={nn.PARTITION_NAME: "layers"})(c, name=name)
      if not c.frozen_layers:
        return stack(c.num_layers, "layers")(x, cache, angles, sight, step)
      low, high = (jax.tree.map(lambda leaf, part=part: leaf[part], cache)
                   for part in (slice(c.frozen_layers), slice(c.frozen_layers, None)))
      x, low = stack(c.frozen_layers, "frozen_layers")(x, low, angles, sight, step)
      x, high = stack(c.num_layers - c.frozen_layers, "layers")(jax.lax.stop_gradient(x), high, angles, sight, step)
      return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), low, high)
    caches = []
    for i in range(c.num_layers):
      if c.frozen_layers and i == c.frozen_layers:
        x = jax.lax.stop_gradient(x)
      x, layer_cache = block(c, name=f"layers_{i}")(x, None if cache is None else cache[i], angles, sight, step)
      caches.append(layer_cache)
    return x, None if cache is None else tuple(caches)


class ClsHead(nn.Module):
  """One logit in float32: the log-odds of malicious.

  Not zero at first: from zero, no gradient would reach the layers before the head has grown.
  """

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    kernel = self.param(
        "kernel", nn.with_logical_partitioning(nn.initializers.normal(CLS_HEAD_DEVIATION), ("norm", None)),
        (hidden.shape[-1], 1), jnp.float32)
    bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (1,), jnp.float32)
    return (jnp.matmul(hidden.astype(jnp.float32), kernel, precision=precision_of(kernel.dtype)) + bias)[..., 0]


def _places_of_cls(tokens, kinds, segments, cls_visible) -> jax.Array:
  """bool [B, E, S]: where each example's CLS is stored."""
  if kinds is None:
    return jnp.zeros_like(tokens, bool)[:, None]
  if segments is None:
    return (kinds == masks.TokenKind.CLS)[:, None]
  return masks.apart(kinds, segments, cls_visible.shape[1]) == masks.TokenKind.CLS


def is_frozen(name: str, config: ModelConfig) -> bool:
  """Whether `config.frozen_layers` keeps gradients from the top-level param `name`; a tied head is an embedding."""
  lowest = {f"layers_{i}" for i in range(config.frozen_layers)}
  return config.frozen_layers > 0 and name in {"embed", "cls_embedding", "frozen_layers"} | lowest


def abstract_params(config: ModelConfig) -> Params:
  """Shapes and dtypes of the params, each with its logical axis names (`nn.LogicallyPartitioned`); no array is made."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(Llama(config).init, key, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def logits_of(hidden: jax.Array, head: jax.Array, vocab_size: int | None = None) -> jax.Array:
  """float32 [..., V] of hidden states [..., D] by a head [D, V or more].

  Args:
    vocab_size: columns behind it are no tokens (`ModelConfig.vocab_padding`) and get no logit. None: all columns do.
  """
  return jnp.matmul(
      hidden, head.astype(hidden.dtype), precision=precision_of(hidden.dtype),
      preferred_element_type=jnp.float32)[..., :vocab_size]


def output_head(params: Params) -> jax.Array:
  """The matrix [D, V] from hidden states to logits, tied or not."""
  return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def init_cache(config: ModelConfig, batch: int, slots: int) -> Any:
  """An empty cache of `slots` tokens for `batch` rows,
  in the form (stacked or per layer) that the model's layers have.
  """
  front = (config.num_layers,) if config.scan_layers else ()
  empty = lambda *last: jnp.zeros((*front, batch, config.num_kv_heads, *last), dtype_of(config.dtype))
  one = lambda: attention.LayerCache(k=empty(config.head_dim, 1 + slots), v=empty(1 + slots, config.head_dim))
  return one() if config.scan_layers else tuple(one() for _ in range(config.num_layers))


# Parameters with an axis for the vocabulary: module, leaf, axis.
VOCAB_LEAVES = (("embed", "embedding", 0), ("lm_head", "kernel", 1))


def resize_vocab(params: Params, rows: int) -> Params:
  """Embeddings and an untied head, whichever `params` has, with `rows` in all: cut, or zeros behind
  (`ModelConfig.vocab_padding`).
  """
  def resize(x, axis):
    missing = rows - x.shape[axis]
    if missing < 0:
      return x[(slice(None),) * axis + (slice(rows),)]
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
  return {**params, **{
      name: {leaf: resize(params[name][leaf], axis)} for name, leaf, axis in VOCAB_LEAVES if name in params}}


def with_rows(model: Llama, params: Params, rows: jax.Array) -> tuple[Llama, Params]:
  """The model with `rows` [R, D] behind its embeddings: free vectors that a prompt can name by id.

  Row i has the id `len(embedding) + i`. It counts as padding of the vocabulary: it has no logit and is never sampled.
  """
  table = params["embed"]["embedding"]
  extended = {**params, "embed": {"embedding": jnp.concatenate([table, jnp.asarray(rows, table.dtype)])}}
  if "lm_head" in params:
    extended["lm_head"] = {"kernel": jnp.pad(params["lm_head"]["kernel"], ((0, 0), (0, len(rows))))}
  padding = len(table) - model.config.vocab_size + len(rows)
  return Llama(model.config.replace(vocab_padding=padding)), extended


def stack_layers(params: Params, frozen: int = 0) -> Params:
  """Unrolled params (`layers_0`, ...) -> scan form (`layers`, leaves with a leading L axis). Others pass through.

  Args:
    frozen: the lowest layers that go into `frozen_layers` instead (`ModelConfig.frozen_layers`).
  """
  count = sum(name.startswith("layers_") for name in params)
  stacked = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
  for name, indices in (("frozen_layers", range(frozen)), ("layers", range(frozen, count))):
    if indices:
      stacked[name] = jax.tree.map(_stack, *(params[f"layers_{i}"] for i in indices))
  return stacked


def _stack(*leaves):
  """Host arrays stay on the host: all of a large model is not to pass through one device."""
  return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)


def unstack_layers(params: Params, first: int = 0) -> Params:
  """The inverse of `stack_layers`. `first`: the lowest layer's number, above 0 where `params` lack those below it."""
  unrolled, index = {name: leaf for name, leaf in params.items() if name not in ("frozen_layers", "layers")}, first
  for stack in (params[name] for name in ("frozen_layers", "layers") if name in params):
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
      unrolled[f"layers_{index}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
      index += 1
  return unrolled
