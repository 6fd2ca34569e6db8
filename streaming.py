"""Training on a `datasets` dataset while it is downloaded (`--streaming`).

Nothing can be looked up in a stream, so each rank reads its part from the beginning to the end, again and again: in
every epoch the dataset's files in a random order, of which it takes each `world_size`-th (or, if there are fewer files
than ranks, of all files each `world_size`-th row), cut into blocks of --shuffle_buffer_size rows, which are shuffled.
So the order is a function of seed and position for a given number of ranks and block size; workers only decode. A
checkpoint has the place where a rank's block began: a resumed run reads that file up to there again and goes on
exactly.

What a stream can't promise: ranks may have different numbers of rows, and each begins its next epoch when it is
through its own part; with another number of processes the order is another one, and a run can't be resumed; and images
are shuffled as far as a block reaches.
"""

import atexit
import itertools
import math
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import datasets
import fsspec
import httpx
import numpy as np
from huggingface_hub.errors import HfHubHTTPError

from arguments import UserError
from captions import is_blank, is_caption, join_columns, label_number
from data_sources import choose_columns, known_labels, open_split, undecoded
from data_utils import BLOCK_ORDER, CROP_AND_FLIP, EPOCH_ORDER, TrainingStream, stream_settings
from images import load_image, reason, transform
from model_checks import class_ids, label_of


EMPTY_EPOCHS = 20  # so many in a row mean that there is nothing
NETWORK_ERRORS = (ConnectionError, TimeoutError, HfHubHTTPError, httpx.TransportError)


@dataclass(frozen=True)
class Place:
    """Where a block of rows begins in a rank's part of a stream."""

    start: int = 0  # how many rows there were before
    epoch: int = 0
    file: int = 0  # its number among the rank's files of the epoch
    row: int = 0  # in that file


