"""Both scripts with the objectives that LPL is compared with, as their users run them, on tiny models."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import read_log
from diffusers import DDPMScheduler, StableDiffusionPipeline
from marks import slow_but
from reference_objectives import predicted, reference_self_perceptual
from safetensors.torch import load_file
from tiny_models import build_photo_folder

import train_lpl_dit
import train_lpl_sd
from data_utils import build_dataloader, make_stream
from latent_lpips import LatentVGG
from loss_terms import make_lpl, make_objectives, weighted_terms
from model_families import find_family
from noise import sample_noise
from train_utils import add_class_images, sample_generators


ROOT = Path(train_lpl_sd.__file__).parent
ALONE = Namespace(distributed_type=DistributedType.NO, reduce=lambda sums, reduction: sums)
NO_LPL = ("--lpl_weight", 0)
WIDE = ("--lpl_sigma_threshold", 80)  # all samples pass the gate
GATE, TAU = ("--lpl_sigma_threshold", 3), 0.75  # at 64 pixels; most samples do not pass
LORA = ("--use_lora", "--rank", 2, "--lora_alpha", 8)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Number of channels -> a folder with a small classifier of the latents of that tiny model's VAE."""
    folders = {}
    for channels, factor, shift in ((4, 0.18215, None), (16, 1.5305, 0.0609)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = LatentVGG(channels, (6, 6, 8, 8, 8), scaling_factor=factor, shift_factor=shift)
        folders[channels] = tmp_path_factory.mktemp("network")
        network.save_pretrained(folders[channels])
    return folders


@pytest.fixture(scope="module")
def weigh(networks):
    """A weight for each name, the weights of the others -> flags."""

    def flags(channels=4, **weights):
        words = [word for name, weight in weights.items() for word in (f"--{name}_weight", weight)]
        network = ("--e_latent_lpips_model", networks[channels]) if "e_latent_lpips" in weights else ()
        return (*words, *network)

    return flags


@pytest.fixture
def load(tiny_sd, photos, tmp_path):
    """flags -> args, family, LPL or None, objectives."""

    def run(*words, data=("--train_data_dir", photos)):
        flags = ["--pretrained_model_name_or_path", tiny_sd, "--resolution", 64, "--seed", 3]
        args = train_lpl_sd.parse_args([str(word) for word in (*flags, *data, "--output_dir", tmp_path / "o", *words)])
        family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
        lpl = make_lpl(args, family.vae, family.unscale) if args.lpl_weight else None
        return args, family, lpl, make_objectives(ALONE, args, family)

    return run


def batch_of(args, size=4):
    return next(build_dataloader(make_stream(args), size))


def weights_of(output):
    """The trained weights of a pipeline, a checkpoint or of LoRA, name -> tensor."""
    return load_file(next(file for name in ("unet", "transformer", ".") for file in (output / name).glob("*tensors")))


def distance(first, second):
    assert first.keys() == second.keys()
    return sum((first[name].double() - second[name].double()).square().sum().item() for name in first) ** 0.5


# Each objective is learnt


LEARNT = [(name, "SD") for name in ("self_perceptual", "e_latent_lpips", "rgb")]
LEARNT += [(name, "StableDiffusion3") for name in ("self_perceptual", "e_latent_lpips", "rgb")]
LEARNT += [("clean_latent", "SD"), ("clean_latent", "StableDiffusion3")]


@pytest.mark.parametrize("name, family", slow_but(LEARNT[:4], LEARNT))
def test_each_objective_alone_falls_on_a_fixed_batch(
    train, train_dit, tiny_pipeline, weigh, monkeypatch, name, family
):
    # One photo whose only crop is its centre; noise and draws depend on the position, so that is fixed as well.
    script = train_lpl_sd if family == "SD" else train_lpl_dit
    generators = script.sample_generators

    def fixed(seed, positions, *purpose, **more):
        return generators(seed, [2] * len(positions), *purpose, **more)

    monkeypatch.setattr(script, "sample_generators", fixed)
    words = ("--l2_weight", 0, *NO_LPL, *weigh(4 if family == "SD" else 16, **{name: 1}))
    words += ("--max_train_samples", 1, "--center_crop", "--learning_rate", 5e-3)
    if family == "SD":
        rows = read_log(train(*words, steps=30))
    else:
        rows = read_log(train_dit(*words, model=tiny_pipeline(family), steps=30))
    found = [row[name] for row in rows]
    assert len(found) == 30 and np.mean(found[-3:]) < 0.7 * found[0]
    assert all(row["l2"] == 0 and row["loss"] == row[name] for row in rows)


@pytest.mark.parametrize("name", slow_but(["self_perceptual"], ["self_perceptual", "e_latent_lpips", "rgb"]))
def test_held_out_images_are_measured_by_every_objective_at_fixed_noise(train, weigh, name):
    words = (*weigh(**{name: 1}), *NO_LPL, "--eval_steps", 1, "--eval_share", 0.2, "--learning_rate")
    rows, still = (read_log(train(*words, rate, steps=2, name=str(rate))) for rate in (1e-2, 1e-12))
    found, same = ([row[f"eval_{name}"] for row in log if f"eval_{name}" in row] for log in (rows, still))
    assert len(found) == len(same) == 2
    assert same[1] == pytest.approx(same[0], rel=1e-4) and found[1] != pytest.approx(same[1], rel=1e-3)
    at_levels = [value for key, value in still[-1].items() if key.startswith(f"eval_{name}_at_")]
    assert len(at_levels) == 5 and same[1] == pytest.approx(np.mean(at_levels))


# They are added


def test_the_loss_in_the_log_is_the_sum_of_its_terms_in_their_shares(train, weigh):
    weights = {"self_perceptual": "auto:0.3", "e_latent_lpips": 0.5, "rgb": "variance:0.1"}
    rows = read_log(train(*weigh(**weights), *WIDE, "--l2_weight", 0.5, steps=2))
    for row in rows:
        terms = {name: row[name] for name in ("l2", "lpl", *weights)}
        assert all(value > 0 for value in terms.values())
        assert row["loss"] == pytest.approx(sum(terms.values()), rel=1e-6)
        for name in terms.keys() - {"l2"}:
            assert row[f"{name}_share"] == pytest.approx(row[name] / row["loss"])


@pytest.mark.parametrize("words", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "LoRA"])
def test_in_bf16_the_terms_are_nearly_what_they_are_in_fp32(train, weigh, words):
    words = (*words, *weigh(self_perceptual=1, e_latent_lpips=1, rgb=1), "--lpl_weight", 1, *WIDE)
    row, expected = (
        read_log(train(*words, "--mixed_precision", precision, steps=1, name=precision))[0]
        for precision in ("bf16", "no")
    )
    for name in ("l2", "self_perceptual", "e_latent_lpips", "rgb"):
        assert row[name] == pytest.approx(expected[name], rel=0.02)
        assert row[name] != expected[name]


