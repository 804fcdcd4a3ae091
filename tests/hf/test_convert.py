"""Conversion changes the attention and nothing else; the original never notices."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from bsbr import BSBRConfig, convert, revert
from bsbr.errors import UserError
from bsbr.peers import AdditiveConfig, ValueOnlyConfig

EVERYTHING = BSBRConfig(dense_below=0, block_size=8, top_k=100)
SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)
BYPASSING = ["bloom", "mpt", *(["codegen"] if Version(transformers.__version__) < Version("5.24") else [])]
"""Families whose attention is not called through transformers' interface."""


def test_reading_every_block_gives_the_original(family, tiny, tokens, logits):
    model = tiny(family)
    ids = tokens(2, 77)
    expected, actual = logits(model, ids), logits(convert(model, EVERYTHING), ids)
    assert (actual - expected).abs().max() <= 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    "config", [EVERYTHING, BSBRConfig(block_size=8, top_k=0, dense_below=999)], ids=["top_k", "dense"]
)
def test_reading_every_block_gives_the_original_through_the_mixer_too(family, tiny, tokens, logits, config):
    """Padding takes the way through the ops, not PyTorch's own attention."""
    model = tiny(family)
    ids, mask = tokens(2, 77), torch.ones(2, 77, dtype=torch.long)
    mask[0, 60:] = 0
    actual = logits(convert(model, config), ids, attention_mask=mask)[mask.bool()]
    expected = logits(model, ids, attention_mask=mask)[mask.bool()]
    assert (actual - expected).abs().max() <= 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_the_registered_families_dispatch(tiny, tokens, logits):
    for family in ("qwen2", "phi", "gemma", "gemma3_text", "gpt_bigcode", "olmo2"):
        model, ids = tiny(family), tokens(1, 60)
        expected = logits(model, ids)
        assert (logits(convert(model, EVERYTHING), ids) - expected).abs().max() <= 1e-4, family
        assert (logits(convert(model, SPARSE), ids) - expected).abs().max() > 1e-4, family


