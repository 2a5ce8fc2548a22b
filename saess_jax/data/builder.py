"""The rows of `sources` as a TensorFlow Datasets builder, prepared once and read at random. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from saess_jax.data import sources

DATA_DIR = os.path.join("~", ".cache", "saess_jax", "datasets")


@dataclasses.dataclass(eq=False)
class SafetyPromptsConfig(tfds.core.BuilderConfig):
  """Made by `config_for`. The name carries a hash of the rows, so that a changed file is another data set."""

  rows: dict[str, list[sources.Row]] = dataclasses.field(default_factory=dict, repr=False)  # By split.


def config_for(source: str) -> SafetyPromptsConfig:
  """The config "embedded-HASH" or "files-HASH" of a `source` of `sources.load_split`.

  All rows are read and checked here, so that a bad one raises (ValueError, FileNotFoundError) before any is written.
  A split of a small file may have no rows; it is then left out.
  """
  if source == "embedded":
    rows = {split: sources.embedded_rows(split) for split in sources.SPLITS}
  else:
    rows = sources.split_rows(sources.read_rows(source))
  digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
  kind = "embedded" if source == "embedded" else "files"
  return SafetyPromptsConfig(name=f"{kind}-{digest}", description=source, rows=rows)


class SafetyPrompts(tfds.core.GeneratorBasedBuilder):
  """Prompts labelled benign or malicious, with the response to train on."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict({
            "prompt": tfds.features.Text(),
            "response": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(sources.LABELS)),
            "category": tfds.features.Text(),
            "source": tfds.features.Text(),
        }),
        disable_shuffling=True,  # Rows keep their order; the training order is the pipeline's.
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(rows) for split, rows in self.builder_config.rows.items()}

  def _generate_examples(self, rows: list[sources.Row]) -> Iterator[tuple[int, dict]]:
    for index, row in enumerate(rows):
      yield index, dataclasses.asdict(row)


class _Rows(Sequence):
  """A TFDS data source whose items are `Row`s."""

  def __init__(self, data_source):
    self._data_source = data_source

  def __len__(self) -> int:
    return len(self._data_source)

  def __getitem__(self, index: int) -> sources.Row:
    fields = self._data_source[range(len(self))[index]]
    texts = {name: fields[name].decode() for name in ("prompt", "response", "category", "source")}
    return sources.Row(label=int(fields["label"]), **texts)


def load(source: str, split: str, data_dir: str = DATA_DIR) -> Sequence[sources.Row]:
  """One split as a random-access sequence of `Row`, prepared under `data_dir` on first use (array_record).

  Raises:
    FileNotFoundError, ValueError: from `sources`; or a split that has no rows.
  """
  config = config_for(source)
  if split not in config.rows:
    raise ValueError(f"{source} has no split {split!r} with rows; it has {', '.join(config.rows)}.")
  builder = SafetyPrompts(config=config, data_dir=os.path.expanduser(data_dir), file_format="array_record")
  builder.download_and_prepare()
  return _Rows(builder.as_data_source(split))
