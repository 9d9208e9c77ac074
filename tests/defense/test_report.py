from __future__ import annotations

import base64
import csv
import io
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from PIL import Image
from rich.console import Console

from denim.defense.cells import Cell
from denim.defense.evaluation import Evaluation
from denim.defense.gallery import Examples
from denim.defense.report import curves, print_table, resubmissions, tradeoff, write_report
from denim.defense.report import page as report_page
from denim.defense.report.pictures import strength, strengths
from denim.defense.rows import EvaluationSettings
from denim.defense.scores import paired_difference, resubmission_curve, score

pytestmark = pytest.mark.slow

RAW, LEAKY = "noise, raw target", "noise, input statistics"
FGSM, PGD, GRAY = "fgsm:16/255,eot=2", "pgd:16/255,steps=3,eot=2", "pgd:16/255,steps=3,eot=2,gray"
ATTACKS = {"none": None, FGSM: 16 / 255, PGD: 16 / 255, GRAY: 16 / 255, "worst 16/255": 16 / 255}
# Levels are out of order, which report and picture must sort; names have characters that HTML and matplotlib interpret.
DEFENSES = (
    ("clean", None, False, "undefended"),
    ("s70", 70.0, False, RAW),
    ("s0", 0.0, False, RAW),
    ("<i>s35</i> & [red]$x$[/red]", 35.0, False, RAW),
    ("leaky 35", 35.0, False, LEAKY),
    ("leaky 70", 70.0, False, LEAKY),
    ("frozen", 70.0, True, RAW),
)
NOISY = ("noisy 35", 35.0, False, "noise, noisy statistics")
WARNINGS = (
    "frozen under fgsm:16/255,eot=2: randomness carries the difference (docs/method.md, health checks)",
    'the gradient of <script>alert("x")</script> [bold]was zero[/bold]',
)
VOID = {"meta", "img", "col", "br"}


def example(shape, attacked, random, seed):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pixels = (clean + 16 / 255 * torch.rand(shape, generator=generator).sub(0.5).sign()).clamp(0, 1)
    pixels = pixels if attacked else clean
    noisy = pixels + 0.3 * torch.randn(shape, generator=generator) if random else pixels
    labels = torch.arange(shape[0]) % 3
    predictions = torch.where(torch.arange(shape[0]) == 1, (labels + 1) % 3, labels)
    denoised = noisy.clamp(0, 1) * 0.9 if random else pixels
    return Examples(clean, pixels, noisy, denoised, labels, labels.clone(), predictions)


def evaluation(defenses=DEFENSES, attacks=ATTACKS, *, shape=(4, 1, 16, 16), examples=True, warnings=WARNINGS):
    generator = np.random.default_rng(0)
    cells, kept, first = [], {}, {}
    for row, (name, sigma, frozen, case) in enumerate(defenses):
        for column, (attack, epsilon) in enumerate(attacks.items()):
            # 0 and 1 among the accuracies: their intervals end at the value.
            accuracy = {0: 1.0, 1: 0.0}.get(row * len(attacks) + column, generator.random())
            labels = np.zeros(150, dtype=int)
            predictions = (generator.random((150, 5)) >= accuracy).astype(int)
            shares = (predictions == 0).mean(axis=1)
            other = first.setdefault(attack, shares)
            difference = None if other is shares else paired_difference(shares, other)
            scores = score(predictions, labels)
            tries = resubmission_curve(predictions, labels) if sigma and not frozen else ()
            cost = (1000 * row + column, 17 * row, 0.5 * column)
            cells.append(Cell(name, sigma, frozen, case, attack, epsilon, scores, difference, tries, *cost))
            if examples and not attack.startswith("worst"):
                kept[name, attack] = example(shape, epsilon is not None, sigma is not None, len(kept) + 1)
    settings = EvaluationSettings(tuple(attack for attack in attacks if ":" in attack), score_draws=5, seed=3)
    return Evaluation(tuple(cells), ("zero", "<b>one</b>"), settings, warnings, {"torch": "2.x<y"}, kept)


def mean(result, name, attack):
    (cell,) = (cell for cell in result.cells if (cell.defense, cell.attack) == (name, attack))
    return cell.scores.mean


