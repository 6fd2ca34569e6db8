"""The model card of a run: what its reader sees, what the Hub reads, and whether what it says is so."""

import json
import re
import subprocess
import types
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock, call

import diffusers
import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import read_log, run_script
from huggingface_hub import ModelCard, close_session
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback_hub import LoopbackHub, Repo
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_tiny_sd, build_tiny_vae

import model_card
import model_families
import train_lpl_dit
import train_lpl_sd
import train_utils
from arguments import OBJECTIVES, UserError
from loss_terms import NO_OBJECTIVES, Objectives, describe_objectives


FLAGS = ["--train_data_dir", "photos of mine", "--output_dir", "out", "--push_to_hub"]
DRAWN = ["--validation_inference_steps", 2, "--lpl_sigma_threshold", 80]
PROMPTS = ["a red fox", "two boats at sea"]
NASTY = [
    'a "red" fox | with `code` & *stars*, <b>bold</b> and &lt;',
    "naïve 狐 🦊",
    "1. first",
    "- a dash",
    "+ plus",
    "# a heading",
    "12) twelve",
    "> said",
    "0.5 of a __fox__ and ~~half~~ [a](b) ![c](d) \\ \\* \\\\",
    "two\nlines\n\n```\nand a fence",
]


class NoHub:
    """Takes what a run would upload, and does nothing."""

    def __init__(self, args):
        args.hub_model_id = f"tester/{Path(args.output_dir).name}"

    def add(self, folder):
        pass

    def may_remove(self, folder):
        return True

    def open(self):
        pass

    def push_result(self, files):
        return "nowhere"


@pytest.fixture(scope="module")
def make_card(photos, class_folders, tmp_path_factory):
    """Trains and returns the output folder, with what `write_model_card` was given; `name` is that of the repository.

    Images are of 64 pixels, in two steps. Given the same name again, a run can be resumed.
    """
    place, given = tmp_path_factory.mktemp("cards"), {}

    def write(args, family, training, facts, images, base_images):
        given[Path(args.output_dir)] = Namespace(args=args, family=family, images=images, base_images=base_images)
        model_card.write_model_card(args, family, training, facts, images, base_images)

    def run(name, model, *words, steps=2, script=None, data=photos):
        script = script or (train_lpl_sd if model is None or (Path(model) / "unet").exists() else train_lpl_dit)
        data = class_folders if data == "classes" else data
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "Hub", NoHub)
            patch.setattr(train_utils, "write_model_card", write)
            patch.setattr("sys.argv", [f"/home/me/{script.__name__}.py"])
            words = ["--push_to_hub", *words]
            output = run_script(script, words, place / name, model, ("--train_data_dir", data), steps)
        return output, given.get(output)

    return run


@pytest.fixture(scope="module")
def full(make_card, tiny_sd):
    """A finetuned Stable Diffusion, whose run was resumed, far from its base model."""
    words = ["--validation_prompts", *PROMPTS, "--num_validation_images", 2, *DRAWN, "--learning_rate", 0.01]
    make_card("full", tiny_sd, *words, "--skip_final_inference", "--checkpointing_steps", 3, steps=3)
    return make_card("full", tiny_sd, *words, "--resume_from_checkpoint", "latest", steps=6)


def parse(*words, script=train_lpl_sd):
    """The flags of a script, which finds the data without looking for it; its repository is `tester/out`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arguments.check_folders", lambda args: None)
        args = script.parse_args([str(word) for word in [*FLAGS, *words]])
    args.hub_model_id, args.resolution, args.max_train_steps = "tester/out", args.resolution or 512, 100
    return args


def of_base(*words, model="owner/base", **settings):
    return parse("--pretrained_model_name_or_path", model, *words, **settings)


def family_of(pipeline, **more):
    """A family without its models."""
    family = model_families.FAMILIES[pipeline]
    names = "pipeline_class denoiser_class denoiser_name stock_lora sampling prompt size_settings".split()
    parts = {"weight_dtype": torch.float32, "vae": diffusers.AutoencoderKL(norm_num_groups=4)}
    parts["denoiser"] = torch.nn.Linear(1, 1)
    return types.SimpleNamespace(**{**{name: getattr(family, name) for name in names}, **parts, **more})


SD = family_of("StableDiffusionPipeline")


def rendered(text):
    """The HTML that CommonMark, with GitHub's tables and strikethrough, makes of Markdown."""
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    return renderer.enable(["table", "strikethrough"]).render(text)


def plain(html):
    """What is seen of HTML without tags of its own."""
    assert "<" not in html, html
    for name, character in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("amp", "&")):
        html = html.replace(f"&{name};", character)
    return html


