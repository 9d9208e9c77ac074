"""The Triton kernels of `patch_loss`: their source in the interpreter."""

import pytest
import torch

from denim.kernels.patches import patchify

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

# Name: batch, height and width in patches, patch size, channels, pixels, dtype of the prediction, norm_pix, mask.
# Grids are such that the last block of each sample is partly empty; runs that pad a patch come with 14, 7 and 5.
CASES = {
    "patch 16": (2, (3, 3), 16, 3, "uint8", torch.float32, True, False),
    "patch 16, masked": (2, (3, 3), 16, 3, "uint8", torch.float32, True, True),
    "patch 16, raw": (1, (1, 3), 16, 3, "uint8", torch.float32, False, False),
    "patch 16, bfloat16": (1, (1, 3), 16, 3, "uint8", torch.bfloat16, True, False),
    "patch 16, float16, raw, masked": (2, (3, 1), 16, 3, "uint8", torch.float16, False, True),
    "patch 16, one channel": (1, (2, 1), 16, 1, "uint8", torch.float32, True, False),
    "patch 8": (3, (3, 7), 8, 3, "uint8", torch.float32, True, True),
    "patch 4": (2, (5, 7), 4, 3, "uint8", torch.bfloat16, True, True),
    "patch 4, one channel": (2, (5, 7), 4, 1, "uint8", torch.float32, True, False),
    "patch 2": (2, (9, 8), 2, 3, "uint8", torch.float32, True, True),
    "patch 2, one channel": (2, (9, 8), 2, 1, "uint8", torch.float32, True, False),
    "patch 14": (2, (3, 1), 14, 3, "uint8", torch.float32, True, True),
    "patch 14, raw, float16": (1, (1, 2), 14, 3, "uint8", torch.float16, False, False),
    "patch 14, one channel": (1, (3, 1), 14, 1, "uint8", torch.float32, True, False),
    "patch 32": (1, (1, 3), 32, 3, "uint8", torch.float32, True, True),
    "patch 7, odd size": (2, (3, 1), 7, 3, "uint8", torch.float32, True, False),
    "patch 1": (2, (3, 5), 1, 3, "uint8", torch.float32, True, True),
    "five channels": (1, (3, 1), 16, 5, "uint8", torch.float32, True, False),
    "five channels, patch 5": (1, (3, 1), 5, 5, "uint8", torch.float32, True, True),
    "planes": (2, (3, 1), 16, 3, "planes", torch.float32, True, True),
    "planes, patch 14": (1, (3, 1), 14, 3, "planes", torch.bfloat16, True, False),
    "planes, bfloat16 pixels": (1, (1, 3), 8, 3, "bfloat16 planes", torch.float32, True, False),
    "channels_last": (2, (1, 3), 16, 3, "channels_last", torch.float32, True, False),
    "strided bytes": (2, (3, 1), 8, 3, "strided", torch.float32, False, True),
    "no image": (0, (3, 1), 8, 3, "uint8", torch.float32, True, False),
}
BLOCK_RUNS = (32, 128, 256)
# Forward and backward.
LAUNCHES = 2


