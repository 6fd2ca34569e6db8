"""The optimizers of the flags: what they keep in memory, that they train and resume, and that their flags arrive."""

import itertools
import math
import shutil

import pytest
import torch
from conftest import read_log
from marks import slow_but
from safetensors.torch import load_file
from tiny_models import build_tiny_sd

import train_lpl_sd
from train_utils import make_optimizer, optimizer_bytes


OPTIMIZERS = {
    "adamw": ("--optimizer", "adamw"),
    "8-bit adamw": ("--use_8bit_adam",),
    "prodigy": ("--optimizer", "prodigy"),
    "adafactor": ("--optimizer", "adafactor"),
}
# Vectors, matrices and kernels, below, at and above the 4096 elements from which 8-bit AdamW quantises.
SHAPES = [(1,), (7,), (5000,), (3, 5), (64, 63), (64, 64), (64, 65), (8, 4, 3, 3), (64, 32, 3, 3), (6, 4, 1, 1)]


class OneProcess:
    num_processes, mixed_precision, device = 1, "no", torch.device("cpu")


@pytest.fixture(scope="module")
def wide_sd(tmp_path_factory):
    """A tiny model some of whose parameters have 4096 elements and more."""
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "wide", unet_channels=(16, 32))


@pytest.fixture
def parse(tiny_sd, photos, tmp_path):
    def parse(*words):
        flags = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos, "--output_dir", tmp_path]
        return train_lpl_sd.parse_args([str(word) for word in (*flags, "--report_to", "none", *words)])

    return parse


def states(optimizer):
    """The tensors that grow with the parameters: not the step counters, nor 8-bit AdamW's two shared tables."""
    kept = (item for state in optimizer.state.values() for item in state.items() if isinstance(item[1], torch.Tensor))
    return [(name, tensor) for name, tensor in kept if tensor.ndim and name not in ("qmap1", "qmap2")]


# Memory


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_bytes_are_those_of_its_state(parse, name):
    args = parse(*OPTIMIZERS[name])
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make_optimizer(args, parameters, OneProcess)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = states(optimizer)
    assert any(tensor.dtype == torch.uint8 for _, tensor in kept) == (name == "8-bit adamw")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in kept}
    assert optimizer_bytes(args, parameters) == sum(storages.values())
    # What is left out does not grow with the parameters.
    everything = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in everything}
    assert sum(storages.values()) - optimizer_bytes(args, parameters) <= 2 * 1024 + 4 * len(parameters)


# Training and resuming


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [(), ("--use_lora",)], ids=["full", "LoRA"])
def test_it_trains(train, tiny_sd, name, kind):
    output = train("--lpl_weight", 0, *OPTIMIZERS[name], *kind, steps=3)
    assert all(math.isfinite(row["loss"]) for row in read_log(output))
    if kind:
        weights = load_file(output / "pytorch_lora_weights.safetensors")
        up = [weight for key, weight in weights.items() if "lora.up" in key or "lora_B" in key]  # start at zero
        assert up and all(weight.any() for weight in up)
    else:
        before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tiny_sd, output))
        moved = sum(not torch.equal(before[key], after[key]) for key in before)
        assert moved == len(before)


KINDS = {"full": (), "LoRA": ("--use_lora",)}
OTHERS = [name for name in OPTIMIZERS if name != "adamw"]  # which test_train_lpl_sd.py has
RESUMED = (("8-bit adamw", "full"), ("prodigy", "LoRA"), ("adafactor", "full"))