def code_in(folder):
    (code,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def command_in(folder):
    (command,) = re.findall(r"```bash\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    return words_of(command)


def words_of(command):
    """What a shell makes of a command."""
    return subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"], text=True).split("\0")[:-1]


# What its reader sees


def test_the_card_tells_of_the_run_and_of_nothing_else_on_this_machine(full, tiny_sd, photos):
    output, _ = full
    text = (output / "README.md").read_text()
    for place in (output.parent, tiny_sd.parent, photos.parent, Path.home(), "/home/me"):
        assert str(place) not in text
    html = rendered(ModelCard(text).text)
    headings = ["full", "How to use it", "Training", "Latent Perceptual Loss", "License", "Citation"]
    assert re.findall("<h[12]>(.*?)</h[12]>", html) == headings
    assert re.findall('<img src="(.*?)"', html) == ["samples/base_and_finetuned.jpg", "loss.png"]
    assert "Finetuned from <code>sd</code>, trained on a folder of images for 6 steps at 64 pixels" in html
    assert "<li>a red fox</li>\n<li>two boats at sea</li>" in html
    assert "seeds 0 to 1. The prompts:" in html and "2 steps, guidance 7.5" in html
    rows = dict(re.findall("<td>(.*?)</td>\n<td>(.*?)</td>", html))
    log = read_log(output)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    share = sum(line["lpl"] / (line["l2"] + line["lpl"]) for line in log) / 6
    last = log[-1]["lpl"] / (log[-1]["l2"] + log[-1]["lpl"])
    assert rows["Share of lpl in the loss"] == f"{share:.1%} on average, {last:.1%} at the end"
    assert rows["Losses at the end"] == f"l2 {log[-1]['l2']:.4g}, lpl {log[-1]['lpl']:.4g}"
    assert rows["Steps"] == "6" and rows["Optimizer"] == "adamw, learning rate 0.01, constant"
    assert "process, 0." in rows["Hardware"] and rows["Hardware"].endswith(" minutes")


def test_all_flags_of_the_run_are_in_its_command(full):
    output, given = full
    words = command_in(output)
    assert words[:3] == ["accelerate", "launch", "train_lpl_sd.py"] and "--hub_token" not in words
    flags = {word[2:] for word in words if word.startswith("--")}
    assert flags == {name for name in given.args.changed if name != "hub_token"} >= {"learning_rate", "push_to_hub"}
    assert words[words.index("--validation_prompts") + 1 :][:2] == PROMPTS


def test_the_grid_has_the_base_model_above_the_finetuned_one_with_the_same_seeds(full, tiny_sd):
    output, _ = full
    grid = np.asarray(Image.open(output / "samples" / "base_and_finetuned.jpg"), int)
    margin = grid.shape[1] - 2 * 64
    assert grid.shape[0] == 4 * 64 and 80 > margin > 40
    base = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    finetuned = diffusers.StableDiffusionPipeline.from_pretrained(output, safety_checker=None)
    drawn = {}
    for row, (prompt, pipe) in enumerate((prompt, pipe) for prompt in PROMPTS for pipe in (base, finetuned)):
        pipe.set_progress_bar_config(disable=True)
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
            drawn[row, seed] = np.asarray(pipe(prompt, generator=generator, **settings).images[0], int)
    for (row, seed), image in drawn.items():
        cell = grid[64 * row :, margin + 64 * seed :][:64, :64]
        distances = {key: np.abs(cell - other).mean() for key, other in drawn.items()}
        assert min(distances, key=distances.get) == (row, seed) and distances[row, seed] < 5
        label = grid[64 * row : 64 * row + 64, :margin]
        assert label.max() > 250 and label.min() < 100  # black on white
    widgets = [np.asarray(Image.open(output / f"samples/prompt-{i}.jpg"), int) for i in (0, 1)]
    for i, widget in enumerate(widgets):
        assert np.abs(widget - drawn[2 * i + 1, 0]).mean() < 5


def test_large_images_are_made_smaller_in_the_grid():
    rows = [[Image.new("RGB", (2048, 1024), color) for color in row] for row in (("red", "lime"), ("blue", "black"))]
    grid = model_card.labelled_grid(rows, ["base", "finetuned"])
    margin = grid.width - 2 * 1024
    assert grid.height == 2 * 512 and 0 < margin < 256
    centres = [grid.getpixel((margin + 512 + 1024 * x, 256 + 512 * y)) for y in (0, 1) for x in (0, 1)]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]


def test_a_readme_of_ones_own_is_kept(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text("my notes")
    model_card.keep_notes(path)
    assert (tmp_path / "README.old.md").read_text() == "my notes" and not path.exists()
    assert f"Your {path} is {tmp_path / 'README.old.md'} now" in capsys.readouterr().err
    path.write_text("---\ntags:\n- diffusers-training\n---\n")
    model_card.keep_notes(path)
    assert path.exists()


def test_many_prompts_make_a_grid_of_bounded_size(tmp_path):
    flags = {"validation_prompts": [f"prompt {i}" for i in range(10)], "num_validation_images": 6, "num_classes": None}
    flags |= {"output_dir": tmp_path, "seed": 5, "validation_inference_steps": 2, "validation_guidance_scale": None}
    images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(60)]
    text = model_card.show_images(Namespace(**flags), images, images)
    with Image.open(tmp_path / model_card.COMPARISON) as grid:
        assert grid.height == 2 * 8 * 64 and 4 * 64 < grid.width < 6 * 64
    assert "seeds 5 to 8. The first 8 of these prompts:" in text and "10. prompt 9" in text
    assert len(list((tmp_path / "samples").glob("prompt-*.jpg"))) == 10


@pytest.mark.parametrize("prompt", NASTY)
def test_a_prompt_is_read_as_it_was_written(tmp_path, prompt):
    words = ["--instance_prompt", prompt, "--validation_prompts", "a", prompt, "--num_validation_images", 1]
    words += ["--seed", 0]
    args = of_base(*words, "--output_dir", tmp_path)
    model_card.write_model_card(args, SD, {"Note": prompt}, {}, [Image.new("RGB", (8, 8))] * 2, [])
    card, expected = ModelCard.load(tmp_path / "README.md"), " ".join(prompt.split())
    html = rendered(card.text)
    assert plain(re.findall("<ol>\n<li>a</li>\n<li>(.*?)</li>\n</ol>", html)[0]) == expected
    assert plain(re.findall("<td>Note</td>\n<td>(.*?)</td>", html)[0]) == expected
    assert plain(re.findall("Write <code>(.*?)</code> in your prompt", html)[0]) == expected
    assert card.data.instance_prompt == prompt and card.data.widget[1]["text"] == prompt
    python, bash = re.findall('<code class="language-(?:python|bash)">(.*?)</code>', html, re.DOTALL)
    assert prompt in words_of(plain(bash))
    args.validation_prompts = [prompt]
    assert f"prompt={json.dumps(prompt, ensure_ascii=False)}, " in model_card.code_of_card(args, SD)
    assert "prompt=" in plain(python)


@pytest.mark.parametrize(
    "words, script, first",
    [
        (["--dataset_name", "owner/data"], train_lpl_sd, "[owner/base](https://huggingface.co/owner/base)"),
        (["--use_lora"], train_lpl_sd, "LoRA weights for [owner/base]"),
        (["--lpl_weight", 0], train_lpl_sd, " with the diffusion loss alone."),
        (
            ["--lpl_weight", 0, "--rgb_weight", 1],
            train_lpl_sd,
            " with the squared error of the decoded images besides",
        ),
        (
            ["--lpl_weight", 0, "--l2_weight", 0, "--self_perceptual_weight", 1],
            train_lpl_sd,
            " with the [self-perceptual loss](https://arxiv.org/abs/2401.00110) alone.",
        ),
        (
            ["--lpl_weight", 1, "--l2_weight", 0, "--e_latent_lpips_weight", 1],
            train_lpl_dit,
            "with the [Latent Perceptual Loss](https://arxiv.org/abs/2411.04873) and "
            "[E-LatentLPIPS](https://arxiv.org/abs/2405.05967).",
        ),
        (["--rgb_weight", 1], train_lpl_sd, "and the squared error of the decoded images besides the diffusion loss."),
        (
            ["--late_reweight"],
            train_lpl_sd,
            " with the diffusion loss, whose weights come from the [Latent Perceptual Loss](https://arxiv.org/abs/",
        ),
        (["--train_shards", "/data/mine/{0..9}.tar"], train_lpl_sd, "trained on tar shards for 100 steps"),
        (["--transformer_config", "x.json"], train_lpl_dit, "A `Linear` in the pipeline of [owner/base]"),
        (["--pretrained_vae_model_name_or_path", "owner/vae"], train_lpl_sd, "with the VAE [owner/vae]("),
    ],
)
def test_the_introduction_says_what_was_trained_on_what(words, script, first):
    data = {"--dataset_name", "--train_shards"} & set(map(str, words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_model_card.FLAGS", FLAGS[2:] if data else FLAGS)
        args = of_base(*words, script=script)
    text = model_card.introduction(args, SD)
    assert first in text and "mine" not in text
    if "--dataset_name" in words:
        assert "trained on the dataset [owner/data](https://huggingface.co/datasets/owner/data) for" in text
    assert ("from scratch" in text) == ("--transformer_config" in words)


@pytest.mark.parametrize(
    "words, tagged, cited",
    [
        ([], True, True),
        (["--late_reweight"], False, True),
        (["--lpl_weight", 0], False, False),
        (["--lpl_weight", 0, "--self_perceptual_weight", 1], False, False),
        (["--l2_weight", 0, "--lpl_weight", 1], True, True),
    ],
)
def test_the_tag_is_for_models_that_lpl_has_trained(tmp_path, words, tagged, cited):
    args = of_base(*words, "--output_dir", tmp_path)
    model_card.write_model_card(args, SD, {}, {}, [], [])
    card = ModelCard.load(tmp_path / "README.md")
    assert ("latent-perceptual-loss" in card.data.tags) == tagged and ("## Citation" in card.text) == cited


def test_other_terms_have_a_section_if_there_are_any(tmp_path):
    words = ["--rgb_weight", "auto:0.3", "--self_perceptual_weight", "variance:0.1", "--sp_distance", "l1"]
    words += ["--e_latent_lpips_weight", 0.5, "--e_latent_lpips_augmentations", "blit", "cutout"]
    args = of_base(*words, "--gate_objectives", "rgb", "--l2_weight", 0.25, "--output_dir", tmp_path)
    objectives = Objectives(dict.fromkeys(OBJECTIVES), gated=args.gate_objectives)
    objectives.weights |= {"rgb": 1.5, "self_perceptual": 0.123456789, "e_latent_lpips": 0.5, "clean_latent": 2}
    model_card.write_model_card(args, SD, {}, {"Other terms": describe_objectives(args, objectives)}, [], [])
    html = rendered(ModelCard.load(tmp_path / "README.md").text)
    section = html.split("<h2>Other terms</h2>")[1].split("<h2>")[0]
    rows = dict(re.findall("<td>(.*?)</td>\n<td>(.*?)</td>", section))
    assert rows["Diffusion loss"] == "weight 0.25"
    perceptual = rows["Self-perceptual loss"]
    assert "weight 0.12346, measured so that its variance is 0.1 times that of the diffusion loss; " in perceptual
    assert "uniform, l1, joint" in perceptual and "only where LPL applies" not in perceptual
    assert "weight 0.5; augmentations: blit, cutout" in rows["E-LatentLPIPS"]
    assert "weight 1.5, measured so that it is 30% of the loss; " in rows["RGB loss"]
    assert rows["RGB loss"].endswith(", only where LPL applies") and len(rows) == 5
    assert rows["Clean-latent error"] == "weight 2; of the clean latents"

    args = of_base("--output_dir", tmp_path)
    model_card.write_model_card(args, SD, {}, {"Other terms": describe_objectives(args, NO_OBJECTIVES)}, [], [])
    assert "Other terms" not in (tmp_path / "README.md").read_text()


# The losses


def drawn_lines(monkeypatch, tmp_path, log, *words):
    """The lines of `draw_losses`: one dict for each panel, label -> steps and values; unlabelled ones as \"raw\"."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert model_card.draw_losses(log, tmp_path / "loss.png", of_base(*words))
    panels = []
    for axis in figures[0].axes:
        lines = {}
        for line in axis.get_lines():
            label = line.get_label() if not line.get_label().startswith("_") else f"raw {len(lines) // 2}"
            lines[label] = (list(line.get_xdata()), list(line.get_ydata()))
        panels.append(lines)
        assert axis.get_legend() is not None and axis.get_xlabel() == "step"
    return panels


def entry(step, l2, lpl=None):
    terms = {"l2": l2} if lpl is None else {"l2": l2, "lpl": lpl, "lpl_share": lpl / (l2 + lpl)}
    return {"step": step, "loss": l2 + (lpl or 0), **terms, "lr": 1e-4, "lpl_gradient_share": 0.3}


def test_the_curves_are_those_of_the_log(monkeypatch, tmp_path, full):
    output, _ = full
    log = read_log(output)
    losses, shares = drawn_lines(monkeypatch, tmp_path, log)
    steps = [1, 2, 3, 4, 5, 6]
    assert losses["l2"] == losses["raw 0"] == (steps, [line["l2"] for line in log])
    assert losses["lpl"] == losses["raw 1"] == (steps, [line["lpl"] for line in log])
    expected = [line["lpl"] / (line["l2"] + line["lpl"]) for line in log]
    assert shares["lpl_share"][1] == pytest.approx(expected)
    assert set(shares["--lpl_target_share"][1]) == {0.2}
    assert Image.open(output / "loss.png").width == 1000  # drawn by the run itself


def test_curves_are_smoothed_over_a_tenth_of_the_run(monkeypatch, tmp_path):
    values = np.random.default_rng(0).random(40).tolist()
    losses, _ = drawn_lines(monkeypatch, tmp_path, [entry(10 * i, v, 0.1) for i, v in enumerate(values)])
    expected = [np.mean(values[max(0, i - 3) : i + 1]) for i in range(40)]
    assert losses["raw 0"][1] == values and losses["l2"][1] == pytest.approx(expected)


@pytest.mark.parametrize(
    "log, steps",
    [
        ([entry(10, 1.0, 0.5)], [10]),
        ([entry(1, 1.0), entry(2, 0.9), entry(3, 0.8, 0.2), entry(4, 0.7, 0.1)], [3, 4]),
        ([entry(1, 1.0, 0.5), entry(2, 0.9, 0.4), entry(3, 0.8), entry(4, 0.7)], [1, 2]),  # resumed without LPL
    ],
)
def test_lpl_is_shown_where_it_was(monkeypatch, tmp_path, log, steps):
    losses, shares = drawn_lines(monkeypatch, tmp_path, log, "--lpl_weight", 0.5)
    assert losses["l2"][0] == [line["step"] for line in log]
    assert losses["lpl"][0] == shares["lpl_share"][0] == steps and "--lpl_target_share" not in shares
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    facts = model_card.training_facts(of_base("--output_dir", tmp_path))
    with_lpl = [line["lpl_share"] for line in log if "lpl" in line]
    span = "" if len(steps) == len(log) else f" from step {steps[0]} to {steps[-1]}"
    expected = f"{np.mean(with_lpl):.1%} on average{span}, {with_lpl[-1]:.1%} at the end"
    assert facts["Share of lpl in the loss"] == expected and "lpl_gradient" not in str(facts)
    assert ("lpl" in facts["Losses at the end"]) == ("lpl" in log[-1])


def test_the_aim_of_lpl_is_drawn_where_lpl_is(monkeypatch, tmp_path):
    log = [{"step": i, "loss": 1.0, "l2": 0.9, "rgb": 0.1, "rgb_share": 0.1} for i in (1, 2)]
    _, shares = drawn_lines(monkeypatch, tmp_path, log, "--late_reweight", "--rgb_weight", 1)
    assert shares.keys() == {"raw 0", "rgb_share"}


def test_the_end_is_the_last_tenth_of_the_log(tmp_path):
    log = [entry(10 * i, l2, 0.1 * (i % 3)) for i, l2 in enumerate(np.linspace(2, 1, 40).tolist())]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    facts = model_card.training_facts(of_base("--output_dir", tmp_path))
    l2, lpl, share = (np.mean([line[name] for line in log[36:]]) for name in ("l2", "lpl", "lpl_share"))
    assert facts["Losses at the end"] == f"l2 {l2:.4g}, lpl {lpl:.4g}"
    assert facts["Share of lpl in the loss"].endswith(f"% on average, {share:.1%} at the end")


def test_without_lpl_there_is_one_curve_and_without_a_log_none(monkeypatch, tmp_path):
    (losses,) = drawn_lines(monkeypatch, tmp_path, [entry(1, 1.0), entry(2, 0.5)], "--lpl_weight", 0)
    assert losses.keys() == {"raw 0", "l2"}
    assert not model_card.draw_losses([], tmp_path / "none.png", of_base())


# What the Hub reads


TASKS = {"text-to-image", "unconditional-image-generation"}


def check_as_the_hub_does(data, folder):
    """What is known of the Hub's rules, which answers 400 to all files with a card that breaks one."""
    for name in [data.get("base_model"), *([data.datasets] if data.datasets else [])]:
        assert name is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    assert data.pipeline_tag in TASKS and data.library_name in ("diffusers", "peft")
    assert data.get("base_model_relation") in ((None,) if data.base_model is None else ("adapter", "finetune"))
    assert all(isinstance(tag, str) and tag for tag in data.tags) and len(set(data.tags)) == len(data.tags)
    for widget in data.get("widget", []):
        assert widget.keys() == {"text", "output"} and widget["text"]
        assert (folder / widget["output"]["url"]).is_file()


def test_metadata_of_a_finetuned_local_model(full):
    output, _ = full
    data = ModelCard.load(output / "README.md").data
    check_as_the_hub_does(data, output)
    tags = "text-to-image diffusers diffusers-training latent-perceptual-loss".split()
    assert data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, "stable-diffusion", "stable-diffusion-diffusers"],
        "widget": [{"text": prompt, "output": {"url": f"samples/prompt-{i}.jpg"}} for i, prompt in enumerate(PROMPTS)],
    }


@pytest.mark.parametrize(
    "words, pipeline, script, expected",
    [
        (["--use_lora"], "StableDiffusionXLPipeline", train_lpl_sd, {"base_model_relation": "adapter"}),
        ([], "StableDiffusionPipeline", train_lpl_sd, {"base_model_relation": "finetune"}),
        (["--use_lora"], "PixArtSigmaPipeline", train_lpl_dit, {"library_name": "peft"}),
        (["--trigger_word", "sks"], "FluxPipeline", train_lpl_dit, {"instance_prompt": "sks"}),
        (["--transformer_config", "x.json"], "FluxPipeline", train_lpl_dit, {"base_model": None}),
    ],
)
def test_metadata_of_models_of_the_hub(words, pipeline, script, expected, tmp_path):
    args = of_base(*words, script=script)
    data = model_card.metadata(args, family_of(pipeline), {"license": "mit"}, [])
    check_as_the_hub_does(data, tmp_path)
    assert data.license == "mit" and "widget" not in data
    for name, value in {"base_model": "owner/base", "library_name": "diffusers", **expected}.items():
        assert data.get(name) == value
    assert ("lora" in data.tags) == ("template:sd-lora" in data.tags) == ("--use_lora" in words)
    assert {tag.split("-")[0] for tag in data.tags} & {"stable", "pixart", "flux"}


def test_a_dataset_of_the_hub_is_named_and_a_folder_is_not(tmp_path):
    for name, expected in (("owner/data", "owner/data"), (str(tmp_path), None), ("./data", None)):
        args = of_base()
        args.dataset_name = name
        assert model_card.metadata(args, SD, {}, []).datasets == expected


def test_classes_have_no_widget_since_it_is_for_text():
    args = parse("--pretrained_model_name_or_path", "owner/base", script=train_lpl_dit)
    args.num_classes, args.validation_prompts = 1000, ["volcano"]
    data = model_card.metadata(args, family_of("DiTPipeline"), {}, [Image.new("RGB", (8, 8))])
    assert data.pipeline_tag == "unconditional-image-generation" and "widget" not in data


def test_an_empty_prompt_has_a_widget_as_the_hub_wants_a_text():
    args = of_base("--validation_prompts", "", "a fox")
    widget = model_card.metadata(args, SD, {}, [Image.new("RGB", (8, 8))]).widget
    assert [sample["text"] for sample in widget] == ["-", "a fox"]


ON_HUB = "https://huggingface.co/owner/Base-1/blob/main/"
LOCAL = "./models/Base-1"


@pytest.mark.parametrize(
    "base, model, expected",
    [
        ({}, "owner/Base-1", {}),
        ({"license": None}, "owner/Base-1", {}),
        ({"license": "creativeml-openrail-m"}, LOCAL, {"license": "creativeml-openrail-m"}),
        ({"license": "Apache-2.0"}, LOCAL, {"license": "apache-2.0"}),
        ({"license": ["mit", "apache-2.0"]}, "owner/Base-1", {"license": ["mit", "apache-2.0"]}),
        ({"license": "gpl-3.0-or-later"}, LOCAL, {"license": "other", "license_name": "gpl-3.0-or-later"}),
        ({"license": ["mit", "My Terms"]}, LOCAL, {"license": "other", "license_name": "mit-my-terms"}),
        ({"license": 3}, LOCAL, {"license": "other", "license_name": "3"}),
        ({"license": "other"}, "owner/Base-1", {"license": "other", "license_name": "base-1-license"}),
        (
            {"license": "other", "license_name": "flux-1-dev", "license_link": "LICENSE.md"},
            "owner/Base-1",
            {"license": "other", "license_name": "flux-1-dev", "license_link": ON_HUB + "LICENSE.md"},
        ),
        (
            {"license": "other", "license_name": "flux-1-dev", "license_link": "LICENSE.md"},
            LOCAL,
            {"license": "other", "license_name": "flux-1-dev"},
        ),
        (
            {"license_name": "flux-1-dev", "license_link": "https://example.com/x"},
            LOCAL,
            {"license": "other", "license_name": "flux-1-dev", "license_link": "https://example.com/x"},
        ),
    ],
)
def test_the_license_is_the_base_models_as_the_hub_takes_it(base, model, expected):
    args = of_base(model=model)
    assert model_card.license_of(args, base) == expected
    text = model_card.describe_license(args, base)
    assert "Base-1" in text and "./models" not in text
    name = expected.get("license_name") or expected.get("license")
    for word in [name] if isinstance(name, str) else name or ["is not known"]:
        assert word in text.replace("\\", "")
    if "license_link" in expected:
        assert f"]({expected['license_link']})" in text


def test_a_license_file_is_that_of_the_revision():
    args = of_base("--revision", "v2")
    link = model_card.license_of(args, {"license": "other", "license_link": "LICENSE"})["license_link"]
    assert link == "https://huggingface.co/owner/base/blob/v2/LICENSE"


def test_from_scratch_the_license_is_the_authors():
    args = parse(
        "--transformer_config", "x.json", "--pretrained_vae_model_name_or_path", "a/vae", script=train_lpl_dit
    )
    assert model_card.license_of(args, {}) == {}
    text = model_card.describe_license(args, {})
    assert text.startswith("The license of these weights is for their author to say. The VAE [a/vae](")


@pytest.mark.parametrize(
    "network, published",
    [
        ("Mingguksky/elatentlpips", True),
        ("Mingguksky/elatentlpips/elatentlpips_ckpt/sd3_latest_vgg16_tuned.pth", True),
        ("downloads/sdxl_latest_vgg16_tuned.pth", True),
        ("download", True),  # of all of them
        ("Mingguksky/elatentlpips-of-mine", False),
        ("owner/latent-vgg", False),
        ("mine", False),
    ],
)
def test_networks_that_are_not_for_commercial_use_are_named(tmp_path, monkeypatch, network, published):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "download" / "elatentlpips_ckpt").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    said = (
        "learned from [Mingguksky/elatentlpips](https://huggingface.co/Mingguksky/elatentlpips), which is CC BY-NC: "
    )
    args = of_base("--e_latent_lpips_weight", 1, "--e_latent_lpips_model", network)
    assert (said + "not for commercial use." in model_card.describe_license(args, {"license": "mit"})) == published
    assert "commercial" not in model_card.describe_license(of_base(), {"license": "mit"})


