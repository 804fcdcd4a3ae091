"""Tiny things that long tests work on: a text, a model, the commands that train, convert and evaluate it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from bsbr import BSBRConfig
from bsbr.cli import main
from bsbr.data.tokenizer import train_tokenizer
from bsbr.evaluation.results import content_digest
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.speed import SpeedSettings
from bsbr.evaluation.suite import run_suite
from bsbr.hf.convert import convert
from bsbr.hf.loading import load_model, load_tokenizer
from bsbr.manifest import describe
from bsbr.training.pretrain import PretrainConfig, run_pretrain

WORDS = [f"word{i % 37} and {i % 11} more of {i % 5};" for i in range(1200)]
TEXT = "\n<|endoftext|>\n".join(" ".join(WORDS[i : i + 200]) for i in range(0, 1200, 200))
ATTENTION = ("--block-size", "8", "--top-k", "1", "--dense-below", "0")
SPARSE = BSBRConfig(block_size=8, top_k=1, dense_below=0)

Command = Callable[[Path, bool], object]
"""Does a piece of work into a folder; True goes on with what a killed run has left there."""


def make(folder: Path) -> Path:
    """Write a text, a dense model and a converted one.

    Args:
        folder: where to.
    Returns:
        The folder: `text.txt`, `model`, `converted`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    tokenizer = train_tokenizer([TEXT], 300, max_length=128)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=len(tokenizer), n_positions=128))
    for parameter in model.parameters():
        parameter.data *= 4  # random weights attend to everything alike: sharpen
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    convert(model.eval(), SPARSE).save_pretrained(folder / "converted")
    tokenizer.save_pretrained(folder / "converted")
    return folder


def commands(place: Path) -> dict[str, Command]:
    """The pieces of work that write something and can be gone on with.

    Args:
        place: from `make`.
    Returns:
        Name to work.
    """
    text, quiet = place / "text.txt", Console(file=io.StringIO())

    def pretrain(output: Path, resume: bool) -> object:
        sizes: dict[str, Any] = {"layers": 1, "heads": 2, "hidden": 16, "context": 16, "vocab": 270, "warmup_steps": 4}
        config = PretrainConfig(
            **sizes, batch_tokens=64, tokens=64 * 30, val_interval=8, val_windows=4, checkpoint_interval=3
        )
        resume = resume and output.exists()
        return run_pretrain(config, text=text, val=text, output=output, resume=resume, device="cpu", console=quiet)

    def finetune(output: Path, resume: bool) -> object:
        sizes = (
            "--length 32 --accumulation 2 --distill-tokens 384 --transfer-tokens 128 --save-interval 2 --eval-windows 1"
        )
        rates = "--precision float32 --eval-interval 3 --device cpu"
        words = [*sizes.split(), *rates.split(), *(["--resume"] if resume else [])]
        return main(["finetune", str(place / "converted"), str(output), "--text", str(text), *words])

    def calibrate(output: Path, resume: bool) -> object:
        again = ["--overwrite"] if resume else []
        return main(["convert", str(place / "model"), str(output), "--calibrate", str(text), *ATTENTION, *again])

    def evaluate(output: Path, resume: bool) -> object:
        model, tokenizer = load_model(place / "model"), load_tokenizer(place / "model")
        variants = {"converted": convert(model, SPARSE), "local": convert(model, BSBRConfig(top_k=0, far="drop"))}
        config = SuiteConfig(
            window=96, documents=4, context=16, similarity_documents=2, random_samples=1, noise_documents=1,
            lengths=(16, 32), fixed_tokens=64, speed=SpeedSettings(rounds=1, least_rounds=1, min_sample_s=0.0),
        )  # fmt: skip
        documents = [f"{i} {TEXT[i * 900 : i * 900 + 1800]}" for i in range(4)]
        run_suite(model, tokenizer, variants, {"book": documents}, config, output, resume)
        return 0

    return {"pretrain": pretrain, "finetune": finetune, "convert --calibrate": calibrate, "evaluate": evaluate}


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished piece of work left, without times: equal for equal work.

    Args:
        folder: its output.
    Returns:
        File names to digests, or to contents without times.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name in ("training.json", "finetune.json"):
            content = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in content.items() if k not in ("wall_s", "training_s")}
        elif path.suffix == ".json" and "digest" in (content := json.loads(path.read_text())):
            found[path.name] = content_digest(content | {"code": ""})  # a commit meanwhile changes no figure
        elif path.name in ("records.jsonl", "checkpoints"):
            found[path.name] = ""
        elif path.name != "manifest.json" or not (folder / "training.json").exists():
            found[path.name] = describe(path)["sha256"] if path.is_file() else ""
    return found
