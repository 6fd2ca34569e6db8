"""--eval_steps: what is held out is never trained on, evaluating changes nothing, the numbers are those by hand."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import read_log, run_script
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from marks import slow_but
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_photo_folder, photo_id

import interruption
import model_card
import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from data_utils import HELD_OUT_POSITION, build_dataloader, held_out_batch, held_out_caption, make_stream
from family import Family
from features import load_extractor
from loss_terms import make_lpl
from lpl_utils import LatentPerceptualLoss
from metrics import frechet_distance, kernel_distances, moments
from model_families import find_family
from noise import training_target
from train_utils import sample_generators


pytestmark = pytest.mark.usefixtures("time_limit")

ROOT = Path(train_lpl_sd.__file__).parent
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
THIRD = ("--eval_steps", 2, "--eval_share", 0.3)  # 3 of 10 photos are held out
LPL = ("--lpl_weight", 0.3, "--lpl_sigma_threshold", 8)  # tau 2 at 64 pixels: some of the levels pass, some do not
STILL = (*LPL, "--learning_rate", 0)
CACHES = ("--cache_latents", "--center_crop", "--cache_text_embeddings")
FRECHET, KERNEL = "eval_frechet_distance_small_sample", "eval_kernel_distance_small_sample"


@pytest.fixture(scope="session")
def extractor(tmp_path_factory):
    """The folder of a tiny random ViT."""
    folder = tmp_path_factory.mktemp("vit")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **size))
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawings(extractor):
    """Flags: five drawings at each evaluation, which two processes can't share evenly."""
    flags = ("--eval_samples", 5, "--eval_feature_extractor", extractor, "--validation_inference_steps", 2)
    return (*flags, "--validation_guidance_scale", 2)


@pytest.fixture(scope="session")
def still(tiny_sd, photos, drawings, tmp_path_factory):
    """Output of a run whose weights stay as they are, with two evaluations."""
    folder, data = tmp_path_factory.mktemp("still"), ("--train_data_dir", photos)
    return run_script(train_lpl_sd, (*STILL, *THIRD, *drawings), folder / "out", tiny_sd, data, 4)


def evaluations(output):
    return [row for row in read_log(output) if "eval_l2" in row]


def trainings(output):
    rows = [row for row in read_log(output) if "loss" in row]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def assert_same_numbers(found, expected, rel=1e-5):
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, rel=rel)


def weights(output):
    """All that was trained: (file, name) -> tensor."""
    paths = [*output.glob("*.safetensors"), *output.glob("unet/*.safetensors"), *output.glob("transformer/*.safet*")]
    paths += output.glob("checkpoint-*/**/*.safetensors")
    return {(path.relative_to(output), name): value for path in paths for name, value in load_file(path).items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name], second[name]), name


def args_of(script, model, data, output, *words):
    flags = [] if model is None else ["--pretrained_model_name_or_path", model]
    flags += [*data, "--output_dir", output, "--resolution", 64, "--seed", 0, "--train_batch_size", 2, *words]
    return script.parse_args([str(word) for word in flags])


# The split


def write_class_folders(folder, photos):
    for path in sorted(photos.glob("*.png")):
        name = "volcano" if int(path.stem[-1]) % 3 == 0 else "umbrella"
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return ("--train_data_dir", folder)


def write_shards(folder, photos):
    texts = {row["file_name"]: row["text"] for row in map(json.loads, open(photos / "metadata.jsonl"))}
    folder.mkdir()
    for k, paths in enumerate(np.array_split(sorted(photos.glob("*.png")), 2)):
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for path in paths:
                tar.add(path, path.name)
                text = folder / path.with_suffix(".txt").name
                text.write_text(texts[path.name])
                tar.add(text, text.name)
    return ("--train_shards", folder / "{0..1}.tar")


def write_dataset(folder, photos):
    shutil.copytree(photos, folder / "train")
    return ("--dataset_name", folder, "--cache_dir", folder.parent / "cache")


def write_wide_and_high(folder, photos):
    """Of several shapes, for buckets; ids are those of `photos`."""
    shutil.copytree(photos, folder)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        Image.open(path).resize([(72, 72), (144, 72), (72, 144)][i % 3]).save(path)
    return ("--train_data_dir", folder, "--aspect_ratio_buckets", "64,64;64,128;128,64")


def write_three_rows_an_image(folder, photos):
    shutil.copytree(photos, folder)
    rows = (photos / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(rows * 3))
    return ("--train_data_dir", folder)


SOURCES = {
    "folder": lambda folder, photos: ("--train_data_dir", photos),
    "three rows an image": write_three_rows_an_image,
    "class folders": write_class_folders,
    "dataset": write_dataset,
    "shards": write_shards,
    "buckets": write_wide_and_high,
}


def stream_of(source, tiny_sd, tiny_pipeline, photos, tmp_path, *words):
    data = SOURCES[source](tmp_path / "data", photos)
    script, model = (train_lpl_dit, tiny_pipeline("DiT")) if source == "class folders" else (train_lpl_sd, tiny_sd)
    return make_stream(args_of(script, model, data, tmp_path / "out", *words))


