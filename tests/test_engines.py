"""Two CPU processes under DDP, FSDP2 and DeepSpeed ZeRO make the run that one makes with the same global batch."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import read_log, run_script
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from engines import blocks_of, check_engine, collected_errors, ordinary_errors
from family import Family
from model_families import StableDiffusion
from noise import stratified_quantiles
from train_utils import make_accelerator, sample_generators


ROOT = Path(train_lpl_sd.__file__).parent
CONFIGS = {"DDP": "ddp", "FSDP2": "fsdp2_full", "ZeRO-2": "zero2", "ZeRO-3": "zero3_offload"}
SHARDED = ("FSDP2", "ZeRO-2", "ZeRO-3")
GATE, TAU = ("--lpl_sigma_threshold", 3), 0.75  # at 64 pixels; most samples do not pass
DRAW = ("--validation_steps", 4, "--validation_inference_steps", 3)


class Kind(NamedTuple):
    """A run: on two processes with `batch` samples each, and on one with `alone` of the flags."""

    model: str
    flags: tuple
    batch: int = 2
    alone: tuple = ("--train_batch_size", 4)
    precision: tuple = ("--mixed_precision", "no")  # for the launcher


KINDS = {
    "all weights": Kind(
        "sd",
        (
            *("--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1, *GATE),
            *("--use_ema", "--ema_decay", 0.9, "--checkpointing_steps", 2),
            *("--validation_prompts", "a fox", "--num_validation_images", 3, *DRAW),  # nothing is left for one of two
        ),
    ),
    "LoRA": Kind(
        "sd",
        (
            *("--use_lora", "--rank", 2, "--lora_alpha", 8, "--learning_rate", 0.01, "--gradient_checkpointing"),
            *("--use_ema", "--ema_decay", 0.9, "--checkpointing_steps", 2),
            *("--validation_prompts", "a fox", "--num_validation_images", 1, *DRAW),
        ),
    ),
    "transformer": Kind(
        "StableDiffusion3",
        (
            *("--learning_rate", 1e-3, "--stratified_timesteps", "--gradient_checkpointing", "--max_grad_norm", 0.1),
            *("--lpl_weight", 0.3, "--lpl_sigma_threshold", 9, "--gradient_accumulation_steps", 2),
            *("--use_ema", "--ema_decay", 0.9),
        ),
        batch=1,
        alone=("--train_batch_size", 1, "--gradient_accumulation_steps", 4),
    ),
    "bf16": Kind(
        "sd", ("--learning_rate", 1e-3, "--lpl_sigma_threshold", 80, "--use_ema", "--ema_decay", 0.9), precision=()
    ),
    "bf16 LoRA": Kind(
        "Flux",
        ("--use_lora", "--rank", 2, "--lora_alpha", 8, "--learning_rate", 0.01, "--lpl_sigma_threshold", 80),
        precision=(),
    ),
}


@pytest.fixture(scope="module")
def models(tiny_sd, tiny_pipeline):
    """Kind of run -> script and folder of the model."""

    def find(kind):
        name = KINDS[kind].model
        return (train_lpl_sd, tiny_sd) if name == "sd" else (train_lpl_dit, tiny_pipeline(name))

    return find


@pytest.fixture(scope="module")
def launch(models, photos, tmp_path_factory):
    """Starts a kind of run under an engine; returns the finished process, its `output` and all that was said."""

    def run(engine, kind, *words, output=None, processes=2):
        if engine.startswith("ZeRO"):
            pytest.importorskip("deepspeed")
        folder = tmp_path_factory.mktemp("run")
        output = output or folder / "out"
        script, model = models(kind)
        config = CONFIGS[engine]
        if engine == "FSDP2" and "LoRA" in kind:
            config = "fsdp2_lora"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
        command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", *KINDS[kind].precision]
        command += ["--main_process_port", 0, "--gradient_accumulation_steps", 3]  # which the script's flag overrides
        command += [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "FSDP2" else []
        command += [script.__file__, "--pretrained_model_name_or_path", model, "--train_data_dir", photos]
        command += ["--output_dir", output, "--report_to", "none", "--resolution", 64, "--max_train_steps", 4]
        command += ["--train_batch_size", KINDS[kind].batch, "--logging_steps", 1, "--seed", 0]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {"DDP": {"ACCELERATE_USE_CPU": "true"}, "FSDP2": {}}.get(engine, {"DS_ACCELERATOR": "cpu"})
        words = [str(word) for word in (*command, *KINDS[kind].flags, *words)]
        with open(folder / "said", "w+") as said:
            process = subprocess.Popen(words, env=environment, stdout=said, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                code = "it hangs"
            finally:
                if process.poll() is None:  # on which the launcher ends what it has started
                    process.terminate()
                    process.wait(timeout=60)
            said.seek(0)
            return SimpleNamespace(code=code, output=output, said=said.read())

    return run


@pytest.fixture(scope="module")
def trained(launch):
    """Engine and kind of run -> the finished run; each is made once, also if it fails."""
    once = functools.cache(launch)

    def run(engine, kind):
        done = once(engine, kind)
        assert done.code == 0, done.said[-3000:]
        assert f"{KINDS[kind].batch} samples x 2 processes" in done.said
        return done

    return run


@pytest.fixture(scope="module")
def alone(models, photos, tmp_path_factory):
    """Kind of run -> output folder of one process with the same global batch, which keeps every step's weights."""

    @functools.cache
    def run(kind, *words):
        script, model = models(kind)
        flags = (*KINDS[kind].flags, "--checkpointing_steps", 1, *KINDS[kind].alone, *words)
        flags += () if KINDS[kind].precision else ("--mixed_precision", "bf16")
        return run_script(script, flags, tmp_path_factory.mktemp("alone"), model, ("--train_data_dir", photos), 4)

    return run


