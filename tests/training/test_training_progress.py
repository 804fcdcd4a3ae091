"""What training shows while it runs."""

import io

from rich.console import Console

from bsbr.training.progress import TrainingProgress


def test_held_out_figures_stay_beside_the_step() -> None:
    out = io.StringIO()
    with TrainingProgress(Console(file=out, width=200), line_interval_s=0.0) as progress:
        progress.update(1, 9, 0.5, 1000.0)
        progress.keep("held-out KL 0.01230")
        progress.update(2, 9, 0.4, 1000.0)
        progress.held_out(3, {"held_out_nll": 2.5})
        progress.update(4, 9, 0.3, 1000.0)
    lines = out.getvalue().splitlines()
    assert "held-out" not in lines[0]
    assert "step 2/9 | loss 0.400 | held-out KL 0.01230" in lines[1]
    assert "held-out 2.500" in lines[3]
    assert "KL" not in lines[3]
