"""Images and captions for training, from a folder or a `datasets` dataset, as an endless and reproducible stream.

Everything about a training sample is a function of (seed, position). Positions 0, 1, 2, ... run through shuffled
epochs laid end to end: position p is sample `permutation(seed, p // N)[p % N]`, and its crop, flip and caption are
drawn from generators seeded with p. So the order does not depend on the number of workers, a resumed run needs only
the position at which to go on, and two processes with batch size B see what one process with 2B sees.

    read_image_folder, read_hub_dataset    samples: (image, caption) pairs
    read_class_folder, read_hub_dataset    samples: (image, class label) pairs, and the classes' names
    limit_samples, check_images            fewer samples: `--max_train_samples`, unreadable images
    labels_of, check_labels                the labels alone, and whether the model has such classes
    load_image, transform                  file -> 8-bit RGB -> pixels in [-1, 1]
    TrainingStream                         position -> training sample
    cache_latents                          encode every image once and let the stream give latents
    build_dataloader                       the batches of one rank, from a start position on

In a sample, image is a path or the bytes of an image file, and caption a string, a list of strings of which one is
drawn each time, or for class-conditional models an int, the class label. Shapes: B batch, H = W = resolution. Only
numpy and Pillow are imported at the top: a folder can be read and checked before torch is loaded.
"""

import csv
import difflib
import io
import itertools
import json
import logging
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from arguments import UserError
from model_checks import class_ids, label_of


logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_CHECKED_IMAGES = 10_000  # read before training; of a larger set, at most so many at even distances

# Pillow's default takes a photo of 90 megapixels for an attack. It warns above this limit and refuses (for us: a bad
# image) above twice as much, where one decoded image takes 2 GB.
Image.MAX_IMAGE_PIXELS = 250_000_000

# What Pillow raises for a file that is not, or not wholly, an image.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Every kind of random decision has its own generators: more caption dropout leaves all crops as they were.
EPOCH_ORDER, CROP_AND_FLIP, CAPTION = range(3)
PRIOR_POSITION = 2**40  # where the positions of images of the class begin, far from all others


# Sources


def read_image_folder(train_data_dir, image_column=None, caption_column=None, instance_prompt=None):
    """Reads a folder of images, in sub-folders too, with captions in metadata files or beside the images.

    A `metadata.jsonl`, `.csv` or `.parquet`, as for Hugging Face's ImageFolder, has a column `file_name`, relative to
    its own folder, and captions: in `caption_column`, or else in `text`, or else in the only text column there is.
    Every row is a sample. Without metadata every image is one, and its caption is in the text file of the same name
    (`cat.txt` for `cat.jpg`). `instance_prompt` is the caption of all samples that have none.

    Returns: a list of (path, caption), sorted by path. Raises `UserError` for whatever is missing or malformed.
    """
    images, rows = _read_folder(train_data_dir, image_column)
    if not rows:
        if caption_column is not None:
            raise UserError(
                f"--caption_column {caption_column} does not apply to --train_data_dir {train_data_dir}, which has no "
                "metadata file; leave the flag out, or add the metadata."
            )
        return _read_text_files(train_data_dir, sorted(images), instance_prompt)
    if caption_column is not None or instance_prompt is None or _text_columns([row for _, row in rows]):
        caption_column = _choose_caption_column([row for _, row in rows], caption_column)
    samples = _fill(_join(rows, caption_column), instance_prompt)
    _check_captions(samples, caption_column)
    _warn_of_unused(images, samples, train_data_dir)
    return sorted(samples, key=lambda sample: sample[0])


def _read_text_files(train_data_dir, images, instance_prompt):
    """Images with the captions that lie beside them."""
    samples = [(path, _read_caption(os.path.splitext(path)[0] + ".txt")) for path in images]
    without = [path for path, caption in samples if _is_blank(caption)]
    if without and instance_prompt is None:
        if len(without) == len(samples):
            raise UserError(
                f"--train_data_dir {train_data_dir} has no captions; write a metadata.jsonl there with one line per "
                'image such as {"file_name": "cat.jpg", "text": "a cat on a sofa"}, or a text file beside each image '
                "(cat.txt for cat.jpg), or give --instance_prompt, which is for all."
            )
        raise UserError(
            f"{len(without)} of the images in --train_data_dir {train_data_dir} have no caption in a text file beside "
            f"them (first: {without[0]}); write these, or give --instance_prompt for those that have none."
        )
    return _fill(samples, instance_prompt)


