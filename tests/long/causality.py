"""No later token changes an earlier output by a bit: operation and models, every backend, family, cache and dtype.

python -m tests.long.causality
"""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from benchmarks.reliability import record
from torch import Tensor

from bsbr import BSBRConfig, convert
from bsbr.hf import BSBRCache
from bsbr.ops import bsbr_attention
from bsbr.ops.native.forward import why_not_native
from tests.hf.coverage import NAMES
from tests.hf.families import VOCABULARY, build
from tests.long.journal import arguments, machines, matching, run_all
from tests.ops.choices import choices
from tests.ops.test_properties import KINDS

TOKENS, ROWS = 300, 50
MODEL_TOKENS = 96
KINDS_HERE = KINDS | {
    "one block": BSBRConfig(dense_below=0, block_size=300, top_k=0),
    "odd blocks": BSBRConfig(dense_below=0, block_size=21, retrieval_block_size=7, top_k=4),
    "small blocks": BSBRConfig(dense_below=0, block_size=12, retrieval_block_size=6, top_k=4),
    "all blocks": BSBRConfig(dense_below=0, block_size=32, top_k=99),
    "per head": BSBRConfig(dense_below=0, block_size=32, retrieval_block_size=8, top_k_per_head=(1, 6)),
}
CONTENDERS = {
    "reference float64": ("reference", torch.float64),
    "chunked float64": ("chunked", torch.float64),
    "chunked float32": ("chunked", torch.float32),
    "chunked bfloat16": ("chunked", torch.bfloat16),
    "chunked float16": ("chunked", torch.float16),
    "native float32": ("native", torch.float32),
}
CHANGES = ("one", "rest")
"""One token is changed, mildly or hugely; or it and all that follow are replaced."""

MODEL_CONFIGS = {
    "sparse": BSBRConfig(dense_below=0, block_size=8, top_k=2),
    "units": BSBRConfig(dense_below=11, block_size=8, retrieval_block_size=4, top_k=3, far="mean", selection="group"),
    "states": BSBRConfig(dense_below=0, block_size=8, top_k=0),
}
CACHES = {"none": None, "full": "full", "offload": "offload", "states": "states"}
PARTS = (29, 1, 1, 1, 9, 40, 15)
"""Sizes in which a text is read where a cache is used."""


def changed(x: Tensor, tokens: range, how: str) -> Tensor:
    """One row for each token: x with that token changed, or with all from it on."""
    rows = x.repeat(len(tokens), 1, 1, 1)
    for row, token in enumerate(tokens):
        if how == "one":
            rows[row, token] = rows[row, token] + 1 if token % 2 else 1e4
        else:
            rows[row, token:] = -3 * rows[row, token:].flip(0) if token % 2 else -1e4
    return rows


def operation(key: str) -> dict[str, Any]:
    """Change every token of a text; count (token, earlier output) pairs and those that differ in any bit."""
    kind, name, how = key.split(" / ")
    config, (backend, dtype) = KINDS_HERE[kind], CONTENDERS[name]
    generator = torch.Generator().manual_seed(len(key))
    q, k, v = (torch.randn(1, TOKENS, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    if backend == "native" and why_not_native(q, config):
        return {"pairs": 0, "changed": 0, "dead": 0, "choices": 0}
    row = {"pairs": 0, "changed": 0, "dead": 0, "choices": 0}
    plain = torch.tensor([[0.0, 1, 1, 1, 1]]).expand(4, 5)
    chooses = backend != "reference" and config.top_k_per_head is None and config.top_k
    with torch.no_grad():
        for first in range(0, TOKENS, ROWS):
            tokens = range(first, first + ROWS)
            same = [x.repeat(ROWS, 1, 1, 1) for x in (q, k, v)]
            moved = [changed(x, tokens, how) for x in (q, k, v)]
            before, after = (bsbr_attention(*x, config, backend=backend) for x in (same, moved))
            differs = (before != after).flatten(2).any(-1)  # what is no number differs from itself
            if chooses:
                chosen = [choices(backend, *x, config, plain) for x in (same, moved)]
                other = (chosen[0] != chosen[1]).flatten(2).any(-1)
                late = TOKENS - other.shape[1]
            for index, token in enumerate(tokens):
                row["pairs"] += token
                row["changed"] += int(differs[index, :token].sum())
                row["dead"] += int(not differs[index, token])
                if chooses:
                    row["choices"] += int(other[index, : max(0, token - late)].sum())
    return row


def read(model: Any, ids: Tensor, mode: str | None) -> Tensor:
    """Logits of a text, at once or part by part with a cache."""
    if mode is None:
        return model(ids, use_cache=False).logits
    cache = BSBRCache(model.config, mode)  # type: ignore[arg-type]
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(PARTS, 1)], 1)


