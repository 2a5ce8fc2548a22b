"""The trained model, with safe decoding on or off, as a model of EleutherAI's lm-evaluation-harness.

  pip install lm_eval
  python -m saess_jax.lm_eval --checkpoint RUN --safety on --include benchmarks/lm_eval --tasks saess_gsm8k --limit 50

What a request's context says is the user's turn in the chat template, with safety on and off alike [our choice: [CLS]
has a place only there], so figures are not those of harnesses that complete plain text. A continuation is what the
assistant begins with, without the space that tasks put before it. With safety on, log-likelihoods are those of a
response that sees [CLS], and generation is safe decoding, refusals included. Rolling log-likelihood is of plain text.

The harness is an optional install. Where it is there, importing this module registers the model as "saess", for
`lm_eval.simple_evaluate(model="saess", model_args="checkpoint=RUN,safety=on", ...)`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saess_jax import batching, generate, masks, pretrained, staging
from saess_jax.config import SafetyConfig
from saess_jax.data import chat
from saess_jax.masks import TokenKind
from saess_jax.model import Llama, Params
from saess_jax.sampling import SamplingConfig

NAME = "saess"  # In the harness's registry.
_STEP = 64  # Padded lengths are multiples: few are compiled.


def load(checkpoint_path: str, weights: str) -> tuple[Llama, Params, Any, SafetyConfig, dict[str, Any]]:
  """A trained run, or plain weights (which have a fresh [CLS]): (model, params, tokenizer, settings, layout).

  Raises:
    ValueError: both are given, or neither; else as `pretrained.load_for_research`.
  """
  if bool(checkpoint_path) == bool(weights):
    raise ValueError(
        f"checkpoint is {checkpoint_path!r} and weights is {weights!r}; expected one of the two: a training run, or "
        "weights as `hf.load_pretrained` takes them.")
  path = checkpoint_path or weights
  return *pretrained.load_for_research(path), pretrained.settings_of(path).layout


@functools.cache
def model_class() -> type:
  """The harness's LM, registered as "saess": `model_class()(checkpoint=..., weights=..., safety=..., ...)`.

  Raises:
    ImportError: lm_eval is not installed.
  """
  try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  except ImportError as error:
    raise ImportError(f"lm-evaluation-harness cannot be imported ({error}); pip install lm_eval.") from error

  @register_model(NAME)
  class SaessLM(LM):
    """See the top of this file."""

    def __init__(
        self, checkpoint: str = "", weights: str = "", safety: bool | str = False, batch_size: int | str = 8,
        max_gen_toks: int = 256, device: str | None = None, max_batch_size: int | None = None):
      """
      Args:
        checkpoint, weights: as `load`.
        safety: whether [CLS] is seen and decoding intervenes; "on" and "off" will do.
        batch_size: rows a forward pass; 8 for "auto".
        max_gen_toks: new tokens where a task does not say.
        device, max_batch_size: what the harness gives every model; nothing here reads them.

      Raises:
        ValueError: as `load`; another word for safety, or "on" without a trained [CLS].
      """
      super().__init__()
      del device, max_batch_size
      words = {"on": True, "off": False, "True": True, "False": False, True: True, False: False}
      if safety not in words:
        raise ValueError(f"safety is {safety!r}; expected on or off.")
      if words[safety] and (checkpoint or weights) and not pretrained.settings_of(checkpoint or weights).has_cls:
        raise ValueError(
            f"{checkpoint or weights} has no trained [CLS], and its verdicts would mean nothing; give safety=off.")
      model, self._params, self._tokenizer, settings, self._layout = load(checkpoint, weights)
      self._model = model
      self._safety = settings if words[safety] else None
      self._batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
      self._max_gen_toks = max_gen_toks
      self._limit = model.config.max_seq_len
      if self._safety is not None and model.config.sliding_window is not None:  # Beyond it [CLS] would be lost.
        self._limit = min(self._limit, model.config.sliding_window - 1)
      self._score = jax.jit(functools.partial(_score, self._model, self._safety is not None))

    @property
    def tokenizer_name(self) -> str:
      return self._tokenizer.name_or_path or type(self._tokenizer).__name__

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
      """(log p of the continuation, whether greedy decoding without interventions says it) of each request."""
      rows = []
      for request in requests:
        context, continuation = request.args
        ids = chat.encode_text(self._tokenizer, continuation.removeprefix(" "))
        if not ids:
          raise ValueError(f"The continuation {continuation!r} has no tokens; expected text.")
        tokens, kinds = chat.encode_prompt(
            self._tokenizer, context, system_prompt=self._layout["system_prompt"])
        self._fits(len(tokens) + len(ids), context)
        tokens = np.append(tokens, ids).astype(np.int32)
        kinds = np.append(kinds, np.full(len(ids), TokenKind.RESPONSE, np.int32))
        if self._safety is not None:
          tokens, kinds = chat.insert_cls(tokens, kinds, "sft", self._layout["header_sees_cls"])
        rows.append((tokens, kinds, len(ids)))
      return self._scores(rows)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
      """log p of whole texts, each token with as much context as fits; the first one's is BOS (or the end of turn)."""
      start = self._tokenizer.bos_token_id
      start = self._tokenizer.eos_token_id if start is None else start
      rows, owners = [], []
      for i, request in enumerate(requests):
        ids = chat.encode_text(self._tokenizer, request.args[0])
        for window in get_rolling_token_windows(ids, start, self._model.config.max_seq_len, 1):
          context, said = make_disjoint_window(window)
          tokens = np.asarray(context + said, np.int32)
          rows.append((tokens, np.full(len(tokens), TokenKind.RESPONSE, np.int32), len(said)))
          owners.append(i)
      plain = jax.jit(functools.partial(_score, self._model, False))
      totals = np.zeros(len(requests))
      np.add.at(totals, owners, [score for score, _ in self._scores(rows, plain)])
      return totals.tolist()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
      """Answers, each up to the first of its stop strings. One batch for requests of the same settings."""
      answers = [""] * len(requests)
      groups: dict[tuple, list[int]] = {}
      for i, request in enumerate(requests):
        settings = request.args[1]
        drawn = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0
        sampling = SamplingConfig(
            temperature=float(settings["temperature"]), top_p=float(settings.get("top_p") or 1.0),
            top_k=int(settings.get("top_k") or 0)) if drawn else SamplingConfig()
        groups.setdefault((int(settings.get("max_gen_toks", self._max_gen_toks)), sampling), []).append(i)
      for (count, sampling), chosen in groups.items():
        generator = generate.Generator(
            self._model, self._params, self._tokenizer, self._safety, sampling, count, self._batch_size,
            **self._layout)
        asked = [requests[i].args[0] for i in chosen]
        numbers = collections.defaultdict(itertools.count)  # Of one text asked several times.
        places = [generate.place_of(next(numbers[text]), text) for text in asked]
        texts = generator.respond(asked, progress=f"generate {count}", places=places)
        for i, response in zip(chosen, texts):
          stops = requests[i].args[1].get("until") or []
          answers[i] = cut(response.text, [stops] if isinstance(stops, str) else stops)
      return answers

    def _fits(self, length: int, context: str) -> None:
      if length > self._limit:
        raise ValueError(
            f"A request has {length} tokens with its template; the model's context is {self._limit}. Lower the "
            f"number of examples (--num-fewshot): {context[:60]!r}")

    def _scores(self, rows, score=None) -> list[tuple[float, bool]]:
      """Rows are (tokens, kinds, how many at the end are scored)."""
      results: list[Any] = [None] * len(rows)
      for chosen, filled, size in batching.by_length([len(row[0]) for row in rows], self._batch_size, _STEP):
        size = min(size, self._limit + 1) if score is None else size  # [CLS] is stored beside the request.
        tokens, kinds = (batching.padded((rows[i][part] for i in filled), size) for part in (0, 1))
        stops = np.asarray([len(rows[i][0]) for i in filled])[:, None]
        counts = np.asarray([rows[i][2] for i in filled])[:, None]
        scored = (np.arange(size) >= stops - counts) & (np.arange(size) < stops)
        total, greedy = (score or self._score)(self._params, tokens, kinds, scored)
        for i, one, other in zip(chosen, np.asarray(total), np.asarray(greedy)):
          results[i] = float(one), bool(other)
      return results

  return SaessLM