def _read_caption(path):
    """What a text file says, in one line; None if there is no such file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return " ".join(file.read().split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a caption ({_reason(error)}); save it as UTF-8 text.") from None


def _fill(samples, instance_prompt):
    """Samples whose missing captions are `instance_prompt`."""
    if instance_prompt is None:
        return samples
    without = sum(_is_blank(caption) for _, caption in samples)
    if 0 < without < len(samples):
        logger.warning(f"{without} of the {len(samples)} images have no caption and get that of --instance_prompt.")
    return [(path, instance_prompt if _is_blank(caption) else caption) for path, caption in samples]


def _is_blank(caption):
    return caption is None or isinstance(caption, str) and not caption.strip()


def read_class_folder(train_data_dir, image_column=None, label_column=None, class_ids=None):
    """Reads images with class labels: from metadata files if there are any, else from class sub-folders.

    In metadata (see `read_image_folder`) the label is in `label_column`, by default `label`: an integer from 0 on, or
    if every row has such a name, a name in `class_ids`. Without metadata the first-level sub-folder of an image is
    its class. Names of digits are the labels (`207`); names in `class_ids` take those; others are numbered in sorted
    order, as torchvision's ImageFolder does.

    Args:
        class_ids: {name: label} of the pretrained model, if it has names for its classes.

    Returns: a list of (path, int label), sorted by path, and {label: name} of the labels that occur. Raises
        `UserError` for whatever is missing, malformed or ambiguous.
    """
    images, rows = _read_folder(train_data_dir, image_column)
    if not rows:
        if label_column is not None:
            raise UserError(
                f"--label_column {label_column} does not apply to --train_data_dir {train_data_dir}, which has no "
                "metadata file; leave the flag out to take the sub-folders as classes, or add the metadata."
            )
        return _read_class_sub_folders(train_data_dir, images, class_ids)
    label_column = label_column or "label"
    columns = _columns([row for _, row in rows])
    if label_column not in columns:
        raise UserError(
            f"the metadata has no label column {label_column}; choose one that is there with --label_column: "
            f"{', '.join(columns) or 'none is, so add one'}; or remove the metadata, and the sub-folders are classes."
        )
    samples = _join(rows, label_column)
    paths, values = zip(*samples)
    row_names = [f"{row['file_name']} in {metadata_path}" for metadata_path, row in rows]
    labels, names = _parse_labels(values, row_names.__getitem__, label_column, class_ids)
    _warn_of_unused(images, samples, train_data_dir)
    return sorted(zip(paths, labels), key=lambda sample: sample[0]), names


def _read_class_sub_folders(train_data_dir, images, class_ids):
    images = sorted(images)
    parts = [os.path.relpath(path, train_data_dir).split(os.sep) for path in images]
    outside = [path for path, inner in zip(images, parts) if len(inner) == 1]
    if len(outside) == len(images):
        raise UserError(
            f"--train_data_dir {train_data_dir} has no classes, neither as sub-folders nor in metadata; put every "
            "image in a sub-folder that is named after its class, or write a metadata.jsonl there with one line per "
            'image such as {"file_name": "cat.jpg", "label": 207}.'
        )
    if outside:
        raise UserError(
            f"{len(outside)} of the images lie outside the class sub-folders of --train_data_dir {train_data_dir} "
            f"(first: {outside[0]}); move them into the sub-folders of their classes, or remove them."
        )
    classes = sorted({inner[0] for inner in parts})
    labels = _known_labels(classes, class_ids)
    if labels is not None:
        names = _class_names(labels, class_ids)
    else:
        labels, names = {name: label for label, name in enumerate(classes)}, dict(enumerate(classes))
        _warn_of_numbers(classes, f"class sub-folders of --train_data_dir {train_data_dir}", class_ids)
    return [(path, labels[inner[0]]) for path, inner in zip(images, parts)], names


def _read_folder(train_data_dir, image_column):
    """The paths of all images in a folder, as a set, and all metadata rows, each with the path of its file."""
    if image_column not in (None, "image", "file_name"):
        raise UserError(
            f"--image_column {image_column} does not apply to --train_data_dir, where the metadata's column file_name "
            "names the images; leave the flag out."
        )
    if not os.path.isdir(train_data_dir):
        raise UserError(f"--train_data_dir {train_data_dir} is not a folder; give the folder that holds the images.")
    images, metadata_paths = _scan_folder(train_data_dir)
    if not images:
        raise UserError(
            f"--train_data_dir {train_data_dir} contains no images ({' '.join(IMAGE_EXTENSIONS)}); give a folder of "
            "image files, or name a dataset or its parquet file with --dataset_name."
        )
    return images, [(path, row) for path in metadata_paths for row in _read_metadata(path)]


def _scan_folder(folder):
    """The paths of all images, as a set, and of all metadata files, as a list, leaving out what is hidden."""
    images, metadata_paths = set(), []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = [os.path.join(root, name) for name in METADATA_FILES if name in files]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both there; keep the one that is meant.")
        metadata_paths += found
        names = [name for name in files if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
        images.update(os.path.normpath(os.path.join(root, name)) for name in names)
    return images, metadata_paths


def _read_metadata(path):
    """The rows of a metadata file: dicts with a file_name."""
    rows = []
    try:
        with open(path, "rb") as file:
            if path.endswith(".parquet"):
                import pyarrow.parquet

                table = pyarrow.parquet.read_table(file).to_pylist()
            else:
                lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                is_csv = path.endswith(".csv")
                table = csv.DictReader(lines, strict=True) if is_csv else map(json.loads, filter(str.strip, lines))
            for row in table:
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise ValueError("it has no file_name")
                if None in row:  # otherwise the caption would silently end at its first comma
                    raise ValueError("it has more fields than there are columns: a caption with commas needs quotes")
                rows.append(row)
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"row {len(rows) + 1} of {path} cannot be read ({_reason(error)}); correct it.") from None
    return rows


def _join(rows, column):
    """The path of the image that each metadata row is about, with what the row has in a column."""
    samples, missing = [], []
    for metadata_path, row in rows:
        path = os.path.normpath(os.path.join(os.path.dirname(metadata_path), row["file_name"]))
        samples.append((path, row.get(column)))
        if not os.path.isfile(path):
            missing.append(f"{row['file_name']} in {metadata_path}")
    if missing:
        raise UserError(
            f"{len(missing)} of the metadata rows name a file that is not there (first: {missing[0]}); correct "
            "file_name, which is relative to the metadata file, or remove the rows."
        )
    return samples


def _warn_of_unused(images, samples, train_data_dir):
    unused = images - {path for path, _ in samples}
    if unused:
        logger.warning(
            f"{len(unused)} of the images in --train_data_dir {train_data_dir} will not be used, because no metadata "
            f"row names them (first: {min(unused)})."
        )


def _columns(rows):
    return list(dict.fromkeys(name for row in rows for name in row if name != "file_name"))


def _text_columns(rows):
    return [name for name in _columns(rows) if any(isinstance(row.get(name), (str, list)) for row in rows)]


def _choose_caption_column(rows, caption_column):
    columns = _columns(rows)
    if caption_column is None:
        texts = _text_columns(rows)
        caption_column = texts[0] if len(texts) == 1 and "text" not in columns else "text"
    if caption_column not in columns:
        raise UserError(
            f"the metadata has no caption column {caption_column}; choose one that is there with --caption_column: "
            f"{', '.join(columns) or 'none is, so add one'}."
        )
    return caption_column


def _check_captions(captions, caption_column):
    """Raises `UserError` unless every caption, given with a name for its sample, is text or a list of texts."""

    def is_text(caption):
        return isinstance(caption, str) and bool(caption.strip())

    bad = []
    for name, caption in captions:
        if not (is_text(caption) or (isinstance(caption, list) and caption and all(map(is_text, caption)))):
            bad.append(f"{caption!r:.60} for {name}")
    if bad:
        raise UserError(
            f"{len(bad)} of the captions in column {caption_column} are empty or no text (first: {bad[0]}); complete "
            "or remove such rows, or choose another column with --caption_column."
        )


def _warn_of_numbers(classes, what, class_ids):
    if class_ids:
        logger.warning(
            f"the model knows none of the {what} by its name, so they are numbered in order: {classes[0]} is class 0, "
            f"..., {classes[-1]} {len(classes) - 1}."
        )


def _parse_labels(values, sample_name, column, class_ids):
    """The labels that the values in a column mean, and {label: name} of those that occur.

    Args:
        values: what each sample has there: an integer from 0 on or its digits, or all of them names in `class_ids`.
        sample_name: index -> what to call the sample in the `UserError` about a value that is none of these.
    """
    texts = [str(value).strip() if isinstance(value, (int, str)) else "" for value in values]
    classes = sorted(set(texts) - {""})
    labels = _known_labels(classes, class_ids)
    if labels is None and not class_ids and "" not in texts and not any(map(str.isdecimal, classes)):
        return [classes.index(text) for text in texts], dict(enumerate(classes))  # a new model's, in sorted order
    if labels is None:
        labels = {name: int(name) for name in classes if name.isdecimal()}
    bad = [index for index, text in enumerate(texts) if text not in labels]
    if bad:
        raise UserError(
            f"{len(bad)} of the labels in column {column} are neither integers from 0 on nor names of classes that "
            f"the model knows (first: {values[bad[0]]!r:.60} for {sample_name(bad[0])}); correct or remove such rows, "
            "or choose another column with --label_column."
        )
    return [labels[text] for text in texts], _class_names(labels, class_ids)


def _known_labels(classes, class_ids):
    """{class: label} if the classes are numbers or all are names in `class_ids`; None if they are other names.

    Raises `UserError` if only some are in `class_ids`: numbers for the others would be those of other classes.
    """
    if all(map(str.isdecimal, classes)):
        return {name: int(name) for name in classes}
    class_ids = class_ids or {}
    unknown = [name for name in classes if name not in class_ids]
    if len(unknown) == len(classes):
        return None
    if unknown:
        similar = [difflib.get_close_matches(name, class_ids) for name in unknown[:5]]
        listed = [f"{name} ({' or '.join(close)}?)" if close else name for name, close in zip(unknown, similar)]
        raise UserError(
            f"the model knows {len(classes) - len(unknown)} of the {len(classes)} classes by their names, but not "
            f"{', '.join(listed + ['...'] * (len(unknown) > 5))}; use the model's names for all classes, or the "
            "numbers of its classes."
        )
    return {name: class_ids[name] for name in classes}


def _class_names(labels, class_ids):
    """{label: name} for {class: label}; a class given by its number has the model's first name for it, if any."""
    model_names = {label: name for name, label in reversed((class_ids or {}).items())}
    return {label: model_names.get(label, name) if name.isdecimal() else name for name, label in labels.items()}


