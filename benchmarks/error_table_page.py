"""The page of error tables, docs/error_table.md, made of committed result files.

python -m benchmarks.error_table_page benchmarks/results/error_table_*.json --output docs/error_table.md
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsbr.files import write_atomic

INTRODUCTION = """# What each summary of a block gets wrong

Every past block that a query does not read is one entry of the softmax, made of a summary. These tables say how far the
attention is then from exact attention, on real queries and keys of two models, held-out books, for every summary that
was tried, at the bytes it keeps ([how it is measured](evaluation.md#the-sweep)). Each cell holds two means over heads:

- the relative error of the attention output, |o - exact| / |exact| over the sampled queries;
- the error of a past block's log-mass in nats, root mean square, blocks weighted by their true share of the past.

All rows read the same number of keys exactly. *Calibrated* rows have their five scalars fitted to every other query and
are measured on the rest; `top_k` is the same for all heads here. Bytes are those of float32 summaries for one key head
and token; keys and values themselves are 256 in bfloat16. A state kept once for all blocks is not counted. Kinds of
heads: *sink-like* puts over 0.4 of its weight on the first token, *local* over 0.6 inside its own block; of the others
*peaked* reads fewer than 64 keys (exponential of the entropy), *broad* more. The tables before rotary positions are of
another attention, which has no sense of distance and therefore spreads over the whole past.
"""

WORDS = {
    "kept": "queries and keys as they are attended",
    "undone": "queries and keys before rotary positions are put on them",
}


def page(files: Sequence[dict[str, Any]]) -> str:
    """Return the whole page.

    Args:
        files: contents of the result files.
    Returns:
        Markdown.
    """
    return "\n".join([INTRODUCTION, *(section(file) for file in files)])


def section(file: dict[str, Any]) -> str:
    """Return the tables of one model: by kind of head and by layer, with and without rotary positions."""
    protocol, name = file["protocol"], file["model"]["name"]
    windows = f"{protocol['windows']} window{'s' if protocol['windows'] > 1 else ''} of {protocol['length']:,} tokens"
    blocks = f"`top_k` {protocol['top_k']} of {protocol['block_size']}"
    lines = [f"## {name}: {windows}, {blocks}", "", f"[Result file](../benchmarks/results/error_table_{name}.json)."]
    for rotation in dict.fromkeys(row["rotation"] for row in file["rows"]):
        mine = [row for row in file["rows"] if row["rotation"] == rotation]
        kinds = [name for name in ("local", "peaked", "broad", "sink-like") if any(r["kind"] == name for r in mine)]
        lines += ["", f"### By kind of head, {WORDS[rotation]}", "", *_table(mine, "kind", kinds)]
        lines += ["", f"### By layer, {WORDS[rotation]}", ""]
        lines += _table(mine, "layer", sorted({row["layer"] for row in mine}))
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], key: str, values: Sequence[Any]) -> list[str]:
    heads = {value: len({(r["layer"], r["head"]) for r in rows if r[key] == value}) for value in values}
    columns = [f"{value} ({heads[value]})" if key == "kind" else f"layer {value}" for value in values]
    columns = ["summary", "calibrated", "bytes per token", f"all ({sum(heads.values())})", *columns]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:" + "|---:" * (len(columns) - 3) + "|"]
    for name, fitted in dict.fromkeys((row["summary"], row["calibrated"]) for row in rows):
        mine = [row for row in rows if (row["summary"], row["calibrated"]) == (name, fitted)]
        cells = []
        for part in (mine, *([row for row in mine if row[key] == value] for value in values)):
            output, mass = (sum(row[m] for row in part) / len(part) for m in ("output_error", "mass_error"))
            cells.append(f"{output:.3f} / {mass:.2f}")
        lines.append(f"| {name} | {fitted} | {mine[0]['bytes_per_token']:.0f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what benchmarks.error_table wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_atomic(args.output, page([json.loads(file.read_text()) for file in args.files]))


if __name__ == "__main__":
    main()
