"""benchmarks/reproduce.py trains, scores and compares what it says; and benchmarks/ablations.py on the same toy."""

import json
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import ablations
import pytest
import reproduce
import reproduction_models
import torch
from conftest import run_script
from diffusers import AutoencoderKL
from reproduce import (
    DRAWN,
    FEW,
    METRICS,
    MORE,
    Experiment,
    change,
    make,
    paper_tables,
    shown,
    side_by_side,
    t_interval,
)
from tiny_models import build_photo_folder, build_tiny_vae
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

import arguments
import latent_lpips_files
import train_lpl_dit


CONFIGS = Path(__file__).parent.parent / "transformer_configs"
SETTINGS = {"steps": 300, "num_samples": 6, "seeds": 2, "jobs": 1, "checkpoints": 1, "train_batch_size": 4}
SETTINGS |= {"size": "small", "learning_rate": 1e-4, "ema_decay": 0.9, "lpl_max_samples": 2, "num_inference_steps": 16}


@pytest.fixture(scope="module")
def toy_models(tmp_path_factory):
    """A tiny random autoencoder, two extractors, a denoiser after two steps, and crops of two classes."""
    folder = tmp_path_factory.mktemp("reproduction")
    models, crops = folder / "models", folder / "crops"
    for kind, seed in (("train", 0), ("held_out", 10)):
        for i, name in enumerate(("brick", "coffee")):
            (build_photo_folder(crops / kind / name, n=6, size=64, seed=seed + i) / "metadata.jsonl").unlink()
    build_tiny_vae().save_pretrained(models / "vae")
    widths = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic"}
    for seed, name in enumerate(("classifier", "random")):
        torch.manual_seed(seed)
        ResNetForImageClassification(ResNetConfig(**widths, num_labels=2)).save_pretrained(models / name)
        ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=1.0).save_pretrained(models / name)
    config, path = json.loads((CONFIGS / "mmdit-tiny.json").read_text()), folder / "config.json"
    path.write_text(json.dumps({**config, "num_layers": 7, "num_classes": 2, "sample_size": 8}))
    flags = ["--transformer_config", path, "--pretrained_vae_model_name_or_path", models / "vae"]
    flags += ["--prediction_type", "epsilon", "--lpl_weight", 0]
    run_script(train_lpl_dit, flags, models / "small-epsilon", None, ("--train_data_dir", crops / "train"), steps=2)
    return models, crops


@pytest.fixture(scope="module")
def runs(toy_models, tmp_path_factory):
    """Where the toys' runs go; they are what the program works on."""
    models, crops = toy_models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "models_of", lambda size: models)
        patch.setitem(reproduction_models.WIDTHS, "small", build_tiny_vae().config.block_out_channels)
        patch.setattr(reproduce, "crops_of", lambda size: crops)
        patch.setattr(reproduce, "RUNS", tmp_path_factory.mktemp("runs"))
        patch.setitem(reproduce.DEFAULTS["small"], "train_batch_size", 4)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield reproduce.RUNS


@pytest.fixture
def experiment(runs):
    def build(arms, prediction_type="epsilon", **settings):
        return Experiment(Namespace(**{**SETTINGS, **settings}), prediction_type, arms)

    return build


@pytest.fixture
def commands(monkeypatch):
    """What would be run: [folder, command], each of which leaves an empty log behind."""
    made = []

    def note(folder, command, *sources, shared=None):
        made.append((folder, command))
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(reproduce, "make", note)
    return made


def value_of(flag, command):
    """What is given last counts."""
    return dict(zip(command, command[1:]))[flag]


# Statistics


def test_the_interval_is_students():
    # mean 2.5, deviation sqrt(5 / 3); the table has 3.182 for 3 degrees of freedom
    middle, reach = t_interval([1.0, 2.0, 3.0, 4.0])
    assert middle == 2.5 and reach == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2, rel=1e-3)
    assert t_interval([7.0]) == (7.0, None)


def test_a_change_is_that_of_pairs():
    # differences -1 and 2 of a baseline of 15: 0.5 is 3.33 %, and its half-width 12.706 * 3 / 2
    middle, reach = change([9.0, 22.0], [10.0, 20.0], relative=True)
    assert middle == pytest.approx(10 / 3) and reach == pytest.approx(12.706 * 1.5 / 0.15, rel=1e-4)
    assert change([9.0, 22.0], [10.0, 20.0], relative=False)[0] == 0.5
    # what the seeds have in common is no uncertainty of the change
    assert change([11.0, 21.0, 1.0], [10.0, 20.0, 0.0], relative=False) == (1.0, 0.0)
    assert change([1.0], [0.0], relative=True) == (None, None)
    with pytest.raises(ValueError):
        change([1.0, 2.0], [1.0], relative=False)


