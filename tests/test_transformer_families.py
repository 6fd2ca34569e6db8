"""Conventions of the transformers: what training tells them and reads off them, against the stock pipelines' loops.

Shapes: B batch, C latent channels, h x w latent positions.
"""

import inspect
import json
import math
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.training_utils import compute_density_for_timestep_sampling
from tiny_models import build_tiny_vae
from tiny_transformers import build_tiny_pipeline

import train_lpl_dit
from loss_terms import lpl_share
from lpl_utils import predict_z0
from model_families import FAMILIES, find_family
from noise import flow_sigmas
from pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULERS = {  # of our own pipeline
    "epsilon": DDIMScheduler(**NOISE),
    "v_prediction": DDIMScheduler(**NOISE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
}
VARIANTS = {"PixArtAlpha 1024": {"sample_size": 128}, "Flux schnell": {"guidance_embeds": False}}  # transformers
REPLACED = {  # components
    "StableDiffusion3 without T5": {"text_encoder_3": None, "tokenizer_3": None},
    "Sana Euler": {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
    "Lumina2 dynamic": {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)},
}
LABELS = [f"ClassConditional {formulation}" for formulation in SCHEDULERS]
MODELS = ["DiT", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Sana", "Flux", *VARIANTS, *REPLACED, *LABELS]
MODELS += ["Chroma", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow", "HunyuanDiT"]
FAMILY_NAMES = [name.removesuffix("Pipeline") for name in FAMILIES]
# Pipelines whose tokens are squares of 2 x 2 positions
PACKED = ("FluxPipeline", "ChromaPipeline", "QwenImagePipeline")
# Where what guidance compares with is in a second call; the others put it into the batch
IN_A_SECOND_CALL = ("Flux", "Chroma", "QwenImage", "Lumina2")
# Where noise levels come from; a family that is in none of these is not checked
FIXED_SHIFT = ["StableDiffusion3", "Flux schnell", "ClassConditional flow", "ZImage", "Lumina2", "AuraFlow"]
SHIFT_BY_RESOLUTION = [  # and the number of steps that show it
    ("Flux", 1000),
    ("Chroma", 1000),
    ("QwenImage", 1000),
    ("Flux2Klein", 50),
    ("Lumina2 dynamic", 50),
]
NO_FLOW = ["DiT", "PixArtAlpha", "PixArtSigma", "HunyuanDiT"]
PROMPTS = ["a red fox", "Two Boats at sea, in a caption of more than twenty tokens"]


@pytest.fixture
def load(tiny_pipeline, photos, class_folders, tmp_path):
    """name, flags -> the family, and the stock pipeline around its transformer."""

    def run(name, *words, vae=None, resolution=64):
        folder = build(name, vae)
        by_label = name.startswith(("DiT", "ClassConditional"))
        flags = ["--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / "out", "--resolution"]
        flags += [resolution, "--train_data_dir", class_folders if by_label else photos, *words]
        args = train_lpl_dit.parse_args([str(word) for word in flags])
        family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
        absent = {part: None for part, component in REPLACED.get(name, {}).items() if component is None}
        pipe = stock_pipeline(name).from_pretrained(folder, transformer=family.denoiser, **absent)
        pipe.set_progress_bar_config(disable=True)
        return family, pipe

    def build(name, vae):
        if name in LABELS:
            return build_class_conditional(tmp_path / "model", SCHEDULERS[name.split()[1]])
        if name in REPLACED:
            pipe = stock_pipeline(name).from_pretrained(tiny_pipeline(name.split()[0]), **REPLACED[name])
            pipe.save_pretrained(tmp_path / "model")
            return tmp_path / "model"
        if vae is None and name not in VARIANTS:
            return tiny_pipeline(name)
        return build_tiny_pipeline(tmp_path / "model", name.split()[0], vae=vae, **VARIANTS.get(name, {}))

    return run


def without_guidance(name):
    """Settings of a stock pipeline. FLUX.1's guidance is an input, whose default is compared."""
    if name in ("Flux", "Flux schnell", "QwenImage"):
        return {}
    return {"guidance_scale": 0.0 if name == "ZImage" else 1.0}  # Z-Image counts from 0


def takes_a_length(name):
    return "max_sequence_length" in inspect.signature(stock_pipeline(name).__call__).parameters


def stock_pipeline(name):
    return ClassConditionalPipeline if name in LABELS else getattr(diffusers, f"{name.split()[0]}Pipeline")


def build_class_conditional(folder, scheduler):
    config = json.loads((Path(train_lpl_dit.__file__).parent / "transformer_configs/mmdit-tiny.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ClassConditionalSD3Transformer2DModel.from_config(config)
    vae = build_tiny_vae(shift_factor=0.3)
    names = {207: "golden retriever", 980: "volcano"}
    ClassConditionalPipeline(transformer, vae, scheduler, id2label=names).save_pretrained(folder)
    return folder


class Step(NamedTuple):
    """One step of a stock pipeline's own loop."""

    calls: list  # arguments of the transformer, name -> tensor, of each of its calls in this step
    given: torch.Tensor  # [B, C, h, w]: what the scheduler makes the step of, after guidance
    latents: torch.Tensor  # [B, C, h, w]
    timestep: torch.Tensor  # [], the scheduler's
    sigma: torch.Tensor  # [], the scheduler's; None if it has none


def stock_step(pipe, index=2, num_inference_steps=4, **settings):
    """Two images of a stock pipeline: what happened in step `index`, of latents 8 high and (but for DiT's) 12 wide."""
    settings |= {"generator": torch.Generator().manual_seed(0), "num_inference_steps": num_inference_steps}
    if "height" in inspect.signature(pipe.__call__).parameters:
        settings |= {"height": 64, "width": 96, "output_type": "latent"}
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        settings["use_resolution_binning"] = False
    if isinstance(pipe, (ClassConditionalPipeline, diffusers.DiTPipeline)):
        settings["class_labels"] = [207, 980]
    else:
        settings["prompt"] = list(PROMPTS)
    step = mock.patch.object(pipe.scheduler, "step", wraps=pipe.scheduler.step)
    with calls_of(pipe.transformer) as calls, step as spy:
        pipe(**settings)
    given, timestep, latents = spy.call_args_list[index].args
    if type(pipe).__name__ in PACKED:
        given, latents = unpack(given), unpack(latents)
    elif isinstance(pipe, diffusers.Flux2KleinPipeline):  # a token is a position
        given, latents = (torch.stack(x.unbind(1), dim=-1).unflatten(-1, (4, 6)) for x in (given, latents))
    each = len(calls) // num_inference_steps
    sigmas = getattr(pipe.scheduler, "sigmas", None)
    sigma = None if sigmas is None else sigmas[index]
    return Step(calls[each * index : each * (index + 1)], given, latents, timestep, sigma)


@contextmanager
def calls_of(transformer):
    """The arguments of every call inside, name -> tensor, after binding them to the signature."""
    forward, calls = inspect.signature(type(transformer).forward), []

    def note(module, args, kwargs):
        calls.append(flat(forward.bind(module, *args, **kwargs).arguments))

    with transformer.register_forward_pre_hook(note, with_kwargs=True):
        yield calls


def flat(arguments):
    """Nested arguments as one dict, without what is None or empty and so as good as absent."""
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            leaves |= {f"{name}.{key}": leaf for key, leaf in flat(value).items()}
        elif value is not None and name not in ("self", "return_dict"):
            leaves[name] = value
    return leaves


def unpack(tokens, height=8, width=12):
    """FLUX's `[B, h/2 w/2, 4 C]` -> `[B, C, h, w]`: a token is a square of 2 x 2 positions, in rows from the top."""
    latents = torch.empty(len(tokens), tokens.shape[2] // 4, height, width)
    for i, token in enumerate(tokens.unbind(1)):
        top, left = 2 * (i // (width // 2)), 2 * (i % (width // 2))
        latents[:, :, top : top + 2, left : left + 2] = token.view(len(tokens), -1, 2, 2)
    return latents


@torch.no_grad()
def training_call(family, step, captions):
    """What training does at that step: timesteps `[B]`, the transformer's arguments, what `predict` gives."""
    timestep = step.timestep
    if isinstance(family.pipe.scheduler, DPMSolverMultistepScheduler) and family.prediction_type == "flow_prediction":
        timestep = step.sigma * 1000  # its own is cut to an integer
    timesteps = timestep.expand(len(captions))
    family.denoiser.train()
    with calls_of(family.denoiser) as calls:
        sizes = {"original_sizes": torch.full((2, 2), 1024), "crop_top_lefts": torch.zeros(2, 2, dtype=torch.long)}
        sizes["target_sizes"] = torch.tensor([[64, 96]] * 2)
        conditioning = family.conditioning({"captions": captions, **sizes})
        output = family.predict(family.denoiser, step.latents, timesteps, conditioning)
    assert len(calls) == 1
    return timesteps, calls[0], output


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


def clean_estimate(scheduler, step, index=2):
    """The scheduler's own, `[B, C, h, w]`."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # one step to sigma 0
        euler = FlowMatchEulerDiscreteScheduler()
        euler.sigmas = torch.stack([step.sigma, torch.tensor(0.0)])
        euler.set_begin_index(0)
        return euler.step(step.given, step.timestep, step.latents).prev_sample
    if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        return scheduler.step(step.given, step.timestep, step.latents).pred_original_sample
    scheduler._step_index = index
    return scheduler.convert_model_output(step.given, sample=step.latents)


@pytest.mark.parametrize("name", MODELS)
def test_the_transformer_is_called_and_read_as_in_the_pipeline(load, name):
    family, pipe = load(name)
    step = stock_step(pipe, **without_guidance(name))
    labels = name.startswith(("DiT", "ClassConditional"))
    timesteps, ours, output = training_call(family, step, [207, 980] if labels else PROMPTS)
    assert_same(ours, step.calls[0])
    assert ("added_cond_kwargs.aspect_ratio" in ours) == (name == "PixArtAlpha 1024")
    assert torch.equal(output, step.given)

    alpha, sigma = family.noise_levels(timesteps)
    z0_hat = predict_z0(output, step.latents, alpha, sigma, family.prediction_type)
    torch.testing.assert_close(z0_hat, clean_estimate(pipe.scheduler, step), rtol=1e-4, atol=1e-5)
    assert (z0_hat - step.latents).abs().max() > 0.01  # else any convention would do


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_caption_is_what_guidance_compares_with(load, name):
    family, pipe = load(name)
    if name.startswith(IN_A_SECOND_CALL):
        guidance = {"guidance_scale": 2.0}
        if "true_cfg_scale" in inspect.signature(pipe.__call__).parameters:
            guidance = {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
        step = stock_step(pipe, **guidance)
        (_, theirs) = step.calls
    elif name == "ZImage":  # in the second half of lists
        step = stock_step(pipe, guidance_scale=2.0)
        theirs = {"t": step.calls[0]["t"][:2]}
        for argument in ("x", "cap_feats"):
            theirs |= {f"{argument}.{i}": step.calls[0][f"{argument}.{i + 2}"] for i in range(2)}
    else:  # in half of the batch
        step = stock_step(pipe, guidance_scale=2.0)
        half = slice(2, 4) if name.startswith(("DiT", "ClassConditional")) else slice(0, 2)
        shared = ("image_rotary_emb.0", "image_rotary_emb.1")
        theirs = {key: value if key in shared else value[half] for key, value in step.calls[0].items()}
    if name == "DiT":  # whose pipeline gives the scheduler the whole batch
        step = step._replace(latents=step.latents[half])
    _, ours, _ = training_call(family, step, ["", ""])
    assert_same(ours, theirs)
    if name == "DiT":
        assert ours["class_labels"].tolist() == [1000, 1000]


@pytest.mark.parametrize("name", ["Sana", "Lumina2"])
def test_an_instruction_is_read_before_captions_alone(load, name):
    family, _ = load(name)
    captions = ["", PROMPTS[0], "", PROMPTS[1]]
    for name, rows in family.encode_prompts(captions).items():
        alone = torch.cat([family.encode_prompts([caption])[name] for caption in captions])
        torch.testing.assert_close(rows, alone)


@torch.no_grad()
def test_dit_drops_no_labels_of_its_own(load):
    family, _ = load("DiT")
    latents, timesteps, outputs = torch.randn(1, 4, 8, 8).repeat(100, 1, 1, 1), torch.full((100,), 500), []
    conditioning = family.conditioning({"captions": [207] * 100})
    for training in (True, False):
        outputs.append(family.predict(family.denoiser.train(training), latents, timesteps, conditioning))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", [name for name in MODELS if name in FAMILY_NAMES and takes_a_length(name)])
def test_flags_reach_the_transformer_as_the_pipelines_arguments(load, name):
    words, settings = ["--max_sequence_length", 20], {"max_sequence_length": 20, **without_guidance(name)}
    if name == "Flux":
        words, settings = [*words, "--guidance_scale", 2], {**settings, "guidance_scale": 2.0}
    family, pipe = load(name, *words)
    step = stock_step(pipe, index=1, num_inference_steps=2, **settings)
    _, ours, _ = training_call(family, step, PROMPTS)
    assert_same(ours, step.calls[0])
    if name == "ZImage":
        assert len(ours["cap_feats.1"]) == 20
    else:
        assert ours["encoder_hidden_states"].shape[1] == (77 + 20 if name == "StableDiffusion3" else 20)
    if name == "Flux":
        assert torch.equal(ours["guidance"], torch.tensor([2.0, 2.0]))


# Noise levels


def test_every_family_is_here():
    families = {name.removesuffix("Pipeline") for name, family in FAMILIES.items() if family.denoiser_name != "unet"}
    assert {name.split()[0] for name in MODELS} == families
    shifts = [*FIXED_SHIFT, *(name for name, _ in SHIFT_BY_RESOLUTION), *NO_FLOW, "Sana"]  # which has its own test
    assert {name.split()[0] for name in shifts} == families
    assert {name.split()[0] for name, _ in VAES} == families


@pytest.mark.parametrize("name", FIXED_SHIFT)
def test_the_noise_levels_of_a_fixed_shift_are_those_of_the_scheduler(load, name):
    family, pipe = load(name)
    theirs = type(pipe.scheduler).from_config(pipe.scheduler.config)
    torch.testing.assert_close(family.sigmas, theirs.sigmas.flip(0))
    torch.testing.assert_close(family.timesteps, theirs.timesteps.flip(0))
    assert torch.equal(family.alphas, 1 - family.sigmas)


@pytest.mark.parametrize("resolution", [64, 128])
@pytest.mark.parametrize("name, steps", SHIFT_BY_RESOLUTION)
def test_noise_levels_depend_on_the_resolution_as_in_the_pipeline(load, name, steps, resolution):
    family, pipe = load(name, resolution=resolution)
    # Qwen-Image's sampler stops a little before sigma = 0, which is a matter of its steps.
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None)

    def interrupt(pipe, step, timestep, inputs):
        pipe._interrupt = True
        return inputs

    size = {"height": resolution, "width": resolution, "output_type": "latent"}
    pipe(prompt=PROMPTS[0], num_inference_steps=steps, callback_on_step_end=interrupt, **size)
    among = slice(1000 // steps - 1, None, 1000 // steps)  # FLUX.2's shift depends on the number of steps as well
    torch.testing.assert_close(family.sigmas[among], pipe.scheduler.sigmas[:-1].flip(0))
    torch.testing.assert_close(family.timesteps[among], pipe.scheduler.timesteps.flip(0))
    unshifted = torch.arange(1, 1001) / 1000
    assert (family.sigmas[:-1] > unshifted[:-1] + 1e-4).all()


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_dynamic_shifts_are_those_of_the_scheduler(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(sigmas=np.arange(1000, 0, -1) / 1000, mu=0.7)
    torch.testing.assert_close(flow_sigmas(scheduler, 0.7), scheduler.sigmas[:-1].flip(0))


@pytest.mark.parametrize("name", ["Flux", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow"])
def test_schedules_of_other_lengths_are_told_as_the_pipeline_tells_them(load, monkeypatch, name):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    monkeypatch.setitem(REPLACED, f"{name} of 500", {"scheduler": scheduler})
    family, pipe = load(f"{name} of 500")
    step = stock_step(pipe, **without_guidance(name))
    timesteps, ours, _ = training_call(family, step, PROMPTS)
    assert_same(ours, step.calls[0])
    torch.testing.assert_close(family.noise_levels(timesteps)[1], step.sigma.expand(2))


def test_sanas_noise_levels_are_shifted_by_three(load):
    family, pipe = load("Sana")
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(family.sigmas, (3 * t / (1 + 2 * t)).float())
    pipe.scheduler.set_timesteps(999)  # of 1000 levels its sampler leaves out the highest
    torch.testing.assert_close(family.sigmas[:-1], pipe.scheduler.sigmas[:-1].flip(0))
    pipe.scheduler.set_timesteps(50)
    told = family.scale_timesteps(pipe.scheduler.sigmas[:-1] * 1000)
    assert told.tolist() == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "words, density",
    [
        ([], ("logit_normal", 0.0, 1.0)),  # SD3's default
        (["logit_normal", "--logit_mean", 0.5, "--logit_std", 0.7], ("logit_normal", 0.5, 0.7)),
        (["mode"], ("mode", None, None, 1.29)),
        (["mode", "--mode_scale", 0.5], ("mode", None, None, 0.5)),
        (["none"], ("none",)),
    ],
)
def test_timesteps_are_drawn_as_in_the_sd3_script_of_diffusers(load, words, density):
    family, pipe = load("StableDiffusion3", *(["--weighting_scheme", *words] if words else []))
    scheme, *numbers = density
    generator, n = torch.Generator().manual_seed(0), 10**6
    u = compute_density_for_timestep_sampling(scheme, n, *numbers, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]

    between = (family.timesteps[:-1] + family.timesteps[1:]) / 2

    def distribution(timesteps):
        return torch.searchsorted(timesteps.sort().values, between) / len(timesteps)

    weights = family.timestep_weights.cumsum(0)
    assert weights[-1].item() == pytest.approx(1, abs=1e-5)
    # Kolmogorov and Smirnov: a distance above 2 / sqrt(n) has a probability of less than a thousandth.
    assert (weights[:-1] - distribution(theirs)).abs().max() < 2 / n**0.5
    ours = family.sample_timesteps([generator] * 8000)
    assert (weights[:-1] - distribution(ours)).abs().max() < 2 / 8000**0.5


@pytest.mark.parametrize("words", [("--logit_mean", 40), ("--logit_std", 20)])
def test_extreme_densities_stay_among_the_timesteps(load, words):
    family, _ = load("StableDiffusion3", "--weighting_scheme", "logit_normal", *words)
    assert len(family.timestep_weights) == 1000 and family.timestep_weights.sum().item() == pytest.approx(1, abs=1e-5)
    expected = family.timesteps.min() if words[0] == "--logit_mean" else None  # more than any other: the least noise
    if expected is not None:
        assert family.timesteps[family.timestep_weights.argmax()] == expected


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    "scheduler, told", [(FlowMatchHeunDiscreteScheduler(shift=3.0), 749.6), (UniPCMultistepScheduler(**FLOW), 749)]
)
def test_other_schedulers_of_flow_matching(load, monkeypatch, scheduler, told):
    monkeypatch.setitem(REPLACED, "StableDiffusion3 otherwise", {"scheduler": scheduler})
    family, _ = load("StableDiffusion3 otherwise")
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(family.sigmas, 3 * u / (1 + 2 * u))
    # What samples diffusion as well tells the model whole numbers.
    assert family.scale_timesteps(torch.tensor([749.6])).item() == pytest.approx(told)


def test_the_share_that_lpl_sees_is_that_of_the_noise_levels_below_tau(load):
    family, _ = load("Flux schnell", "--weighting_scheme", "none")
    for tau in (3, 6, 12):  # sigma / (1 - sigma) at most tau
        assert lpl_share(family, tau) == pytest.approx(tau / (1 + tau), abs=1e-3)
    # With logit_normal, log(alpha / sigma) is normal before the shift, which divides alpha / sigma by 3.
    family, _ = load("StableDiffusion3", "--logit_mean", 0.5, "--logit_std", 0.7)
    for tau in (1, 3, 6):
        expected = 1 - NormalDist(0.5, 0.7).cdf(math.log(3 / tau))
        assert lpl_share(family, tau) == pytest.approx(expected, abs=3e-3)


# Latents


VAES = [
    ("DiT", {"kind": "AutoencoderTiny", "scaling_factor": 0.7}),
    ("StableDiffusion3", None),  # AutoencoderKL with a shift
    ("PixArtSigma", {"kind": "AutoencoderTiny"}),
    ("Sana", None),  # AutoencoderDC
    ("Flux", None),
    ("Flux2Klein", None),
    ("QwenImage", None),
    ("ZImage", None),
    ("Lumina2", {"kind": "AutoencoderTiny"}),
    ("AuraFlow", None),
    ("HunyuanDiT", None),
    ("ClassConditional epsilon", None),
    ("PixArtAlpha", None),
    ("Chroma", None),
]


@pytest.mark.parametrize("name, vae", VAES)
@torch.no_grad()
def test_the_pipeline_decodes_our_latents_to_what_the_vae_makes_of_its_own(load, name, vae):
    family, pipe = load(name, vae=vae and build_tiny_vae(**vae))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.latents({"pixel_values": pixels}, [torch.Generator().manual_seed(i) for i in range(2)])
    assert latents.dtype == torch.float32
    frames = [2] if name == "QwenImage" else []  # its VAE is made for videos: there is a dimension of time
    encoded = pipe.vae.encode(pixels.unsqueeze(*frames) if frames else pixels)
    if hasattr(encoded, "latent_dist"):
        shape = (1, *encoded.latent_dist.mean.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        unscaled = encoded.latent_dist.mean + encoded.latent_dist.std * noise
    else:
        unscaled = encoded[0]
    expected = (pipe.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
    expected = expected.squeeze(*frames) if frames else expected

    settings = {"num_inference_steps": 1, "output_type": "pt", **without_guidance(name)}
    if name.startswith(("DiT", "ClassConditional")):
        settings["class_labels"] = [207, 980]
    else:
        settings |= {"prompt": PROMPTS, "height": 64, "width": 64}
    if name.startswith(("PixArt", "Sana", "HunyuanDiT")):
        settings["use_resolution_binning"] = False
    last = latents
    if type(pipe).__name__ in PACKED:
        last = pipe._pack_latents(latents, *latents.shape)
    elif name == "Flux2Klein":
        last = pipe._pack_latents(latents)
    with mock.patch.object(pipe.scheduler, "step", return_value=DDIMSchedulerOutput(last, last)):
        drawn = pipe(**settings).images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
    for image, ours in zip(expected, family.decode_images(latents)):
        decoded = torch.tensor(np.asarray(ours)).permute(2, 0, 1)
        assert (decoded - image * 255).abs().max() < 0.51
