"""train_lpl_sd.py as its users run it, on tiny models."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from marks import slow_but
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_tiny_sd, build_tiny_vae

import train_lpl_sd
from arguments import UserError
from data_sources import read_image_folder
from data_utils import TrainingStream
from lpl_utils import LatentPerceptualLoss
from train_utils import sample_generators


ROOT = Path(train_lpl_sd.__file__).parent
WIDE_GATE = ("--lpl_sigma_threshold", 80)  # tau 20 at 64 pixels: every timestep of SD's schedule
GIVEN = (*WIDE_GATE, "--lpl_weight", 0.3)  # nothing is measured
FEW = ("--num_validation_images", 1, "--validation_inference_steps", 2)  # where what is drawn is not the point


def unet_weights(output, part="unet"):
    return load_file(output / part / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def sample(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red fox", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


def plain_finetuning(model, photos, steps, batch_size, accumulation=1, warmup=0, lpl_weight=0.0):
    """The training loop once more, without accelerate: AdamW on epsilon's squared error (and LPL, all samples)."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").train()
    pipe = StableDiffusionPipeline.from_pretrained(model, unet=unet)
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    lpl = LatentPerceptualLoss(pipe.vae, chunk_size=0)
    stream = TrainingStream(read_image_folder(photos), seed=0, resolution=64)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    position = 0
    for _ in range(steps):
        for _ in range(accumulation):
            rows = [stream[i] for i in range(position, position + batch_size)]
            positions = range(position, position + batch_size)
            time_generators, generators = (sample_generators(0, positions, purpose) for purpose in (0, 1))
            position += batch_size
            with torch.no_grad():
                pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
                posterior = pipe.vae.encode(pixels).latent_dist
                draws = [torch.randn(posterior.mean[0].shape, generator=generator) for generator in generators]
                latents = (posterior.mean + posterior.std * torch.stack(draws)) * pipe.vae.config.scaling_factor
                tokens = pipe.tokenizer([r["caption"] for r in rows], padding="max_length", return_tensors="pt")
                states = pipe.text_encoder(tokens.input_ids)[0]
            timesteps = torch.tensor([torch.randint(0, 1000, (1,), generator=g) for g in time_generators])
            noise = torch.stack([torch.randn(latents[0].shape, generator=generator) for generator in generators])
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, states).sample
            loss = torch.nn.functional.mse_loss(prediction, noise)
            if lpl_weight:
                steps_back = zip(prediction, timesteps, noisy)
                z0_hat = torch.stack([scheduler.step(p, t, z).pred_original_sample for p, t, z in steps_back])
                loss = loss + lpl_weight * lpl(z0_hat, latents)[0].mean()
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return unet.state_dict()


# What is trained


def test_without_lpl_it_is_the_plain_loop(train, tiny_sd, photos):
    flags = ("--lr_scheduler", "cosine", "--lr_warmup_steps", 1, "--gradient_accumulation_steps", 2)
    trained = unet_weights(train("--lpl_weight", 0, *flags))
    expected = plain_finetuning(tiny_sd, photos, steps=4, batch_size=2, accumulation=2, warmup=1)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-7)


def test_with_lpl_it_is_the_plain_loop_with_lpl(train, tiny_sd, photos):
    trained = unet_weights(train("--lpl_weight", 0.5, *WIDE_GATE, "--lr_scheduler", "cosine", "--lr_warmup_steps", 0))
    expected = plain_finetuning(tiny_sd, photos, steps=4, batch_size=2, lpl_weight=0.5)
    without = plain_finetuning(tiny_sd, photos, steps=4, batch_size=2)
    moved = max((expected[name] - without[name]).abs().max() for name in expected)
    difference = max((expected[name] - trained[name]).abs().max() for name in expected)
    assert difference < 0.02 * moved  # Adam turns rounding errors of tiny gradients into visible ones


@pytest.mark.parametrize("weighting", ["inverse", pytest.param("balanced", marks=pytest.mark.slow)])
def test_auto_reaches_its_share_and_leaves_everything_else_alone(train, weighting):
    flags = (*WIDE_GATE, "--lpl_weighting", weighting, "--checkpointing_steps", 4)
    auto = train(*flags, "--lpl_target_share", 0.3, "--learning_rate", 0, "--max_train_steps", 16, name="still")
    log = read_log(auto)
    # With frozen weights, the 16 batches measured are the 16 batches then trained on.
    assert sum(row["lpl"] for row in log) / sum(row["loss"] for row in log) == pytest.approx(0.3, rel=1e-5)

    auto = train(*flags, name="auto")
    state = json.loads((auto / "checkpoint-4" / "training_state.json").read_text())["lpl"]
    if weighting == "balanced":
        first = [read_log(auto)[0][f"block_loss/{l}"] * state["omega"][l] for l in range(5)]
        assert max(first) < 1.5 * min(first)
    else:
        assert state["omega"] == [1, 0.5, 0.25, 0.125, 0.125]
        given = train(*WIDE_GATE, "--lpl_weight", repr(state["weight"]), name="given")
        assert_same_weights(unet_weights(auto), unet_weights(given))


