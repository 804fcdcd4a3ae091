"""Which parameter is moved by what, and the schedule."""

import pytest
import torch

from bsbr.training.build import build_model
from bsbr.training.language_model import token_nll
from bsbr.training.optimizer import SplitOptimizer, schedule
from bsbr.training.recipe import PretrainConfig


def _model():
    recipe = PretrainConfig(layers=1, heads=2, hidden=16, context=8, batch_tokens=8, tokens=8)
    return build_model(recipe, 20)


def _optimizer(model) -> SplitOptimizer:
    return SplitOptimizer(model, lr=1e-2, muon_lr=1e-2, weight_decay=0.1)


def _train(model, optimizer: SplitOptimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        token_nll(model, torch.randint(20, (2, 9), generator=generator)).mean().backward()
        optimizer.step()


def test_block_matrices_get_muon_and_everything_else_adamw() -> None:
    model = _model()
    optimizer = _optimizer(model)
    _train(model, optimizer, 1)
    owners = {name.split("/")[1]: name.split("/")[0] for name in optimizer.state_tensors()}
    assert set(owners) == {name for name, _ in model.named_parameters()}
    muon = {name for name, owner in owners.items() if owner == "muon"}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert muon == {f"transformer.h.0.{part}.weight" for part in parts}


def test_adamw_for_all_has_no_muon_and_scalars_of_an_attention_do_not_decay() -> None:
    from bsbr import BSBRConfig
    from bsbr.hf.mixers import write_settings

    sparse = write_settings(BSBRConfig(block_size=4, top_k=1, dense_below=0))
    recipe = PretrainConfig(layers=1, heads=2, hidden=16, context=16, batch_tokens=16, tokens=16, attention=sparse)
    model = build_model(recipe, 20)
    for muon in (False, True):
        optimizer = SplitOptimizer(model, lr=1e-2, muon_lr=1e-2, weight_decay=0.1, muon=muon)
        token_nll(model, torch.randint(20, (2, 17))).mean().backward()
        optimizer.step()
        owners = {name.split("/")[1]: name.split("/")[0] for name in optimizer.state_tensors()}
        assert ("muon" in owners.values()) == muon
        assert owners["transformer.h.0.attn.bsbr.calibration"] == "adamw"
        decays = {id(p): group["weight_decay"] for group in optimizer._adamw.param_groups for p in group["params"]}
        assert decays[id(model.transformer.h[0].attn.bsbr.calibration)] == 0.0
        assert decays[id(model.transformer.wte.weight)] == 0.1


def test_every_parameter_moves_and_scale_zero_moves_none() -> None:
    model = _model()
    optimizer = _optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.set_scale(0.0)
    _train(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.set_scale(1.0)
    _train(model, optimizer, 1)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_restored_state_continues_bit_for_bit() -> None:
    model = _model()
    optimizer = _optimizer(model)
    _train(model, optimizer, 3)
    twin = _model()
    twin.load_state_dict(model.state_dict())
    restored = _optimizer(twin)
    restored.load_state_tensors({name: t.clone() for name, t in optimizer.state_tensors().items()})
    _train(model, optimizer, 3, seed=1)
    _train(twin, restored, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_missing_state_is_named() -> None:
    model = _model()
    optimizer = _optimizer(model)
    _train(model, optimizer, 1)
    tensors = optimizer.state_tensors()
    del tensors["muon/transformer.h.0.mlp.c_fc.weight/momentum_buffer"]
    with pytest.raises(ValueError, match=r"c_fc\.weight/momentum_buffer is missing"):
        _optimizer(_model()).load_state_tensors(tensors)


def test_the_schedule_rises_to_one_and_falls_to_zero() -> None:
    values = [schedule(step, 100, 10) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(values) == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[100] == 0.0
    assert 0 < values[99] < 0.02
    assert schedule(0, 5, 0) == 1.0
