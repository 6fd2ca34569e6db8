"""The report of an evaluation: is B better than A, by how much, and how sure are we?

write_report     report.json, report.md and report.html (one file with all pictures in it), from one dict
paper_numbers    what the paper measured under the same conditions, or nothing

Markdown and HTML are two renderings of the same list of blocks, so they say the same.
"""

import html
import io
import json
import math
import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metrics import BANDS
from report_blocks import (
    PAGE,
    PAIRS,
    Bullets,
    Cell,
    Folded,
    Heading,
    Picture,
    Samples,
    Table,
    Text,
    contact_sheet,
    first_samples,
    png,
)


CURVES, SPECTRA = "curves.png", "spectra.png"
STEPS, GUIDANCE = 50, 2.0  # the paper's, in whose vicinity pairs and spectra of a sweep are shown
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe & Ito: told apart by everybody
LOOK = {"font.size": 9, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}


def write_report(report, folder):
    """Write `report.json`, `report.md`, `report.html` and the pictures of the Markdown file to a folder.

    Numbers come first, so that they are safe whatever happens to the pictures. Each file is written wholly or not at
    all; what is not finite is null in the JSON and a dash in the tables.

    Args:
        report: a dict of
            settings: what was measured and how; any names, nested or not, and all optional. Read here: `reference`,
                `num_samples`, `num_reference_samples`, `level`, `feature_extractors` (a list of dicts with `name`, the
                first of which measures what has no suffix), and `num_inference_steps` and `guidance_scale`, the
                setting of a sweep near which samples and spectra are shown; if they are no numbers, the paper's.
            models: list of {name, metrics: {name: number}}, and optionally model (the label without the sweep),
                num_inference_steps, guidance_scale, num_samples, intervals: {name: [low, high]}, samples (a folder,
                relative to the report's), spectrum: {frequency [R], as shares of Nyquist; log_power [R]; error [R],
                low [R], high [R]}.
            reference: {spectrum, reconstructions: {metrics, spectrum} or None, metrics: {sharpness}}, all optional.
            differences: list of {models: [a, b], metrics: {name: {difference: b - a, interval, samples_needed}}}.
            notes: sentences. paper: what `paper_numbers` returns.
        folder: exists or is made.
    """
    report, folder = finite(report), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    blocks = document(report, folder)
    text = "\n\n".join(block.markdown() for block in blocks) + "\n"
    replace_file(folder / "report.md", text.encode())
    body = "\n".join(block.html() for block in blocks)
    replace_file(folder / "report.html", PAGE.format(title=html.escape(title_of(report)), body=body).encode())


def finite(value):
    """The same with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_file(path, content):
    """At any time either the old or the new file is there."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def document(report, folder):
    """All blocks of the report, in order; saves the pictures."""
    view = View(report)
    blocks = [Heading(1, title_of(report)), Text(introduction(report))]
    if report.get("notes"):
        blocks += [Bullets(report["notes"], "note")]
    scores = [outcome(view), values(view)]  # of more than two models there are many pairs
    blocks += list(chain(*(scores if len(view.labels) <= 2 else scores[::-1]))) + paper_table(view)
    blocks += curves(view, folder) + spectra(view, folder) + pairs(view, folder)
    rows = [[Cell(name), Cell(text)] for name, text in flat(report.get("settings", {}))]
    return blocks + [Heading(2, "Settings"), Table(["Setting", "Value"], rows, "prose")]


def title_of(report):
    labels = list(dict.fromkeys(label_of(model) for model in report["models"]))
    return f"Evaluation of {', '.join(labels[:-1])}{' and ' * (len(labels) > 1)}{labels[-1]}"


def introduction(report):
    settings = report.get("settings", {})
    counts = sorted({model.get("num_samples", settings.get("num_samples")) or 0 for model in report["models"]})
    words = f"{' or '.join(f'{count:,}' for count in counts)} samples of each model"
    if "reference" in settings:
        words += f", against {settings['reference']}"
    if settings.get("num_reference_samples"):
        words += f" ({settings['num_reference_samples']:,} images)"
    same = " All models drew from the same seeds and prompts, sample by sample."
    return f"{words}.{same * (len(report['models']) > 1 and all(map(drawn_here, report['models'])))}"


