"""The Triton kernels of `noise_patchify`: their source in the interpreter."""

import math

import pytest
import torch

from denim.kernels import noise_words
from denim.kernels.patches import patchify, unpatchify

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

ALL = 0xFFFFFFFF
# Known answers of Philox-4x32-10: kat_vectors of the Random123 library (Salmon et al. 2011). Counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
GROUPS = 40
WORDS = 4096

# Name: images, height and width in patches, patch size, channels, pixels, dtype, sigma and seeds shapes without B,
# threads of a program. Names say why a case is here; sizes are such that the last block of each is partly empty.
CASES = {
    "patch 16": (2, (1, 5), 16, 3, "uint8", torch.float32, (2,), (3,), 64),
    "patch 16, bfloat16": (2, (1, 3), 16, 3, "uint8", torch.bfloat16, (), (), 128),
    "patch 16, float16": (2, (1, 3), 16, 3, "uint8", torch.float16, (2,), (), 32),
    "patch 16, one channel": (3, (2, 1), 16, 1, "uint8", torch.float32, (), (2,), 32),
    "patch 8": (3, (3, 1), 8, 3, "uint8", torch.float32, (1,), (1,), 16),
    "patch 4": (2, (5, 3), 4, 3, "uint8", torch.bfloat16, (3,), (2,), 32),
    "patch 4, one channel": (5, (3, 3), 4, 1, "uint8", torch.float32, (), (), 128),
    "patch 2": (2, (5, 7), 2, 3, "uint8", torch.float32, (2,), (2,), 32),
    "patch 2, one channel": (2, (3, 5), 2, 1, "uint8", torch.float32, (), (2,), 16),
    "patch 14": (2, (3, 2), 14, 3, "uint8", torch.float32, (2,), (), 64),
    "patch 14, bfloat16": (1, (1, 3), 14, 3, "uint8", torch.bfloat16, (), (), 128),
    "patch 14, one channel": (1, (3, 1), 14, 1, "uint8", torch.float32, (), (), 16),
    "patch 32": (1, (1, 3), 32, 3, "uint8", torch.float32, (2,), (1,), 64),
    "patch 7, odd size": (2, (3, 1), 7, 3, "uint8", torch.float32, (), (2,), 16),
    "two channels": (1, (3, 3), 8, 2, "uint8", torch.float32, (), (), 16),
    "four channels": (1, (3, 3), 16, 4, "uint8", torch.float32, (), (), 128),
    "six channels": (1, (3, 1), 16, 6, "uint8", torch.float32, (), (), 32),
    "five channels, too many to unroll": (1, (3, 1), 16, 5, "uint8", torch.float32, (2,), (), 32),
    "planes": (2, (3, 1), 16, 3, "planes", torch.float32, (2,), (2,), 32),
    "planes, patch 32": (1, (1, 2), 32, 3, "planes", torch.bfloat16, (), (), 32),
    "planes, patch 4": (2, (3, 5), 4, 3, "planes", torch.float32, (), (), 64),
    "planes, patch 14": (2, (1, 3), 14, 3, "planes", torch.float32, (), (2,), 32),
    "planes, bfloat16 pixels": (1, (1, 3), 8, 3, "bfloat16 planes", torch.float32, (), (), 16),
    "channels_last": (2, (1, 3), 16, 3, "channels_last", torch.float32, (2,), (), 32),
    "channels_last, patch 14": (1, (1, 3), 14, 3, "channels_last", torch.float16, (), (), 16),
    "strided bytes": (2, (3, 1), 8, 3, "strided", torch.float32, (2,), (2,), 16),
    "patch 1": (2, (3, 5), 1, 3, "uint8", torch.float32, (2,), (), 16),
    "one pixel": (1, (1, 1), 1, 1, "uint8", torch.float32, (), (), 16),
    "five channels, patch 2": (2, (3, 1), 2, 5, "planes", torch.float32, (), (2,), 16),
    "no image": (0, (3, 1), 8, 3, "uint8", torch.float32, (2,), (2,), 16),
    "no level": (2, (3, 1), 8, 3, "uint8", torch.float32, (0,), (2,), 16),
    "no draw": (2, (3, 1), 8, 3, "uint8", torch.float32, (2,), (0,), 16),
}
# Threads of a program: those shipped, where None takes the first.
THREADS = (None, 64, 256)

