"""Images and captions: what is read, in which order, and what is said when it cannot be read."""

import csv
import io
import itertools
import json
import logging
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tiny_models import build_photo_folder, photo_id

import data_sources
import data_utils
from arguments import UserError
from data_sources import (
    check_images,
    check_labels,
    labels_of,
    limit_samples,
    read_class_folder,
    read_hub_dataset,
    read_image_folder,
)
from data_utils import TrainingStream, all_captions, build_dataloader, cache_latents, read_data
from images import IMAGE_ERRORS, image_size, load_image, open_image, transform


pytestmark = pytest.mark.usefixtures("time_limit")


def image_with_id(number):
    """A plain image of a size of its own; its red value is its id, whatever the crop."""
    return Image.new("RGB", (9 + number % 5, 9 + number % 3), (number, 77, 200))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Ten images with ids 0 to 9 and captions "photo 0" to "photo 9"."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        image_with_id(number).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"photo {number}"} for number in range(10)]
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


@pytest.fixture
def stream(folder):
    return TrainingStream(read_image_folder(str(folder)), seed=5, resolution=8, random_flip=True)


def take(loader, count):
    return list(itertools.islice(loader, count))


def ids(batch):
    """The ids that the pixels of a batch show."""
    return [round(float(red + 1) * 127.5) for red in batch["pixel_values"][:, 0].mean((1, 2))]


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        assert a["captions"] == b["captions"]
        for name in a.keys() - {"captions"}:
            assert a[name].dtype == b[name].dtype and a[name].equal(b[name]), name


# The stream and its batches


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_pixels_and_captions_stay_together_in_the_same_order_with_any_workers(stream, num_workers):
    batches = take(build_dataloader(stream, 4, num_workers=num_workers), 10)
    for batch in batches:
        assert batch["captions"] == [f"photo {number}" for number in ids(batch)]
        assert batch["pixel_values"].shape == (4, 3, 8, 8)
        assert batch["pixel_values"].max() <= 1 and batch["pixel_values"].min() >= -1
        sizes = [[9 + number % 3, 9 + number % 5] for number in ids(batch)]
        assert batch["original_sizes"].tolist() == sizes
    assert [p for batch in batches for p in batch["positions"].tolist()] == list(range(40))
    assert_same_batches(batches, take(build_dataloader(stream, 4), 10))


def test_every_sample_comes_once_per_epoch_in_another_order_each_time(stream):
    seen = [number for batch in take(build_dataloader(stream, 4), 10) for number in ids(batch)]
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]  # batches of 4 cross the boundaries of 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen == [stream.index(position) for position in range(40)]  # sorted by path, here, is sorted by id


def test_another_seed_gives_another_order(stream, folder):
    other = TrainingStream(read_image_folder(str(folder)), seed=6, resolution=8)
    assert [stream.index(p) for p in range(20)] != [other.index(p) for p in range(20)]


def test_the_shares_of_two_processes_make_the_batch_of_one(stream):
    import torch

    whole = take(build_dataloader(stream, 6), 8)
    ranks = [take(build_dataloader(stream, 3, rank=rank, world_size=2, num_workers=rank), 8) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks):
        assert batch["captions"] == first["captions"] + second["captions"]
        for name in ("pixel_values", "positions", "original_sizes", "crop_top_lefts"):
            assert torch.cat([first[name], second[name]]).equal(batch[name])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_mid_epoch_continues_with_the_very_same_batches(stream, num_workers):
    stream.proportion_empty_prompts = 0.3
    straight = take(build_dataloader(stream, 4, num_workers=num_workers), 9)
    resumed = take(build_dataloader(stream, 4, start_position=4 * 4, num_workers=num_workers), 5)
    assert_same_batches(straight[4:], resumed)


def test_the_loader_leaves_the_global_random_generators_alone(stream):
    import random

    import torch

    def draws():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draws()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    take(build_dataloader(stream, 4, num_workers=1), 2)
    take(build_dataloader(stream, 4), 2)
    assert draws() == expected


def test_crops_differ_from_epoch_to_epoch(tmp_path):
    Image.new("RGB", (64, 8)).save(tmp_path / "wide.png")
    stream = TrainingStream([(str(tmp_path / "wide.png"), "wide")], seed=0, resolution=8)
    lefts = [stream[position]["crop_top_left"][1] for position in range(200)]
    assert min(lefts) == 0 and max(lefts) == 56  # both ends of the range are drawn
    assert len(set(lefts)) > 40


def test_captions_are_dropped_at_the_given_rate_by_step_and_without_touching_the_crops(stream):
    before = [stream[position] for position in range(2000)]
    assert all(sample["caption"] for sample in before)
    stream.proportion_empty_prompts = 0.25
    after = [stream[position] for position in range(2000)]
    dropped = [not sample["caption"] for sample in after]
    assert abs(np.mean(dropped) - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5  # four standard errors
    for number in range(10):  # by step: each caption is dropped now and then, none always
        assert 20 < sum(drop for position, drop in enumerate(dropped) if stream.index(position) == number) < 80
    for left, right, drop in zip(before, after, dropped):
        assert np.array_equal(left["pixel_values"], right["pixel_values"])
        assert right["caption"] == ("" if drop else left["caption"])


def test_flips_and_caption_dropout_are_independent(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 4, 8))
    image.save(tmp_path / "half.png")
    samples = [(str(tmp_path / "half.png"), "half")]
    stream = TrainingStream(samples, 0, 8, random_flip=True, proportion_empty_prompts=0.5)
    drawn = [stream[position] for position in range(400)]
    draws = [(sample["pixel_values"][0, 0, 0] < 0, sample["caption"] == "") for sample in drawn]
    assert abs(np.corrcoef(np.array(draws).T)[0, 1]) < 0.2  # four standard errors


def test_one_of_several_captions_is_drawn_each_time(folder):
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "3.png", "text": ["one", "two", "three"]}])
    stream = TrainingStream(read_image_folder(str(folder)), seed=0, resolution=8)
    captions = [stream[position]["caption"] for position in range(120)]
    assert all(captions.count(caption) > 20 for caption in ("one", "two", "three"))
    assert captions == [stream[position]["caption"] for position in range(120)]


