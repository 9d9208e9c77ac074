"""The limits of a GPU, against those that its documents give."""

import pytest

WHERE = "Triton is a dependency on Linux x86-64 alone"
machine = pytest.importorskip("denim.benchmarks.machine_code.builds", reason=WHERE)
roofline = pytest.importorskip("denim.benchmarks.machine_code.roofline", reason=WHERE)


# From NVIDIA's occupancy calculator and, for AMD, registers of a lane over registers of a wave.
@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "share"),
    [
        ("sm_90", 32, 4, 0, 1.0),
        ("sm_90", 33, 4, 0, 0.75),  # 40 registers: 12 blocks of 4 warps
        ("sm_90", 48, 4, 0, 0.625),
        ("sm_90", 64, 4, 0, 0.5),
        ("sm_90", 128, 4, 0, 0.25),
        ("sm_90", 255, 8, 0, 0.125),
        ("sm_90", 16, 1, 0, 0.5),  # 32 blocks of one warp
        ("sm_90", 32, 4, 32 << 10, 0.375),  # 6 blocks of 33 KB in 228 KB
        ("sm_80", 32, 4, 32 << 10, 0.25),  # 4 blocks of 33 KB in 164 KB
        ("sm_86", 40, 4, 0, 1.0),  # 12 blocks of 4 warps are all of 48
        ("sm_89", 48, 4, 0, 5 / 6),
        ("sm_120", 64, 4, 0, 2 / 3),
        ("sm_86", 16, 1, 0, 1 / 3),  # 16 blocks of one warp
        ("sm_89", 16, 1, 0, 0.5),  # 24 blocks
        ("sm_120", 16, 1, 0, 0.5),
        ("sm_89", 32, 4, 32 << 10, 0.25),  # 3 blocks of 33 KB in 100 KB
        ("sm_120", 32, 4, 49 << 10, 1 / 6),
        ("gfx942", 64, 4, 0, 1.0),
        ("gfx942", 65, 4, 0, 0.875),
        ("gfx942", 128, 2, 0, 0.5),
        ("gfx942", 16, 4, 32 << 10, 0.25),  # 2 workgroups of 32 KB in 64 KB
    ],
)
def test_occupancy(target, registers, warps, shared, share):
    assert roofline.occupancy(machine.TARGETS[target], registers, warps, shared) == share


def test_the_largest_limit_binds():
    gpu = roofline.GPU("", multiprocessors=100, clock=1e9, bandwidth=1e12)
    given = {"issue": 4000.0, "multiply": 500.0, "integer": 1000.0, "special": 900.0}
    limits = roofline.roofline(gpu, 1e6, given)
    expected = {"memory": 1.0, "issue": 0.01, "multiply": 0.0025, "integer": 0.005, "special": 0.018}
    assert limits.pop("binds") == "memory"
    assert limits == pytest.approx(expected)
    assert roofline.roofline(gpu, 1e3, given)["binds"] == "special"
    assert roofline.roofline(gpu._replace(integer=4.0), 1e6, given)["integer"] == pytest.approx(0.0025)


GPU = roofline.GPU("", multiprocessors=100, clock=1e9, bandwidth=1e12)
STATIC = roofline.roofline(GPU, 1e6, {"issue": 4000.0, "multiply": 500.0, "integer": 1000.0, "special": 900.0})
NOTHING = {"warp_instructions": 4000.0, "memory": 0.0, "sectors": 0.0, "bytes": 0.0, "passes": 0.0}


@pytest.mark.parametrize(
    ("counts", "name", "limit"),
    [
        ({"memory": 5e5}, "memory", 0.5),
        ({"memory": 2e6}, "memory", 2.0),  # caches are ideal, but kernels read whole sectors
        ({"warp_instructions": 3000.0}, "issue", 0.0075),
        ({"warp_instructions": 5000.0}, "issue", 0.01),  # ptxas has merged some
        ({"sectors": 160_000.0}, "L1", 0.1),
        ({"bytes": 1.28e6}, "L1", 0.1),
        ({"bytes": 1.28e6, "passes": 1e4}, "L1", 0.2),
        ({"bytes": 1.28e6, "passes": 1e4, "sectors": 480_000.0}, "L1", 0.3),
    ],
)
def test_limits_from_execution(counts, name, limit):
    limits = roofline.with_execution(GPU, STATIC, NOTHING | counts)
    assert limits[name] == pytest.approx(limit)
    kept = {"multiply", "integer", "special"}
    assert {key: limits[key] for key in kept} == {key: STATIC[key] for key in kept}
    assert limits[limits.pop("binds")] == max(limits.values())
