"""Finetune the demo's small Stable Diffusion twice, with the plain loss and with LPL, and compare the two.

    python demo/run_demo.py

ends with the picture `demo/output/comparison.png` and the table `demo/output/table.md`. Both models start from
`demo/model` and see the same batches and the same noise. What is already there is reused; delete `demo/output` to
start again.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# The demo is run from anywhere, its modules and those of the repository are found, and every path printed is relative.
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torchvision is missing
# The models are so small that threads cost more than they bring, and stall when anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL, PHOTOS, OUTPUT = Path("demo/model"), Path("demo/photos"), Path("demo/output")
LABELS = {"before": "before", "l2": "l2", "lpl": "l2 + LPL"}
NOISE_LEVELS = (0.25, 0.5, 1.0, 1.5)  # sigma / alpha; LPL applies up to 1.5 at 128 pixels


# ---------------------------------------------------------------- training


def launch() -> str:
    """How the scripts are started."""
    return "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


def environment() -> dict[str, str]:
    """With the `accelerate` of this environment, activated or not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def training_command(output_dir: Path, lpl_flags: str, args: argparse.Namespace) -> list[str]:
    """What a user would type."""
    command = f"""
        {launch()}
        train_lpl_sd.py --pretrained_model_name_or_path {MODEL.as_posix()}
        --train_data_dir {(PHOTOS / "train").as_posix()} --caption_column text --resolution 128
        --train_batch_size {args.train_batch_size} --max_train_steps {args.max_train_steps} --logging_steps 10
        --learning_rate {args.learning_rate} --lr_scheduler cosine --lr_warmup_steps 10
        --proportion_empty_prompts 0.1 --use_ema --seed {args.seed} {lpl_flags}
        --validation_prompts "a photo of a cat" "a photo of a flower" --num_validation_images 1
        --validation_guidance_scale {args.guidance_scale} --validation_steps {args.max_train_steps}
        --skip_final_inference --output_dir {output_dir.as_posix()} --report_to tensorboard"""
    return shlex.split(command)


def finetune(output_dir: Path, lpl_flags: str, args: argparse.Namespace) -> None:
    """Run the training script, unless the folder holds the finished result of the same command and model."""
    command = training_command(output_dir, lpl_flags, args)
    weights = (MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    made_by = f"{shlex.join(command)}\n{hashlib.sha256(weights).hexdigest()}\n"
    note = output_dir / "made_by.txt"
    if note.is_file() and note.read_text() == made_by:
        print(f"\nReusing the finetuned model in {output_dir}.")
        return
    shutil.rmtree(output_dir, ignore_errors=True)
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    subprocess.run(command, check=True, env=environment())
    note.write_text(made_by)


def read_log(output_dir: Path) -> list[dict]:
    """The lines of the run's `train_log.jsonl`."""
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def final_mean(log: list[dict], key: str, share: float = 0.3) -> float | None:
    """Mean of a logged value over the last `share` of the lines; None if it was never logged."""
    values = [row[key] for row in log[-max(1, round(share * len(log))) :] if row.get(key) is not None]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- evaluation


def load_crops(folder: Path, size: int = 128):
    """Captions and pixels [N, 3, size, size] in [-1, 1] of a folder with `metadata.jsonl`."""
    import numpy as np
    import torch
    from PIL import Image

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).resize((size, size), Image.Resampling.LANCZOS) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return [row["text"] for row in rows], pixels.float() / 127.5 - 1


def load_pipeline(folder: Path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar as diffusers_disable_progress_bar
    from transformers.utils.logging import disable_progress_bar

    diffusers_disable_progress_bar()
    disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(vae, pixels):
    """Scaled latents, the means of the posteriors."""
    import torch

    with torch.no_grad():
        return torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(8)]) * vae.config.scaling_factor


def decode(vae, latents):
    """Pixels in [-1, 1] of scaled latents."""
    import torch

    with torch.no_grad():
        images = [vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(8)]
    return torch.cat(images).clamp(-1, 1)


