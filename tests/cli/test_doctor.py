"""`denim doctor` on installations that are broken."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from denim.cli import doctor

pytestmark = pytest.mark.slow


def findings(folder, full=False, monkeypatch=None):
    """What the doctor finds with the packages in a folder before the installed ones."""
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return doctor._findings(full)


def needs(*packages):
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def test_broken_wheels_become_rows(tmp_path, monkeypatch):
    needs("triton", "xformers")
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text(
        "import os, sys, torch\nprint('on the way out', file=sys.stderr)\nos.abort()\n"
    )
    (tmp_path / "triton.py").write_text("raise AttributeError('module torch has no attribute x')\n")
    found = findings(tmp_path, full=True, monkeypatch=monkeypatch)
    assert list(found) == list(doctor._checks(full=True))
    assert found["triton"] == (
        False,
        f"{version('triton')} does not import: AttributeError: module torch has no attribute x",
    )
    usable, reason = found["xformers"]
    assert not usable
    assert reason.startswith("the process that tried it ended with signal SIGABRT: ")
    for name in (
        "python",
        "torch",
        "noise on the CPU",
        "attention, half precision",
        "attention, float32",
        "attention: sdpa",
    ):
        assert found[name][0], found[name]


def test_torch_that_does_not_import_becomes_rows(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    found = findings(tmp_path, monkeypatch=monkeypatch)
    assert list(found) == list(doctor._checks(full=False))
    assert found["python"][0]
    for name in ("torch", "GPU", "attention, float32", "attention: sdpa"):
        assert found[name] == (False, "ImportError: libcudart.so.13: cannot open shared object file")


def test_what_is_not_used_is_not_imported_and_chatter_does_no_harm(tmp_path, monkeypatch):
    needs("triton", "xformers")
    (tmp_path / "triton.py").write_text("print('hello from triton')\n")
    (tmp_path / "xformers.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DENIM_NOISE", "fast")
    found = findings(tmp_path, monkeypatch=monkeypatch)
    assert found["GPU"][0] is False
    assert found["triton"][1].startswith(version("triton"))
    assert "not imported" in found["xformers"][1]
    usable, reason = found["noise on the CPU"]
    assert not usable
    assert "DENIM_NOISE is 'fast'" in reason


@pytest.mark.parametrize("gpu", [True, False])
def test_it_names_the_kernels_of_half_precision_and_of_float32(monkeypatch, gpu):
    """With a GPU and the kernels that serve it played: flash in half precision, cutlass in float32."""
    import torch

    import denim.kernels as kernels

    asked = []

    def kernel(query, key, value):
        asked.append((query.dtype, query.requires_grad))
        return "xformers fa" if query.dtype == torch.bfloat16 else "xformers cutlass"

    def backends(query, key, value):
        return {"xformers": [] if query.dtype == torch.bfloat16 else ["no float32"], "sdpa": [], "math": []}

    empty = torch.empty
    monkeypatch.setattr(doctor, "_has_gpu", lambda: (gpu, ""))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: empty(*shape, dtype=dtype))
    monkeypatch.setattr(kernels, "attention_kernel", kernel)
    monkeypatch.setattr(kernels, "attention_backends", backends)
    checks = doctor._checks(full=False)
    usable, half = checks["attention, half precision"]()
    assert usable
    assert half.startswith("xformers fa; inside torch.compile sdpa")
    assert "multiples of 8" in half
    assert checks["attention, float32"]() == (True, "xformers cutlass; inside torch.compile sdpa")
    assert asked == [(torch.bfloat16, True), (torch.float32, True)]
    assert checks["attention: xformers"]() == (True, "half precision: yes; float32: no float32")
    assert checks["attention: sdpa"]() == (True, "")
