"""Train the demo's small Stable Diffusion pipeline from scratch on a CPU.

    python demo/prepare_photos.py
    python demo/make_demo_model.py --output_dir demo/model

Stage one trains the autoencoder on crops of the photographs, stage two the text encoder and the denoiser on its
latents. The result is a stock `StableDiffusionPipeline`. A finished `vae` folder in the output folder is reused, so
that the second stage can be repeated alone. The random numbers depend on `--seed` only.

`--vae_minutes` and `--unet_minutes` end a stage by the clock, the learning rate following. `demo/model` in this
repository was made so, with 24 and 13 minutes on one core of an AMD EPYC, about the default numbers of steps.
"""

import argparse
import itertools
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torchvision is missing

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from prepare_photos import PHOTOS, SCALES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


RESOLUTION = 128
LATENT_CHANNELS = 16
TEXT_WIDTH = 64
MAX_TOKENS = 16


def load_photos(folder: Path, size: int) -> tuple[torch.Tensor, list[str]]:
    """The crops of a folder with `metadata.jsonl`, as [N, 3, size, size] in [-1, 1], and their captions."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).resize((size, size), Image.Resampling.LANCZOS) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, [row["text"] for row in rows]


def save_grid(images: torch.Tensor, path: Path, columns: int) -> None:
    """Write [N, 3, H, W] in [-1, 1] as one picture."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    grid = Image.new("RGB", (columns * width, math.ceil(len(pixels) / columns) * height))
    for i, image in enumerate(pixels):
        grid.paste(Image.fromarray(image), (i % columns * width, i // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


class Training:
    """Optimizer, learning rate, average weights and progress of one stage, which ends after `steps` or `minutes`.

    The learning rate warms up and falls along a cosine. Given `minutes` it follows the clock where that is ahead of
    the steps, so the stage always ends at a low rate; then the result depends on the machine's speed.
    """

    def __init__(self, name: str, parameters, steps: int, minutes: float | None, lr: float, weight_decay: float):
        self.name, self.parameters = name, list(parameters)
        self.steps, self.seconds, self.lr = steps, 60 * minutes if minutes else math.inf, lr
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.ema = EMAModel(self.parameters, decay=0.998)
        self.step, self.start, self.losses = 0, time.monotonic(), []

    @property
    def done(self) -> float:
        """What share of the stage is over, from 0 to 1."""
        return min(1.0, max(self.step / self.steps, (time.monotonic() - self.start) / self.seconds))

    def update(self, loss: torch.Tensor, shown: torch.Tensor) -> None:
        """One optimizer step; `shown` is the loss to report."""
        rate = min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done)))
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1
        self.losses.append(shown.detach())
        if self.step % 100 == 0:
            seconds, mean = time.monotonic() - self.start, torch.stack(self.losses).mean().item()
            print(f"{self.name} step {self.step} ({self.done:.0%}, {seconds:.0f} s) loss {mean:.4f}", flush=True)
            self.losses = []

    @contextmanager
    def averaged(self):
        """Inside, the models have their average weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        yield
        self.ema.restore(self.parameters)


# ---------------------------------------------------------------- autoencoder


def make_vae() -> AutoencoderKL:
    """Four down and four up blocks, factor 8, as Stable Diffusion's, but narrow."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L2, and L1 at full, half and quarter size, on the pixels and on their gradients, which keeps edges sharp."""
    error = output - target
    loss = error.square().mean()
    for _ in range(3):
        loss = loss + error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss


