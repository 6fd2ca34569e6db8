"""Captions by an image-to-text model: what it says, where it is written, and what happens after an interruption."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import named_flags
from PIL import Image

import prepare_captions
from arguments import UserError
from data_sources import read_image_folder
from images import load_image
from prepare_captions import CHAT_PROMPT, Captioner


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def build_tokenizer():
    """One token for each printable ASCII character."""
    from transformers import RobertaTokenizer

    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *characters])}
    return RobertaTokenizer(vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})


def build_model(kind, folder):
    """Saves a random captioner and its processor: florence, llava (which chats) or blip (which is told nothing)."""
    import transformers
    from transformers import CLIPImageProcessor

    side, tokenizer = {"height": 32, "width": 32}, build_tokenizer()
    images = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 32, "patch_size": 16, **SIZES}
    if kind == "florence":
        images.image_seq_length = 17  # 4 x 4 patches and their mean
        text = {
            "model_type": "bart",
            "d_model": 16,
            "decoder_start_token_id": 2,
            "max_position_embeddings": 256,
            **ids,
        }
        for part in ("encoder", "decoder"):
            text |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
        vision = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1)}
        vision |= {"patch_prenorm": (False, True), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2)}
        vision |= {"window_size": 4, "projection_dim": 16}
        token = {"image_token_id": tokenizer.image_token_id}
        config = transformers.Florence2Config(text_config=text, vision_config=vision, **token)
        processor = transformers.Florence2Processor(images, tokenizer)
    elif kind == "llava":
        parts = {"text_config": {"model_type": "llama", **SIZES, **ids}}
        parts |= {"vision_config": {"model_type": "clip_vision_model", **vision}, "vision_feature_layer": -1}
        config = transformers.LlavaConfig(image_token_id=tokenizer.image_token_id, **parts)
        tokens = {"patch_size": 16, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        processor = transformers.LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **tokens)
    else:
        text = {**SIZES, **ids, "sep_token_id": 2, "encoder_hidden_size": 16}
        config = transformers.BlipConfig(text_config=text, vision_config=vision)
        processor = transformers.BlipProcessor(images, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.normal_(0, 0.6)  # else it says the same of all images
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioners")
    return {kind: build_model(kind, folder / kind) for kind in ("florence", "llava", "blip")}


@pytest.fixture
def folder(tmp_path):
    """Seven images of different sizes and colours, one of them in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b/x.jpg", "c.png", "d.png", "e.png", "f.png", "g.png")):
        picture(number).save(folder / name)
    return folder


def picture(number):
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (2, 2, 3)).astype(np.uint8))
    return coarse.resize((30 + 3 * number, 44 - 2 * number), Image.Resampling.NEAREST)


@pytest.fixture
def caption(models):
    """Runs prepare_captions.py in this process; flags as words."""

    def run(*words, model="blip", batch_size=2):
        flags = [
            *words,
            "--model_name_or_path",
            models.get(model, model),
            "--max_new_tokens",
            12,
            "--batch_size",
            batch_size,
        ]
        prepare_captions.main(prepare_captions.parse_args([str(word) for word in flags]))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def processes(monkeypatch):
    """Makes this process the given one of several."""

    def become(rank, count):
        state = Namespace(process_index=rank, num_processes=count, is_main_process=rank == 0)
        state.device, state.wait_for_everyone, state.destroy_process_group = torch.device("cpu"), int, int
        monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)

    return become


@pytest.fixture
def captioned(monkeypatch):
    """Counts the images that the model is given; `fail_at` is the call at which it is interrupted."""
    counted, call = Namespace(images=0, calls=0, fail_at=None), Captioner.__call__

    def count(self, images):
        counted.calls += 1
        if counted.calls == counted.fail_at:
            raise KeyboardInterrupt
        counted.images += len(images)
        return call(self, images)

    monkeypatch.setattr(Captioner, "__call__", count)
    return counted


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parts_in(folder):
    return sorted(path.name for path in folder.glob("metadata.jsonl*") if path.name != "metadata.jsonl")


