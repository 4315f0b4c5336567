"""Folders of pairs and pictures, and requests, for the tests of votes."""

import asyncio
import io
import json

import numpy as np
from PIL import Image

from jaxpref.voting import catalog, schedule, store
from jaxpref.voting.ballot import Ballot


def png(level, side=8, **options):
  stream = io.BytesIO()
  Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(stream, "PNG", **options)
  return stream.getvalue()


def make_pairs(folder, count, *, prompts=None, first=0):
  """A folder of pairs without labels: picture 0 of pair i has grey level i, picture 1 has 128 + i."""
  (folder / "images").mkdir(parents=True)
  rows = []
  for i in range(first, first + count):
    names = [f"images/{i}_{j}.png" for j in (0, 1)]
    for j, name in enumerate(names):
      (folder / name).write_bytes(png((i + 128 * j) % 256))
    rows.append({"caption": f"prompt {i % (prompts or count)}", "image_0": names[0], "image_1": names[1]})
  (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def ballot(folder, **rules):
  options = {name: rules.pop(name) for name in ("ended", "drawing") if name in rules}
  found = catalog.open_catalog(folder)
  return Ballot(found, store.Store(folder / store.NAME), schedule.Rules(**rules), **options)


def vote(made, name, choice="left", count=1):
  """The pairs that a voter voted on, as (number, swapped)."""
  voter, done = made.join(name), []
  for _ in range(count):
    shown = made.queue(voter)
    if not shown:
      break
    ask = made._open[shown[0].ask]
    done.append((made._of_store[ask.pair], ask.swapped))
    made.vote(voter, shown[0].ask, choice)
  return done


def request(app, method, path, *, headers=None, body=b"", chunks=None):
  """Status, headers and body of an answer of an ASGI app, without a network."""
  parts = [body] if chunks is None else chunks
  scope = {
    **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"},
    **{"path": path.partition("?")[0], "raw_path": path.encode(), "query_string": path.partition("?")[2].encode()},
    **{"root_path": "", "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8420)},
    "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers or ()],
  }
  sent, waiting = [], iter(parts)

  async def receive():
    part = next(waiting, None)
    if part is None:
      return {"type": "http.disconnect"}
    return {"type": "http.request", "body": part, "more_body": chunks is not None}

  async def send(message):
    sent.append(message)

  asyncio.run(app(scope, receive, send))
  found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
  return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])
