"""The classifier of latents: what it learns and what its network is good for, how a run goes on, what is refused."""

import io
import os
import subprocess
import sys
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import named_flags, read_log
from diffusers import VQModel
from PIL import Image
from tiny_models import build_tiny_vae

import train_latent_classifier
from arguments import NotUploaded, UserError
from data_utils import cache_latents, hold_out, open_samples
from images import load_image
from latent_lpips import LatentVGG, latent_lpips, load_latent_lpips
from train_latent_classifier import Latents, evaluate, parse_args, random_crops


SIDE, CLASSES = 32, ("columns", "flat", "rows")


def build_vae(kind="AutoencoderKL", **config):
    """A tiny VAE of factor 2, whose posterior is as narrow as that of trained ones."""
    vae = build_tiny_vae(kind, block_out_channels=(8, 16), **config)
    if hasattr(vae, "quant_conv"):
        vae.quant_conv.bias.data[vae.config.get("z_dim", vae.config.get("latent_channels")) :] -= 10
    return vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    build_vae(shift_factor=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """24 pictures of each class: stripes one way, the other way, or none, anywhere and noisy."""
    folder, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for i in range(24):
            wave = np.roll(np.where(np.arange(SIDE) % 8 < 4, 60, -60), rng.integers(8))
            pattern = {"columns": wave[None, :, None], "flat": 0, "rows": wave[:, None, None]}[name]
            pixels = rng.normal(128, 20, (SIDE, SIDE, 3)) + pattern
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def flags(vae, data, output, *words):
    """A command line; the `words` count, should others say something else."""
    settings = ["--pretrained_vae_model_name_or_path", vae, *data, "--output_dir", output]
    settings += ["--resolution", SIDE, "--train_batch_size", 16, "--width", 0.125, "--eval_share", 0.25]
    return [str(word) for word in (*settings, *words)]


@pytest.fixture
def train(vae, stripes, tmp_path):
    """Runs the script in this process and returns the output folder."""

    def run(*words, name="out", vae=vae, data=("--train_data_dir", stripes), seed=("--seed", 0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train_latent_classifier.main(parse_args(flags(vae, data, tmp_path / name, *seed, *words)))
        return tmp_path / name

    return run


# What it learns


def test_the_network_learns_the_classes_and_its_distance_grows_with_noise(train, vae, stripes, capsys):
    output = train("--max_train_steps", 120, "--logging_steps", 20)
    log = read_log(output)
    assert [line["step"] for line in log if "loss" in line] == [20, 40, 60, 80, 100, 120]
    assert log[-1]["step"] == 120 and log[-1]["eval_accuracy"] > 0.9
    said = capsys.readouterr().out
    assert f"Held-out accuracy {log[-1]['eval_accuracy']:.1%}" in said and f"--e_latent_lpips_model {output}" in said
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "train_log.jsonl",
    ]

    stock = build_vae(shift_factor=0.1)
    network = load_latent_lpips(str(output), stock.config)
    assert (network.config.scaling_factor, network.config.shift_factor) == (0.18215, 0.1)
    assert network.config.num_classes == 3
    images = [load_image(str(stripes / name / "0.png")) for name in CLASSES]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    z = ((stock.encode(pixels).latent_dist.mean - 0.1) * 0.18215).detach()
    assert network(z).argmax(1).tolist() == [0, 1, 2]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)) * z.std()
    distances = torch.stack([latent_lpips(network, z + level * noise, z) for level in (0.0, 0.1, 0.3, 1.0)])
    assert distances[0].abs().max() == 0 and (distances[1:] > distances[:-1]).all()
    other = latent_lpips(network, z, z.roll(1, dims=0))
    assert (other > distances[1]).all(), "another class is further away than a little noise"


def chance_of(said):
    return said.split("would be right in ")[1].split("%")[0]


