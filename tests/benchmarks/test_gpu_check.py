"""`make gpu-check` where there is no GPU: its parts on the CPU at tiny sizes, its processes, its report."""

import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from denim import kernels
from denim.benchmarks import baselines, gpu_check, gpu_models, gpu_operators, gpu_picture, gpu_runs
from denim.benchmarks import kernels as bench
from denim.benchmarks.cases import OPERATIONS
from denim.benchmarks.gpu_check import Part
from denim.benchmarks.gpu_rows import SIZES, Row
from denim.kernels import noise_words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PARTS = {part.name: part for stage in gpu_check.stages() for part in stage}
# What a machine with torch, triton and timm need not have.
MISSING = (
    *("tyro", "rich", "sklearn", "statsmodels", "matplotlib", "tensorboard", "scipy", "hypothesis", "pytest"),
    *("nvidia.dali", "xformers", "foolbox"),
)

BARE = """
import importlib, json, sys
from pathlib import Path
from benchmarks import gpu_check

if __name__ == "__main__":
    links, out = Path(sys.argv[1]), Path(sys.argv[2])
    gpu_check.use_repository(links)
    rows = {}
    for part in (part for stage in gpu_check.stages() for part in stage):
        module, name = part.function.split(":")
        function = getattr(importlib.import_module(module), name)
        rows[part.name] = [vars(row) | {"passed": row.passed} for row in function("cpu", "tiny", *part.arguments)]
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("denim.") and module.__file__]
    (out / "rows.json").write_text(json.dumps({"rows": rows, "files": files}))
    one = [part for part in gpu_check.stages()[0] if part.name == "attack start"]
    passed, _ = gpu_check.check([one], "cpu", "tiny", out)
    sys.exit(not passed)
"""


