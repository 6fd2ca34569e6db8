"""--streaming: the order of a dataset that is read from the beginning to the end, its faults, and how to resume."""

import io
import itertools
import os
import shutil
import threading
import time
from argparse import Namespace

import datasets
import fsspec
import numpy as np
import pytest
from conftest import read_log
from PIL import Image
from safetensors.torch import load_file

import streaming
import train_lpl_sd
from arguments import UserError
from data_utils import build_dataloader, make_stream


BLOCK = 8
FILES = (12, 5, 20)  # rows of each: 37 in all


pytestmark = pytest.mark.usefixtures("time_limit")


def png(number, side=9):
    """An image whose red value is the number."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number, 77, 200)).save(file, "PNG")
    return file.getvalue()


def row(number, **changes):
    return {"image": {"bytes": png(number), "path": None}, "text": f"photo {number}", **changes}


def write_files(folder, *files, **columns):
    """A parquet file of each list of rows, in the layout of the Hub. Returns the folder."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), **columns})
    (folder / "data").mkdir(parents=True)
    for k, rows in enumerate(files):
        part = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
        part.to_parquet(folder / "data" / f"train-{k:05d}-of-{len(files):05d}.parquet")
    return folder


def numbered(*counts):
    numbers = itertools.count()
    return [[row(number) for number in itertools.islice(numbers, count)] for count in counts]


@pytest.fixture
def dataset(tmp_path):
    return write_files(tmp_path / "dataset", *numbered(*FILES))


@pytest.fixture
def open_stream(dataset, tmp_path):
    """The stream that the flags describe, by default of `dataset`."""

    def run(name=dataset, **flags):
        args = Namespace(streaming=True, dataset_name=str(name), cache_dir=str(tmp_path / "cache"), id2label={})
        args.dataset_config_name = args.image_column = args.caption_column = args.label_column = args.buckets = None
        args.instance_prompt = args.caption_weights = args.validation_prompts = args.num_classes = None
        args.trigger_word = args.max_bad_images = args.eval_data_dir = args.eval_steps = None
        args.seed, args.resolution, args.shuffle_buffer_size, args.train_batch_size = 5, 8, BLOCK, 4
        args.center_crop = args.random_flip = False
        args.image_interpolation_mode, args.proportion_empty_prompts = "lanczos", 0.0
        vars(args).update(flags)
        return make_stream(args)

    return run


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def ids(batches):
    """The numbers that the pixels show."""
    reds = [red for batch in batches for red in batch["pixel_values"][:, 0].mean((1, 2))]
    return [round(float(red + 1) * 127.5) for red in reds]


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == b[name] if isinstance(a[name], list) else a[name].equal(b[name]), name


def file_of(number):
    return 0 if number < 12 else 1 if number < 17 else 2


