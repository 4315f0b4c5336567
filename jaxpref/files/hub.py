"""Fetches models of the Hugging Face hub, or says why one cannot be fetched and what to do."""

import errno
import fnmatch
import os
import pathlib
from collections.abc import Iterator

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
# Names of the weights of one network, whole or in shards, in half precision.
_HALF = ("diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors")


class HubError(FileNotFoundError):
  """Raised if a model could not be fetched.

  Attributes:
    reason, remedy: parts of the sentence.
  """

  def __init__(self, name: str, reason: str, remedy: str):
    super().__init__(
      f"{name} is neither a folder here nor could it be fetched from the Hugging Face hub: {reason}; {remedy}."
    )
    self.reason, self.remedy = reason, remedy


def said(error: FileNotFoundError) -> str:
  """Returns why a model could not be fetched and what to do, for a HubError; else that it is not there."""
  return f"could not be fetched: {error.reason}; {error.remedy}" if isinstance(error, HubError) else "is not there"


def fetch(name: str, weights: str) -> pathlib.Path:
  """Returns the folder of a model in the hub's cache, downloading what is missing.

  Fetches only safetensors, JSON and text files; half precision only if there is no other.

  Args:
    name: "organisation/model".
    weights: pattern of the weight files to fetch.

  Raises:
    HubError: one sentence on why the model cannot be fetched, and what to do.
  """
  import huggingface_hub

  left_out = ["*.non_ema.*", "safety_checker/*"]
  try:
    folder = pathlib.Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=[weights, "*.json", "*.txt"], ignore_patterns=["*.fp16[.-]*", *left_out]
      )
    )
    if lacking := list(_without_weights(folder, weights)):
      allowed = [f"{place}*.fp16{end}" for place in lacking for end in ("[.-]*safetensors", ".*json", ".json")]
      folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=allowed, ignore_patterns=left_out))
    return folder
  except Exception as error:  # the hub's client may raise anything
    raise HubError(name, *explain(name, error)) from error


def _without_weights(folder: pathlib.Path, weights: str) -> Iterator[str]:
  """Yields the parts of a folder ("", "unet/") that have a network's config.json but none of its weights."""
  for config in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")]):
    place = config.parent.relative_to(folder).as_posix() + "/"
    place = "" if place == "./" else place
    wanted = any(fnmatch.fnmatch(f"{place}{name}", weights) for name in _HALF)
    if wanted and place != "safety_checker/" and not any(config.parent.glob("*.safetensors")):
      yield place


def explain(name: str, error: BaseException) -> tuple[str, str]:
  """Returns why a model could not be fetched and what to do, from the exception of the hub's client."""
  from huggingface_hub import constants, errors

  if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
    error = error.__cause__  # what went wrong before it searched the cache
  response = getattr(error, "response", None)
  status = getattr(response, "status_code", None)
  if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
    return (
      "it is gated",
      f"accept its licence on huggingface.co/{name}, and {_LOGIN} to a token of the account that did",
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      "there is no model of this name, or it is private",
      f"check the name; for a private one {_LOGIN} to a token of an account that may read it",
    )
  if isinstance(error, errors.DisabledRepoError):
    return "the hub has disabled it", "use another model, or give the path of a downloaded folder"
  if isinstance(error, errors.RevisionNotFoundError):
    return (
      "it has no revision main",
      f"download the revision you want with `hf download {name}`, and give its path",
    )
  if isinstance(error, errors.OfflineModeIsEnabled) or (
    isinstance(error, errors.LocalEntryNotFoundError) and constants.is_offline_mode()
  ):
    return (
      "it is not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it",
      "unset HF_HUB_OFFLINE, or give the path of a downloaded folder",
    )
  if status == 429:
    return (
      "the hub accepts no more requests for now (429)",
      f"wait some minutes, or {_LOGIN}, which allows more of them",
    )
  if status in (401, 403):
    return f"the hub refuses the token ({status})", f"{_LOGIN} to a valid one with read access"
  if status is not None and status >= 500:
    return f"the hub is out of order ({status})", "try again later, or give the path of a downloaded folder"
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
    return f"its cache cannot be written ({os.strerror(error.errno)})", "free space, or set HF_HOME to another folder"
  return f"no connection ({type(error).__name__})", "connect to the network, or give the path of a downloaded folder"
