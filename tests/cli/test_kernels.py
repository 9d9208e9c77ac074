"""`denim kernels --run`: kernels executed on the CPU, and what it says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from denim.cli import kernels as command

WHERE = "Triton is a dependency on Linux x86-64 alone"
pytest.importorskip("triton", reason=WHERE)
check = pytest.importorskip("denim.benchmarks.machine_code.ptx.check", reason=WHERE)
counts = pytest.importorskip("denim.benchmarks.machine_code.ptx.counts", reason=WHERE)

NAME = "attack_start, bf16"


@pytest.mark.slow
def test_a_kernel_is_executed_and_counted(capsys):
    command.main(run=(NAME,))
    said = capsys.readouterr().out
    assert f"{NAME}, compiled for sm_90, 2 images or samples, executed on the CPU" in said
    assert "result: as defined" in said
    row = next(line for line in said.splitlines() if "attack_start_kernel" in line).split()
    # Every pixel is stored once, 2 bytes each, and loaded once; seeds and radii are a few bytes more.
    sectors = 2 * 3 * 48 * 48 * 2 // 32
    assert row[6] == row[8] == f"{sectors}"
    assert row[2] == "100.0%"
    assert row[-1] == f"{64 * sectors / 1e3:.0f}"


def test_what_is_wrong_is_said_and_fails(monkeypatch, capsys):
    outcome = check.Outcome((check.Agreement("result", 2000, 7, 0.5),), 9, "OutOfBounds: somewhere")
    monkeypatch.setattr(check, "run_case", lambda *_, **__: outcome)
    with pytest.raises(SystemExit) as end:
        command.main(run=(NAME,))
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "trapped: OutOfBounds: somewhere" in said
    assert "result: 7 of 2,000 values are wrong; 50% of the values are determined to the last bit" in said


def test_a_name_that_is_misspelt_gets_suggestions():
    with pytest.raises(
        ValueError, match=r"no kernel is called 'atack_start, bf16' \(did you mean 'attack_start, bf16'"
    ):
        command.main(run=("atack_start, bf16",))


@pytest.mark.parametrize(
    "other",
    [{"only": (NAME,)}, {"targets": ("sm_80",)}, {"update_budgets": True}, {"json": Path("a")}, {"page": Path("a")}],
)
def test_other_options_are_refused(other):
    with pytest.raises(ValueError, match="--run takes no other option"):
        command.main(run=(NAME,), **other)