def test_the_original_is_unchanged_and_shares_its_weights(family, tiny, tokens, logits):
    model, ids = tiny(family), tokens(1, 50)
    state, config, kind = set(model.state_dict()), model.config.to_dict(), type(model)
    implementation, before = model.config._attn_implementation, logits(model, ids)
    converted = convert(model, SPARSE)
    assert (logits(converted, ids) - before).abs().max() > 1e-4
    assert torch.equal(logits(model, ids), before)
    assert type(model) is kind
    assert model.config.to_dict() == config
    assert set(model.state_dict()) == state
    assert model.config._attn_implementation == implementation
    theirs = dict(converted.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert theirs[name].data_ptr() == parameter.data_ptr()


def test_moving_casting_or_freezing_one_leaves_the_other_alone(tiny, tokens, logits):
    model, ids = copy.deepcopy(tiny("llama")), tokens(1, 40)
    before = logits(model, ids)
    converted = convert(model, SPARSE).bfloat16().requires_grad_(False)
    assert logits(converted, ids).dtype == torch.bfloat16
    assert torch.equal(logits(model, ids), before)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_embeddings_stay_tied(tiny):
    converted = convert(tiny("gpt2"), SPARSE)
    assert converted.lm_head.weight is converted.transformer.wte.weight


def test_training_mode_dropout_and_checkpointing_are_kept(tiny):
    model = copy.deepcopy(tiny("gpt2")).train()
    model.gradient_checkpointing_enable()
    converted = convert(model, SPARSE)
    assert converted.training
    assert converted.transformer.h[0].attn.attn_dropout.p == 0.1
    assert converted.is_gradient_checkpointing
    assert not convert(model.eval(), SPARSE).training


def test_hidden_states_come_from_the_converted_model(tiny, tokens):
    model, ids = copy.deepcopy(tiny("llama")), tokens(1, 40)
    original = model(ids, output_hidden_states=True).hidden_states
    converted = convert(model, SPARSE)(ids, output_hidden_states=True).hidden_states
    assert len(original) == len(converted) == 3
    assert torch.equal(original[0], converted[0])
    assert not torch.equal(original[1], converted[1])


def test_revert_is_bit_equal(family, tiny, tokens, logits):
    model, ids = tiny(family), tokens(2, 50)
    for config in (SPARSE, AdditiveConfig(block_size=8), ValueOnlyConfig()):
        back = revert(convert(model, config))
        assert type(back) is type(model)
        assert back.config.to_dict() == model.config.to_dict()
        assert torch.equal(logits(back, ids), logits(model, ids))
        assert set(back.state_dict()) == set(model.state_dict())


def test_revert_restores_the_attention_implementation(tiny):
    model = tiny("llama", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert revert(convert(model, SPARSE)).config._attn_implementation == "eager"


def test_converting_again_starts_from_the_same_weights(tiny, tokens, logits):
    model, ids = tiny("gpt2"), tokens(1, 50)
    twice = convert(convert(model, AdditiveConfig(block_size=8)), SPARSE)
    assert torch.equal(logits(twice, ids), logits(convert(model, SPARSE), ids))
    assert torch.equal(logits(revert(twice), ids), logits(model, ids))


def test_calibration_survives_only_a_change_of_dense_below(tiny):
    first = convert(tiny("llama"), SPARSE)
    calibration = first.model.layers[0].self_attn.bsbr.calibration
    calibration.data.fill_(0.5)
    kept = convert(first, BSBRConfig(block_size=8, top_k=1, dense_below=16))
    fresh = convert(first, BSBRConfig(dense_below=0, block_size=8, top_k=2))
    kept.model.layers[0].self_attn.bsbr.calibration.data[0] = 0.25
    assert kept.config.bsbr["dense_below"] == 16
    assert (kept.model.layers[0].self_attn.bsbr.calibration[1] == 0.5).all()
    assert fresh.model.layers[0].self_attn.bsbr.calibration[0].tolist() == [0, 1, 1, 1, 1]
    assert (calibration == 0.5).all(), "each conversion has scalars of its own"


def test_value_only_passes_values_on(tiny, tokens, logits):
    converted, ids = convert(tiny("llama"), ValueOnlyConfig()), tokens(1, 30)
    other = ids.clone()
    other[0, 3] += 1
    moved = (logits(converted, ids) - logits(converted, other)).abs().amax(-1)[0]
    assert moved[3] > 0
    assert not moved[:3].any()
    assert not moved[4:].any()


@pytest.mark.parametrize("family", [*BYPASSING, "falcon"])
def test_families_that_bypass_the_interface_are_refused(family, tiny):
    with pytest.raises(UserError, match=f"type {family} cannot be converted"):
        convert(tiny(family), SPARSE)


@pytest.mark.parametrize("family", BYPASSING)
def test_families_that_bypass_the_interface_never_run_without_a_mask(family, tiny, tokens, logits):
    model = copy.deepcopy(tiny(family))
    model.config._attn_implementation_internal = "bsbr"
    with pytest.raises(UserError, match="cannot be converted"):
        logits(model, tokens(1, 9))


def test_models_that_are_not_plain_decoders_are_refused(tiny):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UserError, match="cross-attention"):
        convert(T5ForConditionalGeneration(t5), SPARSE)
    with pytest.raises(UserError, match="cross-attention"):
        convert(tiny("gpt2", add_cross_attention=True), SPARSE)
    with pytest.raises(UserError, match="expected a GPT2LMHeadModel, got GPT2Model"):
        convert(tiny("gpt2").transformer, SPARSE)
    with pytest.raises(UserError, match="expected a transformers causal language model, got Linear"):
        convert(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(UserError, match="nothing to revert"):
        revert(tiny("gpt2"))
    with pytest.raises(UserError, match="config must be one of BSBRConfig"):
        convert(tiny("gpt2"), {"block_size": 8})


def test_encoders_are_refused_and_told_apart_from_decoders_of_the_same_type(logits, tokens):
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, RobertaConfig, RobertaForMaskedLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert, roberta = (kind(intermediate_size=32, **sizes) for kind in (BertConfig, RobertaConfig))
    for model in (BertForMaskedLM(bert), BertLMHeadModel(bert), RobertaForMaskedLM(roberta)):
        with pytest.raises(UserError, match="looks both ways") as refusal:
            convert(model, SPARSE)
        assert "\n" not in str(refusal.value)
    decoder = BertLMHeadModel(BertConfig(intermediate_size=32, is_decoder=True, **sizes)).eval()
    ids = tokens(1, 50)
    assert (logits(convert(decoder, EVERYTHING), ids) - logits(decoder, ids)).abs().max() <= 1e-4
    other = ids.clone()
    other[0, -1] = 5
    pair = [logits(convert(decoder, SPARSE), x) for x in (ids, other)]
    assert torch.equal(pair[0][:, :-1], pair[1][:, :-1])


def test_sliding_windows_stay_and_a_model_of_nothing_else_is_refused(tiny, tokens, logits):
    with pytest.raises(UserError, match="sliding_window=None"):
        convert(tiny("mistral", sliding_window=8), SPARSE)
    model = tiny("gemma3_text")
    converted = convert(model, SPARSE)
    assert [hasattr(layer.self_attn, "bsbr") for layer in converted.model.layers] == [False, True]
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    actual = logits(convert(model, EVERYTHING), ids, attention_mask=mask)
    assert ((actual - logits(model, ids, attention_mask=mask)) * mask[..., None]).abs().max() <= 1e-4


def test_what_would_change_scores_is_refused(tiny, tokens, logits):
    converted = convert(tiny("llama"), SPARSE)
    with pytest.raises(NotImplementedError, match="softcap"):
        logits(converted, tokens(1, 40), softcap=50.0)
    with pytest.raises(NotImplementedError, match="2-D attention_mask"):
        logits(converted, tokens(1, 40), attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
    with pytest.raises(NotImplementedError, match="continuous batching"):
        converted.generate_batch([[1, 2]])


def test_attention_weights_are_refused_not_left_out_in_silence(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), SPARSE), tokens(1, 20)
    for call in (
        lambda: logits(converted, ids, output_attentions=True),
        lambda: converted.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
    ):
        with pytest.raises(NotImplementedError, match="no attention weights"):
            call()
    dense = revert(converted)
    dense.set_attn_implementation("eager")
    assert dense(ids, output_attentions=True).attentions[0].shape == (1, 4, 20, 20)


def test_the_type_is_right_whether_the_config_was_made_or_read(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    for place in (str(tmp_path), tmp_path):
        model = convert(place, SPARSE)
        assert model.config.model_type == "bsbr-gpt2"
        assert revert(model).config.model_type == "gpt2"
