"""The samples of a run as an endless and reproducible stream of training samples, and its batches.

Everything about a training sample is a function of (seed, position). Positions 0, 1, 2, ... run through shuffled
epochs laid end to end: position p is sample `permutation(seed, p // N)[p % N]`, and its crop, flip and caption are
drawn from generators seeded with p. So the order does not depend on the number of workers, a resumed run needs only
the position at which to go on, and two processes with batch size B see what one process with 2B sees. (With buckets
the order is that of `buckets.BucketOrder`, a function of B as well; of a streamed dataset see `streaming.py`.)

    make_stream         what the data flags describe
    TrainingStream      position -> training sample
    cache_latents       encode every image once and let the stream give latents
    build_dataloader    the batches of one rank, from a start position on

Shapes: B batch, H x W the size that images are cropped to, --resolution squared or a bucket's. Torch is imported where
it is needed: data is read and checked before that.
"""

import itertools
import logging
import math
import os
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np

import interruption
from arguments import UserError, as_flags
from buckets import BucketOrder, nearest_bucket
from captions import all_texts, draw_text, with_trigger_word
from data_sources import (
    caption_of,
    check_images,
    check_labels,
    image_sizes,
    labels_of,
    limit_samples,
    listed,
    name_of,
    read_class_folder,
    read_hub_dataset,
    read_image_folder,
    read_shards,
    scan_folder,
    select,
    too_many_bad_images,
)
from images import IMAGE_ERRORS, load_image, reason, transform
from model_checks import class_ids, label_of


logger = logging.getLogger(__name__)

# Every kind of random decision has its own generators: more caption dropout leaves all crops as they were.
EPOCH_ORDER, CROP_AND_FLIP, CAPTION, BUCKET_ORDER, BLOCK_ORDER, HELD_OUT = range(6)
# Where the positions of images of the class, and of those held out, begin, far from all others.
PRIOR_POSITION, HELD_OUT_POSITION = 2**40, 2**41


@lru_cache(maxsize=2)  # a batch may need the end of one epoch and the beginning of the next
def _permutation(seed, epoch, num_samples):
    return np.random.default_rng([seed, EPOCH_ORDER, epoch]).permutation(num_samples)


def _bucket_permutation(seed, key, epoch, n):
    return np.random.default_rng([seed, BUCKET_ORDER, key, epoch]).permutation(n)


