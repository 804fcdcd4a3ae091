"""Every dependency is locked, with hashes, and what `make` installed is what the lock names."""

import sys
from pathlib import Path

import pytest

from tests.long.dependencies import (
    ROOT,
    brought_by_torch,
    direct,
    faults_of_installation,
    faults_of_locks,
    locked,
    pinned,
)


def test_direct_dependencies_are_pinned() -> None:
    assert len(direct()) >= 15
    assert not direct() - set(pinned())


def test_the_locks_hold_a_hash_of_every_package_at_the_pinned_version() -> None:
    assert len(locked("dev")) > 100
    assert faults_of_locks() == []


def test_only_torch_brings_packages_that_are_in_no_lock() -> None:
    assert "torch" not in locked("dev")
    assert all(name.startswith(("nvidia-", "cuda-")) for name in brought_by_torch())
    assert not brought_by_torch() & set(locked("dev"))


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".dev").exists() or Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(),
    reason="an environment that make did not install need not have the locked versions",
)
def test_what_is_installed_is_what_the_lock_names() -> None:
    assert faults_of_installation() == []
