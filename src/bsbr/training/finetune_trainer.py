"""Transformers' Trainer with the loss of a fine-tuning stage, and an eye on the held-out text."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from bsbr.hf.modeling import BSBRModelMixin
from bsbr.training.distill import distillation_loss, transfer_loss
from bsbr.training.finetune_recipe import FinetuneConfig, Stage
from bsbr.training.held_out import compare_models
from bsbr.training.hub_trainer import PlainTrainer
from bsbr.training.progress import TrainingProgress


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
        student = plain_model(self.trainer.model)
        found = compare_models(self.trainer.teacher, {"converted": student}, self.held_out)["converted"]
        self.progress.keep(f"held-out KL {found['kl']:.5f}")
        self.progress.say(
            f"{self.trainer.stage} step {step}: held-out KL {found['kl']:.5f}, top-1 {found['top1_agreement']:.2%}, "
            f"perplexity x{found['ppl_ratio']:.4f}"
        )
        self.trainer.log({"tokens": tokens} | {f"held_out_{name}": x for name, x in found.items() if x is not None})


def plain_model(student: Any) -> PreTrainedModel:
    """Return the converted model inside whatever wraps it.

    Args:
        student: a model that holds one converted model.
    Returns:
        That model.
    """
    return next(x for x in student.modules() if isinstance(x, BSBRModelMixin))  # type: ignore[return-value]
