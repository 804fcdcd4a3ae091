"""Stacked Muon makes the steps of PyTorch's."""

import torch
from torch import nn

from bsbr.training.muon import StackedMuon


def test_stacks_make_the_steps_of_single_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 48), (32, 48), (48, 32), (32, 32), (48, 32)]
    start = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    kinds = (torch.optim.Muon, StackedMuon)
    sides = [[nn.Parameter(x.clone()) for x in start] for _ in kinds]
    optimizers = [
        kind(side, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for kind, side in zip(kinds, sides, strict=True)
    ]
    for _ in range(3):
        for own, other in zip(*sides, strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        sides[0][3].grad = sides[1][3].grad = None  # without a gradient a matrix stays
        for optimizer in optimizers:
            optimizer.step()
    for own, other, first in zip(*sides, start, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)  # a step is 0.01 x 0.2 x 48 ** 0.5 x 1e-2 at most
        assert own is sides[0][3] or not torch.equal(own, first)
