"""Erasing, mixup and cutmix: timm's, given what is drawn; keyed by the sample ids alone; distributed as timm's."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import timm.data.random_erasing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from denim.kernels import Domain, Stream, derive_seeds, noise_words, normal_noise
from denim.nim.augmentation import Augmentation

SIZE, MEAN, STD, CLASSES = (12, 20), (0.4, 0.5), (0.2, 0.3), 7
IDS = torch.tensor([0, -1, 2**63 - 1, -(2**63), *range(1, 45)])


def build(**changes) -> Augmentation:
    return Augmentation(5, SIZE, MEAN, STD, CLASSES, **{"mixup_group": 8, **changes})


def pictures(count: int = len(IDS), size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.rand(count, len(MEAN), *size, generator=torch.Generator().manual_seed(1))


def labels(count: int = len(IDS)) -> torch.Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(2))


def uniforms(ids: torch.Tensor, epoch: int, count: int, stream: Stream) -> np.ndarray:
    words = noise_words(derive_seeds(5, Domain.AUGMENT, ids, epoch), count, stream)
    return (words.numpy() + 0.5) / 2**32


# ------------------------------------------------------------------------------------------------------ timm's formulas


class Draws:
    """Answers timm's calls of `random` and `np.random` with given uniforms."""

    def __init__(self, row):
        self.row, self.uniform_calls = row, 0

    def random(self):
        return self.row[0]

    def uniform(self, low, high):
        """The area and the aspect ratio of a try, in turn; a try has four uniforms from the fifth on."""
        self.tried, which = divmod(self.uniform_calls, 2)
        self.uniform_calls += 1
        self.places = iter(self.row[4 * self.tried + 6 :])
        return low + (high - low) * self.row[4 * self.tried + 4 + which]

    def randint(self, low, high):
        """Python's: with both ends."""
        return low + int(next(self.places) * (high - low + 1))


@pytest.mark.parametrize("size", [(12, 20), (16, 16), (3, 64)])
def test_erased_boxes_are_timms(monkeypatch, size):
    """Given what is drawn. In an image of 3 x 64 most boxes do not fit, so many are tried, and some never fit."""
    ids = torch.arange(600)
    boxes = Augmentation(5, size, MEAN, STD, CLASSES, erasing=0.7, mixup=0, cutmix=0).draw(ids, 3).boxes
    assert boxes.dtype == torch.int32
    tries = []
    for row, box in zip(uniforms(ids, 3, 44, Stream.ERASE), boxes[:, 0].tolist(), strict=True):
        drawn = Draws(row)
        monkeypatch.setattr(timm.data.random_erasing, "random", drawn)
        erased = RandomErasing(0.7, mode="const", device="cpu")(torch.ones(1, *size))[0] == 0
        top, left, bottom, right = box
        expected = torch.zeros(size, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(erased, expected), box
        tries.append(drawn.uniform_calls // 2)
    assert max(tries) == 10 if size == (3, 64) else max(tries) > 1
    assert min(tries) == 0


class Numpy(SimpleNamespace):
    """numpy as timm's Mixup sees it, whose generator answers with the given uniforms."""

    def __init__(self, row):
        answers = iter(row[2:])
        super().__init__(
            sqrt=np.sqrt,
            clip=np.clip,
            random=SimpleNamespace(
                rand=lambda: row[0],
                beta=lambda a, b: stats.beta(a, b).ppf(row[1]),
                randint=lambda low, high, size: low + int(next(answers) * (high - low)),
            ),
        )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0), (0, 1.0), (0.3, 0.6)])
def test_mixed_images_and_targets_are_timms(monkeypatch, mixup, cutmix):
    """Given what is drawn: group by group, what timm's mode "batch" makes of the group."""
    top, bottom, _, _ = timm.data.mixup.rand_bbox((3, 3), 0.0, count=64)
    if cutmix and max(bottom - top) < 3:
        pytest.skip(f"timm {timm.__version__} makes boxes with an odd side a pixel smaller than they are drawn")
    given_pixels, given_labels = pictures(), labels()
    chosen = set()
    for epoch in range(6):
        augmentation = build(erasing=0.0, mixup=mixup, cutmix=cutmix)
        draws = augmentation.draw(IDS, epoch)
        pixels, targets = augmentation.images(given_pixels, draws), augmentation.targets(given_labels, draws)
        for start, row in zip(range(0, len(IDS), 8), uniforms(IDS[::8], epoch, 4, Stream.MIX), strict=True):
            rows = slice(start, start + 8)
            monkeypatch.setattr(timm.data.mixup, "np", Numpy(row))
            theirs = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=CLASSES)
            expected, soft = theirs(given_pixels[rows].clone(), given_labels[rows])
            cut = cutmix > 0 and (mixup == 0 or row[0] < 0.5)
            chosen.add(cut)
            # Pixels of mixup are rounded three times on either side, values up to 1; those of cutmix are copies.
            torch.testing.assert_close(pixels[rows], expected, rtol=0, atol=0 if cut else 3e-7)
            torch.testing.assert_close(targets[rows], soft, rtol=0, atol=3e-7)
    assert chosen == {True, False} if mixup and cutmix else {bool(cutmix)}
    assert torch.equal(given_pixels, pictures()), "the images that were given are as they were"


def test_without_mixing_targets_are_smoothed_labels():
    augmentation = build(mixup=0.0, cutmix=0.0, mixup_group=16)
    targets = augmentation.targets(labels(3), augmentation.draw(IDS[:3], 0))  # no multiple of a group
    expected = torch.nn.functional.one_hot(labels(3), CLASSES) * 0.9 + 0.1 / CLASSES
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)
    logits = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(0))
    hard = torch.nn.functional.cross_entropy(logits, labels(3), label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), hard, rtol=1e-6, atol=0)


