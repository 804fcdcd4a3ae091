"""Prefill equals decode in every tested family: chunks of every size, and decoding from every block edge.

`python -m benchmarks.families` writes benchmarks/results/families.json. Tiny random models, float32, blocks of 8.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tests.hf.coverage import NAMES
from tests.hf.families import VOCABULARY, build
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.files import write_json
from bsbr.hf import BSBRCache, convert

BLOCK, TOKENS = 8, 300
CONFIG = BSBRConfig(dense_below=0, block_size=BLOCK, top_k=2)
CHUNKS = (1, 2, 3, 7, BLOCK + 1, BLOCK)


@torch.no_grad()
def measure(family: str) -> dict[str, Any]:
    """Compare one forward pass over a text with the same text in parts.

    Args:
        family: transformers' model type.
    Returns:
        How many logits were compared, how many next tokens changed, and the largest difference of a logit.
    """
    model = convert(build(family), CONFIG)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    whole: Tensor = model(ids, use_cache=False).logits
    compared, changed, largest = 0, 0, 0.0

    def compare(found: Tensor, start: int) -> None:
        nonlocal compared, changed, largest
        expected = whole[:, start : start + found.shape[1]]
        compared += found.shape[1]
        changed += int((found.argmax(-1) != expected.argmax(-1)).sum())
        largest = max(largest, float((found - expected).abs().max()))

    for size in CHUNKS:
        cache = BSBRCache(model.config)
        for start in range(0, TOKENS, size):
            compare(model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits, start)
    for split in sorted({edge + step for edge in range(BLOCK, TOKENS, BLOCK) for step in (-1, 0, 1)}):
        cache = BSBRCache(model.config)
        compare(model(ids[:, :split], past_key_values=cache, use_cache=True).logits, 0)
        size = CHUNKS[split % len(CHUNKS)]
        compare(model(ids[:, split : split + size], past_key_values=cache, use_cache=True).logits, split)
    return {"family": family, "positions": compared, "next_tokens_changed": changed, "largest_difference": largest}


def main() -> None:
    """Measure every family and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/families.json"))
    options = parser.parse_args()
    rows = []
    for family in NAMES:
        rows.append(measure(family))
        Console().print(rows[-1])
    write_json(
        options.output,
        {
            "schema": {"name": "bsbr.benchmarks.families", "version": 1},
            "command": [without_folders(word) for word in sys.argv],
            "code": code_versions(),
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
            "model": "two layers, random weights, one for each family",
            "config": CONFIG.to_dict(),
            "protocol": f"{TOKENS} tokens in parts of {CHUNKS} tokens, and split at every block edge and beside it",
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