def flat(settings, prefix=""):
    """(name, text) of settings that may be nested."""
    for name, value in settings.items():
        title = prefix + str(name).replace("_", " ")
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):
            value = {str(part.get("name", i + 1)): part for i, part in enumerate(value)}
        if isinstance(value, dict):
            yield from flat(value, f"{title}: ")
        else:
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield title, "-" if value is None else str(value)


# Metrics: their names, order and better direction


LOWER, HIGHER, NEARER = "\u2193", "\u2191", "\u2192"
METRICS = {
    "frechet_distance": ("Fréchet distance", LOWER),
    "kernel_distance": ("Kernel distance", LOWER),
    "precision": ("Precision", HIGHER),
    "recall": ("Recall", HIGHER),
    "density": ("Density", HIGHER),
    "coverage": ("Coverage", HIGHER),
    "inception_score": ("Inception score", HIGHER),
    "clip_score": ("CLIPScore", HIGHER),
    "spectrum_error": ("Spectrum error", LOWER),
    "spectrum_error_low": ("Spectrum, low frequencies", NEARER),
    "spectrum_error_mid": ("Spectrum, middle frequencies", NEARER),
    "spectrum_error_high": ("Spectrum, high frequencies", NEARER),
    "sharpness": ("Sharpness", NEARER),
}
OF_FEATURES = list(METRICS)[:6]
KNOWN_AS = {("frechet_distance", "inception"): "FID, inception", ("kernel_distance", "inception"): "KID, inception"}


class Metric(NamedTuple):
    title: str
    better: str | None  # LOWER, HIGHER, NEARER (to the target) or None: nobody knows
    target: float | None
    rank: tuple

    @property
    def heading(self):
        """The title with an arrow that says how to read it, and the target where there is one."""
        target = [f"{self.target:.4g}"] if self.better == NEARER else []
        return "\u00a0".join([self.title, *filter(None, [self.better]), *target])


def describe(name, extractors, sharpness):
    """Metric of a name such as frechet_distance_reconstructed_inception.

    Args:
        extractors: short names; what the first one measures has no suffix.
        sharpness: the reference's, or None.
    """
    plain = name.replace("_reconstructed", "")
    bases = [base for base in METRICS if plain == base or plain.startswith(f"{base}_")]
    if not bases:
        return Metric(name.replace("_", " "), None, None, (len(METRICS), name))
    base = max(bases, key=len)
    title, better = METRICS[base]
    extractor = plain[len(base) + 1 :]
    if not extractor and base in OF_FEATURES and extractors:
        extractor = extractors[0]
    if plain != name:
        title += " to the reconstructions"
    if extractor:
        title += f" ({KNOWN_AS.get((base, extractor), extractor)})"
    target = (sharpness if base == "sharpness" else 0.0) if better == NEARER else None
    place = extractors.index(extractor) if extractor in extractors else len(extractors)
    better = None if better == NEARER and target is None else better
    return Metric(title, better, target, (list(METRICS).index(base), plain != name, place, extractor))


