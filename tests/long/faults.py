"""Whether the tests notice faults: each is injected into a copy of the tree, and the fast tests must fail.

python -m tests.long.faults
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.reliability import record

from tests.long.journal import machines, run_all

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """One change of a source file that makes it wrong, as faults.toml has it."""

    name: str
    """What is wrong then, in words."""
    file: str
    """Below src/bsbr."""
    old: str
    """Text that stands in the file once."""
    new: str
    """What takes its place."""
    tests: list[str]
    """Files below tests that are run until one fails."""


LIST = [Fault(**fault) for fault in tomllib.loads((Path(__file__).parent / "faults.toml").read_text())["fault"]]
FAULTS = {fault.name: fault for fault in LIST}
INTERPRETED = ("ops/test_triton.py", "ops/test_triton_decode.py")
"""What these files' own test does in a process of its own is done at once: run interpreted where there is no GPU."""
PATIENCE_S = 600
MENDED = (
    "Perplexity as a mean over documents passed for the mean over tokens: the documents of the test had equal means. "
    "They differ now, and an interval is worked by hand beside it.",
    "Interleaved heads in the kernels' summaries passed without a GPU: no interpreted case had several heads that "
    "share several key heads.",
    "The additive form's retriever could be made of the next block's first token: causal, and not what its definition "
    "says.",
    "A cache whose rows had changed places went back by the padding of other rows: no test went back in padded rows.",
    "MoBA with a far field passed: its blocks are now chosen and read by a formula of the test's own.",
    "Linear attention's sums could be taken in bfloat16 under autocast; the test allowed for 5 %.",
    "Gradients could go unclipped: their norms are now looked at in each step.",
    "A trainer that does not stop at a loss that is no number was noticed only because its test never ended.",
    "A loop of the decoding kernels lost a value when compiled, and passed under the interpreter: what the compiler "
    "makes of kernels is computed too now.",
    "The bytes of a window could be counted wrongly, and nothing noticed, as nothing used them: the function is gone.",
)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


def check_list(root: Path = ROOT) -> None:
    """Refuse a list that no longer fits the sources.

    Raises:
        ValueError: two faults have one name, or what a fault replaces does not stand in its file exactly once.
    """
    if len(FAULTS) != len(LIST):
        raise ValueError("two faults have the same name")
    for fault in FAULTS.values():
        count = (root / "src" / "bsbr" / fault.file).read_text().count(fault.old)
        if count != 1:
            raise ValueError(f"{fault.name}: {fault.old!r} stands {count} times in {fault.file}, expected once")


def copy_tree(to: Path) -> None:
    """Copy what the tests need; a copy of the package is what they import."""
    for name in ("src", "tests", "benchmarks", "examples", "docs"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, to / file.name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Run test files until one test fails: "passed", "failed" or "timed out", and the first test that failed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if set(tests) & set(INTERPRETED) and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    files = [f"tests/{test}" for test in tests]
    try:
        done = subprocess.run(
            [*command, *files],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "timed out", ""
    found = _FAILED.findall(done.stdout)
    if done.returncode == 0:
        return "passed", ""
    return "failed", found[0] if found else f"exit status {done.returncode}: {done.stdout[-300:]}"


def inject(name: str) -> dict[str, Any]:
    """Run a fault's tests in a copy of the tree that has it."""
    fault, begun = FAULTS[name], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / "src" / "bsbr" / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
        outcome, test = run_tests(tree, fault.tests)
    return {"outcome": outcome, "caught_by": test, "seconds": round(time.perf_counter() - begun, 1)}


def sound(test_file: str) -> dict[str, Any]:
    """Run a test file without a fault: it has to pass, or failing would mean nothing."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy_tree(Path(folder))
        outcome, test = run_tests(Path(folder), [test_file])
    return {"outcome": outcome, "failed": test}


def main() -> int:
    """Inject all faults and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name this pattern is found in")
    args = parser.parse_args()
    check_list()
    start = time.perf_counter()
    wanted = {name: fault for name, fault in FAULTS.items() if re.search(args.only, name)}
    rows = run_all("faults", wanted, inject)
    unfaulted = run_all("faults_none", sorted({test for fault in wanted.values() for test in fault.tests}), sound)
    survivors = [name for name, row in rows.items() if row["outcome"] == "passed"]
    for name in survivors:
        print(f"not noticed: {name}")
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults noticed")
    unsound = {key: row for key, row in unfaulted.items() if row["outcome"] != "passed"}
    for key in unsound:
        print(f"fails without a fault: {key}")
    if args.only:
        return int(bool(survivors or unsound))
    late = [name for name, row in rows.items() if row["outcome"] == "timed out"]
    record(
        "faults",
        section="The tests themselves",
        claim="A fault injected into the sources makes a fast test fail.",
        cases=len(rows),
        failures=len(survivors) + len(unsound),
        measured=f"{len(rows) - len(survivors)} of {len(rows)} noticed, {len(late)} of them by running out of time; "
        f"the same tests pass without a fault ({len(unfaulted)} files of tests)",
        command="python -m tests.long.faults",
        conditions=f"{machines(rows)}; masks, blocks, arithmetic, heads, caches, C code, kernels (interpreted), "
        f"padding, "
        "conversion, calibration, metrics, intervals, checkpoints and resuming; each in a copy of the tree",
        mended=MENDED,
        not_covered=[
            "The list was drawn up by people who know the code; it is no proof that every possible fault is noticed.",
            "Kernels run on a CPU here, interpreted or as compiled to Triton's IR: faults that come later, as in loads "
            "ahead of their use, are not in it.",
        ],
        seconds=time.perf_counter() - start,
        details={"faults": rows, "without_a_fault": unfaulted},
    )
    return int(bool(survivors or unsound))


if __name__ == "__main__":
    raise SystemExit(main())