def trained_ids(stream, epochs=4):
    """Of the photos that training sees in so many passes."""
    batches = itertools.islice(build_dataloader(stream, batch_size=1), epochs * stream.num_samples)
    return [photo_id(batch["pixel_values"][0]) for batch in batches]


def held_out_ids(stream):
    batch = held_out_batch(stream, range(len(stream.samples)))
    return [photo_id(image) for image in batch["pixel_values"]]


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_held_out_is_never_trained_on_and_all_else_is(tiny_sd, tiny_pipeline, photos, tmp_path, source):
    shared = (source, tiny_sd, tiny_pipeline, photos, tmp_path)
    stream = stream_of(*shared, *THIRD, "--random_flip", "--proportion_empty_prompts", 0.5)
    held_out, seen = held_out_ids(stream.held_out), trained_ids(stream)
    rows = 3 if source == "three rows an image" else 1
    assert sorted(held_out) == sorted([*set(held_out)] * rows) and len(set(held_out)) == 3
    assert stream.num_samples == 7 * rows
    assert set(seen) == set(range(10)) - set(held_out)
    assert held_out == held_out_ids(stream.held_out)


def test_the_split_is_a_function_of_the_seed(tiny_sd, photos, tmp_path):
    def split(*words):
        stream = make_stream(args_of(train_lpl_sd, tiny_sd, ("--train_data_dir", photos), tmp_path, *THIRD, *words))
        return tuple(held_out_ids(stream.held_out))

    first = split()
    assert split("--random_flip", "--train_batch_size", 3, "--dataloader_num_workers", 1) == first
    assert len({first, *(split("--seed", seed) for seed in range(1, 5))}) > 2


def test_without_eval_steps_or_with_other_images_all_are_trained_on(tiny_sd, photos, tmp_path):
    other = build_photo_folder(tmp_path / "other", n=2, size=80, seed=1)
    for words in ((), ("--eval_steps", 2, "--eval_data_dir", other)):
        stream = make_stream(args_of(train_lpl_sd, tiny_sd, ("--train_data_dir", photos), tmp_path, *words))
        assert sorted(trained_ids(stream, epochs=1)) == list(range(10))
    assert held_out_ids(stream.held_out) == [0, 1]


def test_what_is_held_out_is_cropped_in_the_middle_and_captioned_as_it_is(tiny_sd, tmp_path):
    folder = build_photo_folder(tmp_path / "photos", n=4, size=(80, 96))
    flags = ("--eval_steps", 1, "--eval_data_dir", folder, "--random_flip", "--proportion_empty_prompts", 1)
    stream = make_stream(args_of(train_lpl_sd, tiny_sd, ("--train_data_dir", folder), tmp_path / "out", *flags))
    batch = held_out_batch(stream.held_out, [2])
    expected = Image.open(folder / "photo_0002.png").resize((64, 76), Image.LANCZOS)
    expected = np.asarray(expected, float)[6:70].transpose(2, 0, 1)
    found = batch["pixel_values"][0].numpy() * 127.5 + 127.5
    assert np.abs(found - expected).max() < 2
    (text,) = [json.loads(row)["text"] for row in (folder / "metadata.jsonl").read_text().splitlines()][2:3]
    assert batch["captions"] == [text] and held_out_caption(stream.held_out, 2) == text


def test_training_itself_sees_no_image_that_is_held_out(train, monkeypatch):
    """In the script, and not only in the stream that it makes."""
    seen, step = [], train_lpl_sd.training_step

    def watched(args, family, model, lpl, batch, *more, **settings):
        if torch.is_grad_enabled():
            seen.extend(photo_id(image) for image in batch["pixel_values"])
        return step(args, family, model, lpl, batch, *more, **settings)

    monkeypatch.setattr(train_lpl_sd, "training_step", watched)
    streams, make = [], train_lpl_sd.make_stream
    monkeypatch.setattr(train_lpl_sd, "make_stream", lambda args: streams.append(make(args)) or streams[0])
    train("--lpl_weight", 0, *THIRD, steps=7)
    assert len(seen) == 14 and set(seen) == set(range(10)) - set(held_out_ids(streams[0].held_out))


# Training is what it was


def test_evaluating_changes_nothing(train, drawings):
    flags = (*LPL, "--eval_share", 0.3, "--learning_rate", 1e-3, "--use_ema", "--ema_decay", 0.5, "--random_flip")
    flags += ("--checkpointing_steps", 3)
    often = train(*flags, "--eval_steps", 2, *drawings, name="often")
    never = train(*flags, "--eval_steps", 1000, name="never")
    assert len(evaluations(often)) == 2 and not evaluations(never)
    assert_same_weights(weights(often), weights(never))
    assert trainings(often) == trainings(never)


OTHERS = {
    "LoRA with dropout": ("--use_lora", "--lora_dropout", 0.3, "--use_ema", "--ema_decay", 0.5),
    "caches": (*CACHES, "--random_flip"),
    "caches on the disk": ("--latent_cache_dir", "CACHE", "--center_crop", "--use_lora", "--lora_dropout", 0.3),
    "text encoder": ("--use_lora", "--train_text_encoder", "--gradient_accumulation_steps", 2),
    "stratified": ("--stratified_timesteps", "--lpl_max_samples", 1, "--use_ema", "--offload_ema"),
    "from a step on": ("--lpl_start_step", 3, "--snr_gamma", 5, "--gradient_checkpointing"),
}