def _score(model: Llama, sees_cls: bool, params, tokens, kinds, scored) -> tuple[jax.Array, jax.Array]:
  """log p of the tokens where `scored` [B, S], float32 [B], and whether each is the likeliest, bool [B]."""
  layout = {"kinds": kinds, "stage": "sft"} if sees_cls else {}
  logits = model.apply({"params": params}, tokens, **layout).logits
  targets, scored = tokens[:, 1:], scored[:, 1:]
  before = masks.predictor(kinds, jnp.broadcast_to(jnp.arange(1, tokens.shape[1]), targets.shape))
  logits = jnp.take_along_axis(logits, jnp.maximum(before, 0)[..., None], axis=1)
  said = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  greedy = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~scored, axis=1)
  return jnp.sum(jnp.where(scored, said, 0), axis=1), greedy


def cut(text: str, stops: Sequence[str]) -> str:
  """`text` before the first stop string in it."""
  return text[: min([at for at in map(text.find, filter(None, stops)) if at >= 0], default=len(text))]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
      prog="python -m saess_jax.lm_eval", description="Runs tasks of lm-evaluation-harness on a model.")
  parser.add_argument("--checkpoint", default="", help="workdir of a training run")
  parser.add_argument("--weights", default="", help="weights without a run, as `hf.load_pretrained` takes them")
  parser.add_argument("--safety", default="off", choices=("on", "off"), help="does [CLS] steer decoding?")
  parser.add_argument("--tasks", required=True, help="the harness's names, separated by commas")
  parser.add_argument("--include", help="folder with further task files (YAML)")
  parser.add_argument("--limit", type=int, help="items of each task")
  parser.add_argument("--num-fewshot", type=int, help="examples before each item")
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--out", help="JSON file for the results")
  options = parser.parse_args(argv)
  try:
    if options.out and not pathlib.Path(options.out).absolute().parent.is_dir():
      raise FileNotFoundError(f"--out is {options.out}, and there is no folder to write it into; make it first.")
    model = model_class()(options.checkpoint, options.weights, options.safety, options.batch_size)
    import lm_eval
    from lm_eval.tasks import TaskManager
    results = lm_eval.simple_evaluate(
        model=model, tasks=options.tasks.split(","), task_manager=TaskManager(include_path=options.include),
        limit=options.limit, num_fewshot=options.num_fewshot, bootstrap_iters=0)
  except (ValueError, FileNotFoundError, ImportError, KeyError) as error:
    parser.error(str(error))
  kept = {"results": results["results"], "n": results["n-samples"], "safety": options.safety}
  text = json.dumps(kept, indent=2, default=str)
  print(text)
  if options.out:
    staging.write_text(pathlib.Path(options.out), text + "\n")


try:
  model_class()
except ImportError:
  pass  # Said to who asks for it.

if __name__ == "__main__":
  main()
