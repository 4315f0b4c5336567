"""The command that compares models blindly: the rule, what is shown before the end, results, and the scorer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import urllib.request

import numpy as np
import pytest
from PIL import Image

from jaxpref import blind, evaluate
from jaxpref.data import prompt_sets
from jaxpref.voting import blind_folder, server, store, trial
from tests import QUICK_FLAGS
from tests.voting import made

pytest.importorskip("starlette", reason="needs the packages of the extra [web]")

PROMPTS = ("red apple", "volcano", "cat", "dog")


@pytest.fixture
def folder(tmp_path):
  """What a finished evaluation of two models leaves: pictures of other levels for each cell."""
  place = tmp_path / "evaluation"
  for m, name in enumerate(("base", "new")):
    (place / "images" / name).mkdir(parents=True)
    for p in range(len(PROMPTS)):
      for s in range(2):
        (place / "images" / name / f"{p:05d}_{s}.png").write_bytes(made.png(10 * p + 5 * s + 100 * m))
  results = {"models": ["new", "base"], "baseline": "base", "prompts": [{"text": text} for text in PROMPTS]}
  (place / "results.json").write_text(json.dumps(results | {"seeds_per_prompt": 2}))
  return place


def free_port():
  with server.listen("127.0.0.1", 0) as listening:
    return listening.getsockname()[1]


def serve(monkeypatch, folder, work, *arguments):
  """Runs the command; `work` gets the app while it is served."""
  monkeypatch.setattr(server, "run", lambda app, listening: work(app))
  blind.main([str(folder), f"--port={free_port()}", *arguments])


def call(app, folder, path, body=None):
  token = (folder / server.TOKEN_NAME).read_text().strip()
  headers = [("Host", "localhost"), ("Authorization", f"Bearer {token}"), ("Origin", "http://localhost")]
  headers += [("Content-Type", "application/json")]
  method, content = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
  return json.loads(made.request(app, method, path, headers=headers, body=content)[2])


def prefer(app, folder, model, count, name="Ada"):
  """Votes for a model's pictures, which are known by their level; returns the answers of the server."""
  answers = []
  token = (folder / server.TOKEN_NAME).read_text().strip()
  headers = [("Host", "localhost"), ("Authorization", f"Bearer {token}")]
  for _ in range(count):
    found = call(app, folder, "/api/next", {"voter": name})
    answers.append(found)
    if not found["pairs"]:
      break
    ask = found["pairs"][0]["ask"]
    a = made.request(app, "GET", f"/picture/{ask}/a", headers=headers)[2]
    is_new = a in {made.png(10 * p + 5 * s + 100) for p in range(4) for s in range(2)}
    call(
      app, folder, "/api/vote", {"voter": name, "ask": ask, "choice": "left" if is_new == (model == "new") else "right"}
    )
  return answers


def test_results_are_hidden_until_the_end_and_written_then(folder, monkeypatch, capsys):
  summaries = []

  def work(app):
    answers = prefer(app, folder, "new", 3)
    summaries.append(call(app, folder, "/api/summary"))
    assert not re.search(r"base|new|image_|images/|first_without_bias", json.dumps([answers, summaries]))
    prefer(app, folder, "new", 20)
    summaries.append(call(app, folder, "/api/summary"))

  serve(monkeypatch, folder, work)
  assert summaries[0]["comparison"] == {"rule": trial.Rule(8).in_words()}
  found = json.loads((folder / "blind_results.json").read_text())
  assert found == summaries[1]["comparison"] and found["ended"] and found["pairs"] == 8
  one = found["comparisons"]["new"]
  assert one["win_rate"] == 1.0 and one["prompts_won"] == 4 and one["p"] == 0.125 and one["verdict"] == "undecided"
  page = (folder / "blind.html").read_text()
  assert "100.0%" in page and "undecided" in page and "has not ended" not in page
  assert "Voting ends after 8 pairs" in capsys.readouterr().err


def test_the_rule_cannot_be_changed_after_the_first_vote(folder, monkeypatch):
  serve(monkeypatch, folder, lambda app: None, "--votes=3")
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "new", 1), "--votes=4")
  with pytest.raises(
    SystemExit, match="has votes under another rule, --votes=4 --stop=fixed; a rule cannot be changed"
  ):
    serve(monkeypatch, folder, lambda app: None, "--votes=5")
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "new", 9), "--votes=4")
  assert json.loads((folder / "blind_results.json").read_text())["pairs"] == 4


