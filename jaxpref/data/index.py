"""What must be known of all records before training, without reading an image, and the choice of records to train on.

An `Index` has one entry for each record, in the order of the records. It is small (45 bytes per record with every
field), is saved as one .npz file beside the dataset, and is all that `select` needs:

  selection = select(source.index, ties="drop", max_per_prompt=8, validation_share=0.01, seed=0)
  record = source[selection.kept[0]]      # its label and weight: selection.label[0], selection.weight[0]

Terms of Pick-a-Pic (arXiv 2305.01569): a pair has two images of one caption and label_0, which is 1 if image_0 is
preferred, 0 if image_1 is, and 0.5 for a tie. A prompt is a caption as CLIP's tokenizer sees it: upper and lower case
and the amount of white space do not matter.
"""

import dataclasses
import hashlib
import io
import logging
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data import paths

logger = logging.getLogger(__name__)
FORMAT = 1  # version of the file; raised when its fields change their meaning
TIES = ("drop", "keep", "soft")
PARTS = ("train", "validation")
_DTYPES = {
  "label_0": np.float32,
  "prompt": np.int64,
  "num_example_per_prompt": np.int32,
  "score_0": np.float32,
  "score_1": np.float32,
  "image_0": np.int64,
  "image_1": np.int64,
  "has_label": np.bool_,
  "caption_words": np.int32,
}


