"""The error table's attention is the operation's, where the operation has the same summary."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.block_summaries import BLOCK, Layer, clusters, table
from benchmarks.error_table import errors, estimate, kinds, traits, truth, unrotated
from benchmarks.error_table_page import page, section
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bsbr import BSBRConfig
from bsbr.ops import UNCALIBRATED, reference_attention

SETTINGS = {
    "drop": {"far": "drop"},
    "mean": {"far": "mean"},
    "variance": {"far": "moments", "state": "none"},
    "moments, global state": {"state": "global"},
    "moments, block state": {"state": "block"},
    "moments, token state": {"state": "token"},
    "units of 32: moments, global state": {"state": "global", "retrieval_block_size": 32},
}


def tensors(length: int = 600) -> tuple[torch.Tensor, Layer]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, length, 2, 8, generator=generator)
    at = torch.tensor([300, 383, 384, 512, 599])
    by_head = [x.transpose(0, 1) for x in (q, k, v)]
    layer = Layer(by_head[0][:, at], by_head[1], by_head[2], at, by_head[0][:, at // BLOCK * BLOCK - 1])
    return torch.stack([q, k, v])[:, None], layer


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_is_the_operation_at_the_sampled_queries(name: str) -> None:
    (q, k, v), layer = tensors()
    method = table(BLOCK)[name]
    unit = method.unit
    config = BSBRConfig(block_size=BLOCK, top_k=BLOCK // unit, dense_below=0, **SETTINGS[name])
    scalars = torch.tensor(UNCALIBRATED).repeat(2, 1) + 0.3 * torch.arange(10).view(2, 5) / 10
    expected, _, _ = reference_attention(q, k, v, config, scale=1.0, calibration=scalars)
    entries, exact = method.make(layer, unit), truth(layer, unit)
    # the operation weighs the blocks for the block state with calibrated scores, the table with plain ones
    scalars = torch.tensor(UNCALIBRATED).repeat(2, 1) if name == "moments, block state" else scalars
    if name == "moments, block state":
        expected, _, _ = reference_attention(q, k, v, config, scale=1.0)
    found, _ = estimate(entries, exact, scalars, config.top_k, method.drops)
    assert torch.allclose(found, expected[0, layer.at].transpose(0, 1).float(), atol=2e-4)


def test_exact_masses_have_no_error_and_one_key_per_cluster_is_exact() -> None:
    _, layer = tensors()
    exact = truth(layer, 4)
    entries = clusters(layer, 4, 4)  # four clusters in blocks of four keys
    plain = torch.tensor(UNCALIBRATED).repeat(2, 1)
    found = errors(entries, exact, plain, 2, False, slice(None))
    assert float(found["mass_error"].max()) < 1e-4
    assert float(found["output_error"].max()) < 1e-4
    poor = table(BLOCK)["mean"].make(layer, 4)
    assert float(errors(poor, exact, plain, 2, False, slice(None))["mass_error"].min()) > 0.05


def test_heads_are_told_apart_by_where_their_mass_lies() -> None:
    _, layer = tensors()
    zero = torch.zeros_like(layer.k)
    sink, own = zero.clone(), zero.clone()
    sink[:, 0] = 10 * torch.ones(8)
    q = torch.ones_like(layer.q)
    assert kinds(traits(layer._replace(q=q, k=sink))) == ["sink-like"] * 2
    assert kinds(traits(layer._replace(q=q, k=zero))) == ["broad"] * 2
    at = torch.full_like(layer.at, 599)
    own[:, 512:] = math.log(20) / 8
    assert kinds(traits(layer._replace(q=q, k=own, at=at))) == ["local"] * 2


def test_rotary_positions_are_taken_off() -> None:
    model = LlamaModel(LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8))
    holder = SimpleNamespace(base_model=model)
    x = torch.randn(1, 2, 50, 8)
    cos, sin = model.rotary_emb(x, torch.arange(50)[None])
    turned, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert (turned - x).abs().max() > 0.1
    assert torch.allclose(unrotated(holder, turned[0]), x[0], atol=1e-5)


def test_tables_hold_means_by_kind_and_by_layer() -> None:
    rows = [
        {"layer": layer, "head": 0, "kind": kind, "rotation": "kept", "summary": "drop", "calibrated": "no",
         "bytes_per_token": 4.0, "output_error": error, "mass_error": 1.0}
        for layer, kind, error in ((0, "local", 0.25), (1, "broad", 0.75))
    ]  # fmt: skip
    protocol = {"windows": 1, "length": 1024, "top_k": 2, "block_size": 128}
    text = section({"rows": rows, "protocol": protocol, "model": {"name": "model"}})
    assert "| drop | no | 4 | 0.500 / 1.00 | 0.250 / 1.00 | 0.750 / 1.00 |" in text
    assert "| summary | calibrated | bytes per token | all (2) | local (1) | broad (1) |" in text
    assert "| summary | calibrated | bytes per token | all (2) | layer 0 | layer 1 |" in text


def test_the_page_is_that_of_the_committed_results() -> None:
    root = Path(__file__).parent.parent
    files = sorted((root / "benchmarks" / "results").glob("error_table_*.json"))
    assert files
    assert (root / "docs" / "error_table.md").read_text() == page([json.loads(file.read_text()) for file in files])
