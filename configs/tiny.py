"""A random two-layer model with a byte tokenizer: every part of a run in a minute,
nothing to download, nothing learned.
"""

from saess_jax.config import DataConfig, OptimizerConfig, RolloutConfig, TrainConfig, to_config_dict


def get_config():
  return to_config_dict(TrainConfig(
      model="tiny",
      model_overrides={"max_seq_len": 1024},
      data=DataConfig(max_train_rows=128, max_length=768, max_response=64, buckets=(256, 512, 768)),
      rollouts=RolloutConfig(tokens=16),
      optimizer=OptimizerConfig(learning_rate=1e-3),
      max_steps=12, eval_every=6, save_every=6,
  ))
