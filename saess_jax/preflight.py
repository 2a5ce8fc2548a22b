"""What is refused before a training run does any work: settings, contexts and token ids that cannot go together."""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Sequence

import jax

from saess_jax import config as config_lib
from saess_jax import masks, sharding
from saess_jax.config import ModelConfig, TrainConfig
from saess_jax.data.pipeline import Example

_FROM_0, _FROM_1, _SHARE = (0, math.inf), (1, math.inf), (0, 1)
_RANGES = types.MappingProxyType({
    "seed": _FROM_0, "epochs": _FROM_1, "max_steps": _FROM_0, "save_every": _FROM_1, "keep_last": _FROM_1,
    "eval_every": _FROM_0,
    "data.max_train_rows": _FROM_0, "data.max_validation_rows": _FROM_0, "data.batch_size": _FROM_1,
    "data.examples_per_row": _FROM_1, "data.max_response": _FROM_1, "data.refusal_depth": _FROM_0,
    "data.opener_depth": _FROM_0, "data.histories": _SHARE, "data.history_turns": _FROM_1, "data.disguises": _SHARE,
    "data.frames": _SHARE, "probes.per_sequence": _FROM_0, "probes.min_window": _FROM_1,
    "probes.benign_weight": _FROM_0, "rollouts.max_prompts": _FROM_0, "rollouts.written": _SHARE,
    "rollouts.tokens": _FROM_1, "rollouts.batch_size": _FROM_1, "rollouts.temperature": _FROM_0,
    "loss.cls_weight": _FROM_0, "loss.kl_weight": _FROM_0, "loss.kl_positions": _FROM_1, "loss.chunk": _FROM_1,
    "optimizer.learning_rate": _FROM_0, "optimizer.warmup_steps": _FROM_0, "optimizer.final_fraction": _SHARE,
    "optimizer.weight_decay": _FROM_0, "optimizer.b1": _SHARE, "optimizer.b2": _SHARE,
    "optimizer.clip_norm": _FROM_0, "optimizer.accumulation": _FROM_1, "lora.rank": _FROM_0,
})
_HALVED = ("data.max_train_rows", "data.max_validation_rows", "rollouts.max_prompts")  # A half of each label.


