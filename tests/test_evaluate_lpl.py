"""Models side by side: whole runs of evaluate_lpl.py, whose numbers are computed again by hand from the PNGs."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import named_flags
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from test_features import save, tiny
from test_shards import write_tar
from tiny_models import build_photo_folder, build_tiny_sd, build_tiny_tokenizer

import evaluate_lpl
import features
import metrics
import train_lpl_sd
from arguments import UserError
from comparison import Reference, wants_clip
from data_sources import HubSamples
from features import ClipScorer, load_extractor


ROOT = Path(evaluate_lpl.__file__).parent
SAMPLES, HALVES, K = 8, 6, 2
SMALL = ("--num_samples", SAMPLES, "--num_inference_steps", 2, "--resolution", 64, "--k", K, "--half_samples", HALVES)


def reset():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def parse_words(words):
    return evaluate_lpl.parse_args([str(word) for word in words])


def evaluate(output, *words, small=SMALL, pages=False):
    """Runs the script in this process and returns its report; without `pages` that of numbers alone is written."""
    reset()
    with pytest.MonkeyPatch.context() as patch:
        if not pages:
            patch.setattr(evaluate_lpl, "write_report", write_numbers)
        evaluate_lpl.main(parse_words([*small, "--output_dir", output, *words]))
    return json.loads((output / "report.json").read_text())


def write_numbers(report, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """Folder of a tiny Dinov2 called vit."""
    folder = tmp_path_factory.mktemp("extractors") / "vit"
    return save(folder, tiny("Dinov2Model"), {"height": 28, "width": 28})


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second Stable Diffusion, with other weights in all its parts."""
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def words(photos, extractor):
    return "--reference", photos, "--feature_extractor", extractor


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip"
    build_tiny_tokenizer().save_pretrained(folder)
    return save(folder, tiny("CLIPModel"))


@pytest.fixture(scope="module")
def compared(tiny_sd, other, photos, extractor, clip, tmp_path_factory):
    """Two models, two feature extractors and CLIP: the output folder and the report."""
    folder = tmp_path_factory.mktemp("compared")
    second = save(folder / "resnet", tiny("ResNetModel"))
    words = ("--model", tiny_sd, other, "--names", "before", "after", "--reference", photos, "--clip_model", clip)
    words = (*words, "--feature_extractor", extractor, second)
    return folder / "out", evaluate(folder / "out", *words, pages=True)


def files(output, name):
    return sorted((output / "samples" / name).glob("*.png"))


def pixels(paths):
    """uint8 [N, 3, H, W], by Pillow."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def reference_pixels(folder, size=64):
    """Square pictures, resized as the report says."""
    pictures = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
    resized = [np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def texts(paths):
    return [Image.open(path).text for path in paths]


def models(report):
    return {model["name"]: model for model in report["models"]}


def without(value, *names):
    """A report without what may differ from run to run."""
    if isinstance(value, dict):
        return {key: without(child, *names) for key, child in value.items() if key not in names}
    return [without(child, *names) for child in value] if isinstance(value, list) else value


def same_report(first, second):
    assert without(first, "command") == without(second, "command")


# What the report says


def by_hand(samples, reference, reconstructions, extractors, subsets, captions=None, clip=None):
    """{metric: [S]} by the functions of metrics.py, called directly."""
    found = {}
    for number, name in enumerate(extractors):
        network = load_extractor(name, "cpu")
        suffix = f"_{network.name}" if number else ""
        ours, theirs, rebuilt = (network(images).features for images in (samples, reference, reconstructions))
        for infix, others in (("", theirs), ("_reconstructed", rebuilt)):
            frechet = metrics.frechet_distances(ours, metrics.moments(others), subsets)
            found[f"frechet_distance{infix}{suffix}"] = frechet
            found[f"kernel_distance{infix}{suffix}"] = metrics.kernel_distances(ours, others, subsets)
        for metric, values in metrics.precision_recall_density_coverage(ours, theirs, subsets, K).items():
            found[metric + suffix] = values
    if clip is not None:
        found["clip_score"] = metrics.mean_values(ClipScorer(clip)(samples, captions), subsets)
    found["sharpness"] = metrics.mean_values(metrics.sharpness(samples), subsets)
    power = metrics.radial_power(samples / 127.5 - 1)
    for infix, others in (("", reference), ("_reconstructed", reconstructions)):
        log_power = metrics.radial_log_power(others / 127.5 - 1)
        for name, values in metrics.spectrum_errors(power, log_power, subsets).items():
            found[name.replace("spectrum_error", f"spectrum_error{infix}")] = values
    return found


def reconstructions(output, model, reference):
    """What a model's VAE makes of the reference, by hand, and the PNGs of the run that are nearest to it."""
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    with torch.no_grad():
        latents = vae.encode(reference / 127.5 - 1).latent_dist.mode()
        expected = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
    found = [pixels(sorted(path.glob("*.png"))) for path in (output / "reconstructions").iterdir()]
    return expected, min(found, key=lambda images: (images - expected).abs().max())


def test_the_scores_are_those_of_the_pngs_and_the_centre_crops(compared, tiny_sd, other, photos, extractor, clip):
    output, report = compared
    reference = reference_pixels(photos)
    subsets = metrics.half_samples(SAMPLES, HALVES, 0)
    extractors = (extractor, str(output.parent / "resnet"))
    found = {}
    for name, model in (("before", tiny_sd), ("after", other)):
        paths, rebuilt = files(output, name), reconstructions(output, model, reference)[1]
        assert len(paths) == SAMPLES
        captions = [text["prompt"] for text in texts(paths)]
        values = by_hand(pixels(paths), reference, rebuilt, extractors, subsets, captions, clip)
        found[name], entry = values, models(report)[name]
        assert entry["metrics"].keys() == values.keys()
        for metric, numbers in values.items():
            assert entry["metrics"][metric] == pytest.approx(numbers[0].item(), rel=1e-4, abs=1e-6)
            low, high = metrics.interval(numbers, SAMPLES)
            if low == high:  # the halves say nothing
                assert metric not in entry["intervals"]
                continue
            if metric.startswith(("precision", "recall", "coverage")):
                high = min(high, 1)
            if not metric.startswith(("kernel", "spectrum", "clip")):
                low = max(low, 0)
            assert entry["intervals"][metric] == pytest.approx([low, high], rel=1e-3, abs=1e-5)
    (difference,) = report["differences"]
    assert difference["models"] == ["before", "after"]
    for metric, entry in difference["metrics"].items():
        expected = metrics.difference(found["before"][metric], found["after"][metric], SAMPLES)
        assert entry["difference"] == pytest.approx(expected["difference"], rel=1e-3, abs=1e-6)
        assert entry["interval"] == pytest.approx(expected["interval"], rel=1e-3, abs=1e-5)
    assert report["reference"]["metrics"]["sharpness"] == pytest.approx(metrics.sharpness(reference).mean().item())


