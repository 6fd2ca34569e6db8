"""Sets of images and their scores: what `evaluate_lpl.py` and the training scripts' --eval_steps have in common.

Shapes: N images of a set, B of a batch, H x W pixels, D features, R rings of frequency, S subsets (see
`metrics.half_samples`).
"""

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import metrics
from arguments import UserError
from images import IMAGE_ERRORS, image_size, load_image, reason


class Images(Dataset):
    """A set of N images `[3, H, W]`, uint8; `name(i)` says which is which."""

    def stack(self, indices):
        return torch.stack([self[i] for i in indices])


class ImageFiles(Images):
    """Files of one size. Raises UserError if they are of several, or can't be read."""

    def __init__(self, paths, remedy="repair or remove it"):
        self.paths, self.remedy = [str(path) for path in paths], remedy
        sizes = {}
        for path in self.paths:
            try:
                sizes.setdefault(image_size(path), path)
            except IMAGE_ERRORS as error:
                raise self._unreadable(path, error) from error
        if len(sizes) > 1:
            (first, one), (second, other), *_ = ((f"{w} x {h}", path) for (h, w), path in sizes.items())
            raise UserError(
                f"{one} has {first} pixels and {other} {second}: images that are compared must have one size."
            )
        self.size = next(iter(sizes), None)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return to_tensor(load_image(self.paths[index]))
        except IMAGE_ERRORS as error:
            raise self._unreadable(self.paths[index], error) from error

    def _unreadable(self, path, error):
        return UserError(f"{path} can't be read ({reason(error)}): {self.remedy}.")

    def name(self, index):
        return self.paths[index]


class StreamImages(Images):
    """The images of a `TrainingStream`, the first `most`, cropped in the middle as in training.

    Of several samples of one file it has the first: doubles would be each other's nearest neighbours.
    """

    def __init__(self, stream, most=None):
        self.stream, self.indices = stream, range(len(stream.samples))
        if isinstance(stream.samples, list):
            self.indices = np.unique([path for path, _ in stream.samples], return_index=True)[1].tolist()
        self.indices = self.indices[:most]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        try:
            pixels = self.stream.view(self.indices[index], flip=False)["pixel_values"]
        except IMAGE_ERRORS as error:
            raise UserError(f"{self.name(index)} can't be read ({reason(error)}): repair or remove it.") from error
        return torch.from_numpy((pixels * 127.5 + 127.5).round().astype(np.uint8))

    def name(self, index):
        from data_sources import name_of

        return str(name_of(self.stream.samples, self.indices[index]))


class ArrayImages(Images):
    """Those of an array `[N, H, W, 3]`, uint8."""

    def __init__(self, array, path):
        self.array, self.path, self.size = array, path, array.shape[1:3]

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return torch.from_numpy(self.array[index]).permute(2, 0, 1)

    def name(self, index):
        return f"image {index} of {self.path}"


class ListedImages(Images):
    """PIL images in memory: `images[i]`, which each process needs to have only of its share."""

    def __init__(self, images, count):
        self.images, self.count = images, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return to_tensor(self.images[index])

    def name(self, index):
        return f"sample {index}"


