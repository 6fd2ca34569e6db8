"""Kolors, which has SDXL's UNet and another text encoder, in train_lpl_sd.py."""

import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import KolorsPipeline
from PIL import Image
from tiny_kolors import build_tiny_kolors

import train_lpl_sd
from arguments import UserError
from model_families import find_family


PROMPTS = ["a red fox", "two boats at sea, in the rain"]
LPL = ("--lpl_sigma_threshold", 80)
DRAW = ("--validation_prompt", PROMPTS[0], "--num_validation_images", 1, "--validation_steps", 2)
DRAW += ("--validation_inference_steps", 3)


@pytest.fixture(scope="module")
def kolors(tmp_path_factory):
    return build_tiny_kolors(tmp_path_factory.mktemp("models") / "kolors")


def flatten(arguments):
    nested = arguments.get("added_cond_kwargs") or {}
    return {name: value for name, value in {**arguments, **nested}.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("captions, half", [(PROMPTS, slice(2, 4)), (["", ""], slice(0, 2))])
@torch.no_grad()
def test_the_unet_is_called_as_the_pipeline_calls_it(kolors, photos, tmp_path, captions, half):
    flags = ["--pretrained_model_name_or_path", kolors, "--train_data_dir", photos, "--output_dir", tmp_path / "out"]
    args = train_lpl_sd.parse_args([str(word) for word in (*flags, "--resolution", 64)])
    family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    pipe = KolorsPipeline.from_pretrained(kolors, unet=family.denoiser)
    pipe.set_progress_bar_config(disable=True)
    sizes = {"original_size": (72, 80), "crops_coords_top_left": (3, 5), "target_size": (64, 64)}
    forward = family.denoiser.forward
    with mock.patch.object(family.denoiser, "forward", wraps=forward) as spy:
        pipe(PROMPTS, height=64, width=64, num_inference_steps=2, guidance_scale=2.0, **sizes)
        (inputs, timestep), theirs = spy.call_args_list[0]
        batch = {"captions": captions, "original_sizes": torch.tensor([[72, 80]] * 2)}
        batch["target_sizes"] = torch.tensor([[64, 64]] * 2)
        conditioning = family.conditioning({**batch, "crop_top_lefts": torch.tensor([[3, 5]] * 2)})
        family.predict(family.denoiser, inputs[half], timestep.long().repeat(2), conditioning)
    (latents,), ours = spy.call_args
    assert torch.equal(latents, inputs[half]) and ours.pop("timestep").tolist() == [timestep] * 2
    ours, theirs = flatten(ours), flatten(theirs)
    assert set(ours) == set(theirs) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value[half], rtol=1e-5, atol=1e-6)
    # 1100 noise levels, those of its own scheduler
    assert len(family.timesteps) == 1100
    torch.testing.assert_close(family.alphas, pipe.scheduler.alphas_cumprod.sqrt())


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(("--learning_rate", 1e-3), marks=pytest.mark.slow),
        ("--use_lora", "--rank", 2, "--lora_alpha", 8, "--learning_rate", 0.05),
    ],
)
def test_what_the_stock_pipeline_draws_is_what_was_trained(train, kolors, kind):
    caches = ("--cache_text_embeddings", "--cache_latents", "--center_crop")
    output = train(*kind, *LPL, *DRAW, *caches, model=kolors, steps=2)
    assert all(row["lpl"] > 0 for row in read_log(output))
    if "--use_lora" in kind:
        pipe = KolorsPipeline.from_pretrained(kolors)
        base = draw(pipe)
        pipe.load_lora_weights(output)
    else:
        base, pipe = draw(KolorsPipeline.from_pretrained(kolors)), KolorsPipeline.from_pretrained(output)
    in_training, final = (np.asarray(Image.open(output / "samples" / f"{name}.png"), int) for name in
                          ("step-000002", "final"))  # fmt: skip
    assert np.abs(base - in_training).max() > 8
    assert np.abs(draw(pipe) - in_training).max() <= 1 and np.abs(final - in_training).max() <= 1


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 7.5}
    return np.asarray(pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings).images[0], int)


def test_the_dry_run_needs_no_weights_of_the_text_encoder(train, kolors, capsys):
    train("--dry_run", "--use_lora", "--lpl_weight", 0, model=kolors)
    assert "KolorsPipeline" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.model", "text_encoder/config.json"])
def test_an_incomplete_folder(kolors, photos, tmp_path, capsys, file):
    model = shutil.copytree(kolors, tmp_path / "model")
    (model / file).unlink()
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        train_lpl_sd.parse_args([str(word) for word in flags])
    assert f"there is no {model / file}; give a Hub id or the folder of a saved model." in capsys.readouterr().err


def test_weights_of_one_variant_alone(train, kolors, tmp_path):
    model = shutil.copytree(kolors, tmp_path / "model")
    for path in [*model.rglob("*.safetensors")]:
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    with pytest.raises(UserError, match="can't be loaded .*, or --variant fp16 if it has weights of that kind alone"):
        train("--use_lora", model=model, steps=1)
    train("--use_lora", "--variant", "fp16", *LPL, model=model, steps=1)


def test_its_text_encoder_is_not_trained(kolors, photos, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", kolors, "--train_data_dir", photos, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        train_lpl_sd.parse_args([str(word) for word in (*flags, "--use_lora", "--train_text_encoder")])
    assert "--train_text_encoder: that of Kolors" in capsys.readouterr().err
