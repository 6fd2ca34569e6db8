"""What the project promises of full-size models, counted."""

import diffusers
import pytest
import torch
from dry_runs import PIPELINES, count, readme_commands, write_model


GIB = 2**30
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CACHED = ("--mixed_precision", "bf16", "--cache_latents", "--center_crop", "--cache_text_embeddings")


@pytest.mark.parametrize(
    "model, part, parameters",
    [  # as the published weights' files have them
        ("black-forest-labs/FLUX.2-klein-base-4B", "transformer", 3_875_544_576),
        ("black-forest-labs/FLUX.2-klein-base-4B", "vae", 84_046_115),
        ("Qwen/Qwen-Image", "transformer", 20_430_401_088),
        ("Qwen/Qwen-Image", "vae", 126_892_531),
        ("Tongyi-MAI/Z-Image", "transformer", 6_154_908_736),
    ],
)
def test_models_have_the_size_of_the_published_ones(model, part, parameters):
    class_name, config = PIPELINES[model][part]
    with torch.device("meta"):
        built = getattr(diffusers, class_name)(**config)
    assert sum(p.numel() for p in built.parameters()) == parameters


@pytest.mark.slow
def test_sdxl_lora_at_1024_fits_into_20_gib(photos, tmp_path):
    model, flags = readme_commands()["SDXL LoRA on 24 GB"]
    n = count(write_model(tmp_path, model), photos, *flags)
    assert n["peak"] <= 20 * GIB
    assert n["peak"] - n["peak_l2"] <= 8 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--gradient_checkpointing",), ()], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("batch", [2, 8])
def test_lpl_adds_at_most_8_gib_to_sdxl_at_1024(photos, tmp_path, batch, flags):
    flags += ("--lpl_sigma_threshold", 20, "--train_batch_size", batch)
    n = count(write_model(tmp_path, SDXL), photos, *CACHED, *flags)
    assert 0 <= n["peak"] - n["peak_l2"] <= 8 * GIB
