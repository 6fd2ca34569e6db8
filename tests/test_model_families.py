"""Conventions of Stable Diffusion, compared with the pipeline's own schedulers and prompt encoding."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from tiny_models import build_tiny_sd, build_tiny_vae

import train_lpl_sd
from lpl_utils import predict_z0
from model_families import StableDiffusion
from noise import add_noise, sample_noise, training_target


def load_family(model, photos, output, *words):
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--resolution", 64]
    args = train_lpl_sd.parse_args([str(word) for word in (*flags, "--output_dir", output, *words)])
    return StableDiffusion(args, torch.device("cpu"), torch.float32, torch.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_target_and_estimate_are_those_of_the_scheduler(tmp_path, photos, prediction_type):
    model = build_tiny_sd(tmp_path / "model", prediction_type=prediction_type)
    family = load_family(model, photos, tmp_path / "out")
    assert family.prediction_type == prediction_type
    torch.manual_seed(0)
    latents, noise, model_pred = torch.randn(3, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 13, 500, 999])
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    alpha, sigma = family.noise_levels(timesteps)
    noisy = add_noise(latents, noise, alpha, sigma)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))

    target = training_target(latents, noise, alpha, sigma, prediction_type)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, timesteps)}
    torch.testing.assert_close(target, expected[prediction_type])

    z0_hat = predict_z0(model_pred, noisy, alpha, sigma, prediction_type)
    ddim = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    ddim.set_timesteps(1000)
    for i, timestep in enumerate(timesteps):
        step = ddim.step(model_pred[i], timestep, noisy[i]).pred_original_sample
        torch.testing.assert_close(z0_hat[i], step, rtol=1e-4, atol=1e-4)


def test_the_unet_is_called_as_the_pipeline_calls_it(tiny_sd, photos, tmp_path):
    family = load_family(tiny_sd, photos, tmp_path / "out")
    calls = []
    family.denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, unet=family.denoiser)
    pipe("a red fox", num_inference_steps=2, guidance_scale=1.0, height=64, width=64)
    (latents, timestep), theirs = calls[0]
    alpha, _ = family.noise_levels(timestep.cpu().reshape(1))
    assert alpha.item() == pytest.approx(pipe.scheduler.alphas_cumprod[timestep].sqrt().item())
    family.predict(family.denoiser, latents, timestep.reshape(1), family.encode_prompts(["a red fox"]))
    (ours_latents,), ours = calls[-1]
    assert torch.equal(ours_latents, latents) and ours["timestep"].item() == timestep.item()
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_latents_are_scaled_as_the_pipeline_unscales_them(photos, tmp_path):
    vae = build_tiny_vae(shift_factor=0.3)
    family = load_family(build_tiny_sd(tmp_path / "model", vae=vae), photos, tmp_path / "out")
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = family.latents({"pixel_values": pixels}, generators)
    posterior = vae.encode(pixels).latent_dist
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = (posterior.mean + posterior.std * torch.cat(noise) - 0.3) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    image = vae.decode(latents / vae.config.scaling_factor + 0.3).sample[0]
    decoded = family.decode_images(latents)[0]
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert (expected == decoded).all()


def test_noise_belongs_to_the_sample(tiny_sd):
    latents = torch.zeros(3, 4, 8, 8)
    noise = sample_noise(latents, [torch.Generator().manual_seed(i) for i in (5, 6, 7)])
    alone = sample_noise(latents[:1], [torch.Generator().manual_seed(6)])
    assert torch.equal(noise[1:2], alone)
    generators = [torch.Generator().manual_seed(i) for i in range(3000)]
    means = sample_noise(torch.zeros(3000, 1, 8, 8), generators, offset=0.5).mean((2, 3))
    # Variance of a sample's mean: 1/64 from the pixels, 0.25 from the offset.
    assert means.var().item() == pytest.approx(0.25 + 1 / 64, rel=0.1)


def test_without_lpl_the_decoder_stays_off_the_device(tiny_sd, photos, tmp_path):
    placed = load_family(tiny_sd, photos, tmp_path / "out", "--lpl_weight", "0").placed
    assert placed == {"encoder": True, "decoder": False, "text_encoders": True}
