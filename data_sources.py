"""Where images and captions come from: a folder, a `datasets` dataset or tar shards, as a sequence of samples.

    read_image_folder, read_hub_dataset, read_shards    samples: (image, caption) pairs
    read_class_folder, read_hub_dataset, read_shards    samples: (image, class label) pairs, and the classes' names
    limit_samples, check_images                         fewer samples: `--max_train_samples`, unreadable images
    image_sizes, labels_of, check_labels                sizes and labels alone, and whether the model has such classes

In a sample, image is a path or the bytes of an image file, and caption one of `captions.py` or, for class-conditional
models, an int, the class label. Samples are a list of pairs or, where images are not files of their own, an object
that reads one when it is asked for it. Torch is not imported: data can be read and checked before that.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm.auto import tqdm

from arguments import UserError
from captions import is_blank, is_caption, join_columns, label_number
from images import IMAGE_ERRORS, IMAGE_EXTENSIONS, image_size, open_image, reason
from shards import open_shards


logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_CHECKED_IMAGES = 10_000  # read before training; of a larger set, at most so many at even distances


def read_image_folder(
    train_data_dir, image_column=None, caption_column=None, instance_prompt=None, caption_weights=None
):
    """Reads a folder of images, in sub-folders too, with captions in metadata files or beside the images.

    A `metadata.jsonl`, `.csv` or `.parquet`, as for Hugging Face's ImageFolder, has a column `file_name`, relative to
    its own folder, and captions: in `caption_column`, or else in `text`, or else in the only text column there is;
    several columns are drawn from as often as `caption_weights` say. Every row is a sample. Without metadata every
    image is one, and its caption is in the text file of the same name (`cat.txt` for `cat.jpg`). `instance_prompt` is
    the caption of all samples that have none.

    Returns: a list of (path, caption), sorted by path. Raises `UserError` for whatever is missing or malformed.
    """
    images, rows = read_folder(train_data_dir, image_column)
    columns = as_list(caption_column)
    if not rows:
        if columns:
            raise UserError(
                f"--caption_column {' '.join(columns)} does not apply to --train_data_dir {train_data_dir}, which has "
                "no metadata file; leave the flag out, or add the metadata."
            )
        return _read_text_files(train_data_dir, sorted(images), instance_prompt)
    if columns or instance_prompt is None or _text_columns([row for _, row in rows]):
        columns = _choose_caption_columns([row for _, row in rows], columns)
    samples = _join(rows, lambda row: join_columns([row.get(name) for name in columns], caption_weights))
    samples = _fill(samples, instance_prompt)
    _check_captions(samples, columns)
    _warn_of_unused(images, samples, train_data_dir)
    return sorted(samples, key=lambda sample: sample[0])


def _read_text_files(train_data_dir, images, instance_prompt):
    """Images with the captions that lie beside them."""
    samples = [(path, read_caption(os.path.splitext(path)[0] + ".txt")) for path in images]
    without = [path for path, caption in samples if is_blank(caption)]
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


def read_caption(path):
    """What a text file says, in one line; None if there is no such file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return " ".join(file.read().split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a caption ({reason(error)}); save it as UTF-8 text.") from None


def _fill(samples, instance_prompt):
    """Samples whose missing captions are `instance_prompt`."""
    if instance_prompt is None:
        return samples
    without = sum(is_blank(caption) for _, caption in samples)
    if 0 < without < len(samples):
        logger.warning(f"{without} of the {len(samples)} images have no caption and get that of --instance_prompt.")
    return [(path, instance_prompt if is_blank(caption) else caption) for path, caption in samples]


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
    images, rows = read_folder(train_data_dir, image_column)
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
    samples = _join(rows, lambda row: row.get(label_column))
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
    labels = known_labels(classes, class_ids)
    if labels is not None:
        names = _class_names(labels, class_ids)
    else:
        labels, names = {name: label for label, name in enumerate(classes)}, dict(enumerate(classes))
        _warn_of_numbers(classes, f"class sub-folders of --train_data_dir {train_data_dir}", class_ids)
    return [(path, labels[inner[0]]) for path, inner in zip(images, parts)], names


def read_folder(train_data_dir, image_column):
    """The paths of all images in a folder, as a set, and all metadata rows, each with the path of its file."""
    if image_column not in (None, "image", "file_name"):
        raise UserError(
            f"--image_column {image_column} does not apply to --train_data_dir, where the metadata's column file_name "
            "names the images; leave the flag out."
        )
    if not os.path.isdir(train_data_dir):
        raise UserError(f"--train_data_dir {train_data_dir} is not a folder; give the folder that holds the images.")
    images, metadata_paths = scan_folder(train_data_dir)
    if not images:
        raise UserError(
            f"--train_data_dir {train_data_dir} contains no images ({' '.join(IMAGE_EXTENSIONS)}); give a folder of "
            "image files, or name a dataset or its parquet file with --dataset_name, or tar files with --train_shards."
        )
    return images, [(path, row) for path in metadata_paths for row in read_metadata_file(path)]


def scan_folder(folder):
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


def read_metadata_file(path):
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
        raise UserError(f"row {len(rows) + 1} of {path} cannot be read ({reason(error)}); correct it.") from None
    return rows


def _join(rows, caption_of):
    """The path of the image that each metadata row is about, with its caption or label."""
    samples, missing = [], []
    for metadata_path, row in rows:
        path = os.path.normpath(os.path.join(os.path.dirname(metadata_path), row["file_name"]))
        samples.append((path, caption_of(row)))
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


def _choose_caption_columns(rows, wanted):
    columns = _columns(rows)
    if not wanted:
        texts = _text_columns(rows)
        wanted = texts if len(texts) == 1 and "text" not in columns else ["text"]
    for name in wanted:
        if name not in columns:
            raise UserError(
                f"the metadata has no caption column {name}; choose one that is there with --caption_column: "
                f"{', '.join(columns) or 'none is, so add one'}."
            )
    return wanted


def as_list(caption_column):
    """The names in --caption_column: None, a name, or a list of names."""
    return [caption_column] if isinstance(caption_column, str) else list(caption_column or ())


def _check_captions(captions, columns):
    """Raises `UserError` unless every caption, given with a name for its sample, is one."""
    bad = [f"{caption!r:.60} for {name}" for name, caption in captions if not is_caption(caption)]
    if bad:
        raise UserError(
            f"{len(bad)} of the captions in column {' '.join(columns)} are empty or no text (first: {bad[0]}); "
            "complete or remove such rows, or choose another column with --caption_column."
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
    labels = known_labels(classes, class_ids)
    if labels is None and not class_ids and "" not in texts and not any(map(str.isdecimal, classes)):
        numbers = {name: number for number, name in enumerate(classes)}  # a new model's, in sorted order
        return [numbers[text] for text in texts], dict(enumerate(classes))
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


def known_labels(classes, class_ids):
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
    caption_columns: list
    rows: np.ndarray  # [N] int64, the rows that are used
    caption_weights: list | None = None
    labels: np.ndarray | None = None  # int64, the class labels of all rows of the dataset, in place of captions
    names: dict = field(default_factory=dict)  # {label: class name}
    instance_prompt: str | None = None  # the caption of rows that have none

    def __post_init__(self):
        self.captions_only = self.dataset.select_columns(self.caption_columns) if self.caption_columns else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.image(index), self.caption(index)

    def image(self, index):
        """The image's file or its path, whether there is a caption or not."""
        image = self.dataset[int(self.rows[index])][self.image_column] or {"bytes": None, "path": None}
        return image["bytes"] or image["path"] or b""

    def captions(self):
        if self.labels is not None:
            return self.labels[self.rows].tolist()
        if not self.caption_columns:
            return [self.instance_prompt] * len(self.rows)
        batches = self.captions_only.select(self.rows).iter(batch_size=1000)
        values = itertools.chain.from_iterable(zip(*(b[name] for name in self.caption_columns)) for b in batches)
        return [self._joined(row) for row in values]

    def _joined(self, values):
        caption = join_columns(values, self.caption_weights)
        return self.instance_prompt if self.instance_prompt is not None and is_blank(caption) else caption

    def caption(self, index):
        number = int(self.rows[index])
        if self.labels is not None:
            return int(self.labels[number])
        if not self.caption_columns:
            return self.instance_prompt
        row = self.captions_only[number]
        return self._joined([row[name] for name in self.caption_columns])

    def files_identity(self):
        paths = [file["filename"] for file in self.dataset.cache_files]
        if not paths:
            return None  # it is in memory only
        status = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
        return hashlib.sha256(repr(status).encode() + self.rows.tobytes()).hexdigest()[:32]

    def select(self, indices):
        return replace(self, rows=self.rows[indices])

    def name(self, index):
        return f"row {self.rows[index]} of the dataset"


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
    caption_weights=None,
    split="train",
):
    """Opens a split of a dataset: a Hub id, a folder, a parquet or arrow file, or what `save_to_disk` wrote.

    Without flags the columns are `image` and `text` if there, else the first column and the first of the others.
    `instance_prompt` is the caption of rows that have none, and of all if there is no column `text`. With
    `label_column` a sample has a class label in place of a caption: the column's integer, or its name's in
    `class_ids`, {name: label} of the pretrained model, if the column holds names and all are there.

    Returns: `HubSamples`; with labels, `names` is {label: name} of those that occur, the column's own names if it is
        a `datasets.ClassLabel`. Raises `UserError` if the dataset or a column is missing, a caption is no text, or a
        label no class.
    """
    import datasets

    dataset = open_split(dataset_name, dataset_config_name, train_data_dir, cache_dir, split=split)
    choice = (image_column, caption_column, label_column, instance_prompt)
    image_column, columns = choose_columns(dataset_name, dataset.features, *choice)
    dataset = undecoded(dataset, image_column, dataset_name)
    rows = np.arange(len(dataset))
    samples = HubSamples(dataset, image_column, columns, rows, caption_weights, instance_prompt=instance_prompt)
    if not columns:
        return samples
    if label_column is None:
        captions = ((f"row {row}", caption) for row, caption in enumerate(samples.captions()))
        _check_captions(captions, columns)
        return samples
    batches = dataset.select_columns(columns).iter(batch_size=1000)
    values = list(itertools.chain.from_iterable(batch[label_column] for batch in batches))
    feature = dataset.features[label_column]
    own_names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    if own_names and known_labels(own_names, class_ids) is not None:  # the model may number these classes otherwise
        values = [own_names[value] if 0 <= (-1 if value is None else value) else value for value in values]
        own_names = []
    labels, names = _parse_labels(values, "row {}".format, label_column, class_ids)
    if own_names:
        names = {label: own_names[label] for label in names}
        _warn_of_numbers(own_names, f"classes of --dataset_name {dataset_name}", class_ids)
    return replace(samples, labels=np.array(labels), names=names)


def open_split(
    dataset_name, dataset_config_name=None, train_data_dir=None, cache_dir=None, streaming=False, split="train"
):
    """A split of a dataset. Raises `UserError`."""
    import datasets

    try:
        return _load_split(dataset_name, dataset_config_name, train_data_dir, cache_dir, streaming, split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--dataset_name {dataset_name} cannot be loaded ({reason(error)}); check the name, the path, the "
            "connection and --dataset_config_name."
        ) from None


def choose_columns(dataset_name, features, image_column, caption_column, label_column=None, instance_prompt=None):
    """The image column, and a list of those with captions or the label. Raises `UserError`.

    `features` is {name: type}. Without a name the first of images, and `text` (`txt` if the dataset is of tar shards)
    or else the first of the other columns.
    """
    from datasets import Image

    names = list(features)
    if image_column is None:
        images = [name for name in names if isinstance(features[name], Image)]
        image_column = "image" if "image" in names else (images or names)[0]
    others = [name for name in names if name != image_column]
    column_flag = "--caption_column" if label_column is None else "--label_column"
    columns = as_list(label_column or caption_column)
    usual = [name for name in ("text", "txt") if name in others]
    if not columns and (instance_prompt is None or usual):
        columns = [(usual or others or ["text"])[0]]
    for flag, column in (("--image_column", image_column), *((column_flag, column) for column in columns)):
        if column not in names:
            raise UserError(
                f"--dataset_name {dataset_name} has no column {column} for {flag}; choose one that is there: "
                f"{', '.join(names)}."
            )
    return image_column, columns


def undecoded(dataset, image_column, dataset_name):
    """The dataset with its images as files: we name the image in which an error is, and read more kinds right."""
    import datasets

    try:
        feature = dataset.features[image_column]
        if isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") not in ("binary", "string"):
            raise ValueError  # a stream would say so as late as its first row
        return dataset.with_format(None).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        raise UserError(
            f"column {image_column} of --dataset_name {dataset_name} does not hold images; choose one that does with "
            f"--image_column: {', '.join(dataset.column_names)}."
        ) from None


def _load_split(name, config_name, data_dir, cache_dir, streaming, split):
    import datasets

    if any(os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):  # save_to_disk
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, dict) and split not in dataset:
            raise ValueError(f"it has no split {split}, only {', '.join(dataset)}")
        dataset = dataset[split] if isinstance(dataset, dict) else dataset
        return dataset.to_iterable_dataset() if streaming else dataset
    settings = {"split": split, "cache_dir": cache_dir, "streaming": streaming}
    if os.path.isfile(name):
        kind = os.path.splitext(name)[1][1:]
        if kind not in ("parquet", "arrow"):
            raise ValueError("a file must be .parquet or .arrow")
        return datasets.load_dataset(kind, data_files={split: name}, **settings)
    return datasets.load_dataset(name, config_name, data_dir=data_dir, **settings)


