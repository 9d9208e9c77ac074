from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from denim import kernels
from denim.benchmarks import kernels as bench
from denim.benchmarks import timing
from denim.benchmarks.case import FORWARD
from denim.kernels.noise import noise_backend

CPU = torch.device("cpu")
OPERATIONS = ["attack_step", "decode_patches", "gelu_linear", "noise_patchify", "norm_linear", "patch_loss"]


@pytest.mark.parametrize("benchmark_", bench.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_every_benchmark_is_right_and_its_providers_agree_in_kind(benchmark_, global_rng_untouched):
    """One image of 224, sixteen of 32. The check is that of the benchmark itself; compilation is left to it."""
    providers, error = bench.prepare(benchmark_, CPU, 1)
    assert 0 <= error <= 1
    fused = providers.fused()
    with torch.random.fork_rng():
        chain = providers.chain()
    assert [(value.shape, value.dtype) for value in fused] == [(value.shape, value.dtype) for value in chain]
    # All that comes out has been written, and all but a scalar has been read.
    assert providers.minimum >= sum(value.nbytes for value in fused)
    assert len(fused) == (1 if benchmark_.what == FORWARD else 1 + len(benchmark_.case.leaves))


def test_records_say_what_was_measured(global_rng_untouched):
    seen = []
    (record,) = bench.run(
        "cpu",
        ["patch_loss, 32 x 32, uint8, patch 4, fp32, forward + backward"],
        1,
        seconds=0.01,
        compile=False,
        report=seen.append,
    )
    assert seen == [record]
    assert record.batch == 16
    assert record.shape == "16x64x48 to a number"
    assert record.methods == dict.fromkeys(("fused", "chain", "copy"), timing.WALL)
    assert not record.cold
    elements = 16 * 3 * 32 * 32
    # Prediction (float32) and image (uint8) twice, the gradient and the two scalars once.
    assert record.minimum_bytes == elements * (2 * 4 + 2 * 1 + 4) + 2 * 4
    assert set(record.best_seconds) == {"fused", "chain", "copy"}
    for name, best in record.best_seconds.items():
        assert 0 < best <= record.median_seconds[name] < 10
    fused = record.best_seconds["fused"]
    assert record.ratios == {"chain": record.best_seconds["chain"] / fused}
    assert record.copy_share == record.best_seconds["copy"] / fused
    assert record.gigabytes_per_second == pytest.approx(record.minimum_bytes / fused / 1e9)
    # The chain keeps a target and an error of the prediction's size besides the gradient.
    assert record.peak_bytes["chain"] >= 3 * 4 * elements
    assert record.peak_bytes["fused"] >= 4 * elements
    assert record.absent["compiled"] == "not asked for"
    assert "GPU" in record.absent["naive"]


def test_levels_and_draws_stand_in_the_shape():
    (benchmark,) = bench.select(["noise_patchify, 32 x 32, uint8, patch 4, bf16, 4 levels of 2 draws"])
    providers, _ = bench.prepare(benchmark, CPU, 4)
    # As many results as in other rows, of an eighth of the images.
    assert (providers.batch, providers.shape) == (8, "8x32x32x3 to 4x2x8x64x48")


def test_what_is_faster_than_the_fused_operation_is_known(monkeypatch):
    seconds = {"fused": 2.0, "chain": 1.5, "copy": 1.0}
    times = {name: timing.Times([value, 3.0], timing.WALL) for name, value in seconds.items()}
    monkeypatch.setattr(bench, "measure", lambda functions, *_, **__: {name: times[name] for name in functions})
    (record,) = bench.run("cpu", ["attack_step, 32 x 32, fp32"], 1, compile=False)
    assert record.ratios == {"chain": 0.75}
    assert record.faster == ["chain"]
    seconds["chain"] = times["chain"].seconds[0] = 2.0
    (record,) = bench.run("cpu", ["attack_step, 32 x 32, fp32"], 1, compile=False)
    assert record.faster == []


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("attack_step", lambda right: right * (1 + 1e-3)),
        ("decode_patches", lambda right: torch.where(torch.arange(right.shape[-1]) == 3, torch.nan, right)),
        ("noise_patchify", lambda right: right.flip(1)),
        ("patch_loss", lambda right: right * 1.0001),
    ],
)
def test_a_wrong_operation_is_named_and_never_timed(monkeypatch, operation, wrong):
    function = getattr(kernels, operation)
    monkeypatch.setattr(kernels, operation, lambda *args, **kwargs: wrong(function(*args, **kwargs)))
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("timed all the same"))
    with pytest.raises(bench.WrongResultError, match=f"^{operation}, 32 x 32, .*no time is given"):
        bench.run("cpu", [f"{operation}, 32 x 32"], 1, compile=False)


