"""The page's server: what it answers, and attacks that it refuses."""

import html.parser
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from jaxpref.voting import guard, server
from tests.voting.made import ballot, make_pairs, request

pytest.importorskip("starlette", reason="needs the packages of the extra [web]")

TOKEN = "a-token-of-24-characters"
HOST = ("Host", "127.0.0.1:8420")
AUTHORIZED = (HOST, ("Authorization", f"Bearer {TOKEN}"))
POSTED = (*AUTHORIZED, ("Origin", "http://127.0.0.1:8420"), ("Content-Type", "application/json"))


@pytest.fixture
def made(tmp_path):
  return ballot(make_pairs(tmp_path / "pairs", 6))


@pytest.fixture
def app(made):
  return server.make_app(made, title="Which one?", token=TOKEN, host="127.0.0.1")


def post(app, path, body, headers=POSTED):
  status, _, answer = request(app, "POST", path, headers=headers, body=json.dumps(body).encode())
  return status, json.loads(answer)


def error_of(app, method, path, headers, **options):
  status, _, body = request(app, method, path, headers=headers, **options)
  return status, json.loads(body)["error"]


# ---- What it answers -----------------------------------------------------------------------------------------------


def test_a_vote_from_the_first_request_to_undo(app, made):
  status, found = post(app, "/api/next", {"voter": " Ada  L. "})
  assert status == 200 and len(found["pairs"]) == 2 and found["pairs"][0]["a"] == [8, 8]
  assert found["progress"]["state"] == "voting" and found["progress"]["pairs"] == 6
  ask = found["pairs"][0]["ask"]
  for side in "ab":
    status, headers, body = request(app, "GET", f"/picture/{ask}/{side}", headers=AUTHORIZED)
    assert status == 200 and headers["content-type"] == "image/png" and body.startswith(b"\x89PNG")
  assert post(app, "/api/vote", {"voter": "Ada L.", "ask": ask, "choice": "tie", "seconds": 2}) == (
    200,
    {"written": True},
  )
  (vote,) = made.store.votes()
  assert vote.choice == "tie" and vote.seconds == 2.0
  status, _, body = request(app, "GET", "/api/summary", headers=AUTHORIZED)
  assert [voter["name"] for voter in json.loads(body)["voters"]] == ["Ada L."]
  assert post(app, "/api/undo", {"voter": "Ada L."}) == (200, {"undone": True}) and made.store.votes() == []
  assert post(app, "/api/undo", {"voter": "Ada L."}) == (200, {"undone": False})


def test_nothing_on_the_page_tells_who_drew_what(app, made):
  _, found = post(app, "/api/next", {"voter": "Ada"})
  assert set(found["pairs"][0]) == {"ask", "caption", "a", "b"}
  text = json.dumps(found) + request(app, "GET", "/", headers=[HOST])[2].decode()
  assert not re.search(r"images/|image_|\.png|swapped|repeat\"", text)
  status, headers, _ = request(app, "GET", f"/picture/{found['pairs'][0]['ask']}/a", headers=AUTHORIZED)
  assert not {"etag", "last-modified", "content-disposition"} & set(headers)


def test_the_page_is_small_and_needs_nothing_from_elsewhere(app):
  parts = [request(app, "GET", path, headers=[HOST])[2] for path in ("/", "/page.js", "/style.css", "/icon.svg")]
  assert sum(map(len, parts)) < 100_000
  addresses = re.findall(rb"https?://[^\s\"')]+", b"".join(parts))
  assert set(addresses) <= {b"http://www.w3.org/2000/svg"}


def test_the_page_has_labels_for_all_buttons_and_pictures(app):
  class Parser(html.parser.HTMLParser):
    open_button = None
    wrong = []

    def handle_starttag(self, tag, attributes):
      given = dict(attributes)
      if tag == "button":
        self.open_button = given.get("aria-label", "")
      if tag == "img" and not given.get("alt"):
        self.wrong.append(given)
      if tag == "script" and "src" not in given or "style" in given or any(n.startswith("on") for n in given):
        self.wrong.append(given)  # the policy does not run it

    def handle_data(self, data):
      if self.open_button is not None:
        self.open_button += data.strip()

    def handle_endtag(self, tag):
      if tag == "button":
        if not self.open_button:
          self.wrong.append("a button without a name")
        self.open_button = None

  page = request(app, "GET", "/", headers=[HOST])[2].decode()
  parser = Parser()
  parser.feed(page)
  assert parser.wrong == [] and '<html lang="en">' in page and 'aria-live="polite"' in page


