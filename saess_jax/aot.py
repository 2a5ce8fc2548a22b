"""What a training step or decoding costs on a TPU pod, found on a machine without one.

  python -m saess_jax.aot --config configs/llama2_7b.py --topology v5e:16x16 [--what train|decode] [--json]

Compiles the true program (`train.train_step`, `decode.advance`) ahead of time for the topology, with the compiler that
libtpu brings, and reads off what it says: memory a device needs, by part; bytes it moves; collectives. Matrix products
are counted in the traced program, a loop's body times its length, because XLA's own analysis counts it once. For the
same reason bytes and collectives come from programs of one and two unrolled layers: the difference is a layer's.

The time of a step is the longest of three, as if they overlapped perfectly: products at the peak rate, HBM traffic at
its bandwidth, collectives at that of the chip's links. So `mfu_bound` is what the roofline allows, not a measurement.
Model FLOPs are those without recomputation (remat).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saess_jax import attention, command, decode, preflight, sharding, train
from saess_jax import config as config_lib
from saess_jax.config import ModelConfig, SafetyConfig, TrainConfig
from saess_jax.data import pipeline
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, abstract_params
from saess_jax.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, from the vendor's system architecture pages: decimal units as there, but for memory."""

  flops: float  # bfloat16, a second.
  hbm: float  # Bytes, 2^30 a GB.
  hbm_bandwidth: float  # Bytes a second.
  link_bandwidth: float  # Bytes a second out of the chip, over all its links.


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
}


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
  """"v5e:16x16" -> the chip and its devices, none of which has to exist.

  Raises:
    ValueError: an unknown chip, a topology that the compiler refuses, or no libtpu.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
    raise ValueError(f"topology is {topology!r}; expected CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)}.")
  # libtpu asks the machine which TPU it sits in unless it is told that there is none.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  try:
    return CHIPS[name], topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:  # Whatever the plugin raises.
    raise ValueError(
        f"No compiler for {topology}: {error}. Install libtpu (pip install libtpu), check the topology's size, and let "
        "any other process that uses libtpu end: it serves one at a time.") from error


def flops_of(jaxpr: Any, times: int = 1) -> float:
  """FLOPs of the matrix products in a traced program, over all devices; a loop of unknown length counts once."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, repeat = equation.primitive.name, times
    if name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2.0 * times * math.prod(sizes) * math.prod(equation.outvars[0].aval.shape)
    elif name == "pallas_call":
      total += times * _splash_flops(equation)
      continue
    elif name == "scan":
      repeat = times * equation.params["length"]
    elif name == "shard_map":
      repeat = times * equation.params["mesh"].size
    for inner in jaxprs_in_params(equation.params):
      total += flops_of(inner, repeat)
  return total


