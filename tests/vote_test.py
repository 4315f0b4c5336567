"""The command that shows pairs to people: what it serves, exports and refuses."""

import json
import re
import sys
import time

import numpy as np
import pytest

from jaxpref import pairs, vote
from jaxpref.data import lease, sources
from jaxpref.voting import blind_folder, server, store
from tests.occupied import occupied
from tests.voting import made

pytest.importorskip("starlette", reason="needs the packages of the extra [web]")


@pytest.fixture
def folder(tmp_path):
  return made.make_pairs(tmp_path / "pairs", 12)


@pytest.fixture
def served(monkeypatch):
  """What the command would serve: the ASGI apps, in order."""
  apps = []
  monkeypatch.setattr(server, "run", lambda app, listening: apps.append((app, listening.getsockname())))
  return apps


def refused(*arguments):
  with pytest.raises(SystemExit) as ended:
    vote.main([str(argument) for argument in arguments])
  return ended.value.code


def judged(folder, choice="left", count=5, name="Ada"):
  ballot = made.ballot(folder)
  made.vote(ballot, name, choice, count)
  ballot.store.close()


def test_it_prints_a_link_and_keeps_votes_in_the_folder(folder, served, capsys):
  vote.main([str(folder), f"--port={free_port()}"])
  said = capsys.readouterr().out
  token = (folder / server.TOKEN_NAME).read_text().strip()
  ((app, address),) = served
  assert f"http://127.0.0.1:{address[1]}/#{token}\n" in said and str(folder / store.NAME) in said
  assert (folder / store.NAME).is_file() and not (folder / blind_folder.LOCK).exists()
  assert made.request(app, "GET", "/", headers=[("Host", "localhost")])[0] == 200


def free_port():
  with server.listen("127.0.0.1", 0) as listening:
    return listening.getsockname()[1]


def test_a_second_server_on_a_folder_is_refused(folder, served):
  with occupied(folder, blind_folder.LOCK) as sentence:
    assert sentence in refused(folder)
  assert served == []


def test_votes_on_a_file_lie_beside_it(folder, served):
  vote.main([str(folder / "pairs.jsonl"), f"--port={free_port()}"])
  assert (folder / "pairs.jsonl.votes" / store.NAME).is_file() and not (folder / store.NAME).exists()


def test_a_port_in_use_says_which_one_is_free(folder):
  with server.listen("127.0.0.1", 0) as listening:
    port = listening.getsockname()[1]
    assert re.search(rf"--port={port} is in use; \d+ is free\.", refused(folder, f"--port={port}"))


def test_an_address_for_others_is_warned_about(folder, served, capsys):
  vote.main([str(folder), "--host=0.0.0.0", f"--port={free_port()}"])
  assert "warning: the page is open to the network, without encryption" in capsys.readouterr().err


def test_export_is_a_source_of_pairs_to_train_on(folder, tmp_path, capsys):
  judged(folder)
  vote.main([str(folder), f"--export={tmp_path / 'taste'}"])
  said = capsys.readouterr().out
  assert "5 pairs, 0 of them ties; 0 left out" in said and f"--config.data.path={tmp_path / 'taste'}" in said
  source = sources.open_pairs_file(tmp_path / "taste")
  assert len(source) == 5 and set(source.index.label_0.tolist()) <= {0.0, 1.0}
  winners = [source[i][f"image_{0 if source.index.label_0[i] == 1 else 1}"] for i in range(5)]
  shown = {(j.pair, j.said) for j in made.ballot(folder).judgements()}
  assert {made.png(pair + 128 * (said == "image_1")) for pair, said in shown} == set(winners)


def test_export_of_one_voter_and_of_soft_labels(folder, tmp_path, capsys):
  ballot = made.ballot(folder, overlap=1.0, repeats=False)
  for name, choices in (("Ada", ["left"] * 6), ("Bob", ["tie"] * 6)):
    for choice in choices:
      made.vote(ballot, name, choice)
  ballot.store.close()
  vote.main([str(folder), f"--export={tmp_path / 'bob'}", "--labels=voter", "--voter=Bob"])
  assert set(sources.open_pairs_file(tmp_path / "bob").index.label_0) == {0.5}
  vote.main([str(folder), f"--export={tmp_path / 'soft'}", "--labels=soft"])
  assert set(sources.open_pairs_file(tmp_path / "soft").index.label_0) <= {0.25, 0.75}
  vote.main([str(folder), f"--export={tmp_path / 'tfds'}", "--export_format=tfds"])
  assert len(sources.open_tfds(tmp_path / "tfds")) == 6


def test_the_summary_is_json(folder, capsys):
  judged(folder)
  vote.main([str(folder), "--summary"])
  found = json.loads(capsys.readouterr().out)
  assert found["judged"] == 5 and found["voters"][0]["name"] == "Ada"


def test_a_round_alone_and_all_rounds(tmp_path, capsys):
  folder = tmp_path / "taste"
  made.make_pairs(folder / "round_0", 3)
  made.make_pairs(folder / "round_1", 4, first=3)
  judged(folder, count=7)
  for option, number in (([], 7), (["--round=1"], 4)):
    vote.main([str(folder), f"--export={tmp_path / f'out{number}'}", *option])
    assert f"{number} pairs" in capsys.readouterr().out


