"""Calls of the command line that cannot be right, and what each must be answered with: one line, exit code 2."""

from collections.abc import Iterator
from pathlib import Path

MODEL, CONVERTED, TEXT, OUT, HERE = "{model}", "{converted}", "{text}", "{out}", "{here}"
"""Stand for a dense model, a converted one, a good text, a fresh output folder, and a folder of bad files."""

INTEGERS = ("-1", "a", "2.5", "", "1e9", "nan", "0x10", "9" * 5000, "1,2", "--", "None", "１x")
NUMBERS = ("nan", "inf", "-1", "a", "", "0", "1e999", "1,5")
CHOICES = ("", "nothing", "MOMENTS", "../far", "\x1b[31m", "a" * 3000)

_FEW = ("evaluate", MODEL, "--text", TEXT, "--calibrate", "none", "--output", OUT, "--block-size", "16", "--top-k", "1",
        "--window", "64", "--documents", "2", "--lengths", "16,32", "--repeats", "2")  # fmt: skip
BASES = {
    "evaluate": _FEW,
    "convert": ("convert", MODEL, OUT, "--calibrate", "none"),
    "generate": ("generate", MODEL, "--prompt", "word1"),
    "finetune": ("finetune", CONVERTED, OUT, "--text", TEXT, "--length", "32", "--distill-tokens", "64"),
    "pretrain": ("pretrain", "--text", TEXT, "--val", TEXT, "--output", OUT, "--tokens", "64"),
    "benchmark": ("benchmark", "--output", OUT),
}
"""A good call of each command, but for its option under test."""

_COUNTS = {
    "evaluate": ("block-size", "retrieval-block-size", "top-k", "dense-below", "window", "documents", "repeats",
                 "max-length"),
    "convert": ("block-size", "top-k", "dense-below", "max-length", "layers"),
    "generate": ("max-new-tokens", "max-length"),
    "finetune": ("length", "batch-windows", "accumulation", "lora-rank", "eval-interval", "distill-tokens",
                 "save-interval"),
    "pretrain": ("layers", "heads", "hidden", "context", "vocab", "batch-tokens", "tokens", "seed"),
    "benchmark": ("repeats", "block-size", "lengths"),
}  # fmt: skip
_RATES = {
    "generate": ("temperature", "top-p"),
    "finetune": ("lr", "scalar-lr"),
    "pretrain": ("lr", "muon-lr", "minutes"),
}
_NAMED = {
    "evaluate": ("far", "state", "selection", "dtype", "device"),
    "convert": ("far", "state", "selection"),
    "generate": ("cache", "dtype", "device"),
    "finetune": ("scope", "precision", "device"),
    "pretrain": ("device",),
    "benchmark": ("model", "device"),
}
_GOOD = {
    ("generate", "temperature", "0"),
    ("convert", "layers", "1,2"),  # answered, as a layer that is not there
    ("benchmark", "lengths", "1,2"),
}
"""What happens to be right."""


def calls() -> list[tuple[str, ...]]:
    """Return the bad calls.

    Returns:
        Arguments of `bsbr.cli.main`, with the names in braces to be filled in by `fill`.
    """
    return [*dict.fromkeys((*_options(), *_whole()))]


def fill(call: tuple[str, ...], places: dict[str, Path]) -> list[str]:
    """Put real folders into a call.

    Args:
        call: one of `calls`.
        places: name without braces to path.
    Returns:
        Arguments.
    """
    filled = []
    for word in call:
        for name, path in places.items():
            word = word.replace(f"{{{name}}}", str(path))
        filled.append(word)
    return filled


def _options() -> Iterator[tuple[str, ...]]:
    for table, values in ((_COUNTS, INTEGERS), (_RATES, NUMBERS), (_NAMED, CHOICES)):
        for command, names in table.items():
            for name in names:
                for value in values:
                    if (command, name, value) not in _GOOD:
                        yield _with(BASES[command], f"--{name}", value)


