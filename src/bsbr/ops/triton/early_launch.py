"""Programmatic dependent launch: a launch is on its way before the one in front of it has ended, and waits for that."""

import ctypes
import functools
import os

import torch

_FIRST_DRIVER = 12_030
"""CUDA version of the first driver whose graphs hold such launches."""


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Say whether a GPU, from Hopper on, and its driver take such launches.

    Args:
        device: of the tensors.
    Returns:
        True where kernels may be launched so.

    Example:
        >>> starts_early(torch.device("cpu"))
        False
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return _driver_version() >= _FIRST_DRIVER


def _driver_version() -> int:
    """CUDA version of the driver, 13000 for 13.0; 0 where it cannot be asked. PyTorch does not tell."""
    version = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value