def images_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.[pj][np]g"))


# What the model says


def reference(kind, model_folder, path, prompt=None, **settings):
    """What the model says of one image by itself, through transformers' classes as their documentation uses them."""
    import transformers

    names = {"florence": "Florence2", "llava": "Llava", "blip": "Blip"}
    model = getattr(transformers, f"{names[kind]}ForConditionalGeneration").from_pretrained(model_folder)
    processor = getattr(transformers, f"{names[kind]}Processor").from_pretrained(model_folder)
    text = {"florence": prompt or "<MORE_DETAILED_CAPTION>", "llava": f"<image>{prompt or CHAT_PROMPT} Answer:"}
    words = {} if kind == "blip" else {"text": text[kind]}
    inputs = processor(images=load_image(path), return_tensors="pt", **words)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)[0]
    if kind == "llava":
        tokens = tokens[inputs["input_ids"].shape[1] :]
    return " ".join(processor.decode(tokens, skip_special_tokens=True).split())


@pytest.mark.parametrize("kind", ["florence", "llava", "blip"])
def test_captions_are_what_the_model_says_of_each_image_by_itself(kind, caption, models, folder):
    caption("--train_data_dir", folder, model=kind, batch_size=3)
    expected = [(name, reference(kind, models[kind], folder / name)) for name in images_in(folder)]
    assert [(row["file_name"], row["text"]) for row in rows_of(folder)] == expected
    assert len({text for _, text in expected}) > 3, "the images must not all look the same to the model"


@pytest.mark.parametrize("kind, prompt", [("florence", "<CAPTION>"), ("llava", "what?")])
def test_prompt_and_beams_reach_the_model(kind, prompt, caption, models, folder):
    caption("--train_data_dir", folder, "--prompt", prompt, "--num_beams", 3, model=kind)
    expected = [reference(kind, models[kind], folder / name, prompt, num_beams=3) for name in images_in(folder)]
    assert [row["text"] for row in rows_of(folder)] == expected
    assert expected != [reference(kind, models[kind], folder / name) for name in images_in(folder)]


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_is_that_of_the_weights(dtype, expected, caption, folder, monkeypatch):
    dtypes, call = set(), Captioner.__call__
    monkeypatch.setattr(Captioner, "__call__", lambda self, images: dtypes.add(self.model.dtype) or call(self, images))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    caption("--train_data_dir", folder, "--dtype", dtype)
    assert dtypes == {expected} and len(rows_of(folder)) == 7


def test_a_prompt_whose_answer_is_no_text_is_refused(caption, folder):
    with pytest.raises(UserError, match="--prompt <OD>: what the model answers"):
        caption("--train_data_dir", folder, "--prompt", "<OD>", model="florence")
    with pytest.raises(UserError, match="can't caption with --prompt a <CAPTION> \\("):
        caption("--train_data_dir", folder, "--prompt", "a <CAPTION>", model="florence")


# Folders


def test_training_reads_the_captioned_folder(caption, folder):
    caption("--train_data_dir", folder)
    samples = read_image_folder(str(folder))
    assert [path for path, _ in samples] == [str(folder / name) for name in images_in(folder)]
    assert [text for _, text in samples] == [row["text"] for row in rows_of(folder)]
    assert parts_in(folder) == []


def test_rows_and_columns_of_metadata_stay_and_only_images_without_a_caption_get_one(caption, captioned, folder):
    old = [
        {"file_name": "./d.png", "text": "mine", "label": 3},
        {"file_name": "a.png", "text": " ", "label": 4},
        {"file_name": "b/x.jpg", "license": "ö"},
        {"file_name": "b/x.jpg", "license": "twice"},
    ]
    write_rows(folder, *old)
    caption("--train_data_dir", folder)
    rows = rows_of(folder)
    assert captioned.images == 6
    assert rows[0] == old[0]
    assert [{**row, "text": None} for row in rows[:4]] == [{**row, "text": None} for row in old]
    assert [row["file_name"] for row in rows[4:]] == ["c.png", "e.png", "f.png", "g.png"]
    assert all(row["text"].strip() for row in rows)
    assert rows[2]["text"] == rows[3]["text"]


