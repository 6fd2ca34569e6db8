"""What --dry_run says of transformers, against real runs, torch's count of FLOPs, and numbers worked out by hand."""

import contextlib
import gc
import itertools
import json
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState, GradientState
from dry_runs import PIPELINES, ROOT, count, readme_commands, trained_pipeline, write_model
from marks import slow_but
from tiny_models import build_tiny_vae
from tiny_transformers import build_tiny_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import pipeline_class_conditional
import train_lpl_dit
from counters import LiveBytes
from dry_run import gpu_norms
from model_families import FAMILIES
from train_utils import Log


BF16_LORA = ("--use_lora", "--mixed_precision", "bf16")
SHORT = ("--lpl_num_blocks", 1)  # where LPL's cost is not the point
WITHOUT_LPL = ("--lpl_weight", 0, "--dry_run")
TEXT_CACHE = ("--cache_text_embeddings", "--max_sequence_length", 16)
CACHES = ("--cache_latents", "--center_crop", *TEXT_CACHE)
EVERYWHERE = ("encoder", "decoder", "text_encoders")
LABELS = ("DiT", "MM-DiT", "MM-DiT from scratch")
SIZES = {  # so that constants do not outweigh what grows
    "DiT": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16},
    "StableDiffusion3": {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 64},
    "Flux": {"num_single_layers": 3, "num_attention_heads": 4},
    "Sana": {"num_layers": 6, "num_attention_heads": 8, "num_cross_attention_heads": 4, "cross_attention_dim": 64},
}
MMDIT = json.loads((ROOT / "transformer_configs" / "mmdit-tiny.json").read_text()) | {"num_classes": 10}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> the folder of a tiny model: a pipeline, or from scratch a VAE; built once."""
    folder, built = tmp_path_factory.mktemp("models"), {}

    def build(family):
        path = folder / family
        if family == "MM-DiT from scratch":
            build_tiny_vae(kind="AsymmetricAutoencoderKL").save_pretrained(path)
            (path / "mmdit.json").write_text(json.dumps(MMDIT))
        elif family == "MM-DiT":
            mmdit = pipeline_class_conditional
            transformer = mmdit.ClassConditionalSD3Transformer2DModel.from_config(MMDIT)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
            mmdit.ClassConditionalPipeline(transformer, build_tiny_vae(), scheduler).save_pretrained(path)
        else:
            build_tiny_pipeline(path, family, **SIZES.get(family, {}))
        return path

    return lambda family: built.setdefault(family, None) or built.update({family: build(family)}) or built[family]


@pytest.fixture
def run(models, photos, class_folders, tmp_path):
    """Runs the script in this process and returns what its `main` does: of a dry run, the numbers."""

    def run(family, *words, model=None):
        model, data = model or models(family), class_folders if family in LABELS else photos
        flags = ["--pretrained_model_name_or_path", model]
        if family == "MM-DiT from scratch":
            flags = ["--pretrained_vae_model_name_or_path", model, "--transformer_config", model / "mmdit.json"]
        flags += ["--train_data_dir", data, "--output_dir", tmp_path / "out", "--report_to", "none", "--seed", 0]
        flags += ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 2, "--logging_steps", 1000]
        flags += ["--lpl_weight", 1, "--lpl_sigma_threshold", 1e6]  # every sample, and nothing to calibrate
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return train_lpl_dit.main(train_lpl_dit.parse_args([str(word) for word in (*flags, *words)]))

    return run


# Against real runs


def attention_flops(query, key, value, *args, **kwargs):
    """Two products, from the shapes: queries by keys, and what results by values."""
    batch, heads, queries, width = query
    return 2 * 2 * batch * heads * queries * key[2] * width


def attention_backward_flops(grad, *shapes, **kwargs):
    return attention_flops(*shapes) * 5 // 2  # five products: the first again, and four gradients


def convolution_backward_flops(
    grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, **kwargs
):
    """Each gradient takes a product for every position and weight, whatever the groups; torch's formula, of grouped
    ones, as many as without groups."""
    return 2 * grad[0] * grad[2:].numel() * weight.numel() * sum(wanted[:2])


aten = torch.ops.aten
KERNELS = {  # that torch's counter does not know, or counts wrong
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.convolution_backward: convolution_backward_flops,
}


@pytest.fixture
def count_real_run(run, monkeypatch):
    """Counts a real run: `weights` and `ema` when its loop begins, `peak` bytes with what the loop makes, `flops`."""

    def count(family, *words, on_device):
        there, memory = {}, LiveBytes()
        flops = FlopCounterMode(display=False, custom_mapping=KERNELS)
        make_checkpoints = train_lpl_dit.Checkpoints

        def look(accelerator, args, weights, ema, *more):
            family = weights.family
            modules = [family.denoiser, *itertools.chain(*(family.modules(part) for part in on_device))]
            tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
            there["weights"] = sum(t.numel() * t.element_size() for t in tensors)
            there["ema"] = sum(p.numel() * p.element_size() for p in ema.shadow_params) if ema is not None else 0
            return make_checkpoints(accelerator, args, weights, ema, *more)

        class CountingLog(Log):
            """FLOPs of the first step, which takes no gradients for the log; the peak of the second, which does, and
            for which the optimizer's state is there."""

            def __init__(self, *args):
                super().__init__(*args)
                self.counting = contextlib.ExitStack()
                self.counting.enter_context(flops)
                self.counting.enter_context(memory)  # last, as the other takes operations apart

            def step(self, step, *args):
                self.counting.close()
                if step == 1:
                    there["flops"] = flops.get_total_flops()
                    gc.collect()  # what the counter of FLOPs kept alive
                    memory.peak = memory.live
                    self.counting.enter_context(memory)
                super().step(step, *args)

        monkeypatch.setattr(train_lpl_dit, "Checkpoints", look)
        monkeypatch.setattr(train_lpl_dit, "Log", CountingLog)
        with gpu_norms():
            run(family, *words)
        return {**there, "peak": there["weights"] + there["ema"] + memory.peak}

    return count