class Page(HTMLParser):
    """Elements, text and references of a page; fails where an element is not closed where it should be."""

    def __init__(self, file):
        super().__init__()
        self.open, self.elements, self.references, self.texts = [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self.references += [attrs[key] for key in ("src", "href", "srcset", "data", "action") if key in attrs]
        self.references += re.findall(r"url\(([^)]*)\)", attrs.get("style") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "style":
            self.references += re.findall(r"url\(([^)]*)\)", data)
            assert "@import" not in data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def having(self, name):
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def decode(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    return image


def strips(page):
    """Images by the CSS class that shows them."""
    rules = re.findall(r"\.(strip-\d+)\{background-image:url\(([^)]*)\)", "".join(page.texts))
    return {name: decode(uri) for name, uri in rules}


def printed(result, width):
    console = Console(file=io.StringIO(), width=width)
    print_table(result, console)
    return console.file.getvalue()


def test_report_writes_its_files_and_leaves_nothing_else(tmp_path):
    files = {"report.html", "results.csv", "table.md", "table.tex"}
    files |= {f"tradeoff.{ending}" for ending in ("png", "svg", "pdf")}
    assert write_report(evaluation(), tmp_path / "new" / "folder", title="t") == tmp_path / "new/folder/report.html"
    assert {file.name for file in (tmp_path / "new/folder").iterdir()} == files | {
        "resubmission.csv",
        "resubmission.png",
    }
    write_report(evaluation(DEFENSES[:1]), tmp_path / "nothing random", title="t")
    assert {file.name for file in (tmp_path / "nothing random").iterdir()} == files


def test_csv_holds_every_number_of_every_cell_exactly(tmp_path):
    result = evaluation()
    write_report(result, tmp_path, title="t")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == len(result.cells) == len(DEFENSES) * len(ATTACKS)
    for row, cell in zip(rows, result.cells, strict=True):
        assert (row["defense"], row["case"], row["attack"]) == (cell.defense, cell.case, cell.attack)
        assert row["frozen"] == ("true" if cell.frozen else "false")
        assert (int(row["num_images"]), int(row["score_draws"])) == (150, 5)
        for name in ("sigma", "epsilon"):
            assert (float(row[name]) if row[name] else None) == getattr(cell, name)
        intervals = {name: getattr(cell.scores, name) for name in ("mean", "vote", "worst")}
        for name, interval in {**intervals, "difference": cell.difference}.items():
            texts = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            if interval is None:
                assert texts == ["", "", ""]
            else:
                assert [float(text) for text in texts] == [interval.value, interval.low, interval.high]
        spent = (int(row["gradients"]), int(row["gradients_saved"]), float(row["seconds"]))
        assert spent == (cell.gradients, cell.gradients_saved, cell.seconds)


def test_csv_of_resubmission_has_a_line_for_every_number_of_tries(tmp_path):
    result = evaluation()
    write_report(result, tmp_path, title="t")
    with (tmp_path / "resubmission.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    expected = [(cell, n) for cell in result.cells if cell.resubmission for n in range(1, 6)]
    assert len(rows) == len(expected) == 4 * len(ATTACKS) * 5
    for row, (cell, tries) in zip(rows, expected, strict=True):
        assert (row["defense"], row["attack"], int(row["tries"])) == (cell.defense, cell.attack, tries)
        interval = cell.resubmission[tries - 1]
        found = [float(row[name]) for name in ("accuracy", "low", "high")]
        assert found == [interval.value, interval.low, interval.high]


def test_picture_of_resubmission_has_attacked_beside_clean_and_frozen_beside_random():
    result = evaluation()
    random = [name for name, sigma, frozen, _ in DEFENSES if sigma and not frozen]
    panels = [axes for axes in resubmissions(result).axes if axes.get_visible()]
    assert len(panels) == len(random)
    for axes, name in zip(panels, random, strict=True):
        lines = axes.get_lines()
        curves_drawn = [line for line in lines if line.get_linestyle() == "-"]
        flat = [line for line in lines if line.get_linestyle() == "--"]
        for attack, line in zip(ATTACKS, curves_drawn, strict=True):
            (cell,) = (cell for cell in result.cells if (cell.defense, cell.attack) == (name, attack))
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
            np.testing.assert_allclose(line.get_ydata(), [100 * m.value for m in cell.resubmission], rtol=1e-15)
        # "frozen" has the case and the level of s70 alone.
        expected = [100 * mean(result, "frozen", attack).value for attack in ATTACKS] if name == "s70" else []
        np.testing.assert_allclose([line.get_ydata()[0] for line in flat], expected, rtol=1e-15)


def test_picture_draws_the_cells():
    result = evaluation()
    curve_axes, reference_axes = tradeoff(result).axes
    names = {RAW: ["s0", DEFENSES[3][0], "s70"], LEAKY: ["leaky 35", "leaky 70"]}
    sigmas = {RAW: [0, 35, 70], LEAKY: [35, 70]}
    lines = curve_axes.get_lines()
    bands = [item for item in curve_axes.collections if isinstance(item, PolyCollection)]
    expected = [(case, attack) for case in (RAW, LEAKY) for attack in ATTACKS]
    assert [(curve.case, curve.attack) for curve in curves(result)] == expected
    for (case, attack), line, band in zip(expected, lines, bands, strict=True):
        means = [mean(result, name, attack) for name in names[case]]
        np.testing.assert_array_equal(line.get_xdata(), sigmas[case])
        # Percent of a share: one rounding.
        np.testing.assert_allclose(line.get_ydata(), [100 * m.value for m in means], rtol=1e-15)
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
        for sigma, m in zip(sigmas[case], means, strict=True):
            assert {(sigma, round(100 * m.low, 9)), (sigma, round(100 * m.high, 9))} <= corners
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(lines), "two curves look alike"
    assert len({line.get_marker() for line in lines[: len(ATTACKS)]}) >= len(ATTACKS) - 1  # the worst is a larger ring
    for attack, bars in zip(ATTACKS, reference_axes.containers, strict=True):
        points, _, (segments,) = bars
        means = [mean(result, name, attack) for name in ("clean", "frozen")]
        np.testing.assert_array_equal(np.rint(points.get_xdata()), [0, 1])
        np.testing.assert_allclose(points.get_ydata(), [100 * m.value for m in means], rtol=1e-15)
        # Value minus length of the bar: some roundings of numbers up to 100.
        ends = [sorted(segment[:, 1]) for segment in segments.get_segments()]
        np.testing.assert_allclose(ends, [[100 * m.low, 100 * m.high] for m in means], atol=1e-12)
    assert [tick.get_text() for tick in reference_axes.get_xticklabels()] == ["clean", "frozen\n(\u03c3 70, frozen)"]


def test_defenses_of_one_case_and_level_are_curves_of_their_own():
    twice = [("a0", 0.0, False, RAW), ("b0", 0.0, False, RAW), ("a9", 9.0, False, RAW), ("b9", 9.0, False, RAW)]
    result = evaluation(twice, {"none": None}, examples=False)
    first, second = curves(result)
    assert (first.case, first.means) == (f"{RAW} (a0, a9)", (mean(result, "a0", "none"), mean(result, "a9", "none")))
    assert (second.case, second.means) == (f"{RAW} (b0, b9)", (mean(result, "b0", "none"), mean(result, "b9", "none")))


def test_single_level_stands_beside_the_references(tmp_path):
    single = [defense for defense in DEFENSES if defense[0] in ("clean", "s70", "frozen")]
    result = evaluation(single)
    assert curves(result) == ()
    (axes,) = tradeoff(result).axes
    for attack, bars in zip(ATTACKS, axes.containers, strict=True):
        values = [100 * mean(result, name, attack).value for name in ("clean", "s70", "frozen")]
        np.testing.assert_allclose(bars[0].get_ydata(), values, rtol=1e-15)
    Page(write_report(result, tmp_path, title="t"))


def test_picture_without_references_has_one_panel():
    (axes,) = tradeoff(evaluation(DEFENSES[1:4])).axes
    assert len(axes.get_lines()) == len(ATTACKS)


def test_picture_takes_names_literally(tmp_path):
    # matplotlib parses text between dollar signs as mathematics, and cannot parse this.
    write_report(evaluation([(r"$\frac{$", None, False, "undefended")], examples=False), tmp_path, title="t")


def test_many_attacks_keep_their_own_colours():
    attacks = {"none": None} | {f"fgsm:{radius}/255,eot=1": radius / 255 for radius in range(1, 12)}
    lines = tradeoff(evaluation(attacks=attacks, examples=False)).axes[0].get_lines()[: len(attacks)]
    assert len({tuple(np.atleast_1d(line.get_color())) for line in lines}) == len(attacks)


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 3, 32, 24), (2, 2, 8, 8), (2, 3, 160, 160)])
def test_page_is_well_formed_and_self_contained(tmp_path, shape):
    file = write_report(evaluation(shape=shape), tmp_path, title="A <title> & more")
    page = Page(file)
    assert page.count("link") == page.count("iframe") == 0
    assert [attrs for tag, attrs in page.elements if tag == "script"] == [{}], "one script, within the page"
    assert page.references
    for reference in page.references:
        assert reference.startswith(("data:image/png;base64,", "data:text/plain;", "#")), reference[:80]
    bare = re.sub(r"base64,[A-Za-z0-9+/=]*", "", file.read_text(encoding="utf-8"))
    assert not re.search(r"http|fetch|import|XMLHttpRequest", bare)
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= targets
    for tag, attrs in page.elements:
        if tag == "img" or attrs.get("role") == "img":
            assert attrs.get("alt") or attrs.get("aria-label")


def test_page_escapes_every_name(tmp_path):
    page = Page(write_report(evaluation(), tmp_path, title="A <u>title</u> & more"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"b", "i", "u"})
    assert page.count("script") == 1
    for text in ("A <u>title</u> & more", "<b>one</b>", DEFENSES[3][0], "torch 2.x<y", WARNINGS[1]):
        assert text in page.text


NAMES = (
    "x" * 300,
    "\u0633\u0644\u0627\u0645",
    "</script><script>alert(1)//",
    "=cmd|' /C calc'!A0",
    r"[a]_%&$#{}~^\|*`",
    "",
)


def test_tables_of_markdown_and_latex_have_every_mean_and_escape_names(tmp_path):
    result = evaluation([(name, None, False, "model") for name in NAMES], examples=False, warnings=())
    page = Page(write_report(result, tmp_path, title="t"))
    assert page.count("script") == 1
    markdown, latex = ((tmp_path / f"table.{ending}").read_text(encoding="utf-8") for ending in ("md", "tex"))
    # Cells of a row in Markdown: split at bars that are not escaped, then unescaped.
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines()]
    assert {len(row) for row in rows} == {2 + len(ATTACKS)}
    plain = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in row] for row in rows]
    means = [[str(mean(result, name, attack)) for attack in ATTACKS] for name in NAMES]
    assert [row[0] for row in plain[2:]] == list(NAMES)
    assert [row[2:] for row in plain[2:]] == means
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")].splitlines()[1:]
    assert [line.count(" & ") for line in body] == [1 + len(ATTACKS)] * len(NAMES)
    for line, values in zip(body, means, strict=True):
        assert line.endswith(r" \\")
        assert not line.startswith("["), "it would be an argument of the row before"
        assert line.removesuffix(r" \\").replace("{[}", "[").split(" & ")[2:] == values
    assert body[4].startswith(
        r"{[}a]\_\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}*`" + " & "
    )


