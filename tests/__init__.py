"""Tests of jaxpref."""

import importlib.metadata

# Of XLA. Compilation dominates the tests: code is not optimised, and without MLIR's emitters a third faster to make.
QUICK_FLAGS = "--xla_backend_optimization_level=0"
# XLA ends a process that gives it a flag it does not know; jaxlib 0.12.0.1 has dropped this one.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:4])) < (0, 12, 0, 1):
  QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
