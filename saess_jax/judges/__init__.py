"""Judges by name; `base.py` says what they have in common."""

from __future__ import annotations

from saess_jax.judges.api import ApiConfig, ApiError, OpenAIJudge, config_of
from saess_jax.judges.base import Exchange, Judge, Judgement
from saess_jax.judges.guard import HarmBenchJudge, LlamaGuardJudge
from saess_jax.judges.prefix import PrefixJudge
from saess_jax.judges.rules import RefusalJudge
from saess_jax.judges.topic import TopicJudge

OFFLINE = {judge.name: judge for judge in (RefusalJudge, PrefixJudge, TopicJudge)}
_MODELS = {
    "llama_guard": LlamaGuardJudge,
    "harmbench": lambda path: HarmBenchJudge(path, "llama2"),
    "harmbench_mistral": lambda path: HarmBenchJudge(path, "mistral"),
}


def make_judge(spec: str) -> Judge:
  """A judge by name.

  Args:
    spec: "rules", "prefix", "rules_topic"; "llama_guard:PATH", "harmbench:PATH" (Llama-2-13b-cls) or
      "harmbench_mistral:PATH", where PATH is what `hf.load_pretrained` takes; "openai" or "openai:MODEL".

  Raises:
    ValueError: no such judge; a path that is missing or too much; a model that is none of these; no API key, or no
      price of a model.
    FileNotFoundError: no such model.
  """
  name, _, rest = spec.partition(":")
  if name in OFFLINE:
    if rest:
      raise ValueError(f"{name} takes nothing behind its name, but {rest!r} was given.")
    return OFFLINE[name]()
  if name == "openai":
    return OpenAIJudge(config_of(rest))
  if name in _MODELS:
    if not rest:
      raise ValueError(f"{name} needs a model: {name}:PATH, a folder, a .gguf file or a Hub id.")
    return _MODELS[name](rest)
  expected = [*OFFLINE, "openai", "openai:MODEL", *(f"{name}:PATH" for name in _MODELS)]
  raise ValueError(f"No judge {spec!r}; expected {', '.join(expected)}.")


__all__ = [
    "ApiConfig", "ApiError", "Exchange", "HarmBenchJudge", "Judge", "Judgement", "LlamaGuardJudge", "OFFLINE",
    "OpenAIJudge", "PrefixJudge", "RefusalJudge", "TopicJudge", "make_judge"]