@dataclass
class TrainingStream:
    """An endless map from position to training sample; see the top of this file.

    An image that has become unreadable since it was checked is replaced by the next one of the epoch, with a warning;
    `UserError` is raised once this process has met more than `max_bad_images`, those in `bad` included.
    """

    samples: object  # sequence of (image, caption)
    seed: int
    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    proportion_empty_prompts: float = 0.0
    trigger_word: str | None = None
    max_bad_images: int = 0
    found: int | None = None  # how many samples there were before --max_train_samples
    bad: dict = field(default_factory=dict)  # {name: reason}, as returned by check_images; grows
    buckets: list | None = None  # (height, width) that images are cropped to, the nearest to their shape
    batch_size: int = 1  # of a rank; with buckets the order depends on it
    cache: object | None = None  # index, flip -> the sample as `cache_latents` has encoded it
    embeddings: object | None = None  # caption -> its embeddings, if they are cached on the disk
    prior: object | None = None  # the stream of images of the class, for prior preservation
    held_out: object | None = None  # the stream of images that are not trained on, for --eval_steps

    def __post_init__(self):
        if not len(self.samples):
            raise UserError("there is no image to train on; check --train_data_dir or --dataset_name.")
        self.order = None
        if self.buckets:
            self.bucket_of = nearest_bucket(image_sizes(self.samples), self.buckets)
            self.order = BucketOrder(self.bucket_of, self.batch_size, partial(_bucket_permutation, self.seed))

    @property
    def num_samples(self):
        """N, the samples of an epoch."""
        return len(self.samples)

    @property
    def allowed_bad_images(self):
        return self.max_bad_images

    def state(self, position, world_size):
        """What a rank needs besides the position to go on from a checkpoint."""
        return {"found": self.found}

    def load_state(self, state):
        """What `state` returned. Raises `UserError` if the order can't be that of the run any more."""
        if state["found"] != self.found:
            raise UserError(
                f"--resume_from_checkpoint: there were {state['found']} images to draw --max_train_samples from, now "
                f"there are {self.found}; give it the same data, or start a new run."
            )

    def index(self, position):
        """The index in `samples` of the sample at a position."""
        return next(self._indices(position))

    def _indices(self, position):
        """The index of the sample at a position, and then of those that take its place if it can't be read."""
        if self.order is not None:
            bucket, place = self.order.batch(position // self.batch_size)
            place += position % self.batch_size
            for offset in range(len(self.order.members[bucket])):
                yield self.order.sample(bucket, place + offset)
        else:
            epoch, step = divmod(position, self.num_samples)
            for offset in range(self.num_samples):
                yield int(_permutation(self.seed, epoch, self.num_samples)[(step + offset) % self.num_samples])

    def __getitem__(self, position):
        """The training sample at a position; see `sample`."""
        rng = np.random.default_rng([self.seed, CROP_AND_FLIP, position])
        flip = self.random_flip and rng.random() < 0.5
        indices = self._indices(position)
        candidates = ((partial(name_of, self.samples, i), partial(self._load, i, flip, rng)) for i in indices)
        return self.sample(position, candidates)

    def items(self, rank, world_size, batch_size, start_position):
        """Endless: what `batch` needs to know of each of a rank's batches, here the position where it begins."""
        if self.order is not None:
            start_position += -start_position % batch_size  # nor may a run resumed with another batch size mix buckets
        return itertools.count(start_position + rank * batch_size, world_size * batch_size)

    def batch(self, item, batch_size):
        """The training samples of a batch."""
        return [self[position] for position in range(item, item + batch_size)]

    def sample(self, position, candidates):
        """The first of the candidates, (its name, how to load it) each a function, that can be read.

        Returns what `transform` does, or of a cached sample `posterior` `[2 C, h, w]` for `pixel_values`; caption;
        position; and bad, {name: reason} of the images passed over.
        """
        bad = {}
        for name, load in candidates:
            try:
                view, caption = load()
                break
            except IMAGE_ERRORS as error:
                bad[name()] = reason(error)
                self.note_bad(bad)
        else:
            raise too_many_bad_images(self.bad, self.allowed_bad_images)
        rng = np.random.default_rng([self.seed, CAPTION, position])
        caption = "" if rng.random() < self.proportion_empty_prompts else draw_text(caption, rng)
        return {**view, "caption": with_trigger_word(caption, self.trigger_word), "position": position, "bad": bad}

    def _load(self, index, flip, rng):
        """View and caption of a sample. Raises one of `IMAGE_ERRORS`."""
        if self.cache is None:
            image, caption = self.samples[index]
            return self.view(index, flip, rng, image), caption
        return self.cache(index, flip), caption_of(self.samples, index)

    def size_of(self, index):
        """The size (height, width) that a sample is cropped to."""
        return (self.resolution,) * 2 if self.order is None else self.buckets[self.bucket_of[index]]

    def view(self, index, flip, rng=None, image=None):
        """A sample as `transform` gives it. Raises one of `IMAGE_ERRORS`."""
        image = load_image(self.samples[index][0] if image is None else image)
        return transform(image, self.size_of(index), self.center_crop, flip, self.image_interpolation_mode, rng)

    def note_bad(self, bad):
        """Counts unreadable images, {name: reason}, each once; raises `UserError` if they are too many now."""
        new = {name: reason for name, reason in bad.items() if name not in self.bad}
        self.bad.update(new)
        if len(self.bad) > self.allowed_bad_images:
            raise too_many_bad_images(self.bad, self.allowed_bad_images)
        from torch.utils.data import get_worker_info

        if new and get_worker_info() is None:  # the main process tells, once, what a worker has found
            logger.warning(f"not readable, so that the next image takes its place: {listed(new)}.")


def cache_latents(stream, encode, share_work):
    """Encode every image once, as it is and (with random_flip) mirrored; from then on the stream gives latents.

    What is kept are the parameters of the posterior, on the CPU, so that training draws new latents at every step.

    Args:
        stream: a `TrainingStream` with center_crop, since one crop is kept.
        encode: pixels `[1, 3, H, W]` -> parameters `[1, 2 C, h, w]`.
        share_work: see `train_utils`.

    Raises `UserError`: a latent is not finite, or more images than `max_bad_images` can't be read.
    """
    import torch

    def entry(index):
        try:
            views = [stream.view(index, flip) for flip in ((False, True) if stream.random_flip else (False,))]
        except IMAGE_ERRORS as error:
            return {"error": reason(error)}
        posterior = [encode(torch.from_numpy(view.pop("pixel_values"))[None])[0].cpu() for view in views]
        return {**views[0], "posterior": posterior}  # mirrored or not, the middle is at the same place

    cache = share_work(range(len(stream.samples)), entry, "Caching latents")
    stream.note_bad({name_of(stream.samples, i): entry["error"] for i, entry in enumerate(cache) if "error" in entry})
    for index, entry in enumerate(cache):
        if not all(posterior.isfinite().all() for posterior in entry.get("posterior", ())):
            raise not_finite(name_of(stream.samples, index))
    stream.cache = _InMemory(cache)


@dataclass
class _InMemory:
    entries: list

    def __call__(self, index, flip):
        entry = self.entries[index]
        if "error" in entry:
            raise OSError(entry["error"])
        return {**entry, "posterior": entry["posterior"][int(flip)]}


def not_finite(name):
    return UserError(
        f"the VAE's latents of {name} are not finite: use --vae_dtype fp32 or bf16, or another VAE with "
        "--pretrained_vae_model_name_or_path."
    )


def all_captions(stream):
    """Every caption, or class label, that the stream can give."""
    captions = {""} if stream.proportion_empty_prompts else set()
    for other in filter(None, (stream.prior, stream.held_out)):
        captions |= all_captions(other)
    for caption in labels_of(stream.samples):
        if caption is not None:  # of an image that will be found to have none
            captions |= {with_trigger_word(text, stream.trigger_word) for text in all_texts(caption)}
    return captions


@dataclass
class _Batches:
    """What a DataLoader worker runs: from an item of the stream to its batch.

    A `UserError` is returned, not raised: torch would raise it again with the worker's traceback as its message.
    """

    stream: TrainingStream
    batch_size: int

    def __getitem__(self, item):
        import torch

        stream, more = self.stream, {}
        try:
            samples = stream.batch(item, self.batch_size)
            if stream.prior is not None:
                samples += [stream.prior[PRIOR_POSITION + sample["position"]] for sample in samples]
                more["num_instances"] = self.batch_size
            if stream.embeddings is not None:
                more["embeddings"] = [stream.embeddings[sample["caption"]] for sample in samples]
        except UserError as error:
            return error
        if stream.cache is None:
            images = {"pixel_values": torch.from_numpy(np.stack([sample["pixel_values"] for sample in samples]))}
        else:
            images = {"posteriors": torch.stack([sample["posterior"] for sample in samples])}
        return {
            **images,
            "captions": [sample["caption"] for sample in samples],
            "positions": torch.tensor([sample["position"] for sample in samples]),
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "crop_top_lefts": torch.tensor([sample["crop_top_left"] for sample in samples]),
            "target_sizes": torch.tensor([sample["target_size"] for sample in samples]),
            "bad": {name: reason for sample in samples for name, reason in sample["bad"].items()},
            **more,
        }


def build_dataloader(stream, batch_size, rank=0, world_size=1, start_position=0, num_workers=0):
    """Yields one rank's batches without end; not to be passed through `accelerator.prepare`.

    The k-th global batch is the positions from `start_position + k * world_size * batch_size` on, and rank r takes its
    r-th `batch_size`. To resume, start at the number of samples that all ranks together have consumed.

    A batch is a dict: pixel_values, float32 `[B, 3, H, W]` in [-1, 1], pinned if CUDA is there, or if they are cached
    posteriors `[B, 2 C, h, w]`; captions, a list of B strings, or of class labels and "" where the label is dropped;
    positions, int64 `[B]`; original_sizes and target_sizes (height, width), before resizing and after the crop, and
    crop_top_lefts (top, left), int64 `[B, 2]`. With `stream.embeddings`: embeddings, a list of those of the captions.
    With `stream.prior` as many images of the class follow, and num_instances says after how many.
    """
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _Batches(stream, batch_size),
        batch_size=None,  # an item is a whole batch already
        sampler=stream.items(rank, world_size, batch_size, start_position),
        num_workers=num_workers,
        worker_init_fn=interruption.ignore,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from, and so move, the global generator
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        stream.note_bad(batch.pop("bad"))  # this process counts what all its workers find
        yield batch


def read_data(args):
    """The samples of --train_data_dir or --train_shards, and {name: reason} of what is bad; see `check_images`.

    Adds to `args.id2label` of class labels.
    """
    captions = (args.caption_column, args.instance_prompt, args.caption_weights)
    if args.train_shards:
        label_column = (args.label_column or "cls") if args.num_classes is not None else None
        samples, bad = read_shards(args.train_shards, args.image_column, *captions, label_column, args.cache_dir)
        if label_column is not None:
            _add_classes(args, samples, {})
        if args.max_bad_images is None:
            lost = {path: bad[path] for path in samples.paths if path in bad}
            missing = sum(not os.path.exists(path) for path in lost)  # a mistake in the flag, rather
            if missing > samples.num_shards // 100 or len(lost) > math.ceil(samples.num_shards / 100):
                raise UserError(
                    f"{len(lost)} of the {samples.num_shards} shards can't be read, at least not to their end: "
                    f"{listed(lost)}; repair or remove them, or allow for that many with --max_bad_images."
                )
            args.max_bad_images = math.ceil(len(samples) / 100)
        if len(bad) > args.max_bad_images:
            raise too_many_bad_images(bad, args.max_bad_images)
        if bad:
            logger.warning(f"{len(bad)} of the images or shards cannot be read and are left out: {listed(bad)}.")
        return samples, bad
    if args.num_classes is None:
        samples = read_image_folder(args.train_data_dir, args.image_column, *captions)
    else:
        columns = (args.image_column, args.label_column)
        samples, names = read_class_folder(args.train_data_dir, *columns, class_ids=class_ids(args))
        _add_classes(args, samples, names)
    return check_images(samples, args.max_bad_images or 0)


def _add_classes(args, samples, names):
    """Adds {label: name} to the model's, which keeps all its names for a class that it knows."""
    check_labels(samples, args.num_classes)
    known = class_ids(args)
    args.id2label |= {label: name for label, name in names.items() if name not in known}


def make_stream(args):
    """The stream that the data flags describe, and in `held_out` that of --eval_steps, if there is one.

    Files were mostly read and checked with the flags already.
    """
    if args.streaming:
        from streaming import open_stream

        stream = open_stream(args)
    else:
        stream = open_samples(args)
    if args.eval_data_dir is not None:
        with as_flags(train_data_dir="eval_data_dir"):
            other = {"train_data_dir": args.eval_data_dir, "dataset_name": None, "train_shards": None}
            other |= {"samples": None, "max_train_samples": None, "max_bad_images": None}
            stream.held_out = unchanging(open_samples(Namespace(**{**vars(args), **other})))
    elif args.eval_steps:
        hold_out(stream, args.eval_share)
    return stream


def hold_out(stream, share):
    """Moves a share of the images, drawn with the seed, at least one, to the stream `held_out`."""
    samples, image_of = stream.samples, np.arange(stream.num_samples)
    if isinstance(samples, list):  # several may be of the same image
        image_of = np.unique([path for path, _ in samples], return_inverse=True)[1]
    num_images = image_of.max() + 1
    count = max(1, round(share * num_images))
    if count >= num_images:
        raise UserError(f"--eval_share {share} of {num_images} images leaves none to train on: add images.")
    chosen = np.random.default_rng([stream.seed, HELD_OUT]).permutation(num_images)[:count]
    is_held_out = np.isin(image_of, chosen)
    stream.held_out = unchanging(replace(stream, samples=select(samples, np.flatnonzero(is_held_out)), bad={}))
    stream.samples = select(samples, np.flatnonzero(~is_held_out))
    stream.__post_init__()


def unchanging(stream):
    """A stream whose images are always cropped alike."""
    return replace(stream, center_crop=True, random_flip=False, proportion_empty_prompts=0.0, buckets=None)


def held_out_batch(stream, indices):
    """A batch of these images, the same at every call; see `build_dataloader`."""
    batch = _Batches(HeldOutItems(stream), len(indices))[indices]
    if isinstance(batch, UserError):
        raise batch
    return batch


def held_out_caption(stream, index):
    """A text, or the label, of an image's caption."""
    rng = np.random.default_rng([stream.seed, CAPTION, HELD_OUT_POSITION + index])
    rng.random()  # as `TrainingStream.sample` does
    return with_trigger_word(draw_text(caption_of(stream.samples, index), rng), stream.trigger_word)


@dataclass
class HeldOutItems:
    """What `_Batches` wants of a stream; an item are the indices of images."""

    stream: TrainingStream
    prior = embeddings = cache = None

    def batch(self, indices, batch_size):
        return [self._sample(index) for index in indices]

    def _sample(self, index):
        stream = self.stream
        load = partial(stream._load, index, False, None)
        return stream.sample(HELD_OUT_POSITION + index, [(partial(name_of, stream.samples, index), load)])


def open_samples(args):
    """The stream of data that is there as a whole."""
    if args.train_data_dir or args.train_shards:
        samples, bad = args.samples or read_data(args)
    else:
        columns = {"image_column": args.image_column, "caption_column": args.caption_column}
        if args.num_classes is not None:
            columns |= {"label_column": args.label_column or "label", "class_ids": class_ids(args)}
        else:
            columns |= {"instance_prompt": args.instance_prompt, "caption_weights": args.caption_weights}
        columns |= {"split": getattr(args, "dataset_split", "train"), "cache_dir": args.cache_dir}
        samples = read_hub_dataset(args.dataset_name, args.dataset_config_name, **columns)
        if args.num_classes is not None:
            _add_classes(args, samples, samples.names)
        samples, bad = check_images(samples, args.max_bad_images or 0)
    found, samples = len(samples), limit_samples(samples, args.max_train_samples, args.seed)
    for prompt in (args.validation_prompts or ()) if args.num_classes is not None else ():
        label_of(args, prompt)  # is it a class?
    return TrainingStream(samples, bad=bad, found=found, **stream_settings(args))


def stream_settings(args):
    """What the flags say about training samples, whatever they are read from."""
    names = "seed resolution center_crop random_flip image_interpolation_mode proportion_empty_prompts trigger_word"
    settings = {name: getattr(args, name) for name in [*names.split(), "buckets"]}
    return {**settings, "max_bad_images": args.max_bad_images or 0, "batch_size": args.train_batch_size}


def class_images(args):
    """The images that are in --class_data_dir, as samples with the caption --class_prompt."""
    if not os.path.isdir(args.class_data_dir):
        return []
    images, _ = scan_folder(args.class_data_dir)
    return [(path, args.class_prompt) for path in sorted(images)]


def make_prior_stream(args, stream):
    """The stream of the first --num_class_images of --class_data_dir; for --dry_run the images themselves will do."""
    if args.dry_run:
        return replace(stream)
    samples, bad = check_images(class_images(args)[: args.num_class_images], args.max_bad_images or 0)
    return replace(stream, samples=samples, bad=bad, trigger_word=None)