def test_links_of_the_page_are_its_tables_with_rounded_numbers(tmp_path):
    result = evaluation()
    page = Page(write_report(result, tmp_path, title="t"))
    files = {attrs["download"]: attrs["href"] for tag, attrs in page.elements if "download" in attrs}
    texts = {name: base64.b64decode(uri.partition(",")[2]).decode() for name, uri in files.items()}
    assert texts["table.md"] == (tmp_path / "table.md").read_text()
    assert texts["table.tex"] == (tmp_path / "table.tex").read_text()
    rows = list(csv.DictReader(io.StringIO(texts["table.csv"])))
    assert [row["mean"] for row in rows] == [f"{cell.scores.mean.value:.4f}" for cell in result.cells]


def test_marks_over_the_picture_have_every_mean_where_it_is_drawn(tmp_path):
    result = evaluation()
    page = Page(write_report(result, tmp_path, title="t"))
    marks = {attrs["title"]: attrs["style"] for attrs in page.having("point")}
    assert len(marks) == len(result.cells)
    picture = np.asarray(Image.open(tmp_path / "tradeoff.png").convert("RGB")).astype(int)
    names = dict(zip(ATTACKS, ("none", "fgsm 16/255", "pgd 16/255", "pgd 16/255 gray", "worst 16/255"), strict=True))
    for name, attack, colour in (("s0", "none", (0, 0, 0)), ("clean", FGSM, (0, 0x72, 0xB2))):
        style = marks[f"{name}, {names[attack]}: {mean(result, name, attack)}"]
        left, top = (float(value) / 100 for value in re.findall(r"([\d.]+)%", style))
        row, column = round(top * picture.shape[0]), round(left * picture.shape[1])
        assert np.abs(picture[row, column] - colour).max() < 40, (name, attack)


