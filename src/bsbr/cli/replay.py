"""`bsbr evaluate --replay FILE`: run a result file's own command again and compare every digit."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bsbr.errors import UserError
from bsbr.terminal import harmless

_UNSTABLE = ("command", "machine", "code", "digest", "run", "timing", "original", "bsbr", "original_exponent",
             "bsbr_exponent", "speedup_at_max_length")  # fmt: skip
"""Top-level keys about the run itself, or made of times."""

_SHOWN = 5
_MISSING = object()


def replay(file: str, evaluate: Callable[[list[str]], object]) -> int:
    """Repeat the run that made a result file, with its number of threads, and compare all but times and memory.

    Args:
        file: a result file of `bsbr evaluate`.
        evaluate: runs the sub-command with the options given.
    Returns:
        0 where every digit is the same, 1 where one differs.
    Raises:
        UserError: the file cannot be read, was altered, is partial, or its command cannot be run here.
    """
    path = Path(file)
    before = _read(path)
    words = _options(path, before)
    import torch

    threads, recorded = torch.get_num_threads(), before.get("machine", {}).get("threads")
    if isinstance(recorded, int) and recorded > 0:
        torch.set_num_threads(recorded)
    try:
        with tempfile.TemporaryDirectory(prefix="bsbr-replay-") as folder:
            evaluate([*words, "--output", folder])
            again = Path(folder) / path.name
            if not again.is_file():
                raise UserError(f'replay "{path}": the command made no {path.name}. Keep the name the file was given')
            after = json.loads(again.read_bytes())
    finally:
        torch.set_num_threads(threads)
    return _compare(path, before, after)


def _read(path: Path) -> dict[str, Any]:
    from bsbr.evaluation.results import content_digest

    try:
        content = json.loads(path.read_bytes())
        good = content["digest"] == content_digest(content)
    except OSError as error:
        raise UserError(f'replay "{path}": cannot be read ({error.strerror or error}). Check the path') from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'replay "{path}": is no result file of `bsbr evaluate`. Give one of those') from error
    if not good:
        raise UserError(f'replay "{path}": its digest does not match its content. Use the original file')
    if content.get("status") != "complete":
        raise UserError(f'replay "{path}": is of a run that was not finished. Finish it with --resume first')
    return content


def _options(path: Path, content: Mapping[str, Any]) -> list[str]:
    """The options of the run, without its output folder."""
    command = content.get("command")
    if not isinstance(command, list) or command[:1] != ["evaluate"] or not all(isinstance(x, str) for x in command):
        raise UserError(f'replay "{path}": its command is not `bsbr evaluate`, which alone can be replayed')
    words, rest = [], iter(command[1:])
    for word in rest:
        if word == "--output":
            next(rest, None)
        elif not word.startswith("--output=") and word not in ("--resume", "--overwrite", "--debug"):
            words.append(word)
    return words


def _compare(path: Path, before: dict[str, Any], after: dict[str, Any]) -> int:
    old, new = dict(_figures(before)), dict(_figures(after))
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key, _MISSING) != new.get(key, _MISSING)]
    for key in differ[:_SHOWN]:
        print(harmless(f"{key}: {old.get(key, 'absent')} in the file, {new.get(key, 'absent')} here"))
    if len(differ) > _SHOWN:
        print(f"and {len(differ) - _SHOWN} more")
    versions = {name: (value, after["code"].get(name)) for name, value in before.get("code", {}).items()}
    changed = [f"{name} {then} then, {now} now" for name, (then, now) in versions.items() if then != now]
    note = f" ({'; '.join(changed)})" if changed else ""
    print(harmless(f"{path.name}: {len(old)} values, {len(differ)} differ; times and memory left out{note}"))
    return 1 if differ else 0


def _figures(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value that a run of the same thing must repeat, with a name that says where it stands."""
    for key, value in content.items():
        if key == "rows":
            for row in value:
                if not row.get("volatile"):
                    where = json.dumps([row.get(name) for name in ("metric", "variant", "slice")], sort_keys=True)
                    yield from _leaves(f"rows {where}", row)
        elif key not in _UNSTABLE:
            yield from _leaves(key, value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name} {key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name} {index}", inner)
    else:
        yield name, value


def run_options(words: list[str], add_arguments: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """Parse the options of a recorded command.

    Args:
        words: the options.
        add_arguments: of the sub-command.
    Returns:
        What the parser makes of them.
    Raises:
        UserError: this version has no such options.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"replay: {error}. Use the version of bsbr that made the file") from error
    if unknown:
        raise UserError(f"replay: {unknown[0]} is not known. Use the version of bsbr that made the file")
    args.words = ["evaluate", *words]
    return args
