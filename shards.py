"""Tar shards as webdataset writes them, as a sequence of samples: an index knows where in them each one lies.

The files of a sample follow each other in its shard and have the same name up to the first dot: `000017.jpg`,
`000017.txt`, `000017.json`, `000017.cls`. The index is built once, by one process of a machine with the others
waiting, and read from the disk as it is needed. It lies in `--cache_dir`; shards whose size or time has changed are
read again. Torch is not imported.
"""

import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import secrets
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from arguments import UserError
from captions import is_blank, is_caption, join_columns, label_number
from images import IMAGE_ERRORS, IMAGE_EXTENSIONS, image_size, reason


VERSION = 2  # of the index; one of another version is built anew
FILES = ("image", "txt", "json")
PLACE = [("offset", "u8"), ("size", "u4")]  # in the shard; of a file that is not there the size is 0
ROW = np.dtype(
    [("shard", "u4"), *((kind, PLACE) for kind in FILES), ("label", "i4"), ("height", "u4"), ("width", "u4")]
)
SAVE_SECONDS = 300  # between savings of an index that is being built
MOST_SHARDS = 1_000_000
MOST_PADDING = 2**20  # bytes behind the end of a shard; some writers fill up to a round number
CAPTIONS = ("txt", "caption", "text")  # where a caption is looked for


def open_shards(patterns, image_column=None, cache_dir=None):
    """Opens shards through their index, which is built if it is not there.

    Args:
        patterns: paths, in which `{000000..001242}` and `*` stand for many, or folders.
        image_column: the extension of the images, if a sample has several.
        cache_dir: where the index is kept; by default in Hugging Face's cache.

    Returns: `ShardSamples`, and {name: reason} of what can't be used: shards that are not there, cut or no tar files,
        and samples without an image. Raises `UserError` if there is not one sample.
    """
    paths, image_column = _expand(patterns), image_column and image_column.lower().lstrip(".")
    identity = json.dumps([VERSION, image_column, sorted({os.path.dirname(path) for path in paths})])
    folder = Path(cache_dir or HF_HOME, "lpl_shards", hashlib.sha256(identity.encode()).hexdigest()[:16])
    try:
        shards, rows = _read_index(folder)
        if _outdated(shards, paths):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                shards, rows = _update_index(folder, paths, image_column)
    except OSError as error:
        raise UserError(
            f"the index of --train_shards can't be kept in {folder} ({reason(error)}): name another folder "
            "with --cache_dir."
        ) from error
    starts = np.cumsum([0] + [shard.rows for shard in shards])
    wanted = {shard.path: (shard, start) for shard, start in zip(shards, starts)}
    wanted = [wanted[path] for path in paths]
    bad = {name: why for shard, _ in wanted for name, why in shard.bad}
    indices = np.concatenate([np.arange(start, start + shard.rows) for shard, start in wanted])
    if not len(indices):
        name, why = next(iter(bad.items()))
        raise UserError(f"--train_shards: there is no image in {len(paths)} shards (first: {name}, {why}).")
    return ShardSamples([shard.path for shard in shards], rows, indices, len(paths)), bad


def _expand(patterns):
    """The absolute paths of all shards, each once, in the order given. Raises `UserError`."""
    try:
        expanded = (word for pattern in patterns for word in _braces(os.path.expanduser(pattern)))
        words = list(itertools.islice(expanded, MOST_SHARDS))
    except UnbalancedBracesError:
        raise UserError(f"--train_shards {' '.join(patterns)}: a brace is open; write {{000000..001242}}.") from None
    if any("://" in word or word.startswith("pipe:") for word in words):
        raise UserError(
            "--train_shards takes files; download them first (`hf download`), or use --dataset_name with --streaming."
        )
    packed = [word for word in words if word.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))]
    if packed:
        raise UserError(
            f"--train_shards {packed[0]}: in a compressed shard no sample can be found without reading all "
            "before it; unpack it to a .tar."
        )
    words = [os.path.join(glob.escape(word), "*.tar") if os.path.isdir(word) else word for word in words]
    paths = []
    for word in words:
        is_pattern = glob.has_magic(word) and not os.path.exists(word)
        found = sorted(glob.glob(word)) if is_pattern else [word]
        if not found:
            raise UserError(f"--train_shards {word}: no file fits; correct the pattern, or leave it out.")
        paths += found
    if not paths or not any(map(os.path.isfile, paths)):
        raise UserError(f"--train_shards {' '.join(patterns)}: there is no such file.")
    return list(dict.fromkeys(os.path.abspath(path) for path in paths))


def _braces(pattern):
    return [pattern] if os.path.exists(pattern) else braceexpand(pattern)


# The index of a folder: `index.json` has what `_Shard` says of each shard that was ever asked for, and the rows of all
# are in a file that is mapped into memory.


