"""The kernels on a GPU: bits of causality, poison, random shapes, and texts beyond 2^31 elements, in three dtypes.

python -m tests.long.gpu             # all of it, one process for each dtype
"""

import argparse
import math
import os
import random
import subprocess
import sys
import time
from typing import Any

import torch
from benchmarks.reliability import record
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import device_name
from bsbr.ops import bsbr_attention, reference_attention
from bsbr.ops.schedule import dense_until
from tests.long.causality import changed
from tests.long.journal import run_all
from tests.ops.cases import Case, error_bound
from tests.ops.choices import choices
from tests.ops.needles import draw_text, row_ratio, rows_to_check
from tests.ops.poison import filled_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = {
    "moments": BSBRConfig(dense_below=0, block_size=64, top_k=2),
    "units": BSBRConfig(dense_below=100, block_size=64, retrieval_block_size=16, top_k=4),
    "mean": BSBRConfig(dense_below=0, block_size=32, top_k=2, far="mean"),
    "drop": BSBRConfig(dense_below=0, block_size=32, top_k=2, far="drop"),
    "states": BSBRConfig(dense_below=0, block_size=32, top_k=0),
    "heads": BSBRConfig(dense_below=0, block_size=32, top_k=4, top_k_per_head=(4, 3)),
}
TOKENS, ROWS, WIDTH = 512, 128, 64
LONG = BSBRConfig(dense_below=0, block_size=128, top_k=4)
LENGTHS = (46_340, 46_341, 65_536, 65_537, 131_073)
HUGE = 2**20 + 1
"""With 32 heads of 64, more than 2^31 elements in each of q, k, v, o and their gradients."""

GRADIENT_ERRORS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Largest relative error of a gradient, in norm."""


def draw(rows: int, tokens: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> list[Tensor]:
    """Random q, k and v: four query heads, two key heads."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = [(rows, tokens, heads, WIDTH) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes)
    return [x.to(dtype) for x in (q * spread, k * spread, v)]


def attend(q: Tensor, k: Tensor, v: Tensor, config: BSBRConfig, **options: Any) -> Any:
    """Run the kernels."""
    return bsbr_attention(q, k, v, config, backend="triton", **options)


def causality(key: str) -> dict[str, Any]:
    """Change every token of a text, as `tests.long.causality` does."""
    name, kind, how = key.split(" / ")
    config, tensors = CONFIGS[kind], draw(1, TOKENS, DTYPES[name], 0)
    row = {"pairs": 0, "wrong": 0}
    plain = torch.tensor([[0.0, 1, 1, 1, 1]], device=DEVICE).expand(4, 5).contiguous()
    for first in range(0, TOKENS, ROWS):
        tokens = range(first, first + ROWS)
        same = [x.repeat(ROWS, 1, 1, 1) for x in tensors]
        moved = [changed(x, tokens, how) for x in tensors]
        differs = (attend(*same, config) != attend(*moved, config)).flatten(2).any(-1)
        own = torch.tensor(list(tokens), device=DEVICE)[:, None]
        position = torch.arange(TOKENS, device=DEVICE)
        row["pairs"] += sum(tokens)
        row["wrong"] += int((differs & (position < own)).sum()) + int((~differs & (position == own)).sum())
        if config.top_k:
            chosen = [choices("triton", *x, config, plain) for x in (same, moved)]
            other = (chosen[0] != chosen[1]).flatten(2).any(-1)
            row["wrong"] += int((other & (position[TOKENS - other.shape[1] :] < own)).sum())
    return row


def poison(key: str) -> dict[str, Any]:
    """What is no number, in padding, in values nobody reads, in later blocks and in fresh memory."""
    name, kind, seed = key.split(" / ")
    config, choose, dtype = CONFIGS[kind], random.Random(key), DTYPES[name]
    q, k, v = draw(2, 300, dtype, int(seed))
    fill = choose.choice([torch.nan, torch.inf, -torch.inf])
    lengths = torch.tensor([choose.randint(0, 300), choose.choice([0, 1, 300])], device=DEVICE)
    padded = (torch.arange(300, device=DEVICE) >= lengths[:, None])[..., None, None]
    found = []
    for value in (0.0, fill):
        leaves = [x.masked_fill(padded, value).requires_grad_(kind == "moments") for x in (q, k, v)]
        o, lse = attend(*leaves, config, lengths=lengths, return_lse=True)
        # kernels of one setting, since each setting's are compiled anew
        gradients = torch.autograd.grad(o.float().sum(), leaves) if kind == "moments" else ()
        found.append((o, lse, all(bool(x.isfinite().all()) for x in gradients)))
    wrong = [not (torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]) and found[1][2])]
    clean = attend(q, k, v, config)
    at = choose.randrange(300)
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[:, at] = fill
    before = at // config.block_size * config.block_size
    dense = dense_until(config)
    o = attend(q, *bad, config)
    wrong.append(at >= dense and not torch.equal(o[:, :before], clean[:, :before]))
    with filled_memory(), torch.no_grad():  # gradients have no fixed order, and are refused where one is asked for
        wrong.append(not torch.equal(attend(q, k, v, config), clean))
    return {"slots": int(padded.sum()) + 1, "wrong": sum(wrong)}


