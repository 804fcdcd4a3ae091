"""Perplexity: every token once, the true context, the bytes of exactly the scored tokens."""

import math
from types import SimpleNamespace

import pytest
import torch

from bsbr.errors import UserError
from bsbr.evaluation.perplexity import context_windows, perplexity, score_tokens, target_nll
from bsbr.evaluation.windows import Document, choose_documents, cut_windows, encode_document


class Uniform:
    """A model that prefers no token of seven."""

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))


def document(length: int, *, vocabulary: int = 256, seed: int = 0) -> Document:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    return Document(tokens=tuple(tokens), token_bytes=(1,) * length, index=0)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (16, 1), (16, 8), (16, 15), (40, 7)])
def test_each_token_is_scored_once(length: int, window: int, stride: int) -> None:
    windows = cut_windows(length, window, stride)
    scored = [token for w in windows for token in range(w.first_scored, w.stop)]
    assert scored == list(range(1, length))
    for w in windows:
        assert w.start < w.first_scored
        assert w.stop - w.start <= window
        assert w.start == 0 or w.first_scored - w.start >= window - stride


def test_equals_brute_force(tiny: SimpleNamespace) -> None:
    """Every token's own forward over the context its window gives it."""
    model, doc = tiny.model().double(), document(45)
    windows = cut_windows(45, 16, 5)
    scores = score_tokens(model, doc.tokens, windows)
    for window, score in zip(windows, scores, strict=True):
        for place, token in enumerate(range(window.first_scored, window.stop)):
            ids = torch.tensor(doc.tokens[window.start : token])[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1:].double()
            expected = -logits.log_softmax(-1)[0, doc.tokens[token]]
            assert score[place].item() == pytest.approx(expected.item(), abs=1e-6)


def test_stride_one_gives_every_token_a_full_window(tiny: SimpleNamespace) -> None:
    model, doc = tiny.model().double(), document(30)
    result = perplexity(model, [doc], window=8, stride=1)
    nats = []
    for token in range(1, 30):
        ids = torch.tensor(doc.tokens[max(0, token - 7) : token])[None]
        with torch.no_grad():
            nats.append(target_nll(model(input_ids=ids).logits[0, -1:], torch.tensor([doc.tokens[token]])).item())
    assert result["nll"].value == pytest.approx(sum(nats) / 29, abs=1e-6)
    assert result["nll"].n == 29


@pytest.mark.parametrize("lengths", [(2,), (40,), (17, 2, 33)])
def test_uniform_model_has_its_vocabulary_as_perplexity(lengths: tuple[int, ...]) -> None:
    documents = [document(length, vocabulary=7, seed=length) for length in lengths]
    result = perplexity(Uniform(), documents, window=16)
    assert result["perplexity"].value == pytest.approx(7, rel=1e-14)
    assert result["nll"].n == sum(lengths) - len(lengths)
    assert result["bits_per_byte"].value == pytest.approx(math.log2(7), rel=1e-14)


def test_batch_size_and_padding_change_nothing(tiny: SimpleNamespace) -> None:
    """Windows of several lengths in one batch: right padding must not be seen, nor scored."""
    model, documents = tiny.model(), [document(length, seed=length) for length in (45, 9, 30)]
    alone = perplexity(model, documents, window=16, stride=8, batch_size=1)
    for batch_size in (2, 8, 16):
        together = perplexity(model, documents, window=16, stride=8, batch_size=batch_size)
        assert together["nll"].value == pytest.approx(alone["nll"].value, abs=1e-6)
        assert together["nll"].n == alone["nll"].n


def test_mean_is_weighted_by_tokens(tiny: SimpleNamespace) -> None:
    """A tail window of one token must not weigh as much as a full one."""
    model, doc = tiny.model(), document(18)
    scores = torch.cat(score_tokens(model, doc.tokens, cut_windows(18, 17, 8)))
    assert perplexity(model, [doc], window=17, stride=8)["nll"].value == pytest.approx(scores.mean().item(), rel=1e-12)


def test_bytes_tile_the_source_text(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.tokenizer()
    for text in [*tiny.texts(), "über", "\r\nÄ\r\n", "日本", "🙂x"]:
        encoded = encode_document(tokenizer, text)
        assert sum(encoded.token_bytes or ()) == len(text.encode())
        with_bos = encode_document(tokenizer, text, bos=True)
        assert len(with_bos.tokens) == len(encoded.tokens) + 1
        assert with_bos.token_bytes == (0, *(encoded.token_bytes or ()))


def test_bits_per_byte_leaves_the_unscored_token_out(tiny: SimpleNamespace) -> None:
    result = perplexity(tiny.model(), [encode_document(tiny.tokenizer(), "abcdef")], window=16)
    assert result["bits_per_byte"].value == pytest.approx(result["nll"].value / math.log(2), rel=1e-12)
    assert result["bits_per_byte"].n == 5


def test_short_contexts_score_each_token_once() -> None:
    for length in (0, 3, 4, 5, 11, 40):
        windows = context_windows(length, 2)
        scored = [token for w in windows for token in range(w.first_scored, w.stop)]
        assert scored == list(range(4, length))
        assert all(w.first_scored - w.start >= 2 and w.stop - w.start <= 4 for w in windows)


def test_documents_that_fill_the_window_come_first(tiny: SimpleNamespace) -> None:
    texts = ["a" * 5, "b" * 20, "c" * 12, "d" * 30, "e"]
    chosen = choose_documents(tiny.tokenizer(), texts, documents=3, tokens=16)
    assert [doc.index for doc in chosen] == [1, 2, 3]
    assert [len(doc.tokens) for doc in chosen] == [16, 12, 16]


@pytest.mark.parametrize("texts", [[], [""], ["x"], ["", "y"]])
def test_a_text_of_fewer_than_two_tokens_is_refused(tiny: SimpleNamespace, texts: list[str]) -> None:
    with pytest.raises(UserError, match="at least 2 tokens"):
        choose_documents(tiny.tokenizer(), texts, documents=2, tokens=16)
    with pytest.raises(UserError, match="at least 2 tokens"):
        perplexity(tiny.model(), [encode_document(tiny.tokenizer(), text) for text in texts], window=16)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8)])
def test_windows_that_leave_tokens_out_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        cut_windows(20, window, stride)
