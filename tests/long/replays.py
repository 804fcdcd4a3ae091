"""The same command gives the same bits, and a result file can be made again from what it says.

python -m tests.long.replays
"""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.reliability import record

from bsbr.cli import main as bsbr
from bsbr.evaluation.provenance import cpu_name
from tests.long.tiny import ATTENTION, make, outcome

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "evaluate.txt"
SMALL = (
    "--window",
    "64",
    "--documents",
    "2",
    "--lengths",
    "16,32",
    "--repeats",
    "2",
    "--block-size",
    "8",
    "--top-k",
    "1",
)


def deterministic(place: Path, given: Path) -> list[str]:
    """Run each command with --deterministic twice, in processes of their own, and compare.

    Args:
        place: an empty folder.
        given: from `tests.long.tiny.make`.
    Returns:
        What differed.
    """
    text = str(given / "text.txt")
    sizes = "--layers 1 --heads 2 --hidden 16 --context 16 --vocab 270 --batch-tokens 64 --tokens 2560"
    tuning = "--length 32 --accumulation 2 --distill-tokens 1024 --transfer-tokens 256 --eval-windows 1 --device cpu"
    calls = {
        "evaluate": ("evaluate", str(given / "model"), "--text", text, "--calibrate", text, *SMALL, "--output"),
        "pretrain": ("pretrain", "--text", text, "--val", text, *sizes.split(), "--device", "cpu", "--output"),
        "finetune": ("finetune", str(given / "converted"), "--text", text, *tuning.split()),
    }
    differ = []
    for name, words in calls.items():
        found = []
        for number in range(2):
            output = place / str(number) / name  # results hold the folder's name
            output.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "bsbr.cli", *words, str(output), "--deterministic"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
            found.append({k: v for k, v in outcome(output).items() if not k.endswith((".png", ".html", ".md"))})
        if found[0] != found[1]:
            keys = [key for key in found[0] if found[0][key] != found[1].get(key)]
            differ.append(f"{name}: {', '.join(keys)}")
    return differ


def replay(files: list[Path]) -> dict[str, tuple[int, str]]:
    """Replay result files.

    Args:
        files: the files.
    Returns:
        Name to exit code and last line.
    """
    found = {}
    for file in files:
        said = io.StringIO()
        with redirect_stdout(said):
            code = bsbr(["evaluate", "--replay", str(file)])
        found[file.name] = (code, (said.getvalue().strip().splitlines() or [""])[-1])
        print(code, said.getvalue()[-1500:], flush=True)
    return found


def wheels(place: Path) -> list[str]:
    """Build the package twice and give the SHA-256 of both wheels."""
    digests = []
    for number in range(2):
        folder = place / f"wheel{number}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(folder),
            ".",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        digests += [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.whl")]
        time.sleep(2.1)  # zip files keep times in steps of two seconds
    return digests


def installs(place: Path) -> list[str]:
    """Install the wheel and the lock of `bsbr evaluate` twice, and digest every file but what names the folder."""
    wheel = next((place / "wheel0").glob("*.whl"))
    digests = []
    for number in range(2):
        target = place / f"install{number}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--target", str(target)]
        subprocess.run([*command, "--require-hashes", "--requirement", str(LOCK)], check=True)
        subprocess.run([*command, str(wheel)], check=True)
        total = hashlib.sha256()
        for path in sorted(target.rglob("*")):
            if path.is_file() and path.name not in ("direct_url.json", "RECORD") and path.parent.name != "bin":
                total.update(f"{path.relative_to(target)}\n".encode() + path.read_bytes())
        digests.append(total.hexdigest())
    return digests