def _splash_flops(equation: Any) -> float:
  """Of one call of the attention kernel: 2 products forward, 3 for dq, 4 for dk and dv, over half a square."""
  name = str(equation.params["name"])
  products = 4 if "dkv" in name else 3 if "dq" in name else 2
  *batch, heads, size, dim = next(
      v.aval.shape for v in equation.invars if len(v.aval.shape) >= 3 and v.aval.shape[-1] > 1
      and jnp.issubdtype(v.aval.dtype, jnp.floating))
  return products * 2.0 * math.prod(batch) * heads * size * size * dim / 2


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[a-z][^=]*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\(")


def collectives_of(hlo: str) -> dict[str, float]:
  """Bytes that one device sends in each kind of collective, in the text of a compiled program; loop bodies once.

  The compiler cuts a collective that it overlaps with products into pieces: what has the same channel is one. A
  reduce-scatter is an all-reduce in a computation of its own, "all-reduce-scatter".
  """
  found: dict[str, float] = {}
  seen, computation = set(), ""
  for line in hlo.splitlines():
    if not line.startswith(" "):
      computation = line
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    channel = re.search(r"channel_id=\d+", line)
    name = channel[0] if channel else line
    if name in seen:
      continue
    seen.add(name)
    kind = match["kind"]
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
      kind = "reduce-scatter"
    sizes = [_SIZES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
             for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match["shape"])]
    if match["start"]:  # (operands, results)
      sizes = sizes[len(sizes) // 2:]
    # A ring's all-reduce sends every byte twice: to be summed, and to be handed out.
    found[kind] = found.get(kind, 0.0) + sum(sizes) * (2 if kind == "all-reduce" else 1)
  return found


@dataclasses.dataclass(frozen=True)
class Program:
  """One program to look at: a jitted function and its abstract arguments."""

  function: Any
  arguments: tuple[Any, ...]

  def trace(self):
    return self.function.trace(*self.arguments)

  def compile(self):
    return self.trace().lower().compile()


def _bytes(tree: Any) -> float:
  """On one device."""
  return float(sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def train_program(config: TrainConfig, shape: ModelConfig, mesh: Mesh, loss_of: Any = None) -> Program:
  """The jitted training step and the shapes of its state and of a full batch."""
  model, tx = Llama(shape), train.optimizer(config.optimizer, 1000)
  state = abstract_state(config, model, tx, mesh)
  place = sharding.batch_sharding(mesh)
  batch = {
      name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
      for name, array in pipeline.batch_shapes(config).items()}
  step = jax.jit(
      functools.partial(train.train_step, config, model, tx, loss_of=loss_of), donate_argnums=0,
      out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
  return Program(step, (state, batch))


def decode_program(
    config: TrainConfig, shape: ModelConfig, mesh: Mesh, safety: SafetyConfig | None, batch: int, prompt: int,
    tokens: int, one_step: bool = False) -> Program:
  """The jitted loop `decode.advance`, or one turn of it, on a state with a filled cache; weights over tensor, rows over
  data and fsdp.
  """
  model = Llama(shape)
  key = jax.eval_shape(lambda: jax.random.key(0))
  boxed = abstract_params(shape)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  params = jax.tree.map(place, sharding.unbox(boxed), sharding.shardings(boxed, mesh))
  rows = sharding.batch_sharding(mesh)
  everywhere = NamedSharding(mesh, PartitionSpec())
  kinds = np.full((batch, prompt), TokenKind.QUERY, np.int32)
  asked = decode.Prompt(
      tokens=kinds, kinds=kinds, prefix=np.zeros((batch, 0), np.int32), prefix_length=np.zeros(batch, np.int32))
  settings = decode.DecodeConfig(
      safety=safety and decode.without_words(safety), sampling=decode.sampling.SamplingConfig(), max_new_tokens=tokens,
      stop_ids=np.zeros(1, np.int32), refusal=np.zeros(8, np.int32), refusal_break=1, schedule=np.ones(tokens, bool),
      buffer=tokens, refuses_for_good=safety is not None and safety.dependency == "high")
  start = lambda params, prompt, rng, config: decode.start(model, params, prompt, rng, config)
  state = jax.eval_shape(start, params, asked, key, settings)
  heads = "tensor" if shape.num_kv_heads % mesh.shape["tensor"] == 0 else None
  cache_place = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, heads))
  spread = lambda leaf: place(leaf, rows if leaf.ndim and leaf.shape[0] == batch else everywhere)
  state = jax.tree.map(spread, state).replace(
      cache=jax.tree.map(lambda leaf: place(leaf, cache_place), state.cache))
  if one_step:
    run = functools.partial(decode.step, model)
  else:
    run = lambda params, prompt, rng, config, state: decode.advance(
        model, params, prompt, rng, config, state, config.max_new_tokens)
  abstract = lambda tree: jax.tree.map(lambda x: spread(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))), tree)
  keys = place(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)), rows)
  return Program(
      jax.jit(run, donate_argnums=4), (params, abstract(asked), keys, abstract(settings), state))


