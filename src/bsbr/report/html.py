"""report.html: everything on one page that needs no other file, no network and no script."""

import base64
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from bsbr.report.cautions import not_measured, warnings
from bsbr.report.cells import Table
from bsbr.report.facts import commands, conditions, model_name, settings_text
from bsbr.report.metrics import is_spread, metric, order
from bsbr.report.names import (
    AGREEMENT,
    CAPTIONS,
    EXPONENTS,
    PERPLEXITY,
    PUBLISHED,
    SECTIONS,
    SIMILARITY,
    SPEED,
    SWEEP,
    VARIANTS,
)
from bsbr.report.results import Results
from bsbr.report.tables import tables
from bsbr.report.verdict import verdict

_PLOTS: dict[str, tuple[str, ...]] = {
    AGREEMENT: ("agreement_rates.png",),
    PERPLEXITY: ("perplexity_comparison_wikitext.png",),
    SIMILARITY: ("metrics_distribution.png",),
    SPEED: (
        "speedup_vs_seq_length.png",
        "inference_time_vs_seq_length.png",
        "throughput_vs_seq_length.png",
    ),
    EXPONENTS: ("scaling_exponent_analysis.png",),
    SWEEP: ("quality_vs_density.png", "kl_vs_time.png", "kl_by_position.png"),
}


def report_html(results: Results, plots: Mapping[str, bytes], notes: Iterable[str] = ()) -> str:
    """Write the page.

    Args:
        results: a results folder.
        plots: names of plots and their PNG images, embedded as data.
        notes: warnings about the folder itself, put beside those of the results.
    Returns:
        HTML; every text of the result files is escaped by the template.
    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    template = resources.files("bsbr.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(**_content(results, plots, notes))


def _content(results: Results, plots: Mapping[str, bytes], notes: Iterable[str]) -> dict[str, Any]:
    built = tables(results)
    found = verdict(results)
    return {
        "model": model_name(results),
        "settings": next(settings_text(section, model=False) for section in results.sections.values()),
        "sentences": found.sentences,
        "figures": found.figures,
        "warnings": [*warnings(results), *notes],
        "summary": built["summary"],
        "sections": [
            _section(name, title, built[name], plots) for name, title in SECTIONS.items() if name in results.sections
        ],
        "absent": not_measured(results),
        "variants": _variants(results),
        "metrics": _metrics(results),
        "published": PUBLISHED,
        "conditions": conditions(results),
        "commands": commands(results),
    }


def _section(name: str, title: str, group: list[Table], plots: Mapping[str, bytes]) -> dict[str, Any]:
    images = [
        {
            "name": plot,
            "caption": CAPTIONS[plot],
            "data": base64.b64encode(plots[plot]).decode("ascii"),
        }
        for plot in _PLOTS[name]
        if plot in plots
    ]
    return {
        "id": name.replace("_", "-"),
        "title": title,
        "file": f"{name}.json",
        "images": images,
        "tables": [table for table in group if not table.minor],
        "minor": [table for table in group if table.minor],
    }


def _variants(results: Results) -> list[tuple[str, str]]:
    measured = {name for section in results.sections for name in results.variants(section)}
    return [(words.label, words.meaning) for name, words in VARIANTS.items() if name in measured]


def _metrics(results: Results) -> list[tuple[str, str]]:
    """Definitions of the metrics measured, in the order of their table; unknown ones are named as unknown."""
    rows = [row for section in results.sections for row in results.rows(section)]
    names = {row.metric for row in rows if not is_spread(row.metric)}
    return [
        (
            metric(name).label,
            metric(name).definition or "Not described: this version of bsbr does not know it.",
        )
        for name in sorted(names, key=order)
    ]