def check_deterministic(place: Path, given: Path) -> int:
    """Write the result of running twice."""
    started = time.monotonic()
    differ = deterministic(place, given)
    print("deterministic:", differ or "equal", flush=True)
    record(
        "deterministic",
        section="Reproducibility",
        claim="With --deterministic, evaluate, finetune and pretrain give the same bits from run to run.",
        cases=3,
        failures=len(differ),
        measured="; ".join(differ) or "weights and figures of two runs each, in processes of their own: equal",
        not_covered=[
            "GPUs: there --deterministic takes the chunked backend for gradients, since the "
            "kernels add them in no fixed "
            "order; it was not run on one.",
            "Other machines, numbers of threads or versions: PyTorch promises no equal bits between those.",
        ],
        command="python -m tests.long.replays",
        conditions=f"CPU ({cpu_name()}), two threads; tiny models",
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return len(differ)


def check_replays(place: Path, given: Path, files: list[Path]) -> int:
    """Write the result of replays: of an evaluation and a sweep made now, and of committed files."""
    started = time.monotonic()
    os.chdir(given)
    words = ("evaluate", "model", "--text", "text.txt", "--calibrate", "text.txt", *ATTENTION, *SMALL[:8])
    bsbr([*words, "--output", str(place / "results")])
    sweep = ("evaluate", "model", "--sweep", "--text", "text.txt", "--calibrate", "text.txt", "--block-size", "8")
    few = (
        "--budgets",
        "8,16",
        "--lengths",
        "64",
        "--repeats",
        "2",
        "--calibration-tokens",
        "96",
        "--documents",
        "2",
    )
    bsbr([*sweep, *few, "--output", str(place / "sweep")])
    found = replay(
        [
            place / "results" / "agreement_rates.json",
            place / "sweep" / "sweep.json",
            *(file if file.is_absolute() else ROOT / file for file in files),
        ]
    )
    os.chdir(ROOT)
    bad = {name: said for name, (code, said) in found.items() if code}
    committed = ", ".join(str(file) for file in files)
    record(
        "replays",
        section="Reproducibility",
        claim="`bsbr evaluate --replay FILE` runs a result file's own command again and finds "
        "every digit the same, times "
        "and memory excepted.",
        cases=len(found),
        failures=len(bad),
        measured="; ".join(said.split(";")[0] for _, said in found.values()),
        not_covered=[
            "Result files of `bsbr benchmark`, which hold nothing but times; training.json and "
            "finetune.json; files of "
            "`benchmarks`, which name their commands and have no replay.",
            "Committed files whose model is no part of the package, or that were made on another "
            "processor or version.",
        ],
        command=" ".join(["python -m tests.long.replays", *(str(file) for file in files)]),
        conditions=f"CPU ({cpu_name()}); files of an evaluation and a sweep of a tiny model"
        + (f"; committed: {committed}" if committed else ""),
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return len(bad)


def check_builds(place: Path) -> int:
    """Write the result of building and installing twice."""
    started = time.monotonic()
    built = wheels(place)
    placed = installs(place)
    record(
        "builds",
        section="Reproducibility",
        claim="Two builds of the package give the same wheel, and two installs of it and of "
        "locked dependencies the same files.",
        cases=2,
        failures=(len(set(built)) != 1) + (len(set(placed)) != 1),
        measured=f"wheel SHA-256 {built[0][:16]}...; installed files {placed[0][:16]}...",
        not_covered=["torch, which is in no lock: its wheels differ by index."],
        command="python -m tests.long.replays",
        conditions=f"pip and hatchling; Python {sys.version.split()[0]}; installed beside the wheel: what "
        f"requirements/evaluate.txt locks, by hash, in folders of their own; RECORD and scripts, which name "
        "the folder, left out",
        seconds=time.monotonic() - started,
    )  # fmt: skip
    print("builds:", built, placed, flush=True)
    return (len(set(built)) != 1) + (len(set(placed)) != 1)


def main() -> int:
    """Run twice, replay, build twice; write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="committed result files to replay beside new ones")
    parser.add_argument("--only", choices=("deterministic", "replays", "builds"))
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        given = make(place / "given")
        if args.only in (None, "builds"):
            failures += check_builds(place)
        if args.only in (None, "deterministic"):
            failures += check_deterministic(place, given)
        if args.only in (None, "replays"):
            failures += check_replays(place, given, args.files)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
