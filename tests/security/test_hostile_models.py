"""Folders that want to run code, or to read or write elsewhere, get one line and nothing else."""

import json
import random
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bsbr.errors import UserError
from bsbr.hf.loading import load_model, load_tokenizer
from tests.long.tiny import make
from tests.security.headers import mutate
from tests.security.places import edit

CANARY = "canary"
CODE = f"from pathlib import Path\nPath(__file__).parent.joinpath('{CANARY}').write_text('run')\n"
REMOTE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}

_opened: list[str] = []
_watching = False


def _watch(event: str, args: tuple) -> None:
    if _watching and event == "open" and isinstance(args[0], str | bytes):
        _opened.append(str(args[0]))


sys.addaudithook(_watch)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of all files that are opened during the test."""
    global _watching
    _opened.clear()
    _watching = True
    yield _opened
    _watching = False


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("given"))


@pytest.fixture
def model(given: Path, tmp_path: Path) -> Path:
    shutil.copytree(given / "model", tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(CODE)
    return tmp_path / "model"


def edit_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(load: Callable[[Path], object], folder: Path) -> str:
    """What a loader says of a folder; "" where it loads."""
    try:
        load(folder)
    except UserError as error:
        return str(error)
    return ""


CODE_OF_THEIR_OWN = {
    "config": lambda x: edit(x, auto_map=REMOTE),
    "config of an unknown type": lambda x: edit(x, auto_map=REMOTE, model_type="evil"),
    "config of a converted type": lambda x: edit(x, auto_map=REMOTE, model_type="bsbr-gpt2"),
    "config that names a repository": lambda x: edit(x, auto_map={k: f"a/b--{v}" for k, v in REMOTE.items()}),
    "custom pipeline": lambda x: edit(x, custom_pipelines={"text-generation": {"impl": "evil.Evil", "pt": []}}),
    "tokenizer": lambda x: edit_tokenizer(x, auto_map=REMOTE),
    "tokenizer of an unknown class": lambda x: edit_tokenizer(x, auto_map=REMOTE, tokenizer_class="Evil"),
    "tokenizer class of a module": lambda x: edit_tokenizer(x, tokenizer_class="evil.Evil"),
    "processor": lambda x: (x / "processor_config.json").write_text(json.dumps({"auto_map": REMOTE})),
    "generation": lambda x: (x / "generation_config.json").write_text(json.dumps({"auto_map": REMOTE})),
    "custom generate": lambda x: (
        (x / "custom_generate").mkdir() or (x / "custom_generate" / "generate.py").write_text(CODE)
    ),
    "quantizer": lambda x: edit(x, quantization_config={"quant_method": "evil"}),
    "quantizer that is not installed": lambda x: edit(x, quantization_config={"quant_method": "gptq", "bits": 4}),
    "attention of the hub": lambda x: edit(x, _attn_implementation="evil/kernels:attention"),
    "dtype": lambda x: edit(x, dtype="__import__('os').system('touch canary')"),
    "architecture": lambda x: edit(x, architectures=["evil.Evil"]),
    "adapter": lambda x: (x / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "../evil", "peft_type": "LORA", "auto_mapping": REMOTE})
    ),
    "pickle beside the weights": lambda x: (x / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR."),
    "pickle as weights": lambda x: (x / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR."),
    "template": lambda x: (x / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
}  # fmt: skip


@pytest.mark.parametrize("way", CODE_OF_THEIR_OWN)
def test_no_code_of_a_model_runs(way: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it loads or is refused: in one line, without a question, and its code stays where it is."""
    CODE_OF_THEIR_OWN[way](model)
    monkeypatch.chdir(model)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    started = time.monotonic()
    for load in (load_model, load_tokenizer):
        assert "\n" not in refusal(load, model)
    assert time.monotonic() - started < 14  # transformers asks for 15 s whether code may run
    assert not list(model.rglob(CANARY))
    assert not [name for name in sys.modules if name.split(".")[-1] == "evil"]


OUTSIDE = ("../secret.txt", "{secret}", "../../secret.txt", "./../secret.txt", "~/secret.txt", "..\\secret.txt",
           "C:\\secret.txt",
           "file://{secret}", "%2e%2e/secret.txt", "\u2024\u2024/secret.txt", "secret.txt\0.safetensors",
           "x" * 5000)  # fmt: skip
FIELDS = ("vocab_file", "tokenizer_file", "merges_file", "added_tokens_file", "special_tokens_map_file", "name_or_path")


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name[:20]))
def test_nothing_outside_a_model_is_read(name: str, model: Path, opened: list[str], tmp_path: Path) -> None:
    """Names of shards and of a tokenizer's files that lead out of the folder."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    name = name.format(secret=secret) if "{secret}" in name else name
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
    edit_tokenizer(model, **dict.fromkeys(FIELDS, name))
    opened.clear()
    with pytest.raises(UserError) as refused:
        load_model(model)
    assert "\n" not in str(refused.value)
    assert "a secret" not in str(refused.value)
    said = refusal(load_tokenizer, model)
    assert "\n" not in said
    assert "a secret" not in said
    assert not [path for path in opened if "secret" in path and not path.startswith(str(model))]


@pytest.mark.parametrize(
    "name", [*OUTSIDE[:-1], "a/../../b", "//etc", "\x00", "con", "a\nb"], ids=lambda name: ascii(name[:20])
)
def test_names_that_are_no_models(
    name: str, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    opened.clear()
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError):
            load(name.format(secret=tmp_path / "secret.txt") if "{secret}" in name else name)
    assert not [path for path in opened if "secret.txt" in path]


def test_mutated_headers_are_refused_or_harmless(given: Path, tmp_path: Path) -> None:
    """`python -m tests.long.headers` tries ten thousand."""
    good = (given / "model" / "model.safetensors").read_bytes()
    for number in range(300):
        path = tmp_path / "model.safetensors"
        path.write_bytes(mutate(good, random.Random(number)))
        assert mutation_fault(path, given / "model", tmp_path / "folder") == ""


def mutation_fault(weights: Path, model: Path, place: Path) -> str:
    """Load a model with other weights; say what was wrong with that, "" for nothing."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place)
    shutil.copy(weights, place / "model.safetensors")
    started = time.monotonic()
    try:
        load_model(place)
    except UserError as error:
        if "\n" in str(error):
            return f"said {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if time.monotonic() - started < 20 else "slow"


def test_the_mutations_do_something(given: Path, tmp_path: Path) -> None:
    good = (given / "model" / "model.safetensors").read_bytes()
    found = {mutate(good, random.Random(number)) for number in range(50)}
    assert len(found) > 40
    assert good not in found
    assert struct.unpack("<Q", good[:8])[0] < len(good)
    assert load_file(given / "model" / "model.safetensors")
