"""The class-conditional MM-DiT and its pipeline: loading elsewhere, sampling by hand, sizes of the configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import build_tiny_vae

import pipeline_class_conditional
from pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel


CONFIGS = Path(pipeline_class_conditional.__file__).parent / "transformer_configs"
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def read_config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def build_pipeline(scheduler=None, vae=None, **config):
    torch.manual_seed(0)
    config = {"num_classes": 3, "num_layers": 2, **config}
    transformer = ClassConditionalSD3Transformer2DModel.from_config(read_config("mmdit-tiny"), **config).eval()
    scheduler = scheduler or DDIMScheduler(**BETAS)
    pipe = ClassConditionalPipeline(transformer, vae or build_tiny_vae(shift_factor=0.3), scheduler, id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, class_labels=(0, 2), **options):
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    labels = list(class_labels) if isinstance(class_labels, tuple) else class_labels
    return pipe(labels, generator=torch.Generator().manual_seed(7), **options).images


@torch.no_grad()
def guided_prediction(pipe, latents, t, labels, scale):
    """What the pipeline should compute at time t, in two passes."""
    timestep = torch.full((len(labels),), t)
    conditional = pipe.transformer(latents, timestep, torch.tensor(labels)).sample
    unconditional = pipe.transformer(latents, timestep, torch.tensor([3] * len(labels))).sample
    assert (conditional - unconditional).abs().mean() > 0.01  # else guidance would not be tested
    return (1 - scale) * unconditional + scale * conditional


# Folders


def test_a_saved_folder_loads_and_saves_without_this_repository(tmp_path):
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    script = f"""
import sys, numpy, torch
from diffusers import DiffusionPipeline
assert not any((__import__("pathlib").Path(p) / "pipeline_class_conditional.py").exists() for p in sys.path)
for source, copy in (("model", "copy"), ("copy", "third")):
    pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r} + "/" + source, trust_remote_code=True)
    generator = torch.Generator().manual_seed(7)
    images = pipe(["tench", "shark"], num_inference_steps=2, generator=generator, output_type="np").images
    numpy.save({str(tmp_path)!r} + "/" + source, images)
    pipe.save_pretrained({str(tmp_path)!r} + "/" + copy)
