"""Tests of jaxpref."""

# Of XLA. Compilation dominates the tests: code is not optimised, and without MLIR's emitters a third faster to make.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
