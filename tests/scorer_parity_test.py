"""BERT's vocabulary, which the comparison of scorers takes from another package, is the published one or refused."""

import hashlib
import json

import pytest

from scripts.parity import scorer_parity


def test_beginnings_of_words_become_continuations_marked(tmp_path, monkeypatch):
  file = tmp_path / "vocab.json"
  file.write_text(json.dumps(["[PAD]", "\u2581", "[UNK]", "\u2581the", "ing", "\u2581[", "["]))
  expected = "[PAD]\n[unused0]\n[UNK]\nthe\n##ing\n[\n##[\n"
  found = hashlib.sha256(expected.encode()).hexdigest()
  with pytest.raises(ValueError, match=f"by it has SHA-256 {found}, expected 07eced37"):
    scorer_parity.bert_vocabulary(file)
  monkeypatch.setattr(scorer_parity, "BERT_SHA256", found)
  assert scorer_parity.bert_vocabulary(file) == expected