def to_tensor(image):
    """An RGB PIL image -> `[3, H, W]`, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# What is measured of each image


@dataclass
class Measured:
    """A set of images as the metrics see it; what was not asked for is missing."""

    features: dict = field(default_factory=dict)  # extractor -> [N, D] float32
    logits: dict = field(default_factory=dict)  # extractor -> [N, classes]
    power: torch.Tensor | None = None  # [N, R], by ring of frequency
    sharpness: torch.Tensor | None = None  # [N]
    clip: torch.Tensor | None = None  # [N], CLIPScore
    moments: dict = field(default_factory=dict)  # extractor -> metrics.Moments, if they are not those of the features

    def __len__(self):
        return len(self.sharpness)


@torch.no_grad()
def measure(accelerator, images, extractors, batch_size, workers=0, clip=None, captions=None, title="Measuring"):
    """`Measured` on the main process, None on others, which all call this and share the work.

    extractors: as `features.load_extractor` gives them; clip: a `features.ClipScorer`, with the images' captions.
    Raises UserError: a file can't be read, or its features are not finite.
    """
    mine = range(len(images))[accelerator.process_index :: accelerator.num_processes]
    generator = torch.Generator()  # else the loader would draw from, and so move, the global one
    loader = DataLoader(Readable(images, mine), batch_size, num_workers=workers, collate_fn=list, generator=generator)
    found, done = [], 0
    for batch in tqdm(loader, title, unit="batch", disable=not accelerator.is_local_main_process):
        for error in (image for image in batch if isinstance(image, UserError)):
            raise error
        pixels = torch.stack(batch)
        indices = mine[done : done + len(pixels)]
        done += len(pixels)
        row = {("power",): metrics.radial_power(pixels.float() / 127.5 - 1)}
        row["sharpness",] = metrics.sharpness(pixels)
        for extractor in extractors:
            out = extractor(pixels)
            check_finite(out.features, indices, images, extractor.name)
            row["features", extractor.name] = out.features
            if out.logits is not None:
                row["logits", extractor.name] = out.logits
        if clip is not None:
            row["clip",] = clip(pixels, [captions[i] for i in indices])
        found.append(row)
    keys = found[0] if found else ()
    gathered = gather_object([(list(mine), {key: torch.cat([row[key] for row in found]) for key in keys})])
    return in_order(gathered) if accelerator.is_main_process else None


class Readable(Dataset):
    """What a worker reads: an image or, as torch would raise a traceback again, the UserError."""

    def __init__(self, images, indices):
        self.images, self.indices = images, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        try:
            return self.images[self.indices[number]]
        except UserError as error:
            return error


def check_finite(features, indices, images, extractor):
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"--feature_extractor {extractor}: its features of {images.name(indices[bad[0]])} are not finite: look at "
            "the image, or name another extractor."
        )


def in_order(gathered):
    """What all processes found, [(indices, {key: values})] -> `Measured`."""
    gathered = [(indices, rows) for indices, rows in gathered if indices]
    order = torch.tensor([i for indices, _ in gathered for i in indices]).argsort()
    measured = Measured()
    for key in gathered[0][1]:
        values = torch.cat([rows[key] for _, rows in gathered])[order]
        if len(key) == 1:
            setattr(measured, key[0], values)
        else:
            getattr(measured, key[0])[key[1]] = values
    return measured


# Scores


def score(measured, reference, reconstructions, subsets, extractors, k=5, device="cpu"):
    """{name of the metric: `[S]` float64}, a value for each subset of the samples; the first is that of all.

    Args:
        measured, reference: `Measured`; the reference may be statistics alone.
        reconstructions: those of the reference by the VAE, or None.
        extractors: their names; metrics of the first have no suffix.
        k: of the nearest neighbours.

    Raises UserError: there are too few images for a metric.
    """
    scores = {}
    try:
        for i, name in enumerate(extractors):
            suffix = f"_{name}" if i else ""
            scores |= feature_scores(measured, reference, name, suffix, subsets, k, device)
            if reconstructions is not None:
                distances = feature_scores(measured, reconstructions, name, suffix, subsets, None, device)
                scores |= {with_infix(key, suffix): values for key, values in distances.items()}
            if name in measured.logits:
                scores["inception_score"] = metrics.inception_scores(measured.logits[name], subsets)
    except ValueError as error:
        raise UserError(f"{error} Give more images, or lower --k.") from error
    if measured.clip is not None:
        scores["clip_score"] = metrics.mean_values(measured.clip, subsets)
    for kind, others in (("", reference), ("_reconstructed", reconstructions)):
        if others is not None and others.power is not None:
            errors = metrics.spectrum_errors(measured.power, log_power(others), subsets)
            scores |= {with_infix(name, "", kind): values for name, values in errors.items()}
    scores["sharpness"] = metrics.mean_values(measured.sharpness, subsets)
    return scores


def feature_scores(measured, reference, name, suffix, subsets, k, device):
    features, scores = measured.features[name], {}
    moments = moments_of(reference, name)
    if moments is not None:
        scores[f"frechet_distance{suffix}"] = metrics.frechet_distances(features, moments, subsets, device)
    if name in reference.features:
        others = reference.features[name]
        scores[f"kernel_distance{suffix}"] = metrics.kernel_distances(features, others, subsets, device)
        if k is not None:
            neighbours = metrics.precision_recall_density_coverage(features, others, subsets, k, device)
            scores |= {f"{metric}{suffix}": values for metric, values in neighbours.items()}
    return scores


def moments_of(measured, extractor):
    """The reference's statistics: those that came with it, or those of its features."""
    if extractor in measured.features and extractor not in measured.moments:
        measured.moments[extractor] = metrics.moments(measured.features[extractor])
    return measured.moments.get(extractor)