class StaleIndex(ValueError):
  """Raised for an index file that belongs to other data or is damaged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """Arrays with one entry for each record.

  Attributes:
    label_0: f32[N] in [0, 1], as the dataset gives it. For unpaired records: 1 liked, 0 disliked.
    prompt: i64[N], `prompt_ids` of the captions; equal for equal prompts.
    num_example_per_prompt: i32[N], as the dataset gives it, else the number of records with this prompt.
    score_0, score_1: f32[N], a preference model's scores of the images, as logits: softmax of the two is the
      probability that each is preferred. PickScore: exp(logit_scale) cos, about 20.
    image_0, image_1: i64[N], equal for equal images. Unpaired records have image_0 alone.
    has_label: bool[N], whether anyone judged the pair (Pick-a-Pic's column); None: all were judged.
    caption_words: i32[N], number of words in the caption.
  """

  label_0: np.ndarray
  prompt: np.ndarray
  num_example_per_prompt: np.ndarray
  score_0: np.ndarray | None = None
  score_1: np.ndarray | None = None
  image_0: np.ndarray | None = None
  image_1: np.ndarray | None = None
  has_label: np.ndarray | None = None
  caption_words: np.ndarray | None = None

  def __post_init__(self):
    for name, value in self.arrays().items():
      value = np.asarray(value, _DTYPES[name])
      if value.shape != (len(self.label_0),):
        raise ValueError(f"{name} of an index has shape {list(value.shape)}, label_0 {len(self.label_0)} records.")
      object.__setattr__(self, name, value)
    if (self.score_0 is None) != (self.score_1 is None):
      raise ValueError("an index has one of score_0 and score_1; expected both or none.")
    wrong = np.flatnonzero(~((self.label_0 >= 0) & (self.label_0 <= 1)))
    if len(wrong):
      raise ValueError(f"label_0 of record {wrong[0]} is {self.label_0[wrong[0]]}; expected 0 to 1.")

  def __len__(self) -> int:
    return len(self.label_0)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the fields that are not None, by name."""
    return {name: value for name in _DTYPES if (value := getattr(self, name)) is not None}

  def scores(self, purpose: str = "this") -> tuple[np.ndarray, np.ndarray]:
    """Returns score_0 and score_1, f32[N] each.

    Raises:
      ValueError: the index has no scores.
    """
    if self.score_0 is None or self.score_1 is None:
      raise ValueError(
        f"{purpose} needs the scores of all images, and the source has none; write them with jaxpref.score."
      )
    return self.score_0, self.score_1

  def take(self, records: Sequence[int] | np.ndarray) -> "Index":
    """Returns the index of some records, in the given order."""
    return Index(**{name: value[records] for name, value in self.arrays().items()})


# ---- Prompts ---------------------------------------------------------------------------------------------------


def prompt_ids(captions: Iterable[str]) -> np.ndarray:
  """Returns i64[N]: a hash of each caption, the same in every dataset, process and run.

  Captions that differ only in case or white space are one prompt, as for CLIP's tokenizer.
  """
  digests = []
  for caption in captions:
    if not caption.isascii():
      caption = unicodedata.normalize("NFC", caption)
    text = " ".join(caption.lower().split())
    digests.append(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())
  return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def counts_per_prompt(prompt: np.ndarray) -> np.ndarray:
  """Returns i32[N]: how many of these records have the prompt of each."""
  _, inverse, counts = np.unique(prompt, return_inverse=True, return_counts=True)
  return counts[inverse].astype(np.int32)


def in_validation(prompt: np.ndarray, share: float) -> np.ndarray:
  """Returns bool[N]: the prompts, about `share` of them, that are held out.

  It depends on the prompt alone, not on a seed, the dataset or other options, so that no run trains on a prompt that
  another run held out.
  """
  x = prompt.astype(np.uint64)
  # The finaliser of splitmix64: prompts need not be hashes, and the result's first bits are as good as random.
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  x = x ^ (x >> np.uint64(31))
  return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def make_index(captions: Sequence[str], *, label_0: Any, **columns: Any) -> Index:
  """Returns the index of pairs from their columns.

  Args:
    captions: captions of all records.
    label_0: labels of all records.
    columns: optional fields of `Index`; and image_0_uid and image_1_uid, names of the images.
  """
  prompt = prompt_ids(captions)
  if columns.get("num_example_per_prompt") is None:
    columns["num_example_per_prompt"] = counts_per_prompt(prompt)
  for side in ("0", "1"):
    uids = columns.pop(f"image_{side}_uid", None)
    if uids is not None:
      digests = b"".join(hashlib.blake2b(uid.encode(), digest_size=8).digest() for uid in uids)
      columns[f"image_{side}"] = np.frombuffer(digests, "<i8")
  words = [len(caption.split()) for caption in captions]
  return Index(label_0=label_0, prompt=prompt, caption_words=np.asarray(words), **columns)


def fingerprint(index: Index) -> str:
  """Returns a fingerprint of the prompts and labels of all records, and of their images if the index knows them."""
  digest = hashlib.sha256(index.prompt.astype("<i8").tobytes())
  digest.update(index.label_0.astype("<f4").tobytes())
  for image in (index.image_0, index.image_1):
    digest.update(b"" if image is None else image.astype("<i8").tobytes())
  return digest.hexdigest()[:16]


# ---- Files -----------------------------------------------------------------------------------------------------


def concatenate(parts: Sequence[Index]) -> Index:
  """Returns one index of several; leaves out fields that not all of them have."""
  names = [name for name in _DTYPES if all(name in part.arrays() for part in parts)]
  return Index(**{name: np.concatenate([part.arrays()[name] for part in parts]) for name in names})


def save(index: Index, file: Any, *, fingerprint: str, scored_by: str = "") -> None:
  """Writes an index; readers see the old file or the new one, never a part.

  Args:
    file: a path, which may lie in a bucket.
    fingerprint: fingerprint of the dataset; `load` asks for the same.
    scored_by: the model that made its scores.
  """
  file = paths.open_path(file)
  buffer = io.BytesIO()
  fields: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "scored_by": scored_by}
  fields |= index.arrays()
  np.savez(buffer, **fields)
  file.parent.mkdir(parents=True, exist_ok=True)
  paths.write(file, buffer.getvalue())