BASE_CARD = "---\nlicense: other\nlicense_name: my-terms\nlicense_link: LICENSE.md\n---\n# Base\n"


@pytest.mark.parametrize("text, expected", [(BASE_CARD, "my-terms"), (None, None), ("---\n: [\n---\n", None)])
def test_a_folders_card_is_read_if_there_is_one(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert model_card.base_metadata(of_base(model=tmp_path)).get("license_name") == expected


def test_the_hubs_card_is_read_at_the_revision(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        repo = hub.repos["owner/base"] = Repo(files={"README.md": BASE_CARD.encode()})
        repo.history.append(("later", {"README.md": BASE_CARD.replace("my", "new").encode()}))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        for words, expected in ((["--revision", repo.shas[0]], "my-terms"), ([], "new-terms")):
            args = of_base(*words, "--cache_dir", tmp_path / "cache")
            base = model_card.base_metadata(args)
            assert model_card.license_of(args, base)["license_name"] == expected
        assert list((tmp_path / "cache").rglob("README.md"))
        assert model_card.base_metadata(of_base(model="owner/none")) == {}
    close_session()


# The command


@pytest.mark.parametrize(
    "script, words",
    [
        (train_lpl_sd, "--lpl_weight 0 --scale_lr --gradient_checkpointing"),
        (
            train_lpl_sd,
            "--no-lpl_detach_stats --no-lpl_outlier_mask --lpl_weight 0.25 --no-lpl_gradient_checkpointing",
        ),
        (train_lpl_sd, "--lpl_gradient_checkpointing --lpl_compile --lpl_compile --lpl_max_samples 0.5"),
        (
            train_lpl_sd,
            "--self_perceptual_weight auto:0.3 --sp_layers down1 mid --gate_objectives self_perceptual "
            "--late_reweight --lpl_weight variance:0.1",
        ),
        (
            train_lpl_dit,
            "--self_perceptual_weight 1e-3 --sp_layer 8 --e_latent_lpips_weight auto --e_latent_lpips_model owner/vgg "
            "--e_latent_lpips_augmentations blit cutout --l2_weight 0 --lpl_weight 0",
        ),
        (train_lpl_sd, "--lpl_weight auto --lpl_target_share 0.3 --noise_offset 1e-05 --adam_epsilon 1e-12"),
        (
            train_lpl_sd,
            "--optimizer prodigy --prodigy_decouple false --prodigy_use_bias_correction --prodigy_beta3 0.9",
        ),
        (train_lpl_sd, "--use_ema --save_non_ema --save_dtype fp16 fp32 --caption_column a b --caption_weights 1 2.5"),
        (train_lpl_sd, "--aspect_ratio_buckets --seed 0 --revision a/b"),
        (train_lpl_sd, "--aspect_ratio_buckets 512,512;512,768 --lora_layers to_k,to_q --use_lora --lora_alpha 8"),
        (train_lpl_dit, "--logit_mean=-0.5 --weighting_scheme logit_normal --trigger_word=-sks --mode_scale=-1e-05"),
        (
            train_lpl_dit,
            "--hub_strategy checkpoint --hub_model_id a/b --resume_from_checkpoint owner/name/checkpoint-2",
        ),
    ],
)
def test_the_command_gives_the_same_settings_again(monkeypatch, script, words):
    monkeypatch.setattr("arguments.check_packages", lambda args: None)
    prompts = ["--validation_prompts", "/imagine a fox", 'it\'s a "fox"\n$HOME `id` \\', *NASTY]
    args = of_base(*words.split(), *prompts, script=script)
    monkeypatch.setattr("sys.argv", ["/home/me/somewhere/train.py"])
    command = model_card.command(args)
    launch, again = words_of(command)[:3], words_of(command)[3:]
    assert launch == ["accelerate", "launch", "train.py"]
    monkeypatch.setattr("test_model_card.FLAGS", [])
    repeated = parse(*again, script=script)
    assert repeated.changed == args.changed and args.changed.keys() >= {"train_data_dir", "validation_prompts"}
    unlike = {"given_flags", "idle_lpl_flags"}
    assert {k: v for k, v in vars(repeated).items() if k not in unlike} == {
        k: v for k, v in vars(args).items() if k not in unlike
    }


def test_of_paths_and_tokens_nothing_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("test_model_card.FLAGS", [])
    secret, token = tmp_path / "secret", "hf_to_be_seen_nowhere"
    words = ["--output_dir", secret / "out", "--pretrained_model_name_or_path", secret / "base", "--push_to_hub"]
    words += ["--train_shards", "secret/{0..9}.tar", "--cache_dir", "~/secret/cache", "--hub_token", token]
    words += ["--logging_dir", "../secret/logs", "--pretrained_vae_model_name_or_path", secret / "vae"]
    command = model_card.command(parse(*words))
    assert "secret" not in command and token not in command
    for name in ("out", "base", "{0..9}.tar", "cache", "logs", "vae"):
        assert name in words_of(command)


# The code


def draw_by(code, folder, replaced):
    """Runs a card's code with the result and other models in these folders; returns what it has defined."""
    for name, place in {"tester/" + folder.name: folder, **replaced}.items():
        code = code.replace(json.dumps(name), json.dumps(str(place)))
    assert '"path/to/' not in code and '.to("cuda")' in code
    scope = {}
    exec(code.replace('.to("cuda")', ""), scope)
    return scope


def check_the_code(output, given, replaced, trained):
    """The card's code draws as the run has drawn at its end, not as the base model, and has the weights of the files.

    trained: part of the pipeline -> its weight file, or {} for adapters.
    """
    scope = draw_by(code_in(output), output, replaced)
    pipe, args = scope["pipe"], given.args
    pipe.set_progress_bar_config(disable=True)
    assert scope["image"].size == (64, 64)
    for part, file in trained.items():
        weights, saved = getattr(pipe, part).state_dict(), load_file(output / file)
        assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    for i, prompt in enumerate(args.validation_prompts):
        settings = {**given.family.prompt(prompt), **given.family.size_settings(64), **given.family.sampling}
        if args.validation_guidance_scale is not None:
            settings["guidance_scale"] = args.validation_guidance_scale
        settings |= {"generator": torch.Generator().manual_seed(args.seed), "num_inference_steps": 2}
        image = np.asarray(pipe(**settings).images[0], int)
        position = i * args.num_validation_images
        distance = np.abs(image - np.asarray(given.images[position], int)).mean()
        assert distance <= (0.5 if args.save_dtype[0] == "fp32" else 4)
        if given.base_images:
            assert np.abs(image - np.asarray(given.base_images[position], int)).mean() > 3 * distance + 2
    return scope


def test_the_code_of_a_whole_pipeline(full):
    output, given = full
    scope = check_the_code(output, given, {}, {"unet": "unet/diffusion_pytorch_model.safetensors"})
    assert "torch" not in scope and type(scope["pipe"]) is diffusers.StableDiffusionPipeline


def fox(images=1):
    return ["--validation_prompts", "a red fox", "--num_validation_images", images, *DRAWN, "--learning_rate", 0.05]


def test_the_code_of_a_part_with_a_vae_and_a_scheduler(make_card, tiny_sd, tmp_path):
    """--save_only_trained in half precision; the VAE is that of another pipeline's folder."""
    other = build_tiny_sd(tmp_path / "other", vae=build_tiny_vae(seed=3))
    words = [*fox(), "--save_only_trained", "--save_dtype", "bf16", "--prediction_type", "v_prediction"]
    output, given = make_card("part", tiny_sd, *words, "--pretrained_vae_model_name_or_path", other)
    files = {"unet": "unet/diffusion_pytorch_model.bf16.safetensors"}
    replaced = {"path/to/sd": tiny_sd, "path/to/other": other}
    pipe = check_the_code(output, given, replaced, files)["pipe"]
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    vae = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipe.vae.state_dict()[name], vae[name].bfloat16()) for name in vae)
    assert not (output / "vae").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precisions, variant", [(["fp16"], ".fp16"), (["fp32", "fp16"], "")])
