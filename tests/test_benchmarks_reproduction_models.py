"""benchmarks/reproduction_models.py: what is held out is seen by nobody, and each part can be loaded by the others."""

import json
import math

import numpy as np
import pytest
import reproduction_models
import torch
from diffusers import AutoencoderKL
from PIL import Image
from reproduction_models import (
    CLASSES,
    SIZES,
    load_crops,
    main,
    make_features,
    models_of,
    photographs,
    prepare_crops,
    train_vae,
)
from transformers import AutoImageProcessor, ResNetForImageClassification

from pipeline_class_conditional import ClassConditionalSD3Transformer2DModel


SIZE = 16


@pytest.fixture
def photos(monkeypatch, tmp_path):
    """Two photographs: a square one, and a wide one."""
    for name, width in (("first.png", 96), ("second.png", 150)):
        noise = np.random.default_rng(width).integers(0, 256, (96, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    monkeypatch.setattr(reproduction_models, "PHOTOS", ["first.png", "second.png"])
    monkeypatch.setattr(reproduction_models, "CLASSES", ["first", "second"])
    monkeypatch.setattr(reproduction_models, "photo_path", lambda name: tmp_path / name)
    monkeypatch.setattr(reproduction_models, "SIZES", {"small": (SIZE, 4)})
    monkeypatch.setattr(reproduction_models, "models_of", lambda size_name: tmp_path / "models")
    monkeypatch.setattr(reproduction_models, "crops_of", lambda size: tmp_path / "crops")
    return tmp_path


def test_training_and_held_out_crops_share_no_pixel(photos):
    for name, (photo, cells) in photographs(SIZE).items():
        painted = Image.new("RGB", photo.size, "blue")
        for cell in cells:
            painted.paste("red", cell)
        painted.save(photos / f"{name}.png")
        held_out = len(cells) * (1.5 * SIZE) ** 2 / math.prod(photo.size)
        assert 0.15 < held_out < 0.25
    prepare_crops(photos / "painted", SIZE, count=60, held_out=30)
    for kind, number, colour in (("train", 60, (0, 0, 255)), ("held_out", 30, (255, 0, 0))):
        for name in ("first", "second"):
            files = list((photos / "painted" / kind / name).glob("*.png"))
            assert len(files) == number
            assert all(Image.open(file).getcolors() == [(SIZE * SIZE, colour)] for file in files)
            assert len({file.read_bytes() for file in files}) == 1


def test_crops_are_places_of_their_photograph_and_made_once(photos):
    prepare_crops(photos / "crops", SIZE, count=20, held_out=5)
    pixels, labels = load_crops(photos / "crops" / "train")
    assert pixels.shape == (40, 3, SIZE, SIZE) and labels.tolist() == [0] * 20 + [1] * 20
    assert len({image.numpy().tobytes() for image in pixels}) == 40
    before = (photos / "crops" / "train" / "first" / "0000.png").stat().st_mtime_ns
    prepare_crops(photos / "crops", SIZE, count=20, held_out=5)
    assert (photos / "crops" / "train" / "first" / "0000.png").stat().st_mtime_ns == before


def test_the_autoencoder_is_stock_and_its_scaled_latents_have_unit_variance(photos):
    prepare_crops(photos / "crops", SIZE, count=20, held_out=10)
    train_vae("small", steps=3, minutes=None, seed=0)
    vae = AutoencoderKL.from_pretrained(photos / "models" / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(load_crops(photos / "crops" / "train")[0]).latent_dist.mean
    assert latents.shape == (40, 8, SIZE // 4, SIZE // 4)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, rel=0.02)


def test_extractors_load_and_the_random_one_is_not_trained(photos):
    prepare_crops(photos / "crops", SIZE, count=20, held_out=10)
    make_features("small", steps=2, seed=0)
    weights = []
    for name in ("classifier", "random"):
        network = ResNetForImageClassification.from_pretrained(photos / "models" / name)
        processor = AutoImageProcessor.from_pretrained(photos / "models" / name)
        picture = Image.open(photos / "first.png")
        assert processor(picture, return_tensors="pt").pixel_values.shape == (1, 3, SIZE, SIZE)
        assert network.config.num_labels == 2
        weights.append(network.state_dict())
    torch.manual_seed(0)
    untouched = ResNetForImageClassification(network.config).state_dict()
    convolution = next(name for name, weight in untouched.items() if weight.ndim == 4)
    assert torch.equal(weights[1][convolution], untouched[convolution])
    assert not torch.equal(weights[0][convolution], untouched[convolution])


@pytest.mark.slow
def test_the_denoiser_is_one_of_the_training_script(photos):
    prepare_crops(photos / "crops", SIZE, count=6, held_out=2)
    train_vae("small", steps=2, minutes=None, seed=0)
    main(["denoiser", "--denoiser_steps", "2"])
    folder = photos / "models" / "small-epsilon"
    transformer = ClassConditionalSD3Transformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert transformer.config.in_channels == vae.config.latent_channels == 8
    assert {path.name for path in folder.iterdir() if path.suffix != ".jsonl"} == {
        "model_index.json",
        "scheduler",
        "transformer",
        "vae",
    }


def test_what_is_committed_fits_together():
    folder = models_of("small")
    for size_name, (side, _) in SIZES.items():
        config = json.loads((folder / f"{size_name}.json").read_text())
        vae = reproduction_models.make_vae(size_name)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        assert (config["in_channels"], config["sample_size"]) == (vae.config.latent_channels, side // factor)
        assert config["num_classes"] == len(CLASSES)
