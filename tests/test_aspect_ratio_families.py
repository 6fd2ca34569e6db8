"""--aspect_ratio_buckets: which sizes are accepted, and what the models are told of images that are no squares.

Shapes: B batch, C latent channels, h x w latent positions.
"""

import inspect
from unittest import mock

import diffusers
import pytest
import torch
from test_transformer_families import (
    PACKED,
    PROMPTS,
    SCHEDULERS,
    assert_same,
    build_class_conditional,
    calls_of,
    stock_pipeline,
    unpack,
    without_guidance,
)
from tiny_kolors import build_tiny_kolors
from tiny_transformers import build_tiny_pipeline

import train_lpl_dit
import train_lpl_sd
from model_checks import PIPELINES
from model_families import FAMILIES, find_family


SIZE = (128, 64)  # height and width: of the training images here; their latents are 16 x 8
UNETS = {"StableDiffusion": "SD", "StableDiffusionXL": "SDXL", "Kolors": "Kolors"}
MODELS = ["StableDiffusion3", "PixArtAlpha", "PixArtAlpha 1024", "PixArtSigma", "Sana", "Flux", "Chroma", "Flux2Klein"]
MODELS += ["QwenImage", "ZImage", "Lumina2", "AuraFlow", "HunyuanDiT", "ClassConditional flow", *UNETS]
SQUARES = ["DiT"]
SIZES = {"StableDiffusionXL": "added_cond_kwargs.time_ids", "Kolors": "added_cond_kwargs.time_ids"}
SIZES["HunyuanDiT"] = "image_meta_size"  # the argument that tells the images' sizes, where there is one
ORIGINAL_SIZES, CROPS = ((480, 300), (1023, 511)), ((3, 0), (0, 5))  # of the two samples of a batch


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline, tiny_sd, tiny_sdxl, tmp_path_factory):
    """name -> the folder of a tiny model, and the script that trains it."""
    folder = tmp_path_factory.mktemp("more")

    def build(name):
        if name in ("StableDiffusion", "StableDiffusionXL"):
            return {"StableDiffusion": tiny_sd, "StableDiffusionXL": tiny_sdxl}[name], train_lpl_sd
        if name == "Kolors":
            return build_tiny_kolors(folder / name), train_lpl_sd
        if name == "PixArtAlpha 1024":
            return build_tiny_pipeline(folder / "alpha", "PixArtAlpha", sample_size=128), train_lpl_dit
        if name == "ClassConditional flow":
            return build_class_conditional(folder / "labels", SCHEDULERS["flow"]), train_lpl_dit
        return tiny_pipeline(name), train_lpl_dit

    return build


@pytest.fixture
def parse(tiny_model, photos, class_folders, tmp_path):
    """Parses flags after those for a tiny model and data that fit it; another model may be named by its folder."""

    def run(*words, model="StableDiffusion3", folder=None, resolution=64):
        known, script = tiny_model(model)
        data = class_folders if model.startswith(("DiT", "ClassConditional")) else photos
        flags = ["--train_data_dir", data, "--output_dir", tmp_path / "out", "--report_to", "none"]
        flags += ["--pretrained_model_name_or_path", folder or known, "--resolution", resolution]
        return script.parse_args([str(word) for word in (*flags, *words)])

    return run


@pytest.fixture(scope="session")
def known_flags():
    flags = set()
    with pytest.MonkeyPatch.context() as patch:
        for script in (train_lpl_dit, train_lpl_sd):
            patch.setattr(script, "parse_and_check", lambda parser, argv: parser)
            flags |= set(script.parse_args()._option_string_actions)
    return flags


# What the models are told


def stock_call(pipe, name, **settings):
    """Two images of `SIZE` from a stock pipeline: the denoiser's arguments in its first step, and of the scheduler's.

    These are the prediction and the timestep.
    """
    settings |= {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 2, "output_type": "latent"}
    settings |= {"generator": torch.Generator().manual_seed(0), **without_guidance(name)}
    settings |= {"class_labels": [207, 980]} if name.startswith("ClassConditional") else {"prompt": list(PROMPTS)}
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        settings["use_resolution_binning"] = False
    denoiser = pipe.unet if name in UNETS else pipe.transformer
    step = mock.patch.object(pipe.scheduler, "step", wraps=pipe.scheduler.step)
    with calls_of(denoiser) as calls, step as spy:
        pipe(**settings)
    prediction, timestep, _ = spy.call_args_list[0].args
    return calls[0], prediction, timestep


