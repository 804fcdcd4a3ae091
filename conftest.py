"""Where an optional package is not installed, files that need it cannot be imported to search them for examples."""

import importlib.util

_NEEDS = {"triton": "src/bsbr/ops/triton/*.py", "lm_eval": "src/bsbr/evaluation/harness.py"}

collect_ignore_glob = [files for package, files in _NEEDS.items() if importlib.util.find_spec(package) is None]
