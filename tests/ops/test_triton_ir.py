"""Kernels as they are compiled, computed by NumPy: what the interpreter, which runs their Python, cannot show."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import UNCALIBRATED, bsbr_attention, reference_attention
from tests.ops import test_triton as forward
from tests.ops import test_triton_decode as decoding
from tests.ops import test_triton_past as past
from tests.ops.choices import choices, masses, wrong_choices
from tests.ops.test_triton import GPU, INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(GPU or INTERPRETED, reason="kernels run here as they are")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    from triton.runtime.jit import JITFunction

    import bsbr.ops.triton.decode
    import bsbr.ops.triton.operator  # noqa: F401 - kernels are what they are when imported
    from tests.ops.triton_ir import launch

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU is no obstacle
    monkeypatch.setattr(JITFunction, "run", launch)


@pytest.mark.parametrize("name", decoding.CASES)
def test_decoding(name):
    decoding.check(name, torch.float32, 2)


@pytest.mark.parametrize("name", ["plain", "eighteen columns"])
def test_decoding_with_a_far_field_in_one_part(name, monkeypatch):
    decoding.test_a_far_field_in_one_part_is_read_tile_by_tile(name, monkeypatch)


@pytest.mark.parametrize("name", ["units, rows, two tokens", "odd block, means", "eighteen columns"])
def test_decoding_in_16_bits(name):
    decoding.check(name, torch.float16, 2)


@pytest.mark.parametrize(("name", "most"), [("plain", 1 << 30), ("units", 0), ("dropped far field", 1 << 30)])
def test_decoding_of_heads_that_read_different_numbers(name, most, monkeypatch):
    decoding.test_heads_that_read_different_numbers_are_one_step(name, most, monkeypatch)


@pytest.mark.parametrize(("query", "held"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_decoding_of_queries_that_have_another_dtype_than_the_cache(query, held):
    decoding.test_queries_need_not_have_the_dtype_of_the_cache(query, held)


@pytest.mark.parametrize("token", [643, 1600])
def test_a_key_that_is_no_number_shows(token):
    decoding.test_a_key_that_is_no_number_shows(token)


@pytest.mark.parametrize("infinite", [3, 60])
def test_many_blocks_where_some_are_no_number(infinite):
    """They come first; none is left out, and nothing is read that was never written."""
    q, k, v = (x.half() for x in past.late())
    k[0, : 16 * infinite : 16] = torch.inf
    config = BSBRConfig(block_size=16, top_k=50, dense_below=0)
    o = bsbr_attention(q, k, v, config, q_start=k.shape[1] - q.shape[1], backend="triton")
    assert o.isnan().all()


def test_the_choice_of_blocks_is_told():
    """Benchmarks compare what they time with the reference, given the same choice."""
    from bsbr.ops.triton.operator import triton_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, heads, 16, generator=generator) for heads in (4, 2, 2))
    config = BSBRConfig(block_size=16, top_k=2, dense_below=100)
    calibration = torch.tensor(UNCALIBRATED).expand(4, 5)
    o, lse, chosen = triton_attention(q, k, v, config, scale=0.25, q_start=0, calibration=calibration)
    expected, expected_lse, wanted = reference_attention(q, k, v, config)
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=0, atol=2e-5)
    assert torch.equal(chosen.sort(-1).values, wanted[:, -chosen.shape[1] :].sort(-1).values.int())


def test_late_queries_of_heads_that_read_different_numbers():
    """Some of the second head's would read all of their past if it were a call of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 640, 2, 16, generator=generator) for _ in range(3))
    config = BSBRConfig(block_size=16, top_k_per_head=(1, 50), dense_below=0)
    o = bsbr_attention(q[:, 600:], k, v, config, q_start=600, backend="triton")
    expected = reference_attention(q[:, 600:], k, v, config, q_start=600)[0]
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", forward.CASES)
def test_outputs(name, dtype):
    forward.check_values(forward.draw(name), dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("name", forward.CASES)
def test_gradients(name, dtype, tolerance):
    forward.check_gradients(forward.draw(name), dtype, tolerance)


@pytest.mark.parametrize("together", [True, False], ids=["one call", "by power"])
@pytest.mark.parametrize("name", forward.BY_HEAD)
def test_heads_that_read_different_numbers_of_blocks(name, together, monkeypatch):
    forward.test_heads_that_read_different_numbers_of_blocks(name, together, monkeypatch)


@pytest.mark.parametrize("way", ["many", "16 bits, many in parts"])
def test_a_search_for_many_blocks(way, monkeypatch):
    past.ask_for(way, monkeypatch)
    past.test_late_queries_choose_and_read_as_the_reference(way, 30.0, "moments")
    past.test_equal_blocks_in_tiles_of_different_best_go_to_the_lower(way)
    past.test_nothing_is_left_of_a_past_that_is_read_whole(way)
    past.test_a_key_that_is_no_number_shows_where_its_block_is_past(way)
    past.test_gradients_fit_the_scores_of_the_forward_pass(way, "plain")


def test_scores_held_for_a_few_tiles_at_a_time(monkeypatch):
    from bsbr.ops.triton import past as kernels

    q, k, v = (x.half() for x in past.late(rows=80))
    given = {"q_start": k.shape[1] - q.shape[1], "backend": "triton"}
    whole = bsbr_attention(q, k, v, past.FAR, **given)
    rounds, write = [], kernels.write_scores
    monkeypatch.setattr(kernels, "write_scores", lambda *args: (rounds.append(args[1]), write(*args)))
    monkeypatch.setattr(kernels, "_SCORE_BYTES", 0)
    assert torch.equal(bsbr_attention(q, k, v, past.FAR, **given), whole)
    assert len(rounds) == 5


@pytest.mark.parametrize("counts", [None, (40, 33), (64, 50)], ids=str)
def test_many_blocks(counts):
    past.test_more_blocks_than_the_search_writes_out(counts)


@pytest.mark.parametrize("way", ["by groups", "by groups, 8 peaks at once", "by tiles", "by tiles, 1 of them at once"])
def test_choices_in_16_bits(way, monkeypatch):
    """Scores and search of 16-bit input, which the interpreter cannot compute."""
    from bsbr.ops.triton import search

    if "by tiles" in way:
        monkeypatch.setattr(search, "_MANY_GROUPS", 0)
    if "at once" in way:
        monkeypatch.setattr(search, "_AT_ONCE", 0)
        monkeypatch.setattr(search, "_COLUMNS", 1 if "1 of" in way else 8)
    q, k, v = (x.half() for x in past.late())
    start = k.shape[1] - q.shape[1]
    found = choices("triton", q, k, v, past.FAR, past.UNCALIBRATED, start)
    mass, size = masses(q, k, past.FAR, past.UNCALIBRATED, start)
    assert wrong_choices(found, mass, size, past.FAR.top_k, 2.0**-11)[0] == 0