RUNS = {
    "SD3 LoRA": ("StableDiffusion3", (*BF16_LORA, "--max_sequence_length", 16, "--lpl_num_blocks", 2), EVERYWHERE),
    "Flux LoRA, checkpointing": ("Flux", (*BF16_LORA, *CACHES, *SHORT, "--gradient_checkpointing"), ("decoder",)),
    "Sana, all weights": ("Sana", (*TEXT_CACHE, "--lpl_num_blocks", 2), ("encoder", "decoder")),
    "DiT, all weights": ("DiT", ("--use_ema", "--train_batch_size", 3), EVERYWHERE),
    "MM-DiT": ("MM-DiT from scratch", ("--use_ema", *SHORT), EVERYWHERE),
    "FLUX.2 klein LoRA": ("Flux2Klein", (*BF16_LORA, *CACHES, *SHORT, "--gradient_checkpointing"), ("decoder",)),
    "Qwen-Image, all weights": ("QwenImage", ("--lpl_num_blocks", 2), EVERYWHERE),
    "Chroma LoRA": ("Chroma", (*BF16_LORA, *CACHES, *SHORT), ("decoder",)),
    "Z-Image LoRA": ("ZImage", (*BF16_LORA, *CACHES, *SHORT), ("decoder",)),
    "Lumina-Image 2, all weights": ("Lumina2", (*TEXT_CACHE, *SHORT), ("encoder", "decoder")),
    "AuraFlow LoRA": ("AuraFlow", (*BF16_LORA, *SHORT), EVERYWHERE),
    "HunyuanDiT LoRA": ("HunyuanDiT", (*BF16_LORA, *CACHES[:3], *SHORT), ("decoder",)),
}


@pytest.mark.parametrize("name", slow_but(["DiT, all weights", "Z-Image LoRA"], RUNS))
def test_it_counts_what_a_real_run_does(run, count_real_run, name):
    family, flags, on_device = RUNS[name]
    counted = run(family, *flags, "--dry_run")
    real = count_real_run(family, *flags, on_device=on_device)
    if "--cache_latents" not in flags:  # a batch of images stays in the CPU's memory
        batch = dict(zip(flags, flags[1:])).get("--train_batch_size", 2)
        real["peak"] -= batch * 3 * 64 * 64 * 4
    print(name, *(f"{key} {counted[key] / real[key] - 1:+.2%}" for key in ("peak", "flops")))
    assert (counted["weights"], counted["ema"]) == (real["weights"], real["ema"])
    assert counted["peak"] == pytest.approx(real["peak"], rel=0.05)  # 0.15 is asked for
    assert counted["flops"] == pytest.approx(real["flops"], rel=0.01)
    assert counted["peak_l2"] <= counted["peak"] and counted["flops_l2"] < counted["flops"]


