"""A whole pretraining on paper: the page's formulas, recomputed from their parts."""

import pytest

from denim.nim import preset
from denim.nim.gpus import GPUS
from denim.nim.plan import Strategy, exchange_bytes, least_seconds, make_plan
from denim.nim.scaling import Cluster, scaling_table

SMALL = preset("tiny", img_size=32, patch_size=4, depth=2, decoder_depth=1)
GPU = GPUS["a100"]
TASK = {"images": 10_050, "epochs": 3.0, "batch_size": 1_000}


def table(devices, memory=GPU.memory, **cluster):
    return scaling_table(SMALL, GPU, memory, Cluster(**cluster), devices=devices, **TASK)


def test_time_is_that_of_the_arithmetic_where_the_exchange_hides_behind_it():
    (row,) = table((4,), share=0.25)
    least = least_seconds(SMALL, 250, Strategy(devices=4), GPU)
    assert (row["micro_batch"], row["passes"], row["updates"]) == (250, 1, 30)
    assert row["compute"] == pytest.approx(4 * least)
    assert row["ddp"] < row["compute"]
    assert row["hours"] == pytest.approx(30 * 4 * least / 3600)
    assert row["gpu_hours"] == pytest.approx(4 * row["hours"])


def test_a_slow_network_takes_the_time_between_machines_alone():
    inside, between = table((8, 10), network=1e6)
    assert inside["ddp"] == exchange_bytes(SMALL, Strategy(devices=8)) / GPU.link
    assert inside["fsdp"] == exchange_bytes(SMALL, Strategy(devices=8, fsdp=True)) / GPU.link
    assert between["ddp"] == exchange_bytes(SMALL, Strategy(devices=10)) / 1e6
    assert between["hours"] == pytest.approx(30 * between["ddp"] / 3600)
    (fast,) = table((10,), network=1e15)
    assert fast["ddp"] == exchange_bytes(SMALL, Strategy(devices=10)) / GPU.link


def test_what_a_machine_loads():
    one, machine, many = table((2, 8, 40), image_bytes=1000.0, decoded=50.0)
    for row, held in ((one, 2), (machine, 8), (many, 8)):
        seconds = 3600 * row["hours"] / row["updates"]
        assert row["images"] == pytest.approx(1_000 / row["devices"] * held / seconds)
        assert row["bytes"] == pytest.approx(1000 * row["images"])
        assert row["cores"] == pytest.approx(row["images"] / 50)


def test_checkpoints_have_weights_and_two_averages():
    (row,) = table((1,), disk=2e6)
    plan = make_plan(SMALL, 1, Strategy())
    assert row["checkpoint"] == plan.weights + plan.optimizer == 4 * plan.parameters + 8 * plan.trainable
    assert row["checkpoint_seconds"] == row["checkpoint"] / 2e6


def test_passes_are_the_fewest_that_fit():
    needs = make_plan(SMALL, 125, Strategy(devices=2), passes=4).total
    (row,) = table((2,), memory=needs)
    assert (row["micro_batch"], row["passes"]) == (125, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": (3,)}, "a multiple of the 3 devices"),
        ({"devices": (0,)}, "a multiple of the 0 devices"),
        ({"images": 999}, "999 images, fewer than a batch of 1000"),
        ({"epochs": 0.0}, "epochs must be positive"),
        ({"epochs": float("nan")}, "epochs must be positive"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        scaling_table(SMALL, GPU, GPU.memory, Cluster(), **{**TASK, "devices": (1,), **changes})


@pytest.mark.parametrize("changes", [{"share": 0}, {"share": 1.1}, {"network": -1}, {"decoded": float("nan")}])
def test_bad_clusters(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Cluster(**changes)
