"""The tensorflow_datasets builder of `pickapic`; needs no TensorFlow.

  tfds build jaxpref/data/pickapic --config=v2 --manual_dir=PARQUET --data_dir=DATASETS

and with --beam_pipeline_options=runner=... through Apache Beam, so that many machines write files at once.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters

from jaxpref.data import index as index_lib
from jaxpref.data import paths, pickapic, sources
from jaxpref.devices.progress import tqdm


class Builder(tfds.core.ShardBasedBuilder):
  """Pick-a-Pic from parquet files: each becomes one file, with its rows in the same order.

  Not a GeneratorBasedBuilder, which writes all records twice and sorts them in memory, or with Beam moves them between
  the workers, to bring them into the order they already have.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "All columns but URLs and dates."}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="v2", description="yuvalkirstain/pickapic_v2."),
    tfds.core.BuilderConfig(name="v1", description="yuvalkirstain/pickapic_v1: 583,747 pairs to train on."),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Download the parquet files of yuvalkirstain/pickapic_v1 or pickapic_v2 from the Hugging Face hub, and give their "
    "folder as --manual_dir."
  )
  workers = 1  # processes that write files without Beam

  def __init__(self, *, file_format="array_record", **kwargs):
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    image = {"shape": (None, None, 3)}
    return self.dataset_info_from_configs(
      description=(
        "Pairs of images that people generated for their captions, and which of the two they preferred: label_0 is 1 "
        "for image_0, 0 for image_1, 0.5 for neither. Images are stored as published."
      ),
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "label_0": tfds.features.Scalar(np.float32),
          **{name: tfds.features.Image(**image) for name in pickapic.IMAGES},
          **{name: tfds.features.Text() for name in pickapic.TEXTS},
          **{name: tfds.features.Scalar(np.int64) for name in pickapic.NUMBERS},
          **{name: tfds.features.Scalar(np.bool_) for name in pickapic.FLAGS},
        }
      ),
      homepage="https://huggingface.co/datasets/yuvalkirstain/pickapic_v2",
      disable_shuffling=True,
    )

  def download_and_prepare(self, *, download_config=None, **kwargs) -> None:
    """Keeps a finished dataset, like the base class, but only if it was made from the same files."""
    config = download_config or tfds.download.DownloadConfig()
    replaced = config.download_mode.overwrite_dataset or config.download_mode == tfds.GenerateMode.UPDATE_DATASET_INFO
    if config.manual_dir is not None and self.data_path.exists() and not replaced:
      pickapic.check_made_of(self.data_path, config.manual_dir)
    super().download_and_prepare(download_config=config, **kwargs)

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[functools.partial[Iterator[Any]]]]:
    shards = {}
    for split, files in pickapic.find_shards(dl_manager.manual_dir).items():
      starts = np.cumsum([0, *pickapic.num_rows(files)])
      shards[split] = [
        functools.partial(pickapic.read_shard, file, split, int(start))
        for file, start in zip(files, starts[:-1], strict=True)
      ]
    return shards

  def _download_and_prepare(self, dl_manager, download_config=None) -> None:
    """Writes the files of all splits, several at a time, and beside them the index of each split.

    Differs from the base class in that with Beam all files are one collection. There each file is a stage of its own,
    and runners of one machine run stages one after the other.
    """
    shards = self._shard_iterators_per_split(dl_manager)
    made_of = pickapic.describe_files(dl_manager.manual_dir)
    indexes = {
      split: pickapic.read_index([shard.args[0] for shard in of_split], progress=f"reading the labels of {split}")
      for split, of_split in shards.items()
    }
    templates = {split: self._get_filename_template(split_name=split) for split in shards}
    paths = {
      split: [templates[split].sharded_filepath(shard_index=i, num_shards=len(of_split)) for i in range(len(of_split))]
      for split, of_split in shards.items()
    }
    write = functools.partial(_write, self.info.features, self.info.file_format)
    jobs = [job for split in shards for job in zip(shards[split], paths[split], strict=True)]
    config = download_config or tfds.download.DownloadConfig()
    if config.beam_runner is not None or config.beam_options is not None:
      _by_beam(write, jobs, config)
    else:
      _by_processes(write, jobs, self.workers, f"writing {self.info.full_name}")

    next(iter(paths.values()))[0].parent.joinpath(pickapic.MADE_OF).write_text(json.dumps(made_of, indent=1))
    infos = []
    for split, index in indexes.items():
      adapter = file_adapters.ADAPTER_FOR_FORMAT[self.info.file_format]
      info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[adapter.num_examples(path) for path in paths[split]],
        num_bytes=sum(path.stat().length for path in paths[split]),
        filename_template=templates[split],
      )
      if info.num_examples != len(index):
        raise ValueError(f"{info.num_examples} records of {split} were written, expected {len(index)}; try again.")
      file = paths[split][0].parent / sources.index_name(split)
      index_lib.save(index, file, fingerprint=sources.fingerprint(info))
      infos.append(info)
    self.info.set_splits(tfds.core.SplitDict(infos))


def _write(features: Any, file_format: Any, job: tuple[Callable[[], Iterator[Any]], Any]) -> None:
  shard, path = job
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  records = ((key, serializer.serialize_example(features.encode_example(record))) for key, record in shard())
  path = paths.open_path(path)
  with paths.cannot_be_written(path), paths.part_of(path) as part:  # ArrayRecord's writer knows only local files
    file_adapters.ADAPTER_FOR_FORMAT[file_format].write_examples(part, records)
    paths.move(part, path)


def _by_processes(write: Callable[[Any], None], jobs: Sequence[Any], workers: int, title: str) -> None:
  with tqdm(total=len(jobs), desc=title, unit=" files") as bar:
    if workers == 1:
      for job in jobs:
        write(job)
        bar.update()
      return
    spawn = multiprocessing.get_context("spawn")
    usual = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker silently
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(jobs)), mp_context=spawn, initializer=signal.signal, initargs=usual
    ) as pool:
      try:
        for future in concurrent.futures.as_completed([pool.submit(write, job) for job in jobs]):
          future.result()
          bar.update()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _by_beam(write: Callable[[Any], None], jobs: Sequence[Any], config: Any) -> None:
  import apache_beam as beam

  with beam.Pipeline(runner=config.beam_runner, options=config.beam_options) as pipeline:
    # The reshuffle separates what makes the jobs from what does them, so that they are spread over the workers.
    _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | "Write" >> beam.Map(write)