def test_a_vote_is_answered_in_a_tenth_of_a_second(app):
  times = []
  for _ in range(5):
    _, found = post(app, "/api/next", {"voter": "Ada"})
    started = time.perf_counter()
    assert post(app, "/api/vote", {"voter": "Ada", "ask": found["pairs"][0]["ask"], "choice": "left"})[0] == 200
    times.append(time.perf_counter() - started)
  assert sorted(times)[2] < 0.1, times


# ---- Attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/summary", "/api/next", "/picture/x/a", "/docs", "/votes.sqlite", "//", "/api"])
@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN[:-1]}"])
def test_without_the_token_there_is_nothing(app, path, given):
  headers = [HOST] + ([("Authorization", given)] if given else [])
  assert error_of(app, "GET", path, headers)[0] == 401


def test_the_token_in_the_query_does_not_count(app):
  assert error_of(app, "GET", f"/api/summary?token={TOKEN}", [HOST])[0] == 401


@pytest.mark.parametrize(
  "host",
  ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "", "192.168.0.7:8420", "localhost.evil.example"],
)
def test_other_hosts_are_refused(app, host):
  headers = [("Host", host), AUTHORIZED[1]]
  assert error_of(app, "GET", "/api/summary", headers)[0] == 421
  assert error_of(app, "GET", "/", headers)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8420", "LOCALHOST:8420"])
def test_this_machine_s_names_are_answered(app, host):
  assert request(app, "GET", "/api/summary", headers=[("Host", host), AUTHORIZED[1]])[0] == 200


def test_a_server_for_others_answers_to_addresses_and_to_its_own_name(made):
  app = server.make_app(made, title="t", token=TOKEN, host="0.0.0.0")
  status = lambda host: request(app, "GET", "/api/summary", headers=[("Host", host), AUTHORIZED[1]])[0]
  assert status("192.168.0.7:8420") == status(f"{socket.gethostname()}:8420") == 200
  assert status("evil.example") == 421
  assert request(app, "GET", "/api/summary", headers=[("Host", "192.168.0.7")])[0] == 401


