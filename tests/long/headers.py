"""Ten thousand safetensors files whose headers lie.

python -m tests.long.headers
"""

import argparse
import logging
import random
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.reliability import record

from bsbr.evaluation.provenance import cpu_name
from tests.long.tiny import make
from tests.security.headers import mutate
from tests.security.test_hostile_models import mutation_fault


def main() -> int:
    """Load a model with each file and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    started, faults, slowest = time.monotonic(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        given = make(Path(folder) / "given")
        good = (given / "model" / "model.safetensors").read_bytes()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(args.cases):
            weights = Path(folder) / "mutated"
            weights.write_bytes(mutate(good, random.Random(number)))
            began = time.monotonic()
            if fault := mutation_fault(weights, given / "model", Path(folder) / "place"):
                faults.append(f"{number}: {fault[:200]}")
            slowest = max(slowest, time.monotonic() - began)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    record(
        "headers",
        section="Input and security",
        claim="A safetensors file with a damaged or lying header is refused in one line, or holds "
        "weights of the right names "
        "and shapes; nothing crashes.",
        cases=args.cases,
        failures=len(faults),
        measured=f"slowest {slowest:.2f} s; the process's peak memory rose by {grown:.0f} MB in all",
        not_covered=["Weights that are whole and wrong: a manifest tells them, its author cannot be told."],
        command=f"python -m tests.long.headers --cases {args.cases}",
        conditions=f"CPU ({cpu_name()}), a machine shared with other work; a GPT-2 of two layers; "
        f"eight ways to change a header: its "
        "length, bytes, end, nesting, dtypes, shapes, offsets and names",
        seed=0,
        seconds=time.monotonic() - started,
        details={"faults": faults[:50]},
    )  # fmt: skip
    print(
        f"{args.cases} headers, {len(faults)} faults, slowest {slowest:.2f} s, +{grown:.0f} MB",
        *faults[:20],
        sep="\n  ",
    )
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
