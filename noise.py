"""How latents are noised: z_t, its target, the noise levels of a schedule and how often each of them is drawn.

Shapes: B batch, C latent channels, h x w latent positions, T noise levels.
"""

import math

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


def add_noise(latents, noise, alpha, sigma):
    """z_t = alpha z_0 + sigma eps: `[B, C, h, w]` each, alpha and sigma `[B]`."""
    alpha, sigma = (s.to(latents, non_blocking=True).view(-1, 1, 1, 1) for s in (alpha, sigma))
    return alpha * latents + sigma * noise


def training_target(latents, noise, alpha, sigma, prediction_type):
    """What the denoiser should output: eps, v = alpha eps - sigma z_0, z_0, or (flow matching) eps - z_0."""
    alpha, sigma = (s.to(latents, non_blocking=True).view(-1, 1, 1, 1) for s in (alpha, sigma))
    return {
        "epsilon": lambda: noise,
        "v_prediction": lambda: alpha * noise - sigma * latents,
        "sample": lambda: latents,
        "flow_prediction": lambda: noise - latents,
    }[prediction_type]()


def sample_noise(latents, generators, offset=0.0):
    """Noise like `latents`, one generator per sample; `offset` adds noise that is constant over positions."""
    noise = randn_tensor(latents.shape, generator=generators, device=latents.device, dtype=latents.dtype)
    if offset:
        shape = (*latents.shape[:2], 1, 1)
        noise = noise + offset * randn_tensor(shape, generators, device=latents.device, dtype=latents.dtype)
    return noise


def is_flow_scheduler(scheduler):
    """Whether it knows nothing but flow matching."""
    return type(scheduler).__name__.startswith("FlowMatch")


def prediction_type(scheduler):
    """Also of the scheduler that knows flow matching alone."""
    if is_flow_scheduler(scheduler):
        return "flow_prediction"
    return scheduler.config.prediction_type


def flow_sigmas(scheduler, mu):
    """The noise levels `[T]` of flow matching, from 1 / T to 1 before the family's own shift.

    That is exp(mu), or with a linear shift mu, if the scheduler lets it depend on the number of tokens.
    """
    config = scheduler.config
    sigmas = torch.arange(1, config.num_train_timesteps + 1) / config.num_train_timesteps
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if config.get("use_dynamic_shifting"):
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(config, sequence_length):
    """mu of a scheduler's config at this number of tokens, as in the pipelines of FLUX.1 and those after it."""
    start, end = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (largest - base) / (end - start) * (sequence_length - start)


def flow_timestep_weights(args, num_timesteps):
    """How often each noise level is drawn before the shift, `[T]`, sums to 1 (Esser et al. 2024, Sec. 3.1).

    From quantiles of the scheme's distribution. As in the Diffusers scripts, u counts from the noise to the image.
    """
    u = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    if args.weighting_scheme == "logit_normal":
        u = torch.sigmoid(args.logit_mean + args.logit_std * torch.special.ndtri(u))
    elif args.weighting_scheme == "mode":
        u = 1 - u - args.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    counts = torch.bincount((u * num_timesteps).long().clamp(max=num_timesteps - 1), minlength=num_timesteps)
    return (counts / len(u)).flip(0).float()


def stratified_quantiles(seed, step, batch_size, num_groups, group):
    """Where one group's samples lie between the least and the most noise: `[B]` float64 in [0, 1).

    A group is a forward pass of one process; an optimizer step has `num_groups`. Of its B x num_groups samples each
    has one of as many equal strata to itself, and each group has one in each B-th of the whole, so that all decode as
    many samples for LPL, give or take one. Each sample alone is uniform: expectations stay as they are.
    """
    rng = np.random.default_rng([seed, step, 2])  # the same for all groups
    places = rng.permuted(np.tile(np.arange(num_groups), (batch_size, 1)), axis=1)[:, group]
    own = np.random.default_rng([seed, step, 3, group])
    quantiles = (np.arange(batch_size) + (places + own.random(batch_size)) / num_groups) / batch_size
    return torch.from_numpy(own.permutation(quantiles))


def timestep_weights(args, num_timesteps):
    """How often each timestep is drawn, `[T]`, sums to 1: the --timestep_bias_ flags of the Diffusers SDXL script."""
    weights, biased = torch.ones(num_timesteps), round(args.timestep_bias_portion * num_timesteps)
    favoured = {
        "none": slice(0),
        "earlier": slice(biased),
        "later": slice(num_timesteps - biased, None),
        "range": slice(args.timestep_bias_begin, args.timestep_bias_end),
    }
    weights[favoured[args.timestep_bias_strategy]] *= args.timestep_bias_multiplier
    return weights / weights.sum()


def new_scheduler(args):
    """For a model from scratch: flow matching, or Stable Diffusion's noise schedule."""
    if args.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**noise, set_alpha_to_one=False, steps_offset=1, prediction_type=args.prediction_type)
