"""Tiny random Stable Diffusion pipelines and photo folders, built offline in well under a second."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


LEVELS, LEVEL_STEP = 8, 32  # a photo's id is three base-8 digits, one per colour channel
WORDS = ("a red fox", "two boats at sea", "an old street", "a bowl of fruit", "snow on the hills", "a cat, asleep")


def build_tiny_vae(
    kind="AutoencoderKL",
    post_quant_conv=True,
    shift_factor=None,
    seed=0,
    block_out_channels=(8, 16, 16, 16),
    latent_channels=4,
    scaling_factor=None,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
    **config,
):
    """A random VAE in eval mode whose decoder has `len(block_out_channels)` up blocks (4: factor 8).

    kind: "AutoencoderKL", "AsymmetricAutoencoderKL" (a decoder twice as wide as the encoder, as in the paper's),
        "AutoencoderKLFlux2" (latents are scaled by a batch norm's statistics), "AutoencoderKLQwenImage" (of videos;
        latents are scaled by `latents_mean` and `latents_std`; takes multiples of the first of `block_out_channels`):
        with a mid block. "AutoencoderTiny" (as wide everywhere as the first of `block_out_channels`), "AutoencoderDC"
        (the coarse half of the decoder has linear attention, the fine half batch norms): without.
    post_quant_conv: only AutoencoderKL and AutoencoderKLFlux2 can do without.
    shift_factor: only AutoencoderKL can do with it.
    scaling_factor: by default that of SD's, of TAESD or of Sana's VAE; neither Flux2's nor QwenImage's has one.
    norm_num_groups, sample_size: of the first three kinds alone.
    """
    import diffusers

    if not post_quant_conv and kind not in ("AutoencoderKL", "AutoencoderKLFlux2"):
        raise ValueError(f"{kind} does not take post_quant_conv=False.")
    if shift_factor is not None and kind != "AutoencoderKL":
        raise ValueError(f"{kind} does not take a shift factor.")
    if scaling_factor is not None and kind in ("AutoencoderKLFlux2", "AutoencoderKLQwenImage"):
        raise ValueError(f"{kind} does not take a scaling factor.")
    depth = len(block_out_channels)
    scaling_factor = scaling_factor or {"AutoencoderTiny": 1.0, "AutoencoderDC": 0.41407}.get(kind, 0.18215)
    shared = {"latent_channels": latent_channels, "scaling_factor": scaling_factor}
    if kind in ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2"):
        shared |= {
            "norm_num_groups": norm_num_groups,
            "sample_size": sample_size,
            "down_block_types": ("DownEncoderBlock2D",) * depth,
            "up_block_types": ("UpDecoderBlock2D",) * depth,
        }
    if kind == "AutoencoderKL":
        shared |= {
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "shift_factor": shift_factor,
            "use_quant_conv": post_quant_conv,
            "use_post_quant_conv": post_quant_conv,
            "force_upcast": False,
        }
    elif kind == "AutoencoderKLFlux2":
        del shared["scaling_factor"]
        shared |= {
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "use_quant_conv": post_quant_conv,
            "use_post_quant_conv": post_quant_conv,
        }
    elif kind == "AsymmetricAutoencoderKL":
        shared |= {
            "down_block_out_channels": block_out_channels,
            "layers_per_down_block": layers_per_block,
            "up_block_out_channels": tuple(2 * channels for channels in block_out_channels),
            "layers_per_up_block": layers_per_block,
        }
    elif kind == "AutoencoderTiny":  # the last block of each stage is the one that matters: the decoder has two
        shared |= {
            "encoder_block_out_channels": block_out_channels[:1] * depth,
            "decoder_block_out_channels": block_out_channels[:1] * depth,
            "num_encoder_blocks": (layers_per_block,) * depth,
            "num_decoder_blocks": (layers_per_block + 1,) * (depth - 1) + (1,),
        }
    elif kind == "AutoencoderDC":
        fine, coarse = (depth + 1) // 2, depth // 2
        shortcut = block_out_channels[-1] % latent_channels == 0  # it repeats the latents' channels
        shared |= {
            "attention_head_dim": 8,
            "encoder_block_out_channels": block_out_channels,
            "decoder_block_out_channels": block_out_channels,
            "encoder_layers_per_block": (layers_per_block,) * depth,
            "decoder_layers_per_block": (layers_per_block,) * depth,
            "encoder_qkv_multiscales": ((),) * depth,
            "decoder_qkv_multiscales": ((),) * fine + ((5,),) * coarse,
            "decoder_block_types": ("ResBlock",) * fine + ("EfficientViTBlock",) * coarse,
            "decoder_norm_types": ("batch_norm",) * fine + ("rms_norm",) * coarse,
            "decoder_act_fns": ("relu",) * fine + ("silu",) * coarse,
            "encoder_out_shortcut": shortcut,
            "decoder_in_shortcut": shortcut,
        }
    elif kind == "AutoencoderKLQwenImage":
        statistics = torch.Generator().manual_seed(seed)
        shared = {
            "z_dim": latent_channels,
            "base_dim": block_out_channels[0],
            "dim_mult": [channels // block_out_channels[0] for channels in block_out_channels],
            "num_res_blocks": layers_per_block,
            "temperal_downsample": [False] + [True] * (depth - 2),
            "latents_mean": torch.empty(latent_channels).normal_(0, 1, generator=statistics).tolist(),
            "latents_std": torch.empty(latent_channels).uniform_(1.1, 3.3, generator=statistics).tolist(),
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = getattr(diffusers, kind)(**{**shared, **config})
        for module in vae.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # statistics that no batch has: train mode shows
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.02, 0.5)
        if kind == "AutoencoderKLFlux2":  # far from those that would leave the latents as they are
            vae.bn.running_mean.normal_(0, 1)
            vae.bn.running_var.uniform_(2, 6)
        elif kind == "AutoencoderKLQwenImage":
            vae.decoder.conv_out.weight.data *= 2  # grey images else
    return vae.eval()


def build_tiny_tokenizer():
    """CLIP's tokenizer with the 256 bytes (as such, and at the end of a word), two specials and no merges."""
    from transformers import CLIPTokenizer

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def build_tiny_sd(
    folder,
    vae_kind="AutoencoderKL",
    prediction_type="epsilon",
    seed=0,
    scheduler="DDIM",
    sample_size=8,
    unet_channels=(8, 16),
    vae=None,
    xl=False,
    **scheduler_config,
):
    """Saves a stock StableDiffusionPipeline with random weights into `folder` and returns its path.

    scheduler: "DDIM", "PNDM" (which knows no prediction type "sample") or "Euler", with SD's noise schedule.
    sample_size: side of the latents; images are 8 times as large. vae: takes the place of the tiny one.
    xl: a StableDiffusionXLPipeline instead: a second text encoder, of another width, and size and crop conditioning.
    """
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    noise |= {"steps_offset": 1, "prediction_type": prediction_type, **scheduler_config}
    noise_scheduler = {
        "DDIM": lambda: DDIMScheduler(**{"clip_sample": False, "set_alpha_to_one": False, **noise}),
        "PNDM": lambda: PNDMScheduler(**{"skip_prk_steps": True, "set_alpha_to_one": False, **noise}),
        "Euler": lambda: EulerDiscreteScheduler(**noise),
    }[scheduler]()
    vae = vae or build_tiny_vae(vae_kind, seed=seed)
    conditioning = {"cross_attention_dim": 16}
    if xl:  # both encoders' widths; the second's pooled output and six numbers of 8 sinusoids each
        conditioning = {"cross_attention_dim": 16 + 24, "addition_embed_type": "text_time"}
        conditioning |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_tiny_unet(vae.config.latent_channels, unet_channels, sample_size, **conditioning)
        text_encoder = _text_encoder(CLIPTextModel, width=16)
        second = _text_encoder(CLIPTextModelWithProjection, width=24) if xl else None
    components = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "scheduler": noise_scheduler}
    components |= {"tokenizer": build_tiny_tokenizer(), "feature_extractor": None}
    if xl:
        pipeline = StableDiffusionXLPipeline(text_encoder_2=second, tokenizer_2=build_tiny_tokenizer(), **components)
    else:
        pipeline = StableDiffusionPipeline(safety_checker=None, requires_safety_checker=False, **components)
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_tiny_unet(channels, block_out_channels, sample_size, **conditioning):
    """A random UNet of two levels, in eval mode; the coarse one has cross-attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **conditioning,
    ).eval()


def _text_encoder(model_class, width):
    from transformers import CLIPTextConfig

    tokenizer = build_tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    widths = {"hidden_size": width, "intermediate_size": 32, "projection_dim": 16}
    return model_class(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **layers, **widths)).eval()


def build_photo_folder(folder, n, size, seed=0):
    """`n` <= 512 PNGs of `size` pixels (an int, or width and height) and `metadata.jsonl` (file_name, text).

    The mean colour of photo i is a code of i (`photo_id` reads it back, also from a crop, a flip or a resized copy);
    a texture whose mean is zero makes every photo different from a flat one. Returns the folder.
    """
    if n > LEVELS**3:
        raise ValueError(f"At most {LEVELS**3} photos can be told apart.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    width, height = (size, size) if isinstance(size, int) else size
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        code = (211 * i + 37) % LEVELS**3  # 211 is odd: one to one, and neighbours differ in more than one channel
        colour = np.array([code // LEVELS**2, code // LEVELS % LEVELS, code % LEVELS]) * LEVEL_STEP + LEVEL_STEP // 2
        texture = random.integers(-6, 7, (height, width, 1))
        texture = texture - np.rint(texture.mean()).astype(int)
        pixels = np.clip(colour + texture, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"photo_{i:04d}.png")
        rows.append({"file_name": f"photo_{i:04d}.png", "text": f"{WORDS[i % len(WORDS)]}, number {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def photo_id(photo):
    """The i of a photo made by `build_photo_folder`: a PIL image, or a tensor [3, H, W] with values in [-1, 1]."""
    if isinstance(photo, torch.Tensor):
        mean = (photo.double().mean((1, 2)).numpy() + 1) * 127.5
    else:
        mean = np.asarray(photo.convert("RGB"), dtype=np.float64).mean((0, 1))
    digits = np.rint((mean - LEVEL_STEP // 2) / LEVEL_STEP).astype(int)
    code = int(digits @ [LEVELS**2, LEVELS, 1])
    return (code - 37) * pow(211, -1, LEVELS**3) % LEVELS**3