@pytest.mark.parametrize("kind", slow_but(("LoRA with dropout", "caches"), OTHERS))
def test_evaluating_changes_nothing_of_other_runs(train, drawings, tmp_path, kind):
    flags = [tmp_path / "cache" if word == "CACHE" else word for word in OTHERS[kind]]
    flags += [*LPL, "--eval_share", 0.3, "--learning_rate", 1e-3]
    often = train(*flags, "--eval_steps", 2, *drawings, name="often")
    never = train(*flags, "--eval_steps", 1000, *drawings, name="never")
    assert len(evaluations(often)) == 2
    assert_same_weights(weights(often), weights(never))
    assert trainings(often) == trainings(never)


@pytest.mark.parametrize("family", slow_but(("StableDiffusion3",), ("StableDiffusion3", "DiT", "Sana")))
def test_evaluating_changes_nothing_of_a_transformer(
    train_dit, tiny_pipeline, photos, class_folders, drawings, family
):
    data = ("--train_data_dir", class_folders if family == "DiT" else photos)
    flags = ("--lpl_weight", 0.3, "--lpl_sigma_threshold", 8, "--eval_share", 0.3, "--use_ema", "--ema_decay", 0.5)
    often = train_dit(*flags, "--eval_steps", 2, *drawings, model=tiny_pipeline(family), data=data, name="often")
    never = train_dit(*flags, "--eval_steps", 1000, model=tiny_pipeline(family), data=data, name="never")
    assert len(evaluations(often)) == 1
    assert_same_weights(weights(often), weights(never))
    assert trainings(often) == trainings(never)


# The losses


@torch.no_grad()
def losses_by_hand(model, folder, unet=None, lora=None, other=None):
    """Level -> (sigma/alpha, l2, LPL) of a Stable Diffusion on all photos of a folder, by the stock parts.

    other: a function of position, the caption's embeddings, (z_0, eps) as predicted and as they are; instead of LPL.
    """
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.unet = pipe.unet if unet is None else unet
    if lora is not None:
        pipe.load_lora_weights(lora)
    scheduler, lpl = DDPMScheduler.from_config(pipe.scheduler.config), LatentPerceptualLoss(pipe.vae, chunk_size=0)
    rows = [json.loads(row) for row in (folder / "metadata.jsonl").read_text().splitlines()]
    found = {}
    for number, level in enumerate(LEVELS):
        timestep = torch.tensor([round(1000 * level) - 1])  # of a thousand levels, numbered from 0
        abar = scheduler.alphas_cumprod[timestep].double()
        l2, perceptual = [], []
        for index, row in enumerate(rows):
            image = torch.from_numpy(np.array(Image.open(folder / row["file_name"]))).permute(2, 0, 1)[None]
            posterior = pipe.vae.encode(image / 127.5 - 1).latent_dist
            position = HELD_OUT_POSITION + index + 64 * number
            (generator,) = sample_generators(0, [position], purpose=1)
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            latents = latents * pipe.vae.config.scaling_factor
            noise = torch.randn(latents.shape, generator=generator)
            noisy = scheduler.add_noise(latents, noise, timestep)
            tokens = pipe.tokenizer([row["text"]], padding="max_length", return_tensors="pt")
            text = pipe.text_encoder(tokens.input_ids)[0]
            predicted = pipe.unet(noisy, timestep, text).sample
            l2.append((predicted - noise).square().mean().item())
            clean = scheduler.step(predicted, timestep, noisy).pred_original_sample
            if other is None:
                perceptual.append(lpl(clean, latents)[0].item())
            else:
                perceptual.append(other(position, text, (clean, predicted), (latents, noise)).item())
        found[level] = (((1 - abar) / abar).sqrt().item(), np.mean(l2), np.mean(perceptual))
    return found


def assert_by_hand(row, expected, tau, rel=2e-4, name="lpl"):
    named = {f"{noise:.3g}": (l2, perceptual if noise <= tau else None) for noise, l2, perceptual in expected}
    wanted = {f"eval_l2_at_{level}": l2 for level, (l2, _) in named.items()}
    wanted |= {f"eval_{name}_at_{level}": value for level, (_, value) in named.items() if value is not None}
    for term in ("l2", name):
        wanted[f"eval_{term}"] = np.mean([value for name, value in wanted.items() if f"_{term}_at" in name])
    assert row == pytest.approx({"step": row["step"], **wanted}, rel=rel)


def test_the_losses_are_those_by_hand_of_the_average_weights(train, tiny_sd, tmp_path):
    folder = build_photo_folder(tmp_path / "mine", n=5, size=64, seed=1)  # the last batch is a short one
    flags = (*LPL, "--learning_rate", 0.01, "--use_ema", "--ema_decay", 0.5, "--checkpointing_steps", 4)
    output = train(*flags, "--eval_steps", 2, "--eval_data_dir", folder)
    found = evaluations(output)
    assert [row["step"] for row in found] == [2, 4]
    expected = losses_by_hand(output, folder)  # the result has the average
    assert [noise <= 2 for noise, *_ in expected.values()] == [True, True, True, False, False]
    assert_by_hand(found[1], expected.values(), tau=2)
    raw = UNet2DConditionModel.from_pretrained(output / "checkpoint-4", subfolder="unet")
    raw = losses_by_hand(output, folder, raw)
    assert np.mean([l2 for _, l2, _ in raw.values()]) != pytest.approx(found[1]["eval_l2"], rel=5e-3)


