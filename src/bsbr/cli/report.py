"""`bsbr report`: plots, report page and summary from result files alone."""

import argparse
from pathlib import Path

HELP = "Draw the plots, the report page and the summary again from result files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("results", metavar="DIR", help="folder of an evaluation, a benchmark or a pretraining run")


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    from bsbr.report import render
    from bsbr.report.pretraining import RECORD, render_pretraining
    from bsbr.terminal import harmless

    if (Path(args.results) / RECORD).is_file():
        print(harmless(str(render_pretraining(args.results))))
        return
    for path in render(args.results):
        print(harmless(str(path)))