@dataclass
class HubSamples:
    """Rows of a `datasets` dataset as (image bytes or path, caption or label) pairs, read one at a time."""

    dataset: object  # datasets.Dataset whose image column is not decoded
    image_column: str
    caption_column: str | None
    rows: np.ndarray  # [N] int64, the rows that are used
    labels: np.ndarray | None = None  # int64, the class labels of all rows of the dataset, in place of captions
    names: dict = field(default_factory=dict)  # {label: class name}
    instance_prompt: str | None = None  # the caption of rows that have none

    def __len__(self):
        return len(self.rows)

    def captions(self):
        if self.labels is not None:
            return self.labels[self.rows].tolist()
        if self.caption_column is None:
            return [self.instance_prompt] * len(self.rows)
        captions = self.dataset.select_columns([self.caption_column]).select(self.rows)[self.caption_column]
        return [self._filled(caption) for caption in captions]

    def _filled(self, caption):
        return self.instance_prompt if self.instance_prompt is not None and _is_blank(caption) else caption

    def __getitem__(self, index):
        number = int(self.rows[index])
        row = self.dataset[number]
        image = row[self.image_column] or {"bytes": None, "path": None}
        if self.labels is not None:
            caption = int(self.labels[number])
        else:
            caption = self._filled(row[self.caption_column] if self.caption_column else None)
        return image["bytes"] or image["path"] or b"", caption


