"""Longer texts after a short training at four times the trained length: loss by position, recall by distance.

python -m benchmarks.extension_trained run DATA rows --model full-0=DIR --model bsbr-0=DIR --method dynamic yarn
python -m benchmarks.extension_trained gather rows benchmarks/results/extension_trained.json

DATA is what `benchmarks.from_scratch prepare` wrote, DIR models that its `run --keep` saved, trained at 4,096 tokens,
named by attention and seed. Positions are scaled once, for the longest text tested. Steps alternate: text in windows of
four times the trained length, and passkeys in texts from 256 tokens to that length, which the model has not met before.
"""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.extension import measure
from benchmarks.from_scratch import load_corpus
from benchmarks.spread import spread
from benchmarks.training_rows import add_parts, conditions, read_rows, write_row
from bsbr.data.tasks import TaskConfig
from bsbr.evaluation.tasks import score_task
from bsbr.files import write_json
from bsbr.hf import extend_positions, load_model
from bsbr.training.batches import Batch, TaskBatches, TextBatches
from bsbr.training.corpus import Corpus
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.trainer import Trainer, total_steps

_SHORT = (256, 1024, 4096)
"""Lengths of passkey texts below the window's, which take turns with it."""


class Mixed:
    """Text and passkeys in turn.

    Args:
        corpus: the text.
        recipe: of the training; its context is the longest window.
        vocab: tokens of the model's vocabulary.
    """

    train_tokens: int | None = None

    def __init__(self, corpus: Corpus, recipe: PretrainConfig, vocab: int) -> None:
        steps, device = total_steps(recipe), corpus.train.device
        self.record: dict[str, Any] = corpus.record
        self._text = TextBatches(corpus, recipe, steps)
        lengths = [n for n in _SHORT if n < recipe.context] + [recipe.context]
        self._tasks = [
            TaskBatches(
                TaskConfig(task="passkey", vocab=vocab, length=n),
                PretrainConfig(context=n, batch_tokens=recipe.batch_tokens, tokens=recipe.tokens, seed=recipe.seed),
                steps, device,
            )
            for n in lengths
        ]  # fmt: skip

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        turn, task = divmod(step, 2)
        return self._tasks[turn % len(self._tasks)].at(turn) if task else self._text.at(turn)

    def measure(self, model: Any, *, whole: bool) -> dict[str, Any]:
        """Return the loss on the held-out text; all else is measured at the end."""
        return self._text.measure(model, whole=whole)


def main() -> None:
    """Run or gather."""
    options = _parser().parse_args()
    options.act(options)


def run(options: argparse.Namespace) -> None:
    """Train and measure every model with every method, and write a row after each."""
    corpus = load_corpus(Path(options.data), torch.device(options.device))
    for method in options.method:
        for given in options.model:
            name, _, folder = given.partition("=")
            target = Path(options.rows) / f"{name}-{method}.json"
            if target.exists():
                continue
            try:
                write_row(target, train(name, folder, method, corpus, options))
            except Exception:  # one that fails must not cost the others
                traceback.print_exc()


def train(name: str, folder: str, method: str, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Scale positions, train, and measure at every length."""
    device, longest = corpus.train.device, max(options.lengths)
    attention, _, seed = name.rpartition("-")
    stock = load_model(folder, dtype="float32", device=str(device))
    model = extend_positions(stock, longest, method, trained_length=options.trained).train()
    window = 4 * options.trained
    recipe = PretrainConfig(
        context=window, batch_tokens=max(window, options.batch_tokens), tokens=2 * options.steps * options.batch_tokens,
        lr=options.lr, muon_lr=2 * options.lr, warmup_steps=10, compile=False, seed=int(seed), documents="joined",
        val_interval=1 << 30, val_windows=2, checkpoint_interval=1 << 30,
    )  # fmt: skip
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, TrainingProgress() as progress:
        batches = Mixed(corpus, recipe, len(corpus.tokenizer))
        trainer = Trainer(config=recipe, model=model, batches=batches, folder=Path(scratch), progress=progress)
        trainer.train()
    seconds = time.monotonic() - begun
    model.eval()
    return {
        "attention": attention, "seed": int(seed), "method": method, "recipe": recipe.to_dict(), "steps": trainer.step,
        "scaled_for": longest, "seconds_beside_other_runs": round(seconds, 1), "text": corpus.record,
        "tests": [test(model, corpus, length, options) for length in options.lengths],
        **conditions(sys.argv, device),
    }  # fmt: skip


@torch.no_grad()
def test(model: Any, corpus: Corpus, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Loss by position on held-out text, and passkeys found by distance."""
    device = corpus.held_out.device
    examples = max(options.least_examples, min(256, options.test_tokens // length))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        found = score_task(
            model, TaskConfig(task="passkey", vocab=len(corpus.tokenizer), length=length), examples=examples,
            seed=(9, length), batch=max(1, (1 << 16) // length),
        )  # fmt: skip
    text = measure(model, corpus.held_out, length, options.windows)
    return {"length": length, "text": text, "passkey": found.to_dict()}


def gather(options: argparse.Namespace) -> None:
    """Join the rows, and state mean and spread over seeds."""
    rows = read_rows(options.rows)
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        own = found.setdefault(f"{row['attention']}, {row['method']}", {})
        for one in row["tests"]:
            own.setdefault(f"nll @ {one['length']}", []).append(one["text"]["nll"])
            last = one["text"]["by_position"][-1]
            own.setdefault(f"nll {last['first']} to {last['last']} @ {one['length']}", []).append(last["nll"])
            own.setdefault(f"passkey @ {one['length']}", []).append(one["passkey"]["accuracy"]["value"])
    summary = {who: {key: spread(values) for key, values in own.items()} for who, own in found.items()}
    content = {
        "schema": {"name": "bsbr.benchmarks.extension_trained", "version": 1},
        "protocol": {
            "training": "positions scaled once for the longest test; steps of text and of passkeys in turn",
            "nll": "nats per token over windows spread evenly over the held-out stream",
            "passkey": "share of five-token keys all of whose tokens the model prefers, on fresh examples",
        },
        **{key: rows[0][key] for key in ("code", "machine", "command")}, "summary": summary, "rows": rows,
    }  # fmt: skip
    write_json(options.output, content)
    for who, own in summary.items():
        print(who, *(f"{key} {x['mean']:.4f} ± {x['sd']:.4f} ({x['n']})" for key, x in own.items()), sep="\n  ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, part = add_parts(parser, run, gather)
    part.add_argument("data")
    part.add_argument("rows")
    part.add_argument("--model", action="append", required=True, metavar="ATTENTION-SEED=DIR")
    part.add_argument("--method", nargs="+", choices=["linear", "dynamic", "yarn"], default=["dynamic", "yarn"])
    part.add_argument("--trained", type=int, default=4096)
    part.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    part.add_argument("--steps", type=int, default=100, help="steps of text, and as many of passkeys")
    part.add_argument("--batch-tokens", type=int, default=32_768)
    part.add_argument("--lr", type=float, default=1e-3)
    part.add_argument("--windows", type=int, default=8)
    part.add_argument("--test-tokens", type=int, default=1 << 20, help="tokens of a passkey test, at most")
    part.add_argument("--least-examples", type=int, default=32)
    return parser


if __name__ == "__main__":
    main()
