"""`--deterministic`: the same bits from run to run."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager


def add_deterministic_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option.

    Args:
        parser: that of a sub-command.
    """
    parser.add_argument(
        "--deterministic", action="store_true", help="only algorithms that give the same bits from run to run"
    )


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch choose only algorithms whose results do not vary from run to run; an operation without one fails.

    The attention then takes backends whose sums have a fixed order (`bsbr.ops.attention.resolve_backend`). The number
    of threads, the processor and the versions still count: compare runs of one machine.

    Args:
        on: False changes nothing.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.backends.cudnn.benchmark = before[1]