def test_lpl_falls_on_a_fixed_batch(train, monkeypatch):
    # One photo whose only crop is its centre; the noise depends on the position, so that is fixed as well.
    generators = train_lpl_sd.sample_generators
    fixed = lambda seed, positions, **kind: generators(seed, [2] * len(positions), **kind)  # noqa: E731
    monkeypatch.setattr(train_lpl_sd, "sample_generators", fixed)
    flags = ("--max_train_samples", 1, "--center_crop", "--lpl_weight", 10, *WIDE_GATE, "--learning_rate", 5e-3)
    log = read_log(train(*flags, steps=30))
    assert log[-1]["lpl"] < 0.7 * log[0]["lpl"]


PREDICTED = (("PNDM", "epsilon"), ("DDIM", "v_prediction"), ("PNDM", "sample"))
PREDICTED_BY_THE_OTHER = (("DDIM", "epsilon"), ("PNDM", "v_prediction"), ("DDIM", "sample"))


@pytest.mark.parametrize("scheduler, prediction_type", slow_but(PREDICTED, PREDICTED + PREDICTED_BY_THE_OTHER))
def test_prediction_types_train_and_are_saved(train, tmp_path, prediction_type, scheduler):
    model = build_tiny_sd(tmp_path / "model", scheduler=scheduler)
    output = train("--prediction_type", prediction_type, *GIVEN, model=model, steps=2)
    config = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction_type
    sample(output)


def test_zero_terminal_snr_is_trained_and_saved(train, tmp_path, caplog):
    model = build_tiny_sd(tmp_path / "model", scheduler="PNDM", prediction_type="v_prediction")
    output = train("--rescale_betas_zero_snr", "--snr_gamma", 5, *GIVEN, model=model, steps=2)
    assert sum("--snr_gamma gives the last timestep weight 0" in record.message for record in caplog.records) == 1
    scheduler = StableDiffusionPipeline.from_pretrained(output).scheduler
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] == 0
    assert not scheduler.config.clip_sample
    sample(output)


VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL")
PLACES = ("in the pipeline", "by flag")


@pytest.mark.parametrize("kind, given", slow_but([*zip(VAES, PLACES)], itertools.product(VAES, PLACES)))
def test_every_vae_trains_saves_reloads_samples(train, tmp_path, kind, given):
    vae = build_tiny_vae(kind, seed=1)
    flags, model = (), None
    if given == "by flag":
        vae.save_pretrained(tmp_path / "vae")
        flags, model = ("--pretrained_vae_model_name_or_path", tmp_path / "vae"), build_tiny_sd(tmp_path / "model")
    else:
        model = build_tiny_sd(tmp_path / "model", vae=vae)
    output = train(*flags, *GIVEN, "--gradient_checkpointing", model=model, steps=3)
    assert type(StableDiffusionPipeline.from_pretrained(output).vae).__name__ == kind
    saved = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in vae.state_dict().items())
    assert all(row["lpl"] > 0 for row in read_log(output))
    sample(output)


def test_bf16_trains_float32_weights_and_saves_the_frozen_models_unchanged(train, tiny_sd):
    output = train("--mixed_precision", "bf16", *GIVEN, "--use_ema", "--validation_prompts", "fox", *FEW)
    assert {value.dtype for value in unet_weights(output).values()} == {torch.float32}
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(folder / f"{part}.safetensors") for folder in (tiny_sd, output))
        assert_same_weights(before, after)


@pytest.mark.parametrize(
    "flags, threshold, message",
    [
        ((), 0.13, "no sample passed the gate.*--lpl_sigma_threshold"),  # 1 of 1,000 noise levels does
        ((), 0.001, "--lpl_sigma_threshold 0.001.* no sample passes: raise it"),
        (("--lpl_weight", 0, "--rgb_weight", 1, "--gate_objectives", "rgb"), 0.001, "no sample passes: raise it"),
    ],
)
def test_a_gate_that_nothing_passes_is_refused(train, monkeypatch, flags, threshold, message):
    monkeypatch.setattr("loss_terms.MOST_CALIBRATION_BATCHES", 24)  # more than there are by default
    with pytest.raises(UserError, match=message):
        train(*flags, "--lpl_sigma_threshold", threshold)


