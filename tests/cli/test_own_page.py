"""docs/own.md, as a reader would follow it: its code in a file, its command on a folder of images."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from denim import cli

PAGE = (Path(__file__).parents[2] / "docs" / "own.md").read_text()
# Smaller, for a test.
FEWER = ("--num-images", "4", "--score-draws", "2", "--health-images", "0", "--examples", "1")


@pytest.mark.slow
def test_the_page_leads_to_a_table_for_latex(tmp_path, make_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", each=3, splits=("test",))
    Path("mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)))
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    torch.save(mine.classifier().state_dict(), "mine.pt")
    (command,) = re.findall(r"    denim (evaluate .*?)\n\n", PAGE, re.S)
    words = shlex.split(command.replace("\\\n", " ").replace("steps=50,eot=8", "steps=2,eot=2"))
    monkeypatch.setattr("sys.argv", ["denim", *words, *FEWER])
    cli.run()
    table = Path("runs/mine/table.tex").read_text()
    rows = [line.split(" & ") for line in table.splitlines() if line.endswith(r"\\")]
    assert rows[0][2:] == ["none", "mine Signs", "apgd 4/255", "worst 4/255 \\\\"]
    names = [row[0] for row in rows[1:]]
    assert names == [
        "mine",
        "mine, sigma 20",
        "mine, sigma 70",
        "mine, sigma 70 frozen",
        "mine, noise alone, sigma 20",
        "mine, JPEG 75",
    ]
    for name in ("tradeoff.pdf", "results.csv", "report.html"):
        assert (Path("runs/mine") / name).exists()
