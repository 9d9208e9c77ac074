"""The HTML page of an evaluation, which needs no other file and no network."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from denim.defense.cells import WORST, Cell
from denim.defense.evaluation import Evaluation
from denim.defense.gallery import Examples
from denim.defense.report.names import (
    attacks_of,
    by_place,
    checks_passed,
    counted,
    defenses_of,
    draws_text,
    images_text,
    is_derived,
    leak_text,
    short_names,
    sigma_text,
)
from denim.defense.report.pictures import series
from denim.defense.report.tables import csv_row, latex, markdown
from denim.defense.rows import CLEAN
from denim.nim.progress import clock_text
from denim.nim.text import printable

__all__ = ["html_page"]

GALLERY_VALUES = 12_000_000  # numbers in the gallery's pictures; about 16 MB of base64 where none compresses


SMALL, LARGE = 80, 128  # CSS pixels: smaller images are enlarged to about the first, larger ones shrunk to the second


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --dim: #444; --rule: #ddd; --doubt: #fff6e5;
  --edge: #b35900; --right: #00682f; --wrong: #b00020; --leak: #8f3f00; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --dim: #b0b0b0; --rule: #3a3d42;
  --doubt: #33270f; --edge: #e09a3e; --right: #6fd08c; --wrong: #ff8a94; --leak: #f0a35e; --link: #8ab4f8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 75rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
a { color: var(--link); }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.made { color: var(--dim); font-size: .9rem; }
.numbers caption { text-align: left; padding: .4rem 0; color: var(--dim); }
.numbers th, .numbers td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
.numbers thead th { border-bottom: 2px solid var(--dim); white-space: normal; vertical-align: bottom; }
.numbers th:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 8rem;
  max-width: 22rem; }
.numbers th:first-child, .numbers .text { text-align: left; }
.name { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.numbers small { color: var(--dim); display: block; }
.numbers .prose { white-space: normal; min-width: 20rem; }
.sortable thead button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0;
  text-align: inherit; cursor: pointer; }
.sortable [aria-sort=ascending] button::after { content: " \\25B2"; }
.sortable [aria-sort=descending] button::after { content: " \\25BC"; }
.warnings { border: 2px solid var(--edge); background: var(--doubt); padding: .2rem 1rem; }
.numbers .leak { font-weight: bold; color: var(--leak); }
.picture { position: relative; display: inline-block; background: #fff; max-width: 100%; }
img.curve { max-width: 100%; height: auto; display: block; }
.point { position: absolute; width: 1rem; height: 1rem; margin: -.5rem 0 0 -.5rem; border-radius: 50%; }
.point:hover { outline: 2px solid #0b57d0; }
summary { cursor: pointer; padding: .3rem 0; }
details details { margin-left: 1.5rem; }
.gallery { table-layout: fixed; margin: .5rem 0 1.5rem; }
.gallery th { text-align: left; font-weight: normal; color: var(--dim); padding: .1rem .7rem .1rem 0; }
.gallery th[scope=col] { color: var(--ink); font-weight: bold; }
.gallery th[scope=col], .gallery td { text-align: center; padding: .1rem 0; font-size: .8rem; line-height: 1.2;
  overflow-wrap: anywhere; vertical-align: top; }
.strip { background-size: 100% 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.pixelated { image-rendering: pixelated; }
.right { color: var(--right); }
.wrong { color: var(--wrong); font-weight: bold; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .7rem; }
  h1 { font-size: 1.4rem; }
  .numbers th, .numbers td { padding: .25rem .4rem; }
  .numbers th:first-child { min-width: 6rem; max-width: 9rem; }
  .numbers .aside { display: none; }
  details details { margin-left: .4rem; }
}
"""


# A click on a head sorts by the first number of each cell, or by its text; another click turns the order around.
SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].firstChild ? row.cells[column].firstChild.textContent : "";
    const number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (one, other) => {
        const a = value(one, column), b = value(other, column);
        if (typeof a === "number" && typeof b === "number") return a - b;
        return typeof a === typeof b ? a.localeCompare(b) : typeof a === "number" ? -1 : 1;
      };
      const rows = [...body.rows].sort(order);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
