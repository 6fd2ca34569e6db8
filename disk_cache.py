"""Latents and text embeddings on the disk, for all runs that would compute the same (`--latent_cache_dir`).

An entry is a file of tensors whose name is a hash of everything that its values depend on: of an image the bytes of
its file, the crop and the VAE's weights; of a caption its text and the text encoders' weights. So a run that differs
in other things finds all entries, one with another VAE none, and several runs can share a folder. Files appear under
their names when they are complete. On reading, an entry that is damaged, or another one's, counts as missing.
"""

import hashlib
import json
import os
import secrets
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import UserError
from data_sources import files_identity, image_bytes, in_threads, name_of
from data_utils import not_finite
from images import IMAGE_ERRORS, reason


UNREADABLE = bytes(32)  # in place of a hash
MAX_READ_AHEAD = 10_000  # entries of a rank that are read before training; of more it is seen that they exist


class DiskCache:
    """Key -> tensors and a small dict, in files of `folder`. `settings`: what all its entries depend on."""

    def __init__(self, folder, **settings):
        self.folder = Path(folder)
        self.prefix = json.dumps(settings, sort_keys=True).encode()

    def key(self, content, *more):
        """The key of an entry, from bytes and numbers or texts."""
        return hashlib.sha256(b"\0".join([self.prefix, json.dumps(more).encode(), content])).hexdigest()

    def _path(self, key):
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def __contains__(self, key):
        return self._path(key).exists()

    def write(self, key, tensors, info):
        path = self._path(key)
        metadata = {"key": key, "info": json.dumps(info), "checksum": str(_checksum(tensors))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")  # another run may write it as well
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--latent_cache_dir: {path} can't be written ({reason(error)}): make room, and start "
                "again; what is there already is kept."
            ) from error

    def read(self, key):
        """Tensors and info. Raises OSError if the entry is missing, damaged, or another one's; then it is removed."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("key") != key or metadata["checksum"] != str(_checksum(tensors)):
                raise ValueError("it is not what was written")
            return tensors, json.loads(metadata["info"])
        except (SafetensorError, ValueError, KeyError) as error:
            with suppress(OSError):
                path.unlink()
            raise OSError(f"the cached entry {path} is damaged: {reason(error)}") from error

    def is_sound(self, key):
        try:
            self.read(key)
            return True
        except OSError:
            return False

    def missing(self, keys):
        """Which of the keys, a sequence of N, have to be computed: their indices."""
        is_there = self.is_sound if len(keys) <= MAX_READ_AHEAD else self.__contains__
        return [index for index, found in enumerate(in_threads(is_there, keys)) if not found]


def _checksum(tensors):
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(_bytes(tensors[name]), zlib.crc32(f"{name} {tensors[name].dtype}".encode(), crc))
    return crc


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


# Latents


class LatentsOnDisk:
    """Index and flip of a stream's sample -> what its loader gives of a cached sample."""

    def __init__(self, stream, cache, digests):
        self.cache, self.digests = cache, digests
        self.stream = replace(stream, cache=None)

    def key(self, index, flip):
        """Raises OSError if the image's file can't be read."""
        stream, digest = self.stream, self.digests[index].tobytes()
        if digest == UNREADABLE:
            raise OSError("the file can't be read")
        size = map(int, stream.size_of(index))
        return self.cache.key(digest, *size, stream.image_interpolation_mode, bool(flip))

    def __call__(self, index, flip):
        """Raises OSError if the entry is damaged; the next run makes it anew."""
        tensors, info = self.cache.read(self.key(index, flip))
        return {**info, **tensors}


def cache_latents_on_disk(accelerator, stream, encode, vae, folder, num_workers=0):
    """Encode what is not in the cache, and let the stream give latents; see `data_utils.cache_latents`.

    All processes call this and share the work.
    """
    cache = DiskCache(Path(folder, "latents"), vae=weights_hash(vae))
    latents = LatentsOnDisk(stream, cache, image_digests(accelerator, stream.samples, folder))
    flips = (False, True) if stream.random_flip else (False,)
    readable = np.flatnonzero(latents.digests.any(axis=1))
    bad = dict.fromkeys(np.flatnonzero(~latents.digests.any(axis=1)).tolist(), "the file can't be read")
    share = [(index, flip) for index in my_share(accelerator, readable.tolist()) for flip in flips]
    missing = cache.missing([latents.key(*which) for which in share])
    todo = my_share(accelerator, gathered(accelerator, [share[i] for i in missing]))
    generator = torch.Generator()  # else the loader would draw from, and so move, the global one
    views = DataLoader(_Views(stream, todo), batch_size=None, num_workers=num_workers, generator=generator)
    written = []
    for (index, flip), view in zip(todo, progress(accelerator, views, "Caching latents", len(todo))):
        if "error" in view:
            bad[index] = view["error"]
            continue
        posterior = encode(view.pop("pixel_values")[None])[0]
        if not posterior.isfinite().all():
            raise not_finite(name_of(stream.samples, index))
        cache.write(latents.key(index, flip), {"posterior": posterior}, view)
        written = [latents.key(index, flip)]
    seen = all(key in cache for key in gathered(accelerator, written))
    if not all(gathered(accelerator, [seen])):
        raise UserError("--latent_cache_dir: other machines do not see what this one writes; name a shared folder.")
    bad = dict(gathered(accelerator, list(bad.items())))
    stream.note_bad({name_of(stream.samples, index): why for index, why in bad.items()})
    stream.cache = latents


