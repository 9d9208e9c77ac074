from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from denim.defense import Attack, De3
from denim.defense.attacks import ATTACKS
from denim.defense.attacks.losses import scale_of
from denim.kernels import Domain, draw_seeds, normal_noise
from denim.nim import Autoencoder, AutoencoderConfig

CONFIG = AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target="raw")
SIZE, BATCH = 64, 4
LABELS, IDS = torch.tensor([0, 1, 2, 1]), torch.tensor([9, 2**40, -3, 0])
# Pixels of size one and a radius are rounded once each: half a unit in the last place of float32 at one, twice.
ULP = 2.0**-23


def images(low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def linear(classes: int = 3) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIZE, classes)))


def curved() -> nn.Sequential:
    """Gradients that depend on the noise, unlike those of a linear model of two classes."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 32), nn.Tanh(), nn.Linear(32, 3)))
    model[1].weight *= 8
    model[3].weight *= 8
    return model


class Recorder(nn.Module):
    """Calls a model and records its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.inputs.append(inputs[0].detach().clone())
        return self.model(*inputs)


class Function(nn.Module):
    """A classifier from any function of (B, 1, 8, 8)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.function(pixels)


def noisy(pixels: Tensor, sigma: float, seeds: Tensor) -> Tensor:
    return pixels + sigma / 255 * normal_noise(seeds, (8, 8, 1)).permute(0, 3, 1, 2)


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor = LABELS) -> Tensor:
    return F.cross_entropy(model(pixels), labels, reduction="none")


# The text form


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(ATTACKS)),
    epsilon=st.integers(1, 255).map(lambda level: level / 255) | st.floats(0, 1, exclude_min=True),
    steps=st.none() | st.integers(1, 500),
    eot=st.integers(1, 500),
    restarts=st.integers(1, 9),
    gray=st.booleans(),
    norm=st.sampled_from(["linf", "l2"]),
    losses=st.lists(st.sampled_from(["ce", "mean-probability", "margin", "dlr"]), unique=True, max_size=3),
    full=st.booleans(),
)
def test_the_text_form_gives_the_attack_back(name, epsilon, steps, eot, restarts, gray, norm, losses, full):
    options = {"losses": losses} if ATTACKS[name].losses else {}
    options["norm"] = "linf" if name == "square" else norm
    attack = Attack(name, epsilon, steps, eot=eot, restarts=restarts, gray=gray, full=full, **options)
    assert Attack.parse(str(attack)) == attack


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("fgsm:4/255", Attack("fgsm", 4 / 255)),
        ("pgd:0.03,gray", Attack("pgd", 0.03, gray=True)),
        ("pgd:1/32,steps=7,eot=3,restarts=2", Attack("pgd", 1 / 32, steps=7, eot=3, restarts=2)),
        ("pgd:8/255,restarts=2,gray,steps=5", Attack("pgd", 8 / 255, steps=5, restarts=2, gray=True)),
    ],
)
def test_texts_that_users_write(text, attack):
    assert Attack.parse(text) == attack


def test_texts_that_reports_show():
    assert str(Attack("fgsm", 4 / 255)) == "fgsm:4/255,eot=20"
    assert str(Attack.parse("pgd:16/255,steps=10,restarts=2,gray")) == "pgd:16/255,steps=10,eot=20,restarts=2,gray"
    assert str(Attack("pgd", 0.03)) == "pgd:0.03,steps=20,eot=20"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pgd",
        "pgd:",
        "pgd:four",
        "pgd:4/0",
        "pgd:1e400",
        "pgd:nan",
        "pgd:4/255,step=3",
        "pgd:4/255,steps",
        "pgd:4/255,steps=",
        "pgd:4/255,steps=3.5",
        "pgd:4/255,gray=1",
        "pgd:4/255,",
        "fgsm:4/255,steps=3",
    ],
)
def test_other_texts_are_refused_with_the_form(text):
    with pytest.raises(ValueError, match="is not of the form NAME:EPSILON") as caught:
        Attack.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cw"}, "unknown attack 'cw'; choose one of fgsm, pgd, mpgd, apgd, apgd-t, square, aa, aa-rand"),
        ({"norm": "l1"}, "unknown norm 'l1'; choose linf or l2"),
        ({"norm": "l2", "epsilon": 0.0}, "epsilon must be positive, such as 0.5 in the L2 norm, got 0"),
        ({"name": "square", "norm": "l2"}, "square attacks in the L-infinity norm alone, got norm 'l2'"),
        ({"losses": ("hinge",)}, "unknown loss 'hinge'; choose of ce, mean-probability, margin, dlr;"),
        ({"losses": ("dlr-targeted",)}, "targeted ratios are what apgd-t raises"),
        ({"name": "aa", "losses": ("ce",)}, "the losses of aa are fixed, got ce"),
        ({"epsilon": 0}, r"epsilon must be in \(0, 1\], such as 4/255, got 0"),
        ({"epsilon": 4}, r"epsilon must be in \(0, 1\], such as 4/255, got 4"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eot": 0}, "eot must be at least 1, got 0"),
        ({"restarts": -1}, "restarts must be at least 1, got -1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attack(**{"name": "pgd", "epsilon": 4 / 255} | options)
    readable = math.isfinite(options.get("epsilon", 0))
    if len(options) == 1 and options.keys() <= {"epsilon", "steps", "eot", "restarts"} and readable:
        (pair,) = options.items()
        text = f"pgd:{pair[1]}" if pair[0] == "epsilon" else f"pgd:4/255,{pair[0]}={pair[1]}"
        with pytest.raises(ValueError, match=message):
            Attack.parse(text)


# Results of an attack


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["fgsm", "pgd"]),
    epsilon=st.sampled_from([1 / 255, 8 / 255, 0.3, 1.0]),
    steps=st.integers(1, 5),
    restarts=st.integers(1, 2),
    gray=st.booleans(),
)
def test_candidates_lie_in_the_ball_and_in_the_range(name, epsilon, steps, restarts, gray):
    attack = Attack(name, epsilon, steps, eot=2, restarts=restarts, gray=gray)
    clean = images().round(decimals=1)  # with some at 0 and some at 1
    attacked = attack.run(De3(None, curved(), 35), clean, LABELS, IDS, 0)
    assert attacked.pixels.shape == clean.shape
    assert not attacked.pixels.requires_grad
    assert ((attacked.pixels - clean).abs() <= epsilon + ULP).all()
    assert attacked.pixels.min() >= 0
    assert attacked.pixels.max() <= 1
    assert not attacked.zero_gradients.any()
    assert not attacked.bad_gradients.any()


@pytest.mark.parametrize("sigma", [None, 0, 35])
@pytest.mark.parametrize(
    "attack", [Attack("fgsm", 8 / 255, eot=3, full=True), Attack("pgd", 8 / 255, steps=8, eot=3, full=True)]
)
def test_a_linear_classifier_of_two_classes_is_driven_to_the_optimum(attack, sigma):
    model = linear(2)
    labels = LABELS.clamp(max=1)
    attacked = attack.run(De3(None, model, sigma), images(0.1, 0.9), labels, IDS, 0)
    # The loss is a rising function of the margin w x of the other class, for any noise: x + epsilon sign(w).
    weight = model[1].weight
    margin = torch.stack([weight[1 - label] - weight[label] for label in labels]).view(-1, 1, 8, 8)
    optimum = images(0.1, 0.9) + 8 / 255 * margin.sign()
    # 8 steps move a pixel by 4 x 1/4 + 2 x 1/8 + 2 x 1/16 = 1.375 radii. Starts are uniform in the ball: a pixel that
    # starts further from the optimum than that ends short of it by the difference.
    if attack.name == "fgsm":
        torch.testing.assert_close(attacked.pixels, optimum, rtol=0, atol=ULP)
    else:
        start_distance = 2 * 8 / 255
        assert ((attacked.pixels - optimum).abs() <= start_distance - 1.375 * 8 / 255 + ULP).all()
        many = Attack("pgd", 8 / 255, steps=16, eot=3, full=True).run(
            De3(None, model, sigma), images(0.1, 0.9), labels, IDS, 0
        )  # 2.75 radii
        torch.testing.assert_close(many.pixels, optimum, rtol=0, atol=ULP)


@pytest.mark.parametrize("sigma", [None, 35])
def test_pgd_is_at_least_as_strong_as_fgsm(sigma):
    model, labels = curved(), None
    clean = images(0.2, 0.8)
    labels = model(clean).argmax(dim=1)
    defense = De3(None, model, sigma)
    seeds = draw_seeds(0, Domain.SCORE, IDS, 50)

    def strength(attack: Attack) -> Tensor:
        attacked = attack.run(defense, clean, labels, IDS, 0).pixels
        return F.cross_entropy(defense.draw_logits(attacked, seeds).mean(dim=0), labels)

    unattacked = F.cross_entropy(defense.draw_logits(clean, seeds).mean(dim=0), labels)
    fgsm, pgd = strength(Attack("fgsm", 0.1, full=True)), strength(Attack("pgd", 0.1, steps=30, full=True))
    assert unattacked < fgsm < pgd


def test_a_larger_radius_is_stronger_and_pgd_with_it_breaks_the_undefended_model():
    model, clean = curved(), images(0.2, 0.8)
    labels = model(clean).argmax(dim=1)
    small, large = (
        loss_of(
            model, Attack("pgd", radius, full=True).run(De3(None, model, None), clean, labels, IDS, 0).pixels, labels
        )
        for radius in (0.02, 0.5)
    )
    assert (large > small).all()
    assert (large > math.log(3)).all(), "a loss above the log of the classes: the label is not the first"


# Expectation over transformation


def test_the_gradient_is_the_mean_over_the_draws_of_the_stage():
    model, clean, radius = curved(), images(0.2, 0.8), 0.1
    defense = De3(None, model, 70)
    attacked = Attack("fgsm", radius, eot=5).run(defense, clean, LABELS, IDS, 11).pixels
    seeds = draw_seeds(11, Domain.ATTACK, IDS, 5, 1)
    selection = draw_seeds(11, Domain.SELECTION, IDS, 5)
    scale = scale_of(torch.stack([model(noisy(clean, 70, draw)) for draw in seeds]))[:, None]
    leaf = clean.clone().requires_grad_()

    def single(draw: Tensor) -> Tensor:
        return F.cross_entropy(scale * model(noisy(leaf, 70, draw)), LABELS, reduction="sum")

    mean_loss = torch.stack([torch.autograd.grad(single(draw), leaf)[0] for draw in seeds]).mean(dim=0)
    probability = torch.stack([(scale * model(noisy(leaf, 70, draw))).softmax(dim=1) for draw in seeds]).mean(dim=0)
    of_mean = torch.autograd.grad(F.nll_loss(probability.log(), LABELS, reduction="sum"), leaf)[0]
    candidates = [clean + radius * gradient.sign() for gradient in (mean_loss, of_mean)]
    assert not torch.equal(*candidates), "the two ways to average differ here, so the choice can be seen"
    # Of the two, by image, the one that misleads more selection draws, then the one with the larger mean loss.
    ranks = []
    for candidate in candidates:
        logits = torch.stack([model(noisy(candidate, 70, draw)) for draw in selection])
        losses = torch.stack([F.cross_entropy(draw, LABELS, reduction="none") for draw in logits]).mean(dim=0)
        ranks.append((logits.argmax(dim=-1) != LABELS).sum(dim=0) + losses / (1 + losses))
    expected = torch.where((ranks[1] > ranks[0]).view(-1, 1, 1, 1), candidates[1], candidates[0])
    assert (ranks[1] > ranks[0]).any()
    assert (ranks[1] < ranks[0]).any()
    torch.testing.assert_close(attacked, expected, rtol=0, atol=ULP)


def test_every_step_and_restart_has_draws_of_its_own_and_none_is_a_score_draw():
    asked: list[tuple[Domain, tuple[int, ...]]] = []

    class Spy(De3):
        def seeds(self, run_seed, domain, ids, draws=1, step=0):
            seeds = super().seeds(run_seed, domain, ids, draws, step)
            asked.append((domain, tuple(seeds.flatten().tolist())))
            return seeds

    attack = Attack("pgd", 0.1, steps=3, eot=4, restarts=2, losses=("ce",))
    attack.run(Spy(None, curved(), 35), images(), LABELS, IDS, 0)
    gradients = [seeds for domain, seeds in asked if domain == Domain.ATTACK]
    selection = [seeds for domain, seeds in asked if domain == Domain.SELECTION]
    assert len(gradients) == 2 * 2 * 3  # restarts x ways to average x steps
    distinct = {seed for seeds in gradients for seed in seeds}
    assert len(distinct) == 2 * 3 * 4 * BATCH  # the two ways to average share their draws
    assert len(selection) == 1 + 2 * 4  # the clean image, and of each search the last and the best iterate
    assert len(set(selection)) == 1, "candidates are compared on the same draws"
    assert not distinct & set(selection[0])
    assert {domain for domain, _ in asked} == {Domain.ATTACK, Domain.SELECTION}


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(BATCH)), keep=st.integers(1, BATCH), name=st.sampled_from(["fgsm", "pgd"]))
def test_an_attack_on_a_sample_does_not_depend_on_its_batch(order, keep, name):
    model = curved().double()
    attack, defense = Attack(name, 0.1, steps=4, eot=3, restarts=2), De3(None, model, 35)
    together = attack.run(defense, images().double(), LABELS, IDS, 0).pixels
    chosen = torch.tensor(order[:keep])
    apart = attack.run(defense, images().double()[chosen], LABELS[chosen], IDS[chosen], 0).pixels
    # Signs of float64 gradients flip with the batch only where these are below 1e-15, which none is; the ball is kept
    # to rounding.
    torch.testing.assert_close(apart, together[chosen], rtol=0, atol=1e-12)


def test_ids_and_seed_decide_about_the_start():
    defense, attack = De3(None, curved(), None), Attack("pgd", 0.1, steps=1, full=True)
    clean, same = images()[[0, 0]], torch.tensor([0, 0])

    def run(ids, seed):
        return attack.run(defense, clean, same, torch.tensor(ids), seed).pixels

    assert torch.equal(run([5, 5], 0)[0], run([5, 5], 0)[1])
    assert not torch.equal(run([5, 6], 0)[0], run([5, 6], 0)[1])
    assert not torch.equal(run([5, 5], 0), run([5, 5], 1))


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_global_generator_and_the_defense_stream_are_left_alone():
    defense, twin = De3(None, curved(), 35, seed=3), De3(None, curved(), 35, seed=3)
    for text in ("fgsm:0.1,eot=2", "pgd:0.1,steps=2,eot=2", "pgd:0.1,steps=2,gray"):
        attack = Attack.parse(text)
        first = attack.run(defense, images(), LABELS, IDS, 0).pixels
        assert torch.equal(attack.run(defense, images(), LABELS, IDS, 0).pixels, first)
    assert torch.equal(defense(images()), twin(images()))


# White, gray, frozen, vote


def test_white_box_goes_through_the_denoiser_and_gray_box_never_calls_it():
    denoiser, classifier, inputs = seeded(lambda: Autoencoder(CONFIG)), Recorder(curved()), []
    denoiser.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    defense = De3(denoiser, classifier, 35)
    white = Attack("pgd", 0.1, steps=3, eot=2, losses=("ce",)).run(defense, images(), LABELS, IDS, 0).pixels
    assert len(inputs) == 1 + 2 * (3 + 2)  # the clean image, ways to average x (steps and candidates)
    assert {len(batch) for batch in inputs} == {2 * BATCH}
    inputs.clear()
    classifier.inputs.clear()
    gray = Attack("pgd", 0.1, steps=3, eot=2, losses=("ce",), gray=True).run(defense, images(), LABELS, IDS, 0).pixels
    assert inputs == []
    assert [len(batch) for batch in classifier.inputs] == [BATCH] * (1 + 3 + 2)
    undefended = (
        Attack("pgd", 0.1, steps=3, eot=2, losses=("ce",), full=True)
        .run(De3(None, curved(), None), images(), LABELS, IDS, 0)
        .pixels
    )
    assert torch.equal(gray, undefended)
    assert not torch.equal(gray, white)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: De3(None, model, None),
        lambda model: De3(None, model, 0),
        lambda model: De3(None, model, 35).frozen(2),
    ],
    ids=["off", "sigma 0", "frozen"],
)
def test_a_deterministic_defense_is_attacked_with_one_draw(make):
    classifier = Recorder(curved())
    Attack("pgd", 0.1, steps=3, eot=20, losses=("ce",), full=True).run(make(classifier), images(), LABELS, IDS, 0)
    assert [len(batch) for batch in classifier.inputs] == [BATCH] * (1 + 3 + 2)


def test_draws_of_the_defense_are_all_attacked():
    classifier = Recorder(curved())
    attack = Attack("pgd", 0.1, steps=2, eot=1, losses=("ce",))
    attack.run(De3(None, classifier, 35, draws=3), images(), LABELS, IDS, 0)
    # One gradient draw is one call of the defense with its three draws; one way to average, since there is one draw.
    assert [len(batch) for batch in classifier.inputs] == [3 * BATCH] * (1 + 2 + 2)


def test_frozen_is_attacked_through_its_own_noise():
    frozen, clean = De3(None, curved(), 140).frozen(2), images(0.2, 0.8)
    attacked = Attack("fgsm", 0.1, eot=20, full=True).run(frozen, clean, LABELS, IDS, 5).pixels
    leaf = clean.clone().requires_grad_()
    scale = scale_of(frozen(clean)[None])[:, None]
    (gradient,) = torch.autograd.grad(F.cross_entropy(scale * frozen(leaf), LABELS, reduction="sum"), leaf)
    torch.testing.assert_close(attacked, clean + 0.1 * gradient.sign(), rtol=0, atol=ULP)


def test_a_vote_is_attacked_through_the_mean_probability():
    model, clean = curved(), images(0.2, 0.8)
    defense = De3(None, model, 70, draws=5, aggregate="vote")
    attacked = Attack("fgsm", 0.1, eot=1).run(defense, clean, LABELS, IDS, 5).pixels
    leaf = clean.clone().requires_grad_()
    draws = draw_seeds(5, Domain.ATTACK, IDS, 5, 1)
    probability = torch.stack([model(noisy(leaf, 70, draw)).softmax(dim=1) for draw in draws]).mean(dim=0)
    logs = probability.log()
    probability = (scale_of(logs.detach()[None])[:, None] * logs).softmax(dim=1)
    (gradient,) = torch.autograd.grad(F.nll_loss(probability.log(), LABELS, reduction="sum"), leaf)
    torch.testing.assert_close(attacked, clean + 0.1 * gradient.sign(), rtol=0, atol=ULP)


def test_the_best_of_several_restarts_is_kept():
    """A loss with many local maxima: 20 starts of one step each find more than one start does."""
    model = Function(
        lambda pixels: torch.stack((0 * pixels.flatten(1)[:, 0], (40 * pixels.flatten(1)).sin().mean(1)), 1)
    )
    labels, defense = torch.zeros(BATCH, dtype=torch.int64), De3(None, model, None)
    one, many = (
        loss_of(
            model,
            Attack("pgd", 0.2, steps=1, restarts=n, full=True, losses=("ce",))
            .run(defense, images(), labels, IDS, 0)
            .pixels,
            labels,
        )
        for n in (1, 20)
    )
    assert (many >= one).all()
    assert (many > one).any()


def test_a_candidate_of_infinite_loss_is_worse_than_a_finite_one():
    def function(pixels: Tensor) -> Tensor:
        brightness = pixels.flatten(1).mean(dim=1)
        # Above 0.525 the true class has probability zero; below it is wrong too.
        return torch.stack((torch.where(brightness > 0.525, -math.inf, -brightness), 0 * brightness + 9), dim=1)

    labels, defense = torch.zeros(BATCH, dtype=torch.int64), De3(None, Function(function), None)
    clean = torch.full((BATCH, 1, 8, 8), 0.5)
    # One step of 0.025 up from a start whose brightness is 0.5 +- 0.007: half of the candidates pass 0.525.
    brightness = [
        Attack("pgd", 0.1, steps=1, restarts=n, full=True, losses=("ce",))
        .run(defense, clean, labels, IDS, 0)
        .pixels.flatten(1)
        .mean(dim=1)
        for n in (1, 30)
    ]
    assert (brightness[0] < 0.525).any()
    assert (brightness[1] > 0.525).all()


# Zero and non-finite gradients


def test_zero_gradients_are_counted_by_image():
    """A dead unit: dark images have gradient zero, bright ones do not."""
    model = Function(lambda pixels: F.pad((pixels.flatten(1).mean(dim=1, keepdim=True) - 0.5).relu(), (1, 1)))
    clean = torch.tensor([0.2, 0.8, 0.1, 0.9]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    for text in ("fgsm:4/255,full", "pgd:4/255,steps=3,full"):
        attacked = Attack.parse(text).run(De3(None, model, None), clean, LABELS, IDS, 0)
        assert attacked.zero_gradients.tolist() == [True, False, True, False]
        assert not attacked.bad_gradients.any()


def test_gradients_that_are_not_finite_are_counted_and_never_become_steps():
    def function(pixels: Tensor) -> Tensor:
        brightness = pixels.flatten(1).mean(dim=1, keepdim=True)
        return F.pad(((brightness - 0.5) * (brightness > 0.5)).sqrt(), (1, 1))  # infinite slope times zero is NaN

    clean = torch.tensor([0.2, 0.8, 0.1, 0.9]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    for text in ("fgsm:4/255,full", "pgd:4/255,steps=3,full"):
        attacked = Attack.parse(text).run(De3(None, Function(function), None), clean, LABELS, IDS, 0)
        assert attacked.bad_gradients.tolist() == [True, False, True, False]
        assert not attacked.zero_gradients.any()
        assert attacked.pixels.isfinite().all()
        if text.startswith("fgsm"):
            assert torch.equal(attacked.pixels[[0, 2]], clean[[0, 2]])


TEXTS = pytest.mark.parametrize("text", ["fgsm:4/255,eot=2", "pgd:4/255,steps=2,eot=2", "fgsm:4/255,gray"])


@pytest.mark.parametrize(
    "text", ["fgsm:4/255,eot=2", "pgd:4/255,steps=2,eot=2", "fgsm:4/255,gray", "aa:4/255,steps=1,eot=2"]
)
def test_a_classifier_of_derivative_zero_is_counted_and_stops_nothing(text):
    flat = Function(lambda pixels: torch.eye(3)[:1] + 0 * pixels.flatten(1)[:, :1])
    attacked = Attack.parse(text).run(De3(None, flat, 35), images(), LABELS, IDS, 0)
    assert attacked.zero_gradients.all()
    assert not attacked.bad_gradients.any()
    assert ((attacked.pixels - images()).abs() <= 4 / 255 + ULP).all()


def test_square_alone_has_no_gradient_that_could_be_zero():
    attacked = Attack("square", 4 / 255, 5).run(De3(None, linear(), None), images(), LABELS, IDS, 0)
    assert not attacked.zero_gradients.any()
    assert not attacked.gradients.any()


def without_gradients(pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return linear()(pixels)


@pytest.mark.parametrize(
    "function",
    [
        lambda pixels: torch.eye(3)[:1].expand(len(pixels), -1),
        lambda pixels: torch.eye(3)[(pixels.flatten(1).mean(dim=1) > 0.5).long()],
        lambda pixels: nn.Parameter(torch.eye(3)[:1]).expand(len(pixels), -1),
        lambda pixels: linear()(pixels.detach()),
        lambda pixels: torch.from_numpy(linear()(pixels.detach()).numpy()),
        without_gradients,
    ],
    ids=["constant", "step function", "constant with parameters", "detached", "numpy", "no_grad"],
)
@TEXTS
def test_a_classifier_without_a_graph_is_refused(function, text):
    with pytest.raises(ValueError, match=r"do not depend on the pixels by operations of autograd"):
        Attack.parse(text).run(De3(None, Function(function), 35), images(), LABELS, IDS, 0)


@TEXTS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_is_the_same_where_the_caller_has_turned_gradients_off(text, mode):
    network = curved()
    expected = Attack.parse(text).run(De3(None, network, 35), images(), LABELS, IDS, 0)
    with mode():
        inputs = images(), LABELS.clone(), IDS.clone()
        attacked = Attack.parse(text).run(De3(None, network, 35), *inputs, 0)
    assert not torch.equal(expected.pixels, images())
    for ours, theirs in zip(attacked, expected, strict=True):
        assert torch.equal(ours, theirs)


@TEXTS
def test_a_target_in_training_mode_is_attacked_in_evaluation_mode_and_left_as_it_was(text):
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), *curved())
    network[2].eval()
    expected = Attack.parse(text).run(De3(None, network, 35).eval(), images(), LABELS, IDS, 0)
    defense = De3(None, network.train(), 35)
    network[2].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in defense.modules()]
    attacked = Attack.parse(text).run(defense, images(), LABELS, IDS, 0)
    assert torch.equal(attacked.pixels, expected.pixels)
    assert [module.training for module in defense.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="do not depend"):
        Attack.parse(text).run(De3(None, Function(without_gradients), 35).train(), images(), LABELS, IDS, 0)


@pytest.mark.parametrize(
    "text",
    [
        "fgsm:4/255,eot=3",
        "pgd:4/255,steps=4,eot=1,restarts=2",
        "pgd:4/255,steps=4,eot=3,loss=ce",
        "apgd-t:4/255,steps=3,eot=2",
        "aa:4/255,steps=3,eot=1",
        "square:4/255,steps=5,eot=2",
    ],
)
@pytest.mark.parametrize("sigma", [None, 30.0])
def test_the_most_gradients_are_those_of_an_attack_that_no_image_leaves(text, sigma):
    attack = Attack.parse(f"{text},full")
    target = De3(None, linear(), sigma)
    spent = attack.run(target, images(), LABELS, IDS, 0).gradients
    assert spent.tolist() == [attack.most_gradients(target.is_random, 3)] * BATCH


@pytest.mark.parametrize("text", ["pgd:16/255,steps=50,eot=4", "aa:8/255,steps=3,eot=1", "fgsm:4/255", "square:4/255"])
@pytest.mark.parametrize("sigma", [None, 30.0])
def test_an_attack_tells_of_each_pass(text, sigma):
    told = []
    target, attack = De3(None, linear(), sigma), Attack.parse(text)
    found = attack.run(target, images(), LABELS, IDS, 0, max_batch=8, tell=lambda *numbers: told.append(numbers))
    assert sum(gradients for gradients, _ in told) == int(found.gradients.sum())
    misled = [number for _, number in told]
    assert misled == sorted(misled)
    assert all(number <= BATCH for number in misled)
    leaves = sigma is None or attack.leaves_early
    assert (max(misled, default=0) > 0) == (leaves and bool(told))
    assert torch.equal(found.pixels, attack.run(target, images(), LABELS, IDS, 0, max_batch=8).pixels)
