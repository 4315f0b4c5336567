"""The page's server: a small ASGI app over a `Ballot`, and how it listens.

  GET  /, /style.css, /page.js, /icon.svg
                                     the page, the same for everybody
  GET  /picture/ASK/a, .../b         a picture of a pair that is open
  GET  /api/summary                  what everybody may see
  POST /api/next                     {voter}: the voter's open pairs, and progress
  POST /api/vote                     {voter, ask, choice, seconds}: answers once the vote is on the disk
  POST /api/undo                     {voter}: takes back the last vote

Everything but the page itself needs the token (`guard`). A request has ids, never a path of the file system.
"""

import errno
import json
import math
import os
import pathlib
import secrets
import socket
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from jaxpref.voting import guard
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.choices import CHOICES
from jaxpref.voting.store import Refused

PORT = 8420
TOKEN_NAME = "votes_token.txt"
MAX_NAME = 40  # characters of a voter's name
MAX_SECONDS = 86400.0
TEMPLATES = pathlib.Path(__file__).parent / "templates"

Summary = Callable[[], dict[str, Any]]


# ---- Requests ----------------------------------------------------------------------------------------------------


def read_request(body: bytes) -> dict[str, Any]:
  """Returns the JSON object of a request; raises Refused for anything else."""
  try:
    found = json.loads(body)
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise Refused("expected a JSON object.")
  return found


def voter_name(request: Mapping[str, Any]) -> str:
  """Returns the voter's name, in its canonical form; raises Refused for one that is empty or cannot be shown."""
  given = request.get("voter")
  name = " ".join(unicodedata.normalize("NFC", given).split()) if isinstance(given, str) else ""
  if not name or len(name) > MAX_NAME or any(unicodedata.category(c)[0] == "C" for c in name):
    raise Refused(f"expected a name of 1 to {MAX_NAME} characters.")
  return name


def text_of(request: Mapping[str, Any], field: str) -> str:
  """Returns a short text of a request; raises Refused if it has none."""
  value = request.get(field)
  if not isinstance(value, str) or len(value) > 100:
    raise Refused(f"expected a text as {field!r}.")
  return value


def seconds_of(request: Mapping[str, Any]) -> float:
  """Returns how long a pair was shown, 0 to MAX_SECONDS; 0 for what is no number."""
  value = request.get("seconds")
  good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  return min(max(float(value), 0.0), MAX_SECONDS) if good else 0.0  # type: ignore[arg-type]


