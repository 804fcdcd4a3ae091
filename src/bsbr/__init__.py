"""Block sparse attention with block retrieval, for new models and for Hugging Face causal language models.

Importing this imports neither torch nor transformers. It sees to it that converted models load: as soon as
transformers' table of models is there, the types "bsbr-<family>" are entered in it (`bsbr.registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bsbr import registration
from bsbr.config import BSBRConfig

if TYPE_CHECKING:
    from bsbr.hf.convert import convert, revert
    from bsbr.ops import bsbr_attention
    from bsbr.training.calibrate import calibrate
    from bsbr.training.finetune import finetune
    from bsbr.training.finetune_recipe import FinetuneConfig

__all__ = ["BSBRConfig", "FinetuneConfig", "bsbr_attention", "calibrate", "convert", "finetune", "revert"]
__version__ = "0.1.0"

_LAZY = {
    "FinetuneConfig": "bsbr.training.finetune_recipe",
    "bsbr_attention": "bsbr.ops",
    "calibrate": "bsbr.training.calibrate",
    "convert": "bsbr.hf.convert",
    "finetune": "bsbr.training.finetune",
    "revert": "bsbr.hf.convert",
}
"""Where to find what is imported only when asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bsbr' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


registration.register_with_transformers()
