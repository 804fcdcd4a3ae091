"""Dependencies are locked, and an audit says what is known against them.

python -m tests.long.dependencies
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.reliability import record

ROOT = Path(__file__).parents[2]


def direct() -> set[str]:
    """Names of all direct dependencies, optional ones included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    names = {_name(word) for part in parts for word in part} | {_name(x) for x in project["build-system"]["requires"]}
    return names - {"bsbr"}


def locked() -> dict[str, str]:
    """What constraints.txt pins: name to version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(line): line.split("==")[1].strip() for line in lines if "==" in line and not line.startswith("#")}


def audit(program: str) -> dict[str, Any]:
    """What pip-audit says of the pinned packages and what they bring along."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "audit.json"
        command = [program, "-r", str(ROOT / "constraints.txt"), "--no-deps", "-f", "json", "-o", str(output)]
        subprocess.run(command, capture_output=True, check=False, timeout=1200)
        found = json.loads(output.read_text())["dependencies"]
    audited = [entry for entry in found if "skip_reason" not in entry]
    known = [f"{x['name']} {x['version']}: {v['id']}" for x in audited for v in x.get("vulns", [])]
    return {"packages": len(found), "audited": len(audited), "known": known}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement.strip())[0].lower().replace("_", "-")


def main() -> int:
    """Compare, audit where pip-audit is installed, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audit", default=shutil.which("pip-audit"), help="path of pip-audit")
    args = parser.parse_args()
    started = time.monotonic()
    missing = sorted(direct() - set(locked()))
    found = audit(args.audit) if args.audit else {"packages": 0, "audited": 0, "known": []}
    said = f"pip-audit could look up {found['audited']} of {found['packages']} packages"
    said += f" and knows of {len(found['known'])} vulnerabilities in these" if found["audited"] else ""
    said = said if args.audit else "pip-audit is not installed"
    blind = found["audited"] < found["packages"] or not args.audit
    record(
        "dependencies",
        section="Input and security",
        claim="Every direct dependency is pinned in constraints.txt, which all targets of make install from.",
        cases=len(direct()),
        failures=len(missing) + len(found["known"]),
        measured=said,
        not_covered=[
            "Versions of dependencies of dependencies, and hashes of packages: constraints.txt pins neither.",
            *(["Known vulnerabilities: not all packages could be looked up, nothing is claimed."] if blind else []),
        ],
        command="python -m tests.long.dependencies",
        conditions="names of pyproject.toml, extras and the build backend included",
        seconds=time.monotonic() - started,
        details={"not pinned": missing, "known": found["known"]},
    )  # fmt: skip
    print(f"{len(direct())} direct dependencies, not pinned: {missing}; {said}")
    return int(bool(missing or found["known"]))


if __name__ == "__main__":
    raise SystemExit(main())