def test_demo_draws_once_and_serves(tmp_path, monkeypatch, served):
  calls = []

  def draw(args, quiet):
    calls.append((args.out, args.model, args.num_prompts, quiet))
    made.make_pairs(args.out, 4)
    (args.out / pairs.PICTURES).write_text("")

  monkeypatch.setattr(pairs, "make_pairs", draw)
  monkeypatch.chdir(tmp_path)
  (tmp_path / vote.DEMO).mkdir()
  (tmp_path / vote.DEMO / pairs.PICTURES).write_text("")  # drawing was stopped before the last file
  for _ in range(2):
    vote.main(["--demo", f"--port={free_port()}"])
  assert calls == [(vote.pathlib.Path(vote.DEMO), "tiny-sd", 24, True)] and len(served) == 2


def test_a_missing_package_is_one_sentence(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  assert "pip install 'jaxpref[web]'" in refused(folder)


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "expected one of PAIRS, --demo and --models, found none of them"),
    (["--demo", "x"], "found PAIRS and --demo"),
    (["nothing"], "there is no file or folder nothing"),
    (["x", "--overlap=2"], "--overlap=2.0; expected 0 to 1"),
    (["x", "--overlap=nan"], "--overlap=nan; expected 0 to 1"),
    (["x", "--port=0"], "--port=0; expected 1 to 65535"),
    (["x", "--order_seed=-1"], "--order_seed=-1"),
    (["x", "--active=pikscore"], "--active=pikscore; expected one of pickscore"),
    (["x", "--labels=soft"], "--labels is for --export"),
    (["x", "--export=y", "--labels=voter"], "--labels=voter and --voter=NAME belong together"),
    (["x", "--export=y", "--voter=Ada"], "--labels=voter and --voter=NAME belong together"),
    (["x", "--prompts=emoji"], "--prompts is for --models"),
    (["x", "--export=y"], "there is no file or folder x."),
    ([".", "--export=y"], "has no votes.sqlite, so nobody has voted there yet; vote first."),
    (["--demo", "--export=y"], "--export and --summary take a folder that has votes"),
    (["--demo", "--round=1"], "--round=1 is for a folder of rounds"),
    (["--models", "a=tiny-sd", "b=tiny-sd"], "--out is missing"),
    (["--models", "a=tiny-sd", "b=tiny-sd", "--out=o"], "--prompts is missing; name what the models draw"),
    (["--models", "a=tiny-sd", "--out=o", "--prompts=emoji"], "--models names 1 models; expected two"),
    (["--models", "a=tiny-sd", "b=zeros:sd15-miniature", "--out=o", "--prompts=emoji"], "compare models of one size"),
  ],
  ids=str,
)
def test_what_cannot_work_is_one_sentence(tmp_path, monkeypatch, arguments, sentence):
  monkeypatch.chdir(tmp_path)
  code = refused(*arguments)
  assert sentence in code and code.startswith("error: ") and code.count("\n") == 0
  assert not (tmp_path / "o").exists()


def test_an_old_file_of_votes_is_refused(folder, served):
  judged(folder)
  import sqlite3

  with sqlite3.connect(folder / store.NAME) as other:
    other.execute("PRAGMA user_version = 99")
  assert "has format 99, this version of jaxpref reads 1" in refused(folder)


def test_a_moved_picture_is_named_before_anything_is_served(folder, served):
  (folder / "images" / "3_1.png").unlink()
  assert "image_1 = 'images/3_1.png' does not exist" in refused(folder) and served == []


def test_ctrl_c_keeps_the_votes(folder, monkeypatch, capsys):
  def interrupted(app, listening):
    raise KeyboardInterrupt

  monkeypatch.setattr(server, "run", interrupted)
  assert refused(folder, f"--port={free_port()}") == 130
  assert "all votes are kept; the same command continues" in capsys.readouterr().err
  assert not list(folder.glob(f"*{lease.NAME}"))


def test_active_learns_from_embeddings(folder, monkeypatch):
  judged(folder)
  monkeypatch.setattr(vote.active, "LEAST_VOTES", 3)
  embed = lambda images: np.asarray([[image.mean() / 255, 1.0] for image in images])
  asked = []
  monkeypatch.setattr(vote.published, "image_embedder", lambda spec: asked.append(spec) or embed)
  learners = []
  made_by = vote.active.Learner

  def learner(ballot, embed):
    learners.append((ballot, made_by(ballot, embed)))
    return learners[-1][1]

  def run(app, listening):
    deadline = time.monotonic() + 20
    while learners[0][0].probability is None and time.monotonic() < deadline:
      time.sleep(0.05)

  monkeypatch.setattr(vote.active, "Learner", learner)
  monkeypatch.setattr(server, "run", run)
  vote.main([str(folder), "--active=tiny-clip", f"--port={free_port()}"])
  ((ballot, learnt),) = learners
  assert asked == ["tiny-clip"] and np.isfinite(ballot.probability).all() and not learnt.thread.is_alive()
