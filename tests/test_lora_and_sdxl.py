"""train_lpl_sd.py with LoRA, SDXL, caches and compiled models, as its users run it, on tiny models."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from marks import slow_but
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_photo_folder, build_tiny_sd, build_tiny_vae, photo_id
from transformers import CLIPTextModel

import train_lpl_sd
from arguments import UserError
from data_utils import cache_latents, make_stream
from images import load_image
from lpl_utils import LatentPerceptualLoss
from model_families import StableDiffusion


WIDE_GATE = ("--lpl_sigma_threshold", 80)
GIVEN = (*WIDE_GATE, "--lpl_weight", 0.3)  # nothing is measured
LORA = ("--use_lora", "--rank", 2, "--lora_alpha", 8, "--learning_rate", 0.05)
TEXT = (*LORA, "--train_text_encoder", "--lora_layers", "to_q, to_v, ff.net.2, proj_in, conv1, time_emb_proj")
DRAW = ("--validation_prompt", "a red fox", "--num_validation_images", 1, "--validation_steps", 2)
DRAW += ("--validation_inference_steps", 5)
CACHES = ("--cache_latents", "--center_crop", "--cache_text_embeddings")
MODELS = ("SD", "SDXL")
KINDS = {"full": ("--learning_rate", 1e-3), "LoRA": LORA, "LoRA with text": TEXT}


@pytest.fixture(params=MODELS)
def model(request, tiny_sd, tiny_sdxl):
    return {"SD": tiny_sd, "SDXL": tiny_sdxl}[request.param]


def pixels(image):
    return np.asarray(image, dtype=int)


def draw(pipe, seed=0):
    """What a validation image is, drawn by a stock pipeline."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": 7.5}
    return pixels(pipe("a red fox", generator=torch.Generator().manual_seed(seed), **settings).images[0])


