"""The Triton kernels of `decode_patches`: their source in the interpreter."""

import pytest
import torch

from denim.kernels import decode_patches

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

MEAN = (124 / 255, 0.456, 0.406, 0.3, 0.7)
STD = (0.229, 0.224, 0.225, 0.5, 0.2)
# Statistics of the classifier whose patches are asked for.
NORMAL = ((0.4, 0.5, 0.6, 0.2, 0.5), (0.25, 0.2, 0.3, 0.4, 0.5))
F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8

# Name: leading dimensions and batch, height and width in patches, patch size, channels, prediction, statistics, source;
# the result, where that is not float32. Names say where it is patches, and where the source's gradient is not wanted.
# No case fills its last program, except where a program is one patch.
CASES = {
    "raw": ((2,), (1, 3), 16, 3, F32, None, None),
    "raw, bfloat16": ((3,), (3, 1), 16, 3, BF16, None, None),
    "raw, float16, one channel": ((2, 1), (1, 3), 16, 1, F16, None, None),
    "raw, patch 2": ((3,), (5, 7), 2, 3, F32, None, None),
    "raw, patch 1, one channel": ((3,), (5, 7), 1, 1, F32, None, None),
    "raw, patch 7": ((2,), (1, 3), 7, 3, F32, None, None),
    "raw, patch 14": ((2,), (3, 1), 14, 5, BF16, None, None),
    "raw, patch 32": ((1,), (1, 2), 32, 3, F32, None, None),
    "raw, strided": ((2,), (2, 3), 8, 3, F32, None, None),
    "input": ((2, 2), (1, 3), 16, 3, F32, "input", U8),
    "input, bfloat16": ((3, 2), (1, 3), 16, 3, BF16, "input", U8),
    "input, float16, two leading dimensions": ((2, 3, 1), (1, 3), 8, 3, F16, "input", U8),
    "input, pixels": ((2, 2), (1, 3), 16, 3, F32, "input", F32),
    "input, bfloat16 pixels": ((2,), (3, 1), 16, 3, F32, "input", BF16),
    "input, float16 pixels": ((2,), (3, 3), 8, 1, BF16, "input", F16),
    "input, patch 2": ((2, 3), (5, 7), 2, 3, F32, "input", U8),
    "input, patch 2, one channel": ((2,), (5, 7), 2, 1, BF16, "input", F32),
    "input, patch 4": ((3,), (5, 3), 4, 3, BF16, "input", F32),
    "input, patch 4, bytes": ((3,), (5, 3), 4, 1, F32, "input", U8),
    "input, patch 7": ((3,), (3, 3), 7, 5, F32, "input", U8),
    "input, patch 14": ((2, 1), (3, 2), 14, 3, F32, "input", U8),
    "input, patch 14, pixels": ((1,), (3, 1), 14, 1, BF16, "input", F32),
    "input, patch 32": ((2, 1), (1, 2), 32, 3, BF16, "input", F32),
    "input, patch 32, bytes": ((1,), (1, 2), 32, 1, F32, "input", U8),
    "input, five channels": ((2, 1), (1, 3), 16, 5, BF16, "input", U8),
    "input, strided": ((2, 2), (2, 3), 8, 3, F32, "input", F32),
    "noisy": ((2, 2), (1, 3), 16, 3, F32, "noisy", F32),
    "noisy, bfloat16": ((3,), (1, 3), 16, 3, BF16, "noisy", BF16),
    "noisy, float16 source": ((2,), (3, 3), 4, 3, F32, "noisy", F16),
    "noisy, patch 2": ((3,), (5, 7), 2, 3, BF16, "noisy", F32),
    "noisy, patch 14": ((1, 3), (1, 3), 14, 3, F32, "noisy", F32),
    "noisy, patch 32, one channel": ((2,), (1, 1), 32, 1, F32, "noisy", F32),
    "noisy, five channels": ((3,), (1, 3), 8, 5, F32, "noisy", F32),
    "input, fixed source": ((2, 2), (1, 3), 16, 3, F32, "input", F32),
    "noisy, fixed source": ((3,), (3, 3), 4, 3, BF16, "noisy", BF16),
    "raw, bfloat16 pixels": ((3,), (3, 1), 16, 3, BF16, None, None, BF16),
    "input, float16 pixels out": ((2, 1), (1, 3), 8, 3, F32, "input", F32, F16),
    # Every patch size with every number of channels, statistics and dtypes in turn.
    "patches": ((2, 2), (1, 3), 16, 3, BF16, "input", F32, BF16),
    "patches, raw": ((3,), (1, 3), 16, 3, BF16, None, None, BF16),
    "patches, noisy": ((3,), (1, 3), 16, 3, BF16, "noisy", BF16, F16),
    "patches, one channel": ((2,), (3, 1), 16, 1, F32, "input", U8),
    "patches, four channels": ((2, 1), (1, 3), 16, 4, F16, "noisy", F32, F16),
    "patches, patch 2": ((3,), (5, 7), 2, 3, BF16, None, None),
    "patches, patch 2, one channel": ((3,), (5, 7), 2, 1, F32, "noisy", F16, BF16),
    "patches, patch 2, four channels": ((2, 2), (5, 7), 2, 4, F16, "input", U8),
    "patches, patch 4": ((3,), (5, 7), 4, 3, BF16, "noisy", F32, BF16),
    "patches, patch 4, raw": ((3,), (5, 7), 4, 3, F32, None, None, F16),
    "patches, patch 4, one channel": ((2, 2), (5, 3), 4, 1, BF16, "input", F16, F16),
    "patches, patch 4, four channels": ((3,), (5, 3), 4, 4, F32, None, None),
    "patches, patch 8": ((3,), (1, 3), 8, 3, F16, "input", F32, BF16),
    "patches, patch 8, one channel": ((3,), (1, 3), 8, 1, BF16, None, None, BF16),
    "patches, patch 8, four channels": ((2,), (3, 3), 8, 4, F32, "noisy", BF16),
    "patches, patch 14": ((1, 3), (1, 3), 14, 3, F16, None, None, F16),
    "patches, patch 14, one channel": ((2, 1), (3, 2), 14, 1, BF16, "noisy", F32),
    "patches, patch 14, four channels": ((1,), (3, 1), 14, 4, F32, "input", BF16, BF16),
    "patches, patch 32": ((2,), (1, 1), 32, 3, BF16, "noisy", F16, BF16),
    "patches, patch 32, one channel": ((1,), (1, 2), 32, 1, F32, "input", F32),
    "patches, patch 32, four channels": ((1,), (1, 2), 32, 4, F16, None, None, BF16),
    "patches, fixed source": ((2, 2), (1, 3), 8, 3, BF16, "input", F32, BF16),
    "patches, noisy, fixed source": ((3,), (1, 3), 8, 3, F32, "noisy", F32),
    "patches, strided": ((2, 2), (2, 3), 8, 3, F32, "input", F32),
    "no patches": ((2, 0), (1, 3), 8, 3, F32, None, None),
    "no prediction": ((0, 2), (1, 3), 8, 3, F32, "input", F32),
    "no image": ((2, 0), (1, 3), 8, 3, F32, None, None),
}
DISPATCH = {
    "raw": ((1,), (1, 1), 4, 3, F32, None, None),
    "input": ((2, 1), (1, 1), 4, 3, BF16, "input", U8),
    "noisy": ((1,), (1, 1), 4, 3, F32, "noisy", F32),
    "patches": ((2,), (1, 1), 4, 3, BF16, "noisy", F32, BF16),
    "patches in float64": ((2,), (1, 1), 4, 3, F32, "input", F32, torch.float64),
    "float64 prediction": ((1,), (1, 1), 4, 3, torch.float64, "input", F32),
    "float64 source": ((1,), (1, 1), 4, 3, F32, "input", torch.float64),
    "patch 65": ((1,), (1, 1), 65, 1, F32, None, None),
    "65 channels": ((1,), (1, 1), 2, 65, F32, None, None),
}
SERVED = ("raw", "input", "noisy", "patches")


