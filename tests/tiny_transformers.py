"""Tiny random pipelines of the transformer families, for 64-pixel images, built offline in well under a second."""

import string
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import _text_encoder, build_tiny_tokenizer, build_tiny_vae
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


LATENT_SIZE = 8  # side of the latents: 64 pixels, at the factor 8 of every tiny VAE
OUTPUTS = ("proj_out", "norm_out.linear_2", "all_final_layer")  # the last of a transformer's layers
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CHARACTERS = "▁" + string.ascii_letters + string.digits + string.punctuation
QWEN_TOKENS = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_IMAGE_WORDS = (  # of its pipeline's template: one token each, as in Qwen's vocabulary, so that it has 34
    *("system", "Describe", " the", " image", " by", " detailing", " color", " shape", " size", " texture"),
    *(" quantity", " text", " spatial", " relationships", " of", " objects", " and", " background", "user"),
)
CHAT_TEMPLATE = (  # Qwen3's, without tools and past thoughts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
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

    family: "DiT", "StableDiffusion3" (3.5 medium), "PixArtAlpha", "PixArtSigma", "Sana", "Flux" (dev), "Flux2Klein"
    (base, not distilled), "QwenImage", "ZImage" (Turbo), "Lumina2", "AuraFlow" or "HunyuanDiT" (1.1). Schedulers,
    learned variances, kinds of text encoder and the VAE's scaling are the published checkpoints', and so are the
    latents' channels, but for Sana's, Flux2Klein's and QwenImage's: 4 instead of 32, 32 and 16.
    vae: takes the place of the tiny one; the transformer gets as many latent channels as it has.
    transformer_config: replaces the family's own values. `guidance_embeds=False` makes Flux schnell, whose scheduler
    does not shift. The stock PixArtAlphaPipeline gives a transformer the resolution and the aspect ratio if its
    `sample_size` is 128 (it then has embedders for them by default, and 64-pixel images still work), and only then.
    `use_style_cond_and_image_meta_size=False` makes HunyuanDiT 1.2, whose noise schedule is another one.
    """
    build, vae_config = FAMILIES[family]
    vae = vae or build_tiny_vae(seed=seed, **vae_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = build(vae.config.get("z_dim") or vae.config.latent_channels, transformer_config)
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
            if parameter.ndim > 1 and not name.startswith(OUTPUTS):
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


def _chroma(channels, config):
    own = {"in_channels": 4 * channels, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
    own |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    own |= {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    flux, transformer = _flux(channels, {}), diffusers.ChromaTransformer2DModel(**{**own, **config})
    parts = {"tokenizer": flux["tokenizer_2"], "text_encoder": flux["text_encoder_2"]}
    return {"transformer": transformer, "scheduler": flux["scheduler"], **parts}


def _flux2_klein(channels, config):
    own = {"in_channels": 4 * channels, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}
    own |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
    own |= {"joint_attention_dim": 3 * 8}  # three of the text encoder's layers
    shift = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    tokenizer = _qwen_tokenizer()
    return {
        "transformer": diffusers.Flux2Transformer2DModel(**{**own, **config}),
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift, shift=3.0, use_dynamic_shifting=True),
        "tokenizer": tokenizer,
        "text_encoder": _qwen3(Qwen3ForCausalLM, tokenizer, layers=28, width=8),  # layer 27 is the last one read
        "is_distilled": False,
    }


def _qwen_image(channels, config):
    own = {"in_channels": 4 * channels, "out_channels": channels, "num_layers": 2}
    own |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    own |= {"joint_attention_dim": 16}
    shift = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    shift |= {"shift": 1.0, "shift_terminal": 0.02, "use_dynamic_shifting": True}
    transformer = diffusers.QwenImageTransformer2DModel(**{**own, **config})
    _make_responsive(transformer)  # the first time of two: once, prompts hardly differ
    tokenizer = _qwen_tokenizer(QWEN_IMAGE_WORDS)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift),
        "tokenizer": tokenizer,
        "text_encoder": _qwen_vl(tokenizer, width=16),
    }


def _z_image(channels, config):
    own = {"in_channels": channels, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    own |= {"axes_dims": [4, 6, 6], "cap_feat_dim": 16}
    transformer = diffusers.ZImageTransformer2DModel(**{**own, **config})
    torch.nn.init.normal_(transformer.x_pad_token)  # zero by default: neither would show
    torch.nn.init.normal_(transformer.cap_pad_token)
    tokenizer = _qwen_tokenizer()
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": tokenizer,
        "text_encoder": _qwen3(Qwen3Model, tokenizer, layers=2, width=16),
    }


def _lumina2(channels, config):
    own = {"in_channels": channels, "sample_size": LATENT_SIZE, "hidden_size": 32, "num_layers": 2}
    own |= {"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
    own |= {"axes_dim_rope": (4, 6, 6), "cap_feat_dim": 16}
    transformer = diffusers.Lumina2Transformer2DModel(**{**own, **config})
    _make_responsive(transformer)  # the first time of two: a caption follows a long text that is always the same
    tokenizer, text_encoder = _gemma(width=16)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }


def _aura_flow(channels, config):
    own = {"in_channels": channels, "out_channels": channels, "sample_size": LATENT_SIZE, "pos_embed_max_size": 12**2}
    own |= {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    own |= {"caption_projection_dim": 16, "joint_attention_dim": 32}
    tokenizer, text_encoder = _t5(width=32, config_class=UMT5Config, model_class=UMT5EncoderModel)
    return {
        "transformer": diffusers.AuraFlowTransformer2DModel(**{**own, **config}),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }


def _hunyuan_dit(channels, config):
    own = {"in_channels": channels, "patch_size": 2, "sample_size": LATENT_SIZE}
    own |= {"num_layers": 4}  # the fewest with a long skip connection: from the first block to the last
    own |= {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "pooled_projection_dim": 16}
    own |= {"cross_attention_dim": 24, "cross_attention_dim_t5": 32}  # BERT's and T5's widths
    transformer = diffusers.HunyuanDiT2DModel(**{**own, **config})
    beta_end = 0.03 if transformer.config.use_style_cond_and_image_meta_size else 0.018
    noise = {"beta_start": 0.00085, "beta_end": beta_end, "beta_schedule": "scaled_linear", "steps_offset": 1}
    tokenizer, text_encoder = _bert(width=24)
    tokenizer_2, text_encoder_2 = _t5(width=32)
    return {
        "transformer": transformer,
        "scheduler": DDPMScheduler(**noise, prediction_type="v_prediction", clip_sample=False),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _t5(width, config_class=T5Config, model_class=T5EncoderModel):
    """T5's tokenizer, of single characters, and its encoder (v1.1: gated feed-forward layers), or one alike."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -2.0) for character in CHARACTERS)]
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    config = config_class(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes)
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512), model_class(config).eval()


