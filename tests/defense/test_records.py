from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from denim.defense import records as storing
from denim.defense.records import RecordColumns, Records


def columns(images: np.ndarray, draws: int = 20, missed: int = -1) -> RecordColumns:
    count = len(images)
    classes = np.random.default_rng(0).integers(0, 1000, (count, draws))
    numbers = np.arange(count)
    return RecordColumns(
        images, numbers - 3, numbers % 7, classes, np.full(count, missed), numbers % 4, numbers, np.full(count, 0.25)
    )


def digests(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, (count, 2), dtype=np.uint64)


def test_records_are_what_was_appended_by_any_rank(tmp_path):
    images = digests(7)
    for rank, part in enumerate((slice(0, 4), slice(4, 7))):
        with Records(tmp_path, rank) as records:
            assert len(records.cell(b"other")) == 0
            records.append(b"key", b"target", True, ("\udcff", "b"), columns(images).at(part))
    with Records(tmp_path) as records:
        assert records.is_random(b"target") is True
        assert records.is_random(b"other") is None
        found = records.cell(b"key")
    rows = found.find(images)
    expected = columns(images)
    for name in storing.LAYOUT:
        assert np.array_equal(getattr(found.at(rows), name), getattr(expected, name)), name
    assert found.find(digests(9)[7:]).tolist() == [-1, -1]


def test_of_two_records_the_one_with_confirmation_draws_is_taken(tmp_path):
    images = digests(5)
    with Records(tmp_path) as records:
        records.append(b"key", b"target", True, ("a", "b"), columns(images, missed=3).at(np.arange(2)))
        records.append(b"key", b"target", True, ("a", "b"), columns(images))
        found = records.cell(b"key")
    assert found.missed[found.find(images)].tolist() == [3, 3, -1, -1, -1]
    assert (found.find(images, confirmed=True) >= 0).tolist() == [True, True, False, False, False]


def test_a_class_that_does_not_fit_is_refused(tmp_path):
    block = columns(digests(2))
    block.predictions[0, 0] = 70_000
    with Records(tmp_path) as records, pytest.raises(ValueError, match="hold classes up to 65535, got 70000"):
        records.append(b"key", b"target", True, ("a", "b"), block)
    assert list(tmp_path.iterdir()) == []


def test_records_are_columns_and_no_object_of_python_each(tmp_path, monkeypatch):
    """4,000 images x 5 rows in blocks of 128: a record has 77 bytes of numbers, and reading takes a few times that."""
    monkeypatch.setattr(storing, "SYNCHRONOUS", "OFF")
    images, keys = digests(4000), [bytes([row]) for row in range(5)]
    with Records(tmp_path) as records:
        for key in keys:
            for first in range(0, len(images), 128):
                records.append(key, b"target", True, ("a", "b"), columns(images[first : first + 128]))
    tracemalloc.start()
    try:
        with Records(tmp_path) as records:
            cells = [records.cell(key) for key in keys]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    count = sum(map(len, cells))
    assert count == 20_000
    assert all((cell.find(images) == np.arange(4000)).all() for cell in cells)
    assert kept < 100 * count
    assert peak < 200 * count