def weights(folder):
    """Of a pipeline, of a checkpoint or of LoRA: name -> tensor."""
    names = ("unet", "transformer", ".")
    files = (file for name in names for file in (folder / name).glob("*.safetensors"))
    return load_file(next(files))


def distance(first, second):
    """Between two sets of weights of the same names, in the Euclidean norm."""
    assert first.keys() == second.keys()
    return math.sqrt(sum((first[name].double() - second[name].double()).square().sum().item() for name in first))


def adapter_settings(file):
    """Of an open file with LoRA weights; in no order are the modules, which peft has in a set."""
    settings = json.loads(file.metadata()["lora_adapter_metadata"])
    return {name: sorted(value) if isinstance(value, list) else value for name, value in settings.items()}


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def average(folder, steps, decay):
    """Of one process's weights, by hand: decay min(`decay`, (1 + n) / (10 + n)) at the n-th update after the first."""
    mean, *updates = (weights(folder / f"checkpoint-{step}") for step in range(1, steps + 1))
    for n, update in enumerate(updates, start=1):
        rate = min(decay, (1 + n) / (10 + n))
        mean = {name: rate * value + (1 - rate) * update[name] for name, value in mean.items()}
    return mean


# How noise levels are stratified


def quantiles(step, batch_size, num_groups, seed=0):
    """Of a whole optimizer step: `[num_groups, B]`."""
    groups = (stratified_quantiles(seed, step, batch_size, num_groups, group) for group in range(num_groups))
    return torch.stack(list(groups)).numpy()


@pytest.mark.parametrize("batch_size, num_groups", [(1, 1), (1, 6), (5, 1), (4, 3), (3, 8)])
def test_every_sample_of_a_step_has_a_stratum_to_itself(batch_size, num_groups):
    count = batch_size * num_groups
    for step in range(50):
        found = quantiles(step, batch_size, num_groups)
        assert found.dtype == np.float64 and found.min() >= 0 and found.max() < 1
        assert sorted(np.floor(found * count).ravel()) == list(range(count))
        # Each group has one in each B-th: for every threshold all have as many below it, give or take one.
        assert (np.sort(np.floor(found * batch_size)) == np.arange(batch_size)).all()
        for threshold in np.linspace(0, 1, 30):
            below = (found < threshold).sum(axis=1)
            assert below.max() - below.min() <= 1
            assert abs(below.sum() - threshold * count) <= 1


