"""`bsbr finetune`: a converted model learns from its original what the far field cannot give by itself."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from bsbr.config import BSBRConfig
from bsbr.data.text import text_digest
from bsbr.data.tokenizer import pack_documents
from bsbr.errors import UserError
from bsbr.evaluation.provenance import describe_model, header
from bsbr.files import remove_temporaries, write_json
from bsbr.hf.convert import revert
from bsbr.hf.exact import prepare_dense
from bsbr.hf.mixers import read_settings, write_settings
from bsbr.hf.modeling import BSBRModelMixin, attention_modules
from bsbr.hf.positions import check_length
from bsbr.hf.sharing import share
from bsbr.training.finetune_recipe import FinetuneConfig, Stage
from bsbr.training.finetune_trainer import StageTrainer, plain_model
from bsbr.training.held_out import compare_models
from bsbr.training.hub_trainer import newest_checkpoint
from bsbr.training.progress import TrainingProgress
from bsbr.training.trainer import deferred_interrupt

_FINAL_FACTOR = 4
"""Held-out windows before and after, as a multiple of those on the way."""


@torch.enable_grad()  # also where a caller, or a Ctrl-C within torch.no_grad, has left gradients off
def finetune(
    model: PreTrainedModel,
    config: FinetuneConfig,
    *,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    held_out: str | None = None,
    output: str | Path,
    resume: bool = False,
    report_to: Sequence[str] = (),
    command: Sequence[str] = (),
    console: Console | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a converted model on what its original says; the model given stays as it is.

    Source: docs/method.md, "Fine-tuning". The teacher is the model itself with exact attention, before training.

    1. Measure on held-out windows: the model, the same weights run dense, and with retrieval off.
    2. Train stage after stage (attention transfer, distillation, language modelling) with transformers' Trainer:
       accumulation, bfloat16, gradient checkpointing, several processes under `accelerate launch`, exact resume.
    3. Measure again.

    Args:
        model: converted, with a BSBRConfig; calibrated first, as a rule.
        config: the recipe.
        text: documents separated by lines `<|endoftext|>`; packed into windows.
        tokenizer: the model's.
        held_out: text to measure on; None takes the last twentieth of the windows, at least one, from training.
        output: folder for checkpoints and `finetune.json`.
        resume: go on from the newest checkpoint in `output`.
        report_to: where Trainer logs to: "tensorboard", "trackio" ...
        command: arguments that repeat the run, for the file.
        console: where progress is shown; standard error when None.
    Returns:
        The trained model in eval mode, and the content of `finetune.json`.
    Raises:
        UserError: the model is not converted with a BSBRConfig, a text is too short, the length is beyond the
            model's positions, float16 is wanted without a GPU, peft is missing for scope "lora", or `output` holds an
            unfinished run.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
    """
    settings = _settings(model)
    check_length(model, config.length)
    if config.precision == "float16" and model.device.type != "cuda":
        raise UserError(f"precision float16 needs a GPU, the model is on {model.device}: use float32 or bfloat16")
    folder = Path(output)
    _check_output(folder, resume)
    train, val = _split(text, held_out, tokenizer, config)
    started = time.monotonic()
    teacher = prepare_dense(revert(model).eval().requires_grad_(False))
    student = _student(model, config)
    with TrainingProgress(console if _is_first_process() else Console(quiet=True)) as progress:
        look = _few(val, _FINAL_FACTOR * config.eval_windows)
        progress.say(f"measuring on {len(look)} held-out windows of {config.length} tokens")
        before = compare_models(teacher, _controls(plain_model(student), settings), look)
        history: list[dict[str, Any]] = []
        device = ""
        with deferred_interrupt() as interrupted:
            for number, stage in enumerate(stage for stage, tokens in config.tokens.items() if tokens):
                own = folder / "checkpoints" / f"{number}-{stage}"
                remove_temporaries(own)
                arguments = _arguments(config, stage, own, report_to, model.device)
                trainer = StageTrainer(
                    stage=stage, recipe=config, teacher=teacher, held_out=_few(val, config.eval_windows),
                    progress=progress, interrupted=interrupted, model=student, args=arguments, train_dataset=train,
                )  # fmt: skip
                with _products(config):
                    trainer.go_on(newest_checkpoint(own))
                device = str(trainer.args.device)
                history += [{"stage": stage, **x} for x in trainer.state.log_history if "held_out_kl" in x]
                if interrupted.is_set():
                    progress.say("interrupted: checkpoint written, continue with --resume")
                    raise KeyboardInterrupt
        trained = _finish(student, model)
        progress.say("measuring again")
        after = compare_models(teacher, _controls(trained, settings), look)
    record = _about(model, config, settings, text, held_out, command, device) | {
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in trained.parameters()),
        "text": {"windows": len(train), "held_out_windows": len(look), "length": config.length},
        "before": before,
        "after": after,
        "history": history,
        "wall_s": round(time.monotonic() - started, 1),
    }
    if _is_first_process():
        write_json(folder / "finetune.json", record)
    return trained, record


