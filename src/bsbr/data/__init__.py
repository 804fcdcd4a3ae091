"""Text, tokenizers and token streams; knows nothing of models."""
