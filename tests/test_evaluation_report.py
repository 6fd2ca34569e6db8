"""The report of an evaluation: what it says is in the numbers, and what it shows is in the images."""

import base64
import copy
import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import gaussian_filter

import evaluation_report
import report_blocks
from evaluation_report import View, compare, describe, draw_curve, draw_errors, paper_numbers, write_report
from report_blocks import detail_window


RINGS = 16
FREQUENCY = [(ring + 1) / RINGS for ring in range(RINGS)]
# name -> base's value, lpl's, half of the width of each interval, interval of the difference
METRICS = {
    "frechet_distance": (300.0, 280.0, 12.0, (-26.0, -14.0)),
    "frechet_distance_inception": (15.25, 15.5, 0.4, (0.125, 0.375)),
    "kernel_distance": (0.00151, 0.00140, 0.0001, (-0.00018, -0.00004)),
    "recall": (0.51, 0.512, 0.012, (-0.0047, 0.0087)),
    "clip_score": (25.06, 25.12, 0.05, (0.02, 0.10)),
    "spectrum_error_low": (-0.10, 0.09, 0.02, (0.17, 0.21)),
    "spectrum_error_high": (-0.9, -0.3, 0.03, (0.55, 0.65)),
    "sharpness": (400.0, 600.0, 10.0, (190.0, 210.0)),
    "frechet_distance_reconstructed": (250.0, 240.0, 9.0, (-14.0, -6.0)),
}
VERDICTS = {
    "Fréchet distance (dinov2)": "better",
    "Fréchet distance (FID, inception)": "worse",
    "Fréchet distance to the reconstructions (dinov2)": "better",
    "Kernel distance (dinov2)": "better",
    "Recall (dinov2)": "undecided",
    "CLIPScore": "better",
    "Spectrum, low frequencies": "different",
    "Spectrum, high frequencies": "better",
    "Sharpness": "better",
}
NAMES = dict(zip(VERDICTS, [list(METRICS)[i] for i in (0, 1, 8, 2, 3, 4, 5, 6, 7)]))


def model(label, column, steps, guidance, swept, spectra):
    values = {name: numbers[column] for name, numbers in METRICS.items()}
    return {
        "name": f"{label}, {steps} steps, guidance {guidance:g}" if swept else label,
        "model": label,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "num_samples": 5000,
        "metrics": values,
        "intervals": {name: [value - METRICS[name][2], value + METRICS[name][2]] for name, value in values.items()},
        "spectrum": spectrum(column - 1.0) if spectra else None,
        "samples": f"samples/{label}",
    }


def spectrum(shift):
    error = [shift * frequency for frequency in FREQUENCY]
    power = [-5 * frequency + e for frequency, e in zip(FREQUENCY, error)]
    low, high = ([e + width for e in error] for width in (-0.1, 0.1))
    return {"frequency": FREQUENCY, "log_power": power, "error": error, "low": low, "high": high}


def make_report(settings=((50, 2.0),), spectra=False):
    swept = len(settings) > 1
    models = [model(label, i, *s, swept, spectra) for i, label in enumerate(("base", "lpl")) for s in settings]
    differences = {
        name: {"difference": b - a, "interval": list(interval), "samples_needed": 28_123 if name == "recall" else 900}
        for name, (a, b, _, interval) in METRICS.items()
    }
    pairs = zip(models[: len(settings)], models[len(settings) :])
    return {
        "settings": {
            "reference": "val2017",
            "num_samples": 5000,
            "num_reference_samples": 4952,
            "resolution": 64,
            "level": 0.95,
            "feature_extractors": [{"name": "dinov2", "model": "a/b"}, {"name": "inception", "model": "c"}],
            "versions": {"torch": "2.6"},
        },
        "models": models,
        "reference": {
            "spectrum": spectrum(0.0) if spectra else None,
            "metrics": {"sharpness": 700.0},
            "reconstructions": {
                "metrics": {"frechet_distance": 41.25},
                "spectrum": {"frequency": FREQUENCY, "log_power": [-5.2 * f for f in FREQUENCY]} if spectra else None,
            },
        },
        "differences": [{"models": [a["name"], b["name"]], "metrics": differences} for a, b in pairs],
        "notes": ["Few samples."],
    }


