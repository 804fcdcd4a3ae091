"""Which blocks are read: those of largest estimated mass, of equal ones the earlier, in every backend."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from tests.long.selection import drawn, tied
from tests.ops.cases import skip_unless_able


@pytest.mark.parametrize("kind", [drawn, tied], ids=["random", "ties"])
def test_choices_are_those_of_largest_mass(kind):
    """The long run's cases, some of them: masses by a formula of the test's own."""
    queries = 0
    for seed in range(60):
        for name, (wrong, _, count) in kind(seed).items():
            assert not wrong, f"case {seed}, {name}: {wrong} of {count} choices"
            queries += count
    assert queries > 10_000


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_a_better_block_pushes_the_later_of_two_equal_ones_out(backend):
    """Blocks 0 and 1 are equal, block 2 is better: two are read, 0 and 2. The own value of each block shows which."""
    k = torch.zeros(1, 16, 1, 4)
    k[:, 8:12] = 1
    q, v = torch.ones(1, 16, 1, 4), torch.eye(4).repeat_interleave(4, 0)[None, :, None]
    config = BSBRConfig(block_size=4, top_k=2, far="drop", dense_below=0)
    skip_unless_able(backend, q, config)
    o = bsbr_attention(q, k, v, config, backend=backend)[0, -1, 0]
    assert (o > 0).tolist() == [True, False, True, True]
    expected = reference_attention(q, k, v, config)[0][0, -1, 0]
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=1e-6)
