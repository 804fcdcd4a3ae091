"""`bsbr evaluate`: what conversion costs and gains, against the original."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from bsbr.cli.deterministic import add_deterministic_argument
from bsbr.cli.options import add_attention_arguments, attention_config, check_device, check_output, lengths
from bsbr.cli.sweep import LEFT_OUT, add_sweep_arguments, run_sweep_command
from bsbr.config import BSBRConfig
from bsbr.data.embedded import EMBEDDED
from bsbr.errors import UserError
from bsbr.terminal import harmless

HELP = "Convert a model, measure speed, scaling, perplexity, similarity and agreement against the original, report."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("model", metavar="MODEL", nargs="?", default=EMBEDDED, help="folder, hub name or embedded")
    parser.add_argument("--converted", metavar="DIR", help="evaluate this converted model; no conversion here")
    parser.add_argument("--output", metavar="DIR", default="results", help="folder of the result files")
    parser.add_argument("--text", metavar="FILE", action="append", help="text to evaluate on; may be repeated")
    parser.add_argument("--calibrate", metavar="TEXT", default=EMBEDDED, help="text file, embedded, or none")
    parser.add_argument("--lengths", type=lengths, help="lengths to time; None: 128 to 2048 by doubling")
    parser.add_argument("--window", type=int, help="tokens of a quality window; None: 2048 or the model's positions")
    parser.add_argument("--documents", type=int, help="documents of each text; None: 8, in a sweep 6")
    parser.add_argument("--repeats", type=int, default=8, help="timings of each contender at each length")
    parser.add_argument("--max-length", type=int, help="extend the positions, so that longer lengths can be timed")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of calibration, random tokens and resampling")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    parser.add_argument(
        "--replay", metavar="FILE", help="repeat the run that made a result file and compare each digit"
    )
    add_deterministic_argument(parser)
    add_attention_arguments(parser, top_k=LEFT_OUT["top_k"])
    add_sweep_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and report; the exit code, where a replay gives one."""
    if args.replay is not None:
        return _replay(args)
    attention = attention_config(args)
    if args.repeats < 2:
        raise UserError(f"--repeats {args.repeats}: must be at least 2, or there is no spread")
    args.if_out_of_memory = "Lower --lengths, --window or --documents and start anew; what was measured is kept"
    args.after_interrupt = f"Go on with: bsbr {' '.join(_command(args))} --resume"
    if args.sweep:
        run_sweep_command(args, _command(args))
        return 0
    output = check_output(args.output, "records.jsonl", resume=args.resume, overwrite=args.overwrite)
    check_device(args.device)

    from rich.console import Console

    from bsbr.cli.models import load_with_texts
    from bsbr.evaluation.settings import SuiteConfig
    from bsbr.evaluation.speed import SpeedSettings
    from bsbr.evaluation.suite import run_suite
    from bsbr.evaluation.table import summary_tables
    from bsbr.evaluation.windows import choose_documents
    from bsbr.hf.positions import extend_positions, max_positions
    from bsbr.report import render

    console = Console(stderr=True)
    original, tokenizer, texts = load_with_texts(args.model, args.text, args.dtype, args.device)
    for documents in texts.values():  # before minutes of calibration
        choose_documents(tokenizer, documents, documents=1, tokens=2)
    trained = max_positions(original)
    if args.max_length:
        original = extend_positions(original, args.max_length)
    positions = max_positions(original)
    config = SuiteConfig(
        window=args.window or min(2048, positions or 2048),
        documents=8 if args.documents is None else args.documents,
        lengths=_within(args.lengths or (128, 256, 512, 1024, 2048), positions),
        speed=SpeedSettings(rounds=-(-args.repeats // 2)),
        trained_positions=trained,
        seed=args.seed,
        device=args.device,
    )
    if positions is not None and config.window > positions:  # said before anything is calibrated
        raise UserError(
            f"--window {config.window}: the model has {positions} positions. Lower it, or extend them with --max-length"
        )
    variants = make_variants(original, tokenizer, attention, args)
    summary = run_suite(
        original, tokenizer, variants, texts, config, output, args.resume,
        name=args.model, command=_command(args), console=console,
    )  # fmt: skip
    render(output)
    for table in summary_tables(summary):
        Console().print(table)
    print(harmless(f"report: {output / 'report.html'}   summary: {output / 'summary.md'}"))
    return 0


def _replay(args: argparse.Namespace) -> int:
    from bsbr.cli.replay import replay, run_options

    given = [word for word in args.words if word not in ("--debug", args.replay)]
    if given not in (["evaluate", "--replay"], ["evaluate", f"--replay={args.replay}"]):
        raise UserError("--replay: takes its options from the file. Leave all others out")
    return replay(args.replay, lambda words: run(run_options(words, add_arguments)))


def make_variants(original: Any, tokenizer: Any, attention: BSBRConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Make every conversion that the evaluation compares.

    Args:
        original: the dense model.
        tokenizer: its tokenizer.
        attention: settings of the conversion.
        args: the options of the sub-command.
    Returns:
        Names of the variants to models that share the original's weights.
    Raises:
        UserError: a model or text cannot be used.
    """
    from bsbr.cli.models import read_calibration_text
    from bsbr.hf.convert import convert
    from bsbr.hf.loading import load_model
    from bsbr.peers.additive import AdditiveConfig
    from bsbr.peers.value_only import ValueOnlyConfig

    text = read_calibration_text(args.calibrate)
    size, unit = attention.block_size, attention.retrieval_block_size

    def calibrated(model: Any) -> Any:
        from bsbr.training.calibrate import calibrate

        if text is not None and BSBRConfig.from_dict(_settings(model)).far != "drop":
            calibrate(model, text, tokenizer=tokenizer, seed=args.seed, progress=True)
        return model

    if args.converted:
        converted = load_model(args.converted, dtype=args.dtype, device=args.device)
        attention = replace(BSBRConfig.from_dict(_settings(converted)), top_k_per_head=None)
    else:
        converted = calibrated(convert(original, attention))
    peers: dict[str, Any] = {"block_size": size, "retrieval_block_size": unit, "far": "drop", "dense_below": 0}
    states = replace(attention, top_k=0) if attention.far != "drop" else attention
    return {
        "converted": converted,
        "converted_sparse": convert(converted, replace(attention, dense_below=0)),
        "uncalibrated": convert(original, replace(attention, dense_below=0)),
        "moba": convert(original, BSBRConfig(top_k=attention.top_k, **peers)),
        "local": convert(original, BSBRConfig(top_k=0, **peers)),
        "states": calibrated(convert(original, replace(states, dense_below=0))),
        "additive": convert(original, AdditiveConfig(block_size=size, seed=args.seed)),
        "value_only": convert(original, ValueOnlyConfig()),
    }


def _settings(model: Any) -> dict[str, Any]:
    settings = dict(getattr(model.config, "bsbr", None) or {})
    if settings.pop("mixer", None) != BSBRConfig.mixer:
        raise UserError("--converted: is no model that `bsbr convert` saved. Give such a folder, or leave it out")
    return settings


def _within(wanted: tuple[int, ...], positions: int | None) -> tuple[int, ...]:
    if positions is not None and wanted[-1] > positions:
        raise UserError(
            f"--lengths {wanted[-1]}: the model has {positions} positions. Lower it, or give --max-length {wanted[-1]}"
        )
    return wanted


def _command(args: argparse.Namespace) -> list[str]:
    """The arguments that repeat this run, without what concerns this machine's folders."""
    skip = {"--resume", "--overwrite", "--debug"}
    words = [word for word in args.words if word not in skip]
    return [Path(word).name if Path(word).is_absolute() else word for word in words]
