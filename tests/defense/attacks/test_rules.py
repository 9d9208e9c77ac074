from __future__ import annotations

import torch

from denim.defense.attacks.balls import Ball
from denim.defense.attacks.rules import Apgd, Seen


def test_autopgd_halves_its_size_where_a_search_finds_nothing_better():
    """Of 100 steps the first checkpoints are at 22 and 41. The loss rises in each step, and stays below the first one:
    the first checkpoint asks for rises alone, the second also for a new best."""
    rule, origin = Apgd(Ball(0.1), 100), torch.full((1, 1, 2, 2), 0.5)
    state = {"origin": origin, "best": origin, "best_loss": torch.tensor([10.0])}
    rule.start(state, torch.tensor([0]))
    sizes = []
    for step in range(43):
        value = 10.0 if step == 0 else 0.1 * step
        seen = Seen(torch.tensor([value]), torch.ones_like(origin), torch.tensor([step == 0]), torch.tensor([step]))
        rule.move(state, seen)
        sizes.append(round(float(state["size"]), 6))
    assert sizes == [0.2] * 41 + [0.1] * 2


def test_autopgd_halves_its_size_where_the_loss_seldom_rises_and_goes_on_from_the_best():
    rule, origin = Apgd(Ball(0.1), 100), torch.full((1, 1, 2, 2), 0.5)
    best = origin + 0.05
    state = {"origin": origin, "best": best, "best_loss": torch.tensor([9.0])}
    rule.start(state, torch.tensor([0]))
    for step in range(23):
        falling = torch.tensor([9.0 - step])
        rule.move(state, Seen(falling, torch.ones_like(origin), torch.tensor([step == 0]), torch.tensor([step])))
    assert round(float(state["size"]), 6) == 0.1
    assert torch.equal(state["before"], best)