def read_hub_dataset(
    dataset_name,
    dataset_config_name=None,
    train_data_dir=None,
    image_column=None,
    caption_column=None,
    cache_dir=None,
    label_column=None,
    class_ids=None,
    instance_prompt=None,
):
    """Opens the split `train` of a dataset: a Hub id, a folder, a parquet or arrow file, or what `save_to_disk` wrote.

    Without flags the columns are `image` and `text` if there, else the first column and the first of the others.
    `instance_prompt` is the caption of rows that have none, and of all if there is no column `text`. With
    `label_column` a sample has a class label in place of a caption: the column's integer, or its name's in
    `class_ids`, {name: label} of the pretrained model, if the column holds names and all are there.

    Returns: `HubSamples`; with labels, `names` is {label: name} of those that occur, the column's own names if it is
        a `datasets.ClassLabel`. Raises `UserError` if the dataset or a column is missing, a caption is no text, or a
        label no class.
    """
    import datasets

    try:
        dataset = _load_train_split(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--dataset_name {dataset_name} cannot be loaded ({_reason(error)}); check the name, the path, the "
            "connection and --dataset_config_name."
        ) from None
    columns = dataset.column_names
    image_column = image_column or ("image" if "image" in columns else columns[0])
    others = [name for name in columns if name != image_column]
    column_flag = "--caption_column" if label_column is None else "--label_column"
    caption_column = label_column or caption_column
    if caption_column is None and (instance_prompt is None or "text" in others):
        caption_column = "text" if "text" in others else next(iter(others), "text")
    for flag, column in (("--image_column", image_column), (column_flag, caption_column)):
        if column is not None and column not in columns:
            raise UserError(
                f"--dataset_name {dataset_name} has no column {column} for {flag}; choose one that is there: "
                f"{', '.join(columns)}."
            )
    try:  # `datasets` must not decode: we name the image in which an error is, and read more kinds right
        dataset = dataset.with_format(None).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        raise UserError(
            f"column {image_column} of --dataset_name {dataset_name} does not hold images; choose one that does with "
            f"--image_column: {', '.join(columns)}."
        ) from None
    rows = np.arange(len(dataset))
    samples = HubSamples(dataset, image_column, caption_column, rows, instance_prompt=instance_prompt)
    if caption_column is None:
        return samples
    batches = dataset.select_columns([caption_column]).iter(batch_size=1000)
    captions = itertools.chain.from_iterable(batch[caption_column] for batch in batches)
    if label_column is None:
        if instance_prompt is not None:
            captions = map(samples._filled, captions)
        _check_captions(((f"row {row}", caption) for row, caption in enumerate(captions)), caption_column)
        return samples
    feature, values = dataset.features[label_column], list(captions)
    own_names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    if own_names and _known_labels(own_names, class_ids) is not None:  # the model may number these classes otherwise
        values = [own_names[value] if 0 <= (-1 if value is None else value) else value for value in values]
        own_names = []
    labels, names = _parse_labels(values, "row {}".format, label_column, class_ids)
    if own_names:
        names = {label: own_names[label] for label in names}
        _warn_of_numbers(own_names, f"classes of --dataset_name {dataset_name}", class_ids)
    return replace(samples, labels=np.array(labels), names=names)


