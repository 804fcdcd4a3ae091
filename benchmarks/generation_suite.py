"""transformers' own generation tests, run on converted families.

The tests are in transformers' repository, not in its package: give a checkout of the version that is installed.

git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
pip install parameterized
python -m benchmarks.generation_suite --transformers-tests transformers --holds 5.23.0
"""

import argparse
import hashlib
import importlib.util
import sys
import unittest
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.hf.coverage import NAMES
from tests.hf.families import SIZES
from transformers import set_seed
from transformers.cache_utils import Cache

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.files import write_json
from bsbr.hf import BSBRCache, derive
from bsbr.hf.cache import BSBRLayer

FILE = "tests/generation/test_utils.py"
"""What of the checkout is run."""

BATCH, TOKENS, NEW_TOKENS, WINDOW = 13, 20, 6, 64
CONFIG = BSBRConfig(dense_below=0, block_size=4, top_k=1)

STATIC_CACHE = ("test_generate_with_static_cache", "test_generate_from_inputs_embeds_with_static_cache")
"""Skipped for classes that do not compile to one graph, though a static cache needs no compiler: run anyway."""

LEFT_PADDING = "test_left_padding_compatibility"
"""Skipped for models without attention weights, which it does not read: run anyway."""

PROTOCOL = {
    "model": "the converted class of the family, tiny, random weights, uncalibrated; sliding windows longer than the "
    "texts, since the tests' shapes of transformers' own caches are those of whole texts",
    "input": f"{BATCH} rows of {TOKENS} random tokens, row i masked from token i + 1 on, as transformers tests do; "
    f"each test takes as many rows as it wants and generates {NEW_TOKENS} tokens where it does not say how many",
    "seed": "0 before each test; a test marked flaky runs once and must pass, where transformers tries it again",
    "attention weights": "declared absent, since a converted model computes none: tests of them are skipped, and tests "
    "that would switch to eager attention where there are any run with bsbr attention",
    "caches": "a BSBRCache has no tensor of all keys: its lengths and rows are checked instead of that tensor's shape, "
    "and two caches are equal where a random next token attends to the same",
    "static cache": f"{' and '.join(STATIC_CACHE)} run as if the class compiled to one graph",
    "left padding": f"{LEFT_PADDING} runs as if there were attention weights",
}


class Sizes:
    """What the tests ask for a config and inputs.

    Args:
        family: transformers' model type.
    """

    seq_length = TOKENS

    def __init__(self, family: str) -> None:
        self.family = family

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Make a config of the converted family and inputs for its model."""
        window = {"sliding_window": WINDOW} if SIZES[self.family].get("sliding_window") else {}
        config = derive(self.family)[0](**SIZES[self.family] | window)
        config.bsbr = CONFIG.to_dict()
        ids = torch.randint(3, config.vocab_size, (BATCH, TOKENS))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


def load_tests(folder: Path) -> Any:
    """Import the tests.

    Args:
        folder: the checkout.
    Returns:
        The class GenerationTesterMixin.
    Raises:
        UserError: they are not there.
    """
    if not (folder / FILE).is_file():
        raise UserError(f'--transformers-tests "{folder}": {FILE} missing. Give a checkout of transformers')
    spec = importlib.util.spec_from_file_location("transformers_generation_tests", folder / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("transformers.testing_utils.is_flaky", _run_once):
        spec.loader.exec_module(module)
    return module.GenerationTesterMixin


def _run_once(function: Any = None, **settings: Any) -> Any:
    """Stand in for a decorator that tries a test again until it passes or, written without brackets, never runs it."""
    return function if callable(function) else _run_once


def make_case(mixin: Any, family: str) -> Any:
    """Make the test case of a converted family.

    Args:
        mixin: transformers' GenerationTesterMixin.
        family: transformers' model type.
    Returns:
        A subclass of unittest.TestCase.
    """
    model = derive(family)[1]

    class Case(mixin, unittest.TestCase):  # type: ignore[misc]
        all_generative_model_classes = (model,)
        max_new_tokens = NEW_TOKENS

        @property
        def has_attentions(self) -> bool:
            return self._testMethodName == LEFT_PADDING

        def setUp(self) -> None:
            set_seed(0)
            self.model_tester = Sizes(family)
            one_graph = self._testMethodName in STATIC_CACHE
            self.enterContext(mock.patch.object(model, "_can_compile_fullgraph", one_graph))
            self.enterContext(mock.patch.object(model, "generate", _without_dynamic_full(model.generate)))

        def _check_past_key_values_for_generate(
            self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
        ) -> None:
            if not isinstance(past_key_values, BSBRCache):
                return super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)
            assert len(past_key_values) == config.num_hidden_layers
            for layer in past_key_values.layers:
                assert layer.get_seq_length() == seq_length
                if isinstance(layer, BSBRLayer):
                    assert len(layer.blocks.lengths) == batch_size
            return None

        def _check_caches_are_equal(self, cache1: Cache, cache2: Cache) -> None:
            if not isinstance(cache1, BSBRCache):
                return super()._check_caches_are_equal(cache1, cache2)
            assert isinstance(cache2, BSBRCache)
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            for first, second in zip(cache1.layers, cache2.layers, strict=True):
                assert first.get_seq_length() == second.get_seq_length()
                if isinstance(first, BSBRLayer):
                    assert first.blocks.lengths == second.blocks.lengths
                    torch.testing.assert_close(next_token(first, config), next_token(second, config))
            return None

    return Case


def next_token(layer: BSBRLayer, config: Any) -> torch.Tensor:
    """Let a random token, always the same, attend to what a layer of a cache holds."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(layer.blocks.lengths), 1, count, width, generator=generator)
        for count in (heads, key_heads, key_heads)
    )
    return layer.blocks.attend(q, k, v, scale=width**-0.5)