@pytest.mark.parametrize(
  ("changed", "status"),
  [
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": None}, 403),
    ({"Origin": "http://127.0.0.1:8421"}, 403),
    ({"Origin": "http://127.0.0.1:8420.evil.example"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": None}, 415),
    ({"Authorization": None}, 401),
  ],
)
def test_requests_of_other_sites_change_nothing(app, made, changed, status):
  ask = post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["ask"]
  headers = [(name, value) for name, value in (dict(POSTED) | changed).items() if value is not None]
  assert post(app, "/api/vote", {"voter": "Ada", "ask": ask, "choice": "left"}, headers)[0] == status
  assert post(app, "/api/next", {"voter": "Eve"}, headers)[0] == status
  assert made.store.votes() == [] and list(made.store.voters()) == ["Ada"]


@pytest.mark.parametrize("path", ["/api/next", "/api/vote", "/api/undo"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_post_changes_anything(app, made, path, method):
  post(app, "/api/next", {"voter": "Ada"})
  body = json.dumps({"voter": "Eve", "ask": "x", "choice": "left"}).encode()
  assert request(app, method, f"{path}?voter=Eve", headers=POSTED, body=body)[0] == 405
  assert list(made.store.voters()) == ["Ada"]


@pytest.mark.parametrize(
  "path",
  [
    "/picture/../../../etc/passwd/a",
    "/picture/..%2f..%2fetc%2fpasswd/a",
    "/picture/....//....//etc/passwd",
    "/picture/images/0_0.png",
    "/picture/votes.sqlite/a",
    "/../pairs.jsonl",
    "/style.css/../../store.py",
    "/static/style.css",
    "/pairs.jsonl",
    "/votes_token.txt",
    "/page.js/",
    "/picture/%00/a",
    "/picture/0/a",
  ],
)
def test_no_path_reaches_the_file_system(app, path):
  status, _, body = request(app, "GET", path, headers=AUTHORIZED)
  assert status in (404, 409, 307) and b"root:" not in body and b"PNG" not in body and b"caption" not in body


def test_a_body_that_is_said_to_be_large_is_not_read(app):
  headers = [*POSTED, ("Content-Length", str(2**30))]
  assert error_of(app, "POST", "/api/next", headers, chunks=[])[0] == 413


@pytest.mark.parametrize("length", ["-1", "many", "1e3", ""])
def test_a_length_that_is_no_number_is_refused(app, length):
  assert error_of(app, "POST", "/api/next", [*POSTED, ("Content-Length", length)])[0] == 413


def test_a_body_without_a_length_is_read_to_the_limit(app):
  read = []

  def endless():
    for _ in range(2**20):
      read.append(1024)
      yield b"x" * 1024

  assert error_of(app, "POST", "/api/next", POSTED, chunks=endless())[0] == 413
  assert sum(read) <= guard.MAX_BODY + 1024


@pytest.mark.parametrize(
  "body",
  [
    *(b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 10_000, b"{}", b'{"voter": 5}', b'{"voter": "  "}'),
    *(json.dumps({"voter": "x" * 41}).encode(), b'{"voter": "a\\u0000b"}', b'{"voter": "a\\u202eb"}'),
    b'{"voter": "\\ud800"}',
  ],
  ids=lambda body: body[:20].decode("latin-1"),
)
def test_a_body_that_is_no_request_is_one_sentence(app, made, body):
  for path in ("/api/next", "/api/vote", "/api/undo"):
    status, said = error_of(app, "POST", path, POSTED, body=body)
    assert status == 409 and said.startswith("expected ")
  assert made.store.voters() == {}


@pytest.mark.parametrize(
  "wrong",
  [
    *({"choice": "up"}, {"choice": None}, {"choice": ["left"]}, {"choice": "left'; DROP TABLE votes; --"}),
    *({"ask": "x"}, {"ask": None}, {"ask": "x" * 101}, {"ask": {"a": 1}}),
  ],
  ids=str,
)
def test_a_vote_that_cannot_be_is_refused(app, made, wrong):
  ask = post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["ask"]
  status, said = post(app, "/api/vote", {"voter": "Ada", "ask": ask, "choice": "left"} | wrong)
  assert status == 409 and "error" in said and made.store.votes() == []


@pytest.mark.parametrize("seconds", ["x", None, -5, float("inf"), float("nan"), True, 1e300])
def test_seconds_are_never_an_error(app, made, seconds):
  ask = post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["ask"]
  assert post(app, "/api/vote", {"voter": "Ada", "ask": ask, "choice": "left", "seconds": seconds})[0] == 200
  assert 0.0 <= made.store.votes()[0].seconds <= server.MAX_SECONDS


def test_another_voter_cannot_answer(app, made):
  ask = post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["ask"]
  assert post(app, "/api/vote", {"voter": "Eve", "ask": ask, "choice": "left"})[0] == 409
  assert made.store.votes() == []


MARKUP = "<img src=x onerror=alert(1)>&\"'</script>"


def test_markup_in_prompts_and_names_is_text(tmp_path):
  folder = make_pairs(tmp_path / "pairs", 1)
  row = json.loads((folder / "pairs.jsonl").read_text()) | {"caption": MARKUP}
  (folder / "pairs.jsonl").write_text(json.dumps(row))
  app = server.make_app(ballot(folder), title=MARKUP, token=TOKEN, host="127.0.0.1")
  status, headers, body = request(
    app, "POST", "/api/next", headers=POSTED, body=json.dumps({"voter": MARKUP[:28]}).encode()
  )
  assert status == 200 and json.loads(body)["pairs"][0]["caption"] == MARKUP
  assert headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
  page = request(app, "GET", "/", headers=[HOST])[2].decode()
  assert "<img src=x" not in page and "&lt;img src=x onerror" in page
  script = (server.TEMPLATES / "page.js").read_text()
  assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script)


def test_half_a_character_in_a_prompt_is_shown_as_a_question_mark(tmp_path):
  folder = make_pairs(tmp_path / "pairs", 1)
  row = json.loads((folder / "pairs.jsonl").read_text()) | {"caption": "half \ud83e"}
  (folder / "pairs.jsonl").write_text(json.dumps(row))
  app = server.make_app(ballot(folder), title="t", token=TOKEN, host="127.0.0.1")
  assert post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["caption"] == "half ?"


def test_every_answer_has_the_headers_that_bind_a_browser(app):
  for path, headers in (
    ("/", [HOST]),
    ("/api/summary", AUTHORIZED),
    ("/nothing", AUTHORIZED),
    ("/api/summary", [HOST]),
  ):
    found = request(app, "GET", path, headers=headers)[1]
    assert {name: found.get(name.lower()) for name in guard.HEADERS} == guard.HEADERS
  policy = guard.HEADERS["Content-Security-Policy"]
  assert policy.startswith("default-src 'self'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization", "Content-Length"])
def test_a_header_that_occurs_twice_is_refused(app, name):
  headers = [*POSTED, ("Content-Length", "2"), (name, dict(POSTED).get(name, "2"))]
  assert error_of(app, "POST", "/api/next", headers, body=b"{}")[0] == 400


def test_a_full_disk_is_said_and_the_vote_is_not_counted(app, made):
  ask = post(app, "/api/next", {"voter": "Ada"})[1]["pairs"][0]["ask"]
  made.store._db.execute("PRAGMA query_only = 1")
  status, said = post(app, "/api/vote", {"voter": "Ada", "ask": ask, "choice": "left"})
  assert status == 507 and "votes.sqlite cannot be written" in said["error"]
  made.store._db.execute("PRAGMA query_only = 0")
  assert post(app, "/api/vote", {"voter": "Ada", "ask": ask, "choice": "left"})[0] == 200
  assert len(made.judgements()) == 1


# ---- Listening -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_says_which_one_is_free():
  with server.listen("127.0.0.1", 0) as first:
    port = first.getsockname()[1]
    with pytest.raises(ValueError, match=rf"--port={port} is in use; (\d+) is free") as said:
      server.listen("127.0.0.1", port)
    free = int(re.search(r"; (\d+) is", str(said.value))[1])
    with server.listen("127.0.0.1", free):
      pass


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.5"])
def test_an_address_of_another_machine_is_refused(host):
  with pytest.raises(ValueError, match=f"--host={host} is no address of this machine"):
    server.listen(host, 8420)


def test_the_token_stays_and_is_for_the_owner_alone(tmp_path):
  token = server.token_of(tmp_path)
  assert len(token) >= 32 and server.token_of(tmp_path) == token
  file = tmp_path / server.TOKEN_NAME
  assert stat.S_IMODE(file.stat().st_mode) == 0o600
  file.unlink()
  assert server.token_of(tmp_path) != token
  file.write_text("short")
  with pytest.raises(ValueError, match="holds no token; delete it"):
    server.token_of(tmp_path)


def test_the_link_has_the_token_where_browsers_do_not_send_it():
  assert server.link("127.0.0.1", 80, "t") == "http://127.0.0.1:80/#t"
  assert server.link("::1", 80, "t") == "http://[::1]:80/#t"
  for_others = server.link("0.0.0.0", 80, "t").removeprefix("http://").removesuffix(":80/#t")
  assert for_others == socket.gethostname() or re.fullmatch(r"[0-9.]+", for_others) and for_others != "0.0.0.0"


SERVE = """
import pathlib, sys
from jaxpref.voting import catalog, schedule, server, store
from jaxpref.voting.ballot import Ballot
folder = pathlib.Path(sys.argv[1])
ballot = Ballot(catalog.open_catalog(folder), store.Store(folder / store.NAME), schedule.Rules())
listening = server.listen("127.0.0.1", 0)
print(listening.getsockname()[1], flush=True)
server.run(server.make_app(ballot, title="t", token=sys.argv[2], host="127.0.0.1"), listening)
"""


@pytest.fixture
def port(tmp_path):
  folder = make_pairs(tmp_path / "served", 5)
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
  process = subprocess.Popen(
    [sys.executable, "-c", SERVE, str(folder), TOKEN], stdout=subprocess.PIPE, text=True, env=environment
  )
  try:
    yield int(process.stdout.readline())
  finally:
    process.kill()
    process.wait()


def test_over_a_real_connection(port):
  """The page, and a body of a gigabyte: the server answers at the first bytes and stays small and awake."""
  headers = {"Authorization": f"Bearer {TOKEN}"}
  address = f"http://127.0.0.1:{port}"
  answer = urllib.request.urlopen(urllib.request.Request(f"{address}/api/summary", headers=headers))
  assert json.loads(answer.read())["pairs"] == 5 and "server" not in {name.lower() for name, _ in answer.getheaders()}
  for length in (f"Content-Length: {2**30}", "Transfer-Encoding: chunked"):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
      lines = ["POST /api/next HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Origin: {address}", length]
      lines += ["Content-Type: application/json", f"Authorization: Bearer {TOKEN}", "", ""]
      raw.sendall("\r\n".join(lines).encode())
      sent, block = 0, b"x" * 2**16
      piece = block if length.startswith("C") else f"{len(block):x}\r\n".encode() + block + b"\r\n"
      try:
        while sent < 2**30:
          raw.sendall(piece)
          sent += len(piece)
      except OSError:  # the server has closed the connection
        pass
      assert sent < 2**26
  with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:  # a header of a gigabyte
    with pytest.raises(OSError):
      raw.sendall(b"GET / HTTP/1.1\r\nX: ")
      for _ in range(2**14):
        raw.sendall(b"x" * 2**16)
  answer = urllib.request.urlopen(urllib.request.Request(f"{address}/api/summary", headers=headers))
  assert json.loads(answer.read())["pairs"] == 5


def test_many_requests_at_once(port):
  found = []

  def ask():
    headers = {"Authorization": f"Bearer {TOKEN}"}
    address = f"http://127.0.0.1:{port}/api/summary"
    found.append(urllib.request.urlopen(urllib.request.Request(address, headers=headers)).status)

  threads = [threading.Thread(target=ask) for _ in range(30)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [200] * 30