class Setting(NamedTuple):
    """What a sweep varies."""

    steps: int | None
    guidance: float | None

    def __str__(self):
        steps = [] if self.steps is None else [f"{self.steps} steps"]
        guidance = [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        return ", ".join(steps + guidance) or "default settings"


def label_of(model):
    """A model's name without the sweep."""
    return model.get("model") or model["name"]


def drawn_here(model):
    """Whether the evaluation drew the samples itself, so that those of one number are pairs for sure."""
    return model.get("num_inference_steps") is not None


def setting_of(model):
    return Setting(model.get("num_inference_steps"), model.get("guidance_scale"))


class View:
    """A report as the blocks need it.

    Attributes:
        metrics: {name: Metric}, in the order in which they are shown.
        floor: {name: value} of the VAE's reconstructions of the reference.
        models: {name: model}. labels: models without the sweep, in order; each has a color.
        settings: the sweep's settings, sorted; main: the one of which pairs and spectra are shown.
    """

    def __init__(self, report):
        self.report, self.options = report, report.get("settings", {})
        self.level = f"{100 * self.options.get('level', 0.95):g} %"
        self.reference = report.get("reference") or {}
        self.reconstructions = self.reference.get("reconstructions") or {}
        self.floor = self.reconstructions.get("metrics", {})
        self.models = {model["name"]: model for model in report["models"]}
        self.labels = list(dict.fromkeys(map(label_of, report["models"])))
        self.colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(self.labels)}
        extractors = [part["name"] for part in self.options.get("feature_extractors", [])]
        sharpness = self.reference.get("metrics", {}).get("sharpness")
        names = dict.fromkeys(name for model in report["models"] for name in model["metrics"])
        described = {name: describe(name, extractors, sharpness) for name in names}
        self.metrics = dict(sorted(described.items(), key=lambda item: item[1].rank))
        self.settings = sorted({setting_of(model) for model in report["models"]}, key=lambda s: (s[0] or 0, s[1] or 0))
        self.main = min(self.settings, key=self.distance_to_defaults)

    @property
    def swept(self):
        return len(self.settings) > 1

    def distance_to_defaults(self, setting):
        """What a setting is sorted by: models that it lacks, then how far its steps, then its guidance are off."""
        steps, guidance = self.options.get("num_inference_steps"), self.options.get("guidance_scale")
        steps = steps if isinstance(steps, (int, float)) else STEPS
        guidance = guidance if isinstance(guidance, (int, float)) else GUIDANCE
        missing = len(self.labels) - len(self.at(setting))
        far = abs(math.log((setting.steps or steps) / steps))
        return missing, far, abs((guidance if setting.guidance is None else setting.guidance) - guidance)

    def at(self, setting):
        """{label: model} of the models with this setting."""
        return {label_of(model): model for model in self.report["models"] if setting_of(model) == setting}

    def value(self, model, name):
        """A metric's value with its interval, as text."""
        value, interval = model["metrics"].get(name), interval_of(model.get("intervals", {}).get(name))
        if value is None:
            return "-"
        if interval is None:
            return number(value, None)
        places = decimals(interval)
        return f"{number(value, places)} ({number(interval[0], places)} to {number(interval[1], places)})"


def interval_of(interval):
    """[low, high], or None if there is none or it is not finite."""
    return None if not interval or None in interval else interval


def decimals(interval):
    """As many as show the half-width of an interval with two digits."""
    half = (interval[1] - interval[0]) / 2
    return max(0, 1 - math.floor(math.log10(half))) if half > 0 else None


def number(value, places, sign=""):
    """A number as text; places None: four digits."""
    if value is None:
        return "-"
    if places is None or places > 7:
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{places}f}"


def rounded(count):
    """A number of samples, with two digits."""
    if count < 100:
        return "under 100"
    if count >= 1e9:
        return "over 1,000,000,000"
    size = 10 ** (math.floor(math.log10(count)) - 1)
    return f"{math.ceil(count / size) * size:,}"


# Who is better


VERDICTS = BETTER, WORSE, DIFFERENT, UNDECIDED, UNKNOWN = "better", "worse", "different", "undecided", "no interval"


class Comparison(NamedTuple):
    """What one metric says of a pair of models: `second` (b) against `first` (a)."""

    metric: Metric
    first: float | None
    second: float | None
    difference: float
    interval: list | None
    samples_needed: int | None
    gain: int | None  # +1 or -1: the sign of a difference that is an improvement; None: nobody knows
    verdict: str

    def text(self):
        if self.interval is None:
            return number(self.difference, None, "+")
        places = decimals(self.interval)
        low, high = (number(end, places, "+") for end in self.interval)
        return f"{number(self.difference, places, '+')} ({low} to {high})"