def _case(name, lead, grid, patch_size, channels, dtype, statistics, source_dtype, output=F32) -> dict:
    """Arguments of `decode_patches`, the gradient of its result ("grad"), and whether the source needs a gradient."""
    strided, patches = "strided" in name, "patches" in name
    generator = torch.Generator().manual_seed(patch_size * 10 + channels)
    height, width = grid[0] * patch_size, grid[1] * patch_size
    length, size = grid[0] * grid[1], patch_size * patch_size * channels
    # A standard deviation of three gives many pixels below 0 and above 1.
    prediction = 3 * torch.randn((*lead, length, size), generator=generator)
    shape = prediction.shape if patches else (*lead, channels, height, width)
    grad = torch.randn(shape, generator=generator).to(output)
    source = sigma = None
    if statistics == "input":
        source = torch.randint(0, 256, (lead[-1], height, width, channels), generator=generator, dtype=U8)
        # A flat patch. With one channel only the 1e-6 is left of its variance, and it equals the mean: otherwise the
        # gradient would be the rounding of the patch's mean, divided by the square root of 1e-6.
        source[:1, :patch_size, :patch_size] = 124
        source = source if source_dtype == U8 else (source.permute(0, 3, 1, 2) / 255).to(source_dtype).contiguous()
    if statistics == "noisy":
        source = (2 * torch.randn(prediction.shape, generator=generator)).to(source_dtype)
        # Noise of less variance than a patch has, and of more.
        sigma = torch.linspace(20, 130, lead[-1])
    if strided:
        prediction, grad = (tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (prediction, grad))
        source = source if source is None else source.transpose(-1, -2).contiguous().transpose(-1, -2)
    return {
        "prediction": prediction.to(dtype),
        "source": source,
        "sigma": sigma,
        "height": height,
        "width": width,
        "patch_size": patch_size,
        "mean": list((MEAN * 13)[:channels]),
        "std": list((STD * 13)[:channels]),
        "statistics": statistics or "raw",
        "normal_mean": list(NORMAL[0][:channels]) if patches else [],
        "normal_std": list(NORMAL[1][:channels]) if patches else [],
        "dtype": output,
        "grad": grad,
        "need_source": "fixed source" not in name,
    }


