"""The table of training steps on slices: which rows there are, and what is written of those that are not done."""

import json

from scripts.bench import scaling

REPORT = {
  "arguments": {"trained": 2**30, "batch": 2**30},
  "temporaries": 2**29,
  "peak": 5 * 2**29,
  "flop": 2e12,
  "memory_bytes": 3 * 2**30,
  "collectives": {"all-reduce": {"bytes": 2**28, "count": 3}},
  "least_seconds": {"compute": 0.5, "memory": 0.25, "interconnect": 0.125},
  "bound": "compute",
  "fits": True,
  "topology": "v5e:4x4",
  "command": "python -m jaxpref.compile --config=x",
  "compile_seconds": 61.2,
}


def test_rows_keep_the_batch_of_a_chip():
  rows = scaling.rows()
  assert len(rows) == len({r.key for r in rows}) == 24
  for row in rows:
    chips = scaling.SLICES[row.slice][1]
    fields = dict(a.removeprefix("--config.").split("=") for a in row.arguments())
    batch, accumulation = scaling.BATCH[row.case.split()[0], row.size]
    assert int(fields["batch_size"]) == batch * chips and batch % accumulation == 0
    assert chips % row.fsdp == 0
    assert row.fsdp == (min(chips, 64) if row.case.endswith("full") else 16 if "spo LoRA sdxl v5e" in row.key else 1)


def test_what_is_not_compiled_is_said(tmp_path):
  done, partly = scaling.rows()[:2]
  reports = {done.key: REPORT, partly.key: {"arguments": {"trained": 2**31, "batch": 0}}}
  text = scaling.markdown(reports)
  assert "| 2.00 | 0.5 | 2.50 | 2 | 3 | 0.25 | 0.5 | compute | 61 |" in text
  assert "| 2.00 | not compiled |" in text
  assert text.count("| not compiled |") == 23 + 11  # in the first table and of those on v5e-16 and v5e-256
  missing = next(line for line in text.splitlines() if line.startswith("Not compiled yet"))
  assert missing.count(" on ") == 23


def test_rows_that_are_done_are_skipped(tmp_path, monkeypatch):
  done, other = scaling.rows()[:2]
  (tmp_path / "scaling.json").write_text(json.dumps({done.key: REPORT}))
  compiled = []

  def compile_row(row, *, deadline):
    compiled.append(row)
    if len(compiled) > 1:
      raise TimeoutError("too late")
    return REPORT

  monkeypatch.setattr(scaling, "compile_row", compile_row)
  scaling.main(["--docs", str(tmp_path)])
  assert compiled[0] == other and len(compiled) == 2
  assert set(json.loads((tmp_path / "scaling.json").read_text())) == {done.key, other.key}
