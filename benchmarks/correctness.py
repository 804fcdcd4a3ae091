"""The chunked and the native attention against the float64 reference: random shapes and settings, values and gradients.

python -m benchmarks.correctness --cases 2000
"""

import argparse
import platform
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.ops.cases import error_bound, random_case

import bsbr
from bsbr.files import write_json
from bsbr.ops import bsbr_attention, reference_attention
from bsbr.ops.native.forward import why_not_native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONTENDERS = {str(dtype).removeprefix("torch."): ("chunked", dtype) for dtype in DTYPES} | {
    "float32, native": ("native", torch.float32)
}
LARGEST_GRADIENT_ERROR = 1e-10
"""Of float64 gradients, relative to 1 + the largest gradient."""


def value_ratio(case, backend: str, dtype: torch.dtype) -> float:
    """Largest error of the outputs as a multiple of the forward-error bound; 0 for what a backend does not compute."""
    q, k, v = case.tensors(dtype)
    if backend == "native" and why_not_native(q, case.config):
        return 0.0
    options = {**case.options, "calibration": case.calibration}
    expected, _, chosen = reference_attention(q, k, v, case.config, **options)
    actual = bsbr_attention(q, k, v, case.config, **options, block_indices=chosen, backend=backend)
    ratio = (actual.double() - expected).abs() / error_bound(case, q, k, v, chosen)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def gradient_error(case) -> float:
    """Largest error of a float64 gradient, relative to 1 + the largest gradient of its tensor."""
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.calibration)]
    options = {**case.options, "calibration": leaves[3]}
    expected, _, chosen = reference_attention(*leaves[:3], case.config, **options)
    actual = bsbr_attention(*leaves[:3], case.config, **options, block_indices=chosen)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad((expected * direction).sum(), leaves, **options)
    found = torch.autograd.grad((actual * direction).sum(), leaves, **options)
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    """Run the cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/correctness.json"))
    args = parser.parse_args()
    worst = dict.fromkeys(CONTENDERS, (0.0, -1))
    worst_gradient, beyond, kinds = (0.0, -1), [], Counter()
    for seed in track(range(args.cases), "cases", console=Console(stderr=True)):
        case = random_case(seed)
        kinds[f"far={case.config.far} state={case.config.state}"] += 1
        for name, contender in CONTENDERS.items():
            ratio = value_ratio(case, *contender)
            worst[name] = max(worst[name], (ratio, seed))
            if ratio > 1:
                beyond.append({"seed": seed, "dtype": name, "ratio": ratio})
        error = gradient_error(case)
        worst_gradient = max(worst_gradient, (error, seed))
        if error > LARGEST_GRADIENT_ERROR:
            beyond.append({"seed": seed, "gradient_error": error})
    result = {
        "schema": {"name": "bsbr-correctness", "version": 1},
        "command": f"python -m benchmarks.correctness --cases {args.cases}",
        "cases": args.cases,
        "dtypes": list(worst),
        "bound": "element form of the forward-error bound, see tests/ops/cases.py",
        "worst_ratio_to_bound": {name: {"ratio": ratio, "seed": seed} for name, (ratio, seed) in worst.items()},
        "worst_gradient_error_float64": {"error": worst_gradient[0], "seed": worst_gradient[1]},
        "gradient_limit": LARGEST_GRADIENT_ERROR,
        "kinds": dict(sorted(kinds.items())),
        "beyond": beyond,
        "code": {"bsbr": bsbr.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(args.output, result)
    table = Table("measure", "worst", "limit", title=f"{args.cases} random shapes and settings")
    for name, (ratio, _) in worst.items():
        table.add_row(f"values, {name}", f"{ratio:.3f} x bound", "1 x bound")
    table.add_row("gradients, float64", f"{worst_gradient[0]:.1e}", f"{LARGEST_GRADIENT_ERROR:.0e}")
    table.add_row("beyond", str(len(beyond)), "0")
    Console().print(table)


if __name__ == "__main__":
    main()