def read_shards(
    patterns,
    image_column=None,
    caption_column=None,
    instance_prompt=None,
    caption_weights=None,
    label_column=None,
    cache_dir=None,
):
    """Opens tar shards; see `shards.open_shards` and `shards.ShardSamples`.

    With `label_column` a sample has a class label, an integer from 0 on: `cls` is the .cls file, another name a field
    of the json file.

    Returns: samples, and {name: reason} of what can't be used. Raises `UserError` if no sample has a caption or label.
    """
    samples, bad = open_shards(patterns, image_column, cache_dir)
    if label_column is not None:
        labels = samples.rows["label"] if label_column == "cls" else _labels_from_json(samples, label_column)
        samples = replace(samples, labels=labels)
        has_caption = labels[samples.indices] >= 0
    else:
        columns = as_list(caption_column) or None
        _check_fields(samples, columns or ())
        captions = {"caption_columns": columns, "caption_weights": caption_weights}
        samples = replace(samples, **captions, instance_prompt=instance_prompt)
        sizes = [samples.rows[kind]["size"][samples.indices] for kind in ("txt", "json")]
        has_caption = (np.maximum(*sizes) > 0) | (instance_prompt is not None)
    what = f"class label ({label_column})" if label_column is not None else "caption"
    first = min(100, len(samples))
    if not has_caption.any() or all(caption is None for caption in samples.select(range(first)).captions()):
        try:
            fields = ", ".join(sorted(samples.fields(0))) or "none"
        except (OSError, ValueError) as error:
            fields = f"none ({samples.name(0)}: {reason(error)})"
        flag = "--label_column" if label_column is not None else "--caption_column"
        raise UserError(
            f"--train_shards: the first {first} samples have no {what}; name one of their fields with {flag}: "
            f"{fields}."
        )
    bad |= {samples.name(index): f"it has no {what}" for index in np.flatnonzero(~has_caption)}
    return samples.select(np.flatnonzero(has_caption)), bad


