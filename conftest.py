"""Where triton is not installed, the files of kernels cannot be imported to search them for examples."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["src/bsbr/ops/triton/*.py"]