def _ends(case: dict) -> tuple:
    """The values of the result for pixels of 0 and of 1."""
    if not case["normal_std"]:
        return 0, 1
    mean, std = (torch.tensor(case[name], dtype=torch.float64) for name in ("normal_mean", "normal_std"))
    repeat = case["patch_size"] ** 2
    return ((0 - mean) / std).repeat(repeat), ((1 - mean) / std).repeat(repeat)


def _exact(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Result and both gradients in float64, by the operator on the CPU, which `test_decode_patches.py` tests."""
    prediction, source = case["prediction"].double().requires_grad_(), case["source"]
    if source is not None:
        source = source.permute(0, 3, 1, 2).double() / 255 if source.dtype == U8 else source.double()
        source = source.requires_grad_(case["source"].dtype != U8 and case["need_source"])
    pixels = decode_patches(
        prediction,
        img_size=(case["height"], case["width"]),
        patch_size=case["patch_size"],
        mean=case["mean"],
        std=case["std"],
        statistics=None if case["statistics"] == "raw" else case["statistics"],
        source=source,
        sigma=case["sigma"],
        normalize=(case["normal_mean"], case["normal_std"]) if case["normal_std"] else None,
    )
    pixels.backward(case["grad"].double())
    return pixels.detach(), prediction.grad, None if source is None else source.grad


def _settled(case: dict) -> dict:
    """The upstream gradient, zero where rounding may move a pixel across 0 or 1; the ends have a test of their own."""
    low, high = (_exact(case | {"prediction": case["prediction"].double() + shift})[0] for shift in (-1e-3, 1e-3))
    black, white = _ends(case)
    edge = ((low == black) != (high == black)) | ((low == white) != (high == white))
    return case | {"grad": case["grad"].masked_fill(edge, 0)}


def _assert_stored(got: torch.Tensor, exact: torch.Tensor, error: float) -> None:
    """`got` is a value within `error` of `exact`, in its dtype. False for memory that was not written: it is NaN."""

    def stored(value: torch.Tensor) -> torch.Tensor:
        if got.dtype != BF16:
            return value.to(got.dtype)
        # The interpreter truncates float32 instead of rounding it. Both are monotonic, so the bounds hold.
        return (value.float().view(torch.int32) & ~0xFFFF).view(F32).bfloat16()

    one, other = stored(exact - error), stored(exact + error)
    assert got.shape == exact.shape
    assert got.is_contiguous()
    assert ((torch.minimum(one, other) <= got) & (got <= torch.maximum(one, other))).all()


def _forward(case: dict) -> tuple:
    return ("decode_patches", tuple(value for name, value in case.items() if name not in ("grad", "need_source")))


def _backward(case: dict) -> tuple:
    names = ("grad", "prediction", "source", "sigma", "patch_size", "mean", "std", "statistics", "normal_std")
    names = (*names, "need_source")
    return ("decode_patches_backward", tuple(case[name] for name in names))


@pytest.fixture(scope="module")
def given() -> dict:
    return {
        "launch": {name: _settled(_case(name, *case)) for name, case in CASES.items()},
        "dispatch": {name: _settled(_case(name, *case)) for name, case in DISPATCH.items()},
    }


@pytest.fixture(scope="module")
def ends() -> dict:
    """Predictions whose pixels (mean and std of one half) are exactly 0, 1 and 0.5, outside of [0, 1], or NaN."""
    prediction = torch.tensor([-1.0, 1.0, -1.5, 1.5, 0.0, float("nan"), -1.0, 1.0]).repeat(2).reshape(1, 1, 16)
    grad = torch.tensor([1.0, 1.0, float("inf"), float("nan"), 1.0, 1.0, -1.0, -1.0]).repeat(2).reshape(1, 1, 4, 4)
    case = {"prediction": prediction, "source": None, "sigma": None, "height": 4, "width": 4, "patch_size": 4}
    case |= {"mean": [0.5], "std": [0.5], "statistics": "raw", "normal_mean": [], "normal_std": [], "dtype": F32}
    return case | {"grad": grad, "need_source": False}


@pytest.fixture(scope="module")
def interpreted(given, ends, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    calls = {
        part: {(name, make.__name__): make(case) for name, case in cases.items() for make in (_forward, _backward)}
        for part, cases in given.items()
    }
    calls["launch"] |= {("ends", make.__name__): make(ends) for make in (_forward, _backward)}
    torch.save(calls, folder / "given.pt")
    run_script("kernels/interpreter_attack_decode.py", folder / "given.pt", folder / "got.pt")
    got = torch.load(folder / "got.pt", weights_only=True)
    return {
        part: {
            name: (got[part][name, "_forward"], got[part][name, "_backward"])
            for name, kind in got[part]
            if kind == "_forward"
        }
        for part in got
    }


# float32: a pixel has a few roundings; mean and deviation are sums of runs of at most 64 values and a tree over
# the runs, so some ten units in the last place of values up to 1 / 0.2, times predictions up to 10: 10 * 10 * 2^-24.
PIXEL_ERROR = 1e-5


def _check(case: dict, pixels: torch.Tensor, gradients: tuple) -> None:
    exact, to_prediction, to_source = _exact(case)
    assert pixels.dtype == case["dtype"]
    # Normalisation divides the error of the pixel; its own roundings, of numbers up to 1 / 0.2, are much smaller.
    _assert_stored(pixels, exact, PIXEL_ERROR / min(case["normal_std"], default=1))
    assert gradients[0].dtype == case["prediction"].dtype
    # Relative to the largest gradient, since gradients are sums of terms of both signs.
    largest = to_prediction.abs().max().item() if to_prediction.numel() else 0.0
    _assert_stored(gradients[0], to_prediction, PIXEL_ERROR * largest)
    if to_source is None:
        assert gradients[1].numel() == 0
        return
    assert gradients[1].dtype == case["source"].dtype
    _assert_stored(gradients[1], to_source, PIXEL_ERROR * to_source.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_pixels_and_gradients_equal_the_definition(given, interpreted, name):
    case = given["launch"][name]
    _check(case, *interpreted["launch"][name])


def test_cases_are_not_vacuous(given):
    for name, case in given["launch"].items():
        if not case["prediction"].numel():
            continue
        pixels, to_prediction, _ = _exact(case)
        black, white = _ends(case)
        inside = ((pixels > black) & (pixels < white)).double().mean()
        assert 0.05 < inside < 0.95, name  # both sides of the clamp's mask
        assert (to_prediction != 0).double().mean() > 0.05, name


def test_ends_of_the_clamp_and_nan(interpreted):
    pixels, (gradient, _) = interpreted["launch"]["ends"]
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, float("nan"), 0.0, 1.0]).repeat(2)
    assert torch.equal(pixels.flatten().nan_to_num(7), expected.nan_to_num(7))
    # 1 at both ends; 0 outside, even for an infinite gradient; 0 where the pixel is NaN.
    assert gradient.flatten().tolist() == [0.5, 0.5, 0.0, 0.0, 0.5, 0.0, -0.5, -0.5] * 2


@pytest.mark.parametrize("name", DISPATCH)
def test_cuda_kernel_serves_what_it_can_and_the_reference_the_rest(given, interpreted, name):
    case = given["dispatch"][name]
    (pixels, forward), (gradients, backward) = interpreted["dispatch"][name]
    assert forward == backward == (name in SERVED)
    if name in SERVED:
        _check(case, pixels, gradients)
        return
    _, *forward = _forward(case)
    reference = torch.ops.denim.decode_patches(*forward[0])
    assert torch.equal(pixels, reference)
    _, arguments = _backward(case)
    for gradient, expected in zip(gradients, torch.ops.denim.decode_patches_backward(*arguments), strict=True):
        assert torch.equal(gradient, expected)
