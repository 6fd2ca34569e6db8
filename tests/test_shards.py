"""Tar shards: what the index says of them, what of it reaches training, and what happens when they are damaged."""

import io
import itertools
import json
import multiprocessing
import os
import tarfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import read_log
from PIL import Image
from tiny_models import build_photo_folder, photo_id

import shards
import train_lpl_sd
from arguments import UserError
from buckets import BucketOrder, make_buckets, nearest_bucket, parse_buckets
from data_sources import labels_of, limit_samples, read_image_folder, read_shards
from data_utils import TrainingStream, all_captions, build_dataloader, read_data
from images import load_image
from shards import open_shards


pytestmark = pytest.mark.usefixtures("time_limit")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number, size=(9, 8)):
    """An image, of (width, height), whose red value is the number."""
    return encoded(Image.new("RGB", size, (number, 77, 200)))


def sample(number, **files):
    """The members of a sample: an image and a caption, unless other files are given (None: not this one)."""
    files = {"png": picture(number), "txt": f"photo {number}", **files}
    return [(f"{number:05d}.{name}", content) for name, content in files.items() if content is not None]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_shards(folder, *counts, start=0, **files):
    """Shards of so many samples, whose numbers go on from one to the next. Returns their paths."""
    folder.mkdir(exist_ok=True)
    numbers, paths = itertools.count(start), []
    for k, count in enumerate(counts):
        members = [member for number in itertools.islice(numbers, count) for member in sample(number, **files)]
        paths.append(write_tar(folder / f"{k:05d}.tar", members))
    return paths


@pytest.fixture
def read(tmp_path):
    """`read_shards` with an index of the test's own."""

    def run(patterns, **flags):
        patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
        return read_shards([str(p) for p in patterns], **{"cache_dir": str(tmp_path / "cache"), **flags})

    return run


