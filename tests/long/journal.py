"""Rows of a long run, kept as they come, so that a run that was stopped goes on where it was."""

import argparse
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

from bsbr.evaluation.provenance import cpu_name

FOLDER = Path("results") / "long"


def arguments(description: str | None, module: str) -> tuple[argparse.Namespace, str]:
    """Read what every long run takes: `--only PATTERN`, to run a part of it.

    Args:
        description: of the program; its first line is shown.
        module: name of the module.
    Returns:
        The arguments, and the command as a result should state it.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the keys that this pattern is found in")
    args = parser.parse_args()
    return args, f"python -m {module}" + (f" --only '{args.only}'" if args.only else "")


def matching(keys: Iterable[Any], pattern: str) -> list[Any]:
    """Keys whose name the pattern is found in.

    Example:
        >>> matching(["gpt2 / full", "llama / none"], "^llama")
        ['llama / none']
    """
    return [key for key in keys if re.search(pattern, str(key))]


def run_all(
    name: str, keys: Iterable[Any], work: Callable[[Any], dict[str, Any]], folder: Path = FOLDER
) -> dict[str, dict[str, Any]]:
    """Do the work for every key that has no row yet.

    As many processes work as the environment variable WORKERS says, 1 without it, each with one thread; rows do not
    depend on it.

    Args:
        name: of the run; its rows are in `name`.jsonl.
        keys: what to work on; `str` of each is its name.
        work: a function of a module, called with a key; returns a row, a dict of what JSON can hold.
        folder: where the rows are kept.
    Returns:
        The row of each key, by its name, with the machine it was made on under "where".

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as there:
        ...     for last in (2, 3):
        ...         rows = run_all("squares", range(last), lambda x: {"square": x * x}, Path(there))
        >>> rows["2"]["square"]
        4
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    rows = _read(file)
    keys = list(keys)
    here = machine()
    left = [key for key in keys if str(key) not in rows]
    with file.open("a") as out:
        for key, row in track(_results(left, work), name, len(left), console=Console(stderr=True)):
            rows[str(key)] = row | {"where": here}
            out.write(json.dumps({"key": str(key), "row": rows[str(key)]}) + "\n")
            out.flush()
    return {str(key): rows[str(key)] for key in keys}


def machine() -> str:
    """Name this machine's processor and the versions that decide what is computed.

    Returns:
        A few words, for the rows that are made here.
    """
    versions = torch.__version__.partition("+")[0], transformers.__version__, platform.python_version()
    return "{}, PyTorch {}, transformers {}, Python {}".format(cpu_name(), *versions)


def machines(rows: dict[str, dict[str, Any]]) -> str:
    """Say on which machines rows were made, and how many on each where there are several.

    Args:
        rows: from `run_all`.
    Returns:
        A few words.

    Example:
        >>> machines({"a": {"where": "X"}, "b": {"where": "Y"}, "c": {"where": "X"}})
        'CPU (X: 2 rows; Y: 1 rows)'
    """
    counts = Counter(row["where"] for row in rows.values())
    if len(counts) == 1:
        return f"CPU ({next(iter(counts))})"
    return "CPU (" + "; ".join(f"{where}: {count:,} rows" for where, count in counts.most_common()) + ")"


def _results(keys: list[Any], work: Callable[[Any], dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    workers = min(int(os.environ.get("WORKERS", "1")), len(keys))
    if workers <= 1:
        yield from ((key, work(key)) for key in keys)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(work, key): key for key in keys}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Whole rows only: what a kill tore off is cut away, so that the next row starts on a line of its own."""
    if not file.exists():
        return {}
    whole, newline, _ = file.read_text().rpartition("\n")
    file.write_text(whole + newline)
    return {line["key"]: line["row"] for line in map(json.loads, whole.splitlines())}
