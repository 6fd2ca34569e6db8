"""Blocks of a report, which say themselves in Markdown and in HTML, and samples of several models side by side."""

import base64
import html
import io
import re
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from images import images_in


PAIRS = "pairs.png"
NUM_SAMPLES, THUMBNAIL, CELL = 6, 512, 256  # samples shown; largest side in HTML; side in the contact sheet


def escaped(text):
    """Plain text for a line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def data_url(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass
class Heading:
    level: int
    text: str

    def markdown(self):
        return f"{'#' * self.level} {escaped(self.text)}"

    def html(self):
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass
class Text:
    text: str
    kind: str = ""

    def markdown(self):
        return escaped(self.text)

    def html(self):
        return f'<p class="{self.kind}">{html.escape(self.text)}</p>'


@dataclass
class Bullets:
    items: list
    kind: str = ""

    def markdown(self):
        before = "**Note:** " if self.kind == "note" else ""
        return "\n".join(f"- {before}{escaped(item)}" for item in self.items)

    def html(self):
        return f'<ul class="{self.kind}">{"".join(f"<li>{html.escape(str(item))}</li>" for item in self.items)}</ul>'


class Cell(NamedTuple):
    text: str
    kind: str = ""  # CSS class
    drawing: str = ""  # SVG, in HTML alone


@dataclass
class Table:
    """Rows of cells, the first of which is the row's name; a row of one cell is a heading over those below it."""

    titles: list
    rows: list
    kind: str = ""  # CSS class

    def markdown(self):
        kept = [i for i, title in enumerate(self.titles) if title]  # drawings have no title
        lines = [[escaped(self.titles[i]) for i in kept], ["---"] * len(kept)]
        for row in self.rows:
            texts = [f"**{escaped(row[0].text)}**"] if len(row) == 1 else [escaped(row[i].text) for i in kept]
            lines += [texts + [""] * (len(kept) - len(texts))]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self):
        head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in self.titles)
        body = "\n".join(self.row(row) for row in self.rows)
        table = f'<table class="{self.kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
        return f'<div class="scroll">{table}</div>'

    def row(self, cells):
        if len(cells) == 1:
            return f'<tr><th class="group" colspan="{len(self.titles)}">{html.escape(cells[0].text)}</th></tr>'
        first, *others = cells
        others = "".join(f'<td class="{cell.kind}">{cell.drawing or html.escape(cell.text)}</td>' for cell in others)
        return f'<tr><th scope="row">{html.escape(first.text)}</th>{others}</tr>'


@dataclass
class Folded:
    """A long table, in HTML behind a line to click on."""

    text: str
    table: Table

    def markdown(self):
        return f"{escaped(self.text)}:\n\n{self.table.markdown()}"

    def html(self):
        return f"<details><summary>{html.escape(self.text)}</summary>{self.table.html()}</details>"


@dataclass
class Picture:
    """A file beside the Markdown; in HTML its panels, which stack on a narrow screen."""

    name: str
    text: str
    panels: list  # SVG files, as bytes

    def markdown(self):
        return f"![{escaped(self.text)}]({self.name})"

    def html(self):
        sources = (data_url("svg+xml", panel) for panel in self.panels)
        images = "".join(f'<img src="{source}" alt="{html.escape(self.text)}">' for source in sources)
        return f'<div class="panels">{images}</div>'


@dataclass
class Samples:
    samples: list
    labels: list

    def markdown(self):
        lines = [f"- {escaped(sample.title)}: {escaped(sample.caption) or '(no prompt)'}" for sample in self.samples]
        return "\n".join([f"![Samples of {escaped(', '.join(self.labels))}]({PAIRS})", "", *lines])

    def html(self):
        sections = "\n".join(self.section(sample) for sample in self.samples)
        return f'<div class="{"gallery" if len(self.labels) == 1 else ""}">{sections}</div>'

    def section(self, sample):
        caption = f"<b>{html.escape(sample.title)}</b> {html.escape(sample.caption)}"
        figures = []
        for image, label in zip(sample.images, self.labels):
            sources = [("whole", data_url("jpeg", jpeg(framed(image, sample.window))))]
            if sample.window:
                sources += [("detail", data_url("png", png(image.crop(sample.window))))]
            alt = html.escape(f"{sample.title}, {label}")
            images = "".join(f'<img class="{kind}" src="{url}" alt="{alt}, {kind}">' for kind, url in sources)
            figures += [f"<figure><div>{images}</div><figcaption>{html.escape(label)}</figcaption></figure>"]
        figures = f'<div class="pair" style="--models:{len(figures)}">{"".join(figures)}</div>'
        return f'<section class="sample"><p>{caption}</p>{figures}</section>'


# Samples, side by side


class Sample(NamedTuple):
    """The same noise and prompt in each model."""

    title: str
    caption: str
    images: list  # of PIL images, one per model
    window: tuple | None  # left, upper, right, lower: where they differ most


def first_samples(folders):
    """list of Sample: the first ones, paired in the order of their names, as they are measured."""
    samples = []
    for index, paths in enumerate(islice(zip(*map(images_in, folders)), NUM_SAMPLES)):
        images, captions = zip(*map(read_sample, paths))
        seed = re.search(r"_seed(\d+)", paths[0].name)
        title = f"Sample {index}, " + (f"seed {seed[1]}" if seed else paths[0].name)
        samples += [Sample(title, next(filter(None, captions), ""), list(images), detail_window(images))]
    return samples


def read_sample(path):
    """(RGB image, its prompt or "")."""
    with Image.open(path) as image:
        return image.convert("RGB"), str(image.info.get("prompt", ""))


