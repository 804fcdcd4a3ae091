"""Text that would like to be more than text, and reports with it in one field."""

import json
from html.parser import HTMLParser
from pathlib import Path

from bsbr.report import load
from bsbr.report.html import report_html
from tests.report.conftest import write_sample

HIT = "top.owned=1;fetch('/hit')"
"""What a script that ran would do: leave a mark and ask for a page."""

PAYLOADS = (
    f"<script>{HIT}</script>",
    f'"><script>{HIT}</script>',
    f"'><script>{HIT}</script>",
    f"</title><script>{HIT}</script>",
    f"</style><script>{HIT}</script>",
    f"</textarea></pre></code><script>{HIT}</script>",
    f"--><script>{HIT}</script><!--",
    f"]]><script>{HIT}</script>",
    f"<img src=/hit onerror={HIT!r}>",
    f'" onmouseover="{HIT}" autofocus onfocus="{HIT}" x="',
    f"' style='background:url(/hit)' onload='{HIT}",
    f"<svg/onload={HIT!r}>",
    f"<svg><animate onbegin={HIT!r} attributeName=x dur=1s>",
    f"<math><mtext><style><img src=/hit onerror={HIT!r}>",
    f"<iframe srcdoc='<script>{HIT}</script>'></iframe>",
    "<iframe src=/hit></iframe><object data=/hit></object><embed src=/hit>",
    "<link rel=stylesheet href=/hit><style>@import '/hit';</style>",
    "<meta http-equiv=refresh content='0;url=/hit'>",
    "<base href=/hit><form action=/hit><input name=q autofocus></form>",
    f"<a href=javascript:{HIT}>x</a><a href=/hit ping=/hit>y</a>",
    f"<details open ontoggle={HIT!r}>x</details>",
    "<video><source src=/hit></video><audio src=/hit autoplay></audio>",
    "</td></tr></table><table><tr><td>",
    "{{ 7 * 7 }}{% raw %}{{ self.__init__.__globals__ }}{% endraw %}${7*7}#{7*7}",
    "<scr\0ipt>" + HIT + "</scr\0ipt>\ufeff\u2028\u2029",
    "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2066\u200b",
    "&lt;script&gt;" + HIT + "&lt;/script&gt; &#60;script&#62;",
    "\uff1cscript\uff1e" + HIT + "\uff1c/script\uff1e\u02bc onload=" + HIT,
    "\ud800<plaintext><xmp><noscript><template>",
    "\r\n\r\n<html><body onload=" + HIT + ">" + "<b>" * 300,
)
"""Thirty of them."""

FIELDS = ("model", "path", "text", "variant", "metric", "note")
"""Where foreign text stands in a result file: names, the command, a data set, a task's figures, remarks."""


def folder_with(folder: Path, field: str, payload: str) -> Path:
    """Write a small results folder with a payload in one field.

    Args:
        folder: where to; it is made.
        field: one of `FIELDS`.
        payload: the text.
    Returns:
        The folder.
    """
    names = ("scaling_exponents", "quality_results_wikitext")
    write_sample(folder, names, model=payload if field == "model" else "plain")
    path = folder / f"{names[1]}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    row = document["rows"][0]
    document["rows"] = [entry for entry in document["rows"] if entry["slice"].get("bucket") == "all"][:6]
    if field == "path":
        document["command"] = ["bsbr", "evaluate", payload]
    elif field == "text":
        document["rows"].append(row | {"variant": "converted", "slice": {"text": payload, "bucket": "all"}})
    elif field in ("variant", "metric"):
        document["rows"].append(row | {"variant": "converted", field: payload})
    elif field == "note":
        document["warnings"] = [payload]
        document["not_measured"] = [{"what": "x", "reason": payload}]
        document["rows"].append(row | {"variant": "converted", "metric": "nll", "value": None, "reason": payload})
    path.write_text(json.dumps(document), encoding="utf-8")
    return folder


def page_with(folder: Path, field: str, payload: str) -> str:
    """Write the report page of `folder_with`.

    Args:
        folder, field, payload: as there.
    Returns:
        HTML.
    """
    return report_html(load(folder_with(folder, field, payload)), {})


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, sorted."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)
        self.close()
        self.found.sort()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(f"{tag} {sorted(name for name, _ in attrs)}")
