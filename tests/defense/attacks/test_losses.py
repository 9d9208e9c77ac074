from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from denim.defense.attacks.losses import GAP, LOSSES, loss, scale_of

DRAWS, BATCH, CLASSES = 3, 5, 6
LABELS, TARGETS = torch.tensor([0, 1, 2, 3, 5]), torch.tensor([1, 0, 5, 2, 4])
ONES = torch.ones(BATCH, dtype=torch.float64)


def logits(classes: int = CLASSES) -> torch.Tensor:
    return torch.randn(DRAWS, BATCH, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


def by_hand(name: str, row: torch.Tensor, label: int, target: int) -> float:
    """A loss of one draw and one image, from its formula."""
    others = [float(value) for k, value in enumerate(row) if k != label]
    true, ordered = float(row[label]), sorted(row.tolist(), reverse=True)
    return {
        "ce": math.log(sum(math.exp(value) for value in row.tolist())) - true,
        "margin": max(others) - true,
        "dlr": (max(others) - true) / (ordered[0] - ordered[2]),
        "dlr-targeted": (float(row[target]) - true) / (ordered[0] - (ordered[2] + ordered[3]) / 2),
    }[name]


@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "dlr-targeted"])
def test_losses_are_the_mean_over_draws_of_their_formulas(name):
    rows = logits()
    expected = [
        sum(by_hand(name, rows[r, b], int(LABELS[b]), int(TARGETS[b])) for r in range(DRAWS)) / DRAWS
        for b in range(BATCH)
    ]
    assert loss(name, rows, LABELS, TARGETS, ONES).tolist() == pytest.approx(expected, rel=1e-9)


def test_mean_probability_is_the_cross_entropy_of_the_mean_probability():
    expected = F.nll_loss(logits().softmax(dim=-1).mean(dim=0).log(), LABELS, reduction="none")
    torch.testing.assert_close(loss("mean-probability", logits(), LABELS, TARGETS, ONES), expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("classes", [2, 3, CLASSES])
def test_gradients_are_those_of_the_formulas_and_none_vanishes(name, classes):
    rows = logits(classes).requires_grad_()
    labels, targets = LABELS % classes, (LABELS + 1) % classes

    def value(rows: torch.Tensor) -> torch.Tensor:
        return loss(name, rows, labels, targets, ONES)

    (gradient,) = torch.autograd.grad(value(rows).sum(), rows)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).all(), "each image has a direction"
    if classes > 2:  # of two classes the ratio has a denominator without derivative
        assert torch.autograd.gradcheck(value, (rows,))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_scale_of_all_logits_changes_no_direction(name):
    """Logits times 10,000 make cross entropy vanish in float32; scaled back, it is the same."""

    def gradient(factor: float) -> torch.Tensor:
        leaf = logits()[:1].float().requires_grad_()
        rows = leaf * factor
        value = loss(name, rows, LABELS, TARGETS, scale_of(rows.detach()))
        (found,) = torch.autograd.grad(value.sum(), leaf)
        return found

    # Three roundings of float32 each way.
    torch.testing.assert_close(gradient(1e4), gradient(1.0), rtol=1e-4, atol=1e-6)


def test_the_scale_makes_the_gap_and_survives_equal_and_infinite_logits():
    rows = logits()[:1]
    gap = (rows.amax(dim=-1) - rows.amin(dim=-1)).mean(dim=0)
    torch.testing.assert_close(gap * scale_of(rows), torch.full_like(gap, GAP))
    odd = torch.tensor([[[1.0, 1.0, 1.0], [0.0, -math.inf, 1.0], [math.nan, 0.0, 1.0]]])
    assert scale_of(odd).tolist() == [1.0, 1.0, 1.0]


def test_of_several_draws_the_scale_only_shrinks():
    rows = logits()
    gap = (rows.amax(dim=-1) - rows.amin(dim=-1)).mean(dim=0)
    assert (gap < GAP).all()
    assert torch.equal(scale_of(rows), torch.ones_like(gap))
    torch.testing.assert_close(scale_of(1e4 * rows), GAP / (1e4 * gap))


def test_half_precision_is_computed_in_float32():
    rows = logits().to(torch.bfloat16)
    found = loss("ce", rows, LABELS, TARGETS, ONES)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss("ce", rows.float(), LABELS, TARGETS, ONES))


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        loss("hinge", logits(), LABELS, TARGETS, ONES)