def test_votes_without_a_rule_get_none_afterwards(folder, monkeypatch):
  file = folder / store.NAME
  votes = store.Store(file)
  votes.numbers_of(["a"])
  ada = votes.voter("Ada")
  votes.vote(ada, votes.ask(ada, 1, swapped=False).ask, "left")
  votes.close()
  with pytest.raises(SystemExit, match="has votes without a rule; compare in a new folder"):
    serve(monkeypatch, folder, lambda app: None)


def test_results_before_the_end_say_so(folder, monkeypatch, capsys):
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "base", 2))
  assert not (folder / "blind_results.json").exists()
  blind.main([str(folder), "--results"])
  said = capsys.readouterr().out
  assert "Voting has NOT ended by this rule" in said and "new against base: win rate 0.0%" in said
  assert "Voting has not ended" in (folder / "blind.html").read_text()


def test_names_of_models_are_never_markup(folder, monkeypatch):
  results = {"rule": "r", "ended": True, "votes": 1, "pairs": 1, "ties": 0, "bad": 0, "alpha": None, "baseline": "<b>x"}
  one = {"win_rate": 1.0, "win_rate_interval": None, "prompts_won": 1, "prompts_lost": 0, "prompts_tied": 0}
  blind_folder.write(folder, results | {"comparisons": {"<i>y": one | {"p_holm": 1.0, "verdict": "undecided"}}})
  page = (folder / "blind.html").read_text()
  assert "<b>x" not in page and "<i>y" not in page and "&lt;i&gt;y" in page


def test_votes_are_a_scorer_of_evaluate(folder, monkeypatch):
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "new", 3))
  scorer = blind_folder.load_scorer(f"votes={folder}")
  read = lambda model, p, s: np.asarray(Image.open(folder / "images" / model / f"{p:05d}_{s}.png"))
  cells = [(p, s) for p in range(4) for s in range(2)]
  scores = {
    model: scorer.score([read(model, p, s) for p, s in cells], [PROMPTS[p] for p, _ in cells])
    for model in ("base", "new")
  }
  assert sorted(scores["new"]) == [0.5] * 5 + [1.0] * 3 and (scores["base"] == 1.0 - scores["new"]).all()
  assert "6 of 16 pictures have votes, the others count 0.5" in scorer.scale
  with pytest.raises(ValueError, match="1 of 1 pictures are not among those that were compared"):
    scorer.score([np.zeros((8, 8, 3), np.uint8)], ["another"])
  before = scorer.version
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "base", 1))
  assert blind_folder.load_scorer(f"votes={folder}").version != before


def test_evaluate_takes_the_votes_beside_other_scorers(folder, monkeypatch):
  serve(monkeypatch, folder, lambda app: prefer(app, folder, "new", 8))
  args = types.SimpleNamespace(
    scorers=[f"votes={folder}"], score_batch_size=4, preferred_style="openmoji", out=folder, seeds=2
  )
  held = types.SimpleNamespace(check=lambda: None)
  prompts = [prompt_sets.Prompt(text) for text in PROMPTS]
  described, found = evaluate.score_missing(["base", "new"], prompts, args, None, held)
  assert described[0]["name"] == "votes" and found["new"]["votes"] == [[1.0, 1.0]] * 4
  assert (folder / "scores" / "new" / "votes.json").is_file()
  with pytest.raises(SystemExit, match="expected votes=FOLDER"):
    evaluate.main(["--models", "a=tiny-sd", "--prompts=emoji", "--scorers", "votes"])
  with pytest.raises(SystemExit, match="has no votes.sqlite"):
    evaluate.main(["--models", "a=tiny-sd", "--prompts=emoji", "--scorers", "votes=nothing"])