def _case(batch, grid, patch_size, channels, pixels, dtype, norm_pix, masked, **block) -> dict:
    generator = torch.Generator().manual_seed(patch_size * 100 + channels)
    height, width = grid[0] * patch_size, grid[1] * patch_size
    images = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
    # One patch that is nearly constant: mean of squares minus square of mean would lose its variance.
    images[:1, :patch_size, :patch_size] = 250 + images[:1, :patch_size, :patch_size] % 2
    if pixels == "strided":
        images = images.transpose(1, 2).contiguous().transpose(1, 2)
    elif pixels != "uint8":
        images = images.permute(0, 3, 1, 2) / 255  # NHWC memory
        images = images if pixels == "channels_last" else images.contiguous()
        images = images.bfloat16() if pixels == "bfloat16 planes" else images
    length = grid[0] * grid[1]
    # A view without the first row, as a decoder's output without its class token.
    prediction = torch.randn(batch, length + 1, patch_size**2 * channels, generator=generator).to(dtype)[:, 1:]
    mask = torch.rand(batch, length, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask[0, 0], mask[-1, -1] = True, False
    mean = [0.3 + 0.02 * channel for channel in range(channels)]
    std = [0.2 + 0.03 * channel for channel in range(channels)]
    return {
        "inputs": (prediction, images, mask, patch_size, mean, std, norm_pix),
        "grad": torch.tensor(-3.5),
        "block": block,
    }


def _definition(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64, and the largest error of float32 in each of them."""
    prediction, images, mask, patch_size, mean, std, norm_pix = case["inputs"]
    nhwc = images.double() / 255 if images.dtype == torch.uint8 else images.double().permute(0, 2, 3, 1)
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    target = patchify((nhwc - mean) / std, patch_size)
    # About six roundings of numbers as large as pixel / std and mean / std. Normalisation by a patch's own statistics
    # divides their error by its deviation, and adds about twenty roundings of its result (a sum of a few thousand
    # numbers is sequential within a thread's run and a tree between threads; the approximate root errs by at most
    # 2^-22).
    error = torch.full_like(target, 6 * 2.0**-24 / std.min())
    if norm_pix and len(target):
        variance, centre = torch.var_mean(target, dim=-1, keepdim=True)
        deviation = torch.sqrt(variance + 1e-6)
        target = (target - centre) / deviation
        error = error / deviation + 20 * 2.0**-24 * (1 + target.abs())
    weight = torch.ones(prediction.shape[:2], dtype=torch.float64) if mask is None else mask.double()
    weight = (weight / weight.sum() / target.shape[-1])[..., None]
    difference = prediction.double() - target
    loss = (difference.square() * weight).sum() if len(prediction) else torch.tensor(float("nan"))
    loss_error = (2 * difference.abs() * error * weight).sum() + 20 * 2.0**-24 * loss
    upstream = 2 * case["grad"].double() * weight
    gradient = difference * upstream
    return loss, gradient, loss_error, (error * upstream).abs() + 4 * 2.0**-24 * gradient.abs()


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.bfloat16:
        return value.to(dtype)
    # The interpreter truncates float32 instead of rounding it. Both are monotonic, so the bounds hold.
    return (value.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def _assert_equals_definition(case: dict, loss: torch.Tensor, gradient: torch.Tensor) -> None:
    exact_loss, exact_gradient, loss_error, gradient_error = _definition(case)
    prediction = case["inputs"][0]
    assert loss.shape == ()
    assert (loss.double() - exact_loss).abs() <= loss_error or (loss.isnan() and not len(prediction))
    assert gradient.dtype == prediction.dtype
    assert gradient.shape == prediction.shape
    assert gradient.is_contiguous()
    lowest = _stored(exact_gradient - gradient_error, gradient.dtype)
    highest = _stored(exact_gradient + gradient_error, gradient.dtype)
    assert ((lowest <= gradient) & (gradient <= highest)).all()  # False for memory that was not written: it is NaN


@pytest.fixture(scope="module")
def given() -> dict:
    blocks = {
        f"{patch_size}, block {runs}": _case(
            2, (3, 3), patch_size, 3, "uint8", torch.float32, True, True, block_runs=runs
        )
        for patch_size in (16, 4)
        for runs in BLOCK_RUNS
    }
    small = (1, (1, 2), 4, 3, "uint8", torch.float32, True, True)
    dispatch = {
        "Triton": _case(*small),
        "float64 prediction": _case(*small[:5], torch.float64, True, True),
        "float64 pixels": _case(*small[:4], "planes", *small[5:]),
        "65 channels": _case(1, (1, 1), 1, 65, *small[4:]),
        "one patch of 256 x 256": _case(1, (1, 1), 256, 1, *small[4:]),
    }
    for name in ("65 channels", "one patch of 256 x 256"):
        dispatch[name]["inputs"][2].fill_(True)
    prediction, images, *rest = dispatch["float64 pixels"]["inputs"]
    dispatch["float64 pixels"]["inputs"] = (prediction, images.double(), *rest)
    nothing = _case(*small)
    nothing["inputs"][2].fill_(False)
    strided = _case(*CASES["patch 16"])
    prediction, *rest = strided["inputs"]
    strided["inputs"] = (prediction.transpose(1, 2).contiguous().transpose(1, 2), *rest)
    return {
        "cases": {name: _case(*case) for name, case in CASES.items()}
        | blocks
        | {"nothing selected": nothing, "strided prediction": strided},
        "again": ["patch 16, masked", "patch 14", "patch 4"],
        "dispatch": dispatch,
    }


@pytest.fixture(scope="module")
def interpreted(given, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(given, folder / "given.pt")
    run_script("kernels/interpreter_patch_loss.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


@pytest.mark.parametrize("name", [*CASES, "strided prediction"])
def test_loss_and_gradient_equal_the_definition(given, interpreted, name):
    _assert_equals_definition(given["cases"][name], *interpreted["results"][name])


def test_a_mask_that_selects_nothing_gives_nan(interpreted):
    assert interpreted["results"]["nothing selected"][0].isnan()


def test_two_runs_give_the_same_bits(interpreted):
    for name, (loss, gradient) in interpreted["again"].items():
        assert torch.equal(loss, interpreted["results"][name][0])
        assert torch.equal(gradient, interpreted["results"][name][1])


@pytest.mark.parametrize("patch_size", [16, 4])
def test_a_block_changes_no_more_than_the_order_of_the_sum(given, interpreted, patch_size):
    names = [f"{patch_size}, block {runs}" for runs in BLOCK_RUNS]
    gradients = [interpreted["results"][name][1] for name in names]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    losses = torch.stack([interpreted["results"][name][0] for name in names])
    # The losses of 18 patches have the same bits for every block size. Each addition of them rounds once.
    assert losses.max() - losses.min() <= 18 * 2.0**-24 * losses.max()
    for name in names:
        _assert_equals_definition(given["cases"][name], *interpreted["results"][name])


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("Triton", LAUNCHES),
        ("float64 prediction", 0),
        ("float64 pixels", 0),
        ("65 channels", 0),
        ("one patch of 256 x 256", 0),
    ],
)
def test_cuda_kernels_serve_what_they_can_and_the_reference_the_rest(given, interpreted, name, launches):
    results, launched = interpreted["dispatch"][name]
    assert launched == launches
    _assert_equals_definition(given["dispatch"][name], *results)
