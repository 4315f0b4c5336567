"""Align text-to-image diffusion models with preferences, in JAX.

The package itself imports nothing. Import the module you need: `from jaxpref import losses`.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m jaxpref.COMMAND`, whose libraries take seconds to import; no other program
  from jaxpref.devices import endings

  if endings.is_command(sys.argv, sys.orig_argv):
    endings.begin()
