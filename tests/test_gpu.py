"""What only a GPU can show; skipped elsewhere."""

import pytest
import torch
from conftest import read_log
from tiny_models import build_tiny_vae

from latent_lpips import LatentVGG
from lpl_utils import LatentPerceptualLoss, lpl_term
from objectives import RGB, ELatentLPIPS, Prediction, gated_losses


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_term_never_waits_for_the_device():
    lpl = LatentPerceptualLoss(build_tiny_vae().cuda())
    model_pred, z_t, z0 = torch.randn(3, 4, 4, 8, 8, device="cuda")
    alpha, sigma = torch.tensor([1.0, 0.8, 0.6, 0.1]), torch.tensor([0.0, 0.6, 0.8, 0.99])

    def term():
        loss, _ = lpl_term(lpl, model_pred.requires_grad_(), z_t, z0, alpha, sigma, "epsilon", tau=3, max_samples=2)
        loss.backward()

    term()  # libraries may synchronise while they set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        term()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_other_objectives_never_wait_for_the_device():
    z0_hat, z0, eps_hat, eps = torch.randn(4, 3, 4, 8, 8, device="cuda")
    level = torch.tensor([0.6, 0.8, 0.5])
    prediction = Prediction(z0_hat.requires_grad_(), z0, eps_hat, eps, level, level, torch.tensor([10, 20, 30]), {})
    vae, network = build_tiny_vae().cuda(), LatentVGG(channels=(4, 4, 8, 8, 8)).requires_grad_(False).cuda()
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    passing = torch.tensor([True, False, True])
    objectives = [RGB(lambda z: vae.decode(z).sample), ELatentLPIPS(network, ["blit", "geometric", "color", "cutout"])]

    def terms():
        sum(gated_losses(each, prediction, passing, generators).sum() for each in objectives).backward()

    terms()  # libraries may synchronise while they set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("lora", [(), ("--use_lora",)], ids=["full", "lora"])
def test_the_other_objectives_train_in_half_precision(train, lora, precision):
    flags = ("--mixed_precision", precision, "--vae_dtype", precision, "--lpl_weight", 0, "--gradient_checkpointing")
    log = read_log(train(*flags, *lora, "--self_perceptual_weight", 1, "--rgb_weight", 1))
    assert all(row["self_perceptual"] > 0 and row["rgb"] > 0 for row in log)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_every_precision_trains_validates_and_resumes(train, precision):
    flags = ("--mixed_precision", precision, "--vae_dtype", precision if precision != "no" else "fp32")
    flags += ("--lpl_sigma_threshold", 20, "--use_ema", "--checkpointing_steps", 2, "--validation_prompts", "a fox")
    train(*flags, steps=2)
    log = read_log(train(*flags, "--resume_from_checkpoint", "latest", steps=4))
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(0 < row["lpl"] < 10 for row in log if row["gated_share"])


def test_values_are_those_of_the_cpu():
    z0_hat, z0 = torch.randn(2, 2, 4, 8, 8)
    on_cpu = LatentPerceptualLoss(build_tiny_vae())(z0_hat, z0)[0]
    on_gpu = LatentPerceptualLoss(build_tiny_vae().cuda())(z0_hat.cuda(), z0.cuda())[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["DiT", "StableDiffusion3", "PixArtSigma", "Sana", "Flux"])
def test_transformers_train_in_half_precision(train_dit, tiny_pipeline, photos, class_folders, family, precision):
    data = ("--train_data_dir", class_folders if family == "DiT" else photos)
    flags = ("--mixed_precision", precision, "--use_lora", "--offload", "--lpl_sigma_threshold", 80)
    flags += ("--validation_prompt", "volcano", "--num_validation_images", 1, "--validation_inference_steps", 3)
    output = train_dit(*flags, model=tiny_pipeline(family), data=data)
    assert all(0 < row["lpl"] < 10 for row in read_log(output))
    assert (output / "samples" / "final.png").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_trains_and_draws(train_dit, tiny_pipeline, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "bnb.json").write_text(f'{{"load_in_{bits}bit": true}}')
    flags = ("--use_lora", "--bnb_quantization_config_path", tmp_path / "bnb.json", "--mixed_precision", "bf16")
    flags += ("--validation_prompt", "a fox", "--num_validation_images", 1, "--lpl_sigma_threshold", 80)
    output = train_dit(*flags, "--validation_inference_steps", 3, model=tiny_pipeline("Flux"))
    assert all(0 < row["lpl"] < 10 for row in read_log(output))
    assert (output / "samples" / "final.png").exists()
