"""DreamBooth's prior preservation: images of the class that the model itself has drawn keep it from forgetting."""

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import build_photo_folder, photo_id

import train_lpl_dit
import train_lpl_sd
from data_utils import PRIOR_POSITION, TrainingStream, build_dataloader
from loss_terms import make_lpl
from model_families import find_family


CLASS = "a photo of a dog"
LPL = ("--lpl_weight", 0.5, "--lpl_sigma_threshold", 1e6)


@pytest.fixture
def folder(tmp_path):
    """Photos without captions."""
    folder = build_photo_folder(tmp_path / "mine", n=3, size=64, seed=1)
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def flags(folder, tmp_path):
    words = ["--instance_data_dir", folder, "--instance_prompt", "a photo of sks dog", "--with_prior_preservation"]
    return [*words, "--class_data_dir", tmp_path / "class", "--class_prompt", CLASS, "--num_class_images", 5]


def test_missing_class_images_are_drawn_as_the_stock_pipeline_draws_them(train, tiny_sd, flags, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    photos = build_photo_folder(tmp_path / "class", n=3, size=64)
    kept = sorted(path.name for path in photos.glob("*.png"))
    output = train(*flags, *LPL, "--use_lora", model=tiny_sd, data=(), steps=2)
    assert len(read_log(output)) == 2
    drawn = sorted(path for path in photos.glob("*.png") if path.name not in kept)
    assert [path.name.split("-")[0] for path in drawn] == ["0", "1"]  # two of five were missing
    for i, path in zip((0, 1), drawn):
        generator = torch.Generator().manual_seed(i)
        expected = pipe(CLASS, height=64, width=64, generator=generator).images[0]
        assert np.abs(np.asarray(Image.open(path), int) - np.asarray(expected, int)).max() <= 1
    before = {path: path.stat().st_mtime_ns for path in photos.iterdir()}
    train(*flags, *LPL, "--use_lora", "--cache_latents", "--center_crop", "--cache_text_embeddings", model=tiny_sd,
          data=(), steps=2, name="again")  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in photos.iterdir()} == before


def test_what_an_interrupted_run_has_not_drawn_is_drawn(train, tiny_sd, flags, tmp_path):
    train(*flags, *LPL, "--use_lora", model=tiny_sd, data=(), steps=1)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    for name in drawn:
        if name[0] in "13":  # as if one of two processes had been ahead
            (tmp_path / "class" / name).unlink()
    train(*flags, *LPL, "--use_lora", model=tiny_sd, data=(), steps=1, name="again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()} == drawn and len(drawn) == 5


def test_every_batch_has_as_many_images_of_the_class_as_one_s_own(tmp_path):
    def samples(n, seed, caption):
        folder = build_photo_folder(tmp_path / caption, n=n, size=16, seed=seed)
        return [(str(path), caption) for path in sorted(folder.glob("*.png"))]

    stream = TrainingStream(samples(3, 0, "mine"), seed=0, resolution=16)
    stream.prior = TrainingStream(samples(5, 1, "class"), seed=0, resolution=16)
    seen = {"mine": [], "class": []}
    for workers in (0, 1):
        loader = build_dataloader(stream, 4, rank=1, world_size=2, num_workers=workers)
        for k, batch in zip(range(15), loader):
            first = 8 * k + 4
            own = list(range(first, first + 4))
            assert batch["positions"].tolist() == own + [PRIOR_POSITION + p for p in own]
            assert batch["num_instances"] == 4 and batch["captions"] == ["mine"] * 4 + ["class"] * 4
            assert len(batch["pixel_values"]) == len(batch["original_sizes"]) == 8
            for i, caption in enumerate(batch["captions"]):
                seen[caption].append(photo_id(batch["pixel_values"][i]))
    assert set(seen["mine"]) == set(range(3)) and set(seen["class"]) == set(range(5))


@pytest.mark.parametrize("script, family", [(train_lpl_sd, None), (train_lpl_dit, "ZImage")])
def test_the_loss_is_that_of_both_and_lpl_sees_one_s_own_images_alone(
    tiny_sd, tiny_pipeline, flags, tmp_path, script, family
):
    model = tiny_sd if family is None else tiny_pipeline(family)
    build_photo_folder(tmp_path / "class", n=5, size=64)
    words = [
        "--pretrained_model_name_or_path",
        model,
        "--output_dir",
        tmp_path / "out",
        "--resolution",
        64,
        "--seed",
        0,
    ]
    words += [*flags, *LPL, "--prior_loss_weight", 0.25]
    args = script.parse_args([str(word) for word in words])
    family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    stream = script.make_stream(args)
    script.add_class_images(None, args, family, stream)  # nothing is missing
    batch = next(build_dataloader(stream, 2))
    lpl = make_lpl(args, family.vae, family.unscale)

    def rows(which):
        whole = {
            name: value[which] if len(value) == 4 else value
            for name, value in batch.items()
            if name != "num_instances"
        }
        return whole

    with torch.no_grad():
        both = script.training_step(args, family, family.model, lpl, batch)
        own, prior = (script.training_step(args, family, family.model, lpl, rows(which)) for which in
                      (slice(0, 2), slice(2, 4)))  # fmt: skip
    expected = own.diffusion_loss + 0.25 * prior.diffusion_loss
    torch.testing.assert_close(both.diffusion_loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(both.lpl_loss, own.lpl_loss, rtol=1e-4, atol=0)
    assert (both.diffusion_loss - own.diffusion_loss) > 0.01 and prior.lpl_loss > 0


def test_the_dry_run_draws_nothing(train, tiny_sd, flags, tmp_path):
    train(*flags, "--lpl_weight", 0, "--dry_run", model=tiny_sd, data=())
    assert not (tmp_path / "class").exists()


@pytest.mark.slow
def test_both_processes_draw(train_on_two_processes, tiny_sd, flags, folder, tmp_path):
    train_on_two_processes(*flags[2:], *LPL, "--use_lora", model=tiny_sd, steps=2, data=folder)
    numbers = sorted(int(path.name.split("-")[0]) for path in (tmp_path / "class").glob("*.png"))
    assert numbers == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--with_prior_preservation"], "--with_prior_preservation needs --class_data_dir: add it."),
        (["--with_prior_preservation", "--class_data_dir", "c"], "--with_prior_preservation needs --class_prompt"),
        (["--class_prompt", "c"], "--class_prompt has no effect without --with_prior_preservation: add it, or"),
    ],
)
def test_flags_that_need_each_other(tiny_sd, photos, tmp_path, capsys, words, sentence):
    known = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        train_lpl_sd.parse_args([str(word) for word in (*known, *words)])
    assert sentence in capsys.readouterr().err
