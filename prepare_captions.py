"""Caption images with an image-to-text model of transformers, by default Florence-2 as in the LPL paper.

    python prepare_captions.py --train_data_dir PHOTOS
    accelerate launch prepare_captions.py --dataset_name DATASET --output_dir CAPTIONED

The captions go to metadata.jsonl, and the output is a --train_data_dir for training. In a folder, images that have a
caption in that file already are left alone, and its rows keep their other columns. Another --output_dir, needed for
datasets and shards, gets the image files as well, unchanged. The caption that an image had there stays in the column
original_text. A run that was interrupted goes on where it ended when it is started again.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from arguments import Parser, UserError, run
from captions import is_blank
from data_sources import METADATA_FILES, listed, read_caption, read_folder, read_metadata_file, too_many_bad_images
from images import IMAGE_ERRORS, load_image, open_image, reason


METADATA = METADATA_FILES[0]
ORIGINAL = "original_text"
FLORENCE = "florence-community/Florence-2-large"
CHAT_PROMPT = "Describe this image in detail, in one paragraph. Answer with the description alone."
DEFAULT_PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
AT_LEAST_ONE = "max_new_tokens num_beams batch_size num_workers max_train_samples".split()
SETTINGS = (  # those that must be the same to go on with a run
    "model_name_or_path revision prompt max_new_tokens num_beams caption_column train_data_dir dataset_name "
    "dataset_config_name train_shards image_column"
).split()


# One flag a line reads best.
# fmt: off
def parse_args(argv=None):
    """Parse and check; a wrong flag ends the program with one sentence and exit code 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--train_data_dir", help="folder of images")
    add("--dataset_name", help="Hub id or local folder of a datasets dataset")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--train_shards", nargs="+", metavar="TAR", help="tar shards as webdataset writes them")
    add("--image_column", help="column with the images; of shards the images' extension")
    add("--output_dir", help="where metadata.jsonl and the images go; by default --train_data_dir itself")
    add("--caption_column", default="text", help="column to write")
    add("--overwrite", action="store_true", help="caption the images that have a caption in that column, too")
    add("--model_name_or_path", default=FLORENCE, help="Hub id or folder of the model")
    add("--revision", help="revision of the Hub model")
    add("--cache_dir", help="where downloads are kept")
    add("--prompt", help="what the model is told; by default Florence-2's <MORE_DETAILED_CAPTION>, for models that "
        "chat a request for a description, else nothing")
    add("--max_new_tokens", type=int, default=256, help="tokens of a caption at most")
    add("--num_beams", type=int, help="beams of the search; by default as many as the model's own settings say")
    add("--batch_size", type=int, default=8, help="images that each process captions at a time")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="precision of the model; auto: fp32 "
        "on the CPU, on a GPU bf16, or fp16 where it has no bf16")
    add("--num_workers", type=int, default=4, help="threads of each process that load images")
    add("--max_train_samples", type=int, help="caption the first images only, this many")
    add("--max_bad_images", type=int, help="unreadable images to leave out before giving up; by default none, of "
        "shards 1 in 100")
    args = parser.parse_args(argv)
    try:
        check(args)
    except UserError as error:
        parser.error(str(error))
    return args
# fmt: on


