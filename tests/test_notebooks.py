"""The notebooks of examples/ run from top to bottom, cell by cell, as Jupyter would run them."""

import ast
import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def code_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_no_outputs_of_its_last_run(notebook):
    """They would differ with every machine, and a diff of them says nothing."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    with matplotlib.rc_context({"backend": "Agg"}):
        for number, text in enumerate(code_of(notebook)):
            exec(compile(ast.parse(text), f"{notebook.name}, code cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    expected = {
        "denoise": ("sigma  70", "dB denoised"),
        "evaluate_and_certify": ("noise 50, frozen", "report.html", "average certified radius"),
    }
    for text in expected[notebook.stem]:
        assert text in printed
