"""Headless Chromium, if installed: the document of a page, its console messages, and its width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]


def look(page: Path, *flags: str, dark: bool = False) -> tuple[str, list[str]]:
    """(document after the scripts ran, console messages) of a local page."""
    with tempfile.TemporaryDirectory() as profile:
        result = subprocess.run(
            [
                BROWSER,
                *QUIET,
                f"--user-data-dir={profile}",
                "--dump-dom",
                "--virtual-time-budget=2000",
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
                *flags,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    return result.stdout, re.findall(r"CONSOLE[^\n]*", result.stderr)


def widths(page: Path, width: int, dark: bool = False) -> tuple[int, int]:
    """(width of the content, width of the window) of ``page`` in a frame of ``width`` pixels, as on a phone."""
    frame = page.with_name("frame.html")
    frame.write_text(f"""<iframe id=f src="{page.name}" style="width:{width}px;height:800px;border:0"></iframe><script>
        onload = () => {{ const d = f.contentDocument.documentElement; document.title = d.scrollWidth + " " + d.clientWidth;
        }}
        </script>""")
    document, _ = look(frame, "--allow-file-access-from-files", dark=dark)
    match = re.search(r"<title>(\d+) (\d+)</title>", document)
    assert match, document[:500]
    return int(match[1]), int(match[2])


def drive(page: Path, script: str, width: int = 1000, dark: bool = False) -> tuple[Any, list[str]]:
    """(result of ``script``, console messages) for a local page in a frame of ``width`` pixels.

    Args:
        script: body of a JavaScript function with the page's document ``d`` and window ``w``.
    """
    frame = page.with_name(f"drive-{page.stem}.html")
    frame.write_text(f"""<iframe id=f src="{page.name}" style="width:{width}px;height:800px;border:0"></iframe><script>
        const act = (d, w) => {{ {script} }};
        onload = () => {{
          let found;
          try {{ found = act(f.contentDocument, f.contentWindow); }} catch (error) {{ found = {{ error: String(error) }}; }}
          document.body.append(Object.assign(document.createElement("pre"), {{ id: "found",
                                             textContent: JSON.stringify(found) }}));
        }}
        </script>""")
    document, complaints = look(frame, "--allow-file-access-from-files", dark=dark)
    match = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert match, document[:500]
    return json.loads(html.unescape(match[1])), complaints