def save_samples(folder, label, images, captions=()):
    target = folder / "samples" / label
    target.mkdir(parents=True)
    for i, (image, caption) in enumerate(zip(images, [*captions, *[""] * len(images)])):
        info = PngInfo()
        info.add_itxt("prompt", caption)
        image.save(target / f"{i:06d}_seed{100 + i}.png", pnginfo=info)


def noise(number, size=(64, 48), seed=0):
    pixels = np.random.default_rng(seed).integers(60, 200, (number, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


class Page(HTMLParser):
    """tables: lists of rows of texts; tags: (name, attributes); text: all that is seen; style."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.style, self.cell = [], [], "", "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = tag

    def handle_endtag(self, tag):
        self.cell = None if tag in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cdata_elem == "style":
            self.style += data
            return
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")

    def images(self, kind):
        sources = [
            attributes["src"] for tag, attributes in self.tags if tag == "img" and attributes.get("class") == kind
        ]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]

    def table(self, title):
        (found,) = [table for table in self.tables if title in table[0]]
        return found


def written(report, folder):
    write_report(report, folder)
    return Page((folder / "report.html").read_text())


def without_arrow(title):
    return title.rstrip("\u2193\u2191 ").split(" \u2192")[0]


def test_the_table_of_differences_is_that_of_the_dict(tmp_path):
    rows = written(make_report(), tmp_path).table("Verdict")
    assert rows[0] == ["Metric", "", "Verdict", "Difference", "base", "lpl", "Samples needed"]
    assert {without_arrow(row[0]): row[2] for row in rows[1:]} == VERDICTS
    for title, _, _, difference, first, second, samples in rows[1:]:
        a, b, _, interval = METRICS[NAMES[without_arrow(title)]]
        shown = [float(word.strip("()")) for word in difference.split() if word != "to"]
        tolerance = 0.05 * (interval[1] - interval[0]) / 2  # two digits of the half-width
        assert shown == pytest.approx([b - a, *interval], abs=tolerance)
        assert [float(first), float(second)] == pytest.approx([a, b], abs=tolerance)
        assert samples == ("29,000" if "Recall" in title else "900")
    assert rows[1][:1] + rows[1][3:4] == ["Fréchet distance (dinov2) \u2193", "-20.0 (-26.0 to -14.0)"]


def test_the_table_of_metrics_has_intervals_and_the_floor(tmp_path):
    rows = written(make_report(), tmp_path).table("VAE's reconstructions (floor)")
    assert rows[0][:3] == ["Metric", "base", "lpl"]
    assert rows[1] == ["Fréchet distance (dinov2) \u2193", "300 (288 to 312)", "280 (268 to 292)", "41.25"]
    assert rows[2][1:] == ["15.25 (14.85 to 15.65)", "15.50 (15.10 to 15.90)", "-"]
    assert rows[-1] == ["Sharpness \u2192 700", "400 (390 to 410)", "600 (590 to 610)", "-"]


def test_the_outcome_is_no_surer_than_the_intervals(tmp_path):
    text = written(make_report(), tmp_path).text
    assert "Is lpl better than base?" in text
    assert (
        "lpl is better in 6 of 9 metrics, worse in 1, different without being clearly better or worse in 1; " in text
    )
    assert "1 can't tell the two apart with 5,000 samples." in text
    assert "Undecided: Recall (dinov2) (29,000 samples would tell)." in text
    assert "Worse: Fréchet distance (FID, inception)." in text
    assert "280.0 with lpl, 300.0 with base, a difference of -20.0 (-26.0 to -14.0): better." in text
    report = make_report()
    for found in report["differences"][0]["metrics"].values():
        found["interval"] = None
    page = written(report, tmp_path)
    assert "There are no intervals: any difference may be chance." in page.text and "lpl is better" not in page.text
    assert {row[2] for row in page.table("Verdict")[1:]} == {"no interval"}


@pytest.mark.parametrize(
    "name, first, second, interval, verdict",
    [
        ("frechet_distance", 10, 8, (-3, -1), "better"),
        ("frechet_distance", 8, 10, (1, 3), "worse"),
        ("frechet_distance", 8, 10, (0, 4), "undecided"),
        ("precision", 0.7, 0.8, (0.05, 0.15), "better"),
        ("spectrum_error_mid", -0.5, -0.1, (0.3, 0.5), "better"),
        ("spectrum_error_mid", 0.1, 0.5, (0.3, 0.5), "worse"),
        ("spectrum_error_mid", 0.5, -0.1, (-0.7, -0.5), "better"),  # it went past 0 but is nearer
        ("spectrum_error_mid", 0.1, -0.11, (-0.3, -0.1), "different"),  # who knows which is nearer
        ("sharpness", 400, 600, (150, 250), "better"),
        ("sharpness", 800, 600, (-250, -150), "different"),  # as far above 700 as below
        ("sharpness", 800, 1000, (150, 250), "worse"),
        ("something_new", 1, 2, (0.5, 1.5), "different"),
    ],
)
def test_verdicts(name, first, second, interval, verdict):
    models = [
        {
            "name": label,
            "metrics": {name: value},
            "intervals": {name: [value - abs(value) / 20, value + abs(value) / 20]},
        }
        for label, value in (("a", first), ("b", second))
    ]
    view = View({"models": models, "reference": {"metrics": {"sharpness": 700}}})
    found = {"difference": second - first, "interval": list(interval)}
    assert compare(view, *models, name, found).verdict == verdict


def test_without_the_references_sharpness_nobody_knows_the_better_one(tmp_path):
    report = make_report()
    del report["reference"]["metrics"]
    rows = {row[0]: row[2] for row in written(report, tmp_path).table("Verdict")[1:]}
    assert rows["Sharpness"] == "different" and "Sharpness \u2192 700" not in rows


def test_drawings_of_intervals_have_better_on_the_right(tmp_path):
    page = written(make_report(), tmp_path)
    shown = [attributes["cx"] for tag, attributes in page.tags if tag == "circle"]
    verdicts = [verdict for verdict in VERDICTS.values() if verdict != "different"]
    assert len(shown) == len(verdicts)
    for x, verdict in zip(shown, verdicts):
        assert verdict == "undecided" or (float(x) > 60) == (verdict == "better")


def test_metrics_have_readable_names():
    titles = {
        "frechet_distance": "Fréchet distance (dinov2)",
        "frechet_distance_reconstructed_inception": "Fréchet distance to the reconstructions (FID, inception)",
        "kernel_distance_my_vit": "Kernel distance (my_vit)",
        "spectrum_error_low": "Spectrum, low frequencies",
        "spectrum_error_reconstructed_high": "Spectrum, high frequencies to the reconstructions",
        "inception_score": "Inception score",
        "my_own_score": "my own score",
    }
    described = {name: describe(name, ["dinov2", "inception"], None) for name in titles}
    assert {name: metric.title for name, metric in described.items()} == titles
    assert describe("frechet_distance", ["inception"], None).title == "Fréchet distance (FID, inception)"
    by_rank = sorted(reversed(described), key=lambda name: described[name].rank)
    assert by_rank[0] == "frechet_distance" and by_rank[-1] == "my_own_score"


def test_markdown_says_what_html_says(tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    report = make_report(spectra=True)
    report["settings"]["odd | name"] = "*a* | `b` <i> &amp; _c_"
    save_samples(tmp_path, "base", noise(2), ["a | b", "*c*"])
    save_samples(tmp_path, "lpl", noise(2, seed=1))
    page = written(report, tmp_path)
    rendered = Page(markdown_it.MarkdownIt("commonmark").enable("table").render((tmp_path / "report.md").read_text()))

    def cells(table):
        drawings = [i for i, title in enumerate(table[0]) if not title]
        return [[cell for i, cell in enumerate(row) if i not in drawings] for row in table]

    assert len(page.tables) == 3 and [cells(table) for table in page.tables] == rendered.tables
    assert "Sample 0, seed 100: a | b" in rendered.text and "Sample 1, seed 101: *c*" in rendered.text
    shown = [attributes["src"] for tag, attributes in rendered.tags if tag == "img"]
    assert shown == ["spectra.png", "pairs.png"]
    for name in shown:
        Image.open(tmp_path / name).load()


def test_the_page_needs_nothing_from_outside_and_escapes_what_comes_from_there(tmp_path):
    attack = "<script>alert(1)</script><img src=http://example.com/x>\"' onerror='"
    report = json.loads(json.dumps(make_report(((10, 2.0), (50, 2.0)))).replace("lpl", "{attack}"))
    report = json.loads(json.dumps(report).replace("{attack}", json.dumps(attack)[1:-1]))
    for entry in report["models"]:
        entry["samples"] = "samples/" + ("base" if entry["model"] == "base" else "other")
    report["notes"] = [attack]
    report["settings"] |= {"reference": attack, attack: attack}
    report["paper"] = [{"model": attack, "metric": attack, "value": 1.0, "text": attack}]
    save_samples(tmp_path, "base", noise(1), [attack])
    save_samples(tmp_path, "other", noise(1, seed=1), [attack])
    page = written(report, tmp_path)
    assert page.text.count(attack) > 10
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        assert attributes.get("src", "data:image/").startswith("data:image/") and "href" not in attributes
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in page.style and "@import" not in page.style


def test_no_number_is_null_in_the_json_and_a_dash_on_the_page(tmp_path):
    report = make_report(spectra=True)
    lpl = report["models"][1]
    lpl["metrics"]["recall"], lpl["intervals"]["clip_score"] = math.nan, [math.nan, math.inf]
    lpl["spectrum"]["error"][3] = -math.inf
    report["differences"][0]["metrics"]["recall"] = {"difference": math.nan, "interval": [math.nan] * 2}
    before = copy.deepcopy(report)
    page = written(report, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["models"][1]["metrics"]["recall"] is None and read["models"][1]["metrics"]["frechet_distance"] == 280
    assert str(report) == str(before)
    rows = {without_arrow(row[0]): row[1:] for row in page.table("VAE's reconstructions (floor)")}
    assert rows["Recall (dinov2)"] == ["0.510 (0.498 to 0.522)", "-", "-"] and rows["CLIPScore"][1] == "25.12"
    assert not [row for row in page.table("Verdict") if "Recall" in row[0]]
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_the_numbers_are_safe_and_files_are_whole_or_old(tmp_path, monkeypatch):
    write_report(make_report(), tmp_path)
    assert not list(tmp_path.glob("tmp-*"))
    old, newer = (tmp_path / "report.html").read_bytes(), make_report(spectra=True)
    newer["models"][0]["metrics"]["recall"] = 0.25
    monkeypatch.setattr(evaluation_report, "draw_panels", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(newer, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["metrics"]["recall"] == 0.25
    assert (tmp_path / "report.html").read_bytes() == old

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(make_report(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["metrics"]["recall"] == 0.25


def test_one_model_has_no_pairs(tmp_path):
    report = make_report()
    report["models"], report["differences"] = report["models"][1:], []
    save_samples(tmp_path, "lpl", noise(2), ["a cat"])
    page = written(report, tmp_path)
    assert "Evaluation of lpl" in page.text and "better than" not in page.text and "same seed" not in page.text
    assert page.table("VAE's reconstructions (floor)")[1][1] == "280 (268 to 292)"
    assert len(page.images("whole")) == 2 and not page.images("detail") and "a cat" in page.text
    assert Image.open(tmp_path / "pairs.png").width == report_blocks.CELL


def test_only_samples_drawn_here_are_said_to_be_pairs(tmp_path):
    report = make_report()
    for label in ("base", "lpl"):
        save_samples(tmp_path, label, noise(1))
    text = written(report, tmp_path).text
    assert "same seeds and prompts" in text and "same seed and prompt in each model" in text
    del report["models"][1]["num_inference_steps"]
    report["differences"] = []
    assert "same seeds and prompts" not in written(report, tmp_path).text
    del report["models"][0]["num_inference_steps"]
    text = written(report, tmp_path).text
    assert "where the models differ most" in text and "same seed" not in text


def test_the_least_that_a_report_has(tmp_path):
    page = written({"models": [{"name": "a", "metrics": {"recall": 0.5}}]}, tmp_path)
    assert page.table("Metric")[1] == ["Recall \u2191", "0.5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


# Samples


def test_the_detail_is_where_images_differ_most():
    size, window = 60, 15
    rng = np.random.default_rng(3)
    first = rng.integers(50, 150, (size, size, 3), dtype=np.uint8)
    second = first + rng.integers(0, 12, first.shape, dtype=np.uint8)
    second[33:40, 12:20] += 80
    left, top, right, bottom = detail_window([Image.fromarray(first), Image.fromarray(second)])
    assert right - left == bottom - top == window
    assert left <= 12 and right >= 20 and top <= 33 and bottom >= 40
    difference = np.abs(first.astype(float) - second).mean(axis=-1)
    blurred = gaussian_filter(difference, window / 4, mode="constant", truncate=20)
    half = window // 2
    inside = blurred[half : size - half, half : size - half]  # middles of windows that fit
    assert (top, left) == np.unravel_index(inside.argmax(), inside.shape)


@pytest.mark.parametrize("place", [(0, 0), (58, 42), (0, 42)])
def test_the_detail_stays_in_the_image(place):
    plain = Image.new("RGB", (64, 48), "gray")
    dotted = plain.copy()
    dotted.putpixel((min(place[0], 63), min(place[1], 47)), (255, 255, 255))
    left, top, right, bottom = detail_window([plain, dotted, plain])
    assert 0 <= left <= place[0] < right <= 64 and 0 <= top <= place[1] < bottom <= 48
    assert (right - left, bottom - top) == (12, 12)


def test_pairs_are_the_first_samples_of_both_and_their_details(tmp_path):
    base, lpl = noise(9), [image.copy() for image in noise(9)]
    for i, image in enumerate(lpl):
        image.paste("white", (4 + 5 * i, 20, 12 + 5 * i, 28))
    captions = [f"caption {i}" for i in range(9)]
    save_samples(tmp_path, "base", base, captions)
    save_samples(tmp_path, "lpl", lpl, captions)
    page = written(make_report(), tmp_path)
    assert [f"caption {i}" in page.text for i in range(9)] == [True] * 6 + [False] * 3
    assert "Sample 1, seed 101" in page.text and "The first 6 samples, not chosen" in page.text
    details, wholes = page.images("detail"), page.images("whole")
    assert len(details) == len(wholes) == 12
    for i in range(6):
        left, top, right, bottom = window = detail_window([base[i], lpl[i]])
        assert left <= 4 + 5 * i and right >= 12 + 5 * i and top <= 20 and bottom >= 28
        for image, detail, whole in zip((base[i], lpl[i]), details[2 * i :], wholes[2 * i :]):
            assert np.array_equal(np.asarray(detail), np.asarray(image.crop(window)))
            assert whole.format == "JPEG" and whole.size == image.size
            frame = np.asarray(whole)[top - 1, left:right]
            assert frame.min() > 200  # the noise is darker
    sheet = Image.open(tmp_path / "pairs.png")
    assert sheet.width >= 4 * report_blocks.CELL and sheet.height >= 6 * report_blocks.CELL


def test_large_samples_are_embedded_as_thumbnails(tmp_path):
    for seed, label in enumerate(("base", "lpl")):
        small = noise(1, seed=seed)[0]
        save_samples(tmp_path, label, [small.resize((1280, 960), Image.Resampling.BICUBIC)])
    page = written(make_report(), tmp_path)
    assert [image.size for image in page.images("whole")] == [(512, 384)] * 2
    assert [image.size for image in page.images("detail")] == [(240, 240)] * 2


def test_images_of_different_sizes_have_no_detail(tmp_path):
    save_samples(tmp_path, "base", noise(1))
    save_samples(tmp_path, "lpl", noise(1, size=(32, 32)))
    page = written(make_report(), tmp_path)
    assert [image.size for image in page.images("whole")] == [(64, 48), (32, 32)] and not page.images("detail")


# Curves and spectra


SWEEP = tuple((steps, guidance) for steps in (10, 50, 100) for guidance in (1.0, 2.0, 4.0))


def keep(report, *names):
    for part in report["models"] + report["differences"]:
        part["metrics"] = {name: part["metrics"][name] for name in names}


def test_a_sweep_has_an_overview_curves_and_the_pairs_of_one_setting(tmp_path):
    report = make_report(SWEEP, spectra=True)
    keep(report, "recall", "frechet_distance_inception", "frechet_distance")
    report["differences"][0]["metrics"]["frechet_distance"] = {"difference": -20.0, "interval": [-45.0, 5.0]}
    save_samples(tmp_path, "base", noise(1))
    save_samples(tmp_path, "lpl", noise(1, seed=1))
    page = written(report, tmp_path)
    assert "lpl is better in 0 to 1 of 3 metrics, worse in 1; 1 to 2 can't tell the two apart with 5,000" in page.text
    first, second, third = overview = page.table("lpl is")[1:]
    assert page.table("lpl is")[0][1:] == [f"{steps} steps, guidance {guidance:g}" for steps, guidance in SWEEP]
    assert first == ["Fréchet distance (dinov2) \u2193", "undecided", *["better"] * 8]
    assert set(second[1:]) == {"worse"} and set(third[1:]) == {"undecided"}
    differences = page.table("Verdict")
    assert len(differences) == 1 + len(overview) * (1 + len(SWEEP)) and differences[1] == first[:1]
    assert differences[2][:4] == ["10 steps, guidance 1", "", "undecided", "-20 (-45 to +5)"]
    for heading in ("Samples at 50 steps, guidance 2", "Power spectra at 50 steps, guidance 2", "Curves"):
        assert heading in page.text
    panels = [attributes for tag, attributes in page.tags if tag == "img" and "class" not in attributes]
    assert len(panels) == 2 * 3 + 2 and Image.open(tmp_path / "curves.png").width > 1000


def test_the_setting_shown_is_the_one_nearest_the_defaults():
    report = make_report(SWEEP)
    assert View(report).main == (50, 2.0)
    report["settings"] |= {"num_inference_steps": 12, "guidance_scale": 7.5}
    assert View(report).main == (10, 4.0)
    report["models"] = [
        entry for entry in report["models"] if entry["model"] == "base" or entry["guidance_scale"] == 1
    ]
    assert View(report).main == (10, 1.0)  # where both models are


def test_a_curve_is_that_of_the_dict():
    report = make_report(SWEEP)
    for entry in report["models"]:
        value = (
            300 - entry["num_inference_steps"] - 10 * (entry["model"] == "lpl") + 1000 * (entry["guidance_scale"] != 2)
        )
        entry["metrics"]["frechet_distance"], entry["intervals"]["frechet_distance"] = value, [value - 4, value + 3]
    view = View(report)
    axis = Figure().subplots()
    at = [setting for setting in view.settings if setting.guidance == 2]
    draw_curve(view, "frechet_distance", at, 0, "sampling steps", axis)
    lines = [line.get_xydata().tolist() for line in axis.get_lines()[:2]]
    assert lines == [[[10, 290 - shift], [50, 250 - shift], [100, 200 - shift]] for shift in (0, 10)]
    assert axis.get_xscale() == "log" and axis.get_xticks().tolist() == [10, 50, 100]
    band = axis.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band} == {(x, y + d) for x, y in lines[0] for d in (-4, 3)}
    assert axis.get_lines()[2].get_ydata() == [41.25, 41.25] and axis.get_ylim()[0] > 41.25
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["base", "lpl"]


def test_one_swept_flag_is_one_set_of_curves(tmp_path):
    report = make_report(((25, 2.0), (50, 2.0)))
    keep(report, "recall", "frechet_distance_reconstructed")
    page = written(report, tmp_path)
    assert [tag for tag, _ in page.tags].count("img") == 1  # no curve of the second one
    assert "Power spectra" not in page.text and not (tmp_path / "pairs.png").exists()


def test_the_spectra_are_those_of_the_dict():
    report = make_report(spectra=True)
    axis = Figure().subplots()
    draw_errors(View(report), report["models"], axis)
    floor, *drawn = [list(line.get_ydata()) for line in axis.get_lines()]
    assert drawn[:2] == [entry["spectrum"]["error"] for entry in report["models"]]
    assert floor == pytest.approx([-0.2 * frequency for frequency in FREQUENCY])
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (min(spectrum(-1.0)["low"]), max(spectrum(-1.0)["high"]))
    assert {line.get_xdata()[0] for line in axis.get_lines()} >= {75 / 256, 150 / 256}


# The paper's numbers


CONDITIONS = {
    "reference_is": "imagenet-1k",
    "resolution": 512,
    "prediction_type": "epsilon",
    "sampler": "DDIMScheduler",
    "guidance_rescale": None,
    "num_samples": 50_000,
    "num_reference_samples": 50_000,
    "feature_extractors": [{"name": "dinov2"}, {"name": "inception"}],
    "clip_model": None,
}
MODELS = [{"num_inference_steps": 50, "guidance_scale": 2.0}]


def test_the_papers_numbers_of_each_setting():
    def found(models=MODELS, **changes):
        return [(entry["metric"], entry["value"]) for entry in paper_numbers(CONDITIONS | changes, models)]

    fid, at_256 = "frechet_distance_inception", [{"num_inference_steps": 50, "guidance_scale": 1.5}]
    assert found() == [(fid, 4.88), (fid, 3.79)]
    assert found(feature_extractors=[{"name": "inception"}]) == [
        ("frechet_distance", 4.88),
        ("frechet_distance", 3.79),
    ]
    assert found(prediction_type="v_prediction") == [(fid, 4.72), (fid, 3.84)]
    euler = {"prediction_type": "flow_prediction", "sampler": "FlowMatchEulerDiscreteScheduler"}
    assert found(**euler) == [(fid, 4.54), (fid, 3.61)]
    assert found(at_256, resolution=256) == [(fid, 2.98), (fid, 2.72)]
    cc12m = {"reference_is": "cc12m", "num_samples": 12_345, "num_reference_samples": 12_345}
    assert found(**cc12m) == [(fid, 8.79), (fid, 7.27)]
    clip = cc12m | {"clip_model": "some/clip"}
    assert found(**clip)[2:] == [("clip_score", 24.88), ("clip_score", 25.12)]
    numbers = [(fid, 7.81), (fid, 6.22), ("clip_score", 25.06), ("clip_score", 25.12)]
    assert found(at_256, **clip, resolution=256) == numbers
    swept = [{"num_inference_steps": steps, "guidance_scale": 2.0} for steps in (10, 50)]
    assert found(swept) == found()


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_is": None},
        {"reference_is": "cc12m", "num_samples": 9_999, "num_reference_samples": 9_999},
        {"resolution": 768},
        {"resolution": 256},
        {"prediction_type": "sample"},
        {"prediction_type": "flow_prediction"},
        {"sampler": "EulerDiscreteScheduler"},
        {"sampler": "FlowMatchEulerDiscreteScheduler"},
        {"guidance_rescale": 0.7},
        {"num_samples": 10_000},
        {"num_samples": 10_000, "num_reference_samples": 10_000},
        {"num_reference_samples": 49_999},
        {"feature_extractors": [{"name": "dinov2"}]},
        {"models": [{"num_inference_steps": 25, "guidance_scale": 2.0}]},
        {"models": [{"num_inference_steps": 50, "guidance_scale": 1.5}]},
        {
            "models": [
                {"num_inference_steps": 50, "guidance_scale": 1.0},
                {"num_inference_steps": 9, "guidance_scale": 2},
            ]
        },
    ],
)
def test_any_other_condition_removes_the_papers_numbers(changes):
    settings = CONDITIONS | changes
    assert paper_numbers(settings, settings.pop("models", MODELS)) == []


def test_every_condition_is_needed_to_have_a_number_at_all():
    for name in CONDITIONS.keys() - {"guidance_rescale", "clip_model"}:
        assert paper_numbers({key: value for key, value in CONDITIONS.items() if key != name}, MODELS) == []


def test_the_papers_numbers_are_marked(tmp_path):
    report = make_report()
    assert "In the paper" not in written(report, tmp_path).text
    report["paper"] = paper_numbers(CONDITIONS, MODELS)
    rows = written(report, tmp_path).table("Paper")
    conditions = "Tables 2 and 3: ImageNet-1k, 512 pixels, epsilon, DDIM, 50 steps, guidance 2"
    assert rows[1:] == [
        ["Fréchet distance (FID, inception)", "without LPL", "4.88", conditions],
        ["Fréchet distance (FID, inception)", "with LPL", "3.79", conditions],
    ]


def test_a_model_card_takes_the_numbers_of_the_report(tmp_path):
    import model_card

    write_report(make_report(), tmp_path / "evaluation")
    (tmp_path / "README.md").write_text("# My model\n")
    flags = [str(tmp_path), "--report", str(tmp_path / "evaluation" / "report.json"), "--model", "lpl"]
    model_card.main(model_card.parse_args(flags))
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        name: numbers[1] for name, numbers in METRICS.items()
    }
    assert {result.dataset_name for result in results} == {"val2017"}
