"""`bsbr finetune`: a converted model learns from its original what the far field cannot give by itself."""

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from bsbr.config import BSBRConfig
from bsbr.data.tokenizer import pack_documents
from bsbr.errors import UserError
from bsbr.files import remove_temporaries, write_json
from bsbr.hf.convert import revert
from bsbr.hf.mixers import read_settings, write_settings
from bsbr.hf.modeling import BSBRModelMixin, attention_modules
from bsbr.hf.positions import check_length
from bsbr.hf.sharing import share
from bsbr.training.distill import distillation_loss, transfer_loss
from bsbr.training.finetune_recipe import FinetuneConfig, Stage
from bsbr.training.held_out import compare_models
from bsbr.training.hub_trainer import PlainTrainer, newest_checkpoint
from bsbr.training.progress import TrainingProgress
from bsbr.training.trainer import deferred_interrupt

_FINAL_FACTOR = 4
"""Held-out windows before and after, as a multiple of those on the way."""


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
        console: where progress is shown; standard error when None.
    Returns:
        The trained model in eval mode, and the content of `finetune.json`.
    Raises:
        UserError: the model is not converted with a BSBRConfig, a text is too short, the length is beyond the
            model's positions, peft is missing for scope "lora", or `output` holds an unfinished run.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
    """
    settings = _settings(model)
    check_length(model, config.length)
    folder = Path(output)
    _check_output(folder, resume)
    train, val = _split(text, held_out, tokenizer, config)
    started = time.monotonic()
    teacher = revert(model).eval().requires_grad_(False)
    student = _student(model, config)
    with TrainingProgress(console if _is_first_process() else Console(quiet=True)) as progress:
        look = _few(val, _FINAL_FACTOR * config.eval_windows)
        progress.say(f"measuring on {len(look)} held-out windows of {config.length} tokens")
        before = compare_models(teacher, _controls(_plain(student), settings), look)
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
                trainer.train(resume_from_checkpoint=newest_checkpoint(own))
                device = str(trainer.args.device)
                history += [{"stage": stage, **x} for x in trainer.state.log_history if "held_out_kl" in x]
                if interrupted.is_set():
                    progress.say("interrupted: checkpoint written, continue with --resume")
                    raise KeyboardInterrupt
        trained = _finish(student, model)
        progress.say("measuring again")
        after = compare_models(teacher, _controls(trained, settings), look)
    record = {
        "schema": {"name": "bsbr-finetune", "version": 1},
        "recipe": config.to_dict(),
        "attention": settings.to_dict(),
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in trained.parameters()),
        "text": {"windows": len(train), "held_out_windows": len(look), "length": config.length},
        "before": before,
        "after": after,
        "history": history,
        "device": device,
        "wall_s": round(time.monotonic() - started, 1),
    }
    if _is_first_process():
        write_json(folder / "finetune.json", record)
    return trained, record


class StageTrainer(PlainTrainer):
    """transformers' Trainer with the loss of one stage and an eye on the held-out text.

    Args:
        stage: "transfer", "distill" or "language".
        recipe: the run's.
        teacher: the dense original, frozen.
        held_out: windows, [W, length].
        progress: shows what happens.
        interrupted: set on Ctrl-C.
        model, args, train_dataset: as Trainer takes them.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        recipe: FinetuneConfig,
        teacher: PreTrainedModel,
        held_out: Tensor,
        progress: TrainingProgress,
        interrupted: Any,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Tensor,
    ) -> None:
        rows = [{"input_ids": window} for window in train_dataset]
        super().__init__(model=model, args=args, train_dataset=rows)  # type: ignore[arg-type]
        self.stage, self.recipe, self.teacher = stage, recipe, teacher.to(self.args.device)  # type: ignore[arg-type]
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)  # its lines of raw numbers
        self.add_callback(_Watch(self, held_out, progress, interrupted))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch of windows; called by Trainer."""
        ids = inputs["input_ids"]
        if self.stage == "transfer":
            return transfer_loss(model, self.teacher, {"input_ids": ids})  # type: ignore[arg-type]
        if self.stage == "language":
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        with torch.no_grad():
            taught = self.teacher(input_ids=ids, use_cache=False).logits
        return distillation_loss(model(input_ids=ids, use_cache=False).logits, taught)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, with a rate of its own for the scalars of the far field; called by Trainer."""
        if self.optimizer is None:
            trained: Any = model or self.model
            moving = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
            scalars = [p for n, p in moving if n.endswith(".calibration")]
            others = [p for n, p in moving if not n.endswith(".calibration")]
            recipe = self.recipe
            groups = [
                {"params": others, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
                {"params": scalars, "lr": recipe.scalar_lr, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
        return self.optimizer


class _Watch(TrainerCallback):
    """Shows progress, looks at the held-out text, and turns Ctrl-C into a checkpoint and an end."""

    def __init__(self, trainer: StageTrainer, held_out: Tensor, progress: TrainingProgress, interrupted: Any) -> None:
        self.trainer, self.held_out, self.progress, self.interrupted = trainer, held_out, progress, interrupted
        self.started, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        self.progress.say(f"{self.trainer.stage}: {state.max_steps} steps, from {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            step, seconds = state.global_step, time.monotonic() - self.started
            tokens = self._tokens(args) * (step - self.first) / seconds
            self.progress.update(step, state.max_steps, logs["loss"], tokens)  # type: ignore[index]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.trainer.recipe.eval_interval == 0 or step == state.max_steps:
            self._look(step, step * self._tokens(args))
        if self.interrupted.is_set():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish_checkpoint(state.global_step)

    def _tokens(self, args: Any) -> int:
        """Tokens of an optimizer step."""
        recipe = self.trainer.recipe
        return recipe.length * recipe.batch_windows * recipe.accumulation * args.world_size

    def _look(self, step: int, tokens: int) -> None:
        student = _plain(self.trainer.model)
        found = compare_models(self.trainer.teacher, {"converted": student}, self.held_out)["converted"]
        self.progress.say(
            f"{self.trainer.stage} step {step}: held-out KL {found['kl']:.5f}, top-1 {found['top1_agreement']:.2%}, "
            f"perplexity x{found['ppl_ratio']:.4f}"
        )
        self.trainer.log({"tokens": tokens} | {f"held_out_{name}": x for name, x in found.items() if x is not None})


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


def _plain(student: Any) -> PreTrainedModel:
    """The converted model inside whatever wraps it."""
    return next(x for x in student.modules() if isinstance(x, BSBRModelMixin))  # type: ignore[return-value]


def _finish(student: Any, model: PreTrainedModel) -> PreTrainedModel:
    """The trained model without wrappers, as frozen and as noisy as the model given."""
    plain = student.merge_and_unload() if hasattr(student, "merge_and_unload") else student
    plain = _plain(plain)
    for trained, given in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(given, nn.Dropout):
            trained.p = given.p  # type: ignore[union-attr, assignment]
    return plain.requires_grad_(True).eval()


def _controls(model: PreTrainedModel, settings: BSBRConfig) -> dict[str, PreTrainedModel]:
    """The model, its weights with exact attention, and with nothing retrieved: what sparse attention itself does."""
    off = share(model)
    off.config.bsbr = write_settings(replace(settings, top_k=0, top_k_per_head=None))
    return {"converted": model, "dense": revert(model), "retrieval_off": off}


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


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
