"""De3 as the model of other attack libraries, as docs/evaluation.md shows it, and the traps that the page names."""

from __future__ import annotations

import re
import runpy
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from denim.defense import De3, ModuleTarget, paired_difference
from denim.kernels import Domain
from denim.nim import Autoencoder, AutoencoderConfig

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
CONFIG = AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target="raw")
IDS = torch.arange(12)
# Words in the block of a library, and what makes it quick and strong enough for a small network of four classes.
LIBRARIES = {
    "foolbox": {"n_steps=20": "n_steps=4", "steps=20": "steps=5, rel_stepsize=0.3", "4 / 255": "0.1"},
    "torchattacks": {"steps=20, eot_iter=20": "steps=5, eot_iter=4", "4 / 255, alpha=1 / 255": "0.1, alpha=0.03"},
    "art": {"draws=20": "draws=4", "nb_classes=10": "nb_classes=4", "eps=4 / 255, eps_step=1 / 255, max_iter=20": (
        "eps=0.1, eps_step=0.03, max_iter=5, verbose=False"
    )},
    "pyautoattack": {"4 / 255": "0.1", "100, 20": "5, 4"},
}  # fmt: skip
EACH = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 4))
        model[1].weight.data *= 4
    return model.eval().requires_grad_(False)


@pytest.fixture
def denoiser() -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Autoencoder(CONFIG).eval().requires_grad_(False)


def images() -> Tensor:
    return 0.2 + 0.6 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def accuracy(defense: De3, pixels: Tensor, labels: Tensor, draws: int = 50) -> float:
    with torch.no_grad():
        logits = defense.draw_logits(pixels, defense.seeds(9, Domain.SCORE, IDS, draws))
    return float((logits.argmax(dim=-1) == labels).double().mean())


def answers(defense: De3) -> Tensor:
    with torch.no_grad():
        return defense.draw_logits(images(), defense.seeds(8, Domain.SCORE, IDS, 100)).mean(dim=0).argmax(dim=1)