def _load_train_split(name, config_name, data_dir, cache_dir):
    import datasets

    if any(os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):  # save_to_disk
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, dict) and "train" not in dataset:
            raise ValueError(f"it has no split train, only {', '.join(dataset)}")
        return dataset["train"] if isinstance(dataset, dict) else dataset
    if os.path.isfile(name):
        kind = os.path.splitext(name)[1][1:]
        if kind not in ("parquet", "arrow"):
            raise ValueError("a file must be .parquet or .arrow")
        return datasets.load_dataset(kind, data_files={"train": name}, split="train", cache_dir=cache_dir)
    return datasets.load_dataset(name, config_name, data_dir=data_dir, split="train", cache_dir=cache_dir)


def limit_samples(samples, max_train_samples, seed):
    """At most `max_train_samples` (None: all), drawn with the seed: those that the Diffusers scripts draw."""
    if max_train_samples is None or max_train_samples >= len(samples):
        return samples
    return _select(samples, np.random.default_rng(seed).permutation(len(samples))[:max_train_samples])


def _select(samples, indices):
    if isinstance(samples, HubSamples):
        return replace(samples, rows=samples.rows[indices])
    return [samples[index] for index in indices]


def _name(samples, index):
    return f"row {samples.rows[index]} of the dataset" if isinstance(samples, HubSamples) else samples[index][0]


def labels_of(samples):
    """Each sample's class label (or caption), in their order and without reading the images."""
    return samples.captions() if isinstance(samples, HubSamples) else [caption for _, caption in samples]


def check_labels(samples, num_classes):
    """Raises `UserError` unless every label is one of the model's classes, 0 to num_classes - 1."""
    bad = [(index, label) for index, label in enumerate(labels_of(samples)) if not 0 <= label < num_classes]
    if bad:
        index, label = bad[0]
        raise UserError(
            f"{len(bad)} of the labels are not among the model's {num_classes} classes, 0 to {num_classes - 1} "
            f"(first: {label} for {_name(samples, index)}); correct them, remove such images, or use a model with "
            "more classes."
        )


# Images