# Name: leads, images, height and width in patches, patch size, channels, dtype of the gradient and of the pixels,
# threads of a program.
BACKWARD = {
    "patch 16": ((3, 2), 2, (1, 3), 16, 3, torch.float32, torch.float32, 128),
    "patch 16, bfloat16": ((2,), 2, (1, 3), 16, 3, torch.bfloat16, torch.float32, 64),
    "patch 16, all bfloat16": ((2,), 1, (1, 3), 16, 3, torch.bfloat16, torch.bfloat16, 64),
    "patch 16, bfloat16 pixels": ((), 1, (1, 3), 16, 3, torch.float32, torch.bfloat16, 64),
    "patch 16, float16": ((9,), 1, (2, 1), 16, 3, torch.float16, torch.float16, 64),
    "patch 16, one channel": ((2,), 3, (2, 1), 16, 1, torch.float32, torch.float32, 32),
    "patch 8": ((), 3, (3, 1), 8, 3, torch.bfloat16, torch.float32, 16),
    "patch 4": ((2, 2), 3, (5, 3), 4, 3, torch.bfloat16, torch.float32, 32),
    "patch 2": ((2,), 2, (5, 7), 2, 3, torch.float32, torch.float32, 16),
    "patch 14": ((3,), 2, (3, 2), 14, 3, torch.bfloat16, torch.float32, 128),
    "patch 32": ((2,), 1, (1, 3), 32, 3, torch.float16, torch.float32, 64),
    "patch 7": ((2,), 2, (3, 1), 7, 3, torch.float32, torch.float32, 16),
    "one pixel": ((2,), 1, (1, 1), 1, 1, torch.float32, torch.float32, 16),
    "four channels": ((2,), 1, (1, 3), 16, 4, torch.bfloat16, torch.float32, 32),
    "64 channels": ((2,), 1, (3, 1), 2, 64, torch.float32, torch.float32, 16),
    "strided": ((2, 3), 2, (3, 1), 8, 3, torch.float32, torch.float32, 16),
    "no image": ((2,), 0, (3, 1), 8, 3, torch.float32, torch.float32, 16),
    "no lead": ((0,), 2, (3, 1), 8, 3, torch.float32, torch.float32, 16),
}

# Name: function, samples, arguments for one of them. Only the last program of each runs, which lies beyond
# 2^31 elements of its input, of its output or of both.
BF16 = torch.bfloat16
HUGE = {
    "bytes and patches": ("noise_patchify", 16384, (1, (14, 14), 16, 3, "uint8", BF16, (1,), (), 64)),
    "levels": ("noise_patchify", 4096, (1, (14, 14), 16, 3, "uint8", BF16, (4,), (), 64)),
    "draws": ("noise_patchify", 4096, (1, (14, 14), 16, 3, "uint8", BF16, (), (4,), 64)),
    "from level to level": ("noise_patchify", 8192, (1, (14, 14), 16, 3, "uint8", BF16, (2,), (2,), 64)),
    "planes": ("noise_patchify", 16384, (1, (16, 16), 14, 3, "bfloat16 planes", BF16, (), (), 64)),
    "gradients": ("noise_patchify_backward", 4096, ((4,), 1, (14, 14), 16, 3, BF16, BF16, 64)),
    "from lead to lead": ("noise_patchify_backward", 16384, ((2,), 1, (14, 14), 16, 3, BF16, BF16, 64)),
    "gradients and pixels": ("noise_patchify_backward", 16384, ((), 1, (14, 14), 16, 3, BF16, BF16, 64)),
}


def _arguments(batch, grid, patch_size, channels, pixels, dtype, levels, draws, threads=None) -> dict:
    generator = torch.Generator().manual_seed(patch_size * 100 + channels)
    height, width = grid[0] * patch_size, grid[1] * patch_size
    images = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
    if pixels == "strided":
        images = images.transpose(1, 2).contiguous().transpose(1, 2)
    elif pixels != "uint8":
        images = images.permute(0, 3, 1, 2) / 255  # NHWC memory
        images = images if pixels == "channels_last" else images.contiguous()
        images = images.bfloat16() if pixels == "bfloat16 planes" else images
    return {
        "images": images,
        "sigma": torch.rand(*levels, batch, generator=generator) * 255,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (*draws, batch), generator=generator),
        "patch_size": patch_size,
        "mean": [0.3 + 0.02 * channel for channel in range(channels)],
        "std": [0.2 + 0.03 * channel for channel in range(channels)],
        "dtype": dtype,
    } | ({} if threads is None else {"configurations": (threads,)})