def shapes(key: str) -> dict[str, Any]:
    """A random length, start and magnitude against the float64 reference."""
    name, kind, seed = key.split(" / ")
    config, choose, dtype = CONFIGS[kind], random.Random(key), DTYPES[name]
    tokens = max(1, choose.choice([config.block_size * choose.randint(1, 12) + step for step in (-1, 0, 1)]))
    q, k, v = draw(choose.choice([1, 3]), tokens, dtype, int(seed), math.exp(choose.uniform(-7, 3.4)) ** 0.5)
    plain = torch.tensor([[0.0, 1, 1, 1, 1]], dtype=torch.float64, device=DEVICE).repeat(4, 1)
    calibration = plain * (1 + 0.2 * choose.random())
    case = Case(int(seed), config, q.double(), k.double(), v.double(), calibration, 0, None)
    expected, _, chosen = reference_attention(q, k, v, config, calibration=calibration)
    o = attend(q, k, v, config, calibration=calibration.float(), block_indices=chosen)
    ratio = ((o.double() - expected).abs() / error_bound(case, q, k, v, chosen)).nan_to_num(nan=math.inf)
    return {"ratio": float(ratio.max())}


def long_text(key: str) -> dict[str, Any]:
    """Outputs of sampled rows, with a needle in each one's past; and gradients of a loss on these rows alone."""
    name, tokens = key.split(" / ")[0], int(key.split(" / ")[1])
    dtype, huge = DTYPES[name], tokens == HUGE
    heads, key_heads = (32, 32) if huge else (4, 2)
    torch.cuda.empty_cache()  # of the text before
    rows = rows_to_check(tokens, LONG.block_size, (tokens, heads * WIDTH, tokens // LONG.unit), 12 if huge else 40, 1)
    text = draw_text(tokens, heads, key_heads, WIDTH, LONG, rows, dtype, DEVICE)
    checked = (0, heads - 1)
    with torch.no_grad():
        o = attend(text.q, text.k, text.v, LONG, block_indices=text.chosen.clamp(min=0))
        worst = max(row_ratio(text, row, head, LONG, o) for row in rows for head in checked)
        own = attend(text.q, text.k, text.v, LONG)
        finite = bool(torch.stack([part.isfinite().all() for part in own.split(1 << 16, 1)]).all())
        del o, own
    return {"rows": len(rows) * len(checked), "ratio": worst, "finite": finite, **_gradients(text, rows, checked)} | {
        "device": device_name(DEVICE)
    }


def _gradients(text: Any, rows: list[int], heads: tuple[int, ...]) -> dict[str, float]:
    """Relative errors in norm of dq, dk and dv, where only the sampled rows of some heads have a loss."""
    group = text.q.shape[2] // text.k.shape[2]
    do = torch.zeros_like(text.q)
    generator = torch.Generator(DEVICE).manual_seed(2)
    for head in heads:
        do[0, rows, head] = torch.randn(len(rows), WIDTH, generator=generator, device=DEVICE).to(do.dtype)
    leaves = [x.requires_grad_() for x in (text.q, text.k, text.v)]
    o = attend(*leaves, LONG, block_indices=text.chosen.clamp(min=0))
    found = torch.autograd.grad(o, leaves, do)
    del o
    worst = {}
    for head in heads:
        key_head = head // group
        k, v = (x.detach()[:, :, key_head : key_head + 1].double() for x in (text.k, text.v))
        wanted = [
            torch.zeros(len(rows), WIDTH, device=DEVICE, dtype=torch.float64),
            torch.zeros_like(k),
            torch.zeros_like(v),
        ]
        for number, row in enumerate(rows):
            one = [text.q.detach()[:, row : row + 1, head : head + 1].double(), k[:, : row + 1], v[:, : row + 1]]
            one = [x.clone().requires_grad_() for x in one]
            chosen = text.chosen[:, row : row + 1, head : head + 1]
            expected = reference_attention(*one, LONG, q_start=row, block_indices=chosen)[0]
            dq, dk, dv = torch.autograd.grad(expected, one, do[:, row : row + 1, head : head + 1].double())
            wanted[0][number] = dq.flatten()
            wanted[1][:, : row + 1] += dk
            wanted[2][:, : row + 1] += dv
        ours = (found[0][0, rows, head], *(x[:, :, key_head : key_head + 1] for x in found[1:]))
        for name, a, b in zip(("dq", "dk", "dv"), ours, wanted, strict=True):
            error = float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
            worst[name] = max(worst.get(name, 0.0), error if math.isfinite(error) else math.inf)
    return worst


def runs(name: str, seeds: int) -> dict[str, dict[str, Any]]:
    """Everything in one dtype; rows of each run."""
    kinds = [f"{name} / {kind}" for kind in CONFIGS]
    lengths = (HUGE, *LENGTHS) if name == "bfloat16" else LENGTHS
    keys: dict[str, tuple[Any, list[str]]] = {
        "lengths": (long_text, [f"{name} / {tokens}" for tokens in lengths]),
        "causality": (causality, [f"{kind} / {how}" for kind in kinds for how in ("one", "rest")]),
        "poison": (poison, [f"{kind} / {seed}" for kind in kinds for seed in range(20)]),
        "shapes": (shapes, [f"{kind} / {seed}" for kind in kinds for seed in range(seeds)]),
    }
    return {run: run_all(f"gpu_{run}_{name}", own, work) for run, (work, own) in keys.items()}


def write_results(seeds: int, seconds: float) -> int:
    """Gather what the three processes found; returns the number of failures."""
    common = {"command": "python -m tests.long.gpu", "seed": 0, "seconds": seconds}
    words = f"{', '.join(DTYPES)}; settings {', '.join(CONFIGS)}"
    found = [runs(name, seeds) for name in DTYPES]
    pairs, poisoned, drawn, long_texts = (
        {key: row for part in found for key, row in part[run].items()}
        for run in ("causality", "poison", "shapes", "lengths")
    )
    device = ", ".join(sorted({row["device"] for row in long_texts.values()}))
    failures = [0, 0, 0, 0]
    failures[0] = sum(row["wrong"] for row in pairs.values())
    record(
        "gpu_causality", section="Causality and isolation", cases=sum(row["pairs"] for row in pairs.values()),
        claim="To the last bit, later tokens change neither an output of the kernels nor a choice of blocks.",
        failures=failures[0], conditions=f"{device}; {words}; {TOKENS} tokens, a token changed mildly or to 1e4, or "
        f"all from it on",
        details={"wrong": {key: row for key, row in pairs.items() if row["wrong"]}}, **common,
    )  # fmt: skip
    failures[1] = sum(row["wrong"] for row in poisoned.values())
    record(
        "gpu_poison", section="Numerics", cases=3 * len(poisoned), failures=failures[1],
        claim="On a GPU, NaN and infinities in padding, in later local blocks and in all fresh memory change no bit "
        "of what "
        "must not see them, and gradients stay finite.", conditions=f"{device}; {words}; 2 rows of 300 tokens",
        details={"wrong": {key: row for key, row in poisoned.items() if row["wrong"]}}, **common,
    )  # fmt: skip
    worst = max(drawn.values(), key=lambda row: row["ratio"])["ratio"]
    failures[2] = sum(row["ratio"] > 1 for row in drawn.values())
    record(
        "gpu_shapes", section="Numerics", cases=len(drawn), failures=failures[2],
        claim="Outputs of the kernels on a GPU stay within the forward-error bound of the float64 reference.",
        measured=f"worst ratio to the bound {worst:.3f}", conditions=f"{device}; {words}; random lengths and "
        f"magnitudes",
        details={"beyond": {key: row for key, row in drawn.items() if row["ratio"] > 1}}, **common,
    )  # fmt: skip
    wrong = {key: row for key, row in long_texts.items() if _is_wrong(key, row)}
    failures[3] = len(wrong)
    worst = max(row["ratio"] for row in long_texts.values())
    steepest = {name: max(row["dq"] for key, row in long_texts.items() if key.startswith(name)) for name in DTYPES}
    record(
        "gpu_lengths", section="Numerics", cases=sum(row["rows"] for row in long_texts.values()), failures=failures[3],
        claim="Around the lengths at which an index of 32 bits would overflow, and with more than 2^31 elements a "
        "tensor, "
        "outputs stay within the forward-error bound, and gradients within rounding.",
        measured=f"worst ratio to the bound {worst:.3f}; relative error of dq "
        + ", ".join(f"{name} {error:.1e}" for name, error in steepest.items()),
        conditions=f"{device}; {', '.join(f'{length:,}' for length in (*LENGTHS, HUGE))} tokens, 4 heads of 64, the "
        f"last with 32 "
        "heads and in bfloat16 alone; sampled rows, a needle in each one's past; limits of gradients "
        + ", ".join(f"{name} {limit:.0e}" for name, limit in GRADIENT_ERRORS.items()),
        not_covered=["Rows and heads that were not sampled."], details={"rows": long_texts, "wrong": list(wrong)},
        **common,
    )  # fmt: skip
    print(f"causality {failures[0]}, poison {failures[1]}, shapes {failures[2]}, lengths {failures[3]} failures")
    return sum(failures)


def _is_wrong(key: str, row: dict[str, Any]) -> bool:
    limit = GRADIENT_ERRORS[key.split(" / ")[0]]
    return row["ratio"] > 1 or not row["finite"] or max(row["dq"], row["dk"], row["dv"]) > limit


def main() -> int:
    """Run all dtypes, or one, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seeds", type=int, default=60)
    args = parser.parse_args()
    if args.dtype:
        runs(args.dtype, args.seeds)
        return 0
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.long.gpu", "--seeds", str(args.seeds)]
    running = [subprocess.Popen([*command, "--dtype", name], env={**os.environ, "WORKERS": "1"}) for name in DTYPES]
    codes = [process.wait() for process in running]
    if any(codes):
        return 1
    return int(bool(write_results(args.seeds, time.perf_counter() - start)))


if __name__ == "__main__":
    raise SystemExit(main())
