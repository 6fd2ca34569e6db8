"""What a resumed run takes from its checkpoint, from its flags, and what it says of the difference."""

import json
import math
import shutil

import pytest
import torch
from conftest import read_log
from safetensors.torch import load_file

import train_lpl_sd
from arguments import UserError
from checkpoints import last_step


FLAGS = ("--checkpointing_steps", 2, "--lpl_weight", 0)
LATEST = ("--resume_from_checkpoint", "latest")


def unet(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_flags_of_optimizer_and_schedule_count_and_are_told(train, capsys, monkeypatch):
    train(*FLAGS, "--learning_rate", 1e-4, "--lr_scheduler", "linear", "--lr_warmup_steps", 1, steps=4)
    optimizers = []
    finish = train_lpl_sd.finish
    monkeypatch.setattr(
        train_lpl_sd, "finish", lambda *a: optimizers.append(a[3].weights.optimizer.param_groups) or finish(*a)
    )
    changed = ("--learning_rate", 2e-5, "--adam_weight_decay", 0.5, "--adam_beta2", 0.9, "--lr_warmup_steps", 1)
    flags = (*FLAGS, *changed, "--lr_scheduler", "linear", "--resume_from_checkpoint", "checkpoint-2")
    output = train(*flags, steps=8)
    told = capsys.readouterr().out
    for words in (
        "--learning_rate 2e-05 (was --learning_rate 0.0001)",
        "--adam_weight_decay 0.5 (was --adam_weight_decay 0.01)",
        "--max_train_steps 8 (was --max_train_steps 4)",
    ):
        assert words in told
    assert "--lr_scheduler" not in told
    # From 1 after a step of warm-up to 0 at step 8; logged after each step.
    lr = {row["step"]: row["lr"] for row in read_log(output)}
    assert lr[3] == pytest.approx(2e-5 * 5 / 7) and lr[7] == pytest.approx(2e-5 / 7) and lr[8] == 0
    assert optimizers[0][0]["weight_decay"] == 0.5 and tuple(optimizers[0][0]["betas"]) == (0.9, 0.9)


def test_a_checkpoint_has_the_log_and_the_time_that_was_spent(train, monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("checkpoints.time.monotonic", lambda: next(clock))
    flags = ("--lpl_weight", 0, "--checkpointing_steps", 1)
    output = train(*flags, steps=3)
    states = [json.loads((output / f"checkpoint-{step}" / "training_state.json").read_text()) for step in (1, 2, 3)]
    (device,) = states[0]["spent"]
    assert "cpu" in device and states[0]["spent"][device] >= 100
    for step, state in enumerate(states, start=1):
        log = output / f"checkpoint-{step}" / "train_log.jsonl"
        assert [row["step"] for row in map(json.loads, log.read_text().splitlines())] == [*range(1, step + 1)]
        assert state["files"]["train_log.jsonl"] == log.stat().st_size
    # On another machine the run goes on with the curve, from the time that was spent.
    elsewhere = output.with_name("elsewhere")
    shutil.copytree(output / "checkpoint-2", elsewhere / "checkpoint-2")
    train(*flags, *LATEST, steps=3, name="elsewhere")
    assert [row["step"] for row in read_log(elsewhere)] == [1, 2, 3]
    assert read_log(elsewhere)[:2] == read_log(output)[:2]
    spent = json.loads((elsewhere / "checkpoint-3" / "training_state.json").read_text())["spent"]
    assert spent.keys() == {device} and spent[device] >= states[1]["spent"][device] + 100


def test_nothing_is_told_if_nothing_changed(train, capsys):
    train(*FLAGS, steps=2)
    capsys.readouterr()
    train(*FLAGS, *LATEST, "--checkpointing_steps", 1, "--logging_steps", 2, steps=2)
    assert "Unlike" not in capsys.readouterr().out


def test_an_average_that_was_not_there_begins_with_the_weights(train, capsys):
    output = train(*FLAGS, steps=2)
    weights = unet(output / "checkpoint-2")
    train(*FLAGS, *LATEST, "--use_ema", steps=2)
    assert "that run had no average, so it begins here" in capsys.readouterr().out
    assert all(torch.equal(weights[name], value) for name, value in unet(output).items())


def test_the_decay_of_the_flags_counts(train, capsys):
    flags = (*FLAGS, "--use_ema", "--learning_rate", 1e-2)
    output = train(*flags, "--ema_decay", 0.9999, steps=2)
    train(*flags, "--ema_decay", 0, *LATEST, steps=4)
    raw = unet(output / "checkpoint-4")
    assert max((raw[name] - value).abs().max() for name, value in unet(output).items()) < 1e-6
    before = unet(output / "checkpoint-2")  # an average would still be near these
    assert max((before[name] - value).abs().max() for name, value in unet(output).items()) > 1e-3
    assert "--ema_decay 0.0 (was --ema_decay 0.9999)" in capsys.readouterr().out


def test_lpl_is_measured_anew_if_it_is_another(train, capsys):
    def weight(folder):
        return json.loads((folder / "training_state.json").read_text())["lpl"]["weight"]

    flags = ("--lpl_sigma_threshold", 100, "--checkpointing_steps", 1, "--learning_rate", 0)
    output = train(*flags, steps=1)
    train(*flags, *LATEST, steps=2)
    assert capsys.readouterr().out.count("Measured LPL") == 1
    assert weight(output / "checkpoint-2") == weight(output / "checkpoint-1")
    train(*flags, *LATEST, "--lpl_target_share", 0.5, steps=3)
    assert "Measured LPL" in capsys.readouterr().out
    # s / (1 - s) is 4 times as large; the samples measured on are others.
    assert weight(output / "checkpoint-3") == pytest.approx(4 * weight(output / "checkpoint-2"), rel=0.5)
    train(*flags, *LATEST, "--lpl_num_blocks", 2, steps=4)
    assert "--lpl_num_blocks 2 (was --lpl_num_blocks 4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--optimizer", "adafactor"), "--optimizer adafactor (was --optimizer adamw)"),
        (("--use_lora",), "--use_lora (was no --use_lora)"),
        (("--prediction_type", "v_prediction"), "--prediction_type v_prediction (was no --prediction_type)"),
    ],
)
def test_what_makes_the_saved_state_mean_something_else_is_refused_first(train, flags, words, monkeypatch):
    train(*FLAGS, steps=2)
    monkeypatch.setattr(train_lpl_sd, "make_stream", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(UserError, match="its run can't go on with") as error:
        train(*FLAGS, *flags, *LATEST)
    assert words in str(error.value)


def test_epochs_end_when_the_data_has_been_seen_also_with_another_batch(train, capsys):
    words = ("--num_train_epochs", 2, "--checkpointing_steps", 2, "--lpl_weight", 0)
    output = train(*words, "--max_train_steps", 2)  # 4 of the 20 samples of two epochs
    state = json.loads((output / "checkpoint-2" / "training_state.json").read_text())
    assert state["position"] == 4

    class Args:
        num_train_epochs, resume_from_checkpoint = 2, str(output / "checkpoint-2")

    assert last_step(Args, 10, 2) == 10
    assert last_step(Args, 10, 6) == 2 + math.ceil(16 / 6)
    Args.resume_from_checkpoint = None
    assert last_step(Args, 10, 6) == 4


def test_accumulation_begins_anew_with_another_number_of_forward_passes(train, monkeypatch):
    from accelerate import Accelerator

    train(*FLAGS, "--checkpointing_steps", 3, steps=3)
    synced, backward = [], Accelerator.backward
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, *a: synced.append(self.sync_gradients) or backward(self, *a)
    )
    train(*FLAGS, *LATEST, "--gradient_accumulation_steps", 2, steps=6)
    assert synced == [False, True] * 3