def test_the_gradient_of_all_terms_is_the_sum_of_that_of_each(load, weigh):
    weights = {"self_perceptual": 0.7, "e_latent_lpips": 0.3, "rgb": 2.0}
    gate = (*GATE, "--gate_objectives", "rgb")

    def gradient(**weights):
        words = (*weigh(**weights), *(gate if "rgb" in weights else gate[:2]))
        if "e_latent_lpips" in weights:
            words += ("--e_latent_lpips_augmentations", "blit", "color")
        args, family, lpl, objectives = load(*words)
        batch = batch_of(args, size=8)
        forward = train_lpl_sd.training_step(args, family, family.model, lpl, batch, objectives=objectives)
        terms = weighted_terms(args, lpl, objectives, forward)
        assert all(term > 0 for term in terms.values() if term is not terms["l2"])
        loss = sum(terms.values())
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, family.trained_parameters)])

    nothing = {"lpl": 0}
    both = [gradient(lpl=0.4, **weights), gradient(**nothing)]
    singles = [gradient(**nothing, l2=0, **{name: weight}) for name, weight in weights.items()]
    singles += [gradient(l2=0, lpl=0.4), both[1]]
    total, expected = (sum(values) for values in zip(*singles))
    assert both[0][0] == pytest.approx(total, rel=1e-5)
    assert (both[0][1] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (both[0][1] - both[1][1]).norm() > 0.1 * both[1][1].norm()


def test_half_of_the_samples_may_be_gated_and_still_nothing_of_an_objective_is_lost(load, weigh):
    args, family, _, objectives = load(*weigh(rgb=1, self_perceptual=1), *NO_LPL, *GATE, "--gate_objectives", "rgb")
    batch = batch_of(args, size=8)
    with torch.no_grad():
        forward = train_lpl_sd.training_step(args, family, family.model, None, batch, objectives=objectives)
        objectives.gated = ()
        ungated = train_lpl_sd.training_step(args, family, family.model, None, batch, objectives=objectives)
    passes = forward.noise_levels <= TAU
    assert 0 < passes.sum() < 8
    expected = torch.where(passes, ungated.sample_losses["rgb"], 0)
    torch.testing.assert_close(forward.sample_losses["rgb"], expected, rtol=1e-5, atol=0)
    assert forward.objective_losses["rgb"].item() == pytest.approx(expected.mean().item())
    assert (ungated.sample_losses["rgb"] > 0).all()
    assert torch.equal(forward.sample_losses["self_perceptual"], ungated.sample_losses["self_perceptual"])


def test_of_prior_preservation_objectives_see_one_s_own_images_alone(load, weigh, tmp_path):
    words = ("--instance_data_dir", build_photo_folder(tmp_path / "mine", n=3, size=64), "--instance_prompt", "sks")
    words += ("--with_prior_preservation", "--class_data_dir", build_photo_folder(tmp_path / "class", n=4, size=64))
    words += ("--class_prompt", "a photo of a dog", "--num_class_images", 4, "--prior_loss_weight", 0.25)
    (tmp_path / "mine/metadata.jsonl").unlink()
    words += weigh(self_perceptual=1, e_latent_lpips=1, rgb=1)
    args, family, lpl, objectives = load(*words, "--late_reweight", *WIDE, "--lpl_weight", 2, data=())
    stream = make_stream(args)
    add_class_images(None, args, family, stream)
    batch = next(build_dataloader(stream, 3))
    own = {name: value[:3] for name, value in batch.items() if name != "num_instances"}
    objectives.late.update(torch.tensor([0.1, 0.9]), torch.tensor([1.0, 2]))
    sums = objectives.late.sums
    both = train_lpl_sd.training_step(args, family, family.model, lpl, batch, objectives=objectives)
    objectives.late.sums = sums
    alone = train_lpl_sd.training_step(args, family, family.model, lpl, own, objectives=objectives)
    for name in objectives.terms:
        torch.testing.assert_close(both.sample_losses[name], alone.sample_losses[name], rtol=1e-4, atol=0)
    prior = 0.25 * both.sample_losses["l2"][3:].mean()  # as they are, without Eq. 15's weights
    torch.testing.assert_close(both.diffusion_loss, alone.diffusion_loss + prior, rtol=1e-5, atol=0)
    assert len(both.sample_losses["l2"]) == 6 and alone.diffusion_loss > 1.05 * alone.sample_losses["l2"].mean()


def test_beside_trained_text_encoders_the_frozen_model_reads_what_the_base_s_say(load, weigh, tiny_sd):
    words = (*weigh(self_perceptual=1), *NO_LPL, *LORA, "--train_text_encoder")
    args, family, _, objectives = load(*words)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.trained_parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    batch = batch_of(args)
    forward = train_lpl_sd.training_step(args, family, family.model, None, batch, objectives=objectives)
    positions = batch["positions"]
    timesteps = family.sample_timesteps(sample_generators(args.seed, positions, 0))
    generators = sample_generators(args.seed, positions, 1)
    latents = family.latents(batch, generators)
    noise = sample_noise(latents, generators)
    t_new = torch.cat([torch.randint(1000, (1,), generator=g) for g in sample_generators(args.seed, positions, 2)])
    abar = DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler").alphas_cumprod
    (alpha, sigma), levels = ((abar[t].sqrt(), (1 - abar[t]).sqrt()) for t in (timesteps, t_new))
    z_t = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
    z0_hat, eps_hat = predicted(forward.model_pred.detach(), z_t, alpha, sigma, "epsilon")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(batch["captions"], "cpu", 1, do_classifier_free_guidance=False)
        trained = family.model.denoiser(z_t, timesteps, texts).sample

        def call(noisy, i):
            return pipe.unet(noisy, t_new[i], texts[i : i + 1])

        expected = reference_self_perceptual(call, [pipe.unet.mid_block], latents, noise, z0_hat, eps_hat, levels)
    torch.testing.assert_close(forward.sample_losses["self_perceptual"], expected, rtol=1e-4, atol=0)
    assert (trained - forward.model_pred).abs().max() > 1e-3  # the trained text encoders say something else
    forward.objective_losses["self_perceptual"].backward()
    moved = [name for name, p in family.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in moved} == {"denoiser", "text_encoders"}


# Eq. 15


def test_late_reweighting_counts_where_lpl_applies_and_only_while_training(load):
    args, family, lpl, objectives = load("--late_reweight", "--lpl_weight", 2, *GATE)
    late = objectives.late
    late.update(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 3.0]))
    sums, batch = late.sums.clone(), batch_of(args, size=8)

    def step():
        return train_lpl_sd.training_step(args, family, family.model, lpl, batch, objectives=objectives)

    with torch.no_grad():
        plain = step()
    assert torch.equal(late.sums, sums) and plain.diffusion_loss == plain.sample_losses["l2"].mean()
    forward = step()
    seen, l2 = (forward.lpl_stats["sample_loss"].double(), forward.sample_losses["l2"].double())
    added = torch.tensor([[len(x), x.sum(), x.square().sum()] for x in (l2, seen)], dtype=torch.float64)
    torch.testing.assert_close(late.sums, 0.99 * sums + added)
    number, total, squares = late.sums.T
    variances = squares / number - (total / number) ** 2
    weights = 1 + 2 * variances[1] / variances[0] * (forward.noise_levels <= TAU)
    assert 0 < len(seen) < 8 and weights.max() > 1.01
    assert forward.diffusion_loss.item() == pytest.approx((weights * l2).mean().item(), rel=1e-5)
    assert list(weighted_terms(args, lpl, objectives, forward)) == ["l2"]
    assert not forward.lpl_loss.requires_grad


