"""The TFDS builder: round trip, identity of changed files, nothing written for bad ones."""

import hashlib
import sys

import pytest

from saess_jax.data import builder, sources


@pytest.fixture
def data_file(tmp_path):
  path = tmp_path / "mine.csv"
  path.write_text(
      "prompt,response,label,category\n" + "".join(f'"Prompt {i},\n é 🙂","Yes {i}",{i % 2},cat\n' for i in range(50)))
  return path


def test_round_trip_of_every_split(data_file, tmp_path):
  for split in sources.SPLITS:
    rows = builder.load(str(data_file), split, str(tmp_path / "data"))
    assert list(rows) == sources.load_split(str(data_file), split)
    assert rows[-1] == rows[len(rows) - 1]
  with pytest.raises(IndexError):
    rows[len(rows)]
  assert "tensorflow" not in sys.modules


def test_features_and_identity(data_file, tmp_path):
  config = builder.config_for(str(data_file))
  prompts = builder.SafetyPrompts(config=config, data_dir=str(tmp_path), file_format="array_record")
  assert prompts.name == "safety_prompts" and config.name.startswith("files-")
  assert set(prompts.info.features) == {"prompt", "response", "label", "category", "source"}
  assert prompts.info.features["label"].names == ["benign", "malicious"]
  assert builder.config_for(str(data_file)).name == config.name


def test_a_changed_file_is_not_served_from_the_cache(data_file, tmp_path):
  before = list(builder.load(str(data_file), "train", str(tmp_path / "data")))
  data_file.write_text(data_file.read_text().replace("Yes", "Of course"))
  after = list(builder.load(str(data_file), "train", str(tmp_path / "data")))
  assert len(after) == len(before) and all(row.response.startswith("Of course") for row in after)


def test_prepared_once(data_file, tmp_path, monkeypatch):
  builder.load(str(data_file), "train", str(tmp_path / "data"))
  monkeypatch.setattr(builder.SafetyPrompts, "_generate_examples", None)
  assert len(builder.load(str(data_file), "train", str(tmp_path / "data")))


def test_bad_rows_raise_before_anything_is_written(data_file, tmp_path):
  data_file.write_text(data_file.read_text() + "too few fields\n")
  with pytest.raises(ValueError, match=r"mine.csv:\d+: no field for column response"):
    builder.load(str(data_file), "train", str(tmp_path / "data"))
  assert not (tmp_path / "data").exists()


def test_split_without_rows(tmp_path):
  path = tmp_path / "one.csv"
  path.write_text("prompt,label\nonly,1\n")
  with pytest.raises(ValueError, match=r"one.csv has no split 'dev' with rows; it has \w+\."):
    builder.load(str(path), "dev", str(tmp_path / "data"))


def test_embedded(tmp_path):
  made = builder.SafetyPrompts(config="embedded", data_dir=str(tmp_path), file_format="array_record")
  made.download_and_prepare()
  assert len(made.as_data_source("test")) == len(sources.embedded_rows("test"))
  assert list(builder.load("embedded", "validation", str(tmp_path))) == sources.embedded_rows("validation")


def test_the_version_is_raised_with_the_embedded_rows():
  rows = {split: sources.embedded_rows(split) for split in sources.SPLITS}
  digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
  assert (str(builder.SafetyPrompts.VERSION), digest) == ("1.4.0", "82272c015b6c1b40")
