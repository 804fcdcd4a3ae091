"""Random problems that the kernels take, small enough for their interpreter."""

import math
import random

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.schedule import dense_until
from tests.ops.cases import Case


def kernel_case(seed: int) -> Case:
    """Draw a problem: block sizes, units, widths and groups that tiles fit and do not fit."""
    draw, generator = random.Random(f"kernel {seed}"), torch.Generator().manual_seed(seed)
    unit = draw.choice([16, 16, 32])
    size = unit * draw.choice([1, 1, 2, 3])
    far = draw.choice(["moments", "moments", "mean", "drop"])
    config = BSBRConfig(
        block_size=size,
        retrieval_block_size=unit,
        top_k=draw.choice([1, 2, 3] if far == "drop" else [0, 1, 2, 3]),
        far=far,
        state="none" if far == "drop" else draw.choice(["global", "global", "none"]),
        dense_below=draw.choice([0, 0, 0, 45]),
    )
    tokens = draw.choice([size * draw.randint(1, 4) + step for step in (-1, 0, 1)] + [draw.randint(1, 150)])
    heads, group, rows = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.choice([1, 1, 2])
    width = draw.choice([16, 24, 40, 64])
    start = draw.choice([0, tokens - 1]) if tokens > dense_until(config) else 0
    spread = math.exp(draw.uniform(math.log(1e-3), math.log(30))) ** 0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    plain = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    return Case(
        seed=seed,
        config=config,
        q=normal(rows, tokens - start, heads * group, width) * spread,
        k=normal(rows, tokens, heads, width) * spread,
        v=normal(rows, tokens, heads, width),
        calibration=(plain + draw.choice([0, 0.2]) * normal(heads * group, 5)).float().double(),
        q_start=start,
        lengths=None,
    )
