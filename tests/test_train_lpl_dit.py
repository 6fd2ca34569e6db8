"""train_lpl_dit.py as its users run it, on tiny models of every family."""

import itertools
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from marks import slow_but
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_tiny_vae
from tiny_transformers import CLASSES, _make_responsive, build_tiny_pipeline

import model_families
import train_lpl_dit
from arguments import UserError
from data_utils import build_dataloader, make_stream
from dry_run import saved_by_quantising
from loss_terms import make_lpl
from model_checks import latent_channels
from pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel


CONFIGS = Path(train_lpl_dit.__file__).parent / "transformer_configs"
FAMILIES = ("DiT", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Sana", "Flux", "ClassConditional")
LATER = ("Chroma", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow", "HunyuanDiT")
FAMILIES += LATER
ON_LABELS = ("DiT", "ClassConditional")
STOCK_LORA = ("StableDiffusion3", "Sana", "Flux", "Chroma", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow")
KINDS = {
    "full": ("--learning_rate", 3e-3),
    "LoRA": ("--use_lora", "--rank", 2, "--lora_alpha", 8, "--learning_rate", 0.01),
}
LPL = ("--lpl_weight", 0.3, "--lpl_sigma_threshold", 80)  # tau 20 at 64 pixels: all but the noisiest timesteps
DRAW = ("--num_validation_images", 1, "--validation_steps", 3, "--validation_inference_steps", 3)
CACHES = ("--cache_latents", "--center_crop", "--cache_text_embeddings")


@pytest.fixture(scope="session")
def model_of(tiny_pipeline, tmp_path_factory):
    """family -> folder of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("class_conditional")
    torch.manual_seed(0)
    config = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    transformer = ClassConditionalSD3Transformer2DModel(**config).eval()
    _make_responsive(transformer)
    vae, scheduler = build_tiny_vae(shift_factor=0.1), FlowMatchEulerDiscreteScheduler()
    ClassConditionalPipeline(transformer, vae, scheduler, id2label=CLASSES).save_pretrained(folder)
    return lambda family: folder if family == "ClassConditional" else tiny_pipeline(family)


@pytest.fixture(scope="session")
def data_of(photos, class_folders):
    """family -> what it can be trained on, as flags."""
    return lambda family: ("--train_data_dir", class_folders if family in ON_LABELS else photos)


def open_pipeline(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)  # only one has code of its own
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt):
    """What a validation image is, drawn by a stock pipeline."""
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    if hasattr(pipe, "get_label_ids"):
        return pixels(pipe(pipe.get_label_ids([prompt]), **settings).images[0])
    if type(pipe).__name__.startswith(("PixArt", "Sana", "HunyuanDiT")):
        settings["use_resolution_binning"] = False  # there are bins for the sizes of large models only
    if type(pipe).__name__ == "QwenImagePipeline":
        settings["negative_prompt"] = ""  # else there is no guidance
    return pixels(pipe(prompt=prompt, height=64, width=64, **settings).images[0])


def pixels(image):
    return np.asarray(image, dtype=int)


def drawn(output, name="step-000003"):
    return pixels(Image.open(output / "samples" / f"{name}.png"))


# Train, save, reload in the stock pipeline, sample


DRAWN = (("DiT", "full"), ("StableDiffusion3", "LoRA"), ("PixArtSigma", "LoRA"), ("Flux", "full"))


@pytest.mark.parametrize("family, kind", slow_but(DRAWN, itertools.product(FAMILIES, KINDS)))
def test_what_the_stock_pipeline_draws_is_what_was_trained(train_dit, model_of, data_of, family, kind):
    model, prompt = model_of(family), "volcano" if family in ON_LABELS else "a red fox"
    flags = (*KINDS[kind], *LPL, *DRAW, "--validation_prompt", prompt)
    output = train_dit(*flags, model=model, data=data_of(family))
    log = read_log(output)
    assert len(log) == 3 and all(math.isfinite(row["loss"]) and row["lpl"] > 0 for row in log)

    pipe = open_pipeline(model)
    assert np.abs(draw(pipe, prompt) - drawn(output)).max() > 8
    if kind == "full":
        base, pipe = pipe, open_pipeline(output)
        assert type(pipe).__name__ == type(base).__name__
    elif family in STOCK_LORA:
        pipe.load_lora_weights(output)
    else:
        PeftModel.from_pretrained(pipe.transformer, output)
    assert np.abs(draw(pipe, prompt) - drawn(output)).max() <= 1
    assert np.abs(drawn(output, "final") - drawn(output)).max() <= 1  # the run has done the same at its end
    assert (output / "transformer").exists() == (kind == "full")
    assert not [path for path in output.rglob("*.json") if str(model.parent) in path.read_text()]  # no local paths


@pytest.mark.parametrize("family", LATER)
def test_adapters_are_float32_in_mixed_precision(train_dit, model_of, data_of, family, monkeypatch):
    families, finish = [], train_lpl_dit.finish
    monkeypatch.setattr(train_lpl_dit, "finish", lambda *a: families.append(a[2]) or finish(*a))
    flags = (*KINDS["LoRA"], *LPL, "--mixed_precision", "bf16")
    output = train_dit(*flags, model=model_of(family), data=data_of(family))
    log = read_log(output)
    assert len(log) == 3 and all(math.isfinite(row["loss"]) and row["lpl"] > 0 for row in log)
    frozen = {parameter.dtype for parameter in families[0].denoiser.parameters() if not parameter.requires_grad}
    assert torch.bfloat16 in frozen, "the base must be in half precision"
    saved = weights(output)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in saved.values())
    assert all(value.any() for (_, name), value in saved.items() if "lora_B" in name)


# The step


def prepare(model, data, output, *words):
    """Flags, family and the first four samples of a run, as `main` makes them."""
    flags = [] if model is None else ["--pretrained_model_name_or_path", model]
    flags += [*data, "--output_dir", output / "out", "--resolution", 64, "--seed", 0, *words]
    args = train_lpl_dit.parse_args([str(word) for word in flags])
    family = train_lpl_dit.find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    family.model.train()
    batch = next(build_dataloader(make_stream(args), batch_size=4))
    conditioning = family.conditioning(batch)  # the same at every step; Sana's takes its time
    family.conditioning = lambda _: conditioning
    return args, family, batch


def trained(family):
    return {name: parameter for name, parameter in family.model.named_parameters() if parameter.requires_grad}


def copy_of(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


LEARNED = (("StableDiffusion3", "full"), ("ClassConditional", "full"), ("PixArtAlpha", "LoRA"))


@pytest.mark.parametrize(
    "family, kind", slow_but(LEARNED, [*itertools.product(FAMILIES, KINDS), ("PixArtAlpha for 1024 pixels", "full")])
)
def test_on_a_fixed_batch_both_losses_fall_and_all_weights_learn(model_of, data_of, tmp_path, family, kind):
    if family in FAMILIES:
        model = model_of(family)
    else:
        model = build_tiny_pipeline(tmp_path / "model", "PixArtAlpha", sample_size=128)
    flags = (*KINDS[kind], *LPL, "--lpl_chunk_size", 0)
    args, loaded, batch = prepare(model, data_of(family), tmp_path, *flags)
    # Little noise: in more, the tiny VAE's latents, nearly white noise themselves, are lost for LPL.
    loaded.sample_timesteps = lambda generators, quantiles=(): loaded.timesteps[[10, 30, 60, 100]]
    step = partial(
        train_lpl_dit.training_step, args, loaded, loaded.model, make_lpl(args, loaded.vae, loaded.unscale), batch
    )
    assert torch.equal(step().model_pred, step().model_pred)  # nothing is dropped or drawn but by the sample's number
    parameters, losses = trained(loaded), []
    start = copy_of(parameters)
    optimizer = torch.optim.Adam(parameters.values(), args.learning_rate)
    for _ in range(14):
        forward = step()
        assert len(forward.lpl_stats["chosen"]) == 4
        optimizer.zero_grad()
        (forward.diffusion_loss + args.lpl_weight * forward.lpl_loss).backward()
        assert not [name for name, p in parameters.items() if p.grad is None]  # DDP would wait for it
        optimizer.step()
        losses.append([forward.diffusion_loss.item(), forward.lpl_loss.item()])
    weights = {name for name in parameters if name.endswith("weight") and not without_effect(loaded, name)}
    assert not [name for name in weights if torch.equal(parameters[name], start[name])]
    assert (np.array(losses[-1]) < 0.92 * np.array(losses[0])).all()


@pytest.mark.parametrize("family", slow_but(("DiT", "Lumina2"), FAMILIES))
def test_a_new_transformer_starts_at_zero_and_soon_learns_everywhere(model_of, data_of, tmp_path, family):
    config = model_of(family) / "transformer" / "config.json"
    flags = ("--lpl_weight", 0, "--transformer_config", config)
    args, loaded, batch = prepare(model_of(family), data_of(family), tmp_path, *flags)
    parameters = trained(loaded)
    start = copy_of(parameters)
    optimizer = torch.optim.Adam(parameters.values(), 1e-3)
    for step in range(1, 15):  # AuraFlow's gates are inside of each other
        forward = train_lpl_dit.training_step(args, loaded, loaded.model, None, batch)
        assert bool(forward.model_pred.any()) == (step > 1)
        optimizer.zero_grad()
        forward.diffusion_loss.backward()
        optimizer.step()
        moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, start[name])}
        # The output first, so that the blocks have a gradient at the second step; those that refine text hang on them.
        if step == (3 if family in ("Lumina2", "ZImage") else 2):
            assert blocks(moved) == blocks(parameters) and len(blocks(moved)) >= 2
    matrices = {name for name, parameter in parameters.items() if parameter.ndim > 1}
    assert {name for name in matrices if not without_effect(loaded, name)} <= moved


@pytest.mark.parametrize(
    "family, kind",
    [*((family, "full") for family in LATER if family != "HunyuanDiT"), ("Flux2Klein", "LoRA"), ("ZImage", "LoRA")],
)
def test_gradient_checkpointing_changes_nothing_but_the_work(model_of, data_of, tmp_path, family, kind):
    losses, gradients, passes = [], [], []
    for words in ((), ("--gradient_checkpointing",)):
        flags = (*KINDS[kind], *LPL, *words, "--no-lpl_gradient_checkpointing")
        torch.manual_seed(0)  # LoRA's first matrices are random
        args, loaded, batch = prepare(model_of(family), data_of(family), tmp_path, *flags)
        parameters, calls = perturbed(trained(loaded)), []
        for name, module in loaded.denoiser.named_modules():
            if re.fullmatch(r"\w+\.0\.\w+", name):  # inside of the first block of each kind
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        lpl = make_lpl(args, loaded.vae, loaded.unscale)
        forward = train_lpl_dit.training_step(args, loaded, loaded.model, lpl, batch)
        (forward.diffusion_loss + args.lpl_weight * forward.lpl_loss).backward()
        losses.append([forward.diffusion_loss.item(), forward.lpl_loss.item()])
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        passes.append(len(calls))
    assert passes[1] > passes[0] > 0, "no block was recomputed"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][1] > 0
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name
    weights = [name for name in gradients[0] if name.endswith("weight") and not without_effect(loaded, name)]
    assert all(gradients[0][name].any() for name in weights)


def perturbed(parameters):
    """Moved a little, so that LoRA's second matrices, zero at first, let gradients through to the first ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return parameters


def test_every_family_is_here():
    families = {
        name.removesuffix("Pipeline")
        for name, family in model_families.FAMILIES.items()
        if family.denoiser_name != "unet"
    }
    assert set(FAMILIES) == families
    loaders = {
        name
        for name in families
        if hasattr(model_families.FAMILIES[f"{name}Pipeline"].pipeline_class, "load_lora_weights")
    }
    assert set(STOCK_LORA) == loaders


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if model_families.FAMILIES[f"{name}Pipeline"].ragged])
def test_captions_of_a_batch_do_not_change_each_other(model_of, data_of, tmp_path, family):
    _, loaded, _ = prepare(model_of(family), data_of(family), tmp_path)
    timesteps = loaded.timesteps[[100, 300, 500]]
    shape = loaded.scale(torch.zeros(3, latent_channels(loaded.vae.config), 8, 8)).shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def predict(captions, samples):
        return loaded.predict(loaded.model, latents[samples], timesteps[samples], loaded.encode_prompts(captions))

    captions = ["a red fox", "two boats at sea, " * 20, "snow"]
    together = predict(captions, [0, 1, 2])
    for i, caption in enumerate(captions):
        (alone,) = predict([caption], [i])
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)
        (other,) = predict(["a cat, asleep"], [i])
        assert (other - alone).abs().max() > 1e-3, "a caption must matter"


