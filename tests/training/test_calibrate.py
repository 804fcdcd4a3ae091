"""Calibration moves the five scalars towards exact attention, the same way each time, and never away from it."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bsbr.config import BSBRConfig
from bsbr.data.tokenizer import train_tokenizer
from bsbr.errors import UserError
from bsbr.hf.convert import convert
from bsbr.hf.modeling import attention_modules
from bsbr.ops import UNCALIBRATED, reference_attention
from bsbr.ops.schedule import dense_until
from bsbr.peers import ValueOnlyConfig
from bsbr.training.calibrate import calibrate
from bsbr.training.calibration_fit import attention_output, fit_scalars
from bsbr.training.calibration_sample import Sample, sample_positions, take_sample
from bsbr.training.held_out import compare_models

CONFIG = BSBRConfig(dense_below=0, block_size=8, top_k=1)

KINDS = [
    BSBRConfig(
        dense_below=0, block_size=8, top_k=top_k, far=far, state=state, retrieval_block_size=unit, selection=selection
    )
    for far, state, top_k, unit, selection in itertools.product(
        ["moments", "mean"], ["global", "block", "token", "none"], [0, 3], [8, 4], ["head", "group", "recent"]
    )
]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=300, n_positions=128, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 30  # random weights attend to everything alike: sharpen
    return model


def tokens(rows: int = 4, length: int = 128) -> torch.Tensor:
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(1))


def scalars(model: torch.nn.Module) -> torch.Tensor:
    return torch.stack([module.bsbr.calibration.detach() for module in attention_modules(model)])


def random_sample(config: BSBRConfig, heads: int = 4, key_heads: int = 2, seed: int = 0) -> Sample:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, heads, 100, 8), torch.randn(3, key_heads, 100, 8), torch.randn(3, key_heads, 100, 6)
    positions = sample_positions(dense_until(config), 100, 3, 20, seed=0)
    return take_sample(q, k, v, positions, config, scale=0.7)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_what_is_fitted_is_the_attention_as_defined(config: BSBRConfig) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 6)
    calibration = torch.tensor([0.3, 0.8, 0.6, 1.2, 0.7]) + 0.1 * torch.randn(4, 5)
    positions = sample_positions(dense_until(config), 50, 2, 9, seed=0)
    sample = take_sample(*(x.transpose(1, 2) for x in (q, k, v)), positions, config, scale=0.5)
    sparse, _, _ = reference_attention(q, k, v, config, scale=0.5, calibration=calibration)
    exact, _, _ = reference_attention(q, k, v, BSBRConfig(dense_below=50), scale=0.5)
    rows = torch.arange(2)[:, None]
    found = attention_output(sample, config, calibration)
    torch.testing.assert_close(found.transpose(1, 2), sparse[rows, positions].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample.target.transpose(1, 2), exact[rows, positions].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_held_out_queries_never_get_worse(config: BSBRConfig) -> None:
    sample = random_sample(config)
    fit = fit_scalars(sample, config, steps=5)
    held_out = sample.target[..., 1::2, :]

    def error(calibration: torch.Tensor) -> torch.Tensor:
        difference = attention_output(sample, config, calibration)[..., 1::2, :] - held_out
        error = difference.square().sum((0, 2, 3)) / held_out.square().sum((0, 2, 3))
        return error.view(2, 2).mean(1, keepdim=True).expand(2, 2).flatten() if config.selection == "group" else error

    torch.testing.assert_close(error(torch.tensor(UNCALIBRATED).expand(4, 5)), fit.before)
    torch.testing.assert_close(error(fit.calibration), fit.after)
    assert (fit.after <= fit.before).all()


def test_a_head_that_gains_nothing_stays_uncalibrated() -> None:
    sample = random_sample(CONFIG)
    uncalibrated = torch.tensor(UNCALIBRATED).expand(4, 5)
    perfect = sample._replace(target=attention_output(sample, CONFIG, uncalibrated))
    assert torch.equal(fit_scalars(perfect, CONFIG, steps=10).calibration, uncalibrated)


def test_known_scalars_are_recovered() -> None:
    torch.manual_seed(0)
    truth = torch.tensor([[0.3, 0.8, 1.3, 1.2, 0.6], [-0.2, 1.1, 0.7, 0.9, 1.4]])
    spread = (
        torch.rand(3, 2, 12, 1).repeat_interleave(8, 2) * 1.5
    )  # blocks differ, so that no scalar stands for another
    q, k, v = torch.randn(3, 2, 96, 8), spread * torch.randn(3, 2, 96, 8), torch.randn(3, 2, 96, 6)
    sample = take_sample(q, k, v, sample_positions(16, 96, 3, 80, seed=0), CONFIG, scale=0.5)
    sample = sample._replace(target=attention_output(sample, CONFIG, truth))
    fit = fit_scalars(sample, CONFIG, steps=200)
    torch.testing.assert_close(fit.calibration, truth, rtol=0, atol=0.1)
    assert (fit.after < fit.before / 100).all()


@pytest.mark.parametrize(("tails", "heavy"), [("laplace", True), ("uniform", False)])
def test_tails_of_the_keys_decide_the_scale_of_the_variance(tails: str, heavy: bool) -> None:
    """Along q, every block has the same distribution of keys, heavier or lighter in its tails than a Gaussian's."""
    config = BSBRConfig(dense_below=0, block_size=64, top_k=0, state="none")
    torch.manual_seed(0)
    quantile = (torch.arange(64) + 0.5) / 32 - 1
    keys = quantile if tails == "uniform" else -quantile.sign() * (1 - quantile.abs()).log()
    spread = torch.rand(2, 1, 8, 1, 1) + 0.2
    k = (spread * keys[:, None]).flatten(2, 3)  # [2, 1, 512, 1]
    v = torch.randn(2, 1, 8, 6).repeat_interleave(64, 2)
    positions = sample_positions(64, 512, 2, 100, seed=0)
    q = 2 * torch.rand(2, 1, 512, 1) - 1
    fit = fit_scalars(take_sample(q, k, v, positions, config, scale=1.0), config, steps=100)
    assert (fit.calibration[0, 2] > 1) == heavy
    assert fit.after < fit.before / 2


