"""Eight fake CPU devices for every test, set before jax starts; and programs compiled without LLVM's optimizations, by
XLA's older emitters and in one piece, for they are small and run a few times: compiling is what tests spend their time
on, and so it takes a third (tests/test_stream.py, test_losses.py and test_decode.py 103 s in place of 243).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

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
