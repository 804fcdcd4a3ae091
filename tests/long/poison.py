"""What must not be read is not read: numbers that are none, planted where nobody may look, change no bit.

python -m tests.long.poison
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.reliability import record

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from bsbr.ops.native.forward import why_not_native
from bsbr.ops.schedule import dense_until
from bsbr.ops.shared_cache import block_cache
from tests.long.journal import machines, run_all
from tests.ops.cases import Case, random_case
from tests.ops.poison import filled_memory
from tests.ops.test_decode import cached_case, feed, parts

POISONS = (torch.nan, torch.inf, -torch.inf)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def backends_of(case: Case, dtype: torch.dtype) -> list[str]:
    """Backends that compute a case; not the reference, which multiplies what is masked by 0."""
    able = dtype == torch.float32 and not why_not_native(case.q.to(dtype), case.config)
    return ["chunked", *(["native"] if able else [])]


def padding(seed: int) -> dict[str, Any]:
    """Keys, values and queries of padding are no numbers: outputs, log-sums and gradients are those of zeros there."""
    case, draw = random_case(seed), random.Random(seed)
    dtype = DTYPES[draw.choice(list(DTYPES))]
    tensors = case.tensors(dtype)
    tokens = case.k.shape[1]
    lengths = torch.tensor([draw.randint(0, tokens) for _ in range(case.k.shape[0])])
    lengths[draw.randrange(len(lengths))] = draw.choice([0, 1, tokens])
    options = {"q_start": case.q_start, "lengths": lengths, "calibration": case.calibration}
    padded = torch.arange(tokens) >= lengths[:, None]
    masks = padded[:, case.q_start :, None, None], padded[:, :, None, None], padded[:, :, None, None]
    row = {"slots": int(padded.sum()), "wrong": 0, "rows without a key": int((lengths == 0).sum())}
    for backend in backends_of(case, dtype):
        found = []
        for fill in (0.0, draw.choice(POISONS)):
            leaves = [x.masked_fill(mask, fill).requires_grad_() for x, mask in zip(tensors, masks, strict=True)]
            o, lse = bsbr_attention(*leaves, case.config, **options, backend=backend, return_lse=True)
            gradients = torch.autograd.grad(o.sum(), leaves, allow_unused=True, materialize_grads=True)
            found.append((o, lse, *gradients))
        outside = masks[0].expand_as(found[0][0])
        right = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        right &= not found[1][0][outside].any() and bool((found[1][1][outside[..., 0]] == -torch.inf).all())
        right &= all(bool(x.isfinite().all()) for x in found[1][2:])
        row["wrong"] += not right
    return row


def unread_blocks(seed: int) -> dict[str, Any]:
    """With the far field dropped, values of blocks that a query does not read do not reach it, whatever they are."""
    draw, generator = random.Random(f"unread {seed}"), torch.Generator().manual_seed(seed)
    size, count = draw.choice([4, 8, 16]), draw.randint(4, 9)
    config = BSBRConfig(block_size=size, top_k=draw.choice([1, 2]), far="drop", dense_below=0)
    dtype = DTYPES[draw.choice(list(DTYPES))]
    q, k, v = (
        torch.randn(1, size * count, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (2, 1, 1)
    )
    chosen = reference_attention(q, k, v, config)[2]
    row = {"slots": 0, "wrong": 0}
    case = Case(seed, config, q.double(), k.double(), v.double(), torch.ones(2, 5).double(), 0, None)
    for backend in backends_of(case, dtype):
        clean = bsbr_attention(q, k, v, config, block_indices=chosen, backend=backend)
        for block in range(count - 1):
            poisoned = v.clone()
            poisoned[:, block * size : (block + 1) * size] = draw.choice(POISONS)
            o = bsbr_attention(q, k, poisoned, config, block_indices=chosen, backend=backend)
            own = torch.arange(size * count) // size
            free = (own[:, None] != block) & ~(chosen[0] == block).any(-1)
            if block <= config.top_k:  # of the text's beginning, which is read exactly, in one piece
                free &= (own > config.top_k)[:, None]
            row["slots"] += size
            row["wrong"] += not torch.equal(o[0][free], clean[0][free])
    return row


def later_blocks(seed: int) -> dict[str, Any]:
    """What is no number reaches no earlier local block; in its own token and the later ones of its block it shows."""
    case, draw = random_case(seed), random.Random(seed)
    dtype = DTYPES[draw.choice(list(DTYPES))]
    tensors, size, tokens = case.tensors(dtype), case.config.block_size, case.k.shape[1]
    at = draw.randrange(tokens)
    poisoned = [x.clone() for x in tensors]
    for x in poisoned[1:]:
        x[:, at] = draw.choice(POISONS)
    options = {"q_start": case.q_start, "calibration": case.calibration}
    before = max(0, at // size * size - case.q_start)
    dense = dense_until(replace(case.config, top_k=case.config.max_top_k, top_k_per_head=None))  # of any head
    row = {"slots": 1, "wrong": 0, "vanished": 0}
    for backend in backends_of(case, dtype):
        clean, o = (bsbr_attention(*x, case.config, **options, backend=backend) for x in (tensors, poisoned))
        # the text's beginning is read exactly, in one piece; chunked sums over blocks multiply later ones by 0
        if at >= dense and (backend == "native" or case.config.far == "drop"):
            row["wrong"] += not torch.equal(clean[:, :before], o[:, :before])
        own = o[:, max(0, at - case.q_start) : max(0, (at // size + 1) * size - case.q_start)]
        row["vanished"] += bool(own.isfinite().all(-1).any())
    return row


def uninitialised(seed: int) -> dict[str, Any]:
    """With all fresh memory holding NaN, outputs and gradients are the same bits."""
    case, draw = random_case(seed), random.Random(seed)
    dtype = DTYPES[draw.choice(list(DTYPES))]
    row = {"slots": case.k.shape[1], "wrong": 0}
    options = {**case.options, "calibration": case.calibration}

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in case.tensors(dtype)]
        o, lse = bsbr_attention(*leaves, case.config, **options, backend=backend, return_lse=True)
        return [o, lse, *torch.autograd.grad(o.sum(), leaves, allow_unused=True, materialize_grads=True)]

    for backend in backends_of(case, dtype):
        expected = run(backend)
        with filled_memory():
            found = run(backend)
        row["wrong"] += not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return row


def cached(seed: int) -> dict[str, Any]:
    """Slots of a cache that no token was written to hold no numbers: nothing of them is read."""
    draw, mode = random.Random(seed), ("full", "offload", "states")[seed % 3]
    case = cached_case(seed, **({"top_k": 0, "dense_below": 0} if mode == "states" else {}))
    dtype = DTYPES[draw.choice(["float64", "float32", "bfloat16"])]
    tensors, sizes = case.tensors(dtype), parts(case.k.shape[1], random.Random(seed))
    expected = feed(block_cache(case.config, mode), case, tensors, sizes)
    cache = block_cache(case.config, mode)
    with filled_memory():
        outputs, start = [], 0
        for size in sizes:
            outputs.append(feed(cache, case, [x[:, start:] for x in tensors], [size]))
            start += size
            _poison_unused(cache, draw.choice(POISONS))
    return {"slots": case.k.shape[1], "wrong": int(not torch.equal(torch.cat(outputs, 1), expected))}


def _poison_unused(cache: Any, poison: float) -> None:
    """Write no numbers to every slot that holds no token and no finished block."""
    for one in getattr(cache, "_caches", [cache]):
        size, per_block = one.config.block_size, one.config.block_size // one.config.unit
        for row, length in enumerate(one.lengths):
            block, place = length // size, length % size
            for x in (one._own.k, one._own.v):
                half = block % 2 * size
                x[row, :, half + place : half + size] = poison
                if not block:
                    x[row, :, size:] = poison
            if one._store is not None:
                for x in (one._store.k, one._store.v):
                    x[row, :, block * size :] = poison
            for name in ("meta", "mean_v"):
                if name in one._summaries._tensors:
                    one._summaries._tensors[name][row, :, block * per_block :] = poison
            if "states" in one._summaries._tensors and not block:
                one._summaries._tensors["states"][row, :, 1] = poison


def extremes(seed: int) -> dict[str, Any]:
    """Scores from 1e2 to 1e5 and values near the largest of float16: finite outputs wherever sums can hold them."""
    draw, generator = random.Random(f"extreme {seed}"), torch.Generator().manual_seed(seed)
    dtype = DTYPES[draw.choice(["float32", "bfloat16", "float16"])]
    magnitude = draw.choice([1e2, 1e3, 1e4, 1e5])
    config = BSBRConfig(
        dense_below=0, block_size=16, retrieval_block_size=draw.choice([4, 16]), top_k=draw.choice([0, 1, 2]),
        far=draw.choice(["moments", "mean", "drop"]),
    )  # fmt: skip
    q, k, v = (torch.randn(1, 150, heads, 16, generator=generator) for heads in (2, 1, 1))
    both = (magnitude / 4) ** 0.5
    q, k = (both * q).to(dtype), (both * k).to(dtype)
    v = (v.clamp(-3, 3) * draw.choice([1.0, torch.finfo(torch.float16).max / 8])).to(dtype)
    case = Case(seed, config, q.double(), k.double(), v.double(), torch.ones(2, 5).double(), 0, None)
    expected, row = reference_attention(q, k, v, config)[0], {"slots": 150, "wrong": 0}
    for backend in backends_of(case, dtype):
        o = bsbr_attention(q, k, v, config, backend=backend)
        fits = expected.abs() < torch.finfo(dtype).max / 2  # states may give more than float16 can hold, by definition
        row["wrong"] += not o[fits].isfinite().all()
    return row


RUNS: dict[str, tuple[Callable[[int], dict[str, Any]], int, str, str]] = {
    "poison_padding": (
        padding, 1000, "NaN and infinities in padding change no bit of outputs, log-sums and gradients; a row "
        "without a "
        "key gives 0 and a log-sum of minus infinity, with finite gradients.", "random masks, one row in three empty",
    ),
    "poison_unread": (
        unread_blocks, 300, "With the far field dropped, NaN and infinities in values of blocks that a query does not "
        "read change no bit of its output.", "each past block in turn",
    ),
    "poison_later": (
        later_blocks, 1000, "A NaN or an infinity in a key and value shows in its own token and the later "
        "ones of its block; in native code, and elsewhere without a far field, it changes no bit of earlier blocks.",
        "one token of a random problem",
    ),
    "poison_memory": (
        uninitialised, 500, "Outputs and gradients are the same bits where all fresh memory holds NaN.",
        "PyTorch's own filling of uninitialised memory, the native code's workspace included",
    ),
    "poison_cache": (
        cached, 600, "Slots of a cache that no token was written to may hold NaN or infinities: no bit changes.",
        "texts read in random parts; after each part every unused slot is overwritten; modes full, offload and states",
    ),
    "extremes": (
        extremes, 1000, "Scores of 1e2 to 1e5 and values near the largest of float16 give finite outputs wherever "
        "the reference's fit the dtype.",
        "float32, bfloat16 and float16",
    ),
}  # fmt: skip


def main() -> int:
    """Run all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="part of the cases to run")
    args = parser.parse_args()
    failed = 0
    for name, (work, cases, claim, conditions) in RUNS.items():
        start = time.perf_counter()
        rows = run_all(name, range(round(cases * args.share)), work)
        wrong = [int(seed) for seed, row in rows.items() if row["wrong"] or row.get("vanished")]
        failed += len(wrong)
        record(
            name,
            section="Numerics",
            claim=claim,
            cases=len(rows),
            failures=len(wrong),
            measured=f"{sum(row['slots'] for row in rows.values()):,} slots",
            command="python -m tests.long.poison",
            conditions=f"{machines(rows)}; {conditions}; chunked and native backends, float64 to float16",
            seed=0,
            seconds=time.perf_counter() - start,
            details={"wrong": wrong},
        )
        print(f"{name}: {len(wrong)} wrong of {len(rows)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
