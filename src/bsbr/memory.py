"""Memory that is there, asked before much of it is taken."""

import re
from pathlib import Path

from bsbr.errors import ResourceError

_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return how much memory this process may still take.

    The least of what the system, the control group (a container's limit) and the address-space limit leave.

    Returns:
        Bytes; None where nothing says.

    Example:
        >>> found = available_bytes()
        >>> found is None or found > 0
        True
    """
    found = [_system(), _group(), _address_space()]
    known = [value for value in found if value is not None]
    return max(0, min(known)) if known else None


def require_memory(need: int, what: str, advice: str) -> None:
    """Refuse work that cannot fit, before it allocates anything.

    Args:
        need: bytes that the work takes at the least.
        what: the work, as the error's first words.
        advice: what to change, as its last ones.
    Raises:
        ResourceError: there is less.
    """
    free = available_bytes()
    if free is not None and need > free:
        raise ResourceError(f"{what}: needs at least {_size(need)} of memory, {_size(free)} free. {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out: Python's, torch's on a GPU, or the CPU allocator's.

    Args:
        error: any.
    Returns:
        True if so.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError) or (said and isinstance(error, RuntimeError))


def _size(count: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB")):
        if count >= 1000**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count:,} bytes"


def _number(path: Path, pattern: str, factor: int = 1) -> int | None:
    try:
        match = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * factor if match else None


def _system() -> int | None:
    return _number(Path("/proc/meminfo"), r"^MemAvailable:\s+(\d+)", 1024)


def _group() -> int | None:
    limit, used = (_number(_GROUP / name, r"^(\d+)$") for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    cached = _number(_GROUP / "memory.stat", r"^inactive_file (\d+)") or 0  # given back when it is wanted
    return limit - used + cached


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = _number(Path("/proc/self/statm"), r"^(\d+)", resource.getpagesize()) or 0
    return limit - used