"""


READING = """
<h2 id="reading">How to read the numbers</h2>
<ul>
<li><strong>Mean</strong>: share of images that one draw of the noise gets right, averaged over the fresh draws.
<strong>Vote</strong>: share that the majority of the draws gets right, a tie counting as lost.
<strong>Worst of R</strong>: share that every draw gets right. For a defense without noise all three agree.</li>
<li><strong>worst &epsilon;</strong>: for each image, the attack of that radius that misleads most confirmation
draws.</li>
<li>Intervals are over images, 95&nbsp;%, from the variance of the images' shares; those of differences are paired.
Neither covers the spread between training seeds.</li>
<li><strong>off</strong>: the classifier alone. <strong>frozen</strong>: the noise is fixed, and the attacker knows
it.</li>
<li><strong>raw target</strong>: the denoiser rebuilds pixels from the degraded image alone. <strong>input
statistics</strong>: it also takes each patch's mean and variance from the un-noised, possibly attacked image, two
noise-free numbers per patch that reach the classifier (the <em>statistics leak</em>). <strong>noisy
statistics</strong>: they come from the noisy patch, a diagnostic. <strong>noisy</strong>: no denoiser. See
docs/method.md.</li>
</ul>
<h2 id="health">Health checks</h2>
<p>A defense can look strong because the attack failed. Every evaluation therefore checks that gradients are finite and
not zero, and that a frozen defense is not far below the random one: where it is, randomness and not denoising carries
the difference. Doubt the numbers that a warning names before you believe them. See docs/method.md, health checks.</p>
"""


def _escaped(text: str) -> str:
    """Foreign text on the page. Names of classes may hold bytes that are not UTF-8, which no page can."""
    return html.escape(printable(text))


def _made(evaluation: Evaluation, command: str, data: str) -> str:
    """How, when and at which cost the evaluation was made."""
    own = [cell for cell in evaluation.cells if not cell.attack.startswith(f"{WORST} ")]
    parts = [f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."]
    if data:
        parts.append(f"Data: <code>{_escaped(data)}</code>.")
    if command:
        parts.append(f"Command: <code>{_escaped(command)}</code>.")
    if own and all(cell.seconds is not None for cell in own):
        parts.append(f"Attacks and scores took {clock_text(sum(cell.seconds or 0 for cell in own))}.")
    spent = sum(cell.gradients or 0 for cell in own)
    if spent:
        saved = sum(cell.gradients_saved or 0 for cell in own)
        parts.append(f"{spent:,} gradients of one draw were computed; leaving early saved {saved:,}.")
    return " ".join(parts)


def _points(evaluation: Evaluation, figure: Figure) -> str:
    """Marks over the picture of the trade-off that show their number when they are pointed at; the figure is drawn."""
    cells, attacks = by_place(evaluation), attacks_of(evaluation)
    by_case = series(evaluation)
    places: list[tuple[Any, float, str, str]] = []
    panels = list(figure.axes)
    for names in by_case.values():
        places += [(panels[0], sigma, name, a) for sigma, name in names.items() for a in attacks]
    on_curves = {name for names in by_case.values() for name in names.values()}
    references = [name for name in defenses_of(evaluation) if name not in on_curves]
    for attack, bars in zip(attacks, panels[-1].containers, strict=bool(references)):
        points: Any = bars[0]
        places += [(panels[-1], x, name, attack) for x, name in zip(points.get_xdata(), references, strict=True)]
    short = short_names(attacks)
    width, height = figure.bbox.width, figure.bbox.height
    marks = []
    for axes, x, name, attack in places:
        mean = cells[name, attack].scores.mean
        across, up = axes.transData.transform((x, 100 * mean.value))
        text = _escaped(f"{name}, {short[attack]}: {mean}")
        marks.append(
            f'<span class="point" style="left:{100 * across / width:.2f}%;top:{100 - 100 * up / height:.2f}%" '
            f'title="{text}"></span>'
        )
    return "".join(marks)


def _links(evaluation: Evaluation) -> str:
    """The tables as files within the page, with rounded numbers."""
    handle = io.StringIO()
    rows = [
        {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in csv_row(cell).items()}
        for cell in evaluation.cells
    ]
    writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {
        "CSV": ("csv", handle.getvalue()),
        "Markdown": ("md", markdown(evaluation)),
        "LaTeX": ("tex", latex(evaluation)),
    }
    links = []
    for name, (ending, text) in files.items():
        data = base64.b64encode(text.encode("utf-8", "backslashreplace")).decode("ascii")
        links.append(f'<a download="table.{ending}" href="data:text/plain;charset=utf-8;base64,{data}">{name}</a>')
    return f"<p>The table as {', '.join(links)}. results.csv, beside this page, has every number exactly.</p>"


def html_page(
    evaluation: Evaluation,
    title: str,
    command: str,
    data: str,
    curve: Figure,
    picture: bytes,
    tries: bytes | None = None,
) -> str:
    """The page.

    Args:
        evaluation: what `evaluate` returned.
        title: heading.
        command: that made the evaluation; empty if unknown.
        data: where the images come from; empty if unknown.
        curve: the picture of the trade-off, drawn.
        picture: that picture as a PNG.
        tries: the picture of accuracy against tries as a PNG, where a defense is random.
    """
    strips = _Strips()
    gallery = "".join(_gallery(evaluation, strips))
    attacks = [attack for attack in attacks_of(evaluation) if not is_derived(attack)]
    versions = ", ".join(f"{package} {version}" for package, version in evaluation.versions.items())
    against = f"against {', '.join(f'<code>{_escaped(a)}</code>' for a in attacks)}" if attacks else "clean"
    tables = [
        ("Majority vote of the draws", lambda cell: str(cell.scores.vote)),
        ("Images that every draw gets right (worst of R)", lambda cell: str(cell.scores.worst)),
        (f"Difference of the mean to {next(iter(defenses_of(evaluation)))}, paired over images", _difference),
    ]
    if any(cell.gradients or cell.seconds is not None for cell in evaluation.cells):
        tables.append(("What it cost: gradients of one draw, those saved by leaving early, and seconds", _costs))
    others = "".join(
        f"<details><summary>{_escaped(head)}</summary>{_numbers(evaluation, head, of)}</details>" for head, of in tables
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escaped(title)}</title>
<style>{STYLE}{strips.css()}</style>
</head>
<body>
<h1>{_escaped(title)}</h1>
<p>{counted({len(defenses_of(evaluation))}, "defense")} on {images_text(evaluation)},
{against}. Accuracies are means over
{draws_text(evaluation)} of noise for each image, which neither the attack nor the choice among attacks has seen; in
brackets the 95&nbsp;% interval over images. Seed {evaluation.settings.seed}; precision
{evaluation.settings.precision}; {_escaped(versions)}.
<a href="#reading">How to read the numbers</a>.</p>
<p class="made">{_made(evaluation, command, data)}</p>
{_warnings(evaluation)}
<h2>Accuracy</h2>
{_numbers(evaluation, "Mean accuracy in percent", lambda cell: str(cell.scores.mean))}
{_links(evaluation)}
{others}
<h2>Trade-off</h2>
<div class="picture"><img class="curve" src="{_data_uri(picture)}" alt="Mean accuracy against the noise level sigma, one
line for each attack, with 95 % bands, beside the defenses that are on no line. The numbers are those of the table
above.">{_points(evaluation, curve)}</div>
<p>Point at a mark for its number. tradeoff.svg and tradeoff.pdf, beside this page, are the same picture for print.</p>
{_resubmissions(evaluation, tries)}
{gallery}
{READING}<script>{SORTING}</script></body>
</html>
"""