def test_checkpoints_of_the_run_that_is_left_go_when_there_is_a_new_one(train, capsys):
    flags = ("--checkpointing_steps", 2, "--checkpoints_total_limit", 2, "--lpl_weight", 0)
    output = train(*flags, steps=6)
    train(
        *flags,
        "--checkpoints_total_limit",
        5,
        "--resume_from_checkpoint",
        "checkpoint-4",
        "--learning_rate",
        1,
        steps=5,
    )
    assert "those of the run that is left go: checkpoint-6" in capsys.readouterr().out
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}  # no new one so far
    train(*flags, "--checkpointing_steps", 1, "--resume_from_checkpoint", "checkpoint-4", steps=5)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_another_runs_folder_is_not_written_to(train, capsys, tmp_path):
    mine = train(*FLAGS, steps=2)
    theirs = train(*FLAGS, steps=2, name="theirs")
    before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        train(*FLAGS, "--resume_from_checkpoint", mine / "checkpoint-2", steps=4, name="theirs")
    assert "choose another --output_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()} == before
    new = train(*FLAGS, "--resume_from_checkpoint", mine / "checkpoint-2", steps=4, name="new")
    assert (new / "checkpoint-4").is_dir()


def test_prodigys_flags_count_too(train, monkeypatch):
    flags = (*FLAGS, "--optimizer", "prodigy")
    train(*flags, steps=2)
    groups, finish = [], train_lpl_sd.finish
    monkeypatch.setattr(
        train_lpl_sd, "finish", lambda *a: groups.extend(a[3].weights.optimizer.param_groups) or finish(*a)
    )
    train(*flags, *LATEST, "--prodigy_beta3", 0.9, "--prodigy_decouple", "false", steps=3)
    assert groups[0]["beta3"] == 0.9 and groups[0]["decouple"] is False
    assert groups[0]["k"] == 3  # its own state is the checkpoint's
