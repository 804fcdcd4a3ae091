"""A training text and a held-out one."""

from pathlib import Path

import pytest

from tests.training.runs import TEXT


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Their files, by the names that `run_pretrain` has for them."""
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "val.txt").write_text(TEXT[1000:2500])
    return {"text": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
