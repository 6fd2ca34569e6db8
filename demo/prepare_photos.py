"""Cut training and held-out crops from the photographs inside the scikit-image and scikit-learn wheels.

    python demo/prepare_photos.py --output_dir demo/photos

writes `train/*.png` and `heldout/*.png` (square, 160 pixels), each with a `metadata.jsonl` of `file_name` and `text`.
Nothing is downloaded. A quarter of every photograph, a strip at one side, is kept for the held-out crops, so that the
two sets share no pixel. The result depends on nothing but the flags; a second run reuses folders that are complete.
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from random import Random

from PIL import Image


# What to call each photograph, and the side whose strip is held out. The strips contain texture, not the main subject.
PHOTOS = {
    "astronaut.png": ("an astronaut", "right"),
    "chelsea.png": ("a cat", "left"),
    "coffee.png": ("a cup of coffee", "left"),
    "rocket.jpg": ("a rocket", "left"),
    "motorcycle_left.png": ("a motorcycle", "left"),
    "china.jpg": ("a temple", "right"),
    "flower.jpg": ("a flower", "right"),
}
HELDOUT_SHARE = 0.25
# Side of a crop relative to the shorter side of its region, how to caption it, and its share of the training crops.
SCALES = ((1.0, "a photo of {}", 0.35), (0.75, "a photo of {}", 0.35), (0.5, "a close-up photo of {}", 0.3))


def photo_path(name: str) -> Path:
    """Where the installed package keeps the photograph `name`."""
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ValueError("The demo's photographs ship with scikit-image and scikit-learn: install both.")
        path = Path(spec.origin).parent / folder / name
        if path.is_file():
            return path
    raise ValueError(f"The installed scikit-image and scikit-learn have no photograph named {name}.")


def split_photo(photo: Image.Image, heldout_side: str) -> tuple[Image.Image, Image.Image]:
    """Cut a photograph into its training region and the held-out strip."""
    width, height = photo.size
    strip = round(HELDOUT_SHARE * width)
    if heldout_side == "left":
        return photo.crop((strip, 0, width, height)), photo.crop((0, 0, strip, height))
    return photo.crop((0, 0, width - strip, height)), photo.crop((width - strip, 0, width, height))


def random_crop(region: Image.Image, scale: float, size: int, rng: Random) -> Image.Image:
    """A square of `scale` times the shorter side (4 % jitter) at a random place, resized to `size` pixels."""
    side = round(min(region.size) * scale * rng.uniform(0.96, 1.0))
    left, top = rng.randint(0, region.width - side), rng.randint(0, region.height - side)
    return region.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def strip_crops(strip: Image.Image, count: int, size: int) -> list[Image.Image]:
    """`count` squares as wide as the strip, evenly spaced from top to bottom."""
    side = min(strip.size)
    tops = [round(i * (strip.height - side) / max(1, count - 1)) for i in range(count)]
    return [strip.crop((0, top, side, top + side)).resize((size, size), Image.Resampling.LANCZOS) for top in tops]


def write_folder(folder: Path, crops: list[tuple[str, str, Image.Image]]) -> None:
    """Write (file name, caption, image) triples; the folder appears only once it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file_name, _, image in crops:
        image.save(partial / file_name)
    lines = [json.dumps({"file_name": file_name, "text": text}) for file_name, text, _ in crops]
    (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    partial.rename(folder)


def prepare_photos(output_dir: str | Path, crops_per_photo=60, heldout_per_photo=4, size=160, seed=0) -> None:
    """Write `train` and `heldout` below `output_dir`; a folder that is already there is left as it is."""
    output_dir = Path(output_dir)
    if (output_dir / "train").is_dir() and (output_dir / "heldout").is_dir():
        print(f"Reusing the crops in {output_dir}.")
        return
    train, heldout = [], []
    for name, (subject, heldout_side) in PHOTOS.items():
        photo = Image.open(photo_path(name)).convert("RGB")
        region, strip = split_photo(photo, heldout_side)
        stem, rng = Path(name).stem, Random(f"{seed} {name}")
        for index in range(crops_per_photo):
            scale, template, _ = rng.choices(SCALES, weights=[share for _, _, share in SCALES])[0]
            crop = random_crop(region, scale, size, rng)
            train.append((f"{stem}_{index:03d}.png", template.format(subject), crop))
        for index, crop in enumerate(strip_crops(strip, heldout_per_photo, size)):
            heldout.append((f"{stem}_{index:03d}.png", f"a close-up photo of {subject}", crop))
    for name, crops in (("train", train), ("heldout", heldout)):
        shutil.rmtree(output_dir / name, ignore_errors=True)
        write_folder(output_dir / name, crops)
        print(f"Wrote {len(crops)} crops to {output_dir / name}.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cut the demo's training and held-out crops.")
    parser.add_argument("--output_dir", default="demo/photos", help="Where `train` and `heldout` are written.")
    parser.add_argument("--crops_per_photo", type=int, default=60, help="Training crops of each photograph.")
    parser.add_argument("--heldout_per_photo", type=int, default=4, help="Held-out crops of each photograph.")
    parser.add_argument("--size", type=int, default=160, help="Side of the crops in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the places and scales of the training crops.")
    return parser.parse_args()


if __name__ == "__main__":
    prepare_photos(**vars(parse_args()))
