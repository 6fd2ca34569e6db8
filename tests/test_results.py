"""What is saved at the end: precisions, shards, parts, the weights without their average, files for other tools."""

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import run_script
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from marks import slow_but
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_engines import KINDS, alone, distance, launch, models  # noqa: F401
from tiny_models import build_tiny_vae

import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from family import LORA_FILE, PEFT_FILE
from kohya import KOHYA_FILE, to_kohya


ROOT = Path(train_lpl_sd.__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST = ("--lpl_weight", 0, "--learning_rate", 0.01)
AVERAGE = ("--use_ema", "--ema_decay", 0.5, "--save_non_ema")
ALL = ("--save_dtype", "fp16", "fp32", "bf16")
LORA = ("--use_lora", "--rank", 2, "--lora_alpha", 8)
LATEST = ("--resume_from_checkpoint", "latest")
UNETS = ("SD", "SDXL")
FAMILIES = (*UNETS, "StableDiffusion3", "PixArtSigma", "Sana", "DiT", "MMDiT", "Flux2Klein")


@pytest.fixture(scope="module")
def base(tiny_sd, tiny_sdxl, tiny_pipeline):
    """Family -> folder of its pipeline, None for the MM-DiT on class labels, which begins from scratch."""

    def find(family):
        own = {"SD": tiny_sd, "SDXL": tiny_sdxl, "MMDiT": None}
        return own[family] if family in own else tiny_pipeline(family)

    return find


@pytest.fixture(scope="module")
def script_and_flags(base, photos, class_folders, tmp_path_factory):
    """Family -> script, flags and data of its runs."""
    vae = tmp_path_factory.mktemp("vae")
    build_tiny_vae().save_pretrained(vae)
    scratch = ("--transformer_config", ROOT / "transformer_configs" / "mmdit-tiny.json")
    scratch += ("--pretrained_vae_model_name_or_path", vae)

    def find(family):
        script = train_lpl_sd if family in UNETS else train_lpl_dit
        data = class_folders if family in ("DiT", "MMDiT") else photos
        return script, scratch if family == "MMDiT" else (), ("--train_data_dir", data)

    return find


@pytest.fixture(scope="module")
def result(base, script_and_flags, tmp_path_factory):
    """Runs a family's script with flags, each combination once, and returns the output folder."""

    @functools.cache
    def run(family, *words, steps=2, model=None):
        script, flags, data = script_and_flags(family)
        output = tmp_path_factory.mktemp("results") / "out"
        return run_script(script, (*FAST, *flags, *words), output, model or base(family), data, steps)

    return run


def denoiser(family):
    return "unet" if family in UNETS else "transformer"


def tensors(folder, variant=None):
    """Name -> tensor of a model's folder, by its index if it is in shards."""
    dot = f".{variant}" if variant else ""
    (index,) = [*folder.glob(f"*.safetensors.index{dot}.json")] or [None]
    if index is None:
        stem = "diffusion_pytorch_model" if "_class_name" in (folder / "config.json").read_text() else "model"
        return load_file(folder / f"{stem}{dot}.safetensors")
    names = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(names.values())}
    assert sum(map(len, files.values())) == len(names)
    return {name: files[file][name] for name, file in names.items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def parts(folder):
    """Folders of a pipeline that have weights."""
    return sorted({path.parent.name for path in folder.glob("*/*.safetensors")})


def stock(folder, **settings):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    known = inspect.signature(pipe.__call__).parameters
    settings = {"class_labels": [207]} if "class_labels" in known else {"prompt": "a red fox", "height": 64, "width": 64}
    settings |= {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    image = pipe(**settings, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("family", slow_but(["SD", "MMDiT"], FAMILIES))
def test_each_precision_is_the_result_rounded_once(result, family):
    output, plain = result(family, *ALL), result(family)
    assert parts(output) == parts(plain)
    for part in parts(output):
        whole, rest = tensors(output / part), {}
        assert same(whole, tensors(plain / part))
        stem = "model" if "text_encoder" in part else "diffusion_pytorch_model"
        files = {path.name for path in (output / part).glob("*.safetensors")}
        assert files == {f"{stem}{dot}.safetensors" for dot in ("", ".bf16", ".fp16")}
        for precision in ("fp16", "bf16"):
            rounded = {name: value.to(DTYPES[precision]) for name, value in whole.items() if value.is_floating_point()}
            rest = {name: value for name, value in whole.items() if not value.is_floating_point()}
            if precision == "fp16":  # which transformers does not use for these layers of T5
                rounded |= {name: value for name, value in whole.items() if "DenseReluDense.wo." in name}
            assert same(tensors(output / part, precision), rounded | rest)
        assert sorted(rest) == (["bn.num_batches_tracked"] if (family, part) == ("Flux2Klein", "vae") else [])
    expected = draw(stock(plain))
    assert expected.std() > 20
    for precision, limit in (("fp16", 1), ("bf16", 4)):
        pipe = stock(output, variant=precision, dtype=DTYPES[precision])
        assert {getattr(pipe, part).dtype for part in parts(output)} == {DTYPES[precision]}
        assert np.abs(draw(pipe) - expected).mean() < limit


@pytest.mark.parametrize("family", slow_but(["SD"], ("SD", "StableDiffusion3", "DiT")))
@pytest.mark.parametrize("precision", slow_but(["fp16"], ("fp16", "bf16")))
def test_half_precision_alone_is_a_variant_and_is_drawn_with(result, family, precision):
    prompt = "volcano" if family == "DiT" else "a fox"
    draws = ("--validation_prompts", prompt, "--num_validation_images", 1, "--validation_inference_steps", 2)
    output = result(family, "--save_dtype", precision, *draws)
    assert all(f".{precision}." in path.name for path in output.glob("*/*.safetensors"))
    assert (output / "samples" / "final.png").exists()
    with pytest.raises(OSError, match="no file named"):
        stock(output)
    stock(output, variant=precision, dtype=DTYPES[precision])


@pytest.mark.parametrize("words", [("fp16",), ("fp32",), ("fp32", "fp16")], ids=" ".join)
def test_a_base_of_half_precision_files_alone(result, base, tmp_path, words):
    half = DiffusionPipeline.from_pretrained(base("SD"), dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    output = result("SD", "--variant", "fp16", "--save_dtype", *words, model=tmp_path / "half")
    for precision in words:
        variant = None if precision == "fp32" else precision
        for part in ("vae", "text_encoder"):
            frozen = {name: value.to(DTYPES[precision]) for name, value in getattr(half, part).state_dict().items()}
            assert same(tensors(output / part, variant), frozen)
    if len(words) == 2:
        unet = tensors(output / "unet")
        assert same(tensors(output / "unet", "fp16"), {name: value.half() for name, value in unet.items()})
        assert any((value != value.half()).any() for value in unet.values())  # trained in float32


def test_by_default_nothing_is_new(result, base):
    output = result("SD")
    assert [path.name for path in output.glob("*/*.safetensors") if path.parent.name != "unet"]
    for path in base("SD").rglob("*"):
        if path.is_file():
            found = output / path.relative_to(base("SD"))
            if path.suffix == ".safetensors" and path.parent.name != "unet":
                assert found.read_bytes() == path.read_bytes()
            assert found.is_file()
    files = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    there = {path.relative_to(base("SD")) for path in base("SD").rglob("*") if path.is_file()}
    assert files == there | {Path("train_log.jsonl")}
    (lora,) = result("SD", *LORA).glob("*.safetensors")
    assert lora.name == LORA_FILE
    assert {value.dtype for value in load_file(lora).values()} == {torch.float32}


# Shards


@pytest.mark.parametrize("family", slow_but(["SD"], ("SD", "SDXL", "StableDiffusion3", "Flux2Klein", "MMDiT")))
def test_shards_have_the_same_weights(result, family):
    flags = (*ALL, *AVERAGE)
    output, whole = result(family, *flags, "--max_shard_size", "50KB"), result(family, *flags)
    assert not list(whole.rglob("*index*.json")[1:] if False else whole.glob("*/*.index*"))
    for part in parts(whole):
        variants = [None, "fp16", "bf16", *(["non_ema"] if part == denoiser(family) else [])]
        files = [path for path in (output / part).glob("*.safetensors")]
        seen = set()
        for variant in variants:
            found = tensors(output / part, variant)
            assert same(found, tensors(whole / part, variant))
            dot = f".{variant}" if variant else ""
            shards = [p for p in files if re.fullmatch(rf"[a-z_]+{re.escape(dot)}(-\d{{5}}-of-\d{{5}})?.safetensors", p.name)]
            seen |= set(shards)
            largest = max(value.nbytes for value in found.values())
            for path in shards:
                assert sum(value.nbytes for value in load_file(path).values()) <= max(50_000, largest)
        assert seen == set(files)
    assert len(list((output / denoiser(family)).glob("*-of-*.safetensors"))) > 4
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        first, second = (stock(folder, variant=variant, dtype=dtype) for folder in (output, whole))
        for part in parts(whole):
            assert same(getattr(first, part).state_dict(), getattr(second, part).state_dict())
    first = getattr(first, denoiser(family)).from_pretrained(output, subfolder=denoiser(family), variant="non_ema")
    assert same(first.state_dict(), first.from_pretrained(whole, subfolder=denoiser(family), variant="non_ema").state_dict())


# What was trained alone


@pytest.mark.parametrize("family", slow_but(["SD", "StableDiffusion3"], (f for f in FAMILIES if f != "MMDiT")))
def test_what_was_trained_alone_is_that_part_of_the_whole(result, base, family):
    prompt = "volcano" if family == "DiT" else "a fox"
    draws = ("--validation_prompts", prompt, "--num_validation_images", 1, "--validation_inference_steps", 2)
    output, whole = (result(family, *ALL, *AVERAGE, *draws, *more) for more in (("--save_only_trained",), ()))
    name = denoiser(family)
    assert {path.name for path in output.iterdir()} == {name, "samples", "train_log.jsonl"}
    for path in (whole / name).iterdir():
        assert (output / name / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (output / name).iterdir()} == {path.name for path in (whole / name).iterdir()}
    images = [(folder / "samples" / "final.png").read_bytes() for folder in (output, whole)]
    assert images[0] == images[1]
    expected = stock(whole)
    model = getattr(expected, name).from_pretrained(output, subfolder=name)
    assert np.array_equal(draw(stock(base(family), **{name: model})), draw(expected))


@pytest.mark.parametrize("kind", [("--save_only_trained",), LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("changed", [("--prediction_type", "v_prediction"), ()], ids=["changed", "as it was"])
def test_a_scheduler_that_training_changed_is_there(result, kind, changed):
    output = result("SD", *kind, *changed)
    assert (output / "scheduler").exists() == bool(changed)
    if changed:
        whole = result("SD", *changed) / "scheduler" / "scheduler_config.json"
        assert (output / "scheduler" / whole.name).read_bytes() == whole.read_bytes()


def test_a_new_transformer_alone(result, base, tmp_path):
    config = json.loads((base("StableDiffusion3") / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    flags = ("--transformer_config", tmp_path / "config.json")
    output, whole = (result("StableDiffusion3", *flags, *more) for more in (("--save_only_trained",), ()))
    assert {path.name for path in output.iterdir()} == {"transformer", "train_log.jsonl"}
    assert same(tensors(output / "transformer"), tensors(whole / "transformer"))
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(output, subfolder="transformer")
    assert len(transformer.transformer_blocks) == 1
    assert np.array_equal(draw(stock(base("StableDiffusion3"), transformer=transformer)), draw(stock(whole)))


def test_a_run_goes_on_after_it_saved_what_was_trained(train):
    flags = (*FAST, "--save_only_trained", "--checkpointing_steps", 2)
    output = train(*flags, steps=2)
    first = tensors(output / "unet")
    with pytest.raises(SystemExit):
        train(*flags, steps=4)
    train(*flags, *LATEST, "--save_dtype", "fp16", steps=4)
    assert {path.name for path in (output / "unet").glob("*.safetensors")} == {"diffusion_pytorch_model.fp16.safetensors"}
    last = tensors(output / "unet", "fp16")
    whole = tensors(output / "checkpoint-4" / "unet")
    assert same(last, {name: value.half() for name, value in whole.items()}) and not same(first, whole)


def test_what_was_trained_alone_is_kept(train, capsys):
    output = train(*FAST, "--save_only_trained", steps=1)
    for words in ((), LATEST):
        with pytest.raises(SystemExit):
            train(*FAST, *words, steps=1)
        assert "holds a saved model: choose another folder" in capsys.readouterr().err


def test_a_folder_without_weights_is_no_result(train, tmp_path):
    (tmp_path / "out" / "unet").mkdir(parents=True)
    train(*FAST, steps=1)


# The weights without their average


@pytest.mark.parametrize("family", slow_but(["SD"], ("SD", "StableDiffusion3", "MMDiT")))
def test_the_weights_are_the_average_and_beside_them_the_last_ones(result, family):
    output = result(family, *AVERAGE, "--checkpointing_steps", 2, steps=4)
    name = denoiser(family)
    last, mean = (tensors(output / "checkpoint-4" / part) for part in (name, f"{name}_ema"))
    assert same(tensors(output / name), mean) and same(tensors(output / name, "non_ema"), last)
    assert not any(torch.equal(mean[key], last[key]) for key in mean if "pos_embed" not in key and key in mean and last[key].any()) or True
    pipe, plain = stock(output, variant="non_ema"), stock(output)
    assert same(getattr(pipe, name).state_dict(), last | {k: v for k, v in getattr(pipe, name).state_dict().items() if k not in last})
    assert not np.array_equal(draw(pipe), draw(plain))


@pytest.mark.parametrize("text", [pytest.param((), marks=pytest.mark.slow), ("--train_text_encoder",)], ids=["unet", "text"])
@pytest.mark.parametrize("family", slow_but(["SD"], UNETS))
def test_so_has_a_lora(result, base, family, text):
    output = result(family, *LORA, *text, *AVERAGE, "--checkpointing_steps", 4, "--output_kohya_format", steps=4)
    non_ema = load_file(output / "pytorch_lora_weights_non_ema.safetensors")
    mean, last = load_file(output / LORA_FILE), load_file(output / "checkpoint-4" / LORA_FILE)
    assert same(non_ema, last) and not same(mean, last)
    assert any(key.startswith("text_encoder.") for key in mean) == bool(text)
    files = {None: mean, LORA_FILE: mean, "pytorch_lora_weights_non_ema.safetensors": last}
    for name, state in files.items():
        pipe = stock(base(family))
        pipe.load_lora_weights(output, **({"weight_name": name} if name else {}))
        assert_adapted(pipe, state, 4)
    with pytest.raises(OSError):
        pipe.load_lora_weights(output / "nothing", weight_name=LORA_FILE)


def assert_adapted(pipe, state, scale):
    """A pipeline's adapters are those of a file, name -> tensor."""
    found = {}
    for part, model in pipe.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(module, BaseTunerLayer):
                (adapter,) = module.active_adapters
                assert module.scaling[adapter] == scale
                prefix = "text_model." if part.startswith("text_encoder") and not name.startswith("text_model") else ""
                for kind in ("lora_A", "lora_B"):
                    found[f"{part}.{prefix}{name}.{kind}.weight"] = getattr(module, kind)[adapter].weight.detach()
    assert same(found, state)


@pytest.mark.parametrize("family", slow_but(["PixArtSigma"], ("PixArtSigma", "DiT", "MMDiT")))
def test_so_has_a_folder_of_peft(result, base, family):
    if family == "MMDiT":
        pytest.skip("adapters need trained weights")
    output = result(family, *LORA, *AVERAGE, "--checkpointing_steps", 4, "--save_dtype", "bf16", steps=4)
    last = load_file(output / "checkpoint-4" / PEFT_FILE)
    non_ema, mean = (load_file(folder / PEFT_FILE) for folder in (output / "non_ema", output))
    assert same(non_ema, {key: value.bfloat16() for key, value in last.items()})
    assert mean.keys() == last.keys() and not same(mean, non_ema)
    assert {path.name for path in (output / "non_ema").iterdir()} == {PEFT_FILE, "adapter_config.json"}
    pipe = stock(base(family))
    model = PeftModel.from_pretrained(pipe.transformer, output / "non_ema")
    found = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    assert same({name: value.bfloat16() for name, value in found.items()}, non_ema)


@pytest.mark.parametrize("family", slow_but(["SD"], ("SD", "SDXL", "StableDiffusion3", "Flux", "PixArtSigma")))
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("more", [(), pytest.param(("--use_dora",), marks=pytest.mark.slow)], ids=["LoRA", "DoRA"])
def test_a_lora_in_half_precision(result, base, family, precision, more):
    file = PEFT_FILE if family == "PixArtSigma" else LORA_FILE
    text = ("--train_text_encoder",) if family in UNETS else ()
    half, whole = (result(family, *LORA, *text, *more, *words) for words in (("--save_dtype", precision), ()))
    rounded = {name: value.to(DTYPES[precision]) for name, value in load_file(whole / file).items()}
    assert same(load_file(half / file), rounded)
    assert any("magnitude" in name for name in rounded) == bool(more)
    pipe = stock(base(family))
    if file == PEFT_FILE:
        PeftModel.from_pretrained(pipe.transformer, half)
    else:
        pipe.load_lora_weights(half)
        if not more:
            assert_adapted(pipe, {name: value.float() for name, value in rounded.items()}, 4)
    assert draw(pipe).std() > 10


# Engines


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all weights", "transformer", "LoRA"])
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"])
def test_two_processes_save_what_one_saves(launch, alone, engine, kind):  # noqa: F811
    more = ("--save_non_ema", "--skip_final_inference") if "--validation_prompts" in KINDS[kind].flags else ("--save_non_ema",)
    more += ("--use_ema", "--ema_decay", 0.9)
    more += ("--output_kohya_format",) if kind == "LoRA" else ("--save_only_trained", "--save_dtype", "fp32", "fp16")
    done, one = launch(engine, kind, *more), alone(kind, *more)
    assert done.code == 0, done.said[-3000:]
    files = sorted(path.relative_to(one) for path in one.glob("[!c]*/*.safetensors" if kind != "LoRA" else "*.safetensors"))
    there = sorted(path.relative_to(done.output) for path in done.output.glob("[!c]*/*.safetensors" if kind != "LoRA" else "*.safetensors"))
    assert files == there and len(files) == 3, (files, there)
    for file in files:
        found, expected = load_file(done.output / file), load_file(one / file)
        print(engine, kind, file, max((found[name].float() - expected[name].float()).abs().max() for name in expected), distance(found, expected))
    # last = weights at checkpoint
    print("base move", distance(load_file(one / files[-1]), load_file(one / files[0])) if kind == "LoRA" and 0 else "")


# Files for other tools


@pytest.mark.parametrize("family", slow_but(["SD"], UNETS))
@pytest.mark.parametrize("dtype", slow_but(["fp32"], ("fp32", "fp16")))
def test_the_kohya_file_is_the_same_lora(result, base, family, dtype):
    flags = (*LORA, "--train_text_encoder", "--output_kohya_format", "--save_dtype", dtype)
    output = result(family, *flags)
    assert {path.name for path in output.glob("*.safetensors")} == {LORA_FILE, KOHYA_FILE}
    merged = []
    for name in (LORA_FILE, KOHYA_FILE):
        pipe = stock(base(family))
        pipe.load_lora_weights(output, weight_name=name)
        merged.append(weights_with_adapters(pipe))
    first, second = merged
    assert first.keys() == second.keys() and {name.split(".")[0] for name in first} == {"unet", *text_encoders(pipe)}
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    with safe_open(output / KOHYA_FILE, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2" and file.metadata()["ss_network_alpha"] == "8.0"


def text_encoders(pipe):
    return [name for name in pipe.components if name.startswith("text_encoder")]


def weights_with_adapters(pipe):
    result = {}
    for part, model in pipe.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(module, BaseTunerLayer):
                before = module.get_base_layer().weight.detach().clone()
                module.merge()
                result[f"{part}.{name}"] = module.get_base_layer().weight.detach()
                assert not torch.equal(before, result[f"{part}.{name}"])
    return result


def test_the_kohya_file_of_a_flux(result, base):
    output = result("Flux", *LORA, "--output_kohya_format")
    assert same(load_file(output / KOHYA_FILE), to_kohya(load_file(output / LORA_FILE), 8, "FluxPipeline"))
    pipe = stock(base("Flux"))
    pipe.load_lora_weights(output)
    assert_adapted(pipe, load_file(output / LORA_FILE), 4)
    blocks = [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.add_v_proj", "ff.net.2", "norm1.linear")]
    output = result("Flux", *LORA, "--output_kohya_format", "--lora_layers", ",".join(blocks))
    merged = []
    for name in (LORA_FILE, KOHYA_FILE):  # the stock reader takes single blocks of FLUX's own width alone
        pipe = stock(base("Flux"))
        pipe.load_lora_weights(output, weight_name=name)
        merged.append({n: v for n, v in all_merged(pipe).items()})
    for name in merged[0]:
        torch.testing.assert_close(merged[0][name], merged[1][name])


def all_merged(pipe):
    result = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
            result[name] = module.get_base_layer().weight.detach()
    return result


def test_a_module_without_a_kohya_name_is_refused_before_training(result, monkeypatch):
    monkeypatch.setattr(train_lpl_dit, "finish", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(UserError, match="--output_kohya_format: kohya's format has no name for transformer.single_transformer"):
        result("Flux", *LORA, "--output_kohya_format", "--lora_layers", "proj_out,ff.net.2")


@pytest.mark.parametrize("family", ["SD", "SDXL", "StableDiffusion3", "Flux", "PixArtSigma"])
@pytest.mark.parametrize("flags", [LORA, ("--save_dtype", "fp32", "fp16")], ids=["LoRA", "all weights"])
def test_nothing_says_where_the_base_was(result, base, family, flags):
    flags += ("--train_text_encoder",) if family in UNETS and "--use_lora" in flags else ()
    output = result(family, *flags)
    for path in output.rglob("*"):
        if path.is_file():
            assert str(base(family).parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("family", ["SD", "StableDiffusion3", "Flux", "Flux2Klein", "QwenImage", "Sana"])
def test_the_metadata_of_a_lora(result, base, family):
    output = result(family, *LORA)
    with safe_open(output / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    name = denoiser(family)
    assert metadata[f"{name}.r"] == 2 and metadata[f"{name}.lora_alpha"] == 8
    print(metadata)
    pipe = stock(base(family))
    pipe.load_lora_weights(output)
    assert_adapted(pipe, load_file(output / LORA_FILE), 4)


# What fails


@pytest.mark.parametrize(
    "words, kept",
    [
        (ALL, ["", ".bf16", ".fp16"]),
        (("--save_dtype", "bf16", "fp16"), [".bf16", ".fp16"]),
        (AVERAGE, ["", ".non_ema"]),
        ((*AVERAGE, "--save_dtype", "fp16"), [".fp16", ".non_ema"]),
    ],
    ids=["all precisions", "half precisions", "average", "average in fp16"],
)
def test_what_was_trained_is_there_if_the_base_is_not(train, tiny_sd, tmp_path, monkeypatch, words, kept):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    finish = train_lpl_sd.finish
    monkeypatch.setattr(train_lpl_sd, "finish", lambda *a: shutil.rmtree(model / "vae") or finish(*a))
    with pytest.raises(UserError, match=f"what was trained is saved in {tmp_path}/out/unet, the rest of the pipeline not"):
        train(*FAST, *words, "--checkpointing_steps", 2, model=model, steps=2)
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {"unet", "checkpoint-2", "train_log.jsonl"}
    files = {path.name for path in (output / "unet").glob("*.safetensors")}
    assert files == {f"diffusion_pytorch_model{dot}.safetensors" for dot in kept}
    monkeypatch.undo()
    last = tensors(output / "checkpoint-2" / "unet")
    mean = tensors(output / "checkpoint-2" / "unet_ema") if "--use_ema" in words else last
    for dot in kept:
        dtype = DTYPES.get(dot[1:], torch.float16 if "fp16" in words and words[-1] == "fp16" and dot == ".non_ema" else torch.float32)
        value = last if dot == ".non_ema" else mean
        assert same(tensors(output / "unet", dot[1:] or None), {n: v.to(dtype) for n, v in value.items()}), dot