def test_a_base_model_that_is_gone_does_not_cost_the_result(train, tmp_path, monkeypatch):
    model = build_tiny_sd(tmp_path / "model")
    monkeypatch.setattr(train_lpl_sd.Log, "step", lambda self, *_: shutil.rmtree(model, ignore_errors=True))
    with pytest.raises(UserError, match="what was trained is saved in .*unet, the rest of the pipeline not"):
        train("--lpl_weight", 0, model=model)
    UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_on_a_cpu_is_refused(train):
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        train("--mixed_precision", "fp16")


def test_half_precision_files_give_a_pipeline_that_samples(train, tiny_sd, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    output = train("--variant", "fp16", *GIVEN, model=tmp_path / "model", steps=1)
    sample(output)
    original = load_file(tmp_path / "model" / "text_encoder" / "model.fp16.safetensors")
    saved = load_file(output / "text_encoder" / "model.safetensors")
    assert all(torch.equal(saved[name], value.float()) for name, value in original.items())


def test_lpl_starts_at_its_step(train):
    log = read_log(train("--lpl_start_step", 2, *GIVEN))
    assert ["lpl" in row for row in log] == [False, False, True, True]


def test_weight_zero_never_decodes_and_warns_once(train, monkeypatch, caplog):
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *_, **__: pytest.fail("the decoder was used"))
    train("--lpl_weight", 0, "--lpl_num_blocks", 3)
    assert [r.message for r in caplog.records if "--lpl_" in r.message] == [
        "--lpl_weight 0 switches LPL off, so without effect: --lpl_num_blocks."
    ]


@pytest.mark.parametrize("other", [(), ("--lpl_weight", 0, "--rgb_weight", 1, "--gate_objectives", "rgb")])
def test_steps_whose_samples_are_all_kept_out_by_the_gate_have_no_loss(train, other):
    output = train(*GIVEN, "--l2_weight", 0, *(other or ("--lpl_weight", 1)), "--lpl_sigma_threshold", 0.13, steps=2)
    name = "rgb" if other else "lpl"
    for row in read_log(output):
        assert row["loss"] == row["l2"] == row[name] == row[f"{name}_share"] == row["gated_share"] == 0


def test_max_samples_bounds_what_is_decoded(train, monkeypatch):
    sizes = []
    call = LatentPerceptualLoss.__call__
    monkeypatch.setattr(
        LatentPerceptualLoss, "__call__", lambda self, z0_hat, z0: sizes.append(len(z0)) or call(self, z0_hat, z0)
    )
    train("--lpl_max_samples", 1, "--lpl_weight", 1, *WIDE_GATE, "--train_batch_size", 4)
    assert sizes == [1] * 4


# Average weights, validation, logs


def test_saved_weights_are_the_average_and_validation_changes_nothing(train):
    flags = ("--use_ema", "--ema_decay", 0.5, "--checkpointing_steps", 1, *GIVEN)
    prompts = ("--validation_prompts", "a fox", "a boat", "--validation_inference_steps", 5)
    drawn = train(*flags, *prompts, "--validation_steps", 2, name="drawn")
    plain = train(*flags, name="plain")
    assert_same_weights(unet_weights(drawn), unet_weights(plain))
    assert_same_weights(unet_weights(drawn), unet_weights(drawn / "checkpoint-4", "unet_ema"))

    # The average by hand: decay min(0.5, (1 + n) / (10 + n)) at the n-th update, from the second on.
    weights = [unet_weights(drawn / f"checkpoint-{step}") for step in range(1, 5)]
    for name, value in unet_weights(drawn).items():
        average = weights[0][name]
        for n, update in enumerate(weights[1:], start=1):
            decay = min(0.5, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * update[name]
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-7)

    grid = Image.open(drawn / "samples" / "step-000004.png")
    assert grid.size == (4 * 64, 2 * 64)
    # Drawn with the average: the first image of the grid is what the saved pipeline draws with the same seed.
    pipe = StableDiffusionPipeline.from_pretrained(drawn)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = pipe(["a fox"] * 4, height=64, width=64, num_inference_steps=5, generator=generators).images
    difference = np.abs(np.asarray(grid.crop((0, 0, 64, 64)), int) - np.asarray(images[0], int))
    assert difference.max() <= 1


def test_default_ema_decay_depends_on_lpl(train, monkeypatch):
    decays = []
    monkeypatch.setattr(train_lpl_sd, "make_ema", lambda *_, default_decay: decays.append(default_decay) or None)
    train("--use_ema", *GIVEN, steps=1, name="with")
    train("--use_ema", "--lpl_weight", 0, steps=1, name="without")
    assert decays == [0.99975, 0.9999]


