"""Offsets beyond 32 bits, in compiled code: the last programs of launches on tensors that take no memory."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks.machine_code import run_on_cpu
from denim.benchmarks.machine_code.last_program import reserved
from denim.kernels import attack_start, attack_step, noise_patchify
from denim.kernels.dispatch import GPU, launcher

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

LAST = {"programs": lambda total: [total - 1]}


def launched(monkeypatch, operator, *arguments):
    """The last program alone, into memory that is touched nowhere else."""
    _, launch = launcher(operator)
    with monkeypatch.context() as patch, run_on_cpu(90, **LAST):
        patch.setattr(torch, "empty", reserved)
        return launch(*arguments, gpu=GPU("ptx", 32))


@pytest.mark.parametrize("levels", [1, 4])
def test_patches_of_the_last_image_of_many(monkeypatch, levels):
    batch, side, dtype = 16384 // levels, 224, torch.bfloat16
    images = reserved((batch, side, side, 3), dtype=torch.uint8)
    sigma, seeds = torch.full((levels, batch), 70.0), torch.arange(batch)
    images[-1] = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = (16, [0.5] * 3, [0.25] * 3, dtype)
    out = launched(monkeypatch, "noise_patchify", images, sigma, seeds[None], *given)
    assert out.numel() > 2**31
    # The reference on the last image alone, whose noise depends on its seed and not on the batch.
    alone = noise_patchify(
        images[-1:], sigma[:, -1:], seeds[None, -1:], patch_size=16, mean=given[1], std=given[2], dtype=torch.float32
    )
    written = out[-1, 0, -1] != 0
    assert 1000 < written.sum() < 128 * 48 * 3  # one program of 128 runs, and not more
    torch.testing.assert_close(out[-1, 0, -1][written].float(), alone[-1, 0, -1][written], rtol=2.0**-8, atol=1e-4)


def test_steps_of_an_attack_at_the_end_of_long_samples(monkeypatch):
    # The last program of a sample has three elements.
    shape, end = (2, 2**31 + 3), slice(-3, None)
    pixels, origin, gradient = (reserved(shape, dtype=torch.bfloat16) for _ in range(3))
    for k, tensor in enumerate((pixels, origin, gradient)):
        tensor[-1, end] = torch.linspace(0.1 + 0.1 * k, 0.9, 3).bfloat16()
    sizes = torch.tensor([0.1, 0.02]), torch.tensor([0.5, 0.3])
    out = launched(monkeypatch, "attack_step", pixels, origin, gradient, *sizes)
    alone = attack_step(
        pixels[-1:, end], origin[-1:, end], gradient[-1:, end], step_size=sizes[0][1:], epsilon=sizes[1][1:]
    )
    assert torch.equal(out[-1:, end], alone)


def test_the_start_of_an_attack_at_the_end_of_many_samples(monkeypatch):
    batch = 2**30 + 2
    pixels, seeds = reserved((batch, 3), dtype=torch.bfloat16), reserved((batch,), dtype=torch.int64)
    pixels[-1], seeds[-1] = 0.5, -77
    out = launched(monkeypatch, "attack_start", pixels, seeds, torch.tensor(0.25))
    assert torch.equal(out[-1:], attack_start(pixels[-1:], seeds[-1:], epsilon=torch.tensor(0.25)))
