"""The baselines, counted: what each operation of eager PyTorch moves, and the kernels of `torch.compile`."""

import concurrent.futures
import multiprocessing

import pytest
import torch

inductor = pytest.importorskip(
    "denim.benchmarks.machine_code.inductor", reason="Triton is a dependency on Linux x86-64 alone"
)


@pytest.fixture
def run_in_process():
    """Calls a function in a process of its own: this one's Triton is not told of a GPU."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        yield lambda function, *given: pool.submit(function, *given).result()


def test_eager_traffic_is_what_each_operation_reads_and_writes():
    def chain(x, scale):
        planes = x.permute(0, 2, 1)  # a view
        return (planes.float() * scale[:, None, None]).reshape(2, -1)  # and a copy

    x = torch.empty(2, 3, 4, dtype=torch.uint8, device="meta")
    scale = torch.empty(2, device="meta", requires_grad=True)
    got = inductor.eager(chain, [x, scale], images=2)
    cast, multiply, copied = 24 * (1 + 4), 24 * 4 * 2 + 8, 24 * 4 * 2
    assert got["forward"] == {"kernels": 3, "moved": (cast + multiply + copied) / 2}
    # Of the product: the gradient times the pixels, and the sum over them.
    assert got["backward"]["kernels"] >= 2


@pytest.mark.skipif(inductor.unavailable() is not None, reason=str(inductor.unavailable()))
def test_compiled_attack_step_is_one_kernel_that_moves_the_same_bytes(run_in_process):
    kinds = run_in_process(inductor._count_baselines, "attack_step, fp32")["forward"]
    (kernel,) = kinds["compiled"]
    pixels = 3 * 224 * 224 * 4
    # Pixels, origin and gradient in, pixels out, and the sizes of 64 samples; eager writes what it reads again.
    assert kernel["moved"] == pytest.approx(4 * pixels, rel=1e-4)
    assert kinds["eager"]["moved"] > 3 * kernel["moved"]
    assert 5 < kernel["instructions"] < 50
    assert kernel["stores"] == {"16": 2}


@pytest.mark.skipif(inductor.unavailable() is not None, reason=str(inductor.unavailable()))
@pytest.mark.parametrize("place", [1, 2])
def test_baselines_with_several_levels_and_with_a_gradient(run_in_process, place):
    """The first has no naive kernel, which would run once for each level; in the second, torch asks for a GPU early."""
    case = inductor.COMPARED[place]
    counted = run_in_process(inductor._count_baselines, f"{case.operation}, {case.name}")
    assert ("naive" in counted["forward"]) == (case.outer == 1)
    assert all(kinds["compiled"] for kinds in counted.values())