def model_pairs(key: str) -> dict[str, Any]:
    """Change every token of a model's text."""
    family, name, mode, dtype = key.split(" / ")
    config = MODEL_CONFIGS[name]
    if mode == "states":
        config = replace(config, top_k=0, dense_below=0)
    model = convert(build(family), config)
    if dtype != "float32":
        model = copy.deepcopy(model).to(getattr(torch, dtype))
    ids = torch.randint(3, VOCABULARY, (1, MODEL_TOKENS), generator=torch.Generator().manual_seed(0))
    same = ids.repeat(MODEL_TOKENS, 1)
    moved = same - torch.eye(MODEL_TOKENS, dtype=torch.long)
    with torch.no_grad():
        differs = (read(model, same, CACHES[mode]) != read(model, moved, CACHES[mode])).any(-1)
    later = torch.ones(MODEL_TOKENS, MODEL_TOKENS, dtype=torch.bool).triu()
    return {
        "pairs": int((~later).sum()),
        "changed": int(differs[~later].sum()),
        "dead": int((~differs.diagonal()).sum()),
        "alive": float(differs[later].float().mean()),
    }


def _parts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What keys are made of: how many first parts there are, and which second, third and fourth ones."""
    columns = zip(*(key.split(" / ") for key, row in rows.items() if row["pairs"]), strict=True)
    first, *others = (list(dict.fromkeys(column)) for column in columns)
    return [str(len(first)), *(", ".join(other) for other in others)]


def main() -> int:
    """Change every token of every text and write the results."""
    (args, command), failed = arguments(__doc__, "tests.long.causality"), 0
    keys = [f"{kind} / {name} / {how}" for kind in KINDS_HERE for name in CONTENDERS for how in CHANGES]
    model_keys = [
        f"{family} / {name} / {mode} / {dtype}"
        for family in NAMES
        for name, mode, dtype in [
            *((name, mode, "float32") for name in MODEL_CONFIGS for mode in ("none", "full")),
            ("sparse", "offload", "float32"), ("states", "states", "float32"),
            ("sparse", "none", "bfloat16"), ("sparse", "full", "bfloat16"),
        ]
    ]  # fmt: skip
    runs = (
        (
            "causality_operation", keys, operation,
            "later tokens change neither an output of the operation nor a choice of blocks",
            f"{{0}} settings, {{1}}, {TOKENS} tokens, 4 query and 2 key heads; a token changed mildly or to 1e4, or "
            f"all "
            "from it on replaced",
        ),
        (
            "causality_models", model_keys, model_pairs, "later tokens change no logit of a converted model",
            f"{{0}} families, {MODEL_TOKENS} tokens, tiny random models; settings {{1}}; caches {{2}}, read in parts "
            f"of "
            f"{', '.join(map(str, PARTS))}; {{3}}",
        ),
    )  # fmt: skip
    for name, own_keys, work, claim, conditions in runs:
        start = time.perf_counter()
        rows = run_all(name, matching(own_keys, args.only), work)
        total = {
            what: sum(row.get(what, 0) for row in rows.values()) for what in ("pairs", "changed", "choices", "dead")
        }
        failures = total["changed"] + total["choices"] + total["dead"]
        failed += failures
        record(
            name,
            section="Causality and isolation",
            claim=f"To the last bit, {claim}.",
            cases=total["pairs"],
            failures=failures,
            measured=f"{total['pairs']:,} (token, earlier output) pairs, {total['changed']} changed; each token "
            f"changes its own "
            "output, which is checked too",
            command=command,
            conditions=f"{machines(rows)}; {conditions.format(*_parts(rows))}",
            not_covered=[
                "What is no number: a NaN or infinity at a token may reach earlier queries of its own local block, "
                "as in "
                "PyTorch's attention; it never reaches an earlier block.",
                "A text and its beginning alone are calls of other shapes, equal within rounding and not to the bit.",
            ],
            seed=0,
            seconds=time.perf_counter() - start,
            details={
                "wrong": {key: row for key, row in rows.items() if row["changed"] or row["dead"] or row.get("choices")}
            },
        )
        print(
            f"{name}: {total['pairs']:,} pairs, {total['changed']} changed, {total['choices']} choices, "
            f"{total['dead']} dead"
        )
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
