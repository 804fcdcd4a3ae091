"""Random attention problems, and how far a correct implementation may be from the float64 reference."""

import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import reference_attention
from bsbr.ops.native.forward import why_not_native

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def skip_unless_able(backend: str, q: Tensor, config: BSBRConfig) -> None:
    """Skip a test of the native backend, with its reason, where it cannot compute the call."""
    obstacle = why_not_native(q, config) if backend == "native" else ""
    if obstacle:
        pytest.skip(obstacle)


@dataclass
class Case:
    """One problem: tensors, settings, and how it was made."""

    seed: int
    config: BSBRConfig
    q: Tensor
    k: Tensor
    v: Tensor
    calibration: Tensor
    q_start: int
    lengths: Tensor | None
    options: dict = field(init=False)

    def __post_init__(self) -> None:
        self.options = {"q_start": self.q_start, "lengths": self.lengths}

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v rounded to a dtype."""
        return self.q.to(dtype), self.k.to(dtype), self.v.to(dtype)


def random_case(seed: int, longest: int = 300, value_width: bool = True) -> Case:
    """Draw a problem: odd lengths, every setting, grouped heads, padding, queries that start late."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    unit, ratio = draw.choice([1, 2, 3, 4, 7, 8, 16, 32, 64]), draw.choice([1, 1, 2, 4])
    far = draw.choice(["moments", "moments", "moments", "mean", "drop"])
    state = "none" if far == "drop" else draw.choice(["global", "global", "block", "token", "none"])
    config = BSBRConfig(
        block_size=unit * ratio,
        retrieval_block_size=unit,
        top_k=draw.choice([0, 1, 2, 3, 4, 8, 1000]),
        far=far,
        state=state,
        selection=draw.choice(["head", "group", "recent"]),
        dense_below=draw.choice([0, 0, 0, 1, 33, 128]),
    )
    size = config.block_size
    near = [size * draw.randint(1, 6) + step for step in (-1, 0, 1)]
    tokens = min(longest, max(1, draw.choice([*near, draw.randint(1, longest)])))
    rows, heads, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 1, 2, 4])
    width = draw.choice([1, 3, 8, 16, 31, 64])
    value = draw.choice([width, width, 5]) if value_width else width
    start = 0 if state == "block" else draw.choice([0, 0, tokens - 1, draw.randint(0, tokens - 1)])
    if draw.random() < 0.25:
        config = replace(config, top_k_per_head=tuple(draw.choice([0, 1, 2, 5]) for _ in range(heads)))
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator) if draw.random() < 0.4 else None
    spread = math.exp(draw.uniform(math.log(1e-3), math.log(30))) ** 0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    plain = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    return Case(
        seed=seed,
        config=config,
        q=normal(rows, tokens - start, heads * group, width) * spread,
        k=normal(rows, tokens, heads, width) * spread,
        v=normal(rows, tokens, heads, value),
        calibration=plain + draw.choice([0, 0.2]) * normal(heads * group, 5),
        q_start=start,
        lengths=lengths,
    )


def error_bound(case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
    """How far an output of this dtype may be from the reference, element by element.

    With V the weighted mean of absolute values and A the largest sum of absolute terms of a score, an
    implementation that accumulates in float32 stays within V (2 eps + 8 eps32 (1 + A)): two roundings to the
    output's precision, and score errors turned into relative weight errors by the softmax. A summary counts as a key
    with every term of its log-mass and of its value taken absolute. A running in float64 has eps32 = eps.
    """
    config, group = case.config, q.shape[2] // k.shape[2]
    eps = EPS[q.dtype]
    inner = min(eps, EPS[torch.float32])
    wide = [x.double() for x in (q, k, v)]
    # the reference on absolute values gives V: same weights, absolute values of what they weigh
    absolute = _absolute_output(case, *wide, block_indices)
    scale = q.shape[-1] ** -0.5
    top_k = wide[1].abs().amax(1, keepdim=True)
    scores = scale * (wide[0].abs() * top_k.repeat_interleave(group, 2)).sum(-1)
    bias, mean_scale, var_scale = (case.calibration[:, i].abs() for i in range(3))
    squares = (scale * wide[0]).square() * (2 * top_k.repeat_interleave(group, 2)).square()
    masses = math.log(config.unit) + bias + mean_scale * scores + var_scale / 2 * squares.sum(-1)
    reach = scores if config.far == "drop" else torch.maximum(scores, masses)
    smallest = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
    return absolute * (2 * eps + 8 * inner * (1 + reach[..., None])) + 2 * smallest


def _absolute_output(case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
    """Weighted mean of absolute values, the state's share bounded by |q| |k - mean| |v - mean|, [B, Tq, HQ, Dv]."""
    zero = case.calibration.clone()
    zero[:, 4] = 0
    zero[:, 3] = zero[:, 3].abs()
    options = {**case.options, "block_indices": block_indices, "calibration": zero}
    values = reference_attention(q, k, v.abs(), case.config, **options)[0]
    if case.config.state == "none":
        return values
    group = q.shape[2] // k.shape[2]
    span_k = 2 * k.abs().amax(1, keepdim=True).repeat_interleave(group, 2)
    span_v = 2 * v.abs().amax(1, keepdim=True).repeat_interleave(group, 2)
    reach = (q.abs() * span_k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    far_share = _far_share(case, q, k, v, block_indices)
    return values + case.calibration[:, 4, None].abs() * far_share * reach * span_v


def _far_share(case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
    """Probability of the far field, [B, Tq, HQ, 1]: what values of one lose when it weighs nothing."""
    zero = case.calibration.clone()
    zero[:, 3:] = 0
    options = {**case.options, "block_indices": block_indices, "calibration": zero}
    ones = torch.ones_like(v[..., :1])
    return 1 - reference_attention(q, k, ones, case.config, **options)[0]
