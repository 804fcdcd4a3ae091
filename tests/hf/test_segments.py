"""The way from a mask to documents: what the mask function says, and that no quadratic mask is made."""

import pytest
import torch
from transformers.masking_utils import causal_mask_function

from bsbr.hf.attention import bsbr_mask
from bsbr.hf.segments import attend_by_document, layout


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.int32)[:, None, None]


def test_nothing_to_say_is_no_mask():
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": causal_mask_function}
    assert bsbr_mask(**sizes) is None
    assert bsbr_mask(**sizes, attention_mask=torch.ones(2, 5, dtype=torch.bool)) is None
    assert bsbr_mask(**sizes | {"q_length": 1, "q_offset": 4}) is None


def test_padding_static_slots_and_documents_are_told_apart():
    real = torch.tensor([[False, True, True, True]])
    sizes = {"batch_size": 1, "kv_length": 4, "mask_function": causal_mask_function}
    assert bsbr_mask(**sizes, q_length=4, attention_mask=real).flatten().tolist() == [0, 1, 1, 1]
    static = bsbr_mask(**sizes, q_length=2, q_offset=torch.tensor(1), attention_mask=real[:, :3])
    assert static.flatten().tolist() == [0, 1, 1, -1]
    document = torch.tensor([0, 0, 1, 2])
    packed = bsbr_mask(
        **sizes | {"mask_function": lambda b, h, q, k: (document[q] == document[k]) & (k <= q)},
        q_length=4, allow_is_causal_skip=False,
    )  # fmt: skip
    assert packed.flatten().tolist() == [1, 1, 2, 3]


def test_masks_that_look_ahead_are_refused():
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
    with pytest.raises(NotImplementedError, match="see later ones"):
        bsbr_mask(**sizes, mask_function=lambda b, h, q, k: (q >= 0) & (k >= 0))
    with pytest.raises(NotImplementedError, match="mask functions of the caller's own"):
        bsbr_mask(**sizes, mask_function=causal_mask_function, use_vmap=True)


@pytest.mark.parametrize(("mask", "queries"), [
    (mask_of([0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]), 5),
    (mask_of([1, 1, 2, 2, 2], [1, 2, 3, 4, 5]), 5),
    (mask_of([0, 1, 1, 1, 1, -1], [1, 1, 1, 1, 0, -1], [0, 0, 0, 0, 1, -1]), 2),
    (mask_of([0, 0, 0], [0, 1, 1]), 2),
    (mask_of([0, 0, 0]), 2),
])  # fmt: skip
def test_every_query_reads_its_own_document_and_nothing_else(mask, queries):
    """Attention is replaced by a running sum of the values, which knows what it was given."""
    document = mask[:, 0, 0]
    written = int((document[0] >= 0).sum())
    v = torch.arange(1.0, document.numel() + 1).view(*document.shape, 1, 1) ** 2
    q = v[:, written - queries : written].clone()

    def running_sum(group, q, k, v, hidden):
        assert torch.equal(k, v)
        assert q.shape[1] + group.q_start == k.shape[1] == int(group.lengths.max())
        return v.cumsum(1)[:, group.q_start :]

    o = attend_by_document(layout(mask, queries), q, v, v, None, running_sum)[..., 0, 0]
    for row in range(len(document)):
        for query in range(queries):
            slot = written - queries + query
            same = document[row, : slot + 1] == document[row, slot]
            expected = v[row, : slot + 1, 0, 0][same].sum() if document[row, slot] > 0 else 0
            assert o[row, query] == expected, (row, query)


def test_packed_documents_take_at_most_twice_their_room():
    lengths = [900] + [3] * 50
    plan = layout(mask_of([i + 1 for i, n in enumerate(lengths) for _ in range(n)]), sum(lengths))
    assert sum(group.keys.numel() for group in plan.groups) <= 2 * sum(lengths)
    assert layout(mask_of([0, 1, 1]), 3).groups[0].lengths.tolist() == [2]