def test_the_code_of_precisions(make_card, tiny_sd, precisions, variant):
    output, given = make_card("-".join(precisions), tiny_sd, *fox(), "--save_dtype", *precisions)
    files = {"unet": f"unet/diffusion_pytorch_model{variant}.safetensors"}
    scope = check_the_code(output, given, {}, files)
    assert scope["pipe"].text_encoder.dtype == (torch.float16 if variant else torch.float32)
    mentioned = '- in fp16: `variant="fp16"`' in (output / "README.md").read_text()
    assert mentioned == (not variant)


@pytest.mark.slow
def test_the_code_of_an_sdxl_lora_with_text_encoders(make_card, tiny_sdxl):
    """Beside files of kohya's and without averaging, which are not what is loaded."""
    words = ["--use_lora", "--train_text_encoder", "--use_ema", "--save_non_ema", "--output_kohya_format"]
    words += ["--prediction_type", "v_prediction", "--ema_decay", 0.5]
    output, given = make_card("sdxl", tiny_sdxl, *fox(2), *words, steps=3)
    pipe = check_the_code(output, given, {"path/to/sdxl": tiny_sdxl}, {})["pipe"]
    saved = load_file(output / "pytorch_lora_weights.safetensors")
    loaded = {name: value for name, value in pipe.unet.state_dict().items() if "lora_" in name}
    ours = {name: value for name, value in saved.items() if name.startswith("unet.")}
    assert len(ours) == len(loaded) > 0
    assert sorted(value.sum().item() for value in ours.values()) == pytest.approx(
        sorted(value.sum().item() for value in loaded.values())
    )
    text = (output / "README.md").read_text()
    assert "`pytorch_lora_weights_kohya.safetensors`" in text and "`pytorch_lora_weights_non_ema.safetensors`" in text
    for name in re.findall("`(pytorch_lora.*?)`", text):
        assert (output / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, words, trained",
    [
        ("Flux", ["--use_lora", "--output_kohya_format"], {}),
        ("PixArtSigma", ["--use_lora"], {}),
        ("StableDiffusion3", ["--save_only_trained", "--max_sequence_length", 77], "transformer"),
        ("StableDiffusion3", ["--save_only_trained", "--save_dtype", "fp16", "fp32"], "transformer"),
        ("Sana", [], "transformer"),
    ],
)
def test_the_code_of_a_transformer(make_card, tiny_pipeline, family, words, trained):
    base = tiny_pipeline(family)
    output, given = make_card(f"{family}{len(words)}", base, *fox(), *words)
    files = {trained: f"{trained}/diffusion_pytorch_model.safetensors"} if trained else {}
    check_the_code(output, given, {f"path/to/{family}": base}, files)


