"""Eight fake CPU devices for every test, set before jax starts, and one cache of what is compiled for all of them."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Inherited by the workers of pytest-xdist and by every process that a test starts; gone when the tests end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="saess_jax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from saess_jax import config, model  # noqa: E402


@pytest.fixture(scope="session")
def tiny_params():
  """Unrolled params of the tiny preset, moved away from their start so that no [CLS] part is zero."""
  tiny = model.Llama(config.model_config("tiny", scan_layers=False))
  params = nn.unbox(tiny.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])
