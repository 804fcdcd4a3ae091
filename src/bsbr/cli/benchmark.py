"""`bsbr benchmark`: speed alone, on a model of real size with random weights."""

import argparse

from bsbr.cli.options import add_attention_arguments, attention_config, check_device, check_output, lengths
from bsbr.errors import UserError
from bsbr.memory import require_memory
from bsbr.terminal import harmless

HELP = "Measure speed and memory of whole models against the original and an attention-free floor."

SHAPES = ("gpt2-shape",)
"""Models by name: GPT-2's real size (124 M parameters) with random weights, positions extended."""


_WIDTH, _WIDTHS = 768, 160_000
"""GPT-2's width, and how many vectors of it the model without its positions holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("--model", default=SHAPES[0], help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--output", metavar="DIR", default="results/benchmark", help="folder of the result files")
    default = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    parser.add_argument("--lengths", type=lengths, default=default, help="lengths to time")
    parser.add_argument("--repeats", type=int, default=8, help="timings of each contender at each length")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a length may take before repeats are cut")
    parser.add_argument("--no-memory", action="store_true", help="leave out the extra run that measures memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    add_attention_arguments(parser, top_k=4)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    attention = attention_config(args)
    if args.model not in SHAPES:
        raise UserError(f'--model "{args.model}": expected one of {", ".join(SHAPES)}')
    if args.repeats < 2:
        raise UserError(f"--repeats {args.repeats}: must be at least 2, or there is no spread")
    output = check_output(args.output, "records.jsonl", resume=args.resume, overwrite=args.overwrite)
    args.if_out_of_memory = "Lower --lengths and start anew; what was measured is kept"
    args.after_interrupt = "Go on with the same command and --resume"
    check_device(args.device)
    need = 4 * _WIDTH * (_WIDTHS + args.lengths[-1])
    require_memory(need, f"a model with {args.lengths[-1]} positions", "Lower --lengths")

    from dataclasses import replace

    import torch
    from rich.console import Console
    from transformers import GPT2Config, GPT2LMHeadModel

    from bsbr.evaluation.settings import SuiteConfig
    from bsbr.evaluation.speed import SpeedSettings
    from bsbr.evaluation.suite import run_suite
    from bsbr.evaluation.table import summary_tables
    from bsbr.hf.convert import convert
    from bsbr.peers.value_only import ValueOnlyConfig
    from bsbr.report import render

    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        original = GPT2LMHeadModel(GPT2Config(n_positions=args.lengths[-1])).eval().to(args.device)
    variants = {
        "converted": convert(original, attention),
        "converted_sparse": convert(original, replace(attention, dense_below=0)),
        "value_only": convert(original, ValueOnlyConfig()),
    }
    config = SuiteConfig(
        lengths=args.lengths,
        fixed_tokens=0,
        speed=SpeedSettings(rounds=-(-args.repeats // 2), budget_s=args.budget, least_rounds=1),
        measure_memory=not args.no_memory,
        quality_variants=(),
        trained_positions=1024,
        seed=args.seed,
        device=args.device,
    )
    summary = run_suite(
        original, None, variants, {}, config, output, args.resume,
        name=args.model, command=args.words, console=Console(stderr=True),
    )  # fmt: skip
    render(output)
    for table in summary_tables(summary):
        Console().print(table)
    print(harmless(f"report: {output / 'report.html'}   summary: {output / 'summary.md'}"))
