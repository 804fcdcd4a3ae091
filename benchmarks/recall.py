"""Recall learned from random weights: MQAR, passkey, multi-key needle, and controls.

python -m benchmarks.recall run rows --attention full bsbr --task mqar passkey needle_multikey --seeds 0 1 2
python -m benchmarks.recall gather rows benchmarks/results/recall.json

Each run is trained at up to 4,096 tokens (its curriculum is in the row), and tested at lengths up to 65,536 on fresh
examples. A run that is there already is not made again.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.spread import spread
from benchmarks.training_rows import add_parts, conditions, read_rows, write_row
from bsbr.data.tasks import TaskConfig
from bsbr.evaluation.tasks import controls, score_task
from bsbr.files import write_json
from bsbr.training.batches import TaskBatches
from bsbr.training.build import build_model, parse_attention
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.trainer import Trainer, total_steps

ATTENTIONS = {
    "full": "full",
    "bsbr": "bsbr:block_size=64,top_k=8,dense_below=0",
    "bsbr_units": "bsbr:block_size=64,retrieval_block_size=16,top_k=32,dense_below=0",
    "bsbr_drop": "bsbr:block_size=64,top_k=8,dense_below=0,far=drop",
    "window": "window:window=576",
    "linear": "linear",
    "gated_delta": "gated_delta",
    "nsa": "nsa",
    "moba": "moba:block_size=64,top_k=8",
    "additive": "additive:block_size=64",
    "local": "local:block_size=64",
}
"""What each name stands for; `bsbr_units` reads as many tokens as `bsbr`, chosen 16 at a time."""

_RECIPE: dict[str, Any] = {
    "batch_tokens": 32_768, "lr": 1e-2, "muon_lr": 1e-2, "weight_decay": 0.01, "warmup_steps": 100, "val_interval": 200,
    "val_windows": 32, "checkpoint_interval": 1 << 30, "match_parameters": True,
}  # fmt: skip

_SHORT_FIRST = [[64, 0.5], [256, 0.15], [1024, 0.15]]
"""A model finds what to look for in short texts, and keeps it in long ones."""

_GENTLY = {"lr": 3e-3, "muon_lr": 3e-3}
"""Some seeds of these tasks are lost at 0.01 (`docs/log.md`)."""

RUNS: dict[str, dict[str, Any]] = {
    "mqar": {
        "task": {"task": "mqar", "pairs": 256, "vocab": 1024},
        "recipe": {"context": 4096, "curriculum": _SHORT_FIRST, "tokens": 2000 << 15, **_GENTLY},
        "tests": [{"length": n, "pairs": min(256, n // 8)} for n in (512, 1024, 2048, 4096, 8192)],
    },
    "passkey": {
        "task": {"task": "passkey", "vocab": 1024},
        "recipe": {"context": 4096, "curriculum": _SHORT_FIRST, "tokens": 2000 << 15},
        "tests": [{"length": n} for n in (1024, 4096, 8192, 16384, 32768, 65536)],
    },
    "needle_multikey": {
        "task": {"task": "needle_multikey", "pairs": 8, "vocab": 1024},
        "recipe": {"context": 4096, "curriculum": _SHORT_FIRST, "tokens": 2000 << 15, **_GENTLY},
        "tests": [{"length": n} for n in (1024, 4096, 8192, 16384, 32768)],
    },
    # small enough for a processor: the same ratios of text, blocks and blocks read, a sixteenth of the length
    "needle": {
        "task": {"task": "needle", "vocab": 128},
        "shape": "recall_small.json",
        "recipe": {
            "context": 256,
            "curriculum": [[32, 0.4], [64, 0.2], [128, 0.1]],
            "batch_tokens": 4096,
            "tokens": 150 << 12,
            "warmup_steps": 20,
            "val_interval": 50,
        },
        "tests": [{"length": n} for n in (256, 1024, 4096)],
        "attentions": {"bsbr": "bsbr:block_size=8,top_k=4", "window": "window:window=40"},
    },
}
"""What each task is trained on and at, and what it is tested at."""

_CONFIGS = Path(__file__).parent / "configs"


def main() -> None:
    """Run or gather."""
    options = _parser().parse_args()
    options.act(options)


def run(options: argparse.Namespace) -> None:
    """Train every task with every attention and seed, and write a row after each."""
    for seed in options.seeds:
        for task in options.task:
            for name in options.attention:
                target = Path(options.rows) / f"{task}-{name}-{seed}.json"
                if target.exists():
                    continue
                try:
                    write_row(target, train(task, name, seed, options))
                except Exception:  # one that fails must not cost the others
                    traceback.print_exc()


def train(task: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and test it, and its controls where it is BSBR."""
    plan, device = RUNS[task], torch.device(options.device)
    given = json.loads(options.recipe)
    values = _RECIPE | plan["recipe"] | given
    values["curriculum"] = tuple((length, share) for length, share in values.get("curriculum", ()))
    trained = TaskConfig.from_dict({**plan["task"], "length": values["context"]})
    shape = Path(options.shape or _CONFIGS / plan.get("shape", "recall.json"))
    settings = options.settings or plan.get("attentions", {}).get(name, ATTENTIONS[name])
    recipe = PretrainConfig(
        architecture=str(shape), attention=parse_attention(settings, seed), seed=seed,
        task=trained.to_dict(), compile=False, **values,
    )  # fmt: skip
    model = build_model(recipe, trained.vocab).to(device)
    batches = TaskBatches(trained, recipe, total_steps(recipe), device, workers=options.workers)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, TrainingProgress() as progress:
        trainer = Trainer(config=recipe, model=model, batches=batches, folder=Path(scratch), progress=progress)
        trainer.train()
    seconds = time.monotonic() - begun
    model.eval()
    tests = [trained.to_dict() | test for test in plan["tests"]]
    tested = {"trained": model, **(controls(model, seed) if name.startswith(("bsbr", "moba")) else {})}
    return {
        "task": task, "attention": name, "seed": seed, "recipe": {**recipe.to_dict(), "architecture": shape.name},
        "shape": json.loads(shape.read_text()), "steps": trainer.step,
        "parameters": sum(p.numel() for p in model.parameters()), "history": trainer.history,
        "seconds_beside_other_runs": round(seconds, 1),
        "scores": list(_scores(tested, tests, seed, values["context"], options)),
        **conditions(sys.argv, device),
    }  # fmt: skip


