"""Samples as the stock pipelines draw them, called by hand, for every family and everything that training saves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import run_script
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from marks import slow_but
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_features import save, tiny
from tiny_kolors import build_tiny_kolors
from tiny_models import build_tiny_sd, build_tiny_vae
from tiny_transformers import FAMILIES

import evaluate_lpl
import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from model_families import FAMILIES as ALL_FAMILIES
from pipeline_class_conditional import ClassConditionalPipeline
from sampling import all_agree, draw_samples, identity, own_scheduler, read_models, sample_name


ROOT = Path(train_lpl_sd.__file__).parent
PROMPTS = ["a red fox", "", "two boats at sea, and snow on the hills behind them", 'Köter, "müde"\n(2)']
LABELS = [980, 207, 281, 0]
SEED = 11
UNETS, ON_CLASSES = ("SD", "SDXL", "Kolors"), ("DiT", "MMDiT")
BINNED = ("PixArtAlpha", "PixArtSigma", "Sana", "HunyuanDiT")
STOCK = ("SD", "SDXL", "StableDiffusion3", "Flux", "Chroma", "Sana", "Flux2Klein", "QwenImage", "ZImage", "Lumina2")
STOCK += ("AuraFlow",)  # those whose stock pipelines read LoRA files
EVERY = (*UNETS, *FAMILIES, "MMDiT")
FAST = ("SD", "PixArtSigma", "Sana", "DiT")
SCRATCH = ("--transformer_config", ROOT / "transformer_configs" / "mmdit-tiny.json")
QUICK = ("--lpl_weight", 0, "--learning_rate", 0.01)
AVERAGE = ("--use_ema", "--ema_decay", 0.5, "--save_non_ema")
LORA = ("--use_lora", "--rank", 2, "--lora_alpha", 8)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return save(tmp_path_factory.mktemp("extractors") / "vit", tiny("Dinov2Model"), {"height": 28, "width": 28})


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    build_tiny_vae().save_pretrained(tmp_path_factory.getbasetemp() / "vae")
    return tmp_path_factory.getbasetemp() / "vae"


@pytest.fixture(scope="module")
def trained(photos, class_folders, tiny_sd, tiny_sdxl, tiny_pipeline, vae, tmp_path_factory):
    """Trains a family with flags for two steps; returns the output folder."""

    def run(family, *words):
        script = train_lpl_sd if family in UNETS else train_lpl_dit
        own = {"SD": tiny_sd, "SDXL": tiny_sdxl, "MMDiT": None}
        model = own[family] if family in own else tiny_pipeline(family)
        words += (*SCRATCH, "--pretrained_vae_model_name_or_path", vae) if family == "MMDiT" else ()
        data = ("--train_data_dir", class_folders if family in ON_CLASSES else photos)
        output = tmp_path_factory.mktemp("results") / "out"
        return run_script(script, (*QUICK, *words), output, model, data, steps=2)

    return run


@pytest.fixture(scope="module")
def folder_of(tiny_sd, tiny_sdxl, tiny_pipeline, trained, tmp_path_factory):
    """Family -> folder of a tiny pipeline."""

    def find(family):
        if family == "Kolors":
            return build_tiny_kolors(tmp_path_factory.mktemp("kolors"))
        if family == "MMDiT":
            return trained("MMDiT")
        return {"SD": tiny_sd, "SDXL": tiny_sdxl}[family] if family in ("SD", "SDXL") else tiny_pipeline(family)

    return find


@pytest.fixture
def draw(photos, extractor, tmp_path):
    """Draws a few samples as evaluate_lpl.py does: its flags -> pixels `[N, H, W, 3]` and the pipeline."""

    def run(*words, prompts=PROMPTS, batch_size=2, name="samples"):
        flags = ["--reference", photos, "--output_dir", tmp_path, "--feature_extractor", extractor, "--seed", SEED]
        flags += ["--num_inference_steps", 2, "--resolution", 64, "--batch_size", batch_size, *words]
        args = evaluate_lpl.parse_args([str(word) for word in flags])
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        (model,) = read_models(args)
        pipe, sampler = model.load(args, accelerator.device, torch.float32)
        scale = args.guidance_scale and args.guidance_scale[0]
        settings = {"num_inference_steps": 2, "guidance_scale": scale, "guidance_rescale": args.guidance_rescale}
        folder = tmp_path / name
        draw_samples(accelerator, pipe, model.family, prompts, folder, settings | {"sampler": sampler}, args)
        paths = [folder / sample_name(i, SEED) for i in range(len(prompts))]
        assert sorted(folder.glob("*.png")) == paths
        return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int), pipe

    return run


def load_stock(folder, family="", **parts):
    """The pipeline as diffusers loads it, with the sampler of the evaluation made by hand."""
    if family == "MMDiT":
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **parts)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.scheduler = sampler_of(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampler_of(own):
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        return own
    if own.config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
    return DDIMScheduler.from_config(own.config, timestep_spacing="trailing", clip_sample=False)


def by_hand(pipe, family="", prompts=PROMPTS, **settings):
    """Pixels of the stock pipeline, one prompt after the other."""
    if family != "DiT":
        settings |= {"height": 64, "width": 64}
    settings |= {"use_resolution_binning": False} if family in BINNED else {}
    settings |= {"negative_prompt": ""} if family == "QwenImage" else {}
    images = []
    for i, prompt in enumerate(prompts):
        words = {"class_labels": [prompt]} if family in ON_CLASSES else {"prompt": prompt}
        generator = torch.Generator().manual_seed(SEED + i)
        images.append(pipe(**words, num_inference_steps=2, generator=generator, **settings).images[0])
    return np.stack([np.asarray(image) for image in images]).astype(int)


def assert_same(found, expected):
    """But for rounding; and the images differ from each other."""
    assert found.shape == expected.shape == (len(found), 64, 64, 3)
    assert np.abs(found - expected).max() <= 1
    assert min(np.abs(expected[i] - expected[i - 1]).max() for i in range(len(expected))) > 3


def prompts_of(family):
    return LABELS if family in ON_CLASSES else PROMPTS


# Families


def test_all_families_are_here():
    assert len(EVERY) == len(ALL_FAMILIES)


@pytest.mark.parametrize("family", slow_but(FAST, EVERY))
def test_samples_are_those_of_the_stock_pipeline_whatever_the_batch(draw, folder_of, family):
    folder, prompts = folder_of(family), prompts_of(family)
    expected = by_hand(load_stock(folder, family), family, prompts)
    for size in (1, 3):
        found, _ = draw("--model", folder, prompts=prompts, batch_size=size, name=f"of{size}")
        assert_same(found, expected)


@pytest.mark.parametrize("family", slow_but(("SD", "DiT"), EVERY))
def test_the_guidance_scale_is_the_pipelines(draw, folder_of, family):
    folder, prompts = folder_of(family), prompts_of(family)
    name = "true_cfg_scale" if family == "QwenImage" else "guidance_scale"
    found, _ = draw("--model", folder, "--guidance_scale", 1.7, prompts=prompts)
    pipe = load_stock(folder, family)
    assert_same(found, by_hand(pipe, family, prompts, **{name: 1.7}))
    assert not np.array_equal(found, by_hand(pipe, family, prompts, **{name: 5.0}))


def test_rescaled_guidance(draw, tiny_sd):
    found, _ = draw("--model", tiny_sd, "--guidance_scale", 5, "--guidance_rescale", 0.7)
    pipe = load_stock(tiny_sd)
    assert_same(found, by_hand(pipe, guidance_scale=5.0, guidance_rescale=0.7))
    assert not np.array_equal(found, by_hand(pipe, guidance_scale=5.0))


def test_the_pipelines_own_sampler(draw, tiny_pipeline):
    folder = tiny_pipeline("PixArtSigma")
    found, pipe = draw("--model", folder, "--sampler", "pipeline")
    own = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is type(own.scheduler)
    assert_same(found, by_hand(own, "PixArtSigma"))


def test_another_vae(draw, tiny_sd, vae, tmp_path):
    other = build_tiny_vae(seed=3)
    other.save_pretrained(tmp_path / "vae")
    found, _ = draw("--model", tiny_sd, "--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert_same(found, by_hand(load_stock(tiny_sd, vae=other)))


# What is written


def test_a_png_says_how_it_was_made(draw, tiny_sd, tmp_path):
    draw("--model", tiny_sd)
    for i, prompt in enumerate(PROMPTS):
        text = Image.open(tmp_path / "samples" / f"{i:06d}_seed{SEED + i}.png").text
        assert text["prompt"] == prompt and text["seed"] == str(SEED + i)
        assert (text["num_inference_steps"], text["sampler"]) == ("2", "DDIM")


def test_nothing_is_left_behind_and_nothing_drawn_twice(draw, tiny_sd, tmp_path, monkeypatch):
    draw("--model", tiny_sd)
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {sample_name(i, SEED) for i in range(len(PROMPTS))} | {"settings.json"}
    (tmp_path / "samples" / sample_name(2, SEED)).unlink()
    (tmp_path / "samples" / f".{sample_name(2, SEED)}.tmp").write_bytes(b"cut off")  # of a run that was killed
    drawn = []
    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *words, **more: drawn.append(words[1]) or original(*words, **more))
    draw("--model", tiny_sd)
    assert len(drawn) == 1
    assert {path.name for path in (tmp_path / "samples").iterdir()} == names


# Results of training


def test_a_finetuned_model(draw, trained):
    output = trained("SD")
    assert_same(draw("--model", output)[0], by_hand(load_stock(output)))


@pytest.mark.parametrize("family", slow_but(("SD",), ("SD", "PixArtSigma", "DiT", "MMDiT")))
def test_weights_beside_their_average(draw, trained, family):
    output, prompts = trained(family, *AVERAGE), prompts_of(family)
    raw, _ = draw("--model", output, "--weights", "raw", prompts=prompts, name="raw")
    average, _ = draw("--model", output, prompts=prompts, name="average")
    pipe = load_stock(output, family)
    assert_same(average, by_hand(pipe, family, prompts))
    part = "unet" if family == "SD" else "transformer"
    denoiser = type(getattr(pipe, part)).from_pretrained(output, subfolder=part, variant="non_ema")
    setattr(pipe, part, denoiser)
    assert_same(raw, by_hand(pipe, family, prompts))
    assert not np.array_equal(raw, average)


@pytest.mark.parametrize("family", slow_but(("SD",), ("SD", "PixArtSigma", "DiT")))
def test_what_was_saved_alone_goes_into_its_base_model(draw, trained, folder_of, family):
    output, prompts = trained(family, "--save_only_trained"), prompts_of(family)
    base = folder_of(family)
    assert not (output / "model_index.json").exists()
    found, _ = draw("--model", output, "--base_model", base, prompts=prompts)
    pipe = load_stock(base, family)
    before = by_hand(pipe, family, prompts)
    part = "unet" if family == "SD" else "transformer"
    setattr(pipe, part, type(getattr(pipe, part)).from_pretrained(output, subfolder=part))
    assert_same(found, by_hand(pipe, family, prompts))
    assert not np.array_equal(found, before)


@pytest.mark.parametrize("family", slow_but(("SD",), ("SD", "DiT", "MMDiT")))
def test_a_checkpoint_is_a_model_too(draw, trained, family):
    output, prompts = trained(family, "--checkpointing_steps", 1), prompts_of(family)
    found, _ = draw("--model", output / "checkpoint-2", "--base_model", output, prompts=prompts)
    assert_same(found, by_hand(load_stock(output, family), family, prompts))
    earlier, _ = draw("--model", output / "checkpoint-1", "--base_model", output, prompts=prompts, name="earlier")
    assert not np.array_equal(found, earlier)


@pytest.mark.parametrize("family", slow_but(("SD",), STOCK))
def test_a_lora_that_the_stock_pipeline_reads(draw, trained, folder_of, family):
    check_lora(draw, trained(family, *LORA, *AVERAGE), folder_of(family), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SD", "SDXL"])
def test_a_lora_of_the_text_encoders_too(draw, trained, folder_of, family):
    check_lora(draw, trained(family, *LORA, *AVERAGE, "--train_text_encoder"), folder_of(family), family)


def check_lora(draw, output, base, family):
    drawn = {}
    for weights, name in (("ema", "pytorch_lora_weights"), ("raw", "pytorch_lora_weights_non_ema")):
        flags = ("--model", base, "--lora", output, "--weights", weights)
        drawn[weights], _ = draw(*flags, name=weights)
        pipe = load_stock(base, family)
        plain = by_hand(pipe, family)
        pipe.load_lora_weights(output, weight_name=f"{name}.safetensors")
        assert_same(drawn[weights], by_hand(pipe, family))
        assert not np.array_equal(drawn[weights], plain)
    assert not np.array_equal(drawn["raw"], drawn["ema"])


@pytest.mark.parametrize("family", slow_but(("PixArtSigma",), ("PixArtSigma", "DiT", "HunyuanDiT", "MMDiT")))
def test_a_lora_that_peft_reads(draw, trained, folder_of, family, tmp_path):
    prompts = prompts_of(family)
    if family == "MMDiT":
        base = folder_of(family)
        output = tmp_path / "lora"
        data = ("--train_data_dir", labels_folder(tmp_path / "data"))
        run_script(train_lpl_dit, (*QUICK, *LORA, *AVERAGE), output, base, data, steps=2)
    else:
        output, base = trained(family, *LORA, *AVERAGE), folder_of(family)
    for weights, folder in (("ema", output), ("raw", output / "non_ema")):
        flags = ("--model", base, "--lora", output, "--weights", weights)
        found, _ = draw(*flags, prompts=prompts, name=weights)
        pipe = load_stock(base, family)
        plain = by_hand(pipe, family, prompts)
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, folder)
        assert_same(found, by_hand(pipe, family, prompts))
        assert not np.array_equal(found, plain)


def labels_folder(folder):
    from tiny_models import build_photo_folder

    build_photo_folder(folder, n=6, size=72)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({"file_name": row["file_name"], "label": i}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_scheduler_that_was_saved_with_a_lora_is_the_one_that_draws(draw, trained, tiny_sd):
    output = trained("SD", *LORA, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    _, pipe = draw("--model", tiny_sd, "--lora", output)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-6
    assert own_scheduler(str(tiny_sd / "unet"), None) is None


# Hashes


def test_the_hash_tells_all_weights_apart(draw, trained, tiny_sd, tmp_path):
    """Of the UNet, the VAE, the text encoder and a LoRA; it is the same for the same weights."""
    first, again = identity(load_stock(tiny_sd))["weights"], identity(load_stock(tiny_sd))["weights"]
    assert first == again
    hashes = {first}
    for part, name in (("unet", "conv_out.bias"), ("vae", "decoder.conv_out.bias"), ("text_encoder", None)):
        pipe = load_stock(tiny_sd)
        parameters = dict(getattr(pipe, part).named_parameters())
        with torch.no_grad():
            parameters[name or list(parameters)[-1]][0] += 1e-3
        hashes.add(identity(pipe)["weights"])
    output = trained("SD", *LORA)
    pipe = load_stock(tiny_sd)
    pipe.load_lora_weights(output)
    hashes.add(identity(pipe)["weights"])
    assert len(hashes) == 5


def test_the_identity_tells_strengths_of_a_lora_and_schedulers_apart(trained, tiny_sd):
    pipe = load_stock(tiny_sd)
    pipe.load_lora_weights(trained("SD", *LORA))
    found = [identity(pipe), identity(pipe)]
    next(iter(pipe.unet.peft_config.values())).lora_alpha *= 2
    found.append(identity(pipe))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    found.append(identity(pipe))
    assert found[0] == found[1]
    assert len({entry["scheduler_or_adapters"] for entry in found}) == 3
    assert len({entry["weights"] for entry in found}) == 1


def test_the_hash_includes_projections_of_text_encoders(tiny_sdxl):
    pipe = load_stock(tiny_sdxl)
    before = identity(pipe)["weights"]
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight[0] += 1e-3
    assert identity(pipe)["weights"] != before


def test_the_hash_of_a_peft_lora_tells_it_from_its_base_and_its_raw_weights(draw, trained, tiny_pipeline):
    base, output = tiny_pipeline("PixArtSigma"), trained("PixArtSigma", *LORA, *AVERAGE)
    pipes = [draw("--model", base, name="a")[1], draw("--model", base, "--lora", output, name="b")[1]]
    pipes.append(draw("--model", base, "--lora", output, "--weights", "raw", name="c")[1])
    assert len({identity(pipe)["weights"] for pipe in pipes}) == 3


def test_one_process_agrees_with_itself():
    assert all_agree({"a": 1}) == {"a": 1}


# What can't be drawn


def refused(draw, *words, **more):
    with pytest.raises(UserError) as error:
        draw(*words, **more)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_lora_of_another_model(draw, trained, tiny_sd, tiny_pipeline):
    output = trained("SD", *LORA)
    other = trained("PixArtSigma", *LORA)
    message = refused(draw, "--model", tiny_pipeline("PixArtSigma"), "--lora", output)
    assert f"--lora {output}" in message and "trained on this model" in message
    message = refused(draw, "--model", tiny_sd, "--lora", other)
    assert f"--lora {other}" in message and "trained on this model" in message


def test_a_lora_whose_names_fit_nothing(draw, trained, tiny_pipeline):
    output = trained("PixArtSigma", *LORA)
    path = output / "adapter_model.safetensors"
    state = {name.replace("transformer_blocks", "blocks"): value for name, value in load_file(path).items()}
    save_file(state, path)
    assert f"--lora {output}" in refused(draw, "--model", tiny_pipeline("PixArtSigma"), "--lora", output)


def test_raw_weights_that_are_not_there(draw, trained, tiny_sd, capsys):
    lora = trained("SD", *LORA)
    for words, folder in ((("--model", tiny_sd), tiny_sd), (("--model", tiny_sd, "--lora", lora), lora)):
        with pytest.raises(SystemExit):
            draw(*words, "--weights", "raw")
        assert f"--weights raw: {folder} holds no weights beside the average" in capsys.readouterr().err


def test_a_pipeline_of_another_kind(draw, tmp_path):
    folder = build_tiny_sd(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MarigoldDepthPipeline"}))
    message = refused(draw, "--model", folder)
    assert "is a MarigoldDepthPipeline; what can be evaluated is" in message and "FluxPipeline" in message


def test_weights_that_are_missing_from_a_folder(draw, tmp_path):
    folder = build_tiny_sd(tmp_path / "model")
    next((folder / "unet").glob("*.safetensors")).unlink()
    message = refused(draw, "--model", folder)
    assert f"--model {folder} can't be loaded" in message


def test_too_little_memory_says_what_helps(draw, tiny_sd, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def fails(*words, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fails)
    message = refused(draw, "--model", tiny_sd)
    assert "2 images at a time" in message and "lower --batch_size" in message and "--offload" in message


def test_code_beside_a_class_conditional_model_is_not_run(draw, trained):
    output = trained("MMDiT")
    for path in (output, output / "transformer"):
        for code in path.glob("*.py"):
            code.write_text("raise SystemExit('run')")
    _, pipe = draw("--model", output, prompts=LABELS)
    assert isinstance(pipe, ClassConditionalPipeline)