def test_another_column_and_overwriting_keep_the_captions_that_were_there(caption, folder):
    write_rows(folder, *({"file_name": name, "text": f"my {name}"} for name in images_in(folder)))
    caption("--train_data_dir", folder, "--caption_column", "blip")
    rows = rows_of(folder)
    assert [row["text"] for row in rows] == [f"my {name}" for name in images_in(folder)]
    caption("--train_data_dir", folder, "--overwrite")
    expected = [row | {"text": row["blip"], "original_text": row["text"]} for row in rows]
    assert rows_of(folder) == expected
    caption("--train_data_dir", folder, "--overwrite", "--prompt", "a", model="llava")
    again = rows_of(folder)
    assert [row["original_text"] for row in again] == [row["text"] for row in rows]
    assert [row["text"] for row in again] != [row["text"] for row in expected]


def test_captions_in_text_files_stay_as_a_column(caption, folder):
    (folder / "c.txt").write_text("my own\ncaption\n")
    caption("--train_data_dir", folder)
    assert {row["file_name"]: row["original_text"] for row in rows_of(folder) if "original_text" in row} == {
        "c.png": "my own caption"
    }


def test_another_output_folder_gets_images_and_the_rows_of_all_metadata(caption, folder, tmp_path):
    (folder / "metadata.csv").write_text("file_name,text,label\na.png,mine,7\n")
    write_rows(folder / "b", {"file_name": "x.jpg", "text": "inner"})
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    output = tmp_path / "new" / "output"
    caption("--train_data_dir", folder, "--output_dir", output)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert images_in(output) == images_in(folder)
    assert all((output / name).read_bytes() == (folder / name).read_bytes() for name in images_in(folder))
    rows = rows_of(output)
    assert [row["file_name"] for row in rows] == images_in(folder)
    assert (rows[0]["original_text"], rows[0]["label"], rows[1]["original_text"]) == ("mine", "7", "inner")
    assert [text for _, text in read_image_folder(str(output))] == [row["text"] for row in rows]


def test_images_that_are_in_the_output_are_not_overwritten(caption, folder, tmp_path):
    (tmp_path / "output").mkdir()
    picture(9).save(tmp_path / "output" / "c.png")
    before = (tmp_path / "output" / "c.png").read_bytes()
    with pytest.raises(UserError, match=r"output/c\.png is there already and another image"):
        caption("--train_data_dir", folder, "--output_dir", tmp_path / "output")
    assert (tmp_path / "output" / "c.png").read_bytes() == before


def test_only_the_first_samples_and_later_the_others(caption, captioned, folder, tmp_path):
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "all")
    few = ("--train_data_dir", folder, "--output_dir", tmp_path / "few")
    caption(*few, "--max_train_samples", 3)
    assert [row["file_name"] for row in rows_of(tmp_path / "few")] == images_in(folder)[:3]
    caption(*few)
    assert rows_of(tmp_path / "few") == rows_of(tmp_path / "all")
    assert captioned.images == 7 + 7
    with pytest.raises(SystemExit):  # training would take the three for all there is
        caption("--train_data_dir", folder, "--max_train_samples", 3)


# Interruptions, several processes


def test_a_run_that_is_started_again_ends_as_if_it_had_not_been_interrupted(caption, captioned, folder, tmp_path):
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "whole")
    captioned.images, captioned.calls, captioned.fail_at = 0, 0, 3
    with pytest.raises(KeyboardInterrupt):
        caption("--train_data_dir", folder)
    assert parts_in(folder) == ["metadata.jsonl.part-00000"] and captioned.images == 4
    part = folder / "metadata.jsonl.part-00000"
    part.write_bytes(part.read_bytes()[:-5])  # the last line was not written to its end
    caption("--train_data_dir", folder)
    assert captioned.images == 4 + 3 + 1  # the one whose line was cut comes again
    assert (folder / "metadata.jsonl").read_bytes() == (tmp_path / "whole" / "metadata.jsonl").read_bytes()
    assert parts_in(folder) == []