@pytest.mark.parametrize("family", ["StableDiffusion3", "DiT"])
def test_the_losses_of_a_transformer_are_those_by_hand(
    train_dit, tiny_pipeline, photos, class_folders, tmp_path, family
):
    """Flow matching and class labels, one image at a time, with the family's own ways to predict."""
    data, model = ("--train_data_dir", class_folders if family == "DiT" else photos), tiny_pipeline(family)
    words = (*STILL, "--eval_steps", 3, "--eval_share", 0.4)
    words += ("--weighting_scheme", "none") if family == "StableDiffusion3" else ()  # as often, one as the other
    (row,) = evaluations(train_dit(*words, model=model, data=data))
    args = args_of(train_lpl_dit, model, data, tmp_path / "other", *words)
    expected = transformer_losses_by_hand(args)
    assert any(noise > 2 for noise, *_ in expected) and any(noise <= 2 for noise, *_ in expected)
    assert_by_hand(row, expected, tau=2)


@torch.no_grad()
def transformer_losses_by_hand(args):
    """(sigma/alpha, l2, LPL) at each level, of the model as it is."""
    loaded = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    loaded.model.eval()
    stream, lpl = make_stream(args).held_out, make_lpl(args, loaded.vae, loaded.unscale)
    expected = []
    for number, level in enumerate(LEVELS):
        timesteps = loaded.timesteps[[round(1000 * level) - 1]]
        alpha, sigma = loaded.noise_levels(timesteps)
        l2, perceptual = [], []
        for index in range(len(stream.samples)):
            batch = held_out_batch(stream, [index])
            generators = sample_generators(0, [HELD_OUT_POSITION + index + 64 * number], purpose=1)
            latents = loaded.latents(batch, generators)
            noise = torch.randn(latents.shape, generator=generators[0])
            noisy = alpha * latents + sigma * noise
            predicted = loaded.predict(loaded.model, noisy, timesteps, loaded.conditioning(batch))
            target = training_target(latents, noise, alpha, sigma, loaded.prediction_type)
            l2.append((predicted - target).square().mean().item())
            flow = loaded.prediction_type == "flow_prediction"
            clean = noisy - sigma * predicted if flow else (noisy - sigma * predicted) / alpha
            perceptual.append(lpl(clean, latents)[0].item())
        expected.append(((sigma / alpha).item(), np.mean(l2), np.mean(perceptual)))
    return expected


@pytest.mark.parametrize("gate", [True, False])
def test_the_self_perceptual_loss_of_adapters_is_that_by_hand_in_the_base_model(train, tiny_sd, tmp_path, gate):
    folder = build_photo_folder(tmp_path / "mine", n=3, size=64, seed=1)
    flags = ("--use_lora", "--learning_rate", 0.05, "--self_perceptual_weight", 1, "--lpl_weight", 0)
    flags += ("--gate_objectives", "self_perceptual", "--lpl_sigma_threshold", 8) if gate else ()
    output = train(*flags, "--eval_steps", 3, "--eval_data_dir", folder, steps=3)
    scheduler = DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler")
    middle = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")  # gives what its mid block gives
    middle.up_blocks, middle.conv_norm_out, middle.conv_out = torch.nn.ModuleList(), None, torch.nn.Identity()

    def self_perceptual(position, text, *sides):
        timestep = torch.randint(1000, (1,), generator=sample_generators(0, [position], purpose=2)[0])
        phis = [middle(scheduler.add_noise(*side, timestep), timestep, text, return_dict=False)[0] for side in sides]
        return (phis[0] - phis[1]).square().mean()

    (row,) = evaluations(output)
    row = {name: value for name, value in row.items() if "lpl" not in name}  # is measured as well, without training it
    expected = losses_by_hand(tiny_sd, folder, lora=output, other=self_perceptual)
    assert_by_hand(row, expected.values(), tau=2 if gate else 1e9, name="self_perceptual")
    levels = [name for name in row if name.startswith("eval_self_perceptual_at")]
    assert len(levels) == (3 if gate else 5)


def test_other_terms_are_evaluated_before_their_weight(train):
    flags = ("--rgb_weight", "auto:0.3", "--lpl_weight", 0, "--learning_rate", 0)
    first, second = evaluations(train(*flags, *THIRD))
    assert first.pop("step") != second.pop("step") and first == second
    assert first["eval_rgb"] > 0 and len([name for name in first if name.startswith("eval_rgb_at")]) == len(LEVELS)


def test_weights_that_stay_have_the_same_numbers_at_every_step(still):
    first, second = evaluations(still)
    assert (first.pop("step"), second.pop("step")) == (2, 4)
    assert first == second and {FRECHET, KERNEL} < first.keys()