def _with(base: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
    if flag in base:
        place = base.index(flag)
        base = base[:place] + base[place + 2 :]
    if flag == "--minutes":
        place = base.index("--tokens")
        base = base[:place] + base[place + 2 :]
    return (*base, f"{flag}={value}")


def _whole() -> Iterator[tuple[str, ...]]:
    """Calls that are wrong in other ways: words, files, folders, options that do not go together."""
    yield from (("nothing",), ("--nothing",), ("evaluate", "--nothing"), ("convert",), ("convert", MODEL), ("report",))
    yield from (("generate", MODEL), ("generate",), ("finetune", CONVERTED, OUT), ("pretrain",), ("\x1b]0;owned\x07",))
    yield ("generate", MODEL, "--prompt", "a", "--file", TEXT)
    yield ("generate", MODEL, "--prompt", "")
    yield ("pretrain", "--text", TEXT, "--val", TEXT, "--output", OUT, "--tokens", "64", "--minutes", "1")
    yield ("generate", MODEL, "--prompt", "word1", "--cache", "states")
    yield ("generate", MODEL, "--prompt", "word1", "--max-new-tokens", "4096")
    yield ("finetune", MODEL, OUT, "--text", TEXT)
    yield ("convert", CONVERTED, OUT, "--far", "drop", "--state", "global")
    yield ("convert", MODEL, OUT, "--block-size", "16", "--retrieval-block-size", "5")
    yield ("convert", MODEL, OUT, "--calibrate", TEXT, "--block-size", "64", "--top-k", "8")
    yield (*_FEW, "--sweep", "--far", "drop")
    yield (*_FEW, "--sweep", "--budgets", "7", "--units", "5")
    yield (*_FEW, "--lengths", "16,4096")
    yield (*_FEW, "--window", "4096")
    yield ("evaluate", "--replay", "{here}/none.json")
    yield ("evaluate", "--replay", "{here}/broken.json")
    yield ("evaluate", "--replay", "{here}")
    yield ("evaluate", MODEL, "--replay", "{here}/broken.json")
    for bad in (
        "none.txt",
        "",
        "empty.txt",
        "blank.txt",
        "latin.txt",
        "nul\0.txt",
        "a.txt.xz",
        "a.txt.gz",
        "loop",
        "a" * 5000,
    ):
        yield _with(_FEW, "--text", f"{{here}}/{bad}")
        yield _with(BASES["finetune"], "--text", f"{{here}}/{bad}")
        yield _with(BASES["pretrain"], "--val", f"{{here}}/{bad}")
        yield ("generate", MODEL, f"--file={{here}}/{bad}")
        yield ("convert", MODEL, OUT, f"--calibrate={{here}}/{bad}")
    for bad in (
        "{here}/none", "{here}/empty.txt", "{here}", "../../etc", "a/../../b", "/etc", "", ".", "..", "a/b/c",
        "~nobody/x",
        "C:\\models\\x", "nul\0", "\u202egpj.exe", "a b", "{here}/pickled", "{here}/code",
        "{here}/encoder", "{here}/adapter",
        "{here}/shards_outside", "{here}/shards_absolute", "x" * 5000, "\x1b[2J", "model;rm -rf /", "$(id)", "-",
    ):  # fmt: skip
        yield ("convert", bad, OUT, "--calibrate", "none") if not bad.startswith("-") else ("convert", OUT)
        yield _with((*_FEW[:1], bad, *_FEW[2:]), "--converted", bad)
        if bad:
            yield ("report", bad) if not bad.startswith("-") else ("report",)
    for bad in ("{here}/empty.txt", "{here}/empty.txt/below", "/proc/none", "/sys/none", "nul\0", "a" * 300):
        yield ("convert", MODEL, bad, "--calibrate", "none")
        yield _with(_FEW, "--output", bad)
        yield ("finetune", CONVERTED, bad, "--text", TEXT)
        yield ("pretrain", "--text", TEXT, "--val", TEXT, f"--output={bad}", "--tokens", "64")