def compare(view, first, second, name, found):
    """A Comparison. first, second: models; found: {difference, interval, samples_needed} of the metric."""
    metric = view.metrics[name]
    interval = interval_of(found.get("interval"))
    gain = {LOWER: -1, HIGHER: 1, NEARER: gain_towards(metric.target, first, second, name)}.get(metric.better)
    if interval is None:
        verdict = UNKNOWN
    elif interval[0] <= 0 <= interval[1]:
        verdict = UNDECIDED
    else:
        verdict = DIFFERENT if gain is None else BETTER if gain * found["difference"] > 0 else WORSE
    ends = [model["metrics"].get(name) for model in (first, second)]
    return Comparison(metric, *ends, found["difference"], interval, found.get("samples_needed"), gain, verdict)


def gain_towards(target, first, second, name):
    """Which sign of b - a brings b nearer to the target than a is, if that is sure: else None.

    |b - t| < |a - t| if and only if b - a and (a + b) / 2 - t have opposite signs. The interval of the midpoint is at
    most as wide as the mean of the two models' intervals, however they depend on each other.
    """
    ends = [interval_of(model.get("intervals", {}).get(name)) for model in (first, second)]
    if target is None or None in ends:
        return None
    middle = sum(model["metrics"][name] for model in (first, second)) / 2 - target
    half_width = sum(high - low for low, high in ends) / 4
    return None if abs(middle) <= half_width else -1 if middle > 0 else 1


def compared(view):
    """{(label a, label b): [(setting's text, number of samples, [Comparison])]} of the report's differences.

    Models of different settings are pairs of their own, by their full names.
    """
    found = {}
    for entry in view.report.get("differences") or []:
        first, second = (view.models[name] for name in entry["models"])
        same = setting_of(first) == setting_of(second)
        pair = (label_of(first), label_of(second)) if same else tuple(entry["models"])
        lines = [
            compare(view, first, second, name, entry["metrics"][name])
            for name in view.metrics
            if entry["metrics"].get(name, {}).get("difference") is not None
        ]
        count = min(model.get("num_samples", view.options.get("num_samples")) or 0 for model in (first, second))
        where = str(setting_of(first)) if same and view.swept else ""
        found.setdefault(pair, []).append((where, count, lines))
    return found


def outcome(view):
    """Sentences and the table of differences for each pair of models, and how to read them."""
    blocks = []
    for (first, second), settings in compared(view).items():
        blocks += [Heading(2, f"Is {second} better than {first}?")]
        table = difference_table(view, first, second, settings)
        if all(line.verdict == UNKNOWN for _, _, lines in settings for line in lines):
            blocks += [Text("There are no intervals: any difference may be chance.", "outcome"), table]
        elif len(settings) > 1:
            blocks += [Text(sweep_summary(second, settings), "outcome"), overview(view, second, settings)]
            blocks += [Folded(f"All differences: {second} minus {first}", table)]
        else:
            blocks += [*summary(first, second, *settings[0][1:]), table]
    if not blocks:
        return []
    level = view.options.get("level", 0.95)
    caution = (
        f"Better and worse: beyond the {view.level} interval of the paired difference, in brackets. Intervals say "
        "what another draw of samples would change, not what training again with another seed would; even between two "
        f"equal models, about {100 - 100 * level:.0f} of 100 metrics lie beyond theirs. In the drawings, right is "
        "better and the upright line is no difference. Samples needed: with so many, a difference of this size would "
        "lie beyond its interval four times out of five."
    )
    return blocks + [Text(caution, "small")]