SAME = {
    "batch size 1": ("--train_batch_size", 1),
    "batch size 3": ("--train_batch_size", 3),
    "caches": CACHES,
    "other draws": ("--proportion_empty_prompts", 0.5, "--random_flip", "--stratified_timesteps"),
    "fewer decoded": ("--lpl_max_samples", 1, "--gradient_accumulation_steps", 2),
    "average": ("--use_ema",),
    "LoRA": ("--use_lora",),
}


@pytest.mark.parametrize("kind", slow_but(("batch size 1", "caches", "other draws"), SAME))
def test_the_numbers_do_not_depend_on_how_is_trained(train, still, drawings, kind):
    output = train(*STILL, *THIRD, *drawings, *SAME[kind], steps=2)
    assert_same_numbers(evaluations(output), evaluations(still)[:1], rel=1e-3)


def test_images_of_the_class_do_not_count(train, still, drawings, tmp_path):
    """Prior preservation adds its loss in training alone."""
    folder = build_photo_folder(tmp_path / "class", n=3, size=64, seed=2)
    flags = ("--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", "a dog")
    output = train(*STILL, *THIRD, *drawings, *flags, "--num_class_images", 3, steps=2)
    assert_same_numbers(evaluations(output), evaluations(still)[:1])


def test_the_levels_are_quantiles_of_those_that_are_trained(train):
    """Three quarters of the draws are among the lower half of the timesteps."""
    flags = ("--timestep_bias_strategy", "range", "--timestep_bias_end", 500, "--timestep_bias_multiplier", 3)
    (row,) = evaluations(train("--lpl_weight", 0, *flags, "--eval_steps", 1, steps=1))
    scheduled = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    for timestep in (0.1 / 0.75 * 500, 0.5 / 0.75 * 500, 0.7 / 0.75 * 500):
        abar = scheduled[int(timestep)].double()
        assert f"eval_l2_at_{((1 - abar) / abar).sqrt().item():.3g}" in row
    assert len([name for name in row if "l2_at" in name]) == len(LEVELS)


def test_the_levels_of_flow_matching_are_quantiles_of_the_logit_normal(train_dit, tiny_pipeline):
    flags = ("--lpl_weight", 0, "--eval_steps", 1)
    (row,) = evaluations(train_dit(*flags, model=tiny_pipeline("StableDiffusion3"), steps=1))
    for level in (0.1, 0.3, 0.7, 0.9):
        sigma = torch.special.ndtri(torch.tensor(level)).sigmoid().item()
        sigma = math.ceil(1000 * sigma) / 1000  # of a thousand levels
        assert f"eval_l2_at_{3 * sigma / (1 - sigma):.3g}" in row  # shifted by 3, as its scheduler does
    assert len([name for name in row if "l2_at" in name]) == len(LEVELS)


def test_lpl_is_measured_before_it_begins_and_where_it_is_off(train):
    still = ("--learning_rate", 0, *THIRD)
    before, _ = evaluations(train(*LPL, *still, "--lpl_start_step", 2, name="later"))
    without, _ = evaluations(train("--lpl_weight", 0, *LPL[2:], *still, name="without"))
    now, _ = evaluations(train(*LPL, *still, name="now"))
    assert before == without == now and now["eval_lpl"] > 0


def test_balanced_weights_are_not_known_before_lpl_begins(train):
    flags = (*LPL, *THIRD, "--lpl_weighting", "balanced", "--lpl_start_step", 2, "--lpl_sigma_threshold", 20)
    before, after = evaluations(train(*flags))
    assert "eval_l2" in before and not [name for name in before if "lpl" in name]
    assert after["eval_lpl"] > 0


def test_the_loss_falls_on_images_that_are_learned(train, tmp_path):
    folder = build_photo_folder(tmp_path / "mine", n=4, size=64, seed=1)
    flags = ("--lpl_weight", 0, "--eval_data_dir", folder)
    data = {"data": ("--train_data_dir", folder)}
    (first,) = evaluations(train(*flags, "--eval_steps", 1, "--learning_rate", 0, steps=1, name="first", **data))
    (last,) = evaluations(train(*flags, "--eval_steps", 30, "--learning_rate", 5e-3, steps=30, name="last", **data))
    assert last["eval_l2"] < 0.8 * first["eval_l2"] and set(first) == set(last)


# The distances


def test_the_distances_are_those_of_what_the_stock_pipeline_draws(still, tiny_sd, photos, extractor, tmp_path):
    args = args_of(train_lpl_sd, tiny_sd, ("--train_data_dir", photos), tmp_path, *THIRD)
    images = sorted(held_out_ids(make_stream(args).held_out))
    texts = [json.loads(row)["text"] for row in (photos / "metadata.jsonl").read_text().splitlines()]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2, "height": 64, "width": 64}
    drawn = [
        pipe(texts[images[i % 3]], generator=torch.Generator().manual_seed(i), **settings).images[0] for i in range(5)
    ]
    there = [Image.open(photos / f"photo_{i:04d}.png").resize((64, 64), Image.LANCZOS) for i in images]
    see = load_extractor(str(extractor), "cpu")
    ours, theirs = (
        torch.cat([see(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).features for image in these])
        for these in (drawn, there)
    )
    row = evaluations(still)[0]
    expected = frechet_distance(moments(ours), moments(theirs))
    assert row[FRECHET] == pytest.approx(expected, rel=1e-3) and expected > 0.1
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert row[KERNEL] == pytest.approx(kernel_distances(ours, theirs, everything).item(), rel=1e-3)


