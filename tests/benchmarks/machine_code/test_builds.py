"""Which kernels this Triton can build."""

import pytest

machine = pytest.importorskip(
    "denim.benchmarks.machine_code.builds", reason="Triton is a dependency on Linux x86-64 alone"
)


def test_what_this_triton_cannot_build_is_said(monkeypatch, tmp_path):
    assert machine.unavailable("sm_90") is None
    monkeypatch.setattr("denim.benchmarks.machine_code.builds.NVIDIA_TOOLS", tmp_path)
    assert "nvdisasm and cuobjdump missing" in machine.unavailable("sm_90")
    monkeypatch.setattr("denim.benchmarks.machine_code.builds.backends", {"nvidia": None})
    assert "no amd backend" in machine.unavailable("gfx942")
