"""--push_to_hub, against a stand-in for the Hub."""

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, close_session
from loopback_hub import LoopbackHub, Repo
from PIL import Image
from safetensors.torch import load, load_file
from tiny_models import build_tiny_vae

import train_utils
from arguments import UserError


ROOT = Path(train_utils.__file__).parent
TOKEN = "hf_to_be_seen_nowhere"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny_sd, tiny_pipeline):
    with LoopbackHub(TOKEN) as hub:
        hub.repos["tester/base"] = Repo.of_folder(tiny_sd)
        hub.repos["tester/pixart"] = Repo.of_folder(tiny_pipeline("PixArtSigma"))
        hub.repos["someone/model"] = Repo()
        yield hub


def launch(hub, command, home, cwd=ROOT, **environment):
    environment = {**os.environ, **hub.environment(), "HF_HOME": home, "OMP_NUM_THREADS": "1", **environment}
    words, pipe = [str(word) for word in command], subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def runs(hub, tiny_sd, photos, tmp_path_factory):
    """Three trainings at once, of two steps each: name -> output folder, exit code and what was printed."""
    place = tmp_path_factory.mktemp("runs")
    shared = ["--train_data_dir", photos, "--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 2]
    shared += ["--lpl_sigma_threshold", 80, "--validation_prompt", 'a "red" fox', "--num_validation_images", 1]
    shared += ["--validation_inference_steps", 2, "--checkpointing_steps", 1, "--seed", 0, "--push_to_hub"]
    local, by_id = (["--pretrained_model_name_or_path", model] for model in (tiny_sd, "tester/base"))
    flags = {
        "full": [*local, "--hub_model_id", "tester/full", "--hub_token", TOKEN, "--hub_private_repo"],
        "a LoRA": [*by_id, "--hub_model_id", "lora", "--use_lora", "--prediction_type", "v_prediction"],
        "refused": [*local, "--hub_model_id", "tester/refused", "--hub_token", "hf_wrong"],
    }
    flags["full"] += ["--logging_dir", "./logs"]
    environments = {"full": {"HF_TOKEN": ""}, "refused": {"HF_TOKEN": ""}}
    (place / "full" / "tmp-checkpoint-9").mkdir(parents=True)  # as a killed run leaves it
    (place / "full" / "tmp-checkpoint-9" / "half").write_text("written")
    hub.fail_commits.add("tester/lora")
    started = {}
    for name, more in flags.items():
        command = [sys.executable, "train_lpl_sd.py", *shared, "--output_dir", place / name, *more]
        started[name] = launch(hub, command, place / f"home of {name}", **environments.get(name, {}))
    printed = {name: process.communicate()[0] for name, process in started.items()}
    return {name: (place / name, process.returncode, printed[name]) for name, process in started.items()}


def train_and_push(hub, place, flags):
    """Runs train_lpl_dit.py for one step with each of the flags, at once; outputs are in `place`, by name."""
    shared = ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 1, "--num_validation_images", 1]
    shared += ["--validation_inference_steps", 2, "--seed", 0, "--push_to_hub", "--hub_token", TOKEN]
    started = {}
    for name, more in flags.items():
        output = ["--output_dir", place / name, "--hub_model_id", f"tester/{name}"]
        command = [sys.executable, "train_lpl_dit.py", *shared, *output, *more]
        started[name] = launch(hub, command, place / f"home of {name}")
    for name, process in started.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def transformers(hub, photos, class_folders, tmp_path_factory):
    """Trainings of transformers, for what a stock pipeline can't load by itself; returns their folder."""
    place = tmp_path_factory.mktemp("transformers")
    build_tiny_vae().save_pretrained(place / "vae")
    flags = {
        "peft": ["--pretrained_model_name_or_path", "tester/pixart", "--use_lora", "--learning_rate", 0.1],
        "classes": ["--transformer_config", "transformer_configs/mmdit-tiny.json", "--lpl_sigma_threshold", 80],
    }
    flags["peft"] += ["--train_data_dir", photos, "--validation_prompt", "a red fox"]
    flags["classes"] += ["--train_data_dir", class_folders, "--validation_prompt", "volcano"]
    flags["classes"] += ["--pretrained_vae_model_name_or_path", place / "vae", "--learning_rate", 0.01]
    train_and_push(hub, place, flags)
    return place