def test_spectra_are_drawn_for_each_ring(compared, photos):
    output, report = compared
    reference = metrics.radial_log_power(reference_pixels(photos) / 127.5 - 1)
    ours = metrics.radial_log_power(pixels(files(output, "after")) / 127.5 - 1)
    spectrum = models(report)["after"]["spectrum"]
    np.testing.assert_allclose(spectrum["frequency"], np.arange(1, 33) / 32)
    np.testing.assert_allclose(spectrum["log_power"], ours, rtol=1e-5)
    np.testing.assert_allclose(spectrum["error"], ours - reference, rtol=1e-4, atol=1e-5)
    assert all(low < error < high for low, error, high in zip(*(spectrum[n] for n in ("low", "error", "high"))))
    np.testing.assert_allclose(report["reference"]["spectrum"]["log_power"], reference, rtol=1e-5)


def test_reconstructions_are_the_vaes_mean_decoded_and_scored_like_a_model(compared, tiny_sd, other, photos):
    output, report = compared
    reference = reference_pixels(photos)
    expected, found = zip(*(reconstructions(output, model, reference) for model in (tiny_sd, other)))
    for ours, theirs in zip(expected, found):
        assert (ours - theirs).abs().max() <= 1.01
    assert not torch.equal(*found), "each model has those of its own VAE"
    floor = report["reference"]["reconstructions"]["metrics"]
    assert floor["frechet_distance"] > 0 and not any("reconstructed" in name for name in floor)
    assert any("different VAEs" in note and "not compared" in note for note in report["notes"])
    assert all("kernel_distance_reconstructed" in model["metrics"] for model in report["models"])
    assert not any("reconstructed" in name for name in report["differences"][0]["metrics"])


def test_settings_and_files(compared, extractor):
    output, report = compared
    settings = report["settings"]
    assert (settings["num_samples"], settings["num_reference_samples"]) == (SAMPLES, 10)
    assert (settings["resolution"], settings["seed"], settings["k"]) == (64, 0, K)
    assert [entry["name"] for entry in settings["feature_extractors"]] == ["vit", "resnet"]
    assert (settings["sampler"], settings["prediction_type"]) == ("DDIM", "epsilon")
    assert (settings["guidance_scale"], settings["num_inference_steps"]) == (7.5, 2)  # the former the pipeline's own
    assert "fewer than the 16 features of vit" in " ".join(report["notes"])
    for name in ("report.html", "report.md"):
        assert "before" in (output / name).read_text() and "after" in (output / name).read_text()
    for entry in report["models"]:
        assert (entry["guidance_scale"], entry["num_inference_steps"]) == (7.5, 2)
        assert sorted((output / entry["samples"]).glob("*.png")) == files(output, entry["name"])


def test_what_a_png_says_of_itself(compared):
    output, report = compared
    for name in ("before", "after"):
        for i, (path, text) in enumerate(zip(files(output, name), texts(files(output, name)))):
            assert path.name == f"{i:06d}_seed{i}.png" and text["seed"] == str(i)
            assert (text["num_inference_steps"], text["sampler"]) == ("2", "DDIM")
            assert text["weights"] == models(report)[name]["weights_hash"]
    assert [t["prompt"] for t in texts(files(output, "before"))] == [
        t["prompt"] for t in texts(files(output, "after"))
    ]


# Pairs


def test_a_copy_draws_the_same_images_and_the_differences_are_exactly_0(tiny_sd, words, tmp_path):
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    report = evaluate(tmp_path / "out", "--model", tiny_sd, copy, "--names", "one", "copy", *words)
    images = [pixels(files(tmp_path / "out", name)) for name in ("one", "copy")]
    assert torch.equal(*images) and len(images[0].flatten(1).unique(dim=0)) == SAMPLES
    (difference,) = report["differences"]
    assert "kernel_distance_reconstructed" in difference["metrics"]
    for entry in difference["metrics"].values():
        assert entry == {"difference": 0, "interval": [0, 0], "samples_needed": None}


def test_sample_i_starts_from_the_noise_of_seed_plus_i_and_the_same_prompt(
    tiny_sd, other, words, tmp_path, monkeypatch
):
    seen = []

    def prepare(self, *arguments, **settings):
        seen.append(original(self, *arguments, **settings))
        return seen[-1]

    original = StableDiffusionPipeline.prepare_latents
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", prepare)
    evaluate(tmp_path / "out", "--model", tiny_sd, other, "--seed", 5, "--batch_size", 3, *words)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5 + i)) for i in range(SAMPLES)]
    assert torch.equal(torch.cat(seen), torch.cat([*noise, *noise]))


def test_the_order_of_the_models_turns_the_differences_round(compared, tiny_sd, other, words, tmp_path):
    report = evaluate(tmp_path / "out", "--model", other, tiny_sd, *words)
    forward, back = compared[1]["differences"][0]["metrics"], report["differences"][0]["metrics"]
    assert report["differences"][0]["models"] == ["other", "sd"] and back
    for name, entry in back.items():
        assert entry["difference"] == pytest.approx(-forward[name]["difference"], rel=1e-6, abs=1e-12)
        assert entry["interval"] == pytest.approx(
            [-end for end in forward[name]["interval"][::-1]], rel=1e-6, abs=1e-9
        )
        assert entry["samples_needed"] == forward[name]["samples_needed"]


def close(first, second):
    """Reports of drawings that differ by rounding at most."""
    assert models(first).keys() == models(second).keys()
    for name, model in models(first).items():
        for metric, value in model["metrics"].items():
            others = models(second)[name]["metrics"][metric]
            assert others == pytest.approx(value, rel=0.02, abs=2e-3), metric


def assert_same_images(first, second, name="sd", same_text=True):
    ours, theirs = (pixels(files(output, name)) for output in (first, second))
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert [path.name for path in files(first, name)] == [path.name for path in files(second, name)]
    assert not same_text or texts(files(first, name)) == texts(files(second, name))


def test_the_batch_size_does_not_matter(tiny_sd, words, tmp_path):
    reports = [
        evaluate(tmp_path / str(size), "--model", tiny_sd, *words, "--batch_size", size, "--dataloader_num_workers", n)
        for size, n in ((8, 0), (3, 1))
    ]
    assert_same_images(tmp_path / "8", tmp_path / "3")
    close(*reports)


