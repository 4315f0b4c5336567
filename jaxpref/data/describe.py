"""`python -m jaxpref.data.describe` is `python -m jaxpref.describe`."""

import runpy

if __name__ == "__main__":
  runpy.run_module("jaxpref.describe", run_name="__main__")