@dataclass
class _Shard:
    path: str
    size: int | None  # None: there is no such file
    time: int | None  # of its last change, in ns
    rows: int = 0  # samples
    bad: tuple = ()  # (name, reason) of what can't be used

    def is_like(self, other):
        return other is not None and (self.size, self.time) == (other.size, other.time)


def _update_index(folder, paths, image_column):
    """Reads the index in a folder, after what is new or has changed was added. Returns its `_Shard`s and rows."""
    old, old_rows = _read_index(folder)
    new = _outdated(old, paths)
    starts = np.cumsum([0] + [shard.rows for shard in old])
    kept = [(shard, start) for shard, start in zip(old, starts) if shard.path not in new]
    shards = [shard for shard, _ in kept]
    parts = [np.array(old_rows[start : start + shard.rows]) for shard, start in kept]
    saved = time.monotonic()

    def save():
        for number, rows in enumerate(parts):
            rows["shard"] = number
        _write_index(folder, shards, np.concatenate([np.empty(0, ROW), *parts]))

    bar = tqdm(desc="Indexing shards", total=len(new), disable=os.environ.get("LOCAL_RANK", "0") != "0")
    try:
        with _processes(len(new)) as map_in_processes, bar:
            scanned = map_in_processes(partial(_scan_shard, image_column=image_column), new)
            for shard, (rows, bad) in zip(new.values(), scanned):
                shards.append(replace(shard, rows=len(rows), bad=bad))
                parts.append(rows)
                bar.update(1)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
    finally:  # what is done need not be done again after an interruption
        save()
    return _read_index(folder)


def _outdated(shards, paths):
    """{path: `_Shard`} of those paths that are not, or not as they are now, among the shards of an index."""
    known, now = {shard.path: shard for shard in shards}, {path: _stat(path) for path in paths}
    return {path: shard for path, shard in now.items() if not shard.is_like(known.get(path))}


def _stat(path):
    try:
        status = os.stat(path)
    except OSError:
        return _Shard(path, None, None)
    return _Shard(path, status.st_size, status.st_mtime_ns)


def _read_index(folder):
    """The `_Shard`s and the memory-mapped rows; none of both if there is no index, or it is damaged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        rows = np.load(folder / index["rows"], mmap_mode="r")
        shards = [_Shard(**shard) for shard in index["shards"]]
        if rows.dtype == ROW and len(rows) == sum(shard.rows for shard in shards):
            return shards, rows
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        pass
    return [], np.empty(0, ROW)


def _write_index(folder, shards, rows):
    """Written anew beside the old one, which other runs may have mapped, and then put in its place."""
    name = f"rows-{secrets.token_hex(4)}.npy"
    np.save(folder / name, rows)
    index = {"rows": name, "shards": [asdict(shard) for shard in shards]}
    (folder / "index.tmp").write_text(json.dumps(index))
    os.replace(folder / "index.tmp", folder / "index.json")
    for old in folder.glob("rows-*.npy"):
        if old.name != name:
            old.unlink(missing_ok=True)


@contextmanager
def _processes(num_tasks):
    """A `map` that shares work among processes, where these can start without importing everything again."""
    workers = min(num_tasks, os.cpu_count() or 1)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield map
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        yield pool.map


def _end_with(parent):
    """A process that waits for work would go on waiting after its parent was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _scan_shard(path, image_column):
    """The rows of a shard, in its order, and what is bad in it, [(name, reason)]."""
    rows, bad = [], []

    def add(tar, key, files):
        if "other image" in files:
            files.setdefault("image", files["other image"])
        if not files.keys() & {"image", "txt", "cls"}:
            return  # such as a README
        try:
            rows.append(_row(tar, files))
        except IMAGE_ERRORS as error:
            bad.append((f"{files['image'].name if 'image' in files else key} in {path}", reason(error)))

    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            key, files = None, {}
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps them all
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if os.path.join(folder, stem) != key:
                    if key is not None:
                        add(tar, key, files)
                    key, files = os.path.join(folder, stem), {}
                files.setdefault(_kind(extension.lower(), image_column), member)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end, so it was cut")
            if os.path.getsize(path) - tar.offset > MOST_PADDING:
                raise tarfile.ReadError(f"there is nothing from byte {tar.offset} on")
            if key is not None:
                add(tar, key, files)
    except (OSError, tarfile.TarError) as error:  # the last sample, which may be incomplete, is left out as well
        at = f" after {len(rows)} samples" if rows else ""
        bad.append((path, reason(error) + at))
    if not rows and not bad:
        bad.append((path, "there is no sample in it"))
    return np.array(rows, ROW), bad


def _kind(extension, image_column):
    """image, txt, json or cls, or None for files of which no use is made.

    `depth.png` is another image, to be taken if there is no `png`, unless it is the image column.
    """
    if extension in ("txt", "json", "cls"):
        return extension
    if "." + extension.rpartition(".")[2] not in IMAGE_EXTENSIONS or image_column not in (None, extension):
        return None
    return "other image" if "." in extension and image_column is None else "image"


