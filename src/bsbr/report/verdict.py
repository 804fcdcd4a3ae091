"""The verdict: what the figures say, in sentences a reader understands."""

from dataclasses import dataclass

from bsbr.report.density import density_sentence
from bsbr.report.facts import exposure, find, fit_range, is_extrapolated, model_name
from bsbr.report.metrics import metric
from bsbr.report.names import AGREEMENT, EXPONENTS, PERPLEXITY, SPEED
from bsbr.report.results import Results, Row
from bsbr.report.wording import count_text, interval_text, join_words, value_text

_EVEN = 0.95, 1.05


@dataclass(frozen=True)
class Figure:
    """One headline figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What the figures say: sentences, and the headline figures beside them."""

    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]


def verdict(results: Results) -> Verdict:
    """Say in words what was found, from the rows alone.

    Args:
        results: a results folder.
    Returns:
        Sentences and headline figures; what was not measured is not in them.
    """
    said = (_fidelity(results), _controls(results), _speed(results), _growth(results), density_sentence(results))
    sentences = [text for text in said if text]
    if not sentences:
        sentences = ["Nothing that a verdict needs was measured: neither quality nor speed of the converted model."]
    return Verdict(tuple(sentences), tuple(_figures(results)))


def bucket_words(row: Row) -> str:
    """Say which positions a row is about.

    Args:
        row: a quality row.
    Returns:
        For instance "positions where blocks are left out".
    """
    bucket = row.slice.get("bucket")
    if bucket == "exposed":
        return "positions where the sparse part acts"
    if bucket in (None, "all"):
        return "scored positions"
    return f"positions {bucket}"


def text_words(results: Results, row: Row) -> str:
    """Say which text a row is about.

    Args:
        results: a results folder.
        row: a quality row.
    Returns:
        For instance "WikiText".
    """
    for section in (AGREEMENT, PERPLEXITY):
        if section in results.sections:
            name = row.slice.get("text") or find(results.sections[section].part("data"), "name")
            if name:
                return {"wikitext": "WikiText", "book": "the book"}.get(str(name), str(name))
    return "this text"


def _with_interval(row: Row) -> str:
    kind = metric(row.metric).kind
    interval = interval_text(kind, row.value, row.ci_low, row.ci_high)
    return f"{value_text(kind, row.value)}{f' {interval}' if interval else ''}"


def _same_place(results: Results, row: Row | None, section: str, name: str, kind: str) -> Row | None:
    """The row of another metric or variant on the same positions and text as `row`."""
    keys = ("bucket", "text") if row else ()
    where = {key: row.slice[key] for key in keys if row and key in row.slice}
    found = results.best(section, name, kind, where)
    if found is None and "text" not in where and where:
        found = results.best(section, name, kind, {"bucket": where["bucket"]})
    return found


def _fidelity(results: Results) -> str:
    top1 = results.best(AGREEMENT, "top1_agreement", "converted")
    kl = _same_place(results, top1, AGREEMENT, "kl", "converted")
    ratio = _same_place(results, top1, PERPLEXITY, "ppl_ratio", "converted")
    first = top1 or kl or ratio
    if first is None:
        return ""
    count = f"{count_text(first.n)} " if first.n else ""
    where = f"On {text_words(results, first)}, over {count}{bucket_words(first)}"
    lead = f"{where}, the converted {model_name(results)}"
    parts = []
    if top1:
        parts.append(f"picks the same next token as the original {_in_words(top1)} of the time")
    if ratio:
        parts.append(f"{'' if parts else 'has a '}perplexity {_perplexity_words(results, ratio)}")
    if kl:
        parts.append(f"{'' if parts else 'has a '}mean KL divergence of {value_text('small', kl.value)} nats")
    return f"{lead} {'; '.join(parts)}."


def _in_words(row: Row) -> str:
    """A share and its interval: 95.6 % (interval 95.2 to 96.0)."""
    ends = interval_text(metric(row.metric).kind, row.value, row.ci_low, row.ci_high)
    interval = f" (interval {ends.strip('[]').replace(', ', ' to ')})" if ends else ""
    return f"{value_text(metric(row.metric).kind, row.value)}{interval}"


def _perplexity_words(results: Results, ratio: Row) -> str:
    words = f"{value_text('ratio', ratio.value)} of the original's"
    place = {key: ratio.slice[key] for key in ("bucket", "text", "length") if key in ratio.slice}
    before = results.best(PERPLEXITY, "perplexity", "original", place)
    after = results.best(PERPLEXITY, "perplexity", "converted", place)
    if before and after:
        values = (value_text("plain", row.value) for row in (after, before))
        words += " ({} against {})".format(*values)
    return words


def _controls(results: Results) -> str:
    top1 = results.best(AGREEMENT, "top1_agreement", "converted")
    said = []
    for name, words in (
        ("uncalibrated", "without calibration"),
        ("moba", "without the far field (MoBA)"),
        ("local", "reading its own block only"),
        ("additive", "with the published additive design"),
    ):
        row = _same_place(results, top1, AGREEMENT, "top1_agreement", name)
        if top1 and row:
            said.append(f"{value_text('share', row.value)} {words}")
    return f"The same figure is {join_words(said)}." if said else ""


