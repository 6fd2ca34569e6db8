"""What is saved at the end: precisions, shards, parts, the weights without their average, files for other tools."""

import functools
import inspect
import json
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
from diffusers import DiffusionPipeline
from marks import slow_but
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from test_engines import alone, distance, launch, models  # noqa: F401
from test_survival import pages, run_in
from tiny_kolors import build_tiny_kolors
from tiny_models import build_tiny_vae

import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from family import LORA_FILE, PEFT_FILE
from kohya import KOHYA_FILE


ROOT = Path(train_lpl_sd.__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST = ("--lpl_weight", 0, "--learning_rate", 0.01)
ALL = ("--save_dtype", "fp16", "fp32", "bf16")
AVERAGE = ("--use_ema", "--ema_decay", 0.5, "--save_non_ema")
LORA = ("--use_lora", "--rank", 2, "--lora_alpha", 8)
TEXT = ("--train_text_encoder",)
KOHYA = ("--output_kohya_format",)
LATEST = ("--resume_from_checkpoint", "latest")
NON_EMA = "pytorch_lora_weights_non_ema.safetensors"
UNETS, ON_CLASSES = ("SD", "SDXL"), ("DiT", "MMDiT")
FAMILIES = (*UNETS, "StableDiffusion3", "PixArtSigma", "Sana", "Flux2Klein", *ON_CLASSES)


@pytest.fixture(scope="module")
def base(tiny_sd, tiny_sdxl, tiny_pipeline):
    """Family -> folder of its pipeline; None for the MM-DiT on class labels, which begins from scratch."""

    def find(family):
        own = {"SD": tiny_sd, "SDXL": tiny_sdxl, "MMDiT": None}
        return own[family] if family in own else tiny_pipeline(family)

    return find


@pytest.fixture(scope="module")
def result(base, photos, class_folders, tmp_path_factory):
    """Trains a family with flags, each combination once, and returns the output folder."""
    vae = tmp_path_factory.mktemp("vae")
    build_tiny_vae().save_pretrained(vae)
    scratch = ("--transformer_config", ROOT / "transformer_configs" / "mmdit-tiny.json")
    scratch += ("--pretrained_vae_model_name_or_path", vae)

    @functools.cache
    def run(family, *words, steps=2, model=None):
        script = train_lpl_sd if family in UNETS else train_lpl_dit
        data = ("--train_data_dir", class_folders if family in ON_CLASSES else photos)
        words = (*FAST, *(scratch if family == "MMDiT" else ()), *words)
        return run_script(
            script, words, tmp_path_factory.mktemp("results") / "out", model or base(family), data, steps
        )

    return run


def denoiser(family):
    return "unet" if family in UNETS else "transformer"


def drawing(family):
    prompt = "volcano" if family in ON_CLASSES else "a fox"
    return "--validation_prompts", prompt, "--num_validation_images", 1, "--validation_inference_steps", 2


def parts(folder):
    """The folders of a pipeline that have weights."""
    return sorted({path.parent.name for path in folder.glob("*/*.safetensors")})


def files_of(folder, variant=None):
    """Paths of a model's weights in one variant, whole or in shards."""
    name = (
        rf"(diffusion_pytorch_)?model{re.escape(f'.{variant}') if variant else ''}(-\d{{5}}-of-\d{{5}})?.safetensors"
    )
    return [path for path in sorted(folder.iterdir()) if re.fullmatch(name, path.name)]


def tensors(folder, variant=None):
    """Name -> tensor of a model's folder in one variant; shards must be those of their index."""
    files = {path.name: load_file(path) for path in files_of(folder, variant)}
    if len(files) > 1:
        (index,) = folder.glob(f"*.safetensors.index{f'.{variant}' if variant else ''}.json")
        where = {name: file for file, state in files.items() for name in state}
        assert json.loads(index.read_text())["weight_map"] == where and sum(map(len, files.values())) == len(where)
    return {name: value for state in files.values() for name, value in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def cast(state, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def stock(folder, **settings):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe):
    known = inspect.signature(pipe.__call__).parameters
    settings = {"prompt": "a red fox", "height": 64, "width": 64} if "prompt" in known else {"class_labels": [207]}
    settings |= {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    image = pipe(**settings, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    return np.asarray(image, dtype=int)


def adapted_modules(pipe):
    """Part and name of a pipeline's modules with adapters, and the modules."""
    for part, model in pipe.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(module, BaseTunerLayer):
                yield part, name, module


def assert_adapted(pipe, state, scale=4):
    """A pipeline's adapters have this scale, and are those of a file: name -> tensor."""
    found = {}
    for part, name, module in adapted_modules(pipe):
        (adapter,) = module.active_adapters
        assert module.scaling[adapter] == scale
        if part.startswith("text_encoder"):
            name = f"text_model.{name.removeprefix('text_model.')}"
        for kind in ("lora_A", "lora_B"):
            found[f"{part}.{name}.{kind}.weight"] = getattr(module, kind)[adapter].weight.detach()
    assert same(found, state)


def merged_weights(pipe):
    """Name -> weight with its adapter in it, of all modules whose adapter changes it."""
    result = {}
    for part, name, module in adapted_modules(pipe):
        before = module.get_base_layer().weight.detach().clone()
        module.merge()
        if not torch.equal(module.get_base_layer().weight, before):
            result[f"{part}.{name}"] = module.get_base_layer().weight.detach()
    return result


def test_by_default_there_is_a_pipeline_in_float32_and_nothing_else(result, base):
    output = result("SD")
    files, there = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} for folder in (output, base("SD"))
    )
    assert files == there | {Path("train_log.jsonl")}
    for part in ("vae", "text_encoder"):
        assert same(tensors(output / part), tensors(base("SD") / part))
    for path in output.glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float32}
    assert not same(tensors(output / "unet"), tensors(base("SD") / "unet"))


# Precisions


@pytest.mark.parametrize("family", slow_but(["SD"], FAMILIES))
def test_each_precision_is_the_result_rounded_once(result, family):
    output, plain = result(family, *ALL), result(family)
    assert parts(output) == parts(plain)
    for part in parts(output):
        whole = tensors(output / part)
        assert same(whole, tensors(plain / part))
        stem = "model" if "text_encoder" in part else "diffusion_pytorch_model"
        files = {path.name for path in (output / part).glob("*.safetensors")}
        assert files == {f"{stem}{dot}.safetensors" for dot in ("", ".bf16", ".fp16")}
        assert same(tensors(output / part, "bf16"), cast(whole, torch.bfloat16))
        # Of T5, transformers has these layers in float32 even so.
        precise = {name: value for name, value in whole.items() if "DenseReluDense.wo." in name}
        assert same(tensors(output / part, "fp16"), cast(whole, torch.float16) | precise)
        counted = {name.split(".")[-1] for name, value in whole.items() if not value.is_floating_point()}
        assert counted == ({"num_batches_tracked"} if part == "vae" and family in ("Flux2Klein", "Sana") else set())
    expected = draw(stock(plain))
    assert expected.std() > 20
    assert np.array_equal(draw(stock(output)), expected)  # of one precision also if none is named
    for precision, limit in (("fp16", 1), ("bf16", 4)):
        pipe = stock(output, variant=precision, dtype=DTYPES[precision])
        assert {getattr(pipe, part).dtype for part in parts(output)} == {DTYPES[precision]}
        assert np.abs(draw(pipe) - expected).mean() < limit


ALONE = (("SD", "fp16"), ("SD", "bf16"), ("StableDiffusion3", "fp16"), ("MMDiT", "fp16"))


@pytest.mark.parametrize("family, precision", slow_but(ALONE[:1], ALONE))
def test_half_precision_alone_is_a_variant_that_the_run_draws_with(result, family, precision):
    output = result(family, "--save_dtype", precision, *drawing(family))
    names = [path.name for path in output.glob("*/*.safetensors")]
    assert names and all(name.endswith(f".{precision}.safetensors") for name in names)
    assert (output / "samples" / "final.png").exists()
    draw(stock(output, variant=precision, dtype=DTYPES[precision]))
    with pytest.raises(OSError, match="no file named"):
        stock(output)


@pytest.mark.parametrize("precisions", slow_but(["fp32 fp16"], ("fp32 fp16", "fp32", "fp16")))
def test_a_base_that_has_half_precision_files_alone(result, base, tmp_path, precisions):
    half = DiffusionPipeline.from_pretrained(base("SD"), dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    output = result("SD", "--variant", "fp16", "--save_dtype", *precisions.split(), model=tmp_path / "half")
    for precision in precisions.split():
        variant = {"fp16": "fp16"}.get(precision)
        for part in ("vae", "text_encoder"):
            assert same(tensors(output / part, variant), cast(getattr(half, part).state_dict(), DTYPES[precision]))
    if precisions == "fp32 fp16":
        unet = tensors(output / "unet")
        assert same(tensors(output / "unet", "fp16"), cast(unet, torch.float16))
        assert any((value != value.half()).any() for value in unet.values())  # it was trained in float32


HALVES = [(family, "fp16", ()) for family in (*UNETS, "StableDiffusion3", "Flux", "PixArtSigma")]
HALVES += [("SD", "bf16", ()), ("SDXL", "fp16", ("--use_dora",)), ("PixArtSigma", "bf16", ("--use_dora",))]


@pytest.mark.parametrize("family, precision, more", slow_but(HALVES[:1], HALVES))
def test_a_lora_in_half_precision(result, base, family, precision, more):
    more += TEXT if family in UNETS else ()
    file = PEFT_FILE if family == "PixArtSigma" else LORA_FILE
    half, whole = (result(family, *LORA, *more, *words) for words in (("--save_dtype", precision), ()))
    rounded = cast(load_file(whole / file), DTYPES[precision])
    assert same(load_file(half / file), rounded)
    assert any("magnitude" in name for name in rounded) == ("--use_dora" in more)
    pipe = stock(base(family))
    if file == PEFT_FILE:
        PeftModel.from_pretrained(pipe.transformer, half)
    else:
        pipe.load_lora_weights(half)
    if file == LORA_FILE and "--use_dora" not in more:
        assert_adapted(pipe, cast(rounded, torch.float32))
    assert np.abs(draw(pipe) - draw(stock(base(family)))).max() > 4


# Shards


@pytest.mark.parametrize("family", slow_but(["SD"], (*UNETS, "StableDiffusion3", "Flux2Klein", "MMDiT")))
def test_shards_have_the_weights_of_whole_files(result, family):
    flags, name = (*ALL, *AVERAGE), denoiser(family)
    output, whole = result(family, *flags, "--max_shard_size", "50KB"), result(family, *flags)
    assert not list(whole.glob("*/*.index*")) and len(files_of(output / name)) > 4
    for part in parts(whole):
        variants, shards = [None, "fp16", "bf16", *["non_ema"] * (part == name)], set()
        for variant in variants:
            found = tensors(output / part, variant)
            assert same(found, tensors(whole / part, variant))
            shards |= set(files_of(output / part, variant))
            for path in files_of(output / part, variant):
                sizes = [value.nbytes for value in load_file(path).values()]
                assert sum(sizes) <= 50_000 or len(sizes) == 1
        assert shards == set((output / part).glob("*.safetensors"))
        assert len(list((whole / part).glob("*.safetensors"))) == len(variants)
    for variant, precision in ((None, "fp32"), ("fp16", "fp16"), ("bf16", "bf16")):
        sharded, plain = (stock(folder, variant=variant, dtype=DTYPES[precision]) for folder in (output, whole))
        for part in parts(whole):
            assert same(getattr(sharded, part).state_dict(), getattr(plain, part).state_dict())
    model_class = type(getattr(plain, name))
    raw = [model_class.from_pretrained(place, subfolder=name, variant="non_ema") for place in (output, whole)]
    assert same(*(model.state_dict() for model in raw))


# What was trained alone


@pytest.mark.parametrize("family", slow_but(["SD"], FAMILIES[:-1]))
def test_what_was_trained_alone_is_that_part_of_the_whole(result, base, family):
    name = denoiser(family)
    flags = (*ALL, *AVERAGE, *drawing(family))
    output, whole = (result(family, *flags, *more) for more in (("--save_only_trained",), ()))
    assert {path.name for path in output.iterdir()} == {name, "samples", "train_log.jsonl"}
    found, expected = ({p.name: p.read_bytes() for p in (folder / name).iterdir()} for folder in (output, whole))
    assert found == expected and len(found) == 5  # three precisions, the weights without average, the config
    drawn = [(folder / "samples" / "final.png").read_bytes() for folder in (output, whole)]
    assert drawn[0] == drawn[1]
    pipe = stock(whole)
    model = getattr(pipe, name).from_pretrained(output, subfolder=name)
    assert np.array_equal(draw(stock(base(family), **{name: model})), draw(pipe))


@pytest.mark.parametrize(
    "kind", [("--save_only_trained",), pytest.param(LORA, marks=pytest.mark.slow)], ids=["all weights", "LoRA"]
)
def test_a_scheduler_that_training_changed_comes_with_it(result, kind):
    changed = ("--prediction_type", "v_prediction")
    assert not (result("SD", *kind) / "scheduler").exists()
    found, expected = (result("SD", *words, *changed) / "scheduler" for words in (kind, ()))
    assert [path.read_bytes() for path in found.iterdir()] == [path.read_bytes() for path in expected.iterdir()]
    assert "v_prediction" in (found / "scheduler_config.json").read_text()


@pytest.mark.slow
def test_a_new_transformer_alone(result, base, tmp_path):
    folder = base("StableDiffusion3")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    flags = ("--transformer_config", tmp_path / "config.json")
    output, whole = (result("StableDiffusion3", *flags, *more) for more in (("--save_only_trained",), ()))
    assert {path.name for path in output.iterdir()} == {"transformer", "train_log.jsonl"}
    assert same(tensors(output / "transformer"), tensors(whole / "transformer"))
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(output, subfolder="transformer")
    assert len(transformer.transformer_blocks) == 1
    assert np.array_equal(draw(stock(folder, transformer=transformer)), draw(stock(whole)))


def test_a_run_goes_on_after_it_has_saved_what_was_trained(train, capsys):
    flags = (*FAST, "--save_only_trained", "--checkpointing_steps", 2)
    output = train(*flags, steps=2)
    first = tensors(output / "unet")
    assert 'UNet2DConditionModel.from_pretrained(..., subfolder="unet")' in capsys.readouterr().out
    train(*flags, *LATEST, "--save_dtype", "fp16", steps=4)
    assert {path.name for path in output.glob("unet/*.safetensors")} == {"diffusion_pytorch_model.fp16.safetensors"}
    last = tensors(output / "checkpoint-4" / "unet")
    assert same(tensors(output / "unet", "fp16"), cast(last, torch.float16)) and not same(first, last)


def test_what_was_trained_alone_is_kept_from_another_run(train, capsys, tmp_path):
    (tmp_path / "out" / "unet").mkdir(parents=True)  # by itself no result
    output = train(*FAST, "--save_only_trained", steps=1)
    before = tensors(output / "unet")
    for words in ((), LATEST):
        with pytest.raises(SystemExit):
            train(*FAST, *words, steps=1)
        assert "holds a saved model: choose another folder" in capsys.readouterr().err
    assert same(tensors(output / "unet"), before)


# The weights without their average


@pytest.mark.parametrize("family", slow_but(["SD"], ("SD", "StableDiffusion3", "MMDiT")))
def test_beside_the_average_are_the_last_weights(result, family):
    output, name = result(family, *AVERAGE, "--checkpointing_steps", 4, steps=4), denoiser(family)
    last, mean = (tensors(output / "checkpoint-4" / part) for part in (name, f"{name}_ema"))
    assert same(tensors(output / name), mean) and same(tensors(output / name, "non_ema"), last)
    assert not same(mean, last)
    plain, raw = (stock(output, variant=variant) for variant in (None, "non_ema"))
    loaded = getattr(raw, name).state_dict()
    assert same({key: loaded[key] for key in last}, last)
    assert not np.array_equal(draw(plain), draw(raw))


LORAS = (("SD", TEXT), ("SD", ()), ("SDXL", TEXT), ("StableDiffusion3", ()))


@pytest.mark.parametrize("family, text", slow_but(LORAS[:1], LORAS))
def test_beside_the_averaged_lora_is_the_last_one(result, base, family, text):
    kohya = KOHYA if family in UNETS else ()
    output = result(family, *LORA, *text, *kohya, *AVERAGE, "--checkpointing_steps", 4, steps=4)
    mean, last = load_file(output / LORA_FILE), load_file(output / "checkpoint-4" / LORA_FILE)
    assert same(load_file(output / NON_EMA), last) and not same(mean, last)
    assert any(key.startswith("text_encoder.") for key in mean) == bool(text)
    for name, state in {None: mean, LORA_FILE: mean, NON_EMA: last}.items():
        pipe = stock(base(family))
        pipe.load_lora_weights(output, **({"weight_name": name} if name else {}))
        assert_adapted(pipe, state)


@pytest.mark.parametrize("family", slow_but(["PixArtSigma"], ("PixArtSigma", "DiT")))
def test_beside_an_averaged_adapter_of_peft_is_the_last_one(result, base, family):
    flags = (*AVERAGE, "--checkpointing_steps", 4, "--save_dtype", "bf16")
    output = result(family, *LORA, *flags, steps=4)
    last = cast(load_file(output / "checkpoint-4" / PEFT_FILE), torch.bfloat16)
    raw, mean = (load_file(folder / PEFT_FILE) for folder in (output / "non_ema", output))
    assert same(raw, last) and mean.keys() == raw.keys() and not same(mean, raw)
    assert {path.name for path in (output / "non_ema").iterdir()} == {PEFT_FILE, "adapter_config.json"}
    model = PeftModel.from_pretrained(stock(base(family)).transformer, output / "non_ema")
    found = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    assert same(cast(found, torch.bfloat16), raw)


def test_what_an_older_result_had_besides_is_gone(train):
    flags = (*FAST, *LORA, "--use_ema", "--checkpointing_steps", 2)
    output = train(*flags, *KOHYA, "--save_non_ema", steps=2)
    assert {path.name for path in output.glob("*.safetensors")} == {LORA_FILE, KOHYA_FILE, NON_EMA}
    train(*flags, *LATEST, steps=4)
    assert {path.name for path in output.glob("*.safetensors")} == {LORA_FILE}


ENGINES = [("DDP", "LoRA"), ("FSDP2", "all weights"), ("FSDP2", "LoRA"), ("ZeRO-2", "all weights")]
ENGINES += [("ZeRO-3", "all weights"), ("ZeRO-3", "LoRA")]


@pytest.mark.slow
@pytest.mark.parametrize("engine, kind", ENGINES)
def test_two_processes_save_what_one_saves(launch, alone, engine, kind):  # noqa: F811
    flags = ("--save_non_ema", "--skip_final_inference")
    flags += KOHYA if kind == "LoRA" else ("--save_only_trained", "--save_dtype", "fp32", "fp16")
    done, one = launch(engine, kind, *flags), alone(kind, *flags)
    assert done.code == 0, done.said[-3000:]
    place = "." if kind == "LoRA" else "unet"
    names = {path.name for path in (one / place).glob("*.safetensors")}
    assert {path.name for path in (done.output / place).glob("*.safetensors")} == names and len(names) == 3
    if kind == "LoRA":
        raw, mean = NON_EMA, LORA_FILE
    else:
        raw, mean = (f"diffusion_pytorch_model{dot}.safetensors" for dot in (".non_ema", ""))
        unet = done.output / "unet"
        assert same(tensors(unet, "fp16"), cast(tensors(unet), torch.float16))
    first = load_file(one / "checkpoint-1" / place / mean)
    results = {name: (load_file(done.output / place / name), load_file(one / place / name)) for name in names}
    for name in (raw, mean):
        found, expected = results[name]
        assert distance(found, expected) < 5e-5 * distance(expected, first)
    assert distance(results[raw][0], results[mean][0]) > 0.05 * distance(results[raw][0], first)


# Files for other tools


KOHYAS = (("SD", "fp32"), ("SD", "fp16"), ("SDXL", "fp32"))


@pytest.mark.parametrize("family, precision", slow_but(KOHYAS[:1], KOHYAS))
def test_the_kohya_file_is_the_same_lora(result, base, family, precision):
    output = result(family, *LORA, *TEXT, *KOHYA, "--save_dtype", precision)
    assert {path.name for path in output.glob("*.safetensors")} == {LORA_FILE, KOHYA_FILE}
    first, second = (merged_weights(with_lora(base(family), output, name)) for name in (LORA_FILE, KOHYA_FILE))
    encoders = {path.name for path in base(family).glob("text_encoder*")}
    assert first.keys() == second.keys() and len(first) == len(load_file(output / LORA_FILE)) // 2
    assert {name.split(".")[0] for name in first} == {"unet", *encoders}
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    with safe_open(output / KOHYA_FILE, "pt") as file:
        assert file.metadata().items() >= {"ss_network_dim": "2", "ss_network_alpha": "8.0"}.items()
        dtypes = {file.get_tensor(key).dtype for key in file.keys() if not key.endswith(".alpha")}
    assert dtypes == {DTYPES[precision]}


def with_lora(folder, output, name=None):
    pipe = stock(folder)
    pipe.load_lora_weights(output, **({"weight_name": name} if name else {}))
    return pipe


@pytest.mark.slow
def test_the_kohya_file_of_a_flux(result, base):
    blocks = [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.add_v_proj", "ff.net.2")]
    output = result("Flux", *LORA, *KOHYA, "--lora_layers", ",".join(blocks))
    first, second = (merged_weights(with_lora(base("Flux"), output, name)) for name in (LORA_FILE, KOHYA_FILE))
    assert set(first) == {f"transformer.{name}" for name in blocks}
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])
    default = result("Flux", *LORA, *KOHYA)  # its single block is too narrow for the stock reader of kohya's file
    assert_adapted(with_lora(base("Flux"), default), load_file(default / LORA_FILE))
    names = {key.split(".")[0].partition("_blocks_0_")[2] for key in load_file(default / KOHYA_FILE)}
    double = "img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj img_mlp_0 img_mlp_2 txt_mlp_0 txt_mlp_2"
    assert names == {*double.split(), "linear1"}


def test_a_module_without_a_kohya_name_is_refused_before_training(result, monkeypatch):
    monkeypatch.setattr(train_lpl_dit, "make_optimizer", lambda *_: pytest.fail("training begins"))
    monkeypatch.setattr("kohya.FLUX_OTHERS", {})  # else there is none in FLUX
    with pytest.raises(
        UserError, match="--output_kohya_format: kohya's format has no name for transformer.x_embedder"
    ):
        result("Flux", *LORA, *KOHYA, "--lora_layers", "x_embedder")


@pytest.mark.slow
def test_there_is_no_kohya_file_of_kolors(result, tmp_path, capsys):
    with pytest.raises(SystemExit):
        result("SD", *LORA, *KOHYA, model=build_tiny_kolors(tmp_path / "kolors"))
    message = "--output_kohya_format is for Stable Diffusion, SDXL and FLUX.1, not for KolorsPipeline: leave it out."
    assert message in capsys.readouterr().err


WITH_ALPHA = ("StableDiffusion3", "Sana", "Flux", "Chroma", "Flux2Klein", "QwenImage", "ZImage", "Lumina2", "AuraFlow")


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_ALPHA)
def test_the_file_says_rank_alpha_and_layers(result, base, family):
    output = result(family, *LORA)
    with safe_open(output / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 8)
    pipe = with_lora(base(family), output)
    layers = tuple(metadata["transformer.target_modules"])
    assert all(name.endswith(layers) for _, name, _ in adapted_modules(pipe))
    assert_adapted(pipe, load_file(output / LORA_FILE))


