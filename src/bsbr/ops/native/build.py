"""Compiling the C code once, into the user's cache folder, with whatever C compiler is there."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from bsbr.errors import UserError
from bsbr.files import replace_atomic

_FLAGS = ("-std=gnu99", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
_NATIVE = ("-march=native", "-mcpu=native")
"""Use all that the processor has: compilers take the one flag or the other, depending on the processor."""

_PATIENCE_S = 120
_SOURCES = ("attention.c", "product.h", "vector.h")


class UnavailableError(RuntimeError):
    """The native code cannot be had here; the message is the reason in a few words."""


@functools.cache
def load_library() -> ctypes.CDLL | str:
    """Load the compiled attention, compiling it if this machine has not done so yet.

    1. Name the file by the hash of sources, flags, compiler and processor, so that it is never out of date.
    2. If it is not in the cache folder, compile under a temporary name and rename: two processes may do so at once.

    The cache folder is `$XDG_CACHE_HOME/bsbr`, or ~/.cache/bsbr; the compiler `$CC`, or cc, gcc or clang.

    Returns:
        The library; or, where there is none to be had, the reason in a few words.

    Example:
        >>> isinstance(load_library(), (ctypes.CDLL, str))
        True
    """
    if os.environ.get("BSBR_NATIVE") == "0":
        return "BSBR_NATIVE=0 switches it off"
    try:
        compiler = _find_compiler()
        sources = [Path(__file__).parent / name for name in _SOURCES]
        target = _cache_folder() / f"attention-{_fingerprint(compiler, sources)}.so"
        if not target.exists():
            replace_atomic(target, lambda temporary: _compile(compiler, sources[0], temporary))
        library = ctypes.CDLL(str(target))
        library.bsbr_scratch.restype = ctypes.c_int64
        return library
    except (UnavailableError, UserError, OSError) as error:
        return " ".join(str(error).split())


def _find_compiler() -> str:
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise UnavailableError(f"no C compiler {wanted!r}" if wanted else "no C compiler: install gcc or clang, or set CC")


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path("~/.cache").expanduser()) / "bsbr"


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    parts = [source.read_bytes() for source in sources]
    words = [*_FLAGS, *_NATIVE, compiler, _run([compiler, "--version"]), platform.machine(), _processor()]
    return hashlib.sha256(b"\0".join([*parts, *(word.encode() for word in words)])).hexdigest()[:24]


def _processor() -> str:
    """What tells processors with other instructions apart, for a cache folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        next((x for x in lines if x.lower().startswith(name)), "") for name in ("model name", "flags", "features")
    )


def _compile(compiler: str, source: Path, target: Path) -> None:
    output = ""
    for native in (*_NATIVE, None):
        flags = [*_FLAGS, native] if native else [*_FLAGS]
        try:
            _run([compiler, *flags, str(source), "-o", str(target), "-lm"])
            return
        except UnavailableError as error:
            output = str(error)
    raise UnavailableError(output)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"compiler {command[0]} does not run: {type(error).__name__}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        raise UnavailableError(f"compiler {command[0]} failed: {first}")
    return done.stdout