def many_defenses(count):
    """A third are levels of one case, a third are frozen, the rest are off; names are long."""
    long = "a defense of which there are many and whose name is long, "
    kinds = [(None, False, "undefended"), (70.0, True, RAW), (None, False, RAW)]
    return [(f"{long}{n}", n / 2 if n % 3 == 2 else kinds[n % 3][0], n % 3 == 1, kinds[n % 3][2]) for n in range(count)]


@pytest.mark.parametrize("count", [13, 40, 80])
def test_pictures_of_many_defenses_can_be_read(tmp_path, count):
    """Names beside the curves would leave no room for them, or make a picture of 20,000 pixels."""
    attacks = {"none": None} | {f"pgd:{n}/255,steps=3,eot=2": n / 255 for n in (4, 8)}
    result = evaluation(many_defenses(count), attacks, examples=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "axes sizes collapsed to zero"
        page = Page(write_report(result, tmp_path, title="t"))
    for name, figure in (("tradeoff", tradeoff(result)), ("strength", strength(result))):
        width, _ = Image.open(tmp_path / f"{name}.png").size
        assert 1000 <= width <= 2500
        figure.canvas.draw()
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert min(box.width, box.height) > 2 * figure.dpi
            names = [label for label in axes.get_yticklabels() if "defense" in label.get_text()]
            tops = [label.get_window_extent().y0 for label in names]
            heights = [label.get_window_extent().height for label in names]
            assert all(upper - lower >= height for upper, lower, height in zip(tops, tops[1:], heights, strict=False))
    places = [re.findall(r"([\d.]+)%", attrs["style"]) for attrs in page.having("point")]
    assert len(places) == len(result.cells)
    assert all(0 <= float(value) <= 100 for place in places for value in place)


def test_strength_has_attacks_that_differ_in_one_option_and_draws_them(tmp_path):
    radii = {f"pgd:{n}/255,steps=3,eot=2": n / 255 for n in (8, 4)}
    others = {"pgd:8/255,steps=50,eot=2": 8 / 255, "pgd:8/255,steps=3,eot=8": 8 / 255, "apgd:8/255,eot=8": 8 / 255}
    foreign = {"foolbox:LinfPGD:8/255,steps=3": 8 / 255, "worst 8/255": 8 / 255}
    result = evaluation(attacks={"none": None} | radii | others | foreign)
    by_radius, by_steps, by_draws = strengths(result)
    eight, four = radii
    assert (by_radius.option, by_radius.attacks) == ("epsilon", {0.0: "none", 4 / 255: four, 8 / 255: eight})
    assert (by_steps.option, by_steps.attacks) == ("steps", {3: eight, 50: "pgd:8/255,steps=50,eot=2"})
    assert (by_draws.option, by_draws.attacks) == ("eot", {2: eight, 8: "pgd:8/255,steps=3,eot=8"})
    panels = strength(result).axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["pgd steps=3 eot=2", "pgd 8/255 eot=2", "pgd 8/255 steps=3"]
    line = panels[1].get_lines()[1]
    np.testing.assert_array_equal(line.get_xdata(), [3, 50])
    means = [100 * mean(result, "s70", attack).value for attack in by_steps.attacks.values()]
    np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-15)
    page = Page(write_report(result, tmp_path / "several", title="t"))
    assert (tmp_path / "several" / "strength.png").exists()
    assert "Strength of the attack" in page.text
    assert strengths(evaluation()) == ()
    assert "Strength of the attack" not in Page(write_report(evaluation(), tmp_path / "one", title="t")).text
    assert not (tmp_path / "one" / "strength.png").exists()


