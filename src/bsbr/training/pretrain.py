"""`bsbr pretrain`: a GPT-2-architecture language model from random weights on a text."""

import dataclasses
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import bsbr
from bsbr.errors import UserError
from bsbr.files import check_writable, remove_temporaries, write_json
from bsbr.manifest import write_manifest
from bsbr.memory import require_memory
from bsbr.training.checkpoint import remove_unfinished
from bsbr.training.corpus import prepare_corpus, save_tokenizer
from bsbr.training.language_model import HeldOut, build_gpt2, held_out_loss, save_model
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PretrainConfig", "run_pretrain"]

_MODEL = ("config.json", "generation_config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def run_pretrain(
    config: PretrainConfig,
    *,
    text: str | Path,
    val: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Train a language model from random weights and save it as a standard Hugging Face folder.

    1. Read the texts, train (or load) the tokenizer, encode.
    2. Train on shuffled windows of one packed stream, with checkpoints under `output/checkpoints`.
    3. Round the weights to bfloat16, measure the held-out loss of exactly these weights in float32, and write
       `config.json`, `model.safetensors`, the tokenizer and `training.json`; the checkpoints then go.

    Args:
        config: the recipe.
        text, val: training and held-out text; plain, `.xz` or `.gz`, `<|endoftext|>` lines between documents.
        output: the folder to write; must not hold a model or another run's checkpoints.
        tokenizer: folder of a tokenizer to use instead of training one.
        resume: continue from the newest whole checkpoint in `output`, to the weights of an unbroken run.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` ...
        console: where progress is shown; standard error when None.
    Returns:
        The content of `training.json`.
    Raises:
        UserError: a text, the output folder, the device or the checkpoint cannot be used.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
    """
    started = time.monotonic()
    place, output = _device(device), Path(output)
    _check_output(output, resume)
    if place.type == "cpu":
        require_memory(config.least_bytes(), "training", "Lower --hidden, --layers or --context")
    check_writable(output)
    remove_temporaries(output)
    remove_unfinished(output / "checkpoints")
    # the second is written after the first: without it the tokenizer is not whole
    if resume and tokenizer is None and all((output / name).is_file() for name in _TOKENIZER):
        tokenizer = output
    with TrainingProgress(console) as progress:
        corpus = prepare_corpus(
            text=Path(text),
            val=Path(val),
            tokenizer=None if tokenizer is None else Path(tokenizer),
            vocab=config.vocab,
            context=config.context,
            device=place,
            progress=progress,
        )
        if tokenizer is None or Path(tokenizer) != output:  # what was read there is there
            save_tokenizer(corpus.tokenizer, output)
        model = build_gpt2(
            layers=config.layers,
            heads=config.heads,
            hidden=config.hidden,
            context=config.context,
            vocab=len(corpus.tokenizer),
            seed=config.seed,
        )
        torch.nn.Module.to(model, place)
        trainer = Trainer(config=config, model=model, corpus=corpus, folder=output / "checkpoints", progress=progress)
        if resume:
            trainer.resume()
        trainer.train()
        model.bfloat16().float()
        held_out = held_out_loss(model, corpus.held_out, corpus.byte_lengths, context=config.context)
        progress.held_out(trainer.step, held_out.nll, held_out.bits_per_byte)
        record = _record(config, trainer, held_out, place, time.monotonic() - started)
        save_model(model.bfloat16(), output)
        write_manifest(output, [name for name in (*_MODEL, *_TOKENIZER) if (output / name).is_file()])
        write_json(output / "training.json", record)
        _remove_checkpoints(output)
        progress.say(f"model saved in {output}")
    return record


def _record(
    config: PretrainConfig, trainer: Trainer, held_out: HeldOut, device: torch.device, wall_s: float
) -> dict[str, Any]:
    import transformers

    on_cuda = device.type == "cuda"
    return {
        "schema": {"name": "bsbr-pretrain", "version": 1},
        "recipe": config.to_dict(),
        "text": trainer.corpus.record,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.step,
        "tokens_seen": trainer.step * config.batch_tokens,
        "epochs": trainer.step * config.batch_tokens / len(trainer.corpus.train),
        "held_out": {
            **dataclasses.asdict(held_out),
            "perplexity": held_out.perplexity,
            "weights": "bfloat16",
            "arithmetic": "float32",
        },
        "history": trainer.history,
        "versions": {
            "bsbr": bsbr.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})",
        "precision": trainer.precision,
        "compiled": trainer.compiled,
        "wall_s": round(wall_s, 1),
        "training_s": round(trainer.elapsed_s, 1),
    }


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f'output "{output}": is a file. Choose a folder')
    # a run that was killed while it saved its model still has its checkpoints, and goes on from them
    unfinished = resume and (output / "checkpoints").exists() and not (output / "training.json").exists()
    if (output / "model.safetensors").exists() and not unfinished:
        raise UserError(f'output "{output}": already holds a model. Choose another folder or remove it')
    if not resume and (output / "checkpoints").exists():
        raise UserError(f'output "{output}": holds an unfinished run. Continue it with --resume or choose another')


def _remove_checkpoints(output: Path) -> None:
    # Renamed first: what is left of a removal that was cut short must not look like a run to go on with.
    doomed = output / ".removing-checkpoints"
    shutil.rmtree(doomed, ignore_errors=True)
    (output / "checkpoints").rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: not known. Give auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU visible. Use cpu")
    return device
