"""Lengths around which an index overflows: sampled rows against the float64 reference, a needle in each one's past.

python -m tests.long.lengths
"""

import time
from typing import Any

import torch
from benchmarks.reliability import record

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from bsbr.ops.native.forward import why_not_native
from tests.long.journal import arguments, machines, matching, run_all
from tests.ops.needles import draw_text, row_ratio, rows_to_check

LENGTHS = (46_340, 46_341, 65_536, 65_537, 131_073)
CONFIGS = {
    "sparse": BSBRConfig(dense_below=0, block_size=128, top_k=4),
    "units": BSBRConfig(dense_below=0, block_size=256, retrieval_block_size=64, top_k=8, far="mean"),
    "drop": BSBRConfig(dense_below=3000, block_size=128, top_k=4, far="drop"),
}
CONTENDERS = {
    "chunked float32": ("chunked", torch.float32),
    "native float32": ("native", torch.float32),
    "chunked bfloat16": ("chunked", torch.bfloat16),
}


def one(key: str) -> dict[str, Any]:
    """One length, setting and backend: the largest ratio to the bound over sampled rows."""
    length, name, contender = key.split(" / ")
    tokens, config, (backend, dtype) = int(length), CONFIGS[name], CONTENDERS[contender]
    rows = rows_to_check(tokens, config.block_size, (tokens, 32 * tokens, tokens // config.unit), 32, tokens)
    text = draw_text(tokens, 2, 1, 16, config, rows, dtype, seed=tokens)
    if backend == "native" and why_not_native(text.q, config):
        return {"rows": 0, "ratio": 0.0}
    with torch.no_grad():
        sparse = text.chosen.clamp(min=0)  # rows with fewer past blocks read all of them and look at no choice
        o = bsbr_attention(text.q, text.k, text.v, config, block_indices=sparse, backend=backend)
    ratios = {row: max(row_ratio(text, row, head, config, o) for head in (0, 1)) for row in rows}
    worst = max(ratios, key=lambda row: ratios[row])
    return {"rows": 2 * len(rows), "ratio": ratios[worst], "row": worst}


def main() -> int:
    """Run all lengths and write the result."""
    args, command = arguments(__doc__, "tests.long.lengths")
    start = time.perf_counter()
    keys = [f"{length} / {name} / {contender}" for length in LENGTHS for name in CONFIGS for contender in CONTENDERS]
    rows = run_all("lengths", matching(keys, args.only), one)
    worst = max(rows.values(), key=lambda row: row["ratio"])
    beyond = {key: row for key, row in rows.items() if row["ratio"] > 1}
    record(
        "lengths",
        section="Numerics",
        claim="Around the lengths at which an index of 32 bits would overflow, outputs stay within the forward-error "
        "bound.",
        cases=sum(row["rows"] for row in rows.values()),
        failures=len(beyond),
        measured=f"worst ratio to the bound {worst['ratio']:.3f}",
        command=command,
        conditions=f"{machines(rows)}; {', '.join(f'{length:,}' for length in LENGTHS)} tokens, 2 query heads and "
        f"1 key head, 16 "
        f"wide; {', '.join(CONTENDERS)}; sampled rows, each with a key along its query and values of 30 in a block "
        f"it reads",
        not_covered=["Longer texts on a CPU; rows that were not sampled."],
        seed=0,
        seconds=time.perf_counter() - start,
        details={"ratios": rows, "beyond": beyond},
    )
    print(f"lengths: worst ratio {worst['ratio']:.3f}, {len(beyond)} beyond the bound of {len(rows)} runs")
    return int(bool(beyond))


if __name__ == "__main__":
    raise SystemExit(main())