def check(args):
    """What needs no library and no download, a folder's images included. Raises UserError; sets `args.source`."""
    sources = [f"--{name}" for name in ("train_data_dir", "dataset_name", "train_shards") if getattr(args, name)]
    if len(sources) != 1:
        given = " and ".join(sources) or "none"
        raise UserError(f"give one of --train_data_dir, --dataset_name and --train_shards; given: {given}.")
    for name, least in {**dict.fromkeys(AT_LEAST_ONE, 1), "max_bad_images": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}.")
    if args.dataset_config_name and not args.dataset_name:
        raise UserError("--dataset_config_name has no effect without --dataset_name: leave it out.")
    if not args.caption_column.strip() or args.caption_column in ("file_name", "source", ORIGINAL):
        raise UserError(f"--caption_column {args.caption_column!r} is no name for captions: choose another, or text.")
    if args.output_dir is None and not args.train_data_dir:
        raise UserError(f"{sources[0]} needs --output_dir, a folder for images and captions: add it.")
    args.output_dir = Path(args.output_dir or args.train_data_dir)
    in_place = args.train_data_dir and args.output_dir.resolve() == Path(args.train_data_dir).resolve()
    if args.max_train_samples and in_place:
        raise UserError("--max_train_samples in the folder itself would hide its other images: add --output_dir.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"--output_dir {args.output_dir} is a file: name a folder.")
    args.source = open_folder(args) if args.train_data_dir else None
    for name in METADATA_FILES[1:]:
        if (args.output_dir / name).exists():
            raise other_metadata(args.output_dir / name)


def other_metadata(path):
    return UserError(
        f"{path} is there already, while captions are written to a {METADATA} at the top: give another --output_dir, "
        "which gets the rows of a folder's metadata as well."
    )


# Where the images come from


@dataclass
class Source:
    """Images to caption. A key is an image's place in the output; of datasets and shards it lacks the extension."""

    keys: list
    read: object  # index -> (path or bytes of the image file, columns of its row)
    in_place: bool = False
    origin: object = None  # of datasets and shards: index -> where the image comes from, its column `source`
    bad: dict = field(default_factory=dict)  # {name: reason} of what can't be read at all

    def key_of(self, row):
        name = os.path.normpath(row["file_name"])
        return os.path.splitext(name)[0] if self.origin else name

    def name_of(self, key):
        return self.origin(int(os.path.basename(key))) if self.origin else key


def open_folder(args):
    """The images of --train_data_dir, with the columns of their metadata or the captions of their text files."""
    folder, output = Path(args.train_data_dir), args.output_dir
    images, rows = read_folder(args.train_data_dir, args.image_column)
    in_place = output.resolve() == folder.resolve()
    if folder.resolve() in output.resolve().parents:
        raise UserError(f"--output_dir {output} lies in --train_data_dir, whose images it would double: move it out.")
    others = [path for path, _ in rows if in_place and not os.path.samefile(os.path.dirname(path), folder)]
    if others:
        raise other_metadata(others[0])
    columns = {os.path.normpath(os.path.join(os.path.dirname(path), row["file_name"])): row for path, row in rows}
    paths = sorted(images)

    def read(index):
        row = columns.get(paths[index])
        if row is None:
            caption = read_caption(os.path.splitext(paths[index])[0] + ".txt")
            row = {} if is_blank(caption) else {ORIGINAL: caption}
        return paths[index], row

    return Source([os.path.relpath(path, folder) for path in paths], read, in_place)


def open_dataset(args):
    """The images of --dataset_name or --train_shards, with the captions that they have."""
    import numpy as np

    if args.train_shards:
        from shards import open_shards

        samples, bad = open_shards(args.train_shards, args.image_column, args.cache_dir)
        origin = samples.name
    else:
        from data_sources import HubSamples, choose_columns, open_split, undecoded

        name, config, bad = args.dataset_name, args.dataset_config_name, {}
        dataset = open_split(name, config, cache_dir=args.cache_dir)
        image_column, columns = choose_columns(name, dataset.features, args.image_column, None, None, "")
        dataset = undecoded(dataset, image_column, name)
        samples = HubSamples(dataset, image_column, columns, np.arange(len(dataset)))

        def origin(index):
            return f"row {index} of {name}" + (f" ({config})" if config else "")

    def read(index):
        try:
            caption = samples.caption(index)
        except ValueError:  # that of a shard's sample is no text
            caption = None
        return samples.image(index), {"source": origin(index)} | ({} if is_blank(caption) else {ORIGINAL: caption})

    keys = [f"{index // 10_000:05d}/{index:09d}" for index in range(len(samples))]
    return Source(keys, read, origin=origin, bad=bad)


def load(args, source, index):
    """An image as RGB and its entry in the part, its file being in the output then; None and why if unreadable."""
    key = source.keys[index]
    try:
        image, row = source.read(index)
        pixels = load_image(image)
        with open_image(image) as opened:
            kind = opened.format
    except IMAGE_ERRORS as error:
        return None, {"key": key, "error": reason(error)}
    extension = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    name = f"{key}.{extension}" if source.origin else key
    if not source.in_place:
        place(image if isinstance(image, bytes) else Path(image).read_bytes(), args.output_dir / name)
    return pixels, {"key": key, "row": row | {"file_name": name}}


def place(content, path):
    """Writes an image file, wholly or not at all. Raises UserError if another one is there."""
    if path.exists() and path.read_bytes() != content:
        raise UserError(f"{path} is there already and another image: choose another --output_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# The output. Each process appends to a part of its own; when all is done, the first one makes metadata.jsonl of them.


class Parts:
    """What all processes have written so far: {key: entry} of captioned images, {key: reason} of unreadable ones."""

    def __init__(self, args):
        self.output, self.begun, self.done, self.bad = args.output_dir, False, {}, {}
        self.offsets = defaultdict(int)  # path -> how far it was read
        self.settings = {name: getattr(args, name) for name in SETTINGS}
        self.settings["train_data_dir"] = args.train_data_dir and os.path.abspath(args.train_data_dir)

    def paths(self):
        return sorted(self.output.glob(f"{METADATA}.part-*"))

    def append(self, rank, entries):
        start = "" if self.begun else "\n" + as_lines([{"settings": self.settings}])  # the last line may have been cut
        with open(self.output / f"{METADATA}.part-{rank:05d}", "a", encoding="utf-8") as file:
            file.write(start + as_lines(entries))
        self.begun = True

    def read(self):
        """Reads what is new. Raises UserError if a part is from a run with other settings."""
        for path in self.paths():
            with open(path, "rb") as file:
                file.seek(self.offsets[path])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.offsets[path] += len(line)
                    try:
                        entry = json.loads(line)
                    except ValueError:  # cut by an interruption
                        continue
                    if "settings" in entry:
                        self._compare(path, entry["settings"])
                    elif "error" in entry:
                        self.bad[entry["key"]] = entry["error"]
                    else:
                        self.done[entry["key"]] = entry

    def _compare(self, path, settings):
        for name, value in settings.items():
            if value != self.settings.get(name):
                raise UserError(
                    f"{path} is from a run with --{name} {value}: give the same to go on with it, or remove the file "
                    "to start anew."
                )


def as_lines(entries):
    return "".join(json.dumps(entry, ensure_ascii=False, default=str) + "\n" for entry in entries)


def read_metadata(args):
    path = args.output_dir / METADATA
    return read_metadata_file(str(path)) if path.exists() else []


def uncaptioned(args, source):
    """The indices of the images without a caption, or of all with --overwrite. Raises UserError."""
    rows = read_metadata(args)
    if rows and source.origin:
        key = source.key_of(rows[-1])
        if key not in source.keys or rows[-1].get("source") != source.name_of(key):
            raise UserError(f"--output_dir {args.output_dir} holds images of another source: choose another folder.")
    captioned = {source.key_of(row) for row in rows if not is_blank(row.get(args.caption_column))}
    indices = range(len(source.keys))[: args.max_train_samples]
    return [index for index in indices if args.overwrite or source.keys[index] not in captioned]


def merge(args, source, entries):
    """Writes metadata.jsonl: the rows that it has already, and then those of other images, in order."""
    rows, captions = read_metadata(args), {entry["key"]: entry["caption"] for entry in entries}
    there = {source.key_of(row) for row in rows}
    rows += [entry["row"] for entry in entries if entry["key"] not in there]
    for number, row in enumerate(rows):
        caption, old = captions.get(source.key_of(row)), row.get(args.caption_column)
        if caption:
            kept = not is_blank(row.get(ORIGINAL)) or is_blank(old) or old == caption
            rows[number] = row | ({} if kept else {ORIGINAL: old}) | {args.caption_column: caption}
    temporary = args.output_dir / f"{METADATA}.tmp"
    temporary.write_text(as_lines(rows), encoding="utf-8")
    os.replace(temporary, args.output_dir / METADATA)


# The model


class Captioner:
    """An image-to-text model: RGB images -> captions, each of one line."""

    def __init__(self, args, device):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        auto = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        name = auto if args.dtype == "auto" else args.dtype
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        where = {"revision": args.revision, "cache_dir": args.cache_dir}
        try:
            load_model = AutoModelForImageTextToText.from_pretrained
            model, info = load_model(args.model_name_or_path, dtype=dtype, output_loading_info=True, **where)
            self.processor = AutoProcessor.from_pretrained(args.model_name_or_path, **where)
        except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
            raise refused(args, " ".join(str(error).split()).split(". ")[0]) from None
        if info["missing_keys"]:
            raise refused(args, f"its files lack weights such as {min(info['missing_keys'])}")
        if getattr(self.processor, "image_processor", None) is None:
            raise refused(args, "it has no processor for images and text")
        self.model, self.name, self.prompt = model.to(device).eval(), args.model_name_or_path, args.prompt
        self.chats = bool(getattr(self.processor, "chat_template", None))
        if self.prompt is None:
            self.prompt = DEFAULT_PROMPTS.get(model.config.model_type, CHAT_PROMPT if self.chats else None)
        tasks = getattr(self.processor, "tasks_answer_post_processing_type", {})
        if tasks.get(self.prompt, "pure_text") != "pure_text":
            raise UserError(f"--prompt {self.prompt}: what the model answers to that is no text; choose another task.")
        if not model.config.is_encoder_decoder:
            self.processor.tokenizer.padding_side = "left"
        beams = {} if args.num_beams is None else {"num_beams": args.num_beams}
        self.settings = {"do_sample": False, "max_new_tokens": args.max_new_tokens, **beams}

    def inputs(self, images):
        settings = {"padding": True, "return_tensors": "pt"}
        if self.chats:
            text = {"type": "text", "text": self.prompt}
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
            form = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
            return self.processor.apply_chat_template(chats, **form, processor_kwargs=settings)
        if self.prompt is None:
            return self.processor(images=images, return_tensors="pt")
        return self.processor(images=images, text=[self.prompt] * len(images), **settings)

    def __call__(self, images):
        import torch

        try:
            inputs = self.inputs(images).to(self.model.device, self.model.dtype)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.name} can't caption with --prompt {self.prompt} ({reason(error)}): give another one."
            ) from None
        try:
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, **self.settings)
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is too small for so many images: lower --batch_size.") from None
        prompt = inputs.get("input_ids", tokens[:, :0])
        if not self.model.config.is_encoder_decoder and tokens[:, : prompt.shape[1]].equal(prompt):
            tokens = tokens[:, prompt.shape[1] :]  # such models repeat it
        return [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def refused(args, why):
    return UserError(
        f"--model_name_or_path {args.model_name_or_path} can't be loaded as an image-to-text model ({why}); check "
        f"name, connection and --revision, and that its files have transformers' own format, as {FLORENCE} has."
    )


# The run


def caption_images(args, source, indices, parts, state):
    """Captions the share of one process, a batch at a time. Raises UserError."""
    from tqdm.auto import tqdm

    captioner, bad = Captioner(args, state.device), dict(source.bad)
    batches = [indices[start : start + args.batch_size] for start in range(0, len(indices), args.batch_size)]
    bar = tqdm(desc="Captioning", total=len(indices), disable=not state.is_main_process)
    load_one = partial(load, args, source)
    with ThreadPoolExecutor(args.num_workers) as pool, bar:
        coming = pool.map(load_one, batches[0])
        for following in [*batches[1:], []]:
            loaded, coming = list(coming), pool.map(load_one, following)  # loads while the model works
            bad |= {source.name_of(entry["key"]): entry["error"] for image, entry in loaded if image is None}
            if len(bad) > args.max_bad_images:
                raise too_many_bad_images(bad, args.max_bad_images)
            readable = [(image, entry) for image, entry in loaded if image is not None]
            captions = captioner([image for image, _ in readable]) if readable else []
            for (_, entry), caption in zip(readable, captions):
                entry["caption"] = caption
            parts.append(state.process_index, [entry for _, entry in loaded])
            bar.update(len(loaded))


def main(args):
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    source = args.source or open_dataset(args)
    if args.max_bad_images is None:
        args.max_bad_images = math.ceil(len(source.keys) / 100) if args.train_shards else 0
    if len(source.bad) > args.max_bad_images:
        raise too_many_bad_images(source.bad, args.max_bad_images)
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state, parts = PartialState(cpu=cpu), Parts(args)
    parts.read()  # before metadata.jsonl, as parts are removed when that is there
    parts.bad.clear()  # these are tried again
    missing = uncaptioned(args, source)
    left = [index for index in missing if source.keys[index] not in parts.done]
    state.wait_for_everyone()  # all know their share before one of them writes
    state.destroy_process_group()  # from here on they meet in files alone, where no one's wait runs out of time
    share = left[state.process_index :: state.num_processes]
    if share:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        caption_images(args, source, share, parts, state)
    if state.is_main_process:
        finish(args, source, parts, [source.keys[index] for index in missing], {source.keys[index] for index in left})


def finish(args, source, parts, missing, left):
    """Waits until the parts have the keys that were left, and writes metadata.jsonl. Raises UserError.

    A process that fails ends this one, too: `accelerate launch` sees to that.
    """
    column, target = args.caption_column, args.output_dir / METADATA
    parts.read()
    while not left <= parts.done.keys() | parts.bad.keys():
        time.sleep(1)
        parts.read()
    bad = source.bad | {source.name_of(key): why for key, why in parts.bad.items()}
    if len(bad) > args.max_bad_images:
        raise too_many_bad_images(bad, args.max_bad_images)
    entries = [parts.done[key] for key in missing if key in parts.done]
    spoken = [entry for entry in entries if entry["caption"]]
    empty = [source.name_of(entry["key"]) for entry in entries if not entry["caption"]]
    if missing:
        merge(args, source, spoken)
        print(f"Wrote {len(spoken)} captions to column {column} of {target}.")
    else:
        print(
            f"Nothing to do: all images have a caption in column {column} of {target}. --overwrite writes new ones, "
            "another --caption_column adds a column."
        )
    for path in parts.paths():
        path.unlink()
    if bad:
        print(f"Warning: {len(bad)} of the images can't be read: {listed(bad, len(bad))}.", file=sys.stderr)
    if empty:
        print(
            f"Warning: the model said nothing of {len(empty)} of the images: {', '.join(empty)}. Training leaves out "
            "those that have no row, and refuses rows without a caption.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a wrong flag answer at once
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run(main, args)