def _gemma(width):
    """Gemma's tokenizer, of single characters, and its decoder, whose last hidden states are what Sana reads."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *CHARACTERS]
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)  # False by default, unlike Gemma's
    return tokenizer, Gemma2Model(Gemma2Config(vocab_size=len(tokens), **sizes)).eval()


def _bert(width):
    """BERT's tokenizer, of single characters, alone or inside of a word, and its encoder."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokens), max_position_embeddings=77, initializer_range=0.2, **sizes)
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)
    return tokenizer, BertModel(config).eval()


def _qwen_tokenizer(words=()):
    """Qwen's tokenizer with the 256 bytes, three specials, no merges, and `words` as one token each."""
    vocabulary = {token: i for i, token in enumerate(QWEN_TOKENS)}
    specials = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, chat_template=CHAT_TEMPLATE, model_max_length=2048, **specials)
    tokenizer.add_tokens(list(words))
    return tokenizer


def _qwen_sizes(tokenizer, layers, width):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 32, "initializer_range": 0.2}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return {**sizes, "pad_token_id": pad, "bos_token_id": pad, "eos_token_id": end}


def _qwen3(model_class, tokenizer, layers, width):
    config = Qwen3Config(**_qwen_sizes(tokenizer, layers, width), head_dim=8, tie_word_embeddings=True)
    return model_class(config).eval()


def _qwen_vl(tokenizer, width):
    """Qwen2.5-VL, whose vision tower no text-to-image pipeline uses."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}  # half of the heads' 8 channels
    text = {**_qwen_sizes(tokenizer, 2, width), "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


SHIFTED = {"latent_channels": 16, "post_quant_conv": False}
FLUX_VAE = {**SHIFTED, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FAMILIES = {  # what builds all but the VAE, and the VAE's settings where they are not Stable Diffusion's
    "DiT": (_dit, {}),
    "StableDiffusion3": (_sd3, {**SHIFTED, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "PixArtAlpha": (_pixart, {}),
    "PixArtSigma": (_pixart, {"scaling_factor": 0.13025}),
    "Sana": (_sana, {"kind": "AutoencoderDC", "scaling_factor": 0.41407}),
    "Flux": (_flux, FLUX_VAE),
    "Chroma": (_chroma, FLUX_VAE),
    "Flux2Klein": (_flux2_klein, {"kind": "AutoencoderKLFlux2"}),
    "QwenImage": (_qwen_image, {"kind": "AutoencoderKLQwenImage"}),
    "ZImage": (_z_image, FLUX_VAE),
    "Lumina2": (_lumina2, FLUX_VAE),
    "AuraFlow": (_aura_flow, {"scaling_factor": 0.13025}),
    "HunyuanDiT": (_hunyuan_dit, {"scaling_factor": 0.13025}),
}