def with_infix(name, suffix, infix="_reconstructed"):
    """`frechet_distance_dinov2` -> `frechet_distance_reconstructed_dinov2`; bands come after the infix, too."""
    if suffix:
        return name.removesuffix(suffix) + infix + suffix
    return name.replace("spectrum_error", f"spectrum_error{infix}") if "spectrum" in name else name + infix


def log_power(measured):
    """`[R]` in nats, of the whole set."""
    return metrics.log_of_power(measured.power.mean(dim=0))


# Statistics in ADM's format


STATISTICS = ("extractor", "weights_hash", "count")  # which its own files do not have


def read_statistics(path, extractors):
    """An .npz of the ADM evaluator (Dhariwal & Nichol 2021): `mu`, `sigma` and images `arr_0`; what there is of both.

    The file says whose features they are if `write_statistics` wrote it, else they are Inception's.
    Returns {extractor: Moments}, the hash of its weights or None, and the images or None. Raises UserError.
    """
    try:
        with np.load(path) as file:
            values = {name: file[name] for name in (*STATISTICS, "mu", "sigma", "arr_0") if name in file}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:  # np.load may give an array
        raise UserError(f"--reference {path} can't be read as statistics or images ({reason(error)}).") from error
    images = ArrayImages(values["arr_0"], path) if "arr_0" in values else None
    if images is not None and (images.array.ndim != 4 or images.array.dtype != np.uint8 or images.array.shape[3] != 3):
        raise UserError(f"--reference {path}: arr_0 must be images [N, H, W, 3], uint8.")
    if images is None and not {"mu", "sigma"} <= values.keys():
        raise UserError(f"--reference {path} has neither mu and sigma nor images arr_0.")
    moments = {}
    if {"mu", "sigma"} <= values.keys():
        mean, covariance = (torch.from_numpy(np.asarray(values[name], np.float64)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"--reference {path}: mu and sigma must be [D] and [D, D].")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"--reference {path}: mu and sigma are not finite.")
        name = str(values["extractor"]) if "extractor" in values else "inception"
        count = int(values["count"]) if "count" in values else None
        if name in extractors:
            moments[name] = metrics.Moments(mean, covariance, count)
        elif images is None:
            raise UserError(
                f"--reference {path} holds statistics of {name}, and --feature_extractor is {', '.join(extractors)}: "
                f"add {name}, or give images."
            )
    return moments, str(values["weights_hash"]) if "weights_hash" in values else None, images


def write_statistics(path, moments, extractor):
    """What `read_statistics` reads, and other evaluators of the Frechet distance do; extractor: that of `features`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    mean, covariance = moments.mean.numpy(), moments.covariance.numpy()
    whose = {"extractor": extractor.name, "weights_hash": extractor.settings["weights_hash"]}
    np.savez(temporary, mu=mean, sigma=covariance, count=moments.count, **whose)
    os.replace(temporary, path)
