"""`bsbr report`: plots, report page and summary from result files alone."""

import argparse

HELP = "Draw the plots, the report page and the summary again from the result files of an evaluation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("results", metavar="DIR", help="results folder of an evaluation or benchmark")


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    from bsbr.report import render
    from bsbr.terminal import harmless

    for path in render(args.results):
        print(harmless(str(path)))