def environment(**more: str) -> dict[str, str]:
    names = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return names | {"OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"} | more


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[dict, dict, Path]:
    """All parts at tiny sizes, and one of them as a process, where the packages of MISSING cannot be imported."""
    folder = tmp_path_factory.mktemp("bare")
    missing = folder / "missing"
    for name in MISSING:
        package = missing.joinpath(*name.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            "raise ModuleNotFoundError(f'not on this machine: {__name__}', name=__name__)"
        )
    (folder / "bare.py").write_text(BARE)
    done = subprocess.run(
        [sys.executable, folder / "bare.py", folder / "links", folder],
        env=environment(PYTHONPATH=os.pathsep.join([str(missing), str(ROOT)])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((folder / "rows.json").read_text())
    assert written["files"]
    for file in written["files"]:
        assert Path(file).is_relative_to(folder / "links"), file  # not from an installed denim
    return written["rows"], json.loads((folder / "report.json").read_text()), folder


@pytest.mark.parametrize("name", PARTS)
def test_parts_pass_on_the_cpu_of_a_bare_machine(bare, name):
    rows = bare[0][name]
    assert [row for row in rows if not row["passed"]] == []
    if name == "instructions":  # the CPU has none of them
        assert rows == []
    else:
        assert rows[0]["limit"] is not None  # a check before any number


def test_every_patch_size_and_dtype_is_compared(bare):
    for name in ("noise patchify", "patch loss", "decode patches"):
        seen = " ".join(row["what"] for row in bare[0][name])
        assert all(f"patch {size}," in seen for size in SIZES["tiny"].patch_sizes)
        assert all(dtype in seen for dtype in ("fp32", "fp16", "bf16"))
        assert "gradient" in seen
    for operation in ("noise_patchify", "patch_loss", "decode_patches"):
        assert {case.patch for case in OPERATIONS[operation]} <= set(SIZES["full"].patch_sizes)
    assert SIZES["full"].words == 1 << 32


def test_every_operation_has_a_part():
    operations = {part.arguments for part in PARTS.values() if part.arguments}
    assert operations == {(name,) for name in OPERATIONS}


def test_pretraining_says_what_it_measured(bare):
    rows = {row["what"]: row for row in bare[0]["pretraining"]}
    assert rows["pretraining, Denim"]["unit"] == "images/s"
    # No peak is known of this device, so no utilisation is claimed.
    for name in ("Denim", "good eager", "published eager", "good, compiled"):
        assert rows[f"pretraining, {name}"]["value"] > 0
        assert "not in the table" in rows[f"pretraining, {name}: achieved"]["note"]
    assert not any("utilisation" in name for name in rows)


@pytest.mark.parametrize(("name", "unit"), [("sweep", "noisy images/s"), ("attack", "draws/s")])
def test_one_batch_is_timed_beside_loops(bare, name, unit):
    timed = [row["what"] for row in bare[0][name] if row["unit"] == unit]
    assert [what.partition(", ")[2] for what in timed] == [
        "Denim in one batch, bf16",
        "looped eager fp32",
        "Denim in one batch, compiled bf16",
        "looped compiled bf16",
    ]


def test_what_cannot_run_on_a_bare_machine_says_why(bare):
    (row,) = bare[0]["pretraining run"]
    assert "not installed: rich, scipy, tensorboard" in row["note"]
    assert not (bare[2] / "report.png").exists()  # no matplotlib


def test_a_part_ran_as_a_process(bare):
    (part,) = bare[1]["parts"]
    assert (part["status"], bare[1]["passed"]) == ("passed", True)
    assert len(part["rows"]) == len(bare[0][part["arguments"][0].replace("_", " ")])


def failed(name: str) -> list[str]:
    module, function = PARTS[name].function.split(":")
    rows = getattr(importlib.import_module(module), function)("cpu", "tiny", *PARTS[name].arguments)
    return [row.what for row in rows if not row.passed]


def test_no_graph_of_an_earlier_pass_is_alive_during_a_capture(monkeypatch):
    """Its AccumulateGrad nodes would belong to another stream. The capture is played on the CPU."""

    def attached() -> set[int]:
        objects = (one for one in gc.get_objects() if type(one) is torch.Tensor)  # not the fakes of torch.compile
        return {id(one) for one in objects if one.grad_fn is not None}

    found, before = [], attached()

    def capture(device, function):
        found.append(attached() - before)
        result = function()

        def replay() -> None:
            for written, value in zip(result, function(), strict=True):
                written.copy_(value)

        return replay, result

    monkeypatch.setattr(gpu_models, "_capture", capture)
    rows = list(gpu_models.compiled_and_captured("cpu", "tiny"))
    assert found == [set(), set()]
    replayed = [row for row in rows if "captured" in row.what]
    assert len(replayed) == 2 * 3 * 2  # eager and compiled, three draws, loss and gradients
    assert [row.what for row in rows if not row.passed] == []


def test_a_capture_follows_three_calls_on_a_stream_beside(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def within(what):
        said.append(f"begin {type(what).__name__}")
        yield
        said.append(f"end {type(what).__name__}")

    for name, fake in {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "stream": within,
        "CUDAGraph": Graph,
        "graph": within,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay, result = gpu_models._capture("cuda", lambda: said.append("call") or 7)
    replay()
    assert result == 7
    warm = ["side waits for current", "begin Stream", "call", "call", "call", "end Stream", "current waits for side"]
    assert said == [*warm, "begin Graph", "call", "end Graph", "replay"]
    assert gpu_models._capture("cpu", said.clear) is None


def altered(name: str, change):
    real = getattr(kernels, name)
    return lambda *args, **kwargs: change(real, *args, **kwargs)


WRONG = {
    "noise_patchify: a level off by a thousandth": (
        *("noise patchify", "noise_patchify"),
        lambda real, sigma, **given: real(sigma=sigma * 1.001, **given),
    ),
    "noise_patchify: rows and columns exchanged": (
        *("noise patchify", "noise_patchify"),
        lambda real, *args, **options: real(*args, **options).flip(-2),
    ),
    "noise_patchify: memory not written": (
        *("noise patchify", "noise_patchify"),
        lambda real, *args, **options: real(*args, **options).index_fill(-1, torch.tensor(1), float("nan")),
    ),
    "patch_loss: a ten-thousandth off": (
        *("patch loss", "patch_loss"),
        lambda real, *args, **options: real(*args, **options) * 1.0001,
    ),
    "patch_loss: another gradient, the same value": (
        *("patch loss", "patch_loss"),
        lambda real, *args, **options: (loss := real(*args, **options)) * 1.02 - 0.02 * loss.detach(),
    ),
    "decode_patches: a ten-thousandth off": (
        *("decode patches", "decode_patches"),
        lambda real, *args, **options: real(*args, **options) * 1.0001,
    ),
    "decode_patches: normalised by the wrong statistics": (
        *("decode patches", "decode_patches"),
        lambda real, *args, normalize, **options: real(
            *args, normalize=normalize and (options["mean"], options["std"]), **options
        ),
    ),
    "attack_step: another radius": (
        *("attack step", "attack_step"),
        lambda real, epsilon, **given: real(epsilon=epsilon * 1.02, **given),
    ),
    "attack_step: NaN taken for no step": (
        *("attack step", "attack_step"),
        lambda real, gradient, **given: real(gradient=gradient.nan_to_num(0), **given),
    ),
    "attack_start: other words": (
        *("attack start", "attack_start"),
        lambda real, seeds, **given: real(seeds=seeds ^ 1, **given),
    ),
    "attention: another scale in one backend": (
        *("attention", "attention"),
        lambda real, query, key, value, backend: real(
            query * (1.05 if backend == "sdpa" else 1), key, value, backend=backend
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_fails_its_part(monkeypatch, name):
    part, operator, change = WRONG[name]
    assert failed(part) == []
    monkeypatch.setattr(kernels, operator, altered(operator, change))
    assert failed(part)


def test_wrong_noise_fails(monkeypatch):
    real = gpu_operators.normal_noise
    monkeypatch.setattr(gpu_operators, "normal_noise", lambda seeds, shape: real(seeds, shape) + 1.5e-5)
    assert failed("generator") == ["largest error of 16384 normals of `normal_noise`"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def hungry(device, size, batch):
        tried.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError("too much")
        yield Row("images/s", 1)

    def late(device, size, batch):
        yield Row("images/s", 1)
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(gpu_models, "_pretraining", late)
    with pytest.raises(torch.OutOfMemoryError):  # what was yielded is not yielded twice
        list(gpu_models.pretraining("cpu", "tiny"))
    monkeypatch.setattr(gpu_models, "_pretraining", hungry)
    fits = 1
    assert len(list(gpu_models.pretraining("cpu", "tiny"))) == 1
    assert tried == [4, 2, 1]
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(gpu_models.pretraining("cpu", "tiny"))


def test_a_step_that_does_not_fit_is_said_and_ends_nothing():
    def step():
        raise torch.OutOfMemoryError("too much")

    (row,) = gpu_models._speed("cpu", "a step", step, 4, "images/s", 2)
    assert (row.what, row.unit, row.passed) == ("a step: does not fit into memory", "", True)


def test_two_runs_that_differ_are_found(monkeypatch):
    assert failed("two equal runs") == []
    calls = itertools.count()
    monkeypatch.setattr(
        kernels, "attack_step", altered("attack_step", lambda real, **given: real(**given) + 1e-6 * next(calls))
    )
    (what,) = failed("two equal runs")
    assert what.startswith("attack_step: elements that differ between two runs")


@pytest.mark.parametrize("name", ["sweep", "attack"])
def test_a_loop_that_computes_something_else_is_not_compared(monkeypatch, name):
    monkeypatch.setattr(
        baselines, "decoded_pixels", lambda *args, real=baselines.decoded_pixels, **given: real(*args, **given).flip(-1)
    )
    assert "logits of the loop against Denim's on the same noise, fp32" in failed(name)


def test_the_sanitizer_runs_every_operator(monkeypatch, tmp_path):
    assert [row.note for row in gpu_runs.sanitizer("cpu", "tiny")] == ["not installed; the CUDA toolkit has it"]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/seen\nshift 4\n"$@" || exit\necho ===== ERROR SUMMARY\nexit $STATUS\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for status in (0, 9):
        monkeypatch.setenv("STATUS", str(status))
        (row,) = gpu_runs.sanitizer("cpu", "tiny")
        assert (row.value, row.passed, row.note) == (status, status == 0, "===== ERROR SUMMARY")
    assert (tmp_path / "seen").read_text().startswith("--tool memcheck --error-exitcode 9 ")


def test_pretraining_is_run_killed_and_resumed():
    rows = {row.what: row for row in gpu_runs.pretraining_run("cpu", "tiny")}
    assert [row.what for row in rows.values() if not row.passed] == []
    assert rows["torch: through the loader"].value > 0
    # It was killed before its end, and has gone on from there to the same bits.
    assert rows["resumed: updates that were logged before it was killed"].value < SIZES["tiny"].updates
    assert rows["resumed: weights that differ from those of the whole run"].limit == 0


def test_the_picture_shows_speeds_of_models_and_shares_of_kernels(tmp_path):
    pytest.importorskip("matplotlib")
    assert not gpu_picture.draw([Part("fake_parts:good", 60)], tmp_path / "report.png")
    part = Part("denim.benchmarks.gpu_models:sweep", 60)
    part.rows = [
        Row("sweep, looped", 10, "noisy images/s"),
        Row("k, forward: speed of a copy", 80, "%"),
        Row("a check", 0, limit=1),
    ]
    titles, bars = zip(*gpu_picture.panels([part]), strict=True)
    assert bars == ([("looped", 10)], [("k, forward", 80)])
    assert titles[0] == "De³ sweep, noisy images/s"
    assert gpu_picture.draw([part], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "](report.png)" in gpu_check.markdown({}, [part], True)


def test_numbers_of_several_kernels_have_a_line_each():
    kernels_ = [f"kernel {k}" for k in range(4)]
    rows = [Row(f"{name}: {what}", 2.5, "ms") for name in kernels_ for what in ("time", "chain", "naive")][:-1]
    header, _, *lines = gpu_check._numbers(rows)
    assert header == "| | time | chain | naive | note |"
    assert lines[0] == "| kernel 0 | 2.5 ms | 2.5 ms | 2.5 ms |  |"
    assert lines[3] == "| kernel 3 | 2.5 ms | 2.5 ms |  |  |"
    assert gpu_check._numbers([Row("a speed", 5, "images/s")])[2] == "| a speed | 5 images/s |  |"


FAKE = """
import json, os, subprocess, time
from denim.benchmarks.gpu_rows import Row

def good(device, sizes):
    yield Row("a check", 1.0, limit=2.0)
    yield Row("a speed", 5.0, "images/s", note="a | b")

def wrong(device, sizes):
    yield Row("good check", 1.0, limit=2.0)
    yield Row("bad check", 3.0, limit=2.0)
    yield Row("later check", float("nan"), limit=2.0)
    yield Row("a speed", 5.0, "images/s")

def raises(device, sizes):
    yield Row("a check", 1.0, limit=2.0)
    raise RuntimeError(f"broken on {device} at {sizes}")

def crashes(device, sizes):
    yield Row("a check", 1.0, limit=2.0)
    os._exit(7)

def hangs(device, sizes):
    yield Row("a check", 1.0, limit=2.0)
    yield Row("its child", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)

def reads_itself(device, sizes):
    yield Row("a check", 1.0, limit=2.0)
    for _ in range(300):
        time.sleep(0.1)
        yield Row("another row", 0)
        parts = json.load(open(os.environ["REPORT"]))["parts"]
        if any(part["rows"] for part in parts if part["function"] == "fake_parts:reads_itself"):
            return
    yield Row("rows in the report while the part runs", 0, limit=-1)

def second_stage(device, sizes):
    report = json.load(open(os.environ["REPORT"]))
    yield Row("parts already in the report", sum(part["status"] != "not run" for part in report["parts"]), limit=5)
"""


def ended(pid: int) -> bool:
    """Whether a process has ended. Where nobody has waited for it, a zombie is left."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def faked(tmp_path_factory) -> tuple[bool, dict[str, Part], Path, str]:
    folder = tmp_path_factory.mktemp("faked")
    (folder / "fake_parts.py").write_text(FAKE)
    first = [Part(f"fake_parts:{name}", 60) for name in ("good", "wrong", "raises", "crashes")]
    second = [
        [Part("fake_parts:second_stage", 60)],
        [Part("fake_parts:reads_itself", 60)],
        [Part("fake_parts:good", 0)],
    ]
    plan = [[*first, Part("fake_parts:hangs", 8)], *second]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("REPORT", str(folder / "out" / "report.json"))
        passed, parts = gpu_check.check(plan, "cpu", "tiny", folder / "out")
    return passed, {part.function.split(":")[1]: part for part in reversed(parts)}, folder / "out"


def test_parts_fail_alone(faked):
    passed, parts, _ = faked
    assert not passed
    assert {name: part.status for name, part in parts.items()} == {
        "good": "passed",
        "wrong": "failed",
        "raises": "failed",
        "crashes": "crashed",
        "hangs": "out of time",
        "second_stage": "passed",
        "reads_itself": "passed",
    }
    assert "RuntimeError: broken on cpu at tiny" in parts["raises"].error
    assert "Traceback" in parts["raises"].error
    assert "exit code 7" in parts["crashes"].error
    # What was found before is kept.
    assert all(parts[name].rows for name in parts)
    assert 7 < parts["hangs"].took < 40
    # And what it had started has ended with it.
    assert ended(int(parts["hangs"].rows[1].value))


def test_no_number_after_a_failed_check(faked):
    _, parts, _ = faked
    assert [row.what for row in parts["good"].rows] == ["a check", "a speed"]
    assert [row.what for row in parts["wrong"].rows] == ["good check", "bad check", "later check"]
    assert [row.passed for row in parts["wrong"].rows] == [True, False, False]


def test_the_report_grows_with_every_part(faked):
    """The second stage read it: five parts of the first stage were there."""
    _, parts, _ = faked
    assert [row.value for row in parts["second_stage"].rows] == [5]


def test_report(faked):
    _, _, out = faked
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert report["passed"] is False
    assert report["facts"]["versions"]["torch"] == torch.__version__
    assert report["facts"]["commit"] is None or len(report["facts"]["commit"].split()[0]) == 40
    by_name = {part["function"]: part for part in report["parts"]}
    assert by_name["fake_parts:wrong"]["rows"][2]["value"] == "nan"
    # A part whose time was up before it began is told from one that failed, and the whole has not passed.
    assert report["parts"][-1]["status"] == "not run"
    text = (out / "report.md").read_text()
    assert "| good | passed | 1 of 1 |" in text
    assert "| wrong | failed | 1 of 3 |" in text
    assert "| a speed | 5 images/s | a \\| b |" in text
    assert "| bad check | 3 | 2 |  |" in text
    assert "RuntimeError: broken on cpu at tiny" in text
    assert "## hangs: out of time" in text
    assert "3 of 8 parts passed, 7 have ended." in text


TERMINATED = """
import sys
from pathlib import Path
import torch
from benchmarks import gpu_check

if __name__ == "__main__":
    torch.cuda.is_available = lambda: True
    gpu_check.facts = lambda device: {}
    gpu_check.use_repository = lambda: None
    gpu_check.EVERY = 0.0
    gpu_check.stages = lambda: [[gpu_check.Part("fake_parts:hangs", 600)]]
    sys.exit(gpu_check.main(["--out", sys.argv[1]]))
"""


def test_a_request_to_stop_ends_the_parts(tmp_path):
    (tmp_path / "fake_parts.py").write_text(FAKE)
    (tmp_path / "run.py").write_text(TERMINATED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path], env=environment(PYTHONPATH=path))
    report = tmp_path / "report.json"
    try:
        rows: list[dict] = []
        while len(rows) < 2:  # the part's own limit ends this, however busy the machine is
            time.sleep(0.1)
            assert process.poll() is None, rows
            rows = json.loads(report.read_text())["parts"][0]["rows"] if report.exists() else []
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert ended(int(rows[1]["value"]))


def test_nothing_starts_after_the_deadline(tmp_path):
    passed, parts = gpu_check.check([[Part("fake_parts:good", 60)]], "cpu", "tiny", tmp_path, seconds=0)
    assert not passed
    assert parts[0].status == "not run"


def test_the_plan_fits_into_nine_minutes():
    """What is last may be cut short by the deadline; what comes before has its whole time in any case."""
    *before, _ = (max(part.seconds for part in stage) for stage in gpu_check.stages())
    assert sum(before) <= gpu_check.DEADLINE - 45
    assert gpu_check.DEADLINE + 10 < 540


def test_the_page_has_every_part_and_its_limit():
    lines = (ROOT / "docs" / "gpu-check.md").read_text().splitlines()
    shown = {cells[1].strip(): cells[-2].strip() for line in lines if len(cells := line.split("|")) == 5}
    expected = {part.name: f"{part.seconds:.0f}" for part in PARTS.values() if not part.arguments}
    operations = {f"{part.seconds:.0f}" for part in PARTS.values() if part.arguments}
    expected["one part for each operation"] = operations.pop()
    assert {name: shown.get(name) for name in expected} == expected
    assert not operations


def test_the_timed_cases_exist():
    for size in SIZES.values():
        for word, _ in size.timed:
            assert bench.select([word])


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    output = tmp_path_factory.mktemp("interpreter") / "got.pt"
    script = Path(__file__).parent / "interpreter_instructions.py"
    done = subprocess.run(
        [sys.executable, script, output], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(output, weights_only=True)


def test_words_of_the_kernels(interpreted):
    assert torch.equal(interpreted["words"], noise_words(torch.tensor([0, -1, 2**63 - 1, 5]), 1200))


@pytest.mark.parametrize("place", ["u = 0", "u = 1/2", "series", "u = 1"])
def test_measured_errors_are_those_of_float32_functions(interpreted, place):
    """numpy's are good to about a unit in the last place; a wrong float64 definition would be off by far more."""
    worst = interpreted[place]
    assert worst["lg2"][0] < 2.0**-22
    for name in ("cos", "sin"):
        assert worst[name][0] < 2.0**-23
    # The angle itself, up to pi, is rounded twice.
    for name in ("cosine of the angle", "sine of the angle"):
        assert worst[name][0] < 2.0**-21
    assert 0 < worst["radius"][0] < 1e-6
    assert interpreted[f"{place}, normals"][0] < 2e-6


def test_lg2_is_not_measured_where_the_series_replaces_it(interpreted):
    assert interpreted["u = 1"]["lg2"][0] == 0
    assert interpreted["series"]["lg2"][0] > 0


def test_one_wrong_word_is_found(interpreted):
    worst = interpreted["erring"]
    # Relative to the result outside of (1/2, 2), as the instruction's bound is; float32 rounds it once more.
    assert worst["lg2"] == (pytest.approx(-1 / math.log2((100 + 0.5) * 2.0**-32), rel=1e-5), 100)
    assert worst["cos"] == (pytest.approx(2.0**-6, rel=1e-4), 200)
    assert worst["cosine of the angle"] == (pytest.approx(2.0**-6, rel=1e-4), 200)
    assert math.isnan(worst["sin"][0])
    assert worst["sin"][1] == 300
    assert worst["radius"][1] == 100
    # At the angle of word 200 the wrong cosine counts with the largest radius, that of the first of the words.
    radius = math.sqrt(-2 * math.log((4096 + 0.5) * 2.0**-32))
    assert interpreted["erring, normals"] == (pytest.approx(2.0**-6 * radius, rel=1e-4), 4096)
    assert math.isnan(interpreted["erring, one angle"][0])
