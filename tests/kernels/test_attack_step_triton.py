"""The Triton kernel of `attack_step`: its source in the interpreter, and its machine code built ahead of time."""

import json

import pytest
import torch

from denim.kernels import attack_step

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

# Name: shape, dtypes of pixels, origin and gradient, step size and epsilon per sample. Blocks have 1,024 elements.
CASES = {
    "float32": ((3, 3, 16, 16), torch.float32, torch.float32, torch.float32, True, True),
    "several blocks, the last of one element": ((2, 2049), torch.float32, torch.float32, torch.float32, True, False),
    "odd": ((3, 3, 5, 7), torch.float32, torch.float32, torch.float32, False, True),
    "one block exactly": ((2, 1024), torch.float32, torch.float32, torch.float32, False, False),
    "one sample": ((1, 1, 9, 9), torch.float32, torch.float32, torch.float32, True, True),
    "vector": ((5,), torch.float32, torch.float32, torch.float32, True, True),
    "float16": ((2, 3, 7, 9), torch.float16, torch.float16, torch.float16, True, True),
    "bfloat16": ((2, 3, 7, 9), torch.bfloat16, torch.bfloat16, torch.bfloat16, True, True),
    "mixed": ((2, 3, 7, 9), torch.float32, torch.float16, torch.bfloat16, False, True),
    "mixed, bfloat16 pixels": ((2, 1500), torch.bfloat16, torch.float32, torch.float16, True, False),
    "float64 sizes": ((2, 700), torch.float32, torch.float32, torch.float32, "float64", "float64"),
    "strided": ((2, 8, 6, 3), torch.float32, torch.float32, torch.float32, "strided", True),
    "no sample": ((0, 3, 4, 4), torch.float32, torch.float32, torch.float32, True, False),
}
DISPATCH = {
    "Triton": (torch.float32, torch.bfloat16, 1),
    "float64 pixels": (torch.float64, torch.float32, 0),
    "float64 gradient": (torch.float32, torch.float64, 0),
}


def _size(kind, batch, largest) -> torch.Tensor:
    if kind is False:
        return torch.tensor(largest / 2)
    sizes = torch.linspace(-largest / 3, largest, batch, dtype=torch.float64)
    if kind == "float64":
        return sizes
    return sizes.float().repeat_interleave(2)[::2] if kind == "strided" else sizes.float()


def _arguments(shape, pixels, origin, gradient, step_size, epsilon) -> tuple:
    generator = torch.Generator().manual_seed(len(shape))
    # Moved by up to 0.2 from the origin, with radii up to 0.1 and steps up to 0.3: all branches of the clamp are taken.
    clean = torch.rand(shape, generator=generator)
    moved = (clean + 0.4 * (torch.rand(shape, generator=generator) - 0.5)).clamp(0, 1)
    slope = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    slope.view(-1)[: 4 * len(special) : 4] = special[: len(slope.view(-1)[: 4 * len(special) : 4])]
    if slope.numel():
        moved.view(-1)[-1], clean.view(-1)[-2] = float("nan"), float("nan")
    tensors = [moved.to(pixels), clean.to(origin), slope.to(gradient)]
    if step_size == "strided":
        tensors = [tensor.movedim(-1, 1) for tensor in tensors]
    return (*tensors, _size(step_size, shape[0], 0.3), _size(epsilon, shape[0], 0.1))


def _expected(pixels, origin, gradient, step_size, epsilon) -> torch.Tensor:
    """The operator on the CPU in float32, which `test_attack_step.py` compares with the definition in float64."""
    moved = attack_step(pixels.float(), origin.float(), gradient.float(), step_size=step_size, epsilon=epsilon)
    if pixels.dtype == torch.bfloat16:  # the interpreter cuts float32 off instead of rounding it
        moved = (moved.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return moved.to(pixels.dtype)


@pytest.fixture(scope="module")
def given() -> dict:
    dispatch = {
        name: _arguments((2, 3, 4, 4), pixels, torch.float32, gradient, True, False)
        for name, (pixels, gradient, _) in DISPATCH.items()
    }
    return {"launch": {name: _arguments(*case) for name, case in CASES.items()}, "dispatch": dispatch}


@pytest.fixture(scope="module")
def interpreted(given, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    calls = {part: {name: ("attack_step", case) for name, case in cases.items()} for part, cases in given.items()}
    torch.save(calls, folder / "given.pt")
    run_script("interpreter_attack_decode.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("build")
    run_script("build_attack_decode.py", folder / "report.json", "attack")
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_exactly(given, interpreted, name):
    expected, moved = _expected(*given["launch"][name]), interpreted["launch"][name]
    assert moved.is_contiguous()
    # A step is plus or minus the step size exactly, so a fused multiply-add rounds where the reference rounds.
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_nan_and_nothing_else_becomes_it(given, interpreted):
    pixels, origin, gradient, *_ = given["launch"]["float32"]
    broken = pixels.isnan() | origin.isnan() | gradient.isnan()
    assert broken.sum() == 3
    assert torch.equal(interpreted["launch"]["float32"].isnan(), broken)


@pytest.mark.parametrize("name", DISPATCH)
def test_cuda_kernel_serves_what_it_can_and_the_reference_the_rest(given, interpreted, name):
    pixels, origin, gradient, step_size, epsilon = given["dispatch"][name]
    moved, launches = interpreted["dispatch"][name]
    assert launches == DISPATCH[name][2]
    expected = attack_step(pixels, origin, gradient, step_size=step_size, epsilon=epsilon)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(machine_code, target):
    code = machine_code[f"attack, {target}"]
    opcodes, elements = code["opcodes"], code["elements"]
    # Pixels, origin and gradient once, the iterate once, four float32 at a time; beside them step size and epsilon.
    assert opcodes["LDG.E.128"] == 3 * elements / 4
    assert opcodes["STG.E.128"] == elements / 4
    assert sum(count for name, count in opcodes.items() if name.startswith("LDG")) == 3 * elements / 4 + 2
    assert sum(count for name, count in opcodes.items() if name.startswith("STG")) == elements / 4
    # 24 measured on sm_90; at 16 bytes per element memory stays the limit up to some hundred.
    assert sum(opcodes.values()) / elements <= 28
    assert code["registers"] <= 32  # full occupancy


def test_machine_code_for_amd(machine_code):
    if "attack, gfx942" not in machine_code:
        pytest.skip("this Triton has no AMD backend")
    opcodes, elements = machine_code["attack, gfx942"]["opcodes"], machine_code["attack, gfx942"]["elements"]
    assert opcodes.get("buffer_load_dwordx4", 0) + opcodes.get("global_load_dwordx4", 0) == 3 * elements / 4
    assert opcodes.get("buffer_store_dwordx4", 0) + opcodes.get("global_store_dwordx4", 0) == elements / 4


def test_no_local_or_shared_memory(machine_code):
    for name, code in machine_code.items():
        spills = [opcode for opcode in code["opcodes"] if opcode.startswith(("LDL", "STL", "scratch_"))]
        assert not spills, name
        assert not code.get("scratch"), name
        assert not code["shared"], name