def random_patches(photos: torch.Tensor, batch_size: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """`batch_size` squares of `side` pixels, each from another photo and mirrored half of the time."""
    patches = []
    for index in rng.integers(len(photos), size=batch_size):
        top, left = rng.integers(photos.shape[-1] - side + 1, size=2)
        patch = photos[index, :, top : top + side, left : left + side]
        patches.append(patch.flip(-1) if rng.random() < 0.5 else patch)
    return torch.stack(patches)


def train_vae(photo_dir: Path, steps: int, minutes: float | None, seed: int, grid_path: Path) -> AutoencoderKL:
    """Train the autoencoder: small patches first, whole images at the end, as GroupNorm depends on the size."""
    pools = [load_photos(photo_dir, size)[0] for size in (RESOLUTION, 160)]
    vae, rng = make_vae(), np.random.default_rng(seed)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    training = Training("vae", vae.parameters(), steps, minutes, lr=1.5e-3, weight_decay=1e-4)
    while training.done < 1:
        side, batch_size = (64, 6) if training.done < 0.75 else (RESOLUTION, 2)
        pixels = random_patches(pools[rng.integers(2)], batch_size, side, rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output.float(), pixels)
        training.update(loss + 5e-4 * kl, shown=loss)
        if training.step % 500 == 0:
            with training.averaged():
                show_reconstructions(vae, pools[0], grid_path)
    training.ema.copy_to(vae.parameters())
    show_reconstructions(vae, pools[0], grid_path)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def show_reconstructions(vae: AutoencoderKL, photos: torch.Tensor, path: Path) -> None:
    """A row of photos above their reconstructions."""
    some = photos[:: max(1, len(photos) // 10)][:10]
    save_grid(torch.cat([some, vae.decode(vae.encode(some).latent_dist.mean).sample]), path, columns=len(some))


@torch.no_grad()
def encode_photos(vae: AutoencoderKL, photos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the photos' posteriors, unscaled."""
    posteriors = [vae.encode(batch).latent_dist for batch in photos.split(16)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


# ---------------------------------------------------------------- text


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows all bytes, and the words of the captions as one token each."""
    codes = [c for c in range(256) if 33 <= c <= 126 or 161 <= c <= 172 or c >= 174]
    characters = [chr(c) for c in codes] + [chr(256 + i) for i in range(256 - len(codes))]  # GPT-2's byte alphabet
    tokens = characters + [c + "</w>" for c in characters]
    captions = {template.format(subject) for _, template, _ in SCALES for subject, _ in PHOTOS.values()}
    merges = []
    for word in sorted({word for caption in captions for word in caption.replace("-", " - ").split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            parts = ["".join(merge), *parts[2:]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    padding = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
    return tokenizer(captions, return_tensors="pt", **padding).input_ids


# ---------------------------------------------------------------- denoiser


def make_unet() -> UNet2DConditionModel:
    """Attention on 8 x 8 and 4 x 4 positions only: on 16 x 16 it would take a third of the time."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train_denoiser(
    latents: tuple[torch.Tensor, torch.Tensor],
    captions: list[str],
    tokenizer: CLIPTokenizer,
    noise_scheduler: DDPMScheduler,
    steps: int,
    minutes: float | None,
    batch_size: int,
    show_samples,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train text encoder and UNet on scaled latents (means, standard deviations), a tenth of them without caption."""
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    sizes = [model.num_parameters() / 1e6 for model in (unet, text_encoder)]
    print(f"UNet: {sizes[0]:.2f}M parameters, text encoder: {sizes[1]:.2f}M")
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    training = Training("unet", parameters, steps, minutes, lr=1.5e-3, weight_decay=1e-2)
    means, stds = latents
    # Min-SNR weights (Hang et al., gamma 5): the plain loss learns grain long before it learns shapes.
    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    ids, empty_ids = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    order = itertools.chain.from_iterable(torch.randperm(len(means)).tolist() for _ in itertools.count())
    while training.done < 1:
        index = torch.tensor(list(itertools.islice(order, batch_size)))
        z0 = means[index] + stds[index] * torch.randn_like(means[index])
        noise = torch.randn_like(z0)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,))
        dropped = torch.rand(batch_size, 1) < 0.1
        hidden_states = text_encoder(torch.where(dropped, empty_ids, ids[index]))[0]
        prediction = unet(noise_scheduler.add_noise(z0, noise, timesteps), timesteps, hidden_states).sample
        loss = (prediction - noise).square().mean(dim=(1, 2, 3))
        training.update((weights[timesteps] * loss).mean(), shown=loss.mean())
        if training.step % 1000 == 0:
            with training.averaged():
                show_samples(unet, text_encoder)
    training.ema.copy_to(parameters)
    show_samples(unet, text_encoder)
    return unet.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False)


def make_pipeline(vae, text_encoder, tokenizer, unet, noise_scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save in half precision, but not the text encoder: transformers loads a model in the precision of its file."""
    pipeline.vae.half()
    pipeline.unet.half()
    pipeline.save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's small Stable Diffusion pipeline from scratch.")
    parser.add_argument("--photo_dir", default="demo/photos/train", help="Training crops and their metadata.jsonl.")
    parser.add_argument("--output_dir", default="demo/model", help="Where the pipeline is saved.")
    parser.add_argument("--picture_dir", default="demo/output/make_model", help="Where pictures of the progress go.")
    parser.add_argument("--vae_steps", type=int, default=8200, help="Training steps of the autoencoder.")
    parser.add_argument("--vae_minutes", type=float, help="End its training after that time at the latest.")
    parser.add_argument("--unet_steps", type=int, default=2700, help="Training steps of denoiser and text encoder.")
    parser.add_argument("--unet_minutes", type=float, help="End their training after that time at the latest.")
    parser.add_argument("--batch_size", type=int, default=24, help="Batch size of the second stage.")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; one is fastest unless the cores are idle."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of all random choices.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    photo_dir, output_dir, picture_dir = Path(args.photo_dir), Path(args.output_dir), Path(args.picture_dir)

    torch.manual_seed(args.seed)
    photos, captions = load_photos(photo_dir, RESOLUTION)
    if (output_dir / "vae").is_dir():
        print(f"Reusing the autoencoder in {output_dir / 'vae'}.")
        vae = AutoencoderKL.from_pretrained(output_dir / "vae").requires_grad_(False)
        means, stds = encode_photos(vae, photos)
    else:
        vae = train_vae(photo_dir, args.vae_steps, args.vae_minutes, args.seed, picture_dir / "reconstructions.png")
        means, stds = encode_photos(vae, photos)
        vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
        vae.half().save_pretrained(output_dir / "vae")
        vae.float()
    scaling_factor = vae.config.scaling_factor
    print(f"scaling_factor {scaling_factor}; the posteriors' scaled deviation is {stds.mean() * scaling_factor:.3f}")

    # Another seed for the second stage, so that it does not depend on whether the first one ran.
    torch.manual_seed(args.seed + 1)
    tokenizer = make_tokenizer(output_dir / "tokenizer")
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    prompts = [SCALES[0][1].format(subject) for subject, _ in PHOTOS.values()]

    def show_samples(unet, text_encoder):
        pipeline = make_pipeline(vae, text_encoder, tokenizer, unet, noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(2 * len(prompts))]
        images = pipeline(
            2 * prompts, generator=generators, num_inference_steps=25, guidance_scale=4.0, output_type="pt"
        ).images
        save_grid(images * 2 - 1, picture_dir / "samples.png", columns=len(prompts))

    latents = (means * scaling_factor, stds * scaling_factor)
    unet, text_encoder = train_denoiser(
        latents,
        captions,
        tokenizer,
        noise_scheduler,
        args.unet_steps,
        args.unet_minutes,
        args.batch_size,
        show_samples,
    )
    save_pipeline(make_pipeline(vae, text_encoder, tokenizer, unet, noise_scheduler), output_dir)
    for name in ("vocab.json", "merges.txt"):  # tokenizer.json holds both
        (output_dir / "tokenizer" / name).unlink(missing_ok=True)
    print(f"Saved the pipeline to {output_dir}.")


if __name__ == "__main__":
    main()
