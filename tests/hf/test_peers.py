"""Models with a peer as attention: from a config, causal, packed, trained, saved; generation right or refused."""

import copy

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bsbr import convert, revert
from bsbr.errors import UserError
from bsbr.hf import attention_modules, build_model, count_parameters, match_parameters
from bsbr.hf.mixers import read_settings, write_settings
from bsbr.hf.parameters import AdditiveParameters, attention_shape
from bsbr.peers import PEERS, AdditiveConfig, cost, make
from tests.hf.families import SIZES

SMALL = {
    "bsbr": {"block_size": 8, "top_k": 1},
    "window": {"window": 6},
    "local": {"block_size": 8},
    "moba": {"block_size": 8, "top_k": 1},
    "nsa": {"block_size": 8, "top_k": 1, "window": 6},
    "additive": {"block_size": 8},
}
NEW = ("full", "window", "linear", "gated_delta", "nsa")
LEARNING = ("gated_delta", "nsa")
WITHOUT_CACHE = ("gated_delta", "additive")


def settings(name, **options):
    return make(name, SMALL.get(name), **options)


def family_config(family):
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    return CONFIG_MAPPING[family](**SIZES[family] | dropout)


@pytest.fixture(params=["llama", "gpt2"])
def kind(request):
    return request.param


@pytest.mark.parametrize("name", PEERS)
def test_no_token_moves_an_earlier_output(name, kind, tokens, logits):
    model, ids = build_model(family_config(kind), settings(name)).eval(), tokens(1, 47).repeat(47, 1)
    changed = ids - torch.eye(47, dtype=torch.long)
    moved = (logits(model, changed) != logits(model, ids)).any(-1)  # [changed token, output]
    assert not moved.tril(-1).any()
    assert moved.diagonal().all()
    assert name == "value_only" or moved.triu(1).any()


@pytest.mark.parametrize("name", NEW)
def test_padding_and_packing_change_nothing(name, kind, tokens, logits):
    model, ids = build_model(family_config(kind), settings(name)).eval(), tokens(3, 60)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, :13] = mask[1, 41:] = 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, ids, attention_mask=mask, position_ids=place)
    for row in range(3):
        alone = logits(model, ids[row, mask[row].bool()][None])[0]
        assert (together[row, mask[row].bool()] - alone).abs().max() <= 2e-5
    parts = [30, 1, 29]
    place = torch.cat([torch.arange(length) for length in parts])[None]
    packed = logits(model, ids[:1], position_ids=place, use_cache=False)
    for part, joined in zip(ids[:1].split(parts, 1), packed.split(parts, 1), strict=True):
        assert (logits(model, part) - joined).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [name for name in PEERS if name not in WITHOUT_CACHE])
def test_generation_is_that_of_whole_passes(name, kind, tokens, logits):
    model, ids = build_model(family_config(kind), settings(name)).eval(), tokens(2, 21)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    whole = logits(model, found)
    chosen = whole[:, 20:-1].gather(2, found[:, 21:, None])[..., 0]
    assert (whole[:, 20:-1].amax(2) - chosen).max() <= 1e-5


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_what_needs_past_hidden_states_refuses_a_cache_and_generates_without(name, kind, tokens, logits):
    model, ids = build_model(family_config(kind), settings(name)).eval(), tokens(2, 21)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with pytest.raises(NotImplementedError, match=f"the {name} mixer cannot continue from a cache.* use_cache=False"):
        model.generate(ids, **options)
    found = model.generate(ids, use_cache=False, **options)
    assert torch.equal(logits(model, found)[:, 20:-1].argmax(2), found[:, 21:])


@pytest.mark.parametrize("name", NEW)
def test_every_parameter_learns(name, kind, tokens):
    """Also with gradient checkpointing, and near the same under autocast."""
    model, ids = build_model(family_config(kind), settings(name)), tokens(2, 40)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    plain = gradients()
    for parameter, gradient in plain.items():
        assert torch.isfinite(gradient).all(), parameter
        assert gradient.any(), parameter
    model.gradient_checkpointing_enable()
    for parameter, gradient in gradients().items():
        assert torch.allclose(gradient, plain[parameter], atol=1e-6), parameter
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients()
    for parameter in plain:
        assert torch.isfinite(near[parameter]).all(), parameter
    ours = torch.cat([torch.cat([x[name].flatten() for name in x])[None] for x in (plain, near)])
    assert torch.nn.functional.cosine_similarity(*ours, dim=0) > 0.99