def test_rms_norms_have_the_precision_of_a_gpus_autocast():  # FLUX has torch's, for its queries and keys
    def precision(device):
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            torch.set_autocast_enabled("cuda", True)  # the context manager would look for a GPU
            try:
                x = torch.empty(2, 4, device=device, dtype=torch.bfloat16)
                return F.rms_norm(x, (4,), torch.empty(4, device=device, dtype=torch.bfloat16)).dtype
            finally:
                torch.set_autocast_enabled("cuda", False)

    assert precision("cpu") != precision("cuda")
    with gpu_norms():
        assert precision("cpu") == precision("cuda")


# What it needs and leaves

BARE = ("DiT", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Sana", "Flux", "Chroma", "Flux2Klein", "QwenImage")
BARE += ("ZImage", "Lumina2", "AuraFlow", "HunyuanDiT", "MM-DiT")


def test_every_family_is_here():
    families = {name.removesuffix("Pipeline") for name, family in FAMILIES.items() if family.denoiser_name != "unet"}
    assert set(BARE) - {"MM-DiT"} == families - {"ClassConditional"}


@pytest.fixture
def bare(models, tiny_pipeline, tmp_path):
    """family -> a copy of its model without weights."""

    def copy(family):
        model = models(family) if family == "MM-DiT" else tiny_pipeline(family)
        return shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))

    return copy


