"""BSBR in transformers: importing this registers the attention "bsbr" and the model types "bsbr-<family>"."""

from bsbr.hf.cache import BSBRCache
from bsbr.hf.convert import convert, revert
from bsbr.hf.loading import load_model, load_tokenizer
from bsbr.hf.modeling import BSBRModelMixin, attention_modules, derive
from bsbr.hf.positions import check_length, extend_positions, max_positions
from bsbr.hf.scratch import build_model, count_parameters, match_parameters

__all__ = [
    "BSBRCache",
    "BSBRModelMixin",
    "attention_modules",
    "build_model",
    "check_length",
    "convert",
    "count_parameters",
    "derive",
    "extend_positions",
    "load_model",
    "load_tokenizer",
    "match_parameters",
    "max_positions",
    "revert",
]