def test_every_sample_alone_is_uniform_and_independent_of_the_last_step():
    steps = 4000
    found = np.stack([quantiles(step, batch_size=2, num_groups=3) for step in range(steps)]).reshape(steps, 6)
    ranks = (np.arange(steps) + 0.5) / steps
    distances = np.abs(np.sort(found, axis=0) - ranks[:, None]).max(axis=0)  # of Kolmogorov and Smirnov
    assert (distances < 1.95 / math.sqrt(steps)).all()  # of one sequence in a thousand it is more
    correlations = [np.corrcoef(found[:-1, i], found[1:, i])[0, 1] for i in range(6)]
    assert np.abs(correlations).max() < 4 / math.sqrt(steps)


def test_quantiles_are_those_of_seed_and_step():
    first = quantiles(7, batch_size=2, num_groups=2)
    assert (first == quantiles(7, batch_size=2, num_groups=2)).all()
    assert (first != quantiles(8, batch_size=2, num_groups=2)).all()
    assert (first != quantiles(7, batch_size=2, num_groups=2, seed=1)).all()


def test_processes_have_less_unequal_work_and_the_mean_less_variance():
    independent = np.random.default_rng(0).random((500, 8, 4))
    stratified = np.stack([quantiles(step, batch_size=4, num_groups=8) for step in range(500)])

    def unequal(levels):  # how many samples more than the mean the slowest process decodes
        below = (levels < 0.35).sum(axis=2)
        return (below.max(axis=1) - below.mean(axis=1)).mean()

    assert unequal(stratified) < 0.7 and unequal(independent) > 1.2
    assert np.square(stratified).mean((1, 2)).var() < 0.01 * np.square(independent).mean((1, 2)).var()


WEIGHTS = {
    "uniform": torch.full((40,), 1 / 40),
    "rising": torch.arange(40.0) / 780,
    "with gaps": torch.tensor([0, 0, 1, 0, 3, 0, 4, 0.0]) / 8,
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_quantiles_become_timesteps_by_the_inverse_of_the_cumulative_distribution(weights):
    family = SimpleNamespace(timestep_weights=weights, timesteps=torch.arange(len(weights)) * 10)
    given = torch.cat([torch.tensor([0.0]), torch.rand(5000, generator=torch.Generator().manual_seed(0))]).double()
    found = Family.sample_timesteps(family, sample_generators(0, range(len(given)), 0), given).numpy()
    cumulative = np.cumsum(weights.numpy(), dtype=np.float64)
    assert (found == 10 * (cumulative > given.numpy()[:, None]).argmax(axis=1)).all()  # the first that exceeds it
    shares = np.bincount(found // 10, minlength=len(weights)) / len(found)
    assert np.abs(shares - weights.numpy()).max() < 0.02 and not shares[weights == 0].any()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_given_quantiles_change_no_other_randomness(weights):
    family = SimpleNamespace(timestep_weights=weights, timesteps=torch.arange(len(weights)))
    plain, given = sample_generators(0, range(6), 0), sample_generators(0, range(6), 0)
    drawn = Family.sample_timesteps(family, plain)
    stratified = Family.sample_timesteps(family, given, torch.tensor([0.99, 0.01, 0.5]).double())
    assert not torch.equal(stratified[:3], drawn[:3])
    assert torch.equal(stratified[3:], drawn[3:])  # images of the class, for prior preservation
    for first, second in zip(plain, given):
        assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))


