"""What full-size models cost, by the script's own --dry_run: no weights, no download, no GPU.

    python benchmarks/dry_runs.py

Peak bytes and FLOPs of a training step of Stable Diffusion 1.5 and SDXL, for the settings that the README recommends.
The models are written to a temporary folder as config files only.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tiny_models import build_photo_folder, build_tiny_tokenizer  # noqa: E402

import train_lpl_sd  # noqa: E402


WIDTHS = (320, 640, 1280, 1280)
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS = {
    "SD 1.5": {
        "sample_size": 64,
        "block_out_channels": WIDTHS,
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": WIDTHS[:3],
        "down_block_types": (PLAIN, CROSS, CROSS),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXT_ENCODERS = {  # CLIP-L and, for SDXL, OpenCLIP-bigG
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}


def write_model(folder, name):
    """The files of a pipeline without its weights. Returns the folder."""
    xl = name == "SDXL"
    index = {"_class_name": f"StableDiffusion{'XL' * xl}Pipeline", "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for suffix in ("", "_2") if xl else ("",):
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        text_encoder = f"text_encoder{suffix}"
        index[text_encoder] = ["transformers", "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"]
        CLIPTextConfig(**TEXT_ENCODERS[text_encoder]).save_pretrained(folder / text_encoder)
        build_tiny_tokenizer().save_pretrained(folder / f"tokenizer{suffix}")
    downs = UNETS[name]["down_block_types"]
    unet = {"in_channels": 4, "out_channels": 4, **UNETS[name]}
    ups = tuple(down.replace("Down", "Up") for down in reversed(downs))
    depth = 4
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    noise = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
    for part, model_class, config in (
        ("unet", UNet2DConditionModel, {**unet, "up_block_types": ups}),
        ("vae", AutoencoderKL, vae),
        ("scheduler", DDIMScheduler, noise),
    ):
        (folder / part).mkdir()
        model = {"_class_name": model_class.__name__, **config}
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(model))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def count(model, photos, *flags):
    """The numbers of a dry run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--output_dir", model / "out"]
    words += ["--report_to", "none", "--max_train_steps", 1, "--seed", 0, "--dry_run", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        return train_lpl_sd.main(train_lpl_sd.parse_args([str(word) for word in words]))


SAVING = ("--mixed_precision", "bf16", "--gradient_checkpointing")
CACHED = ("--cache_latents", "--center_crop", "--cache_text_embeddings")
RUNS = {  # model, flags
    "SD 1.5 at 512, full, batch 4": ("SD 1.5", (*SAVING, "--train_batch_size", 4)),
    "SD 1.5 at 512, LoRA, batch 4": ("SD 1.5", (*SAVING, "--train_batch_size", 4, "--use_lora")),
    "SDXL at 1024, LoRA, batch 1": ("SDXL", (*SAVING, *CACHED, "--train_batch_size", 1, "--use_lora", "--rank", 16)),
    "SDXL at 1024, LoRA, batch 4": ("SDXL", (*SAVING, *CACHED, "--train_batch_size", 4, "--use_lora", "--rank", 16)),
    "SDXL at 1024, full, batch 1": ("SDXL", (*SAVING, *CACHED, "--train_batch_size", 1, "--use_8bit_adam")),
    "SDXL at 1024, full, batch 4, no checkpointing": (
        "SDXL",
        ("--mixed_precision", "bf16", *CACHED, "--train_batch_size", 4),
    ),
}


def main():
    print("| run | GiB at the peak | of which LPL adds | TFLOP per step | of which LPL's |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        photos = build_photo_folder(Path(folder, "photos"), n=8, size=1024)
        models = {name: write_model(Path(folder, name), name) for name in UNETS}
        for name, (model, flags) in RUNS.items():
            n = count(models[model], photos, *flags)
            memory = f"{n['peak'] / 2**30:.1f} | {(n['peak'] - n['peak_l2']) / 2**30:.1f}"
            print(
                f"| {name} | {memory} | {n['flops'] / 1e12:.1f} | {(n['flops'] - n['flops_l2']) / 1e12:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