@pytest.mark.parametrize("name, kind", slow_but(RESUMED, itertools.product(OTHERS, KINDS)))
def test_resumed_run_is_bitwise_the_uninterrupted_one(train, wide_sd, monkeypatch, name, kind):
    made, finish = [], train_lpl_sd.finish
    keep = lambda *args: made.append(states(args[3].weights.optimizer)) or finish(*args)  # noqa: E731
    monkeypatch.setattr(train_lpl_sd, "finish", keep)  # which clears the state
    flags = ("--lpl_weight", 0, "--checkpointing_steps", 3, *OPTIMIZERS[name], *KINDS[kind])
    whole = train(*flags, model=wide_sd, steps=6, name="whole")
    resumed = whole.with_name("resumed")
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(*flags, "--resume_from_checkpoint", "latest", model=wide_sd, steps=6, name="resumed")

    if (name, kind) == ("8-bit adamw", "full"):
        assert all(any(t.dtype == torch.uint8 for _, t in kept) for kept in made)
    file = "pytorch_lora_weights.safetensors" if kind == "LoRA" else "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / file), load_file(resumed / file)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [row["loss"] for row in read_log(resumed)] == [row["loss"] for row in read_log(whole)]
    # The states as well, which the last step has used.
    assert made[0]
    for (key, one), (other_key, other) in zip(*made, strict=True):
        assert key == other_key and torch.equal(one, other)


# Flags


def test_prodigy_gets_its_flags(parse):
    parameter = torch.nn.Parameter(torch.ones(3))
    given = ("--prodigy_beta3", 0.95, "--prodigy_decouple", "false", "--prodigy_use_bias_correction", "false")
    given += ("--prodigy_safeguard_warmup", "false", "--adam_beta1", 0.8, "--adam_beta2", 0.98, "--adam_epsilon", 1e-7)
    given += ("--adam_weight_decay", 0.03, "--learning_rate", 0.5)
    (group,) = make_optimizer(parse("--optimizer", "prodigy", *given), [parameter], OneProcess).param_groups
    expected = {"beta3": 0.95, "decouple": False, "use_bias_correction": False, "safeguard_warmup": False}
    expected |= {"betas": (0.8, 0.98), "eps": 1e-7, "weight_decay": 0.03, "lr": 0.5}
    assert {name: group[name] for name in expected} == expected

    (group,) = make_optimizer(parse("--optimizer", "prodigy"), [parameter], OneProcess).param_groups
    expected = {"beta3": None, "decouple": True, "use_bias_correction": True, "safeguard_warmup": True, "lr": 1}
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["adamw", "8-bit adamw"])
def test_adamw_gets_its_flags(parse, name):
    given = ("--adam_beta1", 0.8, "--adam_beta2", 0.98, "--adam_epsilon", 1e-7, "--adam_weight_decay", 0.03)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(parse(*OPTIMIZERS[name], *given), [parameter], OneProcess)
    assert type(optimizer).__name__ == ("AdamW8bit" if "8" in name else "AdamW")
    expected = {"betas": (0.8, 0.98), "eps": 1e-7, "weight_decay": 0.03, "lr": 1e-4}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_adafactor_gets_its_flags(parse):
    parameter = torch.nn.Parameter(torch.ones(3))
    args = parse("--optimizer", "adafactor", "--adam_weight_decay", 0.03, "--learning_rate", 0.02)
    (group,) = make_optimizer(args, [parameter], OneProcess).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.03)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scale_lr_multiplies(parse, name):
    class FourProcesses(OneProcess):
        num_processes = 4

    flags = (*OPTIMIZERS[name], "--learning_rate", 0.001, "--train_batch_size", 3)
    flags += ("--gradient_accumulation_steps", 2)
    parameter = torch.nn.Parameter(torch.ones(3))
    rates = [
        make_optimizer(parse(*flags, *more), [parameter], FourProcesses).param_groups[0]["lr"]
        for more in ((), ("--scale_lr",))
    ]
    assert rates == pytest.approx([0.001, 0.001 * 4 * 3 * 2])


def test_the_schedule_moves_a_scaled_rate(train):
    output = train("--lpl_weight", 0, "--scale_lr", "--lr_scheduler", "linear", "--lr_warmup_steps", 0, steps=2)
    # 1e-4 times batches of 2, falling to 0 in 2 steps; the log has the rate after each.
    assert [row["lr"] for row in read_log(output)] == pytest.approx([1e-4, 0])
