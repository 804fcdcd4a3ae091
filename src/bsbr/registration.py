"""Entering our model types in transformers' tables without importing transformers.

`AutoModelForCausalLM.from_pretrained` must know the types "bsbr-<family>" once bsbr is imported, in whichever order
the two were; but `import bsbr` alone must stay light, and transformers has no entry points.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.models.auto.modeling_auto"
"""The module of transformers that every way to an AutoModel imports."""


def register_with_transformers() -> None:
    """Import `bsbr.hf`, which registers, now if transformers' table is loaded, else right after it is."""
    if _TABLE in sys.modules:
        importlib.import_module("bsbr.hf")
    else:
        sys.meta_path.insert(0, _AfterTable())


class _AfterTable(MetaPathFinder):
    """Finds nothing itself; lets the table be imported as ever and has `bsbr.hf` imported after it, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("bsbr.hf")

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec
