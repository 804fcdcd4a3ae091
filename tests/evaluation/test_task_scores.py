"""Accuracy is counted by answer and by distance, and the controls are what their names say."""

from types import SimpleNamespace

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.data.tasks import TaskConfig
from bsbr.data.tasks.config import OPEN
from bsbr.errors import UserError
from bsbr.evaluation.routing import OneDraw
from bsbr.evaluation.tasks import controls, score_task


class Knows:
    """Knows what followed the first OPEN, if that was at most `reach` tokens before the end."""

    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, ids, use_cache, logits_to_keep):
        first = (ids == OPEN).int().argmax(1)
        said = ids[torch.arange(len(ids)), first + 1]
        said = torch.where(ids.shape[1] - (first + 1) <= self.reach, said, 0)
        logits = torch.nn.functional.one_hot(said, 64).float() * 50
        return SimpleNamespace(logits=logits[:, None].expand(-1, len(logits_to_keep), -1))


def test_accuracy_is_by_distance():
    config = TaskConfig(task="induction", length=64, vocab=64)
    best = score_task(Knows(64), config, examples=100, seed=0, batch=7)
    assert best.accuracy.value == 1.0
    assert best.nll < 1e-6
    assert best.accuracy.low == pytest.approx(0.963, abs=1e-3)
    short = score_task(Knows(15), config, examples=100, seed=0, batch=7)
    for least, most, found in short.by_distance:
        assert least <= most
        assert found.value == (1.0 if most <= 15 else 0.0)
    assert sum(found.n for _, _, found in short.by_distance) == 100
    assert short.chance == 1 / 20


def test_an_answer_is_right_when_all_its_tokens_are():
    class OneDigit(Knows):
        def __call__(self, ids, use_cache, logits_to_keep):
            right = torch.nn.functional.one_hot(ids[:, logits_to_keep[1:]], 64).float()
            return SimpleNamespace(logits=torch.cat([right, torch.zeros_like(right[:, :1])], 1))

    config = TaskConfig(task="passkey", length=64, vocab=64, digits=3)
    found = score_task(OneDigit(0), config, examples=20, seed=0)
    assert found.accuracy.value == 0.0
    assert found.accuracy.n == 20
    assert found.chance == 20**-3


def test_the_batch_size_changes_nothing(tiny_gpt2):
    config = TaskConfig(task="needle_multiquery", length=48, vocab=64, pairs=4, queries=2)
    scores = [score_task(tiny_gpt2, config, examples=8, seed=(1, 2), batch=8).to_dict() for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]["accuracy"]["n"] == 16


def test_controls_read_what_they_say(tiny_gpt2):
    sparse = convert(tiny_gpt2, BSBRConfig(block_size=8, top_k=2, dense_below=0))
    ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))
    found = {name: model(ids, use_cache=False).logits for name, model in controls(sparse).items()}
    local = convert(tiny_gpt2, BSBRConfig(block_size=8, top_k=0, far="drop", dense_below=0))
    assert torch.equal(found["retrieval_off"], local(ids, use_cache=False).logits)
    summaries = convert(tiny_gpt2, BSBRConfig(block_size=8, top_k=0, dense_below=0))
    assert torch.equal(found["summaries_only"], summaries(ids, use_cache=False).logits)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 64
    off = controls(sparse)["retrieval_off"](changed, use_cache=False).logits
    assert torch.equal(off[0, 8:], found["retrieval_off"][0, 8:])
    assert not torch.equal(found["random_blocks"], sparse(ids, use_cache=False).logits)


def test_nothing_leaves_blocks_that_were_not_drawn(tiny_gpt2):
    config = BSBRConfig(block_size=8, top_k=2, dense_below=0)
    random = controls(convert(tiny_gpt2, config), seed=1)["random_blocks"]
    ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))
    states = torch.zeros(1, 64, 2, 8)
    chosen = OneDraw(1)(states, states, config, scale=1.0, layer=0)[0, :, 0]
    drawn = chosen[-1].tolist()
    assert chosen[2 * 8].tolist() == [0, 1]
    before = random(ids, use_cache=False).logits
    for block in range(7):
        changed = ids.clone()
        changed[0, 8 * block] = (changed[0, 8 * block] + 1) % 64
        after = random(changed, use_cache=False).logits
        assert torch.equal(after[0, 56:], before[0, 56:]) is (block not in (*drawn, 0, 1))


def test_controls_are_of_block_retrieval(tiny_gpt2):
    with pytest.raises(UserError, match="controls are of models with block retrieval"):
        controls(tiny_gpt2)
    with pytest.raises(ValueError, match="examples = 0"):
        score_task(tiny_gpt2, TaskConfig(task="induction", length=16, vocab=64), examples=0, seed=0)


@pytest.fixture
def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=64)).eval()
