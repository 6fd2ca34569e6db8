"""Samplers against the probability-flow ODE of Gaussian data, whose solution is known, and against scipy's."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from marks import slow_but
from scipy.integrate import solve_ivp
from tiny_models import build_tiny_sd

from samplers import make_sampler


MEAN, STD = 0.7, 0.5  # of the data, a Gaussian
KINDS = ("epsilon", "v_prediction", "sample")
SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
NOISE = torch.tensor([-1.5, -0.3, 0.4, 2.0], dtype=torch.float64)


def perfect(kind, latents, alpha, sigma):
    """What a perfect model predicts of z = alpha z_0 + sigma eps: expectations given z, in closed form."""
    variance = alpha**2 * STD**2 + sigma**2
    image = MEAN + alpha * STD**2 / variance * (latents - alpha * MEAN)
    noise = sigma / variance * (latents - alpha * MEAN)
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * image,
        "sample": image,
        "flow_prediction": noise - image,
    }[kind]


def exact(latents, alpha, sigma, final_alpha=1.0, final_sigma=0.0):
    """Where the ODE takes z: as many standard deviations from the mean as it was."""
    deviation = math.hypot(alpha * STD, sigma)
    return final_alpha * MEAN + math.hypot(final_alpha * STD, final_sigma) * (latents - alpha * MEAN) / deviation


def draw(scheduler, kind, steps, noise_level, dtype=torch.float64):
    """z at the end, and the timesteps of all calls; noise_level: timestep -> (alpha, sigma)."""
    scheduler.set_timesteps(steps)
    latents, calls = NOISE.to(dtype), []
    for timestep in scheduler.timesteps:
        calls.append(float(timestep))
        output = perfect(kind, latents.double(), *noise_level(float(timestep)))
        latents = scheduler.step(output.to(dtype), timestep, latents, return_dict=False)[0]
    return latents.double(), calls


def flow_level(timestep):
    return 1 - timestep / 1000, timestep / 1000


def diffusion_level(scheduler):
    """Between two timesteps of training the angle of (alpha, sigma) is in proportion."""
    angles = np.arccos(scheduler.alphas_cumprod.double().sqrt().numpy())

    def level(timestep):
        angle = np.interp(timestep, np.arange(1000), angles)
        return math.cos(angle), math.sin(angle)

    return level


def diffusion_scheduler(kind, **config):
    return DDIMScheduler(**SD_NOISE, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, **config)


# Runge-Kutta


def test_the_fixture_is_the_solution_of_the_flow_that_scipy_finds():
    def velocity(sigma, z):
        return perfect("flow_prediction", z, 1 - sigma, sigma)

    found = solve_ivp(velocity, (1.0, 0.0), NOISE.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(exact(NOISE, 0.0, 1.0).numpy(), found, rtol=1e-8)


def flow_error(name, steps, shift=1.0):
    scheduler, _ = make_sampler(FlowMatchEulerDiscreteScheduler(shift=shift), name)
    found, _ = draw(scheduler, "flow_prediction", steps, flow_level)
    return (found - exact(NOISE, 0.0, 1.0)).abs().max().item()


@pytest.mark.parametrize(("name", "least", "most"), [("rk4", 3.7, 5.5), ("auto", 0.8, 1.2)])
def test_runge_kutta_is_of_fourth_order_for_flow_matching_and_euler_of_first(name, least, most):
    errors = [flow_error(name, steps, shift=3.0) for steps in (10, 20, 40)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (orders > least).all() and (orders < most).all()


def test_runge_kutta_is_nearer_to_the_solution_at_equal_work():
    assert flow_error("rk4", 5) < 1e-4 < 1e-2 < flow_error("auto", 20)


@pytest.mark.parametrize("kind", KINDS)
def test_runge_kutta_solves_the_ode_of_diffusion(kind):
    own = diffusion_scheduler(kind)
    level = diffusion_level(own)
    target = exact(NOISE, *level(999), *level(0))
    errors = {}
    for name in ("rk4", "auto"):
        for steps in (5, 10, 20, 40):
            scheduler, _ = make_sampler(own, name)
            found, _ = draw(scheduler, kind, steps, level)
            errors[name, steps] = (found - target).abs().max().item()
    assert errors["rk4", 10] < errors["auto", 40] / 10, "better at equal work: four times as many calls a step"
    assert errors["rk4", 40] < 1e-3
    assert errors["rk4", 40] < errors["rk4", 20] < errors["rk4", 10] < errors["rk4", 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_diffusion_is_the_classical_one_in_the_angle(kind):
    """The textbook's method by hand, for dz/dphi with z = cos(phi) z_0 + sin(phi) eps."""
    own = diffusion_scheduler(kind)
    angles = torch.arccos(own.alphas_cumprod.double().sqrt())

    def slope(phi, z):
        return perfect("v_prediction", z, math.cos(phi), math.sin(phi))

    def model(t, z):
        return perfect(kind, z, *diffusion_level(own)(t))

    scheduler, _ = make_sampler(own, "rk4")
    scheduler.set_timesteps(4)
    begin, end = angles[999].item(), angles[749].item()
    h, z = end - begin, NOISE
    k1 = slope(begin, z)
    k2 = slope(begin + h / 2, z + h / 2 * k1)
    k3 = slope(begin + h / 2, z + h / 2 * k2)
    k4 = slope(end, z + h * k3)
    expected = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    found = z
    for timestep in scheduler.timesteps[:4]:
        found = scheduler.step(model(float(timestep), found), timestep, found).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_starts_from_pure_noise_without_a_division_by_zero():
    own = diffusion_scheduler("v_prediction", rescale_betas_zero_snr=True)
    scheduler, _ = make_sampler(own, "rk4")
    level = diffusion_level(scheduler)
    found, calls = draw(scheduler, "v_prediction", 20, level)
    assert calls[0] == 999 and level(999)[0] < 1e-5
    torch.testing.assert_close(found, exact(NOISE, *level(999), *level(0)), atol=2e-3, rtol=0)


