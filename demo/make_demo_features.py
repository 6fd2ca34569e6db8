"""Train the small network on whose features evaluate_lpl.py can compare the demo's models without a download.

    python demo/prepare_photos.py
    python demo/make_demo_features.py --output_dir demo/features

It tells which of the photographs a crop is from, however it is mirrored, shifted, blurred or tinted: some minutes on
one core. Seven photographs make no DINOv2: its numbers compare the demo's models, and say nothing about others.
"""

import argparse
import json
import os
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torchvision is missing

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from prepare_photos import PHOTOS
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification


SIZE = 128


def load_crops(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [N, 3, SIZE, SIZE] in [-1, 1] and the numbers of their photographs [N]."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    subjects = [subject for subject, _ in PHOTOS.values()]
    images = [Image.open(folder / row["file_name"]).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    labels = [next(i for i, subject in enumerate(subjects) if row["text"].endswith(f" {subject}")) for row in rows]
    return pixels / 127.5 - 1, torch.tensor(labels)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, 3, size, size] -> the same with 7/8 of the size: mirrored, shifted, brightened, tinted."""
    margin = pixels.shape[-1] // 8
    top, left = torch.randint(margin + 1, (2,), generator=generator).tolist()
    pixels = pixels[:, :, top : top + 7 * margin, left : left + 7 * margin]
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    gain = 1 + 0.2 * torch.randn(len(pixels), 3, 1, 1, generator=generator)
    return pixels * gain + 0.1 * torch.randn(len(pixels), 3, 1, 1, generator=generator)


def train(model, pixels, labels, steps, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(augment(pixels[chosen], generator)).logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's feature extractor.")
    parser.add_argument("--photos", type=Path, default=Path("demo/photos"))
    parser.add_argument("--output_dir", type=Path, default=Path("demo/features"))
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**widths, layer_type="basic", num_labels=len(PHOTOS)))
    train(model, *load_crops(args.photos / "train"), args.max_train_steps, args.train_batch_size, args.seed)

    model.eval()
    pixels, labels = load_crops(args.photos / "heldout")
    with torch.no_grad():
        right = (model(pixels).logits.argmax(dim=1) == labels).float().mean().item()
    print(f"{right:.0%} of {len(labels)} held-out crops, which share no pixel with those trained on, are told right.")
    model.save_pretrained(args.output_dir)
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
