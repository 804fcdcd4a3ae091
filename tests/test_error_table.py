"""The error table's attention is the operation's, where the operation has the same summary."""

import math

import pytest
import torch
from benchmarks.block_summaries import BLOCK, Layer, clusters, table
from benchmarks.error_table import errors, estimate, kinds, truth

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
    entries = clusters(layer, 4)  # four clusters in blocks of four keys
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
    assert kinds(layer._replace(q=q, k=sink)) == ["sink-like"] * 2
    assert kinds(layer._replace(q=q, k=zero)) == ["broad"] * 2
    at = torch.full_like(layer.at, 599)
    own[:, 512:] = math.log(20) / 8
    assert kinds(layer._replace(q=q, k=own, at=at)) == ["local"] * 2
