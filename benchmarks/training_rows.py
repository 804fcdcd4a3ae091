"""What the training benchmarks share: rows, there whole or not at all, their conditions, and the parts of a command."""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bsbr.evaluation.provenance import code_versions, without_folders
from bsbr.files import write_json


def conditions(command: list[str], device: torch.device) -> dict[str, Any]:
    """Say which code, machine and command a row comes from.

    Args:
        command: the process's arguments.
        device: what was computed on.
    Returns:
        `code`, `machine` and `command`.
    """
    on_cuda = device.type == "cuda"
    machine = {"device": torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})"}
    if on_cuda:
        machine["cuda"] = str(torch.version.cuda)
    return {"code": code_versions(), "machine": machine, "command": [without_folders(word) for word in command]}


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Write one run's row at once.

    Args:
        path: its file.
        row: its content.
    """
    write_json(path, row)
    print(f"{path.name} written", flush=True)


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Read every row of a folder.

    Args:
        folder: where `write_row` wrote.
    Returns:
        The rows, by file name.
    Raises:
        ValueError: there are none.
    """
    rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    if not rows:
        raise ValueError(f'"{folder}": no rows. Run first')
    return rows


def add_parts(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None],
    gather: Callable[[argparse.Namespace], None],
) -> tuple[Any, argparse.ArgumentParser]:  # fmt: skip
    """Add the parts that write rows into a folder and join them into one file.

    Args:
        parser: of the benchmark.
        run: writes rows into `rows`, on `device`.
        gather: joins `rows` into `output`.
    Returns:
        Where further parts are added, and the parser of `run`, for its other options.
    """
    parts = parser.add_subparsers(required=True)
    running, joining = parts.add_parser("run"), parts.add_parser("gather")
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running.set_defaults(act=run)
    joining.add_argument("rows")
    joining.add_argument("output")
    joining.set_defaults(act=gather)
    return parts, running
