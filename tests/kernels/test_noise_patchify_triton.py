"""The Triton kernels of `noise_patchify`: their source in the interpreter."""

import pytest
import torch

from denim.benchmarks.baselines import unpatchify_planes
from denim.benchmarks.case import BACKWARD, FORWARD
from denim.benchmarks.cases import OPERATIONS, NoisePatchify
from denim.benchmarks.exact_noise import exact_normals
from denim.kernels import noise_words

pytestmark = pytest.mark.slow

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

# Threads of a program that are shipped; None takes the first.
THREADS = (None, 64, 256)
# Name: pass, samples, one of them. Only the last program of each runs, which lies beyond 2^31 elements of its input, of
# its output or of both.
ONE = {"dtype": torch.bfloat16, "batch": 1, "grid": (14, 14), "threads": 64}
HUGE = {
    "bytes and patches": (FORWARD, 16384, NoisePatchify(levels=(1,), **ONE)),
    "levels": (FORWARD, 4096, NoisePatchify(levels=(4,), **ONE)),
    "draws": (FORWARD, 4096, NoisePatchify(draws=(4,), **ONE)),
    "from level to level": (FORWARD, 8192, NoisePatchify(levels=(2,), draws=(2,), **ONE)),
    "planes": (FORWARD, 16384, NoisePatchify(pixels="bf16 planes", patch=14, **ONE | {"grid": (16, 16)})),
    "gradients": (BACKWARD, 4096, NoisePatchify(pixels="bf16 planes", levels=(4,), **ONE)),
    "gradients from level to level": (BACKWARD, 16384, NoisePatchify(pixels="bf16 planes", levels=(2,), **ONE)),
    "gradients and pixels": (BACKWARD, 16384, NoisePatchify(pixels="bf16 planes", **ONE)),
}


def _pixels(case: NoisePatchify, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of the pixels: summed over levels and draws one after the other in `dtype`, then scaled."""
    total = torch.zeros(upstream.shape[-3:], dtype=dtype)
    for grad in upstream.flatten(0, -4) if upstream.dim() > 3 else [upstream]:
        total += grad
    scale = (1 / torch.tensor(case.std, dtype=torch.float64)).to(dtype).repeat(case.patch**2)
    return unpatchify_planes(total * scale, (case.height, case.width), case.patch)


def _arguments(case: NoisePatchify, part: str) -> tuple:
    inputs = case.inputs("cpu")
    if part == FORWARD:
        return case.arguments(inputs)
    return case.backward_arguments(inputs, case.upstream(inputs, case.fused(**inputs)))


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

    return {
        "counters": torch.nn.functional.pad(counters, padding),
        "keys": torch.nn.functional.pad(keys, padding),
        "normal_words": torch.stack([first, second]),
        "huge": {name: (part, batch, case, _arguments(case, part)) for name, (part, batch, case) in HUGE.items()},
    }


@pytest.fixture(scope="module")
def answers(given, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(given, folder / "given.pt")
    run_script("kernels/interpreter_noise_patchify.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


def test_words_equal_the_torch_twin(answers):
    words = answers["philox"][:, : len(SEEDS) * GROUPS].reshape(4, len(SEEDS), GROUPS)
    assert torch.equal(words.permute(1, 2, 0).flatten(1), noise_words(SEEDS, 4 * GROUPS))


def test_words_equal_the_published_known_answers(answers):
    start = len(SEEDS) * GROUPS
    words = answers["philox"][:, start : start + len(KNOWN_ANSWERS)].T
    assert words.tolist() == [list(answer) for _, _, answer in KNOWN_ANSWERS]


def test_normals_are_within_the_contract_everywhere(given, answers):
    exact = torch.stack(exact_normals(*given["normal_words"]))
    # 1e-5 absolute is the contract (docs: the noise contract). NaN would fail the comparison.
    assert ((answers["normals"].double() - exact).abs() <= 1e-5).all()
    assert exact.abs().max() > 6.7  # the extreme words were among them


@pytest.mark.parametrize("part", [FORWARD, BACKWARD])
@pytest.mark.parametrize("patch", [16, 14])
@pytest.mark.parametrize("outer", [(), (2,)])
def test_the_result_does_not_depend_on_the_configuration(configurations, patch, outer, part):
    """One level and draw, and several: the kernel is compiled differently for them."""
    one, *others = (configurations[patch, outer, threads, part] for threads in THREADS)
    assert not one.isnan().any()
    for other in others:
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def configurations(interpret) -> dict:
    jobs = {}
    for patch in (16, 14):
        for outer in ((), (2,)):
            for threads in THREADS:
                case = NoisePatchify(pixels="fp32 planes", patch=patch, levels=outer, draws=outer, threads=threads)
                for part in (FORWARD, BACKWARD):
                    jobs[patch, outer, threads, part] = (case, part, _arguments(case, part), {})
    return interpret(launch=jobs)["launch"]


WITH_GRADIENT = [case for case in OPERATIONS["noise_patchify"] if case.leaves]


@pytest.mark.parametrize("case", WITH_GRADIENT, ids=lambda case: case.name)
def test_gradient_is_the_sum_in_order(interpreted, stored, case):
    *_, upstream, _, (pixels,) = interpreted("noise_patchify")[case.name]
    # Bitwise: one float32 addition after the other, one multiplication, one rounding.
    expected = stored(_pixels(case, upstream, torch.float32), pixels.dtype)
    assert torch.equal(pixels, expected)
    # And that is the gradient: a rounding of 2^-24 for every summand of the largest partial sum, for 1 / std and for
    # the product, and one that may be cut off for the pixels' dtype.
    exact = _pixels(case, upstream, torch.float64)
    largest = _pixels(case, upstream.abs(), torch.float64)
    error = (2 + case.outer) * 2.0**-24 * largest + torch.finfo(pixels.dtype).eps * exact.abs()
    assert ((pixels.double() - exact).abs() <= error).all()


@pytest.mark.parametrize("name", HUGE)
def test_offsets_beyond_32_bits(given, answers, name):
    _, batch, _, arguments = given["huge"][name]
    among_many, alone = answers["huge"][name]
    largest = max(among_many.numel(), arguments[0].numel())
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
