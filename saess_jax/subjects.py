"""Who is evaluated: trained weights with their signal ("saess") or without ("plain"), and their origin ("base")."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saess_jax import adapters, attacks, checkpoint, generate, pretrained, runs
from saess_jax.config import EvalConfig, SafetyConfig, from_config_dict
from saess_jax.model import Llama

MODELS = ("base", "plain", "saess")


@dataclasses.dataclass(frozen=True)
class Models:
  """What is evaluated.

  Attributes:
    identity: says which weights these are, so that an evaluation is not resumed with others.
    has_cls: the trained weights come with a [CLS] that can be asked; a rival's and published ones do not.
    generator: (model, max_new_tokens) -> `generate.Generator` or what answers like one.
    weights: model -> what a white-box attacker reads.
    safety: what "saess" decodes by.
    has_base: what the trained weights began from is known, or they were trained from no others.
  """

  identity: str
  has_cls: bool
  generator: Callable[[str, int], Any]
  weights: Callable[[str], attacks.Weights]
  safety: SafetyConfig
  has_base: bool = True


def load_models(config: EvalConfig) -> Models:
  """The model of `config.checkpoint` ("saess") and the weights that its training began with ("base").

  Of runs that each went on from the one before, "base" is what the first began with (`pretrained.load_origin`): behind
  SFT and DPO it is the published model. It is decoded plainly: nothing sees [CLS] and nothing intervenes; so are the
  trained weights as "plain". Weights without a run or an adapter are their own base. Weights are read when they are
  first asked.

  Raises:
    ValueError, FileNotFoundError: no checkpoint is named, or there is none; a field of `config.safety` is wrong;
      "saess" of a rival's run or of other weights without a trained [CLS].
  """
  path = config.checkpoint
  if not path:
    raise ValueError("checkpoint is empty; expected a training run, an adapter or other weights (--checkpoint PATH).")
  settings, layout, has_cls = pretrained.settings_of(path)
  if "saess" in config.models and not has_cls:
    plain = "('base','plain')" if runs.is_run(path) else "('base',)"
    raise ValueError(
        f"{path} has no trained [CLS], and its verdicts would mean nothing; expected --config.models=\"{plain}\", its "
        "weights decoded plainly.")
  identity, step, has_base = path, None, True
  if runs.is_run(path):
    saved = checkpoint.Saved(path)
    step = saved.best_step()
    if step is None:
      raise FileNotFoundError(f"{saved.folder} holds no checkpoint yet; let the training run reach one.")
    identity = f"step {step}, checksums {saved.fingerprint(step)}"
  elif adapters.is_adapter(path):
    identity = f"{path}, sha256 {hashlib.sha256(pathlib.Path(path).expanduser().read_bytes()).hexdigest()[:16]}"
  else:
    identity, has_base = f"{path}{_files_of(path)}", not has_cls
    if not has_base and "base" in config.models:
      raise ValueError(
          f"What {path} was trained from is not known, so there is no \"base\" to compare with; expected "
          "--config.models=\"('plain','saess')\", its own weights without the signal and with it.")
  changes = {name: value for name, value in config.safety.items() if value is not None}
  safety = from_config_dict(SafetyConfig, dataclasses.asdict(settings) | changes)
  research = functools.cache(lambda: pretrained.load_for_research(path, step)[:3])

  @functools.cache
  def weights(name: str) -> attacks.Weights:
    if name != "base":
      return attacks.Weights(*research(), safety if name == "saess" else None, **layout)
    if runs.is_run(path):
      shape, params, tokenizer = pretrained.load_origin(path)
      params = jax.tree.map(jnp.asarray, params)  # From the host once, and not at every call.
      model = Llama(shape.replace(dtype="float32"))  # As `load_for_research` has what was trained.
      return attacks.Weights(model, params, tokenizer, None, **layout)
    if adapters.is_adapter(path):
      model, params, _, _ = pretrained.load_for_research(adapters.load(path).base)
      return attacks.Weights(model, params, research()[2], None, **layout)  # Asked in the adapter's template.
    return attacks.Weights(*research(), None, **layout)

  @functools.cache  # A generator keeps what it has compiled.
  def generator(name: str, max_new_tokens: int) -> generate.Generator:
    asked = weights(name)
    return generate.Generator(
        asked.model, asked.params, asked.tokenizer, asked.safety, max_new_tokens=max_new_tokens,
        batch_size=config.batch_size, seed=config.seed, **layout)

  return Models(identity, has_cls, generator, weights, safety, has_base)


def _files_of(path: str) -> str:
  """Tells weights that were replaced in place: sizes and times of what is at a local path."""
  root = pathlib.Path(path).expanduser()
  files = sorted(file for file in (root.rglob("*") if root.is_dir() else [root]) if file.is_file())
  if not files:
    return ""  # A model of the Hub, or of an installed package.
  seen = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  return f", files {hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}"