@pytest.mark.slow
@pytest.mark.parametrize("words, trained", [([], "transformer"), (["--use_lora"], {})])
def test_the_code_for_classes(make_card, tiny_pipeline, words, trained):
    base = tiny_pipeline("DiT")
    drawn = ["--validation_prompts", "volcano", "207", "--num_validation_images", 2, *DRAWN, "--learning_rate", 0.05]
    output, given = make_card(f"dit{len(words)}", base, *drawn, *words, data="classes")
    files = {trained: f"{trained}/diffusion_pytorch_model.safetensors"} if trained else {}
    check_the_code(output, given, {"path/to/DiT": base}, files)
    card = ModelCard.load(output / "README.md")
    check_as_the_hub_does(card.data, output)
    assert "The classes:\n\n1. volcano\n2. 207\n" in card.text and "class_labels=[980]" in card.text


@pytest.mark.slow
def test_the_code_of_a_pipeline_of_ours(make_card, tmp_path):
    build_tiny_vae().save_pretrained(tmp_path / "vae")
    config = Path(model_card.__file__).parent / "transformer_configs" / "mmdit-tiny.json"
    words = ["--transformer_config", config, "--pretrained_vae_model_name_or_path", tmp_path / "vae"]
    words += ["--validation_prompts", "volcano", *DRAWN, "--num_validation_images", 2]
    output, given = make_card("mmdit", None, *words, script=train_lpl_dit, data="classes")
    files = {"transformer": "transformer/diffusion_pytorch_model.safetensors"}
    check_the_code(output, given, {}, files)
    card = ModelCard.load(output / "README.md")
    check_as_the_hub_does(card.data, output)
    assert "base_model" not in card.data.to_dict() and not given.base_images
    assert "Samples; 2 steps, seeds 0 to 1." in card.text and str(config.parent) not in card.text
    assert Image.open(output / "samples" / "base_and_finetuned.jpg").height == 64