def load_image(source):
    """Reads an image file, given as path or bytes, as an 8-bit RGB `PIL.Image`.

    The EXIF orientation is applied, alpha is laid on white, 16-bit grey is scaled and not clipped, and of an animation
    the first frame is taken. Raises one of `IMAGE_ERRORS` if that is impossible.
    """
    with _open_image(source) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 0 to 65535; convert("RGB") would clip at 255
            grey = (np.asarray(image).astype(np.int64) + 128) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _open_image(source):
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image.close()
        raise ValueError("its 32-bit pixels do not say what is white: save it with 8 or 16 bits")
    return image


def transform(image, resolution, center_crop, flip, interpolation, rng=None):
    """Resizes the shorter side to `resolution`, mirrors the image if asked to, and crops a square.

    Args:
        image: RGB `PIL.Image`.
        interpolation: `lanczos`, `bicubic`, `bilinear`, `box`, `hamming` or `nearest`; antialiased by Pillow.
        rng: `numpy.random.Generator` from which the crop is drawn, unless it is the centre.

    Returns: dict of pixel_values, float32 `[3, H, W]` in [-1, 1]; original_size, (height, width) of the image before
        resizing; and crop_top_left, (top, left) of the crop in the resized and flipped image: SDXL's conditioning.
    """
    original_size = (image.height, image.width)
    width, height = (int(resolution * side / min(image.size)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    if flip:
        image = ImageOps.mirror(image)
    if center_crop:
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    else:
        top, left = int(rng.integers(height - resolution + 1)), int(rng.integers(width - resolution + 1))
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    pixels = np.ascontiguousarray(pixels) / 127.5 - 1
    return {"pixel_values": pixels, "original_size": original_size, "crop_top_left": (top, left)}


def check_images(samples, max_bad_images=0):
    """Reads the images before training, so that N and the order are settled when it starts.

    At most `MAX_CHECKED_IMAGES` are read, in threads, at the lowest resolution that their format offers.

    Returns: the samples without the unreadable ones, and these as {name: reason}, which `TrainingStream` counts on
        from. Raises `UserError` if there are more than `max_bad_images`.
    """

    def problem(index):
        try:
            with _open_image(samples[index][0]) as image:
                image.draft(None, (1, 1))
                image.load()  # to the end of the file, so that a cut one is noticed
        except IMAGE_ERRORS as error:
            return index, _name(samples, index), _reason(error)

    indices = range(0, len(samples), len(samples) // MAX_CHECKED_IMAGES + 1)
    with ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(problem, indices) if found]
    bad = {name: reason for _, name, reason in problems}
    if len(bad) > max_bad_images:
        raise _too_many_bad_images(bad, max_bad_images)
    if bad:
        logger.warning(f"{len(bad)} of the images cannot be read and are left out: {_listed(bad, len(bad))}.")
        dropped = {index for index, _, _ in problems}
        samples = _select(samples, [index for index in range(len(samples)) if index not in dropped])
    return samples, bad


# The stream


@lru_cache(maxsize=2)  # a batch may need the end of one epoch and the beginning of the next
def _permutation(seed, epoch, num_samples):
    return np.random.default_rng([seed, EPOCH_ORDER, epoch]).permutation(num_samples)


@dataclass
class TrainingStream:
    """An endless map from position to training sample; see the top of this file.

    An image that has become unreadable since `check_images` is replaced by the next one of the epoch, with a warning;
    `UserError` is raised once this process has met more than `max_bad_images`, those in `bad` included.
    """

    samples: object  # sequence of (image, caption)
    seed: int
    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    proportion_empty_prompts: float = 0.0
    max_bad_images: int = 0
    bad: dict = field(default_factory=dict)  # {name: reason}, as returned by check_images; grows
    cache: list | None = None  # what `cache_latents` made of each sample
    prior: object | None = None  # the stream of images of the class, for prior preservation

    def __post_init__(self):
        if not len(self.samples):
            raise UserError("there is no image to train on; check --train_data_dir or --dataset_name.")

    @property
    def num_samples(self):
        """N, the samples of an epoch."""
        return len(self.samples)

    def index(self, position):
        """The index in `samples` of the sample at a position."""
        epoch, step = divmod(position, self.num_samples)
        return int(_permutation(self.seed, epoch, self.num_samples)[step])

    def __getitem__(self, position):
        """Returns what `transform` does, or of a cached sample `posterior` `[2 C, h, w]` for `pixel_values`; caption;
        position; and bad, {name: reason} of the images passed over."""
        rng = np.random.default_rng([self.seed, CROP_AND_FLIP, position])
        flip = self.random_flip and rng.random() < 0.5
        view, caption, bad = self._read(position, flip, rng)
        rng = np.random.default_rng([self.seed, CAPTION, position])
        if rng.random() < self.proportion_empty_prompts:
            caption = ""
        elif isinstance(caption, list):
            caption = caption[rng.integers(len(caption))]
        return {**view, "caption": caption, "position": position, "bad": bad}

    def view(self, index, flip, rng=None):
        """A sample as `transform` gives it. Raises one of `IMAGE_ERRORS`."""
        image = load_image(self.samples[index][0])
        return transform(image, self.resolution, self.center_crop, flip, self.image_interpolation_mode, rng)

    def _read(self, position, flip, rng):
        """View and caption at a position, or else at the next one of the epoch, and {name: reason} if so."""
        bad = {}
        epoch, step = divmod(position, self.num_samples)
        for offset in range(self.num_samples):
            index = self.index(epoch * self.num_samples + (step + offset) % self.num_samples)
            try:
                view = self.view(index, flip, rng) if self.cache is None else self._cached(index, flip)
                return view, self.samples[index][1], bad
            except IMAGE_ERRORS as error:
                bad[_name(self.samples, index)] = _reason(error)
                self.note_bad(bad)
        raise _too_many_bad_images(self.bad, self.max_bad_images)

    def _cached(self, index, flip):
        entry = self.cache[index]
        if "error" in entry:
            raise OSError(entry["error"])
        return {**entry, "posterior": entry["posterior"][int(flip)]}

    def note_bad(self, bad):
        """Counts unreadable images, {name: reason}, each once; raises `UserError` if they are too many now."""
        new = {name: reason for name, reason in bad.items() if name not in self.bad}
        self.bad.update(new)
        if len(self.bad) > self.max_bad_images:
            raise _too_many_bad_images(self.bad, self.max_bad_images)
        from torch.utils.data import get_worker_info

        if new and get_worker_info() is None:  # the main process tells, once, what a worker has found
            logger.warning(f"no longer readable, so that the next image takes its place: {_listed(new)}.")


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
            return {"error": _reason(error)}
        posterior = [encode(torch.from_numpy(view.pop("pixel_values"))[None])[0].cpu() for view in views]
        return {**views[0], "posterior": posterior}  # mirrored or not, the middle is at the same place

    cache = share_work(range(len(stream.samples)), entry, "Caching latents")
    stream.note_bad({_name(stream.samples, i): entry["error"] for i, entry in enumerate(cache) if "error" in entry})
    for index, entry in enumerate(cache):
        if not all(posterior.isfinite().all() for posterior in entry.get("posterior", ())):
            raise UserError(
                f"the VAE's latents of {_name(stream.samples, index)} are not finite: use --vae_dtype fp32 or bf16, "
                "or another VAE with --pretrained_vae_model_name_or_path."
            )
    stream.cache = cache


def all_captions(stream):
    """Every caption, or class label, that the stream can give."""
    captions = {""} if stream.proportion_empty_prompts else set()
    captions |= all_captions(stream.prior) if stream.prior is not None else set()
    for caption in labels_of(stream.samples):
        captions |= set(caption) if isinstance(caption, list) else {caption}
    return captions


@dataclass
class _Batches:
    """What a DataLoader worker runs: from the position where a batch begins to the batch.

    A `UserError` is returned, not raised: torch would raise it again with the worker's traceback as its message.
    """

    stream: TrainingStream
    batch_size: int

    def __getitem__(self, start):
        import torch

        positions = range(start, start + self.batch_size)
        try:
            samples = [self.stream[position] for position in positions]
            if self.stream.prior is not None:
                samples += [self.stream.prior[PRIOR_POSITION + position] for position in positions]
        except UserError as error:
            return error
        if self.stream.cache is None:
            images = {"pixel_values": torch.from_numpy(np.stack([sample["pixel_values"] for sample in samples]))}
        else:
            images = {"posteriors": torch.stack([sample["posterior"] for sample in samples])}
        return {
            **images,
            "captions": [sample["caption"] for sample in samples],
            "positions": torch.tensor([sample["position"] for sample in samples]),
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "crop_top_lefts": torch.tensor([sample["crop_top_left"] for sample in samples]),
            "bad": {name: reason for sample in samples for name, reason in sample["bad"].items()},
            **({"num_instances": self.batch_size} if self.stream.prior is not None else {}),
        }


def build_dataloader(stream, batch_size, rank=0, world_size=1, start_position=0, num_workers=0):
    """Yields one rank's batches without end; not to be passed through `accelerator.prepare`.

    The k-th global batch is the positions from `start_position + k * world_size * batch_size` on, and rank r takes its
    r-th `batch_size`. To resume, start at the number of samples that all ranks together have consumed.

    A batch is a dict: pixel_values, float32 `[B, 3, H, W]` in [-1, 1], pinned if CUDA is there, or if they are cached
    posteriors `[B, 2 C, h, w]`; captions, a list of B strings, or of class labels and "" where the label is dropped;
    positions, int64 `[B]`; original_sizes (height, width) and crop_top_lefts (top, left), int64 `[B, 2]`. With
    `stream.prior` as many images of the class follow, and num_instances says after how many.
    """
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _Batches(stream, batch_size),
        batch_size=None,  # an item is a whole batch already
        sampler=itertools.count(start_position + rank * batch_size, world_size * batch_size),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from, and so move, the global generator
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        stream.note_bad(batch.pop("bad"))  # this process counts what all its workers find
        yield batch


def read_folder(args):
    """The samples of --train_data_dir, checked: see `check_images`. Adds to `args.id2label` of class labels."""
    if args.num_classes is None:
        columns = (args.image_column, args.caption_column)
        samples = read_image_folder(args.train_data_dir, *columns, args.instance_prompt)
    else:
        columns = (args.image_column, args.label_column)
        samples, names = read_class_folder(args.train_data_dir, *columns, class_ids=class_ids(args))
        _add_classes(args, samples, names)
    return check_images(samples, args.max_bad_images)


def _add_classes(args, samples, names):
    """Adds {label: name} to the model's, which keeps all its names for a class that it knows."""
    check_labels(samples, args.num_classes)
    known = class_ids(args)
    args.id2label |= {label: name for label, name in names.items() if name not in known}


def make_stream(args):
    """The stream that the data flags describe. A folder was mostly read and checked with the flags already."""
    if args.train_data_dir:
        samples, bad = args.folder_samples or read_folder(args)
    else:
        columns = {"image_column": args.image_column, "caption_column": args.caption_column}
        if args.num_classes is not None:
            columns |= {"label_column": args.label_column or "label", "class_ids": class_ids(args)}
        else:
            columns["instance_prompt"] = args.instance_prompt
        samples = read_hub_dataset(args.dataset_name, args.dataset_config_name, **columns, cache_dir=args.cache_dir)
        if args.num_classes is not None:
            _add_classes(args, samples, samples.names)
        samples, bad = check_images(samples, args.max_bad_images)
    samples = limit_samples(samples, args.max_train_samples, args.seed)
    for prompt in (args.validation_prompts or ()) if args.num_classes is not None else ():
        label_of(args, prompt)  # is it a class?
    return TrainingStream(
        samples,
        args.seed,
        args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        proportion_empty_prompts=args.proportion_empty_prompts,
        max_bad_images=args.max_bad_images,
        bad=bad,
    )


def class_images(args):
    """The images that are in --class_data_dir, as samples with the caption --class_prompt."""
    if not os.path.isdir(args.class_data_dir):
        return []
    images, _ = _scan_folder(args.class_data_dir)
    return [(path, args.class_prompt) for path in sorted(images)]


def make_prior_stream(args, stream):
    """The stream of the first --num_class_images of --class_data_dir; for --dry_run the images themselves will do."""
    if args.dry_run:
        return replace(stream)
    samples, bad = check_images(class_images(args)[: args.num_class_images], args.max_bad_images)
    return replace(stream, samples=samples, bad=bad)


# Words


def _reason(error):
    """The gist of an exception, short enough for a bracket in a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file that Pillow knows"
    message = getattr(error, "strerror", None) or getattr(error, "msg", None) or str(error) or type(error).__name__
    return message.splitlines()[0].rstrip(".")


def _listed(bad, limit=5):
    names = [f"{name} ({reason})" for name, reason in itertools.islice(bad.items(), limit)]
    return ", ".join(names + ["..."] * (len(bad) > limit))


def _too_many_bad_images(bad, max_bad_images):
    return UserError(
        f"{len(bad)} of the images cannot be read, more than --max_bad_images {max_bad_images} allows: {_listed(bad)}"
        "; repair or remove them, or raise --max_bad_images."
    )