def pass_program(program: Program, shape: ModelConfig, rows: int) -> Program:
  """The pass over the layers in a decoding program's step, alone: the newest token's row, or (2) [CLS]'s before it."""
  params, _, _, _, state = program.arguments
  batch, slots = state.kinds.shape
  where = state.kinds.sharding
  abstract = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=where)
  flag = abstract(dtype=bool)

  def run(params, cache, tokens, kinds, positions, visible, refresh, slot):
    step = attention.Step(slot=slot, visible=visible, refresh=refresh, sees_cls=refresh)
    out = Llama(shape).apply(
        {"params": params}, tokens, kinds=kinds, positions=positions, cache=cache, step=step)
    return out.hidden[:, -1], out.cls_logit, out.cache

  arguments = (
      params, state.cache, *(abstract(rows) for _ in range(3)), abstract(rows, slots, dtype=bool), flag, state.step)
  return Program(jax.jit(run, donate_argnums=1), arguments)


def _per_layer(make: Any, layers: int) -> tuple[float, dict[str, float]]:
  """Bytes and collectives of a device for a program `make(n)` of n unrolled layers, carried on to `layers` of them."""
  costs = []
  for count in (1, 2):
    with tempfile.TemporaryDirectory() as dump:
      compiled = make(count).trace().lower().compile(compiler_options={
          # What is fetched ahead into memory on the chip would count thrice: read there, written, read again.
          "xla_msa_enable": False,
          # `compiled.as_text()` stumbles over what v5p and v6e have their sparse cores do.
          "xla_dump_to": dump, "xla_dump_hlo_as_text": True})
      hlo, = pathlib.Path(dump).glob("*.after_optimizations.txt")
      costs.append({"bytes": compiled.cost_analysis()["bytes accessed"], **collectives_of(hlo.read_text())})
  one, two = costs
  total = {
      name: one.get(name, 0.0) + (layers - 1) * (two.get(name, 0.0) - one.get(name, 0.0)) for name in one | two}
  return total.pop("bytes"), total


def _memory(program: Program, parts: dict[str, float]) -> dict[str, Any]:
  """What a device holds at most while the program runs, in GB (2^30); "hbm_parts" divides it up."""
  in_gb = lambda parts: {name: size / 2**30 for name, size in parts.items()}
  try:
    memory = program.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"Used ([\d.]+)G of", str(error))
    if used is None:
      raise
    return {"hbm_gb_per_device": float(used[1]), "hbm_parts": in_gb(parts), "over": True}
  total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes)
  parts = parts | {"temporaries": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
  return {"hbm_gb_per_device": total / 2**30, "hbm_parts": in_gb(parts), "over": False}


def report_train(config: TrainConfig, topology: str) -> dict[str, Any]:
  """Compiles the training step for `topology`; see the module docstring for what the numbers mean.

  Returns:
    fits, hbm_gb_per_device, hbm_limit_gb, hbm_parts, flops_per_device, bytes_per_device, collective_bytes_per_device,
    step_seconds_bound, limited_by, mfu_bound, cls_extra_flops_ratio, probe_extra_flops_ratio.

  Raises:
    ValueError: a bad topology, mesh or setting.
  """
  chip, devices = devices_of(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  preflight.check(config, mesh)
  if config.objective != "saess":
    raise ValueError(f"objective is {config.objective!r}; expected saess: what is reported is what the signal costs.")
  shape = train.config_of_training(config, config_lib.model_config(config.model, **config.model_overrides))
  without_kl = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kl_weight=0.0))
  without_probes = dataclasses.replace(without_kl, probes=dataclasses.replace(config.probes, per_sequence=0))
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    program = train_program(config, shape, mesh)
    state, batch = program.arguments
    parts = {
        "weights": _bytes((state.trainable, state.frozen)), "optimizer": _bytes(state.opt_state),
        "batch": _bytes(batch)}
    memory = _memory(program, parts)
    unrolled = lambda count: train_program(
        config, shape.replace(num_layers=count, scan_layers=False, frozen_layers=0), mesh)
    moved, collectives = _per_layer(unrolled, shape.num_layers)
    count = lambda config, shape, **how: flops_of(train_program(config, shape, mesh, **how).trace().jaxpr)
    flops = count(config, shape)
    useful = shape.replace(remat="none")
    plain, with_cls = count(config, useful, loss_of=train.plain_loss), count(without_probes, useful)
    with_probes = count(without_kl, useful)
  times = {
      "products": flops / mesh.size / chip.flops, "memory": moved / chip.hbm_bandwidth,
      "collectives": sum(collectives.values()) / chip.link_bandwidth}
  slowest = max(times, key=times.get)
  return {
      "fits": not memory.pop("over") and memory["hbm_gb_per_device"] <= chip.hbm / 2**30,
      "hbm_limit_gb": chip.hbm / 2**30, **memory, "flops_per_device": flops / mesh.size, "bytes_per_device": moved,
      "collective_bytes_per_device": collectives, "step_seconds_bound": times[slowest], "limited_by": slowest,
      "mfu_bound": with_probes / mesh.size / chip.flops / times[slowest],
      "cls_extra_flops_ratio": with_cls / plain - 1, "probe_extra_flops_ratio": with_probes / with_cls - 1}