@pytest.fixture(scope="module")
def packed(hub, tiny_pipeline, photos, tmp_path_factory):
    """The same of models with VAEs of their own: a LoRA and a pipeline."""
    place = tmp_path_factory.mktemp("packed")
    flags = {"klein": ["--use_lora", "--learning_rate", 0.1], "qwen-image": ["--learning_rate", 0.01]}
    for name, family in (("klein", "Flux2Klein"), ("qwen-image", "QwenImage")):
        hub.repos[f"tester/base-of-{name}"] = Repo.of_folder(tiny_pipeline(family))
        flags[name] += ["--pretrained_model_name_or_path", f"tester/base-of-{name}", "--train_data_dir", photos]
        flags[name] += ["--validation_prompt", "a red fox"]
    train_and_push(hub, place, flags)
    return place


DRAW = """
import sys
import torch
folder, code, settings = sys.argv[1:]
exec(code)
image.save(f"{folder}/image of the card.png")
generator = torch.Generator().manual_seed(0)
pipe(**eval(settings), generator=generator, num_inference_steps=2).images[0].save(f"{folder}/image.png")
"""


FOX = {"prompt": "a red fox", "height": 64, "width": 64}


@pytest.mark.parametrize(
    "place, name, settings",
    [
        ("transformers", "peft", {**FOX, "use_resolution_binning": False}),
        ("transformers", "classes", {"class_labels": [1]}),  # volcano; 64 pixels are what it was trained for
        pytest.param("packed", "klein", FOX, marks=pytest.mark.slow),
        pytest.param("packed", "qwen-image", {**FOX, "negative_prompt": ""}, marks=pytest.mark.slow),
    ],
)
def test_the_code_in_a_transformers_card_draws_what_was_trained(hub, request, tmp_path, place, name, settings):
    place = request.getfixturevalue(place)
    card = hub.repos[f"tester/{name}"].files["README.md"].decode()
    assert str(place) not in card
    assert ModelCard(card).data.pipeline_tag == (
        "text-to-image" if "prompt" in settings else "unconditional-image-generation"
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    command = [sys.executable, "-c", DRAW, tmp_path, code.replace('.to("cuda")', ""), repr(settings)]
    process = launch(hub, command, tmp_path / "home", cwd=tmp_path)  # where our own module is out of reach
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert Image.open(tmp_path / "image of the card.png").size == (64, 64)
    assert_same_image(place / name / "samples" / "final.png", tmp_path / "image.png")


@pytest.fixture(scope="module")
def repeated_upload(hub, runs, tmp_path_factory):
    """The command that the failed upload's message names, run when the Hub works again."""
    command = re.search(r"`(hf upload .*)`", runs["a LoRA"][2])[1]
    assert command.count("--exclude") == 4  # not what the client leaves out anyway
    hub.fail_commits.clear()
    hf = Path(sys.executable).with_name("hf")
    process = launch(hub, [hf, *shlex.split(command)[1:]], tmp_path_factory.mktemp("home"))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed


PULL = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

folder, code = sys.argv[1:]
def draw(name, pipe):
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": torch.Generator().manual_seed(0)}
    pipe('a "red" fox', **settings).images[0].save(f"{folder}/{name}.png")

pipe = StableDiffusionPipeline.from_pretrained("tester/full")
save_file(pipe.unet.state_dict(), f"{folder}/unet.safetensors")
draw("full", pipe)
exec(code)
image.save(f"{folder}/image of the card.png")
draw("a LoRA", pipe)
"""


@pytest.fixture(scope="module")
def pulled(hub, runs, repeated_upload, tmp_path_factory):
    """What a user has who knows the repositories alone, and the code in the LoRA's card."""
    (code,) = re.findall(r"```python\n(.*?)```", hub.repos["tester/lora"].files["README.md"].decode(), re.DOTALL)
    folder = tmp_path_factory.mktemp("pulled")
    process = launch(hub, [sys.executable, "-c", PULL, folder, code.replace('.to("cuda")', "")], folder / "home")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return folder


def assert_same_image(first, second):
    first, second = (np.asarray(Image.open(path).convert("RGB"), int) for path in (first, second))
    assert first.std() > 0 and np.abs(first - second).max() <= 1


def test_a_pipeline_is_pushed_without_checkpoints_and_logs(hub, runs):
    output, returncode, printed = runs["full"]
    assert returncode == 0, printed
    repo = hub.repos["tester/full"]
    assert repo.private
    parts = "README.md model_index.json samples scheduler text_encoder tokenizer unet vae".split()
    assert sorted({path.split("/")[0] for path in repo.files}) == parts
    assert load(repo.files[WEIGHTS]).keys() == load_file(output / WEIGHTS).keys()
    others = {"checkpoint-1", "checkpoint-2", "logs", "train_log.jsonl"}
    assert {path.name for path in output.iterdir()} == {*parts, *others}


def test_the_pushed_pipeline_is_the_local_one(runs, pulled):
    output = runs["full"][0]
    expected, weights = load_file(output / WEIGHTS), load_file(pulled / "unet.safetensors")
    assert expected.keys() == weights.keys() and all((expected[name] == weights[name]).all() for name in expected)
    assert_same_image(output / "samples" / "final.png", pulled / "full.png")


def test_the_code_in_a_loras_card_draws_what_the_local_lora_draws(runs, pulled):
    assert_same_image(runs["a LoRA"][0] / "samples" / "final.png", pulled / "a LoRA.png")
    assert Image.open(pulled / "image of the card.png").size == (64, 64)


def test_cards_name_their_base_and_nothing_of_this_machine(hub, runs, tiny_sd, repeated_upload):
    for name, base in (("full", None), ("lora", "tester/base")):
        text = hub.repos[f"tester/{name}"].files["README.md"].decode()
        card = ModelCard(text)
        assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
        assert card.data.get("base_model") == base
        assert card.data.get("base_model_relation") == ("adapter" if base else None)
        assert ("lora" in card.data.tags) == bool(base)
        (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert picture in hub.repos[f"tester/{name}"].files
        assert str(tiny_sd.parent) not in text and "2 steps at 64 pixels" in text


def test_a_wrong_token_ends_the_run_before_a_model_is_loaded(hub, runs):
    output, returncode, printed = runs["refused"]
    assert returncode == 1
    sentence = printed.splitlines()[-1]
    assert re.search(r"--push_to_hub: .* tester/refused \(.*\): .*`hf auth login`.*--hub_token", sentence)
    assert "Traceback" not in printed and "LPL" not in printed and not output.exists()
    assert "tester/refused" not in hub.repos


def test_a_failed_upload_costs_nothing_and_says_how_to_repeat_it(hub, runs, repeated_upload):
    output, returncode, printed = runs["a LoRA"]
    assert returncode == 1 and "Traceback" not in printed
    sentence = next(line for line in printed.splitlines() if "error: " in line)
    assert f"the upload failed (The test wants this commit to fail); the result is safe in {output}: " in sentence
    pushed = {"README.md", "pytorch_lora_weights.safetensors", "samples/final.png", "scheduler/scheduler_config.json"}
    assert hub.repos["tester/lora"].files.keys() == pushed
    for path in pushed:
        assert hub.repos["tester/lora"].files[path] == (output / path).read_bytes()


def test_the_token_is_in_no_file_and_not_printed(runs):
    output, _, printed = runs["full"]
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"hparams.yml", "README.md", "optimizer.bin"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in printed and "hf_wrong" not in runs["refused"][2]


@pytest.fixture
def flags(hub, monkeypatch):
    """What `create_hub_repo` reads, in this process, whose client talks to the stand-in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    return Namespace(hub_token=TOKEN, hub_model_id=None, hub_private_repo=False, output_dir="runs/my-fox")


def test_the_repository_has_the_folders_name_by_default(hub, flags):
    train_utils.create_hub_repo(flags)
    assert flags.hub_model_id == "tester/my-fox" and not hub.repos["tester/my-fox"].private


@pytest.mark.parametrize(
    "name, reason",
    [
        ("someone/model", "You don't have write access to someone/model"),
        ("someone/new", "You don't have the rights to create someone/new"),
        ("of/three/parts", "Repo id must"),
    ],
)
def test_a_repository_that_cannot_be_written_to_is_refused(flags, name, reason):
    flags.hub_model_id = name
    with pytest.raises(UserError, match=rf"--push_to_hub: .* {name} \({reason}.*\): .*--hub_model_id"):
        train_utils.create_hub_repo(flags)


def test_a_private_push_to_a_public_repository_is_refused(flags):
    flags.hub_model_id, flags.hub_private_repo = "tester/base", True
    with pytest.raises(UserError, match="--hub_private_repo: tester/base exists and is public"):
        train_utils.create_hub_repo(flags)


def test_a_hub_out_of_reach_is_one_sentence(flags, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--push_to_hub: .* my-fox \(.*refused.*\)"):
        train_utils.create_hub_repo(flags)