def test_only_a_change_told_from_0_is_bold():
    assert shown((-2.04, 0.51), "+", " %") == "**-2.04 ± 0.51 %**"
    assert shown((0.3, 0.51), "+") == "+0.30 ± 0.51"
    assert shown((2.04, 0.51)) == "2.04 ± 0.51"
    assert shown((2.04, None), "+") == "+2.04"
    assert shown((None, None), "+", " %") == "-"


# Commands


def test_a_command_runs_once_for_the_same_sources(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    (source / "config.json").write_text("1")
    script = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'new').write_text(sys.argv[2]); print(sys.argv[2])"

    def run(word, shared=None):
        make(folder, [sys.executable, "-c", script, str(folder), word], source, shared=shared)
        new = (folder / "new").exists()
        (folder / "new").unlink(missing_ok=True)
        return new

    assert run("a") and not run("a")
    assert run("b"), "another command"
    (source / "config.json").write_text("2")
    assert run("b") and not run("b")
    (folder / "made_by.txt").unlink()
    (folder / "rest").touch()
    assert run("b", shared=tmp_path / "common"), "it was not finished"
    assert not (folder / "rest").exists() and (folder / "common").resolve() == tmp_path / "common"


def test_a_failure_is_told_with_its_log_and_not_taken_for_a_result(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="made.log .*\nno such thing"):
            make(tmp_path / "made", command)


def test_tasks_run_side_by_side_until_one_fails():
    both = threading.Barrier(2, timeout=20)
    side_by_side(2, [both.wait, both.wait])
    done = []

    def fail():
        raise SystemExit("it failed")

    with pytest.raises(SystemExit, match="it failed"):
        side_by_side(1, [lambda: done.append(0), fail, *[lambda: done.append(time.sleep(0.1))] * 5])
    assert 1 <= len(done) < 4


# Arms


def test_every_arm_and_grid_has_flags_that_the_script_takes(experiment, commands, monkeypatch):
    monkeypatch.setattr(latent_lpips_files, "check_latent_lpips", lambda model: None)
    arms = {arm: how for arm, how in (FEW | MORE).items() if not callable(how)}
    grids = ablations.make_grids(300, 0.9, 2, 3)
    arms |= {flags: flags for grid in grids.values() for flags in ablations.flags_of(grid) if flags not in DRAWN}
    for arm in arms:
        experiment(arms).model(arm, seed=1)
    for _, command in commands:
        given = command[command.index("train_lpl_dit.py") + 1 :]
        args = train_lpl_dit.parse_args(given)
        assert args.seed == 1 and args.use_ema and arguments.weight(str(args.lpl_weight)) == args.lpl_weight
    assert len({folder for folder, _ in commands}) == len(set(arms.values()))


def test_blocks_are_at_the_papers_depth(experiment, commands):
    for number, block in ((8, 2), (16, 4), (28, 7)):  # of 7
        experiment(MORE).model(f"self-perceptual, block {number}", 0)
        assert value_of("--sp_layer", commands[-1][1]) == str(block)


def write_log(folder, rates, every=100):
    lines = (json.dumps({"step": i * every, "images_per_second": rate}) for i, rate in enumerate(rates, 1))
    (folder / "train_log.jsonl").write_text("\n".join(lines) + "\n")


def test_l2_gets_the_steps_that_take_the_time_of_lpl(experiment, commands):
    few = experiment(FEW)
    for seed, rates in enumerate(([16, 16, 5], [10, 10, 2])):
        write_log(few.model("l2", seed), [3, 40, 40])
        write_log(few.model("LPL", seed), rates)
        few.model("l2, same time", seed)
        assert value_of("--lpl_weight", commands[-1][1]) == "0"
        assert value_of("--max_train_steps", commands[-1][1]) == ["750", "1200"][seed]


def test_the_time_of_a_step_is_that_after_the_start_of_lpl(experiment, commands):
    late = experiment({"late": "--lpl_start_step 300 --max_train_steps 600"})
    write_log(late.model("late", 0), [40] * 6 + [16, 16, 10, 10, 16, 16], every=50)
    assert late.seconds_per_step("late", 0) == 4 / 16