def test_erased_pixels_are_normal_in_normalised_space():
    augmentation = build(erasing=0.999, mixup=0.0, cutmix=0.0)
    draws, pixels = augmentation.draw(IDS, 0), pictures()
    erased = augmentation.images(pixels, draws)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    noise = normal_noise(derive_seeds(5, Domain.AUGMENT, IDS), (*SIZE, 2)).double().permute(0, 3, 1, 2)
    count = 0
    for before, after, (top, left, bottom, right), own in zip(
        pixels, erased, draws.boxes[:, 0].tolist(), noise, strict=True
    ):
        inside = torch.zeros(SIZE, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(after[:, ~inside], before[:, ~inside])
        # float32 of values up to 7 * 0.3.
        torch.testing.assert_close(after[:, inside].double(), (own * std + mean)[:, inside], rtol=0, atol=1e-6)
        count += inside.sum().item()
    assert count > 1000
    assert erased.dtype == torch.float32
    assert erased.min() < 0


# --------------------------------------------------------------------------------------------------------- global batch


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    group=st.sampled_from([2, 4, 6]),
    groups=st.integers(1, 8),
    epoch=st.integers(0, 2**40),
    recipe=st.sampled_from([{}, {"erasing": 0.0}, {"mixup": 0.0}, {"cutmix": 0.0}]),
)
def test_any_cut_of_a_global_batch_gives_the_same_bits(data, group, groups, epoch, recipe):
    """Micro-batches, or ranks: whatever whole groups are taken together, and in whatever order."""
    augmentation = build(**{"mixup_group": group, "erasing": 0.6, **recipe})
    count = group * groups
    ids = IDS[:count]
    pixels, own = pictures(count), labels(count)
    draws = augmentation.draw(ids, epoch)
    whole = augmentation.images(pixels, draws), augmentation.targets(own, draws)
    cuts = data.draw(st.sets(st.integers(1, groups - 1))) if groups > 1 else set()
    edges = [group * edge for edge in (0, *sorted(cuts), groups)]
    for start, stop in itertools.pairwise(edges):
        rows = slice(start, stop)
        draws = augmentation.draw(ids[rows], epoch)
        assert torch.equal(augmentation.images(pixels[rows], draws), whole[0][rows])
        assert torch.equal(augmentation.targets(own[rows], draws), whole[1][rows])


def test_seed_and_epoch_change_everything_that_is_drawn():
    first = build().draw(IDS, 0)
    for other in (build().draw(IDS, 1), Augmentation(6, SIZE, MEAN, STD, CLASSES, mixup_group=8).draw(IDS, 0)):
        for name in ("seeds", "boxes", "weights"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_a_part_of_a_group_is_refused():
    with pytest.raises(ValueError, match="whole groups of 8 images, got 12 images"):
        build().draw(IDS[:12], 0)


def test_the_generators_of_the_process_are_not_read(global_rng_untouched):
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    augmentation = build()
    draws = augmentation.draw(IDS, 0)
    augmentation.images(pictures(), draws)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy[1])  # noqa: NPY002


# --------------------------------------------------------------------------------------------------------- distribution


def test_lambdas_are_beta_and_the_choice_is_even():
    """Kolmogorov-Smirnov and binomial tests; the draws are fixed, so a right generator passes once and for all."""
    ids = torch.arange(2 * 4000)
    augmentation = build(mixup_group=2, smoothing=0.0, erasing=0.0, mixup=0.8, cutmix=0.4)
    draws = augmentation.draw(ids, 0)
    cut, share = draws.weights[::2, 0] == 1, draws.weights[::2, 1].double()
    assert stats.binomtest(int(cut.sum()), 4000, 0.5).pvalue > 1e-3
    assert stats.kstest(share[~cut].numpy(), stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    # The box loses what lies outside of the image: lambda is as drawn only where nothing does.
    top, left, bottom, right = draws.boxes[::2, 0][cut].double().unbind(1)
    area = (bottom - top) * (right - left)
    torch.testing.assert_close(share[cut], 1 - area / (SIZE[0] * SIZE[1]), rtol=0, atol=1e-7)
    with np.errstate(all="ignore"):
        drawn = stats.beta(0.4, 0.4).ppf(uniforms(ids[::2], 0, 2, Stream.MIX)[cut.numpy(), 1])
    assert (share[cut].numpy() >= drawn - 1e-7).all(), "a clipped box leaves more of the image"


def test_erasing_is_distributed_as_timms():
    """Two-sample Kolmogorov-Smirnov tests of area, ratio and place, 3000 images each; and the share of erased ones."""
    count, size = 3000, (24, 40)
    boxes = Augmentation(0, size, MEAN, STD, CLASSES, erasing=0.5, mixup=0, cutmix=0).draw(torch.arange(count), 0).boxes
    ours = boxes[:, 0].numpy()
    random.seed(0)
    theirs = []
    erase = RandomErasing(0.5, mode="const", device="cpu")
    for _ in range(count):
        rows, columns = (erase(torch.ones(1, *size))[0] == 0).nonzero().unbind(1)
        theirs.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] if len(rows) else [0] * 4)
    theirs = np.array(theirs)
    erased = int((ours[:, 2] > 0).sum())
    assert stats.binomtest(erased, count, 0.5).pvalue > 1e-3
    for measure in (
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        lambda box: (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]),
        lambda box: box[:, 0] / (size[0] - box[:, 2] + box[:, 0]),
        lambda box: box[:, 1] / (size[1] - box[:, 3] + box[:, 1]),
    ):
        left, right = (measure(box[box[:, 2] > 0].astype(np.float64)) for box in (ours, theirs))
        assert stats.ks_2samp(left, right).pvalue > 1e-3