def _check_fields(samples, columns):
    """Raises `UserError` if none of the first samples has one of the columns."""
    there = set()
    for index in range(min(100, len(samples))):
        try:
            there |= samples.fields(index).keys()
        except IMAGE_ERRORS:
            pass  # it will be found out when its turn comes
    for column in columns:
        if column not in there:
            raise UserError(
                f"--train_shards: none of the first samples has {column} for --caption_column; choose what is there: "
                f"{', '.join(sorted(there)) or 'nothing is'}."
            )


def _labels_from_json(samples, field):
    """The label of each row of the index, -1 where there is none or it is not asked for."""

    def label(index):
        try:
            return label_number(samples.fields(index)[field])
        except (*IMAGE_ERRORS, KeyError):
            return -1

    labels = np.full(len(samples.rows), -1)
    labels[samples.indices] = [label(index) for index in tqdm(range(len(samples)), desc="Reading class labels")]
    return labels


def limit_samples(samples, max_train_samples, seed):
    """At most `max_train_samples` (None: all), drawn with the seed: those that the Diffusers scripts draw."""
    if max_train_samples is None or max_train_samples >= len(samples):
        return samples
    return select(samples, np.random.default_rng(seed).permutation(len(samples))[:max_train_samples])


def select(samples, indices):
    if isinstance(samples, list):
        return [samples[index] for index in indices]
    return samples.select(indices)