def _row(tar, files):
    """A sample's row. Raises one of `IMAGE_ERRORS`."""
    if "image" not in files:
        raise ValueError("there is no image beside it")
    places = [(files[kind].offset_data, files[kind].size) if kind in files else (0, 0) for kind in FILES]
    with tar.extractfile(files["image"]) as file:
        size = image_size(file)
    label = -1  # none; captions may be all that is needed
    if "cls" in files:
        text = tar.extractfile(files["cls"]).read().decode(errors="replace").strip()
        label = label_number(text)
    return 0, *places, label, *size


@dataclass
class ShardSamples:
    """The samples of shards as (image bytes, caption or label) pairs, read one at a time.

    Captions are those of `caption_columns`: `txt` is the text file, other names are fields of the json file. Without
    them it is the text file, or else the json file's `caption` or `text`.
    """

    paths: list  # of the shards in the index
    rows: np.ndarray  # [..] ROW, of all samples that they have
    indices: np.ndarray  # [N], the rows that are used
    num_shards: int  # that were asked for
    caption_columns: list | None = None
    caption_weights: list | None = None
    instance_prompt: str | None = None  # the caption of samples that have none
    labels: np.ndarray | None = None  # [..] int, of all rows, in place of captions

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        """Raises OSError or ValueError if a file can't be read or there is no caption."""
        with self._opened(index) as (row, shard):
            return _read(shard, row["image"]), self._caption(index, row, shard)

    def image(self, index):
        """The image's file, whether there is a caption or not. Raises OSError."""
        with self._opened(index) as (row, shard):
            return _read(shard, row["image"])

    def caption(self, index):
        """The caption or label without the image. Raises OSError or ValueError."""
        with self._opened(index) as (row, shard):
            return self._caption(index, row, shard)

    def fields(self, index):
        """What is known of a sample: the fields of its json file, and the text file's text as `txt`."""
        with self._opened(index) as (row, shard):
            return self._fields(row, shard)

    @contextmanager
    def _opened(self, index):
        row = self.rows[self.indices[index]]
        with open(self.paths[row["shard"]], "rb", buffering=0) as shard:
            yield row, shard

    def _caption(self, index, row, shard):
        if self.labels is not None:
            return int(self.labels[self.indices[index]])
        fields = self._fields(row, shard)
        columns = self.caption_columns or [next((name for name in CAPTIONS if not is_blank(fields.get(name))), "txt")]
        caption = join_columns([fields.get(name) for name in columns], self.caption_weights)
        caption = self.instance_prompt if is_blank(caption) else caption
        if not is_caption(caption):
            raise ValueError("it has no caption" if is_blank(caption) else f"its caption is no text: {caption!r:.40}")
        return caption

    @staticmethod
    def _fields(row, shard):
        fields = json.loads(_read(shard, row["json"])) if row["json"]["size"] else {}
        if not isinstance(fields, dict):
            raise ValueError("its .json holds no fields")
        if row["txt"]["size"]:
            fields["txt"] = " ".join(_read(shard, row["txt"]).decode("utf-8-sig").split())
        return fields

    def captions(self):
        """The caption or label of each sample that has one, None of the others, without reading the images."""

        def caption(index):
            try:
                return self.caption(index)
            except (OSError, ValueError, RecursionError):
                return None

        return self.labels[self.indices].tolist() if self.labels is not None else map(caption, range(len(self)))

    def sizes(self):
        """(height, width) of the images, `[N, 2]`."""
        return np.stack([self.rows[name][self.indices] for name in ("height", "width")], axis=1)

    def files_identity(self):
        used, number = np.unique(self.rows["shard"][self.indices], return_inverse=True)
        digest = hashlib.sha256(repr([_stat(self.paths[shard]) for shard in used]).encode())
        digest.update(number.tobytes() + self.rows["image"][self.indices].tobytes())
        return digest.hexdigest()[:32]

    def select(self, indices):
        return replace(self, indices=self.indices[indices])

    def name(self, index):
        row = self.rows[self.indices[index]]
        path, start = self.paths[row["shard"]], int(row["image"]["offset"]) - tarfile.BLOCKSIZE
        try:
            with open(path, "rb") as shard:
                shard.seek(start)
                header = shard.read(tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
                if header[tarfile.LENGTH_NAME - 1]:  # it may be cut, and the rest elsewhere
                    member += f"... (byte {start})"
        except (OSError, tarfile.TarError):
            member = f"the image at byte {start}"
        return f"{member} in {path}"


def _read(shard, place):
    shard.seek(int(place["offset"]))
    content, size = b"", int(place["size"])
    while len(content) < size:  # mostly once; without a buffer less may come than was asked for
        part = shard.read(size - len(content))
        if not part:
            raise OSError("the shard has become shorter")
        content += part
    return content