def test_page_says_how_and_at_which_cost_it_was_made(tmp_path):
    result = evaluation()
    words = "denim evaluate --out 'a <b>'"
    page = Page(write_report(result, tmp_path, title="t", command=words, data="digits & more"))
    assert words in page.text
    assert "digits & more" in page.text
    own = [cell for cell in result.cells if not cell.attack.startswith("worst")]
    spent, saved = sum(cell.gradients for cell in own), sum(cell.gradients_saved for cell in own)
    assert f"{spent:,} gradients of one draw were computed; leaving early saved {saved:,}." in page.text
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d", page.text)


def test_pictures_for_print_have_the_same_bytes_each_time(tmp_path):
    for folder in ("one", "other"):
        write_report(evaluation(examples=False), tmp_path / folder, title="t")
    for ending in ("svg", "pdf"):
        one, other = ((tmp_path / folder / f"tradeoff.{ending}").read_bytes() for folder in ("one", "other"))
        assert one == other


def test_names_that_cannot_be_printed_cost_no_report(tmp_path):
    """Bytes of a folder's name that are not UTF-8, and characters that act on a terminal."""
    name, shown = "caf\udce9 \x1b[31m", r"caf\xe9 \x1b[31m"
    odd = replace(
        evaluation([(name, None, False, "undefended"), *DEFENSES[1:]], warnings=(f"{name}: lost",)),
        classes=(name, "\u732b"),
    )
    page = write_report(odd, tmp_path, title=name).read_text(encoding="utf-8")
    assert page.count(shown) > 5
    assert "\u732b" in page
    assert "\x1b" not in page
    assert r"caf\udce9 " in (tmp_path / "results.csv").read_text(encoding="utf-8")
    text = io.StringIO()
    print_table(odd, Console(file=text, width=200))
    assert text.getvalue().count(shown) >= 3
    assert "\x1b" not in text.getvalue()


