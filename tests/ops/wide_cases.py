"""Random problems of other shapes than those of `cases`: long texts, wide heads, many heads, large blocks."""

import math
import random

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from tests.ops.cases import Case

_ELEMENTS = 4_000_000
"""Most numbers of a tensor that the reference makes: scores, and what each query reads of the states."""


def wide_case(seed: int) -> Case:
    """Draw a problem: up to 4,097 tokens, heads up to 256 wide, up to 8 key heads of up to 8 query heads, blocks up to
    256 tokens; what a reference quadratic in the text can still compute."""
    draw, generator = random.Random(f"wide {seed}"), torch.Generator().manual_seed(seed)
    kind = draw.choice(["longest", *["long", "wide", "heads"] * 4])
    unit, ratio = draw.choice([1, 5, 16, 48, 64, 100, 128, 256]), draw.choice([1, 1, 1, 2])
    unit = unit if kind in ("wide", "heads") else max(unit, 16)
    heads, group = (
        (draw.choice([1, 2, 5, 8]), draw.choice([1, 2, 3, 8]))
        if kind == "heads"
        else (1, 1 if kind == "longest" else draw.choice([1, 2]))
    )
    width = draw.choice(
        {"longest": [8, 33], "long": [1, 8, 33, 64], "wide": [96, 128, 160, 200, 256], "heads": [1, 8, 20]}[kind]
    )
    value = draw.choice([width, width, 12])
    room = (4097**2 + 1 if kind == "longest" else _ELEMENTS) // (heads * group)
    most = min(4097, int(math.sqrt(room)), room // (width * value))
    size = unit * ratio
    near = [size * draw.randint(1, max(1, most // size)) + step for step in (-1, 0, 1)]
    longest = near if kind in ("wide", "heads") else [most, most - 1, *near]
    tokens = min(most, max(1, draw.choice([*longest, draw.randint(1, most)])))
    far = draw.choice(["moments", "moments", "mean", "drop"])
    config = BSBRConfig(
        block_size=size,
        retrieval_block_size=unit,
        top_k=draw.choice([0, 1, 2, 4, 8, 1000]),
        far=far,
        state="none" if far == "drop" else draw.choice(["global", "global", "none"]),
        selection=draw.choice(["head", "head", "group", "recent"]),
        dense_below=draw.choice([0, 0, 0, size + 3]),
    )
    spread = math.exp(draw.uniform(math.log(1e-3), math.log(30))) ** 0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = draw.choice([0, 0, tokens - 1])
    return Case(
        seed=seed,
        config=config,
        q=normal(1, tokens - start, heads * group, width) * spread,
        k=normal(1, tokens, heads, width) * spread,
        v=normal(1, tokens, heads, value),
        calibration=torch.tensor([0.0, 1, 1, 1, 1]).double() + draw.choice([0, 0.2]) * normal(heads * group, 5),
        q_start=start,
        lengths=None,
    )