def test_training_uses_each_stratum_once_a_step(train, monkeypatch):
    drawn = []
    predict = StableDiffusion.predict
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, *a: drawn.append(a[2].numpy()) or predict(self, *a))
    flags = ("--stratified_timesteps", "--gradient_accumulation_steps", 2, "--lpl_weight", 0)
    train(*flags, "--train_batch_size", 4, steps=3)
    assert [len(timesteps) for timesteps in drawn] == [4] * 6
    for step in range(3):
        assert sorted(np.concatenate(drawn[2 * step : 2 * step + 2]) // 125) == list(range(8))


# What an engine shards one by one, and what it can't do


class Block(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)


@pytest.mark.parametrize("named", [["Block", "Gone"], ["Gone"], [], None])
def test_blocks_are_those_that_diffusers_names_or_those_in_lists(named):
    module = torch.nn.Module()
    module.head = torch.nn.Linear(1, 1)
    module.down, module.up = torch.nn.ModuleList([Block(), Block()]), torch.nn.ModuleList([torch.nn.ReLU()])
    module._no_split_modules = named
    assert blocks_of(module) == (["Block"] if named == ["Block", "Gone"] else ["Block", "ReLU"])


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusion3", "Flux", "DiT"])
def test_blocks_have_most_of_a_model(tiny_sd, tiny_pipeline, family):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd if family == "StableDiffusion" else tiny_pipeline(family))
    model = pipe.components.get("unet") or pipe.transformer
    names = blocks_of(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    inside = {p for block in blocks for p in block.parameters()}
    assert len(blocks) > 1
    assert sum(p.numel() for p in inside) > 0.5 * sum(p.numel() for p in model.parameters())


def stand_in(kind, fsdp2=True, checkpointing=False, stage=2, zero=None, **config):
    plugins = {
        "fsdp_plugin": SimpleNamespace(activation_checkpointing=checkpointing),
        "deepspeed_plugin": SimpleNamespace(
            zero_stage=stage, deepspeed_config={"zero_optimization": zero or {}, **config}
        ),
    }
    state = SimpleNamespace(**plugins)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2, state=state, mixed_precision="no")


def flags(**changes):
    plain = {"use_8bit_adam": False, "optimizer": "adamw", "use_ema": True, "bnb_quantization_config_path": None}
    return SimpleNamespace(**{**plain, "train_text_encoder": False, **changes})


FSDP, ZERO, DDP = DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MULTI_CPU
NVME = {"offload_param": {"device": "none"}, "offload_optimizer": {"device": "nvme"}}
BNB = {"load_in_4bit": True}


@pytest.mark.parametrize(
    "accelerator, args, sentence",
    [
        (stand_in(FSDP, fsdp2=False), flags(), "FSDP1 is not supported: set fsdp_version: 2"),
        (stand_in(FSDP, checkpointing=True), flags(), "fsdp_activation_checkpointing .*--gradient_checkpointing"),
        (stand_in(ZERO, stage=0), flags(), "zero_stage 0 shards nothing"),
        (stand_in(FSDP), flags(use_8bit_adam=True), "--use_8bit_adam needs whole tensors, which FSDP2 shards"),
        (stand_in(ZERO), flags(optimizer="prodigy"), "--optimizer prodigy .* which ZeRO-2 shards.*or DDP"),
        (stand_in(FSDP), flags(optimizer="adafactor"), "--optimizer adafactor"),
        (stand_in(ZERO, stage=3), flags(train_text_encoder=True), "--train_text_encoder does not work with ZeRO-3"),
        (stand_in(FSDP), flags(bnb_quantization_config_path=BNB), "--bnb_quantization_config_path .* FSDP2"),
        (stand_in(ZERO, stage=3, zero=NVME), flags(), "--use_ema does not work with weights on NVMe"),
        (stand_in(ZERO, optimizer={"type": "AdamW"}), flags(), "has its own optimizer: remove it"),
        (stand_in(ZERO, scheduler={"type": "WarmupLR"}), flags(), "has its own scheduler: remove it"),
        (stand_in(ZERO, bf16={"enabled": True}), flags(), "config says bf16, --mixed_precision no: choose one"),
    ],
)
def test_what_an_engine_can_not_do_is_refused(accelerator, args, sentence):
    with pytest.raises(UserError, match=sentence):
        check_engine(accelerator, args)