def launch(processes, output, *words):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    command += [ROOT / "evaluate_lpl.py", *SMALL, "--output_dir", output, *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_sd, other, words, tmp_path):
    words = ("--model", tiny_sd, other, "--batch_size", 3, *words)
    report = evaluate(tmp_path / "one", *words)
    result = launch(2, tmp_path / "two", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("sd", "other"):
        assert_same_images(tmp_path / "one", tmp_path / "two", name)
    close(report, json.loads((tmp_path / "two" / "report.json").read_text()))


@pytest.mark.slow
def test_what_one_of_two_processes_finds_ends_both_with_one_sentence(tiny_sd, words, tmp_path, time_limit):
    output = tmp_path / "two"
    evaluate(output, "--model", tiny_sd, *words)
    path = files(output, "sd")[3]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    result = launch(2, output, "--model", tiny_sd, *words)
    assert result.returncode == 1
    assert result.stderr.count("evaluate_lpl.py: error: ") == 1 and path.name in result.stderr


# Going on


def state(paths):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_what_is_missing_is_drawn_and_the_rest_left_as_it_is(tiny_sd, other, words, tmp_path):
    words = ("--model", tiny_sd, other, "--batch_size", 3, *words)
    report = evaluate(tmp_path / "out", *words)
    drawn = [*files(tmp_path / "out", "sd"), *files(tmp_path / "out", "other")]
    rebuilt = sorted((tmp_path / "out" / "reconstructions").rglob("*.png"))
    before, lost = state([*drawn, *rebuilt]), [drawn[1], drawn[6], drawn[9], rebuilt[2]]
    images = pixels(lost)
    for path in [*lost, tmp_path / "out" / "report.json"]:
        path.unlink()
    again = evaluate(tmp_path / "out", *words)
    after = state([*drawn, *rebuilt])
    assert {path for path in before if before[path] != after[path]} <= set(lost)
    assert (pixels(lost).int() - images.int()).abs().max() <= 1
    close(report, again)


def test_more_samples_go_on_from_those_that_are_there(tiny_sd, words, tmp_path):
    evaluate(tmp_path / "out", "--model", tiny_sd, *words)
    before = state(files(tmp_path / "out", "sd"))
    more = evaluate(tmp_path / "out", "--model", tiny_sd, *words, "--num_samples", 13)
    assert state(before) == before and len(files(tmp_path / "out", "sd")) == 13
    close(more, evaluate(tmp_path / "fresh", "--model", tiny_sd, *words, "--num_samples", 13))
    assert_same_images(tmp_path / "out", tmp_path / "fresh")
    less = evaluate(tmp_path / "out", "--model", tiny_sd, *words)
    assert less["models"][0]["num_samples"] == SAMPLES and len(files(tmp_path / "out", "sd")) == 13


def test_more_samples_of_classes_keep_the_classes_of_those_that_are_there(tiny_pipeline, extractor, photos, tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=reference_pixels(photos).permute(0, 2, 3, 1).numpy())
    words = ("--model", tiny_pipeline("DiT"), "--reference", path, "--feature_extractor", extractor)
    evaluate(tmp_path / "out", *words)
    evaluate(tmp_path / "out", *words, "--num_samples", 12)
    evaluate(tmp_path / "fresh", *words, "--num_samples", 12)
    assert_same_images(tmp_path / "out", tmp_path / "fresh", "DiT")


@pytest.fixture(scope="module")
def begun(tiny_sd, words, tmp_path_factory):
    output = tmp_path_factory.mktemp("begun")
    evaluate(output, "--model", tiny_sd, *words, "--names", "a")
    return output


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("--num_inference_steps 3", "num inference steps"),
        ("--guidance_scale 3", "guidance scale"),
        ("--guidance_rescale 0.5", "guidance rescale"),
        ("--sampler rk4", "sampler"),
        ("--seed 1", "seed"),
        ("--resolution 32", "resolution"),
        ("--mixed_precision bf16", "precision|weights"),
        ("--instance_prompt thing", None),  # all photos have captions of their own
    ],
)
def test_other_settings_in_the_same_folder_are_refused(begun, tiny_sd, words, changed, what):
    before = state(begun.glob("*/*/*.png"))
    run = ("--model", tiny_sd, *words, "--names", "a", *changed.split())
    if what is None:
        evaluate(begun, *run)
    else:
        with pytest.raises(UserError, match=f"{what}.*choose another --output_dir"):
            evaluate(begun, *run)
    assert state(before) == before


def test_another_model_or_reference_in_the_same_folder_is_refused(begun, tiny_sd, other, words, photos, tmp_path):
    before = state(begun.glob("*/*/*.png"))
    with pytest.raises(UserError, match="choose another --output_dir"):
        evaluate(begun, "--model", other, *words, "--names", "a")
    fewer = ("--max_reference_samples", 6)
    captions = shutil.copytree(photos, tmp_path / "captions")
    for path in captions.glob("*.png"):
        path.with_suffix(".txt").write_text("another")
    (captions / "metadata.jsonl").unlink()
    for words in ((*words, *fewer), ("--reference", captions, *words[2:])):
        with pytest.raises(UserError, match="choose another --output_dir"):
            evaluate(begun, "--model", tiny_sd, *words, "--names", "a")
    assert state(before) == before


def test_another_scheduler_in_the_same_folder_is_refused(begun, tiny_sd, words, tmp_path):
    changed = shutil.copytree(tiny_sd, tmp_path / "changed")
    path = changed / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    message = refused(begun, "--model", changed, *words, "--names", "a")
    assert "samples/a has images made with other scheduler" in message and "choose another --output_dir" in message


@pytest.mark.parametrize("content", [None, "", "[]"])
def test_images_that_do_not_say_how_they_were_made_are_refused(begun, tiny_sd, words, tmp_path, content):
    output = shutil.copytree(begun, tmp_path / "out")
    path = output / "samples" / "a" / "settings.json"
    path.unlink() if content is None else path.write_text(content)
    message = refused(output, "--model", tiny_sd, *words, "--names", "a")
    assert f"{path.parent} has images that do not say how they were made" in message


def test_reconstructions_of_another_reference_are_refused(tiny_pipeline, photos, extractor, tmp_path):
    """Of as many images of the same size, in a file of the same name; and of another column of the same dataset."""
    array = reference_pixels(photos).permute(0, 2, 3, 1).numpy()
    path, output = tmp_path / "images.npz", tmp_path / "npz"
    np.savez(path, arr_0=array)
    words = ("--model", tiny_pipeline("DiT"), "--feature_extractor", extractor, "--reference")
    evaluate(output, *words, path)
    before = state(output.glob("*/*/*.png"))
    np.savez(path, arr_0=255 - array)
    message = refused(output, *words, path)
    assert "reconstructions/" in message and "made with other reference: choose another --output_dir" in message
    pictures = [str(file) for file in sorted(photos.glob("*.png"))]
    columns = {"image": pictures, "other": pictures[::-1], "label": [0] * len(pictures)}
    dataset = datasets.Dataset.from_dict(columns)
    for column in ("image", "other"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(tmp_path / "data")
    evaluate(tmp_path / "columns", *words, tmp_path / "data", "--image_column", "image")
    message = refused(tmp_path / "columns", *words, tmp_path / "data", "--image_column", "other")
    assert "made with other reference" in message
    assert state(output.glob("*/*/*.png")) == before


def test_images_in_memory_are_known_by_what_they_are():
    def identity(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        features = datasets.Features(image=datasets.Image(decode=False))
        dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]}, features)
        samples = HubSamples(dataset, "image", [], np.arange(3))
        assert samples.files_identity() is None
        return Reference.identity(SimpleNamespace(stream=SimpleNamespace(samples=samples), image_column=None))

    assert identity(0) == identity(0) != identity(1)