def test_captions_are_drawn_in_turn_each_with_a_seed_of_its_own(train, photos, drawings, monkeypatch):
    asked, draw = [], Family.draw

    def watched(self, prompt, generator, **settings):
        asked.append((prompt, generator.initial_seed(), settings["num_inference_steps"], settings["guidance_scale"]))
        return draw(self, prompt, generator, **settings)

    monkeypatch.setattr(Family, "draw", watched)
    streams, make = [], train_lpl_sd.make_stream
    monkeypatch.setattr(train_lpl_sd, "make_stream", lambda args: streams.append(make(args)) or streams[0])
    train("--lpl_weight", 0, *drawings, "--eval_steps", 1, "--eval_share", 0.3, "--trigger_word", "sks", steps=2)
    texts = [json.loads(row)["text"] for row in (photos / "metadata.jsonl").read_text().splitlines()]
    texts = [f"sks, {texts[i]}" for i in held_out_ids(streams[0].held_out)]
    assert asked == 2 * [(texts[i % 3], i, 2, 2.0) for i in range(5)] and len(set(texts)) == 3


def test_drawings_are_from_the_average_weights(train, drawings):
    """Of a run that goes on from the average alone, the numbers are the same."""
    flags = ("--lpl_weight", 0, *THIRD, *drawings)
    moved = train(*flags, "--learning_rate", 0.01, "--use_ema", "--ema_decay", 0.5, name="moved")
    again = train(*flags, "--learning_rate", 0, model=moved, steps=2, name="again")
    found, expected = evaluations(moved)[1], evaluations(again)[0]
    assert {**found, "step": 2} == pytest.approx(expected, rel=1e-3)
    assert evaluations(moved)[0][FRECHET] != pytest.approx(found[FRECHET], rel=1e-2)


def test_class_labels_are_drawn(train_dit, tiny_pipeline, class_folders, drawings):
    output = train_dit(*THIRD, *drawings, model=tiny_pipeline("DiT"), data=("--train_data_dir", class_folders))
    (row,) = evaluations(output)
    assert row[FRECHET] > 0 and math.isfinite(row[KERNEL])


# Interruptions


def test_a_resumed_run_has_the_uninterrupted_ones_evaluations(train, drawings):
    flags = (*LPL, *THIRD, *drawings, "--eval_samples", 2, "--learning_rate", 1e-3, "--use_ema", "--ema_decay", 0.5)
    flags += ("--checkpointing_steps", 3)
    whole = train(*flags, steps=6, name="whole")
    train(*flags, steps=5, name="parts")  # it was at 4, too, which the resumed run is again
    parts = train(*flags, "--resume_from_checkpoint", "checkpoint-3", steps=6, name="parts")
    assert evaluations(parts) == evaluations(whole) and len(evaluations(whole)) == 3
    assert_same_weights(weights(parts), weights(whole))


def test_evaluating_may_change_when_a_run_goes_on(train, capsys):
    """What was found at the checkpoint's step is in the log that the checkpoint keeps."""
    train("--lpl_weight", 0, *THIRD, "--checkpointing_steps", 2, steps=2)
    flags = ("--eval_steps", 3, "--eval_share", 0.3, "--resume_from_checkpoint", "latest")
    output = train("--lpl_weight", 0, *flags)
    assert [row["step"] for row in evaluations(output)] == [2, 3]
    assert "Unlike the run to resume" in (said := capsys.readouterr().out) and "--eval" not in said


def test_a_signal_ends_the_drawings_and_the_run_goes_on_where_it_was(train, drawings, monkeypatch):
    flags = (*LPL, *THIRD, *drawings, "--eval_samples", 3, "--learning_rate", 1e-3, "--checkpointing_steps", 100)
    whole = train(*flags, name="whole")
    drawn, draw = [], StableDiffusionPipeline.__call__

    def interrupted(*args, **settings):
        drawn.append(1)
        return draw(*args, **settings)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupted)
    monkeypatch.setattr(interruption, "received", lambda: "SIGTERM" if len(drawn) >= 2 else None)
    parts = train(*flags, name="parts")
    assert len(drawn) == 2 and (parts / "checkpoint-3").is_dir()
    (row,) = evaluations(parts)
    expected = evaluations(whole)[0]
    assert row == {name: value for name, value in expected.items() if name not in (FRECHET, KERNEL)}
    monkeypatch.undo()
    train(*flags, "--resume_from_checkpoint", "latest", name="parts")
    assert evaluations(parts)[1:] == evaluations(whole)[1:]
    assert_same_weights(weights_of_result(parts), weights_of_result(whole))


def weights_of_result(output):
    return {name: value for name, value in weights(output).items() if "checkpoint" not in str(name[0])}