@pytest.mark.parametrize(
    "accelerator, args",
    [
        (stand_in(FSDP), flags()),
        (stand_in(ZERO), flags()),
        (stand_in(ZERO, stage=3, zero=NVME), flags(use_ema=False)),
        (stand_in(DDP, fsdp2=False), flags(use_8bit_adam=True, train_text_encoder=True)),
        (stand_in(DDP, fsdp2=False), flags(optimizer="prodigy", bnb_quantization_config_path=BNB)),
    ],
)
def test_what_an_engine_can_do_is_not(accelerator, args):
    check_engine(accelerator, args)


def test_the_process_group_has_the_timeout_of_the_flag(monkeypatch, tmp_path):
    handlers = []

    def accelerator(kwargs_handlers, **more):
        handlers.extend(kwargs_handlers)
        raise ValueError("seen")

    monkeypatch.setattr("train_utils.Accelerator", accelerator)
    args = {"dry_run": False, "output_dir": tmp_path, "logging_dir": "logs", "gradient_accumulation_steps": 1}
    args |= {"mixed_precision": None, "report_to": "none", "nccl_timeout": 7}
    with pytest.raises(UserError, match="seen"):
        make_accelerator(SimpleNamespace(**args))
    assert handlers[0].to_kwargs()["timeout"] == timedelta(seconds=7)


def test_errors_of_a_method_come_when_all_is_done():
    def save(name):
        if name == "full":
            raise OSError(28, "No space left on device")
        saved.append(name)

    saved, target = [], SimpleNamespace(save=save)
    with pytest.raises(OSError, match="No space left"):
        with collected_errors(target, "save"):
            target.save("full")
            target.save("other")
    assert saved == ["other"] and target.save is save


def test_what_torch_raises_for_all_processes_can_be_caught():
    failure = (OSError(28, "No space left on device"), None)
    with pytest.raises(OSError, match="No space left"):
        with ordinary_errors():
            raise CheckpointException("save", {1: failure})


# Two processes


EXACT = ("all weights", "LoRA", "transformer")
on_every_engine = pytest.mark.parametrize("engine", CONFIGS)
of_every_kind = pytest.mark.parametrize("kind", EXACT)


@pytest.mark.slow
@of_every_kind
@on_every_engine
def test_every_step_has_the_losses_of_one_process(trained, alone, engine, kind):
    rows, expected = read_log(trained(engine, kind).output), read_log(alone(kind))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-6)  # float32 has 1.2e-7
        assert row["lpl"] == pytest.approx(expected["lpl"], rel=2e-6)


@pytest.mark.slow
@of_every_kind
@on_every_engine
def test_the_result_is_the_average_that_one_process_makes(trained, alone, engine, kind):
    folder = alone(kind)
    expected = average(folder, steps=4, decay=0.9)
    first, last = (weights(folder / f"checkpoint-{step}") for step in (1, 4))
    moved = distance(first, last)
    found = weights(trained(engine, kind).output)
    assert distance(expected, last) > 0.05 * moved
    assert distance(found, expected) < 5e-5 * moved
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--max_grad_norm", 100), ("--gradient_accumulation_steps", 3)])
def test_without_clipping_or_with_the_launcher_s_accumulation_it_would_be_another(alone, words):
    folder, other = alone("transformer"), alone("transformer", *words)
    first, result = weights(folder / "checkpoint-1"), weights(folder)
    assert distance(weights(other), result) > 0.01 * distance(first, result)


@pytest.mark.slow
@on_every_engine
def test_the_rate_is_the_schedule_s_to_the_last_step(trained, engine):
    rates = [row["lr"] / 1e-3 for row in read_log(trained(engine, "all weights").output)]
    # After n steps: up in one, then half a cosine down to 0 at the fourth.
    assert rates == pytest.approx([1, *(0.5 + 0.5 * math.cos(math.pi * n / 3) for n in (1, 2, 3))])


