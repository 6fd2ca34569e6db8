"""What --dry_run says, against what is counted in real runs, worked out by hand, or allocated on a GPU."""

import contextlib
import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from marks import slow_but
from tiny_models import build_photo_folder, build_tiny_sd, build_tiny_vae
from torch._subclasses.fake_tensor import FakeTensorMode

import train_lpl_sd
from arguments import UserError
from counters import FlopCounter, LiveBytes, count_flops
from dry_run import expected_decoded, gpu_norms, size
from latent_lpips import LatentVGG
from lpl_utils import LatentPerceptualLoss, lpl_term
from train_utils import Log


ROOT = Path(train_lpl_sd.__file__).parent
WIDE_GATE = ("--lpl_weight", 1, "--lpl_sigma_threshold", 80)  # every sample, and nothing to calibrate
SHORT = ("--lpl_num_blocks", 1, "--dry_run")  # where LPL's cost is not the point
EVERYWHERE = ("encoder", "decoder", "text_encoders")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny, but not so tiny that constants outweigh what grows."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"unet_channels": (16, 32)}
    return {
        "SD": build_tiny_sd(folder / "sd", **sizes),
        "SDXL": build_tiny_sd(folder / "sdxl", **sizes, xl=True, scheduler="Euler"),
    }


@pytest.fixture
def run(models, photos, tmp_path):
    """Runs the script in this process and returns what its `main` does: of a dry run, the numbers."""

    def run(*words, model="SD", seed=("--seed", 0)):
        flags = ["--pretrained_model_name_or_path", models.get(model, model), "--train_data_dir", photos]
        flags += ["--output_dir", tmp_path / "out", "--report_to", "none", "--resolution", 64, *seed]
        flags += ["--train_batch_size", 2, "--max_train_steps", 2, "--logging_steps", 1000]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return train_lpl_sd.main(train_lpl_sd.parse_args([str(word) for word in (*flags, *words)]))

    return run