def summary(first, second, count, lines):
    """How much by the first metric, how many metrics, and which ones."""
    by = {verdict: [line for line in lines if line.verdict == verdict] for verdict in VERDICTS}
    sentence = f"{second} is better in {len(by[BETTER])} of {len(lines)} metrics, worse in {len(by[WORSE])}"
    if by[DIFFERENT]:
        sentence += f", different without being clearly better or worse in {len(by[DIFFERENT])}"
    sentence += f"; {len(by[UNDECIDED])} can't tell the two apart with {count:,} samples."
    line = lines[0]
    places = decimals(line.interval) if line.interval else None
    example = f"{line.metric.title}: {number(line.second, places)} with {second}, {number(line.first, places)} with "
    example += f"{first}, a difference of {line.text()}: {line.verdict}."
    items = [f"{verdict.capitalize()}: {'; '.join(map(needed, by[verdict]))}." for verdict in VERDICTS if by[verdict]]
    return [Text(sentence, "outcome"), Text(example), Bullets(items)]


def sweep_summary(second, settings):
    """How many metrics at the settings of a sweep."""

    def among(verdict):
        counts = [sum(line.verdict == verdict for line in lines) for _, _, lines in settings]
        return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"

    return (
        f"Depending on the setting, {second} is better in {among(BETTER)} of {len(settings[0][2])} metrics, worse in "
        f"{among(WORSE)}; {among(UNDECIDED)} can't tell the two apart with {settings[0][1]:,} samples."
    )


def overview(view, second, settings):
    """The verdicts of a sweep: a row per metric, a column per setting."""
    rows = []
    for metric in view.metrics.values():
        verdicts = [[line.verdict for line in lines if line.metric is metric] for _, _, lines in settings]
        if any(verdicts):
            cells = [Cell(found[0], found[0]) if found else Cell("-") for found in verdicts]
            rows += [[Cell(metric.heading), *cells]]
    return Table([f"{second} is", *(where for where, _, _ in settings)], rows, "narrow")


def needed(line):
    """A metric's name, and if it is undecided how many samples it would take."""
    if line.verdict != UNDECIDED or not line.samples_needed:
        return line.metric.title
    return f"{line.metric.title} ({rounded(line.samples_needed)} samples would tell)"


# Tables


def values(view):
    """The table of metrics: a column per model; of a sweep a group of rows per metric."""
    floor = ["VAE's reconstructions (floor)"] if view.floor else []
    rows = []
    for name, metric in view.metrics.items():
        title = metric.heading
        limit = [Cell(number(view.floor.get(name), None), "floor")] if view.floor else []
        if view.swept:
            rows += [[Cell(title)]]
        for setting in view.settings:
            at = view.at(setting)
            cells = [Cell(view.value(at[label], name) if label in at else "-") for label in view.labels]
            rows += [[Cell(str(setting) if view.swept else title), *cells, *limit]]
    legend = (
        f"In brackets the {view.level} intervals of each model by itself. {LOWER} lower is better, {HIGHER} higher "
    )
    legend += f"is better, {NEARER} nearer to the number after it is better."
    if view.floor:
        legend += " The floor: the reference images themselves, encoded and decoded by the VAE."
    first = "Setting" if view.swept else "Metric"
    table = Table([first, *view.labels, *floor], rows, "wrapped")
    table = Folded("All values", table) if view.swept else table
    return [Heading(2, "Metrics"), table, Text(legend, "small")]


def difference_table(view, first, second, settings):
    """A pair's differences: a row per metric; of a sweep a group of rows per metric."""
    rows = []
    for metric in view.metrics.values():
        lines = [(where, line) for where, _, lines in settings for line in lines if line.metric is metric]
        title = metric.heading
        if len(settings) > 1 and lines:
            rows += [[Cell(title)]]
        rows += [comparison_row(where if len(settings) > 1 else title, line) for where, line in lines]
    name = "Setting" if len(settings) > 1 else "Metric"
    return Table([name, "", "Verdict", "Difference", first, second, "Samples needed"], rows)


def comparison_row(title, line):
    places = decimals(line.interval) if line.interval else None
    ends = [Cell(number(value, places)) for value in (line.first, line.second)]
    count = rounded(line.samples_needed) if line.samples_needed else "-"
    drawing, verdict = Cell("", drawing=whisker(line)), Cell(line.verdict, line.verdict)
    return [Cell(title), drawing, verdict, Cell(line.text()), *ends, Cell(count)]


