"""benchmarks/data.py measures what it says, at tiny sizes."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import data
import numpy as np
import pytest
import torch
from PIL import Image

from images import load_image, transform


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear"])
def test_the_examples_transform_does_the_work_of_ours(tmp_path, interpolation):
    (path,) = data.photo_files(tmp_path, (90, 90), 1)  # a square: there is only one crop
    ours = [transform(load_image(path), 64, True, flip, interpolation)["pixel_values"] for flip in (False, True)]
    assert np.abs(ours[0] - ours[1]).max() > 0.1
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        pixels = data.public_transform(path, interpolation, resolution=64)
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        seen |= {i for i in (0, 1) if np.abs(pixels.numpy() - ours[i]).max() < 1e-6}
    assert seen == {0, 1}


def test_the_examples_transform_crops_at_random(tmp_path):
    gradient = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "wide.png")
    torch.manual_seed(0)
    pixels = [data.public_transform(tmp_path / "wide.png", "bilinear", resolution=64) for _ in range(30)]
    assert {tuple(p.shape) for p in pixels} == {(3, 64, 64)}
    lefts = {round(float((p.min() + 1) * 127.5)) for p in pixels}
    assert len(lefts) > 10 and min(lefts) < 10 and max(lefts) > 54  # of 0 to 64


def test_photos_differ_and_compress_like_photos(tmp_path):
    paths = data.photo_files(tmp_path, (640, 480), 2)
    images = [np.asarray(Image.open(path)) for path in paths]
    assert images[0].shape == (480, 640, 3) and (images[0] != images[1]).mean() > 0.5
    for path in paths:
        assert 1 < 8 * os.path.getsize(path) / (640 * 480) < 4  # bits per pixel


def test_waiting_share(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(data.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))

    def batches():
        while True:
            data.time.sleep(1)
            yield

    assert data.waiting_share(batches(), step_seconds=3, steps=5) == pytest.approx(0.25)
    assert data.waiting_share(iter(range(5)), step_seconds=3, steps=5) == 0


def test_ratio_is_taken_round_by_round():
    assert data.ratio([2, 40, 3], [1, 10, 1]) == "3 (2 to 4)"


@pytest.mark.slow
def test_all_tables(capsys):
    data.main(
        "--sizes 96x64 --files 30 --shards 3 --samples_per_shard 10 --photos 8 --reads 20 --rounds 2 --steps 2".split()
    )
    tables = re.findall(r"^([^|\n].*)\n\n\|(.*)\n\|[-|]+\n((?:\|.*\n)+)", capsys.readouterr().out, re.MULTILINE)
    rows = {title.split(" ")[0]: body.splitlines() for title, _, body in tables}
    assert {title: len(body) for title, body in rows.items()} == {
        "Images": 2,
        "Share": 3,
        "Cached": 1,
        "Start": 3,
        "Random": 3,
    }
    for line in rows["Start"]:
        _, name, samples, *_, peak, imports, worker, _ = (cell.strip() for cell in line.split("|"))
        assert samples == "30" and int(peak) >= int(imports) > int(worker) > 0, name


def test_folder_and_shards_hold_the_same_samples(tmp_path):
    contents = [Path(path).read_bytes() for path in data.photo_files(tmp_path, (64, 48), 2)]
    pattern = data.write_shards(tmp_path / "shards", 2, 5, contents)
    samples, bad = data.open_samples(pattern, tmp_path / "index")
    assert not bad and len(samples) == 10
    files, _ = data.open_samples(data.write_folder(tmp_path / "folder", 10, contents), None)
    for i in range(10):
        assert samples[i] == (contents[i % 2], f"photo number {i}")
        assert data.image_bytes(files, i) == contents[i % 2] and files[i][1] == f"photo number {i}"