def test_other_captions_of_the_same_images_are_refused(tiny_sd, photos, extractor, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"other": f"{row['text']}, in winter"}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    words = ("--model", tiny_sd, "--reference", folder, "--feature_extractor", extractor, "--caption_column")
    evaluate(tmp_path / "out", *words, "text")
    before = state((tmp_path / "out").glob("*/*/*.png"))
    with pytest.raises(UserError, match="samples/sd .*prompts.*choose another --output_dir"):
        evaluate(tmp_path / "out", *words, "other")
    assert state(before) == before


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_finds_the_same(tiny_sd, words, tmp_path, time_limit):
    words = [*words, "--batch_size", 2, "--num_inference_steps", 60, "--num_samples", 12, "--model", tiny_sd]
    command = [sys.executable, ROOT / "evaluate_lpl.py", *SMALL, "--output_dir", tmp_path / "out", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)
        while len(files(tmp_path / "out", "sd")) < 4 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = state(files(tmp_path / "out", "sd"))
    assert 4 <= len(before) < 12, (tmp_path / "log").read_text()[-2000:]
    report = evaluate(tmp_path / "out", *words)
    assert state(before) == before and len(files(tmp_path / "out", "sd")) == 12
    same_report(report, evaluate(tmp_path / "fresh", *words))


# Sweeps


def test_sweeps_over_steps_and_guidance(tiny_sd, other, words, tmp_path):
    sweep = ("--num_inference_steps", 1, 2, "--guidance_scale", 1, 2.5)
    report = evaluate(tmp_path / "out", "--model", tiny_sd, other, *words, *sweep)
    settings = [(steps, scale) for steps in (1, 2) for scale in (1, 2.5)]
    expected = {
        f"{model}, {steps} steps, guidance {scale}": (model, steps, scale)
        for model in ("sd", "other")
        for steps, scale in settings
    }
    found = {m["name"]: (m["model"], m["num_inference_steps"], m["guidance_scale"]) for m in report["models"]}
    assert found == expected
    folders = {model["samples"] for model in report["models"]}
    assert folders == {f"samples/{m}_{n}-steps_guidance-{s}" for m, n, s in expected.values()}
    for model in report["models"]:
        paths = sorted((tmp_path / "out" / model["samples"]).glob("*.png"))
        text = texts(paths)[0]
        assert len(paths) == SAMPLES
        assert (text["num_inference_steps"], float(text["guidance_scale"])) == (
            str(model["num_inference_steps"]),
            model["guidance_scale"],
        )
    pairs = [entry["models"] for entry in report["differences"]]
    assert pairs == [[name, name.replace("sd", "other")] for name in expected if name.startswith("sd")]
    alone = evaluate(tmp_path / "alone", "--model", tiny_sd, *words, "--guidance_scale", 2.5)["models"][0]
    assert alone["name"] == "sd"
    assert alone["metrics"] == pytest.approx(models(report)["sd, 2 steps, guidance 2.5"]["metrics"], rel=1e-6)


# What is compared with


def test_folders_of_samples_have_the_scores_of_the_models_that_drew_them(compared, words, tmp_path):
    output, drawn = compared
    folders = [output / "samples" / name for name in ("before", "after")]
    report = evaluate(tmp_path / "out", "--samples", *folders, *words, small=("--k", K, "--half_samples", HALVES))
    for name, model in models(report).items():
        assert model["metrics"] == pytest.approx({m: models(drawn)[name]["metrics"][m] for m in model["metrics"]})
        assert "kernel_distance" in model["metrics"] and "clip_score" not in model["metrics"]
    ours, theirs = report["differences"][0], drawn["differences"][0]
    assert ours["models"] == theirs["models"]
    for metric, entry in ours["metrics"].items():
        expected = theirs["metrics"][metric]
        assert entry["difference"] == pytest.approx(expected["difference"], rel=1e-6, abs=1e-9)
        assert entry["interval"] == pytest.approx(expected["interval"], rel=1e-6, abs=1e-9)
    assert report["reference"]["reconstructions"] is None
    assert "taken from the order of their names." in " ".join(report["notes"])


def test_samples_drawn_here_say_their_captions_to_clip(compared, photos, words, clip, tmp_path):
    output, drawn = compared
    words, small = (*words, "--clip_model", clip), ("--k", K, "--half_samples", HALVES)
    report = evaluate(tmp_path / "out", "--samples", output / "samples" / "after", *words, small=small)
    expected = models(drawn)["after"]["metrics"]["clip_score"]
    assert report["models"][0]["metrics"]["clip_score"] == pytest.approx(expected) and expected > 0
    message = refused(tmp_path / "other", "--samples", photos, *words, small=small)
    assert "photo_0000.png has no text `prompt`" in message and "--clip_model" in message


def test_an_enlarged_reference_is_noted(photos, words, tmp_path):
    larger = build_photo_folder(tmp_path / "larger", n=8, size=80)
    small = ("--k", K, "--half_samples", HALVES)
    report = evaluate(tmp_path / "out", "--samples", larger, *words, small=small)
    assert "10 of the 10 reference images are smaller than 80 pixels" in " ".join(report["notes"])
    report = evaluate(tmp_path / "out", "--samples", photos, *words, small=small)
    assert "enlarged" not in " ".join(report["notes"])


def test_images_count_once_however_many_rows_they_have(photos, words, tmp_path):
    """Else they are each other's nearest neighbours."""
    rows = (photos / "metadata.jsonl").read_text().splitlines()
    larger, reports = build_photo_folder(tmp_path / "larger", n=8, size=80, seed=1), []
    folder = shutil.copytree(photos, tmp_path / "photos")
    for count in (1, 3, 6):
        (folder / "metadata.jsonl").write_text("\n".join(rows * count))
        run = ("--samples", larger, "--reference", folder, *words[2:])
        reports.append(evaluate(tmp_path / str(count), *run, small=("--k", K, "--half_samples", HALVES)))
        same_report(without(reports[-1], "samples"), without(reports[0], "samples"))
    assert reports[0]["settings"]["num_reference_samples"] == 10
    noted = " ".join(reports[0]["notes"])
    assert "doubles" not in noted and "10 of the 10 reference images are smaller than 80 pixels" in noted


def test_equal_files_are_noted(photos, words, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns("metadata.jsonl"))
    shutil.copy(folder / "photo_0001.png", folder / "again.png")
    run = ("--samples", photos, "--reference", folder, *words[2:], "--batch_size", 3)
    report = evaluate(tmp_path / "out", *run, small=("--k", K, "--half_samples", HALVES))
    assert "1 of the 11 reference images are doubles" in " ".join(report["notes"])


def numbers(value):
    """All of a report's numbers."""
    if isinstance(value, (dict, list)):
        return [
            number for child in (value.values() if isinstance(value, dict) else value) for number in numbers(child)
        ]
    return [value] if isinstance(value, (int, float)) else []