def detail_window(images):
    """The square of a quarter of the shorter side in which images of one size differ most; None if they can't.

    That is where the range over the images (of two: the absolute difference), averaged over the colours and blurred
    by a Gaussian of a quarter of the window, is largest.
    """
    if len(images) < 2 or len({image.size for image in images}) > 1:
        return None
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    spread = (pixels.max(axis=0) - pixels.min(axis=0)).mean(axis=-1)  # [H, W]
    window = max(1, min(spread.shape) // 4)
    rows, columns = (gaussians(size, window) for size in spread.shape)
    blurred = rows @ spread @ columns.T  # at each place of the window
    top, left = np.unravel_index(blurred.argmax(), blurred.shape)
    return int(left), int(top), int(left) + window, int(top) + window


def gaussians(size, window):
    """[size - window + 1, size]: for each place of a window, weights of the pixels around its middle."""
    middles = np.arange(size - window + 1)[:, None] + (window - 1) / 2
    return np.exp(-0.5 * ((np.arange(size)[None, :] - middles) / (window / 4)) ** 2)


def framed(image, window):
    """The image with the window's frame, white in black; as it is without a window."""
    image = image.copy()
    if window:
        draw, line = ImageDraw.Draw(image), max(1, min(image.size) // 200)
        for color, margin in (("black", 2 * line), ("white", line)):
            corner = [max(0, side - margin) for side in window[:2]]
            opposite = [min(size, side + margin) - 1 for size, side in zip(image.size, window[2:])]
            draw.rectangle((*corner, *opposite), None, color, line)
    return image


def contact_sheet(samples, labels):
    """One PIL image: a row per sample; the models' images, then their details."""
    details = any(sample.window for sample in samples)
    top, gap, columns = 26, 4, len(labels) * (1 + details)
    step = CELL + gap
    sheet = Image.new("RGB", (columns * step - gap, len(samples) * (step + top)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for y, sample in enumerate(samples):
        cells = [framed(image, sample.window) for image in sample.images]
        cells += [image.crop(sample.window) for image in sample.images if sample.window]
        titles = [*labels, *(f"{label}, detail" for label in labels)]
        for x, (cell, title) in enumerate(zip(cells, titles)):
            sampling = Image.Resampling.NEAREST if x >= len(labels) else Image.Resampling.LANCZOS
            scale = CELL / max(cell.size)
            cell = cell.resize([max(1, round(side * scale)) for side in cell.size], sampling)
            sheet.paste(cell, (x * step, y * (step + top) + top))
            text = f"{sample.title.removeprefix('Sample ')}: {title}"
            while len(text) > 4 and font.getlength(text) > CELL:
                text = f"{text[:-4]}..."
            draw.text((x * step, y * (step + top) + top // 2), text, fill="black", font=font, anchor="lm")
    return sheet


def png(image):
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()


def jpeg(image):
    """A thumbnail; without the usual halving of colour, as details are what one looks for."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="jpeg", quality=90, subsampling=0)
    return file.getvalue()


# The page around the blocks


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1180px; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid #d5dae0; }}
h3 {{ font-size: 1.05rem; margin: 1.4rem 0 .4rem; }}
p, ul {{ margin: .5rem 0; max-width: 85ch; }}
ul {{ padding-left: 1.3rem; }}
.small {{ font-size: .85rem; color: #57606a; }}
.outcome {{ font-weight: 600; }}
.note {{ background: #fff6dd; border-left: 4px solid #d9a400; padding: .6rem .8rem .6rem 2rem; }}
.scroll {{ overflow-x: auto; margin: .5rem 0; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ec; }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; }}
thead th {{ border-bottom: 2px solid #8c959f; vertical-align: bottom; white-space: normal; }}
tbody th {{ font-weight: 500; }}
th.group {{ font-weight: 700; padding-top: .8rem; }}
.floor {{ color: #57606a; }}
td.better {{ color: #00603d; font-weight: 600; }}
td.worse {{ color: #a33b00; font-weight: 600; }}
.wrapped td {{ white-space: normal; min-width: 6.5rem; }}
td.undecided {{ color: #57606a; }}
.narrow td, .narrow thead th {{ font-size: .78rem; padding: .3rem; text-align: center; white-space: normal; }}
.narrow thead th {{ min-width: 4.2rem; }}
.narrow thead th:first-child {{ text-align: left; }}
summary {{ cursor: pointer; font-weight: 600; margin: .8rem 0; }}
svg {{ display: block; fill: #6e7781; stroke: #6e7781; stroke-width: 2; }}
svg.better {{ fill: #008a58; stroke: #008a58; }}
svg.worse {{ fill: #d55e00; stroke: #d55e00; }}
svg .zero {{ stroke: #1b1f24; stroke-width: 1; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: .5rem; }}
.panels img {{ width: 100%; max-width: 560px; }}
.sample {{ margin: 1.2rem 0; break-inside: avoid; }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: .8rem; }}
.pair {{ display: grid; grid-template-columns: repeat(var(--models), 1fr); gap: .6rem; max-width: 1100px; }}
figure {{ margin: 0; }}
figure div {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 4px; }}
figure img {{ width: 100%; display: block; }}
.detail {{ image-rendering: pixelated; }}
figcaption {{ font-size: .85rem; color: #57606a; }}
.prose th, .prose td {{ text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }}
.prose th {{ min-width: 7rem; }}
@media (max-width: 700px) {{
  th, td {{ padding: .3rem .4rem; }}
  th:first-child {{ white-space: normal; max-width: 34vw; }}
}}
@media print {{
  body {{ font-size: 10pt; padding: 0; max-width: none; }}
  .scroll {{ overflow: visible; }}
  th, td {{ padding: .15rem .35rem; white-space: normal; }}
  tr, .panels img {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
  details::details-content {{ content-visibility: visible; display: block; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""
