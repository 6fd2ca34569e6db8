"""What `evaluate_lpl.py` compares: the real images, the samples of each model and setting, and the report on them."""

import hashlib
import itertools
import os
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import metrics
from arguments import UserError, as_flags, check_unused
from captions import draw_text
from data_sources import caption_of, files_identity, image_bytes, image_sizes, labels_of
from data_utils import open_samples
from disk_cache import weights_hash
from evaluation import ImageFiles, StreamImages, log_power, moments_of, read_statistics, score
from evaluation_report import paper_numbers
from features import CLIP, short_name
from images import images_in
from model_checks import public_name
from sampling import all_agree, describe, draw_samples, reconstruct, sample_name


LEVEL = 0.95
ADM_SAMPLES = 50_000  # if there are no images to count


class Reference:
    """The real images, and what is to be drawn: their captions or labels."""

    def __init__(self, args, models):
        self.name, self.images, self.stream = args.reference, None, None
        self.image_column, self.numbered = args.image_column, False
        self.moments, self.weights = {}, None  # statistics that came with the images, of a network with these weights
        if args.reference_kind == "npz":
            short = [short_name(name) for name in args.feature_extractor]
            self.moments, self.weights, self.images = read_statistics(args.reference, short)
            if self.images is not None and self.images.size != (args.resolution, args.resolution):
                height, width = self.images.size
                raise UserError(
                    f"--reference {args.reference} has images of {width} x {height} pixels, and the samples have "
                    f"{args.resolution}: give the --resolution of the reference, or another one."
                )
            return
        flags = dict.fromkeys(("train_data_dir", "dataset_name", "train_shards"), "reference")
        with as_flags(**flags, max_train_samples="max_reference_samples"):
            self.stream, self.numbered = open_stream(args, models)
        self.images = StreamImages(self.stream)

    def prompts(self, args, models):
        """Captions or class labels of the samples: those of the images, in an order drawn with the seed."""
        rng = np.random.default_rng([args.seed, 7])
        num_classes = models[0].num_classes
        count = args.num_samples or (ADM_SAMPLES if self.images is None else len(self.images))
        if self.stream is None:
            if num_classes is None:
                raise UserError(f"--reference {args.reference} has no captions to draw: give images with captions.")
            rounds = range(-(-count // num_classes))  # more samples leave the first ones as they are
            return np.concatenate([rng.permutation(num_classes) for _ in rounds])[:count].tolist()
        order = rng.permutation(len(self.stream.samples))
        captions = (caption_of(self.stream.samples, int(order[i % len(order)])) for i in range(count))
        return [int(c) if num_classes is not None else draw_text(c, rng) for c in captions]

    def smaller_than(self, resolution):
        """How many of the images had to be enlarged."""
        if self.stream is None:
            return 0
        sizes = image_sizes(self.stream.samples)
        return sum(min(sizes[i]) < resolution for i in self.images.indices)

    def check(self, extractors):
        """Raises UserError if statistics that came with the images are of other features than these networks'."""
        for extractor in extractors:
            given, dim = self.moments.get(extractor.name), extractor.settings["dim"]
            if given is None:
                continue
            if len(given.mean) != dim or self.weights not in (None, extractor.settings["weights_hash"]):
                what = (
                    f"of {len(given.mean)} features" if len(given.mean) != dim else "by a network with other weights"
                )
                raise UserError(
                    f"--reference {self.name}: its statistics are {what}, and {extractor.name} gives {dim}: name the "
                    "network that they are from with --feature_extractor."
                )

    def prompts_hash(self):
        """What decides on the prompts besides the seed; not how many of them are drawn."""
        captions = list(labels_of(self.stream.samples)) if self.stream else None
        return hashlib.sha256(repr(captions).encode()).hexdigest()[:32]

    def identity(self):
        """A hash of all that reconstructions of the images depend on."""
        if self.stream is None:
            return hashlib.sha256(np.ascontiguousarray(self.images.array)).hexdigest()
        samples, digest = self.stream.samples, hashlib.sha256(str(self.image_column).encode())
        files = files_identity(samples)
        for part in [files.encode()] if files else (image_bytes(samples, i) for i in range(len(samples))):
            digest.update(part)
        return digest.hexdigest()


def open_stream(args, models):
    """The reference as the training scripts read their data; images to compare --samples with need no captions.

    Returns the `TrainingStream`, and whether its classes have names of which no model knows the numbers.
    """
    labels = bool(models) and models[0].num_classes is not None
    if labels or args.samples:
        check_unused(args, ["--caption_column", "--instance_prompt"], "classes" if labels else "--samples")
    if not labels:
        check_unused(args, ["--label_column"], "captions" if models else "--samples")
    source = {"train_data_dir": None, "dataset_name": None, "train_shards": None}
    source[args.reference_kind] = [args.reference] if args.reference_kind == "train_shards" else args.reference
    kept = "image_column caption_column label_column dataset_config_name cache_dir max_bad_images seed resolution"
    source |= {flag: getattr(args, flag) for flag in kept.split()}
    absent = "samples validation_prompts caption_weights trigger_word buckets".split()
    known = {label: names for model in models for label, names in model.id2label.items()}  # they agree
    flags = Namespace(
        **source,
        **dict.fromkeys(absent),
        dataset_split=args.reference_split,
        num_classes=models[0].num_classes if models else None,
        id2label=dict(known),
        instance_prompt="" if args.samples else args.instance_prompt,
        max_train_samples=args.max_reference_samples,
        center_crop=True,
        random_flip=False,
        image_interpolation_mode="lanczos",
        proportion_empty_prompts=0.0,
        train_batch_size=args.batch_size,
    )
    stream = open_samples(flags)
    classes = flags.id2label.items()  # with those of the data
    strange = [names for label, names in classes if known.get(label) != names and not names.isdecimal()]
    if known and strange:
        raise UserError(
            f"--reference {args.reference}: the models have no class {strange[0]}; call its classes as they do, such "
            f"as {next(iter(known.values()))}, or by their numbers."
        )
    return stream, bool(strange)


class SampleSet(NamedTuple):
    """The samples of one model in one setting."""

    name: str
    model: str  # its name without the setting
    images: ImageFiles
    vae: str | None = None  # whose reconstructions are its own
    facts: dict = {}  # for the report

    @property
    def setting(self):
        return self.name.removeprefix(self.model)


def open_folders(args):
    """The images of --samples: as many of each, of one size, which becomes --resolution."""
    folders = [images_in(folder) for folder in args.samples]
    for folder, paths in zip(args.samples, folders):
        if args.num_samples is None and len(paths) != len(folders[0]):
            raise UserError(
                f"--samples {folder} has {len(paths)} images and {args.samples[0]} {len(folders[0])}: say with "
                "--num_samples how many of each to compare."
            )
        if len(paths) < (args.num_samples or 0):
            raise UserError(
                f"--samples {folder} has {len(paths)} images, fewer than --num_samples {args.num_samples}."
            )
    folders = [ImageFiles(paths[: args.num_samples]) for paths in folders]
    ImageFiles([folder.paths[0] for folder in folders])  # are they of one size?
    height, width = folders[0].size
    if height != width:
        raise UserError(f"--samples {args.samples[0]}: images of {width} x {height} pixels; they must be squares.")
    args.resolution = height
    facts = [{"samples": os.path.relpath(folder, args.output_dir)} for folder in args.samples]
    return [SampleSet(name, name, images, facts=f) for name, images, f in zip(args.names, folders, facts)]


def check_counts(args, count, reference):
    """Enough images for the metrics, before samples are drawn. Raises UserError."""
    least = 4 if reference.images is None else 2 * (args.k + 1)
    if count < least:
        what = f"precision, recall, density and coverage with --k {args.k}" if least > 4 else "the Fréchet distance"
        given = "--samples are" if args.samples else "--num_samples"
        raise UserError(f"{given} {count}, and {what} needs at least {least}, for the intervals: give more.")
    if reference.images is not None and len(reference.images) <= args.k:
        raise UserError(
            f"--reference {args.reference} has {len(reference.images)} images, and --k {args.k} needs at least "
            f"{args.k + 1}: give more, or lower --k."
        )


def wants_clip(args, models):
    """Whether there is to be a CLIPScore: for models that read text. Sets the default of --clip_model."""
    if models and models[0].num_classes is not None:
        check_unused(args, ["--clip_model"], "classes")
        return False
    if models and args.clip_model is None and "--feature_extractor" not in args.given_flags:
        args.clip_model = CLIP
    return args.clip_model is not None


def prompts_in(images):
    """What PNGs say that they were drawn for, as those of this program do. Raises UserError."""
    prompts = []
    for path in images.paths:
        with Image.open(path) as image:
            prompts.append(image.info.get("prompt"))
        if prompts[-1] is None:
            raise UserError(f"--clip_model: {path} has no text `prompt` as samples drawn here have: leave it out.")
    return prompts


def draw_set(accelerator, args, model, pipe, facts, setting, prompts):
    """The samples of a model in a setting, (steps, guidance scale), drawn by all processes.

    facts: what the samples depend on besides: `sampler`, and hashes.
    """
    steps, scale = setting
    words = [model.name]
    words += [f"{steps} steps"] if len(args.num_inference_steps) > 1 else []
    words += [f"guidance {scale:g}"] if len(args.guidance_scale or ()) > 1 else []
    name = ", ".join(words)
    folder = Path(args.output_dir, "samples", name.replace(", ", "_").replace(" ", "-"))
    settings = {
        "precision": accelerator.mixed_precision,
        **facts,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "guidance_rescale": args.guidance_rescale,
        "resolution": args.resolution,
        "seed": args.seed,
    }
    draw_samples(accelerator, pipe, model.family, prompts, folder, settings, args)
    paths = [folder / sample_name(i, args.seed) for i in range(len(prompts))]
    facts = {
        **describe(pipe, model.family, facts["sampler"], scale),
        "source": public_name(model.lora or model.source),
        "weights_hash": facts["weights"],
        "num_inference_steps": steps,
        "samples": folder.relative_to(args.output_dir).as_posix(),
    }
    return SampleSet(
        name, model.name, ImageFiles(paths, "remove it, and the same command draws it again"), facts=facts
    )


def reconstruct_reference(accelerator, args, vae, reference, rebuilt):
    """What a VAE makes of the real images goes to `rebuilt`, {VAE's hash: images}; returns that hash, or None."""
    if reference.images is None:
        return None
    name = all_agree(weights_hash(vae)[:12] if accelerator.is_main_process else None)
    if name not in rebuilt:
        folder = Path(args.output_dir, "reconstructions", name)
        settings = {"vae": name, "reference": reference.identity(), "resolution": args.resolution}
        paths = reconstruct(accelerator, vae, reference.images, folder, settings, args.batch_size)
        rebuilt[name] = ImageFiles(paths, "remove it, and the same command makes it again")
    return name


# The report


class Scored(NamedTuple):
    """What remains of a set when its features are gone."""

    values: dict  # metric -> [S]
    spectrum: dict


def score_set(args, measured, real, floor, device):
    """`Scored`, of the `evaluation.Measured` of a set, the reference and its reconstructions (or None)."""
    count, names = len(measured), [short_name(name) for name in args.feature_extractor]
    subsets = metrics.half_samples(count, args.half_samples, args.seed)
    values = score(measured, real, floor, subsets, names, args.k, device)
    curve = spectrum(measured)
    if real.power is not None:
        errors = metrics.spectrum_differences(measured.power, log_power(real), subsets)
        reach = [metrics.interval(ring, count, LEVEL) for ring in errors.T]
        curve |= {"error": errors[0].tolist(), "low": [low for low, _ in reach], "high": [high for _, high in reach]}
    return Scored(values, curve)


def make_report(args, reference, sets, scored, real, floors, networks):
    """All that `evaluation_report` shows.

    Args:
        sets: `SampleSet`s, every two of which are compared if their setting is the same. scored: name -> `Scored`.
        real: `evaluation.Measured` of the reference. floors: VAE's hash -> that of its reconstructions.
        networks: (feature extractors, CLIP scorer or None).
    """
    extractors, clip = networks
    settings = settings_of(args, sets, real, extractors, clip)
    models = [entry(s, scored[s.name]) for s in sets]
    rebuilt = None
    if floors:
        floor = next(iter(floors.values()))
        everything = torch.ones(1, len(floor), dtype=torch.bool)
        found = score(floor, real, None, everything, [extractor.name for extractor in extractors], args.k)
        rebuilt = {"metrics": first(found), "spectrum": spectrum(floor)}
    own = {"sharpness": real.sharpness.mean().item()} if real.sharpness is not None else {}
    return {
        "settings": settings,
        "models": models,
        "reference": {"metrics": own, "spectrum": spectrum(real), "reconstructions": rebuilt},
        "differences": differences(sets, scored),
        "notes": notes(args, reference, sets, real, floors, extractors),
        "paper": paper_numbers(settings, models),
    }


def entry(s, scored):
    """One model in one setting. There is no interval where all halves agree: they say nothing then."""
    count, values = len(s.images), scored.values
    found = {name: metrics.interval(values[name], count, LEVEL) for name in values}
    intervals = {name: possible(name, interval) for name, interval in found.items() if interval[0] < interval[1]}
    facts = {"name": s.name, "model": s.model, "num_samples": count, **s.facts}
    return {**facts, "metrics": first(values), "intervals": intervals, "spectrum": scored.spectrum}


def possible(metric, interval):
    """The part of an interval, [low, high], that a metric can take."""
    shares = ("precision", "recall", "coverage")
    least = 0.0 if metric.startswith((*shares, "frechet", "density", "sharpness")) else -np.inf
    most = 1.0 if metric.startswith(shares) else np.inf
    return [min(max(end, least), most) for end in interval]


def first(values):
    """Of all samples, name -> number."""
    return {name: found[0].item() for name, found in values.items()}


def spectrum(measured):
    """A set's radial log power, if it has images."""
    if measured.power is None:
        return None
    power = log_power(measured)
    return {"frequency": metrics.ring_frequencies(len(power)).tolist(), "log_power": power.tolist()}


def differences(sets, scored):
    """Of every two models in the same setting, the later one's from the earlier one's."""
    found = []
    for first, second in itertools.combinations(sets, 2):
        if first.setting == second.setting:
            ours, theirs = scored[first.name].values, scored[second.name].values
            shared = [name for name in ours if name in theirs]
            if first.vae != second.vae:  # whose reconstructions are different references
                shared = [name for name in shared if "_reconstructed" not in name]
            compared = {
                name: metrics.difference(ours[name], theirs[name], len(first.images), LEVEL) for name in shared
            }
            found.append({"models": [first.name, second.name], "metrics": compared})
    return found


def settings_of(args, sets, real, extractors, clip):
    """All that the numbers depend on."""
    drawn = {}  # as it was, also where the flags leave it to the pipeline
    for name in "sampler timestep_spacing prediction_type num_inference_steps guidance_scale".split():
        found = list(dict.fromkeys(s.facts[name] for s in sets if s.facts.get(name) is not None))
        drawn |= {name: found[0] if len(found) == 1 else found} if found else {}
    flags = "reference_is resolution k half_samples seed".split()
    flags += [] if args.samples else "guidance_rescale weights".split()
    return {
        "reference": public_name(args.reference),
        "reference_images": "shorter side resized to the resolution by Lanczos, centre crop",
        "num_samples": len(sets[0].images),
        "num_reference_samples": None if real.sharpness is None else len(real),
        **drawn,
        **{name: getattr(args, name) for name in flags},
        "level": LEVEL,
        "feature_extractors": [extractor.settings for extractor in extractors],
        "clip_model": clip and clip.settings,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "Pillow", "numpy")},
        "command": args.command,
    }