def test_a_wrong_gradient_is_refused():
    right = (torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    exact, errors = tuple(value.double() for value in right), (1e-5, 1e-5)
    assert bench.check("case", right, exact, errors) == 0
    with pytest.raises(bench.WrongResultError, match="case: the gradient 1 is off by"):
        bench.check("case", (right[0], right[1] * 1.001), exact, errors)
    with pytest.raises(bench.WrongResultError, match=r"has shape \(2,\), the definition's \(3,\)"):
        bench.check("case", (right[0], right[1][:2]), exact, errors)
    # One rounding of bfloat16 is allowed, two per cent are not.
    pi = (torch.tensor([math.pi], dtype=torch.float64),)
    bench.check("case", (torch.tensor([math.pi]).bfloat16(),), pi, (1e-5,))
    with pytest.raises(bench.WrongResultError):
        bench.check("case", (torch.tensor([3.2]).bfloat16(),), pi, (1e-5,))


def test_without_a_compiler_the_record_says_so(monkeypatch):
    def broken(*_, **__):
        def call(**_):
            raise RuntimeError("no working C++ compiler\nwas found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    (record,) = bench.run("cpu", ["attack_step, 32 x 32, fp32"], 1, seconds=0.01)
    assert record.absent["compiled"] == "RuntimeError: no working C++ compiler"
    assert "compiled" not in record.ratios


def test_compiled_chain_is_compared():
    """With a compiler; the first case of the cheapest operation."""
    if noise_backend() != "compiled":
        pytest.skip("no C++ compiler")
    (record,) = bench.run("cpu", ["attack_step, 32 x 32, fp32"], 1, seconds=0.01)
    assert record.ratios["compiled"] > 0
    assert record.peak_bytes["compiled"] == 16 * 3 * 32 * 32 * 4  # one kernel, nothing but its output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"only": ["patch_los,"]},
            r"no case has 'patch_los,' in its name; these are the cases:\n  attack_step, 224 x 224",
        ),
        ({"device": "meta"}, "device must be cpu or cuda, got meta"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"cold": True}, "L2 cache of a GPU and the device is cpu"),
        pytest.param(
            {"device": "cuda"},
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**{"device": "cpu", **arguments})


def test_names_tell_benchmarks_apart():
    names = [benchmark.name for benchmark in bench.BENCHMARKS]
    assert len(set(names)) == len(names)
    assert sorted({benchmark.operation for benchmark in bench.BENCHMARKS}) == OPERATIONS
    assert bench.select([]) == list(bench.BENCHMARKS)
    assert {benchmark.side for benchmark in bench.select(["32 x 32"])} == {32}


@pytest.mark.slow
def test_pytest_benchmark_ranks_the_providers_of_one_case(tmp_path):
    words = ["-p", "no:cacheprovider", "-q", "--benchmark-only", f"--benchmark-json={tmp_path / 'records.json'}"]
    chosen = "attack_step and 32 and not compiled and not naive"
    suite = Path(__file__).parents[2] / "benchmarks" / "suites" / "test_kernels.py"
    # In a worker of pytest-xdist the suite would measure nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "-m", "pytest", suite, *words, "-k", chosen]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    groups: dict[str, list[str]] = {}
    for record in json.loads((tmp_path / "records.json").read_text())["benchmarks"]:
        groups.setdefault(record["group"], []).append(record["params"]["provider"])
    names = {benchmark.name for benchmark in bench.select(["attack_step, 32"])}
    assert names <= set(groups)
    assert all(sorted(providers) == ["chain", "fused"] for providers in groups.values())
