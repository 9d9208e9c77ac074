import pytest
import torch

from denim.benchmarks import timing


@pytest.fixture(scope="session")
def best_seconds():
    """Best of ten calls on the CPU after a first one."""
    return lambda function: timing.best_seconds(function, torch.device("cpu"))