# Transforms


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size", [(40, 24), (24, 41), (24, 24)])
def test_the_crop_lies_where_the_returned_coordinates_say(size, center_crop):
    """At the resolution of the shorter side nothing is resized, so the crop is a plain slice of the array."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    for draw in range(40):
        flip = draw % 2 == 1
        view = transform(Image.fromarray(pixels), 24, center_crop, flip, "lanczos", np.random.default_rng(draw))
        result, (top, left) = view["pixel_values"], view["crop_top_left"]
        crops = [source[top : top + 24, left : left + 24] for source in (pixels, pixels[:, ::-1])]
        matches = [np.allclose(result, crop.transpose(2, 0, 1) / 255 * 2 - 1, atol=1e-6) for crop in crops]
        assert matches == [not flip, flip]
        assert view["original_size"] == size[::-1]
        assert result.dtype == np.float32 and result.shape == (3, 24, 24)
        if center_crop:
            assert (top, left) == (round((size[1] - 24) / 2), round((size[0] - 24) / 2))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"])
def test_the_shorter_side_is_resized_with_the_chosen_filter(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    view = transform(image, 16, True, False, mode)
    resized = np.asarray(image.resize((int(71 * 16 / 50), 16), getattr(Image.Resampling, mode.upper())))
    top, left = view["crop_top_left"]
    assert np.allclose(view["pixel_values"], resized[:, left : left + 16].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert (view["original_size"], top, left) == ((50, 71), 0, 3)


# Kinds of images


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((2, 3, 3), dtype=np.uint8)
    upright[0, 0], upright[0, 2], upright[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How the stored array arises from the upright one, from the definition: where row 0 and column 0 of what is
    # stored lie in the upright image (1: top, left; 2: top, right; ... 6: right, top; 8: left, bottom).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(load_image(data), upright)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(1, 10)])
def test_the_size_is_known_without_decoding(kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (30, 20)), kind, exif=exif)
    assert image_size(data) == load_image(data).size[::-1]


def test_an_orientation_that_is_no_number_is_none(monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {0x0112: "6"})
    assert image_size(encoded(Image.new("RGB", (30, 20)), "JPEG")) == (20, 30)


def test_an_image_that_would_become_too_long_is_a_bad_one():
    with pytest.raises(ValueError, match="2 x 3000 pixels it is too long and thin"):
        transform(Image.new("RGB", (2, 3000)), 512, True, False, "box")
    assert transform(Image.new("RGB", (30, 3000)), 512, True, False, "box")["pixel_values"].shape == (3, 512, 512)


def test_a_damaged_avif_is_a_bad_image():
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "AVIF")
    place = data.index(b"mdat") + 4
    with pytest.raises(IMAGE_ERRORS):
        load_image(data[:place] + bytes(300) + data[place + 300 :])


def palette_image(**options):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return encoded(image, "PNG", **options)


def grey16(values, dtype="<u2"):
    return Image.fromarray(np.array([values], dtype=dtype))


KINDS = {
    "rgb": (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), "PNG"), [(1, 2, 3), (1, 2, 3)]),
    "grey": (encoded(Image.new("L", (2, 1), 90), "PNG"), [(90,) * 3] * 2),
    "black and white": (encoded(Image.new("1", (2, 1), 1), "PNG"), [(255,) * 3] * 2),
    "clear alpha": (encoded(Image.new("RGBA", (2, 1), (9, 9, 9, 0)), "PNG"), [(255,) * 3] * 2),
    # 51 / 255 = a fifth of the colour, four fifths of white
    "thin alpha": (encoded(Image.new("RGBA", (2, 1), (55, 105, 155, 51)), "PNG"), [(215, 225, 235)] * 2),
    "grey alpha": (encoded(Image.new("LA", (2, 1), (55, 51)), "PNG"), [(215,) * 3] * 2),
    "palette": (palette_image(), [(10, 20, 30), (200, 100, 50)]),
    "palette with alpha": (palette_image(transparency=0), [(255, 255, 255), (200, 100, 50)]),
    "rgb with a transparent colour": (
        encoded(Image.new("RGB", (2, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        [(255,) * 3] * 2,
    ),
    # a subtractive colour: (1 - C) (1 - K) and so on
    "cmyk": (encoded(Image.new("CMYK", (2, 1), (255, 0, 51, 51)), "TIFF"), [(0, 204, 163)] * 2),
    "16-bit grey png": (encoded(grey16([0, 65535]), "PNG"), [(0,) * 3, (255,) * 3]),
    "16-bit grey, mid": (encoded(grey16([128 * 257, 3 * 257]), "PNG"), [(128,) * 3, (3,) * 3]),
    "16-bit grey tiff": (encoded(grey16([128 * 257, 65535]), "TIFF"), [(128,) * 3, (255,) * 3]),
    "16-bit grey pgm": (b"P5 2 1 65535\n" + np.array([128 * 257, 65535], ">u2").tobytes(), [(128,) * 3, (255,) * 3]),
    "first frame": (
        encoded(Image.new("RGB", (2, 1), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 1))]),
        [(255, 0, 0)] * 2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_the_right_rgb(kind, tmp_path):
    data, expected = KINDS[kind]
    image = load_image(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=int)[0] - expected).max() <= 1, np.asarray(image)
    (tmp_path / "file").write_bytes(data)
    assert np.array_equal(load_image(str(tmp_path / "file")), image)


def test_cmyk_jpeg_keeps_its_colours():
    image = load_image(encoded(Image.new("CMYK", (16, 16), (255, 0, 51, 51)), "JPEG", quality=95))
    assert np.abs(np.asarray(image, dtype=int) - (0, 204, 163)).max() <= 4


def test_a_large_photo_is_no_attack(monkeypatch, recwarn):
    assert 200_000_000 < Image.MAX_IMAGE_PIXELS < 500_000_000
    data = encoded(Image.new("1", (10_000, 10_000)), "PNG")  # Pillow's default warns from 89 megapixels on
    with open_image(data) as image:
        assert image.size == (10_000, 10_000)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # beyond the limit: a bad image like others, not a crash
    with pytest.raises(UserError, match="decompression bomb.*--max_bad_images"):
        check_images([(data, "huge")])


def test_images_of_32_bits_are_refused_rather_than_clipped(tmp_path):
    for number, dtype in enumerate((np.float32, np.int32)):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / f"{number}.tif")
        with pytest.raises(UserError, match=f"{number}.tif.*8 or 16 bits"):
            check_images([(str(tmp_path / f"{number}.tif"), "x")])


# Folders


def test_a_folder_is_read_sorted_with_sub_folders(folder):
    sub = folder / "more" / "deep"
    sub.mkdir(parents=True)
    image_with_id(20).save(sub / "a.jpg")
    image_with_id(21).save(folder / "more" / "B.PNG")
    with open(folder / "more" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), ("B.PNG", 'a "big", red one'), ("deep/a.jpg", "over\ntwo lines")])
    samples = read_image_folder(str(folder))
    expected = [(str(folder / f"{number}.png"), f"photo {number}") for number in range(10)]
    expected += [(str(folder / "more" / "B.PNG"), 'a "big", red one'), (str(sub / "a.jpg"), "over\ntwo lines")]
    assert samples == expected


def test_linked_folders_and_files_with_a_byte_order_mark_are_read(folder, tmp_path):
    linked = tmp_path / "elsewhere"
    linked.mkdir()
    image_with_id(30).save(linked / "linked.png")
    (linked / "metadata.csv").write_text("file_name,text\r\nlinked.png,from afar\r\n", encoding="utf-8-sig")
    (folder / "link").symlink_to(linked)
    assert read_image_folder(str(folder))[-1] == (str(folder / "link" / "linked.png"), "from afar")


def test_parquet_metadata_and_lists_of_captions(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "metadata.jsonl").unlink()
    table = pyarrow.table({"file_name": ["2.png", "1.png"], "text": [["x", "y"], ["z"]]})
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    assert read_image_folder(str(folder)) == [(str(folder / "1.png"), ["z"]), (str(folder / "2.png"), ["x", "y"])]


def test_the_caption_column_is_found_or_chosen(folder):
    rows = [{"file_name": "1.png", "prompt": "a prompt", "score": 3}]
    write_jsonl(folder / "metadata.jsonl", rows)
    assert read_image_folder(str(folder))[0][1] == "a prompt"  # the only text column
    rows[0]["text"] = "a text"
    write_jsonl(folder / "metadata.jsonl", rows)
    assert read_image_folder(str(folder), "image")[0][1] == "a text"
    assert read_image_folder(str(folder), "file_name", "prompt")[0][1] == "a prompt"


def test_images_without_a_row_are_counted_in_one_warning(folder, caplog):
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "4.png", "text": "four"}])
    (folder / ".hidden").mkdir()
    image_with_id(1).save(folder / ".hidden" / "thumbnail.png")
    assert read_image_folder(str(folder)) == [(str(folder / "4.png"), "four")]
    assert len(caplog.records) == 1
    assert "9 of the images" in caplog.text and "0.png" in caplog.text and "hidden" not in caplog.text


@pytest.fixture
def captioned(folder):
    """The folder with text files in the place of metadata: of the ten images, 3.png has an empty one, 7.png none."""
    (folder / "metadata.jsonl").unlink()
    for number in range(10):
        if number != 7:
            text = "" if number == 3 else f"  photo {number},\n of a cat \n"
            (folder / f"{number}.txt").write_text(text, encoding="utf-8-sig" if number == 1 else "utf-8")
    (folder / "notes.txt").write_text("of no image")
    return folder


def test_captions_lie_beside_the_images(captioned, caplog):
    with pytest.raises(UserError, match="2 of the images in --train_data_dir .* have no caption .*first: .*3.png.*; "):
        read_image_folder(str(captioned))
    samples = read_image_folder(str(captioned), instance_prompt="sks cat")
    named = {3: "sks cat", 7: "sks cat"}
    expected = [(str(captioned / f"{i}.png"), named.get(i, f"photo {i}, of a cat")) for i in range(10)]
    assert samples == expected
    assert "2 of the 10 images have no caption and get that of --instance_prompt" in caplog.text
    (captioned / "3.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="3.txt cannot be read as a caption .*; save it as UTF-8 text."):
        read_image_folder(str(captioned), instance_prompt="sks cat")
    with pytest.raises(UserError, match="--caption_column text does not apply to --train_data_dir"):
        read_image_folder(str(captioned), caption_column="text")


def test_one_prompt_for_all(folder, caplog):
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "1.png", "score": 3}, {"file_name": "2.png"}])
    names = ["1.png", "2.png"]
    assert read_image_folder(str(folder), instance_prompt="a") == [(str(folder / name), "a") for name in names]
    rows = [{"file_name": "1.png", "text": " "}, {"file_name": "2.png", "text": ["x"]}]
    write_jsonl(folder / "metadata.jsonl", rows)
    samples = read_image_folder(str(folder), instance_prompt="a")
    assert samples == [(str(folder / "1.png"), "a"), (str(folder / "2.png"), ["x"])]
    (folder / "metadata.jsonl").unlink()
    caplog.clear()
    assert {caption for _, caption in read_image_folder(str(folder), instance_prompt="a")} == {"a"}
    assert not caplog.text  # it was asked for


METADATA_ERRORS = {
    "no rows": ("", "--train_data_dir .*has no captions; write a metadata.jsonl .*file_name"),
    "not json": ('{"file_name": "1.png", "text": "a"}\n{oops\n', "row 2 of .*metadata.jsonl cannot be read .*correct"),
    "no file_name": ('{"text": "a"}\n', "row 1 of .*metadata.jsonl.*no file_name"),
    "no object": ("[1]\n", "row 1 of .*metadata.jsonl.*no file_name"),
    "missing file": (
        '{"file_name": "gone.png", "text": "a"}\n{"file_name": "1.png", "text": "a"}\n',
        "1 of the metadata rows name a file that is not there .first: gone.png in .*.jsonl.; correct file_name",
    ),
    "no text column": ('{"file_name": "1.png"}\n', "no caption column text;.*--caption_column: none is, so add one"),
    "two text columns": ('{"file_name": "1.png", "a": "x", "b": "y"}\n', "no caption column text;.*_column: a, b."),
    "empty caption": (
        '{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "text": " "}\n{"file_name": "3.png"}\n',
        "2 of the captions in column text are empty or no text .first: ' ' for .*2.png.*--caption_column",
    ),
    "null caption": ('{"file_name": "1.png", "text": null}\n', "1 of the captions .*first: None for .*1.png"),
    "number": ('{"file_name": "1.png", "text": 7}\n', "1 of the captions .*first: 7 for .*1.png"),
    "empty list": ('{"file_name": "1.png", "text": []}\n', r"1 of the captions .*first: \[\] for .*1.png"),
    "list with null": ('{"file_name": "1.png", "text": ["a", null]}\n', "1 of the captions .*1.png"),
}


@pytest.mark.parametrize("error", METADATA_ERRORS)
def test_an_error_in_the_metadata_is_one_sentence(folder, error):
    content, sentence = METADATA_ERRORS[error]
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence) as raised:
        read_image_folder(str(folder))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_caption_with_an_unquoted_comma_is_not_cut_short(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n1.png,plain\n2.png,a red, round ball\n")
    with pytest.raises(UserError, match="row 2 of .*metadata.csv.*commas needs quotes"):
        read_image_folder(str(folder))
    (folder / "metadata.csv").write_text('file_name,text\n1.png,"never closed\n2.png,b\n')
    with pytest.raises(UserError, match="row 1 of .*metadata.csv cannot be read"):
        read_image_folder(str(folder))


def test_errors_about_the_folder_name_the_flag_and_the_remedy(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--train_data_dir .*nowhere is not a folder; give"):
        read_image_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--train_data_dir .*empty contains no images.*--dataset_name"):
        read_image_folder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="--image_column photo does not apply to --train_data_dir.*leave the flag out"):
        read_image_folder(str(folder), image_column="photo")
    with pytest.raises(UserError, match="no caption column prompt;.*--caption_column: text"):
        read_image_folder(str(folder), caption_column="prompt")
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match="metadata.jsonl and .*metadata.csv are both there; keep"):
        read_image_folder(str(folder))
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="--train_data_dir .*has no captions; write a metadata.jsonl"):
        read_image_folder(str(folder))


def test_folders_are_read_without_importing_torch_or_datasets(folder):
    code = f"""