def _without_dynamic_full(generate: Any) -> Any:
    """Tests before 5.23 ask by a name that 5.23 has dropped for what is a converted model's own cache."""

    def run(self: Any, *args: Any, **settings: Any) -> Any:
        if settings.get("cache_implementation") == "dynamic_full":
            del settings["cache_implementation"]
        return generate(self, *args, **settings)

    return run


class Outcomes(unittest.TestResult):
    """What became of each test: passed, skipped with its reason, or failed with the last line of its error."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[str, str]] = {}

    def _note(self, test: Any, outcome: str, **more: str) -> None:
        self.rows[test._testMethodName] = {"outcome": outcome, **more}
        print(test._testMethodName, outcome, *more.values(), file=sys.stderr)

    def addSuccess(self, test: Any) -> None:
        """Note a test that passed."""
        self._note(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        """Note a test that was skipped."""
        self._note(test, "skipped", reason=reason)

    def addFailure(self, test: Any, error: Any) -> None:
        """Note a test that failed."""
        self._note(test, "failed", error=" ".join(str(error[1]).split())[:500] or error[0].__name__)

    addError = addFailure


def run_family(folder: Path, family: str) -> dict[str, dict[str, str]]:
    """Run the tests on one converted family.

    Args:
        folder: the checkout of transformers.
        family: transformers' model type.
    Returns:
        Each test's outcome, with the reason or error where it did not pass.
    """
    outcomes = Outcomes()
    unittest.defaultTestLoader.loadTestsFromTestCase(make_case(load_tests(folder), family)).run(outcomes)
    return outcomes.rows


def summarise(families: dict[str, dict[str, dict[str, str]]]) -> dict[str, Any]:
    """Put the outcomes of all families together.

    Args:
        families: family to what `run_family` returned.
    Returns:
        The counts and errors of each family; tests that passed in all; reasons of the others.
    """
    rows = []
    for family, tests in families.items():
        counts = Counter(row["outcome"] for row in tests.values())
        failures = {name: row["error"] for name, row in tests.items() if row["outcome"] == "failed"}
        rows.append({"family": family, **{x: counts[x] for x in ("passed", "skipped", "failed")}, "failures": failures})
    names = sorted({name for tests in families.values() for name in tests})
    by_name = {name: [tests[name] for tests in families.values() if name in tests] for name in names}
    return {
        "rows": rows,
        "passed_in_all": [name for name in names if all(row["outcome"] == "passed" for row in by_name[name])],
        "skipped": {
            name: sorted({row["reason"] for row in by_name[name] if row["outcome"] == "skipped"})
            for name in names
            if any(row["outcome"] == "skipped" for row in by_name[name])
        },
    }


def main() -> int:
    """Run the families, write one JSON file; return 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-tests", type=Path, required=True, help="checkout of transformers")
    parser.add_argument("--holds", required=True, help="which version the checkout is, for the result file")
    parser.add_argument("--families", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation_suite.json"))
    options = parser.parse_args()
    folder = options.transformers_tests.resolve()
    found = summarise({family: run_family(folder, family) for family in options.families})
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    write_json(
        options.output,
        {
            "schema": {"name": "bsbr.benchmarks.generation_suite", "version": 1},
            "command": [without_folders(word) for word in sys.argv],
            "code": code_versions(),
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu"},
            "tests": {"file": FILE, "version": options.holds, "sha256": digest},
            "config": CONFIG.to_dict(),
            "protocol": PROTOCOL,
            **found,
        },
    )
    for row in found["rows"]:
        print(f"{row['family']}: {row['passed']} passed, {row['skipped']} skipped, {row['failed']} failed")
    return int(any(row["failed"] for row in found["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
