"""Values that no model can have, field by field."""

import json
from pathlib import Path

HUGE = "9" * 5000
VALUES: dict[str, str] = {
    "0": "0",
    "-1": "-1",
    "1e9": "1e9",
    "2^31": str(2**31),
    "2^63": str(2**63),
    "NaN": "NaN",
    "Infinity": "Infinity",
    "text": '"8"',
    "null": "null",
    "list": "[]",
    "object": "{}",
    "true": "true",
    "1e-400": "1e-400",
    "5,000 digits": HUGE,
    "10 MB of text": json.dumps("x" * 10_000_000),
}
"""Name to how it stands in a JSON file."""

FIELDS = {
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"),
    "llama": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "rms_norm_eps"),
    "bsbr-gpt2": ("n_embd", "n_layer", "n_positions", "bsbr.block_size", "bsbr.top_k", "bsbr.retrieval_block_size",
                  "bsbr.dense_below", "bsbr.far"),
}  # fmt: skip
"""Model type to fields that take sizes, or the settings of the attention."""


def with_value(config: Path, field: str, value: str) -> None:
    """Put a value into a config.json, as it is written.

    Args:
        config: the file.
        field: its name; "bsbr.x" is x of the object "bsbr".
        value: JSON, or what is none.
    """
    content = json.loads(config.read_text())
    part = content
    *parents, name = field.split(".")
    for parent in parents:
        part = part[parent]
    part[name] = "@@@"
    config.write_text(json.dumps(content).replace('"@@@"', value))
