"""What holds for every test: files that need an absent package are left out, and nobody loads a pickle."""

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_NEEDS = {"triton": "src/bsbr/ops/triton/*.py", "lm_eval": "src/bsbr/evaluation/harness.py"}

collect_ignore_glob = [files for package, files in _NEEDS.items() if importlib.util.find_spec(package) is None]

_PACKAGE = str(Path(__file__).parent / "src" / "bsbr")
_loaded: list[str] = []
"""Pickles that code of the package, or what it called, has opened."""


def _watch(event: str, args: tuple) -> None:
    if event == "pickle.find_class":
        _note(f"{args[0]}.{args[1]}")


def _note(what: str) -> None:
    """Remember a pickle, if the package is among those who wanted it."""
    frame = sys._getframe(2)
    first = frame.f_code.co_filename
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None:
        _loaded.append(f"{what} by {first}, for {frame.f_code.co_filename}")


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which the package opens a pickle, be it by torch's own reader."""
    torch = sys.modules.get("torch")
    if torch is not None:
        real = torch.load

        def load(*args: object, **kwargs: object) -> object:
            _note(f"torch.load of {args[:1]}")
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, "load", load)
    yield
    found = list(_loaded)
    _loaded.clear()
    assert not found, f"a pickle was opened: {found[:3]}"


@pytest.fixture(autouse=True, scope="session")
def _heed_ctrl_c() -> None:
    """Let tests of Ctrl-C work where the suite is a shell's background job, which starts with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
