"""The chains that Denim is compared with compute what Denim computes: float64, results and gradients."""

import pytest
import torch

from denim.benchmarks import baselines
from denim.kernels import attack_step, decode_patches, noise_patchify, normal_noise, patch_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLAT = {"mean": torch.tensor(MEAN, dtype=torch.float64), "std": torch.tensor(STD, dtype=torch.float64)}
OWN = {"mean": MEAN, "std": STD}
BATCH, HEIGHT, WIDTH, PATCH = 3, 21, 14, 7
SHAPE = (BATCH, HEIGHT * WIDTH // PATCH**2, PATCH * PATCH * 3)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(dtype):
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (BATCH, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
    return data if dtype == torch.uint8 else (data.double() / 255).permute(0, 3, 1, 2).contiguous().requires_grad_()


def assert_same(ours, chain, leaves):
    """Results, and gradients of a random projection; some ten roundings of float64 numbers below 100."""
    assert ours.dtype == chain.dtype
    torch.testing.assert_close(ours, chain, rtol=1e-12, atol=1e-12)
    upstream = random(*ours.shape, seed=9)
    if leaves:
        gradients = zip(
            torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(chain, leaves, upstream), strict=True
        )
        for mine, other in gradients:
            assert mine.abs().max() > 0
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("levels", "draws"), [((), ()), ((4,), ()), ((), (2,)), ((4,), (2,))])
def test_noisy_patches(levels, draws):
    pixels = images(torch.float64)
    sigma = random(*levels, BATCH).abs() * 70
    seeds = torch.arange(BATCH) - 10 * torch.ones(*draws, BATCH, dtype=torch.int64).cumsum(0)
    ours = noise_patchify(pixels, sigma, seeds, patch_size=PATCH, **OWN, dtype=torch.float64)
    noise = normal_noise(seeds, (HEIGHT, WIDTH, 3)).movedim(-1, -3).double()
    chain = baselines.noisy_patches(
        pixels, sigma, **FLAT, patch_size=PATCH, noise=noise, draws=draws, dtype=torch.float64
    )
    assert_same(ours, chain, [pixels])


@pytest.mark.parametrize(("levels", "draws"), [((), ()), ((4,), (2,))])
def test_noise_of_its_own_is_standard_normal(levels, draws):
    data, sigma = images(torch.uint8), torch.full((*levels, BATCH), 51.0)
    flat = {name: value.float() for name, value in FLAT.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = baselines.noisy_patches(data, sigma, **flat, patch_size=PATCH, draws=draws)
    clean = baselines.noisy_patches(data, 0 * sigma, **flat, patch_size=PATCH, draws=draws)
    normal = (noisy - clean).unflatten(-1, (-1, 3)) * flat["std"] * 255 / 51
    # 2,646 independent normals or more: their mean has a standard deviation of 0.02, their variance of 0.03.
    assert normal.mean().abs() < 0.1
    assert abs(normal.var() - 1) < 0.15


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruction_loss(norm_pix, masked):
    prediction, pixels = random(*SHAPE).requires_grad_(), images(torch.float64).detach()
    options = {"patch_size": PATCH, "norm_pix": norm_pix, "mask": random(*SHAPE[:2], seed=3) < 0 if masked else None}
    ours = patch_loss(prediction, pixels, **OWN, **options)
    assert_same(ours, baselines.reconstruction_loss(prediction, pixels, **FLAT, **options), [prediction])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("statistics", [None, "input", "noisy"])
def test_decoded_pixels(statistics, normalize):
    prediction = random(2, *SHAPE).requires_grad_()
    options = {"img_size": (HEIGHT, WIDTH), "patch_size": PATCH, "statistics": statistics}
    if statistics == "input":
        options["source"] = images(torch.float64)
    if statistics == "noisy":
        options |= {"source": random(2, *SHAPE, seed=4).requires_grad_(), "sigma": random(2, BATCH).abs() * 100}
    own, flat = dict(OWN), dict(FLAT)
    if normalize:
        own["normalize"] = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        flat["normalize"] = tuple(torch.tensor(values, dtype=torch.float64) for values in own["normalize"])
    leaves = [prediction, *([options["source"]] if statistics else [])]
    ours = decode_patches(prediction, **own, **options)
    assert_same(ours, baselines.decoded_pixels(prediction, **flat, **options), leaves)


def test_linf_step():
    origin = images(torch.float64).detach()
    pixels = (origin + 0.1 * random(*origin.shape)).clamp(0, 1)
    sizes = {"step_size": random(BATCH).abs() * 0.05, "epsilon": random(BATCH, seed=5).abs() * 0.1}
    gradient = random(*origin.shape, seed=6)
    ours = attack_step(pixels, origin, gradient, **sizes)
    assert_same(ours, baselines.linf_step(pixels, origin, gradient, **sizes), [])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory, run_script):
    """The naive kernel on bytes and on planes, without noise and with that of sigma 255."""
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    data = {"bytes": images(torch.uint8), "planes": images(torch.float64).detach().float()}
    cases = {
        f"{name}, {sigma}": {
            "images": data[name],
            "sigma": torch.full((BATCH,), float(sigma)),
            "seed": 1,
            "patch_size": PATCH,
            "mean": mean,
            "std": std,
            "dtype": torch.float32,
        }
        for name in data
        for sigma in (0, 255)
    }
    folder = tmp_path_factory.mktemp("baselines")
    torch.save(cases, folder / "given.pt")
    run_script("benchmarks/interpreter_baselines.py", folder / "given.pt", folder / "got.pt")
    return cases, torch.load(folder / "got.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "planes"])
def test_the_naive_kernel_computes_the_same(interpreted, name):
    cases, got = interpreted
    data, sigma = cases[f"{name}, 0"]["images"], torch.zeros(BATCH)
    clean = noise_patchify(data, sigma, torch.zeros(BATCH, dtype=torch.int64), patch_size=PATCH, **OWN)
    # Three float32 roundings of numbers below 3.
    torch.testing.assert_close(got[f"{name}, 0"], clean, rtol=0, atol=1e-6)
    normal = (got[f"{name}, 255"] - got[f"{name}, 0"]).unflatten(-1, (-1, 3)) * torch.tensor(STD)
    # 2,646 normals: standard deviations 0.02 of the mean, 0.03 of the variance, 0.2 of the fourth moment.
    assert normal.mean().abs() < 0.1
    assert abs(normal.var() - 1) < 0.15
    assert abs(normal.pow(4).mean() - 3) < 0.9
    assert normal.flatten().unique().numel() > 0.99 * normal.numel()
