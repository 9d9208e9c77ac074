import shutil

import numpy as np
import pytest
from PIL import Image

from denim.benchmarks import screenshots
from denim.benchmarks.screenshots import NAMES, main, screenshot

PAGE = """<!DOCTYPE html><html><head><meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; } body { margin: 0; background: #fff; }
div { width: 100%; height: 50px; background: #f00; }
@media (max-width: 500px) { div { background: #0f0; } }
@media (prefers-color-scheme: dark) { body { background: #000; } }
</style></head><body><div></div></body></html>"""


def test_a_page_that_is_not_there_and_a_missing_browser_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no page"):
        screenshot(tmp_path / "none.html", tmp_path / "out.png", 400, 300)
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    monkeypatch.setattr(screenshots.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="need Chromium"):
        screenshot(page, tmp_path / "out.png", 400, 300)


def test_a_browser_that_makes_no_picture_is_an_error_with_its_words(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\necho it broke >&2\n")
    browser.chmod(0o755)
    monkeypatch.setattr(screenshots.shutil, "which", lambda name: str(browser))
    with pytest.raises(RuntimeError, match="it broke"):
        screenshot(page, tmp_path / "out.png", 400, 300)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason="Chromium is not installed")
def test_pictures_have_the_width_and_the_scheme_that_their_names_say(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    main(page, widths=(500, 800), height=300)
    assert len(capsys.readouterr().out.splitlines()) == 4
    for width, block in ((500, (0, 255, 0)), (800, (255, 0, 0))):
        for scheme, ground in (("light", (255, 255, 255)), ("dark", (0, 0, 0))):
            picture = np.asarray(Image.open(tmp_path / f"page-{width}-{scheme}.png").convert("RGB"))
            assert picture.shape[:2] == (300, width)
            assert tuple(picture[25, width // 2]) == block
            assert tuple(picture[200, width // 2]) == ground