def test_the_code_says_where_the_base_model_is_from():
    args = of_base("--revision", "v2", "--variant", "fp16", "--use_lora", "--instance_prompt", "sks")
    code = model_card.code_of_card(args, family_of("StableDiffusionXLPipeline", weight_dtype=torch.bfloat16))
    imports, _, lines = code.partition("\n\n")
    assert imports == "import torch\nfrom diffusers import StableDiffusionXLPipeline"
    pipeline = MagicMock()
    exec(lines, {"torch": torch, "StableDiffusionXLPipeline": pipeline})
    pipe = call.from_pretrained().to()
    assert pipeline.mock_calls == [
        call.from_pretrained("owner/base", revision="v2", variant="fp16", dtype=torch.bfloat16),
        call.from_pretrained().to("cuda"),
        pipe.load_lora_weights("tester/out"),
        pipe(prompt="sks", height=512, width=512),
        pipe().images.__getitem__(0),
    ]


# Evaluation results


REPORT = {
    "settings": {"reference": "/home/me/val images", "num_samples": 5000, "steps": 50},
    "models": [{"name": "finetuned", "metrics": {"fid": 12.345678, "clip_score": 0.31, "kid": float("nan")}}],
}


@pytest.fixture
def card(tmp_path):
    model_card.write_model_card(of_base("--output_dir", tmp_path), SD, {}, {}, [], [])
    return tmp_path