@dataclass
class HubStream(TrainingStream):
    """A `TrainingStream` of rows that come one after the other; `samples` is a `datasets.IterableDataset`."""

    image_column: str = "image"
    columns: list = field(default_factory=list)  # with captions, or the one with class labels
    caption_weights: list | None = None
    instance_prompt: str | None = None
    to_label: object | None = None  # value of the column -> class label
    block_size: int = 1000
    name: str = ""  # of the dataset
    rows_read: int = 0  # by this process
    places: dict = field(default_factory=lambda: {0: Place()})  # start -> `Place`, of the blocks that were begun

    def __post_init__(self):
        self.order = None

    num_samples = None  # nobody knows

    # What the main process reads

    def items(self, rank, world_size, batch_size, start_position):
        """Endless, of each of a rank's batches: its position, and its rows with one more, for an unreadable one."""
        first = start_position // world_size
        rows = self._rows(first, rank, world_size)
        batch = list(itertools.islice(rows, batch_size + 1))
        for k in itertools.count():
            self.rows_read = first + (k + 1) * batch_size
            yield start_position + (k * world_size + rank) * batch_size, self.rows_read, batch
            batch = [batch[-1], *itertools.islice(rows, batch_size)]

    def _rows(self, first, rank, world_size):
        """Endless: a rank's rows from number `first` on."""
        begin = max((start for start in self.places if start <= first), default=0)
        with read_ahead(self._blocks(self.places.get(begin, Place()), rank, world_size)) as blocks:
            for place, rows in blocks:
                self.places[place.start] = place
                yield from rows[max(0, first - place.start) :]

    def _blocks(self, place, rank, world_size):
        """Endless: the place where a block begins, and its rows in their random order."""
        empty = 0
        while empty < EMPTY_EPOCHS:
            count, block, begin = place.start, [], None
            for file, number, row in self._epoch(place, rank, world_size):
                begin = begin or Place(count, place.epoch, file, number)
                block.append(row)
                if len(block) == self.block_size:
                    yield begin, self._shuffled(block, begin, rank)
                    count, block, begin = count + len(block), [], None
            if block:
                yield begin, self._shuffled(block, begin, rank)
                count += len(block)
            empty = empty + 1 if count == place.start else 0
            place = Place(count, place.epoch + 1)
        raise UserError(f"--streaming: the dataset has no row for process {rank} of {world_size}.")

    def _shuffled(self, rows, begin, rank):
        order = np.random.default_rng([self.seed, BLOCK_ORDER, rank, begin.start]).permutation(len(rows))
        try:
            with ThreadPoolExecutor(16) as pool:
                return list(pool.map(_fetched, [rows[i] for i in order]))
        except NETWORK_ERRORS as error:
            raise _lost(error) from error
        except ImportError as error:
            raise UserError(f"--streaming: the images can't be fetched ({reason(error)}): install that.") from error

    def _epoch(self, place, rank, world_size):
        """A rank's rows of an epoch from a place on, each with the number of its file and its own in there."""
        num_files = self.samples.num_shards
        files = np.random.default_rng([self.seed, EPOCH_ORDER, place.epoch]).permutation(num_files)
        by_file = num_files >= world_size
        for file, which in enumerate(files[rank::world_size] if by_file else files):
            if file < place.file:
                continue
            try:
                for number, row in enumerate(self.samples.shard(num_files, int(which))):
                    if (file, number) >= (place.file, place.row) and (by_file or number % world_size == rank):
                        yield file, number, self._row(row, f"row {number} of file {which} of the dataset")
            except NETWORK_ERRORS as error:
                raise _lost(error) from error
            except (OSError, ValueError, EOFError, datasets.exceptions.DatasetsError) as error:
                self.note_bad({f"file {which} of the dataset": reason(error)})

    def _row(self, row, name):
        """Name, image file and caption or label of a row."""
        image = row[self.image_column] or {"bytes": None, "path": None}
        values = [row[column] for column in self.columns]
        caption = values[0] if self.to_label else join_columns(values or [None], self.caption_weights)
        caption = self.instance_prompt if is_blank(caption) else caption
        return name, image["bytes"] or image["path"] or b"", caption

    # What workers do

    def batch(self, item, batch_size):
        position, self.rows_read, rows = item
        return [self._sample(position + i, [*rows[i:], *rows[:i]]) for i in range(batch_size)]

    def _sample(self, position, rows):
        rng = np.random.default_rng([self.seed, CROP_AND_FLIP, position])
        flip = self.random_flip and rng.random() < 0.5
        return self.sample(position, ((lambda name=row[0]: name, partial(self._view, row, flip, rng)) for row in rows))

    def _view(self, row, flip, rng):
        _, image, caption = row
        if self.to_label is not None:
            caption = self.to_label(caption)
        elif not is_caption(caption):
            raise ValueError("it has no caption" if is_blank(caption) else f"its caption is no text: {caption!r:.40}")
        size, interpolation = (self.resolution,) * 2, self.image_interpolation_mode
        return transform(load_image(image), size, self.center_crop, flip, interpolation, rng), caption

    @property
    def allowed_bad_images(self):
        return max(1, math.ceil(self.rows_read / 100)) if self.max_bad_images is None else self.max_bad_images

    # Checkpoints

    def state(self, position, world_size):
        start = max(start for start in self.places if start <= position // world_size)
        self.places = {key: place for key, place in self.places.items() if key >= start}
        return {"place": asdict(self.places[start]), **self._order()}

    def load_state(self, state):
        """Raises `UserError` if the order is another one now."""
        for what, value in self._order().items():
            if state[what] != value:
                raise UserError(
                    f"--resume_from_checkpoint: that run had {what.replace('_', ' ')} {state[what]}, now it is "
                    f"{value}: with --streaming the order depends on it; give the same, or start a new run."
                )
        self.places = {state["place"]["start"]: Place(**state["place"])}

    def _order(self):
        return {
            "dataset": self.name,
            "number_of_files": self.samples.num_shards,
            "shuffle_buffer_size": self.block_size,
        }


def _lost(error):
    return UserError(
        f"--streaming: the dataset can't be read any more ({reason(error)}): check the connection, and go on with "
        "--resume_from_checkpoint latest."
    )


def _fetched(row):
    """A row whose image is at hand: a dataset of image files names their addresses."""
    name, image, caption = row
    if isinstance(image, str) and "://" in image:
        try:
            with fsspec.open(image, "rb") as file:
                image = file.read()
        except FileNotFoundError:
            pass  # it will be found out when its turn comes
    return name, image, caption


class read_ahead:
    """Iterates over a generator in a thread, one element ahead; a context manager, which ends the thread."""

    def __init__(self, generator):
        self.generator, self.ready, self.stop = generator, queue.Queue(maxsize=1), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        atexit.register(self._end)
        return iter(self._next, None)

    def __exit__(self, *error):
        self.stop.set()

    def _end(self):
        """At exit: the interpreter must not go away below a thread that is inside a library."""
        self.stop.set()
        self.thread.join(timeout=30)

    def _run(self):
        try:
            for element in self.generator:
                self._put((element, None))
                if self.stop.is_set():
                    return
        except BaseException as error:  # the reader raises it
            self._put((None, error))

    def _put(self, pair):
        while not self.stop.is_set():
            try:
                return self.ready.put(pair, timeout=0.1)
            except queue.Full:
                pass

    def _next(self):
        element, error = self.ready.get()
        if error is not None:
            raise error
        return element


def open_stream(args):
    """The stream of --dataset_name, whose columns are found as `read_hub_dataset` does."""
    dataset = open_split(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, streaming=True)
    try:
        dataset = dataset if dataset.column_names else dataset._resolve_features()
    except (*NETWORK_ERRORS, OSError, ValueError, StopIteration) as error:
        raise UserError(f"--dataset_name {args.dataset_name} can't be read ({reason(error)}).") from error
    with_labels = args.num_classes is not None
    label_column = (args.label_column or "label") if with_labels else None
    columns = (args.image_column, args.caption_column, label_column, args.instance_prompt)
    image_column, columns = choose_columns(args.dataset_name, dataset.features, *columns)
    to_label = None
    if with_labels:
        own_names, known = getattr(dataset.features[label_column], "names", []), class_ids(args)
        labels = known_labels(own_names, known)  # the model may number the classes otherwise
        if labels is None:
            args.id2label |= {label: name for label, name in enumerate(own_names) if label not in args.id2label}
        to_label = partial(_label, labels and [labels[name] for name in own_names], known, args.num_classes)
    dataset = undecoded(dataset, image_column, args.dataset_name).select_columns([image_column, *columns])
    for prompt in (args.validation_prompts or ()) if with_labels else ():
        label_of(args, prompt)  # is it a class?
    return HubStream(
        dataset,
        image_column=image_column,
        columns=columns,
        caption_weights=args.caption_weights,
        instance_prompt=args.instance_prompt,
        to_label=to_label,
        block_size=args.shuffle_buffer_size,
        name=os.path.basename(os.path.normpath(args.dataset_name)),  # also after it was moved
        **stream_settings(args) | {"max_bad_images": args.max_bad_images},
    )


def _label(labels, class_ids, num_classes, value):
    """The class label that a value of the column means: a number, which may be an index in `labels`, or a name."""
    label = class_ids.get(value, value) if isinstance(value, str) else value
    if labels and isinstance(value, int) and 0 <= value < len(labels):
        label = labels[value]
    if not 0 <= label_number(label) < num_classes:
        raise ValueError(f"{value!r:.40} is no class of the model's")
    return label_number(label)
