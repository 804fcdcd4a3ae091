"""Dependencies are locked, and an audit says what is known against them.

python -m tests.long.dependencies
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.reliability import record
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCKS = ("dev", "evaluate")
LEFT_OUT = {"torch", "bsbr"}
"""In no lock: the package itself, and torch, whose wheels differ by index; it is pinned in constraints.txt."""


def direct() -> set[str]:
    """Names of all direct dependencies, optional ones included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    names = {_name(word) for part in parts for word in part} | {_name(x) for x in project["build-system"]["requires"]}
    return names - {"bsbr"}


def pinned() -> dict[str, str]:
    """What constraints.txt pins: name to version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(line): line.split("==")[1].strip() for line in lines if "==" in line and not line.startswith("#")}


def brought_by_torch() -> set[str]:
    """Packages that the CUDA build of torch brings along, which the locks leave to it."""
    return set(re.findall(r"^# cuda: (\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def locked(lock: str) -> dict[str, dict[str, int]]:
    """What a lock holds: name to versions, by which there may be several for several Pythons, to numbers of hashes."""
    found: dict[str, dict[str, int]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements" / f"{lock}.txt").read_text()):
        if match := re.match(r"([\w.\[\]-]+)==([^\s;]+)", entry):
            found.setdefault(_name(match[1]), {})[match[2]] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
    return found


def faults_of_locks() -> list[str]:
    """Where a lock leaves a hash out, or differs from constraints.txt or from the other lock."""
    faults = []
    for lock in LOCKS:
        content = locked(lock)
        faults += [f"{lock}: {name} has no hash" for name, found in content.items() if not all(found.values())]
        faults += [
            f"{lock}: {name} {list(content[name])}, constraints.txt {version}"
            for name, version in pinned().items()
            if name in content and list(content[name]) != [version]
        ]
        faults += [f"{lock}: {name} differs from dev" for name in content if content[name] != locked("dev").get(name)]
    missing = direct() - set(locked("dev")) - LEFT_OUT
    return faults + [f"dev: {name} is missing" for name in sorted(missing)]


def faults_of_installation() -> list[str]:
    """Where what is installed for bsbr and its tests, followed to the last dependency, is not what the lock names."""
    lock, cuda, faults, left, seen = (
        locked("dev"),
        brought_by_torch(),
        [],
        [("bsbr", "dev"), ("bsbr", "datasets")],
        set(),
    )
    while left:
        name, extra = left.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            faults.append(f"{name} is not installed")
            continue
        if name not in LEFT_OUT | cuda and found.version not in lock.get(name, ()):
            faults.append(f"{name} {found.version} is installed, the lock has {list(lock.get(name, ()))}")
        for need in map(Requirement, found.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                ahead = {(_name(need.name), own) for own in ("", *need.extras)} - seen
                seen |= ahead
                left += ahead
    return faults


def audit(program: str) -> dict[str, Any]:
    """What pip-audit says of the locked packages."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "audit.json"
        lock = str(ROOT / "requirements" / "dev.txt")
        command = [program, "-r", lock, "--no-deps", "--disable-pip", "-f", "json", "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        if not output.exists():
            return {"packages": len(locked("dev")), "audited": 0, "known": [], "said": _last_line(done.stderr)}
        found = json.loads(output.read_text())["dependencies"]
    audited = [entry for entry in found if "skip_reason" not in entry]
    known = [f"{x['name']} {x['version']}: {v['id']}" for x in audited for v in x.get("vulns", [])]
    return {"packages": len(found), "audited": len(audited), "known": known, "said": ""}


def _last_line(text: str) -> str:
    """The kind of the error that ended a program, without addresses."""
    lines = [line for line in text.strip().splitlines() if line and not line.startswith(" ")]
    return re.split(r"[:(]", lines[-1])[0] if lines else "nothing"


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement.strip())[0].lower())


def main() -> int:
    """Compare, audit where pip-audit is installed, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audit", default=shutil.which("pip-audit"), help="path of pip-audit")
    args = parser.parse_args()
    started = time.monotonic()
    unpinned = [f"{name} is not in constraints.txt" for name in sorted(direct() - set(pinned()))]
    faults = unpinned + faults_of_locks() + faults_of_installation()
    found = audit(args.audit) if args.audit else {"packages": 0, "audited": 0, "known": [], "said": ""}
    said = f"pip-audit could look up {found['audited']} of {found['packages']} packages"
    said += f" and knows of {len(found['known'])} vulnerabilities in these" if found["audited"] else ""
    said = said if args.audit else "pip-audit is not installed"
    blind = found["audited"] < found["packages"] or not args.audit
    record(
        "dependencies",
        section="Input and security",
        claim="Every package that `make` installs, dependencies of dependencies included, is locked to a version and "
        "the hashes of its files, but for torch and its CUDA libraries, which are locked to a version; what is "
        "installed is what the lock names.",
        cases=len(locked("dev")),
        failures=len(faults) + len(found["known"]),
        measured=f"{len(direct())} direct dependencies, {len(locked('dev'))} packages in the lock with "
        f"{sum(sum(x.values()) for x in locked('dev').values()):,} hashes; {said}",
        mended=[
            "Dependencies of dependencies were pinned by nothing, and no package by the hash of its file.",
            "triton was pinned to 3.6.0 where the default Linux build of torch 2.13.0 needs 3.7.1, so that "
            "`make test` could not be set up with that build.",
        ],
        not_covered=[
            "torch: its wheels differ by index (with CUDA or without), so that the lock has no hash of it; its CUDA "
            "libraries are what its own metadata names.",
            "pip itself; what builds the packages that have no wheel (setuptools, by version).",
            *(["Known vulnerabilities: not all packages could be looked up, nothing is claimed."] if blind else []),
        ],
        command="python -m tests.long.dependencies",
        conditions=f"requirements/dev.txt and requirements/evaluate.txt, for every platform and Python 3.11 or later; "
        f"installed: Python {sys.version.split()[0]}",
        seconds=time.monotonic() - started,
        details={"faults": faults, "known": found["known"], "pip-audit ended with": found["said"]},
    )  # fmt: skip
    print(f"{len(direct())} direct dependencies, faults: {faults}; {said} {found['said']}")
    return int(bool(faults or found["known"]))


if __name__ == "__main__":
    raise SystemExit(main())
