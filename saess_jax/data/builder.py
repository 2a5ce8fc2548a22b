"""The rows of `sources` as a TensorFlow Datasets builder, prepared once and read at random. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from saess_jax.config import DataConfig
from saess_jax.data import paper, sources

DATA_DIR = os.path.join("~", ".cache", "saess_jax", "datasets")


@dataclasses.dataclass(eq=False)
class SafetyPromptsConfig(tfds.core.BuilderConfig):
  """What `config_for` makes of a source. Without rows of its own it stands for the embedded set."""

  rows: dict[str, list[sources.Row]] = dataclasses.field(default_factory=dict, repr=False)  # By split.
  sha256: dict[str, str] = dataclasses.field(default_factory=dict)  # Of the published files they come from.

  def split_rows(self, split: str) -> list[sources.Row]:
    """The rows of `split` as they were read; none is prepared for it.

    Raises:
      ValueError: there are none.
    """
    if not self.rows:
      return sources.embedded_rows(split)
    if split not in self.rows:
      raise ValueError(f"{self.description} has no split {split!r} with rows; it has {', '.join(self.rows)}.")
    return self.rows[split]


EMBEDDED = SafetyPromptsConfig(name="embedded", description="The contrast sets that ship with the package.")


def config_for(
    source: str, manual_dir: str = DataConfig.manual_dir, paper_rows: int = DataConfig.paper_rows
) -> SafetyPromptsConfig:
  """The config of a `source` of `DataConfig`: "embedded", "paper" (of `paper_rows`), or "files-HASH" of what else
  `sources.read_splits` reads.

  The hash is of the rows, so that a changed file is another data set. All rows are read and checked here: a bad one
  raises (ValueError, FileNotFoundError) before any is written. A split of a small file may have no rows; it is then
  left out.
  """
  if source == EMBEDDED.name:
    return EMBEDDED
  if source == "paper":
    rows, digests = paper.read(manual_dir, paper_rows)
    name = source if paper_rows == DataConfig.paper_rows else f"{source}-{paper_rows}"
    return SafetyPromptsConfig(name=name, description="LIMA, Alpaca and ALERT", rows=rows, sha256=digests)
  rows = sources.read_splits(source)
  digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
  return SafetyPromptsConfig(name=f"files-{digest}", description=source, rows=rows)


class SafetyPrompts(tfds.core.GeneratorBasedBuilder):
  """Prompts labelled benign or malicious, with the response to train on."""

  # Prepared data is kept by it: raised whenever the embedded rows change, or which of the paper's rows are for what.
  VERSION = tfds.core.Version("1.4.0")
  BUILDER_CONFIGS = [EMBEDDED]

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
        metadata=tfds.core.MetadataDict(sha256=self.builder_config.sha256),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    rows = self.builder_config.rows or {split: sources.embedded_rows(split) for split in sources.SPLITS}
    return {split: self._generate_examples(rows) for split, rows in rows.items()}

  def _generate_examples(self, rows: list[sources.Row]) -> Iterator[tuple[int, dict]]:
    for index, row in enumerate(rows):
      yield index, {name: getattr(row, name) for name in self.info.features}


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


def load(source: str | SafetyPromptsConfig, split: str, data_dir: str = DATA_DIR) -> Sequence[sources.Row]:
  """One split as a random-access sequence of `Row`, prepared under `data_dir` on first use (array_record).

  Raises:
    FileNotFoundError, ValueError: from `sources` and `paper`; a split that has no rows; a published file that is
      another than when the data there were prepared.
  """
  config = config_for(source) if isinstance(source, str) else source
  config.split_rows(split)
  builder = SafetyPrompts(config=config, data_dir=os.path.expanduser(data_dir), file_format="array_record")
  # Of data that are there already this is what was recorded when the files were first read.
  recorded = dict(builder.info.metadata or {}).get("sha256", {})
  for name, digest in config.sha256.items():
    if recorded.get(name) != digest:
      raise ValueError(
          f"The file of {name} is another than when {builder.data_dir} was prepared: its sha256 is {digest}, and was "
          f"{recorded.get(name)}. Put the first one back, or choose another --workdir.")
  builder.download_and_prepare()
  return _Rows(builder.as_data_source(split))
