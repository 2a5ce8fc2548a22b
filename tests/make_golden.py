"""What parity is measured against: tiny random Llamas, SmolLM2 in torch, and the golden arrays made from both.

`python tests/make_golden.py` rewrites tests/golden/*.npz with transformers' torch models; the tests then need no torch.
"""

from __future__ import annotations

import json
import pathlib

import gguf as gguf_package
import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOKENS = np.random.default_rng(7).integers(0, 64, (2, 24), dtype=np.int32)
TOP = 5  # Logits kept at each position of SmolLM2.

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 1e4, "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}
CASES = {  # What differs from BASE: each a way for weights or arithmetic to go wrong.
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "wide_heads": {"head_dim": 24},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
}

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea in winter.",
    "Explain photosynthesis to a child in three sentences.",
    "def fibonacci(n):\n    # returns the n-th number",
    "List 3 fruits and their colours:\n1.",
    "Translate 'good morning' into Spanish.",
    "How do I kill a Python process?",
    "Who wrote Don Quixote, and in which century?",
    "Summarise the plot of Romeo and Juliet.",
    "What is 17 + 25?",
    "Give me a recipe for lentil soup.",
    "Why is the sky blue?",
    "Write an e-mail asking for a day off.",
    "Name the planets in order from the sun.",
    "What does HTTP 404 mean?",
    "Tell me a joke about a cat and a piano.",
    "Convert 3.5 kilometres to metres.",
    "Napoleon était-il petit ?",
    "What are the benefits of sleep?",
    "Describe a sunset to someone who can't see.",
)


def hf_config(case: str) -> dict:
  """The config.json of a tiny model."""
  return BASE | CASES[case]


def hf_state(case: str) -> dict[str, np.ndarray]:
  """Its random weights, float32, under Hugging Face's names."""
  config = hf_config(case)
  D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
  N, K = config["num_attention_heads"], config["num_key_value_heads"]
  H = config.get("head_dim", D // N)
  rng = np.random.default_rng(0)
  kernel = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
  scale = lambda: rng.uniform(0.5, 1.5, D).astype(np.float32)
  state = {"model.embed_tokens.weight": kernel(V, D), "model.norm.weight": scale()}
  for i in range(config["num_hidden_layers"]):
    state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in {
        "input_layernorm": scale(), "post_attention_layernorm": scale(),
        "self_attn.q_proj": kernel(N * H, D), "self_attn.k_proj": kernel(K * H, D),
        "self_attn.v_proj": kernel(K * H, D), "self_attn.o_proj": kernel(D, N * H),
        "mlp.gate_proj": kernel(F, D), "mlp.up_proj": kernel(F, D), "mlp.down_proj": kernel(D, F)}.items()}
    if config["model_type"] == "qwen2":
      state |= {f"model.layers.{i}.self_attn.{name}_proj.bias": rng.normal(0, 0.5, size * H).astype(np.float32)
                for name, size in (("q", N), ("k", K), ("v", K))}
  return state if config["tie_word_embeddings"] else state | {"lm_head.weight": kernel(V, D)}


def write_folder(folder: pathlib.Path, case: str = "grouped", config: dict | None = None, state: dict | None = None):
  """A Hugging Face folder without torch; returns `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config or hf_config(case)))
  safetensors.numpy.save_file(state or hf_state(case), folder / "model.safetensors")
  return folder


def write_with_tokenizer(folder: pathlib.Path, tokenizer, context: int) -> pathlib.Path:
  """The same with a vocabulary of 512 and that tokenizer; embeddings spread out enough to tell words apart."""
  state, rng = hf_state("grouped"), np.random.default_rng(3)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    state[name] = rng.normal(0, 0.3, (512, BASE["hidden_size"])).astype(np.float32)
  write_folder(folder, config=BASE | {"vocab_size": 512, "max_position_embeddings": context}, state=state)
  tokenizer.save_pretrained(folder)
  return folder


def torch_model(config: dict, state: dict[str, np.ndarray]):
  """transformers' torch model of that config and those weights, eager attention, in float32."""
  import torch
  import transformers
  config = transformers.AutoConfig.for_model(**config)
  config._attn_implementation = "eager"  # The plain formula.
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  lacking = model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
  assert set(lacking.missing_keys) <= {"lm_head.weight"} and not lacking.unexpected_keys, lacking
  model.tie_weights()
  return model


def torch_smollm2(path: pathlib.Path):
  """SmolLM2 in torch, read from the GGUF apart from saess_jax.

  The rows of Q and K are put in order by index here: row i of a head in Hugging Face's order is row 2i of llama.cpp's
  in the first half, and row 2(i - H/2) + 1 in the second.
  """
  state = {}
  rows = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
  names = {
      "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
      "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
      "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
  outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
  for tensor in gguf_package.GGUFReader(path).tensors:
    values = gguf_package.dequantize(tensor.data, tensor.tensor_type)
    if not tensor.name.startswith("blk."):
      state[outer[tensor.name]] = values
      continue
    _, layer, part, _ = tensor.name.split(".")
    if part in ("attn_q", "attn_k"):
      values = np.concatenate([values[start:start + 64][rows] for start in range(0, len(values), 64)])
    state[f"model.layers.{layer}.{names[part]}.weight"] = values
  return torch_model({
      "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
      "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
      "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e5}, state)


def chat_ids(tokenizer, prompt: str) -> list[int]:
  """The prompt in the model's chat template, up to where the answer begins."""
  messages = [{"role": "user", "content": prompt}]
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  return tokenizer(text, add_special_tokens=False).input_ids


def main():
  import torch

  from saess_jax import gguf
  GOLDEN.mkdir(exist_ok=True)
  with torch.no_grad():
    tiny = {case: torch_model(hf_config(case), hf_state(case))(torch.tensor(TOKENS)).logits.numpy() for case in CASES}
    np.savez_compressed(GOLDEN / "llama_tiny.npz", tokens=TOKENS, **tiny)
    model, tokenizer = torch_smollm2(gguf.smollm2_path()), gguf.read_tokenizer(gguf.smollm2_path())
    arrays = {}
    for i, prompt in enumerate(PROMPTS[:5]):
      ids = chat_ids(tokenizer, prompt)
      top = model(torch.tensor([ids])).logits[0].topk(TOP)
      arrays |= {
          f"ids_{i}": np.int32(ids), f"top_{i}": top.indices.numpy().astype(np.int32),
          f"logits_{i}": top.values.numpy()}
    np.savez_compressed(GOLDEN / "smollm2.npz", **arrays)


if __name__ == "__main__":
  main()