def check(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError for settings out of their range or that cannot work together, before any work."""
  config_lib.check_ranges(config, _RANGES)
  config_lib.safety_as_dict(config.safety)  # Raises for a schedule as an array, which no file can hold.
  for name in _HALVED:
    if operator.attrgetter(name)(config) == 1:
      raise ValueError(f"{name} is 1; expected 0 for all, or 2 or more, half of them of each label.")
  rule = config.optimizer
  if rule.clip_norm == 0 or 1 in (rule.b1, rule.b2):
    raise ValueError(
        f"optimizer.clip_norm is {rule.clip_norm}, b1 {rule.b1} and b2 {rule.b2}; expected the first above 0 (a large "
        "one clips nothing) and the others below 1.")
  for name, instead in (("frozen_layers", "set the run's own"), ("vocab_padding", "training pads by itself")):
    if name in config.model_overrides:
      raise ValueError(f"model_overrides has {name}, which would do nothing: leave it out; {instead}.")
  shards = sharding.batch_shards(mesh) * config.optimizer.accumulation
  if config.data.batch_size % shards:
    raise ValueError(
        f"data.batch_size {config.data.batch_size} is not divisible by {shards} (mesh data {mesh.shape['data']} x fsdp "
        f"{mesh.shape['fsdp']} x optimizer.accumulation {config.optimizer.accumulation}); change one of them.")
  if config.stage not in masks.STAGES:
    raise ValueError(f"stage is {config.stage!r}; expected one of {', '.join(masks.STAGES)}.")
  if config.cls_sees_response not in masks.CLS_SEES_RESPONSE:
    raise ValueError(
        f"cls_sees_response is {config.cls_sees_response!r}; expected one of {', '.join(masks.CLS_SEES_RESPONSE)}.")
  if config.objective not in config_lib.OBJECTIVES:
    raise ValueError(f"objective is {config.objective!r}; expected one of {', '.join(config_lib.OBJECTIVES)}.")
  found = (config.stage, config.data.examples_per_row, config.loss.kl_weight, config.probes.per_sequence)
  if config.objective != "saess" and found != ("sft", 1, 0, 0):
    raise ValueError(
        f"objective {config.objective!r} knows no [CLS]: it goes with stage 'sft', data.examples_per_row 1, "
        f"loss.kl_weight 0 and probes.per_sequence 0; found {found}.")
  if config.objective == "dpo" and not (config.rollouts.enabled and config.loss.dpo_beta > 0):
    raise ValueError(
        f"objective 'dpo' compares refusals with rollouts, at loss.dpo_beta above 0; found rollouts.enabled "
        f"{config.rollouts.enabled} and loss.dpo_beta {config.loss.dpo_beta}.")
  if config.objective == "dpo" and config.lora.start:
    raise ValueError(
        "objective 'dpo' compares with where it began, but under LoRA the reference is the base without its pairs; "
        "leave lora.start out.")
  if config.probes.per_sequence and not config.safety.rule2_keeps_query and config.probes.min_window > config.safety.r2:
    raise ValueError(
        f"probes.min_window is {config.probes.min_window}, and a window of Rule 2 holds safety.r2 {config.safety.r2} "
        "tokens at most: none of them would be learned from. Lower the first or raise the second.")
  if config.stage == "pretrain" and config.probes.per_sequence:
    raise ValueError("probes are views of the SFT stage; set probes.per_sequence to 0 for stage pretrain.")
  if config.stage == "pretrain" and config.loss.kl_weight:
    raise ValueError("The KL term compares at tokens of a query, and documents have none; set loss.kl_weight to 0.")
  if config.stage == "pretrain" and config.rollouts.enabled:
    raise ValueError("rollouts answer prompts, and stage pretrain reads documents; set rollouts.enabled to False.")
  if config.data.responses == "rollouts" and not config.rollouts.enabled:
    raise ValueError(
        "data.responses is 'rollouts', but rollouts.enabled is False: no response would be read. Enable them, or set "
        "data.responses to 'all'.")
  if config.data.opener_depth and not config.data.refusal_depth:
    raise ValueError(
        f"data.opener_depth is {config.data.opener_depth}, but data.refusal_depth is 0: "
        "answers to benign requests would stand behind an attacker's words, and refusals never. Set both above 0, or "
        "the first to 0.")
  if config.data.disguises + config.data.frames > 1:
    raise ValueError(
        f"data.disguises is {config.data.disguises} and data.frames {config.data.frames}; expected shares of queries, "
        "no more than 1 together.")
  for name in ("histories", "disguises", "frames"):
    if getattr(config.data, name) and (config.data.responses != "rollouts" or config.objective != "saess"):
      raise ValueError(
          f"data.{name} is {getattr(config.data, name)}, but data.responses is {config.data.responses!r} and objective "
          f"{config.objective!r}: it is a share of the queries that are read alone, for [CLS]. Set them to 'rollouts' "
          "and 'saess', or the first to 0.")
  # What has no rollout yet would still fit.
  if config.rollouts.enabled and max(config.data.buckets, default=0) < config.data.max_length:
    raise ValueError(
        f"With rollouts sequences grow up to data.max_length {config.data.max_length}, more than the longest of "
        f"data.buckets {config.data.buckets}; add a bucket or lower data.max_length.")


def check_context(config: TrainConfig, shape: ModelConfig) -> None:
  """Raises ValueError where sequences may be longer than what the model reads. [CLS] takes no position."""
  if config.data.max_length - 1 > shape.max_seq_len:
    raise ValueError(
        f"data.max_length is {config.data.max_length}, [CLS] included, and the model's context {shape.max_seq_len} "
        f"tokens; lower it to {shape.max_seq_len + 1} or less.")
  if shape.sliding_window is None or config.objective != "saess":
    return
  packed = config.data.examples_per_row > 1  # Into the longest bucket.
  fitting = [bucket for bucket in config.data.buckets if bucket >= config.data.max_length and not packed]
  longest = min(fitting, default=max(config.data.buckets, default=0))
  if longest > shape.sliding_window:
    raise ValueError(
        f"Rows are padded to up to {longest} tokens (data.max_length, data.buckets), and the model's sliding window is "
        f"{shape.sliding_window}, beyond which [CLS] would be lost; lower them, or set sliding_window to None: "
        "--config.model_overrides='{\"sliding_window\": None}'.")


def check_rollouts(config: TrainConfig, lengths: Sequence[int], shape: ModelConfig) -> None:
  """Raises ValueError where a rollout would not fit behind one of the requests, of so many tokens, that it answers."""
  longest = max(lengths, default=-math.inf)
  if longest + config.rollouts.tokens > shape.context:
    raise ValueError(
        f"rollouts.tokens is {config.rollouts.tokens}, a request that is to be answered has {longest} tokens, and the "
        f"model's context is {shape.context}; lower the first to {shape.context - longest} or less, or shorten what is "
        "that long in the data.")


def check_ids(examples: Sequence[Example], vocab_size: int) -> None:
  """Raises ValueError for a token that the model has no embedding of."""
  for example in examples:
    worst = int(example.tokens.max(initial=0))
    if worst >= vocab_size:
      raise ValueError(
          f"The tokenizer gives token id {worst}, and the model has {vocab_size} tokens; is this its own tokenizer, or "
          "were tokens added without rows for them?")
