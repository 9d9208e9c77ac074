from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from denim.defense.images import as_loader, batches_of, identify, pixels_of, same_again
from denim.nim.data import EvalView, ImageFolder, Subset, TorchLoader

IMAGES = torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0])


class Photos(Dataset):
    """Images of Pillow."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int):
        return Image.fromarray(IMAGES[index].permute(1, 2, 0).numpy()), int(LABELS[index])


def everything(step: int) -> bool:
    return True


FORMS = {
    "tensors": lambda: (IMAGES, LABELS),
    "floats": lambda: (IMAGES.float() / 255, LABELS),
    "dataset": lambda: TensorDataset(IMAGES, LABELS),
    "photos": Photos,
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_pixels_labels_and_ids(form):
    loader = as_loader(FORMS[form]())
    batches = list(loader.epoch(0))
    pixels = torch.cat([pixels_of(batch, torch.device("cpu")) for batch in batches])
    torch.testing.assert_close(pixels, IMAGES.float() / 255, rtol=0, atol=0)
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS.tolist()
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(5))
    images = identify(loader, everything)
    assert len({bytes(digest) for digest in images.digests}) == 5
    for step, batch in batches_of(loader, np.unique(images.steps)):
        assert same_again(loader, images.at(images.steps == step), batch).all()


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ("digits", TypeError, "data must be a loader, a DataLoader or a Dataset"),
        ((IMAGES, LABELS[:3]), ValueError, "images and labels must be as many, got 5 and 3"),
        (DataLoader(TensorDataset(IMAGES, LABELS), shuffle=True), ValueError, "shuffles"),
        ((IMAGES.permute(0, 2, 3, 1), LABELS), ValueError, r"with 1 or 3 channels, got \(8, 6, 3\)"),
        ((IMAGES.float(), LABELS), ValueError, r"pixels must lie in \[0, 1\]"),
        ((IMAGES, LABELS.float()), ValueError, "labels must be one class number for each image"),
        (DataLoader(IMAGES), ValueError, r"must give \(images, labels\), got Tensor"),
    ],
)
def test_other_data_are_refused(data, kind, words):
    with pytest.raises(kind, match=words):
        list(as_loader(data).epoch(0))


@pytest.fixture
def folder(tmp_path):
    """Six photos of two classes."""
    generator = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(place)
    return tmp_path


def opened(folder, size: int = 8, **options) -> TorchLoader:
    source = ImageFolder(folder / "photos", "test", cache=folder / "cache")
    return TorchLoader(Subset(source, 6, 0), EvalView(size), 2, shuffle=False, last="keep", **options)


def digests(loader) -> dict[int, bytes]:
    images = identify(loader, everything)
    return dict(zip(images.ids.tolist(), map(bytes, images.digests), strict=True))


def test_images_of_files_are_identified_without_decoding(folder, monkeypatch):
    loader = opened(folder)
    before = digests(loader)
    assert len(set(before.values())) == 6

    def decoding(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr("denim.nim.data.sources.decode", decoding)
    assert digests(loader) == before
    assert all(digests(opened(folder, 7))[sample] != digest for sample, digest in before.items())


def test_a_file_that_changes_is_another_image_and_a_file_that_is_gone_is_none(folder):
    loader = opened(folder, max_bad=0.5)
    images = identify(loader, everything)
    changed, gone = (int(images.ids[row]) for row in (0, 3))
    source = loader.source
    at = {int(sample): source.where(index) for index, sample in enumerate(source.ids)}
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(at[changed])
    for step, batch in batches_of(loader, np.array([0])):
        part = images.at(images.steps == step)
        assert same_again(loader, part, batch).tolist() == [sample != changed for sample in part.ids]
    (folder / "photos" / at[gone].split("/photos/")[1]).unlink()
    with pytest.warns(UserWarning, match="can no longer be read"):
        now = digests(loader)
    before = dict(zip(images.ids.tolist(), map(bytes, images.digests), strict=True))
    assert before.keys() - now.keys() == {gone}
    assert {sample for sample in now if now[sample] != before[sample]} == {changed}
