"""The page that ends a pretraining run: its curves and figures, from `training.json` alone."""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsbr.errors import UserError
from bsbr.files import write_atomic
from bsbr.report.wording import visible

RECORD = "training.json"
PAGE = "training.html"

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}"
    "img{max-width:100%}"
)


def render_pretraining(folder: str | Path) -> Path:
    """Write `training.html` beside the record of a run; it needs no other file, no network and no script.

    Args:
        folder: the folder that `bsbr pretrain` wrote.
    Returns:
        The page.
    Raises:
        UserError: there is no record, it is damaged, or the page cannot be written.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        page = pretraining_html(record)
    except FileNotFoundError:
        raise UserError(f'folder "{visible(str(folder))}": no {RECORD}. Give a folder of bsbr pretrain') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'record "{visible(str(path))}": cannot be used ({visible(str(error))}). Train again, or restore the file'
        ) from error
    return write_atomic(Path(folder) / PAGE, page)


def pretraining_html(record: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        record: content of `training.json`.
    Returns:
        HTML; without matplotlib it has no curves, and says so.
    """
    recipe = record["recipe"]
    attention = (recipe.get("attention") or {"mixer": "full"})["mixer"]
    title = f"{recipe.get('architecture', 'gpt2')} with {attention} attention, {record['parameters']:,} parameters"
    try:
        from bsbr.report.plots.pretraining import draw_pretraining

        data = base64.b64encode(draw_pretraining(record)).decode("ascii")
        curves = f'<img alt="losses against tokens" src="data:image/png;base64,{data}">'
    except ModuleNotFoundError:
        curves = "<p>Curves need matplotlib: pip install 'bsbr[evaluate]', then bsbr report on this folder.</p>"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _table(_figures(record)),
        curves,
        "<h2>Recipe</h2>",
        _table([(name, json.dumps(value)) for name, value in sorted(recipe.items())]),
        "<h2>Trained on</h2>",
        _table([(name, json.dumps(value)) for name, value in sorted(record["text"].items())]),
    ]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _figures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    held_out, seconds = record["held_out"], record["training_s"]
    rows = [("held-out loss", f"{held_out['nll']:.4f} nats per token")]
    if "bits_per_byte" in held_out:
        rows.append(("bits per byte", f"{held_out['bits_per_byte']:.4f}"))
    if "accuracy" in held_out:
        found = held_out["accuracy"]
        rows.append(("accuracy", f"{found['value']:.2%} ({found['ci_low']:.2%} to {found['ci_high']:.2%})"))
        for part in held_out["by_distance"]:
            between = f"{part['ci_low']:.2%} to {part['ci_high']:.2%} of {part['n']}"
            rows.append((f"at distance {part['least']} to {part['most']}", f"{part['value']:.2%} ({between})"))
    rows += [
        ("tokens", f"{record['tokens_seen']:,} in {record['steps']:,} steps"),
        (
            "training time",
            f"{seconds:,.1f} s" + (f", {record['tokens_seen'] / seconds:,.0f} tokens/s" if seconds else ""),
        ),
        ("device", f"{record['device']}, {record.get('processes', 1)} process(es), {record['precision']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))),
    ]
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>"


def _text(value: str) -> str:
    return html.escape(visible(value))
