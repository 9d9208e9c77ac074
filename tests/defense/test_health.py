"""Health checks: planted failures are found, and an honest model passes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from denim.defense import Attack, De3, EvaluationSettings, HealthWarning, evaluate, print_table, write_report
from denim.defense.health import check_health
from denim.kernels import Domain

IMAGES, EPSILON = 40, 0.15
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(digit_pixels) -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels, ids = (tensor[:IMAGES] for tensor in digit_pixels("test"))
    return pixels, labels, ids


@pytest.fixture(scope="module")
def honest(adversarially_trained) -> nn.Module:
    """A network after adversarial training."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    return adversarially_trained(make, epochs=20, epsilon=0.1, step_size=0.04)


class Planted(nn.Module):
    """A model whose answers are those of another one, and whose gradients are not."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.register_buffer("direction", torch.randn(256, 10, generator=torch.Generator().manual_seed(3)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels)
        if self.kind == "masked":  # finite, not zero, and of no use
            useless = pixels.flatten(1) @ self.direction
            return logits.detach() + 1e-3 * (useless - useless.detach())
        if self.kind == "shattered":
            return logits.detach() + 1e-4 * (3e4 * (pixels.flatten(1) @ self.direction)).sin() + 1e-9 * logits
        if self.kind == "saturated":
            return (50 * logits).softmax(dim=-1).clamp(0, 1) + 0 * logits
        if self.kind == "NaN":
            return torch.where(logits[:, :1] > 0, torch.nan, logits)
        return logits * {"scaled": 1e4, "as it is": 1.0}[self.kind]


def failed(target, images, text: str = f"apgd:{EPSILON},steps=20,eot=4", **options) -> set[str]:
    checks = check_health(target, *images, Attack.parse(text), **options)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("sigma", [None, 20.0])
def test_an_honest_model_passes(honest, images, sigma):
    assert failed(De3(None, honest, sigma), images) == set()


def test_logits_times_ten_thousand_are_no_failure_any_more(honest, images):
    assert failed(De3(None, Planted(honest, "scaled"), None), images) == set()


@pytest.mark.parametrize("kind", ["masked", "shattered"])
@pytest.mark.parametrize("sigma", [None, 20.0])
def test_gradients_of_no_use_are_found(honest, images, kind, sigma):
    assert "Black box" in failed(De3(None, Planted(honest, kind), sigma), images)


def test_saturation_is_found(honest, images):
    assert failed(De3(None, Planted(honest, "saturated"), None), images) & {"Gradients of zero", "Black box"}


def test_logits_that_are_not_finite_end_the_checks(honest, images):
    assert failed(De3(None, Planted(honest, "NaN"), None), images) == {"Logits"}


def test_a_quantised_model_is_refused_by_the_attack_itself(honest, images):
    class Quantised(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return honest((pixels.detach() * 8).round() / 8)

    with pytest.raises(ValueError, match="do not depend on the pixels"):
        failed(De3(None, Quantised(), None), images)


def test_a_weak_attack_is_found(honest, images):
    assert "More steps" in failed(De3(None, honest, None), images, "pgd:0.15,steps=1,loss=ce,full")


def test_what_leaving_early_adds_to_the_accuracy_is_a_number(honest, images):
    """Of an attack that leaves early, and of no other; by the same draws, so that the number is of leaving alone."""
    few = tuple(tensor[:16] for tensor in images)
    noisy = De3(None, honest, 20.0)

    def found(text: str) -> list[float]:
        checks = check_health(noisy, *few, Attack.parse(text), draws=8, seed=3)
        return [check.value for check in checks if check.name == "Leaving early"]

    def accuracy(text: str) -> float:
        pixels, labels, ids = few
        right = noisy.draw_logits(pixels, noisy.seeds(3, Domain.CONFIRMATION, ids, 8, 2)).argmax(dim=-1) == labels
        chosen = right.double().mean(dim=0) > 0.5
        pixels, labels, ids = (tensor[chosen] for tensor in few)
        attacked = Attack.parse(text).run(noisy, pixels, labels, ids, 3).pixels
        seeds = noisy.seeds(3, Domain.CONFIRMATION, ids, 8, 2)
        return float((noisy.draw_logits(attacked, seeds).argmax(dim=-1) == labels).double().mean())

    early = f"pgd:{EPSILON},steps=50,eot=4,loss=ce"
    assert found(early) == [pytest.approx(accuracy(early) - accuracy(f"{early},full"), abs=1e-12)]
    assert found(f"{early},full") == found(f"pgd:{EPSILON},steps=49,eot=4,loss=ce") == []
    assert found(f"pgd:{EPSILON},steps=50,eot=3,loss=ce") == []


def test_a_defense_that_is_off_is_found(honest, images):
    assert "Defense off" in failed(Deaf(None, honest, 20.0), images)


def test_labels_that_do_not_fit_are_found(honest, images):
    pixels, _, ids = images
    wrong = (honest(pixels).argmax(dim=1) + 1) % 10
    assert failed(De3(None, honest, None), (pixels, wrong, ids)) == {"Clean accuracy"}


def test_where_no_accuracy_is_left_no_other_attack_is_made(honest, images):
    checks = check_health(De3(None, honest, None), *images, Attack.parse("pgd:0.9,steps=20,eot=1"))
    assert [check.name for check in checks] == ["Logits", "Gradients of zero", "Gradients that are not finite"]


def test_without_an_attack_the_checks_are_those_of_the_clean_images(honest, images):
    checks = check_health(De3(None, honest, 20.0), *images, None)
    assert [(check.name, check.passed) for check in checks] == [("Logits", True), ("Defense off", True)]


class Deaf(De3):
    """Off by accident."""

    def draw_logits(self, pixels, seeds, *, surrogate=False, sigma=None):
        return self.classifier(pixels).expand(len(seeds), -1, -1)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    not_in_fingerprint = ("calls",)

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return self.model(pixels)


def evaluated(out: Path, defenses: dict[str, nn.Module], images, printed: io.StringIO, **more):
    settings = EvaluationSettings(("fgsm:0.15,eot=2", f"apgd:{EPSILON},steps=5,eot=2"), **{"score_draws": 2, **more})
    console = Console(file=printed, width=300)
    return evaluate(defenses, images[:2], replace(settings, examples=0), out, console=console)


def test_an_evaluation_checks_its_defenses_and_keeps_what_is_found(honest, images, tmp_path):
    counted = Counted(Planted(honest, "masked"))
    defenses = {
        "masked": counted,
        "honest": honest,
        "level 5": De3(None, honest, 5.0),
        "level 20": De3(None, honest, 20.0),
        "deaf": Deaf(None, honest, 20.0),
    }
    printed = io.StringIO()
    with pytest.warns(HealthWarning):
        done = evaluated(tmp_path, defenses, images, printed, health_images=24)
    assert [(part.defense, part.num_images) for part in done.health] == [(name, 24) for name in defenses]
    attacks = {part.defense: part.attack for part in done.health}
    strong = f"apgd:{EPSILON},steps=5,eot=2"
    mean = {cell.defense: cell.scores.mean.value for cell in done.cells if cell.attack == strong}
    levels = ["level 5", "level 20", "deaf"]
    highest = max(levels, key=mean.__getitem__)
    assert attacks == {
        "masked": strong,
        "honest": strong,
        **{name: strong if name == highest else "none" for name in levels},
    }
    failed = {(part.defense, check.name) for part in done.health for check in part.checks if not check.passed}
    assert failed >= {("masked", "Black box"), ("deaf", "Defense off")}
    assert {name for name, _ in failed} <= {"masked", "deaf", highest}
    warned = [warning for warning in done.warnings if "health checks)" in warning]
    assert len([text for text in warned if text.startswith("deaf: Defense off: ")]) == 1
    assert len([text for text in warned if text.startswith("masked: Black box: ")]) == 1
    kept = json.loads((tmp_path / "results.json").read_text())["health"]
    assert [part["defense"] for part in kept] == list(defenses)
    table = io.StringIO()
    print_table(done, Console(file=table, width=300))
    checks = [check for part in done.health for check in part.checks]
    passed = sum(check.passed for check in checks)
    assert f"{passed} of {len(checks)} health checks passed, on 24 images" in table.getvalue()
    page = write_report(done, tmp_path, title="t").read_text()
    assert f"{passed} of {len(checks)} health checks passed, on 24 images" in page
    assert page.count("<td>Black box</td>") + page.count('<td class="text">Black box</td>') == 3
    # Nothing is computed again: neither by the same call, nor for a defense that is the same among others.
    assert printed.getvalue().count("health checks of ") == len(defenses)
    counted.calls = 0
    with pytest.warns(HealthWarning):
        again = evaluated(tmp_path, defenses, images, printed, health_images=24)
    assert again.health == done.health
    assert counted.calls == 0
    with pytest.warns(HealthWarning):
        fewer = evaluated(tmp_path, {"another name": counted}, images, printed, health_images=24)
    assert fewer.health[0].checks == done.health[0].checks
    assert printed.getvalue().count("health checks of ") == len(defenses)
    # Other images are other checks.
    with pytest.warns(HealthWarning):
        evaluated(tmp_path, {"masked": counted}, images, printed, health_images=23)
    assert printed.getvalue().count("health checks of masked beside") == 2
    assert evaluated(tmp_path, {"honest": honest}, images, printed, health_images=0).health == ()


def test_health_checks_halve_their_passes_where_memory_does_not_suffice(honest, images, tmp_path):
    class Small(nn.Module):
        most = 1000
        not_in_fingerprint = ("most",)

        def forward(self, pixels: Tensor) -> Tensor:
            if len(pixels) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return honest(pixels)

    small, few, printed = Small(), tuple(tensor[:4] for tensor in images), io.StringIO()
    whole = evaluated(tmp_path / "whole", {"small": small}, few, printed, health_images=4)
    evaluated(tmp_path / "small", {"small": small}, few, printed, health_images=0)
    small.most = 2
    done = evaluated(tmp_path / "small", {"small": small}, few, printed, health_images=4, max_batch=4)
    assert done.health == whole.health
    assert "out of memory for the health checks of small: from now on at most 2 images in a pass" in printed.getvalue()
    small.most = 0
    with pytest.raises(MemoryError, match="small: the health checks of one image do not fit"):
        evaluated(tmp_path / "small", {"small": small}, few, printed, health_images=3)


def test_bad_input(honest, images):
    pixels, labels, ids = images
    with pytest.raises(ValueError, match="need images"):
        check_health(De3(None, honest, None), pixels[:0], labels[:0], ids[:0], Attack("pgd", 0.1))
    with pytest.raises(ValueError, match="about white box attacks"):
        check_health(De3(None, honest, None), pixels, labels, ids, Attack("pgd", 0.1, gray=True))
