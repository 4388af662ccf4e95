"""The report in a real browser: nothing to complain about in its console, and nothing wider than a phone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_bliss.report import page
from megatron_bliss.report.facts import report_facts
from tests.test_report import made

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
)
# Put into a copy of the page: what the page itself must not have.
_MEASURE = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"

__all__ = ["made"]  # the run, a fixture


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [500, 1400])  # a headless window is not narrower than 500
def test_the_page_fits_and_the_console_is_silent(made: Path, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.html(report_facts(made, None)).replace("</body>", _MEASURE))
    assert BROWSER
    command = [BROWSER, *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    found = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert not re.search(r"CONSOLE", found.stderr), found.stderr
    title = re.search(r"<title>(\d+) of (\d+)</title>", found.stdout)
    assert title, found.stderr[-2000:]
    assert int(title[1]) <= int(title[2]) == width
