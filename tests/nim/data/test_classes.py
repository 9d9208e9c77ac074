"""Classes are names: wherever two lists of classes meet, labels are numbered by name, and unknown names are refused."""

import io
import json
import tarfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from denim.nim.data import (
    ImageFolder,
    Subset,
    TorchLoader,
    TrainView,
    indexing,
    match_classes,
    open_manifest,
    open_source,
)
from denim.nim.data.shards import pack

TRAINED = ("ant", "bee", "cow")


@pytest.fixture
def fill(noise_image):
    def make(root, counts):
        for name, count in counts.items():
            (root / name).mkdir(parents=True)
            for k in range(count):
                noise_image(5, 7, seed=k).save(root / name / f"{k}.png")
        return root

    return make


def folder_or_shards(root, as_shards):
    if not as_shards:
        return root
    pack(open_manifest(root, "all", labelled=False)[0], root.with_name(f"{root.name}-packed"), "part", 2000)
    return root.with_name(f"{root.name}-packed")


@pytest.mark.parametrize("as_shards", [False, True])
def test_a_missing_class_is_allowed_and_said(tmp_path, fill, as_shards):
    root = folder_or_shards(fill(tmp_path / "test", {"ant": 2, "cow": 3}), as_shards)
    with pytest.warns(UserWarning, match=r"test.* has no images of 1 of 3 classes: 'bee'"):
        source = open_source(root, "test", classes=TRAINED)
    assert source.classes == TRAINED
    assert source.labels.tolist() == [0, 0, 2, 2, 2]
    (batch,) = TorchLoader(source, TrainView(4), 5, shuffle=False).epoch(0)
    assert batch.labels.tolist() == [0, 0, 2, 2, 2]
    assert Subset(source, 5).labels.sort().values.tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("as_shards", [False, True])
def test_an_unknown_class_is_refused_before_anything_is_decoded(tmp_path, fill, as_shards, monkeypatch):
    root = folder_or_shards(fill(tmp_path / "test", {"ant": 1, "bee": 1, "dog": 1, "elk": 1}), as_shards)
    monkeypatch.setattr(indexing, "judge_all", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"has 2 of 4 classes that are not among the 3 expected ones: 'dog', 'elk'\."):
        open_source(root, "test", classes=TRAINED)
    monkeypatch.undo()
    open_source(root, "test")  # indexed now
    with pytest.raises(ValueError, match="'dog', 'elk'"):
        open_source(root, "test", classes=TRAINED)


@pytest.mark.parametrize("as_shards", [False, True])
def test_a_class_without_images_keeps_its_number(tmp_path, fill, as_shards):
    root = folder_or_shards(fill(tmp_path / "test", {"ant": 1, "bee": 0, "cow": 2}), as_shards)
    manifest, _ = open_manifest(root, "test", labelled=False)
    assert (manifest.classes, manifest.labels.tolist()) == (TRAINED, [0, 2, 2])
    with pytest.raises(ValueError, match="no readable image for class 'bee'"):
        ImageFolder(root, "test")
    with pytest.warns(UserWarning, match="no images of 1 of 3 classes: 'bee'"):
        assert open_source(root, "test", classes=TRAINED).labels.tolist() == [0, 2, 2]


@pytest.fixture(scope="module")
def ten():
    """Digits: in memory, ten classes."""
    return open_source("digits", "test")


@given(st.permutations(("ant", "bee", "cow", "dog", "elk")))
def test_any_order_of_names(ten, order):
    source = match_classes(ten, tuple("0123456789"))
    source.classes = (*order, *"56789")
    matched = match_classes(source, (*"98765", *sorted(order)))
    assert [matched.classes[k] for k in matched.labels] == [source.classes[k] for k in source.labels]
    assert torch.equal(source.labels, ten.labels)  # the original is as it was


@pytest.mark.filterwarnings("ignore:.* has no images of 998 of 1000 classes")
@pytest.mark.parametrize(
    ("found", "classes", "numbers"),
    [
        (("ant", "bee"), 2, [0, 1]),  # by position: as many, and no names to compare
        (("0", "7"), 1000, [0, 7]),  # numbers are themselves
        (("1", "0"), 2, [1, 0]),
    ],
)
def test_models_without_names(ten, found, classes, numbers):
    source = match_classes(ten, tuple("0123456789"))
    source.classes, source.labels = found, torch.arange(len(found))
    assert match_classes(source, classes).labels.tolist() == numbers


@pytest.mark.parametrize(
    ("found", "classes"), [(("ant", "bee"), 3), (("0", "3"), 3), (("00", "1"), 3), (("²", "1"), 9)]
)
def test_models_without_names_whose_numbers_say_nothing(ten, found, classes):
    source = match_classes(ten, tuple("0123456789"))
    source.classes, source.labels = found, torch.arange(len(found))
    with pytest.raises(ValueError, match=r"nothing says which is which. Write the names, .* config.json"):
        match_classes(source, classes)


def shard(file, members, noise_image):
    picture = io.BytesIO()
    noise_image(5, 7).save(picture, "PNG")
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or picture.getvalue())
            tar.addfile(info, io.BytesIO(content or picture.getvalue()))


def test_numbers_in_foreign_shards_are_names(tmp_path, noise_image):
    """Labels 3 and 900,000 in two samples are two classes, not 900,001."""
    members = [("a.png", None), ("a.cls", b"900000"), ("b.png", None), ("b.cls", b"3")]
    shard(tmp_path / "x.tar", members, noise_image)
    source = open_source(tmp_path, "test")
    assert (source.classes, source.labels.tolist()) == (("3", "900000"), [1, 0])
    with pytest.raises(ValueError, match="not among the 2 expected ones: '900000'"):
        open_source(tmp_path, "test", classes=("3", "4"))
    with pytest.warns(UserWarning, match="no images of 999999 of 1000001 classes"):
        assert open_source(tmp_path, "test", classes=1_000_001).labels.tolist() == [900_000, 3]


def test_two_labels_of_one_name_are_refused(tmp_path, noise_image):
    members = []
    for k in range(2):
        said = {"label": k, "class": "ant", "denim": {"id": k, "position": k}}
        members += [(f"{k}.json", json.dumps(said).encode()), (f"{k}.png", None)]
    shard(tmp_path / "x.tar", members, noise_image)
    with pytest.raises(ValueError, match=r"several labels in the shards in .* have the class 'ant'"):
        open_source(tmp_path, "test")
