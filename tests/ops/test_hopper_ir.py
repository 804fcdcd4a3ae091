"""What runs on Hopper GPUs alone, as it is compiled and computed by NumPy, beside what runs elsewhere."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from tests.ops.test_triton import GPU, INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(GPU or INTERPRETED, reason="kernels run here as they are")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    from triton.runtime.jit import JITFunction

    import bsbr.ops.triton.operator  # noqa: F401 - kernels are what they are when imported
    from bsbr.ops.triton import hopper
    from tests.ops.triton_ir import launch

    monkeypatch.setattr(hopper, "_LEAST_BLOCKS", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU is no obstacle
    monkeypatch.setattr(JITFunction, "run", launch)


def late(dtype: torch.dtype, tokens: int, rows: int, width: int = 128) -> list[torch.Tensor]:
    """Queries of the last rows in two heads of one key head, keys that differ by 16, values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, width, generator=generator) for n, heads in ((rows, 2), (tokens, 1), (tokens, 1))
    )
    k += torch.randn(1, -(-tokens // 16), 1, width, generator=generator).repeat_interleave(16, 1)[:, :tokens]
    return [x.to(dtype) for x in (q, k, v)]


def both(q, k, v, config, monkeypatch, what):
    """The output without what `bsbr.ops.triton.hopper` allows, and with it."""
    from bsbr.ops.triton import hopper

    start = k.shape[1] - q.shape[1]
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, what, lambda *given: False)
        without = bsbr_attention(q, k, v, config, q_start=start, backend="triton")
    return without, bsbr_attention(q, k, v, config, q_start=start, backend="triton")


@pytest.mark.parametrize(
    ("tokens", "rows", "settings", "groups"),
    [
        (1312, 70, {}, 128),
        (1312, 70, {}, 0),
        (2150, 70, {"far": "mean", "state": "none"}, 0),
        (1088, 64, {"top_k": 40}, 128),
        (330, 330, {"top_k_per_head": (3,)}, 128),
    ],
    ids=["two tiles of blocks", "by tiles", "means", "many blocks", "short past"],
)
def test_scores_in_gluon(tokens, rows, settings, groups, monkeypatch):
    triton = pytest.importorskip("triton")
    from bsbr.ops.triton import hopper, scores_hopper, search

    if not triton.__version__.startswith(hopper._GLUON):
        pytest.skip("Gluon of this version is not used")

    calls = []
    write = scores_hopper.write_scores_on_hopper
    monkeypatch.setattr(scores_hopper, "write_scores_on_hopper", lambda *given: (calls.append(1), write(*given)))
    monkeypatch.setattr(search, "_MANY_GROUPS", groups)
    config = BSBRConfig(**{"block_size": 64, "retrieval_block_size": 16, "top_k": 4, "dense_below": 0, **settings})
    elsewhere, here = both(*late(torch.bfloat16, tokens, rows), config, monkeypatch, "scores_in_gluon")
    assert len(calls) == 1
    assert torch.equal(elsewhere, here)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1088, 1500])
def test_mean_values_by_descriptor(dtype, width, tokens, monkeypatch):
    config = BSBRConfig(block_size=64, retrieval_block_size=16, top_k=4, dense_below=0)
    elsewhere, here = both(*late(dtype, tokens, 90, width), config, monkeypatch, "copies_tiles")
    # weights are added as they were rounded for the product, elsewhere as they were
    torch.testing.assert_close(here, elsewhere, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)
    assert not torch.equal(here, elsewhere)


@pytest.mark.parametrize("place", [80, 1250], ids=["past of all", "past of some"])
def test_what_is_no_number_shows_where_it_is_past(place, monkeypatch):
    from bsbr.ops.triton import hopper

    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    q, k, v = late(torch.bfloat16, 1400, 200)
    config = BSBRConfig(block_size=64, retrieval_block_size=16, top_k=4, dense_below=0)
    clean = bsbr_attention(q, k, v, config, q_start=1200, backend="triton")
    k[0, place:], v[0, place:] = torch.nan, torch.nan
    here = bsbr_attention(q, k, v, config, q_start=1200, backend="triton")
    block = place // 64 * 64
    assert torch.equal(here[0, : max(0, block - 1200)], clean[0, : max(0, block - 1200)])
    assert here[0, max(0, block + 64 - 1200) :].isnan().all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_no_product_is_on_its_way_when_its_weights_are_replaced(dtype):
    """They are in registers: every pass over whole tiles has to wait for all of its products."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from bsbr.ops.triton import past

    sizes = {"G": 4, "B": 128, "UNIT": 128, "TOP_K": 8, "D": 128, "DP": 128, "BM": 64, "BN": 64, "PIECE": 64}
    constants = {**sizes, "FAR": True, "FIND": False, "GAPS": False, "STATE": True}
    types = dict.fromkeys(("q", "k", "v", "mean_v", "states", "part_o"), f"*{dtype}")
    types |= dict.fromkeys(("first_k", "calibration", "part_lse", "bests", "tops"), "*fp32")
    types |= {"values": f"tensordesc<{dtype}[64, 128]>", "scores": "*i16", "score_scale": "fp32", "scale": "fp32"}
    kernel = past._attend_past
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    whole = [[["tt.divisibility", 16]] if signature[x][0] in "*i" else [] for x in names]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(x),): value for x, value in constants.items()},
        {(i,): x for i, x in enumerate(whole) if x},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1, "maxnreg": 168}
    )
    loop = made.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    products = [x for x in loop.splitlines() if "ttng.warp_group_dot" in x]
    assert sum("isAsync = true" in x for x in products) == 2
    assert "pendings = 0" in products[-1]