def test_results_are_in_the_metadata_and_in_the_text(card):
    before = (card / "README.md").read_text()
    model_card.add_results(card, REPORT)
    text = (card / "README.md").read_text()
    raw = ModelCard.load(card / "README.md").data
    name, results = model_index_to_eval_results(raw.to_dict()["model-index"])
    assert name == "out"
    assert {r.metric_type: (r.metric_name, r.metric_value) for r in results} == {
        "fid": ("fid", 12.345678),
        "clip_score": ("clip score", 0.31),
    }
    for result in results:
        assert result.task_type == "text-to-image" and result.dataset_name == "val images"
        assert result.dataset_type == "imagefolder"
    rows = dict(re.findall("<td>(.*?)</td>\n<td>(.*?)</td>", rendered(text[text.index("## Evaluation") :])))
    assert rows == {"fid": "12.346", "clip score": "0.31"}
    assert "/home/me" not in text and "Measured with: reference val images, num\\_samples 5000, steps 50." in text
    body = before.partition("\n---\n")[2]
    assert body.rstrip() in text, "the rest is as it was"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_results_take_the_place_of_older_ones(card, line_end):
    model_card.add_results(card, REPORT)
    path, newer = card / "README.md", {"models": [{"name": "it", "metrics": {"fid": 9}}]}
    text = path.read_text() + "\n## Thanks\n\nto all\n"
    path.write_bytes(text.replace("\n", line_end).encode())
    model_card.add_results(card, newer)
    once = path.read_bytes().decode()
    assert once.count("## Evaluation") == 1 and once.count("## Thanks") == 1 and "12.346" not in once
    assert once.index("## Evaluation") < once.index("## Thanks") and "clip" not in once
    assert [result.metric_value for result in ModelCard.load(path).data.eval_results] == [9]
    model_card.add_results(card, newer)
    assert path.read_bytes().decode() == once


