"""Gradients in float64: against finite differences, and against the reference's.

python -m tests.long.gradients
"""

import argparse
import random
import time
from typing import Any

import torch
from benchmarks.correctness import LARGEST_GRADIENT_ERROR, gradient_error
from benchmarks.reliability import record
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from tests.long.journal import machines, run_all
from tests.ops.cases import random_case


def small_problem(seed: int) -> tuple[BSBRConfig, list[Tensor]]:
    """Settings, and q, k, v, calibration and sinks in float64, few enough for finite differences."""
    draw, generator = random.Random(f"small {seed}"), torch.Generator().manual_seed(seed)
    unit, ratio = draw.choice([1, 2, 3, 4]), draw.choice([1, 1, 2])
    far = draw.choice(["moments", "moments", "mean", "drop"])
    config = BSBRConfig(
        block_size=unit * ratio,
        retrieval_block_size=unit,
        top_k=draw.choice([0, 1, 2]),
        far=far,
        state="none" if far == "drop" else draw.choice(["global", "block", "token", "none"]),
        selection=draw.choice(["head", "group", "recent"]),
        dense_below=draw.choice([0, 0, 3]),
    )
    tokens, heads, group = draw.randint(1, 15), draw.choice([1, 1, 2]), draw.choice([1, 2])
    width, value = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    shapes = [(1, tokens, heads * group, width), (1, tokens, heads, width), (1, tokens, heads, value)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    plain = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    leaves.append(plain + 0.2 * torch.randn(heads * group, 5, generator=generator, dtype=torch.float64))
    leaves.append(torch.randn(heads * group, generator=generator, dtype=torch.float64))
    return config, [x.requires_grad_() for x in leaves]


def finite_differences(seed: int) -> dict[str, Any]:
    """Whether gradients of q, k, v, calibration and sinks are the slopes, at a choice of blocks that is held."""
    config, leaves = small_problem(seed)
    chosen = reference_attention(*leaves[:3], config, calibration=leaves[3])[2]

    def output(q: Tensor, k: Tensor, v: Tensor, calibration: Tensor, sinks: Tensor) -> Any:
        return bsbr_attention(
            q, k, v, config, calibration=calibration, block_indices=chosen, sinks=sinks, backend="chunked"
        )

    options = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "raise_exception": False}
    return {"right": bool(torch.autograd.gradcheck(output, leaves, **options))}


def against_reference(seed: int) -> dict[str, Any]:
    """Largest error of a gradient, relative to 1 + the largest gradient of its tensor."""
    return {"error": gradient_error(random_case(seed))}


def main() -> int:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--cases", type=int, default=2000)
    args = parser.parse_args()
    command = f"python -m tests.long.gradients --checks {args.checks} --cases {args.cases}"
    start = time.perf_counter()
    rows = run_all("gradcheck", range(args.checks), finite_differences)
    wrong = [int(seed) for seed, row in rows.items() if not row["right"]]
    record(
        "gradients_by_differences",
        section="Numerics",
        claim="Gradients of q, k, v, calibration and sinks are the slopes that finite differences find.",
        cases=len(rows),
        failures=len(wrong),
        measured="step 1e-6, absolute tolerance 1e-5, relative 1e-3",
        command=command,
        conditions=f"{machines(rows)}, float64, chunked backend; random shapes and settings, the choice of blocks held",
        not_covered=[
            "The choice of blocks is piecewise constant and has no gradient: where it jumps there is no slope."
        ],
        seed=0,
        seconds=time.perf_counter() - start,
        details={"wrong": wrong},
    )
    start = time.perf_counter()
    rows = run_all("gradients", range(args.cases), against_reference)
    worst = max(rows.items(), key=lambda item: item[1]["error"])
    beyond = [int(seed) for seed, row in rows.items() if not row["error"] <= LARGEST_GRADIENT_ERROR]
    record(
        "gradients_by_reference",
        section="Numerics",
        claim="Gradients in float64 are those that PyTorch derives from the reference.",
        cases=len(rows),
        failures=len(beyond),
        measured=f"largest relative error {worst[1]['error']:.1e} (limit {LARGEST_GRADIENT_ERROR:.0e})",
        command=command,
        conditions=f"{machines(rows)}, chunked backend, whose backward pass serves the native one too; random "
        f"shapes and settings",
        seed=0,
        seconds=time.perf_counter() - start,
        details={"worst_seed": int(worst[0]), "beyond": beyond},
    )
    print(f"finite differences: {len(wrong)} wrong of {args.checks}")
    print(f"reference: largest relative error {worst[1]['error']:.1e}, {len(beyond)} beyond of {args.cases}")
    return int(bool(wrong or beyond))


if __name__ == "__main__":
    raise SystemExit(main())
