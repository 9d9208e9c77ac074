import pytest


@pytest.fixture(scope="session")
def built() -> dict:
    """The report on every kernel for every target that this Triton can build for; built once in a session."""
    report = pytest.importorskip(
        "denim.benchmarks.machine_code.report", reason="Triton is a dependency on Linux x86-64 alone"
    )
    return report.report()
