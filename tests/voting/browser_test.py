"""The page in a real browser: Debian's chromium, without a window, driven by selenium. Fails without it if slow."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from jaxpref.voting import server, store
from tests.voting import made

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDS = "which needs selenium, chromium and chromium-driver; scripts/test_slow.sh installs them"
MARKUP = "<img src=x onerror=document.title='hacked'> & <b>bold</b> \"quoted\""
SERVE = """
import pathlib, sys
from jaxpref.voting import catalog, schedule, server, store
from jaxpref.voting.ballot import Ballot
folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
ballot = Ballot(catalog.open_catalog(folder), store.Store(folder / store.NAME), schedule.Rules(repeats=False))
listening = server.listen("127.0.0.1", port)
app = server.make_app(ballot, title="Which picture is better?", token=server.token_of(folder), host="127.0.0.1")
print("serving", flush=True)
server.run(app, listening)
"""


class Server:
  """A server in a process of its own, which can be killed and started again."""

  def __init__(self, folder):
    self.folder = folder
    with server.listen("127.0.0.1", 0) as listening:
      self.port = listening.getsockname()[1]
    self.start()
    self.link = server.link("127.0.0.1", self.port, server.token_of(folder))

  def start(self):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    command = [sys.executable, "-c", SERVE, str(self.folder), str(self.port)]
    self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert self.process.stdout.readline() == "serving\n"

  def kill(self):
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()

  def votes(self):
    """(voter, choice, image that is A) of each vote that counts."""
    database = sqlite3.connect(f"file:{self.folder / store.NAME}?mode=ro", uri=True)
    try:
      return database.execute(
        "SELECT name, choice, pair FROM votes JOIN asks USING (ask) JOIN voters USING (voter) "
        "WHERE NOT undone ORDER BY vote"
      ).fetchall()
    finally:
      database.close()


@pytest.fixture
def served(tmp_path):
  pytest.importorskip("starlette", reason="needs the packages of the extra [web]")
  folder = made.make_pairs(tmp_path / "pairs", 40)
  rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
  (folder / "pairs.jsonl").write_text(
    "".join(json.dumps(row | {"caption": f"{MARKUP} {i}"}) + "\n" for i, row in enumerate(rows))
  )
  found = Server(folder)
  yield found
  found.kill()


class Page:
  """A page that a voter has open."""

  def __init__(self, *options, phone=False):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert CHROMIUM and DRIVER, f"the page in a browser, {NEEDS}"
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = CHROMIUM
    for option in (
      "headless=new",
      "no-sandbox",
      "disable-dev-shm-usage",
      "disable-gpu",
      "window-size=1200,800",
      *options,
    ):
      chosen.add_argument(f"--{option}")
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    if phone:
      metrics = {"width": 390, "height": 780, "pixelRatio": 2, "touch": True}
      chosen.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    self.driver = webdriver.Chrome(options=chosen, service=Service(DRIVER))

  def open(self, link, name=None):
    self.driver.get(link)
    if name is not None:
      self.wait(lambda: self.find("#name").is_displayed())
      self.find("#name").send_keys(name)
      self.find("#name-form button").click()
    self.wait(lambda: self.ask)
    return self

  def find(self, selector):
    return self.driver.find_element("css selector", selector)

  def wait(self, condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
      assert time.monotonic() < deadline, self.driver.find_element("css selector", "body").text
      time.sleep(0.02)
    return found

  @property
  def ask(self):
    return self.driver.execute_script("return document.body.dataset.ask")

  def press(self, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(self.driver).send_keys(key).perform()

  def moves_on(self, work):
    """Does something and waits for another pair."""
    before = self.ask
    work()
    self.wait(lambda: self.ask != before)

  def shown(self):
    """The prompt, and the colours of the middle of A and B as they are on the screen."""
    script = """
      const level = (id) => {
        const image = document.getElementById(id), canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        const drawn = canvas.getContext("2d"); drawn.drawImage(image, 0, 0);
        return drawn.getImageData(1, 1, 1, 1).data[0];
      };
      return [document.getElementById("prompt").textContent, level("picture-a"), level("picture-b")];
    """
    return self.driver.execute_script(script)

  def errors(self):
    return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def pages():
  opened = []

  def make(*options, **named):
    opened.append(Page(*options, **named))
    return opened[-1]

  yield make
  for page in opened:
    page.driver.quit()


def test_voting_by_keys_by_mouse_undo_and_reload(served, pages):
  pytest.importorskip("selenium", reason=f"the page in a browser, {NEEDS}")
  if not (CHROMIUM and DRIVER):
    pytest.skip(f"the page in a browser, {NEEDS}")
  from selenium.webdriver.common.keys import Keys

  page = pages().open(served.link, "Ada")
  for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.SPACE, "x", "s"):
    page.moves_on(lambda key=key: page.press(key))
  assert [choice for _, choice, _ in served.votes()] == ["left", "right", "tie", "bad", "skip"]
  for selector in ("#choose-a", "#choose-b", "[data-choice=tie]", "[data-choice=bad]", "[data-choice=left]"):
    page.moves_on(lambda selector=selector: page.find(selector).click())
  assert [choice for _, choice, _ in served.votes()][5:] == ["left", "right", "tie", "bad", "left"]

  current = page.shown()
  page.moves_on(lambda: page.press("u"))
  undone = page.shown()
  assert undone != current and len(served.votes()) == 9
  page.driver.refresh()
  page.wait(lambda: page.ask)
  assert page.shown() == undone  # the name and the pair are known after a reload
  page.moves_on(lambda: page.press(Keys.ARROW_RIGHT))
  assert page.shown() == current and served.votes()[-1][1] == "right" and len(served.votes()) == 10
  assert len({pair for _, _, pair in served.votes()}) == 10 and page.errors() == []


@pytest.mark.slow
def test_markup_in_a_prompt_is_text(served, pages):
  page = pages().open(served.link, "<i>A</i>")
  assert page.shown()[0].startswith(MARKUP) and page.driver.title == "Which picture is better?"
  assert page.driver.execute_script("return document.querySelectorAll('#prompt *, [onerror]').length") == 0
  page.find("#vote [data-go=summary]").click()
  page.wait(lambda: page.find("#voters").text.strip())
  assert page.find("#voters th").text == "<i>A</i>"
  assert page.driver.execute_script("return document.querySelectorAll('#voters i').length") == 0


@pytest.mark.slow
def test_what_is_shown_is_the_pair_that_the_vote_is_about(served, pages):
  page = pages().open(served.link, "Ada")
  chosen = []
  for _ in range(12):
    prompt, a, b = page.shown()
    number = int(prompt.rsplit(" ", 1)[1])
    assert sorted((a, b)) == sorted((number, 128 + number))
    chosen.append((number, a))
    page.moves_on(lambda: page.press("\ue012"))  # the left arrow
  page.driver.quit()
  served.kill()
  ballot = made.ballot(served.folder)
  found = [(j.pair, (j.pair if j.said == "image_0" else 128 + j.pair)) for j in ballot.judgements()]
  assert found == chosen and len({a >= 128 for _, a in chosen}) == 2  # both orders occur


@pytest.mark.slow
def test_the_next_pair_is_shown_in_a_tenth_of_a_second(served, pages):
  page = pages().open(served.link, "Ada")
  script = """
    const done = arguments[0], before = document.body.dataset.ask, times = [];
    let started = performance.now();
    new MutationObserver(() => { times.push(performance.now() - started); next(); })
      .observe(document.body, {attributes: true, attributeFilter: ["data-ask"]});
    function next() {
      if (times.length === 15) { done(times); return; }
      setTimeout(() => {  // a person looks at the pair
        started = performance.now();
        document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
      }, 400);
    }
    next();
  """
  times = sorted(page.driver.execute_async_script(script))
  print(json.dumps({"milliseconds_to_the_next_pair": {"median": times[7], "max": times[-1]}}))
  assert times[7] < 100, times


@pytest.mark.slow
def test_two_voters_at_once(served, pages):
  ada, bob = pages().open(served.link, "Ada"), pages().open(served.link, "Bob")
  for _ in range(6):
    for page in (ada, bob):
      page.moves_on(lambda page=page: page.press("x"))
  votes = served.votes()
  assert [name for name, _, _ in votes] == ["Ada", "Bob"] * 6
  shared = {pair for name, _, pair in votes if name == "Ada"} & {pair for name, _, pair in votes if name == "Bob"}
  assert len(shared) <= 6  # the overlap alone
  ada.find("#vote [data-go=summary]").click()
  ada.wait(lambda: ada.find("#voters").text.strip())
  assert ada.find("#voters").text.count("Bob") == 1
  ada.find("#summary [data-go=vote]").click()
  ada.wait(lambda: ada.find("#vote").is_displayed())


@pytest.mark.slow
def test_a_killed_server_loses_no_vote_and_the_page_goes_on(served, pages):
  page = pages().open(served.link, "Ada")
  for number in range(4):
    page.moves_on(lambda: page.press("\ue014"))
    served.kill()
    assert len(served.votes()) == 2 * number + 1
    before = page.ask
    page.press("\ue012")  # while the server is away
    page.wait(lambda: page.find("#notice").is_displayed())
    assert "Nothing is lost" in page.find("#notice").text and page.ask == before
    served.start()
    page.wait(lambda before=before: page.ask != before, seconds=40)
    assert len(served.votes()) == 2 * number + 2 and not page.find("#notice").is_displayed()
  assert len({pair for _, _, pair in served.votes()}) == 8


@pytest.mark.slow
def test_keys_faster_than_the_server_lose_and_skip_no_pair(served, pages):
  page = pages().open(served.link, "Ada")
  script = """
    const done = arguments[0], seen = [document.body.dataset.ask];
    new MutationObserver(() => document.body.dataset.ask && seen.push(document.body.dataset.ask))
      .observe(document.body, {attributes: true, attributeFilter: ["data-ask"]});
    let left = 400;
    const timer = setInterval(() => {
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "x", bubbles: true}));
      if (!--left) { clearInterval(timer); setTimeout(() => done(seen), 1000); }
    }, 7);
  """
  seen = page.driver.execute_async_script(script)
  votes = served.votes()
  assert len(votes) in (len(seen) - 1, 40) and len({pair for _, _, pair in votes}) == len(votes) > 10
  assert len(set(seen)) == len(seen) and page.errors() == []


@pytest.mark.slow
def test_looking_closely_flips_at_the_same_place_and_votes(served, pages):
  page = pages().open(served.link, "Ada")
  boxes = lambda: [page.find(f"#close-{side}").rect for side in "ab"]
  visible = lambda: [page.find(f"#close-{side}").is_displayed() for side in "ab"]
  page.press("z")
  page.wait(lambda: page.find("#closely").is_displayed())
  assert visible() == [True, False]
  page.press("f")
  assert visible() == [False, True] and boxes()[0] == boxes()[1]
  small = boxes()[0]["width"]
  page.press("z")
  assert boxes()[0]["width"] == pytest.approx(2 * small) and boxes()[0] == boxes()[1]
  page.moves_on(lambda: page.press("\ue012"))
  assert not page.find("#closely").is_displayed() and served.votes()[-1][1] == "left"


@pytest.mark.slow
def test_a_phone_votes_by_touch_and_nothing_is_cut_off(served, pages):
  page = pages(phone=True).open(served.link, "Ada")
  width = page.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
  assert width[0] <= width[1]
  height = page.driver.execute_script("return innerHeight")
  for selector in ("#picture-a", "#picture-b", "[data-choice=left]", "[data-choice=right]", "#undo"):
    box = page.find(selector).rect
    assert box["y"] >= 0 and box["y"] + box["height"] <= height + 1, selector
  for selector in ("[data-choice=tie]", "#choose-b"):
    page.moves_on(lambda selector=selector: page.find(selector).click())
  assert [choice for _, choice, _ in served.votes()] == ["tie", "right"]
  assert page.find("[data-choice=tie]").rect["height"] >= 40


@pytest.mark.slow
def test_dark_and_light(served, pages):
  page = pages().open(served.link, "Ada")
  colour = "return getComputedStyle(document.body).backgroundColor"
  found = []
  for scheme in ("light", "dark"):
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    found.append(sum(map(int, re.findall(r"\d+", page.driver.execute_script(colour))[:3])))
  assert found[0] > 600 and found[1] < 150


@pytest.mark.slow
def test_the_page_asks_nobody_else_and_the_token_is_in_no_address(served, pages):
  page = pages().open(served.link, "Ada")
  page.moves_on(lambda: page.press("x"))
  events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
  asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
  token = served.link.partition("#")[2]
  assert len(asked) > 5 and all(re.match(rf"(blob:)?http://127\.0\.0\.1:{served.port}/", url) for url in asked)
  assert not [url for url in asked if token in url]


@pytest.mark.slow
def test_without_the_token_the_page_says_what_to_do(served, pages):
  page = pages()
  page.driver.get(served.link.partition("#")[0])
  page.wait(lambda: page.find("#notice").is_displayed())
  assert "Open the whole link" in page.find("#notice").text
  page.driver.get(served.link + "x")
  page.driver.refresh()
  page.wait(lambda: page.find("#name").is_displayed())
  page.find("#name").send_keys("Eve")
  page.find("#name-form button").click()
  page.wait(lambda: "token is missing or wrong" in page.find("#notice").text)
  assert served.votes() == []


@pytest.mark.slow
def test_a_page_of_another_site_can_neither_read_nor_vote(served, pages, tmp_path):
  """Even with the token; as from a page that a voter has open beside."""
  token = served.link.partition("#")[2]
  other = tmp_path / "evil.html"
  other.write_text("<!doctype html><title>evil</title>")
  page = pages()
  page.driver.get(other.as_uri())
  script = """
    const done = arguments[2];
    const options = {method: "POST", headers: {"Authorization": "Bearer " + arguments[1],
      "Content-Type": "application/json"}, body: JSON.stringify({voter: "Eve"})};
    const simple = {method: "POST", mode: "no-cors", body: JSON.stringify({voter: "Eve"})};
    const tried = [fetch(arguments[0] + "api/next", options), fetch(arguments[0] + "api/next", simple),
      fetch(arguments[0] + "api/summary", {headers: options.headers})];
    Promise.allSettled(tried).then((found) => done(found.map((one) => one.status + (one.value ? one.value.type : ""))));
  """
  address = served.link.partition("#")[0]
  assert page.driver.execute_async_script(script, address, token) == ["rejected"] * 3
  with sqlite3.connect(served.folder / store.NAME) as database:
    assert database.execute("SELECT count(*) FROM voters").fetchone() == (0,)
