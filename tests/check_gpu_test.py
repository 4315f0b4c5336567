"""The check that comes before an accelerator is timed sees attention that is wrong, or that fails."""

import pytest

from jaxpref.models import attention
from scripts import check_gpu


@pytest.mark.parametrize("size", check_gpu.SMALL)
def test_right_wrong_and_failing_attention(size, monkeypatch):
  right = check_gpu.measure(size, "xla")
  assert 0 < right["difference"] < check_gpu.BOUND and right["seconds"] > 0
  compute = attention.attention

  def wrong(q, k, v, *, implementation):
    if implementation == "cudnn":
      raise RuntimeError("no engine for this size\nand more")
    return compute(q, k, v, implementation=implementation) * (1.0 if implementation == "chunked" else 1.05)

  monkeypatch.setattr(attention, "attention", wrong)
  assert check_gpu.measure(size, None)["difference"] > check_gpu.BOUND
  failed = check_gpu.measure(size, "cudnn")
  assert failed["error"] == "RuntimeError: no engine for this size"
  assert "| cudnn | RuntimeError: no engine for this size | |" in check_gpu.table([right, failed])


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(check_gpu, "PACKAGES", ("json", "not_there"))
  assert check_gpu.missing() == ["not_there (No module named 'not_there')"]