@pytest.mark.slow
@on_every_engine
def test_checkpoints_say_which_engine_made_them_and_what_was_measured(trained, alone, engine):
    (state, expected) = (
        json.loads((folder / "checkpoint-4" / "training_state.json").read_text())
        for folder in (trained(engine, "all weights").output, alone("all weights"))
    )
    assert state["settings"]["engine"] == (None if engine == "DDP" else engine)
    assert state["settings"]["num_processes"] == 2 and expected["settings"]["num_processes"] == 1
    assert state["step"] == 4 and state["position"] == expected["position"] == 16
    assert state["lpl"]["weight"] == pytest.approx(expected["lpl"]["weight"], rel=2e-6)


@pytest.mark.slow
def test_often_one_process_alone_has_samples_for_lpl(tiny_sd, alone):
    abar = DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler").alphas_cumprod
    draws = [torch.randint(0, 1000, (1,), generator=generator) for generator in sample_generators(0, range(16), 0)]
    passes = (1 / abar - 1).sqrt()[torch.cat(draws)] <= TAU
    by_process = passes.view(4, 2, 2).sum(dim=2)  # step, process
    assert ((by_process == 0).any(dim=1) & (by_process > 0).any(dim=1)).sum() >= 2
    assert [row["lpl"] > 0 for row in read_log(alone("all weights"))] == passes.view(4, 4).any(dim=1).tolist()


@pytest.mark.slow
@on_every_engine
def test_most_forward_passes_of_the_transformer_have_no_sample_for_lpl(trained, engine):
    done = trained(engine, "transformer")
    share = float(re.search(r"LPL applies to ([\d.]+)%", done.said)[1])
    assert 25 < share < 45  # so that of a step's four strata the first passes, and at most one more
    assert all(row["lpl"] > 0 for row in read_log(done.output))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all weights", "LoRA"])
@on_every_engine
def test_drawings_are_those_of_one_process_and_of_the_stock_pipeline(trained, alone, tiny_sd, engine, kind):
    output, samples = trained(engine, kind).output, alone(kind) / "samples"
    in_training, final = (pixels(output / "samples" / name) for name in ("step-000004.png", "final.png"))
    assert in_training.shape == (64, 64 * (3 if kind == "all weights" else 1), 3)
    assert np.abs(in_training - pixels(samples / "step-000004.png")).max() <= 2
    assert np.abs(in_training - final).max() <= 2
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd if kind == "LoRA" else output)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    if kind == "LoRA":
        pipe.load_lora_weights(output)
    (drawn,) = pipe("a fox", **settings).images
    assert np.abs(np.asarray(drawn, dtype=int) - final[:, :64]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "bf16 LoRA"])
@on_every_engine
def test_lora_files_have_the_names_and_settings_of_one_process(trained, alone, engine, kind):
    files = (folder / "pytorch_lora_weights.safetensors" for folder in (trained(engine, kind).output, alone(kind)))
    found, expected = (safe_open(file, "pt") for file in files)
    assert set(found.keys()) == set(expected.keys()) and len(found.keys()) >= 16
    part = "transformer" if kind == "bf16 LoRA" else "unet"
    assert adapter_settings(found) == adapter_settings(expected)
    assert adapter_settings(found)[f"{part}.r"] == 2 and adapter_settings(found)[f"{part}.lora_alpha"] == 8
    assert all(found.get_tensor(name).dtype == torch.float32 for name in found.keys())
    assert not (trained(engine, kind).output / "unet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "bf16 LoRA"])
@on_every_engine
def test_bf16_trains_like_bf16_in_one_process(trained, alone, engine, kind):
    done, folder = trained(engine, kind), alone(kind)
    rows, expected = read_log(done.output), read_log(folder)
    if engine != "ZeRO-3":  # whose linear layers round before they add the bias
        assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    for row, expected in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2**-8)  # to the precision of bf16
        assert row["lpl"] == pytest.approx(expected["lpl"], rel=2**-8)
    found, result, first = (weights(path) for path in (done.output, folder, folder / "checkpoint-1"))
    assert distance(found, result) < 0.2 * distance(first, result)  # Adam makes much of small gradients' rounding
    assert {value.dtype for value in found.values()} == {torch.float32}