class Api:
  """Answers requests; independent of the library that serves them."""

  def __init__(self, ballot: Ballot, summary: Summary):
    self._ballot = ballot
    self._summary = summary

  def next(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the voter's open pairs and progress."""
    voter = self._ballot.join(voter_name(request))
    shown = self._ballot.queue(voter)
    size = lambda picture: [picture.width, picture.height]
    return {
      "pairs": [{"ask": s.ask, "caption": s.caption, "a": size(s.sides[0]), "b": size(s.sides[1])} for s in shown],
      "progress": self._ballot.progress(voter),
    }

  def vote(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a vote."""
    choice = request.get("choice")
    if choice not in CHOICES:
      raise Refused(f"expected a choice, one of {', '.join(CHOICES)}.")
    voter = self._ballot.join(voter_name(request))
    self._ballot.vote(voter, text_of(request, "ask"), str(choice), seconds=seconds_of(request))
    return {"written": True}

  def undo(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """Takes back the voter's last vote."""
    return {"undone": self._ballot.undo(self._ballot.join(voter_name(request)))}

  def summary(self) -> dict[str, Any]:
    """Returns what everybody may see."""
    return self._summary()

  def picture(self, ask: str, side: str) -> bytes:
    """Returns the PNG file of a picture."""
    if side not in ("a", "b"):
      raise Refused("expected picture a or b.")
    return self._ballot.picture(ask, "ab".index(side))


def render(title: str) -> str:
  """Returns the page."""
  import jinja2

  environment = jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(TEMPLATES),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("vote.html.j2").render(title=title, max_name=MAX_NAME)


def make_app(ballot: Ballot, *, title: str, token: str, host: str, summary: Summary | None = None) -> guard.Guard:
  """Returns the ASGI app.

  Args:
    title: of the page.
    token: that requests must have.
    host: the address on which it will listen.
    summary: what everybody may see; `Ballot.summary` by default.
  """
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route

  api = Api(ballot, summary or ballot.summary)
  page = render(title)
  files = {name: (TEMPLATES / name).read_bytes() for name in ("page.js", "style.css", "icon.svg")}

  async def answered(work: Callable[[], Any]) -> Response:
    try:
      found = await run_in_threadpool(work)
    except Refused as error:
      return JSONResponse({"error": str(error)}, 409)
    except OSError as error:
      print(f"error: {error}", file=sys.stderr, flush=True)
      return JSONResponse({"error": str(error)}, 507)
    return Response(found, media_type="image/png") if isinstance(found, bytes) else JSONResponse(found)

  def posted(method: Callable[[Mapping[str, Any]], Any]) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
      body = await request.body()
      return await answered(lambda: method(read_request(body)))

    return endpoint

  async def picture(request: Request) -> Response:
    ask, side = (request.path_params[name] for name in ("ask", "side"))
    return await answered(lambda: api.picture(ask, side))

  async def summary_of(request: Request) -> Response:
    return await answered(api.summary)

  def fixed(content: bytes, kind: str) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
      return Response(content, media_type=kind)

    return endpoint

  routes = [
    Route("/", fixed(page.encode(), "text/html; charset=utf-8")),
    Route("/page.js", fixed(files["page.js"], "text/javascript; charset=utf-8")),
    Route("/style.css", fixed(files["style.css"], "text/css; charset=utf-8")),
    Route("/icon.svg", fixed(files["icon.svg"], "image/svg+xml")),
    Route("/picture/{ask}/{side}", picture),
    Route("/api/summary", summary_of),
    *(Route(f"/api/{name}", posted(getattr(api, name)), methods=["POST"]) for name in ("next", "vote", "undo")),
  ]
  log = lambda text: print(text, file=sys.stderr, flush=True)
  return guard.Guard(Starlette(routes=routes), token=token, host=host, log=log)


# ---- Listening ---------------------------------------------------------------------------------------------------


def check_library() -> None:
  """Raises ValueError if the packages of the extra [web] are missing."""
  try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise ValueError(f"the page needs packages that are not installed ({error}); pip install 'jaxpref[web]'") from error


def token_of(folder: pathlib.Path) -> str:
  """Returns the folder's token, the same at each start, so that a voter's link stays good; only the owner may read it.

  To make old links useless, delete the file.

  Raises:
    OSError: it cannot be read or written.
    ValueError: the file holds something else.
  """
  file = folder / TOKEN_NAME
  try:
    token = file.read_text(encoding="ascii").strip()
  except FileNotFoundError:
    token = secrets.token_urlsafe(24)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
      new.write(token + "\n")
  if len(token) < 16 or not all(c.isalnum() or c in "-_" for c in token):
    raise ValueError(f"{file} holds no token; delete it, and the command makes a new one.")
  return token


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens.

  Raises:
    ValueError: the port is in use, and which one is free; or the address is not one of this machine.
  """
  try:
    return _bind(host, port)
  except socket.gaierror as error:
    raise ValueError(f"--host={host} is no address of this machine ({error.strerror}); try 127.0.0.1.") from error
  except OSError as error:
    if error.errno == errno.EACCES:
      raise ValueError(f"--port={port} is for the system's own programs; give one from 1024 on.") from error
    if error.errno != errno.EADDRINUSE:
      raise ValueError(f"--host={host} is no address of this machine ({error.strerror}); try 127.0.0.1.") from error
  for other in [*range(port + 1, min(port + 50, 2**16)), 0]:
    try:
      with _bind(host, other) as found:
        raise ValueError(f"--port={port} is in use; {found.getsockname()[1]} is free.")
    except OSError:
      continue
  raise ValueError(f"--port={port} is in use, and so are those after it.")


def _bind(host: str, port: int) -> socket.socket:
  family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
  found = socket.socket(family, kind, protocol)
  try:
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a server that was killed is free at once
    found.bind(address)
    found.listen(128)
  except BaseException:
    found.close()
    raise
  return found


def link(host: str, port: int, token: str) -> str:
  """Returns the address to open; what follows # stays in the browser, and is in no log."""
  shown = _own_address() if host in ("0.0.0.0", "::", "") else host
  return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/#{token}"


def _own_address() -> str:
  """Returns the address by which others of the network reach this machine, as far as it knows; else its name."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(("10.255.255.255", 1))  # sends nothing: chooses the way that a packet would take
      return str(probe.getsockname()[0])
    except OSError:
      return socket.gethostname()


def run(app: guard.Guard, listening: socket.socket) -> None:
  """Serves until Ctrl-C, which raises KeyboardInterrupt."""
  import uvicorn

  config = uvicorn.Config(
    app,
    access_log=False,
    h11_max_incomplete_event_size=guard.MAX_BODY,
    lifespan="off",
    limit_concurrency=200,
    log_level="warning",
    server_header=False,
    timeout_graceful_shutdown=2,
    timeout_keep_alive=30,
    ws="none",
  )
  uvicorn.Server(config).run(sockets=[listening])
