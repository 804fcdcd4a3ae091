"""The report of an evaluation: plots, an HTML page and a Markdown summary, drawn from result files alone."""

from pathlib import Path

from bsbr.report.load import load
from bsbr.report.results import Results

__all__ = ["Results", "load", "render"]


def render(results_dir: str | Path) -> list[Path]:
    """Draw everything a results folder holds figures for, into that folder.

    1. Read the result files; what is missing is left out, and said to be.
    2. Draw the plots under their published names.
    3. Write summary.md and report.html, a page that needs no other file and no network.

    Args:
        results_dir: the folder that `bsbr evaluate` wrote.
    Returns:
        The files written.
    Raises:
        UserError: the folder holds no results, a file in it is damaged, or it cannot be written.
    """
    from bsbr.files import write_atomic
    from bsbr.report.cautions import stale_plots
    from bsbr.report.html import report_html
    from bsbr.report.markdown import summary_markdown
    from bsbr.report.plots import draw_all

    results = load(results_dir)
    plots = draw_all(results)
    stale = stale_plots(results, plots)
    contents: dict[str, bytes | str] = {
        **plots,
        "summary.md": summary_markdown(results),
        "report.html": report_html(results, plots, stale),
    }
    return [write_atomic(results.folder / name, content) for name, content in contents.items()]