def test_pictures_are_drawn_in_turns_while_people_vote(tmp_path, monkeypatch):
  """With models that draw a level for each number: which pictures come first, and that none is drawn twice."""
  drawn = []

  def sampler(name):
    def sample(params, ids, numbers):
      drawn.append((name, numbers.tolist()))
      level = {"base": 0, "new": 100}[name] + numbers
      return np.broadcast_to(level[:, None, None, None], (len(numbers), 8, 8, 3)).astype(np.uint8)

    return sample

  monkeypatch.setattr(blind, "PROMPTS_AT_A_TIME", 2)
  monkeypatch.setattr(
    blind.settings,
    "load",
    lambda name, loras, args, mesh: (name, None, lambda texts: np.zeros((len(texts), 4), np.int32)),
  )
  monkeypatch.setattr(blind.settings, "of_draw", lambda args, module, tokenize: {"seeds_per_prompt": 1})
  monkeypatch.setattr(blind.drawing, "make_sampler", lambda module, mesh: sampler(module))
  monkeypatch.setattr(blind.sharding, "make_mesh", lambda devices: None)
  args = types.SimpleNamespace(seeds=1, batch_size=2)
  prompts = [prompt_sets.Prompt(text) for text in PROMPTS]
  models = {name: (name, ()) for name in ("base", "new")}
  (tmp_path / "images" / "new").mkdir(parents=True)
  (tmp_path / "images" / "new" / "00001_0.png").write_bytes(made.png(7))
  for _ in range(2):
    now = blind.Drawing(tmp_path, models, prompts, args)
    assert now.status() is not None
    now.thread.start()
    now.thread.join(60)
    assert now.status() is None and now.catalog.ready().all()
  assert drawn == [("base", [0, 1]), ("new", [0, 0]), ("base", [2, 3]), ("new", [2, 3])]
  assert now.catalog.read(1).images == (made.png(1), made.png(7)) and now.catalog.read(3).images[1] == made.png(103)


def test_drawing_that_fails_is_said_on_the_page(tmp_path, monkeypatch, capsys):
  def fails(*_):
    raise ValueError("the weights are gone")

  monkeypatch.setattr(blind.settings, "load", fails)
  now = blind.Drawing(
    tmp_path, {"a": ("a", ()), "b": ("b", ())}, [prompt_sets.Prompt("x")], types.SimpleNamespace(seeds=1, batch_size=1)
  )
  now.thread.start()
  now.thread.join(60)
  assert (
    now.status() == "Drawing has stopped; the terminal says why." and "the weights are gone" in capsys.readouterr().err
  )


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "expected FOLDER or --models, and not both"),
    (["nothing"], "nothing has no blind.json and no results.json of jaxpref.evaluate"),
    (["x", "--out=y"], "--out=y is for --models"),
    (["x", "--votes=0"], "--votes=0; expected at least 1"),
    (["x", "--stop=never"], "argument --stop: invalid choice: 'never'"),
    (["x", "--results"], "x has no votes.sqlite"),
    (["x", "--seeds=0", "--prompts=emoji"], "--prompts is for --models"),
    (["--models", "a=tiny-sd", "--prompts=emoji", "--out=o"], "--models names one model"),
    (["--models", "a=tiny-sd", "b=tiny-sd", "--prompts=emoji"], "--out is missing"),
    (["--models", "a=tiny-sd", "b=tiny-sd", "--out=o"], "--prompts is missing"),
    (["--models", "a=tiny-sd", "b=zeros:sd15-miniature", "--prompts=emoji", "--out=o"], "compare models of one size"),
    (["--models", "a=tiny-sd", "b=tiny-sd", "--prompts=emoji", "--out=o", "--seed=-1"], "--seed=-1"),
  ],
  ids=str,
)
def test_what_cannot_work_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as ended:
    blind.main(arguments)
  assert sentence in f"{ended.value.code}{capsys.readouterr().err}"
  assert list(tmp_path.iterdir()) == []


def test_a_folder_of_one_model_is_refused(folder):
  found = json.loads((folder / "results.json").read_text()) | {"models": ["base"]}
  (folder / "results.json").write_text(json.dumps(found))
  with pytest.raises(SystemExit, match="has one model, base; a comparison needs two or more"):
    blind.main([str(folder)])


def test_votes_without_a_rule_are_no_comparison(folder):
  store.Store(folder / store.NAME).close()
  with pytest.raises(SystemExit, match="holds no blind comparison; vote with python -m jaxpref.blind"):
    blind.main([str(folder), "--results"])


# ---- For real ----------------------------------------------------------------------------------------------------


