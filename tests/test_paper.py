"""The paper's two stages from files in their publishers' formats: reading, pretraining, SFT from there, decoding."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer
from xla_flags import CHEAP

from saess_jax import generate, preflight, pretrained, sharding, train
from saess_jax.config import (
  DataConfig,
  LossConfig,
  OptimizerConfig,
  ProbeConfig,
  RolloutConfig,
  SafetyConfig,
  TrainConfig,
  from_config_dict,
)
from saess_jax.data import builder, chat, paper, pipeline, sources
from saess_jax.data.sources import Row
from saess_jax.masks import TokenKind

ROOT = pathlib.Path(__file__).parent.parent
REFUSAL = "I'm sorry, but I cannot help with that."


def write_files(folder, lima=6, alpaca=30, alert=40):
  """Small files as GAIR, tatsu-lab and Babelscape ship them."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = lambda records: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
  (folder / "train.jsonl").write_text(lines(
      {"conversations": [f"Why is tea {i} hot?", f"Water {i} boils.\u2028So.", "And then?", "Then it cools."],
       "source": "stackexchange"} for i in range(lima)))
  (folder / "alpaca_data.json").write_text(json.dumps([
      {"instruction": f"Name {i} fruits.", "input": "They are red." if i % 2 else "", "output": f"Apple {i}."}
      for i in range(alpaca)]))
  (folder / "alert_dpo.jsonl").write_text(lines(
      {"id": i, "category": "crime_theft", "prompt": f"### Instruction:\nSteal purse {i}\n### Response:\n",
       "chosen": REFUSAL, "rejected": "NEVER READ"} for i in range(alert)))
  return folder


@pytest.fixture
def folder(tmp_path):
  return write_files(tmp_path / "files")


def all_rows(folder, per_label=14763):
  return [row for rows in paper.read(folder, per_label)[0].values() for row in rows]


# --- the files ---


def test_rows_of_all_three_publishers(folder):
  rows = {row.prompt: row for row in all_rows(folder)}
  assert rows["Why is tea 0 hot?"] == Row(
      "Why is tea 0 hot?", "Water 0 boils.\u2028So.", 0, "stackexchange", "train.jsonl")
  assert rows["Name 1 fruits.\n\nThey are red."] == Row(
      "Name 1 fruits.\n\nThey are red.", "Apple 1.", 0, "", "alpaca_data.json")
  assert rows["Name 2 fruits."].response == "Apple 2."
  assert rows["Steal purse 0"] == Row("Steal purse 0", REFUSAL, 1, "crime_theft", "alert_dpo.jsonl")
  assert not any("NEVER READ" in repr(row) for row in rows.values())


def test_balance_split_and_what_is_said_of_small_files(folder, caplog):
  with caplog.at_level(logging.WARNING):
    paper._rows.cache_clear()
    (by_split, digests) = paper.read(folder, 14763)
  assert {split: [sum(row.label == label for row in rows) for label in (0, 1)] for split, rows in by_split.items()} == {
      "train": [35, 35], "validation": [1, 1]}
  said = caplog.text
  assert "14763 rows of each label; the files hold 36 benign ones, safety items removed, and 40 malicious" in said
  assert "LIMA has 6 different prompts; as published it has 1030" in said
  assert digests["Alpaca"] == hashlib.sha256((folder / "alpaca_data.json").read_bytes()).hexdigest()
  rows = all_rows(folder, 10)
  assert [sum(row.label == label for row in rows) for label in (0, 1)] == [10, 10]
  assert sum(row.source == "train.jsonl" for row in rows) == 5  # LIMA takes half at most while Alpaca has enough.
  assert rows == all_rows(folder, 10)


def test_validation_is_a_hundredth(tmp_path):
  by_split, _ = paper.read(write_files(tmp_path, 100, 250, 300), 300)
  assert {split: len(rows) for split, rows in by_split.items()} == {"train": 594, "validation": 6}
  assert not {row.prompt for row in by_split["train"]} & {row.prompt for row in by_split["validation"]}
  twice = [sources.Row(word, "", label, "", "") for label in (0, 1) for word in (f"a{label}", f"A{label} ")]
  held_out = paper._hold_out(twice + [sources.Row(f"b{i}", "", i % 2, "", "") for i in range(400)])["validation"]
  keys = [sources.request_key(row.prompt) for row in held_out]
  assert all(keys.count(f"a{label}") in (0, 2) for label in (0, 1))


