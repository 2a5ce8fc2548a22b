"""The training loop: shapes first, shardings second, arrays last; then steps until the epochs or max_steps are done.

There are two ways to start, and their order matters: (1) the newest checkpoint in the workdir, which restores weights,
optimizer, rng and data position together, so that a resumed run's losses are those of an undisturbed one; (2) the
weights that the config names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging

from saess_jax import (
    adapters,
    checkpoint,
    cluster,
    events,
    losses,
    masks,
    preflight,
    pretrained,
    runs,
    sharding,
    staging,
    weights,
)
from saess_jax import config as config_lib
from saess_jax import model as model_lib
from saess_jax.config import OptimizerConfig, TrainConfig
from saess_jax.data import builder, chat, pipeline, rollouts, sources
from saess_jax.generate import Generator
from saess_jax.model import Llama
from saess_jax.sampling import SamplingConfig
from saess_jax.state import TrainState, abstract_state, create_state


class Diverged(RuntimeError):
  """A loss or gradient that is not finite."""


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Clipping, then AdamW under warm-up and cosine decay; norms, biases and the [CLS] embedding do not decay."""
  def decays(tree):
    flat = flax.traverse_util.flatten_dict(tree, is_leaf=lambda _, x: isinstance(x, nn.Partitioned))
    return flax.traverse_util.unflatten_dict({path: path[-1] in ("kernel", "embedding", "a", "b") for path in flat})
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
          learning_rate(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays))


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Step -> rate."""
  return optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup_steps, max(steps, config.warmup_steps + 1),
      config.learning_rate * config.final_fraction)


def loss_of_batch(
    config: TrainConfig, model: Llama, variables: Any, batch: dict[str, jax.Array], total: losses.Totals
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The objective's share of one batch, or micro-batch, and the shares of its parts (`losses.loss_sums`).

  Args:
    variables: the model's collections, and as one more "reference" the params that the run started from, for a KL term.
  """
  kinds, segments, positions = batch["kinds"], batch.get("segments"), None
  if segments is not None:  # Whatever has a rule of its own is made for each packed example alone: [B, E, ...].
    kinds = masks.apart(kinds, segments, batch["label"].shape[1])
    positions = masks.rope_positions(kinds).sum(axis=1)
  cls_visible = masks.cls_visibility(kinds, config.stage, config.cls_sees_response, batch["label"] > 0.5)
  probe_visible = None
  if config.probes.per_sequence:
    views = batch["probe_views"].reshape(*kinds.shape[:-1], -1, 3)
    probe_visible = masks.view_visibility(kinds, views).reshape(len(kinds), -1, kinds.shape[-1])
  read = functools.partial(
      model.apply, tokens=batch["tokens"], kinds=batch["kinds"], positions=positions, stage=config.stage,
      segments=segments, cls_visible=cls_visible)
  out = read(variables, probe_visible=probe_visible)
  reference = None
  if "reference" in variables:  # It has read the same text, in which nothing is [CLS].
    base, order = variables["reference"], masks.cls_last(batch["kinds"])
    stored = {"tokens": batch["tokens"], "kinds": batch["kinds"], "positions": positions, "segments": segments}
    moved = {name: x if x is None else jnp.take_along_axis(x, order, axis=1) for name, x in stored.items()}
    hidden = read({"params": base}, **moved).hidden
    back = jnp.argsort(order, axis=1)
    reference = jnp.take_along_axis(hidden, back[..., None], axis=1), model_lib.output_head(base)
  head = model_lib.output_head(variables["params"])
  return losses.loss_sums(out, head, batch, total, config.loss, model.config.vocab_size, reference)


