"""Report pages full of hostile text in a real browser: nothing of it lives, and nothing is asked for.

python -m tests.long.browser
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.reliability import record

from tests.security.payloads import FIELDS, PAYLOADS, page_with

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-extensions",
    "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage", "--mute-audio",
)  # fmt: skip

_INDEX = """<!DOCTYPE html><meta charset=utf-8><body>{frames}<pre id=found></pre><script>
window.onload = () => {{
  const found = {{owned: window.owned || 0, pages: []}};
  for (const frame of document.querySelectorAll('iframe')) {{
    const tags = {{}}, page = frame.contentDocument;
    let live = 0;
    for (const element of page.querySelectorAll('*')) {{
      const name = element.tagName.toLowerCase();
      tags[name] = (tags[name] || 0) + 1;
      if (/^(script|iframe|frame|object|embed|form|input|svg|math|video|audio|link|base|template)$/.test(name)) live++;
      for (const attribute of element.attributes) {{
        if (/^on/i.test(attribute.name) || /^\\s*(javascript|https?):/i.test(attribute.value)) live++;
      }}
    }}
    found.pages.push([frame.getAttribute('src'), live, tags]);
  }}
  document.getElementById('found').textContent = 'FOUND' + btoa(JSON.stringify(found)) + 'DNUOF';
}};
</script>"""


def browser() -> str | None:
    """The path of a Chromium, or None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(pages: dict[str, str], program: str) -> tuple[dict[str, Any], list[str]]:
    """Show pages to a browser, each in a frame of its own.

    Args:
        pages: path to HTML.
        program: the browser.
    Returns:
        What a script around the frames found in them, and the requests beyond the pages themselves.
    """
    frames = "".join(f"<iframe src='{path}'></iframe>" for path in pages)
    served = {"/": _INDEX.format(frames=frames), **pages}
    others: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = served.get(self.path)
            if page is None:
                others.append(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((page or "").encode())

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory() as profile:
            url = f"http://127.0.0.1:{server.server_port}/"
            done = subprocess.run(
                [program, *FLAGS, f"--user-data-dir={profile}", "--timeout=240000", "--dump-dom", url],
                capture_output=True, text=True, timeout=280, check=False,
            )  # fmt: skip
    finally:
        server.shutdown()
    import base64

    match = re.search(r"FOUND(.*?)DNUOF</pre>", done.stdout, re.DOTALL)
    if match is None:
        raise RuntimeError(f"the browser showed nothing: {done.stderr[-300:]}")
    return json.loads(base64.b64decode(match[1])), [path for path in others if path != "/favicon.ico"]


def check(folder: Path, program: str, payloads: tuple[str, ...] = PAYLOADS) -> tuple[int, list[str], str]:
    """Look at a page for each payload in each field.

    Args:
        folder: an empty folder to work in.
        program: the browser.
        payloads: the texts.
    Returns:
        How many pages, what was wrong, and the browser's version.
    """
    texts = ["plain words", *payloads]
    faults: list[str] = []
    for field in FIELDS:
        pages = {f"/{field}-{n}": page_with(folder / f"{field}-{n}", field, text) for n, text in enumerate(texts)}
        found, requests = look(pages, program)
        faults += [f"a request for {path}" for path in requests]
        if found["owned"]:
            faults.append(f"{field}: a script ran")
        seen = {path: (live, Counter(tags)) for path, live, tags in found["pages"]}
        if len(seen) != len(pages):
            faults.append(f"{field}: {len(pages) - len(seen)} pages were not shown")
        plain = seen[f"/{field}-0"][1]
        for path, (live, tags) in seen.items():
            if live:
                faults.append(f"{path}: {live} live elements")
            if tags != plain or not tags:
                faults.append(f"{path}: other elements than with plain words")
        print(f"{field}: {len(seen)} pages, {len(faults)} faults so far", flush=True)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return len(FIELDS) * len(payloads), faults, version


def main() -> int:
    """Look at all pages and write the result."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    program = browser()
    if program is None:
        print("no Chromium here: left out")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pages, faults, version = check(Path(folder), program)
        canary, requests = look({"/canary": f"<script>{PAYLOADS[0][8:-9]}</script>"}, program)
    if not canary["owned"] or "/hit" not in requests:
        raise SystemExit("a page that does run a script was not noticed: the test shows nothing")
    record(
        "browser",
        section="Input and security",
        claim="Hostile text in a report makes no live element and no request in a browser.",
        cases=pages,
        failures=len(faults),
        measured=f"{len(PAYLOADS)} payloads in each of {len(FIELDS)} fields ({', '.join(FIELDS)}): 0 "
        f"scripts ran, 0 live "
        "elements, 0 requests; a page that does run a script was noticed" if not faults else "; ".join(faults)[:500],
        not_covered=["Browsers other than Chromium; the page runs no script, so that it has no other states."],
        command="python -m tests.long.browser",
        conditions=f"{version}, headless; each page in a frame, served over HTTP; the page's own "
        f"policy is default-src 'none'",
        seconds=time.monotonic() - started,
        details={"faults": faults},
    )  # fmt: skip
    print(f"{pages} pages, {len(faults)} faults", *faults[:20], sep="\n  ")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
