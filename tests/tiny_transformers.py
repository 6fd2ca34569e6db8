"""Tiny random pipelines of the transformer families, for 64-pixel images, built offline in well under a second."""

import string
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import _text_encoder, build_tiny_tokenizer, build_tiny_vae
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


LATENT_SIZE = 8  # side of the latents: 64 pixels, at the factor 8 of every tiny VAE
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CHARACTERS = "▁" + string.ascii_letters + string.digits + string.punctuation
CLASSES = {  # a few of ImageNet's; a comma separates synonyms, as in the index of DiT's checkpoint
    0: "tench, Tinca tinca",
    2: "great white shark, white shark, man-eater",
    207: "golden retriever",
    281: "tabby, tabby cat",
    879: "umbrella",
    980: "volcano",
}


def build_tiny_pipeline(folder, family, seed=0, vae=None, **transformer_config):
    """Saves a stock diffusers pipeline with random weights into `folder` and returns its path.

    family: "DiT", "StableDiffusion3" (3.5 medium), "PixArtAlpha", "PixArtSigma", "Sana" or "Flux" (dev). Schedulers,
    learned variances, kinds of text encoder and the VAE's scaling are the published checkpoints', and so are the
    latents' channels, but for Sana's, 4 instead of 32.
    vae: takes the place of the tiny one; the transformer gets as many latent channels as it has.
    transformer_config: replaces the family's own values. `guidance_embeds=False` makes Flux schnell, whose scheduler
    does not shift. The stock PixArtAlphaPipeline gives a transformer the resolution and the aspect ratio if its
    `sample_size` is 128 (it then has embedders for them by default, and 64-pixel images still work), and only then.
    """
    build, vae_config = FAMILIES[family]
    vae = vae or build_tiny_vae(seed=seed, **vae_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = build(vae.config.latent_channels, transformer_config)
    _make_responsive(components["transformer"].eval())
    pipeline = getattr(diffusers, f"{family}Pipeline")(vae=vae, **components)
    if family == "DiT":  # the pipeline reads the names from its index, but would leave them out of the one it writes
        pipeline.register_to_config(id2label={i: CLASSES.get(i, f"class {i}") for i in range(1000)})
    pipeline.save_pretrained(folder)
    return Path(folder)


def _make_responsive(transformer):
    """Doubles all weights but the output's: so few and narrow layers hardly tell prompts or timesteps apart else."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1 and not name.startswith("proj_out"):
                parameter *= 2


def _dit(channels, config):
    own = {"in_channels": channels, "out_channels": 2 * channels, "sample_size": LATENT_SIZE, "num_layers": 2}
    own |= {"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 1000}
    return {
        "transformer": diffusers.DiTTransformer2DModel(**{**own, **config}),
        "scheduler": DDIMScheduler(**LINEAR, clip_sample=False),
    }


def _sd3(channels, config):
    own = {"in_channels": channels, "out_channels": channels, "sample_size": LATENT_SIZE, "num_layers": 2}
    own |= {"num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    own |= {"pos_embed_max_size": 12, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    own |= {"joint_attention_dim": 48, "pooled_projection_dim": 2 * 16}  # T5's width; what both CLIPs project to
    tokenizer_3, text_encoder_3 = _t5(width=48)  # wider than both CLIPs together, which are padded to it
    return {
        "transformer": diffusers.SD3Transformer2DModel(**{**own, **config}),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": build_tiny_tokenizer(),
        "tokenizer_2": build_tiny_tokenizer(),
        "tokenizer_3": tokenizer_3,
        "text_encoder": _text_encoder(CLIPTextModelWithProjection, width=16),
        "text_encoder_2": _text_encoder(CLIPTextModelWithProjection, width=24),
        "text_encoder_3": text_encoder_3,
    }


def _pixart(channels, config):
    own = {"in_channels": channels, "out_channels": 2 * channels, "sample_size": LATENT_SIZE, "num_layers": 2}
    # 24 wide: thirds of it embed height, width and aspect ratio, where there are such conditions
    own |= {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 32}
    tokenizer, text_encoder = _t5(width=32)
    return {
        "transformer": diffusers.PixArtTransformer2DModel(**{**own, **config}),
        "scheduler": DPMSolverMultistepScheduler(**LINEAR),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }


def _sana(channels, config):
    own = {"in_channels": channels, "out_channels": channels, "sample_size": LATENT_SIZE, "num_layers": 2}
    own |= {"num_attention_heads": 4, "attention_head_dim": 8, "caption_channels": 16}
    own |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    tokenizer, text_encoder = _gemma(width=16)
    return {
        "transformer": diffusers.SanaTransformer2DModel(**{**own, **config}),
        "scheduler": DPMSolverMultistepScheduler(**LINEAR, **flow),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }


def _flux(channels, config):
    own = {"in_channels": 4 * channels, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    own |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    own |= {"joint_attention_dim": 32, "pooled_projection_dim": 16}  # T5's and CLIP's widths
    transformer = diffusers.FluxTransformer2DModel(**{**own, **config})
    dev = transformer.config.guidance_embeds
    shift = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    shift |= {"shift": 3.0 if dev else 1.0, "use_dynamic_shifting": dev}
    tokenizer_2, text_encoder_2 = _t5(width=32)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift),
        "tokenizer": build_tiny_tokenizer(),
        "tokenizer_2": tokenizer_2,
        "text_encoder": _text_encoder(CLIPTextModel, width=16),
        "text_encoder_2": text_encoder_2,
    }


def _t5(width):
    """T5's tokenizer, of single characters, and its encoder (v1.1: gated feed-forward layers)."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -2.0) for character in CHARACTERS)]
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes)
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512), T5EncoderModel(config).eval()


def _gemma(width):
    """Gemma's tokenizer, of single characters, and its decoder, whose last hidden states are what Sana reads."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *CHARACTERS]
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)  # False by default, unlike Gemma's
    return tokenizer, Gemma2Model(Gemma2Config(vocab_size=len(tokens), **sizes)).eval()


SHIFTED = {"latent_channels": 16, "post_quant_conv": False}
FAMILIES = {  # what builds all but the VAE, and the VAE's settings where they are not Stable Diffusion's
    "DiT": (_dit, {}),
    "StableDiffusion3": (_sd3, {**SHIFTED, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "PixArtAlpha": (_pixart, {}),
    "PixArtSigma": (_pixart, {"scaling_factor": 0.13025}),
    "Sana": (_sana, {"kind": "AutoencoderDC", "scaling_factor": 0.41407}),
    "Flux": (_flux, {**SHIFTED, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
}
