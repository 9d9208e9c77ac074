"""The Triton normals with the largest errors that a GPU's approximate lg2, sin and cos may have."""

import math

import pytest
import torch

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

ALL = 0xFFFFFFFF
WORDS = 1 << 17
# PTX ISA, sections on lg2, sin and cos: largest absolute errors of the approximate instructions.
LG2, SINE = 2.0**-22, 2.0**-20.5
# Signs of the errors of (logarithm, cosine and sine). The two normals use one of cosine and sine each.
ERRORS = [(0.0, 0.0)] + [(lg2 * LG2, sine * SINE) for lg2 in (-1, 1) for sine in (-1, 1)]
# Middles of 2 * NEAR words around (at the ends: next to) each place where the arithmetic changes or loses digits.
NEAR = 4096
PLACES = {"u = 0": NEAR, "u = 1/2": 1 << 31, "series begins": (1 << 32) - (1 << 26), "u = 1": (1 << 32) - NEAR}


@pytest.fixture(scope="module")
def words() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    near = [torch.arange(-NEAR, NEAR) + place for place in PLACES.values()]
    rest = torch.randint(0, 1 << 32, (WORDS - 2 * NEAR * len(PLACES),), generator=generator)
    second = torch.randint(0, 1 << 32, (WORDS,), generator=generator)
    # Whole quarters of the circle and their neighbours, where cosine or sine is 1 and the other 0.
    quarters = torch.tensor([(quarter << 30) + step & ALL for quarter in range(4) for step in (-1, 0, 1)])
    second[: WORDS // 2 : 2] = quarters.repeat(WORDS)[: WORDS // 4]
    return torch.stack([torch.cat([*near, rest]), second])


@pytest.fixture(scope="module")
def error(words, tmp_path_factory, run_script) -> dict[str, torch.Tensor]:
    """Largest error against the float64 definition over all signs and both normals, for every word."""
    folder = tmp_path_factory.mktemp("noise")
    torch.save({"words": words, "errors": ERRORS}, folder / "given.pt")
    run_script("kernels/interpreter_noise.py", folder / "given.pt", folder / "got.pt")
    got = torch.load(folder / "got.pt", weights_only=True)
    first, second = words.double()
    # float64 holds u = (first + 1/2) / 2^32 exactly, so its logarithm is good next to 1 too.
    radius, angle = (-2 * ((first + 0.5) * 2.0**-32).log()).sqrt(), second * (2 * math.pi * 2.0**-32)
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()])
    assert exact.abs().max() > 6.76  # the extreme words are among them
    assert got["pinned"].shape == (len(ERRORS), 2, WORDS)
    return {name: (normals - exact).abs().nan_to_num(math.inf).amax(dim=(0, 1)) for name, normals in got.items()}


def _near(error: torch.Tensor, place: str) -> torch.Tensor:
    first = list(PLACES).index(place) * 2 * NEAR
    return error[first : first + 2 * NEAR]


def test_the_contract_holds_with_the_instructions_worst_errors(error):
    assert error["pinned"].max() <= 1e-5
    # The errors are in the results: those of sine and cosine alone, times the largest radius, are 4.5e-6.
    assert error["pinned"].max() > 6.7 * SINE


@pytest.mark.parametrize("place", PLACES)
def test_every_place_where_the_arithmetic_changes(error, place):
    assert _near(error["pinned"], place).max() <= 1e-5


@pytest.mark.parametrize("changed", ["without series", "plain u"])
def test_arithmetic_that_is_not_pinned_breaks_the_contract(error, changed):
    """Next to u = 1, by errors of 1e-4 and more (a NaN counts as infinite); elsewhere it is as good."""
    assert _near(error[changed], "u = 1").max() > 1e-4
    for place in ("u = 0", "u = 1/2"):
        assert _near(error[changed], place).max() <= 1e-5