def module_sizes(modules):
    tensors = [t for module in modules if module is not None for t in (*module.parameters(), *module.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture
def count_real_run(run, monkeypatch):
    """Counts a real run: `weights`, `ema`, `frozen` when its loop begins, `peak` bytes with what it makes, `flops`."""

    def count(*words, on_device, **more):
        there, steps, memory, flops = {}, [], LiveBytes(), FlopCounter()
        make_checkpoints, make_objectives = train_lpl_sd.Checkpoints, train_lpl_sd.make_objectives

        def look_at_objectives(*args):
            objectives = make_objectives(*args)
            there["frozen"] = module_sizes(objectives.modules)
            return objectives

        def look(accelerator, args, weights, ema, *more):
            family = weights.family
            vae = family.vae
            parts = {
                "encoder": [vae.encoder, vae.quant_conv],
                "decoder": [vae.decoder, vae.post_quant_conv],
                "text_encoders": family.text_encoders.values(),
            }
            there["weights"] = module_sizes([family.denoiser, *itertools.chain(*(parts[name] for name in on_device))])
            there["ema"] = sum(p.numel() * p.element_size() for p in ema.shadow_params) if ema is not None else 0
            return make_checkpoints(accelerator, args, weights, ema, *more)

        class CountingLog(Log):
            def __init__(self, *args):
                super().__init__(*args)
                gc.collect()
                self.counting = contextlib.ExitStack()
                self.counting.enter_context(memory)
                self.counting.enter_context(flops)

            def step(self, step, *args):
                steps.append((memory.peak, flops.total))
                if step == self.args.max_train_steps:
                    self.counting.close()
                super().step(step, *args)

        monkeypatch.setattr(train_lpl_sd, "make_objectives", look_at_objectives)
        monkeypatch.setattr(train_lpl_sd, "Checkpoints", look)
        monkeypatch.setattr(train_lpl_sd, "Log", CountingLog)
        with gpu_norms():
            run(*words, **more)
        # The first step takes no gradients for the log, the last one does; the optimizer's state is there by then.
        return {**there, "peak": sum(there.values()) + steps[-1][0], "flops": steps[0][1]}

    return count


# Against real runs

RUNS = {
    "SD, average, batch 3, whole graph": (
        "SD",
        ("--use_ema", "--train_batch_size", 3, "--lpl_chunk_size", 0),
        EVERYWHERE,
    ),
    "SD LoRA, bf16, checkpointing": (
        "SD",
        ("--use_lora", "--rank", 16, "--mixed_precision", "bf16", "--gradient_checkpointing"),
        EVERYWHERE,
    ),
    "SD, one sample decoded, 8 bits": (
        "SD",
        ("--lpl_max_samples", 1, "--use_8bit_adam", "--mixed_precision", "bf16"),
        EVERYWHERE,
    ),
    "SD without LPL, Prodigy": ("SD", ("--lpl_weight", 0, "--optimizer", "prodigy"), ("encoder", "text_encoders")),
    "SD, self-perceptual": (
        "SD",
        ("--lpl_weight", 0, "--self_perceptual_weight", 1, "--sp_layers", "mid", "decoder"),
        ("encoder", "text_encoders"),
    ),
    "SD LoRA, LPL and two others": (
        "SD",
        ("--use_lora", "--rgb_weight", 1, "--self_perceptual_weight", 1, "--lpl_chunk_size", 2),
        EVERYWHERE,
    ),
    "SDXL": ("SDXL", ("--optimizer", "adafactor"), EVERYWHERE),
    "SDXL, accumulation": ("SDXL", ("--gradient_accumulation_steps", 3, "--train_batch_size", 1), EVERYWHERE),
    "SDXL LoRA, caches, channels last": (
        "SDXL",
        ("--use_lora", "--cache_latents", "--center_crop", "--cache_text_embeddings", "--lpl_channels_last"),
        ("decoder",),
    ),
    "SDXL LoRA, text encoders": (
        "SDXL",
        ("--use_lora", "--train_text_encoder", "--gradient_checkpointing"),
        EVERYWHERE,
    ),
}


FAST = ("SD, average, batch 3, whole graph", "SDXL LoRA, caches, channels last")


@pytest.mark.parametrize("name", slow_but(FAST, RUNS))
def test_it_counts_what_a_real_run_does(run, count_real_run, name):
    model, flags, on_device = RUNS[name]
    flags = flags if "--lpl_weight" in flags else (*WIDE_GATE, *flags)
    counted = run(*flags, "--dry_run", model=model)
    real = count_real_run(*flags, model=model, on_device=on_device)
    if "--cache_latents" not in flags:  # a batch of images stays in the CPU's memory
        batch = dict(zip(flags, flags[1:])).get("--train_batch_size", 2)
        real["peak"] -= batch * 3 * 64 * 64 * 4
    print(name, *(f"{key} {counted[key] / real[key] - 1:+.2%}" for key in ("peak", "flops")))
    for part in ("weights", "ema", "frozen"):
        assert counted[part] == real[part]
    assert counted["peak"] == pytest.approx(real["peak"], rel=0.03)  # 0.15 is asked for
    assert counted["flops"] == pytest.approx(real["flops"], rel=0.01)
    assert counted["peak_l2"] <= counted["peak"]
    assert (counted["flops_l2"] < counted["flops"]) == (name != "SD without LPL, Prodigy")


def test_offloaded_average_and_unfused_adamw_count_when_they_are_the_peak(run):
    # Nothing but the weights matters: their gradients, the average's visit and what a step of AdamW needs besides.
    flags = ("--lpl_weight", 0, "--resolution", 8, "--train_batch_size", 1, "--dry_run")
    average = ("--use_ema", "--offload_ema", "--foreach_ema")
    plain, ema, fp16 = (run(*flags, *more) for more in ((), average, ("--mixed_precision", "fp16")))
    weights = 4 * plain["trainable_parameters"]
    assert ema["peak"] - ema["weights"] == 2 * weights + 2 * weights  # Adam's state, the average, its differences
    assert fp16["peak"] - fp16["weights"] == 2 * weights + 2 * weights  # Adam's state, gradients, square roots
    assert plain["peak"] - plain["weights"] < 3.5 * weights


def test_norms_have_the_precision_of_a_gpus_autocast():
    def precisions(device):
        with FakeTensorMode():
            x = torch.empty(2, 8, 4, 4, device=device, dtype=torch.bfloat16)
            weight, kernel = torch.empty(8, device=device), torch.empty(8, 8, 1, 1, device=device)
            enabled = torch.is_autocast_enabled(device)
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                results = {
                    "group_norm": F.group_norm(x, 4, weight, weight),
                    "layer_norm": F.layer_norm(x, (4,)),
                    "silu": F.silu(x),
                    "gelu": F.gelu(x),
                    "conv2d": F.conv2d(x.float(), kernel),
                    "linear": F.linear(x.float(), torch.empty(4, 4, device=device)),
                    "attention": F.scaled_dot_product_attention(x.float(), x.float(), x.float()),
                }
            finally:
                torch.set_autocast_enabled(device, enabled)
        return {name: result.dtype for name, result in results.items()}

    assert precisions("cpu") != precisions("cuda")
    with gpu_norms():
        assert precisions("cpu") == precisions("cuda")


# The share of LPL


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("max_samples", [None, 1, 2, 4, 0.3])
def test_expected_decoded_is_the_mean_over_all_that_can_happen(batch, max_samples):
    share, expected = 0.3, 0
    for passing in itertools.product([True, False], repeat=batch):
        chance = share ** sum(passing) * (1 - share) ** (batch - sum(passing))
        decoded = {None: sum(passing), 0.3: 0.3 * sum(passing)}.get(max_samples)
        expected += chance * (min(sum(passing), max_samples) if decoded is None else decoded)
    assert expected_decoded(batch, share, max_samples) == pytest.approx(expected)


@pytest.mark.parametrize("max_samples", [None, 1, 2, 0.4])
def test_expected_decoded_is_what_is_decoded_on_average(max_samples):
    decoded, batches, share = [], 2000, 0.4
    generator = torch.Generator().manual_seed(0)

    def lpl(z0_hat, z0):
        decoded.append(len(z0))
        return z0_hat.flatten(1).sum(1), {}

    latents = torch.zeros(3, 1, 1, 1)
    for _ in range(batches):
        passes = torch.rand(3, generator=generator) < share
        alpha, sigma = torch.where(passes, 1.0, 0.1), torch.where(passes, 0.1, 1.0)
        inputs = {"z_t": latents, "z0": latents, "alpha": alpha, "sigma": sigma}
        lpl_term(
            lpl, latents, **inputs, prediction_type="epsilon", tau=1, max_samples=max_samples, generator=generator
        )
    decoded = torch.tensor(decoded).double()
    error = 4 * decoded.std() / batches**0.5
    assert decoded.mean().item() == pytest.approx(expected_decoded(3, share, max_samples), abs=error.item())


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shares_and_flops_of_a_narrow_gate(run, models, accumulation):
    flags = ("--lpl_weight", 1, "--lpl_max_samples", 1, "--gradient_accumulation_steps", accumulation, *SHORT)
    flags += ("--timestep_bias_strategy", "later", "--timestep_bias_multiplier", 3, "--timestep_bias_portion", 0.25)
    narrow = run(*flags, "--lpl_sigma_threshold", 24)

    abar = DDPMScheduler.from_pretrained(models["SD"], subfolder="scheduler").alphas_cumprod
    passing = ((1 - abar) / abar).sqrt() <= 24 * 64 / 256
    drawn = torch.cat([torch.ones(750), 3 * torch.ones(250)])
    share = (drawn[passing].sum() / drawn.sum()).item()
    assert 750 < passing.sum() < 1000 and share < passing.float().mean()
    assert narrow["lpl_samples"] == pytest.approx(share)
    assert narrow["lpl_steps"] == pytest.approx(1 - (1 - share) ** (2 * accumulation))

    # Of each batch of 2, one sample is decoded if one passes.
    wide = run(*flags, "--lpl_sigma_threshold", 80)
    assert wide["lpl_samples"] == pytest.approx(1) and wide["lpl_steps"] == pytest.approx(1)
    assert narrow["peak"] == wide["peak"] and narrow["flops_l2"] == wide["flops_l2"]
    of_lpl = (1 - (1 - share) ** 2) * (wide["flops"] - wide["flops_l2"])
    assert narrow["flops"] == pytest.approx(narrow["flops_l2"] + of_lpl)


def test_zero_terminal_snr_and_a_gate_that_next_to_nothing_passes(run, capsys):
    flags = ("--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--train_batch_size", 1, *SHORT)
    flags += ("--timestep_bias_strategy", "range", "--timestep_bias_begin", 999, "--timestep_bias_multiplier", 1e9)
    closed = run(*flags, "--lpl_sigma_threshold", 0.13)  # the first of the timesteps passes, and the last is drawn
    assert 0 < closed["lpl_samples"] < 1e-8 and closed["flops"] == pytest.approx(closed["flops_l2"])
    assert closed["peak"] > closed["peak_l2"], "the peak is that of a step whose samples all pass"
    assert "LPL sees 0.0% of the samples" in capsys.readouterr().out


# The other terms


def frozen(module):
    return module.requires_grad_(False).eval()


def features_by_hand(name, model):
    """The features that a term compares, a function of latents, and the bytes of a copy of its network, if any."""
    if name == "rgb":
        vae = frozen(AutoencoderKL.from_pretrained(model, subfolder="vae"))
        return lambda latents: [vae.decode(latents, return_dict=False)[0]], 0
    if name == "e_latent_lpips":
        # VGG-16: of each convolution kernel and bias, four numbers for each channel in batch norm, and a count.
        widths = (4, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
        pairs = list(itertools.pairwise(widths))
        size = 4 * sum((9 * first + 5) * second for first, second in pairs) + 8 * len(pairs)
        size += 4 * (64 + 128 + 256 + 512 + 512)  # the weights of the comparison
        return frozen(LatentVGG(4)).features, size
    unet = frozen(UNet2DConditionModel.from_pretrained(model, subfolder="unet"))
    size = sum(4 * p.numel() for part, p in unet.named_parameters() if not part.startswith("up_blocks."))
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = torch.nn.ModuleList(), None, torch.nn.Identity()
    text = torch.zeros(2, 77, unet.config.cross_attention_dim)
    return lambda latents: unet(latents, torch.tensor([5, 5]), text, return_dict=False), size


@pytest.mark.parametrize(
    "name, words",
    [("rgb", ()), ("e_latent_lpips", ()), ("self_perceptual", ()), ("self_perceptual", ("--use_lora",))],
)
def test_other_terms_cost_what_their_network_does(run, models, name, words):
    features, network = features_by_hand(name, models["SD"])
    true, predicted = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8, requires_grad=True)

    def compare():
        with torch.no_grad():
            features(true)
        torch.autograd.grad(sum(phi.sum() for phi in features(predicted)), predicted)

    flags = ("--lpl_weight", 0, f"--{name}_weight", 1, "--gradient_accumulation_steps", 3, *words, "--dry_run")
    numbers = run(*flags)
    (of_term,) = numbers["flops_of"].values()
    assert of_term == 3 * count_flops(compare) and numbers["flops"] == numbers["flops_l2"] + of_term
    assert numbers["frozen"] == (0 if words else network)
    assert numbers["peak"] > numbers["peak_l2"] + numbers["frozen"]


def test_a_gate_leaves_of_a_terms_work_the_share_that_passes(run, models):
    abar = DDPMScheduler.from_pretrained(models["SD"], subfolder="scheduler").alphas_cumprod
    share = (((1 - abar) / abar).sqrt() <= 24 * 64 / 256).float().mean().item()
    flags = ("--lpl_weight", 0, "--rgb_weight", 1, "--self_perceptual_weight", 1, "--dry_run")
    everything = run(*flags)
    gated = run(*flags, "--gate_objectives", "self_perceptual", "--lpl_sigma_threshold", 24)
    name, other = "Self-perceptual loss", "RGB loss"
    assert gated["flops_of"][name] == pytest.approx(share * everything["flops_of"][name]) and 0.7 < share < 0.95
    assert gated["flops_of"][other] == everything["flops_of"][other]
    assert (gated["frozen"], gated["peak"]) == (everything["frozen"], everything["peak"])
    assert gated["lpl_samples"] == gated["lpl_steps"] == 0


def test_the_terms_add_up_and_are_listed(run, capsys):
    flags = ("--rgb_weight", "auto:0.3", "--self_perceptual_weight", "variance:0.1", "--sp_layers", "mid", "up1")
    flags += ("--sp_distance", "l1", "--gate_objectives", "rgb")
    alone, both = run(*SHORT, "--lpl_weight", 1), run(*SHORT, *flags)
    out = capsys.readouterr().out.split("Settings\n")[-1]
    assert list(both["flops_of"]) == ["LPL", "Self-perceptual loss", "RGB loss"]
    assert both["flops_of"]["LPL"] == alone["flops_of"]["LPL"]
    assert both["flops"] == pytest.approx(alone["flops"] + sum(list(both["flops_of"].values())[1:]), rel=1e-12)
    assert alone["frozen"] == 0 < both["frozen"] < both["peak"] - alone["peak"]

    given, defaults = out.split("Settings by default")
    for line in ("--rgb_weight auto:0.3", "--self_perceptual_weight variance:0.1", "--gate_objectives rgb"):
        assert f"  {line}\n" in given
    assert "  --sp_layers mid up1\n" in given and "  --sp_distance l1\n" in given
    assert "  --l2_weight 1.0\n" in defaults and "late_reweight" not in out
    rows = dict(re.findall(r"^  +(frozen networks|of it due to [\w -]+?|peak) +([\d.]+ \w+)", defaults, re.MULTILINE))
    assert rows["frozen networks"] == size(both["frozen"], "B", 1024)
    assert rows["peak"] == size(both["peak"], "B", 1024)
    assert rows["of it due to all but l2"] == size(both["peak"] - both["peak_l2"], "B", 1024)
    for name, flops in both["flops_of"].items():
        assert rows[f"of it due to {name}"] == size(flops, "FLOP", 1000)


def test_late_reweighting_takes_lpl_without_its_gradient(run, models):
    lpl = LatentPerceptualLoss(AutoencoderKL.from_pretrained(models["SD"], subfolder="vae"), num_blocks=1)
    with torch.no_grad():
        forward = count_flops(lambda: lpl.features(torch.zeros(2, 4, 8, 8)))
    assert run(*WIDE_GATE, *SHORT, "--late_reweight")["flops_of"]["LPL"] == pytest.approx(2 * forward)


# What it needs and leaves


@pytest.mark.parametrize("model", slow_but(["SD"], ["SD", "SDXL"]))
def test_it_needs_no_weights_and_writes_nothing(run, models, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(models[model], tmp_path / "copy")
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    flags = ("--use_lora", "--cache_latents", "--center_crop", "--use_ema", "--report_to", "tensorboard", *SHORT)
    before = sorted(tmp_path.rglob("*"))
    without = run(*flags, model=copy)
    assert sorted(tmp_path.rglob("*")) == before
    assert without == {**run(*flags, model=model), "blocks": []}


@pytest.mark.parametrize(
    "flags", [("--lpl_weight", 0, "--dry_run"), pytest.param(SHORT, marks=pytest.mark.slow)], ids=["l2", "LPL"]
)
def test_fp16_costs_what_bf16_does_if_the_vae_does(run, flags):
    # But for AdamW: of all the weights, unfused, it would take more. By default, the VAE of fp16 is in float32.
    def count(precision, vae="auto"):
        return run("--use_lora", "--mixed_precision", precision, "--vae_dtype", vae, *flags)

    fp16, bf16 = count("fp16"), count("bf16")
    assert bf16 == count("fp16", "bf16")
    assert fp16 == count("bf16", "fp32")
    assert fp16["weights"] > bf16["weights"]


def test_it_needs_no_seed(run, capsys):
    flags = ("--lpl_weight", 0, "--dry_run")
    without = run(*flags, seed=())
    assert "--seed" not in capsys.readouterr().out, "every run draws its own"
    assert without == run(*flags)


def test_processes_change_only_the_share_of_steps_and_add_buckets(run, monkeypatch):
    one = run(*SHORT)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    four = run(*SHORT)
    changed = {name for name in one if one[name] != four[name]}
    assert changed == {"buckets", "peak", "peak_l2", "lpl_steps"}
    assert four["buckets"] == four["peak"] - one["peak"] == 4 * one["trainable_parameters"]
    assert four["lpl_steps"] == pytest.approx(1 - (1 - one["lpl_samples"]) ** (2 * 4))


@pytest.mark.slow
def test_launched_for_two_processes_it_reports_once(models, photos, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    command += [ROOT / "train_lpl_sd.py", "--pretrained_model_name_or_path", models["SD"], "--train_data_dir", photos]
    command += ["--output_dir", tmp_path / "out", "--resolution", 64, "--train_batch_size", 1, *SHORT]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("Nothing was trained or written.") == 1
    assert "buckets" in result.stdout and not (tmp_path / "out").exists()


# The report


def test_every_setting_is_printed_once_as_it_was_resolved(run, capsys):
    flags = ("--use_ema", "--push_to_hub", "--hub_token", "hf_secret", "--no-lpl_outlier_mask", "--lpl_start_step", 1)
    run(*flags, "--validation_prompts", "a fox", "a boat", "--mixed_precision", "bf16", *SHORT)
    captured = capsys.readouterr()
    assert "hf_secret" not in captured.out + captured.err
    given, defaults = captured.out.split("Settings by default")
    names = re.findall(r"^  --(\w+) ", captured.out, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    for line in ("--seed 0", "--use_ema True", "--lpl_outlier_mask False", "--validation_prompts a fox a boat"):
        assert f"  {line}\n" in given
    for line in ("--prediction_type epsilon", "--vae_dtype bf16", "--ema_decay 0.99975", "--learning_rate 0.0001"):
        assert f"  {line}\n" in defaults
    assert "LPL sees 27.1% of the samples (sigma/alpha at most 0.75), in 46.9% of the steps from step 1 on" in defaults


def test_numbers_are_printed_in_units_that_suit_them(run, capsys):
    numbers = run("--use_lora", "--lpl_weight", 0, "--dry_run")
    out = capsys.readouterr().out
    assert f"Trained: {numbers['trainable_parameters']:,} parameters in float32" in out
    assert re.search(rf"^  peak +{numbers['peak'] / 2**20:.2f} MiB", out, flags=re.MULTILINE)
    assert re.search(rf"^  total +{numbers['flops'] / 1e6:.2f} MFLOP", out, flags=re.MULTILINE)
    assert " 0.00 " not in out
    rows = dict(re.findall(r"^  (weights|optimizer's state|the rest at the peak|peak) +([\d.]+ \w?i?B)", out, re.M))
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20}
    rows = {name: float(text.split()[0]) * units[text.split()[1]] for name, text in rows.items()}
    assert rows.pop("peak") == pytest.approx(sum(rows.values()), rel=0.01)


def test_units():
    sizes = (0, 1023, 1024, 1.5 * 2**20, 24 * 2**30, 3000 * 2**40)
    assert [size(n, "B", 1024) for n in sizes] == [
        "0.00 B", "1023.00 B", "1.00 KiB", "1.50 MiB", "24.00 GiB", "3000.00 TiB"
    ]  # fmt: skip
    assert [size(n, "FLOP", 1000) for n in (999, 2e12)] == ["999.00 FLOP", "2.00 TFLOP"]


def test_mistakes_are_one_sentence(run, capsys):
    with pytest.raises(UserError, match="--lora_layers nowhere") as error:
        run("--dry_run", "--use_lora", "--lora_layers", "nowhere")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        run("--dry_run", "--lpl_num_blocks", 9)
    assert "--lpl_num_blocks 9: the VAE's decoder has 4 up blocks" in capsys.readouterr().err


# Against the allocator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision", "bf16"),
        ("--mixed_precision", "bf16", "--use_lora", "--gradient_checkpointing"),
        ("--mixed_precision", "fp16", "--use_ema"),
        ("--lpl_weight", "0"),
    ],
    ids=" ".join,
)
def test_the_peak_is_what_a_gpu_allocates(run, monkeypatch, tmp_path, flags):
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    model = build_tiny_sd(tmp_path / "model", unet_channels=(320, 640), vae=build_tiny_vae(**widths))
    photos = build_photo_folder(tmp_path / "photos", n=4, size=512)
    flags = ("--train_data_dir", photos, "--resolution", 512, "--train_batch_size", 4, *flags)
    flags = flags if "--lpl_weight" in flags else (*flags, "--lpl_weight", 1, "--lpl_sigma_threshold", 10)
    counted = run(*flags, "--dry_run", model=model)

    class ResettingLog(Log):
        def __init__(self, *args):
            super().__init__(*args)
            torch.cuda.reset_peak_memory_stats()

        def step(self, step, *args):
            if step == self.args.max_train_steps:
                peaks.append(torch.cuda.max_memory_allocated() - before)
            super().step(step, *args)

    gc.collect()
    peaks, before = [], torch.cuda.memory_allocated()
    monkeypatch.setattr(train_lpl_sd, "Log", ResettingLog)
    run(*flags, model=model)
    assert counted["peak"] == pytest.approx(peaks[0], rel=0.15)