"""
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-I", "-c", script]
    result = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Expected types" not in result.stderr and "not expected" not in result.stderr  # Diffusers' doubts
    expected = sample(pipe)
    for name in ("model", "copy"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    first, second = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("model", "copy"))
    assert first == {name: value for name, value in second.items() if name != "_name_or_path"}


def test_this_module_loads_a_folder_without_running_its_code(tmp_path):
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path)
    for copy in tmp_path.rglob("*.py"):
        copy.write_text("raise SystemExit('ran')")
    transformer = ClassConditionalSD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path, transformer=transformer)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ClassConditionalPipeline and loaded.transformer is transformer
    assert loaded.config.id2label == NAMES
    assert np.array_equal(sample(loaded), sample(pipe))


def test_the_saved_config_is_the_one_of_the_configs_folder(tmp_path):
    config = read_config("mmdit-tiny")
    ClassConditionalSD3Transformer2DModel.from_config(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("base_sample_size") is None
    assert {name: value for name, value in saved.items() if name != "_diffusers_version"} == config


# Sampling


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_two_guided_ddim_steps_by_hand(prediction_type):
    pipe = build_pipeline(DDIMScheduler(prediction_type=prediction_type, **BETAS))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).sqrt()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    z = start
    for t, next_alpha in ((500, alphas[0]), (0, torch.tensor(1.0))):
        alpha, sigma = alphas[t], (1 - alphas[t] ** 2).sqrt()
        output = guided_prediction(pipe, z.float(), t, [0, 2], scale=2.5)
        z0 = {
            "epsilon": (z - sigma * output) / alpha,
            "v_prediction": alpha * z - sigma * output,
            "sample": output,
        }[prediction_type]
        z = next_alpha * z0 + (1 - next_alpha**2).sqrt() * (z - alpha * z0) / sigma
    latents = sample(pipe, latents=start, guidance_scale=2.5, output_type="latent")
    torch.testing.assert_close(latents, z.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(latents, sample(pipe, guidance_scale=2.5, output_type="latent"))  # drew the same noise


def test_guided_flow_euler_steps_by_hand():
    pipe = build_pipeline(FlowMatchEulerDiscreteScheduler(shift=1.0))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    latents = sample(pipe, latents=z, guidance_scale=2.5, num_inference_steps=3, output_type="latent")
    sigmas = [1.0, 0.5005, 0.001, 0.0]  # evenly down to 1 / 1000, then 0
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        z = z + (next_sigma - sigma) * guided_prediction(pipe, z, 1000 * sigma, [0, 2], scale=2.5)
    torch.testing.assert_close(latents, z, rtol=1e-4, atol=1e-4)


def test_without_guidance_there_is_one_pass_and_dynamic_shifting_is_refused():
    pipe = build_pipeline(FlowMatchEulerDiscreteScheduler(shift=1.0))
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    z = torch.randn(2, 4, 8, 4)
    options = {"guidance_scale": 1.0, "num_inference_steps": 1, "height": 64, "width": 32, "output_type": "latent"}
    latents = sample(pipe, latents=z, **options)
    assert batches == [2]
    with torch.no_grad():
        expected = z - pipe.transformer(z, torch.full((2,), 1000.0), torch.tensor([0, 2])).sample
    torch.testing.assert_close(latents, expected)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=False"):
        sample(pipe)


def test_latents_are_unscaled_and_decoded_in_the_precision_of_the_vae():
    pipe = build_pipeline(FlowMatchEulerDiscreteScheduler())
    latents, images = sample(pipe, output_type="latent"), sample(pipe, output_type="pt")
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.18215 + 0.3).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    pipe.transformer.to(torch.bfloat16)
    half = sample(pipe, output_type="latent")
    assert half.dtype == torch.float32 and 0 < (half - latents).abs().max() < 0.3
    assert sample(pipe, output_type="pt").dtype == torch.float32


def build_vae(kind):
    if kind == "AutoencoderTiny":
        widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
        return AutoencoderTiny(num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3, **widths)
    if kind == "AutoencoderDC":
        sides = {"layers_per_block": (1,) * 5, "block_out_channels": (8,) * 5, "qkv_multiscales": ((),) * 5}
        config = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
        return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.5, **config)
    return build_tiny_vae(kind)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_images_are_as_large_as_those_that_encode_to_the_sample_size(kind):
    pipe = build_pipeline(vae=build_vae(kind))
    images = sample(pipe, num_inference_steps=1, output_type="pt")
    with torch.no_grad():
        encoded = pipe.vae.encode(images)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
    assert latents.shape == (2, 4, 8, 8)
    token = images.shape[-1] // 4
    with pytest.raises(ValueError, match=f"multiples of {token} pixels"):
        sample(pipe, height=images.shape[-1] + token // 2)


def test_classes_by_number_and_by_name():
    pipe = build_pipeline()
    assert pipe.get_label_ids("Tinca tinca") == [0]
    assert pipe.get_label_ids(["shark", "tench", "tench, Tinca tinca"]) == [2, 0, 0]
    assert np.array_equal(sample(pipe, ["tench", 2]), sample(pipe, (0, 2)))
    one = sample(pipe, "goldfish")
    assert np.array_equal(one, sample(pipe, 1)) and not np.array_equal(one, sample(pipe, 2))
    with pytest.raises(ValueError, match="No class is called 'whale'.*'tench, Tinca tinca'"):
        sample(pipe, "whale")
    with pytest.raises(ValueError, match="no class 4: use 0 to 2, or 3 for no class"):
        sample(pipe, 4)


# Training


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none():
    gradients = []
    for checkpointing in (False, True):
        transformer = build_pipeline().transformer.train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        torch.manual_seed(1)
        inputs = torch.randn(4, 4, 8, 8), torch.tensor([10.0, 300.0, 600.0, 990.0]), torch.arange(4)
        transformer(*inputs).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in transformer.named_parameters()})
    plain, checkpointed = gradients
    assert None not in plain.values()  # DDP would wait for it
    # SD3's last block drops its context output, so the context's queries there get a gradient of zero.
    zero = {name for name, gradient in plain.items() if not gradient.any()}
    assert zero == {f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias")} | {
        "transformer_blocks.1.attn.norm_added_q.weight"
    }
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


# Sizes


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def feed_forward(d):
    return linear(d, 4 * d) + linear(4 * d, d)


def mmdit_parameters(layers, d, heads, channels, joint, pooled, labels=0):
    """SD3: two streams of modulation, q, k, v, out, feed-forward and norms of q and k; the last drops its context."""
    stream = linear(d, 6 * d) + 4 * linear(d, d) + feed_forward(d) + 2 * (d // heads)
    last = linear(d, 2 * d) + 3 * linear(d, d) + 2 * (d // heads)
    embeddings = linear(256, d) + linear(d, d) + linear(pooled, d) + linear(d, d) + linear(joint, d) + labels * d
    ends = linear(4 * channels, d) + linear(d, 2 * d) + linear(d, 4 * channels)
    return (2 * layers - 1) * stream + last + embeddings + ends


def dit_parameters(layers, d):
    """DiT, where Diffusers gives every block its own embedding of time and label; also with one, as in the paper."""
    embedding = linear(256, d) + linear(d, d) + 1001 * d
    block = linear(d, 6 * d) + 4 * linear(d, d) + feed_forward(d)
    ends = linear(16, d) + linear(d, 2 * d) + linear(d, 16)
    return layers * (block + embedding) + ends, layers * block + embedding + ends


CLASSES = {"joint": 1536, "pooled": 1536, "labels": 1001}, {"joint": 896, "pooled": 896, "labels": 1001}
TEXT = {"joint": 4096, "pooled": 2048}


@pytest.mark.parametrize(
    "name, expected, millions, tolerance",
    [
        ("dit-xl-2", dit_parameters(28, 1152)[0], 750, 0.001),
        ("dit-s-2", dit_parameters(12, 384)[0], 40, 0.01),
        ("dit-tiny", dit_parameters(4, 96)[0], 1.2, 0.01),
        ("mmdit-28x1536", mmdit_parameters(28, 1536, 24, 4, **CLASSES[0]), 2368, 0.002),
        ("mmdit-28x896", mmdit_parameters(28, 896, 14, 4, **CLASSES[1]), 796, 0.03),
        ("mmdit-tiny", mmdit_parameters(4, 64, 2, 4, joint=64, pooled=64, labels=1001), 0.65, 0.01),
        ("mmdit-text-28x1536", mmdit_parameters(28, 1536, 24, 16, **TEXT), 2368, 0.001),
        ("mmdit-text-28x896", mmdit_parameters(28, 896, 14, 16, **TEXT), 809, 0.001),
    ],
)
def test_number_of_parameters(name, expected, millions, tolerance):
    config = read_config(name)
    model_class = getattr(diffusers, config["_class_name"], ClassConditionalSD3Transformer2DModel)
    with torch.device("meta"):
        model = model_class.from_config(config)
    assert type(model).__name__ == config["_class_name"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert expected == pytest.approx(millions * 1e6, rel=tolerance)


def test_dit_sizes_are_the_papers_and_the_tiny_one_is_tiny():
    assert dit_parameters(28, 1152)[1] == pytest.approx(675e6, rel=0.002)  # Peebles & Xie, Table 1
    assert dit_parameters(12, 384)[1] == pytest.approx(33e6, rel=0.01)
    assert dit_parameters(4, 96)[0] - 4 * 1001 * 96 < 1e6


def test_the_class_conditional_transformer_reaches_1024_pixels():
    config = {**read_config("mmdit-28x896"), "num_layers": 1, "num_attention_heads": 1}
    transformer = ClassConditionalSD3Transformer2DModel.from_config(config)
    with torch.no_grad():
        output = transformer(torch.randn(1, 4, 128, 128), torch.tensor([500]), torch.tensor([0])).sample
    assert output.shape == (1, 4, 128, 128)
