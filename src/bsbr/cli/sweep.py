"""`bsbr evaluate --sweep`: quality against the share of keys read and against time, for several methods."""

import argparse
from typing import Any

from bsbr.cli.options import attention_config, check_device, check_output, lengths
from bsbr.errors import UserError
from bsbr.terminal import harmless

LEFT_OUT: dict[str, Any] = {
    "top_k": 2,
    "retrieval_block_size": None,
    "window": None,
    "converted": None,
    "max_length": None,
}
"""Options of an evaluation that say nothing about a sweep, which has many settings of its own; with their defaults."""


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sweep.

    Args:
        parser: that of `bsbr evaluate`.
    """
    group = parser.add_argument_group("sweep")
    group.add_argument("--sweep", action="store_true", help="measure quality against density instead, many settings")
    group.add_argument("--budgets", type=lengths, default=(128, 256, 512), help="retrieved tokens of a query")
    group.add_argument("--units", type=lengths, help="retrieval block sizes; None: the block size")
    group.add_argument("--windows", type=int, default=1, help="windows of each document, of --lengths tokens each")
    group.add_argument("--after", type=int, help="first position of the main figures; None: a quarter of a window")
    group.add_argument("--batch-tokens", type=int, default=8192, help="tokens that go through a model at once")
    group.add_argument("--time-device", help="cpu, cuda or none: where models are timed; None: as --device")
    group.add_argument("--calibration-tokens", type=int, default=16384, help="tokens read by each calibration")
    group.add_argument("--calibration-queries", type=int, default=128, help="queries of each head it samples")
    group.add_argument("--calibration-steps", type=int, default=200, help="steps of each fit")


def run_sweep_command(args: argparse.Namespace, command: list[str]) -> None:
    """Sweep and report.

    Args:
        args: parsed options of `bsbr evaluate`.
        command: the arguments that repeat the run.
    Raises:
        UserError: options that do not fit together, or a model or text that cannot be used.
    """
    for name, default in LEFT_OUT.items():
        if getattr(args, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: a sweep has --budgets, --units and --lengths instead. Leave {flag} out")
    output = check_output(args.output, "sweep_records.jsonl", resume=args.resume, overwrite=args.overwrite)
    for device in {args.device, args.time_device} - {None, "none"}:
        check_device(device)
    units = args.units or (args.block_size,)

    from dataclasses import replace

    from rich.console import Console

    from bsbr.cli.models import load_with_texts, read_calibration_text
    from bsbr.data.text import text_digest
    from bsbr.evaluation.speed import SpeedSettings
    from bsbr.evaluation.sweep import run_sweep
    from bsbr.evaluation.sweep_points import SweepConfig
    from bsbr.evaluation.sweep_table import sweep_tables
    from bsbr.hf.exact import prepare_dense
    from bsbr.hf.positions import max_positions
    from bsbr.report import render
    from bsbr.training.calibrate import calibrate

    attention = replace(attention_config(args), top_k=1, retrieval_block_size=None, dense_below=0)
    text = read_calibration_text(args.calibrate)
    original, tokenizer, texts = load_with_texts(args.model, args.text, args.dtype, args.device)
    prepare_dense(original)
    config = SweepConfig(
        attention=attention,
        budgets=args.budgets,
        units=units,
        lengths=args.lengths or (min(2048, max_positions(original) or 2048),),
        windows=args.windows,
        documents=6 if args.documents is None else args.documents,
        after=args.after,
        batch_tokens=args.batch_tokens,
        speed=SpeedSettings(rounds=-(-args.repeats // 2), budget_s=60.0, least_rounds=2),
        seed=args.seed,
        device=args.device,
        time_device=args.time_device,
    )
    chosen = {
        "tokens": args.calibration_tokens,
        "queries_per_head": args.calibration_queries,
        "steps": args.calibration_steps,
        "seed": args.seed,
    }

    def fit(model: Any, length: int) -> None:
        calibrate(model, text or "", tokenizer=tokenizer, length=length, **chosen)

    described = {} if text is None else chosen | {"text": args.calibrate.split("/")[-1], "sha256": text_digest(text)}
    content = run_sweep(
        original, tokenizer, texts, None if text is None else fit, config, output, args.resume,
        calibration=described, name=args.model, command=command, console=Console(stderr=True),
    )  # fmt: skip
    render(output)
    for table in sweep_tables(content):
        Console().print(table)
    print(harmless(f"report: {output / 'report.html'}   summary: {output / 'summary.md'}"))
