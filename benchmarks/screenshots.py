"""Screenshots of a report: `python -m denim.benchmarks.screenshots --page PAGE`, with Chromium.

A phone, a tablet and a desktop, light and dark, as PNGs beside the page. Chromium is `apt install chromium` on Debian.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from denim.nim.files import atomic_write

__all__ = ["main", "screenshot"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 800, 1440)
SCHEMES = {"dark": 0, "light": 1}  # blink's numbers
SECONDS = 120  # that Chromium may take for a page


def _browser() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"screenshots need Chromium, and none of {', '.join(NAMES)} is installed")


def screenshot(page: Path, out: Path, width: int, height: int, scheme: str = "light") -> None:
    """Write what Chromium shows of the top of a page as a PNG.

    Args:
        page: HTML file.
        out: the PNG.
        width: of the window in CSS pixels.
        height: likewise.
        scheme: "light" or "dark", what the page is told of the user's preference.

    Raises:
        FileNotFoundError: no Chromium, or no page.
        RuntimeError: Chromium failed; the message has its words.
    """
    if not page.is_file():
        raise FileNotFoundError(f"no page {page}")
    browser = _browser()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"),
            *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"),
            *(f"--screenshot={picture}", page.resolve().as_uri()),
        ]
        done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=SECONDS, check=False)
        if not picture.exists():
            raise RuntimeError(f"{browser} made no picture of {page}: {done.stderr.strip()[-500:]}")
        with atomic_write(out) as staged:
            shutil.copyfile(picture, staged)


def main(page: Path, widths: Sequence[int] = WIDTHS, height: int = 2000) -> None:
    """Write PAGE-400-light.png and so on beside a page, and print their names.

    Args:
        page: HTML file.
        widths: of the windows in CSS pixels.
        height: of the windows.
    """
    for width in widths:
        for scheme in SCHEMES:
            out = page.with_name(f"{page.stem}-{width}-{scheme}.png")
            screenshot(page, out, width, height, scheme)
            print(out)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