def _scores(
    tested: dict[str, Any], tests: list[dict[str, Any]], seed: int, trained: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Score every model at every length; controls only up to the trained length, where the model knows the answer."""
    for test in tests:
        config = TaskConfig.from_dict(test)
        examples = max(options.least_examples, min(512, options.test_tokens // config.length))
        for who, model in tested.items():
            if who != "trained" and config.length > trained:
                continue
            device = model.device
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    found = score_task(
                        model, config, examples=examples, seed=(seed, 9, config.length),
                        batch=max(1, (1 << 16) // config.length),
                    )  # fmt: skip
            except torch.cuda.OutOfMemoryError as error:
                print(f"{who} at {config.length}: {error}", file=sys.stderr, flush=True)
                continue
            yield {"model": who, "length": config.length, "pairs": config.pairs, **found.to_dict()}


def gather(options: argparse.Namespace) -> None:
    """Join the rows, and state mean and spread of accuracy over seeds."""
    rows = read_rows(options.rows)
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for score in row["scores"]:
            who = row["attention"] if score["model"] == "trained" else f"{row['attention']}, {score['model']}"
            value = score["accuracy"]["value"]
            found.setdefault(row["task"], {}).setdefault(f"{who} @ {score['length']}", []).append(value)
    summary = {task: {key: spread(values) for key, values in sorted(own.items())} for task, own in found.items()}
    first = rows[0]
    content = {
        "schema": {"name": "bsbr.benchmarks.recall", "version": 1},
        "protocol": {
            "accuracy": "share of answers all of whose tokens the model prefers, on fresh examples; mean and standard "
            "deviation over seeds; rows have Wilson's 95 % intervals and accuracy by octave of distance",
            "controls": "the same weights without what retrieves: own block alone, random blocks, summaries alone",
        },
        "code": first["code"], "machine": first["machine"], "command": first["command"],
        "attentions": ATTENTIONS, "summary": summary, "rows": rows,
    }  # fmt: skip
    write_json(options.output, content)
    print(table(summary))


def table(summary: dict[str, Any]) -> str:
    """Write the summary as Markdown tables, one a task: models down, lengths across."""
    parts = []
    for task, found in summary.items():
        lengths = sorted({int(key.rpartition(" @ ")[2]) for key in found})
        who = sorted({key.rpartition(" @ ")[0] for key in found})
        lines = [f"| {task} | {' | '.join(f'{n:,}' for n in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
        for name in who:
            cells = [found.get(f"{name} @ {n}") for n in lengths]
            shown = ["" if x is None else f"{x['mean']:.4f} ± {x['sd']:.4f}" for x in cells]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, part = add_parts(parser, run, gather)
    part.add_argument("rows")
    part.add_argument("--task", nargs="+", choices=RUNS, default=list(RUNS))
    part.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full", "bsbr"])
    part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    part.add_argument("--recipe", default="{}", help="fields of PretrainConfig that differ, JSON")
    part.add_argument("--settings", help="settings of the attention in place of those of its name")
    part.add_argument("--shape", help="configuration of the model, JSON; None: the task's own")
    part.add_argument("--test-tokens", type=int, default=1 << 22, help="tokens that a test reads, at most")
    part.add_argument("--least-examples", type=int, default=32, help="examples of a test, at least; at most 512")
    part.add_argument("--workers", type=int, default=1, help="processes that make examples")
    return parser


if __name__ == "__main__":
    main()
