"""The paper's comparisons in miniature: what does LPL change, and what do its controls? Nothing is downloaded.

    python benchmarks/reproduce.py --jobs 2
    python benchmarks/reproduce.py --size large --arms all --jobs 4

All arms start from the same pre-trained denoiser (benchmarks/reproduction_models.py), see the same crops with the same
noise for the same number of steps, and are scored by evaluate_lpl.py on crops of regions that no network has seen.
Each seed is another order of the crops, other noise, and other samples. What is trained and scored is kept in
benchmarks/output/reproduce: an interrupted run goes on, and one with more arms or seeds does only what is missing.
Tables and pictures go there as well, or to `--output`.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from statistics import mean, median, stdev


sys.path.insert(0, str(Path(__file__).resolve().parent))
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from reproduction_models import DENOISER_STEPS, SIZES, WIDTHS, crops_of, models_of, train_denoiser  # noqa: E402
from run_demo import draw_comparison, environment, final_mean, launch, read_log  # noqa: E402
from scipy.stats import t as students_t  # noqa: E402

from evaluation_report import COLORS, LOOK, decimals, finish_spectrum, number, save_figure  # noqa: E402


RUNS = Path("benchmarks/output/reproduce")
DEFAULTS = {  # of the flags, by --size; the large one is meant for a GPU
    "small": {
        "prediction_types": ["epsilon"],
        "checkpoints": 1,
        "seeds": 3,
        "steps": 250,
        "train_batch_size": 24,
        "lpl_max_samples": 4,
        "learning_rate": 3e-4,
        "ema_decay": 0.99,
        "num_samples": 1000,
        "num_inference_steps": 16,
    },
    "large": {
        "prediction_types": ["epsilon", "v_prediction", "flow_prediction"],
        "checkpoints": 2,
        "seeds": 5,
        "steps": 3000,
        "train_batch_size": 128,
        "lpl_max_samples": 32,
        "learning_rate": 3e-4,
        "ema_decay": 0.999,
        "num_samples": 10_000,
        "num_inference_steps": 50,
    },
}
CLASSIFIER_STEPS = 1000  # of the network of E-LatentLPIPS
SAMPLE_SEEDS = 10**6  # from one seed's samples to the next one's


# ---------------------------------------------------------------- arms


def untouched(experiment, seed):
    """The denoiser that all arms start from."""
    return experiment.start(seed)


def same_time(experiment, seed):
    """l2 for as many more steps as a step with LPL took longer than one without, by the logs of this seed."""
    factor = experiment.seconds_per_step("LPL", seed) / experiment.seconds_per_step("l2", seed)
    return experiment.train(f"{L2} --max_train_steps {round(factor * experiment.args.steps)}", seed)


@dataclass(frozen=True)
class Drawn:
    """A trained model whose samples are drawn in another way.

    factor: of the latents before they are decoded, by a VAE that is told of another scale. That alone can bring
    samples nearer to real images, so LPL has to do more. guidance_scale: classifier-free; others are drawn without.
    """

    flags: str
    factor: float = 1
    guidance_scale: float = 1

    def __call__(self, experiment, seed):
        source = experiment.train(self.flags, seed)
        if self.factor == 1:
            return source
        folder = experiment.folder / slug(f"{self.flags} x {self.factor}") / f"{seed}"
        made_by = f"latents x {self.factor}\n{fingerprint(source)}\n"
        if not is_made(folder, made_by):
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("made_by.txt"))
            path = folder / "vae" / "config.json"
            config = json.loads(path.read_text())
            changed = {**config, "scaling_factor": config["scaling_factor"] / self.factor}
            path.write_text(json.dumps(changed, indent=2) + "\n")
            (folder / "made_by.txt").write_text(made_by)
        return folder


def training_of(how):
    """The flags that an arm is trained with; None if its model is made from others alone."""
    return how if isinstance(how, str) else getattr(how, "flags", None)


# Name -> flags of train_lpl_dit.py, or what makes the model from those of other arms
L2 = "--lpl_weight 0"
FEW = {
    "before": untouched,
    "l2": L2,
    "LPL": "",
    "LPL, not detached": "--no-lpl_detach_stats",
    "LPL, channel_l2": "--lpl_normalization channel_l2",  # blocks are weighted by `inverse`, positions by `mean`
    "l2, same time": same_time,
    "l2 on noise and z0": f"{L2} --clean_latent_weight auto:0.2 --gate_objectives clean_latent",
    "l2, latents x 1.1": Drawn(L2, factor=1.1),
}
SELF_PERCEPTUAL = f"{L2} --self_perceptual_weight variance:0.1 --sp_layer"
LPIPS = f"{L2} --e_latent_lpips_weight variance:0.1 --e_latent_lpips_model {{classifier}}"
MORE = {
    "LPL, separate": "--lpl_normalization separate",
    "LPL, uniform": "--lpl_weighting uniform",
    "LPL, gate 0.577 (SNR 3)": "--lpl_sigma_threshold 0.577",
    "LPL, gate 1": "--lpl_sigma_threshold 1",
    "LPL, gate 6": "--lpl_sigma_threshold 6",
    "self-perceptual, block 8": f"{SELF_PERCEPTUAL} {{block_8}}",
    "self-perceptual, block 16": f"{SELF_PERCEPTUAL} {{block_16}}",
    "self-perceptual, block 28": f"{SELF_PERCEPTUAL} {{block_28}}",
    "E-LatentLPIPS": LPIPS,
    "E-LatentLPIPS, gated": f"{LPIPS} --gate_objectives e_latent_lpips",
    "RGB": f"{L2} --rgb_weight variance:0.1",
    "Eq. 15": "--late_reweight",
    "min-SNR": f"{L2} --snr_gamma 5",
}
ARMS = {"few": FEW, "all": FEW | MORE}
BOTH = {"l2": L2, "LPL": ""}
DRAWN = {f"{arm}, latents x {x}": Drawn(flags, factor=x) for arm, flags in BOTH.items() for x in (1.1, 1.2, 1.3)}
DRAWN |= {f"{arm}, guidance {x}": Drawn(flags, guidance_scale=x) for arm, flags in BOTH.items() for x in (1.5, 2, 3)}
DRAWN |= {f"{arm}, guidance 2": Drawn(flags, guidance_scale=2) for arm, flags in MORE.items()}
DRAWN["l2, latents x 1.1, guidance 2"] = Drawn(L2, factor=1.1, guidance_scale=2)


# ---------------------------------------------------------------- commands that are run once


def fingerprint(*folders):
    """A hash of the weights and configs in folders."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_made(folder, made_by):
    """Whether a folder holds the finished result of what `made_by` says; if not, it is removed."""
    note = folder / "made_by.txt"
    if note.is_file() and note.read_text() == made_by:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def make(folder, command, *sources, shared=None):
    """Run a command that fills a folder, unless that holds what the same command made of the same sources (folders).

    shared: another folder, which the command finds in its own under the same name. Raises SystemExit if it fails.
    """
    made_by = f"{shlex.join(command)}\n{fingerprint(*sources)}\n"
    if is_made(folder, made_by):
        return
    print(f"$ {shlex.join(command)}", flush=True)
    folder.mkdir(parents=True)
    if shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
        (folder / shared.name).symlink_to(shared.resolve())
    log = Path(f"{folder}.log")
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment()).returncode
    if status:
        raise SystemExit(f"{log} is the log of a command that has failed, and ends with\n{log.read_text()[-2000:]}")
    (folder / "made_by.txt").write_text(made_by)