# To go on from a checkpoint


def go_on(launch, engine, kind, checkpoint, output, *words, processes=2):
    """The run that resumes from a copy of `checkpoint` in its own folder `output`."""
    shutil.copytree(checkpoint, output / checkpoint.name)
    return launch(engine, kind, "--resume_from_checkpoint", "latest", *words, output=output, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all weights", "LoRA"])
@on_every_engine
def test_a_resumed_run_ends_as_the_uninterrupted_one(trained, alone, launch, tmp_path, engine, kind):
    whole = trained(engine, kind).output
    resumed = go_on(launch, engine, kind, whole / "checkpoint-2", tmp_path)
    assert resumed.code == 0 and "at step 2." in resumed.said, resumed.said[-3000:]
    assert "Unlike the run" not in resumed.said
    found, expected = weights(tmp_path), weights(whole)
    rows, whole_rows = read_log(tmp_path), read_log(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    if engine == "ZeRO-3":  # DeepSpeed's Adam on the CPU gets beta's powers by multiplication, and anew from `pow`
        first = weights(alone(kind) / "checkpoint-1")
        assert distance(found, expected) < 5e-5 * distance(first, expected)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole_rows], rel=2e-6)
    else:
        assert distance(found, expected) == 0
        assert [row["loss"] for row in rows] == [row["loss"] for row in whole_rows]


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_sharded(trained, alone, launch, tmp_path):
    whole = trained("FSDP2", "all weights").output
    flags = ("--train_batch_size", 4)
    resumed = go_on(launch, "FSDP2", "all weights", whole / "checkpoint-2", tmp_path, *flags, processes=1)
    assert resumed.code == 0 and "4 samples x 1 processes" in resumed.said, resumed.said[-3000:]
    assert (
        "Unlike the run to resume: --train_batch_size 4 (was --train_batch_size 2); 1 process (was 2 proc"
        in resumed.said
    )
    first, expected = weights(alone("all weights") / "checkpoint-1"), weights(whole)
    assert distance(weights(tmp_path), expected) < 5e-5 * distance(first, expected)


def refusal(done):
    """The one sentence that a process has ended with."""
    assert done.code != 0
    before, *sentences = re.split(r"^train_lpl_sd\.py: error: ", done.said, flags=re.MULTILINE)
    assert len(sentences) == 1 and "Traceback" not in before, done.said[-3000:]
    return sentences[0].splitlines()[0]


@pytest.mark.slow
def test_zero_needs_as_many_processes_as_before(trained, launch, tmp_path):
    whole = trained("ZeRO-2", "all weights").output
    done = go_on(launch, "ZeRO-2", "all weights", whole / "checkpoint-2", tmp_path, processes=1)
    assert "checkpoint-2: its run can't go on with 1 process (was 2 processes); go on as it was" in refusal(done)


@pytest.mark.slow
def test_fsdp_refuses_whole_weights(trained, launch, tmp_path):
    whole = trained("DDP", "all weights").output
    done = go_on(launch, "FSDP2", "all weights", whole / "checkpoint-2", tmp_path, processes=1)
    assert "checkpoint-2: its run can't go on with FSDP2 (was whole weights); go on as it was" in refusal(done)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_one_process_refuses_what_is_sharded(trained, models, photos, tmp_path, engine):
    folder = trained(engine, "all weights").output / "checkpoint-2"
    script, model = models("all weights")
    words = (*KINDS["all weights"].flags, "--resume_from_checkpoint", folder)
    with pytest.raises(UserError, match=rf"its run can't go on with whole weights \(was {engine}\)"):
        run_script(script, words, tmp_path, model, ("--train_data_dir", photos), 4)