def plain_loss(
    config: TrainConfig, model: Llama, variables: Any, batch: dict[str, jax.Array], total: losses.Totals
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """In place of `loss_of_batch`: L_lm of a language model without a safety signal, for which every token is text."""
  hidden = model.apply(variables, batch["tokens"]).hidden
  head = model_lib.output_head(variables["params"])
  loss = losses.language_loss(hidden, head, batch, total, config.loss, model.config.vocab_size)
  return loss, {"loss": loss, "lm_loss": loss}


def preference_loss(
    config: TrainConfig, model: Llama, variables: Any, batch: dict[str, jax.Array], total: losses.Totals
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """In place of `loss_of_batch`: DPO on pairs of sequences without [CLS]: arrays [B, 2, ...], the chosen one first."""
  flat = jax.tree.map(lambda x: x.reshape(2 * len(x), *x.shape[2:]), batch)
  def log_probs(variables):
    hidden = model.apply(variables, flat["tokens"]).hidden
    head = model_lib.output_head(variables["params"])
    return losses.response_log_probs(hidden, head, flat, config.loss, model.config.vocab_size).reshape(-1, 2)
  ours = log_probs({name: variables[name] for name in ("params", "lora") if name in variables})
  loss, right = losses.dpo_loss(ours, log_probs({"params": variables["reference"]}), config.loss.dpo_beta)
  share = batch["label_weight"][:, 0] / (total.sequences / 2)
  loss, right = jnp.sum(share * loss), jnp.sum(share * right)
  return loss, {"loss": loss, "dpo_loss": loss, "dpo_accuracy": right}


_LOSSES = {"saess": loss_of_batch, "sft": plain_loss, "dpo": preference_loss}  # By `config.OBJECTIVES`.


def _variables(trainable: Any, frozen: Any) -> Any:
  params = {**frozen["params"], **trainable["params"]}
  if "reference" not in frozen:
    return {**trainable, "params": params}
  # [CLS] in it is what is being learned, of which the base's pass is to make no backward pass.
  reference = jax.lax.stop_gradient({**params, **frozen["reference"]})
  return {**trainable, "reference": reference, "params": params}


def train_step(
    config: TrainConfig, model: Llama, tx: optax.GradientTransformation, state: TrainState,
    batch: dict[str, jax.Array], loss_of: Callable[..., Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from one global batch, in `optimizer.accumulation` micro-batches. Pure; jit it with state donated.

  Args:
    loss_of: in place of the config's objective one of your own of that form.

  Returns:
    The new state, and float32 scalars: the loss, its parts, accuracies, and the gradient's norm before clipping.
  """
  loss_of = loss_of or _LOSSES[config.objective]
  count, total = config.optimizer.accumulation, losses.totals(batch)
  loss = lambda trainable, micro: loss_of(config, model, _variables(trainable, state.frozen), micro, total)
  grad = jax.grad(loss, has_aux=True)
  if count == 1:
    grads, metrics = grad(state.trainable, batch)
  else:
    # Every count-th row, not a block of rows, so that each device keeps working on the rows it holds.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0), batch)
    add = lambda sums, one: (jax.tree.map(jnp.add, sums, grad(state.trainable, one)), None)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(grad, state.trainable, first)
    # Summed in float32: beside what has come together, bfloat16 would lose a micro-batch's share.
    sums, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes), micro)
    grads, metrics = jax.tree.map(lambda x, shape: x.astype(shape.dtype), sums, shapes)
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  metrics["grad_norm"] = optax.global_norm(grads)
  return state.replace(
      step=state.step + 1, trainable=optax.apply_updates(state.trainable, updates), opt_state=opt_state), metrics


def eval_step(config: TrainConfig, model: Llama, state: TrainState, batch: dict[str, jax.Array]):
  """One batch's sums of losses and right verdicts, and the weights to divide them by once all batches are added up."""
  one = losses.Totals(*(jnp.ones(()),) * 4)
  _, sums = _LOSSES[config.objective](config, model, _variables(state.trainable, state.frozen), batch, one)
  return sums, losses.totals(batch)


def _evaluate(step, state: TrainState, batches: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
  """Averages over a validation set."""
  sums, total = jax.tree.map(lambda *x: sum(map(float, x)), *(step(state, batch) for batch in batches))
  sequences = total.sequences
  per = {"lm": total.tokens, "cls": sequences, "dpo": sequences, "probe": total.probes, "kl": total.compared}
  return {name: value / max(per[name.partition("_")[0]], 1.0) for name, value in sums.items() if name != "loss"}


def _draw(
    config: TrainConfig, rows: dict[str, list[sources.Row]]) -> tuple[dict[str, list[sources.Row]], list[sources.Row]]:
  """(the rows of each split that are read, those of them whose prompts the base answers)."""
  limits = {"train": config.data.max_train_rows, "validation": config.data.max_validation_rows}
  rows = {split: sources.draw_evenly(rows[split], limit // 2, config.seed) for split, limit in limits.items()}
  rollout = config.rollouts
  return rows, sources.draw_evenly(
      rows["train"] + rows["validation"], rollout.max_prompts // 2, config.seed, rollout.written
  ) if rollout.enabled else []


def _sample_rollouts(
    config: TrainConfig, workdir: pathlib.Path, rows: list[sources.Row], shape: config_lib.ModelConfig, base: Any,
    tokenizer: Any) -> dict[str, list[int]]:
  """The rollout step: the first process samples and writes, all read: prompt -> token ids.

  A run that goes on from another takes over what that one sampled: its model was not aligned yet.

  Raises:
    ValueError: that lacks some of the prompts, and the other run's model is aligned now.
  """
  generator = functools.cache(lambda: Generator(  # Where all are there already the weights need not be on a device.
      Llama(shape), jax.tree.map(jnp.asarray, base), tokenizer, safety=None,
      sampling=SamplingConfig(temperature=config.rollouts.temperature),
      max_new_tokens=config.rollouts.tokens, batch_size=config.rollouts.batch_size,
      system_prompt=config.data.system_prompt, seed=config.seed))
  sample = lambda prompts: [r.ids for r in generator().respond(prompts, progress="rollouts")]
  path = workdir / rollouts.FILE
  before = pathlib.Path(config.weights).expanduser() / rollouts.FILE
  with cluster.together("sampling rollouts") as first:
    if first:
      if runs.is_run(config.weights) and before.is_file() and not path.exists():
        staging.write_text(path, before.read_text(encoding="utf-8"))
      if _is_aligned(config.weights) and (missing := {row.prompt for row in rows} - rollouts.read(path).keys()):
        raise ValueError(
            f"{path} lacks answers of the unaligned base to {len(missing)} prompts, and {config.weights} is aligned, "
            "or may be: its own would pass for harm. Give the data, seed and rollouts of that run, or copy a "
            "rollouts.jsonl there that answers them.")
      rollouts.complete(path, [row.prompt for row in rows], sample)
  return rollouts.read(path)


def _is_aligned(path: str) -> bool:
  """Whether weights were fine-tuned to refuse, as far as can be told: a run's, or what was exported with its [CLS]."""
  if runs.is_run(path):
    return runs.read_config(path).stage == "sft"
  return path != "" and pretrained.settings_of(path).has_cls


def train_and_evaluate(config: TrainConfig, workdir: str | pathlib.Path) -> dict[str, float]:
  """Trains to the end, resuming what the workdir holds.

  Returns:
    The last validation's averages; {} where nothing was validated, as when the run was at its end already.

  Raises:
    ValueError: bad settings or data, a mesh that does not fit, a workdir of another run, of other data or from other
      weights; before anything is written but the lock. A workdir that another process trains in, or an aligned run's
      weights that would have to answer prompts in the unaligned base's place. A run whose examples changed since.
    Diverged: the loss is not finite; the last good checkpoint stays.
    damage.Damaged, checkpoint.SaveFailed: no checkpoint of those there can be read; one cannot be written.
    cluster.PeerFailed: any of these on another process.
  """
  with cluster.together("checking settings and data"):
    workdir = staging.local(workdir).absolute()
    mesh = sharding.make_mesh(config.mesh)
    preflight.check(config, mesh)
    dataset = builder.config_for(config.data.source, config.data.manual_dir, config.data.paper_rows)
    rows = {split: dataset.split_rows(split) for split in ("train", "validation")}
    sources.require_two_classes(rows["train"], f"The training split of {config.data.source}")
    sources.require_one_label(itertools.chain(*rows.values()))
  with cluster.together("reading and checking weights"):  # Of a run, orbax's reader meets the others': all get here.
    shape, base, tokenizer = pretrained.load_base(config)
    start = _read_start(config, shape, base) if config.lora.start else None
    fingerprint = pretrained.fingerprint_of_base(config, base)
    training = config_of_training(config, shape)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):  # What only building the model tells.
      abstract_state(config, Llama(training), optimizer(config.optimizer, 1), mesh)
    as_ours = dataclasses.replace(config, objective="saess")  # Without rollouts a rival has nothing to read.
    for split in rows.values():  # A prompt that is too long costs the user seconds, not the rollouts.
      examples = pipeline.build_examples(tokenizer, split, None, as_ours)
      preflight.check_ids(examples, shape.vocab_size)
      pipeline.Batches(examples, as_ours)
    if config.data.max_length + config.rollouts.tokens > shape.context:  # Else what trains leaves room enough.
      there = rollouts.read(workdir / rollouts.FILE).keys()
      preflight.check_rollouts(config, [
          len(chat.encode_prompt(tokenizer, row.prompt, system_prompt=config.data.system_prompt)[0])
          for row in _draw(config, rows)[1] if row.prompt not in there], shape)
  with _alone(workdir):
    cluster.first_then_rest("claiming the workdir", lambda: runs.claim(
        workdir, config, rows, fingerprint, tokenizer.chat_template))
    rows = cluster.first_then_rest("preparing the data", lambda: {
        split: list(builder.load(dataset, split, str(workdir / "data"))) for split in rows})
    rows, answered = _draw(config, rows)
    known = _sample_rollouts(config, workdir, answered, shape, base, tokenizer) if config.rollouts.enabled else None

    examples = pipeline.build_examples(tokenizer, rows["train"], known, config)
    cut, refusals = pipeline.unfinished(examples)
    if 2 * cut > refusals and jax.process_index() == 0:
      logging.warning(
          "%d of %d refusals are cut before their end, from which the model does not learn to stop; raise "
          "data.max_response (%d) or data.max_length (%d).", cut, refusals, config.data.max_response,
          config.data.max_length)
    here = sharding.rows_here(mesh, config.data.batch_size)
    loader = pipeline.Loader(pipeline.Batches(examples, config, here, config.epochs))
    cluster.agree("training examples", loader.examples)
    steps = min(len(loader), config.max_steps or len(loader))
    held_out = pipeline.build_examples(tokenizer, rows["validation"], known, config)
    validation = pipeline.Batches(held_out, config, here) if held_out else ()

    model, tx = Llama(training), optimizer(config.optimizer, steps)
    place = lambda local: jax.make_array_from_process_local_data(
        sharding.batch_sharding(mesh), local, (config.data.batch_size, *local.shape[1:]))
    formed = lambda tree: model_lib.stack_layers(tree, training.frozen_layers) if training.scan_layers else tree
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
      state, state_shardings = create_state(config, model, formed(base | (start.cls if start else {})), tx, mesh)
      if start:
        lora = jax.tree.map(weights.put, formed(start.lora), state_shardings.trainable["lora"])
        state = state.replace(trainable=state.trainable | {"lora": lora})
      del base, start
      manager = checkpoint.Checkpoints(workdir, config.keep_last)
      state = _resume(manager, state, loader)
      # The wish to stop, a bool a device, is summed up by the step's program: all processes read it with the metrics.
      step = jax.jit(
          lambda state, batch, wishes: (*train_step(config, model, tx, state, batch), jnp.any(wishes)),
          donate_argnums=0, out_shardings=(state_shardings, None, None))
      update = lambda state, batch, stop: step(state, jax.tree.map(place, batch), sharding.one_a_device(mesh, stop))
      validate = jax.jit(functools.partial(eval_step, config, model))
      run_validation = lambda state: _evaluate(
          validate, state, (jax.tree.map(place, batch) for batch in validation)) if held_out else {}
      with _wishes_to_stop() as asked:
        return _loop(config, workdir, manager, loader, steps, state, update, run_validation, asked)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
  """Lets one run at a time into the workdir, which is made; the first process holds the lock. Raises ValueError for a
  second one.
  """
  with contextlib.ExitStack() as held:
    with cluster.together(f"locking {workdir}") as first:
      if first:
        workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(staging.alone(workdir))
    yield


def _read_start(config: TrainConfig, shape: model_lib.ModelConfig, base: Any) -> adapters.Adapter:
  """The adapter that the run goes on from. Raises ValueError for one that does not fit it."""
  start = adapters.load(config.lora.start)
  adapters.check_base(shape, base, start)
  found = {(path[0], path[-2], leaf.shape[-1]) for path, leaf in flax.traverse_util.flatten_dict(start.lora).items()
           if path[-1] == "a"}
  layers = [f"layers_{i}" for i in range(shape.num_layers)]
  wanted = {(layer, name, config.lora.rank) for layer in layers for name in config.lora.projections}
  if found != wanted or config.frozen_layers:
    of = lambda pairs: ", ".join(f"{name} of rank {rank}" for name, rank in sorted({pair[1:] for pair in pairs}))
    raise ValueError(
        f"{config.lora.start} has pairs of {of(found)} in {len({pair[0] for pair in found})} layers; lora.projections "
        f"and lora.rank say {of(wanted)}, in all {shape.num_layers}, and frozen_layers is {config.frozen_layers}. Set "
        "them to the adapter's, and that to 0; an adapter that leaves layers out cannot be gone on from.")
  return start


def config_of_training(config: TrainConfig, shape: model_lib.ModelConfig) -> model_lib.ModelConfig:
  """The model's config for the loop: layers scanned unless the overrides say otherwise, the lowest of them frozen.

  Raises:
    ValueError: no layer is left to train, an unknown matmul_dtype, or sequences longer than what the model reads.
  """
  preflight.check_context(config, shape)
  if config.matmul_dtype:
    config_lib.dtype_of(config.matmul_dtype)
  if not 0 <= config.frozen_layers < shape.num_layers:
    raise ValueError(
        f"frozen_layers is {config.frozen_layers}; the model has {shape.num_layers} layers: expected 0 to "
        f"{shape.num_layers - 1}.")
  return shape.replace(
      vocab_padding=-shape.vocab_size % sharding.VOCAB_MULTIPLE,
      scan_layers=bool(config.model_overrides.get("scan_layers", True)), frozen_layers=config.frozen_layers,
      matmul_dtype=config.matmul_dtype or shape.matmul_dtype)


def _resume(manager: checkpoint.Checkpoints, state: TrainState, loader: pipeline.Loader) -> TrainState:
  """The state of the newest checkpoint that is whole, laid out as `state`, with the loader at its batch; `state` itself
  where there is no checkpoint.

  Raises:
    ValueError: the processes do not see the same checkpoints.
  """
  cluster.agree(f"checkpoints in {manager.folder}", ", ".join(map(str, manager.steps())))
  if not manager.steps():
    return state
  abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.saved())
  for leaf in jax.tree.leaves(state.saved()):  # Else weights and moments are on the devices twice while these are read.
    leaf.delete()
  step, saved, iterator = manager.restore_newest(abstract)
  with cluster.together("taking up the data where they were left"):
    loader.set_state(iterator)
  if jax.process_index() == 0:
    print(f"Resuming at step {step}.")
  return state.replace(**saved)


@contextlib.contextmanager
def _wishes_to_stop() -> Iterator[set[int]]:
  """The signals among SIGTERM and Ctrl-C that have come so far, a set that grows; none end the process meanwhile, but
  for a second Ctrl-C. Only a process's main thread can ask for signals: in another one the set stays empty.
  """
  asked = set()

  def ask(number, frame):
    del frame
    asked.add(number)
    if number == signal.SIGINT:
      signal.signal(number, before[number])

  numbers = {signal.SIGTERM, signal.SIGINT} if threading.current_thread() is threading.main_thread() else set()
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # A job in the background of a shell script.
    numbers -= {signal.SIGINT}
  before = {number: signal.signal(number, ask) for number in numbers}
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _loop(
    config: TrainConfig, workdir: pathlib.Path, manager: checkpoint.Checkpoints, loader: pipeline.Loader, steps: int,
    state: TrainState, update: Callable[..., Any], run_validation: Callable[[TrainState], dict[str, float]],
    asked: set[int]
) -> dict[str, float]:
  """Dispatches step n, then reads the metrics of step n - 1, so that the device never waits for the host.

  SIGTERM or Ctrl-C on any process is in the next step's batch; the run stops after the step in whose metrics it is
  read, and after Ctrl-C it raises KeyboardInterrupt there. A second Ctrl-C does so at once. A validation that a stop
  did not wait for is made up for when the run goes on.

  Args:
    steps: where the run ends.
    update: (state, this process's rows of a batch, whether it wishes to stop) -> (state, metrics, whether any does).
    asked: signals to stop that this process got so far.

  Returns:
    What was validated last; {} if nothing was.
  """
  start, rate = int(state.step), learning_rate(config.optimizer, steps)
  first = jax.process_index() == 0
  writer = events.Events(workdir / "tensorboard", start) if first else None
  validated: dict[str, float] = {}
  pending = None  # Step number, metrics and wish to stop, not yet read.
  stop = False  # As all processes know it.
  tokens, began = 0, time.perf_counter()
  is_due = lambda step: step == steps or bool(config.eval_every and step % config.eval_every == 0)

  def validate(state, step, say):
    found = run_validation(state)
    if writer and found:
      say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
      writer.write({f"validation/{name}": value for name, value in found.items()}, step)
    return found

  def read(pending):
    step, metrics, stop = pending
    metrics = {name: float(value) for name, value in metrics.items()}
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
      raise Diverged(
          f"At step {step} the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}. The last good "
          f"checkpoint is step {manager.latest_step()} in {manager.folder}. Lower optimizer.learning_rate, or look at "
          "the data of that step.")
    if writer:
      writer.write({f"train/{name}": value for name, value in metrics.items()}, step)
      writer.write({"train/learning_rate": float(rate(step - 1))}, step)
    return metrics, bool(stop)

  try:
    if start and is_due(start) and not manager.is_validated(start) and (validated := validate(state, start, print)):
      manager.add_metrics(start, validated)
    with tqdm.tqdm(total=steps, initial=start, desc="train", unit="step", disable=not first) as bar:
      for step in range(start + 1, steps + 1):
        batch = next(loader)
        kinds = batch["kinds"]
        tokens += np.count_nonzero(kinds) * config.data.batch_size // len(kinds)  # As if all rows were like these.
        state, metrics, wished = update(state, batch, bool(asked))
        if pending is not None:
          seen, stop = read(pending)
          right = {name.removesuffix("_accuracy"): f"{value:.2f}" for name, value in seen.items()
                   if name in ("cls_accuracy", "dpo_accuracy")}
          bar.set_postfix(
              loss=f"{seen['loss']:.3f}", **right, tok_s=f"{tokens / (time.perf_counter() - began):.0f}")
        pending = (step, metrics, wished)
        bar.update()
        ends = step == steps or stop
        evaluate = ends or is_due(step)
        save = ends or step % config.save_every == 0
        if evaluate or save:  # Nothing that is not finite is ever saved.
          stop, pending = read(pending)[1] or stop, None
        measured = {}
        if evaluate and not stop:
          measured = validated = validate(state, step, bar.write)
        if save or stop:
          manager.save(step, state.saved(), loader.get_state(), config, measured or None, writer)
        if stop:
          logging.warning("Stopped: saved step %d; the same command goes on from there.", step)
          break
    manager.close()
  except BaseException:
    with contextlib.suppress(Exception):  # What went wrong first is what is said.
      manager.close()
    raise
  finally:
    if writer:
      with contextlib.suppress(OSError):  # All that belongs to a checkpoint is on the disk already.
        writer.close()
  if signal.SIGINT in asked:
    raise KeyboardInterrupt
  return validated