def name_of(samples, index):
    return samples[index][0] if isinstance(samples, list) else samples.name(index)


def caption_of(samples, index):
    """A sample's caption or class label, without reading its image."""
    return samples[index][1] if isinstance(samples, list) else samples.caption(index)


def image_bytes(samples, index):
    """The file of a sample's image. Raises one of `IMAGE_ERRORS`."""
    image = samples[index][0] if isinstance(samples, list) else samples.image(index)
    if isinstance(image, bytes):
        return image
    with open(image, "rb") as file:
        return file.read()


def files_identity(samples):
    """A hash that is another one as soon as a file of the samples has another size or time; None if unknown."""
    if not isinstance(samples, list):
        return samples.files_identity()
    digest = hashlib.sha256()
    for path, _ in samples:
        status = os.stat(path) if os.path.exists(path) else None
        digest.update(f"{os.path.abspath(path)} {status and (status.st_size, status.st_mtime_ns)}\0".encode())
    return digest.hexdigest()[:32]


def image_sizes(samples):
    """(height, width) of every image, `[N, 2]`; (1, 1) of those whose head can't be read."""

    def size(index):
        try:
            return image_size(samples[index][0])
        except IMAGE_ERRORS:  # it will be found out when its turn comes
            return 1, 1

    if hasattr(samples, "sizes"):
        return samples.sizes()
    hide = os.environ.get("LOCAL_RANK", "0") != "0"
    sizes = in_threads(size, range(len(samples)))
    return list(tqdm(sizes, desc="Reading image sizes", total=len(samples), disable=hide))


