"""Caches on the disk: found again when nothing that matters has changed, made anew when something has."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import AutoencoderKL
from marks import slow_but
from PIL import Image
from safetensors.torch import load, save_file
from tiny_models import build_photo_folder, build_tiny_vae

import disk_cache
from arguments import UserError
from data_sources import read_image_folder
from data_utils import TrainingStream, build_dataloader
from disk_cache import DiskCache, cache_embeddings_on_disk, cache_latents_on_disk, files_hash, weights_hash
from shards import open_shards


pytestmark = pytest.mark.usefixtures("time_limit")
FLAGS = ("--center_crop", "--random_flip", "--seed", 3, "--proportion_empty_prompts", 0.3)
ALONE = SimpleNamespace(
    process_index=0,
    num_processes=1,
    is_main_process=True,
    is_local_main_process=True,
    wait_for_everyone=lambda: None,
)


@pytest.fixture
def counted(monkeypatch):
    """What was computed and not found in a cache: latents and captions, in their order."""
    computed = {"latents": [], "captions": []}
    write = DiskCache.write

    def count(self, key, tensors, info):
        computed[self.folder.name.replace("text_embeddings", "captions")].append(info.get("caption", key))
        return write(self, key, tensors, info)

    monkeypatch.setattr(DiskCache, "write", count)
    return computed


def forget(computed):
    for found in computed.values():
        found.clear()


def losses(output):
    return [line["loss"] for line in read_log(output)]


def entries(folder, kind="latents"):
    return sorted(Path(folder, kind).rglob("*.safetensors"))


@pytest.mark.parametrize("prior", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cached_run_is_the_run_without_a_cache(train, tmp_path, photos, prior, counted):
    flags = FLAGS + ("--dataloader_num_workers", 1, "--logging_steps", 1, "--lpl_weight", 0.1)
    if prior:
        flags += ("--with_prior_preservation", "--class_data_dir", photos, "--class_prompt", "a class")
        flags += ("--num_class_images", 3)
    plain = train(*flags, name="plain")
    cached = train(*flags, "--latent_cache_dir", tmp_path / "cache", name="cached")
    assert counted["latents"] and counted["captions"]
    again = train(*flags, "--latent_cache_dir", tmp_path / "cache", name="again")
    assert losses(cached) == losses(again) and len(losses(plain)) == 4
    assert losses(plain) == pytest.approx(losses(cached), rel=1e-4)  # where images are encoded as a batch


def test_what_does_not_change_the_values_recomputes_nothing(train, tmp_path, photos, counted):
    cache = ("--latent_cache_dir", tmp_path / "cache", "--lpl_weight", 0)
    train(*FLAGS, *cache, name="first")
    images, captions = len(os.listdir(photos)) - 1, set(counted["captions"])
    assert len(counted["latents"]) == 2 * images and len(captions) == len(counted["captions"]) and "" in captions
    forget(counted)
    others = ("--learning_rate", 0.01, "--train_batch_size", 3, "--lpl_weight", 0.1, "--seed", 9, "--center_crop")
    train(*cache, *others, name="second")
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    train(*FLAGS, *cache, data=("--train_data_dir", moved), name="third")
    assert counted == {"latents": [], "captions": []}
    train(*FLAGS, *cache, "--trigger_word", "sks", name="fourth")  # other captions of the same images
    assert counted["latents"] == [] and set(counted["captions"]) == {f"sks, {text}" for text in captions - {""}}


CHANGES = ("resolution", "image_interpolation_mode", "vae", "vae_dtype", "image", "text_encoder")


@pytest.mark.parametrize("what", slow_but(("vae", "image", "text_encoder"), CHANGES))
def test_what_changes_the_values_makes_new_entries(train, tiny_sd, tmp_path, photos, counted, what):
    folder = shutil.copytree(photos, tmp_path / "photos")
    cache = ("--latent_cache_dir", tmp_path / "cache", "--center_crop", "--lpl_weight", 0)
    train(*cache, data=("--train_data_dir", folder), steps=1, name="first")
    images, captions = len(counted["latents"]), len(counted["captions"])
    forget(counted)
    changes, model = (), tiny_sd
    if what == "resolution":
        changes = ("--resolution", 32)
    elif what == "image_interpolation_mode":
        changes = ("--image_interpolation_mode", "box")
    elif what == "vae_dtype":
        changes = ("--vae_dtype", "bf16")
    elif what == "vae":
        vae = AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
        with torch.no_grad():
            vae.decoder.conv_out.bias[0] += 1e-3  # of one weight, even of the decoder
        vae.save_pretrained(tmp_path / "vae")
        changes = ("--pretrained_vae_model_name_or_path", tmp_path / "vae")
    elif what == "image":
        path = sorted(folder.glob("*.png"))[2]
        times = path.stat().st_mtime_ns
        Image.new("RGB", (70, 70), "red").save(path)
        os.utime(path, ns=(times + 10**6, times + 10**6))
    elif what == "text_encoder":
        from transformers import CLIPTextModel

        model = shutil.copytree(tiny_sd, tmp_path / "model")
        encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        with torch.no_grad():
            next(encoder.parameters())[0, 0] += 1e-3
        encoder.save_pretrained(model / "text_encoder")
    train(*cache, *changes, data=("--train_data_dir", folder), model=model, steps=1, name="second")
    new = {"image": (1, 0), "text_encoder": (0, captions)}.get(what, (images, 0))
    assert (len(counted["latents"]), len(counted["captions"])) == new


KINDS = ("latents", "text_embeddings")
DAMAGES = ("truncated", "empty", "one bit", "another entry", "no tensors")
FAST = (("one bit", "latents"), ("another entry", "text_embeddings"), ("no tensors", "latents"))


@pytest.mark.parametrize("damage, kind", slow_but(FAST, itertools.product(DAMAGES, KINDS)))
def test_a_damaged_or_foreign_entry_is_made_anew(train, tmp_path, counted, kind, damage):
    flags = (*FLAGS, "--latent_cache_dir", tmp_path / "cache", "--lpl_weight", 0)
    clean = train(*flags, steps=2, name="first")
    path, other = entries(tmp_path / "cache", kind)[:2]
    content, values = path.read_bytes(), load(path.read_bytes())
    forget(counted)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "one bit":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "another entry":
        shutil.copy(other, path)
    else:
        save_file({"posterior": torch.zeros(1)}, path)
    again = train(*flags, steps=2, name="second")
    assert sum(map(len, counted.values())) == 1
    made = load(path.read_bytes())
    assert made.keys() == values.keys() and all(made[name].equal(values[name]) for name in values)
    assert losses(again) == losses(clean)


def id_of(pixels):
    """The id of an image of `make_folder`, whose red value it is."""
    return round(float((pixels[0].mean() + 1) * 127.5))


def make_folder(folder, n):
    folder.mkdir()
    rows = []
    for number in range(n):
        image = Image.new("RGB", (8 + number % 3, 9), (number, 0, 0))
        image.putpixel((0, 4), (number, 99, 0))  # left and right differ
        image.save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": f"photo {number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def encode(pixels):
    """A VAE that keeps the picture."""
    return torch.cat([pixels, pixels], dim=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_caption_crop_and_latent_of_every_sample_agree(tmp_path, num_workers):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 13)))
    vae = build_tiny_vae()

    def stream():
        return TrainingStream(samples, 5, 8, center_crop=True, random_flip=True, proportion_empty_prompts=0.2)

    cached = stream()
    cache_latents_on_disk(ALONE, cached, encode, vae, tmp_path / "cache", num_workers)
    plain = build_dataloader(stream(), 3, num_workers=0)
    for batch, expected, _ in zip(build_dataloader(cached, 3, num_workers=num_workers), plain, range(12)):
        assert "pixel_values" not in batch
        assert batch["posteriors"].equal(encode(expected["pixel_values"]))
        for name in ("positions", "original_sizes", "crop_top_lefts", "target_sizes"):
            assert batch[name].equal(expected[name])
        assert batch["captions"] == expected["captions"]
        numbers = [id_of(posterior) for posterior in batch["posteriors"]]
        assert all(caption in ("", f"photo {n}") for caption, n in zip(batch["captions"], numbers))


def test_images_that_are_the_same_share_their_entries_whatever_they_are_read_from(tmp_path, counted):
    folder = make_folder(tmp_path / "photos", 4)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(folder.glob("*.png")):
            for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shutil.copy(folder / "000.png", folder / "copy.png")
    (folder / "metadata.jsonl").unlink()
    vae = build_tiny_vae()
    stream = TrainingStream(read_image_folder(str(folder), instance_prompt="x"), 5, 8, center_crop=True)
    cache_latents_on_disk(ALONE, stream, encode, vae, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 4
    forget(counted)
    samples, _ = open_shards([str(tmp_path / "0.tar")], cache_dir=tmp_path)
    stream = TrainingStream(samples, 5, 8, center_crop=True)
    cache_latents_on_disk(ALONE, stream, encode, vae, tmp_path / "cache")
    assert counted["latents"] == [] and id_of(stream[0]["posterior"]) == int(samples.name(stream.index(0))[:3])


def test_an_image_that_cannot_be_read_is_counted_as_without_a_cache(tmp_path):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 6)))
    (tmp_path / "photos" / "003.png").write_bytes(b"junk")
    stream = TrainingStream(samples, 5, 8, center_crop=True)
    with pytest.raises(UserError, match="1 of the images .*003.png .not an image"):
        cache_latents_on_disk(ALONE, stream, encode, build_tiny_vae(), tmp_path / "cache")
    stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=1)
    cache_latents_on_disk(ALONE, stream, encode, build_tiny_vae(), tmp_path / "cache")
    assert {id_of(stream[position]["posterior"]) for position in range(6)} == {0, 1, 2, 4, 5}


def test_an_entry_damaged_during_training_is_passed_over_within_the_allowance(tmp_path):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 6)))
    stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=1)
    cache_latents_on_disk(ALONE, stream, encode, build_tiny_vae(), tmp_path / "cache")
    lost = id_of(stream[2]["posterior"])
    disk_path = stream.cache.cache._path(stream.cache.key(stream.index(2), False))
    disk_path.write_bytes(disk_path.read_bytes()[:-1])
    assert id_of(stream[2]["posterior"]) == id_of(stream[3]["posterior"]) != lost
    assert "damaged" in next(iter(stream.bad.values()))


def test_latents_that_are_not_finite_are_not_kept(tmp_path):
    stream = TrainingStream(read_image_folder(str(make_folder(tmp_path / "photos", 2))), 5, 8, center_crop=True)
    with pytest.raises(UserError, match="latents of .*000.png are not finite"):
        cache_latents_on_disk(ALONE, stream, lambda pixels: pixels / 0, build_tiny_vae(), tmp_path / "cache")
    assert not entries(tmp_path / "cache")


@pytest.fixture
def two_processes(monkeypatch):
    """Calls a function in two threads that take each other for processes; returns both results."""
    place, barrier, sent = threading.local(), threading.Barrier(2, timeout=30), {}

    def gather_object(objects):
        sent[place.rank] = objects
        barrier.wait()
        everything = [*sent[0], *sent[1]]
        barrier.wait()
        return everything

    monkeypatch.setattr(disk_cache, "gather_object", gather_object)

    def run(function):
        def as_process(rank):
            place.rank = rank
            wait = {"wait_for_everyone": barrier.wait, "is_main_process": rank == 0}
            return function(SimpleNamespace(**{**vars(ALONE), **wait, "process_index": rank, "num_processes": 2}))

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_process, range(2)))

    return run


def test_two_processes_share_what_is_missing(tmp_path, two_processes, counted):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 12)))
    (tmp_path / "photos" / "001.png").write_bytes(b"junk")  # its process has nothing else to find fault with
    vae, embedded = build_tiny_vae(), []

    def run(accelerator):
        stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=1)
        made = []

        def encode_and_count(pixels):
            made.append(id_of(pixels[0]))
            return encode(pixels)

        def embed(caption):
            embedded.append(caption)
            return {"x": torch.tensor([len(caption)])}

        cache_latents_on_disk(accelerator, stream, encode_and_count, vae, tmp_path / "cache")
        captions = [f"caption {n}" for n in range(5)]
        on_disk = cache_embeddings_on_disk(accelerator, captions, embed, identity={}, folder=tmp_path / "cache")
        assert [on_disk[caption]["x"].item() for caption in captions] == [9] * 5
        assert {id_of(stream[p]["posterior"]) for p in range(12)} == set(range(12)) - {1}
        return made

    made = two_processes(run)
    assert sorted(made[0] + made[1]) == [n for n in range(12) if n != 1] and {len(part) for part in made} == {5, 6}
    assert sorted(embedded) == [f"caption {n}" for n in range(5)]
    # After one process was interrupted, its part is not left to it alone.
    stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=1)
    cache_latents_on_disk(ALONE, stream, encode, vae, tmp_path / "cache")
    for index in (3, 5, 7, 9):
        stream.cache.cache._path(stream.cache.key(index, False)).unlink()
    made = two_processes(run)
    assert sorted(made[0] + made[1]) == [3, 5, 7, 9] and {len(part) for part in made} == {2}


def test_another_machine_that_does_not_see_the_folder(tmp_path, two_processes, monkeypatch):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 4)))
    vae = build_tiny_vae()

    def run(accelerator):
        stream = TrainingStream(samples, 5, 8, center_crop=True)
        with pytest.raises(UserError, match="other machines do not see what this one writes"):
            cache_latents_on_disk(accelerator, stream, encode, vae, tmp_path / f"cache{accelerator.process_index}")

    two_processes(run)


def test_a_file_that_could_not_be_read_once_has_no_entry(tmp_path, monkeypatch, counted):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 4)))
    read, failing = disk_cache.image_bytes, {1, 2}

    def read_or_fail(samples, index):
        if index in failing:
            raise OSError("the network is gone")
        return read(samples, index)

    monkeypatch.setattr(disk_cache, "image_bytes", read_or_fail)
    vae, cache = build_tiny_vae(), tmp_path / "cache"
    stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=2)
    cache_latents_on_disk(ALONE, stream, encode, vae, cache)
    assert len(stream.bad) == 2 and {id_of(stream[p]["posterior"]) for p in range(4)} == {0, 3}
    failing.clear()
    stream = TrainingStream(samples, 5, 8, center_crop=True)
    cache_latents_on_disk(ALONE, stream, encode, vae, cache)
    assert len(counted["latents"]) == 4 and {id_of(stream[p]["posterior"]) for p in range(4)} == {0, 1, 2, 3}


def test_a_damaged_entry_among_very_many_is_made_anew_by_the_next_run(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(disk_cache, "MAX_READ_AHEAD", 3)
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 6)))
    vae = build_tiny_vae()

    def cached_stream():
        stream = TrainingStream(samples, 5, 8, center_crop=True, max_bad_images=1)
        cache_latents_on_disk(ALONE, stream, encode, vae, tmp_path / "cache")
        return stream

    stream = cached_stream()
    stream.cache.cache._path(stream.cache.key(4, False)).write_bytes(b"")
    forget(counted)
    stream = cached_stream()  # sees that there is a file
    assert {id_of(stream[p]["posterior"]) for p in range(6)} == {0, 1, 2, 3, 5} and counted["latents"] == []
    stream = cached_stream()
    assert {id_of(stream[p]["posterior"]) for p in range(6)} == set(range(6)) and len(counted["latents"]) == 1


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_damaged_digests_are_computed_again(tmp_path, damage):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 5)))
    digests = disk_cache.image_digests(ALONE, samples, tmp_path / "cache").copy()
    path = next((tmp_path / "cache" / "digests").iterdir())
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    assert np.array_equal(disk_cache.image_digests(ALONE, samples, tmp_path / "cache"), digests)
    assert np.array_equal(np.load(path), digests)
    (tmp_path / "file").write_text("")
    assert np.array_equal(disk_cache.image_digests(ALONE, samples, tmp_path / "file"), digests)  # can't be kept


def test_what_is_there_is_not_read_again_until_a_file_changes(tmp_path, monkeypatch):
    samples = read_image_folder(str(make_folder(tmp_path / "photos", 5)))
    digests = disk_cache.image_digests(ALONE, samples, tmp_path / "cache")
    monkeypatch.setattr(disk_cache, "image_bytes", lambda *args: pytest.fail("an image was read"))
    assert np.array_equal(disk_cache.image_digests(ALONE, samples, tmp_path / "cache"), digests)
    assert len({digest.tobytes() for digest in digests}) == 5
    os.utime(tmp_path / "photos" / "001.png", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="an image was read"):
        disk_cache.image_digests(ALONE, samples, tmp_path / "cache")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "save_file", full)
    with pytest.raises(UserError, match="--latent_cache_dir: .* can't be written .No space left.*make room"):
        DiskCache(tmp_path, kind="test").write("ab" * 32, {"x": torch.ones(2)}, {})


def test_embeddings_are_those_of_their_captions_in_every_precision(tmp_path):
    captions = ["", "photo", "photo\0", "Foto 1/2: ü", "x" * 5000]

    def embed(caption):
        ids = torch.frombuffer(bytearray(caption.encode() or b"\1"), dtype=torch.uint8)
        return {"ids": ids, "half": ids.to(torch.bfloat16), "mask": ids > 64, "scalar": ids.float().mean()}

    on_disk = cache_embeddings_on_disk(ALONE, captions, embed, identity={"a": 1}, folder=tmp_path)
    for caption in captions:
        read, expected = on_disk[caption], embed(caption)
        assert read.keys() == expected.keys()
        assert all(read[name].equal(expected[name]) and read[name].dtype == expected[name].dtype for name in expected)
    with pytest.raises(UserError, match="start again, and it is made anew"):
        on_disk["no such caption"]


def test_a_hash_sees_every_weight_config_value_precision_and_file(tmp_path):
    first, same = build_tiny_vae(), build_tiny_vae()
    assert weights_hash(first) == weights_hash(same) != weights_hash(build_tiny_vae().bfloat16())
    same.register_to_config(_name_or_path="elsewhere")
    assert weights_hash(first) == weights_hash(same)
    same.register_to_config(shift_factor=0.5)
    assert weights_hash(first) != weights_hash(same)
    same = build_tiny_vae()
    with torch.no_grad():
        list(same.parameters())[-1].view(-1)[-1] += 1e-6
    assert weights_hash(first) != weights_hash(same)

    def tokenizer(text):
        return SimpleNamespace(save_pretrained=lambda folder: Path(folder, "vocab.txt").write_text(text))

    assert files_hash(tokenizer("a")) == files_hash(tokenizer("a")) != files_hash(tokenizer("b"))


@pytest.mark.slow
def test_a_run_killed_while_it_caches_goes_on_there(tiny_sd, tmp_path, train, counted):
    folder = tmp_path / "photos"
    build_photo_folder(folder, 60, 96)
    cache = ("--latent_cache_dir", tmp_path / "cache", "--center_crop")
    script = Path(disk_cache.__file__).parent / "train_lpl_sd.py"
    words = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", folder, "--resolution", 64]
    words += ["--output_dir", tmp_path / "killed", "--report_to", "none", "--max_train_steps", 1, *cache]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, script, *map(str, words)], env=environment)
    while len(entries(tmp_path / "cache")) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(entries(tmp_path / "cache"))
    assert done < 60
    train(*cache, data=("--train_data_dir", folder), steps=1)
    assert len(counted["latents"]) == 60 - done