@pytest.mark.slow
def test_a_real_signal_in_the_middle_of_an_evaluation(tiny_sd, photos, extractor, tmp_path):
    output = tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos, "--output_dir", output]
    flags += ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 8, "--logging_steps", 1, "--seed", 0]
    flags += ["--report_to", "none", *THIRD, "--eval_samples", 400, "--eval_feature_extractor", extractor]
    said = open(tmp_path / "said", "w")
    words = [sys.executable, ROOT / "train_lpl_sd.py", *flags]
    process = subprocess.Popen([str(word) for word in words], stdout=said, stderr=said)
    try:
        while not (output / "train_log.jsonl").exists() or len(read_log(output)) < 2:
            assert process.poll() is None, (tmp_path / "said").read_text()[-2000:]
            time.sleep(0.05)
        time.sleep(1)  # 400 drawings take longer
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 1, (tmp_path / "said").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()
        said.close()
    (row,) = evaluations(output)
    assert row["step"] == 2 and FRECHET not in row
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]


# Several processes


ENGINES = {"DDP": "ddp", "FSDP2": "fsdp2_full", "ZeRO-2": "zero2", "ZeRO-3": "zero3_offload"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", [1, 2])
def test_two_processes_find_what_one_finds(tiny_sd, photos, still, drawings, tmp_path, engine, batch):
    """With batches of 1, three images in two and one; with 2, the second process has one and nothing else."""
    if engine.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--mixed_precision", "no"]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{ENGINES[engine]}.yaml", "--main_process_port", 0]
    command += [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "FSDP2" else []
    command += [train_lpl_sd.__file__, "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos]
    command += ["--output_dir", tmp_path / "two", "--report_to", "none", "--resolution", 64, "--max_train_steps", 4]
    command += ["--train_batch_size", batch, "--logging_steps", 1, "--seed", 0, *STILL, *THIRD, *drawings]
    device = {"DDP": {"ACCELERATE_USE_CPU": "true"}, "FSDP2": {}}.get(engine, {"DS_ACCELERATOR": "cpu"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **device}
    with open(tmp_path / "said", "w") as said:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        try:
            assert process.wait(timeout=110) == 0, (tmp_path / "said").read_text()[-3000:]
        finally:
            if process.poll() is None:  # on which the launcher ends what it has started
                process.terminate()
                process.wait()
    assert_same_numbers(evaluations(tmp_path / "two"), evaluations(still), rel=1e-3)


# Other sources of images


def test_a_stream_is_evaluated_on_other_images(train, photos, tmp_path, drawings, still):
    other = build_photo_folder(tmp_path / "other", n=3, size=72, seed=1)
    data = (*write_dataset(tmp_path / "data", photos), "--streaming")
    output = train(*LPL, "--eval_steps", 2, "--eval_data_dir", other, *drawings, data=data)
    first, second = evaluations(output)
    assert first.keys() == second.keys() == evaluations(still)[0].keys()


def test_classes_held_out_have_the_numbers_that_they_have_in_training(tiny_pipeline, class_folders, tmp_path):
    """From scratch classes are numbered in their order, and a folder may have a part of them."""
    train = tmp_path / "train"
    for k, name in enumerate(("apples", "boats", "cats")):
        (build_photo_folder(train / name, n=3, size=64, seed=k) / "metadata.jsonl").unlink()
    other = tmp_path / "other"
    (build_photo_folder(other / "cats", n=2, size=64, seed=9) / "metadata.jsonl").unlink()
    flags = ("--transformer_config", ROOT / "transformer_configs" / "dit-tiny.json", "--eval_steps", 1)
    flags += ("--pretrained_vae_model_name_or_path", tiny_pipeline("DiT"), "--eval_data_dir", other)
    args = args_of(train_lpl_dit, None, ("--train_data_dir", train), tmp_path / "out", *flags)
    stream = make_stream(args)
    assert held_out_batch(stream.held_out, [0, 1])["captions"] == [2, 2]
    assert {args.id2label[i] for i in range(3)} == {"apples", "boats", "cats"}


@pytest.mark.slow
def test_a_dry_run_takes_the_flags_and_loads_no_extractor(train, capsys):
    """A Hub id that is in no cache: with the Hub out of reach, to load it would fail."""
    output = train(*THIRD, "--eval_samples", 4, "--eval_feature_extractor", "nobody/nothing", "--dry_run")
    assert "Nothing was trained or written." in capsys.readouterr().out and not output.exists()


# Mistakes


@pytest.fixture(scope="session")
def known_flags():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lpl_sd, "parse_and_check", lambda parser, argv: parser)
        return set(train_lpl_sd.parse_args()._option_string_actions)


@pytest.fixture
def parse(tiny_sd, photos, tmp_path):
    def run(*words, data=("--train_data_dir", photos)):
        return args_of(train_lpl_sd, tiny_sd, data, tmp_path / "out", *words)

    return run


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--eval_samples", 8], "--eval_samples has no effect without --eval_steps: add it, or leave --eval_samples"),
        (["--eval_share", 0.2], "--eval_share has no effect without --eval_steps: add it"),
        (["--eval_data_dir", "."], "--eval_data_dir has no effect without --eval_steps: add it"),
        (["--eval_feature_extractor", "inception"], "--eval_feature_extractor has no effect without --eval_steps"),
        (["--eval_steps", 2, "--eval_feature_extractor", "a/b"], "has no effect without --eval_samples: add it"),
        (["--eval_steps", 0], "--eval_steps 0 must be at least 1"),
        (["--eval_steps", 2, "--eval_share", 0], "--eval_share 0.0 must be between 0 and 1"),
        (["--eval_steps", 2, "--eval_share", 1], "--eval_share 1.0 must be between 0 and 1"),
        (["--eval_steps", 2, "--eval_samples", 1], "--eval_samples 1 must be at least 2, or 0 for none"),
        (["--eval_steps", 2, "--eval_samples", -1], "--eval_samples -1 must be at least 2, or 0 for none"),
        (["--eval_steps", 2, "--eval_data_dir", "nowhere"], "--eval_data_dir nowhere is no folder: give one"),
        (["--eval_steps", 2, "--eval_data_dir", ""], "--eval_data_dir"),
        (["--eval_steps", 2, "--eval_data_dir", ".", "--eval_share", 0.2], "--eval_share has no effect with"),
        (
            ["--eval_steps", 2, "--eval_samples", 4, "--eval_feature_extractor", "gone"],
            "--eval_feature_extractor gone",
        ),
    ],
)
def test_wrong_flags(refuse, words, sentence):
    assert sentence in refuse(*words)


