"""What the project promises of full-size models, counted."""

import pytest
from dry_runs import count, readme_commands, write_model


GIB = 2**30
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CACHED = ("--mixed_precision", "bf16", "--cache_latents", "--center_crop", "--cache_text_embeddings")


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