def test_what_the_user_writes_in_between_stays(caption, captioned, folder):
    captioned.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        caption("--train_data_dir", folder)
    write_rows(folder, {"file_name": "a.png", "text": "mine"})
    caption("--train_data_dir", folder)
    assert rows_of(folder)[0] == {"file_name": "a.png", "text": "mine"}
    assert [row["file_name"] for row in rows_of(folder)] == images_in(folder)


def test_a_run_that_was_killed_goes_on(caption, captioned, models, folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, prepare_captions as script\n"
        "call, calls = script.Captioner.__call__, []\n"
        "def die(self, images):\n"
        "    calls.append(1)\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else call(self, images)\n"
        "script.Captioner.__call__ = die\n"
        "script.main(script.parse_args(sys.argv[1:]))\n"
    )
    flags = ["--train_data_dir", folder, "--model_name_or_path", models["blip"], "--max_new_tokens", 12]
    command = [str(word) for word in (sys.executable, script, *flags, "--batch_size", 2)]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_captions.__file__).parent)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (folder / "metadata.jsonl").exists()
    caption("--train_data_dir", folder)
    assert captioned.images == 3
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "whole")
    assert rows_of(folder) == rows_of(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(caption, folder, monkeypatch, capsys):
    caption("--train_data_dir", folder)
    before = (folder / "metadata.jsonl").stat().st_mtime_ns
    (folder / "metadata.jsonl.part-00003").touch()  # the run was killed before it could remove it
    monkeypatch.setattr(prepare_captions, "Captioner", None)  # the model is not even loaded
    capsys.readouterr()
    caption("--train_data_dir", folder)
    assert "Nothing to do: all images have a caption in column text" in capsys.readouterr().out
    assert (folder / "metadata.jsonl").stat().st_mtime_ns == before
    assert parts_in(folder) == []


def test_a_part_of_a_run_with_other_settings_is_not_mixed_in(caption, captioned, folder):
    captioned.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        caption("--train_data_dir", folder)
    with pytest.raises(UserError, match="part-00000 is from a run with --prompt None"):
        caption("--train_data_dir", folder, "--prompt", "other")
    caption("--train_data_dir", folder)
    assert len(rows_of(folder)) == 7


def test_the_first_of_two_processes_waits_for_the_other(caption, captioned, processes, folder, tmp_path):
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "whole")
    captioned.images = 0
    processes(0, 2)
    first = threading.Thread(target=caption, args=("--train_data_dir", folder), daemon=True)
    first.start()
    own = folder / "metadata.jsonl.part-00000"
    while first.is_alive() and not (own.exists() and own.read_text().count('caption":') == 4):
        time.sleep(0.1)
    first.join(timeout=1.5)
    assert first.is_alive() and captioned.images == 4 and not (folder / "metadata.jsonl").exists()
    with open(folder / "metadata.jsonl.part-00001", "w") as part:  # what the other one writes, and half a line
        for row in rows_of(tmp_path / "whole")[1:4:2]:
            part.write(json.dumps({"key": row["file_name"], "caption": row["text"], "row": row}) + "\n")
        row = rows_of(tmp_path / "whole")[5]
        line = json.dumps({"key": row["file_name"], "caption": row["text"], "row": row}) + "\n"
        part.write(line[:30])
        part.flush()
        first.join(timeout=1.5)
        assert first.is_alive()
        part.write(line[30:])
    first.join(timeout=20)
    assert not first.is_alive()
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    assert parts_in(folder) == []