def in_threads(function, items):
    """`map(function, items)` in threads, which are given a part of the items at a time."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), 10_000):
            yield from pool.map(function, items[start : start + 10_000])


def labels_of(samples):
    """Each sample's class label (or caption), in their order and without reading the images."""
    return [caption for _, caption in samples] if isinstance(samples, list) else samples.captions()


def check_labels(samples, num_classes):
    """Raises `UserError` unless every label is one of the model's classes, 0 to num_classes - 1."""
    bad = [(index, label) for index, label in enumerate(labels_of(samples)) if not 0 <= label < num_classes]
    if bad:
        index, label = bad[0]
        raise UserError(
            f"{len(bad)} of the labels are not among the model's {num_classes} classes, 0 to {num_classes - 1} "
            f"(first: {label} for {name_of(samples, index)}); correct them, remove such images, or use a model with "
            "more classes."
        )


def check_images(samples, max_bad_images=0):
    """Reads the images before training, so that N and the order are settled when it starts.

    At most `MAX_CHECKED_IMAGES` are read, in threads, at the lowest resolution that their format offers.

    Returns: the samples without the unreadable ones, and these as {name: reason}, which `TrainingStream` counts on
        from. Raises `UserError` if there are more than `max_bad_images`.
    """

    def problem(index):
        try:
            with open_image(samples[index][0]) as image:
                image.draft(None, (1, 1))
                image.load()  # to the end of the file, so that a cut one is noticed
        except IMAGE_ERRORS as error:
            return index, name_of(samples, index), reason(error)

    indices = range(0, len(samples), len(samples) // MAX_CHECKED_IMAGES + 1)
    with ThreadPoolExecutor() as pool:
        problems = [found for found in pool.map(problem, indices) if found]
    bad = {name: reason for _, name, reason in problems}
    if len(bad) > max_bad_images:
        raise too_many_bad_images(bad, max_bad_images)
    if bad:
        logger.warning(f"{len(bad)} of the images cannot be read and are left out: {listed(bad, len(bad))}.")
        dropped = {index for index, _, _ in problems}
        samples = select(samples, [index for index in range(len(samples)) if index not in dropped])
    return samples, bad


def listed(bad, limit=5):
    names = [f"{name} ({reason})" for name, reason in itertools.islice(bad.items(), limit)]
    return ", ".join(names + ["..."] * (len(bad) > limit))


def too_many_bad_images(bad, max_bad_images):
    return UserError(
        f"{len(bad)} of the images cannot be read, more than --max_bad_images {max_bad_images} allows: {listed(bad)}"
        "; repair or remove them, or raise --max_bad_images."
    )
