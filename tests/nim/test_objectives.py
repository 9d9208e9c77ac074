"""The three objectives against the steps written out by hand."""

import pytest
import torch

from denim.kernels import Domain, derive_seeds, noise_patchify, normalized_patches, patch_loss
from denim.nim import Autoencoder, AutoencoderConfig, Mask, Objective, Sigma

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 8, 1, 2, target="norm")
PIXEL = {"patch_size": 4, "mean": CONFIG.mean, "std": CONFIG.std}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 8, 12, 3), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([0.0, 40.0, 90.0]), derive_seeds(5, Domain.TRAINING, torch.arange(3))


def squared_error(prediction, images):
    target = normalized_patches(images, **PIXEL).double()
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (prediction.double() - target).square().mean(-1)


def test_nim_counts_all_patches_of_the_noisy_image(batch):
    images, sigma, seeds = batch
    model = Autoencoder(CONFIG)
    loss = Objective.published("nim").loss(model, images, sigma, seeds)
    expected = squared_error(model(noise_patchify(images, sigma, seeds, **PIXEL)), images).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # float32 sums of a few hundred terms


def test_mae_counts_hidden_patches_of_the_clean_image(batch):
    images, _, seeds = batch
    model = Autoencoder(CONFIG)
    objective = Objective.published("mae", mask_ratio=0.5)
    mask = Mask.random(seeds, CONFIG.num_patches, 0.5)
    errors = squared_error(model(normalized_patches(images, **PIXEL), mask), images)
    loss = objective.loss(model, images, None, seeds)
    assert loss.item() == pytest.approx(errors[mask.hidden].mean().item(), rel=1e-5)


def test_dmae_hides_and_adds_noise_and_counts_all_patches(batch):
    images, sigma, seeds = batch
    model = Autoencoder(CONFIG)
    mask = Mask.random(seeds, CONFIG.num_patches, 0.75)
    errors = squared_error(model(noise_patchify(images, sigma, seeds, **PIXEL), mask), images)
    loss = Objective.published("dmae").loss(model, images, sigma, seeds)
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_published_noise_levels():
    assert Objective.published("nim").sigma == Sigma("gamma", (25.0, 3.0))
    assert Objective.published("mae").sigma is None
    assert Objective.published("dmae").sigma == Sigma("constant", (63.75,))
    assert Objective.published("nim", "uniform:0,150").sigma == Sigma("uniform", (0.0, 150.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beit", "70"), "nim, mae, dmae"),
        (("mae", "70"), "takes no sigma"),
        (("nim", "-3"), "not negative"),
        (("nim", "70", 1.0), "mask_ratio"),
    ],
)
def test_bad_objectives_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective.published(*arguments)


def test_an_objective_needs_its_sigma():
    with pytest.raises(ValueError, match="needs a sigma"):
        Objective("nim", None)


@pytest.mark.parametrize("name", ["nim", "mae", "dmae"])
@pytest.mark.parametrize("autocast", [True, False])
def test_patches_are_in_the_dtype_in_which_the_model_computes(batch, operators, name, autocast):
    images, sigma, seeds = batch
    model, objective = Autoencoder(CONFIG), Objective.published(name)
    given = []
    encode = model.encode
    model.encode = lambda patches, mask: given.append(patches) or encode(patches, mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), operators() as calls:
        loss = objective.loss(model, images, None if name == "mae" else sigma, seeds)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert [patches.dtype for patches in given] == [dtype]
    assert [call.args[-1] for call in calls["denim.noise_patchify.default"]] == [dtype]
    # The embedding takes the patches as they are.
    assert not any(call.args[0] is given[0] for call in calls["aten._to_copy.default"])
    assert loss.dtype == torch.float32
    # Rounded by the kernel, patches are the same as float32 ones that autocast rounds.
    patches = noise_patchify(images, sigma, seeds, **PIXEL) if name != "mae" else normalized_patches(images, **PIXEL)
    mask = None if name == "nim" else Mask.random(seeds, CONFIG.num_patches, 0.75)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model.decode(encode(patches, mask), mask)
    hidden = mask.hidden if name == "mae" else None
    assert torch.equal(loss, patch_loss(expected, images, mask=hidden, **PIXEL))
