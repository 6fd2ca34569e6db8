"""Which text of a caption a training step sees: from one or several columns, weighted, with a trigger word."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from captions import all_texts, draw_text, is_blank, is_caption, join_columns, with_trigger_word
from data_sources import read_hub_dataset, read_image_folder
from data_utils import TrainingStream, all_captions


COLUMNS, WEIGHTS = ["short", "long", "tags"], [1.0, 2.0, 5.0]
ROWS = [  # of three images: all columns; one blank, one missing; a list
    {"short": "a fox", "long": "a red fox in the snow", "tags": "fox, snow"},
    {"short": " ", "long": "two boats", "tags": None},
    {"short": "a street", "long": ["an old street", "a street at night"], "tags": "street"},
]
TEXTS = [  # what may be drawn, and how often of all draws of that image
    {"a fox": 1 / 8, "a red fox in the snow": 2 / 8, "fox, snow": 5 / 8},
    {"two boats": 1},
    {"a street": 1 / 8, "an old street": 1 / 8, "a street at night": 1 / 8, "street": 5 / 8},
]


def png(number):
    """An image whose red value is the number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def from_folder(path, **settings):
    for number in range(3):
        (path / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{number}.png", **row} for number, row in enumerate(ROWS)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_image_folder(str(path), **settings)


def from_dataset(path, **settings):
    import datasets

    rows = {"image": [{"bytes": png(number), "path": None} for number in range(3)]}
    rows |= {name: [row[name] for row in ROWS] for name in ("short", "tags")}
    rows |= {"long": [row["long"] if isinstance(row["long"], list) else [row["long"]] for row in ROWS]}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.cast_column("image", datasets.Image()).save_to_disk(path / "data")
    return read_hub_dataset(str(path / "data"), **settings)


def stream_of(samples, **settings):
    return TrainingStream(samples, seed=3, resolution=8, **settings)


def draws(stream, count):
    """{id that the pixels show: how often each text came with it}."""
    found = {}
    for position in range(count):
        sample = stream[position]
        number = round((float(sample["pixel_values"][0].mean()) + 1) * 127.5)
        found.setdefault(number, Counter())[sample["caption"]] += 1
    return found


# Through the stream


@pytest.mark.parametrize("read", [from_folder, from_dataset])
def test_columns_are_drawn_from_as_often_as_their_weights_say(read, tmp_path):
    stream = stream_of(read(tmp_path, caption_column=COLUMNS, caption_weights=WEIGHTS))
    found = draws(stream, 3 * 1200)
    for number, expected in enumerate(TEXTS):
        assert found[number].keys() == expected.keys()  # blank columns never come, and do not weigh
        for text, share in expected.items():
            bound = 4 * (share * (1 - share) / 1200) ** 0.5  # four standard errors
            assert abs(found[number][text] / 1200 - share) <= bound, (text, found[number])


def test_without_weights_all_columns_count_alike(tmp_path):
    found = draws(stream_of(from_folder(tmp_path, caption_column=COLUMNS)), 3 * 900)
    for text in TEXTS[0]:
        assert abs(found[0][text] / 900 - 1 / 3) < 4 * (2 / 9 / 900) ** 0.5


def test_one_column_needs_no_list(tmp_path):
    assert from_folder(tmp_path, caption_column="long")[1][1] == "two boats"


def test_the_instance_prompt_is_for_images_all_of_whose_columns_are_blank(tmp_path):
    samples = from_folder(tmp_path, caption_column=["short", "tags"], instance_prompt="a photo of sks")
    assert draws(stream_of(samples), 30)[1] == {"a photo of sks": 10}


@pytest.mark.parametrize("read", [from_folder, from_dataset])
@pytest.mark.parametrize("dropped", [0.0, 0.2])
@pytest.mark.parametrize("trigger_word", [None, "fox"])
def test_all_captions_are_those_that_the_stream_gives(read, dropped, trigger_word, tmp_path):
    samples = read(tmp_path, caption_column=COLUMNS, caption_weights=WEIGHTS)
    stream = stream_of(samples, proportion_empty_prompts=dropped, trigger_word=trigger_word)
    given = {stream[position]["caption"] for position in range(600)}  # the rarest comes 600 / 3 / 8 times on average
    assert given == all_captions(stream)
    assert ("" in given) == (dropped > 0)


def test_the_trigger_word_leaves_dropout_and_the_choice_among_columns_as_they_were(tmp_path):
    samples = from_folder(tmp_path, caption_column=COLUMNS, caption_weights=WEIGHTS)
    plain = stream_of(samples, proportion_empty_prompts=0.3)
    marked = stream_of(samples, proportion_empty_prompts=0.3, trigger_word="SNOW")
    for position in range(200):
        before, after = plain[position]["caption"], marked[position]["caption"]
        if not before or "snow" in before:
            assert after == before
        else:
            assert after == f"SNOW, {before}"


# One by one


def test_a_part_of_another_word_is_not_the_trigger_word():
    assert with_trigger_word("a portrait, an armchair", "art") == "art, a portrait, an armchair"
    assert with_trigger_word("fine (Art)!", "art") == "fine (Art)!"
    assert with_trigger_word("C++ code", "c++") == "C++ code"


def test_half_of_a_character_is_no_caption():
    assert not is_caption("\ud83d") and not is_caption(["a", "b \ud83d"]) and is_caption("\U0001f600")


@pytest.mark.parametrize(
    "text, word, expected",
    [
        ("a dog", "sks", "sks, a dog"),
        ("a sks dog", "sks", "a sks dog"),
        ("a SKS dog", "sks", "a SKS dog"),
        ("a dog", "SKS", "SKS, a dog"),
        ("", "sks", ""),  # a dropped caption
        ("a dog", None, "a dog"),
        (7, None, 7),  # a class label
    ],
)
def test_the_trigger_word_comes_in_front_and_never_twice(text, word, expected):
    assert with_trigger_word(text, word) == expected
    assert with_trigger_word(with_trigger_word(text, word), word) == expected


@pytest.mark.parametrize(
    "values, weights, expected",
    [
        (["one"], [3.0], "one"),
        ([None], None, None),
        (["one", None], [3.0, 1.0], ((3.0, "one"),)),
        (["", "two"], None, ((1, "two"),)),
        (["one", ["a", "b"]], [1.0, 2.0], ((1.0, "one"), (2.0, ["a", "b"]))),
        ([None, " \n"], None, None),
        ([np.array(["a", "b"]), "two"], None, ((1, ["a", "b"]), (1, "two"))),
    ],
)
def test_what_several_columns_make(values, weights, expected):
    assert join_columns(values, weights) == expected


@pytest.mark.parametrize(
    "caption, blank, fits",
    [
        ("a", False, True),
        ("", True, False),
        (" \n\t", True, False),
        (None, True, False),
        (["a", "b"], False, True),
        (["a", ""], False, False),
        ([], True, False),
        (["a", None], False, False),
        (3, False, False),
        ({"text": "a"}, False, False),
        (((1, "a"), (2, ["b", "c"])), False, True),
        (((1, "a"), (2, 3)), False, False),
        ((), False, False),
    ],
)
def test_what_a_caption_is(caption, blank, fits):
    assert is_blank(caption) == blank and is_caption(caption) == fits


@pytest.mark.parametrize("caption", ["a", ["a", "b", "c"], ((1, "a"), (9, ["b", "c"])), 7, 0])
def test_every_text_is_drawn_some_time_and_no_other(caption):
    rng = np.random.default_rng(0)
    assert {draw_text(caption, rng) for _ in range(300)} == all_texts(caption)
