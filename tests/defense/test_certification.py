from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from denim.benchmarks.certified_attacks import attacked_votes
from denim.defense import CertificationSettings, De3, ModuleTarget, certify
from denim.defense.certification_report import certified_curve, print_certification, write_certification
from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, progress
from denim.nim.data import EvalView, TorchLoader
from denim.nim.files import DamagedFileError
from denim.nim.ranks import joined
from denim.nim.stopping import Stopped

COUNT, CLASSES, SIZE = 7, 3, 6
SETTINGS = CertificationSettings((40.0, 90.0), draws=300, selection_draws=20, seed=5, max_batch=64)


class Linear(nn.Module):
    """Linear in float64, so that an answer depends on its image alone and not on the batch."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        weights = torch.randn(classes, SIZE * SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.register_buffer("weights", weights)
        self.sizes: list[int] = []

    not_in_fingerprint = ("sizes",)

    def forward(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        return (pixels.flatten(1).double() - 0.5) @ self.weights.T


def images(count: int = COUNT) -> Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def labels(count: int = COUNT) -> Tensor:
    truth = Linear()(images(count)).argmax(dim=1)
    truth[0] = (truth[0] + 1) % CLASSES  # one is wrong
    return truth


def run(out: Path, options: CertificationSettings = SETTINGS, classifier: nn.Module | None = None, data=None, **more):
    defense = De3(None, classifier or Linear(), 70)
    return certify(defense, data or (images(), labels()), options, out, console=Console(file=io.StringIO()), **more)


def lines(out: Path) -> dict[tuple[int, float], dict]:
    rows = [json.loads(line) for line in (out / "certificates.jsonl").read_text().splitlines()]
    return {(row["id"], row["sigma"]): row for row in rows}


def answers(image: int, sigma: float, draws: range, seed: int = SETTINGS.seed) -> np.ndarray:
    """What the noisy images of some draws are taken for; the key of a draw is spelt out."""
    level = struct.unpack("<q", struct.pack("<d", sigma))[0]
    seeds = derive_seeds(seed, Domain.CERTIFY, torch.tensor(image), level, torch.tensor(list(draws)))
    noise = normal_noise(seeds, (SIZE, SIZE, 1)).permute(0, 3, 1, 2)
    return Linear()(images()[image] + sigma / 255 * noise).argmax(dim=1).numpy()


def reference(image: int, sigma: float, n0: int, n: int, alpha: float) -> tuple[int | None, float]:
    """CERTIFY of Cohen et al. (2019), section 3.2.2, as it stands there; classes, or None for ABSTAIN."""
    counts0 = np.bincount(answers(image, sigma, range(2**31, 2**31 + n0)), minlength=CLASSES)
    top = int(counts0.argmax())
    counts = np.bincount(answers(image, sigma, range(n)), minlength=CLASSES)
    p_lower = proportion_confint(counts[top], n, alpha=2 * alpha, method="beta")[0]
    if p_lower > 1 / 2:
        return top, sigma / 255 * stats.norm.ppf(p_lower)
    return None, 0.0


def test_without_early_stopping_the_procedure_is_that_of_cohen_et_al(tmp_path):
    found = run(tmp_path)
    abstained = 0
    for level in found.levels:
        assert level.ids.tolist() == list(range(COUNT))
        assert (level.draws == SETTINGS.draws).all()
        for row in range(COUNT):
            top, radius = reference(row, level.sigma, 20, 300, SETTINGS.alpha)
            assert level.radii[row] == pytest.approx(radius, rel=1e-9, abs=0)
            abstained += top is None
            if top is not None:
                assert level.predictions[row] == top
    assert 0 < abstained < COUNT, "both outcomes are compared"


@pytest.mark.parametrize("options", [{"radii": (0.1, 0.3)}, {"tolerance": 0.05}])
def test_early_stopping_concludes_from_a_part_of_the_same_draws(tmp_path, options):
    settings = replace(SETTINGS, draws=2_000, **options)
    found = run(tmp_path, settings)
    spent = np.concatenate([level.draws for level in found.levels])
    assert 50 <= spent.min() < spent.max() <= 2_000
    for level in found.levels:
        estimation = settings.estimation(level.sigma)
        for row in range(COUNT):
            selected = np.bincount(answers(row, level.sigma, range(2**31, 2**31 + 20)), minlength=CLASSES)
            assert level.predictions[row] == selected.argmax()
            right = answers(row, level.sigma, range(level.draws[row])) == selected.argmax()
            assert level.successes[row] == right.sum()
            looks = [look for look, count in enumerate(estimation.looks) if count <= level.draws[row]]
            bounds = [
                proportion_confint(
                    right[: estimation.looks[look]].sum(), estimation.looks[look], 2 * estimation.errors[look], "beta"
                )[0]
                for look in looks
            ]
            assert level.bounds[row] == pytest.approx(max(bounds), rel=1e-9)


def test_results_do_not_depend_on_batches_order_or_company(tmp_path):
    settings = replace(SETTINGS, radii=(0.1,))
    whole = run(tmp_path / "whole", settings)
    single = run(tmp_path / "single", replace(settings, max_batch=7))
    other = run(tmp_path / "level", replace(settings, sigmas=(90.0,)))
    part = run(tmp_path / "part", settings, data=(images()[:3], labels()[:3]))
    for attribute in ("ids", "predictions", "successes", "draws", "radii"):
        expected = [getattr(level, attribute) for level in whole.levels]
        assert np.array_equal(expected, [getattr(level, attribute) for level in single.levels])
        assert np.array_equal(expected[1:], [getattr(level, attribute) for level in other.levels])
        assert np.array_equal([each[:3] for each in expected], [getattr(level, attribute) for level in part.levels])


def test_passes_are_full_and_never_larger_than_allowed(tmp_path):
    classifier = Linear()
    found = run(tmp_path, replace(SETTINGS, radii=(0.1,), max_batch=32), classifier)
    drawn = sum(level.draws.sum() for level in found.levels) + 2 * COUNT * 20
    passes = [size for size in classifier.sizes if size > 2]  # smaller ones look at the classifier
    assert max(passes) == 32
    assert sum(passes) >= drawn - 2 * 2
    assert np.mean(np.array(passes) == 32) > 0.8


def test_a_certification_that_was_stopped_goes_on_and_gives_the_same(tmp_path):
    expected = run(tmp_path / "whole")

    class Interrupting(Linear):
        not_in_fingerprint = ("sizes", "left")
        left = 20

        def forward(self, pixels: Tensor) -> Tensor:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(pixels)

    assert threading.current_thread() is threading.main_thread()
    interrupting = Interrupting()
    with pytest.raises(Stopped):
        run(tmp_path / "part", classifier=interrupting)
    kept = (tmp_path / "part" / "certificates.jsonl").read_text()
    assert 0 < kept.count("\n") < 2 * COUNT
    # A process that is killed while it writes leaves a line without its end.
    with (tmp_path / "part" / "certificates.jsonl").open("a") as handle:
        handle.write('{"key": "half')
    interrupting.left = 10**9
    again = run(tmp_path / "part", classifier=interrupting)
    assert (tmp_path / "part" / "certificates.jsonl").read_text().startswith(kept), "nothing is computed twice"
    assert lines(tmp_path / "part").keys() == lines(tmp_path / "whole").keys()
    for level, other in zip(expected.levels, again.levels, strict=True):
        assert np.array_equal(level.radii, other.radii)
    calls = len(interrupting.sizes)
    run(tmp_path / "part", classifier=interrupting)
    assert len(interrupting.sizes) == calls, "a finished certification computes nothing"


def test_memory_that_does_not_suffice_halves_the_passes_and_says_so(tmp_path):
    class Small(Linear):
        not_in_fingerprint = ("sizes", "most")

        def __init__(self, most: int) -> None:
            super().__init__()
            self.most = most

        def forward(self, pixels: Tensor) -> Tensor:
            if len(pixels) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(pixels)

    printed = io.StringIO()
    settings = replace(SETTINGS, tolerance=0.1)
    found = certify(
        De3(None, Small(20), 70), (images(), labels()), settings, tmp_path / "a", console=Console(file=printed)
    )
    said = re.findall("out of memory: from now on at most (\\d+) images in a pass", printed.getvalue())
    assert said == ["32", "16"]
    for level, other in zip(run(tmp_path / "b", settings).levels, found.levels, strict=True):
        assert np.array_equal(level.radii, other.radii)
        assert np.array_equal(level.draws, other.draws)
    # A first look at two copies of an image, and a pass of one.
    with pytest.raises(MemoryError, match=r"a pass of one image does not fit into memory \(CUDA .*another precision"):
        run(tmp_path / "c", classifier=Small(0))


def test_compiled_blocks_give_the_certificates_of_eager_ones(tmp_path, monkeypatch):
    torch.manual_seed(0)
    real, compiled = torch.compile, []

    def counted(function, **options):
        compiled.append(function)
        return real(function, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", counted)
    config = ClassifierConfig(3, (8, 8), 4, 16, 1, 2, mean=(0.5,), std=(0.25,), trained_on="noise, raw target")
    defense = De3(autoencoder("raw"), Classifier(config), 70)
    data = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    few = replace(SETTINGS, sigmas=(70.0,), draws=60)
    found = [
        certify(defense, data, replace(few, compile=on), tmp_path / str(on), console=Console(file=io.StringIO()))
        for on in (None, True)
    ]
    assert [each.settings.compile for each in found] == [False, True]
    assert len([function for function in compiled if "Block.forward" in function.__qualname__]) == 3
    assert np.array_equal(found[0].levels[0].successes, found[1].levels[0].successes)
    assert lines(tmp_path / "None") == lines(tmp_path / "True")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Certifications of two ranks, by the kind of their data, and what they have printed."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_two_ranks_have_the_certificates_of_one(two_ranks, tmp_path, kind):
    """Each certifies its own batches; then one process goes on with what both have."""
    out, said = two_ranks[0] / kind, two_ranks[1]
    expected = run(tmp_path, data=parts(kind))
    files = [out / name for name in ("certificates.jsonl", "certificates-1.jsonl")]
    made = [len(file.read_text().splitlines()) for file in files]
    assert sum(made) == 2 * COUNT
    assert min(made) >= 2 * (COUNT // 2)
    share = f"certifying: {2 * COUNT} certificates of at most 320 draws each, of which this process makes {made[0]}"
    assert share in said
    kept = [file.read_text() for file in files]
    files[1].write_text(kept[1] + '{"key": "half')  # which a process that is killed leaves
    classifier = Linear()
    again = run(out, classifier=classifier, data=parts(kind))
    assert classifier.sizes == [], "what both have is kept"
    assert [file.read_text() for file in files] == [kept[0], kept[1] + '{"key": "half']
    for level, other in zip(expected.levels, again.levels, strict=True):
        assert level.ids.tolist() == other.ids.tolist()
        assert np.array_equal(level.radii, other.radii)


class Few:
    """A source of the images in 0-255 levels."""

    name, classes, channels, skipped = "few", ("a", "b", "c"), 1, ()

    def __init__(self) -> None:
        self.labels, self.ids = labels(), torch.arange(COUNT)
        self.sizes = torch.full((COUNT, 2), SIZE, dtype=torch.int32)

    def __len__(self) -> int:
        return COUNT

    def where(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray((images()[index, 0] * 255).round().byte().numpy())


def parts(kind: str, rank: int = 0, world: int = 1):
    """Data in several batches, which are the same for all ranks, or a loader of a part of them."""
    if kind == "tensors":
        return DataLoader(TensorDataset(images(), labels()), batch_size=2)
    return TorchLoader(Few(), EvalView(SIZE), 2, shuffle=False, last="pad", workers=0, rank=rank, world=world)


def certify_on_ranks(out: Path) -> None:
    with joined(torch.device("cpu"), 100) as ranks:
        for kind in ("tensors", "loader"):
            console, data = Console(quiet=not ranks.is_first), parts(kind, ranks.rank, ranks.world)
            found = certify(De3(None, Linear(), 70), data, SETTINGS, out / kind, console=console, ranks=ranks)
            radii = ranks.gather([level.radii.tolist() for level in found.levels])
            assert radii[0] == radii[1]
            assert len(radii[0][0]) == COUNT


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 6}, {"draws": 299}, {"selection_draws": 21}, {"alpha": 0.01}, {"radii": (0.1,)}, {"tolerance": 0.1},
    ],
)  # fmt: skip
def test_certificates_of_other_settings_are_not_taken(tmp_path, changed):
    data = (images()[:1], labels()[:1])
    run(tmp_path, replace(SETTINGS, sigmas=(40.0,)), data=data)
    run(tmp_path, replace(SETTINGS, sigmas=(40.0,), **changed), data=data)
    assert len((tmp_path / "certificates.jsonl").read_text().splitlines()) == 2
    # Neither are those of other weights, images or labels.
    other = Linear()
    other.weights += 1
    for classifier, given in ((other, data), (None, (images()[1:2], data[1])), (None, (data[0], (data[1] + 1) % 3))):
        before = (tmp_path / "certificates.jsonl").read_text()
        run(tmp_path, replace(SETTINGS, sigmas=(40.0,)), classifier, given)
        assert len((tmp_path / "certificates.jsonl").read_text()) > len(before)


def test_progress_says_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "BETWEEN", 0.0)
    console = Console(file=io.StringIO(), width=200)
    certify(De3(None, Linear(), 70), (images(), labels()), SETTINGS, tmp_path, console=console)
    shown = console.file.getvalue().splitlines()
    assert shown[0] == "certifying: 14 certificates of at most 320 draws each"
    assert re.fullmatch(r"certifying: 0/14 certificates  [\d,]+ draws/s  at most \d:\d\d:\d\d left", shown[1])
    assert re.fullmatch(r"certifying: 13/14 certificates  [\d,]+ draws/s  \d:\d\d:\d\d left", shown[-3])
    assert re.fullmatch(r"certifying: 14/14 certificates  320 draws each  in \d:\d\d:\d\d", shown[-1])


def test_a_damaged_file_is_an_error(tmp_path):
    run(tmp_path, data=(images()[:1], labels()[:1]))
    text = (tmp_path / "certificates.jsonl").read_text()
    (tmp_path / "certificates.jsonl").write_text(text.replace('"draws": 300', '"draws": "300"'))
    with pytest.raises(DamagedFileError, match="draws"):
        run(tmp_path)


# What cannot be certified


def autoencoder(target: str) -> Autoencoder:
    return Autoencoder(AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target=target))


class Hidden(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :3] + torch.rand(len(pixels), 3)


@pytest.mark.parametrize(
    ("defense", "message"),
    [
        (lambda: De3(None, Linear(), 70).frozen(), "frozen"),
        (lambda: De3(None, Linear(), None), "off"),
        (lambda: De3(None, Linear(), 70, draws=4), "4 draws per call"),
        (lambda: De3(None, Linear(), 70, draws=2, aggregate="vote"), "2 draws per call"),
        (lambda: De3(autoencoder("raw"), Linear(), 0, degrade="mask"), "adds no noise"),
        (lambda: De3(autoencoder("norm"), Linear(), 70), 'statistics="noisy"'),
        (lambda: De3(autoencoder("norm"), Linear(), 70, degrade="both"), 'statistics="noisy"'),
        (lambda: De3(None, De3(None, Linear(), 35), 70), "classifier draws by itself"),
        (lambda: De3(None, ModuleTarget(Hidden(), is_random=True), 70), "classifier draws by itself"),
    ],
)
def test_defenses_without_a_valid_certificate_are_refused(tmp_path, defense, message):
    with pytest.raises(ValueError, match=message):
        certify(defense(), (images(), labels()), SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_and_hidden_randomness_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"De3\(None, model, sigma\)"):
        certify(Linear(), (images(), labels()), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="draws by itself in evaluation mode"):
        run(tmp_path, classifier=Hidden())
    with pytest.raises(ValueError, match="classifier draws by itself"):
        run(tmp_path, classifier=ModuleTarget(Hidden()))
    assert len(run(tmp_path, classifier=ModuleTarget(Linear())).levels) == 2


def test_bad_images_and_labels_are_refused(tmp_path):
    for data, message in (
        ((images(), labels() + 1), "labels reach from 1 to 3"),
        ((images(), labels() - 1), "labels reach from -1"),
        ((images()[:0], labels()[:0]), "needs images"),
        ((torch.rand(3, 1, 5, 5), labels()[:3]), "does not take pixels of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, data=data)
    with pytest.raises(ValueError, match="2 names of classes"):
        run(tmp_path, classes=("a", "b"))


def test_radii_that_the_draws_cannot_certify_are_named_and_given_up_at_once(tmp_path):
    settings = replace(SETTINGS, sigmas=(40.0,), radii=(1.0,), draws=2_000)
    with pytest.warns(UserWarning, match="no image can be certified at radius 1 with sigma 40"):
        found = run(tmp_path, settings)
    assert (found.levels[0].draws == 50).all()
    assert any("largest radius" in note for note in found.warnings)


# What certificates are worth


def digits():
    """Digits and a classifier of them, trained on noisy ones."""
    data = load_digits()
    pixels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32)
    noisy = pixels + 40 / 255 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    fitted = LogisticRegression(max_iter=300, tol=1e-2).fit(noisy[:1000].flatten(1).numpy(), data.target[:1000])
    layer = nn.Linear(64, 10)
    layer.load_state_dict({"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)})
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False), pixels[1000:], torch.tensor(data.target[1000:])


@pytest.mark.slow
def test_l2_attacks_find_nothing_inside_certified_radii(tmp_path):
    classifier, pixels, truth = digits()
    count = 8
    settings = CertificationSettings((40.0,), draws=1_000, max_batch=1_000)
    (level,) = run(tmp_path, settings, classifier, (pixels[:count], truth[:count])).levels
    defense = De3(None, classifier, 40)

    certified = np.flatnonzero(level.radii > 0)
    assert len(certified) > 5

    def votes(factor: float) -> np.ndarray:
        radii = factor * level.radii[certified]
        options = {"steps": 8, "eot": 4, "draws": 2_000, "max_batch": 2_000}
        return attacked_votes(defense, pixels[certified], level.predictions[certified], radii, certified, **options)

    assert votes(0.9999).tolist() == level.predictions[certified].tolist()
    # The attack is strong enough to find what is there.
    assert np.mean(votes(4.0) != level.predictions[certified]) > 0.7


def test_certified_radii_of_a_linear_classifier_are_below_its_margins(tmp_path):
    """Smoothing leaves a linear classifier of two classes as it is, so the true radius is the distance to its plane."""
    classifier = Linear(2)
    settings = CertificationSettings((60.0,), draws=2_000, tolerance=0.02)
    truth = classifier(images(60)).argmax(dim=1)
    (level,) = run(tmp_path, settings, classifier, (images(60), truth)).levels
    normal = classifier.weights[0] - classifier.weights[1]
    margins = (((images(60).flatten(1).double() - 0.5) @ normal).abs() / normal.norm()).numpy()
    assert (level.radii <= margins).all()
    reachable = margins < 0.8 * level.largest_radius
    assert reachable.sum() > 20
    assert (margins - level.radii)[reachable].max() < 0.15


# The report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("certified")
    return out, run(out)


def test_files_of_the_report(finished):
    out, found = finished
    write_certification(found, out)
    with (out / "certificates.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * COUNT
    for row in rows:
        record = lines(out)[int(row["id"]), float(row["sigma"])]
        assert int(row["draws"]) == record["draws"] == 300
        expected = float(row["sigma"]) / 255 * max(stats.norm.ppf(record["bound"]), 0)
        assert float(row["radius"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["radius_levels"]) == pytest.approx(255 * expected, rel=1e-5)
        assert row["prediction"] == (str(record["top"]) if expected else "")
        assert int(row["correct"]) == (expected > 0 and record["top"] == record["label"])
    with (out / "results.csv").open() as handle:
        curve = list(csv.DictReader(handle))
    for row in curve:
        right = [each for each in rows if each["sigma"] == row["sigma"] and int(each["correct"])]
        share = np.mean(
            [0.0] * (COUNT - len(right)) + [float(each["radius"]) >= float(row["radius"]) for each in right]
        )
        assert float(row["certified"]) == pytest.approx(share)
        assert float(row["low"]) <= share <= float(row["high"])
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["alpha"] == 0.001
    assert [level["draws_per_image"] for level in results["levels"]] == [320, 320]
    assert results["levels"][0]["largest_radius"] == pytest.approx(40 / 255 * stats.norm.ppf(0.001 ** (1 / 300)))
    assert (out / "certified.png").stat().st_size > 10_000


def test_the_curve_is_that_of_the_certificates(finished):
    _, found = finished
    axes = certified_curve(found).axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) > 2]
    for level, line in zip(found.levels, drawn, strict=True):
        x, y = line.get_data()
        assert x[-1] == pytest.approx(level.largest_radius, rel=1e-12)
        assert y[-1] == 0
        for radius in np.linspace(0.001, x[-1] - 0.001, 23):
            # Of steps that are drawn as "pre", the value is that of the next point.
            assert y[np.searchsorted(x, radius)] == pytest.approx(100 * level.certified(radius).value)


def printed(found) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_certification(found, console)
    return " ".join(console.file.getvalue().split())


def test_the_table_says_what_was_found_and_what_is_not_known(finished, tmp_path):
    _, found = finished
    shown = printed(found)
    assert "sigma 40" in shown
    assert "(s = 0.157)" in shown
    assert str(found.levels[1].certified(0)) in shown
    assert f"{found.levels[1].average_radius.value:.3f}" in shown
    part = run(tmp_path, replace(SETTINGS, radii=(0.25, 0.1)))
    shown = printed(part)
    assert "0.1 (25.5 levels)" in shown
    assert "average radius" not in shown
    assert "abstained" not in shown
    assert "abstained" in printed(run(tmp_path, replace(SETTINGS, radii=(0.0, 0.1))))
    assert "other radii, and their average, are not known" in shown
    axes = certified_curve(part).axes[0]
    for level, errorbar in zip(part.levels, axes.containers, strict=True):
        x, y = errorbar.lines[0].get_data()
        assert errorbar.lines[0].get_linestyle() == "None"
        assert x == pytest.approx([0.1, 0.25], abs=0.01)
        assert y == pytest.approx([100 * level.certified(radius).value for radius in (0.1, 0.25)])


if __name__ == "__main__":
    certify_on_ranks(Path(sys.argv[1]))