def without_effect(family, name):
    """In SD3's and Qwen-Image's last blocks nothing reads what becomes of the text: its queries have no gradient."""
    if not isinstance(family.denoiser, (SD3Transformer2DModel, QwenImageTransformer2DModel)):
        return False
    last = f"transformer_blocks.{family.denoiser.config.num_layers - 1}.attn"
    return any(f"{last}.{part}" in name for part in ("add_q_proj", "norm_added_q"))


def blocks(names):
    return {tuple(name.split(".")[:2]) for name in names if re.match(r"\w+\.\d", name)}


# Checkpoints


def weights(folder):
    """Of a result or a checkpoint: the model's or the adapters', and the average."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("transformer*/*.safetensors")]
    return {(path.relative_to(folder), key): value for path in paths for key, value in load_file(path).items()}


RESUMED = (("DiT", "full"), ("PixArtSigma", "LoRA"))
RESUMED_LATER = (("QwenImage", "full"), ("Flux", "LoRA"), ("QwenImage", "LoRA"))


@pytest.mark.parametrize("family, kind", slow_but(RESUMED, RESUMED + RESUMED_LATER))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(train_dit, model_of, data_of, family, kind):
    flags = (*KINDS[kind], *LPL, "--use_ema", "--ema_decay", 0.5, "--random_flip", "--checkpointing_steps", 3)
    flags += ("--proportion_empty_prompts", 0.3, *(("--lora_dropout", 0.3) if kind == "LoRA" else ()))
    source = {"model": model_of(family), "data": data_of(family), "steps": 6}
    whole = train_dit(*flags, **source, name="whole")
    resumed = whole.with_name("resumed")
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train_dit(*flags, "--resume_from_checkpoint", "latest", **source, name="resumed")
    for part in (".", "checkpoint-6"):
        expected, found = weights(whole / part), weights(resumed / part)
        assert expected and expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = weights(whole / "checkpoint-6")
    assert not all(torch.equal(value, last[name]) for name, value in weights(whole).items() if name in last)
    assert [row["loss"] for row in read_log(resumed)] == [row["loss"] for row in read_log(whole)]


# Several processes


@pytest.mark.slow  # one of test_train_lpl_sd.py is not
@pytest.mark.parametrize(
    "family, kind",
    [
        ("StableDiffusion3", "full"),
        ("DiT", "LoRA"),
        *((family, "full") for family in LATER),
        ("HunyuanDiT", "LoRA"),
    ],
)
def test_two_processes_train_as_one_does(train_dit, train_on_two_processes, model_of, data_of, family, kind):
    flags = (*KINDS[kind], *LPL, "--learning_rate", 1e-4)
    model, data = model_of(family), data_of(family)
    one = train_dit(*flags, "--train_batch_size", 4, model=model, data=data, steps=2, name="one")
    two = train_on_two_processes(*flags, model=model, steps=2, script=train_lpl_dit, data=data[1])
    for row, expected in zip(read_log(two), read_log(one), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["lpl"] == pytest.approx(expected["lpl"], rel=1e-3)


# Memory


CACHED = ("StableDiffusion3", "PixArtSigma", "Sana", "Flux", "Flux2Klein", "QwenImage", "ZImage", "HunyuanDiT")


@pytest.mark.parametrize("family", slow_but(("PixArtSigma", "HunyuanDiT"), CACHED))
def test_caches_change_nothing_but_the_work(train_dit, model_of, monkeypatch, family):
    flags = (*LPL, "--center_crop", "--proportion_empty_prompts", 0.3, "--learning_rate", 1e-4)
    pipe = open_pipeline(model_of(family))
    encoded = []
    for encoder, method in ((type(pipe.vae), "encode"), (type(pipe), "encode_prompt")):
        call = getattr(encoder, method)
        spy = lambda *a, call=call, **k: encoded.append((call.__name__, a[1][:])) or call(*a, **k)  # noqa: E731
        monkeypatch.setattr(encoder, method, spy)
    plain = train_dit(*flags, model=model_of(family), steps=3, name="plain")
    prompts = [prompt for name, captions in encoded if name == "encode_prompt" for prompt in captions]
    encoders = 2 if family == "HunyuanDiT" else 1  # calls for a caption
    assert len(prompts) == 6 * encoders and 0 < prompts.count("") < 6 * encoders
    encoded.clear()
    cached = train_dit(*flags, *CACHES, model=model_of(family), steps=3, name="cached")
    assert [name for name, _ in encoded] == ["encode"] * 10 + [
        "encode_prompt"
    ] * 11 * encoders  # photos; captions, and none
    for row, expected in zip(read_log(cached), read_log(plain), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["lpl"] == pytest.approx(expected["lpl"], rel=1e-4)


def test_offloaded_encoders_are_on_the_device_only_while_they_work(train_dit, model_of, monkeypatch):
    model, families, placed = model_of("PixArtSigma"), [], []
    monkeypatch.setattr(train_lpl_dit, "cache", lambda *a: families.append(a[2]))
    monkeypatch.setattr(train_lpl_dit, "finish", lambda *_: None)
    plain = train_dit(*LPL, model=model, name="plain")
    for encoder, method, part in (
        (AutoencoderKL, "encode", "encoder"),
        (PixArtSigmaPipeline, "encode_prompt", "text_encoders"),
    ):
        call = getattr(encoder, method)
        spy = lambda *a, call=call, part=part, **k: placed.append(families[1].placed[part]) or call(*a, **k)  # noqa: E731
        monkeypatch.setattr(encoder, method, spy)
    offloaded = train_dit(*LPL, "--offload", model=model, name="offloaded")
    assert placed == [True] * 6
    assert families[0].placed == {"encoder": True, "decoder": True, "text_encoders": True}
    assert families[1].placed == {"encoder": False, "decoder": True, "text_encoders": False}
    assert [row["loss"] for row in read_log(offloaded)] == [row["loss"] for row in read_log(plain)]


# From scratch


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    build_tiny_vae().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config, prediction_type, extra",
    [
        pytest.param("mmdit-tiny", "epsilon", (), marks=pytest.mark.slow),
        pytest.param("mmdit-tiny", "v_prediction", ("--rescale_betas_zero_snr",), marks=pytest.mark.slow),
        ("mmdit-tiny", "flow_prediction", ()),
        ("dit-tiny", "epsilon", ()),
    ],
)
def test_a_new_model_learns_at_64_and_then_at_128_pixels(
    train_dit, class_folders, vae_folder, config, prediction_type, extra
):
    file, data = CONFIGS / f"{config}.json", ("--train_data_dir", class_folders)
    flags = ("--transformer_config", file, "--pretrained_vae_model_name_or_path", vae_folder, "--lpl_weight", 0)
    flags += ("--prediction_type", prediction_type, *extra, "--learning_rate", 1e-2)
    small = train_dit(*flags, model=None, data=data, steps=6, name="small")
    flags = (*KINDS["full"], *LPL, *DRAW, "--resolution", 128, "--validation_prompt", "volcano")
    large = train_dit(*flags, model=small, data=data, name="large")
    assert all(row["lpl"] > 0 for row in read_log(large))

    for output in (small, large):  # no paths of this machine in what may be shared
        assert not [path for path in output.rglob("*.json") if str(vae_folder.parent.parent) in path.read_text()]
    first, second = open_pipeline(small), open_pipeline(large)
    assert draw(first, "volcano").shape == (64, 64, 3)
    assert drawn(large).shape == (128, 128, 3)
    assert np.abs(draw(second, "volcano") - drawn(large)).max() <= 1
    assert np.abs(draw(second, "golden retriever") - drawn(large)).max() > 1
    for pipe in (first, second):
        assert pipe.get_label_ids(["golden retriever", "volcano"]) == [0, 1]  # sorted, as the folders are
        if prediction_type == "flow_prediction":
            assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        else:
            scheduler = pipe.scheduler.config
            assert scheduler.prediction_type == prediction_type and scheduler.rescale_betas_zero_snr == bool(extra)

    positions, old_positions = second.transformer.pos_embed.pos_embed, first.transformer.pos_embed.pos_embed
    if config == "mmdit-tiny":  # of all sizes up to a largest one: the middle is used
        assert torch.equal(positions, old_positions)
        new = ClassConditionalSD3Transformer2DModel.from_config(json.loads(file.read_text()))
    else:
        new = DiTTransformer2DModel.from_config(json.loads(file.read_text()), sample_size=16)
    assert torch.equal(positions, new.pos_embed.pos_embed)
    as_saved = type(second.transformer).from_config(second.transformer.config)
    assert torch.equal(positions, as_saved.pos_embed.pos_embed)


def test_a_new_text_model_is_trained_in_the_pipeline_around_it(train_dit, model_of, tmp_path):
    model = model_of("StableDiffusion3")
    config = json.loads((model / "transformer" / "config.json").read_text())
    wider = {"num_attention_heads": 3, "caption_projection_dim": 48}
    (tmp_path / "config.json").write_text(json.dumps({**config, **wider}))
    flags = ("--transformer_config", tmp_path / "config.json", "--learning_rate", 1e-2)
    output = train_dit(*flags, *LPL, *DRAW, "--validation_prompt", "a red fox", model=model)
    pipe = open_pipeline(output)
    assert pipe.transformer.inner_dim == 48
    assert np.abs(draw(pipe, "a red fox") - drawn(output)).max() <= 1
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        first, second = (next((folder / part).glob("*.safetensors")) for folder in (model, output))
        first, second = load_file(first), load_file(second)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "family, wrong", [("QwenImage", {"axes_dims_rope": [4, 4, 4]}), ("HunyuanDiT", {"text_len": 9})]
)
def test_a_new_transformer_that_can_not_work_is_one_sentence(train_dit, model_of, tmp_path, family, wrong):
    config = json.loads((model_of(family) / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(UserError, match="--transformer_config: this transformer can't work in the pipeline: .*size"):
        train_dit("--transformer_config", tmp_path / "config.json", model=model_of(family))


# Parts that are not as usual


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Diffusers asks for a GPU to quantise; bitsandbytes itself can do without."""
    quantizers = pytest.importorskip("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    monkeypatch.setattr(quantizers.BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
    monkeypatch.setattr(quantizers.BnB4BitDiffusersQuantizer, "update_device_map", lambda *a: {"": "cpu"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


def test_a_quantised_base_gets_float32_adapters(train_dit, tiny_pipeline, tmp_path, monkeypatch, without_a_gpu):
    from bitsandbytes.nn import Linear4bit

    families, finish = [], train_lpl_dit.finish
    monkeypatch.setattr(train_lpl_dit, "finish", lambda *a: families.append(a[2]) or finish(*a))
    config = tmp_path / "bnb.json"
    config.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    flags = ("--use_lora", "--bnb_quantization_config_path", config, "--checkpointing_steps", 2)
    output = train_dit(*flags, *LPL, model=tiny_pipeline("Flux"), steps=2)
    adapted = [module for name, module in families[0].denoiser.named_modules() if name.endswith("to_q.base_layer")]
    assert adapted and all(isinstance(module, Linear4bit) for module in adapted)
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    pipe = FluxPipeline.from_pretrained(tiny_pipeline("Flux"))  # and serve the base in full precision
    pipe.load_lora_weights(output)


@pytest.mark.parametrize("double", [False, True])
def test_the_dry_run_knows_the_bytes_of_a_quantised_base(model_of, data_of, tmp_path, without_a_gpu, double):
    from bitsandbytes.nn import Linear4bit

    config = tmp_path / "bnb.json"
    config.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_use_double_quant": double}))
    flags = ("--use_lora", "--bnb_quantization_config_path", config)
    args, loaded, _ = prepare(model_of("Flux"), data_of("Flux"), tmp_path, *flags)
    saved = 0
    for module in loaded.denoiser.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            scales = [state.absmax] + ([state.state2.absmax] if double else [])
            saved += 4 * module.in_features * module.out_features  # this base is in float32
            saved -= module.weight.nbytes + sum(scale.nbytes for scale in scales)
    _, plain, _ = prepare(model_of("Flux"), data_of("Flux"), tmp_path, "--use_lora")
    largest = max(4 * m.weight.numel() for m in plain.denoiser.modules() if isinstance(m, torch.nn.Linear))
    assert saved_by_quantising(args, plain.denoiser) == pytest.approx(saved - largest, rel=0.02)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_quantising_needs_a_gpu(train_dit, tiny_pipeline, tmp_path):
    config = tmp_path / "bnb.json"
    config.write_text('{"load_in_8bit": true}')
    with pytest.raises(UserError, match="--bnb_quantization_config_path needs a GPU: leave it out."):
        train_dit("--use_lora", "--bnb_quantization_config_path", config, model=tiny_pipeline("Flux"))


def test_a_decoder_that_lpl_refuses_is_found_before_anything_is_encoded(train_dit, tiny_pipeline, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("it adds noise")

    monkeypatch.setattr("loss_terms.LatentPerceptualLoss", refuse)
    monkeypatch.setattr("train_utils.share_work", lambda *args: pytest.fail("something was encoded"))
    with pytest.raises(UserError, match="LPL can't be computed: it adds noise"):
        train_dit(*CACHES, model=tiny_pipeline("StableDiffusion3"))


def test_stable_diffusion_3_may_come_without_t5(train_dit, tiny_pipeline, tmp_path):
    model = shutil.copytree(tiny_pipeline("StableDiffusion3"), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / part)
        index[part] = [None, None]
    (model / "model_index.json").write_text(json.dumps(index))
    output = train_dit(*LPL, *DRAW, "--validation_prompt", "a fox", model=model)
    drawn, final = (Image.open(output / "samples" / f"{name}.png") for name in ("step-000003", "final"))
    assert np.abs(np.asarray(drawn, int) - np.asarray(final, int)).max() <= 1
    StableDiffusion3Pipeline.from_pretrained(output, text_encoder_3=None, tokenizer_3=None)
