"""The state of a training run: its shapes and shardings first, its arrays straight where they belong."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from saess_jax import adapters, sharding, weights
from saess_jax import model as model_lib
from saess_jax.config import TrainConfig
from saess_jax.model import Llama


@flax.struct.dataclass
class TrainState:
  """All that a step changes, and the frozen weights that it reads.

  Attributes:
    step: int32 scalar, steps done.
    trainable: {"params": ..., "lora": ...}; with LoRA the pairs and the [CLS] parts, else all params; of either, what
      stands above `frozen_layers`.
    opt_state: of optax, for `trainable` alone.
    rng: uint32 [2], the run's key, from which the LoRA pairs began; steps draw nothing.
    frozen: {"params": ...}, the rest; not in checkpoints. For a KL term or DPO also "reference": the params that they
      compare with, as far as they are learned.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any
  rng: jax.Array
  frozen: Any

  def saved(self) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"step": self.step, "trainable": self.trainable, "opt_state": self.opt_state, "rng": self.rng}


def _state_at_start(
    config: TrainConfig, model: Llama, tx: optax.GradientTransformation, params: Any, rng: jax.Array) -> TrainState:
  reached = {name: leaf for name, leaf in params.items() if not model_lib.is_frozen(name, model.config)}
  trainable = {"params": reached}
  if config.lora.rank:
    learned = {name: leaf for name, leaf in reached.items() if name in adapters.CLS_PARAMS}
    trainable = {"params": learned, "lora": adapters.init_lora(reached, config.lora, rng)}
  frozen = {"params": {name: leaf for name, leaf in params.items() if name not in trainable["params"]}}
  if config.loss.kl_weight or config.objective == "dpo":
    frozen["reference"] = {
        name: leaf for name, leaf in trainable["params"].items() if name not in adapters.CLS_PARAMS}
  return TrainState(
      step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=tx.init(trainable),
      rng=jax.random.key_data(rng), frozen=frozen)


def abstract_state(
    config: TrainConfig, model: Llama, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state (jax.ShapeDtypeStruct); no array is made."""
  rng = jax.eval_shape(lambda: jax.random.key(config.seed))
  boxed = model_lib.abstract_params(model.config)
  state = jax.eval_shape(functools.partial(_state_at_start, config, model, tx), boxed, rng)
  return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), sharding.unbox(state),
      sharding.shardings(state, mesh))


def create_state(
    config: TrainConfig, model: Llama, base: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """The state at step 0, laid out over the mesh from its first byte, and its shardings.

  Args:
    base: params of the model's form of layers, without `vocab_padding`; host arrays go straight to their shards, in
      the model's `param_dtype`.
  """
  rng = jax.random.key(config.seed)
  boxed = model_lib.abstract_params(model.config)
  state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, tx, mesh))
  params = jax.tree.map(
      lambda box, leaf, place: box.replace_boxed(weights.put(np.asarray(leaf, box.value.dtype), place)),
      boxed,
      model_lib.resize_vocab(base, model.config.vocab_size + model.config.vocab_padding),
      sharding.shardings(boxed, mesh),
      is_leaf=lambda x: isinstance(x, nn.Partitioned))
  create = jax.jit(
      lambda params, rng: sharding.unbox(_state_at_start(config, model, tx, params, rng)),
      out_shardings=state_shardings)
  return create(params, rng), state_shardings