import sys, data_sources, data_utils
samples, bad = data_sources.check_images(data_sources.read_image_folder({str(folder)!r}))
assert data_utils.TrainingStream(samples, 0, 8)[3]["pixel_values"].shape == (3, 8, 8)
print(len(samples), sorted({{"torch", "datasets", "pyarrow", "diffusers"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(data_utils.__file__)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "10 []\n", result.stderr


# Datasets


@pytest.fixture
def dataset(tmp_path):
    """Six rows with images of ids 0 to 5 as columns image, text, and others."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": encoded(image_with_id(number), "PNG"), "path": None} for number in range(6)]
    columns = {
        "image": images,
        "label": list(range(6)),
        "text": [f"photo {number}" for number in range(6)],
        "all_captions": [[f"photo {number}", "photo"] for number in range(6)],
        "holes": ["a", None, "", "b", "c", "d"],
    }
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string")}
    features |= {"all_captions": datasets.Sequence(datasets.Value("string")), "holes": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("layout", ["save_to_disk", "dict", "parquet file", "parquet folder", "arrow file"])
def test_local_datasets_give_images_with_their_captions(dataset, tmp_path, layout):
    import datasets

    place = tmp_path / "data"
    if layout == "save_to_disk":
        dataset.save_to_disk(place)
    elif layout == "dict":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(place)
    elif layout == "arrow file":
        dataset.save_to_disk(place)
        place = place / "data-00000-of-00001.arrow"
    else:
        place.mkdir()
        dataset.to_parquet(place / "train.parquet")
        place = place / "train.parquet" if layout == "parquet file" else place
    samples = read_hub_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    samples, bad = check_images(samples)
    assert (len(samples), bad) == (6, {})
    stream = TrainingStream(samples, seed=0, resolution=8)
    for num_workers in (0, 2):
        for batch in take(build_dataloader(stream, 4, num_workers=num_workers), 3):
            assert batch["captions"] == [f"photo {number}" for number in ids(batch)]


def test_all_captions_are_those_of_the_samples_used(dataset, folder, tmp_path):
    dataset.save_to_disk(tmp_path / "data")
    samples = read_hub_dataset(str(tmp_path / "data"), caption_column="all_captions")
    three = limit_samples(samples, 3, seed=0)
    wanted = {caption for index in range(3) for caption in three[index][1]}
    assert all_captions(TrainingStream(three, seed=0, resolution=8)) == wanted and len(wanted) > 1
    stream = TrainingStream(read_image_folder(str(folder)), 0, 8, proportion_empty_prompts=0.1)
    assert all_captions(stream) == {"", *(caption for _, caption in stream.samples)}


def test_dataset_columns_are_found_chosen_or_listed(dataset, tmp_path):
    def read(columns=None, **flags):
        place = str(tmp_path / f"data{len(os.listdir(tmp_path))}")
        (dataset.select_columns(columns) if columns else dataset).save_to_disk(place)
        return read_hub_dataset(place, **flags)

    assert read()[2][1] == "photo 2"
    assert read(caption_column="all_captions")[2][1] == ["photo 2", "photo"]
    dataset.with_format("numpy").save_to_disk(tmp_path / "numpy")  # which would read lists as arrays
    assert read_hub_dataset(str(tmp_path / "numpy"), caption_column="all_captions")[2][1] == ["photo 2", "photo"]
    renamed = read(["image", "text"]).dataset.rename_columns({"image": "jpg", "text": "prompt"})
    renamed.save_to_disk(tmp_path / "renamed")
    samples = read_hub_dataset(str(tmp_path / "renamed"))  # neither name is there: the first and the second column
    assert samples[4][1] == "photo 4" and load_image(samples[4][0]).getpixel((0, 0))[0] == 4

    listed = "image, label, text, all_captions, holes"
    with pytest.raises(UserError, match=f"--dataset_name .* has no column prompt for --caption_column; .*: {listed}"):
        read(caption_column="prompt")
    with pytest.raises(UserError, match=f"--dataset_name .* has no column jpg for --image_column; .*: {listed}"):
        read(image_column="jpg")
    with pytest.raises(UserError, match=f"column label of --dataset_name .*not hold images.*--image_column: {listed}"):
        read(image_column="label")
    with pytest.raises(
        UserError, match="2 of the captions in column holes are empty or no text .first: None for row 1"
    ):
        read(caption_column="holes")
    with pytest.raises(UserError, match="6 of the captions in column label .*first: 0 for row 0.*--caption_column"):
        read(caption_column="label")
    with pytest.raises(UserError, match="has no column text for --caption_column"):
        read(["image"])

    for columns, flags, captions in (
        (["image"], {}, ["sks"] * 6),
        (["image", "label"], {}, ["sks"] * 6),
        (None, {}, [f"photo {number}" for number in range(6)]),
        (None, {"caption_column": "holes"}, ["a", "sks", "sks", "b", "c", "d"]),
    ):
        samples = read(columns, instance_prompt="sks", **flags)
        assert samples.captions() == captions and [samples[i][1] for i in range(6)] == captions


def test_a_dataset_that_is_not_there_is_one_sentence(dataset, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "untrained")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet" * 100)
    (tmp_path / "x.zip").write_bytes(b"")
    reasons = {"nobody/nothing": "Hub", str(tmp_path / "untrained"): "no split train, only test"}
    reasons |= {str(tmp_path / "empty"): "any data files", str(tmp_path / "bad.parquet"): "not a parquet file"}
    reasons |= {str(tmp_path / "x.zip"): "must be .parquet or .arrow"}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"--dataset_name {name} cannot be loaded .*{reason}.*; check the name"):
            read_hub_dataset(name, cache_dir=str(tmp_path / "cache"))


def test_max_train_samples_draws_what_the_diffusers_scripts_draw(dataset, tmp_path, folder):
    dataset.save_to_disk(tmp_path / "data")
    samples = read_hub_dataset(str(tmp_path / "data"))
    expected = dataset.shuffle(seed=7).select(range(4))["text"]
    limited = limit_samples(samples, 4, seed=7)
    assert [caption for _, caption in (limited[index] for index in range(4))] == list(expected)
    assert len(limited) == 4 and len(samples) == 6
    assert limit_samples(samples, None, 7) is samples and limit_samples(samples, 6, 7) is samples
    files = read_image_folder(str(folder))
    drawn = limit_samples(files, 3, seed=7)
    assert len(set(drawn)) == 3 and set(drawn) < set(files)


# Bad images


def break_image(path, how):
    if how == "cut":
        image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        path.write_bytes(encoded(Image.fromarray(image), "JPEG")[:-200])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"no image"}[how])


REASONS = {"cut": "truncated", "gone": "No such file", "empty": "not an image", "text": "not an image"}


@pytest.mark.parametrize("how", REASONS)
def test_bad_images_are_found_named_and_counted_before_training(folder, caplog, how):
    samples = read_image_folder(str(folder))
    break_image(folder / "3.png", how)
    break_image(folder / "7.png", how)
    sentence = f"2 of the images cannot be read, more than --max_bad_images 1 allows: .*3.png .*{REASONS[how]}.*7.png"
    with pytest.raises(UserError, match=sentence + ".*; repair or remove them, or raise --max_bad_images"):
        check_images(samples, max_bad_images=1)
    assert not caplog.records
    good, bad = check_images(samples, max_bad_images=2)
    assert good == [sample for number, sample in enumerate(samples) if number not in (3, 7)]
    assert list(bad) == [str(folder / "3.png"), str(folder / "7.png")]
    assert len(caplog.records) == 1 and "3.png" in caplog.text and "7.png" in caplog.text


def test_of_many_images_only_some_are_read_at_start(monkeypatch):
    monkeypatch.setattr(data_sources, "MAX_CHECKED_IMAGES", 10)
    data, read = encoded(image_with_id(1), "PNG"), []
    monkeypatch.setattr(data_sources, "open_image", lambda source: read.append(1) or Image.open(io.BytesIO(source)))
    for count, at_most in ((10, 10), (11, 10), (99, 10), (3, 3)):
        read.clear()
        assert len(check_images([(data, "x")] * count)[0]) == count
        assert at_most / 2 <= len(read) <= at_most


def test_a_bad_row_of_a_dataset_is_named_by_its_number(dataset, tmp_path):
    import datasets

    rows = [{"bytes": encoded(image_with_id(number), "PNG"), "path": None} for number in range(6)]
    rows[2], rows[4] = None, {"bytes": b"no image", "path": None}
    features = datasets.Features({name: dataset.features[name] for name in ("image", "text")})
    broken = datasets.Dataset.from_dict({"image": rows, "text": dataset["text"][:]}, features=features)
    broken.save_to_disk(tmp_path / "data")
    samples = read_hub_dataset(str(tmp_path / "data"))
    with pytest.raises(UserError, match="2 of the images .*row 2 of the dataset .not an image.*row 4 of the dataset"):
        check_images(samples)
    good, bad = check_images(samples, 2)
    assert [good[index][1] for index in range(len(good))] == ["photo 0", "photo 1", "photo 3", "photo 5"]
    assert set(bad) == {"row 2 of the dataset", "row 4 of the dataset"}
    limited = limit_samples(samples, 5, seed=7)  # rows keep their numbers when a choice is made from a choice
    good, bad = check_images(limited, 2)
    rows = np.random.default_rng(7).permutation(6)[:5]
    assert [good[index][1] for index in range(len(good))] == [f"photo {row}" for row in rows if row not in (2, 4)]
    assert set(bad) == {f"row {row} of the dataset" for row in rows if row in (2, 4)} and bad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_lost_during_training_stops_it_with_one_sentence(folder, stream, num_workers):
    (folder / "6.png").unlink()
    place = [stream.index(position) for position in range(10)].index(6)
    loader = build_dataloader(stream, 2, num_workers=num_workers)
    assert len(take(loader, place // 2)) == place // 2  # all batches before it are good
    with pytest.raises(UserError) as raised:
        next(loader)
    assert str(raised.value) == (
        f"1 of the images cannot be read, more than --max_bad_images 0 allows: {folder / '6.png'} (No such file or "
        "directory); repair or remove them, or raise --max_bad_images."
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_lost_image_within_the_allowance_is_replaced_by_the_next_with_one_warning(folder, num_workers, tmp_path):
    stream = TrainingStream(read_image_folder(str(folder)), seed=5, resolution=8, max_bad_images=1)
    order = [stream.index(position) for position in range(30)]
    lost = order[9]  # the last of the first epoch, so that the first takes its place
    (folder / f"{lost}.png").unlink()
    expected = list(order)
    for position, number in enumerate(order):
        if number == lost:
            expected[position] = order[position // 10 * 10 + (position + 1) % 10]
    log = logging.FileHandler(tmp_path / "log")  # a file, because what workers write must be seen as well
    logging.getLogger("data_utils").addHandler(log)
    try:
        batches = take(build_dataloader(stream, 3, num_workers=num_workers), 10)
    finally:
        logging.getLogger("data_utils").removeHandler(log)
        log.close()
    assert [number for batch in batches for number in ids(batch)] == expected
    assert [caption for batch in batches for caption in batch["captions"]] == [f"photo {n}" for n in expected]
    told = (tmp_path / "log").read_text()
    assert told.count("\n") == 1 and f"{lost}.png (No such file" in told


@pytest.mark.parametrize("num_workers", [0, 2])
def test_losses_in_different_workers_count_together(folder, num_workers):
    stream = TrainingStream(read_image_folder(str(folder)), seed=5, resolution=8, max_bad_images=1)
    lost = [stream.index(0), stream.index(2)]  # first samples of the first two batches: one for each worker
    for number in lost:
        (folder / f"{number}.png").unlink()
    loader = build_dataloader(stream, 2, num_workers=num_workers)
    next(loader)
    with pytest.raises(UserError, match=f"2 of the images .*{lost[0]}.png.*{lost[1]}.png.*--max_bad_images"):
        next(loader)


def test_what_was_left_out_at_start_counts_against_the_allowance(folder):
    samples = read_image_folder(str(folder))
    (folder / "1.png").unlink()
    samples, bad = check_images(samples, max_bad_images=1)
    (folder / "2.png").unlink()
    stream = TrainingStream(samples, seed=5, resolution=8, max_bad_images=1, bad=bad)
    with pytest.raises(UserError, match="2 of the images .*1.png.*2.png"):
        take(build_dataloader(stream, 9), 1)


def test_no_image_left_is_an_error_not_an_endless_search(folder):
    samples = read_image_folder(str(folder))
    stream = TrainingStream(samples, seed=5, resolution=8, max_bad_images=100)
    for number in range(10):
        (folder / f"{number}.png").unlink()
    with pytest.raises(UserError, match="10 of the images cannot be read"):
        stream[0]
    with pytest.raises(UserError, match="no image to train on; check --train_data_dir"):
        TrainingStream(check_images(samples, 100)[0], seed=5, resolution=8)


# Class labels

MODEL_CLASSES = {"tench": 0, "Tinca tinca": 0, "golden retriever": 207, "tabby cat": 281}  # as in DiT's id2label


def make_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image_with_id(1).save(folder / name)
    return str(folder)


CLASS_FOLDERS = {  # sub-folders, class_ids, their labels, names
    "digits": (["207", "08"], None, [207, 8], {8: "08", 207: "207"}),
    "digits, of which the model knows some": (["0", "5"], MODEL_CLASSES, [0, 5], {0: "tench", 5: "5"}),
    "the model's names": (["tabby cat", "Tinca tinca"], MODEL_CLASSES, [281, 0], {0: "Tinca tinca", 281: "tabby cat"}),
    "other names": (["b", "a10", "a2", "Z"], None, [3, 1, 2, 0], {0: "Z", 1: "a10", 2: "a2", 3: "b"}),
    "digits among names": (["b", "10", "9"], None, [2, 0, 1], {0: "10", 1: "9", 2: "b"}),
}


@pytest.mark.parametrize("case", CLASS_FOLDERS)
def test_a_sub_folder_is_a_class(tmp_path, case):
    classes, class_ids, labels, names = CLASS_FOLDERS[case]
    for name in classes:
        make_images(tmp_path, f"{name}/1.png", f"{name}/deep/3/2.jpg")
    make_images(tmp_path, ".hidden/1.png")
    expected = [
        (str(tmp_path / name / image), label)
        for name, label in zip(classes, labels)
        for image in ("1.png", "deep/3/2.jpg")
    ]
    samples, class_names = read_class_folder(str(tmp_path), class_ids=class_ids)
    assert samples == sorted(expected)
    assert class_names == names


def test_classes_that_the_model_has_no_name_for_are_numbered_with_a_warning(tmp_path, caplog):
    folder = make_images(tmp_path, "rose/1.png", "lily/1.png")
    assert [label for _, label in read_class_folder(folder, class_ids=MODEL_CLASSES)[0]] == [0, 1]
    assert len(caplog.records) == 1 and "lily is class 0, ..., rose 1" in caplog.text


LABEL_METADATA = {  # file, content, flags, labels of 1.png and 2.png, names
    "jsonl": ("jsonl", '{"file_name": "2.png", "label": 3}\n{"file_name": "1.png", "label": 207}', {}, [207, 3]),
    "csv": ("csv", "file_name,text,label\n2.png,two, 3\n1.png,one,207\n", {}, [207, 3]),
    "other column": ("csv", "file_name,label,kind\n2.png,9,3\n1.png,9,207\n", {"label_column": "kind"}, [207, 3]),
    "the model's names": (
        "csv",
        "file_name,label\n2.png,tench\n1.png,tabby cat\n",
        {"class_ids": MODEL_CLASSES},
        [281, 0],
    ),
}


@pytest.mark.parametrize("case", LABEL_METADATA)
def test_labels_in_metadata_come_before_those_of_sub_folders(tmp_path, case):
    kind, content, flags, labels = LABEL_METADATA[case]
    folder = make_images(tmp_path / "photos", "77/1.png", "77/2.png")
    (tmp_path / "photos" / "77" / f"metadata.{kind}").write_text(content)
    samples, names = read_class_folder(folder, **flags)
    assert samples == [(f"{folder}/77/{number}.png", label) for number, label in zip((1, 2), labels)]
    assert names == ({281: "tabby cat", 0: "tench"} if "class_ids" in flags else {3: "3", 207: "207"})


def test_parquet_labels_and_unused_images(tmp_path, caplog):
    import pyarrow
    import pyarrow.parquet

    folder = make_images(tmp_path, "1.png", "2.png", "3.png")
    table = pyarrow.table({"file_name": ["2.png", "1.png"], "label": [4, 5]})
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    assert read_class_folder(folder, class_ids=MODEL_CLASSES) == (
        [(f"{folder}/1.png", 5), (f"{folder}/2.png", 4)],
        {4: "4", 5: "5"},
    )
    assert len(caplog.records) == 1 and "1 of the images" in caplog.text and "3.png" in caplog.text


BAD_LABELS = {  # the label of 2.png
    "missing": "",
    "null": ', "label": null',
    "negative": ', "label": -1',
    "fraction": ', "label": 3.0',
    "truth value": ', "label": true',
    "name": ', "label": "tench"',
    "list": ', "label": [3]',
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_label_that_is_no_class_is_named_with_its_row(tmp_path, case):
    folder = make_images(tmp_path, "1.png", "2.png")
    rows = '{"file_name": "1.png", "label": 1}\n{"file_name": "2.png"%s}\n' % BAD_LABELS[case]
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(UserError, match="1 of the labels in column label .*2.png in .*metadata.jsonl.*--label_column"):
        read_class_folder(folder)


def test_errors_about_classes_name_the_place_and_the_remedy(tmp_path):
    flat = make_images(tmp_path / "flat", "1.png")
    with pytest.raises(UserError, match="--train_data_dir .*flat has no classes.*; put every .*, or write a metadata"):
        read_class_folder(flat)
    with pytest.raises(UserError, match="--label_column kind does not apply to --train_data_dir .*no metadata.*leave"):
        read_class_folder(flat, label_column="kind")
    with pytest.raises(UserError, match="--image_column photo does not apply"):
        read_class_folder(flat, image_column="photo")
    write_jsonl(tmp_path / "flat" / "metadata.jsonl", [{"file_name": "1.png", "text": "a", "kind": 2}])
    with pytest.raises(UserError, match="no label column label; choose .*--label_column: text, kind; or remove"):
        read_class_folder(flat)
    write_jsonl(tmp_path / "flat" / "metadata.jsonl", [{"file_name": "gone.png", "label": 2}])
    with pytest.raises(UserError, match="name a file that is not there .first: gone.png"):
        read_class_folder(flat)
    stray = make_images(tmp_path / "stray", "a/1.png", "z.png", "y.png")
    with pytest.raises(UserError, match="2 of the images lie outside .*stray .first: .*stray/y.png.; move them"):
        read_class_folder(stray)


def test_names_of_which_the_model_knows_only_some_are_refused_with_what_may_be_meant(tmp_path):
    folder = make_images(tmp_path, "golden retriver/1.png", "qqq/1.png", "tench/1.png")
    sentence = r"knows 1 of the 3 classes .*, but not golden retriver \(golden retriever\?\), qqq; use the model's"
    with pytest.raises(UserError, match=sentence):
        read_class_folder(folder, class_ids=MODEL_CLASSES)
    rows = [{"file_name": "tench/1.png", "label": "tench"}, {"file_name": "qqq/1.png", "label": "tabby cats"}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(UserError, match=r"knows 1 of the 2 classes .*, but not tabby cats \(tabby cat\?\);"):
        read_class_folder(folder, class_ids=MODEL_CLASSES)


@pytest.fixture
def labelled(dataset, tmp_path):
    """Reads the fixture `dataset` with the classes of its six rows in a column `label` of the given type."""
    import datasets

    def read(kind, values, **flags):
        rows = dataset.select_columns(["text", "image"])
        rows = rows.add_column("label", values, feature=datasets.Features({"label": kind})["label"])
        path = str(tmp_path / f"{len(os.listdir(tmp_path))}.parquet")
        rows.to_parquet(path)
        return read_hub_dataset(path, cache_dir=str(tmp_path / "cache"), **flags)

    return read


def test_labels_of_datasets(labelled):
    from datasets import ClassLabel, Value

    samples = labelled(Value("int32"), [5, 0, 9, 0, 5, 1], label_column="label", class_ids=MODEL_CLASSES)
    assert labels_of(samples) == [5, 0, 9, 0, 5, 1]
    assert samples.names == {0: "tench", 1: "1", 5: "5", 9: "9"}
    three = limit_samples(samples, 3, seed=7)
    rows = np.random.default_rng(7).permutation(6)[:3]
    assert labels_of(three) == [[5, 0, 9, 0, 5, 1][row] for row in rows] == [three[index][1] for index in range(3)]
    assert [load_image(three[index][0]).getpixel((0, 0))[0] for index in range(3)] == list(rows)

    samples = labelled(ClassLabel(names=["ant", "bee", "cow"]), [2, 0, 2, 0, 2, 0], label_column="label")
    assert (labels_of(samples), samples.names) == ([2, 0, 2, 0, 2, 0], {0: "ant", 2: "cow"})
    assert samples[2][1] == 2

    names = ["tench", "tabby cat"] * 3
    samples = labelled(Value("string"), names, label_column="label", class_ids=MODEL_CLASSES)
    assert (labels_of(samples), samples.names) == ([0, 281] * 3, {0: "tench", 281: "tabby cat"})
    assert samples[1][1] == 281
    assert labelled(Value("string"), names)[1][1] == "photo 1"  # without the flag: captions, as before


def test_labels_of_datasets_that_are_no_classes(labelled):
    from datasets import ClassLabel, Value

    with pytest.raises(UserError, match="has no column kind for --label_column; .*: text, image, label"):
        labelled(Value("int64"), [0] * 6, label_column="kind")
    for kind, values, first in (
        (ClassLabel(num_classes=3), [0, 1, -1, 2, -1, 0], "-1 for row 2"),  # as in test sets without labels
        (Value("float32"), [0.0] * 6, "0.0 for row 0"),
        (Value("string"), ["cat", "dog", "", "cat", "dog", "cat"], "'cat' for row 0"),
        (Value("int64"), [0, 1, 2, None, 4, 5], "None for row 3"),
    ):
        with pytest.raises(UserError, match=f"of the labels in column label .*first: {first}.*--label_column"):
            labelled(kind, values, label_column="label")
    with pytest.raises(UserError, match="knows 1 of the 2 classes .* but not cat"):
        labelled(Value("string"), ["cat", "tench"] * 3, label_column="label", class_ids=MODEL_CLASSES)


def test_names_without_numbers_are_numbered_in_order_for_a_new_model(labelled):
    from datasets import Value

    samples = labelled(Value("string"), ["dog", "cat", "eel"] * 2, label_column="label")
    assert labels_of(samples) == [1, 0, 2] * 2 and samples.names == {0: "cat", 1: "dog", 2: "eel"}


def test_classes_of_datasets_that_the_model_numbers_otherwise(labelled, caplog):
    from datasets import ClassLabel

    read = partial(labelled, label_column="label", class_ids=MODEL_CLASSES)
    samples = read(ClassLabel(names=["golden retriever", "tench"]), [0, 1] * 3)
    assert labels_of(samples) == [207, 0] * 3 and samples.names == {207: "golden retriever", 0: "tench"}
    with pytest.raises(UserError, match="knows 1 of the 2 classes .* but not golden retreiver .golden retriever.."):
        read(ClassLabel(names=["tench", "golden retreiver"]), [0, 1] * 3)
    assert not caplog.records
    samples = read(ClassLabel(names=["ant", "bee"]), [0, 1] * 3)
    assert labels_of(samples) == [0, 1] * 3 and samples.names == {0: "ant", 1: "bee"}
    assert "knows none of the classes of --dataset_name" in caplog.text


def test_the_model_keeps_its_names_for_the_classes_that_it_knows(tmp_path):
    make_images(tmp_path, "white shark/1.png", "tabby, tabby cat/2.png", "volcano/3.png")
    known = {2: "great white shark, white shark", 281: "tabby, tabby cat", 980: "volcano", 134: "crane", 517: "crane"}
    args = Namespace(id2label=dict(known), num_classes=1000, train_data_dir=str(tmp_path), max_bad_images=0)
    args.image_column = args.label_column = args.train_shards = None
    args.caption_column = args.instance_prompt = args.caption_weights = None
    samples, _ = read_data(args)
    assert {label for _, label in samples} == {2, 281, 980} and args.id2label == known
    make_images(tmp_path, "crane/4.png")  # which of the two?
    with pytest.raises(UserError, match="knows 3 of the 4 classes .* but not crane.*the numbers"):
        read_data(args)


def test_a_label_beyond_the_models_classes_is_refused_with_the_first_image(labelled):
    from datasets import Value

    samples = [("a.png", 0), ("b.png", 10), ("c.png", 9), ("d.png", 11)]
    check_labels(samples, 12)
    with pytest.raises(UserError, match="2 of the labels .* model's 10 classes, 0 to 9 .first: 10 for b.png.; corr"):
        check_labels(samples, 10)
    samples = labelled(Value("int64"), [0, 1, 2, 3, 4, 5], label_column="label")
    check_labels(samples, 6)
    with pytest.raises(UserError, match="1 of the labels .*5 classes.*first: 5 for row 5 of the dataset"):
        check_labels(samples, 5)


@pytest.fixture
def classified(tmp_path):
    """36 photos, photo i in the class sub-folder i % 4."""
    photos, classes = build_photo_folder(tmp_path / "photos", 36, 16), tmp_path / "classes"
    for number, photo in enumerate(sorted(photos.glob("*.png"))):
        (classes / str(number % 4)).mkdir(parents=True, exist_ok=True)
        photo.rename(classes / str(number % 4) / photo.name)
    return TrainingStream(read_class_folder(str(classes))[0], seed=3, resolution=16, random_flip=True)


def test_every_image_keeps_its_label_and_labels_are_dropped_by_step_at_the_given_rate(classified):
    classified.proportion_empty_prompts = 0.2
    batches = take(build_dataloader(classified, 8, num_workers=1), 450)  # 100 epochs
    labels = [label for batch in batches for label in batch["captions"]]
    photos = [photo_id(pixels) for batch in batches for pixels in batch["pixel_values"]]
    assert {type(label) for label in labels} == {int, str}
    assert all(label in (photo % 4, "") for label, photo in zip(labels, photos))
    dropped = np.array([label == "" for label in labels])
    assert abs(dropped.mean() - 0.2) < 4 * (0.2 * 0.8 / 3600) ** 0.5  # four standard errors
    for photo in range(36):  # 100 times each: dropped now and then, never always
        assert 4 <= dropped[np.array(photos) == photo].sum() <= 36  # 20, by four standard errors of 4
    assert all_captions(classified) == {"", 0, 1, 2, 3}


def test_labels_stay_with_cached_latents(classified):
    import torch

    classified.center_crop = True
    cache_latents(classified, torch.clone, lambda items, make, _: [make(item) for item in items])
    for batch in take(build_dataloader(classified, 8), 9):
        assert batch["captions"] == [photo_id(pixels) % 4 for pixels in batch["posteriors"]]


def test_labels_of_a_dataset_stay_with_their_images(labelled):
    from datasets import Value

    samples = labelled(Value("int64"), [5, 0, 9, 0, 5, 1], label_column="label")
    stream = TrainingStream(limit_samples(samples, 5, seed=1), seed=0, resolution=8)
    for batch in take(build_dataloader(stream, 4, num_workers=1), 5):
        assert batch["captions"] == [[5, 0, 9, 0, 5, 1][number] for number in ids(batch)]
        assert {type(label) for label in batch["captions"]} == {int}  # the loader makes tensors of numpy's integers
