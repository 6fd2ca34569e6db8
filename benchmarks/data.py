"""Measure how fast training data comes: images, waiting, start-up, shards and caches. No GPU, no download.

    python benchmarks/data.py

Prints Markdown tables. Everything is made in a temporary folder. Machines are noisy, so variants take turns, and a
ratio is taken within each round: printed are medians, and in brackets the lowest and highest ratio.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps


sys.path.insert(0, str(Path(__file__).parent.parent))
from data_sources import check_images, image_bytes, read_image_folder, read_shards  # noqa: E402
from data_utils import TrainingStream, build_dataloader  # noqa: E402
from images import load_image  # noqa: E402


RESOLUTION = 512
PHOTOS = 5  # of a size, each another file
MANY = 20  # times as many are hashed


# What is measured with


def photo_files(folder, size, count, quality=90):
    """Paths of `count` different JPEG files of a size (width, height), whose noise has a photo's spectrum, 1 / f."""
    width, height = size
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.4, (height, width))]
    noise += [np.roll(noise[0], shift, (0, 1)) for shift in (height // 3, height // 2)]
    luma, red, blue = (plane / plane.std() for plane in noise)
    planes = [luma + 0.3 * colour for colour in (red, -(red + blue) / 2, blue)]
    pixels = np.clip(120 + 50 * np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    paths = [Path(folder, f"{width}x{height}-{i}.jpg") for i in range(count)]
    for i, path in enumerate(paths):  # the noise is periodic, so that it can be moved without a seam
        Image.fromarray(np.roll(pixels, 97 * i, (0, 1))).save(path, quality=quality)
    return list(map(str, paths))


def public_transform(path, interpolation, resolution=RESOLUTION):
    """What the public Diffusers examples do with torchvision: Resize, RandomCrop, RandomHorizontalFlip, ToTensor,
    Normalize. float32 `[3, H, W]` in [-1, 1]."""
    image = Image.open(path).convert("RGB")
    short, long = sorted(image.size)
    long = int(resolution * long / short)
    size = (resolution, long) if image.width <= image.height else (long, resolution)
    image = image.resize(size, Image.Resampling[interpolation.upper()])
    left, top = (int(torch.randint(side - resolution + 1, ())) for side in size)
    image = image.crop((left, top, left + resolution, top + resolution))
    if torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)


def take_turns(variants, rounds, clock=time.perf_counter):
    """{name: function} -> {name: `[rounds]` seconds}; every variant once in each round, and once before."""
    seconds = {name: [] for name in variants}
    for round in range(-1, rounds):
        for name, function in variants.items():
            start = clock()
            function()
            if round >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above, below):
    """Median, lowest and highest of the ratios of two variants' seconds, round by round."""
    ratios = [a / b for a, b in zip(above, below)]
    return f"{median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def print_table(title, *rows):
    """Markdown; the first row is the head."""
    print(f"\n{title}\n")
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if i == 0:
            print("|---" * len(row) + "|")
    sys.stdout.flush()


def stream_of(samples, interpolation="lanczos", resolution=RESOLUTION, **settings):
    return TrainingStream(samples, 0, resolution, random_flip=True, image_interpolation_mode=interpolation, **settings)


# 1: images per second


def measure_images(folder, sizes, rounds):
    rows = [("photo", "interpolation", "images/s", "examples' images/s", "speed, examples' = 1", "decoding's share")]
    for size in sizes:
        paths = photo_files(folder, size, PHOTOS)
        name = f"{size[0]} x {size[1]}, {np.mean([os.path.getsize(path) for path in paths]) / 1000:.0f} kB"
        for interpolation in ("lanczos", "bilinear"):
            stream = stream_of([(path, "") for path in paths], interpolation)
            seconds = take_turns(
                {
                    "stream": lambda: [stream[position] for position in range(PHOTOS)],
                    "examples": lambda: [public_transform(path, interpolation) for path in paths],
                    "decode": lambda: [load_image(path) for path in paths],
                },
                rounds,
                time.process_time,  # what other processes on the machine do matters less
            )
            speeds = [f"{PHOTOS / median(seconds[name]):.1f}" for name in ("stream", "examples")]
            faster = ratio(seconds["examples"], seconds["stream"])
            decoding = median(d / s for d, s in zip(seconds["decode"], seconds["stream"]))
            rows.append((name, interpolation, *speeds, faster, f"{decoding:.0%}"))
    print_table(f"Images per second of a process's CPU time, to {RESOLUTION} px", *rows)


# 2: waiting


def waiting_share(batches, step_seconds, steps):
    """Of the time of some steps, that in which a training process is blocked for the next batch."""
    waited, start = 0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(step_seconds)
    return waited / (time.perf_counter() - start)


def measure_waiting(folder, size, steps, rounds, batch_size=4):
    stream = stream_of([(path, "") for path in photo_files(folder, size, PHOTOS)])
    alone = build_dataloader(stream, batch_size)
    load_seconds = median(take_turns({"batch": lambda: next(alone)}, 10)["batch"])
    shares = {}
    for _ in range(rounds):
        for workers in (0, 1, 2):
            for factor in (2, 1, 0.5):
                batches = build_dataloader(stream, batch_size, num_workers=workers)
                waiting_share(batches, factor * load_seconds, 4)  # workers start, and come as far ahead as they can
                shares.setdefault((workers, factor), []).append(waiting_share(batches, factor * load_seconds, steps))
    rows = [("workers", *(f"a step is {factor} x a batch" for factor in (2, 1, 0.5)))]
    for workers in (0, 1, 2):
        found = [shares[workers, factor] for factor in (2, 1, 0.5)]
        rows.append((workers, *(f"{median(s):.0%} ({min(s):.0%} to {max(s):.0%})" for s in found)))
    title = f"{batch_size} photos of {size[0]} x {size[1]}: {1000 * load_seconds:.0f} ms"
    print_table(f"Share of a step spent waiting for its batch ({title})", *rows)


# 3: start


def write_folder(folder, files, contents):
    """Image files with text files beside them, 1000 in a sub-folder."""
    for i in range(files):
        inner = Path(folder, f"{i // 1000:03d}")
        if i % 1000 == 0:
            inner.mkdir(parents=True)
        (inner / f"{i:06d}.jpg").write_bytes(contents[i % len(contents)])
        (inner / f"{i:06d}.txt").write_text(f"photo number {i}")
    return str(folder)


def write_shards(folder, shards, samples_per_shard, contents):
    Path(folder).mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(Path(folder, f"{shard:06d}.tar"), "w") as tar:
            for i in range(shard * samples_per_shard, (shard + 1) * samples_per_shard):
                for extension, content in (("jpg", contents[i % len(contents)]), ("txt", b"photo number %d" % i)):
                    member = tarfile.TarInfo(f"{i:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(Path(folder, "*.tar"))


def open_samples(path, cache_dir):
    if path.endswith(".tar"):
        return read_shards([path], cache_dir=cache_dir)
    return check_images(read_image_folder(path))


def start(path, cache_dir, num_workers=2, batch_size=16):
    """What a fresh process needs from the imports to the first batch, and its memory after some more batches."""
    mib = {"imports": _memory("self", "status", "VmHWM")}
    begin = time.perf_counter()
    samples, bad = open_samples(path, cache_dir)
    opened = time.perf_counter()
    batches = build_dataloader(stream_of(samples, resolution=32, bad=bad), batch_size, num_workers=num_workers)
    next(batches)
    seconds = {"open": opened - begin, "first": time.perf_counter() - begin}
    for _ in range(min(250, len(samples))):  # workers come to own what they touch of the shared pages
        next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    assert len(workers) == num_workers
    private = [_memory(pid, "smaps_rollup", "Private_Clean", "Private_Dirty") for pid in workers]
    mib |= {"peak": _memory("self", "status", "VmHWM"), "worker": max(private)}
    print(json.dumps({**seconds, "mib": mib, "samples": len(samples)}))


def _memory(process, file, *names):
    lines = Path("/proc", str(process), file).read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.count(":") == 1)
    return sum(int(fields[name].split()[0]) for name in names) / 1024


def fresh_start(path, cache_dir):
    """`start` in a process of its own: the peak that exec inherits from its parent is not in VmHWM."""
    words = [sys.executable, __file__, "--start", path, str(cache_dir)]
    run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure_start(folder, pattern, cache_dir, rounds):
    found = {"folder": [], "shards, first time": [], "shards, index there": []}
    for _ in range(rounds):
        shutil.rmtree(cache_dir, ignore_errors=True)
        found["folder"].append(fresh_start(folder, cache_dir))
        found["shards, first time"].append(fresh_start(pattern, cache_dir))
        found["shards, index there"].append(fresh_start(pattern, cache_dir))
    rows = [("", "samples", "s to open", "s to the first batch", "peak MiB", "of which imports", "a worker's own MiB")]
    for name, starts in found.items():
        seconds = [[run[key] for run in starts] for key in ("open", "first")]
        mib = [median(run["mib"][key] for run in starts) for key in ("peak", "imports", "worker")]
        times = [f"{median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in seconds]
        rows.append((name, starts[0]["samples"], *times, *(f"{m:.0f}" for m in mib)))
    print_table("Start with 2 workers; images of 64 x 48", *rows)
    samples = found["shards, first time"][0]["samples"]
    build = median(a["open"] - b["open"] for a, b in zip(found["shards, first time"], found["shards, index there"]))
    size = sum(path.stat().st_size for path in Path(cache_dir).rglob("*") if path.is_file())
    print(f"\nThe index takes {1000 * build / samples:.3f} s and {size / samples:.0f} kB per 1000 samples.")


# 4: shards against a folder


def forget(paths):
    """Removes files from the kernel's page cache, where it allows that."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_some(samples, count, rng):
    for index in rng.integers(len(samples), size=count):
        image_bytes(samples, index)


def measure_reads(sources, cache_dir, rounds, count):
    """`sources`: {what the images are: (folder, pattern of shards)}; the last are read from the disk, too."""
    rows = [("images", "folder: reads/s", "shards: reads/s", "speed, folder = 1")]
    for name, paths in sources.items():
        files, shards = (open_samples(path, cache_dir)[0] for path in paths)
        rng = np.random.default_rng(0)
        reads = {"files": lambda: read_some(files, count, rng), "shards": lambda: read_some(shards, count, rng)}
        rows.append(_reads_row(f"{name}, in the page cache", count, take_turns(reads, rounds)))
    os.sync()  # a page that is not written yet can't be forgotten
    some, seconds = min(count, len(files)) // 4, {"files": [], "shards": []}
    for round in range(rounds):
        for which, samples in (("files", files), ("shards", shards)):
            forget([path for path, _ in files] if which == "files" else shards.paths)
            begin = time.perf_counter()
            read_some(samples, some, np.random.default_rng(round))
            seconds[which].append(time.perf_counter() - begin)
    rows.append(_reads_row(f"{name}, not in the page cache", some, seconds))
    print_table("Random reads of samples, image and caption", *rows)


def _reads_row(name, count, seconds):
    speeds = [f"{count / median(seconds[which]):.0f}" for which in ("files", "shards")]
    return name, *speeds, ratio(seconds["files"], seconds["shards"])


# 5: the cache of latents


def measure_cache(folder, sizes, rounds):
    from accelerate import PartialState  # here, because fresh processes import this file

    from disk_cache import DiskCache, LatentsOnDisk, image_digests

    rows = [("photo", "decode and transform: ms", "hash: ms", "read a cached latent: ms", "hashing", "reading")]
    for size in sizes:
        paths = photo_files(folder, size, PHOTOS)
        stream = stream_of([(path, "") for path in paths], center_crop=True)
        cached = stream_of(stream.samples, center_crop=True)
        digests = np.stack([np.frombuffer(hashlib.sha256(Path(p).read_bytes()).digest(), np.uint8) for p in paths])
        cached.cache = LatentsOnDisk(cached, DiskCache(Path(folder, "latents")), digests)
        for i in range(PHOTOS):
            for flip in (False, True):
                view = stream.view(i, flip)
                del view["pixel_values"]
                side = RESOLUTION // 8
                cached.cache.cache.write(cached.cache.key(i, flip), {"posterior": torch.randn(8, side, side)}, view)

        def hash_all():
            shutil.rmtree(Path(folder, "digests"), ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress
                image_digests(PartialState(), stream.samples * MANY, folder)

        seconds = take_turns(
            {
                "transform": lambda: [stream[position] for position in range(PHOTOS)],
                "hash": hash_all,
                "read": lambda: [cached[position] for position in range(PHOTOS)],
            },
            rounds,
        )
        seconds["hash"] = [second / MANY for second in seconds["hash"]]
        times = [f"{1000 * median(s) / PHOTOS:.2f}" for s in seconds.values()]
        shares = [ratio(seconds[name], seconds["transform"]) for name in ("hash", "read")]
        rows.append((f"{size[0]} x {size[1]}", *times, *shares))
    print_table("Cached latents (8 x 64 x 64, float32); the time of decoding and transforming is 1", *rows)


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["4000x3000", "2000x1500", "640x480"], help="of photos, width x height")
    add("--files", type=int, default=100_000, help="images in the folder that is opened")
    add("--shards", type=int, default=1000)
    add("--samples_per_shard", type=int, default=100)
    add("--rounds", type=int, default=9, help="in which variants take turns; a third of it where these are slow")
    add("--steps", type=int, default=10, help="of training, whose waiting is measured")
    add("--reads", type=int, default=2000, help="random reads of a round")
    add("--photos", type=int, default=1000, help="of the last size, which are read from a folder and from shards")
    add("--start", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.sizes = [tuple(int(side) for side in size.split("x")) for size in args.sizes]
    return args


def main(words=None):
    args = parse_args(words)
    torch.set_num_threads(1)  # as in a DataLoader's worker
    if args.start:
        return start(*args.start)
    few = max(1, args.rounds // 3)
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        measure_images(folder, args.sizes, args.rounds)
        measure_waiting(folder, args.sizes[len(args.sizes) // 2], args.steps, few)
        measure_cache(folder, args.sizes, args.rounds)
        photos = [Path(path).read_bytes() for path in photo_files(folder, args.sizes[-1], PHOTOS)]
        small = [Path(path).read_bytes() for path in photo_files(folder, (64, 48), PHOTOS)]
        sources = {
            f"{np.mean([len(content) for content in contents]) / 1000:.0f} kB": (
                write_folder(folder / name, files, contents),
                write_shards(folder / f"{name} shards", shards, samples, contents),
            )
            for name, files, shards, samples, contents in (
                ("small", args.files, args.shards, args.samples_per_shard, small),
                ("photos", args.photos, max(1, args.photos // 100), min(args.photos, 100), photos),
            )
        }
        measure_start(*next(iter(sources.values())), folder / "index", few)
        measure_reads(sources, folder / "index", args.rounds, args.reads)


if __name__ == "__main__":
    main()