def _gradient(leads, batch, grid, patch_size, channels, dtype, pixel_dtype, threads=None, strided=False) -> dict:
    generator = torch.Generator().manual_seed(patch_size * 100 + channels)
    shape = (*leads, batch, grid[0] * grid[1], patch_size * patch_size * channels)
    grad = torch.randn(shape, generator=generator).to(dtype)
    return {
        "grad": grad.transpose(-1, -2).contiguous().transpose(-1, -2) if strided else grad,
        "height": grid[0] * patch_size,
        "width": grid[1] * patch_size,
        "patch_size": patch_size,
        "std": [0.2 + 0.03 * channel for channel in range(channels)],
        "dtype": pixel_dtype,
    } | ({} if threads is None else {"configurations": (threads,)})


def _normals(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 definition. Next to u = 1, 1 - u is exact in float64, so the logarithm is accurate there too."""
    u = (first.double() + 0.5) * 2.0**-32
    squared = -2 * torch.where(first < 1 << 31, u.log(), torch.log1p((first.double() + 0.5 - 2.0**32) * 2.0**-32))
    angle = second.double() * (2 * math.pi * 2.0**-32)
    return squared.sqrt() * angle.cos(), squared.sqrt() * angle.sin()


def _patches(case: dict) -> torch.Tensor:
    """The definition in float64, from the words of the torch version: (*S, *R, B, L, D)."""
    images, sigma, seeds = case["images"], case["sigma"].double(), case["seeds"]
    nhwc = images.double() / 255 if images.dtype == torch.uint8 else images.double().permute(0, 2, 3, 1)
    size = nhwc.shape[1:]
    words = noise_words(seeds.flatten(), 4 * -(-size.numel() // 4)).reshape(-1, 4)
    pairs = (*_normals(words[:, 0], words[:, 1]), *_normals(words[:, 2], words[:, 3]))
    noise = torch.stack(pairs, dim=-1).reshape(seeds.numel(), words.shape[0] // max(1, seeds.numel()) * 4)
    noise = noise[:, : size.numel()].reshape(*seeds.shape, *size)
    mean, std = (torch.tensor(case[name], dtype=torch.float64) for name in ("mean", "std"))
    levels = sigma.reshape(*sigma.shape[:-1], *(1,) * (seeds.dim() - 1), sigma.shape[-1], 1, 1, 1) / 255
    noisy = (nhwc - mean) / std + levels * noise / std
    return patchify(noisy.flatten(0, -4), case["patch_size"]).unflatten(0, noisy.shape[:-3])


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the interpreter stores it: it truncates float32 to bfloat16 instead of rounding."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    return (value.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def _bounds(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value that each patch element may take in the output's dtype."""
    exact = _patches(case)
    sigma = case["sigma"].max().item() if case["sigma"].numel() else 0.0
    # 1e-5 is the noise contract; the rest is float32: half a dozen roundings of numbers as large as the value, or as
    # pixel / std and mean / std, of which it is the difference.
    largest = exact.abs() + 2 / min(case["std"])
    error = 1e-5 * sigma / (255 * min(case["std"])) + 6 * 2.0**-24 * largest

    # Rounding and truncation are monotonic, so the bounds hold for the stored values.
    return _stored(exact - error, case["dtype"]), _stored(exact + error, case["dtype"])


def _pixels(case: dict, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of the pixels: summed over levels and draws one after the other in `dtype`, then scaled."""
    total = torch.zeros(case["grad"].shape[-3:], dtype=dtype)
    for grad in case["grad"].flatten(0, -4) if case["grad"].dim() > 3 else [case["grad"]]:
        total += grad
    scale = (1 / torch.tensor(case["std"], dtype=torch.float64)).to(dtype).repeat(case["patch_size"] ** 2)
    return unpatchify(total * scale, (case["height"], case["width"]), case["patch_size"]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def given() -> dict:
    group = torch.arange(GROUPS)
    counters = [torch.stack([group, 0 * group, 0 * group, 0 * group])] * len(SEEDS)
    keys = [torch.stack([seed & ALL, (seed >> 32) & ALL])[:, None].expand(2, GROUPS) for seed in SEEDS]
    counters += [torch.tensor(counter)[:, None] for counter, _, _ in KNOWN_ANSWERS]
    keys += [torch.tensor(key)[:, None] for _, key, _ in KNOWN_ANSWERS]
    counters, keys = torch.cat(counters, dim=1), torch.cat(keys, dim=1)
    padding = (0, 256 - counters.shape[1])

    # First words around every place where the arithmetic changes or loses digits: u = 0, 1/2, 1 - 2^-6 and 1.
    near = torch.arange(-300, 300)
    first = torch.cat([(near + centre) & ALL for centre in (0, 1 << 31, (1 << 32) - (1 << 26))])
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([first, torch.randint(0, 1 << 32, (WORDS - len(first),), generator=generator)])
    second = torch.randint(0, 1 << 32, (WORDS,), generator=generator)
    second[::8] = torch.tensor([0, 1, ALL, 1 << 31, (1 << 31) - 1, (1 << 31) + 1, 1 << 30, 3 << 30]).repeat(WORDS // 64)

    cases = {name: _arguments(*case) for name, case in CASES.items()}
    # One level and draw, and several: the kernel is compiled differently for them.
    for patch_size in (16, 14):
        for outer in ((), (2,)):
            for threads in THREADS:
                case = _arguments(2, (1, 3), patch_size, 3, "uint8", torch.float32, outer, outer, threads)
                cases[f"{patch_size}, {outer}, {threads}"] = case
    backward = {name: _gradient(*case, strided=name == "strided") for name, case in BACKWARD.items()}
    for threads in THREADS:
        case = _gradient((2, 2), 2, (1, 3), 16, 3, torch.float32, torch.float32, threads)
        backward[f"threads {threads}"] = case
    dispatch = {
        "Triton": _arguments(1, (1, 1), 4, 3, "uint8", torch.float32, (), ()),
        "float64 patches": _arguments(1, (1, 1), 4, 3, "uint8", torch.float64, (), ()),
        "float64 pixels": _arguments(1, (1, 1), 4, 3, "planes", torch.float32, (), ()),
        "65 channels": _arguments(1, (1, 1), 2, 65, "uint8", torch.float32, (), ()),
    }
    dispatch["float64 pixels"]["images"] = dispatch["float64 pixels"]["images"].double()
    dispatch_backward = {
        "backward, Triton": _gradient((2,), 1, (1, 1), 4, 3, torch.float32, torch.float32),
        "backward, float64 gradient": _gradient((2,), 1, (1, 1), 4, 3, torch.float64, torch.float32),
        "backward, float64 pixels": _gradient((2,), 1, (1, 1), 4, 3, torch.float32, torch.float64),
        "backward, 65 channels": _gradient((2,), 1, (1, 1), 2, 65, torch.float32, torch.float32),
    }
    huge = {}
    for name, (function, batch, case) in HUGE.items():
        make = _arguments if function == "noise_patchify" else _gradient
        huge[name] = (function, batch, make(*case))
    return {
        "counters": torch.nn.functional.pad(counters, padding),
        "keys": torch.nn.functional.pad(keys, padding),
        "normal_words": torch.stack([first, second]),
        "cases": cases,
        "backward": backward,
        "dispatch": {name: ("noise_patchify", case) for name, case in dispatch.items()}
        | {name: ("noise_patchify_backward", case) for name, case in dispatch_backward.items()},
        "huge": huge,
    }


@pytest.fixture(scope="module")
def interpreted(given, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(given, folder / "given.pt")
    run_script("kernels/interpreter_noise_patchify.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


def test_words_equal_the_torch_twin(interpreted):
    words = interpreted["philox"][:, : len(SEEDS) * GROUPS].reshape(4, len(SEEDS), GROUPS)
    assert torch.equal(words.permute(1, 2, 0).flatten(1), noise_words(SEEDS, 4 * GROUPS))


def test_words_equal_the_published_known_answers(interpreted):
    start = len(SEEDS) * GROUPS
    words = interpreted["philox"][:, start : start + len(KNOWN_ANSWERS)].T
    assert words.tolist() == [list(answer) for _, _, answer in KNOWN_ANSWERS]


def test_normals_are_within_the_contract_everywhere(given, interpreted):
    exact = torch.stack(_normals(*given["normal_words"]))
    # 1e-5 absolute is the contract (docs: the noise contract). NaN would fail the comparison.
    assert ((interpreted["normals"].double() - exact).abs() <= 1e-5).all()
    assert exact.abs().max() > 6.7  # the extreme words were among them


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_the_definition(given, interpreted, name):
    case, patches = given["cases"][name], interpreted["patches"][name]
    lowest, highest = _bounds(case)
    assert patches.dtype == case["dtype"]
    assert patches.shape == lowest.shape
    assert patches.is_contiguous()
    assert ((lowest <= patches) & (patches <= highest)).all()  # False for memory that was not written: it is NaN


@pytest.mark.parametrize("patch_size", [16, 14])
@pytest.mark.parametrize("outer", [(), (2,)])
def test_a_draw_does_not_depend_on_the_configuration(interpreted, patch_size, outer):
    one, *others = (interpreted["patches"][f"{patch_size}, {outer}, {threads}"] for threads in THREADS)
    assert not one.isnan().any()
    for other in others:
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradient_is_the_sum_in_order(given, interpreted, name):
    case, pixels = given["backward"][name], interpreted["pixels"][name]
    assert pixels.is_contiguous()
    # Bitwise: one float32 addition after the other, one multiplication, one rounding.
    expected = _stored(_pixels(case, torch.float32), case["dtype"])
    assert pixels.dtype == expected.dtype
    assert torch.equal(pixels, expected)
    # And that is the gradient: a rounding of 2^-24 for every summand of the largest partial sum, for 1 / std and for
    # the product, and one that may be cut off for the pixels' dtype.
    exact = _pixels(case, torch.float64)
    largest = _pixels(case | {"grad": case["grad"].abs()}, torch.float64)
    error = (2 + case["grad"].shape[:-3].numel()) * 2.0**-24 * largest + torch.finfo(case["dtype"]).eps * exact.abs()
    assert ((pixels.double() - exact).abs() <= error).all()


def test_gradient_does_not_depend_on_the_configuration(interpreted):
    one, *others = (interpreted["pixels"][f"threads {threads}"] for threads in THREADS)
    assert not one.isnan().any()
    for other in others:
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("Triton", 1),
        ("float64 patches", 0),
        ("float64 pixels", 0),
        ("65 channels", 0),
        ("backward, Triton", 1),
        ("backward, float64 gradient", 0),
        ("backward, float64 pixels", 0),
        ("backward, 65 channels", 0),
    ],
)
def test_cuda_kernel_serves_what_it_can_and_the_reference_the_rest(given, interpreted, name, launches):
    function, case = given["dispatch"][name]
    result, launched = interpreted["dispatch"][name]
    assert launched == launches
    assert result.dtype == case["dtype"]
    if function == "noise_patchify":
        lowest, highest = _bounds(case)
        assert ((lowest <= result) & (result <= highest)).all()
    else:
        # Two summands; the kernel multiplies by 1 / std where the reference divides: four roundings of 2^-24.
        torch.testing.assert_close(result.double(), _pixels(case, torch.float64), rtol=0, atol=4 * 2.0**-24 * 8 / 0.2)


@pytest.mark.parametrize("name", HUGE)
def test_offsets_beyond_32_bits(given, interpreted, name):
    _, batch, case = given["huge"][name]
    among_many, alone = interpreted["huge"][name]
    largest = max(among_many.numel(), *(case[name].numel() for name in ("images", "grad") if name in case))
    assert batch * largest > 2**31
    # Bits are compared, since elements that the last program does not write are NaN in both.
    assert torch.equal(among_many.view(torch.int16), alone.view(torch.int16))
    assert (~alone.isnan()).any()


def test_sizes_that_the_kernels_leave_to_the_reference():
    kernel = pytest.importorskip("denim.kernels.noise_patchify_triton")

    def serves(batch, side, patch_size=16, channels=3, dtype=torch.bfloat16):
        images = torch.empty(batch, side, side, channels, dtype=torch.uint8, device="meta")
        grad = torch.empty(batch, (side // patch_size) ** 2, patch_size**2 * channels, dtype=dtype, device="meta")
        mean, std = [0.5] * channels, [0.25] * channels
        forward = kernel.serves(images, grad[:, 0, 0], grad[:, 0, 0], patch_size, mean, std, dtype)
        assert kernel.serves_backward(grad, side, side, patch_size, std, torch.float32) == forward
        return forward

    assert serves(4096, 224)
    assert serves(0, 224)
    assert not serves(1, 32768)  # 3 * 2^30 elements of one image
    assert serves(2**27, 32, 4)
    assert not serves(2**31, 32, 4)  # that many programs, one at least for an image
    assert not serves(2, 32, dtype=torch.float64)