def my_share(accelerator, items):
    return items[accelerator.process_index :: accelerator.num_processes]


def gathered(accelerator, items):
    """The lists of all processes as one. All call this; the slowest one's work comes before it."""
    return gather_object(items) if accelerator.num_processes > 1 else items


@dataclass
class _Views:
    """What a DataLoader worker runs: the pixels of an image to encode, or why there are none."""

    stream: object
    which: list  # (index, flip)

    def __len__(self):
        return len(self.which)

    def __getitem__(self, i):
        try:
            view = self.stream.view(*self.which[i])
        except IMAGE_ERRORS as error:
            return {"error": reason(error)}
        return {**view, "pixel_values": torch.from_numpy(view["pixel_values"])}


def image_digests(accelerator, samples, folder):
    """A hash of each image file's bytes, uint8 `[N, 32]`; `UNREADABLE` of those that can't be read.

    As long as no file has changed its size or time, what was computed before is taken. All processes call this.
    """

    def digest(index):
        try:
            return hashlib.sha256(image_bytes(samples, index)).digest()
        except IMAGE_ERRORS:
            return UNREADABLE

    path = Path(folder, "digests", f"{files_identity(samples)}.npy")
    found = _load_digests(path, len(samples))
    if all(gathered(accelerator, [found is not None])):
        return found
    mine = my_share(accelerator, range(len(samples)))
    hashed = list(progress(accelerator, in_threads(digest, mine), "Hashing images", len(mine)))
    digests = np.zeros((len(samples), 32), np.uint8)
    for rank, part in enumerate(gathered(accelerator, [b"".join(hashed)])):
        digests[rank :: accelerator.num_processes] = np.frombuffer(part, np.uint8).reshape(-1, 32)
    if accelerator.is_main_process and path.stem != "None" and digests.any(axis=1).all():
        with suppress(OSError):  # then it is done again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
            with open(temporary, "wb") as file:
                np.save(file, digests)
            os.replace(temporary, path)
    return digests


def _load_digests(path, n):
    """What `image_digests` has kept, or None."""
    with suppress(OSError, ValueError, EOFError):
        digests = np.load(path, mmap_mode="r")
        if digests.shape == (n, 32) and digests.dtype == np.uint8:
            return digests


# Text embeddings


class EmbeddingsOnDisk:
    """Caption -> its embeddings, name -> tensor."""

    def __init__(self, cache):
        self.cache = cache

    def __getitem__(self, caption):
        try:
            return self.cache.read(self.cache.key(caption.encode()))[0]
        except OSError as error:
            raise UserError(f"--latent_cache_dir: {error}; start again, and it is made anew.") from error


def cache_embeddings_on_disk(accelerator, captions, embed, *, identity, folder):
    """Encode the captions that are not in the cache. All processes call this and share the work.

    `embed` makes name -> tensor of a caption, and `identity` says what its results depend on.
    """
    cache = DiskCache(Path(folder, "text_embeddings"), **identity)
    share = my_share(accelerator, captions)
    missing = cache.missing([cache.key(caption.encode()) for caption in share])
    todo = my_share(accelerator, gathered(accelerator, [share[i] for i in missing]))
    for caption in progress(accelerator, todo, "Caching text embeddings"):
        cache.write(cache.key(caption.encode()), embed(caption), {"caption": caption})
    accelerator.wait_for_everyone()
    return EmbeddingsOnDisk(cache)


# What the values depend on


def weights_hash(*modules):
    """A hash of models: their classes, configs, weights and precision."""
    digest = hashlib.sha256()
    for module in modules:
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else module.config
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.update(json.dumps([type(module).__name__, config], sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def files_hash(*parts):
    """A hash of all files that tokenizers and the like would be saved in."""
    digest = hashlib.sha256()
    for part in parts:
        with TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(f"{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def progress(accelerator, items, title, total=None):
    return tqdm(items, title, total, disable=not accelerator.is_local_main_process)