@pytest.mark.parametrize("family", slow_but(["DiT", "Flux"], BARE))
def test_configs_are_enough_and_nothing_is_written(run, bare, tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    fixed = {"HunyuanDiT": CACHES[:3]}  # its text embeddings have one length
    model, caches = bare(family), CACHES[:2] if family in LABELS else fixed.get(family, CACHES)
    before = sorted(tmp_path.rglob("*"))
    full = run(family, *WITHOUT_LPL, model=model)
    lora = run(family, *SHORT, *caches, *BF16_LORA, "--dry_run", model=model)
    assert sorted(tmp_path.rglob("*")) == before

    unread = 0.15 if family == "QwenImage" else 0.02  # of two blocks, the last one's text is
    assert (1 - unread) * full["parameters"] < full["trainable_parameters"] <= full["parameters"]
    state = 3 * 4 * full["trainable_parameters"]  # two moments and the gradients, in float32
    assert full["peak"] >= full["weights"] + state
    assert full["flops"] > lora["flops_l2"] and lora["flops"] > lora["flops_l2"] > 0
    assert 0 < lora["trainable_parameters"] < 0.2 * lora["parameters"]
    assert lora["weights"] < full["weights"] and lora["peak"] < full["peak"]


@pytest.mark.parametrize(
    ("family", "norm_type", "flags"),
    [("DiT", "ada_norm_zero", ("--use_lora",)), ("PixArtSigma", "ada_norm_single", ("--mixed_precision", "bf16"))],
)
def test_repositories_from_before_these_transformers_had_names(run, bare, tiny_pipeline, family, norm_type, flags):
    old = bare(family)
    for file, changes in (
        (old / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (old / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "norm_type": norm_type}),
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    counted, with_weights = (run(family, *flags, *WITHOUT_LPL, model=m) for m in (old, tiny_pipeline(family)))
    assert counted == with_weights


def test_what_visits_the_device_counts_while_it_is_there(run):
    # The peak is in Gemma, whose prompt is long: it is there then with --offload, too, only the VAE's encoder is not.
    here, away = (run("Sana", *WITHOUT_LPL, *more) for more in ((), ("--offload",)))
    encoder = module_bytes(build_tiny_vae(kind="AutoencoderDC", scaling_factor=0.41407).encoder)
    assert here["peak"] - away["peak"] == encoder
    assert here["weights"] - away["weights"] > encoder


def module_bytes(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


# The models of the README


def test_full_size_models_have_their_published_numbers_of_parameters():
    millions = {}
    models = {**PIPELINES, "mmdit": trained_pipeline(ROOT / "transformer_configs" / "mmdit-28x896.json")}
    with torch.device("meta"):
        for name, pipeline in models.items():
            for part, entry in pipeline.items():
                if part.startswith("text_encoder"):
                    model_class = getattr(transformers, entry[0])
                    model = model_class(model_class.config_class(**entry[1]))
                elif part in ("unet", "transformer", "vae"):
                    library = diffusers if hasattr(diffusers, entry[0]) else pipeline_class_conditional
                    model = getattr(library, entry[0]).from_config(dict(entry[1]))
                else:
                    continue
                millions[name.split("/")[-1], part] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    for name, part, published in (
        ("stable-diffusion-v1-5", "unet", 859.5),
        ("stable-diffusion-v1-5", "text_encoder", 123.1),
        ("stable-diffusion-2-1", "unet", 865.9),
        ("stable-diffusion-2-1", "text_encoder", 340.4),
        ("stable-diffusion-xl-base-1.0", "unet", 2567.5),
        ("stable-diffusion-xl-base-1.0", "text_encoder_2", 694.7),
        ("stable-diffusion-xl-base-1.0", "vae", 83.7),
        ("stable-diffusion-3.5-medium", "transformer", 2243.2),  # 2469.7 with the positions, which are not trained
        ("stable-diffusion-3.5-medium", "text_encoder_3", 4762.3),
        ("FLUX.1-dev", "transformer", 11901.4),
        ("Sana_1600M_1024px_diffusers", "transformer", 1604.5),
        ("Sana_1600M_1024px_diffusers", "text_encoder", 2614.3),
        ("Sana_1600M_1024px_diffusers", "vae", 312.3),
        ("PixArt-Sigma-XL-2-1024-MS", "transformer", 610.9),
        ("DiT-XL-2-256", "transformer", 749.8),  # 675.1 in the paper's code, where the blocks share their embedders
        ("mmdit", "transformer", 805.5),
        ("mmdit", "vae", 194.3),
    ):
        assert millions[name, part] == published, (name, part)


def test_commands_of_both_scripts_are_read_from_the_readme(monkeypatch, tmp_path):
    readme = """## On a GPU
### Old
```bash
accelerate launch --mixed_precision bf16 train_lpl_sd.py \\
  --pretrained_model_name_or_path some/model --output_dir a
```
### New
```bash
accelerate launch --mixed_precision bf16 train_lpl_dit.py --transformer_config transformer_configs/mmdit-tiny.json \\
  --pretrained_vae_model_name_or_path some/vae --prediction_type sample --validation_prompts fox --output_dir first
accelerate launch --mixed_precision bf16 train_lpl_dit.py --pretrained_model_name_or_path first --resolution 512
```
"""
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "transformer_configs").mkdir()
    monkeypatch.setattr("dry_runs.ROOT", tmp_path)
    commands, config = readme_commands(), str(tmp_path / "transformer_configs" / "mmdit-tiny.json")
    assert {title: model for title, (model, _) in commands.items()} == {
        "Old": "some/model",
        "New": "some/vae",
        "New (2)": (config, "sample"),
    }
    flags = commands["New"][1]
    assert flags[:4] == ["--mixed_precision", "bf16", "--transformer_config", config]
    assert flags[-4:] == ["--validation_prompts", "0", "--output_dir", "first"]


@pytest.mark.slow
@pytest.mark.parametrize(("quantized", "gib"), [((), 33), (("--bnb_quantization_config_path", "nf4.json"), 18)])
def test_flux_lora_at_1024_fits_24_gb_in_4_bits_only(photos, tmp_path, quantized, gib):
    flags = ("--mixed_precision", "bf16", "--use_lora", "--rank", 16, "--cache_latents", "--center_crop")
    flags += ("--cache_text_embeddings", "--gradient_checkpointing", "--train_batch_size", 1, "--resolution", 1024)
    n = count(write_model(tmp_path, "black-forest-labs/FLUX.1-dev"), photos, *flags, *quantized)
    assert gib - 3 < n["peak"] / 2**30 < gib