class Running:
  """A command that serves the page, as a user starts it; `ask` sends it a request."""

  def __init__(self, *command, cwd):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = QUICK_FLAGS
    usual = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    self.process = subprocess.Popen(
      [sys.executable, "-m", *command], cwd=cwd, env=environment, preexec_fn=usual, **pipes
    )
    link = self.process.stdout.readline().strip()
    assert "/#" in link, self.process.stderr.read()
    self.address, _, self.token = link.partition("/#")

  def ask(self, path, body=None):
    headers = {"Authorization": f"Bearer {self.token}", "Origin": self.address, "Content-Type": "application/json"}
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(self.address + path, content, headers), timeout=60) as answer:
      return json.loads(answer.read())

  def vote(self, count, choice="left"):
    """Votes as Ada, waiting for pictures that are still drawn; returns the last answer."""
    voted, deadline = 0, time.monotonic() + 300
    while time.monotonic() < deadline:
      found = self.ask("/api/next", {"voter": "Ada"})
      if voted == count or found["progress"]["state"] in ("done", "ended"):
        return found
      if found["pairs"]:
        self.ask("/api/vote", {"voter": "Ada", "ask": found["pairs"][0]["ask"], "choice": choice})
        voted += 1
      else:
        time.sleep(0.2)
    raise AssertionError("no more pairs came")

  def interrupt(self):
    """Exit code and stderr after Ctrl-C."""
    self.process.send_signal(signal.SIGINT)
    said = self.process.communicate(timeout=60)[1]
    return self.process.returncode, said


@pytest.mark.slow
def test_two_models_draw_while_people_vote_and_evaluate_shows_the_votes(tmp_path):
  models = ["--models", "one=tiny-sd", "two=tiny-sd", "--prompts=emoji", "--num_prompts=6", "--steps=2", "--seeds=1"]
  running = Running("jaxpref.blind", *models, "--out=o", "--votes=5", f"--port={free_port()}", cwd=tmp_path)
  assert running.vote(3)["progress"]["pairs"] == 6
  assert running.interrupt()[0] == 130
  running = Running("jaxpref.blind", *models, "--out=o", "--votes=5", f"--port={free_port()}", cwd=tmp_path)
  assert running.vote(9)["progress"]["state"] == "ended"
  code, said = running.interrupt()
  assert code == 130 and "all votes are kept" in said
  found = json.loads((tmp_path / "o" / "blind_results.json").read_text())
  assert found["ended"] and found["pairs"] == 5 and (tmp_path / "o" / "blind.html").is_file()
  evaluate.main([*models, f"--out={tmp_path / 'o'}", "--scorers", f"votes={tmp_path / 'o'}", "judge"])
  results = json.loads((tmp_path / "o" / "results.json").read_text())
  assert [scorer["name"] for scorer in results["scorers"]] == ["votes", "judge"]


@pytest.mark.slow
def test_a_new_user_gets_to_voting_in_one_command(tmp_path):
  started = time.monotonic()
  running = Running("jaxpref", "vote", "--demo", f"--port={free_port()}", cwd=tmp_path)
  found = running.vote(3, "tie")
  print(json.dumps({"seconds_from_nothing_to_three_votes": round(time.monotonic() - started, 1)}))
  assert found["progress"]["votes"] == 3 and found["progress"]["pairs"] == 24 and found["pairs"][0]["a"] == [32, 32]
  assert running.interrupt()[0] == 130


@pytest.mark.slow
def test_of_two_servers_on_one_folder_the_second_is_refused_and_a_killed_one_is_followed(tmp_path):
  made.make_pairs(tmp_path / "pairs", 5)
  first = Running("jaxpref.vote", "pairs", f"--port={free_port()}", cwd=tmp_path)
  assert first.vote(2)["progress"]["votes"] == 2
  second = [sys.executable, "-m", "jaxpref.vote", str(tmp_path / "pairs"), f"--port={free_port()}"]
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), JAX_PLATFORMS="cpu")
  done = subprocess.run(second, capture_output=True, text=True, env=environment, check=False)
  assert done.returncode == 1 and f"is being written by process {first.process.pid}" in done.stderr
  first.process.kill()
  first.process.wait()
  after = Running("jaxpref.vote", "pairs", f"--port={first.address.rpartition(':')[2]}", cwd=tmp_path)
  assert after.address == first.address and after.token == first.token
  assert after.ask("/api/next", {"voter": "Ada"})["progress"]["votes"] == 2
  after.interrupt()
