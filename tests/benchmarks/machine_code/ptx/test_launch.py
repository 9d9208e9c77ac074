"""Triton's own launches, compiled for GPUs that are not here and executed on CPU tensors."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch

from denim.benchmarks.machine_code import run_on_cpu
from denim.benchmarks.machine_code.ptx.launch import execute
from denim.benchmarks.machine_code.ptx.traps import Misaligned, OutOfBounds, Race, StoredTwice, UnknownInstruction

triton = pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
tl = pytest.importorskip("triton.language")
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction
driver = pytest.importorskip("triton.runtime").driver


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def copy_without_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@triton.jit
def copy_of_what_is_called_aligned(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(tl.multiple_of(x + i, 16)))


@triton.jit
def sums(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    i = tl.arange(0, BLOCK)
    tl.store(out + row, tl.sum(tl.load(x + row * columns + i, mask=i < columns, other=0.0)))


@triton.jit
def combine(scales, x, y, out, flag, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.load(x + i).to(tl.float32) * scales[0]
    if y is not None:
        total += tl.load(y + i) * scales[1]
    if flag:
        total += offset
    tl.store(out + i, total)


@triton.jit
def at_the_same_place(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def count(out):
    tl.atomic_add(out, 1)


@triton.jit
def product(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + place)
    tl.store(out + place, tl.dot(tile, tile))


@triton.jit
def swap(out):
    tl.atomic_cas(out, 0, 1)


@triton.jit
def merged(mean, squares, count, other_mean, other_squares, other_count):
    total = count + other_count
    step = (other_mean - mean) * (other_count / total)
    return mean + step, squares + other_squares + (other_mean - mean) * step * count, total


@triton.jit
def mean_and_squares(x, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    values = tl.load(x + place)
    mean, squares, _ = tl.reduce((values, tl.zeros_like(values), tl.full(values.shape, 1.0, tl.float32)), 1, merged)
    row = tl.arange(0, ROWS)
    tl.store(out + row, mean)
    tl.store(out + ROWS + row, squares)


CAPABILITIES = (80, 90, 100)


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        *((torch.float32, capability) for capability in CAPABILITIES),
        *((dtype, 90) for dtype in (torch.bfloat16, torch.uint8, torch.int64, torch.float64)),
    ],
)
def test_copies_are_equal_and_nothing_else_is_touched(dtype, capability):
    x = (torch.randn(1000) * 100).to(dtype)
    memory = torch.zeros(1100, dtype=dtype)
    with run_on_cpu(capability) as launches:
        copy[(4,)](x, memory[50:1050], 1000, BLOCK=256)
    assert torch.equal(memory[50:1050], x)
    assert not memory[:50].any()
    assert not memory[1050:].any()
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.threads) == ("copy", (4,), 128)
    assert launch.warp_instructions > 4 * 4 * 5
    assert f"sm_{capability}" in launch.ptx


def test_a_store_without_its_mask_is_trapped():
    x = torch.randn(1000)
    with (
        run_on_cpu(),
        pytest.raises(OutOfBounds, match=r"out \(1000,\) \+ 4000.*copy_without_mask, test_launch\.py:\d+"),
    ):
        copy_without_mask[(4,)](x, torch.empty(1024)[:1000], 1000, BLOCK=256)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_through_shuffles_and_shared_memory(capability, warps):
    x = torch.randn(6, 700)
    out = torch.empty(6)
    with run_on_cpu(capability):
        sums[(3, 2)](x, out, 700, BLOCK=1024, num_warps=warps)
    torch.testing.assert_close(out.double(), x.double().sum(1), rtol=0, atol=700 * 2.0**-24 * 40)


def test_lanes_that_merge_the_same_parts_in_another_order_store_other_bits():
    """As the kernels of torch.compile do: a race, of numbers that differ by rounding. Only `execute` allows it."""
    x, out = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), torch.empty(2, 16)
    with run_on_cpu():
        with pytest.raises(Race, match=r"two threads write shared memory.*kernel mean_and_squares"):
            mean_and_squares[(1,)](x, out, ROWS=16, COLS=32)
        compiled = mean_and_squares.warmup(x, out, ROWS=16, COLS=32, grid=(1,))
    execute(compiled, {"x": x, "out": out}, (1,), unordered=True)
    exact = x.double()
    # Some five roundings of partial results in each of five steps.
    torch.testing.assert_close(out[0].double(), exact.mean(1), rtol=0, atol=25 * 2.0**-24)
    torch.testing.assert_close(out[1].double(), 31 * exact.var(1), rtol=25 * 2.0**-24, atol=0)


def test_arguments_of_all_kinds():
    x, y, out = torch.randn(32).half(), torch.randn(32), torch.empty(32)
    with run_on_cpu():
        combine[(1,)]((2.0, 3.0), x, y, out, True, -5, BLOCK=32)
        torch.testing.assert_close(out, x.float() * 2 + y * 3 - 5)
        combine[lambda meta: (meta["BLOCK"] // 32,)](
            scales=(2.0, 3.0), x=x, y=None, out=out, flag=False, offset=1, BLOCK=32
        )
        torch.testing.assert_close(out, x.float() * 2)


def test_strided_tensors_may_be_accessed_between_their_first_and_last_element():
    memory = torch.arange(100.0)
    out = torch.empty(50)
    with run_on_cpu():
        copy[(1,)](memory[10:60:7], out[:50], 50, BLOCK=64)
        assert torch.equal(out[:43], memory[10:53])
        with pytest.raises(OutOfBounds, match=r"x \(8,\) \+ 200, which has 200 bytes"):
            copy[(1,)](memory[10:60:7], out, 51, BLOCK=64)


def test_bases_that_are_not_aligned_get_narrower_accesses():
    memory, out = torch.randn(1009), torch.empty(1009)
    with run_on_cpu() as launches:
        copy[(2,)](memory[:1008], out[:1008], 1008, BLOCK=512)
        copy[(2,)](memory[1:], out[1:], 1008, BLOCK=512)
    assert torch.equal(out[1:], memory[1:])
    wide, narrow = (launch.ptx for launch in launches)
    assert "ld.global.v2" in wide or "ld.global.v4" in wide
    assert "ld.global.v" not in narrow


def test_a_false_promise_of_alignment_is_trapped():
    memory, out = torch.randn(257), torch.empty(256)
    with run_on_cpu():
        copy_of_what_is_called_aligned[(1,)](memory[:256], out, BLOCK=256, num_warps=1)
        with pytest.raises(Misaligned, match="copy_of_what_is_called_aligned"):
            copy_of_what_is_called_aligned[(1,)](memory[1:], out, BLOCK=256, num_warps=1)


def test_some_programs_alone():
    x, out = torch.randn(1000), torch.zeros(1000)
    with run_on_cpu(programs=lambda total: [1, total - 1]) as launches:
        copy[(4,)](x, out, 1000, BLOCK=256)
    assert torch.equal(out[256:512], x[256:512])
    assert torch.equal(out[768:], x[768:])
    assert not out[:256].any()
    everything = sum(launch.warp_instructions for launch in launches) * 2
    with run_on_cpu() as launches:
        copy[(4,)](x, torch.empty(1000), 1000, BLOCK=256)
    assert launches[0].warp_instructions == everything


def test_two_programs_at_one_place_are_trapped():
    with run_on_cpu(), pytest.raises(StoredTwice, match=r"out .*stored by two threads"):
        at_the_same_place[(2,)](torch.empty(1, dtype=torch.int32))


def test_what_the_machine_does_not_know_is_named():
    with run_on_cpu(), pytest.raises(UnknownInstruction, match=r"kernel count.*atom"):
        count[(2,)](torch.zeros(1, dtype=torch.int32))


def test_compare_and_swap_is_named():
    with run_on_cpu(), pytest.raises(UnknownInstruction, match=r"kernel swap.*atom"):
        swap[(2,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_matrix_products_are_named(capability):
    """Before anything runs: the result is as it was."""
    x, out = torch.ones(32, 32, dtype=torch.bfloat16), torch.full((32, 32), -7.0)
    with (
        run_on_cpu(capability),
        pytest.raises(UnknownInstruction, match=r"kernel product, test_launch\.py:\d+.*(mma|ldmatrix)"),
    ):
        product[(1,)](x, out, SIZE=32)
    assert (out == -7).all()


def test_tensors_elsewhere_are_refused():
    with run_on_cpu(), pytest.raises(ValueError, match="argument x is a tensor on meta; run_on_cpu takes CPU tensors"):
        copy[(1,)](torch.empty(10, device="meta"), torch.empty(10), 10, BLOCK=16)


def test_autotuned_kernels_take_the_configuration_of_fewest_instructions():
    tuned = triton.autotune([triton.Config({"BLOCK": block}, num_warps=4) for block in (32, 1024)], key=["n"])(copy)
    x, out = torch.randn(4096), torch.empty(4096)
    with run_on_cpu() as launches:
        tuned[lambda meta: (4096 // meta["BLOCK"],)](x, out, 4096)
    assert torch.equal(out, x)
    assert tuned.best_config.kwargs["BLOCK"] == 1024
    assert len(launches) == 3  # both were tried, one ran


def test_everything_is_as_before_afterwards():
    before = JITFunction.run, driver._active
    inside = []
    with contextlib.suppress(ZeroDivisionError), run_on_cpu():
        inside = [JITFunction.run, driver._active]
        raise ZeroDivisionError
    assert not set(inside) & set(before)
    assert (JITFunction.run, driver._active) == before


def test_an_interpreting_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"), run_on_cpu():
        pass


def run_example(text, folder, monkeypatch):
    """As a file: Triton reads the source of kernels."""
    name = f"documented_example_{zlib.crc32(text.encode())}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    importlib.import_module(name)
    sys.modules.pop(name)


def test_the_example_in_the_documentation_runs(tmp_path, capsys, monkeypatch):
    text = inspect.getdoc(run_on_cpu)
    example = re.search(r"::\n\n((?:    .*\n|\n)+)", text)[1]
    assert len([line for line in example.splitlines() if line.strip()]) == 10
    imports = "import torch\nimport triton\nimport triton.language as tl\n"
    imports += "from denim.benchmarks.machine_code import run_on_cpu\n"
    run_example(imports + textwrap.dedent(example), tmp_path, monkeypatch)
    assert int(capsys.readouterr().out) > 100


def test_the_example_on_the_page_runs_and_counts(tmp_path, capsys, monkeypatch):
    page = Path(__file__).parents[4] / "docs" / "kernels.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for count, counted in ((1000, (250, 126)), (1024, (128, 128))):  # as the page says
        run_example(example.replace("1000", str(count)), tmp_path, monkeypatch)
        instructions, *sectors, moved = map(int, capsys.readouterr().out.split())
        assert instructions > 100
        assert tuple(sectors) == counted
        assert moved == 2 * count * 4


@pytest.mark.slow
def test_importing_it_imports_no_triton():
    program = "import sys; from denim.benchmarks.machine_code import run_on_cpu; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