def test_schedule_counts_optimizer_steps(train):
    flags = ("--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--gradient_accumulation_steps", 3)
    log = read_log(train("--lpl_weight", 0, *flags, steps=6))
    # The rate after n steps: up in 2, then down to 0 at the sixth.
    assert [row["lr"] / 1e-4 for row in log] == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])


def test_tensorboard_gets_scalars_and_images(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--report_to", "tensorboard", "--validation_prompts", "fox", "--validation_steps", 2, *GIVEN)
    output = train(*flags, *FEW)
    (folder,) = (output / "logs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0}).Reload()
    logged = [row["lpl_share"] for row in read_log(output)]
    assert [event.value for event in events.Scalars("lpl_share")] == pytest.approx(logged, rel=1e-5)
    assert [event.step for event in events.Images("validation")] == [2, 4]
    assert {"grad_norm_lpl", "grad_cosine", "variance_ratio/4", "gated_share"} <= set(events.Tags()["scalars"])


# Checkpoints


@pytest.fixture
def sd_with_dropout(tiny_sd, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "dropout")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "dropout": 0.2}))
    return model


def test_a_seed_repeats_a_run_with_dropout_whatever_is_drawn_or_measured_in_between(train, sd_with_dropout):
    flags = ("--lpl_start_step", 2, *WIDE_GATE, "--checkpointing_steps", 4)
    prompt = ("--validation_prompts", "fox", "--validation_steps", 1, *FEW)
    auto = train(*flags, *prompt, model=sd_with_dropout, name="auto")
    weight = json.loads((auto / "checkpoint-4" / "training_state.json").read_text())["lpl"]["weight"]
    torch.rand(7)  # something else has used the global generator
    given = train(*flags, "--lpl_weight", repr(weight), model=sd_with_dropout, name="given")
    assert_same_weights(unet_weights(auto), unet_weights(given))


def test_resumed_run_is_bitwise_the_uninterrupted_one(train, sd_with_dropout):
    # 6 steps of 2 x 2 samples over 10 photos: the checkpoint at step 3 is in the middle of the second epoch.
    flags = ("--use_ema", "--gradient_accumulation_steps", 2, "--random_flip", *WIDE_GATE)
    flags += ("--checkpointing_steps", 3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2)
    flags += ("--proportion_empty_prompts", 0.5, "--noise_offset", 0.1)
    whole = train(*flags, steps=6, model=sd_with_dropout, name="whole")
    resumed = whole.with_name("resumed")
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    train(*flags, "--resume_from_checkpoint", "latest", steps=6, model=sd_with_dropout, name="resumed")
    for part in ("checkpoint-6/unet", "checkpoint-6/unet_ema", "unet"):
        assert_same_weights(unet_weights(whole, part), unet_weights(resumed, part))
    assert [row["loss"] for row in read_log(resumed)] == [row["loss"] for row in read_log(whole)]
    # Done again in its own folder, the log has every step once.
    losses = [row["loss"] for row in read_log(whole)]
    shutil.rmtree(whole / "checkpoint-6")
    train(*flags, "--resume_from_checkpoint", "latest", steps=6, model=sd_with_dropout, name="whole")
    assert [row["loss"] for row in read_log(whole)] == losses


def test_latest_without_a_checkpoint_starts_at_zero_and_says_so(train, capsys):
    output = train("--resume_from_checkpoint", "latest", "--seed", 0, "--lpl_weight", 0, steps=2)
    assert "starting at step 0" in capsys.readouterr().out
    assert len(read_log(output)) == 2


def test_resume_refuses_other_data_and_another_seed(train):
    flags = ("--checkpointing_steps", 1, "--lpl_weight", 0)
    train(*flags, steps=1)
    with pytest.raises(UserError, match="had 10 samples, now there are 4"):
        train(*flags, "--resume_from_checkpoint", "latest", "--max_train_samples", 4)
    with pytest.raises(UserError, match="--seed 5: the run to resume has seed 0"):
        train(*flags, "--resume_from_checkpoint", "latest", "--seed", 5)


@pytest.mark.parametrize("name", ["optimizer.bin", "unet/diffusion_pytorch_model.safetensors", "random_states_0.pkl"])
def test_a_damaged_checkpoint_is_named(train, name):
    flags = ("--checkpointing_steps", 1, "--lpl_weight", 0)
    checkpoint = train(*flags, steps=1) / "checkpoint-1"
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(bytes(len(content)))  # the size alone does not tell
    with pytest.raises(UserError, match="--resume_from_checkpoint .*checkpoint-1 is damaged .*: choose another one"):
        train(*flags, "--resume_from_checkpoint", "latest")


