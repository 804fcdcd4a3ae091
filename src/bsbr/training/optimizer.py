"""Muon for the matrices of the blocks, AdamW for everything else, one schedule for both; or AdamW for all."""

from collections.abc import Mapping

import torch
from torch import nn

from bsbr.training.muon import StackedMuon
from bsbr.training.processes import like, whole

_STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "muon": ("momentum_buffer",)}


class SplitOptimizer:
    """Muon on 2-D block weights and AdamW on embeddings, norms and biases, behind one `step`.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al.,
    "Muon is Scalable for LLM Training" (arXiv 2502.16982), whose scaling (`match_rms_adamw`) is used, as it
    does not depend on which way round a weight is stored (GPT-2 stores [in, out]).

    Args:
        model: its parameters that require gradients are optimised.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, in the same units.
        weight_decay: decoupled, on matrices and embeddings; norms, biases and an attention's scalars have none.
        muon: False leaves the matrices to AdamW too, at its rate.
    """

    def __init__(self, model: nn.Module, *, lr: float, muon_lr: float, weight_decay: float, muon: bool = True) -> None:
        self._names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        looked_up = _embeddings(model)
        vectors = [p for p, name in self._names.items() if p.ndim != 2 or name.endswith(".calibration")]
        kept = {*vectors}
        matrices = [p for p in self._names if p not in kept and p not in looked_up]
        embeddings = [p for p in self._names if p not in kept and p in looked_up]
        if not muon:
            matrices, embeddings = [], embeddings + matrices
        fused = next(iter(self._names)).is_cuda
        self._adamw = torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.95),
            fused=fused,
        )
        self._parts: dict[str, torch.optim.Optimizer] = {"adamw": self._adamw}
        if matrices:
            # on a CPU nothing is launched, and matrices spread over processes cannot be stacked
            stacks = fused and not any(hasattr(p, "full_tensor") for p in matrices)
            self._parts["muon"] = (StackedMuon if stacks else torch.optim.Muon)(
                matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        self._peaks = {"adamw": lr, "muon": muon_lr}

    def set_scale(self, scale: float) -> None:
        """Set both learning rates to `scale` times their peak."""
        for name, part in self._parts.items():
            for group in part.param_groups:
                group["lr"] = self._peaks[name] * scale

    def step(self) -> None:
        """Apply the gradients and forget them."""
        for part in self._parts.values():
            part.step()
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every state tensor under `optimizer/parameter/key`, as references, or whole where they are spread."""
        return {
            f"{part_name}/{self._names[p]}/{key}": whole(part.state[p][key])
            for part_name, part in self._parts.items()
            for p in part.state
            for key in _STATE_KEYS[part_name]
        }

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave, on this optimizer's devices.

        Args:
            tensors: one tensor for every parameter and key.
        Raises:
            ValueError: a tensor is missing; the message names it.
        """
        for part_name, part in self._parts.items():
            for group in part.param_groups:
                for p in group["params"]:
                    part.state[p] = {
                        key: self._restored(tensors, f"{part_name}/{self._names[p]}/{key}", p, key)
                        for key in _STATE_KEYS[part_name]
                    }

    def _restored(self, tensors: Mapping[str, torch.Tensor], name: str, p: nn.Parameter, key: str) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"optimizer state {name} is missing. Resume from an earlier checkpoint")
        # AdamW keeps its step count on the CPU unless it is fused.
        stays = key == "step" and not p.is_cuda
        return tensors[name].clone() if stays else like(tensors[name], p)


def schedule(step: int, total_steps: float, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at `total_steps`.

    Args:
        step: the step about to be made, from 0.
        total_steps: steps of the whole run; may be an estimate that changes on the way.
        warmup_steps: steps until the peak.
    Returns:
        A factor from 0 to 1 for the learning rates.

    Example:
        >>> [round(schedule(step, 10, 2), 2) for step in (0, 1, 2, 6, 9, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.12, 0.0]
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay = (total_steps - step) / max(total_steps - warmup_steps, 1.0)
    return max(0.0, min(warm, decay))


def _embeddings(model: nn.Module) -> set[torch.Tensor]:
    """Weights that stand for tokens or positions, the output matrix among them."""
    found: set[torch.Tensor] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return found if head is None else found | {head.weight}