def test_a_grid_with_more_than_one_point_below_the_least_trained_level_is_harmless():
    """Z-Image's pipeline asks for a grid that ends at no noise, before the end that every grid gets."""
    own = FlowMatchEulerDiscreteScheduler()
    own.sigma_min = 0.0
    scheduler, _ = make_sampler(own, "rk4")
    scheduler.sigma_min = 0.0
    found, calls = draw(scheduler, "flow_prediction", 20, flow_level)
    assert len(calls) == 80
    torch.testing.assert_close(found, exact(NOISE, 0.0, 1.0), atol=2e-3, rtol=0)


def test_samples_keep_the_models_precision_and_a_second_drawing_begins_anew():
    scheduler, _ = make_sampler(FlowMatchEulerDiscreteScheduler(), "rk4")
    first, _ = draw(scheduler, "flow_prediction", 3, flow_level, torch.float32)
    again, _ = draw(scheduler, "flow_prediction", 3, flow_level, torch.float32)
    assert torch.equal(first, again)
    scheduler.set_timesteps(1)
    half = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    assert scheduler.step(half, scheduler.timesteps[0], half).prev_sample.dtype == torch.bfloat16


# In a pipeline


@pytest.fixture(scope="module")
def pipelines(tiny_sd, tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")

    def find(name):
        if name == "SD":
            return tiny_sd
        if name in KINDS:
            return build_tiny_sd(folder / name, prediction_type=name)
        return tiny_pipeline(name)

    return find


FAST = ("SD", "v_prediction", "DiT", "Sana")
ALL = (*FAST, "sample", "StableDiffusion3", "PixArtSigma", "Flux", "Flux2Klein", "Chroma", "QwenImage", "ZImage")
ALL += ("Lumina2", "AuraFlow", "HunyuanDiT", "PixArtAlpha")


@pytest.mark.parametrize("name", slow_but(FAST, ALL))
def test_a_pipeline_calls_its_model_four_times_a_step(pipelines, name):
    pipe = DiffusionPipeline.from_pretrained(pipelines(name))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler, title = make_sampler(pipe.scheduler, "rk4")
    model, levels = getattr(pipe, "unet", None) or pipe.transformer, []

    def step(*words, **settings):
        levels.append(float(words[1]))
        return original(*words, **settings)

    original, pipe.scheduler.step = pipe.scheduler.step, step
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    text = {"class_labels": [207]} if name == "DiT" else {"prompt": "a fox", "height": 64, "width": 64}
    binned = ("Sana", "PixArtSigma", "PixArtAlpha", "HunyuanDiT")
    text |= {"use_resolution_binning": False} if name in binned else {}
    image = pipe(**text, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert np.isfinite(image).all() and np.std(image) > 0
    guided = len(calls) // 12  # some call the model apart for the prompt and without it
    assert title == "RK4" and len(levels) == 12 and len(calls) == 12 * guided and guided in (1, 2)
    assert all(first >= second for first, second in zip(levels, levels[1:]))  # from noise to image


# Others


@pytest.mark.parametrize(
    "own",
    [
        PNDMScheduler(**SD_NOISE, skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(**SD_NOISE, prediction_type="v_prediction"),
        DDPMScheduler(**SD_NOISE, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(**SD_NOISE, prediction_type="epsilon"),
        diffusion_scheduler("sample"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_diffusion_is_sampled_by_ddim_from_the_last_trained_timestep(own):
    scheduler, title = make_sampler(own, "auto")
    assert type(scheduler) is DDIMScheduler and title == "DDIM"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert scheduler.config.prediction_type == own.config.prediction_type
    torch.testing.assert_close(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding


def test_ddim_is_diffusers_own_without_clipping():
    """A step by hand: the latents here go far beyond 1, where clipping would cut them."""
    own = PNDMScheduler(**SD_NOISE)
    scheduler, _ = make_sampler(own, "auto")
    scheduler.set_timesteps(2)
    latents, noise = 30 * NOISE, NOISE.flip(0)
    found = scheduler.step(noise, scheduler.timesteps[0], latents).prev_sample
    now, then = own.alphas_cumprod[999].double(), own.alphas_cumprod[499].double()
    image = (latents - (1 - now).sqrt() * noise) / now.sqrt()
    assert image.abs().max() > 100
    torch.testing.assert_close(found, then.sqrt() * image + (1 - then).sqrt() * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["auto", "rk4"])
def test_zero_terminal_snr_and_the_kind_of_prediction_stay(name):
    own = diffusion_scheduler("v_prediction", rescale_betas_zero_snr=True)
    scheduler, _ = make_sampler(own, name)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod) and own.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("name", ["auto", "rk4"])
def test_flow_matching_keeps_its_shift_and_its_dynamic_shift(name):
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler, title = make_sampler(static, name)
    scheduler.set_timesteps(4)
    static.set_timesteps(4)
    assert title == {"auto": "Euler", "rk4": "RK4"}[name]
    torch.testing.assert_close(scheduler.sigmas, static.sigmas)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler, _ = make_sampler(dynamic, name)
    for each in (scheduler, dynamic):
        each.set_timesteps(4, mu=0.8)
    torch.testing.assert_close(scheduler.sigmas, dynamic.sigmas)


def test_flow_matching_is_not_sampled_with_noise():
    own = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert not make_sampler(own, "auto")[0].config.stochastic_sampling


@pytest.mark.parametrize("name", ["auto", "rk4"])
def test_the_flow_shift_of_sanas_scheduler_is_kept(name):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler, _ = make_sampler(DPMSolverMultistepScheduler(**flow), name)
    like = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    like.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, like.sigmas)
    assert scheduler.sigmas[1] > 0.85  # 0.75 without the shift


def test_a_pipelines_own_sampler_is_left_as_it_is():
    own = PNDMScheduler(**SD_NOISE)
    assert make_sampler(own, "pipeline") == (own, "PNDMScheduler")