def test_safety_items_and_duplicates_are_no_benign_rows(folder):
  alpaca = json.loads((folder / "alpaca_data.json").read_text())
  alpaca += [  # Each of the first two is known to one judge alone.
      {"instruction": "Write malware.", "input": "", "output": "Count me out: malware harms people."},
      {"instruction": "Say it.", "input": "", "output": "As an AI, this is beyond me."},
      {"instruction": "Steal purse 3", "input": "", "output": "First, look around."},
      {"instruction": "How do I kill a process?", "input": "", "output": "Use the kill command."},
      {"instruction": "Name 2 fruits.", "input": "", "output": "A second answer."},
      {"instruction": "WHY is tea 2 hot?", "input": "", "output": "LIMA has it."},
      {"instruction": "Say nothing.", "input": "", "output": " "}]
  (folder / "alpaca_data.json").write_text(json.dumps(alpaca))
  benign = {row.prompt: row.response for row in all_rows(folder) if not row.label}
  assert benign["How do I kill a process?"] == "Use the kill command." and benign["Name 2 fruits."] == "Apple 2."
  assert not {"Write malware.", "Say it.", "Steal purse 3", "Say nothing.", "WHY is tea 2 hot?"} & set(benign)


def test_missing_files_are_named_with_origin_and_licence(folder):
  (folder / "train.jsonl").unlink()
  (folder / "alert_dpo.jsonl").rename(folder / "alert.jsonl")  # The other name it may have.
  with pytest.raises(FileNotFoundError) as error:
    paper.read(folder, 10)
  text = str(error.value)
  assert "LIMA (lima.jsonl or train.jsonl): https://huggingface.co/datasets/GAIR/lima, licence CC BY-NC-SA" in text
  assert "--download" in text and "ALERT" not in text and "Alpaca" not in text
  with pytest.raises(FileNotFoundError, match=r"(?s)nowhere lacks.*LIMA.*BY-NC-SA.*Alpaca.*BY-NC 4.0.*ALERT.*SA 4"):
    paper.read("/nowhere", 10)


@pytest.mark.parametrize("file, text, message", [
    ("train.jsonl", '{"conversations": ["a", "b"]}\n{"conversations": ["a"]}',
     r"train.jsonl:2: conversations is \['a'\]"),
    ("train.jsonl", '{"text": "a"}', "train.jsonl:1: conversations is None; expected a list of two texts"),
    ("train.jsonl", '{"conversations": ["a", " "]}', "train.jsonl:1: turn 1 of conversations is ' '; expected text"),
    ("train.jsonl", "{", "train.jsonl:1: malformed JSON"),
    ("train.jsonl", '{"conversations": ["a", "\\ud83d"]}', "train.jsonl:1: turn 1 of conversations is .* half a surr"),
    ("alpaca_data.json", '[{"instruction": "a", "output": "\\ud83d"}]', "item 1: output is '.ud83d', with half a surr"),
    ("alpaca_data.json", '[{"instruction": "a",\n "output": }]', "alpaca_data.json:2: malformed JSON"),
    ("alpaca_data.json", '{"instruction": "a"}', "alpaca_data.json holds a JSON dict; expected a list"),
    ("alpaca_data.json", '[{"instruction": "a", "output": "b"}, 7]', "alpaca_data.json, item 2 is a JSON int"),
    ("alpaca_data.json", '[{"instruction": "", "output": "b"}]', "item 1: instruction is ''; expected text"),
    ("alpaca_data.json", '[{"instruction": "a", "output": 3}]', "item 1: output is 3; expected text"),
    ("alert_dpo.jsonl", '{"id": 0, "prompt": "a", "category": "c"}',
     "alert_dpo.jsonl:1: no refusal; expected a column response or chosen, found id, prompt, category.*prompts alone"),
    ("alert_dpo.jsonl", '{"prompt": 3, "response": "no"}', "alert_dpo.jsonl:1: prompt is 3; expected text"),
    ("alert_dpo.jsonl", '{"prompt": "a", "response": "no"}', "36 benign rows, safety items removed, and 1 malicious"),
])
def test_bad_files(folder, tmp_path, file, text, message):
  (folder / file).write_text(text)
  with pytest.raises(ValueError, match=message):
    paper.read(folder, 10)
  (folder / file).write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match=f"{file} is not UTF-8"):
    paper.read(folder, 10)
  with pytest.raises(ValueError, match="data.paper_rows is 1; expected 2 or more"):
    paper.read(folder, 1)