PLACES = [(family, flags) for family in (*UNETS, "StableDiffusion3", "PixArtSigma") for flags in (LORA, ALL)]


@pytest.mark.parametrize("family, flags", slow_but(PLACES[:1], PLACES))
def test_no_file_says_where_the_base_was(result, base, family, flags):
    flags += (*TEXT, *KOHYA) if family in UNETS and flags == LORA else ()
    output = result(family, *flags, *AVERAGE, "--checkpointing_steps", 2)
    files = [path for path in output.rglob("*") if path.is_file()]
    folder = str(base(family).parent).encode()
    assert len(files) > 5 and not [path for path in files if folder in path.read_bytes()]


# What fails


KEPT = {
    ALL: ["", ".bf16", ".fp16"],
    ("--save_dtype", "bf16", "fp16"): [".bf16", ".fp16"],
    (*AVERAGE, "--save_dtype", "fp32"): ["", ".non_ema"],
    (*AVERAGE, "--save_dtype", "fp16"): [".fp16", ".non_ema"],
}


@pytest.mark.parametrize("words, kept", slow_but([[*KEPT.items()][0], [*KEPT.items()][3]], KEPT.items()))
def test_what_was_trained_is_there_if_the_base_is_not(train, tiny_sd, tmp_path, monkeypatch, words, kept):
    model, output = shutil.copytree(tiny_sd, tmp_path / "model"), tmp_path / "out"
    finish = train_lpl_sd.finish
    monkeypatch.setattr(train_lpl_sd, "finish", lambda *a: shutil.rmtree(model / "vae") or finish(*a))
    with pytest.raises(UserError, match=f"what was trained is saved in {output}/unet, the rest of the pipeline not"):
        train(*FAST, *words, "--checkpointing_steps", 2, model=model, steps=2)
    assert {path.name for path in output.iterdir()} == {"unet", "checkpoint-2", "train_log.jsonl"}
    last = tensors(output / "checkpoint-2" / "unet")
    mean = tensors(output / "checkpoint-2" / "unet_ema") if "--use_ema" in words else last
    assert {path.name for path in output.glob("unet/*.safetensors")} == {
        f"diffusion_pytorch_model{dot}.safetensors" for dot in kept
    }
    for dot in kept:
        precision = words[-1] if dot == ".non_ema" else dot[1:] or "fp32"
        expected = cast(last if dot == ".non_ema" else mean, DTYPES[precision])
        assert same(tensors(output / "unet", dot[1:] or None), expected)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--save_only_trained",)], ids=["pipeline", "trained alone"])
