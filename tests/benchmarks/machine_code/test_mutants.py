"""Kernels with a mistake are caught by the proofs, and kernels without one pass them; the page says so."""

from __future__ import annotations

import collections

import pytest

WHERE = "Triton is a dependency on Linux x86-64 alone"
pytest.importorskip("triton", reason=WHERE)
cases = pytest.importorskip("denim.benchmarks.machine_code.cases", reason=WHERE)
mutants = pytest.importorskip("denim.benchmarks.machine_code.mutants", reason=WHERE)

MUTANTS = {mutant.name: mutant for mutant in mutants.MUTANTS}
# One that the source shows, one that the compiler's text alone shows, and one of each that machine code shows.
FEW = (
    "half the angle of sine and cosine, on NVIDIA alone",
    "a store that lost its mask in the compiler",
    "one pair of bfloat16 truncated by the compiler",
    "no mask where the last program stores",
)


def test_names_tell_mutants_apart():
    assert len(MUTANTS) == len(mutants.MUTANTS) >= 15


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_the_sources_of_today_and_has_a_case_that_is_built(mutant):
    if mutant.case != mutants.HUGE:
        assert [one for one in cases.BUILDS if (one.case, one.part) == (mutants._case(mutant.case), mutant.part)]
    if mutant.file != mutants.PTX:
        source = (mutants.KERNELS / f"{mutant.file}.py").read_text()
        changed = mutants._edited(source, mutant)
        assert changed != source
        compile(changed, mutant.file, "exec")


def test_a_mutant_that_changes_nothing_is_out_of_date():
    mutant = mutants.MUTANTS[0]._replace(edits=(("no such text", "another"),))
    with pytest.raises(ValueError, match="'no such text' is not in noise_triton"):
        mutants._edited("twice twice", mutant)
    with pytest.raises(ValueError, match="adapt the mutant"):
        mutants._edited("twice twice", mutant._replace(edits=(("twice", "once"),)))


NOTHING = dict.fromkeys(mutants.PROOFS, "")


def test_faults_are_mutants_that_pass_and_kernels_that_do_not():
    caught = NOTHING | {"executed": "Race"}
    assert mutants.faults({("a", True): caught, ("a", False): NOTHING}) == []
    (text,) = mutants.faults({("a", True): NOTHING, ("a", False): NOTHING})
    assert text == "a: no proof notices it"
    (text,) = mutants.faults({("a", True): caught, ("a", False): caught})
    assert text == "the kernel of 'a' as it is, executed: Race"


def test_the_page_has_a_row_for_each_mutant_and_counts_those_that_execution_alone_shows():
    found = {(name, True): NOTHING | {"executed": "Race"} for name in MUTANTS}
    found[mutants.MUTANTS[0].name, True] = NOTHING | {"interpreter": "1 wrong of 1", "executed": "Race"}
    text = mutants.page(mutants.MUTANTS, found)
    assert f"{len(MUTANTS)} mutants, all caught; {len(MUTANTS) - 1} of them by execution alone." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(MUTANTS)
    assert rows[2].endswith("| 1 wrong of 1 | - | - | Race |")


@pytest.mark.slow
def test_a_few_mutants_are_caught_and_the_kernel_as_it_is_passes():
    found = mutants.prove_all([MUTANTS[name] for name in FEW])
    assert mutants.faults(found) == []
    assert collections.Counter(changed for _, changed in found) == {True: 4, False: 1}
    angle, mask, rounding, tail = ({proof for proof, text in found[name, True].items() if text} for name in FEW)
    assert angle == mask == {"executed"}
    assert rounding == {"invariants", "executed"}
    assert tail == {"interpreter", "executed"}
    assert found[FEW[1], True]["executed"] == "OutOfBounds"