def positions(pipe, x):
    """What a stock pipeline works on, as `[B, C, h, w]`."""
    if type(pipe).__name__ in PACKED:
        return unpack(x, 16, 8)
    if isinstance(pipe, diffusers.Flux2KleinPipeline):  # a token is a position
        return torch.stack(x.unbind(1), dim=-1).unflatten(-1, (8, 4))
    return x.squeeze(2) if isinstance(pipe, diffusers.ZImagePipeline) else x  # its images are videos of one frame


def given_latents(pipe, call):
    """The latents of a call of the denoiser, `[B, C, h, w]`."""
    if isinstance(pipe, diffusers.ZImagePipeline):
        return torch.stack([call["x.0"], call["x.1"]]).squeeze(2)
    return positions(pipe, call["sample"] if "sample" in call else call["hidden_states"])


def load(parse, name):
    """The family, for images of `SIZE`, and the stock pipeline around its denoiser."""
    args = parse("--aspect_ratio_buckets", "{},{}".format(*SIZE), model=name)
    assert args.buckets == [SIZE]
    family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    part = {family.denoiser_name: family.denoiser}
    pipe = stock_pipeline(name).from_pretrained(args.pretrained_model_name_or_path, **part)
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_denoiser_is_told_of_other_shapes_as_in_the_pipeline(parse, name):
    family, pipe = load(parse, name)
    told = [{}]
    if name in SIZES:  # a pipeline's call has one size for all its images
        told = [{"original_size": size, "crops_coords_top_left": top} for size, top in zip(ORIGINAL_SIZES, CROPS)]
    theirs, prediction, timestep = zip(*(stock_call(pipe, name, **sizes) for sizes in told))
    latents, theirs, timestep = given_latents(pipe, theirs[0]), list(theirs), timestep[0]
    if name in SIZES:  # each sample has its own
        rows = [call[SIZES[name]][i] for i, call in enumerate(theirs)]
        assert not torch.equal(*rows)
        theirs[0][SIZES[name]] = torch.stack(rows)
        prediction = [torch.stack([sample[i] for i, sample in enumerate(prediction)])]

    batch = {"captions": [207, 980] if name.startswith("ClassConditional") else PROMPTS}
    batch |= {"original_sizes": torch.tensor(ORIGINAL_SIZES), "crop_top_lefts": torch.tensor(CROPS)}
    batch["target_sizes"] = torch.tensor([SIZE] * 2)
    timesteps = timestep.expand(2)
    if name in UNETS:  # some of their schedulers give whole numbers as floats
        timesteps, theirs[0]["timestep"] = timesteps.long(), theirs[0]["timestep"].long().expand(2)
    with calls_of(family.denoiser) as calls:
        output = family.predict(family.denoiser, latents, timesteps, family.conditioning(batch))
    assert_same(calls[0], theirs[0])
    torch.testing.assert_close(output, positions(pipe, prediction[0]))
    if name == "PixArtAlpha 1024":
        assert calls[0]["added_cond_kwargs.resolution"].tolist() == [list(SIZE)] * 2

    pixels = torch.rand(2, 3, *SIZE) * 2 - 1
    encoded = family.latents({"pixel_values": pixels}, [torch.Generator().manual_seed(i) for i in range(2)])
    assert encoded.shape == latents.shape and family.decode(encoded).shape == pixels.shape


def test_every_family_is_here():
    families = {name.removesuffix("Pipeline") for name in FAMILIES}
    assert {name.split()[0] for name in MODELS} | set(SQUARES) == families
    assert [name for name, rules in PIPELINES.items() if rules.squares] == [f"{name}Pipeline" for name in SQUARES]


@torch.no_grad()
def test_a_transformer_that_takes_squares_alone_takes_nothing_else(tiny_pipeline):
    pipe = diffusers.DiTPipeline.from_pretrained(tiny_pipeline("DiT"))
    with pytest.raises(RuntimeError, match="shape"):
        pipe.transformer(torch.zeros(1, 4, 16, 10), torch.tensor([1]), class_labels=torch.tensor([1]))
    long = pipe.transformer(torch.zeros(1, 4, 16, 4), torch.tensor([1]), class_labels=torch.tensor([1])).sample
    assert long.shape[2:] == (8, 8)  # as many tokens as a square has


@pytest.mark.parametrize("name", ["Flux", "Flux2Klein", "QwenImage"])
def test_noise_levels_stay_those_of_the_resolution(parse, name):
    args = [parse(model=name), parse("--aspect_ratio_buckets", "64,64;128,64", model=name)]
    square, buckets = (find_family(a)(a, torch.device("cpu"), torch.float32, torch.float32) for a in args)
    assert torch.equal(square.sigmas, buckets.sigmas)


