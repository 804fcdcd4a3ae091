"""What stands beside a text changes nothing: other rows of the batch, padding, other documents of a packed row.

python -m tests.long.isolation
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.reliability import record
from torch import Tensor

from bsbr import BSBRConfig, convert
from bsbr.hf import BSBRCache
from bsbr.ops import bsbr_attention
from tests.hf.coverage import NAMES
from tests.hf.families import VOCABULARY, build
from tests.long.journal import arguments, machines, matching, run_all
from tests.long.poison import DTYPES, backends_of
from tests.ops.cases import random_case

CONFIGS = {
    "sparse": BSBRConfig(dense_below=0, block_size=8, top_k=2),
    "units": BSBRConfig(dense_below=11, block_size=8, retrieval_block_size=4, top_k=3, far="mean", selection="group"),
    "states": BSBRConfig(dense_below=0, block_size=8, top_k=0, state="block"),
}
LARGEST = 2e-5
"""Largest difference of a logit, as in the tests of padding."""

NEVER_PACKED = ("opt", "gpt_oss")
"""Families whose own code does not tell packed documents apart, BSBR or not."""

MIXED = ("qwen3_moe",)
"""Families whose own code multiplies all documents' tokens of an expert at once: equal within rounding."""


def rows_of_a_batch(seed: int) -> dict[str, Any]:
    """One row of a batch is replaced by huge numbers, then by none: the other rows keep their bits."""
    case, draw = random_case(seed), random.Random(seed)
    dtype, count = DTYPES[draw.choice(list(DTYPES))], draw.randint(2, 6)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(count, *x.shape[1:], generator=generator).to(dtype) for x in (case.q, case.k, case.v)]
    victim, others = draw.randrange(count), None
    others = [row for row in range(count) if row != victim]
    options = {"q_start": case.q_start, "calibration": case.calibration}
    row = {"cases": 0, "wrong": 0}
    for backend in backends_of(case, dtype):
        clean = bsbr_attention(*tensors, case.config, **options, backend=backend)
        for fill in (1e4, torch.nan, torch.inf):
            poisoned = [x.clone() for x in tensors]
            for x in poisoned:
                x[victim] = fill
            o = bsbr_attention(*poisoned, case.config, **options, backend=backend)
            row["cases"] += 1
            row["wrong"] += not torch.equal(o[others], clean[others])
    return row


def wrong_logits(found: Tensor, expected: Tensor) -> int:
    """Positions whose next token changed or whose logits are further off than rounding."""
    far = (found - expected).abs().amax(-1) > LARGEST
    return int((far | (found.argmax(-1) != expected.argmax(-1))).sum())


def _model(key: str) -> tuple[Any, random.Random]:
    family, name, _ = key.split(" / ")
    return convert(build(family), CONFIGS[name]), random.Random(key)


def _ids(draw: random.Random, *shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)))


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def padded(key: str) -> dict[str, Any]:
    """Rows of any length, padded left, right and on both sides; what stands in the padding does not matter either."""
    model, draw = _model(key)
    rows, width = draw.randint(2, 5), draw.randint(20, 70)
    ids, mask = _ids(draw, rows, width), torch.zeros(rows, width, dtype=torch.long)
    for row in range(rows):
        start = draw.choice([0, draw.randint(0, width - 2)])
        mask[row, start : draw.choice([width, draw.randint(start + 1, width)])] = 1
    inputs = {"attention_mask": mask, "position_ids": _places(mask), "use_cache": False}
    together = model(ids, **inputs).logits
    other = model(torch.where(mask.bool(), ids, _ids(draw, rows, width)), **inputs).logits
    wrong = int((together != other).any(-1)[mask.bool()].sum())
    for row in range(rows):
        real = mask[row].bool()
        wrong += wrong_logits(together[row, real], model(ids[row, real][None], use_cache=False).logits[0])
    return {"cases": int(mask.sum()), "wrong": wrong}


