"""Block sparse attention with block retrieval, for new models and for Hugging Face causal language models."""

from bsbr.config import BSBRConfig

__all__ = ["BSBRConfig"]
__version__ = "0.1.0"