def side_by_side(jobs, tasks):
    """Call functions, `jobs` of them at a time. After an error no more are begun."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def slug(text):
    """A name for a folder."""
    return re.sub(r"[^\w.]+", "-", text).strip("-") or "defaults"


# ---------------------------------------------------------------- training and scores


@dataclass
class Experiment:
    """Arms that start from one denoiser, with --checkpoints from several in turn, a seed from the same one.

    args: what `parse_args` gives; arms: as `ARMS` has them, `l2` and `LPL` among them if others need these.
    """

    args: argparse.Namespace
    prediction_type: str
    arms: dict

    def __post_init__(self):
        self.resolution, self.seeds = SIZES[self.args.size][0], range(self.args.seeds)
        self.crops, self.models = crops_of(self.resolution), models_of(self.args.size)
        self.extractors = [self.models / "classifier", self.models / "random"]
        self.shared = RUNS / self.args.size  # by all prediction types
        self.folder = self.shared / self.prediction_type

    def start(self, seed):
        """The folder of the denoiser that the arms start from."""
        name, number = f"{self.args.size}-{self.prediction_type}", seed % self.args.checkpoints
        return self.shared / "checkpoints" / f"{name}-{number}" if number else self.models / name

    @cached_property
    def placeholders(self):
        """What flags can name in braces: the network of E-LatentLPIPS, and blocks at the depth of those of 28."""
        depth = json.loads((self.start(0) / "transformer" / "config.json").read_text())["num_layers"]
        blocks = {f"block_{n}": max(1, round(depth * n / 28)) for n in (8, 16, 28)}
        return {"classifier": self.shared / "latent-classifier", **blocks}

    def train_latent_classifier(self):
        """The network of E-LatentLPIPS, on the crops' latents."""
        command = f"""
            {launch()} train_latent_classifier.py --pretrained_vae_model_name_or_path {self.models / "vae"}
            --train_data_dir {self.crops / "train"} --resolution {self.resolution} --width 0.25 --random_flip
            --max_train_steps {CLASSIFIER_STEPS} --seed 0 --output_dir {self.placeholders["classifier"]}"""
        make(self.placeholders["classifier"], shlex.split(command), self.models / "vae")

    def train(self, flags, seed):
        """The folder of a model that these flags have trained."""
        args, folder = self.args, self.folder / slug(flags) / f"{seed}"
        command = f"""
            {launch()} train_lpl_dit.py --pretrained_model_name_or_path {self.start(seed)}
            --train_data_dir {self.crops / "train"} --resolution {self.resolution} --center_crop --cache_latents
            --latent_cache_dir {self.shared / "latents"} --train_batch_size {args.train_batch_size}
            --max_train_steps {args.steps} --learning_rate {args.learning_rate} --lr_scheduler cosine
            --lr_warmup_steps {min(20, args.steps // 10)} --use_ema --ema_decay {args.ema_decay}
            --lpl_base_resolution {self.resolution} --lpl_num_blocks {len(WIDTHS[args.size])}
            --lpl_max_samples {args.lpl_max_samples} --lpl_chunk_size {min(args.lpl_max_samples, 8)}
            --checkpointing_steps {10**9} --report_to none --seed {seed}
            --output_dir {folder} {flags.format(**self.placeholders)}"""
        sources = [self.start(seed)] + [self.placeholders["classifier"]] * ("{classifier}" in flags)
        make(folder, shlex.split(command), *sources)
        return folder

    def model(self, arm, seed):
        """The folder of an arm's model, which is made if it is not there."""
        how = self.arms[arm]
        return how(self, seed) if callable(how) else self.train(how, seed)

    def score_folder(self, arm, seed):
        how = self.arms[arm]
        return self.folder / slug(arm if callable(how) else how) / f"{seed}-score"

    def score(self, arm, seed):
        """Draw samples of an arm's model and measure them."""
        model = self.model(arm, seed)
        number, steps = self.args.num_samples, self.args.num_inference_steps
        guidance = getattr(self.arms[arm], "guidance_scale", 1)
        drawing = f"--resolution {self.resolution} --num_inference_steps {steps} --guidance_scale {guidance}"
        flags = f"--model {model} {drawing} --num_samples {number} --seed {seed * SAMPLE_SEEDS}"
        self.evaluate(self.score_folder(arm, seed), flags, model)

    def score_training_crops(self):
        """As if they were samples, which gives the folder of what a model that knows them by heart would get."""
        files = sorted(self.crops.glob("train/*/*.png"))
        count, folder = min(self.args.num_samples, len(files)), self.folder / "training-crops"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in (files[i * len(files) // count] for i in range(count)):
            (folder / f"{path.parent.name}-{path.name}").symlink_to(path.resolve())
        vae, scores = self.start(0) / "vae", self.folder / "training-crops-score"
        flags = f"--samples {folder} --pretrained_vae_model_name_or_path {vae} --num_samples {count}"
        self.evaluate(scores, flags, vae)
        return scores

    def evaluate(self, folder, flags, source):
        command = f"""
            {launch()} evaluate_lpl.py {flags} --names samples --reference {self.crops / "held_out"}
            --feature_extractor {" ".join(map(str, self.extractors))} --batch_size 50 --half_samples 2
            --output_dir {folder}"""
        make(folder, shlex.split(command), source, *self.extractors, shared=self.shared / "reconstructions")

    def run(self):
        """Train and score what is missing."""
        for seed in range(min(self.args.checkpoints, self.args.seeds)):
            if not (self.start(seed) / "model_index.json").exists():
                steps = DENOISER_STEPS[self.args.size]
                train_denoiser(self.args.size, self.prediction_type, steps, seed, self.start(seed))
        jobs = partial(side_by_side, self.args.jobs)
        trainings = [flags for flags in dict.fromkeys(map(training_of, self.arms.values())) if flags is not None]
        trained = [(flags, seed) for seed in self.seeds for flags in trainings]
        # First what fills the folders that all others read; what is made from other arms is made when it is scored.
        first = [self.score_training_crops, partial(self.train, *trained[0])]
        first += [self.train_latent_classifier] if any("{classifier}" in flags for flags in trainings) else []
        jobs(first)
        jobs(partial(self.train, *run) for run in trained)
        for seed in self.seeds:  # in turn: the first one's scores have the reconstructions of every VAE made
            jobs(partial(self.score, arm, seed) for arm in self.arms)

    def seconds_per_step(self, arm, seed):
        """The median over the log's lines of the last --steps steps, before which LPL may wait for its start."""
        log = read_log(self.model(arm, seed))
        rates = [line["images_per_second"] for line in log if line["step"] > log[-1]["step"] - self.args.steps]
        return self.args.train_batch_size / median(rates)

    def reports(self):
        """Arm -> what evaluate_lpl.py reports, a dict for each seed."""
        return {arm: [self.report(self.score_folder(arm, seed)) for seed in self.seeds] for arm in self.arms}

    @staticmethod
    def report(folder):
        return json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- statistics


def t_interval(values, level=0.95):
    """Mean of independent values, and half the width of its confidence interval: None if there is one value only."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), students_t.ppf((1 + level) / 2, len(values) - 1) * stdev(values) / len(values) ** 0.5


def change(values, baseline, relative):
    """`t_interval` of the differences, seed by seed; relative: in per cent of the mean baseline; None if that is 0."""
    if relative and not mean(baseline):
        return None, None
    scale = 100 / mean(baseline) if relative else 1
    return t_interval([scale * (b - a) for a, b in zip(baseline, values, strict=True)])


def values(reports, metric):
    return [report["models"][0]["metrics"][metric] for report in reports]


def shown(found, sign="", unit=""):
    """A mean with its half-width as text; with a sign, it is a change: bold if its interval is without 0."""
    middle, reach = found
    if reach is None:
        return number(middle, None, sign) + unit * (middle is not None)
    places = decimals((middle - reach, middle + reach))
    text = f"{number(middle, places, sign)} ± {number(reach, places)}{unit}"
    return f"**{text}**" if sign and abs(middle) > reach else text


# ---------------------------------------------------------------- tables


METRICS = {  # those in nats are compared by their difference, the others by a ratio
    "frechet_distance": "FD",
    "frechet_distance_reconstructed": "FD to reconstructions",
    "frechet_distance_random": "FD, random network",
    "frechet_distance_reconstructed_random": "FD to reconstructions, random network",
    "kernel_distance": "KD",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "spectrum_error": "spectrum error (nats)",
    "spectrum_error_high": "power at high frequencies (nats)",
}
# What the paper reports: metric -> value of l2 and with LPL
TABLE_3 = {
    "epsilon": {
        "FID": (4.88, 3.79),
        "coverage": (0.80, 0.82),
        "density": (1.14, 1.13),
        "precision": (0.74, 0.77),
        "recall": (0.49, 0.51),
    },
    "v_prediction": {
        "FID": (4.72, 3.84),
        "coverage": (0.80, 0.83),
        "density": (1.15, 1.14),
        "precision": (0.73, 0.78),
        "recall": (0.49, 0.50),
    },
    "flow_prediction": {
        "FID": (4.54, 3.61),
        "coverage": (0.82, 0.85),
        "density": (1.14, 1.29),
        "precision": (0.75, 0.79),
        "recall": (0.52, 0.54),
    },
}


def of_512(row, arm, fid):
    """A row of the paper's that compares with l2 at 512 pixels."""
    return row, "epsilon", "l2", arm, "FID", 4.88, fid


# Title -> rows: what it is, prediction type, baseline and arm as they are called here, metric, the paper's two values
PAPER = {
    "Table 2: data": [
        ("ImageNet-1k, 256 pixels", "epsilon", None, None, "FID", 2.98, 2.72),
        ("ImageNet-1k, 512 pixels", "epsilon", None, None, "FID", 4.88, 3.79),
        ("CC12M, 256 pixels", "epsilon", None, None, "FID", 7.81, 6.22),
        ("CC12M, 512 pixels", "epsilon", None, None, "FID", 8.79, 7.27),
        ("S320M, 512 pixels", "epsilon", None, None, "FID", 8.81, 8.30),
        ("these photographs", "epsilon", "l2", "LPL", "FID", None, None),
    ],
    "Table 3: formulations": [
        (f"{kind}: {metric}", kind, "l2", "LPL", metric, *pair)
        for kind, metrics in TABLE_3.items()
        for metric, pair in metrics.items()
    ],
    "Table 5: perceptual losses": [
        of_512("E-LatentLPIPS", "E-LatentLPIPS", 7.71),
        of_512("E-LatentLPIPS, gated", "E-LatentLPIPS, gated", 7.19),
        of_512("self-perceptual, block 8 of 28", "self-perceptual, block 8", 5.82),
        of_512("self-perceptual, block 16", "self-perceptual, block 16", 13.40),
        of_512("self-perceptual, block 28", "self-perceptual, block 28", 10.43),
        of_512("LPL", "LPL", 3.79),
    ],
    "Table 6: timestep weights": [
        of_512("Eq. 15", "Eq. 15", 5.43),
        of_512("min-SNR", "min-SNR", 5.04),
        of_512("LPL", "LPL", 3.79),
    ],
    "Table 7: the same time for both": [("LPL", "epsilon", "l2, same time", "LPL", "FID", 4.62, 3.84)],
    "Sec. 4.3: normalisation and weights of the blocks": [
        of_512("normalised separately", "LPL, separate", 4.79),
        of_512("uniform weights", "LPL, uniform", 4.38),
        of_512("LPL", "LPL", 3.79),
    ],
}


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def scores_table(reports, floors):
    """Values of each arm; floors: name -> reports of what no denoiser has drawn."""
    rows = [[arm, *(shown(t_interval(values(found, name))) for name in METRICS)] for arm, found in reports.items()]
    rows += [[f"*{name}*", *(number(found.get(key), None) for key in METRICS)] for name, found in floors.items()]
    return table(["", *METRICS.values()], rows)


def changes_table(reports, baseline="l2"):
    """What each arm changes, in per cent or in nats."""
    rows = []
    for arm in (arm for arm in reports if arm != baseline):
        pairs = {name: [values(reports[which], name) for which in (arm, baseline)] for name in METRICS}
        found = (change(*pair, relative="nats" not in METRICS[name]) for name, pair in pairs.items())
        rows.append([arm, *(shown(each, "+") for each in found)])
    return table(["", *METRICS.values()], rows)


def paper_row(results, row, kind, before, after, metric, *theirs):
    """What the paper reports, and ours beside it if there are two arms. results: prediction type -> arm -> reports."""
    cells = ["", ""]
    if theirs[0] is not None:
        cells = [f"{theirs[0]:g} -> {theirs[1]:g}", f"{100 * (theirs[1] / theirs[0] - 1):+.0f} %"]
    names = ("frechet_distance", "frechet_distance_reconstructed") if metric == "FID" else (metric,)
    for name in names if after is not None else ():
        pair = (values(results[kind][arm], name) for arm in (after, before))
        cells.append(shown(change(*pair, relative=True), "+", " %"))
    return [row, *cells, *[""] * (4 - len(cells))]


def paper_tables(results):
    """Those of the paper's tables all arms of which there are here; results: prediction type -> arm -> reports."""
    head = ["", "paper", "the paper's change", "our change", "ours, to reconstructions"]
    parts = []
    for title, rows in PAPER.items():
        rows = [row for row in rows if row[1] in results]
        arms = [(kind, arm) for _, kind, *pair, _, _, _ in rows for arm in pair if arm is not None]
        if arms and all(arm in results[kind] for kind, arm in arms):
            parts += [f"**{title}**", table(head, [paper_row(results, *row) for row in rows])]
    return "\n\n".join(parts)


def alarms_table(experiment):
    """What the logs say of LPL, a mean over the last 30 % of each run and over blocks, and what a step takes."""
    names = {"share of the loss": "lpl_share", "target error": "target_error", "variance ratio": "variance_ratio"}
    names["cosine with l2's gradient"] = "grad_cosine"
    rows = []
    for arm, how in experiment.arms.items():
        if callable(how):
            continue
        logs = [read_log(experiment.model(arm, seed)) for seed in experiment.seeds]
        cells = [text_of([logged(log, name) for log in logs]) for name in names.values()]
        ratios = [experiment.seconds_per_step(arm, k) / experiment.seconds_per_step("l2", k) for k in experiment.seeds]
        rows.append([arm, *cells, shown(t_interval(ratios))])
    return table(["", *names, "seconds per step, l2 = 1"], rows)


def logged(log, name):
    """A value of a log, or its mean over blocks; None if it is not there."""
    found = [final_mean(log, key) for key in log[-1] if key == name or key.startswith(f"{name}/")]
    return mean(found) if found else None


def text_of(numbers):
    return "" if None in numbers else shown(t_interval(numbers))


# ---------------------------------------------------------------- pictures


def draw_spectra(reports, path):
    """Log power against real images and, as in Fig. 4, against l2: means over the seeds, with intervals."""
    first = reports["l2"][0]
    frequency = first["models"][0]["spectrum"]["frequency"]
    errors = {arm: np.array([r["models"][0]["spectrum"]["error"] for r in found]) for arm, found in reports.items()}
    real, rebuilt = first["reference"]["spectrum"], first["reference"]["reconstructions"]["spectrum"]
    floor = np.subtract(rebuilt["log_power"], real["log_power"])
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(frequency, floor, color="gray", linestyle="--", linewidth=1.3, label="VAE's reconstructions")
        for (arm, found), look in zip(errors.items(), looks()):
            left.plot(frequency, found.mean(0), linewidth=1.3, label=arm, **look)
            if arm not in ("before", "l2"):
                middle, reach = zip(*(t_interval(ring) for ring in (found - errors["l2"]).T.tolist()))
                right.plot(frequency, middle, linewidth=1.3, **look)
                if None not in reach:
                    band = np.array(middle) - reach, np.array(middle) + reach
                    right.fill_between(frequency, *band, alpha=0.15, linewidth=0, color=look["color"])
        for axis in (left, right):
            axis.axhline(0, color="black", linewidth=1)
        finish_spectrum(left, "Against held-out crops", "difference of log power in nats")
        finish_spectrum(right, "Against l2", "difference of log power in nats")
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
        save_figure(figure, path)


def looks():
    """Colours, and other lines when these are used up."""
    return ({"color": color, "linestyle": line} for line in cycle(("-", "--", ":", "-.")) for color in COLORS)


def draw_samples(experiment, path, count=12):
    """The first samples of each arm, which in a column start from the same noise."""
    rows, labels = {}, []
    for arm in experiment.arms:
        files = sorted((experiment.score_folder(arm, 0) / "samples" / "samples").glob("*.png"))[:count]
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        rows[textwrap.fill(arm, 16)] = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        labels = [""] * len(files)
    draw_comparison(labels, rows, path, scale=1)


# ---------------------------------------------------------------- program


def heading(argv):
    """When, on what, of which commit, and by which command."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *argv])
    return f"{date.today()}, torch {torch.__version__}, {device}, commit {commit or 'unknown'}: `{command}`"


def describe(experiment):
    """Markdown: what the arms of one prediction type have got."""
    args, reports = experiment.args, experiment.reports()
    floors = {
        "the VAE's reconstructions": next(iter(reports.values()))[0]["reference"]["reconstructions"]["metrics"],
        "training crops": experiment.report(experiment.score_training_crops())["models"][0]["metrics"],
    }
    sizes = f"{args.steps} steps of {args.train_batch_size}, {args.num_samples} samples, {args.seeds} seeds"
    means = "Means over the seeds ± half of the 95 % interval (Student's t)."
    changes = "Changes against l2, seed by seed, in per cent or in nats; bold where the interval is without 0."
    return [
        f"## {experiment.prediction_type}",
        f"{sizes}; distances and neighbours in features of the crops' classifier. {means}",
        scores_table(reports, floors),
        changes,
        changes_table(reports),
        "What the logs say, over the last 30 % of the steps and all blocks.",
        alarms_table(experiment),
    ]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    parts, results = [heading(argv)], {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for prediction_type in args.prediction_types:
        experiment = Experiment(args, prediction_type, ARMS[args.arms])
        experiment.run()
        results[prediction_type] = reports = experiment.reports()
        parts += describe(experiment)
        stem = f"{args.output.stem}-{prediction_type}"
        draw_spectra({arm: reports[arm] for arm in FEW}, args.output.with_name(f"{stem}-spectra.png"))
        draw_samples(experiment, args.output.with_name(f"{stem}-samples.png"))
        parts += [f"![spectra]({stem}-spectra.png)", f"![samples]({stem}-samples.png)"]
    parts += ["## Beside the paper", paper_tables(results)]
    args.output.write_text("\n\n".join(parts) + "\n")
    print(args.output.read_text() + f"\nSee {args.output}.")


def add_run_arguments(parser):
    """What every comparison on these models can be told; None: by size."""
    add = parser.add_argument
    add("--size", choices=DEFAULTS, default="small", help="of the models, and what the flags below default to")
    add("--seeds", type=int, help="repetitions of each arm")
    add("--steps", type=int, help="training steps of each arm")
    add("--num_samples", type=int, help="samples to score of each arm and seed")
    add("--lpl_max_samples", type=int, help="of a batch, how many LPL may decode")
    add("--prediction_types", nargs="+", choices=["epsilon", "v_prediction", "flow_prediction"], help="the denoisers")
    add("--jobs", type=int, default=1, help="how many arms are trained or scored at a time")
    add("--output", type=Path, help="Markdown file, beside which the pictures go")


def complete(args, parser, name):
    """Sets what was not given; name: of the output. A wrong or missing thing ends the program with one sentence."""
    for flag, default in DEFAULTS[args.size].items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, default)
    for flag in ("seeds", "steps", "num_samples", "lpl_max_samples", "jobs"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must be at least 1.")
    for part in ("vae", "classifier", "random"):
        if not (models_of(args.size) / part / "config.json").exists():
            what = "vae" if part == "vae" else "features"
            parser.error(
                f"{models_of(args.size) / part} is missing: make it with `python "
                f"benchmarks/reproduction_models.py {what} --size {args.size}`."
            )
    args.output = args.output or RUNS / args.size / f"{name}.md"
    return args


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--arms", choices=ARMS, default="few", help="how many arms there are")
    return complete(parser.parse_args(argv), parser, "results")


if __name__ == "__main__":
    main()