@pytest.fixture
def scans(monkeypatch):
    """The names of the shards that are read through for the index, in this process."""
    found, scan = [], shards._scan_shard

    def counted(path, image_column):
        found.append(os.path.basename(path))
        return scan(path, image_column)

    monkeypatch.setattr(shards, "_scan_shard", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return found


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def red(image):
    return load_image(image).getpixel((0, 0))[0]


def ids(batch):
    """The numbers that the pixels of a batch show."""
    return [round(float(level + 1) * 127.5) for level in batch["pixel_values"][:, 0].mean((1, 2))]


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == b[name] if isinstance(a[name], list) else a[name].equal(b[name]), name


# The index


def test_samples_are_what_the_tars_hold(read, tmp_path):
    paths = write_shards(tmp_path / "data", 5, 1, 7)
    samples, bad = read(paths)
    assert len(samples) == 13 and bad == {}
    expected = []  # read independently, with tarfile
    for path in paths:
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        expected += [(content[n], content[n[:-3] + "txt"].decode()) for n in sorted(content) if n.endswith("png")]
    assert [samples[index] for index in range(13)] == expected
    assert [samples.caption(index) for index in range(13)] == list(samples.captions()) == [t for _, t in expected]
    assert samples.name(6) == f"00006.png in {paths[2]}"
    assert [samples.select([7, 2])[index] for index in (0, 1)] == [expected[7], expected[2]]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders_in_a_shard(read, tmp_path, format):
    """Headers of more than one block come before such members; `name` must still find the image's own."""
    folder = "a.folder/" + "x" * 60 + "/" + "y" * 60
    names = ["plain", f"{folder}/{'z' * 80}", "./dotted"]
    if format != tarfile.USTAR_FORMAT:
        names.append(f"{folder}/{'z' * 150}é")
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for number, name in enumerate(names):
            for extension, content in (("png", picture(number)), ("txt", f"photo {number}".encode())):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples, bad = read(tmp_path / "a.tar")
    assert bad == {}
    assert [(red(image), caption) for image, caption in map(samples.__getitem__, range(len(names)))] == [
        (number, f"photo {number}") for number in range(len(names))
    ]
    assert samples.name(0) == f"plain.png in {tmp_path / 'a.tar'}"


def test_the_layout_of_img2dataset(read, tmp_path):
    """jpg, txt and json, as img2dataset writes them through webdataset; `caption` is in the json, too."""
    members = []
    for number in range(4):
        jpg = encoded(Image.new("RGB", (20 + number, 16), (40 * number, 0, 0)), "JPEG", quality=95)
        fields = {"caption": f"web {number}", "url": f"https://example.org/{number}", "similarity": 0.3}
        fields |= {"key": f"{number:09d}", "status": "success", "error_message": None, "width": 20 + number}
        fields |= {"height": 16, "original_width": 400, "exif": "{}", "sha256": "0" * 64}
        files = {"jpg": jpg, "txt": f"text {number}", "json": json.dumps(fields)}
        members += [(f"{number:09d}.{name}", content) for name, content in files.items()]
    write_tar(tmp_path / "00000.tar", members)
    samples, bad = read(tmp_path / "00000.tar")
    assert bad == {} and [abs(red(samples[n][0]) - 40 * n) < 8 for n in range(4)] == [True] * 4
    assert list(samples.captions()) == [f"text {n}" for n in range(4)]
    assert samples.sizes().tolist() == [[16, 20 + number] for number in range(4)]
    assert list(read(tmp_path / "00000.tar", caption_column="caption")[0].captions()) == [f"web {n}" for n in range(4)]
    assert samples.fields(2)["url"] == "https://example.org/2" and samples.fields(2)["txt"] == "text 2"


CAPTIONS = {  # files of three samples, flags, captions
    "txt": ([{"txt": "one"}, {"txt": "two"}, {"txt": "three"}], {}, ["one", "two", "three"]),
    "txt of several lines, with a BOM": (
        [{"txt": b"\xef\xbb\xbfone\r\n of  many \n"}, {"txt": "zwei Füße"}, {"txt": "x"}],
        {},
        ["one of many", "zwei Füße", "x"],
    ),
    "json": (
        [{"json": '{"caption": "one"}'}, {"json": '{"text": "two"}'}, {"json": '{"text": "c", "caption": "three"}'}],
        {},
        ["one", "two", "three"],
    ),
    "txt before json": (
        [{"txt": "one", "json": '{"caption": "a"}'}, {"txt": "", "json": '{"caption": "two"}'}, {"txt": "three"}],
        {},
        ["one", "two", "three"],
    ),
    "a field": (
        [{"txt": "no", "json": json.dumps({"alt": f"alt {n}", "caption": "no"})} for n in range(3)],
        {"caption_column": "alt"},
        ["alt 0", "alt 1", "alt 2"],
    ),
    "lists": ([{"json": '{"text": ["a", "b"]}'}, {"txt": "t"}, {"txt": "u"}], {}, [["a", "b"], "t", "u"]),
    "several columns": (
        [
            {"txt": "one", "json": '{"long": "one and all"}'},
            {"txt": "two", "json": '{"long": " "}'},
            {"txt": None, "json": '{"long": ["x", "y"]}'},
        ],
        {"caption_column": ["txt", "long"], "caption_weights": [1.0, 3.0]},
        [((1.0, "one"), (3.0, "one and all")), ((1.0, "two"),), ((3.0, ["x", "y"]),)],
    ),
    "instance prompt": (
        [{"txt": None}, {"txt": "two"}, {"txt": " "}],
        {"instance_prompt": "sks"},
        ["sks", "two", "sks"],
    ),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions(read, tmp_path, case):
    files, flags, expected = CAPTIONS[case]
    members = [member for number in range(3) for member in sample(number, **{"txt": None, **files[number]})]
    samples, bad = read(write_tar(tmp_path / "a.tar", members), **flags)
    assert list(samples.captions()) == expected and bad == {}
    assert [samples[index][1] for index in range(3)] == expected


def test_weights_of_columns_reach_the_stream(read, tmp_path):
    members = sample(0, txt="short", json='{"long": "long one", "none": null}')
    flags = {"caption_column": ["txt", "long", "none"], "caption_weights": [1.0, 3.0, 50.0]}
    stream = TrainingStream(read(write_tar(tmp_path / "a.tar", members), **flags)[0], seed=0, resolution=8)
    drawn = [stream[position]["caption"] for position in range(1200)]
    assert abs(drawn.count("long one") / 1200 - 0.75) < 4 * (0.75 * 0.25 / 1200) ** 0.5  # four standard errors
    assert set(drawn) == all_captions(stream) == {"short", "long one"}


def test_class_labels(read, tmp_path):
    labels = [7, 0, 999]
    files = [{"cls": f"{label}\n", "json": json.dumps({"kind": label + 1, "id": str(label)})} for label in labels]
    path = write_tar(tmp_path / "a.tar", [m for n in range(3) for m in sample(n, txt=None, **files[n])])
    for column, expected in (("cls", labels), ("kind", [8, 1, 1000]), ("id", labels)):
        samples, bad = read(path, label_column=column)
        assert list(labels_of(samples)) == [samples[n][1] for n in range(3)] == expected and bad == {}
        assert {type(samples[n][1]) for n in range(3)} == {int}  # of numpy's, the loader makes tensors


def test_samples_without_a_label_are_named(read, tmp_path):
    values = [3, -1, "x", None, 2.5, True]
    files = [{"json": json.dumps({"label": value})} for value in values]
    path = write_tar(tmp_path / "a.tar", [m for n in range(6) for m in sample(n, txt=None, **files[n])])
    samples, bad = read(path, label_column="label")
    assert list(labels_of(samples)) == [3]  # as in a folder's metadata, fractions and truth values are no classes
    assert bad == {f"0000{n}.png in {path}": "it has no class label (label)" for n in range(1, 6)}


def test_the_image_is_chosen_by_its_extension(read, tmp_path):
    files = {"png": None, "txt": None}
    members = []
    for number in range(3):
        several = {"seg.png": picture(100 + number), "PNG": picture(number), "th.jpg": picture(200), "TXT": "t"}
        members += sample(number, **files, **several)
    path = write_tar(tmp_path / "a.tar", members)
    for column, expected in ((None, 0), ("png", 0), (".PNG", 0), ("seg.png", 100)):
        samples, bad = read(path, image_column=column)
        assert [red(samples[n][0]) for n in range(3)] == [expected + n for n in range(3)] and bad == {}
    with pytest.raises(UserError, match="no image in 1 shards .first: 00000 in .*a.tar, there is no image beside it"):
        read(path, image_column="webp")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_photo_is_that_of_what_is_seen(read, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpg = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    samples, _ = read(write_tar(tmp_path / "a.tar", sample(0, png=None, jpg=jpg) + sample(1)))
    seen = (20, 30) if orientation < 5 else (30, 20)  # from 5 on rows and columns change places
    assert samples.sizes().tolist() == [list(seen), [8, 9]]
    assert load_image(samples[0][0]).size == seen[::-1]


def test_names_of_shards(read, tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "data", 1, 1, 1, 1)
    folder = tmp_path / "data"
    for patterns, expected in (
        ([f"{folder}/{{00000..00003}}.tar"], [0, 1, 2, 3]),
        ([f"{folder}/0000{{2,0}}.tar"], [2, 0]),
        ([f"{folder}/*.tar"], [0, 1, 2, 3]),
        ([f"{folder}/0000[12].tar"], [1, 2]),
        ([paths[3], paths[1]], [3, 1]),
        ([paths[3], f"{folder}/*.tar", paths[0]], [3, 0, 1, 2]),  # each once
        ([f"{folder}/../data/00001.tar", paths[1]], [1]),
    ):
        assert list(read(patterns)[0].captions()) == [f"photo {number}" for number in expected], patterns
    monkeypatch.chdir(folder)
    assert list(read("0000{0..1}.tar")[0].captions()) == ["photo 0", "photo 1"]
    monkeypatch.setenv("HOME", str(folder))
    assert list(read("~/00001.tar")[0].captions()) == ["photo 1"]


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("{0..3.tar", "a brace is open; write {000000..001242}"),
        ("none-{0..3}.tar", "--train_shards .*none-{0..3}.tar: there is no such file"),
        ("*.none", "no file fits"),
        ("https://example.org/{0..3}.tar", "download them first .*--dataset_name with --streaming"),
        ("pipe:cat 0.tar", "download them first"),
        ("a.tar.gz", "a.tar.gz: in a compressed shard .*unpack it to a .tar"),
        ("", "there is no such file"),
    ],
)
def test_names_that_are_no_shards(read, tmp_path, monkeypatch, pattern, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read(pattern)


def test_only_what_has_changed_is_read_again(read, tmp_path, scans):
    paths = write_shards(tmp_path / "data", 3, 4, 2)
    read(paths)
    assert scans == ["00000.tar", "00001.tar", "00002.tar"]
    scans.clear()
    assert list(read(paths)[0].captions()) == [f"photo {n}" for n in range(9)] and scans == []
    write_tar(paths[1], [member for number in (40, 41) for member in sample(number)])  # other samples, and fewer
    samples, bad = read(paths)
    assert scans == ["00001.tar"] and bad == {}
    assert [red(samples[n][0]) for n in range(len(samples))] == [0, 1, 2, 40, 41, 7, 8]
    assert list(samples.captions()) == [f"photo {n}" for n in (0, 1, 2, 40, 41, 7, 8)]
    scans.clear()
    status = os.stat(paths[2])
    content = (tmp_path / "data" / "00002.tar").read_bytes().replace(b"photo 7", b"foto_77")  # of the same size
    (tmp_path / "data" / "00002.tar").write_bytes(content)
    os.utime(paths[2], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert list(read(paths)[0].captions())[5] == "foto_77" and scans == ["00002.tar"]
    scans.clear()
    os.unlink(paths[0])
    samples, bad = read(paths)
    assert list(samples.captions()) == ["photo 40", "photo 41", "foto_77", "photo 8"]
    assert bad == {paths[0]: "No such file or directory"} and "00001.tar" not in scans


def test_what_was_bad_is_still_told_when_the_index_is_there(read, tmp_path, scans):
    path = write_tar(tmp_path / "a.tar", sample(0) + sample(1, png=b"junk") + sample(2))
    first, again = read(path), read(path)
    assert first[1] == again[1] == {f"00001.png in {path}": "not an image file that Pillow knows"}
    assert scans == ["a.tar"]


def test_the_index_is_mapped_from_the_disk(read, tmp_path):
    samples, _ = read(write_shards(tmp_path / "data", 3, 4))
    assert isinstance(samples.rows, np.memmap)
    assert len(list((tmp_path / "cache").rglob("rows-*.npy"))) == 1


def test_a_run_keeps_its_index_while_another_one_writes_it_anew(read, tmp_path):
    paths = write_shards(tmp_path / "data", 3, 4)
    samples, _ = read(paths)
    write_tar(paths[1], sample(60))
    assert len(read(paths)[0]) == 4
    assert [red(samples[n][0]) for n in range(3)] == [0, 1, 2]


def test_an_interrupted_index_goes_on_where_it_was(read, tmp_path, scans, monkeypatch):
    paths = write_shards(tmp_path / "data", 1, 1, 1, 1)
    scan = shards._scan_shard
    monkeypatch.setattr(shards, "_scan_shard", lambda path, image_column: _interrupted(scan, path, image_column))
    with pytest.raises(KeyboardInterrupt):
        read(paths)
    assert scans == ["00000.tar", "00001.tar"]
    monkeypatch.setattr(shards, "_scan_shard", scan)
    assert list(read(paths)[0].captions()) == [f"photo {n}" for n in range(4)]
    assert scans == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]


def _interrupted(scan, path, image_column):
    if "00002" in path:
        raise KeyboardInterrupt
    return scan(path, image_column)


def _build(paths, cache, barrier, log):
    scan = shards._scan_shard

    def counted(path, image_column):
        with open(log, "a") as file:
            file.write(f"{os.path.basename(path)}\n")
        time.sleep(0.1)  # long enough for the other to come
        return scan(path, image_column)

    shards._scan_shard, os.cpu_count = counted, lambda: 1
    barrier.wait()
    samples, _ = open_shards(paths, cache_dir=cache)
    assert [red(samples[n][0]) for n in range(6)] == list(range(6))


def test_shards_that_are_added_are_the_only_ones_read_and_any_choice_keeps_its_order(read, tmp_path, scans):
    paths = write_shards(tmp_path / "data", 2, 3, 1, json='{"label": 7}', cls="3")
    read(paths[:2])
    samples, _ = read(paths)
    assert scans == ["00000.tar", "00001.tar", "00002.tar"] and len(samples) == 6
    for labels, options in ((None, {}), (7, {"label_column": "label"}), (3, {"label_column": "cls"})):
        samples, bad = read([paths[2], paths[1]], **options)  # of the index's six rows not the first two
        assert [red(samples[n][0]) for n in range(4)] == [5, 2, 3, 4] and bad == {} and samples.num_shards == 2
        expected = [f"photo {n}" for n in (5, 2, 3, 4)] if labels is None else [labels] * 4
        assert list(samples.captions()) == expected
        assert samples.sizes().tolist() == [[8, 9]] * 4 and samples.name(0) == f"00005.png in {paths[2]}"
    assert len(scans) == 3


def test_a_folder_stands_for_its_shards(read, tmp_path):
    write_shards(tmp_path / "data", 2, 3)
    (tmp_path / "data" / "readme.txt").write_text("not a shard")
    samples, bad = read(tmp_path / "data")
    assert [red(samples[n][0]) for n in range(5)] == list(range(5)) and bad == {}


def test_a_shard_whose_tail_is_empty_was_not_written_to_its_end(read, tmp_path):
    paths = write_shards(tmp_path / "data", 3, 3)
    with open(paths[0], "ab") as file:
        file.write(bytes(10_240))  # as tar may fill up
    with open(paths[1], "ab") as file:
        file.write(bytes(2**20 + 1))
    samples, bad = read(paths)
    assert list(bad) == [paths[1]] and "nothing from byte" in bad[paths[1]] and len(samples) == 5


def test_lost_shards_are_not_counted_as_single_images(tmp_path):
    paths = write_shards(tmp_path / "data", *[40] * 5)
    flags = dict.fromkeys(("image_column", "caption_column", "instance_prompt", "caption_weights", "num_classes"))
    args = Namespace(train_shards=paths, cache_dir=str(tmp_path), max_bad_images=None, **flags)
    os.truncate(paths[1], 0)
    samples, bad = read_data(args)
    assert len(samples) == 160 and list(bad) == [paths[1]] and args.max_bad_images == 2
    os.truncate(paths[3], 0)  # two are fewer than a hundredth of the images, but not of the shards
    args.max_bad_images = None
    with pytest.raises(UserError, match=f"2 of the 5 shards .*{paths[1]}.*{paths[3]}.*--max_bad_images"):
        read_data(args)
    args.max_bad_images = 2
    assert len(read_data(args)[0]) == 120


def test_an_index_that_may_only_be_read_will_do(read, tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "data", 2)
    read(paths)
    monkeypatch.setattr(shards, "FileLock", lambda path: pytest.fail("it is to be written"))
    assert len(read(paths)[0]) == 2


def test_files_that_belong_to_no_sample_and_names_with_brackets(read, tmp_path):
    folder = tmp_path / "data [1] {a,b}"
    folder.mkdir()
    path = write_tar(
        folder / "0.tar", [("README", "x"), ("stats.json", "{}"), *sample(0), ("LICENSE", "x"), *sample(1)]
    )
    samples, bad = read(path)
    assert len(samples) == 2 and bad == {}


def test_long_names_are_told_apart(read, tmp_path):
    stem = "a" * 120
    members = [(f"{stem}{n}.{kind}", content) for n in range(4) for kind, content in (("png", b"junk"), ("txt", "x"))]
    members += [(f"{stem}9.png", picture(9)), (f"{stem}9.txt", "x")]
    good = [(f"{stem}{n}.{kind}", content) for n in range(2) for kind, content in (("png", picture(n)), ("txt", "x"))]
    _, bad = read(write_tar(tmp_path / "a.tar", members))
    assert len(bad) == 4
    samples, _ = read(write_tar(tmp_path / "b.tar", good))
    assert samples.name(0) != samples.name(1) and "aaaa... (byte " in samples.name(0)


def test_of_processes_that_start_at_once_one_builds_the_index(tmp_path):
    paths, log = write_shards(tmp_path / "data", 2, 3, 1), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (paths, str(tmp_path / "cache"), barrier, str(log))
    processes = [context.Process(target=_build, args=arguments, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(25)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["00000.tar", "00001.tar", "00002.tar"]


def test_shards_that_are_read_in_several_processes_keep_their_order(read, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    paths = write_shards(tmp_path / "data", *[1] * 12)
    assert list(read(paths)[0].captions()) == [f"photo {n}" for n in range(12)]


DAMAGES = {
    "json cut": ("index.json", lambda content: content[:-20]),
    "json empty": ("index.json", lambda content: b""),
    "json of another kind": ("index.json", lambda content: b"[1]"),
    "json without rows": ("index.json", lambda content: b"{}"),
    "json with strange fields": ("index.json", lambda content: content.replace(b'"size"', b'"sice"')),
    "rows cut": ("rows-*.npy", lambda content: content[:-20]),
    "rows cut in the head": ("rows-*.npy", lambda content: content[:20]),
    "rows empty": ("rows-*.npy", lambda content: b""),
    "rows of another kind": ("rows-*.npy", lambda content: _npy(np.zeros(5))),
    "rows too few": ("rows-*.npy", lambda content: _npy(np.zeros(2, shards.ROW))),
    "rows gone": ("rows-*.npy", None),
}


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_anew(read, tmp_path, scans, damage):
    name, change = DAMAGES[damage]
    paths = write_shards(tmp_path / "data", 3, 2)
    read(paths)
    [path] = (tmp_path / "cache").rglob(name)
    content = path.read_bytes()
    path.unlink()  # the old one may still be mapped
    if change is not None:
        path.write_bytes(change(content))
        assert path.read_bytes() != content
    assert list(read(paths)[0].captions()) == [f"photo {n}" for n in range(5)]
    assert scans == ["00000.tar", "00001.tar"] * 2
    read(paths)
    assert len(scans) == 4


def test_a_folder_that_cannot_hold_the_index_is_an_error_with_the_remedy(read, tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "data", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="index of --train_shards can't be kept in .*Not a dir.*folder with --cache_dir"
    ):
        read(paths, cache_dir=str(tmp_path / "file"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left on device.*--cache_dir"):
        read(paths)
    monkeypatch.undo()
    assert len(read(paths)[0]) == 1


# Faults


BAD_SAMPLES = {  # files of the bad one, its name, the reason
    "junk": ({"png": b"no image"}, "00099.png", "not an image"),
    "no bytes": ({"png": b""}, "00099.png", "not an image"),
    "no image": ({"png": None}, "00099", "no image beside it"),
    "no caption": ({"txt": None}, "00099.png", "no caption"),
    "32-bit pixels": (
        {"png": None, "tif": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")},
        "00099.tif",
        "8 or 16 bits",
    ),
}


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_named_and_the_others_are_used(read, tmp_path, case, place):
    files, name, why = BAD_SAMPLES[case]
    groups = [sample(number) for number in range(4)]
    groups.insert({"first": 0, "middle": 2, "last": 4}[place], sample(99, **files))
    path = write_tar(tmp_path / "a.tar", itertools.chain(*groups))
    samples, bad = read(path)
    assert [red(samples[n][0]) for n in range(4)] == list(range(4))
    assert list(samples.captions()) == [f"photo {n}" for n in range(4)]
    [(told, reason)] = bad.items()
    assert told == f"{name} in {path}" and why in reason


def test_a_class_number_that_is_none_or_too_large_is_bad_only_where_it_is_used(read, tmp_path):
    members = [m for n, cls in enumerate(["5", "cat", "-1", "99999999999", ""]) for m in sample(n, cls=cls)]
    path = write_tar(tmp_path / "a.tar", members)
    samples, bad = read(path, label_column="cls")
    assert list(labels_of(samples)) == [5]
    assert sorted(bad) == [f"0000{n}.png in {path}" for n in range(1, 5)]
    samples, bad = read(path)
    assert list(samples.captions()) == [f"photo {n}" for n in range(5)] and bad == {}


def member_ends(path):
    """Where in a tar each member begins, and where the last ends."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return [member.offset for member in members] + [members[-1].offset_data + 512 * -(-members[-1].size // 512)]


@pytest.mark.parametrize("where", ["header", "data", "padding", "sample's border", "image's border", "end"])
def test_of_a_cut_shard_the_samples_before_the_cut_are_used(read, tmp_path, where):
    """What is cut off is known by the missing end of the tar; the last sample before that may be incomplete."""
    whole, cut = write_shards(tmp_path / "data", 2, 4)
    starts = member_ends(cut)  # image and caption of each of the samples 2, 3, 4, 5
    place, kept = {
        "header": (starts[4] + 100, [2]),
        "data": (starts[4] + 512 + 30, [2, 3]),
        "padding": (starts[5] + 512 + 9, [2, 3]),
        "sample's border": (starts[4], [2]),
        "image's border": (starts[5], [2, 3]),
        "end": (starts[8], [2, 3, 4]),
    }[where]
    os.truncate(cut, place)
    samples, bad = read([whole, cut])
    assert [red(samples[n][0]) for n in range(len(samples))] == [0, 1, *kept]
    assert list(samples.captions()) == [f"photo {n}" for n in [0, 1, *kept]]
    [(name, reason)] = bad.items()
    assert name == cut and reason.endswith(f"after {len(kept)} samples")


NO_TARS = {
    "zero bytes": b"",
    "text": b"this is no tar\n" * 100,
    "zeros": bytes(10240),  # what a crash may leave of a file
    "short": b"x" * 20,
    "an image": picture(1),
}


@pytest.mark.parametrize("case", NO_TARS)
def test_a_file_that_is_no_tar_is_named(read, tmp_path, case):
    good = write_tar(tmp_path / "a.tar", sample(0))
    (tmp_path / "b.tar").write_bytes(NO_TARS[case])
    samples, bad = read([good, tmp_path / "b.tar", tmp_path / "c.tar"])
    assert list(samples.captions()) == ["photo 0"]
    assert list(bad) == [str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
    assert bad[str(tmp_path / "c.tar")] == "No such file or directory"
    with pytest.raises(UserError, match="no image in 1 shards .first: .*b.tar"):
        read(tmp_path / "b.tar")


@pytest.mark.parametrize("members", [[], [(".hidden", b"x")]])
def test_a_shard_without_any_sample_is_no_crash(read, tmp_path, members):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="--train_shards: there is no image in 1 shards"):
        read(path)
    good = write_tar(tmp_path / "b.tar", sample(0))
    samples, bad = read([path, good])
    assert list(samples.captions()) == ["photo 0"] and list(bad) == [path]


@pytest.mark.parametrize("content", ['{"fields": ', "[1, 2]", '{"url": "x"}', '{"caption": " "}', '{"caption": 3}'])
def test_shards_without_a_caption_are_refused_with_the_fields_that_are_there(read, tmp_path, content):
    path = write_tar(tmp_path / "a.tar", [m for n in range(2) for m in sample(n, txt=None, json=content)])
    with pytest.raises(
        UserError, match="first 2 samples have no caption; name one of their fields with --caption_col"
    ):
        read(path)


def test_a_field_that_is_not_there_is_refused(read, tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0, json='{"alt": "x", "label": "cat"}'))
    with pytest.raises(UserError, match="none of the first samples has tittle .*: alt, label, txt"):
        read(path, caption_column=["txt", "tittle"])
    for column in ("cls", "label"):
        with pytest.raises(UserError, match=f"no class label .{column}.; .*--label_column: alt, label, txt"):
            read(path, label_column=column)


def shard_args(patterns, cache_dir, **changes):
    args = Namespace(train_shards=list(map(str, patterns)), train_data_dir=None, cache_dir=str(cache_dir))
    args.image_column = args.caption_column = args.instance_prompt = args.caption_weights = None
    args.label_column = args.num_classes = args.max_bad_images = None
    vars(args).update(changes)
    return args


def test_one_in_a_hundred_may_be_bad_by_default(tmp_path, caplog):
    """Rounded up: one of up to 100 samples, two of up to 200."""

    def data(good, bad, **flags):
        folder = tmp_path / f"{good}-{bad}"
        folder.mkdir(exist_ok=True)
        members = [member for n in range(good) for member in sample(n, png=picture(1))]
        members += [member for n in range(bad) for member in sample(1000 + n, png=b"junk")]
        return shard_args([write_tar(folder / "a.tar", members)], tmp_path / "cache", **flags)

    for good, bad in ((5, 1), (100, 1), (101, 2)):
        args = data(good, bad)
        assert [len(found) for found in read_data(args)] == [good, bad]
        assert args.max_bad_images == bad  # how many more may follow is counted on in training
        assert f"{bad} of the images or shards cannot be read and are left out: 01000.png" in caplog.text
    for good, bad in ((5, 2), (100, 2), (101, 3)):
        with pytest.raises(
            UserError, match=f"{bad} of the images .* more than --max_bad_images {bad - 1} .*01000.png"
        ):
            read_data(data(good, bad))
    with pytest.raises(UserError, match="1 of the images .* more than --max_bad_images 0"):
        read_data(data(5, 1, max_bad_images=0))
    assert len(read_data(data(5, 3, max_bad_images=3))[1]) == 3


def destroy(path, how, at):
    """What may happen to a shard during training."""
    if how == "gone":
        os.unlink(path)
    elif how == "shorter":
        os.truncate(path, at)
    elif how == "overwritten":
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\0" * (os.path.getsize(path) - at))
    elif how == "a folder":
        os.unlink(path)
        os.mkdir(path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["gone", "shorter", "overwritten", "a folder"])
def test_a_shard_that_is_lost_during_training(read, tmp_path, how, num_workers, caplog):
    """Its samples are replaced by the next of the epoch and counted, each by its name; beyond the limit it ends."""
    paths = write_shards(tmp_path / "data", 8, 4)
    samples, _ = read(paths)
    stream = TrainingStream(samples, seed=1, resolution=8, max_bad_images=4)
    first = build_dataloader(stream, 4, num_workers=num_workers)
    next(first)
    destroy(paths[1], how, at=0)
    batches = take(build_dataloader(stream, 4, start_position=12, num_workers=num_workers), 3)
    shown = [number for batch in batches for number in ids(batch)]
    assert set(shown) == set(range(8)) and len(shown) == 12
    assert [caption for batch in batches for caption in batch["captions"]] == [f"photo {n}" for n in shown]
    assert len(stream.bad) == 4 and all(paths[1] in name for name in stream.bad)
    assert "not readable, so that the next image takes its place" in caplog.text
    strict = TrainingStream(samples, seed=1, resolution=8, max_bad_images=3)
    with pytest.raises(UserError, match="4 of the images cannot be read, more than --max_bad_images 3 .*00001.tar"):
        take(build_dataloader(strict, 4, num_workers=num_workers), 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_when_all_shards_are_lost_it_ends(read, tmp_path, num_workers):
    paths = write_shards(tmp_path / "data", 3, 3)
    stream = TrainingStream(read(paths)[0], seed=1, resolution=8, max_bad_images=1000)
    for path in paths:
        os.unlink(path)
    with pytest.raises(UserError, match="6 of the images cannot be read"):
        take(build_dataloader(stream, 2, num_workers=num_workers), 1)


# The order


def shown_by(batches):
    return [number for batch in batches for number in ids(batch)]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_comes_once_per_epoch_with_its_caption(read, tmp_path, world_size, num_workers):
    samples, _ = read(write_shards(tmp_path / "data", 5, 2, 9))  # 16: epochs end at a batch's end
    stream = TrainingStream(samples, seed=4, resolution=8, random_flip=True)
    per_rank = [
        take(build_dataloader(stream, 4, rank, world_size, num_workers=num_workers), 12 // world_size)
        for rank in range(world_size)
    ]
    batches = [batch for together in zip(*per_rank) for batch in together]
    epochs = [shown_by(batches[start : start + 4]) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    for batch in batches:
        assert batch["captions"] == [f"photo {number}" for number in ids(batch)]
    assert_same_batches(batches, take(build_dataloader(stream, 4), 12))


def test_photos_that_are_told_apart_by_their_pixels_keep_their_captions(read, tmp_path):
    photos = build_photo_folder(tmp_path / "photos", 24, (20, 24))
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    groups = [
        [(f"{n:04d}.png", (photos / row["file_name"]).read_bytes()), (f"{n:04d}.txt", row["text"])]
        for n, row in enumerate(rows)
    ]
    paths = [write_tar(tmp_path / f"{k}.tar", itertools.chain(*groups[k::3])) for k in range(3)]
    stream = TrainingStream(limit_samples(read(paths)[0], 20, seed=2), seed=0, resolution=16, random_flip=True)
    seen = []
    for batch in take(build_dataloader(stream, 5, num_workers=2), 8):
        numbers = [photo_id(pixels) for pixels in batch["pixel_values"]]
        assert batch["captions"] == [texts[number] for number in numbers]
        assert batch["original_sizes"].tolist() == [[24, 20]] * 5
        seen += numbers
    assert sorted(seen[:20]) == sorted(seen[20:]) and len(set(seen)) == 20


def test_the_order_is_that_of_a_folder_with_the_same_samples(read, tmp_path):
    paths = write_shards(tmp_path / "data", 5, 2, 4)
    (tmp_path / "folder").mkdir()
    for path in paths:
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "folder", filter="data")
    settings = {"seed": 4, "resolution": 8, "random_flip": True, "proportion_empty_prompts": 0.2}
    shards_stream = TrainingStream(read(paths)[0], **settings)
    folder_stream = TrainingStream(read_image_folder(str(tmp_path / "folder")), **settings)
    assert_same_batches(
        take(build_dataloader(shards_stream, 3, num_workers=1), 9), take(build_dataloader(folder_stream, 3), 9)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_exactly(read, tmp_path, num_workers):
    samples, _ = read(write_shards(tmp_path / "data", 5, 2, 4))
    stream = TrainingStream(samples, seed=4, resolution=8, proportion_empty_prompts=0.3)
    straight = take(build_dataloader(stream, 3, num_workers=num_workers), 9)
    again = TrainingStream(read(write_shards(tmp_path / "data", 5, 2, 4))[0], 4, 8, proportion_empty_prompts=0.3)
    assert_same_batches(straight[4:], take(build_dataloader(again, 3, start_position=12, num_workers=num_workers), 5))


def test_threads_may_read_at_once(read, tmp_path):
    samples, _ = read(write_shards(tmp_path / "data", 20, 20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: (red(samples[n][0]), samples.caption(n)), list(range(40)) * 5))
    assert found == [(n, f"photo {n}") for n in list(range(40)) * 5]


# Aspect-ratio buckets


SIZES = [(30, 20), (20, 30), (24, 24), (60, 20), (40, 25)]  # (width, height) of number % 5
BUCKETS = parse_buckets("16,16; 12,20;20,12")


def nearest(size):
    """The bucket whose log of height / width is nearest: 12 / 20 up to sqrt(0.6), 20 / 12 beyond its inverse."""
    ratio = size[1] / size[0]
    return (12, 20) if ratio < 0.7746 else (16, 16) if ratio < 1.291 else (20, 12)


@pytest.fixture
def mixed(read, tmp_path):
    """A stream of 23 samples of five shapes, in three buckets; number n has the shape n % 5."""
    members = [member for n in range(23) for member in sample(n, png=picture(n, SIZES[n % 5]))]
    paths = [write_tar(tmp_path / f"{k}.tar", members[k * 12 : (k + 1) * 12]) for k in range(4)]
    samples, _ = read(paths)

    def build(batch_size=4, **settings):
        return TrainingStream(samples, 3, 16, **{"buckets": BUCKETS, "batch_size": batch_size, **settings})

    return build


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_never_mix_sizes_and_all_samples_come_equally_often(mixed, world_size, num_workers):
    stream = mixed(random_flip=True)
    loaders = [build_dataloader(stream, 4, rank, world_size, num_workers=num_workers) for rank in range(world_size)]
    batches = [
        batch for together in zip(*(take(loader, 24 // world_size) for loader in loaders)) for batch in together
    ]
    times = np.zeros(23, int)
    for number, batch in enumerate(batches):
        [size] = set(map(tuple, batch["target_sizes"].tolist()))
        assert batch["pixel_values"].shape == (4, 3, *size)
        numbers = ids(batch)
        assert batch["captions"] == [f"photo {n}" for n in numbers]
        assert [nearest(SIZES[n % 5]) for n in numbers] == [size] * 4
        assert batch["original_sizes"].tolist() == [list(SIZES[n % 5][::-1]) for n in numbers]
        if number < 23:  # in four passes over the data all batches of four are complete
            np.add.at(times, numbers, 1)
    assert times.tolist() == [4] * 23


def test_the_share_of_each_bucket_is_that_of_its_samples(mixed):
    stream = mixed()
    for epochs in (1, 2, 8):
        batches = epochs * 23 // 4
        counts = {size: 0 for size in BUCKETS}
        for k in range(batches):
            counts[tuple(stream.size_of(stream.index(4 * k)))] += 4
        for size, count in counts.items():
            members = sum(nearest(SIZES[n % 5]) == size for n in range(23))
            assert abs(count - epochs * members) < 2 * 4  # what is kept back, and batches of the epoch begun


def test_order_of_a_small_example_by_hand():
    """Without shuffling. Bucket 0 has the samples 0, 2, 3, bucket 1 has 1 and 4; batches of two.

    Rows laid end to end: 0 2 | 3 0 | 2 3 | ... and 1 4 | 1 4 | ... After one pass bucket 0 has one complete batch
    and bucket 1 one; after two passes 3 and 2; after three 4 and 3.
    """
    order = BucketOrder(np.array([0, 1, 0, 0, 1]), 2, lambda key, epoch, n: np.arange(n))
    batches = [[order.sample(bucket, place + i) for i in range(2)] for bucket, place in map(order.batch, range(7))]
    assert batches == [[0, 2], [1, 4], [3, 0], [2, 3], [1, 4], [0, 2], [1, 4]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 40])
def test_every_bucket_goes_through_its_samples_again_and_again(batch_size):
    """The batches of a bucket, in the order of their numbers, are its shuffled epochs laid end to end."""
    random = np.random.default_rng(batch_size)
    bucket_of = random.permutation(np.repeat([0, 1, 3], [1, 5, 11]))  # bucket 2 has none
    order = BucketOrder(
        bucket_of, batch_size, lambda key, epoch, n: np.random.default_rng([key, epoch]).permutation(n)
    )
    batches = sorted(map(order.batch, range(batch_size * 17)))  # batch_size^2 passes: all batches are complete
    assert len(set(batches)) == batch_size * 17
    for bucket in (0, 1, 3):
        row = [order.sample(bucket, place + i) for b, place in batches if b == bucket for i in range(batch_size)]
        members = np.flatnonzero(bucket_of == bucket).tolist()
        assert len(row) == batch_size**2 * len(members)
        passes = [row[start : start + len(members)] for start in range(0, len(row), len(members))]
        assert all(sorted(numbers) == members for numbers in passes)
        if bucket == 3 and batch_size > 1:
            assert len(set(map(tuple, passes))) > 1


def test_a_bucket_of_one_sample_gives_batches_of_it_alone():
    order = BucketOrder(np.array([1, 0, 0, 0]), 4, lambda key, epoch, n: np.arange(n))
    batches = [order.batch(k) for k in range(4)]  # 4 passes: three batches of bucket 0, one of bucket 1
    assert sorted(bucket for bucket, _ in batches) == [0, 0, 0, 1]
    [place] = [place for bucket, place in batches if bucket == 1]
    assert [order.sample(1, place + i) for i in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("center_crop", [True, False])
def test_the_pixels_are_those_of_pillows_resize_and_crop(read, tmp_path, center_crop):
    random = np.random.default_rng(0)
    sizes = [(71, 50), (50, 71), (64, 64), (120, 40), (33, 80), (47, 47)]
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    members = [member for n, image in enumerate(images) for member in sample(n, png=encoded(image))]
    samples, _ = read(write_tar(tmp_path / "a.tar", members))
    stream = TrainingStream(samples, 1, 16, center_crop, buckets=BUCKETS, batch_size=2)
    seen = set()
    for batch in take(build_dataloader(stream, 2), 12):
        for i, caption in enumerate(batch["captions"]):
            number = int(caption.split()[1])
            (width, height), (target_h, target_w) = sizes[number], nearest(sizes[number])
            scale = max(target_h / height, target_w / width)  # it just covers the bucket's size
            w, h = int(width * scale + 1e-6), int(height * scale + 1e-6)
            top, left = batch["crop_top_lefts"][i].tolist()
            if center_crop:
                assert abs(top - (h - target_h) / 2) <= 0.5 and abs(left - (w - target_w) / 2) <= 0.5
            resized = images[number].resize((w, h), Image.Resampling.LANCZOS)
            crop = np.asarray(resized.crop((left, top, left + target_w, top + target_h)), dtype=np.float32)
            assert np.allclose(batch["pixel_values"][i], crop.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
            assert batch["original_sizes"][i].tolist() == [height, width]
            assert batch["target_sizes"][i].tolist() == [target_h, target_w]
            seen.add(number)
    assert seen == set(range(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_with_buckets_a_resumed_run_goes_on_exactly(mixed, num_workers):
    settings = {"random_flip": True, "proportion_empty_prompts": 0.3}
    straight = take(build_dataloader(mixed(**settings), 4), 20)
    for start in (1, 7, 13):
        resumed = build_dataloader(mixed(**settings), 4, start_position=4 * start, num_workers=num_workers)
        assert_same_batches(straight[start:], take(resumed, 20 - start))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_resumed_with_another_batch_size_no_batch_is_mixed(mixed, batch_size):
    for start in (4, 12, 52):
        for rank in range(2):
            loader = build_dataloader(mixed(batch_size), batch_size, rank, 2, start_position=start)
            for batch in take(loader, 8):
                assert len(set(map(tuple, batch["target_sizes"].tolist()))) == 1
                assert len({nearest(SIZES[n % 5]) for n in ids(batch)}) == 1


def test_with_buckets_a_lost_image_is_replaced_by_one_of_its_bucket(read, tmp_path):
    members = [member for n in range(10) for member in sample(n, png=picture(n, SIZES[n % 5]))]
    lost = write_tar(tmp_path / "lost.tar", [m for n in (10, 11) for m in sample(n, png=picture(n, SIZES[n % 5]))])
    samples, _ = read([write_tar(tmp_path / "a.tar", members), lost])
    stream = TrainingStream(samples, 3, 16, buckets=BUCKETS, batch_size=4, max_bad_images=2)
    os.unlink(lost)
    for batch in take(build_dataloader(stream, 4, num_workers=1), 12):
        assert len({nearest(SIZES[n % 5]) for n in ids(batch)}) == 1
    assert len(stream.bad) == 2


@pytest.mark.parametrize("resolution, unit", [(64, 8), (512, 64), (1024, 64), (768, 32), (256, 16)])
def test_sizes_that_follow_from_the_resolution(resolution, unit):
    sizes = make_buckets(resolution, unit)
    assert (resolution, resolution) in sizes and sizes == sorted(set(sizes))
    assert {(width, height) for height, width in sizes} == set(sizes)  # tall and wide ones alike
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert max(height, width) <= 2 * min(height, width)
        assert resolution**2 - max(height, width) * unit < height * width <= resolution**2
    assert sum(height == width for height, width in sizes) == 1


def test_buckets_of_sdxl():
    """Sizes that SDXL's finetuning has (appendix I of Podell et al., 2023), of up to 1:2."""
    sizes = make_buckets(1024, 64)
    assert {(832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832)} <= set(sizes)


def test_sizes_that_are_given():
    assert (
        parse_buckets("1024,1024;832,1216") == parse_buckets(" 832, 1216 ;1024,1024; ") == [(832, 1216), (1024,) * 2]
    )
    for text in ("", "512", "512,512,512", "512x512", "0,64", "-64,64", "64,64;;32,64", "a,b"):
        with pytest.raises(UserError, match="--aspect_ratio_buckets .*height,width;height,width"):
            parse_buckets(text)
    with pytest.raises(UserError, match="two of the sizes have the same shape"):
        parse_buckets("64,64;128,128")


def test_the_nearest_bucket_is_that_of_the_nearest_log_ratio():
    sizes = np.random.default_rng(0).integers(1, 400, (500, 2))
    buckets = make_buckets(256, 16)
    distances = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([h / w for h, w in buckets]))
    chosen = nearest_bucket(sizes, buckets)
    assert np.allclose(distances[np.arange(500), chosen], distances.min(1))
    assert nearest_bucket(buckets, buckets).tolist() == list(range(len(buckets)))


# The whole program


@pytest.fixture
def photo_shards(photos, tmp_path):
    """The fixture `photos` in two shards, of four and six."""
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    groups = [
        [(f"{n}.png", (photos / row["file_name"]).read_bytes()), (f"{n}.json", json.dumps({"text": row["text"]}))]
        for n, row in enumerate(rows)
    ]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", itertools.chain(*groups[:4]))
    write_tar(folder / "1.tar", itertools.chain(*groups[4:]))
    return ("--train_shards", folder / "{0..1}.tar", "--cache_dir", tmp_path / "cache")


def test_training_on_shards_is_training_on_their_folder(train, photo_shards):
    from safetensors.torch import load_file

    outputs = [train("--lpl_weight", 0.5, name="a"), train("--lpl_weight", 0.5, name="b", data=photo_shards)]
    first, second = [load_file(o / "unet" / "diffusion_pytorch_model.safetensors") for o in outputs]
    assert all(first[name].equal(second[name]) for name in first)
    assert [row["loss"] for row in read_log(outputs[0])] == [row["loss"] for row in read_log(outputs[1])]


@pytest.fixture
def parse(tiny_sd, photo_shards, tmp_path, monkeypatch):
    shown = shards.tqdm
    monkeypatch.setattr(shards, "tqdm", lambda **words: shown(**{**words, "disable": True}))  # it wants one line

    def run(*words):
        flags = ["--pretrained_model_name_or_path", tiny_sd, *photo_shards, "--output_dir", tmp_path / "out"]
        return train_lpl_sd.parse_args([str(word) for word in (*flags, "--resolution", 64, *words)])

    return run


@pytest.fixture(scope="session")
def known_flags():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lpl_sd, "parse_and_check", lambda parser, argv: parser)
        return set(train_lpl_sd.parse_args()._option_string_actions)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--train_shards", "none.tar"], "--train_shards none.tar: there is no such file"),
        (["--caption_column", "title"], "none of the first samples has title for --caption_column; choose"),
        (["--caption_column", "text", "txt", "--caption_weights", "1"], "--caption_weights needs 2 numbers above 0"),
        (["--caption_column", "a", "b", "--caption_weights", "1", "0"], "--caption_weights needs 2 numbers above 0"),
        (["--caption_column", "text", "--caption_weights", "1"], "--caption_weights has no effect with a single"),
        (["--caption_weights", "1"], "--caption_weights has no effect without --caption_column"),
        (["--image_column", "jpg"], "there is no image in 2 shards"),
        (["--train_data_dir", "x"], "--train_data_dir and --train_shards exclude each other"),
        (["--dataset_name", "x"], "--dataset_name and --train_shards exclude each other"),
        (["--streaming"], "--streaming has no effect without --dataset_name"),
        (["--trigger_word", " "], "--trigger_word is empty"),
        (["--aspect_ratio_buckets", "64"], "give sizes as height,width;height,width"),
        (["--aspect_ratio_buckets", "64,60"], "--aspect_ratio_buckets 64,60"),
        (
            ["--aspect_ratio_buckets", "--with_prior_preservation", "--class_data_dir", "x", "--class_prompt", "x"],
            "--with_prior_preservation has no effect with --aspect_ratio_buckets",
        ),
    ],
)
def test_refused_flags(refuse, words, sentence):
    assert sentence in refuse(*words)