def test_a_reference_of_one_colour_gives_finite_numbers(photos, words, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(8):
        Image.new("RGB", (72, 72), (128, 128, 128)).save(tmp_path / "flat" / f"{i}.png")
    run = ("--samples", photos, "--reference", tmp_path / "flat", *words[2:])
    report = evaluate(tmp_path / "out", *run, small=("--k", K, "--half_samples", HALVES))
    assert "spectrum_error" in report["models"][0]["metrics"]
    assert np.isfinite(numbers(report)).all()


def test_folders_whose_names_differ_are_noted(photos, words, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved", ignore=shutil.ignore_patterns("*.jsonl", "photo_0003.png"))
    run = ("--samples", photos, moved, *words, "--num_samples", 9)
    report = evaluate(tmp_path / "out", *run, small=("--k", K, "--half_samples", HALVES))
    assert "photo_0003 is compared with photo_0004." in " ".join(report["notes"])


def test_a_model_can_be_compared_with_its_own_weights_beside_the_average(tiny_sd, other, words, tmp_path):
    """The two kinds of weights, each as a model of its own: what the same model draws then."""
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    both, raw = (shutil.copytree(tiny_sd, tmp_path / name) for name in ("both", "other"))
    shutil.copy(other / weights, both / weights.with_suffix(".non_ema.safetensors"))
    shutil.copy(other / weights, raw / weights)
    report = evaluate(tmp_path / "out", "--model", both, "--weights", "ema", "raw", *words)
    alone = evaluate(tmp_path / "alone", "--model", tiny_sd, raw, "--names", "both", "both-raw", *words)
    assert list(models(report)) == ["both", "both-raw"]
    for name in models(report):
        assert_same_images(tmp_path / "out", tmp_path / "alone", name, same_text=False)
    close(report, alone)
    assert report["differences"][0]["metrics"]["frechet_distance"]["difference"] != 0


def test_with_a_vae_the_reference_of_such_folders_is_reconstructed_too(compared, tiny_sd, words, tmp_path):
    output, drawn = compared
    vae = ("--pretrained_vae_model_name_or_path", tiny_sd / "vae", "--num_samples", SAMPLES)
    small = ("--k", K, "--half_samples", HALVES)
    report = evaluate(tmp_path / "out", "--samples", output / "samples" / "before", *words, *vae, small=small)
    expected = {
        m: value for m, value in models(drawn)["before"]["metrics"].items() if m in models(report)["before"]["metrics"]
    }
    assert models(report)["before"]["metrics"] == pytest.approx(expected, rel=1e-5)
    assert "kernel_distance_reconstructed" in expected
    assert report["differences"] == []


def test_captions_are_those_of_the_reference_in_an_order_of_the_seed(photos, tiny_sd, words, tmp_path):
    own = [json.loads(line)["text"] for line in (photos / "metadata.jsonl").read_text().splitlines()]
    orders = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        evaluate(output, "--model", tiny_sd, *words, "--seed", seed, "--num_samples", 13)
        orders.append([text["prompt"] for text in texts(files(output, "sd"))])
        assert sorted(orders[-1][:10]) == sorted(own) and orders[-1][10:] == orders[-1][:3]
    assert orders[0] != orders[1] and own not in [order[:10] for order in orders]


def test_a_folder_with_a_sub_folder_for_each_class_gives_the_labels(tiny_pipeline, class_folders, extractor, tmp_path):
    words = ("--model", tiny_pipeline("DiT"), "--reference", class_folders, "--feature_extractor", extractor)
    report = evaluate(tmp_path / "out", *words)
    labels = [text["prompt"] for text in texts(files(tmp_path / "out", "DiT"))]
    assert sorted(labels) == ["207"] * 4 + ["980"] * 4 and labels != sorted(labels)
    assert report["settings"]["num_reference_samples"] == 8
    assert "clip_score" not in report["models"][0]["metrics"]


@pytest.fixture(scope="module")
def nameless(tiny_pipeline, tmp_path_factory):
    """The tiny DiT without names of its classes."""
    folder = shutil.copytree(tiny_pipeline("DiT"), tmp_path_factory.mktemp("models") / "nameless")
    path = folder / "model_index.json"
    index = {name: value for name, value in json.loads(path.read_text()).items() if name != "id2label"}
    path.write_text(json.dumps(index))
    return folder


def labels_drawn(output, name):
    return [text["prompt"] for text in texts(files(output, name))]


def test_class_names_may_be_known_to_the_second_model_alone(
    nameless, tiny_pipeline, class_folders, extractor, tmp_path
):
    models = ("--model", nameless, tiny_pipeline("DiT"))
    report = evaluate(tmp_path / "out", *models, "--reference", class_folders, "--feature_extractor", extractor)
    for name in ("nameless", "DiT"):
        assert sorted(labels_drawn(tmp_path / "out", name)) == ["207"] * 4 + ["980"] * 4
    assert "numbered" not in " ".join(report["notes"])


def test_class_names_that_no_model_knows(nameless, tiny_pipeline, photos, extractor, tmp_path):
    """Refused, unless the models know none; numbers mean themselves."""
    folders = {"names": ("cats", "dogs"), "numbers": ("3", "30")}
    for kind, classes in folders.items():
        for start, name in zip((0, 5), classes):
            (tmp_path / kind / name).mkdir(parents=True)
            for i in range(start, start + 5):
                shutil.copy(photos / f"photo_{i:04d}.png", tmp_path / kind / name)
    words = ("--feature_extractor", extractor, "--reference")
    message = refused(tmp_path / "out", "--model", tiny_pipeline("DiT"), *words, tmp_path / "names")
    assert "no class cats" in message and "--reference" in message
    for kind, labels, is_noted in (("names", {"0", "1"}, True), ("numbers", {"3", "30"}, False)):
        output = tmp_path / f"out-{kind}"
        report = evaluate(output, "--model", nameless, *words, tmp_path / kind)
        assert set(labels_drawn(output, "nameless")) == labels
        assert ("numbered in the order of theirs" in " ".join(report["notes"])) == is_noted


def test_a_dataset_that_was_saved_and_one_of_its_splits(photos, tiny_sd, words, extractor, tmp_path):
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    columns = {"image": [str(photos / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    splits = {"train": dataset.select([0, 1, 2]), "validation": dataset}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    from_folder = evaluate(tmp_path / "folder", "--model", tiny_sd, *words)
    words = ("--reference", tmp_path / "data", "--reference_split", "validation", "--feature_extractor", extractor)
    report = evaluate(tmp_path / "out", "--model", tiny_sd, *words)
    assert report["models"][0]["metrics"] == pytest.approx(from_folder["models"][0]["metrics"], rel=1e-6)
    assert_same_images(tmp_path / "folder", tmp_path / "out")


def test_tar_shards(photos, tiny_sd, words, extractor, tmp_path):
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    members = [
        [
            (row["file_name"], (photos / row["file_name"]).read_bytes()),
            (f"{Path(row['file_name']).stem}.txt", row["text"]),
        ]
        for row in rows
    ]
    for number, part in enumerate((members[:6], members[6:])):
        write_tar(tmp_path / f"{number:02d}.tar", [member for sample in part for member in sample])
    from_folder = evaluate(tmp_path / "folder", "--model", tiny_sd, *words)
    words = ("--reference", tmp_path / "{00..01}.tar", "--feature_extractor", extractor)
    report = evaluate(tmp_path / "out", "--model", tiny_sd, *words)
    assert report["models"][0]["metrics"] == pytest.approx(from_folder["models"][0]["metrics"], rel=1e-6)
    assert_same_images(tmp_path / "folder", tmp_path / "out")


def test_fewer_images_of_the_reference_are_drawn_with_the_seed(photos, tiny_sd, words, tmp_path):
    report = evaluate(tmp_path / "out", "--model", tiny_sd, *words, "--max_reference_samples", 5)
    assert report["settings"]["num_reference_samples"] == 5
    rebuilt = sorted((tmp_path / "out" / "reconstructions").rglob("*.png"))
    captions = {text["prompt"] for text in texts(files(tmp_path / "out", "sd"))}
    assert len(rebuilt) == len(captions) == 5


def test_statistics_that_were_written_are_the_reference_they_came_from(compared, extractor, tmp_path):
    output, drawn = compared
    path = output / "statistics" / "reference_vit.npz"
    small = ("--k", K, "--half_samples", HALVES)
    words = ("--reference", path, "--feature_extractor", extractor)
    report = evaluate(tmp_path / "out", "--samples", output / "samples" / "after", *words, small=small)
    (model,) = report["models"]
    assert model["metrics"].keys() == {"frechet_distance", "sharpness"}
    assert model["metrics"]["frechet_distance"] == pytest.approx(models(drawn)["after"]["metrics"]["frechet_distance"])
    assert report["settings"]["num_reference_samples"] is None and report["reference"]["spectrum"] is None


def test_statistics_of_another_network_of_the_same_name_are_refused(compared, photos, tmp_path):
    model = tiny("Dinov2Model")
    model.layernorm.bias.data += 0.1
    other = save(tmp_path / "vit", model, {"height": 28, "width": 28})
    path = compared[0] / "statistics" / "reference_vit.npz"
    words = ("--samples", photos, "--reference", path, "--feature_extractor", other)
    message = refused(tmp_path / "out", *words, small=("--k", K))
    assert f"--reference {path}" in message and "by a network with other weights" in message
    assert "--feature_extractor" in message


def test_images_in_an_npz_are_a_reference(compared, photos, extractor, tmp_path):
    output, drawn = compared
    np.savez(tmp_path / "images.npz", arr_0=reference_pixels(photos).permute(0, 2, 3, 1).numpy())
    words = ("--reference", tmp_path / "images.npz", "--feature_extractor", extractor)
    small = ("--k", K, "--half_samples", HALVES)
    report = evaluate(tmp_path / "out", "--samples", output / "samples" / "after", *words, small=small)
    expected = models(drawn)["after"]["metrics"]
    found = report["models"][0]["metrics"]
    assert found == pytest.approx({name: expected[name] for name in found}) and "recall" in found


# Names


def test_names_come_from_the_folders(tiny_sd, words, tmp_path, monkeypatch):
    folder = tmp_path / "ein Modell, größer (2)"
    folder.mkdir()
    shutil.copytree(tiny_sd, folder / "result")
    shutil.copytree(tiny_sd, tmp_path / "result")
    monkeypatch.chdir(tmp_path)
    args = parse_words(["--model", f"{folder.name}/result/", "./result", *words, "--output_dir", "out/"])
    assert len(set(args.names)) == 2
    assert all(name.endswith("result") and not set(name) & set("/ ,()") for name in args.names)
    shutil.copytree(folder, tmp_path / "Ñandú, 2")
    model = str(Path("Ñandú, 2", "result"))
    report = evaluate(Path("out here, ja"), "--model", model, "--names", "Ñandú 2,5", *words)
    (entry,) = report["models"]
    assert entry["name"] == "Ñandú-2-5"
    assert len(list(Path("out here, ja", entry["samples"]).glob("*.png"))) == SAMPLES
    assert str(tmp_path) not in json.dumps(report)


# Bad input


@pytest.fixture(scope="module")
def known_flags():
    """Every flag of the script."""
    found = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(evaluate_lpl.Parser, "parse_args", lambda parser, argv: next(found.append(parser) or iter(())))
        evaluate_lpl.parse_args([])
    return set(found[0]._option_string_actions)


@pytest.fixture
def parse(words, tmp_path):
    def run(*given):
        return parse_words([*words, "--output_dir", tmp_path / "out", *given])

    return run


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def flag_refusals(sd, photos, tmp_path):
    """Flags and what the sentence says."""
    lora, alone, file, empty = (tmp_path / name for name in ("lora", "alone", "file.txt", "empty"))
    for folder in (lora, alone / "unet", empty):
        folder.mkdir(parents=True)
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (alone / "unet" / "config.json").write_text("{}")
    file.write_text("")
    model, samples = ("--model", sd), ("--samples", photos)
    return [
        ((), "either --model, to draw samples, or --samples"),
        ((*model, *samples), "either --model, to draw samples, or --samples"),
        ((*model, "--lora", lora, lora, "--model", sd, sd, sd), "--lora has 2 entries and --model 3"),
        ((*model, "--lora", empty), "holds no LoRA"),
        ((*model, "--lora", tmp_path / "no"), f"there is no folder {tmp_path / 'no'}"),
        (("--model", tmp_path / "no"), f"there is no folder {tmp_path / 'no'}"),
        (("--model", lora), "holds a LoRA: give its base as --model, and this as --lora"),
        (("--model", empty), "holds no model: name the --output_dir of a finished training"),
        (("--model", file), "holds no model"),
        (("--model", alone), "add --base_model"),
        ((*model, "--base_model", sd), "--base_model has no effect"),
        (("--model", sd, sd), "tell them apart with --names"),
        (("--model", sd, sd, "--names", "a", "a"), "tell them apart with --names"),
        (("--model", sd, sd, "--names", "a"), "--names needs 2 names"),
        (("--model", sd, f"{sd}/"), "tell them apart with --names"),
        (("--samples", empty), f"--samples {empty} is no folder with images"),
        (("--samples", tmp_path / "no"), "is no folder with images"),
        ((*samples, "--lora", lora), "--lora has no effect with --samples"),
        ((*samples, "--sampler", "rk4"), "--sampler has no effect with --samples"),
        ((*samples, "--resolution", 64), "--resolution has no effect with --samples"),
        ((*samples, "--num_inference_steps=3"), "--num_inference_steps has no effect with --samples"),
        ((*model, "--reference", tmp_path / "no"), "there is no such file or folder"),
        ((*model, "--reference", tmp_path / "no.npz"), "there is no such file"),
        ((*model, "--output_dir", file), f"--output_dir {file} is a file: name a folder"),
        ((*model, "--num_samples", 0), "--num_samples 0 must be at least 1"),
        ((*model, "--guidance_scale", 2, -1), "--guidance_scale -1.0 must be at least 0"),
        ((*model, "--guidance_scale", 2, 2), "--guidance_scale has a value twice"),
        ((*model, "--num_inference_steps", 0), "--num_inference_steps 0 must be at least 1"),
        ((*model, "--half_samples", 1), "--half_samples 1 must be at least 2"),
        ((*model, "--feature_extractor", tmp_path / "no"), "--feature_extractor"),
        ((*model, "--feature_extractor", "resnet"), "neither a folder nor a Hub id"),
        ((*model, "--clip_model", empty), "--clip_model"),
        ((*model, "--seed", 2**64), f"--seed {2**64} is too large"),
        ((*model, "--output_dir", photos / "out"), "lies in"),
        ((*model, "--output_dir", file / "out"), f"--output_dir {file / 'out'} can't be written"),
        ((*model, "--reference_split", "test"), "--reference_split has no effect on --reference"),
    ]


CASES = range(36)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_flag_is_refused_with_a_remedy(refuse, tiny_sd, photos, tmp_path, case):
    cases = flag_refusals(tiny_sd, photos, tmp_path)
    assert len(cases) == len(CASES)
    flags, sentence = cases[case]
    message = refuse(*map(str, flags))
    assert sentence in message and message.rstrip().endswith(".")


def test_the_commands_of_the_readme_are_accepted(tiny_sd, photos, extractor, tmp_path, monkeypatch):
    """With folders in the place of those that it names."""
    monkeypatch.chdir(tmp_path)
    there = {"--model": tiny_sd, "--reference": photos, "--feature_extractor": extractor}
    blocks = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```bash")[1:]]
    commands = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "evaluate_lpl.py" in line
    ]
    assert commands
    for command in commands:
        words = shlex.split(command)
        words, flag = words[words.index("evaluate_lpl.py") + 1 :], None
        for word in words:
            flag = word if word.startswith("--") else flag
            if flag in there and word != flag and not Path(word).exists():
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).symlink_to(there[flag])
        args = parse_words(words)
        assert args.entries and args.reference_kind == "train_data_dir"


def test_the_readme_names_flags_that_there_are(known_flags, monkeypatch):
    """Of this script or, where models come from, of training."""
    monkeypatch.setattr(train_lpl_sd, "parse_and_check", lambda parser, argv: parser)
    training = set(train_lpl_sd.parse_args()._option_string_actions)
    (section,) = re.findall(r"\n## Is it better\?\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    named = named_flags(section)
    assert "--half_samples" in named and named <= known_flags | training


def test_a_flag_that_is_not_there_is_told_with_one_like_it(refuse, tiny_sd):
    assert "there is no flag --guidance; is --guidance_scale meant?" in refuse("--model", tiny_sd, "--guidance", 2)


@pytest.mark.parametrize("there", [True, False])
def test_by_default_dinov2_comes_first_and_inception_if_it_is_installed(
    tiny_sd, photos, tmp_path, monkeypatch, capsys, there
):
    for module in (evaluate_lpl, features):
        monkeypatch.setattr(module, "inception_available", lambda: there)
    args = parse_words(["--model", tiny_sd, "--reference", photos, "--output_dir", tmp_path / "out"])
    assert args.feature_extractor == ["dinov2", "inception"][: 1 + there]
    assert ("Inception's metrics are left out" in capsys.readouterr().err) != there
    assert args.clip_model is None and wants_clip(args, [SimpleNamespace(num_classes=None)])
    assert args.clip_model == "openai/clip-vit-large-patch14"
    assert not wants_clip(args, [SimpleNamespace(num_classes=1000)])


def test_a_wrong_flag_is_told_before_libraries_are_loaded(words, tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / "evaluate_lpl.py", "--model", tmp_path / "no", *words]
    command = [str(word) for word in (*command, "--output_dir", tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "torch" not in result.stderr
    assert f"there is no folder {tmp_path / 'no'}" in result.stderr.splitlines()[-1]


def refused(output, *words, small=SMALL):
    """The sentence that ends the run, before any sample is drawn."""
    reset()
    args = parse_words([*small, "--output_dir", output, *words])
    with pytest.raises(UserError) as error:
        evaluate_lpl.main(args)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message
    return message


@pytest.fixture
def nothing_drawn(monkeypatch):
    monkeypatch.setattr("sampling.draw_batch", lambda *arguments: pytest.fail("it draws"))


def test_too_few_samples_or_images(tiny_sd, words, photos, extractor, tmp_path, nothing_drawn):
    model = ("--model", tiny_sd, *words)
    message = refused(tmp_path / "out", *model, "--num_samples", 5)
    assert "--num_samples" in message and "--k 2" in message and "at least 6" in message
    message = refused(tmp_path / "out", *model, "--max_reference_samples", 2)
    assert "--reference" in message and "at least 3" in message
    three = tmp_path / "three"
    shutil.copytree(photos, three, ignore=shutil.ignore_patterns("*_000[3-9].png", "metadata.jsonl"))
    message = refused(tmp_path / "out", "--samples", three, *words, small=("--k", K))
    assert "--samples are 3" in message and "at least 6" in message
    evaluate(tmp_path / "enough", "--samples", photos, *words, small=("--k", 4, "--half_samples", HALVES))


def test_an_odd_number_of_samples_may_be_just_enough(photos, words, tmp_path):
    small = ("--k", K, "--half_samples", HALVES, "--num_samples", 7)
    report = evaluate(tmp_path / "out", "--samples", photos, *words, small=small)
    model = report["models"][0]
    assert model["metrics"]["precision"] == 1 and "precision" not in model["intervals"], "all halves agree"
    assert "frechet_distance" in model["intervals"]


def test_samples_of_several_sizes_or_numbers(photos, words, tmp_path):
    small = build_photo_folder(tmp_path / "small", n=10, size=48)
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    shutil.copy(small / "photo_0003.png", mixed / "photo_0003.png")
    message = refused(tmp_path / "out", "--samples", mixed, *words, small=())
    assert "48 x 48" in message and "72 x 72" in message and "photo_0003.png" in message
    message = refused(tmp_path / "out", "--samples", photos, small, *words, small=())
    assert "48 x 48" in message and "72 x 72" in message
    fewer = build_photo_folder(tmp_path / "fewer", n=9, size=72)
    message = refused(tmp_path / "out", "--samples", photos, fewer, *words, small=())
    assert "--num_samples" in message and "9 images" in message
    message = refused(tmp_path / "out", "--samples", photos, *words, "--num_samples", 11, small=())
    assert "10 images, fewer than --num_samples 11" in message
    wide = build_photo_folder(tmp_path / "wide", n=10, size=(72, 64))
    assert "squares" in refused(tmp_path / "out", "--samples", wide, *words, small=())


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_damaged_sample_is_named(photos, words, tmp_path, content):
    folder = shutil.copytree(photos, tmp_path / "damaged")
    path = folder / "photo_0004.png"
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    message = refused(tmp_path / "out", "--samples", folder, *words, small=("--k", K))
    assert str(path) in message and "repair or remove it" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_of_ones_own_is_drawn_again_when_it_was_removed(tiny_sd, words, tmp_path, workers):
    report = evaluate(tmp_path / "out", "--model", tiny_sd, *words)
    path = files(tmp_path / "out", "sd")[5]
    whole = pixels([path])
    path.write_bytes(path.read_bytes()[:-300])
    message = refused(tmp_path / "out", "--model", tiny_sd, *words, "--dataloader_num_workers", workers)
    assert str(path) in message and "remove it, and the same command draws it again" in message
    path.unlink()
    close(report, evaluate(tmp_path / "out", "--model", tiny_sd, *words))
    assert (pixels([path]).int() - whole.int()).abs().max() <= 1


def test_features_that_are_not_finite_name_the_image(photos, words, tmp_path, monkeypatch):
    def networks(name, *arguments):
        network = load_extractor(name, *arguments)

        class Broken(type(network)):
            def __call__(self, images):
                found = super().__call__(images)
                dark = images.float().mean(dim=(1, 2, 3)) == images.float().mean(dim=(1, 2, 3)).min()
                return found._replace(features=found.features.masked_fill(dark[:, None], torch.nan))

        network.__class__ = Broken
        return network

    monkeypatch.setattr(evaluate_lpl, "load_extractor", networks)
    darkest = min(photos.glob("*.png"), key=lambda path: np.asarray(Image.open(path)).mean())
    message = refused(tmp_path / "out", "--samples", photos, *words, small=("--k", K, "--batch_size", 10))
    assert str(darkest) in message and "not finite" in message and "--feature_extractor vit" in message


def test_networks_out_of_reach_are_told_before_anything_is_drawn(tiny_sd, photos, words, tmp_path, nothing_drawn):
    run = ("--model", tiny_sd, "--reference", photos)
    message = refused(tmp_path / "out", *run, "--feature_extractor", "nobody/nothing")
    assert "--feature_extractor nobody/nothing can't be loaded" in message
    message = refused(tmp_path / "out", "--model", tiny_sd, *words, "--clip_model", "nobody/nothing")
    assert "--clip_model nobody/nothing can't be loaded" in message
    message = refused(tmp_path / "out", "--model", "nobody/nothing", *words)
    assert "--model nobody/nothing can't be loaded" in message


def test_models_that_do_not_draw_the_same(tiny_sd, tiny_pipeline, class_folders, extractor, tmp_path, nothing_drawn):
    reference = ("--reference", class_folders, "--feature_extractor", extractor)
    dit = tiny_pipeline("DiT")
    message = refused(tmp_path / "out", "--model", dit, tiny_sd, *reference)
    assert "1000 classes" in message and "captions" in message
    renamed = shutil.copytree(dit, tmp_path / "renamed")
    index = json.loads((renamed / "model_index.json").read_text())
    index["id2label"]["980"] = "hill"
    (renamed / "model_index.json").write_text(json.dumps(index))
    message = refused(tmp_path / "out", "--model", dit, renamed, *reference)
    assert "class 980" in message and "volcano" in message and "hill" in message
    larger = build_tiny_sd(tmp_path / "larger", sample_size=16)
    small = [word for i, word in enumerate(SMALL) if "--resolution" not in SMALL[max(0, i - 1) : i + 1]]
    message = refused(tmp_path / "out", "--model", tiny_sd, larger, *reference, small=small)
    assert "64 pixels" in message and "128" in message and "--resolution" in message


def test_labels_beyond_the_models(tiny_pipeline, photos, extractor, tmp_path, nothing_drawn):
    folder = shutil.copytree(photos, tmp_path / "labels")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({"file_name": row["file_name"], "label": 1000 + i}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    words = ("--reference", folder, "--feature_extractor", extractor)
    message = refused(tmp_path / "out", "--model", tiny_pipeline("DiT"), *words)
    assert "1000" in message and named_flags(message) <= {"--label_column", "--model", "--reference"}


def test_a_reference_that_does_not_say_what_to_draw(
    tiny_sd, photos, extractor, class_folders, tmp_path, nothing_drawn
):
    bare = shutil.copytree(photos, tmp_path / "bare", ignore=shutil.ignore_patterns("metadata.jsonl"))
    np.savez(tmp_path / "images.npz", arr_0=reference_pixels(photos).permute(0, 2, 3, 1).numpy())
    words = ("--model", tiny_sd, "--feature_extractor", extractor)
    message = refused(tmp_path / "out", *words, "--reference", tmp_path / "images.npz")
    assert "images.npz has no captions to draw" in message
    message = refused(tmp_path / "out", *words, "--reference", bare)
    assert "caption" in message and "--instance_prompt" in message
    assert not named_flags(message) & {"--train_data_dir", "--max_train_samples"}


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (None, "can't be read"),
        ({"mu": np.zeros(3)}, "neither mu and sigma nor images"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "mu and sigma must be"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "arr_0 must be images"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "arr_0 must be images"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "extractor": "other"}, "statistics of other"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of inception"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "extractor": "vit"}, "16"),
    ],
)
def test_npz_files_that_can_not_be_used(photos, extractor, tmp_path, arrays, sentence):
    path = tmp_path / "reference.npz"
    if arrays is None:
        path.write_bytes(random.Random(0).randbytes(1000))
    else:
        np.savez(path, **arrays)
    words = ("--reference", path, "--feature_extractor", extractor)
    message = refused(tmp_path / "out", "--samples", photos, *words, small=("--k", K))
    assert f"--reference {path}" in message and sentence in message


def test_an_npz_of_images_of_another_size(photos, extractor, tiny_pipeline, tmp_path):
    words = ("--reference", tmp_path / "images.npz", "--feature_extractor", extractor)
    samples = build_photo_folder(tmp_path / "samples", n=6, size=64)
    for width, height in ((32, 32), (48, 64)):
        array = reference_pixels(photos)[:, :, :height, :width].permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / "images.npz", arr_0=array)
        for run, small in ((("--samples", samples), ("--k", K)), (("--model", tiny_pipeline("DiT")), SMALL)):
            message = refused(tmp_path / "out", *run, *words, small=small)
            assert f"images of {width} x {height} pixels" in message and "another one" in message


def test_precision_sizes_and_parts_that_a_model_does_not_have(
    tiny_sd, tiny_pipeline, words, class_folders, extractor, tmp_path, nothing_drawn
):
    run = ("--model", tiny_sd, *words)
    for sampler in ("auto", "rk4"):
        message = refused(tmp_path / "out", *run, "--num_inference_steps", 5, 2000, "--sampler", sampler)
        assert "--num_inference_steps" in message and "1000 noise levels" in message
    assert "--mixed_precision fp16 needs a GPU" in refused(tmp_path / "out", *run, "--mixed_precision", "fp16")
    message = refused(tmp_path / "out", *run, "--resolution", 68)
    assert "--resolution 68 must be a multiple of 8" in message
    message = refused(tmp_path / "out", *run, "--pretrained_vae_model_name_or_path", tiny_sd / "unet")
    assert "UNet2DConditionModel" in message
    classes = ("--model", tiny_pipeline("DiT"), "--reference", class_folders, "--feature_extractor", extractor)
    message = refused(tmp_path / "out", *classes, "--resolution", 128)
    assert "--resolution 128" in message and "64 pixels" in message
    assert "--guidance_rescale" in refused(tmp_path / "out", *classes, "--guidance_rescale", 0.5)
    assert "--clip_model has no effect" in refused(tmp_path / "out", *classes, "--clip_model", "nobody/nothing")
    for flag in ("--caption_column", "--instance_prompt"):
        assert f"{flag} has no effect" in refused(tmp_path / "out", *classes, flag, "text")
    assert "--label_column has no effect" in refused(tmp_path / "out", *run, "--label_column", "label")