INCOMPLETE = ("optimizer.bin", "random_states_0.pkl", "training_state.json")
FIRST = (("optimizer.bin", True), ("training_state.json", False))


@pytest.mark.parametrize("name, cut", slow_but(FIRST, itertools.product(INCOMPLETE, (True, False))))
def test_an_incomplete_checkpoint_is_passed_over_by_latest_and_refused_by_name(train, name, cut, capsys):
    flags = ("--checkpointing_steps", 1, "--lpl_weight", 0)
    output = train(*flags, steps=2)
    damaged = output / "checkpoint-2" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2]) if cut else damaged.unlink()
    with pytest.raises(SystemExit):
        train(*flags, "--resume_from_checkpoint", "checkpoint-2", steps=3)
    message = capsys.readouterr().err
    assert f"checkpoint-2 is damaged ({name} " in message and "choose another checkpoint" in message
    train(*flags, "--resume_from_checkpoint", "latest", steps=3)
    told = capsys.readouterr()
    assert f"checkpoint-2 is damaged ({name} " in told.err
    assert "checkpoint-1 at step 1" in told.out
    assert [row["step"] for row in read_log(output)] == [1, 2, 3]


def test_latest_does_not_start_anew_where_all_checkpoints_are_damaged(train, capsys):
    flags = ("--checkpointing_steps", 1, "--lpl_weight", 0)
    output = train(*flags, steps=1)
    (output / "checkpoint-1" / "optimizer.bin").unlink()
    for resume in (("--resume_from_checkpoint", "latest"), ("--seed", 0)):
        with pytest.raises(SystemExit):
            train(*flags, *resume)
        assert "another --output_dir" in capsys.readouterr().err.replace(
            "choose another folder", "another --output_dir"
        )


def test_old_checkpoints_go_after_the_new_one_is_complete(train, monkeypatch):
    output = train("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--lpl_weight", 0, steps=5)
    assert {path.name for path in output.glob("*checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}

    def full_disk(self, folder, ema):
        Path(folder, "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engines.Weights.save", full_disk)
    flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--lpl_weight", 0)
    with pytest.raises(UserError, match="checkpoint-6.*No space left.*checkpoint-5"):
        train(*flags, "--resume_from_checkpoint", "latest", steps=6)
    monkeypatch.undo()
    assert (output / "checkpoint-5" / "training_state.json").exists()
    train(*flags, "--resume_from_checkpoint", "latest", steps=6)
    assert {path.name for path in output.glob("*checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(train, tmp_path):
    flags = ("--learning_rate", 1e18, "--checkpointing_steps", 1, "--lpl_weight", 0)
    with pytest.raises(UserError, match=r"step 2: loss (nan|inf).*sigma/alpha \d") as error:
        train(*flags)
    assert "\n" not in str(error.value)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert not (out / "unet").exists()


# Several processes


def test_two_processes_make_the_step_of_one_with_the_same_global_batch(train, train_on_two_processes, tiny_sd):
    flags = ("--lr_scheduler", "constant", *WIDE_GATE, "--lpl_target_share", 0.4, "--checkpointing_steps", 3)
    one = train(*flags, "--train_batch_size", 4, steps=3, name="one")
    two = train_on_two_processes(*flags, model=tiny_sd, steps=3)
    for row, expected in zip(read_log(two), read_log(one), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["lpl"] == pytest.approx(expected["lpl"], rel=1e-3)
    start = unet_weights(tiny_sd)
    weights, expected = unet_weights(two), unet_weights(one)
    moved = max((expected[name] - start[name]).abs().max() for name in start)
    assert max((expected[name] - weights[name]).abs().max() for name in start) < 0.02 * moved


def test_the_safety_checker_is_kept(train, tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=8, text_config=size, vision_config=vision))
    pipe = StableDiffusionPipeline.from_pretrained(build_tiny_sd(tmp_path / "plain"), safety_checker=None)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    components = {**pipe.components, "safety_checker": checker, "feature_extractor": extractor}
    StableDiffusionPipeline(**components).save_pretrained(tmp_path / "model")
    output = train("--lpl_weight", 0, model=tmp_path / "model", steps=1)
    saved = StableDiffusionPipeline.from_pretrained(output)
    assert torch.equal(saved.safety_checker.concept_embeds, checker.concept_embeds)
    assert saved.config.requires_safety_checker and saved.feature_extractor.crop_size == extractor.crop_size