def test_page_holds_warnings_settings_and_every_number(tmp_path):
    result = evaluation()
    page = Page(write_report(result, tmp_path, title="t"))
    for warning in WARNINGS:
        # Links split the text of a warning, at a place where it has no space.
        assert warning.replace(" ", "") in page.text.replace(" ", "")
    assert ("a", {"href": "#health"}) in page.elements
    for text in ("150 images", "5 fresh draws", "Seed 3", PGD, GRAY):
        assert text in page.text
    for cell in result.cells:
        for interval in (cell.scores.mean, cell.scores.vote, cell.scores.worst):
            assert str(interval) in page.text
        if cell.difference is not None:
            value, low, high = (100 * end for end in (cell.difference.value, cell.difference.low, cell.difference.high))
            assert f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" in page.text


def test_many_warnings_do_not_push_the_table_off_the_screen(tmp_path):
    file = write_report(evaluation(warnings=tuple(f"warning {letter}" for letter in "abcdef")), tmp_path, title="t")
    section = re.search('<section class="warnings">(.*?)</section>', file.read_text(encoding="utf-8"), re.DOTALL)[1]
    shown, _, folded = section.partition("<details>")
    assert "6 warnings" in shown
    assert re.findall("warning [a-f]", shown) == ["warning a", "warning b", "warning c", "warning d"]
    assert "<summary>2 more</summary>" in folded
    assert re.findall("warning [a-f]", folded) == ["warning e", "warning f"]


