"""A tiny model with a verdict that means something, laid open for the white-box attacks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny_tokenizer import tiny_tokenizer

from saess_jax import config, decode, model
from saess_jax.attacks import Target, Weights
from saess_jax.attacks.gcg import START
from saess_jax.data import chat
from saess_jax.masks import TokenKind

BEHAVIORS = [f"Do the forbidden thing number {i}." for i in range(4)]
HARMLESS = ["How do I make bread?", "Write a story in which a baker sings.", "Explain flour.", "Mix water and salt."]
SAFETY = config.SafetyConfig(rule2_keeps_query=True)


def with_verdict(params):
  """`params` with a [CLS] head that tells BEHAVIORS (log-odds 3) from HARMLESS (-3), with a suffix behind them: along
  the difference of means.
  """
  tiny = model.Llama(config.model_config("tiny", scan_layers=False))
  rows = [chat.encode_request(tiny_tokenizer(), text + START) for text in BEHAVIORS + HARMLESS]
  prompt = decode.pad_prompts(rows)
  out = jax.jit(lambda params: tiny.apply({"params": params}, prompt.tokens, kinds=prompt.kinds, stage="sft"))(params)
  at = np.argmax(prompt.kinds == TokenKind.CLS, axis=1)
  hidden = np.asarray(out.hidden)[np.arange(len(rows)), at]
  malicious, benign = hidden[: len(BEHAVIORS)].mean(axis=0), hidden[len(BEHAVIORS):].mean(axis=0)
  way = malicious - benign
  kernel = 6 * way / (way @ way)
  head = {"kernel": jnp.asarray(kernel[:, None]), "bias": jnp.asarray([-kernel @ (malicious + benign) / 2])}
  return {**params, "cls_head": head}


def target(params, victim="saess", seed=0, safety=SAFETY, max_seq_len=1024):
  """A Target whose models share `params`; only "saess" has a defence."""
  tiny = model.Llama(config.model_config("tiny", scan_layers=False, max_seq_len=max_seq_len))
  tokenizer = tiny_tokenizer()
  weights = {"base": Weights(tiny, params, tokenizer, None), "saess": Weights(tiny, params, tokenizer, safety)}
  return Target(victim, tokenizer, None, weights.__getitem__, max_seq_len, seed)