def load(file: Any, *, num_records: int, fingerprint: str, scored_by: str | None = None) -> Index:
  """Reads what `save` wrote; accepts the scores of any model if `scored_by` is None.

  Raises:
    FileNotFoundError: the file does not exist.
    StaleIndex: it is of other data, has another model's scores, is of another program version, or is damaged.
  """
  file = paths.open_path(file)
  try:
    with np.load(io.BytesIO(paths.read(file)), allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    form, found = int(arrays.pop("format")), str(arrays.pop("fingerprint"))
    by = str(arrays.pop("scored_by", ""))
    index = Index(**arrays) if form == FORMAT else None
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise StaleIndex(f"{file} is not a readable index ({error}); delete it.") from error
  if index is None:
    raise StaleIndex(f"{file} is an index of format {form}, expected {FORMAT}; delete it.")
  if len(index) != num_records or found != fingerprint:
    raise StaleIndex(
      f"{file} is the index of {len(index)} records with fingerprint {found}, the dataset has {num_records} and "
      f"{fingerprint}; delete it."
    )
  if scored_by not in (None, by):
    raise StaleIndex(f"{file} has scores by {by or 'an unknown model'}, expected {scored_by}; choose another file.")
  return index


def score_agreement(index: Index) -> float:
  """Returns the share of labels that the scores agree with, without ties of either; NaN if only ties are left."""
  score_0, score_1 = index.scores()
  decided = (index.label_0 != 0.5) & (score_0 != score_1)
  return float(np.mean(((score_0 > score_1) == (index.label_0 > 0.5))[decided])) if decided.any() else float("nan")


def load_or_build(
  files: Sequence[Any],
  build: Callable[[], Index],
  *,
  num_records: int,
  fingerprint: str,
  agrees: Callable[[Index], bool] = lambda index: True,
) -> Index:
  """Returns the index from the first file that has it; else builds it and writes it to the first writable one.

  Args:
    files: paths, such as one beside the dataset and one in a cache folder.
    build: makes the index, which may take long.
    num_records, fingerprint: those of the dataset.
    agrees: whether an index from a file fits the data, judged by a few records.
  """
  for file in files:
    try:
      index = load(file, num_records=num_records, fingerprint=fingerprint)
      if agrees(index):
        return index
      logger.warning("%s does not agree with the labels or captions of its dataset; making it again", file)
    except OSError:
      continue
    except StaleIndex as error:
      logger.warning("%s Making it again.", str(error).replace("; delete it.", "."))
  index = build()
  for file in files:
    try:
      save(index, file, fingerprint=fingerprint)
      return index
    except OSError:
      continue
  logger.warning("the index of the dataset could not be written to %s; the next run makes it again", files[-1])
  return index


# ---- Selection -------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
  """What to train on.

  Attributes:
    kept: i64[M], ascending: the records.
    label: f32[M], the probability that image_0 of the record is better.
    weight: f32[M], 1 / (number of kept records with the same prompt).
    winner: i64[M], the record whose winning image replaces this one's; `kept` itself without `keep_best`.
  """

  kept: np.ndarray
  label: np.ndarray
  weight: np.ndarray
  winner: np.ndarray


def select(
  index: Index,
  *,
  ties: str = "drop",
  max_per_prompt: int = 0,
  keep_best: bool = False,
  min_gap: float = 0.0,
  only_labelled: bool = False,
  flip_labels: float = 0.0,
  seed: int = 0,
  validation_share: float = 0.0,
  part: str = "train",
) -> Selection:
  """Returns which records are used, with which label and weight. Pure: the same arguments give the same result.

  Records without a caption are left out, and a pair of an image with itself is a tie.

  Weights are those of PickScore and of SPO's preference model, 1 / num_example_per_prompt, but count only the records
  that are left. The published column counts all of the dataset, so that a prompt whose ties were dropped would weigh
  less than another. Weights sum to the number of prompts; a loss divides by their sum over the batch.

  Args:
    index: index of all records.
    ties: what to do with pairs of label 0.5. "drop" leaves them out, as in Diffusion-DPO. "keep" keeps them at 0.5, as
      in PickScore and SPO's preference model. "soft" drops nothing and makes every label a probability: softmax of the
      scores if there are scores (arXiv 2409.06691), else the label itself.
    max_per_prompt: largest number of records of a prompt, drawn at random; 0: no limit. (PickScore's
      limit_examples_per_prompt takes the first ones, which are those of one user.)
    keep_best: the option only_on_best of PickScore's and SPO's training. It replaces the winner of a pair by the image
      that it later lost against, and so on to one that never lost (`Selection.winner`); pairs that form a circle are
      left out. If an image lost several times, the last time counts.
    min_gap: pairs with |p_0 - p_1| <= min_gap are ties, where p is the softmax of the two scores. 0.1 with labels by
      PickScore (`labels_by_score`) gives the data of SPO's preference model for SDXL.
    only_labelled: leave out pairs that nobody judged, as PickScore does outside its training split.
    flip_labels: share of the training labels to flip, for studies of robustness to wrong labels (arXiv 2403.00409). A
      larger share flips those of a smaller one and more; validation labels stay.
    seed: seed of `flip_labels` and `max_per_prompt`.
    validation_share: share of prompts to hold out, see `in_validation`. No prompt is in both parts.
    part: "train": without the held-out prompts; "validation": only those.

  Raises:
    ValueError: an argument is out of range, or needs a field that the index does not have.
  """
  if ties not in TIES or part not in PARTS:
    raise ValueError(f"ties={ties!r}, part={part!r}; expected one of {', '.join(TIES)} and of {', '.join(PARTS)}.")
  for name, value in (("min_gap", min_gap), ("flip_labels", flip_labels), ("validation_share", validation_share)):
    if not 0 <= value < 1:
      raise ValueError(f"{name}={value!r}; expected a number of at least 0 and below 1.")
  if max_per_prompt < 0 or seed < 0:
    raise ValueError(f"max_per_prompt={max_per_prompt}, seed={seed}; expected integers of at least 0.")
  if part == "validation" and not validation_share:
    raise ValueError("part='validation' with validation_share=0 selects nothing; hold out a share of the prompts.")
  if keep_best and ties != "drop":
    raise ValueError(f"keep_best with ties={ties!r}; expected 'drop', as a tie has no best image.")

  label = index.label_0
  if ties == "soft" and index.score_0 is not None:
    label = _preference(index, "ties='soft'")
  if min_gap:
    label = np.where(np.abs(2 * _preference(index, "min_gap") - 1) <= min_gap, np.float32(0.5), label)
  if index.image_0 is not None and index.image_1 is not None:
    label = np.where(index.image_0 == index.image_1, np.float32(0.5), label)  # no image beats itself
  held_out = in_validation(index.prompt, validation_share)
  use = held_out if part == "validation" else ~held_out
  if index.caption_words is not None:
    use = use & (index.caption_words > 0)
  if only_labelled and index.has_label is not None:
    use = use & index.has_label
  if ties == "drop":
    use = use & (label != 0.5)

  winner = np.arange(len(index))
  if keep_best:
    winner = _final_winners(index, np.flatnonzero(use))
    use = winner >= 0
  if flip_labels and part == "train":
    # Drawn for all records, so that other arguments do not change which labels are flipped.
    turned = np.random.default_rng([seed, 1]).random(len(index)) < flip_labels
    label = np.where(turned, 1 - label, label)

  kept = np.flatnonzero(use)
  if max_per_prompt:
    kept = _at_most(kept, index.prompt[kept], max_per_prompt, np.random.default_rng([seed, 2]).random(len(index))[kept])
  weight = 1 / counts_per_prompt(index.prompt[kept]).astype(np.float32)
  return Selection(kept, label[kept].astype(np.float32), weight, winner[kept])


def labels_by_score(index: Index) -> Index:
  """Returns the index with labels by its scores instead of people's: the image with the higher score wins.

  Raises:
    ValueError: the index has no scores.
  """
  gap = _preference(index, "labels by score") - 0.5
  return dataclasses.replace(index, label_0=(np.sign(gap) + 1) / 2, has_label=None)


def _preference(index: Index, purpose: str) -> np.ndarray:
  """Returns f32[N], the probability that image_0 is preferred: softmax of the two scores (Bradley and Terry's model).

  A pair whose images could not be scored (-inf) is undecided.
  """
  score_0, score_1 = index.scores(purpose)
  with np.errstate(invalid="ignore"):
    gap = np.nan_to_num(score_0 - score_1)
  return (1 + np.tanh(gap / 2)) / 2


def _at_most(kept: np.ndarray, prompt: np.ndarray, limit: int, priority: np.ndarray) -> np.ndarray:
  """Returns the `limit` records of each prompt with the lowest priority, ascending."""
  order = np.lexsort((priority, prompt))
  prompt = prompt[order]
  place = np.arange(len(order))
  first = np.concatenate([[True], prompt[1:] != prompt[:-1]]) if len(order) else np.zeros(0, bool)
  rank = place - np.maximum.accumulate(np.where(first, place, 0)) if len(order) else place
  return np.sort(kept[order[rank < limit]])


def _final_winners(index: Index, decided: np.ndarray) -> np.ndarray:
  """Returns i64[N]: for each decided pair the one that ends its chain of better images; -1 for the others."""
  if index.image_0 is None or index.image_1 is None:
    raise ValueError("keep_best needs to know which images are the same; this source has no image_0_uid.")
  first_wins = index.label_0[decided] > 0.5
  image_0, image_1 = index.image_0[decided], index.image_1[decided]
  won, lost = np.where(first_wins, image_0, image_1), np.where(first_wins, image_1, image_0)
  order = np.argsort(lost, kind="stable")
  at = np.searchsorted(lost[order], won, side="right") - 1  # the last pair that the winner lost
  beaten = (at >= 0) & (lost[order][at] == won)
  following = np.where(beaten, order[at], np.arange(len(decided)))
  for _ in range(len(decided).bit_length()):  # each round doubles the length of the chain that was followed
    if not beaten[following].any():
      break
    following = following[following]
  winner = np.full(len(index), -1)
  winner[decided] = np.where(beaten[following], -1, decided[following])  # still beaten: a circle
  return winner
