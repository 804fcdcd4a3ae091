"""Options that several sub-commands share, and what they mean."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.files import check_writable, remove_temporaries

if TYPE_CHECKING:
    import torch


def add_attention_arguments(parser: argparse.ArgumentParser, *, top_k: int) -> None:
    """Add the options that make a BSBRConfig.

    Args:
        parser: the sub-command's.
        top_k: default of --top-k.
    """
    group = parser.add_argument_group("attention")
    group.add_argument("--block-size", type=int, default=BSBRConfig.block_size, help="tokens of the local block")
    group.add_argument("--retrieval-block-size", type=int, help="tokens of a retrieved block; None: as the local one")
    group.add_argument("--top-k", type=int, default=top_k, help="past blocks each query reads exactly")
    group.add_argument("--far", default=BSBRConfig.far, help="summary of the others: moments, mean or drop")
    group.add_argument("--state", help="first-order state: global, block, token or none; None: what suits --far")
    group.add_argument(
        "--selection", default=BSBRConfig.selection, help="which blocks: chosen by head or group, or recent"
    )
    group.add_argument(
        "--dense-below", type=int, default=BSBRConfig.dense_below, help="queries before this position are exact"
    )


def attention_config(args: argparse.Namespace) -> BSBRConfig:
    """Make the config that the options describe.

    Args:
        args: parsed options of `add_attention_arguments`.
    Returns:
        The config.
    Raises:
        ValueError: a value is out of range.
    """
    return BSBRConfig(
        block_size=args.block_size,
        retrieval_block_size=args.retrieval_block_size,
        top_k=args.top_k,
        far=args.far,
        state=args.state,
        selection=args.selection,
        dense_below=args.dense_below,
    )


def lengths(text: str) -> tuple[int, ...]:
    """Parse `128,256,512`; an argparse type.

    Args:
        text: what the user wrote.
    Returns:
        The lengths, ascending.
    Raises:
        argparse.ArgumentTypeError: not positive integers.

    Example:
        >>> lengths("256,128")
        (128, 256)
    """
    try:
        values = sorted(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        values = []
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"expected lengths such as 128,256,512, got {text!r}")
    return tuple(values)


def check_device(name: str) -> "torch.device":
    """Return the device, if it is there.

    Args:
        name: as torch writes devices.
    Returns:
        The device.
    Raises:
        UserError: no such device here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device "{name}": no such device. Use cpu or cuda') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'--device "{name}": no GPU visible. Use --device cpu')
    return device


def check_output(folder: str, marker: str, *, resume: bool | None = None, overwrite: bool | None = None) -> Path:
    """Check that an output folder can be written before long work starts, and clear what a killed run left there.

    Args:
        folder: the folder; made if missing.
        marker: the file that says that an earlier run has written there.
        resume: an earlier run may go on; None where the sub-command has no --resume.
        overwrite: an earlier run may be replaced; None where the sub-command has no --overwrite.
    Returns:
        The folder.
    Raises:
        UserError: it is a file, holds another run, or cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f'output "{folder}": is a file. Choose a folder')
    if (path / marker).exists() and not resume and not overwrite:
        ways = [f"--{name}" for name, value in (("resume", resume), ("overwrite", overwrite)) if value is not None]
        instead = f"Add {' or '.join(ways)}, or choose another folder" if ways else "Choose another folder"
        raise UserError(f'output "{folder}": holds an earlier run. {instead}')
    check_writable(path)
    remove_temporaries(path)
    return path