def _about(
    model: PreTrainedModel,
    config: FinetuneConfig,
    settings: BSBRConfig,
    text: str,
    held_out: str | None,
    command: Sequence[str],
    device: str,
) -> dict[str, Any]:
    """What the record says about how it came about."""
    texts = {"text": text} if held_out is None else {"text": text, "held_out": held_out}
    top = header(
        status="complete",
        command=command,
        model=describe_model(model),
        data={name: {"sha256": text_digest(content)} for name, content in texts.items()},
        protocol={"interval": "95 %, by held-out window"},
        config=settings.to_dict(),
        device=device or str(model.device),
        dtype=config.precision,
    )
    return top | {"schema": {"name": "bsbr-finetune", "version": 2}, "recipe": config.to_dict()}


def _settings(model: PreTrainedModel) -> BSBRConfig:
    settings = read_settings(model.config.bsbr)[1] if isinstance(model, BSBRModelMixin) else None
    if not isinstance(settings, BSBRConfig):
        raise UserError(f"{type(model).__name__} is not converted with a BSBRConfig: run bsbr convert first")
    return settings


def _check_output(folder: Path, resume: bool) -> None:
    # a run that was killed between its last figure and the saving of its model is finished, and must be resumable
    if (folder / "finetune.json").exists() and not resume:
        raise UserError(f'output "{folder}": holds a finished run. Choose another folder or remove it')
    if (folder / "checkpoints").exists() and not resume:
        raise UserError(f'output "{folder}": holds an unfinished run. Continue it with --resume or choose another')


def _split(
    text: str, held_out: str | None, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig
) -> tuple[Tensor, Tensor]:
    """Windows to train on and to measure on, [W, length] each."""
    train = _windows(text, tokenizer, config.length, "text")
    if held_out is not None:
        return train, _windows(held_out, tokenizer, config.length, "held-out text")
    kept = max(1, len(train) // 20)
    if len(train) <= kept:
        raise UserError(f"text: one window of {config.length} tokens, two are needed. Give more text or lower --length")
    return train[:-kept], train[-kept:]


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, what: str) -> Tensor:
    ids = pack_documents(text, tokenizer)
    count = len(ids) // length
    if not count:
        raise UserError(f"{what}: {len(ids)} tokens, one window needs {length}. Give more text or lower --length")
    return torch.tensor(ids[: count * length]).view(count, length)


def _few(windows: Tensor, count: int) -> Tensor:
    """At most `count` windows, evenly spread."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def _student(model: PreTrainedModel, config: FinetuneConfig) -> nn.Module:
    """A copy that may be trained, with what moves marked and dropout off."""
    student: Any = share(model) if config.scope == "calibration" else copy.deepcopy(model)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a teacher without noise is best followed without noise
    if config.scope == "all":
        return student.requires_grad_(True)
    if config.scope == "lora":
        student = _with_lora(student, config)
    else:
        student.requires_grad_(False)
        if config.scope == "attention":
            for module in attention_modules(student):
                module.requires_grad_(True)
    for name, parameter in student.named_parameters():
        if name.endswith(".calibration"):
            parameter.requires_grad_(True)
    return student


def _with_lora(student: PreTrainedModel, config: FinetuneConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("scope lora needs the package peft: pip install 'bsbr[finetune]'") from None
    attention = {id(module) for module in attention_modules(student)}
    targets = [
        f"{name}.{leaf}"
        for name, module in student.named_modules()
        if id(module) in attention
        for leaf, child in module.named_children()
        if getattr(child, "weight", None) is not None and child.weight.dim() == 2
    ]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return get_peft_model(student, lora)


def _finish(student: Any, model: PreTrainedModel) -> PreTrainedModel:
    """The trained model without wrappers, as frozen and as noisy as the model given."""
    plain = student.merge_and_unload() if hasattr(student, "merge_and_unload") else student
    plain = plain_model(plain)
    for trained, given in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(given, nn.Dropout):
            trained.p = given.p  # type: ignore[union-attr, assignment]
    return plain.requires_grad_(True).eval()


def _controls(model: PreTrainedModel, settings: BSBRConfig) -> dict[str, PreTrainedModel]:
    """The model, its weights with exact attention, and with nothing retrieved: what sparse attention itself does."""
    off = share(model)
    off.config.bsbr = write_settings(replace(settings, top_k=0, top_k_per_head=None))
    return {"converted": model, "dense": prepare_dense(revert(model)), "retrieval_off": off}


def _arguments(
    config: FinetuneConfig, stage: Stage, folder: Path, report_to: Sequence[str], device: torch.device
) -> TrainingArguments:
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    steps = config.steps(stage, int(os.environ.get("WORLD_SIZE", "1")))
    # newer versions of transformers rename this one, so it is named only where it is wanted
    memory = {"gradient_checkpointing": True} if config.gradient_checkpointing and stage != "transfer" else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_windows,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_share * steps),
        max_grad_norm=config.clip,
        bf16=bfloat16,
        fp16=config.precision == "float16",
        save_strategy="steps",
        save_steps=config.save_interval,
        save_total_limit=2,
        logging_steps=1,
        report_to=list(report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=stage == "transfer" and config.scope == "all",
        seed=config.seed,
        use_cpu=device.type == "cpu",
        **memory,  # type: ignore[arg-type]
    )


@contextmanager
def _products(config: FinetuneConfig) -> Iterator[None]:
    """Let products of float32 round to 10 bits where the recipe says so, on GPUs that can."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or config.precision in ("tf32", "float16")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