def weights(path):
    return load_file(path / "pytorch_lora_weights.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Train, save, reload in the stock pipeline, sample


DRAWN = (("SD", "full"), ("SDXL", "LoRA with text"))


@pytest.mark.parametrize("model, kind", slow_but(DRAWN, itertools.product(MODELS, KINDS)), indirect=["model"])
def test_what_the_stock_pipeline_draws_is_what_was_trained(train, model, kind):
    output = train(*KINDS[kind], *DRAW, *WIDE_GATE, model=model, steps=2)
    in_training = pixels(Image.open(output / "samples" / "step-000002.png"))
    base = DiffusionPipeline.from_pretrained(model)
    assert np.abs(draw(base) - in_training).max() > 8
    if "--use_lora" in KINDS[kind]:
        base.load_lora_weights(output)
        reloaded = base
        assert not (output / "unet").exists()
    else:
        reloaded = DiffusionPipeline.from_pretrained(output)
    assert type(reloaded) is type(base)
    assert not [path for path in output.rglob("*.json") if str(model.parent) in path.read_text()]  # no local paths
    assert np.abs(draw(reloaded) - in_training).max() <= 1
    # The run has done the same at its end.
    assert np.abs(pixels(Image.open(output / "samples" / "final.png")) - in_training).max() <= 1
    assert all(row["lpl"] > 0 for row in read_log(output))


def test_every_text_encoder_learns(train, model):
    output = train(*TEXT, *GIVEN, model=model, steps=1)
    encoders = {key.split(".")[0] for key in weights(output)} - {"unet"}
    assert encoders == {path.name for path in model.glob("text_encoder*")}
    ups = {key: value.any() for key, value in weights(output).items() if "lora_B" in key}  # they start at zero
    assert len(ups) > 20 and all(ups.values())
    # Other tools know a text encoder's modules by the names of older transformers.
    assert all(".text_model.encoder.layers." in key for key in weights(output) if key.startswith("text_encoder"))


@pytest.mark.parametrize("model", slow_but(["SD"], MODELS), indirect=True)
def test_with_the_adapter_off_the_lora_is_the_base(train, model, monkeypatch):
    families = []
    finish = train_lpl_sd.finish
    monkeypatch.setattr(train_lpl_sd, "finish", lambda *a: families.append(a[2]) or finish(*a))
    output = train(*TEXT, "--use_dora", *GIVEN, model=model, steps=2)
    loaded = DiffusionPipeline.from_pretrained(model)
    loaded.load_lora_weights(output)
    loaded.disable_lora()
    (family,) = families
    base = DiffusionPipeline.from_pretrained(model)
    for name in ("unet", *family.text_encoder_names):
        expected = getattr(base, name).state_dict()
        for pipe in (family.pipe, loaded):
            found = getattr(pipe, name).state_dict()
            found = {key.replace(".base_layer", ""): value for key, value in found.items() if "lora_" not in key}
            assert same(found, expected)
    assert np.array_equal(draw(loaded), draw(base))


def test_rank_alpha_and_layers_are_saved_with_the_weights(train, tiny_sdxl):
    output = train(*TEXT, "--lora_layers", "to_q, ff.net.2", "--lpl_weight", 0, model=tiny_sdxl, steps=1)
    state, _, metadata = StableDiffusionXLPipeline.lora_state_dict(output, return_lora_metadata=True)
    modules = {key.split(".lora_")[0].split("transformer_blocks.0.")[1] for key in state if key.startswith("unet")}
    assert modules == {"attn1.to_q", "attn2.to_q", "ff.net.2"}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert metadata[f"{part}.r"] == 2 and metadata[f"{part}.lora_alpha"] == 8


def test_layers_that_are_not_there_are_refused(train):
    with pytest.raises(UserError, match="--lora_layers to_z: no module .* there are .*to_q"):
        train("--use_lora", "--lora_layers", "to_z")


HALF = (("SD", "LoRA"), ("SDXL", "LoRA with text"))


@pytest.mark.parametrize("model, kind", slow_but(HALF, itertools.product(MODELS, list(KINDS)[1:])), indirect=["model"])
def test_half_precision_bases_train_float32_adapters(train, model, kind):
    output = train(*KINDS[kind], "--mixed_precision", "bf16", *GIVEN, *DRAW, model=model, steps=2)
    assert {value.dtype for value in weights(output).values()} == {torch.float32}
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(output)
    assert np.abs(draw(pipe) - pixels(Image.open(output / "samples" / "step-000002.png"))).mean() < 8


PRECISIONS = (("bf16", "fp32"), ("no", "bf16"))  # of the training, of the VAE
PRECISE = (("SD", "LoRA", PRECISIONS[0]), ("SDXL", "full", PRECISIONS[1]))


@pytest.mark.parametrize(
    "model, kind, precisions",
    slow_but(PRECISE, itertools.product(MODELS, ("full", "LoRA"), PRECISIONS)),
    indirect=["model"],
)
def test_the_vae_may_have_a_precision_of_its_own(train, model, kind, precisions):
    precision, vae = precisions
    output = train(
        *KINDS[kind], "--mixed_precision", precision, "--vae_dtype", vae, *GIVEN, *DRAW, model=model, steps=2
    )
    drawn, final = (pixels(Image.open(output / "samples" / f"{name}.png")) for name in ("step-000002", "final"))
    assert np.abs(drawn - final).mean() < 8


EXTRA = (("--train_text_encoder", "--gradient_checkpointing"), ("--use_dora",))
RESUMED = (("SD", EXTRA[0]), ("SDXL", EXTRA[1]))


@pytest.mark.parametrize("model, extra", slow_but(RESUMED, itertools.product(MODELS, EXTRA)), indirect=["model"])
def test_a_resumed_lora_run_is_bitwise_the_uninterrupted_one(train, model, extra):
    flags = (*LORA, *extra, "--lora_dropout", 0.3, "--use_ema", "--ema_decay", 0.9, "--random_flip", *WIDE_GATE)
    flags += ("--checkpointing_steps", 3, "--proportion_empty_prompts", 0.3)
    whole = train(*flags, steps=6, model=model, name="whole")
    resumed = whole.with_name("resumed")
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(*flags, "--resume_from_checkpoint", "latest", steps=6, model=model, name="resumed")
    for part in (".", "checkpoint-6"):
        assert same(weights(whole / part), weights(resumed / part))
    assert not same(weights(whole), weights(whole / "checkpoint-6"))  # the result is the average
    # A checkpoint is loaded by the stock pipeline as well.
    DiffusionPipeline.from_pretrained(model).load_lora_weights(whole / "checkpoint-3")


def test_a_checkpoint_of_another_rank_is_refused(train):
    train("--use_lora", "--checkpointing_steps", 1, "--lpl_weight", 0, steps=1)
    with pytest.raises(UserError, match="its run can't go on with --rank 3 .was --rank 4"):
        train("--use_lora", "--rank", 3, "--lpl_weight", 0, "--resume_from_checkpoint", "latest")


@pytest.mark.slow  # one of test_train_lpl_sd.py is not
def test_two_processes_train_adapters_of_both_text_encoders_as_one_does(train, train_on_two_processes, tiny_sdxl):
    flags = (*TEXT, *WIDE_GATE, "--lpl_weight", 0.1, "--learning_rate", 1e-3, *CACHES[:2])
    one = train(*flags, "--train_batch_size", 4, model=tiny_sdxl, steps=2, name="one")
    two = train_on_two_processes(*flags, model=tiny_sdxl, steps=2)
    for row, expected in zip(read_log(two), read_log(one), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


# Conditioning


def test_the_unet_of_sdxl_is_called_as_the_pipeline_calls_it(tiny_sdxl, photos, tmp_path):
    args = train_lpl_sd.parse_args(words(tiny_sdxl, photos, tmp_path, "--proportion_empty_prompts", 0.5))
    family = train_lpl_sd.find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    calls = []
    family.denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, unet=family.denoiser)
    pipe.set_progress_bar_config(disable=True)
    sizes = {"original_size": (480, 640), "crops_coords_top_left": (3, 5), "target_size": (64, 64)}
    pipe("a red fox", num_inference_steps=1, height=64, width=64, **sizes)
    (latents, timestep), theirs = calls[0]

    batch = {"captions": ["", "a red fox"], "original_sizes": torch.tensor([[480, 640]] * 2)}
    batch |= {"crop_top_lefts": torch.tensor([[3, 5]] * 2), "target_sizes": torch.tensor([[64, 64]] * 2)}
    conditioning = family.conditioning(batch)  # a dropped caption is what guidance starts from
    family.predict(family.denoiser, latents, timestep.repeat(2).long(), conditioning)
    _, ours = calls[-1]
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(ours["added_cond_kwargs"][name], theirs["added_cond_kwargs"][name])


def words(model, photos, output, *more):
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--output_dir", output / "out"]
    return [str(word) for word in (*flags, "--resolution", 64, "--seed", 0, *more)]


@pytest.mark.parametrize("bias, favoured", [("earlier", (0, 249)), ("later", (750, 999)), ("range", (100, 299))])
def test_biased_timesteps_come_as_often_as_asked_for(tiny_sd, photos, tmp_path, bias, favoured):
    flags = ["--timestep_bias_strategy", bias, "--timestep_bias_multiplier", 3]
    flags += ["--timestep_bias_begin", 100, "--timestep_bias_end", 300] if bias == "range" else []
    args = train_lpl_sd.parse_args(words(tiny_sd, photos, tmp_path, *flags))
    family = StableDiffusion(args, torch.device("cpu"), torch.float32, torch.float32)
    timesteps = family.sample_timesteps([torch.Generator().manual_seed(i) for i in range(3000)])
    inside = ((timesteps >= favoured[0]) & (timesteps <= favoured[1])).float().mean().item()
    share = (favoured[1] - favoured[0] + 1) / 1000
    assert inside == pytest.approx(3 * share / (3 * share + 1 - share), abs=0.03)


# Caches


CACHED = (("SD", "bf16"), ("SDXL", "no"))


@pytest.mark.parametrize(
    "model, precision", slow_but(CACHED, itertools.product(MODELS, ("no", "bf16"))), indirect=["model"]
)
def test_caches_change_nothing_but_the_work(train, model, monkeypatch, precision):
    flags = ("--center_crop", "--random_flip", "--proportion_empty_prompts", 0.3, "--mixed_precision", precision)
    flags += (*WIDE_GATE, "--lpl_weight", 0.1, "--max_train_steps", 7)
    plain = train(*flags, model=model, name="plain")
    encoded = []
    for encoder, method in ((AutoencoderKL, "encode"), (CLIPTextModel, "forward")):
        call = getattr(encoder, method)
        spy = lambda *a, call=call, **k: encoded.append(call) or call(*a, **k)  # noqa: E731
        monkeypatch.setattr(encoder, method, spy)
    cached = train(*flags, *CACHES, model=model, name="cached")
    encoders = len(list(model.glob("text_encoder*")))
    assert len(encoded) == 2 * 10 + 11 * encoders  # photos, also mirrored; captions, and none
    for row, expected in zip(read_log(cached), read_log(plain), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4 if precision == "no" else 2e-2)


def test_captions_crops_and_cached_latents_belong_together(tiny_sdxl, tmp_path):
    photos = build_photo_folder(tmp_path / "photos", n=24, size=(100, 72))
    flags = ("--center_crop", "--random_flip", "--cache_latents", "--resolution", 64)
    args = train_lpl_sd.parse_args(words(tiny_sdxl, photos, tmp_path, *flags))
    stream = make_stream(args)
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    encode = lambda pixel_values: vae.encode(pixel_values).latent_dist.parameters  # noqa: E731
    with torch.no_grad():
        cache_latents(stream, encode, lambda items, compute, title: [compute(item) for item in items])
        mirrored = 0
        for position in range(60):
            sample = stream[position]
            number = int(sample["caption"].split("number ")[1])
            photo = load_image(photos / f"photo_{number:04d}.png")
            assert photo_id(photo) == number
            resized = photo.resize((int(100 * 64 / 72), 64), Image.Resampling.LANCZOS)
            top, left = sample["crop_top_left"]
            assert sample["original_size"] == (72, 100) and (top, left) == (0, 12)
            crop = torch.tensor(np.asarray(resized)[:, left : left + 64].transpose(2, 0, 1) / 127.5 - 1).float()
            turned = torch.tensor(np.asarray(resized)[:, ::-1][:, left : left + 64].transpose(2, 0, 1) / 127.5 - 1)
            distances = [(encode(x[None].float())[0] - sample["posterior"]).abs().max() for x in (crop, turned)]
            assert min(distances) < 1e-4
            mirrored += int(distances[1] < distances[0])
    assert 15 < mirrored < 45


def test_encoders_leave_the_device_once_all_is_cached(train, tiny_sdxl, monkeypatch):
    families = []
    monkeypatch.setattr(train_lpl_sd, "finish", lambda *a: families.append(a[2]))
    train(*CACHES, model=tiny_sdxl, steps=1)
    (family,) = families
    assert family.placed == {"encoder": False, "decoder": True, "text_encoders": False}
    family.device = torch.device("meta")  # another device than the CPU
    family.place(**family.placed)
    modules = {"encoder": family.vae.encoder, "decoder": family.vae.decoder, **family.text_encoders}
    devices = {name: {p.device.type for p in module.parameters()} for name, module in modules.items()}
    off = dict.fromkeys(("encoder", "text_encoder", "text_encoder_2"), {"cpu"})
    assert devices == {"decoder": {"meta"}, **off}


def test_an_image_that_cannot_be_read_is_skipped_in_the_cache_as_well(train, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    flags = ("--max_bad_images", 1, *CACHES, "--lpl_weight", 0, "--use_lora")
    args = train_lpl_sd.parse_args(words(build_tiny_sd(tmp_path / "model"), folder, tmp_path, *flags))
    (folder / "photo_0003.png").write_bytes(b"no longer")  # after it was checked
    stream = make_stream(args)
    ones = lambda pixel_values: torch.ones(1, 8, 8, 8)  # noqa: E731
    cache_latents(stream, ones, lambda items, compute, title: [compute(item) for item in items])
    captions = [stream[position]["caption"] for position in range(10)]
    assert len(captions) == 10 and not any(caption.endswith("number 3") for caption in captions)


@pytest.mark.parametrize("cached", [(), CACHES], ids=["encoded at every step", "cached"])
def test_a_vae_that_overflows_is_noticed(train, tmp_path, cached):
    vae = build_tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e38
    model = build_tiny_sd(tmp_path / "model", vae=vae)
    with pytest.raises(UserError, match="not finite|loss nan") as error:
        train("--lpl_weight", 0, *cached, model=model)
    assert "--vae_dtype" in str(error.value)


def test_xformers_that_cannot_work_is_one_sentence(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # installed, as far as the flags know
    with pytest.raises(UserError, match="--enable_xformers_memory_efficient_attention: .*; leave it out") as error:
        train("--enable_xformers_memory_efficient_attention", "--lpl_weight", 0)
    assert "\n" not in str(error.value)


# Compiled models


def test_a_compiled_unet_trains_and_saves_like_a_plain_one(train, monkeypatch):
    flags = (*WIDE_GATE, "--lpl_weight", 0.1, "--use_ema", "--checkpointing_steps", 1, *DRAW)
    plain = train(*flags, name="plain", steps=2)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = train(*flags, name="compiled", steps=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for part in ("unet", "checkpoint-2/unet", "checkpoint-2/unet_ema"):
        first, second = (load_file(o / part / "diffusion_pytorch_model.safetensors") for o in (plain, compiled))
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_decoder_blocks_give_the_same_loss_and_gradient(recompute):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    results = []
    for compile_backend in (None, backend):
        vae = build_tiny_vae()
        lpl = LatentPerceptualLoss(vae, gradient_checkpointing=recompute, compile_backend=compile_backend)
        torch.manual_seed(0)
        z0_hat, z0 = torch.randn(2, 2, 4, 8, 8)
        loss, stats = lpl(z0_hat.requires_grad_(), z0)
        loss.sum().backward()
        results.append((loss.detach(), z0_hat.grad, vae.decode(z0).sample))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)
    assert len(graphs) >= 5  # every hooked block, at least once
    torch._dynamo.reset()


def test_the_decoder_is_compiled_on_request(train, monkeypatch):
    plain = train("--lpl_weight", 0.1, *WIDE_GATE, name="plain", steps=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train("--lpl_weight", 0.1, *WIDE_GATE, "--lpl_compile", "aot_eager", name="compiled", steps=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5
    assert read_log(compiled)[0]["lpl"] == pytest.approx(read_log(plain)[0]["lpl"], rel=1e-4)
    torch._dynamo.reset()


# Validation


def test_epochs_between_drawings_are_steps_of_the_data(train):
    flags = ("--validation_prompts", "a fox", "--num_validation_images", 1, "--validation_epochs", 2)
    output = train("--lpl_weight", 0, *flags, "--gradient_accumulation_steps", 2, "--skip_final_inference", steps=7)
    # 10 photos, 4 a step: an epoch is 3 steps.
    assert [path.name for path in (output / "samples").iterdir()] == ["step-000006.png"]


def test_lora_with_a_new_schedule_says_so(train, tmp_path):
    model = build_tiny_sd(tmp_path / "model", prediction_type="v_prediction")
    output = train(*LORA, "--rescale_betas_zero_snr", *GIVEN, model=model, steps=1)
    config = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"
    pipe = StableDiffusionPipeline.from_pretrained(model, scheduler=None)
    assert pipe.scheduler is None
