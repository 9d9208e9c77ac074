"""Every kernel keeps to its budget, and what became worse or better is said."""

import os

import pytest

WHERE = "Triton is a dependency on Linux x86-64 alone"
triton = pytest.importorskip("triton", reason=WHERE)
budgets = pytest.importorskip("denim.benchmarks.machine_code.budgets", reason=WHERE)
cases = pytest.importorskip("denim.benchmarks.machine_code.cases", reason=WHERE)
machine = pytest.importorskip("denim.benchmarks.machine_code.builds", reason=WHERE)

TARGETS = machine.TARGETS
AVAILABLE = [target for target in TARGETS if machine.unavailable(target) is None]


def test_every_kernel_keeps_to_its_budget(built):
    # Where it is enforced, an upgrade or a Triton without a backend must not switch it off.
    enforced = bool(os.environ.get("CI"))
    assert list(TARGETS) == AVAILABLE or not enforced, [machine.unavailable(target) for target in TARGETS]
    version, kept = budgets.read_budgets()
    if version != triton.__version__:
        message = (
            f"budgets were made with Triton {version}, this is {triton.__version__}, whose compiler counts otherwise: "
            "run `denim kernels --update-budgets` and look at the difference"
        )
        (pytest.fail if enforced else pytest.skip)(message)
    failures, _better = budgets.compare(kept, built, complete=list(TARGETS) == AVAILABLE)
    assert failures == []


BEFORE = {
    "registers": 48,
    "occupancy": 0.625,
    "spills": 0,
    "local": 0,
    "loads": {"4": 2, "16": 3},
    "stores": {"16": 6},
    "instructions": 28.8,
}


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"registers": 56, "occupancy": 0.5625}, ["occupancy 62.5% -> 56.2% (48 -> 56 registers)"]),
        ({"spills": 8}, ["spills 0 -> 8"]),
        ({"local": 2}, ["local-memory instructions 0 -> 2"]),
        ({"loads": {"4": 14}}, ["loads 2 x 4 bytes + 3 x 16 bytes -> 14 x 4 bytes"]),
        ({"stores": {"8": 12}}, ["stores 6 x 16 bytes -> 12 x 8 bytes"]),
        ({"instructions": 29.7}, ["instructions per output element 28.80 -> 29.70 (+3.1%)"]),
        ({"instructions": 29.7, "stores": {"8": 12}}, ["stores", "instructions"]),
        # Within an occupancy step, within the tolerance, and one scalar more.
        ({"registers": 47, "instructions": 29.6, "loads": {"4": 3, "16": 3}}, []),
    ],
)
def test_what_became_worse_fails_with_before_and_after(change, texts):
    failures, better = budgets.compare({"k": {"sm_90": BEFORE}}, {"k": {"sm_90": BEFORE | change}}, complete=True)
    assert len(failures) == len(texts)
    for failure, text in zip(failures, texts, strict=True):
        assert failure.startswith("k, sm_90: ")
        assert text in failure
    assert better == []


def test_spills_fail_even_where_the_budget_has_some():
    spilling = BEFORE | {"spills": 8}
    failures, _ = budgets.compare({"k": {"sm_90": spilling}}, {"k": {"sm_90": spilling}}, complete=True)
    assert failures == ["k, sm_90: spills 8 -> 8"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 40, "occupancy": 0.75}, "occupancy 62.5% -> 75.0%"),
        ({"instructions": 24.0}, "28.80 -> 24.00 (-16.7%)"),
    ],
)
def test_what_became_better_is_said(change, text):
    failures, (better,) = budgets.compare({"k": {"sm_90": BEFORE}}, {"k": {"sm_90": BEFORE | change}}, complete=True)
    assert failures == []
    assert text in better


def test_entries_without_counterpart_fail_and_say_what_to_do():
    failures, _ = budgets.compare({}, {"new": {"sm_90": BEFORE}}, complete=True)
    assert "new, sm_90: has no budget" in failures[0]
    assert "--update-budgets" in failures[0]
    kept = {"old": {"sm_80": BEFORE, "sm_90": BEFORE}}
    failures, _ = budgets.compare(kept, {"old": {"sm_90": BEFORE}}, complete=True)
    assert failures[0].startswith("old, sm_80: has a budget but is not built")
    assert budgets.compare(kept, {"old": {"sm_90": BEFORE}}, complete=False) == ([], [])


def test_a_report_keeps_to_the_budgets_made_from_it(built, tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(budgets.budgets_text(built))
    version, kept = budgets.read_budgets(path)
    assert version == triton.__version__
    assert budgets.compare(kept, built, complete=True) == ([], [])
    with pytest.raises(ValueError, match="update-budgets"):
        budgets.read_budgets(tmp_path / "none")
    path.write_text('{"triton": "3.6.0"}')
    with pytest.raises(ValueError, match=r"budgets\.json has no entry 'budgets'"):
        budgets.read_budgets(path)


def test_budget_of_an_entry_keeps_what_is_compared(built):
    entry = built[cases.BUILDS[0].name]["sm_90"]
    assert set(budgets.budget(entry)) == set(BEFORE)