def test_only_input_statistics_are_called_a_leak(tmp_path):
    leaky, honest = evaluation(DEFENSES[4:6]), evaluation(DEFENSES[:4] + DEFENSES[6:] + (NOISY,))
    # One mark for each of two defenses in each of five tables.
    assert len(Page(write_report(leaky, tmp_path, title="t")).having("leak")) == 2 * 5
    assert "(statistics leak)" in printed(leaky, 120)
    assert len(Page(write_report(honest, tmp_path, title="t")).having("leak")) == 0
    assert "leak" not in printed(honest, 120)


def test_page_shows_the_picture_that_lies_beside_it(tmp_path):
    page = Page(write_report(evaluation(), tmp_path, title="t"))
    for curve, name in zip(page.having("curve"), ("tradeoff", "resubmission"), strict=True):
        assert base64.b64decode(curve["src"].partition(",")[2]) == (tmp_path / f"{name}.png").read_bytes()
    width, height = Image.open(tmp_path / "tradeoff.png").size
    # Wide enough to print across a column at 300 dpi (3.3 inches), small enough for a page.
    assert 1000 <= width <= 4000
    assert 500 <= height <= 2000


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, "L")])
def test_strips_show_the_images(tmp_path, channels, mode):
    shape = (3, channels, 16, 12)
    one = evaluation((DEFENSES[1],), {"none": None, FGSM: 16 / 255}, shape=shape)
    page = Page(write_report(one, tmp_path, title="t"))
    images = strips(page)
    examples = one.examples["s70", FGSM]
    change = examples.attacked - examples.clean
    gain = 0.5 / change.abs().max()
    rows = [examples.clean, examples.attacked, 0.5 + gain * change, examples.noisy.clamp(0, 1), examples.denoised]
    shown = [next(c for c in attrs["class"].split() if c.startswith("strip-")) for attrs in page.having("strip")]
    # Unattacked: clean, noisy, denoised. Attacked: all five, the clean strip being the same one.
    assert len(shown) == 3 + 5
    assert shown[0] == shown[3]
    assert len(set(shown)) == len(images) == 7
    for name, row in zip(shown[3:], rows, strict=True):
        assert images[name].mode == mode
        pixels = np.asarray(images[name]).reshape(16, 3, -1, 3 if channels == 3 else 1)[:, :, :12]
        expected = row if channels in (1, 3) else row.mean(dim=1, keepdim=True)
        # 8-bit pixels: half a level.
        np.testing.assert_allclose(pixels / 255, expected.permute(2, 0, 3, 1), atol=0.5 / 255 + 1e-6)


def test_small_images_are_enlarged_without_smoothing_and_large_ones_shrunk(tmp_path):
    small = Page(write_report(evaluation(shape=(4, 1, 16, 16)), tmp_path, title="t")).having("strip")
    assert all("pixelated" in attrs["class"] and "height:80px" in attrs["style"] for attrs in small)
    large = Page(write_report(evaluation(shape=(1, 3, 256, 256)), tmp_path, title="t")).having("strip")
    assert all("pixelated" not in attrs["class"] and "height:128px" in attrs["style"] for attrs in large)


def test_predictions_are_marked_right_and_wrong_in_words_too(tmp_path):
    one = evaluation((DEFENSES[1],), {"none": None, FGSM: 16 / 255})
    page = Page(write_report(one, tmp_path, title="t"))
    # Four images: three rows of predictions; in two of them image 1 is taken for class 2, which has no name.
    assert (len(page.having("right")), len(page.having("wrong"))) == (10, 2)
    assert (page.text.count("✓"), page.text.count("✗ class 2")) == (10 + 1, 2)  # and one in the explanation
    labels = [attrs.get("aria-label") for tag, attrs in page.elements if tag == "span"]
    assert (labels.count("right"), labels.count("wrong")) == (10, 2)


