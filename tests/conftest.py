"""Eight fake CPU devices and cheap compiling for every test, set before jax starts."""

import os

from xla_flags import CHEAP, EIGHT_DEVICES

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES} {CHEAP}"

import flax.linen as nn  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from saess_jax import config, model  # noqa: E402

hypothesis.settings.register_profile("unhurried", deadline=None)  # A busy machine is no failure.
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_params():
  """Unrolled params of the tiny preset, moved away from their start so that no [CLS] part is zero."""
  tiny = model.Llama(config.model_config("tiny", scan_layers=False))
  params = nn.unbox(tiny.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])