@torch.no_grad()
def packed(key: str) -> dict[str, Any]:
    """Documents in one row: each as if alone, and with another document changed the same to the bit."""
    model, draw = _model(key)
    lengths = [draw.choice([1, draw.randint(2, 40)]) for _ in range(draw.randint(2, 5))]
    ids = _ids(draw, 1, sum(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(ids, position_ids=places, use_cache=False).logits
    wrong, start, victim = 0, 0, draw.randrange(len(lengths))
    changed, outside = ids.clone(), torch.ones(sum(lengths), dtype=torch.bool)
    for number, length in enumerate(lengths):
        span = slice(start, start + length)
        wrong += wrong_logits(together[0, span], model(ids[:, span], use_cache=False).logits[0])
        if number == victim:
            changed[:, span] = _ids(draw, 1, length)
            outside[span] = False
        start += length
    other = model(changed, position_ids=places, use_cache=False).logits
    if key.split(" / ")[0] in MIXED:
        return {"cases": sum(lengths), "wrong": wrong + wrong_logits(other[0, outside], together[0, outside])}
    wrong += int((other != together)[0].any(-1)[outside].sum())
    return {"cases": sum(lengths), "wrong": wrong}


@torch.no_grad()
def cached(key: str) -> dict[str, Any]:
    """Left padding and neighbours of every row, read in random parts with a cache."""
    model, draw = _model(key)
    if key.split(" / ")[1] == "states":
        model = convert(build(key.split(" / ")[0]), BSBRConfig(dense_below=0, block_size=8, top_k=0))
    rows, width = draw.randint(2, 5), draw.randint(20, 70)
    ids, mask = _ids(draw, rows, width), torch.ones(rows, width, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : draw.randint(0, width - 2)] = 0
    places, cache, parts, start = _places(mask), BSBRCache(model.config), [], 0
    while start < width:
        stop = min(width, start + draw.choice([1, 1, 2, 9, 30]))
        inputs = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
        parts.append(model(ids[:, start:stop], **inputs, past_key_values=cache, use_cache=True).logits)
        start = stop
    together, wrong = torch.cat(parts, 1), 0
    for row in range(rows):
        real = mask[row].bool()
        wrong += wrong_logits(together[row, real], model(ids[row, real][None], use_cache=False).logits[0])
    return {"cases": int(mask.sum()), "wrong": wrong}


def keys(families: Sequence[str], seeds: int) -> list[str]:
    """Families, settings and seeds."""
    return [f"{family} / {name} / {seed}" for family in families for name in CONFIGS for seed in range(seeds)]


PACKS = [family for family in NAMES if family not in NEVER_PACKED]
RUNS: dict[str, tuple[Callable[[Any], dict[str, Any]], Sequence[Any], str, str]] = {
    "isolation_rows": (
        rows_of_a_batch, range(500), "What is in one row of a batch, no numbers included, changes no bit of another "
        "row.",
        "operation; chunked and native backends, float64 to float16",
    ),
    "isolation_padding": (
        padded, keys(list(NAMES), 6), "Padding and neighbours change no next token, and no logit beyond rounding; "
        "what stands in "
        "the padding changes no bit.", f"{len(NAMES)} families, tiny random models, float32, largest difference "
        f"{LARGEST:.0e}",
    ),
    "isolation_cache": (
        cached, keys(list(NAMES), 6), "Read with a cache in any parts, a left-padded row among others is the row "
        "alone.",
        f"{len(NAMES)} families, tiny random models, float32, largest difference {LARGEST:.0e}",
    ),
    "isolation_packed": (
        packed, keys(PACKS, 6), "Documents packed into one row are as if alone; a change of one changes no bit of "
        "another.",
        f"{len(PACKS)} families, tiny random models, float32, largest difference {LARGEST:.0e}",
    ),
}  # fmt: skip


def main() -> int:
    """Run all and write the results."""
    args, command = arguments(__doc__, "tests.long.isolation")
    failed = 0
    for name, (work, own_keys, claim, conditions) in RUNS.items():
        start = time.perf_counter()
        rows = run_all(name, matching(own_keys, args.only), work)
        wrong = {key: row["wrong"] for key, row in rows.items() if row["wrong"]}
        failed += len(wrong)
        record(
            name,
            section="Causality and isolation",
            claim=claim,
            cases=sum(row["cases"] for row in rows.values()),
            failures=sum(wrong.values()),
            measured=f"{len(rows):,} batches",
            command=command,
            conditions=f"{machines(rows)}; {conditions}",
            not_covered=[
                "A row alone and the same row in a batch are equal within rounding, not to the bit: PyTorch's "
                "products of other "
                "shapes may round differently.",
                f"To the bit, in packed rows of {' and '.join(MIXED)}: the products of an expert have the shapes "
                "that all documents together give them, converted or not; they are equal within rounding.",
                f"Packing into one row for {' and '.join(NEVER_PACKED)}: their own code in transformers does not "
                f"tell packed "
                "documents apart.",
            ],
            seed=0,
            seconds=time.perf_counter() - start,
            details={"wrong": wrong},
        )
        print(f"{name}: {sum(wrong.values())} wrong in {len(wrong)} of {len(rows)} batches")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