# Which sizes


SDXL_SIZES = [(704, 1408), (768, 1280), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)]


@pytest.mark.parametrize(
    "model, resolution, words, sizes",
    [
        ("StableDiffusion3", 64, [], None),
        ("StableDiffusion3", 64, ["64, 64; 128,64;64,64;"], [(64, 64), (128, 64)]),
        ("StableDiffusion3", 64, ["auto"], [(48, 80), (64, 64), (80, 48)]),  # in steps of its patches
        ("StableDiffusionXL", 1024, ["auto"], sorted({*SDXL_SIZES, *(size[::-1] for size in SDXL_SIZES)})),
    ],
)
def test_the_sizes(parse, model, resolution, words, sizes):
    flag = ["--aspect_ratio_buckets", *(word for word in words if word != "auto")] if words else []
    assert parse(*flag, model=model, resolution=resolution).buckets == sizes


@pytest.mark.parametrize("model, resolution, unit", [("StableDiffusion", 520, 40), ("PixArtSigma", 528, 48)])
def test_the_unit_of_the_sizes_is_made_of_whole_tokens(parse, model, resolution, unit):
    sizes = parse("--aspect_ratio_buckets", model=model, resolution=resolution).buckets
    assert (resolution, resolution) in sizes and len(sizes) > 5
    assert all(side % unit == 0 for size in sizes for side in size)


def test_one_square_alone_follows_from_a_resolution_that_is_no_multiple_of_the_unit(parse):
    sizes = parse("--aspect_ratio_buckets", model="StableDiffusion", resolution=968).buckets  # the unit is 64
    assert [size for size in sizes if size[0] == size[1]] == [(968, 968)]


def test_the_sizes_of_a_model_of_the_hub_are_known_later(parse):
    assert parse("--aspect_ratio_buckets", "72,64", folder="someone/model").buckets is None


POSITIONS = "the transformer has positions for"


@pytest.mark.parametrize(
    "model, words, sentence",
    [
        ("StableDiffusion", "64,60", "64,60: both sides must be multiples of 8, the VAE's factor."),
        ("StableDiffusion3", "64,64;72,64", "72,64: both sides must be multiples of 16, the VAE's factor times the"),
        ("StableDiffusion3", "64,208", f"64,208: {POSITIONS} 192 pixels (pos_embed_max_size)"),
        ("AuraFlow", "208,64", f"208,64: {POSITIONS} 192 pixels (pos_embed_max_size)"),
        ("Lumina2", "64,8208", f"64,8208: {POSITIONS} 8192 pixels (axes_lens)"),
        ("StableDiffusion3", "64x64", "'64x64': give sizes as height,width;height,width"),
        ("StableDiffusion3", "64,64;32,64;128,128", "'64,64;32,64;128,128': two of the sizes have the same shape"),
        ("StableDiffusion3", "64,64,64", "'64,64,64': give sizes as height,width;height,width"),
        ("DiT", "64,64", "is not for DiTPipeline, which takes squares alone: leave it out"),
    ],
)
def test_sizes_that_cannot_be(refuse, model, words, sentence):
    message = refuse("--aspect_ratio_buckets", words, model=model)
    assert f"error: --aspect_ratio_buckets {sentence}" in message


def test_the_longest_of_the_sizes_that_follow_from_the_resolution_can_be_too_long(refuse):
    message = refuse("--aspect_ratio_buckets", resolution=192)
    assert f"--aspect_ratio_buckets 144,240: {POSITIONS} 192 pixels" in message


# Class labels


@pytest.mark.parametrize("flag, values", [("--trigger_word", ["sks"]), ("--caption_weights", [1, 2])])
def test_class_labels_have_no_captions(refuse, flag, values):
    words = ["--caption_column", "a", "b"] if flag == "--caption_weights" else []
    assert f"{flag} has no effect with the class labels of DiTPipeline" in refuse(*words, flag, *values, model="DiT")


@pytest.mark.parametrize("model, captions", [("DiT", False), ("ClassConditional flow", False), ("Sana", True)])
def test_a_cache_on_the_disk_is_of_text_embeddings_where_there_are_any(parse, tmp_path, model, captions):
    args = parse("--latent_cache_dir", tmp_path / "cache", "--center_crop", model=model)
    assert args.cache_latents and args.cache_text_embeddings == captions