def test_chance_is_the_share_of_the_most_frequent_class_among_the_held_out_images(train, stripes, tmp_path, capsys):
    rows = [f'{{"file_name": "{i}.png", "label": {int(i >= 18)}}}' for i in range(20)]
    for i in range(20):
        Image.fromarray(np.full((SIDE, SIDE, 3), 10 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    train("--max_train_steps", 1, data=("--train_data_dir", tmp_path), seed=("--seed", 2))
    args = parse_args(flags("a/vae", ("--train_data_dir", tmp_path), tmp_path / "other", "--seed", 2))
    stream = open_samples(args)
    hold_out(stream, 0.25)
    labels = [label for _, label in stream.held_out.samples]
    assert len(labels) == 5 and 0 < sum(labels) < 5, "the seed is to hold out both"
    assert chance_of(capsys.readouterr().out) == f"{100 * labels.count(0) / 5:.1f}"


def test_labels_may_have_gaps_and_come_from_a_dataset_or_shards_with_latents_on_the_disk(train, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    images, labels = [], [5, 900] * 6
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(np.full((SIDE, SIDE, 3), 20 * i, dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    columns = {"image": [{"bytes": image, "path": None} for image in images], "kind": labels}
    dataset = Dataset.from_dict(columns, Features({"image": ImageColumn(), "kind": Value("int64")}))
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for i, (image, label) in enumerate(zip(images, labels)):
            for suffix, content in (("png", image), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    results = []
    for name, data in (
        ("dataset", ("--dataset_name", tmp_path / "data.parquet", "--label_column", "kind")),
        ("shards", ("--train_shards", tmp_path / "data.tar")),
        ("disk", ("--train_shards", tmp_path / "data.tar", "--latent_cache_dir", tmp_path / "cache")),
    ):
        output = train("--max_train_steps", 2, "--cache_dir", tmp_path / "hub", name=name, data=data)
        results.append(LatentVGG.from_pretrained(output))
    assert all(result.config.num_classes == 2 for result in results)
    for name, values in results[0].state_dict().items():
        assert all(torch.equal(values, other.state_dict()[name]) for other in results[1:]), name


# Latents


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderKLQwenImage"])
def test_latents_are_scaled_as_the_denoiser_sees_them(tmp_path, kind):
    shift = {"shift_factor": 0.3} if kind == "AutoencoderKL" else {}
    build_vae(kind, latent_channels=3, **shift).save_pretrained(tmp_path)
    args = Namespace(pretrained_vae_model_name_or_path=str(tmp_path), cache_dir=None, resolution=SIDE)
    latents = Latents(args, torch.device("cpu"), torch.float32)
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = latents.vae
    with torch.no_grad():
        if kind == "AutoencoderKL":
            expected = (vae.encode(x).latent_dist.mean - 0.3) * 0.18215
        elif kind == "AutoencoderTiny":
            expected = vae.encode(x).latents * vae.config.scaling_factor
        else:
            mean, std = (torch.tensor(vae.config[name]).view(3, 1, 1) for name in ("latents_mean", "latents_std"))
            expected = (vae.encode(x[:, :, None]).latent_dist.mean[:, :, 0] - mean) / std
    encoded = latents.encode(x)
    assert torch.allclose(latents.scaled(encoded), expected, atol=1e-5)
    drawn = latents.scaled(encoded, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert torch.equal(drawn, expected) == (kind == "AutoencoderTiny"), "it has no posterior to draw from"
    assert torch.allclose(drawn, expected, atol=0.1)


def test_random_crops_are_windows_at_whole_positions_each_by_its_own_generator():
    z = torch.randn(40, 4, 16, 8)
    crops = random_crops(z, [torch.Generator().manual_seed(seed) for seed in range(40)])
    assert crops.shape == (40, 4, 14, 7)
    found = [
        [(y, x) for y in range(3) for x in range(2) if torch.equal(z[i, :, y : y + 14, x : x + 7], crops[i])]
        for i in range(40)
    ]
    assert {place for (place,) in found} == {(y, x) for y in range(3) for x in range(2)}
    small = torch.randn(1, 4, 7, 4)
    assert torch.equal(random_crops(small, [None]), small)


# How a run goes on


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_log(train, monkeypatch):
    whole = train("--max_train_steps", 9, "--logging_steps", 2, "--random_flip", name="whole")
    signals = iter([None] * 4)
    monkeypatch.setattr(train_latent_classifier.interruption, "received", lambda: next(signals, "SIGTERM"))
    settings = ("--max_train_steps", 9, "--logging_steps", 2, "--random_flip")
    stopped = train(*settings, name="stopped")
    assert [path.name for path in stopped.glob("*.pt")] == ["checkpoint.pt"] and not (stopped / "config.json").exists()
    monkeypatch.undo()
    with open(stopped / "train_log.jsonl", "a") as log:
        log.write('{"step": 6, "of a run that was killed": 1}\n{"step": 7, "lo')
    train(*settings, "--resume_from_checkpoint", "latest", name="stopped", seed=())
    assert not (stopped / "checkpoint.pt").exists()
    expected, found = (LatentVGG.from_pretrained(folder).state_dict() for folder in (whole, stopped))
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    evaluations = [[line for line in read_log(folder) if "eval_loss" in line] for folder in (whole, stopped)]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]
    assert [line["step"] for line in read_log(stopped) if "loss" in line] == [2, 4, 6, 8, 9]


def test_without_a_checkpoint_a_run_to_resume_starts_anew(train):
    output = train("--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert read_log(output)[-1]["step"] == 2


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(train, tmp_path):
    train("--max_train_steps", 1, name="other")  # what follows is refused before anything is trained
    output = tmp_path / "out"
    output.mkdir()
    (output / "checkpoint.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match="checkpoint.pt is damaged"):
        train("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    torch.save({"settings": {"--seed": 0, "--width": 0.25}}, output / "checkpoint.pt")
    with pytest.raises(UserError, match="--resume_from_checkpoint: that run had --width 0.25, this one 0.125"):
        train("--max_train_steps", 4, "--resume_from_checkpoint", "latest")


def test_a_repository_that_can_not_be_had_is_told_before_anything_is_encoded(train, monkeypatch):
    monkeypatch.setattr(train_latent_classifier, "Latents", lambda *_: pytest.fail("the VAE was loaded"))
    with pytest.raises(UserError, match="--push_to_hub: the repository me/net can't be had"):
        train("--max_train_steps", 1, "--push_to_hub", "--hub_model_id", "me/net")


def test_a_failed_upload_leaves_the_result_and_says_how_to_do_it_by_hand(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_latent_classifier, "create_repo", lambda *_, **__: None)
    with pytest.raises(NotUploaded, match=f"safe in {tmp_path}/out.*`hf upload me/net {tmp_path}/out .`"):
        train("--max_train_steps", 1, "--push_to_hub", "--hub_model_id", "me/net")
    assert LatentVGG.from_pretrained(tmp_path / "out").config.num_classes == 3


@pytest.mark.slow
def test_two_processes_train_one_network_and_measure_what_is_saved(vae, stripes, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = flags(vae, ("--train_data_dir", stripes), tmp_path / "out", "--seed", 0, "--max_train_steps", 8)
    command += [train_latent_classifier.__file__, *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "16 samples x 2 processes" in result.stdout

    AcceleratorState._reset_state(reset_partial_state=True)
    args = parse_args(flags(vae, ("--train_data_dir", stripes), tmp_path / "other", "--seed", 0))
    accelerator, stream = Accelerator(cpu=True), open_samples(args)
    hold_out(stream, args.eval_share)
    latents = Latents(args, accelerator.device, torch.float32)
    cache_latents(stream.held_out, latents.encode, lambda items, entry, title: [entry(item) for item in items])
    network = LatentVGG.from_pretrained(tmp_path / "out")
    found = evaluate(accelerator, args, network, latents, stream.held_out, {0: 0, 1: 1, 2: 2})
    last = read_log(tmp_path / "out")[-1]
    assert last["step"] == 8 and found["eval_accuracy"] == pytest.approx(last["eval_accuracy"])
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


# What is refused


@pytest.fixture
def refuse(vae, stripes, tmp_path, capsys):
    """The sentence by which the flags are refused."""

    def run(*words, vae=vae, data=("--train_data_dir", stripes)):
        with pytest.raises(SystemExit) as exit:
            parse_args(flags(vae, data, tmp_path / "out", *words))
        message = capsys.readouterr().err
        assert exit.value.code == 2 and message.count("\n") == 1
        return message

    return run


@pytest.fixture(scope="module")
def known_flags():
    help_text = subprocess.run(
        [sys.executable, train_latent_classifier.__file__, "--help"], capture_output=True, text=True, check=True
    ).stdout
    return named_flags(help_text)


@pytest.mark.parametrize(
    "words, what",
    [
        (["--train_batch_size", "0"], "--train_batch_size 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--width", "0"], "--width 0.0 must be greater than 0"),
        (["--eval_share", "1"], "--eval_share 1.0 must be between 0 and 1"),
        (["--dataset_name", "a/b"], "given: --train_data_dir and --dataset_name"),
        (["--dataset_config_name", "a"], "--dataset_config_name has no effect with --train_data_dir"),
        (["--hub_model_id", "a/b"], "--hub_model_id has no effect without --push_to_hub"),
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "3"], "--lr_warmup_steps has no effect with"),
        (["--pretrained_model_name_or_path", "a/b"], "--pretrained_model_name_or_path has no effect with"),
        (["--variant", "fp16"], "--variant has no effect with --pretrained_vae_model_name_or_path"),
        (["--label_column", "kind"], "--label_column kind does not apply"),
        (["--streaming"], "--streaming is not there"),
        (["--cache_latents"], "--cache_latents is not needed"),
        (["--learning-rate", "1"], "is --learning_rate meant?"),
    ],
)
def test_a_wrong_flag_is_one_sentence_that_names_flags_that_are_there(refuse, known_flags, words, what):
    message = refuse(*words)
    assert what in message
    assert named_flags(message) <= known_flags | {*words}


def test_data_vae_and_results_that_can_not_be_used_are_refused_at_once(refuse, stripes, vae, tmp_path):
    assert "given: none" in refuse(data=())
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "0.png")
    assert "has no classes" in refuse(data=("--train_data_dir", tmp_path / "flat"))
    assert f"there is no {tmp_path}/nothing/config.json" in refuse(vae=tmp_path / "nothing")
    output = tmp_path / "out"
    output.write_text("")
    assert f"--output_dir {output} is a file" in refuse()
    output.unlink()
    output.mkdir()
    (output / "checkpoint.pt").touch()
    assert "continue it with --resume_from_checkpoint latest" in refuse()
    (output / "diffusion_pytorch_model.safetensors").touch()
    assert "holds a saved model" in refuse("--resume_from_checkpoint", "latest")


def test_no_vae_is_refused_and_a_pipeline_must_have_one(stripes, tmp_path, capsys):
    words = ["--train_data_dir", str(stripes), "--output_dir", str(tmp_path / "out")]
    for more, what in (([], "no VAE: give"), (["--pretrained_model_name_or_path", str(tmp_path)], "vae/config.json")):
        with pytest.raises(SystemExit):
            parse_args([*words, *more])
        assert what in capsys.readouterr().err


def test_one_class_has_nothing_to_tell_apart(train, tmp_path):
    (tmp_path / "data" / "only").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (SIDE, SIDE), (i, i, i)).save(tmp_path / "data" / "only" / f"{i}.png")
    with pytest.raises(UserError, match="all images are of one class"):
        train(data=("--train_data_dir", tmp_path / "data"))


@pytest.mark.parametrize(
    "kind, what",
    [
        ("AutoencoderKLFlux2", "neither a scaling_factor nor latents_mean"),
        ("VQModel", "the VAE is a VQModel, this script supports"),
    ],
)
def test_a_vae_whose_latents_have_no_known_scale_is_refused(train, tmp_path, kind, what):
    vae = VQModel(norm_num_groups=4, block_out_channels=(8,)) if kind == "VQModel" else build_vae(kind)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=what):
        train(vae=tmp_path / "vae")


def test_what_the_vae_or_the_machine_can_not_do_is_refused(train):
    with pytest.raises(UserError, match="fp16"):
        train("--mixed_precision", "fp16")
    with pytest.raises(UserError, match="--resolution 33 must be a multiple of 2: 32"):
        train("--resolution", 33)
