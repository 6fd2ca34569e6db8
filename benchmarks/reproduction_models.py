"""Make what benchmarks/reproduce.py starts from: crops of photographs, an autoencoder, denoisers, feature extractors.

    python benchmarks/reproduction_models.py vae denoiser features
    python benchmarks/reproduction_models.py denoiser --size large --prediction_type flow_prediction

The photographs are those inside the scikit-image and scikit-learn wheels; nothing is downloaded. A fifth of each is
held out: no network here has seen a pixel of it. The denoiser is trained by train_lpl_dit.py with the diffusion loss
alone. What is in `benchmarks/reproduction` was made on one core of an AMD EPYC: the autoencoder with
`--vae_minutes 30`, which is about the default number of steps, the denoiser in 62 minutes.
"""

import argparse
import itertools
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]
import run_demo  # noqa: E402, I001  (first: it sets the number of threads)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from make_demo_features import train as train_classifier  # noqa: E402
from make_demo_model import Training, encode_photos, random_patches, reconstruction_loss, save_grid  # noqa: E402
from PIL import Image  # noqa: E402
from prepare_photos import photo_path  # noqa: E402
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification  # noqa: E402


PHOTOS = """
    astronaut.png brick.png camera.png chelsea.png china.jpg coffee.png coins.png flower.jpg grass.png gravel.png
    hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg rocket.jpg
""".split()  # each is a class
CLASSES = [name.partition(".")[0] for name in PHOTOS]
# Of the small size and of the large one, which is meant for a GPU: pixels, batch of the denoiser, autoencoder
SIZES = {"small": (64, 32), "large": (96, 256)}
WIDTHS = {"small": (32, 64, 96), "large": (64, 128, 192, 256)}
LATENT_CHANNELS = {"small": 8, "large": 32}
DENOISER_STEPS = {"small": 12_000, "large": 20_000}


def models_of(size_name):
    """The folder of what was made for a size: the small one's is a part of the repository."""
    return Path("benchmarks/reproduction") if size_name == "small" else Path("benchmarks/output/reproduction-large")


# ---------------------------------------------------------------- photographs


