"""What the rows of the training benchmarks share: their conditions, and that each is there whole or not at all."""

import platform
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