def block(library: str, changes: dict[str, str]) -> str:
    """The code of the page for a library, made quick."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text().split("## De3 inside other libraries")[1], re.S)
    (code,) = (text for text in blocks if re.search(rf"^(import|from) {library}\b", text, re.M))
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


@EACH
@pytest.mark.parametrize("rebuilds", [False, True])
def test_the_code_of_the_page_attacks_a_de3(library, rebuilds, network, denoiser):
    pytest.importorskip(library, reason=f"{library} is not installed; a De3 cannot be its model")
    defense = De3(denoiser if rebuilds else None, network, 20.0, seed=0)
    assert not defense.training
    labels = answers(defense)
    state = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    names = {"defense": defense, "pixels": images(), "labels": labels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(block(library, LIBRARIES[library]), names)
    attacked = names["attacked"].detach()
    assert attacked.dtype == torch.float32
    assert (attacked - images()).abs().max() <= 0.1 + 1e-6
    assert accuracy(defense, attacked, labels) < accuracy(defense, images(), labels) - 0.2
    assert not any(part.training for part in defense.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in defense.state_dict().items())
    exec(block("torch\nfrom denim", {}), names)  # the score
    assert 0 <= names["accuracy"] < 1


def auto_attack(model: nn.Module, labels: Tensor, version: str, eps: float = 0.1) -> Tensor:
    library = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    runner = library.AutoAttack(model, eps=eps, version=version, seed=0)
    runner.apgd.n_iter, runner.apgd.eot_iter, runner.attacks_to_run = 5, 4, ["apgd-ce"]
    return runner.run_standard_evaluation(images(), labels, batch_size=12)[0]


def test_pyautoattack_returns_images_as_they_were_and_believes_one_draw(network):
    defense = De3(None, network, 60.0, seed=1)
    labels = answers(defense)
    same = (auto_attack(defense, labels, "rand") == images()).flatten(1).all(dim=1)
    assert same.any()
    # It counts all of these as broken by one draw that missed; on fresh draws many answers are right.
    with torch.no_grad():
        logits = defense.draw_logits(images(), defense.seeds(9, Domain.SCORE, IDS, 50))
    assert (logits.argmax(dim=-1) == labels).double().mean(dim=0)[same].max() > 0.3
    # Where no attack is seen to succeed, the image also comes back as it was.
    assert torch.equal(
        auto_attack(defense.frozen(0), defense.frozen(0)(images()).argmax(dim=1), "rand", 1e-6), images()
    )


def test_a_global_seed_repeats_the_noise_of_a_module_and_not_that_of_a_de3(network):
    class Noisy(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return network(pixels + 0.1 * torch.randn(pixels.shape))

    def twice(model: nn.Module) -> bool:
        found = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):
                torch.manual_seed(0)
                found.append(model(images()))
        return torch.equal(*found)

    assert twice(Noisy())
    assert not twice(De3(None, network, 20.0))
    assert twice(De3(None, network, 20.0).frozen())


def test_pyautoattacks_seed_does_not_stop_the_noise_of_a_de3(network):
    """Two runs with one seed of pyautoattack have the same starts, and the noise of the first run is not repeated."""
    seen: list[Tensor] = []
    defense = De3(None, network, 20.0)
    defense.register_forward_hook(lambda module, given, logits: seen.append(logits.detach().clone()))
    labels = answers(defense)
    for _ in range(2):
        auto_attack(defense, labels, "rand")
    assert len(seen) > 20
    assert not any(
        torch.equal(one, other)
        for number, one in enumerate(seen)
        for other in seen[:number]
        if one.shape == other.shape
    )


def test_torchattacks_and_art_put_a_de3_into_evaluation_mode(network):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    art = pytest.importorskip("art.estimators.classification", reason="ART is not installed")
    defense, modes = De3(None, network, 20.0).train(), []
    defense.register_forward_hook(lambda module, given, logits: modes.append(module.training))
    torchattacks.PGD(defense, eps=0.1, alpha=0.03, steps=2)(images(), answers(defense))
    assert defense.training
    given = {"loss": nn.CrossEntropyLoss(), "input_shape": (1, 8, 8), "nb_classes": 4, "device_type": "cpu"}
    art.PyTorchClassifier(defense, clip_values=(0, 1), **given).predict(images().numpy())
    assert not defense.training
    assert len(modes) > 2
    assert not any(modes)


def test_training_mode_is_named_by_foolbox_and_left_to_the_user_by_pyautoattack(network):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    defense = De3(None, network, 20.0).train()
    with pytest.warns(UserWarning, match="training mode"):
        foolbox.PyTorchModel(defense, bounds=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto_attack(defense, answers(defense), "rand")
    assert defense.training


def test_normalised_and_unbounded_pixels_are_errors(network):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    art = pytest.importorskip("art.estimators.classification", reason="ART is not installed")
    defense = De3(None, network, 20.0)
    message = r"pixels must lie in \[0, 1\], .* normalisation lives inside the model"
    model = foolbox.PyTorchModel(defense, bounds=(0, 1), preprocessing={"mean": 0.5, "std": 0.25})
    with pytest.raises(ValueError, match=message):
        model(images())
    given = {"loss": nn.CrossEntropyLoss(), "input_shape": (1, 8, 8), "nb_classes": 4, "device_type": "cpu"}
    with pytest.raises(ValueError, match=message):
        art.PyTorchClassifier(defense, preprocessing=(0.5, 0.25), **given).predict(images().numpy())
    assert art.PyTorchClassifier(defense, clip_values=(0, 1), **given).predict(images().numpy()).shape == (12, 4)
    with pytest.raises(TypeError, match="divide uint8 images by 255"):
        defense((images() * 255).byte())


def test_a_model_of_normalised_images_goes_into_a_module_target(network):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    target = ModuleTarget(network, preprocessing=((0.5,), (0.25,)), is_random=False)
    labels = target(images()).argmax(dim=1)
    attacked = torchattacks.PGD(target, eps=0.1, alpha=0.03, steps=5)(images(), labels)
    assert (target(attacked).argmax(dim=1) == labels).double().mean() < 0.5


@pytest.mark.slow
def test_a_resnet_of_somebody_else_sees_through_the_shipped_denoiser_and_not_through_noise(data_folder):
    """The CIFAR-10 classifier that pyautoattack brings, which nothing has fine-tuned, on the first test images."""
    library = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    folder, archive = Path(library.__file__).parent / "examples", data_folder / "cifar10_jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}: set DENIM_DATA to the folder that holds it")
    with tarfile.open(archive) as tar:
        files = [member for member in tar if re.search(r"test/\w+/00[01]\d\.jpg$", member.name)]
        pixels = torch.stack([pil_to_tensor(Image.open(tar.extractfile(file))) for file in files]) / 255
    kinds = sorted({file.name.split("/")[-2] for file in files})
    labels = torch.tensor([kinds.index(file.name.split("/")[-2]) for file in files])
    assert len(labels) == 200
    network = runpy.run_path(str(folder / "resnet.py"))["ResNet18"]()
    network.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    denoiser = Autoencoder.from_pretrained("cifar10-tiny")

    def right(defense: De3) -> Tensor:
        seeds = defense.seeds(0, Domain.SCORE, torch.arange(200))
        with torch.no_grad():
            return (defense.draw_logits(pixels, seeds)[0].argmax(dim=-1) == labels).double()

    rebuilt, noisy = (right(De3(part, network.eval(), 20.0)).numpy() for part in (denoiser.eval(), None))
    # On 1,000 images 77.9 and 23.8 % are right.
    assert rebuilt.mean() >= 0.70
    assert paired_difference(rebuilt, noisy).low > 0.4