def test_of_a_stream_nothing_can_be_held_out(refuse):
    data = ("--dataset_name", "owner/name", "--streaming", "--max_train_steps", 4)
    assert "--eval_steps: of a stream no images can be held out: give some in --eval_data_dir" in refuse(
        "--eval_steps", 2, data=data
    )


def test_inception_needs_its_package(refuse, monkeypatch):
    monkeypatch.setattr("features.inception_available", lambda: False)
    message = refuse("--eval_steps", 2, "--eval_samples", 4, "--eval_feature_extractor", "inception")
    assert "--eval_feature_extractor inception needs a package that is not installed" in message


def test_an_extractor_that_is_none(train, tmp_path):
    """Its config.json tells of nothing that can be loaded: known before anything is trained."""
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="--eval_feature_extractor") as error:
        train(*THIRD, "--eval_samples", 4, "--eval_feature_extractor", tmp_path / "none")
    assert " --feature_extractor" not in str(error.value) and not (tmp_path / "out").exists()


def no_captions(folder):
    (build_photo_folder(folder, n=3, size=64) / "metadata.jsonl").unlink()


def one_cut_off(folder):
    path = build_photo_folder(folder, n=3, size=64) / "photo_0001.png"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "make, sentence",
    [
        (no_captions, "--eval_data_dir"),
        (lambda folder: folder.mkdir(), "--eval_data_dir .* contains no images"),
        (one_cut_off, "photo_0001.png"),
    ],
)
def test_other_images_that_will_not_do(parse, tmp_path, make, sentence):
    make(tmp_path / "other")
    with pytest.raises(UserError, match=sentence) as error:
        make_stream(parse("--eval_steps", 2, "--eval_data_dir", tmp_path / "other"))
    assert "--train_data_dir" not in str(error.value)


def test_with_an_instance_prompt_other_images_need_no_captions(parse, tmp_path):
    no_captions(tmp_path / "other")
    flags = ("--eval_steps", 2, "--eval_data_dir", tmp_path / "other", "--instance_prompt", "a dog")
    stream = make_stream(parse(*flags, "--trigger_word", "sks"))
    assert held_out_batch(stream.held_out, [0])["captions"] == ["sks, a dog"]


def test_a_share_that_leaves_nothing(parse):
    with pytest.raises(UserError, match="--eval_share 0.99 of 10 images leaves none to train on: add images."):
        make_stream(parse("--eval_steps", 2, "--eval_share", 0.99))


def test_drawings_need_two_images_to_be_compared_with(train, drawings, tmp_path):
    with pytest.raises(UserError, match="--eval_samples.*2 images.*--eval_share") as error:
        train("--lpl_weight", 0, "--eval_steps", 2, *drawings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_unknown_classes(tiny_pipeline, class_folders, tmp_path):
    other = tmp_path / "other"
    for name in ("volcano", "unicorn"):
        (build_photo_folder(other / name, n=2, size=64) / "metadata.jsonl").unlink()
    words = ("--eval_steps", 2, "--eval_data_dir", other)
    args = args_of(train_lpl_dit, tiny_pipeline("DiT"), ("--train_data_dir", class_folders), tmp_path / "out", *words)
    with pytest.raises(UserError, match="unicorn"):
        make_stream(args)


# What reads the log


def test_the_model_card_shows_training_alone(still, photos, tmp_path):
    args = args_of(train_lpl_sd, still, ("--train_data_dir", photos), tmp_path, *STILL)
    log = model_card.read_log(still)
    assert [row["step"] for row in log] == [1, 2, 3, 4] and not [name for row in log for name in row if "eval" in name]
    assert model_card.loss_terms(log) == ["l2", "lpl"]
    assert model_card.draw_losses(log, tmp_path / "loss.png", args)
    assert Image.open(tmp_path / "loss.png").size == (1000, 350)
