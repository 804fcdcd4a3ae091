"""Tiny models, a byte tokenizer and texts that the evaluation tests share; nothing is downloaded."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 256


def tiny_model(seed: int = 0, *, vocabulary: int = VOCABULARY, positions: int = 64) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers, sharp enough that its predictions differ."""
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=positions,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def disturbed(model: GPT2LMHeadModel, size: float, **settings: int) -> GPT2LMHeadModel:
    """A copy with noise on its weights, dressed as a converted model with these settings."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    changed.config.bsbr = dict(settings)
    return changed


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level BPE does it: a character of two bytes is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0])


def tiny_texts(count: int = 4, length: int = 120, seed: int = 0) -> list[str]:
    """Texts of random words, some characters of more than one byte among them."""
    choice = random.Random(seed).choice
    words = ["alpha", "bread", "Ärger", "don't", "naïve", "\n", "42", "river", "über"]
    return [" ".join(choice(words) for _ in range(length // 5)) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers above under one name."""
    return SimpleNamespace(model=tiny_model, disturbed=disturbed, tokenizer=byte_tokenizer, texts=tiny_texts)