def test_a_run_goes_on_with_another_number_of_processes(caption, captioned, processes, folder, tmp_path):
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "whole")
    captioned.images = 0
    processes(1, 3)
    caption("--train_data_dir", folder)
    assert captioned.images == 2 and not (folder / "metadata.jsonl").exists()
    processes(0, 1)
    caption("--train_data_dir", folder)
    assert captioned.images == 7
    assert rows_of(folder) == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_launched_processes_write_what_one_does(caption, models, folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    command += [prepare_captions.__file__, "--train_data_dir", folder, "--model_name_or_path", models["blip"]]
    command += ["--max_new_tokens", 12, "--batch_size", 2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("Wrote 7 captions") == 1
    caption("--train_data_dir", folder, "--output_dir", tmp_path / "one")
    assert rows_of(folder) == rows_of(tmp_path / "one")
    assert parts_in(folder) == []


# Datasets and shards


def encoded(number, kind):
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


FILES = [encoded(0, "PNG"), encoded(1, "JPEG"), encoded(2, "WEBP"), encoded(3, "PNG")]
CAPTIONS = ["a fox", None, "  ", "boats"]


@pytest.fixture
def dataset(tmp_path):
    import datasets

    columns = {"image": [{"bytes": content, "path": None} for content in FILES], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.fixture
def shards(tmp_path):
    """Two shards with two samples each."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:06d}.tar", "w") as tar:
            for number in (2 * shard, 2 * shard + 1):
                files = {("png", "jpg", "webp", "png")[number]: FILES[number]}
                files |= {"txt": CAPTIONS[number].encode()} if CAPTIONS[number] else {}
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"key{number}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(tmp_path / "{000000..000001}.tar")


@pytest.fixture(params=["dataset", "shards"])
def source(request, tmp_path):
    """The flags that name it, and where its images come from."""
    if request.param == "dataset":
        name = request.getfixturevalue("dataset")
        return ["--dataset_name", name], [f"row {number} of {name}" for number in range(4)]
    names = ["key0.png", "key1.jpg", "key2.webp", "key3.png"]
    paths = [tmp_path / f"{number // 2:06d}.tar" for number in range(4)]
    flags = ["--train_shards", request.getfixturevalue("shards"), "--cache_dir", tmp_path / "cache"]
    return flags, [f"{name} in {path}" for name, path in zip(names, paths)]


def test_datasets_and_shards_become_a_folder_with_the_same_image_files(source, caption, captioned, models, tmp_path):
    flags, origins = source
    output = tmp_path / "output"
    caption(*flags, "--output_dir", output)
    rows = rows_of(output)
    assert [(output / row["file_name"]).read_bytes() for row in rows] == FILES
    assert [Path(row["file_name"]).suffix for row in rows] == [".png", ".jpg", ".webp", ".png"]
    assert [row["source"] for row in rows] == origins
    assert [row.get("original_text") for row in rows] == ["a fox", None, None, "boats"]
    samples = read_image_folder(str(output))
    assert [text for _, text in samples] == [reference("blip", models["blip"], path) for path, _ in samples]
    both = read_image_folder(str(output), caption_column=["text", "original_text"], caption_weights=[0.8, 0.2])
    assert both[0][1] == ((0.8, samples[0][1]), (0.2, "a fox"))
    caption(*flags, "--output_dir", output)
    assert captioned.images == 4


def test_an_interrupted_dataset_goes_on(source, caption, captioned, tmp_path):
    flags, _ = source
    caption(*flags, "--output_dir", tmp_path / "whole")
    captioned.calls, captioned.fail_at = 0, 2
    with pytest.raises(KeyboardInterrupt):
        caption(*flags, "--output_dir", tmp_path / "output")
    caption(*flags, "--output_dir", tmp_path / "output")
    assert rows_of(tmp_path / "output") == rows_of(tmp_path / "whole")
    assert captioned.images == 4 + 4


def test_an_output_with_images_of_another_source_is_left_alone(caption, dataset, folder, tmp_path):
    caption("--dataset_name", dataset, "--output_dir", tmp_path / "output")
    before = (tmp_path / "output" / "metadata.jsonl").read_bytes()
    (tmp_path / "other").symlink_to(dataset)
    for flags in (["--dataset_name", tmp_path / "other"], ["--dataset_name", dataset, "--output_dir", folder]):
        write_rows(folder, {"file_name": "a.png", "text": "mine"})
        with pytest.raises(UserError, match="holds images of another source"):
            caption("--output_dir", tmp_path / "output", *flags)
    assert (tmp_path / "output" / "metadata.jsonl").read_bytes() == before
    assert rows_of(folder) == [{"file_name": "a.png", "text": "mine"}]


# Images that can't be read, models that can't


def test_unreadable_images_are_named_and_counted_and_come_when_they_are_repaired(caption, captioned, folder, capsys):
    whole = (folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"1 of the images cannot be read, more than --max_bad_images 0.*d\.png \("):
        caption("--train_data_dir", folder)
    assert not (folder / "metadata.jsonl").exists()
    caption("--train_data_dir", folder, "--max_bad_images", 1)
    assert [row["file_name"] for row in rows_of(folder)] == [name for name in images_in(folder) if name != "d.png"]
    assert "Warning: 1 of the images can't be read: d.png (" in capsys.readouterr().err
    assert captioned.images == 6
    (folder / "d.png").write_bytes(whole)
    caption("--train_data_dir", folder)
    assert sorted(row["file_name"] for row in rows_of(folder)) == images_in(folder)
    assert captioned.images == 7


def test_an_unreadable_image_is_tried_again_when_the_run_goes_on(caption, captioned, folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(b"no image")
    captioned.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        caption("--train_data_dir", folder, "--max_bad_images", 1)
    (folder / "a.png").write_bytes(whole)
    caption("--train_data_dir", folder)
    assert [row["file_name"] for row in rows_of(folder)] == images_in(folder)
    assert captioned.images == 7


def test_what_is_wrong_with_shards_counts(caption, captioned, shards, tmp_path, capsys):
    cut = tmp_path / "000001.tar"
    cut.write_bytes(cut.read_bytes()[:1100])
    flags = ["--train_shards", shards, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "output"]
    with pytest.raises(UserError, match=r"1 of the images .*000001\.tar \("):
        caption(*flags, "--max_bad_images", 0)
    assert captioned.images == 0
    caption(*flags)  # of shards 1 in 100, rounded up
    assert len(rows_of(tmp_path / "output")) == 2
    assert "Warning: 1 of the images can't be read: " in capsys.readouterr().err


def test_unreadable_images_of_all_processes_count(caption, processes, folder):
    for name in ("a.png", "b/x.jpg"):
        (folder / name).write_bytes(b"no image")
    processes(1, 2)
    caption("--train_data_dir", folder, "--max_bad_images", 1)
    processes(0, 2)
    part = (folder / "metadata.jsonl.part-00001").read_bytes()
    with pytest.raises(UserError, match="more than --max_bad_images 1"):  # the parts are read in the end
        run_first_with(part, folder, caption)
    assert not (folder / "metadata.jsonl").exists()


def run_first_with(part, folder, caption):
    """Runs process 0, whose fellow writes its part while it runs."""
    path = folder / "metadata.jsonl.part-00001"
    path.unlink()
    timer = threading.Timer(0.5, path.write_bytes, [part])
    timer.start()
    try:
        caption("--train_data_dir", folder, "--max_bad_images", 1)
    finally:
        timer.join()


def test_unreadable_rows_of_a_dataset_are_named(caption, tmp_path):
    import datasets

    images = [{"bytes": FILES[0], "path": None}, {"bytes": b"", "path": None}, None]
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    columns = {"label": [4, 5, 6], "picture": images}
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "dataset")
    flags = ["--dataset_name", tmp_path / "dataset", "--output_dir", tmp_path / "output"]
    with pytest.raises(UserError, match=r"2 of the images .*row 1 of .*dataset \(.*row 2 of .*dataset \("):
        caption(*flags, batch_size=3)
    caption(*flags, "--max_bad_images", 2)
    assert len(rows_of(tmp_path / "output")) == 1


def test_an_image_of_which_the_model_says_nothing_has_no_row(caption, folder, monkeypatch, capsys):
    call = Captioner.__call__
    monkeypatch.setattr(Captioner, "__call__", lambda self, images: ["", *call(self, images)[1:]])
    caption("--train_data_dir", folder)
    named = ["b/x.jpg", "d.png", "f.png"]
    assert [row["file_name"] for row in rows_of(folder)] == named
    assert "nothing of 4 of the images: a.png, c.png, e.png, g.png." in capsys.readouterr().err
    assert len(read_image_folder(str(folder))) == 3


def test_models_that_cannot_caption_are_refused_in_a_sentence(caption, models, folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    def refusal(model):
        with pytest.raises(UserError) as error:
            caption("--train_data_dir", folder, model=model)
        message = str(error.value)
        assert f"--model_name_or_path {model} can't be loaded as an image-to-text model (" in message
        assert "\n" not in message
        return message

    LlamaForCausalLM(LlamaConfig(vocab_size=8, **SIZES)).save_pretrained(tmp_path / "text")
    build_model("blip", tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    gone = next(name for name in weights if "vision" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "cut/model.safetensors", {"format": "pt"})
    build_model("blip", tmp_path / "blind")
    (tmp_path / "blind" / "processor_config.json").unlink()
    assert f"its files lack weights such as {gone}" in refusal(tmp_path / "cut")
    assert "AutoModelForImageTextToText" in refusal(tmp_path / "text")
    assert "Can't load image processor" in refusal(tmp_path / "blind")
    refusal("nobody/nothing")
    caption("--train_data_dir", folder)
    assert len(rows_of(folder)) == 7, "what failed leaves nothing in the way"


# Flags


@pytest.fixture
def parse():
    return lambda *words: prepare_captions.parse_args([str(word) for word in words])


@pytest.fixture
def known_flags(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    return named_flags(capsys.readouterr().out)


def test_wrong_flags_are_refused_in_a_sentence(refuse, folder, tmp_path):
    shown = ["--train_data_dir", folder]
    hub = ["--dataset_name", "some/set", "--output_dir", tmp_path / "output"]
    assert "give one of --train_data_dir" in refuse()
    assert "given: --train_data_dir and --dataset_name" in refuse(*shown, *hub)
    assert "--dataset_name needs --output_dir" in refuse(*hub[:2])
    assert "--train_shards needs --output_dir" in refuse("--train_shards", "a.tar")
    assert "--batch_size 0 must be at least 1" in refuse(*hub, "--batch_size", 0)
    assert "--max_bad_images -1 must be at least 0" in refuse(*hub, "--max_bad_images", -1)
    assert "no effect without --dataset_name" in refuse(*shown, "--dataset_config_name", "x")
    assert "is no name for captions" in refuse(*hub, "--caption_column", "file_name")
    assert "is a file" in refuse(*shown, "--output_dir", folder / "a.png")
    assert "is not a folder" in refuse("--train_data_dir", folder / "nothing")
    assert "lies in --train_data_dir" in refuse(*shown, "--output_dir", folder / "b" / "out")


def test_metadata_that_would_not_go_together_is_refused(refuse, folder, tmp_path):
    write_rows(folder / "b", {"file_name": "x.jpg", "text": "inner"})
    message = refuse("--train_data_dir", folder)
    assert f"{folder}/b/metadata.jsonl is there already" in message and "--output_dir" in message
    (folder / "b" / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\na.png,mine\n")
    assert "metadata.csv is there already" in refuse("--train_data_dir", folder)
    assert "metadata.csv is there already" in refuse("--dataset_name", "some/set", "--output_dir", folder)


def test_flags_are_checked_before_torch_is_imported(folder):
    code = "import sys, prepare_captions; prepare_captions.parse_args(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--train_data_dir", str(folder)]
    subprocess.run(command, check=True, cwd=Path(prepare_captions.__file__).parent)


def test_a_mistake_found_later_is_one_sentence_too(folder):
    command = [sys.executable, prepare_captions.__file__, "--train_data_dir", str(folder)]
    result = subprocess.run([*command, "--model_name_or_path", "nobody/nothing"], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("prepare_captions.py: error: --model_name_or_path nobody")