def photographs(size):
    """Class -> its photograph, six crops of `size` pixels high (or wide), and the boxes that are held out of it.

    Every fifth cell of a grid, a knight's move from one to the next, so that what is held out is like the rest.
    """
    found, side = {}, 3 * size // 2
    for name in PHOTOS:
        photo = Image.open(photo_path(name)).convert("RGB")
        growth = 6 * size / min(photo.size)
        photo = photo.resize([round(length * growth) for length in photo.size], Image.Resampling.LANCZOS)
        columns, rows = (length // side for length in photo.size)
        cells = [(i, j) for j in range(rows) for i in range(columns) if (i + 2 * j) % 5 == 1]
        boxes = [(i * side, j * side, (i + 1) * side, (j + 1) * side) for i, j in cells]
        found[name.partition(".")[0]] = photo, boxes
    return found


def random_box(inside, size, rng):
    """A square of 1 to 1.25 times `size` pixels in a box (left, top, right, bottom)."""
    left, top, right, bottom = inside
    side = round(size * rng.uniform(1, 1.25))
    left, top = rng.randint(left, right - side), rng.randint(top, bottom - side)
    return left, top, left + side, top + side


def overlap(one, other):
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def prepare_crops(folder, size, count, held_out):
    """Write `train/CLASS/*.png` and `held_out/CLASS/*.png` below `folder`, which share no pixel of a photograph."""
    if (folder / "complete").exists():
        return
    for name, (photo, cells) in photographs(size).items():
        rng = Random(name)
        anywhere = (random_box((0, 0, *photo.size), size, rng) for _ in itertools.count())
        outside = (box for box in anywhere if not any(overlap(box, cell) for cell in cells))
        inside = (random_box(rng.choice(cells), size, rng) for _ in itertools.count())
        for kind, boxes, number in (("train", outside, count), ("held_out", inside, held_out)):
            place = folder / kind / name
            place.mkdir(parents=True, exist_ok=True)
            for i, box in enumerate(itertools.islice(boxes, number)):
                photo.crop(box).resize((size, size), Image.Resampling.LANCZOS).save(place / f"{i:04d}.png")
    (folder / "complete").touch()


def crops_of(size):
    """Where the crops are, which are made if they are not there."""
    folder = Path("benchmarks/output", f"crops-{size}")
    prepare_crops(folder, size, count=400, held_out=200)
    return folder


def load_crops(folder):
    """Pixels `[N, 3, H, W]` in [-1, 1] and classes `[N]` of the crops of `folder/CLASS`."""
    files = [(i, path) for i, name in enumerate(CLASSES) for path in sorted((folder / name).glob("*.png"))]
    pixels = np.stack([np.asarray(Image.open(path)) for _, path in files])
    labels = torch.tensor([i for i, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


# ---------------------------------------------------------------- autoencoder


def make_vae(size_name):
    """In the shape of Stable Diffusion's: factor 4 in each direction for the small size, 8 for the large one."""
    widths = WIDTHS[size_name]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS[size_name],
        norm_num_groups=8,
        sample_size=SIZES[size_name][0],
    )


def train_vae(size_name, steps, minutes, seed):
    """On pieces of the crops at first, on whole ones at the end, as group norms depend on the size."""
    torch.manual_seed(seed)
    rng, device = np.random.default_rng(seed), "cuda" if torch.cuda.is_available() else "cpu"
    size, folder = SIZES[size_name][0], models_of(size_name)
    pixels = load_crops(crops_of(size) / "train")[0]
    vae = make_vae(size_name).to(device)
    training = Training("vae", vae.parameters(), steps, minutes, lr=2e-3, weight_decay=1e-4)
    while training.done < 1:
        side, batch_size = (size // 2, 16) if training.done < 0.8 else (size, 8)
        batch = random_patches(pixels, batch_size, side, rng).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output.float(), batch)
        training.update(loss + 2e-4 * kl, shown=loss)
    training.ema.copy_to(vae.parameters())
    vae.cpu().eval().requires_grad_(False)
    means, stds = encode_photos(vae, pixels)
    scaling_factor = round(1 / means.std().item(), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.half().save_pretrained(folder / "vae")
    print(f"scaling_factor {scaling_factor}; the scaled posteriors deviate by {stds.mean() * scaling_factor:.3f}")
    show_reconstructions(vae.float(), size)


@torch.no_grad()
def show_reconstructions(vae, size):
    """Prints how close the autoencoder comes to crops it was trained on and to others, and draws some of both."""
    rows = []
    for kind in ("train", "held_out"):
        pixels = load_crops(crops_of(size) / kind)[0][::10]
        rebuilt = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in pixels.split(16)])
        error = (rebuilt.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
        print(f"{kind}: PSNR {-10 * error.log10().mean():.2f} dB")
        some = slice(None, None, max(1, len(pixels) // 15))
        rows += [pixels[some][:15], rebuilt[some][:15]]
    save_grid(torch.cat(rows), Path("benchmarks/output/reconstructions.png"), columns=15)


# ---------------------------------------------------------------- denoiser


def train_denoiser(size_name, prediction_type, steps, seed, output_dir):
    """The paper's MM-DiT on class labels, small, by train_lpl_dit.py with the diffusion loss alone.

    Its min-SNR weights make so short a training learn shapes and not the grain alone.
    """
    (size, batch), folder = SIZES[size_name], models_of(size_name)
    command = f"""
        {run_demo.launch()} train_lpl_dit.py --transformer_config benchmarks/reproduction/{size_name}.json
        --pretrained_vae_model_name_or_path {folder / "vae"} --train_data_dir {crops_of(size) / "train"}
        --resolution {size} --center_crop --cache_latents --prediction_type {prediction_type} --lpl_weight 0
        --snr_gamma 5 --train_batch_size {batch} --max_train_steps {steps} --learning_rate 2e-3 --lr_scheduler cosine
        --lr_warmup_steps 500 --use_ema --ema_decay 0.999 --save_dtype fp16 --logging_steps 100
        --checkpointing_steps 5000 --checkpoints_total_limit 1 --resume_from_checkpoint latest
        --report_to none --seed {seed} --output_dir {output_dir}"""
    print(f"$ {' '.join(command.split())}", flush=True)
    subprocess.run(shlex.split(command), check=True, env=run_demo.environment())
    for path in output_dir.glob("checkpoint-*"):
        shutil.rmtree(path)
    for path in output_dir.rglob("*.fp16.safetensors"):  # it is no variant of anything
        path.rename(path.with_name(path.name.replace(".fp16", "")))
    for path in output_dir.rglob("*.py"):  # a copy of what is here
        path.unlink()


# ---------------------------------------------------------------- feature extractors


def make_features(size_name, steps, seed):
    """Two small networks to measure with: a classifier of the crops, and one whose weights stay random.

    A random network sees statistics of the image and no classes: Naeem et al. 2020 propose it for pictures unlike
    those that the usual extractors were trained on.
    """
    size = SIZES[size_name][0]
    folder = crops_of(size)
    pixels, labels = load_crops(folder / "train")
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    for name in ("classifier", "random"):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(ResNetConfig(**widths, num_labels=len(CLASSES)))
        if name == "classifier":
            train_classifier(model, pixels, labels, steps, 32, seed)
            model.eval()
            held_out, truth = load_crops(folder / "held_out")
            with torch.no_grad():
                right = (model(held_out).logits.argmax(1) == truth).float().mean().item()
            print(f"{right:.0%} of {len(truth)} held-out crops are told right.")
        else:
            with torch.no_grad():
                for batch in pixels[torch.randperm(len(pixels))[:1280]].split(64):  # for the batch norms' statistics
                    model(batch)
        model.save_pretrained(models_of(size_name) / name)
        processor = ConvNextImageProcessorPil(
            size={"shortest_edge": size}, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        processor.save_pretrained(models_of(size_name) / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["vae", "features", "denoiser"])
    parser.add_argument("--size", choices=SIZES, default="small", help="of all models")
    parser.add_argument("--prediction_type", default="epsilon", help="of the denoiser")
    parser.add_argument("--vae_steps", type=int, default=7400)
    parser.add_argument("--vae_minutes", type=float, help="end the autoencoder's training after that time")
    parser.add_argument("--denoiser_steps", type=int, help=f"by size: {DENOISER_STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if "vae" in args.parts:
        train_vae(args.size, args.vae_steps, args.vae_minutes, args.seed)
    if "features" in args.parts:
        make_features(args.size, 1500, args.seed)
    if "denoiser" in args.parts:
        kind = f"{args.size}-{args.prediction_type}"
        steps = args.denoiser_steps or DENOISER_STEPS[args.size]
        train_denoiser(args.size, args.prediction_type, steps, args.seed, models_of(args.size) / kind)


if __name__ == "__main__":
    main()