def draw_samples(pipeline, captions: list[str], guidance_scale: float):
    """One image per caption, in [-1, 1]; the i-th starts from the noise of seed i, whatever the model."""
    import torch

    images = []
    for start in range(0, len(captions), 10):
        seeds = range(start, min(start + 10, len(captions)))
        output = pipeline(
            captions[start : start + 10],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=25,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        images.append(output.images * 2 - 1)
    return torch.cat(images)


def one_step_estimate(pipeline, z0, captions: list[str], level: float):
    """The clean estimate z0_hat after one call of the UNet on latents z0 noised to sigma / alpha = `level`."""
    import torch

    from lpl_utils import predict_z0

    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer
    ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    abar = scheduler.alphas_cumprod
    timestep = ((1 - abar).sqrt() / abar.sqrt() - level).abs().argmin()
    alpha, sigma = abar[timestep].sqrt().expand(len(z0)), (1 - abar[timestep]).sqrt().expand(len(z0))
    z_t = alpha[0] * z0 + sigma[0] * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = pipeline.unet(z_t, timestep, pipeline.text_encoder(ids)[0]).sample
    return predict_z0(prediction, z_t, alpha, sigma, scheduler.config.prediction_type)


def one_step_errors(pipeline, lpl, z0, captions: list[str]):
    """Squared error and LPL of the estimates of latents z0 at every noise level, both [levels, N]."""
    import torch

    estimates = [one_step_estimate(pipeline, z0, captions, level) for level in NOISE_LEVELS]
    squared = torch.stack([(z0_hat - z0).square().mean(dim=(1, 2, 3)) for z0_hat in estimates])
    with torch.no_grad():
        return squared, torch.stack([lpl(z0_hat, z0)[0] for z0_hat in estimates])


# ---------------------------------------------------------------- report


def write_table(rows: list[tuple], path: Path) -> None:
    """Write and print rows as markdown; numbers with three significant digits, None as a dash."""

    def text(value) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    path.write_text("\n".join(lines) + "\n")
    print("\n" + path.read_text())


def draw_comparison(columns: list[str], rows: dict, path: Path, scale: int = 2) -> None:
    """Draw labelled rows of images ([N, 3, H, W] in [-1, 1]), enlarged `scale` times."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = (scale * side for side in next(iter(rows.values())).shape[-2:])
    left, top, gap = 170, 36, 4
    font = ImageFont.load_default(size=20)
    size = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(columns):
        draw.text((left + i * (width + gap) + width / 2, top / 2), label, fill="black", font=font, anchor="mm")
    for j, (label, images) in enumerate(rows.items()):
        y = top + j * (height + gap)
        draw.multiline_text((12, y + height / 2), label, fill="black", font=font, anchor="lm")
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(pixels):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            picture.paste(enlarged, (left + i * (width + gap), y))
    picture.save(path)


def paired_difference(a, b) -> str:
    """Mean and standard error over the crops of b - a, relative to the mean of a; both [N]."""
    difference = (b - a) / a.mean()
    error = difference.std() / len(difference) ** 0.5
    return f"{100 * difference.mean():+.1f} +- {100 * error:.1f} %"


def compare(runs: dict[str, Path], args: argparse.Namespace) -> None:
    """Measure the model before and after the two finetunings, write the picture and the table."""

    from lpl_utils import LatentPerceptualLoss
    from metrics import power_spectrum_error

    captions, pixels = load_crops(PHOTOS / "heldout")
    train_captions, train_pixels = load_crops(PHOTOS / "train")
    pipelines = {"before": load_pipeline(MODEL), **{name: load_pipeline(folder) for name, folder in runs.items()}}
    vae = pipelines["before"].vae
    lpl = LatentPerceptualLoss(vae, chunk_size=4)

    # Samples imitate the training crops, so their spectra are compared with as many of those, of the same captions.
    prompts = sorted({caption for caption in train_captions if caption.startswith("a photo")})
    chosen = [
        index
        for prompt in prompts
        for index in [i for i, caption in enumerate(train_captions) if caption == prompt][: args.samples_per_prompt]
    ]
    real = train_pixels[chosen]
    sample_captions = [train_captions[i] for i in chosen]
    latents = {"seen": encode(vae, real), "held out": encode(vae, pixels)}
    latent_captions = {"seen": sample_captions, "held out": captions}
    reconstructed = decode(vae, latents["seen"])

    samples, errors, spectra = {}, {}, {}
    for name, pipeline in pipelines.items():
        print(f"Evaluating {LABELS[name]}: {len(chosen)} samples, {len(pixels)} held-out crops ...", flush=True)
        samples[name] = draw_samples(pipeline, sample_captions, args.guidance_scale)
        for crops, z0 in latents.items():
            errors[name, crops] = one_step_errors(pipeline, lpl, z0, latent_captions[crops])
        for reference_name, reference in (("real", real), ("reconstructed", reconstructed)):
            for band, value in power_spectrum_error(samples[name], reference).items():
                spectra[name, reference_name, band] = value

    logs = {name: read_log(folder) for name, folder in runs.items()}
    rows = [("", *LABELS.values(), "LPL against l2")]
    for key, label in (
        ("l2", "training: l2 loss"),
        ("lpl", "training: weighted LPL"),
        ("lpl_share", "training: LPL's share"),
    ):
        rows.append((f"{label}, last 30 %", None, *(final_mean(logs[name], key) for name in runs), ""))
    for crops in latents:
        for kind, label in enumerate(("squared error of z0_hat", "LPL of z0_hat")):
            for i, level in enumerate(NOISE_LEVELS):
                values = {name: errors[name, crops][kind][i] for name in pipelines}
                means = (values[name].mean().item() for name in pipelines)
                difference = paired_difference(values["l2"], values["lpl"])
                rows.append((f"{crops} crops: {label}, sigma/alpha {level}", *means, difference))
    for reference_name in ("real", "reconstructed"):
        for band in ("low", "mid", "high"):
            values = (f"{spectra[name, reference_name, band]:+.2f}" for name in pipelines)
            rows.append((f"samples: {band}-frequency power against {reference_name} (nats)", *values, ""))
    write_table(rows, OUTPUT / "table.md")

    # For each subject the first crop and its reconstruction; what the models make of its noised latents in one step;
    # and what they draw from its caption.
    firsts = [sample_captions.index(prompt) for prompt in prompts]
    labels = [prompt.removeprefix("a photo of ") for prompt in prompts]
    estimates = {
        name: decode(vae, one_step_estimate(pipelines[name], latents["seen"][firsts], prompts, NOISE_LEVELS[-1]))
        for name in runs
    }
    picture = {
        "real": real[firsts],
        "VAE\nreconstruction": reconstructed[firsts],
        "l2\n(one step)": estimates["l2"],
        "l2 + LPL\n(one step)": estimates["lpl"],
        "l2\n(sample)": samples["l2"][firsts],
        "l2 + LPL\n(sample)": samples["lpl"][firsts],
    }
    draw_comparison(labels, picture, OUTPUT / "comparison.png")
    print(f"See {OUTPUT / 'comparison.png'} and {OUTPUT / 'table.md'}.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune with and without LPL, and compare.")
    parser.add_argument("--max_train_steps", type=int, default=160, help="Training steps of each run.")
    parser.add_argument("--train_batch_size", type=int, default=8, help="Images per step.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Peak learning rate.")
    parser.add_argument("--samples_per_prompt", type=int, default=4, help="Sampled images per caption and model.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance of the samples.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of both training runs.")
    return parser.parse_args()


def main() -> None:
    args, start = parse_args(), time.monotonic()
    from prepare_photos import prepare_photos

    prepare_photos(PHOTOS)
    runs = {"l2": OUTPUT / "l2", "lpl": OUTPUT / "lpl"}
    finetune(runs["l2"], "--lpl_weight 0", args)
    finetune(runs["lpl"], "--lpl_weight auto --lpl_target_share 0.2", args)
    compare(runs, args)
    print(f"The demo took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
