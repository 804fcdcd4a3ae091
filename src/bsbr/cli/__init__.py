"""The command line: one file a sub-command, each a parser and a function; nothing heavy is imported to show help."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from bsbr.cli import benchmark, convert, evaluate, finetune, generate, pretrain, report
from bsbr.cli.deterministic import deterministic
from bsbr.errors import UserError
from bsbr.files import write_error
from bsbr.memory import is_out_of_memory
from bsbr.terminal import one_line

COMMANDS = {
    "evaluate": evaluate,
    "convert": convert,
    "finetune": finetune,
    "generate": generate,
    "benchmark": benchmark,
    "report": report,
    "pretrain": pretrain,
}
"""Sub-commands: modules with HELP, add_arguments(parser) and run(args)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None means those of the process.
    Returns:
        The exit code: 0 done, 1 a check failed (or bsbr did), 2 bad input, 3 out of memory or disk space, 130
        interrupted. Errors and warnings are one line each on standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    for word in words:
        if re.fullmatch(r"--[a-z-]+=--", word):  # argparse would take it for no value at all, and check nothing
            parser.error(f"argument {word[:-3]}: expected a value, got '--'")
    args = parser.parse_args(words)
    args.words = words
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    for chatty in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of its own wheel
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        with deterministic(getattr(args, "deterministic", False)):
            return args.run(args) or 0
    except KeyboardInterrupt:
        return _fail(f"interrupted. {getattr(args, 'after_interrupt', 'Nothing half-written is left')}", 130)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        return _explain(error, args)


def _explain(error: Exception, args: argparse.Namespace) -> int:
    """Say in one line what was wrong, and return the exit code."""
    if isinstance(error, ValueError):
        return _fail(str(error), getattr(error, "exit_code", UserError.exit_code))
    if is_out_of_memory(error):
        return _fail(f"out of memory. {getattr(args, 'if_out_of_memory', 'Use a smaller model or a shorter text')}", 3)
    if isinstance(error, OSError):
        named = write_error("file", error.filename, error) if error.filename else None
        return _fail(str(named or error), getattr(named, "exit_code", UserError.exit_code))
    return _fail(f"unexpected {type(error).__name__}: {error}. Please report what --debug shows", 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        sys.exit(_fail(f"{message}. See {self.prog} --help", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bsbr", description="Long context at a fraction of the cost, for models people already have.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.HELP, description=command.HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        own.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser


def _version() -> str:
    from bsbr import __version__

    return f"bsbr {__version__}"


def _fail(message: str, code: int) -> int:
    print(f"bsbr: error: {one_line(message)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"bsbr: warning: {one_line(str(message))}", file=sys.stderr)