def notes(args, reference, sets, real, floors, extractors):
    """What to keep in mind with these numbers."""
    count, said = len(sets[0].images), []
    for extractor in extractors:
        moments = moments_of(real, extractor.name)
        dim = len(moments.mean) if moments else 0
        if count <= dim:
            said.append(
                f"{count} samples are fewer than the {dim} features of {extractor.name}: its Fréchet distances are "
                "far too high; compare them with each other alone, and look at the kernel distances."
            )
    features = next(iter(real.features.values()), None)
    doubles = 0 if features is None else len(features) - len(features.unique(dim=0))
    if doubles:
        said.append(
            f"{doubles} of the {len(real)} reference images are doubles: they are each other's nearest neighbours, so "
            "that precision, density and coverage are too low."
        )
    small = reference.smaller_than(args.resolution)
    if small:
        said.append(
            f"{small} of the {len(real)} reference images are smaller than {args.resolution} pixels, and enlarged: "
            "spectra and sharpness are those of blurred images."
        )
    if len(floors) > 1:
        said.append(
            "The models have different VAEs: each one's distances to reconstructions are to those of its own and are "
            "not compared; what is shown as the floor is of the first."
        )
    if reference.numbered:
        said.append("No model has names for its classes: those of the reference are numbered in the order of theirs.")
    if args.samples and len(sets) > 1:
        pairs = zip(*([Path(path).stem for path in s.images.paths] for s in sets))
        differ = next((names for names in pairs if len(set(names)) > 1), None)
        said.append(
            "That the images are pairs, of the same noise and prompt, is taken from the order of their names"
            + (f", which differ: {' is compared with '.join(differ)}." if differ else ".")
        )
    return said
