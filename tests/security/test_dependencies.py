"""Every direct dependency is pinned."""

from tests.long.dependencies import direct, locked


def test_direct_dependencies_are_pinned() -> None:
    assert len(direct()) >= 15
    assert not direct() - set(locked())
