"""The command line: one file a sub-command, each a parser and a function; nothing heavy is imported to show help."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bsbr.cli import benchmark, convert, evaluate, finetune, generate, pretrain, report
from bsbr.errors import UserError

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
        The exit code: 0 done, 2 bad input, 3 out of memory, 130 interrupted. Errors are one line on standard error.
    """
    args = _parser().parse_args(argv)
    if not hasattr(args, "run"):
        _parser().print_help()
        return 0
    for chatty in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of its own wheel
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return _fail(f"interrupted. {getattr(args, 'after_interrupt', 'Nothing half-written is left')}", 130)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, ValueError) as error:
        if args.debug:
            raise
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if args.debug or not _is_out_of_memory(error):
            raise
        advice = getattr(
            args, "if_out_of_memory", "Lower --lengths, --window or --documents; what was measured is kept"
        )
        return _fail(f"out of memory. {advice}", 3)
    return 0


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
    one_line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in one_line)
    print(f"bsbr: error: {shown}", file=sys.stderr)
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