def test_contrast_is_the_same_model_and_latents_times_1_1(experiment, toy_models, monkeypatch):
    start = toy_models[0] / "small-epsilon"
    few = experiment(FEW)
    monkeypatch.setattr(few, "train", lambda flags, seed: start)
    folder = few.model("l2, latents x 1.1", 0)
    plain, scaled = (AutoencoderKL.from_pretrained(path / "vae") for path in (start, folder))
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = plain.decode(1.1 * latents / plain.config.scaling_factor).sample
        found = scaled.decode(latents / scaled.config.scaling_factor).sample
    torch.testing.assert_close(found, expected)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (start / weights).read_bytes()
    monkeypatch.setattr("shutil.copytree", None)
    assert few.model("l2, latents x 1.1", 0) == folder, "it is not made again"


def test_guidance_is_another_way_to_draw_the_same_model(experiment, commands):
    arms = {name: DRAWN[name] for name in ("l2, guidance 2", "l2, guidance 1.5")} | {"l2": FEW["l2"]}
    guided = experiment(arms, seeds=1)
    guided.run()
    trained = {str(folder) for folder, command in commands if "train_lpl_dit.py" in command}
    scored = {value_of("--guidance_scale", c): c for _, c in commands if "evaluate_lpl.py" in c and "--model" in c}
    assert len(trained) == 1 and set(scored) == {"1", "1.5", "2"}
    assert {value_of("--model", command) for command in scored.values()} == trained
    assert len({guided.score_folder(arm, 0) for arm in arms}) == 3


def test_what_is_drawn_otherwise_is_trained_first_with_what_it_needs(experiment, commands):
    experiment({arm: DRAWN[arm] for arm in ("E-LatentLPIPS, guidance 2", "l2, guidance 2")}, seeds=1).run()
    scripts = [next(word for word in command if word.endswith(".py")) for _, command in commands]
    drawn = [i for i, (_, command) in enumerate(commands) if "--model" in command]
    assert len(drawn) == 2 and "train_latent_classifier.py" in scripts[: drawn[0]]
    assert scripts[: drawn[0]].count("train_lpl_dit.py") >= 2


def test_seeds_take_checkpoints_in_turn_and_missing_ones_are_trained(experiment, commands, toy_models, monkeypatch):
    trained, models = [], toy_models[0]
    monkeypatch.setattr(reproduce, "train_denoiser", lambda *args: trained.append(args))
    one = experiment({"l2": FEW["l2"]}, seeds=3, checkpoints=2)
    other = reproduce.RUNS / "small" / "checkpoints" / "small-epsilon-1"
    assert [one.start(seed) for seed in range(3)] == [models / "small-epsilon", other, models / "small-epsilon"]
    one.run()
    assert trained == [("small", "epsilon", reproduce.DENOISER_STEPS["small"], 1, other)]


def test_each_seed_has_samples_of_its_own_and_the_scores_share_reconstructions(experiment, commands):
    experiment({"before": FEW["before"], "l2": FEW["l2"]}, seeds=3).run()
    scored = [command for _, command in commands if "evaluate_lpl.py" in command and "--model" in command]
    seeds = [int(value_of("--seed", command)) for command in scored]
    assert sorted(set(seeds)) == [0, 10**6, 2 * 10**6] and len(seeds) == 6


def test_training_crops_of_all_classes_are_scored(experiment, commands):
    experiment(FEW, num_samples=6).score_training_crops()
    folder = Path(value_of("--samples", commands[-1][1]))
    files = sorted(folder.iterdir())
    assert [path.name.split("-")[0] for path in files] == ["brick"] * 3 + ["coffee"] * 3
    assert all(path.resolve().parent.parent.name == "train" for path in files)


# Tables


def reports(distance, **more):
    """Of two seeds, the second of which is 2 worse."""
    metrics = [dict.fromkeys(METRICS, 1.0) | {"frechet_distance": d, **more} for d in (distance, distance + 2)]
    return [{"models": [{"metrics": values}]} for values in metrics]


def test_the_papers_changes_are_beside_ours():
    text = paper_tables({"epsilon": {"l2": reports(7.0), "l2, same time": reports(5.0), "LPL": reports(3.0)}})
    assert "| ImageNet-1k, 512 pixels | 4.88 -> 3.79 | -22 % |  |  |" in text
    # of 8 on average, 4 less
    assert "| epsilon: FID | 4.88 -> 3.79 | -22 % | **-50 ± 0 %** | +0 ± 0 % |" in text
    # of 6, 2 less
    assert "**Table 7" in text and "| LPL | 4.62 -> 3.84 | -17 % | **-33.33 ± 0 %** | +0 ± 0 % |" in text
    assert "Table 5" not in text and "v_prediction" not in text