def test_one_of_several_models_is_named(card):
    report = {"models": [{"name": name, "metrics": {"fid": i}} for i, name in enumerate(("base", "mine"))]}
    with pytest.raises(UserError, match="--model: the report has base, mine; name one of them"):
        model_card.add_results(card, report)
    with pytest.raises(UserError, match="--model: the report has base, mine"):
        model_card.add_results(card, report, "yours")
    model_card.add_results(card, report, "mine")
    assert [result.metric_value for result in ModelCard.load(card / "README.md").data.eval_results] == [1]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        (b"\xff\xfe\x00", "can't be read"),
        ("[]", "no report of an evaluation"),
        ("{}", "no report of an evaluation"),
        ('{"models": [{"name": "a"}]}', "no report of an evaluation"),
        ('{"models": [{"name": "a", "metrics": [1]}]}', "no report of an evaluation"),
        ('{"models": 3}', "no report of an evaluation"),
        ('{"models": [], "settings": 3}', "no report of an evaluation"),
        ('{"models": []}', "no model"),
        ('{"models": [{"name": "a", "metrics": {"fid": NaN, "kid": null}}]}', "no number for a"),
    ],
)
def test_a_bad_report_is_one_sentence(card, text, sentence):
    report, before = card / "report.json", (card / "README.md").read_bytes()
    if text is not None:
        report.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence) as error:
        model_card.main(model_card.parse_args([str(card), "--report", str(report)]))
    assert str(error.value).endswith(".") and "\n" not in str(error.value) and str(error.value).startswith("--")
    assert (card / "README.md").read_bytes() == before


def test_the_command_line_adds_results(card, capsys):
    (card / "report.json").write_text(json.dumps(REPORT))
    model_card.main(model_card.parse_args([str(card), "--report", str(card / "report.json")]))
    assert "## Evaluation" in (card / "README.md").read_text()
    assert f"`hf upload OWNER/NAME {card / 'README.md'} README.md`" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no model card .*: train with --push_to_hub"):
        model_card.add_results(card / "none", REPORT)


def test_results_fit_a_card_that_was_written_by_hand(tmp_path):
    (tmp_path / "README.md").write_text("No heading, no metadata.\n")
    model_card.add_results(tmp_path, REPORT)
    name, results = model_index_to_eval_results(ModelCard.load(tmp_path / "README.md").data.to_dict()["model-index"])
    assert name == tmp_path.name and results[0].task_type == "text-to-image"
    assert "No heading, no metadata.\n\n## Evaluation\n" in (tmp_path / "README.md").read_text()
