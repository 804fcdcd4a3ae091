"""A config.json that makes no sense is refused in one line, quickly, and before memory is taken."""

import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bsbr.errors import UserError
from bsbr.hf.loading import load_model
from tests.long.tiny import make
from tests.security.configs import FIELDS, VALUES, with_value

CASES = [(family, field, value) for family, fields in FIELDS.items() for field in fields for value in VALUES]

HARMLESS = {
    ("llama", "rms_norm_eps", "1e-400"),
    ("bsbr-gpt2", "bsbr.block_size", "2^31"),  # means one block
    ("bsbr-gpt2", "bsbr.top_k", "0"),
    ("bsbr-gpt2", "bsbr.top_k", "2^31"),  # means all blocks
    ("bsbr-gpt2", "bsbr.dense_below", "0"),
    ("bsbr-gpt2", "bsbr.dense_below", "2^31"),
    ("bsbr-gpt2", "bsbr.retrieval_block_size", "null"),  # means as the block
}
"""What a model may well have."""


def models(folder: Path) -> dict[str, Path]:
    """A tiny model of each type."""
    given = make(folder / "given")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, bos_token_id=0, **sizes))
    llama.save_pretrained(folder / "llama")
    (given / "converted" / "manifest.json").unlink()  # it would refuse any change of the config
    return {"gpt2": given / "model", "llama": folder / "llama", "bsbr-gpt2": given / "converted"}


def outcome(model: Path, field: str, value: str, place: Path) -> tuple[str, float]:
    """Load a model with one senseless value: what was wrong with the answer ("" for nothing), and seconds."""
    shutil.copytree(model, place)
    with_value(place / "config.json", field, VALUES[value])
    started = time.perf_counter()
    try:
        load_model(place)
    except UserError as error:
        said = str(error)
        fault = "" if "\n" not in said and len(said) < 500 else f"said {said[:200]!r}"
    except Exception as error:
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        fault = "loaded"
    seconds = time.perf_counter() - started
    shutil.rmtree(place)
    return fault, seconds


def test_senseless_configs_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "transformers")
    known, faults, slow = models(tmp_path), {}, {}
    for number, (family, field, value) in enumerate(CASES):
        fault, seconds = outcome(known[family], field, value, tmp_path / str(number))
        expected = "loaded" if (family, field, value) in HARMLESS else ""
        if fault != expected:
            faults[family, field, value] = fault
        slow[family, field, value] = seconds
    assert len(CASES) >= 300
    assert not faults
    assert sorted(slow.values())[len(slow) * 99 // 100] < 5  # a second on an idle machine; this one may be shared
