"""Numbers and foreign text as words: the same in tables, plots and sentences."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from bsbr.report.definitions import Kind

NOT_MEASURED = "not measured"

_TIMES = "\N{MULTIPLICATION SIGN}"
_MINUS = "\N{MINUS SIGN}"


def visible(text: str) -> str:
    r"""Show characters that could steer a terminal, a table or the reading order as escapes.

    Args:
        text: any string, lone surrogates included.
    Returns:
        The text with control, format, private and surrogate characters as \x1b, \u202e and so on.

    Example:
        >>> visible("gpt2" + chr(27) + "[2J")
        'gpt2\\x1b[2J'
    """
    return "".join(_escaped(char) if _hidden(char) else char for char in text)


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@dataclass(frozen=True)
class _Style:
    factor: float = 1.0
    decimals: int = 3
    prefix: str = ""
    suffix: str = ""

    def write(self, value: float, extra: int = 0) -> str:
        scaled = value * self.factor
        if abs(scaled) >= 1e9 or 0 < abs(scaled) < 1e-4:
            text = f"{scaled:.2e}"
        else:
            text = f"{scaled:,.{max(self.decimals + extra, 0)}f}"
        return text.replace("-", _MINUS) if not _is_zero(text) else text.lstrip("-")


def _is_zero(text: str) -> bool:
    return not any(char in "123456789" for char in text)


def _significant(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 1
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 6)


def _share(value: float) -> _Style:
    away = min(abs(value), abs(1 - value))
    return _Style(100, 2 if 0 < away < 0.01 else 1, suffix=" %")


def _seconds(value: float) -> _Style:
    factor, suffix = (1, " s") if abs(value) >= 1 else (1e3, " ms") if abs(value) >= 1e-3 else (1e6, " µs")
    return _Style(factor, _significant(value * factor, 3), suffix=suffix)


def _bytes(value: float) -> _Style:
    power = min(max(int(math.log2(abs(value)) // 10), 0), 4) if value else 0
    factor = 1 / 1024**power
    return _Style(
        factor,
        _significant(value * factor, 3) if power else 0,
        suffix=f" {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}",
    )


def _style(kind: Kind, value: float) -> _Style:
    if kind == "share":
        return _share(value)
    if kind == "ratio":
        return _Style(decimals=3 if abs(value) < 10 else _significant(value, 3), prefix=_TIMES)
    if kind == "speedup":
        return _Style(decimals=2 if abs(value) < 10 else 1, suffix=_TIMES)
    if kind == "seconds":
        return _seconds(value)
    if kind == "bytes":
        return _bytes(value)
    if kind == "length":
        return _Style(decimals=0)
    if kind == "slope":
        return _Style(decimals=2)
    return _Style(decimals=_significant(value, 3 if kind == "small" else 4))


def value_text(kind: Kind, value: float) -> str:
    """Write one value with its unit.

    Args:
        kind: how this metric is written.
        value: the value, in the unit of the result file (shares as 0 to 1, times in s).
    Returns:
        For instance "95.6 %"; what is not 100 % never reads as 100 %, nor what is above 0 as 0 %.

    Example:
        >>> value_text("share", 0.9561), value_text("seconds", 0.01234), value_text("share", 0.99999)
        ('95.6 %', '12.3 ms', '> 99.99 %')
    """
    if kind == "share" and 0.99995 <= value < 1:
        return "> 99.99 %"
    if kind == "share" and 0 < value < 0.00005:
        return "< 0.01 %"
    style = _style(kind, value)
    return f"{style.prefix}{style.write(value)}{style.suffix}"


def interval_text(kind: Kind, value: float, low: float | None, high: float | None) -> str:
    """Write the interval of a value in the unit of the value, with decimals enough to tell its ends apart.

    Args:
        kind: how this metric is written.
        value: the value the interval belongs to.
        low, high: its ends; None where there are none.
    Returns:
        For instance "[95.2, 96.0]", or "" without an interval.

    Example:
        >>> interval_text("share", 0.956, 0.9523, 0.9601)
        '[95.2, 96.0]'
    """
    if low is None or high is None:
        return ""
    style = _style(kind, value)
    for extra in range(4):
        ends = style.write(low, extra), style.write(high, extra)
        if ends[0] != ends[1] or low == high:
            break
    return f"[{ends[0]}, {ends[1]}]"


def count_text(count: float) -> str:
    """Write a count with thousands separated.

    Args:
        count: the count.
    Returns:
        For instance "8,192".
    """
    return f"{count:,.0f}"


def join_words(words: Sequence[str]) -> str:
    """Join words as in a sentence.

    Args:
        words: at least one word.
    Returns:
        For instance "a, b and c".
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