def test_same_seed_same_scalars_and_nothing_else_changes() -> None:
    original = gpt2()
    models = [convert(original, CONFIG).train() for _ in range(3)]
    weights = {name: x.clone() for name, x in original.named_parameters()}
    state = torch.get_rng_state()
    for model, seed in zip(models, [0, 0, 1], strict=True):
        assert calibrate(model, tokens(), queries_per_head=64, steps=10, seed=seed) is model
    first, again, other = (scalars(model) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert models[0].training
    assert models[0].config._attn_implementation == "bsbr"
    assert all(torch.equal(x, weights[name]) for name, x in original.named_parameters())


def test_a_calibrated_model_is_nearer_to_its_original() -> None:
    original = gpt2().eval()
    model = convert(original, CONFIG)
    text = torch.randint(300, (8, 128), generator=torch.Generator().manual_seed(2))

    def distance() -> float:
        with torch.no_grad():
            p, q = (m(text).logits[:, dense_until(CONFIG) :].log_softmax(-1) for m in (original, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = distance()
    calibrate(model, tokens(16), steps=100, queries_per_head=256)
    assert distance() < 0.9 * before


@pytest.mark.parametrize("dense_below", [0, 64, 128])  # 128 leaves nothing sparse: calibrated as if it were 0
def test_heads_that_share_keys_and_prompts_that_stay_exact(dense_below: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    settings = BSBRConfig(block_size=8, top_k=1, selection="group", dense_below=dense_below)
    model = calibrate(convert(LlamaForCausalLM(config), settings), tokens(), queries_per_head=64, steps=5)
    assert scalars(model).shape == (1, 4, 5)
    assert torch.isfinite(scalars(model)).all()


@pytest.mark.parametrize("repeats", [4, 400])  # a text tokenised whole, and one of which parts are
def test_a_text_is_tokenised_with_the_models_tokenizer(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["The quick brown fox jumps over the lazy dog, again and again. " * repeats] * 3
    tokenizer = train_tokenizer(documents, 300)
    model = convert(gpt2(), CONFIG)
    monkeypatch.setattr("bsbr.training.calibrate._accept", lambda *_: None)  # random weights gain by chance only
    calibrate(model, "\n<|endoftext|>\n".join(documents), tokenizer=tokenizer, tokens=512, queries_per_head=32, steps=5)
    assert not torch.equal(scalars(model)[0, 0], torch.tensor(UNCALIBRATED))


@pytest.mark.parametrize("far", ["moments", "drop"])
def test_heads_that_read_different_numbers_are_fitted_together(far: str) -> None:
    config = BSBRConfig(block_size=8, top_k=2, far=far, dense_below=0)
    sample = random_sample(config)
    calibration = torch.tensor(UNCALIBRATED) + 0.1 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    numbers = [0, 0, 3, 1000]  # nothing, and more than there is
    calibration.requires_grad_()
    together = attention_output(sample, config, calibration, torch.tensor(numbers))
    for head, number in enumerate(numbers):
        apart = attention_output(sample, replace(config, top_k=number), calibration)
        assert torch.allclose(together[:, head], apart[:, head], atol=1e-6)
    if far != "drop":
        (gradient,) = torch.autograd.grad(together.square().sum(), calibration)
        assert torch.isfinite(gradient).all()
        assert gradient[2].abs().min() > 0
        assert not gradient[3].any(), "what reads everything depends on no scalar"


def blind_to_the_past(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The first layer looks at everything alike, which its summaries already know: no block is worth reading there."""
    model.transformer.h[0].attn.c_attn.weight.data[:, :32] = 0
    model.transformer.h[0].attn.c_attn.bias.data[:32] = 0
    return model


def test_blocks_go_to_the_heads_that_need_them() -> None:
    config = BSBRConfig(dense_below=0, block_size=8, top_k=2)
    original = blind_to_the_past(gpt2()).eval()
    models = {
        name: calibrate(
            convert(original, config), tokens(16), queries_per_head=128, steps=20, spread_top_k=name == "spread"
        )
        for name in ("spread", "uniform")
    }
    rows = models["spread"].config.bsbr["top_k_per_head"]
    assert rows[0] == (0, 0)
    assert sum(rows[1]) == 2 * 4  # two layers of two heads with a mean of two
    assert models["uniform"].config.bsbr["top_k_per_head"] is None
    text = torch.randint(300, (8, 128), generator=torch.Generator().manual_seed(2))
    found = compare_models(original, models, text)
    assert found["spread"]["kl"] < found["uniform"]["kl"]


def test_where_the_far_field_is_dropped_blocks_are_spread_and_nothing_else() -> None:
    model = convert(gpt2(), BSBRConfig(dense_below=0, block_size=8, top_k=2, far="drop"))
    calibrate(model, tokens(16), queries_per_head=128, steps=5)
    rows = model.config.bsbr["top_k_per_head"]
    assert len({count for row in rows for count in row}) > 1
    assert sum(map(sum, rows)) <= 2 * 4
    assert torch.equal(scalars(model), torch.tensor(UNCALIBRATED).expand(2, 2, 5))


def test_what_does_not_help_on_text_left_out_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = {"calibrated": {"kl": 0.2}, "uncalibrated": {"kl": 0.1}}
    monkeypatch.setattr("bsbr.training.calibrate.compare_models", lambda *_: worse)
    model = convert(gpt2(), CONFIG)
    with pytest.warns(UserWarning, match=r"did not help on held-out text \(KL 0.2 nats, 0.1 without\)"):
        calibrate(model, tokens(), queries_per_head=64, steps=5)
    assert torch.equal(scalars(model), torch.tensor(UNCALIBRATED).expand(2, 2, 5))
    assert model.config.bsbr["top_k_per_head"] is None


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = convert(gpt2(), CONFIG)
    dropped = convert(gpt2(), BSBRConfig(dense_below=0, block_size=8, far="drop"))
    with pytest.raises(UserError, match="no far field"):
        calibrate(dropped, tokens(), spread_top_k=False)
    for other in (gpt2(), convert(gpt2(), ValueOnlyConfig())):
        with pytest.raises(UserError, match="no scalars to calibrate"):
            calibrate(other, tokens())
    with pytest.raises(UserError, match="too short to calibrate on: 23 tokens, at least 24 needed"):
        calibrate(model, tokens(1, 23))
    with pytest.raises(UserError, match="too short to calibrate on: 99 tokens, at least 100 needed"):
        calibrate(model, tokens(1, 99), length=100)
    with pytest.raises(UserError, match=r"nothing to calibrate in 16 tokens.* at least 24 tokens"):
        calibrate(model, tokens(), length=16)
    with pytest.raises(UserError, match="beyond the model's 128 positions"):
        calibrate(model, tokens(), length=200)
    with pytest.raises(ValueError, match="tokenizer"):
        calibrate(model, "some text")
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        calibrate(model, tokens(), steps=0)
    assert torch.equal(scalars(model), torch.tensor(UNCALIBRATED).expand(2, 2, 5))


def test_an_interruption_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model = convert(gpt2(), CONFIG)
    monkeypatch.setattr("bsbr.training.calibration_layer.fit_scalars", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokens())
    assert model.config._attn_implementation == "bsbr"
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
