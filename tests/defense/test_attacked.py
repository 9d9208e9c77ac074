"""Attacked images that an evaluation keeps: those that it has scored, whatever stopped, changed or was damaged."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from denim.defense import Attack, De3, EvaluationSettings, evaluate, load_attacked
from denim.defense import work as working
from denim.nim import progress

pytestmark = pytest.mark.slow

COUNT = 10
TEXT, RANDOM = "pgd:12/255,steps=3,eot=2", "sigma 35"
SETTINGS = EvaluationSettings(("fgsm:12/255,eot=2", TEXT), score_draws=3, seed=4, examples=0, health_images=0)
KEEPING = replace(SETTINGS, keep_attacked=True)


class Wavy(nn.Module):
    """Computes in float64, so that the sign of a gradient does not depend on the batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(64, 3).double().requires_grad_(False)

    def forward(self, pixels):
        return self.layer((12 * pixels).sin().flatten(1).double())


def pixels():
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def labels():
    return torch.arange(COUNT) % 3


def run(out, settings=KEEPING, seed=0, images=None, printed=None):
    """Two rows in batches of 4, 4 and 2."""
    network = Wavy(seed)
    rows = {"off": De3(None, network, None), RANDOM: De3(None, network, 35.0)}
    images = pixels() if images is None else images
    data = DataLoader(TensorDataset(images, labels()[: len(images)]), batch_size=4)
    return evaluate(rows, data, settings, out, console=Console(file=printed or io.StringIO(), width=200))


def expected(seed=0, sigma: float | None = 35.0):
    target = De3(None, Wavy(seed), sigma).eval()
    return Attack.parse(TEXT).run(target, pixels(), labels(), torch.arange(COUNT), 4).pixels


@pytest.fixture
def attacks(monkeypatch):
    """Numbers of images of the attacks that are run."""
    counts, real = [], working._attack

    def counting(row, where, clean, *rest):
        if row.attack is not None:
            counts.append(len(clean))
        return real(row, where, clean, *rest)

    monkeypatch.setattr(working, "_attack", counting)
    return counts


def test_the_kept_images_are_those_of_the_attack(tmp_path):
    kept, plain = run(tmp_path / "kept"), run(tmp_path / "plain", SETTINGS)
    assert kept.cells == plain.cells
    assert not (tmp_path / "plain" / "attacked").exists()
    for name, sigma in (("off", None), (RANDOM, 35.0)):
        found = load_attacked(tmp_path / "kept", name, TEXT)
        assert torch.equal(found.images, expected(sigma=sigma))
        assert torch.equal(found.labels, labels())
        assert found.ids.tolist() == list(range(COUNT))
    assert torch.equal(load_attacked(tmp_path / "kept", RANDOM, f"{TEXT},loss=ce+dlr").images, expected())


def test_a_finished_evaluation_attacks_again_for_them(tmp_path, attacks, monkeypatch):
    run(tmp_path, SETTINGS)
    records = (tmp_path / "records.sqlite").read_bytes()
    with pytest.raises(ValueError, match=r"has kept no attacked images of sigma 35 under pgd.*--keep-attacked"):
        load_attacked(tmp_path, RANDOM, TEXT)
    attacks.clear()
    monkeypatch.setattr(progress.LineClock, "due", lambda self: True)
    run(tmp_path, printed=(printed := io.StringIO()))
    announced, *lines, _last = printed.getvalue().splitlines()
    assert announced.startswith("evaluating: 0 records to make, by at most ")
    assert lines
    assert all(re.match(r"evaluating: 0/0 records  0:\d\d:\d\d left  ", line) for line in lines)
    assert sum(attacks) == 4 * COUNT
    assert (tmp_path / "records.sqlite").read_bytes() == records
    assert torch.equal(load_attacked(tmp_path, RANDOM, TEXT).images, expected())
    attacks.clear()
    run(tmp_path)
    assert not attacks


def test_a_file_that_is_lost_or_damaged_is_made_again(tmp_path, attacks):
    run(tmp_path)
    first, second, third = sorted((tmp_path / "attacked").glob("sigma 35 pgd*/*.safetensors"))
    first.unlink()
    third.write_bytes(third.read_bytes()[:40])
    with pytest.warns(UserWarning, match="is damaged, and is passed over"):
        assert load_attacked(tmp_path, RANDOM, TEXT).ids.tolist() == [4, 5, 6, 7]
    attacks.clear()
    before = second.stat().st_mtime_ns
    with pytest.warns(UserWarning, match="is damaged, and is passed over"):
        run(tmp_path)
    assert attacks == [4, 2]
    assert second.stat().st_mtime_ns == before
    assert torch.equal(load_attacked(tmp_path, RANDOM, TEXT).images, expected())


def test_images_and_weights_that_have_changed_replace_what_was_kept(tmp_path):
    run(tmp_path)
    run(tmp_path, seed=1)
    assert torch.equal(load_attacked(tmp_path, RANDOM, TEXT).images, expected(seed=1))
    changed = pixels()
    changed[9] = 1 - changed[9]
    run(tmp_path, seed=1, images=changed)
    found = load_attacked(tmp_path, RANDOM, TEXT).images
    assert torch.equal(found[:9], expected(seed=1)[:9])
    assert not torch.equal(found[9], expected(seed=1)[9])
    assert (found[9] - changed[9]).abs().max() <= 12 / 255 + 1e-6
    run(tmp_path, seed=2, images=pixels()[:4])  # files of the other batches are those of seed 1
    assert load_attacked(tmp_path, RANDOM, TEXT).ids.tolist() == [0, 1, 2, 3]


def test_two_processes_keep_what_one_keeps(tmp_path):
    """Files of one division of the images do not stand in the way of those of another."""
    run(tmp_path)
    for file in (tmp_path / "attacked").glob("*/0-000001.safetensors"):
        file.rename(file.with_name("1-000000.safetensors"))
    run(tmp_path)
    found = load_attacked(tmp_path, RANDOM, TEXT)
    assert found.ids.tolist() == list(range(COUNT))
    assert torch.equal(found.images, expected())


def test_rows_that_there_are_not(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"has no sigma 70 under pgd.*it has off under none, off under fgsm"):
        load_attacked(tmp_path, "sigma 70", TEXT)
    with pytest.raises(ValueError, match="not of the form"):
        load_attacked(tmp_path, RANDOM, "pgd:4,steps")
    with pytest.raises(FileNotFoundError):
        load_attacked(tmp_path / "nowhere", RANDOM, TEXT)
