"""The pairs that people vote on: those of a source, those of several rounds, or the pictures of models in a folder."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxpref.data import index as index_lib
from jaxpref.data import paths, records, sources
from jaxpref.data.files import FilePairs, open_pairs_file
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.voting import rounds


@dataclasses.dataclass(frozen=True)
class Pair:
  """A pair as it is shown and exported.

  Attributes:
    caption: its prompt.
    images: the bytes of two image files.
    extra: what its source says of it beyond that: noise_0, noise_1, original_size_0 and original_size_1.
  """

  caption: str
  images: tuple[bytes, bytes]
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Catalog(Protocol):
  """Pairs by number."""

  @property
  def keys(self) -> Sequence[str]:
    """The keys of the N pairs, the same ones in every run, whatever other pairs there are."""
    ...

  @property
  def group(self) -> np.ndarray:
    """i64[N], equal for pairs that ask the same, such as those of a prompt: one of each is asked first."""
    ...

  def read(self, number: int) -> Pair:
    """Reads a pair; raises OSError if a picture is missing."""
    ...

  def ready(self) -> np.ndarray:
    """Returns bool[N]: the pairs whose pictures are drawn."""
    ...


EXTRA = ("noise_0", "noise_1", "original_size_0", "original_size_1")


class FromSources:
  """The pairs of sources; a pair that two of them have, or one has twice, is there once."""

  def __init__(self, opened: Mapping[str, Any]):
    """Lists the pairs of sources.

    Args:
      opened: name -> source of pairs; the names are part of the pairs' keys.
    """
    self._sources = list(opened.values())
    places: dict[str, tuple[int, int]] = {}
    groups: list[np.ndarray] = []
    for number, (name, source) in enumerate(opened.items()):
      known = len(places)
      keys = _keys(name, source)
      chosen = [i for i, key in enumerate(keys) if places.setdefault(key, (number, i)) == (number, i)]
      assert len(places) == known + len(chosen)
      groups.append(source.index.prompt[chosen])
    self.keys = list(places)
    self._places = list(places.values())
    self.group = np.concatenate(groups)

  def read(self, number: int) -> Pair:
    """Reads a pair; raises OSError if a picture is missing."""
    of_source, i = self._places[number]
    record = self._sources[of_source][i]
    images = tuple(records.field(record, i, f"image_{side}") for side in (0, 1))
    extra = {name: [int(v) for v in record[name]] for name in EXTRA if record.get(name) is not None}
    return Pair(records.text(records.field(record, i, "caption")), images, extra)  # type: ignore[arg-type]

  def ready(self) -> np.ndarray:
    """Returns bool[N]: all pairs are drawn."""
    return np.ones(len(self.keys), bool)


def _keys(name: str, source: Any) -> list[str]:
  if isinstance(source, FilePairs):
    texts = ("\n".join((name, *source.names(i))) for i in range(len(source)))
  else:
    content = sources.content_fingerprint(source)
    texts = (f"{name}\n{content}\n{i}" for i in range(len(source)))
  return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest() for text in texts]


def open_catalog(
  path: paths.Path, *, kind: str | None = None, split: str = "train", only: int | None = None
) -> FromSources:
  """Opens the pairs of a folder or file of any kind of pairs, or of a folder of rounds.

  Args:
    path: what `sources.open_source` opens; pairs.jsonl needs no labels.
    kind: one of `sources.PAIR_KINDS`; None: from the name and content.
    split: of a tfds dataset.
    only: number of the one round to open; None: all that are drawn.

  Raises:
    FileNotFoundError, ValueError: there are no pairs, or a picture is missing.
  """
  place = paths.open_path(path)
  of_rounds = rounds.drawn(place) if kind is None and isinstance(place, pathlib.Path) else []
  if only is not None and only not in of_rounds:
    raise FileNotFoundError(f"{place} has no round {only} whose pairs are drawn; it has {of_rounds or 'none'}.")
  if of_rounds:
    folders = {n: rounds.folder_of(place, n) for n in of_rounds if only in (None, n)}
    return FromSources({folder.name: open_pairs_file(folder, labelled=False) for folder in folders.values()})
  found = kind or _detect(place)
  if found not in sources.PAIR_KINDS:
    raise ValueError(f"{place} is of kind {found}; expected pairs: {', '.join(sources.PAIR_KINDS)}.")
  if found == "pairs_file":
    return FromSources({"": open_pairs_file(place, labelled=False)})
  return FromSources({"": sources.open_source(found, place, split=split)})


def _detect(place: Any) -> str:
  if isinstance(place, pathlib.Path) and place.is_dir():
    kind = sources.detect_kind(place)
    if kind == "tfds":
      try:
        sources.find_dataset(place)
      except FileNotFoundError as error:
        raise FileNotFoundError(
          f"{place} has no pairs.jsonl and no dataset, so there are no pictures to vote on; draw some with "
          f"python -m jaxpref.pairs --prompts=PROMPTS --out={place}"
        ) from error
    return kind
  return sources.detect_kind(place)


# ---- Pictures of models ------------------------------------------------------------------------------------------


class OfModels:
  """Pairs of a picture by the baseline, image_0, and one by another model, image_1, of the same prompt and seed.

  Attributes:
    prompts, models, seeds: what it was made of; the baseline is the first model.
    cells: (number of the model, prompt, seed) of each pair.
  """

  def __init__(self, folder: pathlib.Path, prompts: Sequence[str], models: Sequence[str], seeds: int):
    """Lists the pairs; their pictures need not exist yet.

    Args:
      folder: with pictures as `evaluation.folder.image_file` names them.
      prompts: P texts.
      models: names; the first one is the baseline.
      seeds: pictures of each prompt.
    """
    self._folder = folder
    self.prompts = list(prompts)
    self.models = list(models)
    self.seeds = seeds
    self.cells = [(m, p, s) for m in range(1, len(models)) for p in range(len(prompts)) for s in range(seeds)]
    self.keys = [f"{models[0]} {models[m]} {p} {s}" for m, p, s in self.cells]
    prompt = index_lib.prompt_ids(self.prompts)
    self.group = np.asarray([hash((m, int(prompt[p]))) for m, p, _ in self.cells], np.int64)
    self._ready = np.zeros(len(self.cells), bool)

  def files(self, number: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the files of image_0 and image_1."""
    m, p, s = self.cells[number]
    first, second = (evaluation_folder.image_file(self._folder, self.models[i], p, s) for i in (0, m))
    return first, second

  def read(self, number: int) -> Pair:
    """Reads a pair; raises OSError if a picture is missing."""
    first, second = self.files(number)
    return Pair(self.prompts[self.cells[number][1]], (paths.read(first), paths.read(second)))

  def ready(self) -> np.ndarray:
    """Returns bool[N]: the pairs whose two pictures exist."""
    for number in np.flatnonzero(~self._ready):
      self._ready[number] = all(file.is_file() for file in self.files(int(number)))
    return self._ready
