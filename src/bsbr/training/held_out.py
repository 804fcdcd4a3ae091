"""How near models are to their teacher on held-out windows."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bsbr.evaluation.agreement import compare, read_teacher
from bsbr.evaluation.statistics import paired_bootstrap, ratio_mean

_ROWS = 1024
"""Positions whose predictions are compared at once."""


@torch.no_grad()
def compare_models(
    teacher: PreTrainedModel, models: Mapping[str, PreTrainedModel], windows: Tensor
) -> dict[str, dict[str, float | None]]:
    """Compare next-token predictions at every position of the windows.

    Args:
        teacher: the original.
        models: name to model; each is put into eval mode for the time.
        windows: token ids, [W, length].
    Returns:
        For each name: `kl` (nats, teacher || model), `top1_agreement` (share), `ppl_ratio` (of perplexities), and the
        ends of their 95 % intervals over windows, `kl_low`, `kl_high` ..., where there are several windows.
    """
    sums = {name: torch.zeros(3, len(windows), dtype=torch.float64) for name in models}
    base = torch.zeros(len(windows), dtype=torch.float64)
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        for w, window in enumerate(windows.to(teacher.device)):
            logits = {name: model(window[None], use_cache=False).logits[0, :-1] for name, model in models.items()}
            taught = teacher(window[None], use_cache=False).logits[0, :-1]
            for first in range(0, len(taught), _ROWS):
                rows = slice(first, first + _ROWS)
                target = read_teacher(taught[rows], window[1:][rows])
                base[w] += target.nll.sum().cpu()
                for name, found in logits.items():
                    compared = compare(target, found[rows])
                    parts = [compared[metric].sum() for metric in ("kl", "top1_agreement", "nll")]
                    sums[name][:, w] += torch.stack([x.double() for x in parts]).cpu()
    finally:
        for name, model in models.items():
            model.train(training[name])
    counts = [windows.shape[1] - 1] * len(windows)
    return {name: _figures(found, base, counts) for name, found in sums.items()}


def _figures(sums: Tensor, base: Tensor, counts: list[int]) -> dict[str, float | None]:
    kl, top1, nll = sums.tolist()
    if len(counts) == 1:
        ratio = math.exp((nll[0] - base[0].item()) / counts[0])
        return {"kl": kl[0] / counts[0], "top1_agreement": top1[0] / counts[0], "ppl_ratio": ratio}
    found = {
        "kl": ratio_mean(kl, counts),
        "top1_agreement": ratio_mean(top1, counts),
        "ppl_ratio": paired_bootstrap(base.tolist(), nll, counts, statistic="exp_difference"),
    }
    values = {name: x.value for name, x in found.items()}
    low = {f"{name}_low": x.low for name, x in found.items()}
    return values | low | {f"{name}_high": x.high for name, x in found.items()}