def whisker(line):
    """SVG of a difference's interval on its own scale, with better on the right; "" if there is no better."""
    if line.interval is None or line.gain is None:
        return ""
    reach = max(map(abs, line.interval)) or 1.0
    ends = (line.interval[0], line.difference, line.interval[1])
    low, middle, high = sorted(60 + 54 * line.gain * end / reach for end in ends)
    return (
        f'<svg class="{line.verdict}" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<path class="zero" d="M60 0V16"/><path d="M{low:.1f} 8H{high:.1f}"/>'
        f'<circle cx="{middle:.1f}" cy="8" r="3.5"/></svg>'
    )


def paper_table(view):
    rows = []
    for entry in view.report.get("paper") or []:
        metric = entry.get("metric")
        title = view.metrics[metric].title if metric in view.metrics else metric
        texts = [title, entry.get("model"), number(entry.get("value"), None), entry.get("text")]
        rows += [[Cell(text or "-") for text in texts]]
    if not rows:
        return []
    text = "What the paper's authors measured on their own models. The conditions are those of this report."
    titles = ["Metric", "Model", "Paper", "Conditions"]
    return [Heading(2, "In the paper"), Table(titles, rows, "prose"), Text(text, "small")]


# Curves and spectra


def curves(view, folder):
    """Metrics against the number of steps and the guidance scale, as in Figs. 8 and 19 of the paper."""
    panels = []
    for place, title in enumerate(("sampling steps", "guidance scale")):
        other = 1 - place
        at = [
            setting for setting in view.settings if setting[other] == view.main[other] and setting[place] is not None
        ]
        if len(at) < 2:
            continue
        if len({setting[other] for setting in view.settings}) > 1:
            title += f", at {view.main._replace(**{Setting._fields[place]: None})}"
        names = [name for name in view.metrics if "_reconstructed" not in name]
        panels += [partial(draw_curve, view, name, at, place, title) for name in names]
    if not panels:
        return []
    picture = Picture(CURVES, "Metrics against what was swept", draw_panels(panels, folder / CURVES))
    text = f"Bands: {view.level} intervals of each model by itself; where they overlap, the paired difference may "
    text += "still be clear." + " Dashed, where in range: the VAE's reconstructions." * bool(view.floor)
    return [Heading(2, "Curves"), picture, Text(text, "small")]


def draw_curve(view, name, settings, place, title, axis):
    for label in view.labels:
        points = [(setting[place], view.at(setting).get(label)) for setting in settings]
        points = [(x, model) for x, model in points if model and model["metrics"].get(name) is not None]
        x, y = [x for x, _ in points], [model["metrics"][name] for _, model in points]
        axis.plot(x, y, ".-", color=view.colors[label])
        bands = [interval_of(model.get("intervals", {}).get(name)) for _, model in points]
        if bands and None not in bands:
            low, high = zip(*bands)
            axis.fill_between(x, low, high, color=view.colors[label], alpha=0.2, linewidth=0)
    if view.floor.get(name) is not None:
        limits = axis.get_ylim()  # a floor far below would press the curves together
        axis.axhline(view.floor[name], color="gray", linestyle="--", linewidth=1)
        axis.set_ylim(limits)
    ticks = sorted({setting[place] for setting in settings})
    if place == 0:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    metric = view.metrics[name]
    axis.set_title(metric.heading, fontsize=10)
    axis.set_xlabel(title)
    axis.legend(axis.get_lines()[: len(view.labels)], view.labels, fontsize=8, frameon=False)


def spectra(view, folder):
    """The spectra and their errors, as in Figs. 4 and 5 of the paper."""
    drawn = [model for model in view.at(view.main).values() if model.get("spectrum")]
    panels = [partial(draw_powers, view, drawn), partial(draw_errors, view, drawn)]
    if not drawn:
        return []
    files = draw_panels(panels, folder / SPECTRA)
    picture = Picture(SPECTRA, "Power spectra, and their error against the reference", files)
    text = "First the mean over all images, then its difference from the reference; below 0 there is too little "
    text += f"detail. Bands: {view.level} intervals. Dotted: where the paper divides low, middle and high frequencies."
    return [Heading(2, "Power spectra" + f" at {view.main}" * view.swept), picture, Text(text, "small")]


