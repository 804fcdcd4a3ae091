"""Where triton is not installed, the files that import it cannot be searched for examples."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("src/bsbr/ops/triton/[!p_]*.py")
    collect_ignore_glob.append("src/bsbr/ops/triton/pairs.py")
