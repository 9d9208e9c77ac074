from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from denim.kernels import Domain, Stream, derive_seeds, draw_seeds, noise_words, normal_noise, uniform_noise
from denim.kernels import noise as module
from denim.kernels.noise import noise_backend, normals_from_words, philox

WORD = 0xFFFFFFFF
# The contract: largest absolute error of a normal against the float64 definition, for every backend.
NORMAL_ERROR = 1e-5
# sqrt(66 ln 2), the radius at u = 2^-33.
LARGEST = math.sqrt(66 * math.log(2))
DRAWS = 10_000_000

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# Of seed 7, from the references below: words in numpy, normals in float64.
GOLDEN_WORDS = [0xF4607A2D, 0xC009F9DC, 0x1D3ABA42, 0x15EDAC82]
GOLDEN_NORMALS = [0.0002916, -0.304847, 1.7887574, 1.0678725, 0.3764035, -1.2870117, 1.8115039, -0.4912409]
GOLDEN_SEEDS = [-3874093396505381283, -7347498702865581010, 6109070688390409149]
SEEDS = [0, 1, -1, 12345, 2**32, -(2**63), 2**63 - 1, 0x299F31D0A4093822]


def reference_philox(counter, key):
    """Philox (Salmon et al. 2011) in numpy's unsigned integers, which torch lacks on most backends."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.asarray(word, dtype=np.uint64) for word in key]
    mask, shift = np.uint64(WORD), np.uint64(32)
    for turn in range(10):
        if turn:
            k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ k[0], p1 & mask, (p0 >> shift) ^ c[3] ^ k[1], p0 & mask]
    return c


def reference_words(seed: int, count: int, stream: int = 0) -> np.ndarray:
    groups = np.arange((count + 3) // 4, dtype=np.uint64)
    key = (seed & WORD, (seed >> 32) & WORD)
    return np.stack(
        reference_philox((groups, 0 * groups, 0 * groups + np.uint64(stream), 0 * groups), key), -1
    ).ravel()[:count]


def reference_normals(first, second):
    """The definition (Box and Muller) in float64."""
    u = (np.asarray(first, dtype=np.float64) + 0.5) / 2.0**32
    angle = 2 * np.pi * np.asarray(second, dtype=np.int64).astype(np.uint32).view(np.int32).astype(np.float64) / 2.0**32
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


def chosen_words() -> tuple[torch.Tensor, torch.Tensor]:
    """First words around every place where the arithmetic changes, with every kind of angle, and random words."""
    switch = 2**32 - 2**26  # h = -2^-6, where the series replaces the logarithm
    centres = (0, 2**26, 2**31, 2**32 - 2**8, switch, 2**32 - 1)
    radius = {c + d for c in centres for d in range(-300, 300) if 0 <= c + d <= WORD}
    angles = [0, 1, WORD, 2**29, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 0x12345678]
    pairs = np.array(list(itertools.product(sorted(radius), angles)), dtype=np.int64)
    random = np.random.default_rng(0).integers(0, 2**32, (200_000, 2))
    # Random words near u = 1, which uniform words rarely reach.
    random[:50_000, 0] = WORD - (2.0 ** np.random.default_rng(1).uniform(0, 27, 50_000)).astype(np.int64)
    words = torch.from_numpy(np.concatenate([pairs, random]))
    return words[:, 0].contiguous(), words[:, 1].contiguous()


@pytest.fixture(scope="module")
def compiled_arithmetic():
    """Philox and normals compiled by torch, for words that the test chooses."""
    if noise_backend() != "compiled":
        pytest.skip("no C++ compiler: noise is drawn eagerly here")

    @torch.compile(dynamic=True)
    def arithmetic(counter, key, first, second):
        return philox(tuple(counter), tuple(key)), normals_from_words(first, second)

    return arithmetic


def counters_and_keys():
    random = np.random.default_rng(2).integers(0, 2**32, (6, 1000))
    known = np.array([[*counter, *key] for counter, key, _ in KNOWN_ANSWERS]).T
    columns = torch.from_numpy(np.concatenate([known, random], axis=1))
    return columns[:4].contiguous(), columns[4:].contiguous()


def test_words_are_the_published_ones():
    counter, key = counters_and_keys()
    words = torch.stack(philox(tuple(counter), tuple(key)))
    for column, (_, _, answer) in enumerate(KNOWN_ANSWERS):
        assert words[:, column].tolist() == answer
    assert np.array_equal(words.numpy(), np.stack(reference_philox(counter.numpy(), key.numpy())).astype(np.int64))


@pytest.mark.slow
def test_compiled_arithmetic_keeps_words_and_normals(compiled_arithmetic):
    counter, key = counters_and_keys()
    first, second = chosen_words()
    words, normals = compiled_arithmetic(counter, key, first, second)
    assert torch.equal(torch.stack(words), torch.stack(philox(tuple(counter), tuple(key))))
    for normal, reference in zip(normals, reference_normals(first.numpy(), second.numpy()), strict=True):
        np.testing.assert_allclose(normal.numpy(), reference, rtol=0, atol=NORMAL_ERROR, equal_nan=False)


def test_normals_follow_the_definition_at_every_edge():
    first, second = chosen_words()
    for normal, reference in zip(
        normals_from_words(first, second), reference_normals(first.numpy(), second.numpy()), strict=True
    ):
        assert normal.dtype == torch.float32
        # assert_allclose counts a NaN that the reference lacks as a mismatch.
        np.testing.assert_allclose(normal.numpy(), reference, rtol=0, atol=NORMAL_ERROR, equal_nan=False)
        assert normal.abs().max().item() <= LARGEST + NORMAL_ERROR


def test_largest_normal_and_smallest_radius():
    zero = torch.zeros(1, dtype=torch.int64)
    assert abs(normals_from_words(zero, zero)[0].item() - LARGEST) < NORMAL_ERROR
    # u = 1 - 2^-33: -2 ln u = 2^-32. float32 u would be 1, and the normal 0.
    assert normals_from_words(zero + WORD, zero)[0].item() == pytest.approx(2.0**-16, rel=1e-6)


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("count", [1, 3, 4, 5, 127])
def test_words_of_a_seed(stream, count):
    words = noise_words(torch.tensor(SEEDS), count, stream)
    assert words.shape == (len(SEEDS), count)
    for row, seed in zip(words, SEEDS, strict=True):
        assert np.array_equal(row.numpy(), reference_words(seed, count, stream).astype(np.int64))


def test_normals_of_a_seed_are_its_words_in_pairs(global_rng_untouched):
    shape = (5, 7, 3)
    noise = normal_noise(torch.tensor(SEEDS), shape)
    assert noise.dtype == torch.float32
    assert noise.shape == (len(SEEDS), *shape)
    for sample, seed in zip(noise, SEEDS, strict=True):
        words = reference_words(seed, 108)
        reference = np.stack(reference_normals(words[0::2], words[1::2]), -1).ravel()[: math.prod(shape)]
        np.testing.assert_allclose(sample.flatten().numpy(), reference, rtol=0, atol=NORMAL_ERROR, equal_nan=False)


def test_golden_values():
    """These values must not change: results that were published with a seed depend on them."""
    assert noise_words(torch.tensor(7), 4).tolist() == GOLDEN_WORDS
    golden = torch.tensor(GOLDEN_NORMALS)
    torch.testing.assert_close(normal_noise(torch.tensor(7), (8,)), golden, rtol=0, atol=NORMAL_ERROR)
    assert derive_seeds(7, Domain.TRAINING, torch.arange(3)).tolist() == GOLDEN_SEEDS
    assert derive_seeds(-1, Domain.SCORE, torch.tensor([2**40]), step=2**33 + 5, draw=9).tolist() == [
        -9085532206487519050
    ]


def test_enumerations_are_pinned():
    """The numbers are part of the contract: a new member must not renumber others."""
    names = ["NOISE", "SEED", "MASK", "START", "SIGMA", "ERASE", "MIX", "DROP_PATH"]
    assert [stream.name for stream in sorted(Stream)] == names
    stages = ["TRAINING", "DEFENSE", "ATTACK", "SELECTION", "CONFIRMATION", "SCORE", "CERTIFY"]
    names = [*stages, "FROZEN", "COPY", "AUGMENT", "FINETUNING", "SUBSET", "HELD_OUT", "VALIDATION"]
    assert [domain.name for domain in sorted(Domain)] == names
    assert [int(domain) for domain in sorted(Domain)] == list(range(14))
    assert [int(stream) for stream in sorted(Stream)] == list(range(8))


@pytest.mark.slow
def test_distribution_of_ten_million_draws():
    """Moments and the Kolmogorov-Smirnov distance, each within five standard errors of a standard normal's."""
    seeds = derive_seeds(3, Domain.TRAINING, torch.arange(10))
    draws = normal_noise(seeds, (DRAWS // 10,)).flatten().to(torch.float64).numpy()
    assert np.isfinite(draws).all()
    assert np.abs(draws).max() <= LARGEST + NORMAL_ERROR
    # Standard errors of sample moments of N(0, 1): 1/n, 2/n, 6/n and 24/n are the variances. The cut at 6.764 moves
    # the fourth moment by 1e-7, which is far below.
    centred = draws - draws.mean()
    variance = np.mean(centred**2)
    assert abs(draws.mean()) < 5 * math.sqrt(1 / DRAWS)
    assert abs(variance - 1) < 5 * math.sqrt(2 / DRAWS)
    assert abs(np.mean(centred**3) / variance**1.5) < 5 * math.sqrt(6 / DRAWS)
    assert abs(np.mean(centred**4) / variance**2 - 3) < 5 * math.sqrt(24 / DRAWS)
    p_value = stats.kstest(draws, "norm").pvalue
    assert p_value > 2 * stats.norm.sf(5)
    # Neighbours, the two normals of a pair among them: values and squares are uncorrelated (variance of the
    # correlation is 1/n).
    for lag in (1, 2, 3, 4, 1_000_000):
        for values in (draws, draws**2 / math.sqrt(2)):
            left, right = values[:-lag] - values.mean(), values[lag:] - values.mean()
            assert abs(np.mean(left * right)) < 5 / math.sqrt(left.size)


def test_uniforms():
    seeds = derive_seeds(3, Domain.TRAINING, torch.arange(10))
    uniform = uniform_noise(seeds, (50, 400), Stream.MASK)
    assert uniform.dtype == torch.float32
    assert uniform.shape == (10, 50, 400)
    words = noise_words(seeds, 20_000, Stream.MASK).to(torch.float64)
    torch.testing.assert_close(uniform.flatten(1).to(torch.float64), (words + 0.5) / 2**32, rtol=0, atol=2**-24)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 2 * stats.norm.sf(5)


def test_uniform_below_one_for_the_largest_word(monkeypatch):
    largest = torch.tensor([[0, WORD]])
    monkeypatch.setattr("denim.kernels.noise.noise_words", lambda *_: largest)
    uniform = uniform_noise(torch.tensor([0]), (2,), Stream.MASK)
    assert uniform.tolist() == [[2.0**-33, 1 - 2.0**-24]]


def test_streams_and_seeds_differ():
    """Two independent lists of 256 words agree at some place with probability 256 / 2^32: any equality is a bug."""
    rows = [noise_words(torch.tensor(SEEDS), 256, stream) for stream in Stream]
    for left, right in itertools.combinations(torch.cat(rows), 2):
        assert not (left == right).any()


def reference_seed(run: int, domain: int, sample: int, step: int, draw: int) -> int:
    halves = [(value & WORD, (value >> 32) & WORD) for value in (run, sample, step)]
    first = reference_philox((*halves[1], 1, domain), halves[0])
    second = reference_philox((*halves[2], 1, draw), first[:2])
    return int(np.uint64(second[0] | (second[1] << np.uint64(32))).astype(np.int64))


@given(
    run=st.integers(-(2**63), 2**63 - 1),
    domain=st.sampled_from(Domain),
    sample=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**63 - 1),
    draw=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_derived_seed_is_the_documented_hash(run, domain, sample, step, draw):
    samples = torch.tensor([sample, 0])
    seeds = derive_seeds(run, domain, samples, step, draw)
    assert seeds.tolist() == [reference_seed(run, domain, s, step, draw) for s in (sample, 0)]
    tensors = derive_seeds(torch.tensor(run), domain, samples, torch.tensor([step, step]), torch.tensor(draw))
    assert torch.equal(tensors, seeds)


def test_derived_seeds_do_not_collide(global_rng_untouched):
    """Two of 2.6e6 random seeds of 64 bits are equal with probability 2e-7."""
    samples = torch.arange(10_000)
    parts = [
        derive_seeds(run, domain, samples, step=step, draw=draw)
        for run in (0, 1)
        for domain in Domain
        for step, draw in (
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
            (2**32, 0),
            (0, 2**31),
            (7, 3),
            (3, 7),
            (10**6, 0),
            (0, 10**6),
        )
    ]
    seeds = torch.cat(parts)
    assert seeds.unique().numel() == seeds.numel() == 200_000 * len(Domain)


def test_draw_seeds_stack_the_draws():
    samples, step = torch.tensor([5, 9, 2**35]), torch.tensor([0, 1, 2])
    seeds = draw_seeds(3, Domain.ATTACK, samples, 4, step=step)
    assert seeds.shape == (4, 3)
    for draw in range(4):
        assert torch.equal(seeds[draw], derive_seeds(3, Domain.ATTACK, samples, step, draw))


@pytest.fixture(params=["eager", "compiled"])
def backend(request):
    """Draws by the eager or by the compiled arithmetic. Bitwise equality is promised within each of them."""
    if request.param == "compiled" and noise_backend() != "compiled":
        pytest.skip("no C++ compiler: noise is drawn eagerly here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("denim.kernels.noise.noise_backend", lambda: request.param)
        yield request.param


@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    count=st.integers(1, 300),
    longer=st.integers(0, 300),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_draw_depends_on_seed_and_position_alone(backend, seeds, count, longer, data):
    """The same bits for every batch, place in the batch, stride and size of the sample."""
    batch = torch.tensor(seeds)
    noise = normal_noise(batch, (count,))
    place = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(normal_noise(batch[place], (count,)), noise[place])
    assert torch.equal(normal_noise(batch[place : place + 1], (count,))[0], noise[place])
    assert torch.equal(normal_noise(batch, (count + longer,))[:, :count], noise)
    strided = torch.stack([batch.flip(0), batch.flip(0) + 1], dim=1)[:, 0]
    assert torch.equal(normal_noise(strided, (count,)), noise.flip(0))
    outer = torch.stack([batch, batch ^ 1])
    assert torch.equal(normal_noise(outer, (count,))[0], noise)
    assert torch.equal(normal_noise(outer.mT, (count,))[:, 0], noise)


def test_a_draw_of_many_positions_is_the_same(backend):
    """So many positions that torch divides the work between threads, at places that depend on the size."""
    seeds = torch.arange(3)
    noise = normal_noise(seeds, (200_003,))
    assert torch.equal(normal_noise(seeds[1], (200_003,)), noise[1])
    assert torch.equal(normal_noise(seeds, (70_001,)), noise[:, :70_001])


def test_eager_and_compiled_agree():
    """Words are the same; log2, sin and cos of the two vector libraries differ in the last bits."""
    if noise_backend() != "compiled":
        pytest.skip("no C++ compiler: noise is drawn eagerly here")
    seeds = torch.tensor([*SEEDS, *range(100, 116)])
    words = noise_words(seeds, 20_000).unflatten(-1, (-1, 2))
    eager = torch.stack(normals_from_words(words[..., 0], words[..., 1]), dim=-1).flatten(1)
    torch.testing.assert_close(normal_noise(seeds, (20_000,)), eager, rtol=0, atol=NORMAL_ERROR)


def test_caller_state_does_not_change_the_draw():
    """Nor does it compile again: after eight compilations torch would use eager arithmetic without a message."""
    seeds = torch.arange(6)
    noise = normal_noise(seeds, (100,))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    threads = torch.get_num_threads()
    contexts = [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("cpu"),
    ]
    for context in contexts:
        with context:
            assert torch.equal(normal_noise(seeds.clone(), (100,)), noise)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(normal_noise(seeds, (100,)), noise)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(normal_noise(torch.arange(25), (100,))[:6], noise)  # as many rows as groups
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_a_compilation_says_so_and_code_from_the_cache_does_not(monkeypatch, caplog):
    if noise_backend() != "compiled":
        pytest.skip("no C++ compiler: noise is drawn eagerly here")

    def stand_in(seeds, groups):  # the generator itself takes half a minute to compile
        row = seeds[:, None] + torch.arange(groups)
        return row, row + 1, row + 2, row + 3

    notices = []
    with torch._inductor.utils.fresh_cache():
        for _ in range(2):
            caplog.clear()
            # Another code object each time: torch.compile keeps what it made of a code object in memory.
            copy = types.FunctionType(stand_in.__code__.replace(), globals())
            monkeypatch.setattr(module, "_group_normals", copy)
            module._compiled_group_normals.__wrapped__()
            notices.append([record.getMessage() for record in caplog.records if record.name == "denim"])
    (message,), nothing = notices
    assert message.startswith("denim: compiling the noise")
    assert nothing == []


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_scalar_samples(shape):
    assert normal_noise(torch.arange(3), shape).shape == (3, *shape)
    assert noise_words(torch.arange(3), math.prod(shape)).shape == (3, math.prod(shape))
    assert normal_noise(torch.zeros(0, 2, dtype=torch.int64), (4, 3)).shape == (0, 2, 4, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8])
def test_seeds_of_another_dtype_are_refused(dtype):
    seeds = torch.zeros(2, dtype=dtype)
    for call in (
        lambda: normal_noise(seeds, (4,)),
        lambda: noise_words(seeds, 4),
        lambda: uniform_noise(seeds, (4,), Stream.MASK),
        lambda: derive_seeds(0, Domain.SCORE, seeds),
        lambda: derive_seeds(seeds, Domain.SCORE, torch.arange(2)),
        lambda: derive_seeds(0, Domain.SCORE, torch.arange(2), step=seeds),
        lambda: derive_seeds(0, Domain.SCORE, torch.arange(2), draw=seeds),
    ):
        with pytest.raises(TypeError, match="int64"):
            call()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("eager", "eager"), ("compiled", "compiled"), ("fast", "expected auto, eager or compiled")],
)
def test_backend_is_chosen_by_environment(monkeypatch, setting, expected):
    monkeypatch.setenv("DENIM_NOISE", setting)
    choose = noise_backend.__wrapped__
    if setting == "fast":
        with pytest.raises(ValueError, match=expected):
            choose()
    else:
        assert choose() == expected


def test_backend_without_a_compiler_is_eager(monkeypatch, tmp_path):
    monkeypatch.delenv("DENIM_NOISE")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert noise_backend.__wrapped__() == "eager"


@pytest.mark.slow
def test_eager_backend_in_a_fresh_process_gives_the_golden_values():
    code = "import torch; from denim.kernels import normal_noise; print(*normal_noise(torch.tensor(7), (8,)).tolist())"
    environment = {**os.environ, "DENIM_NOISE": "eager"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    np.testing.assert_allclose([float(x) for x in printed.stdout.split()], GOLDEN_NORMALS, rtol=0, atol=NORMAL_ERROR)