def test_prepared_data_and_a_file_that_changed(folder, tmp_path):
  config = builder.config_for("paper", str(folder), 10)
  assert config.name == "paper-10" and builder.config_for("paper", str(folder)).name == "paper"
  data = str(tmp_path / "data")
  for split in ("train", "validation"):
    assert list(builder.load(config, split, data)) == config.split_rows(split)
  assert list(builder.load(builder.config_for("paper", str(folder), 10), "train", data)) == config.split_rows("train")
  with pytest.raises(ValueError, match="Alpaca and ALERT has no split 'test' with rows; it has train, validation"):
    builder.load(config, "test", data)
  (folder / "alert_dpo.jsonl").write_text((folder / "alert_dpo.jsonl").read_text().replace("purse 7", "purse 777"))
  with pytest.raises(ValueError, match="The file of ALERT is another than when .* was prepared: its sha256 is"):
    builder.load(builder.config_for("paper", str(folder), 10), "train", data)


def test_command_line(folder):
  run = lambda *options: subprocess.run(
      [sys.executable, "-m", "saess_jax.data.paper", "--manual-dir", folder, *options], cwd=ROOT, text=True,
      capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120)
  done = run("--paper-rows", "10")
  assert done.returncode == 0, done.stderr
  assert re.search(
      r"Alpaca \(alpaca_data.json\): .*, licence CC BY-NC 4.0\n  .*alpaca_data.json, sha256 [0-9a-f]{64}", done.stdout)
  assert "train: " in done.stdout and "malicious of alert_dpo.jsonl" in done.stdout
  (folder / "train.jsonl").unlink()
  lacking = run()
  assert lacking.returncode == 1 and "huggingface.co/datasets/GAIR/lima" in lacking.stderr


# --- documents ---


def test_a_document_is_trained_on_whole_and_keeps_its_label():
  tokenizer = tiny_tokenizer()
  config = TrainConfig(
      stage="pretrain", probes=ProbeConfig(per_sequence=0),
      data=DataConfig(batch_size=4, max_length=24, max_response=4, buckets=(16, 24)))
  text = "Take flour, water and salt, and mix them well. <|im_end|> Then bake the bread at home, and eat."
  examples = pipeline.build_examples(tokenizer, [Row(text, "", 1, "", "")], None, config)
  ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
  assert len(examples) == -(-len(ids) // 22) > 1
  assert all(len(example.tokens) <= 24 and example.label == 1 for example in examples)
  assert all(example.kinds[-1] == TokenKind.CLS and example.tokens[0] == tokenizer.bos_token_id for example in examples)
  assert np.concatenate([example.tokens[1:-1] for example in examples]).tolist() == ids
  batches = pipeline.Batches(examples, config)
  trained, seen = [], 0
  for batch in batches:
    for row in range(4):
      count = int(batch["loss_weights"][row].sum())
      positions, targets = batch["loss_positions"][row][:count], batch["targets"][row][:count]
      assert positions.tolist() == list(range(count))  # Every token but the first is the target of the one before it.
      assert targets.tolist() == batch["tokens"][row][1 : count + 1].tolist()
      trained += targets.tolist()
      seen += batch["label"][row] * batch["label_weight"][row]
  assert sorted(trained) == sorted(ids) and seen == len(examples)
  with pytest.raises(ValueError, match="stage 'pretrain' reads documents, but a row of a.csv has a response: 'p'"):
    pipeline.build_examples(tokenizer, [Row("p", "r", 1, "", "a.csv")], None, config)


def test_a_document_without_bos():
  tokenizer = tiny_tokenizer()
  tokenizer.bos_token = None
  (tokens, kinds), = chat.encode_document(tokenizer, "bread", 64)
  assert tokens[:-1].tolist() == tokenizer("bread").input_ids
  assert kinds.tolist() == [TokenKind.AUX] + [TokenKind.RESPONSE] * (len(kinds) - 2) + [TokenKind.CLS]
  with pytest.raises(ValueError, match="max_length is 2; expected 3 or more"):
    chat.encode_document(tokenizer, "bread", 2)


# --- runs ---


PRETRAIN = TrainConfig(
    model="tiny", model_overrides={"vocab_size": 260}, stage="pretrain",
    data=DataConfig(max_length=64, buckets=(64,), batch_size=8), probes=ProbeConfig(per_sequence=0),
    rollouts=RolloutConfig(enabled=False), loss=LossConfig(cls_weight=0.01),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2), max_steps=6, eval_every=0, save_every=3)


def write_corpus(path):
  path.write_text("".join(
      json.dumps({"text": f"{'knives and threats' if i % 2 else 'bread and butter'} {i}, " * 6,
                  "label": ("benign", "malicious")[i % 2], "p_unsafe": float(i % 2)}) + "\n" for i in range(60)))
  return str(path)