@pytest.mark.parametrize("name", NEW)
def test_a_few_steps_fit_one_batch(name, tokens):
    model, ids = build_model(family_config("llama"), settings(name)), tokens(2, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", NEW)
def test_round_trip_is_exact(name, kind, tokens, logits, tmp_path):
    model, ids = build_model(family_config(kind), settings(name, seed=3), seed=5).eval(), tokens(1, 50)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.bsbr == model.config.bsbr
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("name", NEW)
def test_convert_and_revert(name, kind, tiny, tokens, logits):
    model, ids = tiny(kind), tokens(1, 50)
    converted = convert(model, settings(name))
    if name == "full":
        assert torch.equal(logits(converted, ids), logits(model, ids))
    else:
        assert not torch.allclose(logits(converted, ids), logits(model, ids), atol=1e-3)
    assert torch.equal(logits(revert(converted), ids), logits(model, ids))


def test_gated_deltanet_has_no_rotary_positions(tokens, logits):
    """Moved by 100 positions, a text gives the same to the bit; other attentions see another rounding."""
    place, ids = torch.arange(40)[None], tokens(1, 40)
    for name in ("gated_delta", "linear"):
        model = build_model(family_config("llama"), settings(name)).eval()
        moved = logits(model, ids, position_ids=place + 100)
        assert torch.equal(moved, logits(model, ids, position_ids=place)) == (name == "gated_delta")


@pytest.mark.parametrize("name", ["linear", "gated_delta"])
def test_dropout_of_weights_that_do_not_exist_is_refused(name, tokens):
    model = build_model(CONFIG_MAPPING["gpt2"](**SIZES["gpt2"] | {"attn_pdrop": 0.1}), settings(name))
    with pytest.raises(NotImplementedError, match=f"the {name} mixer has no attention weights to drop"):
        model(tokens(1, 20))
    model.eval()(tokens(1, 20))


def test_weights_come_from_the_seeds_alone():
    state = torch.get_rng_state()
    first, again, other = (
        build_model(family_config("llama"), settings("nsa", seed=inner), seed=outer).state_dict()
        for inner, outer in ((1, 2), (1, 2), (3, 2))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert different == {name for name in first if name.endswith("bsbr.gate")}
    full = build_model(family_config("llama"), settings("full"), seed=2).state_dict()
    assert all(torch.equal(full[name], first[name]) for name in full), "what two attentions share starts the same"
    outer = build_model(family_config("llama"), settings("full"), seed=3).state_dict()
    assert not torch.equal(full["lm_head.weight"], outer["lm_head.weight"])


@pytest.mark.parametrize("name", PEERS)
def test_costs_know_the_parameters(name, kind):
    model = build_model(family_config(kind), settings(name))
    (module, *_) = attention_modules(model)
    found = sum(x.numel() for x in getattr(module, "bsbr", torch.nn.Module()).parameters())
    assert found == cost(settings(name), attention_shape(module), 100).parameters


REAL = {
    "llama": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "gpt2": {"vocab_size": 8192, "n_embd": 512, "n_layer": 8, "n_head": 8},
    "opt": {
        "vocab_size": 8192, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_matched_within_two_percent(name, family):
    """At the size that is trained, about 30 million; without matching, Gated DeltaNet has 7 % more."""
    config = CONFIG_MAPPING[family](**REAL[family])
    matched = match_parameters(config, make(name))
    wanted, found = count_parameters(config), count_parameters(matched, make(name))
    assert abs(found - wanted) < 0.02 * wanted
    assert config.to_dict() == CONFIG_MAPPING[family](**REAL[family]).to_dict()


def test_what_the_builders_refuse():
    with pytest.raises(UserError, match="models of type bloom cannot be converted"):
        build_model(CONFIG_MAPPING["bloom"](), make("full"))
    with pytest.raises(UserError, match="config must be one of BSBRConfig"):
        build_model(LlamaConfig(), {"top_k": 1})
    narrow = LlamaConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=9)
    with pytest.raises(UserError, match="attention gated_delta has more parameters than this model's MLPs"):
        match_parameters(narrow, make("gated_delta"))


def test_a_copy_has_parameters_of_its_own(tokens, logits):
    model, ids = build_model(family_config("llama"), settings("gated_delta")).eval(), tokens(1, 30)
    before, copied = logits(model, ids), copy.deepcopy(model)
    with torch.no_grad():
        attention_modules(copied)[0].bsbr.gate.mul_(2)
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(copied, ids), before)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="torch 2.9 cannot compile a union of types; 2.10 was not tried"
)
def test_settings_are_read_inside_one_graph():
    """A compiled model asks for them in every layer: what the compiler cannot follow there would cut it into pieces."""
    for name in PEERS:
        kept = write_settings(settings(name))

        def width(x, kept=kept):
            return x + len(read_settings(kept, 0)[1].mixer)

        torch._dynamo.reset()
        compiled = torch.compile(width, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(())) == len(settings(name).mixer)


@pytest.mark.parametrize("tokens", [17, 24, 25])
def test_the_additive_form_retrieves_by_the_last_token_of_the_block_before(tokens):
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=9)
    additive = AdditiveConfig(block_size=8)
    module = attention_modules(convert(LlamaForCausalLM(config), additive))[0]
    parameters = next(part for part in module.modules() if isinstance(part, AdditiveParameters))
    hidden = torch.zeros(1, tokens, 16)
    hidden[:, 7::8] = torch.arange(1, 1 + hidden[:, 7::8].shape[1])[:, None].float()
    past = (tokens - 1) // 8
    expected = torch.arange(1, 1 + past).float()[:, None].expand(past, 16)
    for found, name in zip(parameters.meta(hidden, 8), "rh", strict=True):
        weight, bias = (getattr(parameters, f"{name}_{part}") for part in ("weight", "bias"))
        assert torch.allclose(found.flatten(2)[0], expected @ weight.T + bias, atol=1e-6)