def speedups(results: Results, kind: str = "converted") -> list[Row]:
    """Return the speed-ups by length in the regime to quote.

    Args:
        results: a results folder.
        kind: the variant.
    Returns:
        Rows sorted by length; a fixed batch if measured, else the first regime there is.
    """
    rows = [row for row in results.rows(SPEED, "speedup", kind) if isinstance(row.slice.get("length"), int)]
    regimes = {str(row.slice.get("regime")) for row in rows}
    regime = "fixed_batch" if "fixed_batch" in regimes else min(regimes, default="")
    return sorted((row for row in rows if str(row.slice.get("regime")) == regime), key=lambda row: row.slice["length"])


def _faster(row: Row) -> bool:
    return row.value >= _EVEN[1] and (row.ci_low is None or row.ci_low > 1)


def _speed(results: Results) -> str:
    rows = speedups(results)
    if not rows:
        return ""
    tail = len(rows)
    while tail and _faster(rows[tail - 1]):
        tail -= 1
    sentences = []
    if tail < len(rows):
        first, last = rows[tail], rows[-1]
        words = f"from {_length(first)} tokens on it is {_times(first)} as fast as the original"
        if last is not first:
            words += (
                f", rising to {_times(last)} at {_length(last)}"
                if last.value > first.value
                else (f", and {_times(last)} at {_length(last)}")
            )
        sentences.append(words)
    if tail:
        sentences.append(_slower_words(rows[:tail], tail == len(rows)))
    joined = "; ".join(sentences)
    return f"On {_machine(results)}, {joined}."


def _slower_words(rows: list[Row], never: bool) -> str:
    values = [row.value for row in rows]
    low, high = min(values), max(values)
    span = f"{_length(rows[0])} to {_length(rows[-1])} tokens" if len(rows) > 1 else f"{_length(rows[0])} tokens"
    pace = value_text("speedup", low)
    if value_text("speedup", high) != pace:
        pace = f"{pace} to {value_text('speedup', high)}"
    lead = "it is not reliably faster at any length measured: " if never else "at "
    even = " (even)" if low >= _EVEN[0] and high <= _EVEN[1] else ""
    return f"{lead}{f'at {span}' if never else span} it runs at {pace} the original's speed{even}"


def _length(row: Row) -> str:
    return count_text(row.slice["length"])


def _times(row: Row) -> str:
    return value_text("speedup", row.value)


def _machine(results: Results) -> str:
    machine = results.sections[SPEED].part("machine")
    device = str(machine.get("device") or "this machine")
    device = {"cpu": "the CPU", "cuda": "the GPU"}.get(device, device.replace("cuda (", "the GPU ("))
    count = machine.get("threads")
    threads = f" with {count} thread{'' if count == 1 else 's'}" if count and device == "the CPU" else ""
    dtype = f" in {machine['dtype']}" if machine.get("dtype") else ""
    return f"{device}{threads}{dtype}"


def _growth(results: Results) -> str:
    after = exponent(results, "converted")
    before = exponent(results, "original")
    if after is None or before is None:
        return ""
    span = f" over {fit_range(after)} tokens" if fit_range(after) else ""
    text = (
        f"Beyond a constant, its time grows with length to the power {_with_interval(after)}{span}, "
        f"the original's with {_with_interval(before)}"
    )
    crossing = results.best(EXPONENTS, "crossover_length", "converted")
    if crossing:
        lengths = [row.slice["length"] for row in speedups(results)]
        note = ", extrapolated" if is_extrapolated(crossing, lengths) else ""
        text += f"; the two curves cross at {count_text(crossing.value)} tokens{note}"
    return f"{text}."


def exponent(results: Results, kind: str) -> Row | None:
    """Return the fitted exponent to quote.

    Args:
        results: a results folder.
        kind: the variant.
    Returns:
        The row of the fixed batch if there is one, else any; None if not measured.
    """
    fixed = results.best(EXPONENTS, "exponent", kind, {"regime": "fixed_batch"})
    return fixed or results.best(EXPONENTS, "exponent", kind)


def _figures(results: Results) -> list[Figure]:
    figures = []
    top1 = results.best(AGREEMENT, "top1_agreement", "converted")
    kl = _same_place(results, top1, AGREEMENT, "kl", "converted")
    ratio = _same_place(results, top1, PERPLEXITY, "ppl_ratio", "converted")
    for label, row in (
        ("same next token", top1),
        ("perplexity ratio", ratio),
        ("KL, nats", kl),
    ):
        if row:
            kind = metric(row.metric).kind
            interval = interval_text(kind, row.value, row.ci_low, row.ci_high)
            figures.append(
                Figure(label, value_text(kind, row.value), f"interval {interval}" if interval else "no interval")
            )
    rows = speedups(results)
    if rows:
        figures.append(Figure(f"speed at {_length(rows[-1])} tokens", _times(rows[-1]), "times the original's"))
    share = exposure(results)
    if share:
        figures.append(Figure("sparse exposure", value_text("share", share.value), "of scored positions"))
    return figures