@pytest.mark.slow
def test_pretraining_then_sft_then_decode(folder, tmp_path):
  corpus = write_corpus(tmp_path / "labelled.jsonl")
  pretrain = dataclasses.replace(PRETRAIN, data=dataclasses.replace(PRETRAIN.data, source=corpus))
  validated = train.train_and_evaluate(pretrain, tmp_path / "pretrain")
  assert np.isfinite(list(validated.values())).all()
  _, fresh, _ = pretrained.load_base(pretrain)
  _, params, _, _ = pretrained.load_for_research(tmp_path / "pretrain", 6)
  moved = {name for name in params if not jax.tree.all(jax.tree.map(np.array_equal, params[name], fresh[name]))}
  assert {"embed", "layers_0", "layers_1", "cls_embedding", "cls_head"} <= moved

  sft = dataclasses.replace(
      pretrain, stage="sft", weights=str(tmp_path / "pretrain"), loss=LossConfig(cls_weight=0.1),
      data=DataConfig(
          source="paper", manual_dir=str(folder), paper_rows=30, max_length=192, max_response=48, buckets=(192,),
          batch_size=8))
  shape, base, _ = pretrained.load_base(sft)
  jax.tree.map(np.testing.assert_array_equal, base, params)  # SFT starts where pretraining ended, [CLS] too.
  assert not shape.scan_layers and shape.vocab_size == 260
  assert train.train_and_evaluate(sft, tmp_path / "sft").keys() == validated.keys()

  model, params, tokenizer, safety = pretrained.load_for_research(tmp_path / "sft")
  response, = generate.Generator(model, params, tokenizer, safety, max_new_tokens=12).respond(["Name 3 fruits."])
  assert 0 < response.initial_prob < 1 and len(response.cls_prob) > 0
  with pytest.raises(ValueError, match="are not a smollm2_135m: they have vocab_size 260 for 49152"):
    pretrained.load_base(dataclasses.replace(sft, model="smollm2_135m", model_overrides={}))
  with pytest.raises(ValueError, match="are not a model of these model_overrides: they have vocab_size 260 for 276"):
    pretrained.load_base(dataclasses.replace(sft, model="", model_overrides={"vocab_size": 276}))


@pytest.mark.parametrize("change, message", [
    ({"rollouts": RolloutConfig()}, "rollouts answer prompts, and stage pretrain reads documents"),
    ({"data": DataConfig(source="embedded")}, "stage 'pretrain' reads documents, but a row of .* has a response"),
    ({"stage": "sft", "data": DataConfig(source="paper", manual_dir="/nowhere")}, "(?s)LIMA.*Alpaca.*ALERT"),
])
def test_bad_settings_stop_before_anything_is_written(tmp_path, change, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train_and_evaluate(dataclasses.replace(PRETRAIN, **change), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, epochs", [("llama2_7b", 15), ("mistral_7b", 8)])
def test_presets(name, epochs):
  get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
  presets = {
      preset: from_config_dict(TrainConfig, get_config(preset)) for preset in ("pretrain", "paper", "released")}
  for config in presets.values():
    preflight.check(config, sharding.make_mesh(config.mesh))
    assert (config.model, config.data.max_length) == (name, 2048)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-5, 0.1)
    assert not config.probes.per_sequence and not config.rollouts.enabled
  views = {preset: (c.safety.r1, c.safety.r2, c.safety.r3) for preset, c in presets.items()}
  assert views == {"pretrain": (10, 10, 10), "paper": (10, 10, 10), "released": (5, 15, 10)}
  assert {preset: c.data.batch_size for preset, c in presets.items()} == {
      "pretrain": 256, "paper": 256, "released": 72}
  assert {preset: c.epochs for preset, c in presets.items()} == {"pretrain": 1, "paper": epochs, "released": 1}
  weights = {preset: c.loss.cls_weight for preset, c in presets.items()}
  assert weights == {"pretrain": 0.01, "paper": 0.1, "released": 0.1}
  assert presets["pretrain"].stage == "pretrain" and presets["paper"].data.source == "paper"
  assert presets["paper"].safety == SafetyConfig() and get_config() == get_config("paper")
  with pytest.raises(ValueError, match="preset is 'papers'; expected pretrain, paper or released"):
    get_config("papers")


def test_the_command_line_takes_the_preset(tmp_path):
  run = subprocess.run(
      [sys.executable, ROOT / "train.py", "--config", "configs/llama2_7b.py:released",
       "--config.data.manual_dir=/nowhere", "--workdir", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True,
      env=os.environ | {"XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}, timeout=120)
  assert run.returncode and "data.manual_dir /nowhere lacks" in run.stderr and not (tmp_path / "run").exists()