def test_a_disk_too_small_for_all_precisions(result, tiny_sd, photos, tmp_path, more):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("unshare -Urm is not permitted")
    flags = (*ALL, *AVERAGE, *more, "--checkpointing_steps", 2)
    reference, disk = result("SD", *flags), tmp_path / "disk"
    checkpoint = pages(reference / "checkpoint-2")
    size = checkpoint + (pages(reference) - checkpoint) // 2
    words = [sys.executable, ROOT / "train_lpl_sd.py", "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir"]
    words += [photos, "--output_dir", disk / "out", "--report_to", "none", "--resolution", 64, "--train_batch_size", 2]
    words += ["--max_train_steps", 2, "--logging_steps", 1, "--seed", 0, *FAST, *flags, *LATEST]
    codes, said = run_in(disk, size, [str(word) for word in words])
    assert codes == [1, 0] and "Traceback" not in said, said[-3000:]
    assert f"the result can't be written (No space left on device); the checkpoints in {disk}/out are intact" in said
    assert set(tmp_path.joinpath("disk.files").read_text().split()) == {"checkpoint-2", "train_log.jsonl"}
    output = tmp_path / "disk.out"
    for path in (path for path in reference.rglob("*") if path.is_file() and "checkpoint-2" not in path.parts):
        if path.name != "train_log.jsonl":
            assert (output / path.relative_to(reference)).read_bytes() == path.read_bytes()