def _warnings(evaluation: Evaluation) -> str:
    if not evaluation.warnings:
        return "<p>No health check of the attacks gave a warning.</p>" + _health_table(evaluation)
    # A link into the documentation would not work from a folder of results, so the page has an explanation of its own.
    items = (
        re.sub(r"docs/[\w./-]+\.md(, [\w ]+)?", r'<a href="#health">\g<0></a>', _escaped(warning))
        for warning in evaluation.warnings
    )
    entries = "".join(f"<li>{item}</li>" for item in items)
    section = f'<section class="warnings"><h2>Warnings</h2><ul>{entries}</ul></section>'
    return section + _health_table(evaluation)


def _health_table(evaluation: Evaluation) -> str:
    if not evaluation.health:
        return ""
    rows = []
    for part in evaluation.health:
        beside = "without an attack" if part.attack == CLEAN else f"beside {part.attack}"
        for check in part.checks:
            mark, kind = ("pass", "right") if check.passed else ("warn", "wrong")
            rows.append(
                f'<tr><th scope="row">{_name(part.defense)}<small>{_escaped(beside)}</small></th>'
                f'<td class="text">{_escaped(check.name)}</td><td>{check.value:.3g}</td>'
                f'<td class="{kind}">{mark}</td><td class="text prose">{_escaped(check.text)}</td></tr>'
            )
    heads = (
        '<th scope="col">defense</th><th scope="col" class="text">check</th><th scope="col">number</th>'
        '<th scope="col">result</th><th scope="col" class="text">what the number is</th>'
    )
    return (
        f'<details><summary>{checks_passed(evaluation)}</summary><div class="wide"><table class="numbers">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _numbers(evaluation: Evaluation, caption: str, of: Callable[[Cell], str]) -> str:
    """A table, defenses by attacks; `of` gives a value and, after a space, its interval."""
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    names = short_names(attacks)
    heads = "".join(f'<th scope="col" title="{_escaped(attack)}">{_escaped(names[attack])}</th>' for attack in attacks)
    rows = []
    for name, cell in defenses_of(evaluation).items():
        values = []
        for attack in attacks:
            value, _, interval = of(cells[name, attack]).partition(" ")
            scores = cells[name, attack].scores
            hover = f"{name}, {names[attack]}: mean {scores.mean}, vote {scores.vote}, worst of R {scores.worst}"
            values.append(f'<td title="{_escaped(hover)}">{value}<small>{interval}</small></td>')
        rows.append(
            f'<tr><th scope="row">{_name(name)}</th><td class="text aside">{sigma_text(cell)}</td>'
            f'<td class="text aside">{_case(cell.case)}</td>{"".join(values)}</tr>'
        )
    return (
        f'<div class="wide"><table class="numbers sortable"><caption>{_escaped(caption)}</caption><thead><tr>'
        f'<th scope="col">defense</th><th scope="col" class="text aside">sigma</th>'
        f'<th scope="col" class="text aside">case</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _name(name: str) -> str:
    """A name at the head of a row, of at most four lines; all of it shows when it is pointed at."""
    return f'<span class="name" title="{_escaped(name)}">{_escaped(name)}</span>'


def _case(case: str) -> str:
    leak = '<small class="leak">statistics leak</small>' if leak_text(case) else ""
    return _escaped(case) + leak


def _difference(cell: Cell) -> str:
    if cell.difference is None:
        return "–"  # noqa: RUF001
    value, low, high = (100 * x for x in (cell.difference.value, cell.difference.low, cell.difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _costs(cell: Cell) -> str:
    spent = "–" if cell.gradients is None else f"{cell.gradients:,}"  # noqa: RUF001
    parts = [] if not cell.gradients_saved else [f"{cell.gradients_saved:,} saved"]
    if cell.seconds is not None:
        parts.append(f"{cell.seconds:.1f} s")
    return f"{spent} {', '.join(parts)}"


def _resubmissions(evaluation: Evaluation, picture: bytes | None) -> str:
    if picture is None:
        return ""
    last = _resubmission_columns(max(len(cell.resubmission) for cell in evaluation.cells))
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    names = short_names(attacks)
    heads = "".join(f'<th scope="col">{n}</th>' for n in last)
    rows = []
    for name in defenses_of(evaluation):
        for attack in attacks:
            curve = cells[name, attack].resubmission
            if curve:
                values = (str(curve[n - 1]).partition(" ") for n in last)
                row = "".join(f"<td>{value}<small>{interval}</small></td>" for value, _, interval in values)
                head = f'<th scope="row">{_name(name)}</th><td class="text">{_escaped(names[attack])}</td>'
                rows.append(f"<tr>{head}{row}</tr>")
    return (
        "<h2>Resubmission</h2><p>Accuracy against an attacker who may submit an image again, and needs one wrong "
        "answer among that many tries. Broken lines: the same level with frozen noise, where tries make no difference."
        f'</p><div class="picture"><img class="curve" src="{_data_uri(picture)}" alt="Accuracy against the number of '
        "tries, a panel for each random defense, a line for each attack. Some of the numbers are in the table below, "
        'all are in resubmission.csv."></div><details><summary>Accuracy in percent by tries</summary><div class="wide">'
        '<table class="numbers"><thead><tr><th scope="col">defense</th><th scope="col" class="text">attack</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _resubmission_columns(draws: int) -> list[int]:
    """Numbers of tries for a table: 1, 2, 5, 10, 20, 50, ..., and the last."""
    found = [digit * 10**power for power in range(len(str(draws))) for digit in (1, 2, 5)]
    return [n for n in found if n < draws] + [draws]


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


class _Strips:
    """Rows of images as PNGs in the style sheet, where places that show the same row share it."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def add(self, images: Tensor) -> str:
        """CSS class of a strip of (N, C, H, W) images side by side, clipped to [0, 1], with white gaps between."""
        images = images.clamp(0, 1)
        if images.shape[1] not in (1, 3):
            images = images.mean(dim=1, keepdim=True)
        images = F.pad(images, (0, _gap(images)), value=1.0)
        pixels = (images * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
        return self._names.setdefault(file.getvalue(), f"strip-{len(self._names)}")

    def css(self) -> str:
        return "".join(f".{name}{{background-image:url({_data_uri(png)})}}\n" for png, name in self._names.items())


def _gap(images: Tensor) -> int:
    return max(1, images.shape[-1] // 16)


def _gallery(evaluation: Evaluation, strips: _Strips) -> Iterator[str]:
    kept = {place: examples for place, examples in evaluation.examples.items() if len(examples.labels)}
    if not kept:
        return
    first = next(iter(kept.values()))
    available = len(first.labels)
    # attacked, difference, noisy, denoised; the clean row is shared.
    needed = 4 * len(kept) * first.clean[0].numel()
    count = max(1, min(available, GALLERY_VALUES // needed))
    yield "<h2>Gallery</h2><p>One score draw of each image, as attacked on that defense. "
    yield "✓ and ✗ say whether the prediction is right. A row that would repeat another is left out; noisy images are "
    yield f"clipped to [0, 1] for display. Shown: {counted({count}, 'image')} of {available} kept.</p>"
    cells, names = by_place(evaluation), short_names(attacks_of(evaluation))
    defenses = {name: cell for name, cell in defenses_of(evaluation).items() if any(name == n for n, _ in kept)}
    opened, telling = _telling(kept, defenses, cells, count)
    for name, cell in defenses.items():
        attacks = [attack for attack in names if (name, attack) in kept]
        strongest = min(attacks, key=lambda attack: (attack == CLEAN, cells[name, attack].scores.mean.value))
        strongest = telling if name == opened else strongest
        sigma = f"sigma {sigma_text(cell)}" if cell.sigma is not None else "off"
        yield f"<details{' open' if name == opened else ''}><summary><strong>{_escaped(name)}</strong> "
        yield f"({sigma}; {_escaped(cell.case)})</summary>"
        for attack in attacks:
            yield f"<details{' open' if attack == strongest else ''}><summary>{_escaped(names[attack])}: "
            yield f"{cells[name, attack].scores.mean} %</summary>"
            yield _pictures(kept[name, attack], count, evaluation.classes, strips, f"{name}, {attack}")
            yield "</details>"
        yield "</details>"


def _telling(
    kept: dict[tuple[str, str], Examples], defenses: dict[str, Cell], cells: dict[tuple[str, str], Cell], count: int
) -> tuple[str, str]:
    """The place at which the gallery opens: attacked and defended, with images that are right and some that are not."""

    def rank(place: tuple[str, str]) -> tuple[bool, bool, bool, int, float]:
        name, attack = place
        right = (kept[place].predictions == kept[place].labels)[:count]
        says = bool(right.any()) and not bool(right.all())
        is_defended = bool(defenses[name].sigma) and not defenses[name].frozen
        accuracy = cells[place].scores.mean.value
        return attack == CLEAN, not is_defended, not says, list(defenses).index(name), accuracy

    return min(kept, key=rank)


def _pictures(examples: Examples, count: int, classes: Sequence[str], strips: _Strips, where: str) -> str:
    """One table: columns are images, rows the stages that they go through."""
    labels = [int(label) for label in examples.labels[:count]]
    attacked = not bool((examples.attacked == examples.clean).all())
    stages = [("clean", examples.clean[:count]), ("attacked", examples.attacked[:count])]
    if attacked:
        change = (examples.attacked - examples.clean)[:count]
        gain = min(10.0, 0.5 / max(float(change.abs().max()), 1e-6))
        stages.append((f"difference &times; {gain:.3g}", 0.5 + gain * change))
    stages += [("noisy", examples.noisy[:count]), ("denoised", examples.denoised[:count])]
    rows_high, columns_wide = examples.clean.shape[-2:]
    side = max(rows_high, columns_wide)
    factor = max(1, SMALL // side) if side <= LARGE else LARGE / side
    height, width = factor * rows_high, factor * (columns_wide + _gap(examples.clean))
    sharp = " pixelated" if factor > 1 else ""

    def predictions(head: str, values: Tensor) -> str:
        marks = []
        for value, label in zip(values[:count].tolist(), labels, strict=True):
            mark, kind, word = ("✓", "right", "right") if value == label else ("✗", "wrong", "wrong")
            name = _escaped(_class_name(classes, value))
            marks.append(f'<td class="{kind}"><span role="img" aria-label="{word}">{mark}</span> {name}</td>')
        return f'<tr><th scope="row">{head}</th>{"".join(marks)}</tr>'

    rows: list[str] = []
    shown: set[str] = set()
    for stage, images in stages:
        name = strips.add(images)
        if name in shown:
            continue
        shown.add(name)
        alt = f"{stage}: {_escaped(where)}"
        rows.append(
            f'<tr><th scope="row">{stage}</th><td colspan="{len(labels)}"><div role="img" aria-label="{alt}" '
            f'class="strip {name}{sharp}" style="width:{width * len(labels):g}px;height:{height:g}px"></div></td></tr>'
        )
        if stage == "clean" and attacked:
            rows.append(predictions("clean taken for", examples.clean_predictions))
    rows.append(predictions("attacked taken for" if attacked else "taken for", examples.predictions))
    truth = "".join(f'<th scope="col">{_escaped(_class_name(classes, label))}</th>' for label in labels)
    sizes = f'<col style="width:10rem"><col span="{len(labels)}" style="width:{width:g}px">'
    return (
        f'<div class="wide"><table class="gallery" style="width:calc(10rem + {width * len(labels):g}px)">'
        f"<colgroup>{sizes}</colgroup><thead><tr><th>true class</th>{truth}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _class_name(classes: Sequence[str], index: int) -> str:
    return classes[index] if index < len(classes) else f"class {index}"