def draw_powers(view, models, axis):
    lines = [("reference", view.reference.get("spectrum") or {}, {"color": "black"}), *spectrum_lines(view, models)]
    draw_spectra(axis, lines, "log_power")
    finish_spectrum(axis, "Power spectrum", "log power in nats")


def draw_errors(view, models, axis):
    lines = spectrum_lines(view, models)
    draw_spectra(axis, lines, "error")
    for _, spectrum, look in lines:
        if spectrum.get("low") and spectrum.get("high"):
            low, high = missing_as_nan(spectrum["low"]), missing_as_nan(spectrum["high"])
            axis.fill_between(spectrum["frequency"], low, high, color=look["color"], alpha=0.2, linewidth=0)
    axis.axhline(0, color="black", linewidth=1)
    finish_spectrum(axis, "Error against the reference", "difference of log power in nats")


def spectrum_lines(view, models):
    """list of (label, spectrum, look) of the reconstructions and the models."""
    floor, reference = (part.get("spectrum") or {} for part in (view.reconstructions, view.reference))
    if floor and reference:
        error = missing_as_nan(floor["log_power"]) - missing_as_nan(reference["log_power"])
        floor = {"error": error, **floor}
    lines = [("VAE's reconstructions", floor, {"color": "gray", "linestyle": "--"})]
    return lines + [(label_of(m), m["spectrum"], {"color": view.colors[label_of(m)]}) for m in models]


def draw_spectra(axis, lines, name):
    labels, drawn = [], []
    for label, spectrum, look in lines:
        if spectrum.get(name) is not None:
            drawn += axis.plot(spectrum["frequency"], missing_as_nan(spectrum[name]), linewidth=1.3, **look)
            labels += [label]
    axis.legend(drawn, labels, fontsize=8, frameon=False)


def missing_as_nan(numbers):
    return np.array(numbers, dtype=float)


def finish_spectrum(axis, title, unit):
    for _, border in list(BANDS.values())[:-1]:
        axis.axvline(border, color="gray", linestyle=":", linewidth=1)
    axis.set_xlim(0, 1)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("frequency, as a share of Nyquist's")
    axis.set_ylabel(unit)


