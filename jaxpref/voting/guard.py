"""What a request must have before the page's server looks at it: a known host, its own origin, the token, a small body.

docs/voting_security.md says which threat each check answers. The checks are pure functions of a request's method, path
and headers; `Guard` applies them to any ASGI app.
"""

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

MAX_BODY = 16 * 2**10  # bytes of a request
HEADERS = {
  "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
  "form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "X-Frame-Options": "DENY",
  "Referrer-Policy": "same-origin",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cache-Control": "no-store",
}
PUBLIC = ("/", "/page.js", "/style.css", "/icon.svg")  # the same for everybody; everything else needs the token

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Problem = tuple[int, str]  # status and sentence


def hosts_of(host: str) -> set[str]:
  """Returns the names that a server on an address answers to, beside addresses of that kind; see `host_problem`."""
  names = {"localhost", host.lower()}
  return names if is_loopback(host) else names | {socket.gethostname().lower(), socket.getfqdn().lower()}


def is_loopback(host: str) -> bool:
  """Returns whether an address or name can be reached from this machine alone."""
  address = _address(host)
  return host.lower() == "localhost" if address is None else address.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
  try:
    return ipaddress.ip_address(text.strip("[]"))
  except ValueError:
    return None


def host_problem(header: str, names: Iterable[str], *, loopback: bool) -> Problem | None:
  """Returns what is wrong with a Host header; None for nothing.

  A page of another site can make its own name lead to this machine (DNS rebinding), and then its requests have that
  name here. Addresses cannot be made to lead elsewhere.

  Args:
    header: such as "127.0.0.1:8420".
    names: in lower case.
    loopback: whether the server listens for this machine alone; then other addresses are refused, too.
  """
  name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
  name = name.strip("[]").lower()
  address = _address(name)
  if name in names or (address is not None and (address.is_loopback or not loopback)):
    return None
  return 421, "this server does not answer to that name; open the link that the command printed."


def origin_problem(method: str, headers: Mapping[str, str]) -> Problem | None:
  """Returns what is wrong with the origin of a request that changes something: a page of another site sent it."""
  if method != "POST":
    return None
  host = headers.get("host", "")
  if headers.get("origin") not in (f"http://{host}", f"https://{host}"):
    return 403, "requests of other origins are refused."
  if headers.get("sec-fetch-site", "same-origin") != "same-origin":
    return 403, "requests of other sites are refused."
  if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
    return 415, "expected application/json."
  return None


def token_problem(path: str, headers: Mapping[str, str], token: str) -> Problem | None:
  """Returns what is wrong with the token of a request; None for nothing, or for a path that needs none."""
  if path in PUBLIC:
    return None
  scheme, _, given = headers.get("authorization", "").partition(" ")
  if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
    return None
  return 401, "the token is missing or wrong; open the link that the command printed."


def length_problem(headers: Mapping[str, str]) -> Problem | None:
  """Returns what is wrong with the stated length of a body."""
  length = headers.get("content-length", "0")
  if not length.isdigit() or int(length) > MAX_BODY:
    return 413, f"the request is larger than {MAX_BODY} bytes."
  return None


class Guard:
  """An ASGI app that passes on the requests that all checks let through, and adds HEADERS to all answers."""

  def __init__(self, app: App, *, token: str, host: str, log: Callable[[str], object] = lambda text: None):
    """Wraps an app.

    Args:
      token: that requests must have.
      host: the address on which the server listens.
      log: is told of each refused request.
    """
    self._app, self._token, self._log = app, token, log
    self._names, self._loopback = hosts_of(host), is_loopback(host)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""
    if scope["type"] == "lifespan":
      await self._app(scope, receive, send)
      return
    if scope["type"] != "http":
      await send({"type": "websocket.close", "code": 1008})
      return
    problem = self._problem(scope)
    if problem is not None:
      self._log(f"refused {scope['method']} {scope['path'][:100]!r}: {problem[1]}")
      await _answer(send, *problem)
      return
    body = await _body(receive)
    if body is None:
      await _answer(send, 413, f"the request is larger than {MAX_BODY} bytes.")
      return
    replay = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def received() -> MutableMapping[str, Any]:
      return next(replay, None) or await receive()

    async def guarded(message: MutableMapping[str, Any]) -> None:
      if message["type"] == "http.response.start":
        message = {**message, "headers": [*message.get("headers", ()), *_encoded(HEADERS)]}
      await send(message)

    await self._app(scope, received, guarded)

  def _problem(self, scope: Scope) -> Problem | None:
    names = [name for name, _ in scope["headers"]]
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    method, path = scope["method"], scope["path"]
    if method not in ("GET", "HEAD", "POST"):
      return 405, "expected GET or POST."
    if any(names.count(name) > 1 for name in (b"host", b"origin", b"authorization", b"content-length")):
      return 400, "a header occurs twice."
    return (
      host_problem(headers.get("host", ""), self._names, loopback=self._loopback)
      or origin_problem(method, headers)
      or token_problem(path, headers, self._token)
      or length_problem(headers)
    )


async def _body(receive: Receive) -> bytes | None:
  """Returns the body of a request; None if it is larger than MAX_BODY, of which no more is read then."""
  body = b""
  while True:
    message = await receive()
    body += message.get("body", b"")
    if len(body) > MAX_BODY:
      return None
    if not message.get("more_body"):
      return body


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
  return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


async def _answer(send: Send, status: int, sentence: str) -> None:
  body = json.dumps({"error": sentence}).encode()
  headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
  await send({"type": "http.response.start", "status": status, "headers": _encoded(headers | HEADERS)})
  await send({"type": "http.response.body", "body": body})