def report_decode(config: TrainConfig, topology: str, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
  """Compiles the decoding loop for `topology`, with a verdict at every step and without a safety signal.

  A step holds the pass with the [CLS] rows and the one without them and runs one of them, while the analysis counts
  both. So its bytes are those of a step without a signal, the one pass exchanged for the other.

  Returns:
    fits, hbm_gb_per_device, hbm_limit_gb, hbm_parts, bytes_per_device (of a step with a verdict),
    step_seconds_bound, bytes_ratio_each_vs_off.
  """
  chip, devices = devices_of(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  shape = config_lib.model_config(config.model, **config.model_overrides).replace(
      scan_layers=False, remat="none", param_dtype="bfloat16")
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    make = lambda layers, safety, **how: decode_program(
        config, shape.replace(num_layers=layers), mesh, safety, batch, prompt, tokens, **how)
    each = make(shape.num_layers, config.safety)
    memory = _memory(each, {"weights": _bytes(each.arguments[0]), "kv cache": _bytes(each.arguments[-1].cache)})
    one_step = lambda layers: make(layers, None, one_step=True)
    without, _ = _per_layer(one_step, shape.num_layers)
    token, both = (
        _per_layer(lambda layers, rows=rows: pass_program(
            one_step(layers), shape.replace(num_layers=layers), rows), shape.num_layers)[0] for rows in (1, 2))
  step = without - token + both
  return {
      "fits": not memory.pop("over") and memory["hbm_gb_per_device"] <= chip.hbm / 2**30,
      "hbm_limit_gb": chip.hbm / 2**30, **memory, "bytes_per_device": step,
      "step_seconds_bound": step / chip.hbm_bandwidth, "bytes_ratio_each_vs_off": step / without}


def main(config):
  given = flags.FLAGS
  config = config_lib.from_config_dict(TrainConfig, config)
  if given.what == "train":
    report = report_train(config, given.topology)
  else:
    report = report_decode(config, given.topology, given.batch, given.prompt, given.tokens)
  for name, value in report.items():
    print(f"{name:28}", {k: float(f"{v:.4g}") for k, v in value.items()} if isinstance(value, dict)
          else f"{value:.4g}" if isinstance(value, float) else value)
  if given.json:
    print(json.dumps(report))


if __name__ == "__main__":  # Flags are the process's: whoever imports this module has his own.
  flags.DEFINE_string("topology", "v5e:16x16", "CHIP:AxB (v5e, v6e) or CHIP:AxBxC (v4, v5p).")
  flags.DEFINE_enum("what", "train", ["train", "decode"], "The training step, or the decoding loop.")
  flags.DEFINE_bool("json", False, "One JSON object as the last line.")
  flags.DEFINE_integer("batch", 8, "Decoding: rows.", lower_bound=1)
  flags.DEFINE_integer("prompt", 512, "Decoding: stored tokens of the prompt.", lower_bound=1)
  flags.DEFINE_integer("tokens", 512, "Decoding: response slots.", lower_bound=1)
  command.run(main)