def test_with_late_reweighting_the_log_has_eq_15_and_no_lpl_in_the_loss(train):
    rows = read_log(train("--late_reweight", *WIDE, steps=3))
    for row in rows:
        assert row["loss"] == row["l2"] and "lpl" not in row and "grad_cosine" not in row
        assert row["late_weight"] == pytest.approx(1 + row["late_variance_ratio"]) and row["late_mean_ratio"] > 0
    plain = read_log(train(*NO_LPL, steps=3, name="plain"))
    assert rows[0]["l2"] == pytest.approx(plain[0]["l2"] * rows[0]["late_weight"], rel=1e-5)  # all pass the gate


def test_lpl_that_starts_later_reweighs_from_then_on(train, capsys):
    rows = read_log(train("--late_reweight", *WIDE, "--lpl_start_step", 2, steps=3))
    plain = read_log(train(*NO_LPL, steps=2, name="plain"))
    assert ["late_weight" in row for row in rows] == [False, False, True]
    assert [row["l2"] for row in rows[:2]] == [row["l2"] for row in plain]
    assert capsys.readouterr().out.count("Measured ") == 1


# Going on


@pytest.fixture
def resume(train):
    """flags, flags of the resumed run -> outputs of the run that goes through and of the one that is resumed."""

    def run(words, changed=(), steps=4):
        whole = train(*words, "--checkpointing_steps", 2, steps=steps, name="whole")
        resumed = whole.with_name("resumed")
        shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
        flags = (*words, *changed, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
        return whole, train(*flags, steps=steps, name="resumed")

    return run


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(resume, weigh, capsys):
    words = weigh(self_perceptual="auto", e_latent_lpips="variance:0.1", rgb="auto:0.1")
    words += ("--e_latent_lpips_augmentations", "blit", "geometric", "--late_reweight", *WIDE)
    whole, resumed = resume((*words, "--learning_rate", 1e-3))
    weights, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [row["loss"] for row in read_log(resumed)] == [row["loss"] for row in read_log(whole)]
    states = [json.loads((folder / "checkpoint-4/training_state.json").read_text()) for folder in (whole, resumed)]
    assert states[0]["objectives"] == states[1]["objectives"] and states[0]["objectives"]["late"]
    assert all(weight > 0 for weight in states[0]["objectives"]["weights"].values())
    assert capsys.readouterr().out.count("Measured ") == 1
    start = weights_of(whole / "checkpoint-2")
    assert distance(start, expected) > 0.1


def test_other_layers_are_measured_anew_beside_a_number_that_stays(resume, weigh, capsys):
    words = (*weigh(self_perceptual="auto", rgb=0.5), *NO_LPL)
    whole, resumed = resume(words, ("--sp_layers", "encoder"), steps=3)
    assert capsys.readouterr().out.count("Measured self_perceptual on ") == 2
    states = [json.loads((folder / "checkpoint-2/training_state.json").read_text()) for folder in (whole, resumed)]
    assert states[0] == states[1] and states[0]["objectives"]["weights"]["rgb"] == 0.5
    rows, expected = read_log(resumed), read_log(whole)
    assert rows[-1]["rgb"] == expected[-1]["rgb"]
    assert rows[-1]["self_perceptual"] != pytest.approx(expected[-1]["self_perceptual"], rel=0.01)


def test_the_copy_is_of_the_model_as_it_was_when_training_began_also_in_a_resumed_run(resume, weigh, monkeypatch):
    seen = []
    step = train_lpl_sd.training_step

    def spy(args, family, *more, objectives, **settings):
        frozen = objectives.terms["self_perceptual"].frozen.modules[0]
        seen.append({name: value.clone() for name, value in frozen.state_dict().items()})
        return step(args, family, *more, objectives=objectives, **settings)

    monkeypatch.setattr(train_lpl_sd, "training_step", lambda *given: spy(*given[:-1], objectives=given[-1]))
    whole, _ = resume((*weigh(self_perceptual=1), *NO_LPL, "--learning_rate", 1e-2), steps=3)
    assert len(seen) == 4
    base, trained = seen[0], weights_of(whole / "checkpoint-2")
    assert all(torch.equal(state[name], base[name]) for state in seen for name in base)
    assert all(name in trained for name in base) and any(not torch.equal(trained[name], base[name]) for name in base)


# Several processes


def compare_logs(output, expected, names, rel=1e-5):
    rows, wanted = read_log(output), read_log(expected)
    assert len(rows) == len(wanted) > 1
    for row, want in zip(rows, wanted):
        assert {name: row[name] for name in names} == pytest.approx({name: want[name] for name in names}, rel=rel)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_with_the_same_global_batch(train, train_on_two_processes, tiny_sd, weigh):
    words = weigh(self_perceptual="auto", e_latent_lpips="variance:0.1", rgb="auto:0.1")
    words += ("--gate_objectives", "rgb", "e_latent_lpips", *GATE, "--late_reweight", "--learning_rate", 1e-3)
    output = train_on_two_processes(*words, model=tiny_sd, steps=4)
    expected = train(*words, "--train_batch_size", 4, "--checkpointing_steps", 1, steps=4)
    compare_logs(output, expected, ("loss", "l2", "self_perceptual", "e_latent_lpips", "rgb", "late_weight"))
    moved = distance(weights_of(expected / "checkpoint-1"), weights_of(expected))
    assert distance(weights_of(output), weights_of(expected)) < 1e-3 * moved


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
@pytest.mark.parametrize("gate", [("--gate_objectives", "self_perceptual"), ()], ids=["gated", "everywhere"])
def test_where_weights_are_sharded_processes_with_other_numbers_of_samples_do_not_wait(
    train, tiny_sd, photos, weigh, tmp_path, engine, gate
):
    if engine == "ZeRO-3":
        pytest.importorskip("deepspeed")
    words = (*weigh(self_perceptual="auto"), *NO_LPL, *GATE, *gate, *LORA, "--learning_rate", 0.01, "--seed", 0)
    words += ("--gradient_checkpointing", "--eval_steps", 2, "--eval_share", 0.3)
    config = {"FSDP2": "fsdp2_lora", "ZeRO-3": "zero3_offload"}[engine]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--mixed_precision", "no"]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--main_process_port", 0]
    command += [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "FSDP2" else []
    command += [train_lpl_sd.__file__, "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos]
    command += ["--output_dir", tmp_path / "two", "--report_to", "none", "--resolution", 64, "--max_train_steps", 4]
    command += ["--train_batch_size", 2, "--logging_steps", 1, *words]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", **({} if engine == "FSDP2" else {"DS_ACCELERATOR": "cpu"})}
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            code = "it hangs"
            process.terminate()  # on which the launcher ends what it has started
            process.wait(timeout=60)
        said.seek(0)
        assert code == 0, said.read()[-3000:]
    expected = train(*words, "--train_batch_size", 4, "--checkpointing_steps", 1, steps=4)
    rows = [[row for row in read_log(folder) if "loss" in row] for folder in (tmp_path / "two", expected)]
    for row, want in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["self_perceptual"] == pytest.approx(want["self_perceptual"], rel=1e-4)
    moved = distance(weights_of(expected / "checkpoint-1"), weights_of(expected))
    assert distance(weights_of(tmp_path / "two"), weights_of(expected)) < 1e-3 * moved
    if gate:  # the samples of a step's two processes that pass
        seen = [passing_samples(tiny_sd, step) for step in range(4)]
        assert any(first != second for first, second in seen)


def passing_samples(model, step):
    """How many of the two samples of each process pass the gate, at a step that is counted from 0."""
    abar = DDPMScheduler.from_pretrained(model, subfolder="scheduler").alphas_cumprod
    generators = sample_generators(0, range(4 * step, 4 * step + 4), 0)
    draws = torch.cat([torch.randint(0, 1000, (1,), generator=generator) for generator in generators])
    passes = (1 / abar - 1).sqrt()[draws] <= TAU
    return passes.view(2, 2).sum(1).tolist()
