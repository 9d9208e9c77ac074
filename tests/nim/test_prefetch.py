"""Batches that are made ahead: what comes out, failures, and that no thread is left."""

import threading

import pytest
import torch

from denim.nim.data import Batch
from denim.nim.prefetch import prefetched

CPU = torch.device("cpu")


class Numbers:
    """Epochs of 5 parts, of which the state counts those that were handed out."""

    steps_per_epoch = 5

    def __init__(self, broken_at=None):
        self.handed_out = 0
        self.broken_at = broken_at

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, 5):
            number = 10 * epoch + step
            if number == self.broken_at:
                raise OSError(f"part {number} cannot be read")
            self.handed_out += 1
            yield Batch(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1), torch.tensor([number]))

    def state(self):
        return {"handed_out": self.handed_out}


def prepare(batch, epoch):
    return {"ids": batch.ids, "epoch": torch.tensor(epoch)}


@pytest.mark.parametrize("threaded", [False, True])
def test_parts_come_in_order_each_with_the_state_of_the_loader_after_it(threaded):
    parts = prefetched(Numbers(), prepare, CPU, first=3, per_epoch=4, stop=10, threaded=threaded)
    found = [(int(part.tensors["ids"]), int(part.tensors["epoch"]), part.loader["handed_out"]) for part in parts]
    assert found == [(3, 0, 1), (10, 1, 2), (11, 1, 3), (12, 1, 4), (13, 1, 5), (20, 2, 6), (21, 2, 7)]


@pytest.mark.parametrize("threaded", [False, True])
def test_a_failure_comes_where_it_happened(threaded):
    parts = prefetched(Numbers(broken_at=2), prepare, CPU, first=0, per_epoch=5, stop=5, threaded=threaded)
    assert [int(next(parts).tensors["ids"]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="part 2"):
        next(parts)


def test_no_thread_is_left_and_none_runs_far_ahead():
    loader = Numbers()
    parts = prefetched(loader, prepare, CPU, first=0, per_epoch=5, stop=50, threaded=True)
    next(parts)
    assert "prefetch" in [thread.name for thread in threading.enumerate()]
    parts.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    assert loader.handed_out <= 5
