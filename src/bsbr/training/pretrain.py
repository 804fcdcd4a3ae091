"""`bsbr pretrain`: a causal language model from random weights, on a text or a synthetic task."""

import dataclasses
import platform
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import bsbr
from bsbr.data.tasks import TaskConfig
from bsbr.errors import UserError
from bsbr.files import check_writable, remove_temporaries, write_json
from bsbr.manifest import write_manifest
from bsbr.memory import require_memory
from bsbr.training.batches import Batches, TaskBatches, TextBatches
from bsbr.training.board import Board
from bsbr.training.build import build_model, least_bytes
from bsbr.training.checkpoint import remove_unfinished
from bsbr.training.corpus import Corpus, prepare_corpus, save_tokenizer
from bsbr.training.language_model import HeldOut, save_model
from bsbr.training.processes import Processes, fill, join_processes, local_device, spread
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.sampling import continue_prompt
from bsbr.training.trainer import Trainer, deferred_interrupt, total_steps

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PretrainConfig", "run_pretrain"]

RECORD = "training.json"
"""The record of a run, written last: a folder that has it is finished."""

_SAMPLE_TOKENS = 48
_MODEL = ("config.json", "generation_config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@torch.enable_grad()  # also where a caller, or a Ctrl-C within torch.no_grad, has left gradients off
def run_pretrain(
    config: PretrainConfig,
    *,
    text: str | Path | None = None,
    val: str | Path | None = None,
    output: str | Path,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    samples: Sequence[str] = (),
    workers: int = 0,
    log_to_tensorboard: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Train a language model from random weights and save it as a standard Hugging Face folder.

    1. Read the texts, train (or load) the tokenizer, encode; or generate the recipe's task.
    2. Train on shuffled windows of one packed stream, with checkpoints under `output/checkpoints`. Under `accelerate
       launch` or `torchrun`, weights, gradients and optimizer state are shared out over the processes (FSDP2).
    3. Round the weights to bfloat16, measure the held-out loss of exactly these weights in float32, and write
       `config.json`, `model.safetensors`, the tokenizer and, last, `training.json`; the checkpoints then go.

    A run that was killed at any moment goes on with `resume` and ends with the weights of an unbroken one.

    Args:
        config: the recipe.
        text, val: training and held-out text, as `bsbr.data.collections.read_collection` takes them; None for a task.
        output: the folder to write; must not hold a model or another run's checkpoints.
        tokenizer: folder of a tokenizer to use instead of training one.
        resume: continue from the newest whole checkpoint in `output`, to the weights of an unbroken run.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` ...
        samples: prompts that are continued at each held-out loss.
        workers: processes that make a task's examples ahead of time; with any, a script needs the usual guard,
            `if __name__ == "__main__":`.
        log_to_tensorboard: write the curves into `output/tensorboard` too.
        console: where progress is shown; standard error when None.
    Returns:
        The content of `training.json`.
    Raises:
        UserError: a text, the output folder, the device or the checkpoint cannot be used.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
    """
    started = time.monotonic()
    place, output = local_device(_device(device)), Path(output)
    _check_sources(config, text, val, tokenizer, samples)
    _check_output(output, resume)
    if place.type == "cpu":
        require_memory(
            least_bytes(config), "training", "Lower --hidden, --layers or --batch-tokens, or raise --accumulation"
        )
    with join_processes(place) as processes, TrainingProgress(_voice(console, processes)) as progress:
        if processes.first:
            check_writable(output)
            remove_temporaries(output)
            remove_unfinished(output / "checkpoints")
        processes.wait()
        corpus: Corpus | None = None
        if text is not None and val is not None:
            if resume and tokenizer is None and _has_tokenizer(output):
                tokenizer = output
            corpus = prepare_corpus(
                text=text, val=val, tokenizer=None if tokenizer is None else Path(tokenizer), vocab=config.vocab,
                context=config.context, device=place, progress=progress,
            )  # fmt: skip
            if processes.first and (tokenizer is None or Path(tokenizer) != output):  # what was read there is there
                save_tokenizer(corpus.tokenizer, output)
        batches, vocab = _batches(config, corpus, place, workers)
        model = build_model(config, vocab)
        _check_share(config, processes)
        torch.nn.Module.to(model, place)
        spread(model, processes, place)
        board = Board(output / "tensorboard") if log_to_tensorboard and processes.first else None
        trainer = Trainer(
            config=config, model=model, batches=batches, folder=output / "checkpoints", progress=progress,
            processes=processes, board=board,
        )  # fmt: skip
        if samples and corpus is not None:
            trainer.on_measure.append(partial(_sample, corpus, tuple(samples), progress))
        if resume:
            trainer.resume()
        trainer.train()
        if board is not None:
            board.close()
        record = _finish(config, trainer, vocab, place, output, started)
        progress.say(f"model saved in {output}")
        processes.wait()
    return record


def _finish(
    config: PretrainConfig, trainer: Trainer, vocab: int, place: torch.device, output: Path, started: float
) -> dict[str, Any]:
    """Measure the weights as they are stored, on the first process alone, and write everything."""
    weights = trainer.whole_weights()
    if not trainer.processes.first:
        return {}
    model = trainer.model
    if trainer.processes.world > 1:
        model = build_model(config, vocab)
        torch.nn.Module.to(model, place)
        for name, parameter in model.named_parameters():
            fill(parameter, weights[name])
    model.bfloat16().float()
    figures = trainer.batches.measure(model, whole=True)
    found = figures.pop("found")
    trainer.progress.held_out(trainer.step, figures)
    record = _record(config, trainer, model, found, place, time.monotonic() - started)
    save_model(model.bfloat16(), output)
    write_manifest(output, [name for name in (*_MODEL, *_TOKENIZER) if (output / name).is_file()])
    with deferred_interrupt():  # the run has ended: Ctrl-C between these would leave its checkpoints for ever
        write_json(output / RECORD, record)
        _remove_checkpoints(output)
    return record


def _batches(config: PretrainConfig, corpus: Corpus | None, place: torch.device, workers: int) -> tuple[Batches, int]:
    """Where batches come from, and how many tokens the vocabulary has."""
    if corpus is not None:
        return TextBatches(corpus, config, total_steps(config)), len(corpus.tokenizer)
    task = TaskConfig.from_dict({**(config.task or {}), "length": config.context})
    return TaskBatches(task, config, total_steps(config), place, workers=workers), task.vocab


def _sample(
    corpus: Corpus, prompts: tuple[str, ...], progress: TrainingProgress, model: PreTrainedModel, step: int
) -> None:
    for prompt in prompts:
        ids = torch.tensor(corpus.tokenizer(prompt, add_special_tokens=False)["input_ids"] or [0])
        text = str(corpus.tokenizer.decode(continue_prompt(model, ids, _SAMPLE_TOKENS).tolist()))
        progress.say(f"step {step}: {' '.join(text.split())}")


def _record(
    config: PretrainConfig, trainer: Trainer, model: PreTrainedModel, found: Any, device: torch.device, wall_s: float
) -> dict[str, Any]:
    import transformers

    on_cuda, tokens = device.type == "cuda", trainer.step * config.batch_tokens
    if isinstance(found, HeldOut):
        held_out = {**dataclasses.asdict(found), "perplexity": found.perplexity}
        held_out["nll_by_part"] = list(found.nll_by_part)
    else:
        held_out = found.to_dict()
    epoch = trainer.batches.train_tokens
    return {
        "schema": {"name": "bsbr-pretrain", "version": 1},
        "recipe": config.to_dict(),
        "text": trainer.batches.record,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "tokens_seen": tokens,
        "epochs": None if epoch is None else tokens / epoch,
        "held_out": {**held_out, "weights": "bfloat16", "arithmetic": "float32"},
        "history": trainer.history,
        "versions": {
            "bsbr": bsbr.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})",
        "processes": trainer.processes.world,
        "precision": trainer.precision,
        "compiled": trainer.compiled,
        "wall_s": round(wall_s, 1),
        "training_s": round(trainer.elapsed_s, 1),
    }


def _check_sources(
    config: PretrainConfig,
    text: str | Path | None,
    val: str | Path | None,
    tokenizer: str | Path | None,
    samples: Sequence[str],
) -> None:
    if config.task is None and (text is None or val is None):
        raise UserError("what to train on: give text and val, or a task")
    if config.task is not None and (text is not None or val is not None or tokenizer is not None or samples):
        raise UserError("a task makes its own tokens: leave text, val, tokenizer and samples out")


def _check_share(config: PretrainConfig, processes: Processes) -> None:
    windows, parts = config.batch_tokens // config.context, processes.world * config.accumulation
    if windows % parts:
        raise UserError(
            f"{windows} windows of a step cannot be shared out over {processes.world} processes and "
            f"{config.accumulation} passes. Take batch_tokens = {-(-windows // parts) * parts * config.context}"
        )


def _has_tokenizer(folder: Path) -> bool:
    # the second is written after the first: without it the tokenizer is not whole
    return all((folder / name).is_file() for name in _TOKENIZER)


def _voice(console: "Console | None", processes: Processes) -> "Console | None":
    if processes.first:
        return console
    from rich.console import Console

    return Console(quiet=True)


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f'output "{output}": is a file. Choose a folder')
    # a run that was killed while it saved its model still has its checkpoints, and goes on from them
    unfinished = resume and (output / "checkpoints").exists() and not (output / RECORD).exists()
    if (output / RECORD).exists() or ((output / "model.safetensors").exists() and not unfinished):
        raise UserError(f'output "{output}": already holds a model. Choose another folder or remove it')
    if not resume and (output / "checkpoints").exists():
        raise UserError(f'output "{output}": holds an unfinished run. Continue it with --resume or choose another')


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


def _remove_checkpoints(output: Path) -> None:
    # Renamed first: what is left of a removal that was cut short must not look like a run to go on with.
    doomed = output / ".removing-checkpoints"
    shutil.rmtree(doomed, ignore_errors=True)
    if (output / "checkpoints").exists():
        (output / "checkpoints").rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
