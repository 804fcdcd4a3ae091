"""What must change nothing in any tested family: how a text is cut, padding, neighbours, and the cache of `generate`.

`python -m benchmarks.families` writes benchmarks/results/families.json. Tiny random models, float32, blocks of 8.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tests.hf.coverage import NAMES
from tests.hf.families import VOCABULARY, build
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.family_texts import KINDS, compare_texts
from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, cpu_name
from bsbr.files import write_json
from bsbr.hf import BSBRCache, convert

BLOCK, TOKENS = 8, 300
CONFIG = BSBRConfig(dense_below=0, block_size=BLOCK, top_k=2)
CHUNKS = (1, 2, 3, 7, BLOCK + 1, BLOCK)
WIDTHS = tuple(range(2 * BLOCK + 4))
"""Tokens of left padding."""

ROWS = 8
PADDED = 5 * BLOCK + 3
"""Tokens of a text that is padded or put among others."""


class Comparison:
    """Counts of logits compared, of next tokens that changed, and the largest difference."""

    def __init__(self) -> None:
        self.positions, self.changed, self.largest = 0, 0, 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Compare logits [..., vocabulary] of the same positions."""
        self.positions += found[..., 0].numel()
        self.changed += int((found.argmax(-1) != expected.argmax(-1)).sum())
        self.largest = max(self.largest, float((found - expected).abs().max()))

    def row(self) -> dict[str, Any]:
        """Return the three figures."""
        return {
            "positions": self.positions,
            "next_tokens_changed": self.changed,
            "largest_difference": self.largest,
        }


def draw(rows: int, length: int, seed: int = 0) -> Tensor:
    """Draw token ids, none of them special, [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: PreTrainedModel, ids: Tensor, mask: Tensor, stops: list[int]) -> Tensor:
    """Logits of padded rows that are read in parts with a BSBRCache.

    Args:
        model: a converted model.
        ids: [B, T]; mask: [B, T], 0 for padding.
        stops: where each part ends.
    Returns:
        [B, T, vocabulary].
    """
    cache, place, parts, start = BSBRCache(model.config), positions(mask), [], 0
    for stop in stops:
        call = {"attention_mask": mask[:, :stop], "position_ids": place[:, start:stop]}
        parts.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **call).logits)
        start = stop
    return torch.cat(parts, 1)


def positions(mask: Tensor) -> Tensor:
    """Return the position of each token among those of its row that are none of padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def compare_parts(model: PreTrainedModel) -> Comparison:
    """Compare one forward pass over a text with the same text in parts of every size and from every block edge."""
    ids, found = draw(1, TOKENS), Comparison()
    whole: Tensor = model(ids, use_cache=False).logits
    for size in CHUNKS:
        cache = BSBRCache(model.config)
        for start in range(0, TOKENS, size):
            part = model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits
            found.add(part, whole[:, start : start + size])
    for split in sorted({edge + step for edge in range(BLOCK, TOKENS, BLOCK) for step in (-1, 0, 1)}):
        cache = BSBRCache(model.config)
        found.add(model(ids[:, :split], past_key_values=cache, use_cache=True).logits, whole[:, :split])
        stop = split + CHUNKS[split % len(CHUNKS)]
        part = model(ids[:, split:stop], past_key_values=cache, use_cache=True).logits
        found.add(part, whole[:, split:stop])
    return found


def compare_padding(model: PreTrainedModel) -> Comparison:
    """Compare a text alone with the same behind padding of every width, at once and in parts from a cache."""
    found = Comparison()
    for width in WIDTHS:
        ids = draw(1, width + PADDED, seed=width)
        mask = torch.ones_like(ids)
        mask[:, :width] = 0
        alone = model(ids[:, width:], use_cache=False).logits
        together = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        found.add(together[:, width:], alone)
        length = ids.shape[1]
        parts = read(model, ids, mask, [11, length - 20, *range(length - 19, length - 8), length])
        found.add(parts[:, width:], alone)
    return found


def compare_neighbours(model: PreTrainedModel) -> Comparison:
    """Compare each of 8 random texts of different lengths alone with the same in one left-padded batch."""
    found, ids = Comparison(), draw(ROWS, PADDED + 20)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, : 5 * row % 23] = 0
    together = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    length = ids.shape[1]
    decoded = read(model, ids, mask, [length - 20, *range(length - 19, length + 1)])
    for row in range(ROWS):
        real = mask[row].bool()
        alone = model(ids[row, real][None], use_cache=False).logits[0]
        found.add(together[row, real], alone)
        found.add(decoded[row, real], alone)
    return found


@torch.no_grad()
def measure(family: str) -> dict[str, Any]:
    """Make every comparison for one family.

    Args:
        family: transformers' model type.
    Returns:
        The figures of each comparison.
    """
    model = convert(build(family), CONFIG)
    return {
        "family": family,
        "parts": compare_parts(model).row(),
        "left_padding": compare_padding(model).row(),
        "batch": compare_neighbours(model).row(),
        "texts": compare_texts(family, CONFIG),
    }


def main() -> None:
    """Measure the families and write one JSON file after each; go on where the same code has left one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--families", nargs="+", choices=list(NAMES), default=list(NAMES), help="which, this time")
    options = parser.parse_args()
    rows = earlier_rows(options.output)
    for family in options.families:
        if family not in rows:
            rows[family] = measure(family)
            Console().print(rows[family])
            write_json(options.output, result(rows))


def earlier_rows(file: Path) -> dict[str, Any]:
    """Return the rows of a result file by family, if this very code made it."""
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    return {row["family"]: row for row in found["rows"]} if found.get("code") == code_versions() else {}


def result(rows: dict[str, Any]) -> dict[str, Any]:
    """Put the conditions before the rows."""
    return {
        "schema": {"name": "bsbr.benchmarks.families", "version": 2},
        "status": "complete" if set(rows) == set(NAMES) else "partial",
        "command": ["python", "-m", "benchmarks.families"],
        "code": code_versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
        "model": "two layers, random weights, one for each family",
        "config": CONFIG.to_dict(),
        "protocol": {
            "parts": f"{TOKENS} tokens in parts of {CHUNKS} tokens, and split at every block edge and beside it",
            "left_padding": f"{PADDED} tokens behind {WIDTHS[0]} to {WIDTHS[-1]} tokens of random padding against the "
            "text alone, every position, in one forward pass and in parts from a cache, some of one token",
            "batch": f"{ROWS} random texts in one left-padded batch against each alone, every position, in one forward "
            "pass, and with the last 20 tokens decoded one by one",
            "texts": KINDS,
        },
        "rows": [rows[family] for family in NAMES if family in rows],
    }


if __name__ == "__main__":
    main()
