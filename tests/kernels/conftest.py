from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch

from denim.benchmarks.case import BACKWARD, FORWARD, Case, stored_by_interpreter
from denim.benchmarks.cases import OPERATIONS


class Interpreted(NamedTuple):
    """A case, and what the Triton kernels made of it in the interpreter."""

    case: Case
    inputs: dict[str, torch.Tensor]
    upstream: torch.Tensor | None
    """Gradient of the result; None where nothing gets a gradient."""
    result: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


def _given(case: Case) -> dict[str, torch.Tensor]:
    """The inputs of a case; predictions of a loss are views without the first row, as a decoder's output without its
    class token."""
    inputs = case.inputs("cpu")
    if case.operation == "patch_loss":
        longer = torch.nn.functional.pad(inputs["prediction"], (0, 0, 1, 0))
        inputs["prediction"] = longer[:, 1:]
    return inputs


@pytest.fixture(scope="session")
def stored():
    """stored(value, dtype): `denim.benchmarks.case.stored_by_interpreter`."""
    return stored_by_interpreter


@pytest.fixture(scope="session")
def assert_stored(stored):
    """assert_stored(got, exact, error): `got` is what the interpreter stores of a value within `error` of `exact`."""

    def check(got: torch.Tensor, exact: torch.Tensor, error: torch.Tensor | float) -> None:
        """`got` is a value within `error` of `exact`, in its dtype; NaN where that is NaN and nowhere else."""
        assert got.shape == exact.shape
        assert got.is_contiguous()
        lowest, highest = stored(exact - error, got.dtype), stored(exact + error, got.dtype)
        assert (((lowest <= got) & (got <= highest)) | (got.isnan() & exact.isnan())).all()

    return check


@pytest.fixture(scope="session")
def interpret(tmp_path_factory, run_script):
    """interpret(launch={key: ...}, dispatch={key: ...}): see `interpreter_cases.py`."""
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

    def run(**jobs: dict) -> dict:
        folder = tmp_path_factory.mktemp("interpreter")
        torch.save(jobs, folder / "given.pt")
        run_script("kernels/interpreter_cases.py", folder / "given.pt", folder / "got.pt")
        return torch.load(folder / "got.pt", weights_only=True)

    return run


@pytest.fixture(scope="session")
def interpreted(interpret):
    """interpreted(operation) -> {name: `Interpreted`}, all cases of the operation; run once in a session."""

    @functools.cache
    def run(operation: str) -> dict[str, Interpreted]:
        made: dict[str, Any] = {}
        jobs: dict[Any, Any] = {}
        for case in OPERATIONS[operation]:
            inputs = _given(case)
            upstream = case.upstream(inputs, case.fused(**inputs)) if case.leaves else None
            made[case.name] = case, inputs, upstream
            jobs[case.name, FORWARD] = (case, FORWARD, case.arguments(inputs), {})
            if upstream is not None:
                jobs[case.name, BACKWARD] = (case, BACKWARD, case.backward_arguments(inputs, upstream), {})
        got = interpret(launch=jobs)["launch"]
        results = {}
        for name, (case, inputs, upstream) in made.items():
            gradients = () if upstream is None else got[name, BACKWARD]
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            results[name] = Interpreted(case, inputs, upstream, got[name, FORWARD], gradients)
        return results

    return run