def draw_panels(panels, path):
    """Save functions that draw on an axis as one PNG; returns one SVG file (bytes) for each."""
    with matplotlib.rc_context(LOOK):
        columns = min(3, len(panels)) if len(panels) != 4 else 2
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels):
            panel(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        save_figure(figure, path)
        return [draw_alone(panel) for panel in panels]


def draw_alone(panel):
    figure, file = Figure(figsize=(4.6, 3.3), layout="constrained"), io.BytesIO()
    panel(figure.subplots())
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def save_figure(figure, path):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    replace_file(path, file.getvalue())


# Samples, side by side


def pairs(view, folder):
    """The first samples of each model side by side, with a detail of each."""
    at = {label: model for label, model in view.at(view.main).items() if "samples" in model}
    at = {label: model for label, model in at.items() if (folder / model["samples"]).is_dir()}
    samples = first_samples([folder / model["samples"] for model in at.values()])
    if not samples:
        return []
    replace_file(folder / PAIRS, png(contact_sheet(samples, list(at))))
    text = f"The first {len(samples)} samples, not chosen" if len(samples) > 1 else "The first sample, not chosen"
    if len(at) > 1:
        text += ", with the same seed and prompt in each model" * all(map(drawn_here, at.values()))
        text += (
            ". The frame, enlarged beside or below its picture, is where the models differ most; it is at the same "
        )
        text += "place in all of them"
    heading = Heading(2, "Samples" + f" at {view.main}" * view.swept)
    return [heading, Text(f"{text}.", "small"), Samples(samples, list(at))]


# What the paper measured


class PaperRow(NamedTuple):
    """A result of Berrada et al. and the conditions of its measurement, which are Sec. 4.1's."""

    table: str
    dataset: str  # as in --reference_is
    resolution: int
    prediction_type: str
    metric: str
    without: float
    lpl: float

    @property
    def guidance_scale(self):
        return 1.5 if self.resolution == 256 else 2.0

    @property
    def sampler(self):
        return "Euler" if self.prediction_type == "flow_prediction" else "DDIM"


FID = "frechet_distance"
PAPER = [
    PaperRow("Table 2", "imagenet-1k", 256, "epsilon", FID, 2.98, 2.72),
    PaperRow("Tables 2 and 3", "imagenet-1k", 512, "epsilon", FID, 4.88, 3.79),
    PaperRow("Table 3", "imagenet-1k", 512, "v_prediction", FID, 4.72, 3.84),
    PaperRow("Table 3", "imagenet-1k", 512, "flow_prediction", FID, 4.54, 3.61),
    PaperRow("Table 2", "cc12m", 256, "epsilon", FID, 7.81, 6.22),
    PaperRow("Table 2", "cc12m", 256, "epsilon", "clip_score", 25.06, 25.12),
    PaperRow("Table 2", "cc12m", 512, "epsilon", FID, 8.79, 7.27),
    PaperRow("Table 2", "cc12m", 512, "epsilon", "clip_score", 24.88, 25.12),
]
DATASETS = {"imagenet-1k": "ImageNet-1k", "cc12m": "CC12M"}
SAMPLERS = {"DDIM": ("ddim", "ddimscheduler"), "Euler": ("euler", "flowmatcheulerdiscretescheduler")}
# The paper compares as many samples as the evaluation set has. ImageNet-1k's validation set has 50,000; how many of
# CC12M it took is not said but for the spectra, 10,000.
FEWEST = {"imagenet-1k": 50_000, "cc12m": 10_000}


def paper_numbers(settings, models):
    """The paper's results that were measured as this evaluation was: list of {model, metric, value, text}.

    All of these must be the paper's: the reference set, as the user names it (`reference_is`), and the number of
    samples, equal to its size; resolution, prediction type, sampler, steps and guidance of at least one model, no
    rescaled guidance; for the Fréchet distance Inception's features, for the CLIPScore any CLIP model, as the paper
    does not name its own.

    Args:
        settings: the report's, with `prediction_type` and `reference_is` among them.
        models: the report's.
    """
    extractors = [part["name"] for part in settings.get("feature_extractors", [])]
    found = []
    for row in PAPER:
        measured = settings.get("clip_model") if row.metric == "clip_score" else "inception" in extractors
        if not measured or not same_conditions(row, settings, models):
            continue
        suffix = "_inception" if row.metric == FID and extractors[0] != "inception" else ""
        text = f"{row.table}: {DATASETS[row.dataset]}, {row.resolution} pixels, {row.prediction_type}, {row.sampler}, "
        text += f"{STEPS} steps, guidance {row.guidance_scale:g}"
        text += "; its CLIP model is not named" * (row.metric == "clip_score")
        for model, value in (("without LPL", row.without), ("with LPL", row.lpl)):
            found += [{"model": model, "metric": row.metric + suffix, "value": value, "text": text}]
    return found


def same_conditions(row, settings, models):
    """Whether an evaluation's conditions are those of a row of the paper."""
    count = settings.get("num_samples") or 0
    return (
        settings.get("reference_is") == row.dataset
        and settings.get("resolution") == row.resolution
        and settings.get("prediction_type") == row.prediction_type
        and str(settings.get("sampler")).lower() in SAMPLERS[row.sampler]
        and not settings.get("guidance_rescale")
        and count == settings.get("num_reference_samples")
        and (count == FEWEST[row.dataset] if row.dataset == "imagenet-1k" else count >= FEWEST[row.dataset])
        and any(setting_of(model) == (STEPS, row.guidance_scale) for model in models)
    )