# The order


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_row_comes_once_per_epoch_with_its_caption(open_stream, num_workers):
    batches = take(build_dataloader(open_stream(), 4, num_workers=num_workers), 37)  # four epochs
    for batch in batches:
        assert batch["captions"] == [f"photo {number}" for number in ids([batch])]
        assert batch["pixel_values"].shape == (4, 3, 8, 8)
    seen = ids(batches)
    epochs = [seen[start : start + 37] for start in range(0, 148, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [p for batch in batches for p in batch["positions"].tolist()] == list(range(148))
    assert_same_batches(batches, take(build_dataloader(open_stream(), 4), 37))


def test_files_come_in_another_order_in_every_epoch(open_stream):
    seen = ids(take(build_dataloader(open_stream(shuffle_buffer_size=1), 4), 111))  # without blocks: 12 epochs
    orders = set()
    for start in range(0, 444, 37):
        epoch = seen[start : start + 37]
        files = [key for key, _ in itertools.groupby(map(file_of, epoch))]
        assert sorted(files) == [0, 1, 2]  # each in one piece
        assert epoch == [number for file in files for number in range(37) if file_of(number) == file]
        orders.add(tuple(files))
    assert len(orders) > 2


def test_rows_are_shuffled_inside_their_blocks_alone(open_stream):
    plain = ids(take(build_dataloader(open_stream(shuffle_buffer_size=1), 1), 74))
    shuffled = ids(take(build_dataloader(open_stream(shuffle_buffer_size=BLOCK), 1), 74))
    orders = []  # of each block
    for epoch in (0, 37):
        for start in range(epoch, epoch + 37, BLOCK):
            end = min(start + BLOCK, epoch + 37)
            assert sorted(plain[start:end]) == sorted(shuffled[start:end])
            orders.append([plain[start:end].index(number) for number in shuffled[start:end]])
    assert len(orders) == 10 and len(set(map(tuple, orders))) == 10
    whole = ids(take(build_dataloader(open_stream(shuffle_buffer_size=1000), 1), 37))
    assert sorted(whole) == list(range(37))
    assert len({file_of(number) for number in whole[:8]}) > 1  # files are mixed where a block reaches


def test_the_order_is_that_of_the_seed(open_stream):
    orders = [ids(take(build_dataloader(open_stream(seed=seed), 4), 9)) for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("files", [(6, 6), (3, 3, 3, 3), (12,), (4, 8)])
def test_two_ranks_share_the_rows(open_stream, tmp_path, files, num_workers):
    """By files, if there are as many as ranks, else by every second row; here each rank has six rows an epoch."""
    name = write_files(tmp_path / "other", *numbered(*files))
    streams = [open_stream(name, shuffle_buffer_size=4) for _ in range(2)]
    loaders = [build_dataloader(s, 2, rank, 2, num_workers=num_workers) for rank, s in enumerate(streams)]
    per_rank = [take(loader, 6) for loader in loaders]
    for batches in per_rank:
        for batch in batches:
            assert batch["captions"] == [f"photo {number}" for number in ids([batch])]
    if files != (4, 8):
        for epoch in (0, 3):
            assert sorted(ids(per_rank[0][epoch : epoch + 3]) + ids(per_rank[1][epoch : epoch + 3])) == list(range(12))
    else:  # unlike shares: each rank goes through its own again and again
        assert set(ids(per_rank[0])[:4]).isdisjoint(ids(per_rank[1])[:4])
    positions = [batch["positions"].tolist() for together in zip(*per_rank) for batch in together]
    assert positions == [[start, start + 1] for start in range(0, 24, 2)]


def test_five_ranks_of_three_files(open_stream):
    """Fewer files than ranks: all 37 rows are there once, in shares of 7 or 8."""
    seen = []
    for rank in range(5):
        loader = build_dataloader(open_stream(shuffle_buffer_size=3), 1, rank, 5)
        numbers = ids(take(loader, 9))
        share = next(count for count in (7, 8, 9) if len(set(numbers[: count + 1])) <= count)
        seen += numbers[:share]
    assert sorted(seen) == list(range(37))


def test_crops_flips_and_dropout_are_those_of_the_position(open_stream, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    rows = [row(0, image={"bytes": file.getvalue(), "path": None}) for _ in range(6)]
    name = write_files(tmp_path / "other", rows)
    stream = open_stream(name, random_flip=True, proportion_empty_prompts=0.3)
    batches = take(build_dataloader(stream, 4), 60)
    lefts = [left for batch in batches for _, left in batch["crop_top_lefts"].tolist()]
    assert min(lefts) == 0 and max(lefts) == 22
    dropped = [caption == "" for batch in batches for caption in batch["captions"]]
    assert abs(np.mean(dropped) - 0.3) < 4 * (0.3 * 0.7 / 240) ** 0.5  # four standard errors
    pixels, flipped = np.asarray(image), 0
    for batch in batches:
        for view, (_, left) in zip(batch["pixel_values"], batch["crop_top_lefts"].tolist()):
            crops = [p[:, left : left + 8].transpose(2, 0, 1) / 127.5 - 1 for p in (pixels, pixels[:, ::-1])]
            matches = [np.allclose(view, crop, atol=1e-6) for crop in crops]
            assert sum(matches) == 1
            flipped += matches[1]
    assert abs(flipped / 240 - 0.5) < 4 * (0.25 / 240) ** 0.5


# Going on


def resumed(open_stream, state, position, rank=0, world_size=1, num_workers=0, batch_size=4, **flags):
    stream = open_stream(**flags)
    stream.load_state(state)
    return build_dataloader(stream, batch_size, rank, world_size, start_position=position, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_exactly(open_stream, num_workers):
    """From every batch of three epochs: in the middle of blocks, files and epochs, and at their borders."""
    flags = {"random_flip": True, "proportion_empty_prompts": 0.2}
    straight = take(build_dataloader(open_stream(**flags), 4), 32)
    stream = open_stream(**flags)
    loader = build_dataloader(stream, 4, num_workers=num_workers)
    for done in range(1, 28):
        next(loader)
        if num_workers and done % 9:
            continue
        state = stream.state(4 * done, 1)
        rest = take(resumed(open_stream, state, 4 * done, num_workers=num_workers, **flags), 4)
        assert_same_batches(straight[done : done + 4], rest)


@pytest.mark.parametrize("world_size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_rank_goes_on_exactly(open_stream, world_size):
    for rank in range(world_size):
        straight = take(build_dataloader(open_stream(), 3, rank, world_size), 16)
        stream = open_stream()
        loader = build_dataloader(stream, 3, rank, world_size)
        for done in range(1, 13):
            next(loader)
            position = 3 * done * world_size
            rest = resumed(open_stream, stream.state(position, world_size), position, rank, world_size, batch_size=3)
            assert_same_batches(straight[done : done + 3], take(rest, 3))


def test_a_run_that_was_resumed_can_be_resumed_again(open_stream):
    straight = take(build_dataloader(open_stream(), 4), 30)
    stream, done, seen = open_stream(), 0, []
    for steps in (1, 1, 5, 2, 8, 3, 10):
        loader = build_dataloader(stream, 4, start_position=4 * done)
        seen += take(loader, steps)
        done += steps
        state = stream.state(4 * done, 1)
        stream = open_stream()
        stream.load_state(state)
    assert_same_batches(straight, seen)


def test_another_order_or_dataset_is_not_gone_on_with(open_stream):
    stream = open_stream()
    take(build_dataloader(stream, 4), 5)
    state = stream.state(20, 1)
    for name, value in (("shuffle_buffer_size", 77), ("number_of_files", 1), ("dataset", "other")):
        with pytest.raises(UserError, match=f"that run had {name.replace('_', ' ')} {value}, now it is"):
            open_stream().load_state({**state, name: value})


def test_resumed_with_another_batch_size_no_row_is_lost_or_doubled(open_stream):
    straight = ids(take(build_dataloader(open_stream(), 4), 30))
    stream = open_stream()
    take(build_dataloader(stream, 4), 5)
    rest = ids(take(resumed(open_stream, stream.state(20, 1), 20, batch_size=3), 20))
    assert rest == straight[20:80]


def test_a_state_is_small_and_plain(open_stream):
    import json

    stream = open_stream()
    loader = build_dataloader(stream, 4)
    for done in range(1, 60):
        next(loader)
        state = stream.state(4 * done, 1)
        assert json.loads(json.dumps(state)) == state and len(json.dumps(state)) < 200
        assert len(stream.places) < 5  # of what is behind nothing is kept


# Faults


def corrupt(folder, number, how):
    [path] = folder.glob(f"data/train-{number:05d}-*")
    content = path.read_bytes()
    path.write_bytes({"zero bytes": b"", "cut": content[: len(content) // 2], "text": b"no parquet"}[how])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_is_replaced_by_the_next(open_stream, tmp_path, num_workers, caplog):
    [rows] = numbered(12)
    rows[3]["image"] = {"bytes": b"junk", "path": None}
    rows[7]["text"] = None
    rows[10]["image"] = None
    name = write_files(tmp_path / "other", rows)
    good = write_files(tmp_path / "good", *numbered(12))
    order = ids(take(build_dataloader(open_stream(good), 4), 3))
    stream = open_stream(name, max_bad_images=3)
    batches = take(build_dataloader(stream, 4, num_workers=num_workers), 3)
    seen = ids(batches)
    assert [caption for batch in batches for caption in batch["captions"]] == [f"photo {n}" for n in seen]
    for position, number in enumerate(order[:-1]):
        if number not in (3, 7, 10):
            assert seen[position] == number
        elif order[position + 1] not in (3, 7, 10):
            assert seen[position] == order[position + 1]
    assert {name: why.split(" ")[0] for name, why in stream.bad.items()} == {
        "row 3 of file 0 of the dataset": "not",
        "row 7 of file 0 of the dataset": "it",
        "row 10 of file 0 of the dataset": "not",
    }
    assert "row 7 of file 0 of the dataset (it has no caption)" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_bad_rows_than_are_allowed_end_the_run(open_stream, tmp_path, num_workers):
    [rows] = numbered(12)
    for number in (2, 5, 9):
        rows[number]["image"] = {"bytes": b"junk", "path": None}
    name = write_files(tmp_path / "other", rows)
    with pytest.raises(
        UserError, match="3 of the images cannot be read, more than --max_bad_images 2 .*row . of file 0"
    ):
        take(build_dataloader(open_stream(name, max_bad_images=2), 4, num_workers=num_workers), 4)
    with pytest.raises(UserError, match="1 of the images .*--max_bad_images 0"):
        take(build_dataloader(open_stream(name, max_bad_images=0), 4, num_workers=num_workers), 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_by_default_one_row_in_a_hundred_may_be_bad(open_stream, tmp_path, num_workers):
    """Of those read up to there: one of the first hundred, two of two hundred."""

    def run(*bad):
        [rows] = numbered(200)
        for number in bad:
            rows[number]["image"] = {"bytes": b"junk", "path": None}
        name = write_files(tmp_path / f"{len(list(tmp_path.iterdir()))}", rows)
        stream = open_stream(name, shuffle_buffer_size=1)
        take(build_dataloader(stream, 4, num_workers=num_workers), 50)
        return len(stream.bad)

    assert run(0) == 1 and run(50, 150) == 2
    with pytest.raises(UserError, match="2 of the images .* more than --max_bad_images 1 allows"):
        run(20, 30)


def test_when_all_rows_are_bad_it_ends(open_stream, tmp_path):
    name = write_files(tmp_path / "other", [row(n, image={"bytes": b"junk", "path": None}) for n in range(12)])
    with pytest.raises(UserError, match="of the images cannot be read"):
        take(build_dataloader(open_stream(name, max_bad_images=1000), 4), 1)


@pytest.mark.parametrize("how", ["zero bytes", "cut", "text"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_is_no_parquet_is_left_out(open_stream, dataset, number, how, caplog):
    corrupt(dataset, number, how)
    for seed in range(4):  # it may be the first that is read
        stream = open_stream(seed=seed)
        batches = take(build_dataloader(stream, 4), 24)
        expected = {n for n in range(37) if file_of(n) != number}
        assert set(ids(batches)) == expected
        assert [c for batch in batches for c in batch["captions"]] == [f"photo {n}" for n in ids(batches)]
        assert list(stream.bad) == [f"file {number} of the dataset"]
    assert f"file {number} of the dataset (" in caplog.text
    with pytest.raises(UserError, match=f"1 of .* more than --max_bad_images 0 allows: file {number} of the dataset"):
        take(build_dataloader(open_stream(max_bad_images=0), 4), 24)


def test_a_rank_whose_only_file_is_bad_waits_for_the_next_epoch(open_stream, tmp_path):
    name = write_files(tmp_path / "other", *numbered(6, 6))
    corrupt(name, 1, "zero bytes")
    for rank in range(2):
        batches = take(build_dataloader(open_stream(name, max_bad_images=1), 2, rank, 2), 6)
        assert set(ids(batches)) == set(range(6))


def test_a_first_file_that_cannot_be_read_is_one_sentence(open_stream, dataset):
    corrupt(dataset, 0, "cut")
    with pytest.raises(UserError, match="--dataset_name .*dataset .*Parquet"):
        open_stream()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("allowed", [None, 1000])
def test_files_that_vanish_end_the_run(open_stream, dataset, num_workers, allowed):
    loader = build_dataloader(open_stream(max_bad_images=allowed), 4, num_workers=num_workers)
    next(loader)
    shutil.rmtree(dataset / "data")
    with pytest.raises(UserError, match="No such file|no row"):
        take(loader, 30)
    loader.close()


def test_a_dataset_without_rows_is_one_sentence(open_stream, tmp_path):
    with pytest.raises(UserError, match="--streaming: the dataset has no row|can't be read"):
        take(build_dataloader(open_stream(write_files(tmp_path / "other", [])), 4), 1)


class Unplugged:
    """A dataset whose connection is lost after so many rows of a file."""

    def __init__(self, dataset, rows, error):
        self.dataset, self.rows, self.error, self.num_shards = dataset, rows, error, dataset.num_shards

    def shard(self, num_shards, index):
        yield from itertools.islice(self.dataset.shard(num_shards, index), self.rows)
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [ConnectionError("unplugged"), TimeoutError("unplugged")])
def test_a_lost_connection_ends_the_run_with_the_way_to_go_on(open_stream, num_workers, error):
    stream = open_stream(max_bad_images=1000)
    stream.samples = Unplugged(stream.samples, 5, error)
    sentence = "--streaming: the dataset can't be read any more .unplugged.: .*--resume_from_checkpoint latest"
    with pytest.raises(UserError, match=sentence):
        take(build_dataloader(stream, 4, num_workers=num_workers), 10)


def test_a_lost_connection_while_images_are_fetched_does_the_same(open_stream, tmp_path, monkeypatch):
    """A dataset may name its images by their addresses."""
    for number in range(12):
        fsspec.filesystem("memory").pipe(f"/photos/{number}.png", png(number))
    rows = [row(n, image={"bytes": None, "path": f"memory://photos/{n}.png"}) for n in range(12)]
    name = write_files(tmp_path / "other", rows)
    assert sorted(ids(take(build_dataloader(open_stream(name), 4), 3))) == list(range(12))

    def lost(*_):
        raise ConnectionError("unplugged")

    monkeypatch.setattr(streaming.fsspec, "open", lost)
    with pytest.raises(UserError, match="the dataset can't be read any more .unplugged.: .*--resume_from_checkpoint"):
        take(build_dataloader(open_stream(name), 4), 3)


def test_an_address_without_an_image_is_a_bad_row(open_stream, tmp_path):
    memory = fsspec.filesystem("memory")
    for number in range(12):
        memory.pipe(f"/gone/{number}.png", png(number))
    rows = [row(n, image={"bytes": None, "path": f"memory://gone/{n}.png"}) for n in range(12)]
    name = write_files(tmp_path / "other", rows)
    memory.rm("/gone/5.png")
    stream = open_stream(name, max_bad_images=1)
    assert set(ids(take(build_dataloader(stream, 4), 3))) >= set(range(12)) - {5}
    assert list(stream.bad) == ["row 5 of file 0 of the dataset"]


def test_what_is_missing_for_web_addresses_is_named(open_stream, tmp_path, monkeypatch):
    """`datasets` does without aiohttp, which fsspec needs for https."""
    addresses = [{"url": f"https://example.org/{n}.png", "text": f"photo {n}"} for n in range(4)]
    (tmp_path / "other").mkdir()
    datasets.Dataset.from_list(addresses).to_parquet(tmp_path / "other" / "train.parquet")

    def needs_a_package(*_):
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr(streaming.fsspec, "open", needs_a_package)
    with pytest.raises(UserError, match="aiohttp"):
        take(build_dataloader(open_stream(tmp_path / "other", image_column="url"), 4), 1)


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_images_in_plain_columns(open_stream, tmp_path, kind):
    """Columns that are not marked as images: of addresses or of files' bytes."""
    for number in range(4):
        fsspec.filesystem("memory").pipe(f"/plain/{number}.png", png(number))
    values = [f"memory://plain/{n}.png" if kind == "string" else png(n) for n in range(4)]
    (tmp_path / "other").mkdir()
    table = datasets.Dataset.from_dict({"photo": values, "text": [f"photo {n}" for n in range(4)]})
    table.to_parquet(tmp_path / "other" / "train.parquet")
    [batch] = take(build_dataloader(open_stream(tmp_path / "other", image_column="photo"), 4), 1)
    assert batch["captions"] == [f"photo {n}" for n in ids([batch])] and sorted(ids([batch])) == [0, 1, 2, 3]


# Captions and labels


def test_captions_of_several_columns(open_stream, tmp_path):
    rows = [row(n, text=None if n == 1 else f"photo {n}", tags=[f"tag {n}", "x"] if n else []) for n in range(4)]
    name = write_files(tmp_path / "other", rows, tags=datasets.List(datasets.Value("string")))
    flags = {"caption_column": ["text", "tags"], "caption_weights": [1.0, 3.0], "trigger_word": "sks"}
    batches = take(build_dataloader(open_stream(name, **flags), 4), 200)
    drawn = {n: [] for n in range(4)}
    for batch in batches:
        for number, caption in zip(ids([batch]), batch["captions"]):
            drawn[number].append(caption)
    assert set(drawn[0]) == {"sks, photo 0"} and set(drawn[1]) == {"sks, tag 1", "sks, x"}
    assert set(drawn[2]) == {"sks, photo 2", "sks, tag 2", "sks, x"}
    count = sum(caption == "sks, photo 2" for caption in drawn[2])
    assert abs(count / 200 - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5  # four standard errors


def test_the_instance_prompt_is_the_caption_of_rows_that_have_none(open_stream, tmp_path):
    rows = [row(n, text=None if n % 2 else f"photo {n}") for n in range(4)]
    stream = open_stream(write_files(tmp_path / "other", rows), instance_prompt="sks")
    [batch] = take(build_dataloader(stream, 4), 1)
    assert batch["captions"] == ["sks" if n % 2 else f"photo {n}" for n in ids([batch])]


MODEL_CLASSES = {0: "tench", 207: "golden retriever, retriever", 281: "tabby cat"}
LABELS = {  # the column's type, its values, the labels that they mean
    "numbers": (datasets.Value("int64"), [3, 0, 9, 281], [3, 0, 9, 281]),
    "digits": (datasets.Value("string"), ["3", "0", "9", "281"], [3, 0, 9, 281]),
    "the model's names in another order": (
        datasets.ClassLabel(names=["tabby cat", "tench", "golden retriever"]),
        [0, 1, 2, 0],
        [281, 0, 207, 281],
    ),
    "names that the model has not": (datasets.ClassLabel(names=["ant", "bee"]), [1, 0, 1, 0], [1, 0, 1, 0]),
    "the model's names as strings": (datasets.Value("string"), ["tench", "retriever"] * 2, [0, 207] * 2),
}


def labelled(folder, kind, values):
    rows = [row(number, kind=value) for number, value in enumerate(values)]
    return write_files(folder, rows, kind=kind)


@pytest.mark.parametrize("case", LABELS)
def test_class_labels(open_stream, tmp_path, case):
    kind, values, expected = LABELS[case]
    flags = {"label_column": "kind", "num_classes": 1000, "id2label": dict(MODEL_CLASSES)}
    stream = open_stream(labelled(tmp_path / "other", kind, values), **flags)
    for batch in take(build_dataloader(stream, 4, num_workers=1), 3):
        assert batch["captions"] == [expected[number] for number in ids([batch])]
        assert {type(label) for label in batch["captions"]} == {int}


BAD_LABELS = {
    "beyond the classes": (datasets.Value("int64"), [3, 0, 1000, 1]),
    "negative": (datasets.Value("int64"), [3, 0, -1, 1]),
    "missing": (datasets.Value("int64"), [3, 0, None, 1]),
    "not labelled": (datasets.ClassLabel(names=["tabby cat", "tench"]), [0, 1, -1, 0]),  # as in test sets
    "another name": (datasets.Value("string"), ["tench", "0", "cat", "1"]),
    "fraction": (datasets.Value("float32"), [None, None, 2.5, None]),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_label_that_is_no_class_is_named(open_stream, tmp_path, case):
    kind, values = BAD_LABELS[case]
    flags = {"label_column": "kind", "num_classes": 1000, "id2label": dict(MODEL_CLASSES), "max_bad_images": 4}
    stream = open_stream(labelled(tmp_path / "other", kind, values), **flags)
    try:
        take(build_dataloader(stream, 4), 1)
    except UserError:  # if all are bad
        pass
    assert "row 2 of file 0 of the dataset" in stream.bad
    assert "no class of the model's" in stream.bad["row 2 of file 0 of the dataset"]


def test_names_of_which_the_model_knows_only_some_are_refused(open_stream, tmp_path):
    """As without --streaming: their numbers would be those of other classes."""
    name = labelled(tmp_path / "other", datasets.ClassLabel(names=["tench", "golden retreiver"]), [0, 1, 0, 1])
    with pytest.raises(UserError, match="knows 1 of the 2 classes .* but not golden retreiver .golden retriever"):
        open_stream(name, label_column="kind", num_classes=1000, id2label=dict(MODEL_CLASSES))


def test_columns_that_are_not_there_are_refused_at_once(open_stream):
    for flags in ({"caption_column": ["tittle"]}, {"image_column": "photo"}, {"label_column": "x", "num_classes": 3}):
        with pytest.raises(UserError, match="has no column .* for --.*; choose one that is there: image, text"):
            open_stream(**flags)


def test_a_column_without_images_is_refused_at_once(open_stream, tmp_path):
    name = labelled(tmp_path / "other", datasets.Value("int64"), [3, 0, 9, 281])
    with pytest.raises(UserError, match="column kind .* does not hold images; .*--image_column: image"):
        open_stream(name, image_column="kind")


def test_a_dataset_that_is_not_there_is_refused(open_stream, tmp_path):
    with pytest.raises(UserError, match="--dataset_name .*none cannot be loaded .*; check the name"):
        open_stream(tmp_path / "none")


@pytest.mark.parametrize("kind", ["file", "save_to_disk", "image folder"])
def test_other_kinds_of_datasets(open_stream, tmp_path, kind):
    name = tmp_path / "other"
    if kind == "file":
        [path] = (write_files(name, *numbered(12)) / "data").iterdir()
        name = path
    elif kind == "save_to_disk":
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_list(numbered(12)[0], features=features).save_to_disk(name)
    else:
        name.mkdir()
        lines = ["file_name,text"]
        for number in range(12):
            (name / f"{number}.png").write_bytes(png(number))
            lines.append(f"{number}.png,photo {number}")
        (name / "metadata.csv").write_text("\n".join(lines))
    batches = take(build_dataloader(open_stream(name), 4), 6)
    assert sorted(ids(batches[:3])) == sorted(ids(batches[3:])) == list(range(12))
    assert [c for batch in batches for c in batch["captions"]] == [f"photo {n}" for n in ids(batches)]


# Threads


def readers():
    return [thread for thread in threading.enumerate() if thread.name.endswith("(_run)")]


def ended(threads):
    until = time.time() + 5
    while any(thread.is_alive() for thread in threads) and time.time() < until:
        time.sleep(0.02)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leaving_the_loader_ends_its_thread(open_stream, num_workers):
    before = readers()
    loader = build_dataloader(open_stream(), 4, num_workers=num_workers)
    next(loader)
    mine = [thread for thread in readers() if thread not in before]
    assert len(mine) == 1
    loader.close()
    assert ended(mine)


def test_an_error_ends_the_thread(open_stream):
    before = readers()
    stream = open_stream()
    stream.samples = Unplugged(stream.samples, 5, ConnectionError("unplugged"))
    with pytest.raises(UserError):
        take(build_dataloader(stream, 4), 10)
    assert ended([thread for thread in readers() if thread not in before])


def test_only_one_block_is_read_ahead(open_stream, tmp_path):
    """What is read is held in memory."""
    stream = open_stream(write_files(tmp_path / "other", *numbered(100)), shuffle_buffer_size=10)
    read, rows = [], stream._row
    stream._row = lambda *words: read.append(1) or rows(*words)
    loader = build_dataloader(stream, 2)
    for _ in range(3):
        next(loader)
    time.sleep(0.3)
    assert len(read) <= 10 * 4  # one in use, one ready, one in the thread's hand, and the next one's first row
    loader.close()


# The whole program


@pytest.fixture
def photo_stream(photos, tmp_path):
    """The fixture `photos` as a dataset of three files."""
    import json

    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = {"bytes": (photos / row.pop("file_name")).read_bytes(), "path": None}
    name = write_files(tmp_path / "photo_stream", rows[:3], rows[3:7], rows[7:])
    return ("--dataset_name", name, "--cache_dir", tmp_path / "cache", "--streaming", "--shuffle_buffer_size", 4)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(train, photo_stream):
    flags = ("--checkpointing_steps", 3, "--lpl_weight", 0.5, "--random_flip", "--lr_scheduler", "constant")
    whole = train(*flags, name="whole", data=photo_stream, steps=8)
    part = train(*flags, name="part", data=photo_stream, steps=4)
    for path in (part / "unet", part / "model_index.json"):  # as if it had been stopped after its checkpoint
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(*flags, "--resume_from_checkpoint", "latest", name="part", data=photo_stream, steps=8)
    first, second = [load_file(o / "unet" / "diffusion_pytorch_model.safetensors") for o in (whole, part)]
    assert all(first[name].equal(second[name]) for name in first)
    assert [log["loss"] for log in read_log(whole)][3:] == [log["loss"] for log in read_log(part)][-5:]


def test_a_run_of_another_number_of_processes_is_not_resumed(train, photo_stream):
    import json

    output = train("--checkpointing_steps", 2, data=photo_stream, steps=2)
    path = output / "checkpoint-2" / "training_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "streams": state["streams"] * 2}))
    sentence = "with --streaming the order depends on the number of processes, which was 2; start as many"
    with pytest.raises(UserError, match=sentence):
        train("--resume_from_checkpoint", "latest", data=photo_stream, steps=4)


@pytest.fixture
def parse(tiny_sd, photo_stream, tmp_path):
    def run(*words):
        flags = ["--pretrained_model_name_or_path", tiny_sd, *photo_stream, "--output_dir", tmp_path / "out"]
        flags += ["--resolution", 64, "--max_train_steps", 4]
        return train_lpl_sd.parse_args([str(word) for word in (*flags, *words)])

    return run


@pytest.fixture(scope="session")
def known_flags():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lpl_sd, "parse_and_check", lambda parser, argv: parser)
        return set(train_lpl_sd.parse_args()._option_string_actions)


@pytest.mark.parametrize(
    "words",
    [
        ["--cache_latents", "--center_crop"],
        ["--cache_text_embeddings"],
        ["--latent_cache_dir", "x"],
        ["--aspect_ratio_buckets"],
        ["--max_train_samples", "3"],
        ["--with_prior_preservation", "--class_data_dir", "x", "--class_prompt", "x"],
        ["--num_train_epochs", "3"],
        ["--validation_epochs", "3", "--validation_prompts", "x"],
    ],
)
def test_flags_that_need_the_whole_dataset_are_refused(refuse, words):
    assert f"{words[0]} has no effect with --streaming: leave one of them out" in refuse(*words)


def test_a_stream_needs_to_know_when_to_end(tiny_sd, photo_stream, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", tiny_sd, *photo_stream, "--output_dir", tmp_path / "out"]
    for words, sentence in (
        (flags, "--streaming: nobody knows how long an epoch is: say when to end with --max_train_steps"),
        ([*flags, "--max_train_steps", 4, "--shuffle_buffer_size", 0], "--shuffle_buffer_size 0 must be at least 1"),
        ([w for w in flags if w != "--streaming"], "--shuffle_buffer_size has no effect without --streaming: add it"),
    ):
        with pytest.raises(SystemExit):
            train_lpl_sd.parse_args([str(word) for word in words])
        assert sentence in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