def test_all_arms_have_all_tables():
    found = {arm: reports(4.0) for arm in FEW | MORE}
    text = paper_tables({kind: found for kind in reproduce.TABLE_3})
    assert all(title in text for title in reproduce.PAPER)
    assert "| min-SNR | 4.88 -> 5.04 | +3 % | +0 ± 0 % | +0 ± 0 % |" in text
    assert "| flow_prediction: density | 1.14 -> 1.29 | +13 % | +0 ± 0 % |  |" in text


def test_wrong_and_missing_things_are_one_sentence(runs, monkeypatch, tmp_path, capsys):
    def error(*flags):
        with pytest.raises(SystemExit) as exit:
            reproduce.parse_args(flags)
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert error("--seeds", "0") == f"{Path(sys.argv[0]).name}: error: --seeds 0 must be at least 1."
    assert "--jobs -1 must" in error("--jobs", "-1")
    monkeypatch.setattr(reproduce, "models_of", lambda size: tmp_path)
    assert (
        f"{tmp_path / 'vae'} is missing: make it with `python benchmarks/reproduction_models.py vae --size small`"
        in error()
    )


# End to end


@pytest.fixture
def run(runs, monkeypatch):
    """Runs a program at toy size; returns its Markdown, and the training and scoring commands that it has begun."""
    begun, usual = [], subprocess.run

    def note(command, *args, **settings):
        begun.extend(word for word in command if str(word).endswith(".py"))
        return usual(command, *args, **settings)

    monkeypatch.setattr(subprocess, "run", note)

    def run(program, *flags):
        begun.clear()
        sizes = "--steps 2 --seeds 1 --num_samples 12 --lpl_max_samples 2 --output".split()
        program.main([*sizes, str(runs / "out.md"), *flags])
        return (runs / "out.md").read_text(), sorted(begun)

    return run


@pytest.mark.slow
def test_the_whole_comparison_is_made_once(run, runs, monkeypatch):
    few = {arm: FEW[arm] for arm in ("before", "l2", "LPL", "l2, same time", "l2, latents x 1.1")}
    monkeypatch.setattr(reproduce, "FEW", few)
    monkeypatch.setattr(reproduce, "ARMS", {"few": few})
    text, begun = run(reproduce, "--jobs", "2")
    assert begun == ["evaluate_lpl.py"] * 6 + ["train_lpl_dit.py"] * 3
    folder = runs / "small" / "epsilon"
    report = json.loads((folder / "defaults" / "0-score" / "report.json").read_text())["models"][0]["metrics"]
    row = next(line for line in text.splitlines() if line.startswith("| LPL |")).split(" | ")
    assert float(row[1]) == pytest.approx(report["frechet_distance"], rel=1e-3)
    assert len(list((runs / "small" / "reconstructions").iterdir())) == 2, "of the VAE, and of the scaled one"
    for arm in few:
        assert f"| {arm} |" in text
    assert all((runs / f"out-epsilon-{name}.png").stat().st_size > 10_000 for name in ("spectra", "samples"))

    again, begun = run(reproduce)
    assert begun == [] and again.splitlines()[1:] == text.splitlines()[1:]
    (folder / "before" / "0-score" / "made_by.txt").unlink()
    assert run(reproduce)[1] == ["evaluate_lpl.py"]


@pytest.mark.slow
def test_two_grids_of_the_ablations(run, runs, monkeypatch):
    gate = ablations.Grid(
        "Threshold", ablations.of("lpl_sigma_threshold", (1, 3), 3), ("frechet_distance",), axis="log"
    )
    baselines = {1: FEW["l2"], 1.1: "l2, latents x 1.1"}
    contrast = ablations.Grid("Contrast", {1: "", 1.1: "LPL, latents x 1.1"}, baselines=baselines)
    monkeypatch.setattr(ablations, "make_grids", lambda *sizes: {"gate": gate, "contrast": contrast})
    text, _ = run(ablations)
    assert "| 1 |" in text and "| 3 |" in text
    assert (runs / "out-epsilon-gate.png").stat().st_size > 5_000
    report = json.loads((runs / "small" / "epsilon" / "LPL-latents-x-1.1" / "0-score" / "report.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| 1.1 |")).split(" | ")
    assert float(row[1]) == pytest.approx(report["models"][0]["metrics"]["frechet_distance"], rel=1e-3)
    assert run(ablations, "--grid", "gate")[1] == []