def test_gallery_opens_at_the_strongest_attack_on_the_first_random_defense(tmp_path):
    result = evaluation()
    text = write_report(result, tmp_path, title="t").read_text(encoding="utf-8")
    gallery = text[text.index("<h2>Gallery") :]
    outer = re.findall(r"<details( open)?><summary><strong>(.*?)</strong>", gallery)
    assert [name for is_open, name in outer if is_open] == ["s70"]
    assert len(outer) == len(DEFENSES)
    inner = gallery[gallery.index("<strong>s70</strong>") : gallery.index("<strong>s0</strong>")]
    values = {attack: mean(result, "s70", attack).value for attack in (FGSM, PGD, GRAY)}
    shown = {FGSM: "fgsm 16/255", PGD: "pgd 16/255", GRAY: "pgd 16/255 gray"}[min(values, key=values.__getitem__)]
    assert re.findall(r"<details open><summary>(.*?):", inner) == [shown]


def test_gallery_opens_where_some_images_are_right_and_some_are_not(tmp_path):
    result = evaluation()
    for (name, attack), shown in result.examples.items():
        predictions = shown.labels if (name, attack) != ("leaky 35", GRAY) else shown.predictions
        result.examples[name, attack] = replace(shown, predictions=predictions)
    text = write_report(result, tmp_path, title="t").read_text(encoding="utf-8")
    gallery = text[text.index("<h2>Gallery") :]
    assert re.findall(r"<details open><summary><strong>(.*?)</strong>", gallery) == ["leaky 35"]
    inner = gallery[gallery.index("<strong>leaky 35</strong>") : gallery.index("<strong>leaky 70</strong>")]
    assert re.findall(r"<details open><summary>(.*?):", inner) == ["pgd 16/255 gray"]


def test_gallery_shows_fewer_of_large_images(tmp_path, monkeypatch):
    # 28 cells of four rows of 3 * 16 * 16 numbers: room for two of four images.
    monkeypatch.setattr(report_page, "GALLERY_VALUES", 2 * 28 * 4 * 3 * 16 * 16)
    page = Page(write_report(evaluation(shape=(4, 3, 16, 16)), tmp_path, title="t"))
    assert "Shown: 2 images of 4 kept" in page.text
    assert {image.size for image in strips(page).values()} == {(2 * 17, 16)}


def test_page_without_examples_has_no_gallery(tmp_path):
    page = Page(write_report(evaluation(examples=False), tmp_path, title="t"))
    assert "Gallery" not in page.text
    assert page.having("strip") == []


def test_page_without_warnings_says_so(tmp_path):
    page = Page(write_report(evaluation(warnings=()), tmp_path, title="t"))
    assert page.having("warnings") == []
    assert "No health check of the attacks gave a warning" in page.text


def test_clean_evaluation_alone(tmp_path):
    result = evaluation(DEFENSES[:1], {"none": None})
    Page(write_report(result, tmp_path, title="t"))
    assert str(result.cells[0].scores.mean) in printed(result, 80)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_table_shows_every_number_and_warning_at_any_width(width):
    result = evaluation()
    text = printed(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    words = " ".join(text.split())
    for warning in WARNINGS:
        assert f"warning: {warning}" in words
    assert "Mean accuracy in % over 5 fresh draws of noise, 150 images, 95% interval over images" in words
    for cell in result.cells:
        m = cell.scores.mean
        half = max(m.high - m.value, m.value - m.low)
        assert (str(m) if width == 200 else f"{100 * m.value:.1f} ±{100 * half:.1f}") in text


def test_table_in_one_piece_at_120_columns_with_seven_attack_columns():
    attacks = ATTACKS | {"pgd:48/255,steps=3,eot=2": 48 / 255, "fgsm:48/255,eot=2": 48 / 255}
    text = printed(evaluation(attacks=attacks), 120)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("frozen ")]
    # Name, "70 frozen", seven times value and interval.
    assert [len(row) for row in rows if "±" in " ".join(row)] == [1 + 2 + 2 * 7]


def test_table_keeps_brackets_in_names():
    assert any(line.strip().startswith(DEFENSES[3][0]) for line in printed(evaluation(), 200).splitlines())


def test_interval_of_the_narrow_table_is_its_longer_side():
    result = evaluation(DEFENSES[:1], {"none": None} | {f"fgsm:{i}/255,eot=1": i / 255 for i in range(1, 9)})
    m = result.cells[0].scores.mean
    assert m.value == 1
    assert f"100.0 ±{100 * (1 - m.low):.1f}" in printed(result, 80)
