"""The model that the demo starts from is a trained one and fits the demo."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from lpl_utils import LatentPerceptualLoss
from metrics import radial_log_power


MODEL = Path(__file__).parent.parent / "demo" / "model"


def test_the_demo_model_draws_pictures_and_has_the_decoder_that_lpl_wants():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 15e6
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}
    images = {}
    for name in ("a photo of a flower", "a photo of a rocket"):
        images[name] = pipe([name] * 2, generator=[torch.Generator().manual_seed(i) for i in range(2)], **draw).images
    # As in photographs, and unlike in noise, power falls steeply with frequency ...
    power = radial_log_power(torch.cat(list(images.values())))
    assert power[:4].mean() - power[-16:].mean() > 6
    # ... and the caption counts: the flower is orange, the night sky behind the rocket is blue.
    (red, _, blue), (rocket_red, _, rocket_blue) = (image.mean((0, 2, 3)) for image in images.values())
    assert red - blue > 0.05 + rocket_red - rocket_blue

    lpl = LatentPerceptualLoss(pipe.vae)
    assert lpl.omega.tolist() == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
