"""The coverage table: every family that is tested, every property, and why a cell is empty.

`python -m tests.hf.coverage` runs the tests of `test_families` and writes docs/families.md from their outcomes.
"""

import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

NAMES = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "gpt_bigcode": "GPT-BigCode",
    "opt": "OPT",
    "phi": "Phi",
    "phi3": "Phi-3",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2, without its cap",
    "gemma3_text": "Gemma 3",
    "olmo2": "OLMo 2",
    "stablelm": "StableLM",
    "smollm3": "SmolLM3",
    "gpt_oss": "gpt-oss",
}
"""Words for each tested family."""

TRAITS = {
    "gpt2": "learned positions",
    "gpt_neox": "rotary positions on a quarter of each head",
    "gpt_bigcode": "one key head, learned positions",
    "opt": "learned positions, scaled queries",
    "phi": "rotary positions on half of each head",
    "phi3": "one projection for queries, keys and values",
    "llama": "grouped heads",
    "mistral": "grouped heads; `sliding_window=None`",
    "qwen2": "grouped heads, biases",
    "qwen3": "normalised queries and keys, wide heads",
    "qwen3_moe": "mixture of experts",
    "gemma": "scaled embeddings",
    "gemma2": "a sliding and a full layer; loaded with `attn_logit_softcapping=None`",
    "gemma3_text": "a sliding and a full layer, own rotary positions each",
    "olmo2": "normalised queries and keys",
    "stablelm": "rotary positions on a quarter of each head",
    "smollm3": "a layer with and one without rotary positions",
    "gpt_oss": "sinks, a sliding and a full layer, mixture of experts",
}
"""What the tiny model of each family has that others have not."""

PROPERTIES = {
    "test_reading_every_block_equals_the_original": "dense",
    "test_generate_is_that_without_a_cache": "generate",
    "test_left_padding_and_neighbours_change_nothing": "padding",
    "test_beam_search_is_that_without_a_cache": "beam",
    "test_prefill_in_chunks_is_one_forward_pass": "chunks",
    "test_save_load_and_revert": "save",
    "test_lora_trains_saves_and_reloads": "LoRA",
    "test_bfloat16_is_as_good_as_the_original": "bf16",
    "test_gradients_are_those_of_the_original": "gradient",
}
"""Column of each test."""

REASONS: dict[tuple[str, str], str] = {}
"""Why a test does not apply to a family, by (family, test); it is skipped with this sentence."""

_REFUSED = """Refused, each in one sentence, since a silent conversion would be wrong:

- Gemma 2 as published: its cap on attention scores, $50\\tanh(s/50)$, cannot be summarised. Loaded with
  `attn_logit_softcapping=None` it converts; its original is then the model without the cap, and what leaving it out
  costs was not measured here.
- BLOOM, CodeGen, Falcon, GPT-J, GPT-Neo, MPT: they compute attention themselves.
- Encoders, encoder-decoders (T5) and models with cross-attention: BSBR attention is causal.
- Models whose layers all have sliding windows: there is nothing to convert.
"""


def render(outcomes: dict[tuple[str, str], str]) -> str:
    """Write the page.

    Args:
        outcomes: "yes" or a reason, by family and test.
    Returns:
        The text of docs/families.md.
    """
    reasons = sorted({outcome for outcome in outcomes.values() if outcome != "yes"})
    lines = [
        "# Families",
        "",
        "Written by `python -m tests.hf.coverage` from the outcomes of `tests/hf/test_families.py`; not to be edited.",
        "Every cell is a test on a tiny random model of two layers, blocks of 8 tokens.",
        "",
        f"| family | {' | '.join(PROPERTIES.values())} | what it has |",
        f"|---|{':-:|' * len(PROPERTIES)}---|",
    ]
    for family, words in NAMES.items():
        found = [outcomes[family, test] for test in PROPERTIES]
        cells = ["✓" if outcome == "yes" else f"({reasons.index(outcome) + 1})" for outcome in found]
        lines.append(f"| {words} | {' | '.join(cells)} | {TRAITS[family]} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), *([""] if reasons else [])]
    return "\n".join([*lines, _COLUMNS, _REFUSED])


_COLUMNS = """What a ✓ says:

- dense: with every block retrieved, logits are the original's, with and without padding (float32, at most 1e-4 apart,
  the same next token everywhere).
- generate: greedy and sampled text with the BSBR cache, a stock cache and none are the same tokens.
- padding: left padding of 0 to 19 tokens and other rows in the batch change no next token, at any position.
- beam: beam search with and without a cache gives the same tokens.
- chunks: a prompt read in parts of 1, 7, 8 and 9 tokens gives the logits of one forward pass.
- save: a saved model loads with `AutoModelForCausalLM` to the same bits, and `revert` gives the original's.
- LoRA: an adapter (peft) learns, and reloads on the converted model to the same bits.
- bf16: with every block retrieved, no further from float32 than twice the original in bfloat16.
- gradient: with every block retrieved, every weight's gradient is the original's; with few, all are finite and reach
  the calibration.
"""


class _Outcomes:
    """A plugin of pytest that collects what became of each test."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, rest = report.nodeid.rpartition("::")[2].partition("[")
        key = rest.rstrip("]"), test
        if test not in PROPERTIES or (report.when != "call" and report.passed):
            return
        if report.skipped:
            self.found[key] = str(report.longrepr[2]).removeprefix("Skipped: ")  # type: ignore[index]
        else:
            self.found[key] = "yes" if report.passed else "failed"


def main() -> int:
    """Run the tests and write the page; return 1, with the page untouched, where one failed."""
    outcomes = _Outcomes()
    pytest.main(["-q", str(Path(__file__).parent / "test_families.py"), "-p", "no:randomly"], plugins=[outcomes])
    wrong = [
        key for key in ((family, test) for family in NAMES for test in PROPERTIES)
        if outcomes.found.get(key, "failed") == "failed"
    ]  # fmt: skip
    for family, test in wrong:
        print(f"{family}: {test} failed or did not run", file=sys.stderr)
    if not wrong:
        PAGE.write_text(render(outcomes.found))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
