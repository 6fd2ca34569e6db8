"""The model card of a run: what was trained on what, how, what it looks like, and how to use it.

write_model_card    `README.md` in the output folder, with the pictures that it shows
add_results         evaluation results, into the card's metadata and its text

python model_card.py FOLDER --report report.json    adds what an evaluation has found to the card in a folder
"""

import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from PIL import Image, ImageDraw, ImageFont

from arguments import LOG_FILE, Parser, UserError, first_line, run
from family import NON_EMA, VARIANTS
from kohya import KOHYA_FILE
from loading import DTYPES
from model_checks import is_folder_name


CARD, LOSSES, COMPARISON = "README.md", "loss.png", "samples/base_and_finetuned.jpg"
PAPER = "https://arxiv.org/abs/2411.04873"
CITATION = """@inproceedings{berrada2025boosting,
  title     = {Boosting Latent Diffusion with Perceptual Objectives},
  author    = {Berrada Ifriqi, Tariq and Astolfi, Pietro and Hall, Melissa and Havasi, Marton and Benchetrit, Yohann
               and Romero-Soriano, Adriana and Alahari, Karteek and Drozdzal, Michal and Verbeek, Jakob},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}"""


def write_model_card(args, family, training, facts, images, base_images):
    """Write `README.md` to the output folder, with the pictures that it shows.

    Args:
        training: what the flags do not say of the run, name -> text.
        facts: sections of their own, heading -> {name: text}; empty ones are left out.
        images: PIL images of the validation prompts, in the order of `train_utils.drawing_tasks`, or none.
        base_images: the same of the model before it was trained, or none.
    """
    output = Path(args.output_dir)
    base = base_metadata(args)
    sections = [f"# {args.hub_model_id.split('/')[-1]}", introduction(args, family)]
    if images:
        sections += [show_images(args, images, base_images)]
    sections += [f"## How to use it\n\n```python\n{code_of_card(args, family)}\n```", describe_files(args, family)]
    sections += [f"## Training\n\n{table(training | training_facts(args))}"]
    sections += [f"All flags that differ from their defaults:\n\n```bash\n{command(args)}\n```"]
    if draw_losses(read_log(output), output / LOSSES, args):
        sections += [f"![Losses and their shares over the training steps]({LOSSES})"]
    sections += [f"## {heading}\n\n{table(rows)}" for heading, rows in facts.items() if rows]
    sections += [f"## License\n\n{describe_license(args, base)}"]
    if args.lpl_weight != 0:
        sections += [f"## Citation\n\nThe Latent Perceptual Loss:\n\n```bibtex\n{CITATION}\n```"]
    text = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{metadata(args, family, base, images).to_yaml()}\n---\n\n{text}\n").save(output / CARD)


# What the Hub reads


def metadata(args, family, base, images):
    """ModelCardData: what the Hub finds and shows the model by. base: the base model's (see `base_metadata`)."""
    sources = {"base_model": args.pretrained_model_name_or_path, "datasets": args.dataset_name}
    # The Hub refuses metadata with a name that is not an id.
    found = {key: name for key, name in sources.items() if name and not is_folder_name(name)}
    if "base_model" in found:
        found["base_model_relation"] = "adapter" if args.use_lora else "finetune"
    task = "text-to-image" if args.num_classes is None else "unconditional-image-generation"
    tags = [task, "diffusers", "diffusers-training", *["latent-perceptual-loss"] * (args.lpl_weight != 0)]
    tags += TAGS.get(family.pipeline_class.__name__, []) + ["lora", "template:sd-lora"] * args.use_lora
    prompt = args.instance_prompt or args.trigger_word
    if prompt:
        found["instance_prompt"] = prompt
    if images and args.num_classes is None:
        urls = (image_name(i) for i in range(len(args.validation_prompts)))
        found["widget"] = [{"text": text, "output": {"url": url}} for text, url in zip(args.validation_prompts, urls)]
    library = "diffusers" if family.stock_lora or not args.use_lora else "peft"
    return ModelCardData(library_name=library, pipeline_tag=task, tags=tags, **license_of(args, base), **found)


TAGS = {
    "StableDiffusionPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionXLPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    "KolorsPipeline": ["kolors"],
    "StableDiffusion3Pipeline": ["sd3", "sd3-diffusers"],
    "FluxPipeline": ["flux", "flux-diffusers"],
    "ChromaPipeline": ["chroma"],
    "Flux2KleinPipeline": ["flux2", "flux2-klein"],
    "QwenImagePipeline": ["qwen-image"],
    "ZImagePipeline": ["z-image"],
    "Lumina2Pipeline": ["lumina2"],
    "AuraFlowPipeline": ["aura-flow"],
    "SanaPipeline": ["sana"],
    "PixArtAlphaPipeline": ["pixart-alpha"],
    "PixArtSigmaPipeline": ["pixart-sigma"],
    "HunyuanDiTPipeline": ["hunyuan-dit"],
    "DiTPipeline": ["dit"],
}


def base_metadata(args):
    """The metadata of the base model's card, {} if there is none in reach."""
    name = args.pretrained_model_name_or_path
    if name is None:
        return {}
    try:
        path = Path(name, CARD) if is_folder_name(name) else hf_hub_download(name, CARD, revision=args.revision)
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is not needed, and many things can be wrong with one
        return {}


def license_of(args, base):
    """What the metadata says of the license: the base model's."""
    found = {key: base[key] for key in ("license", "license_name", "license_link") if base.get(key)}
    link, name = found.get("license_link"), args.pretrained_model_name_or_path
    if link and "://" not in link:  # a file of the base model's repository
        found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
        if is_folder_name(name):
            del found["license_link"]
    return found


def describe_license(args, base):
    found = license_of(args, base)
    if not args.pretrained_model_name_or_path:
        return "The license of these weights is for their author to say."
    base = f"`{public_name(args.pretrained_model_name_or_path)}`"
    if "license" not in found:
        return f"The base model {base} says nothing of its license in its model card; its terms hold here, too."
    text = f"That of the base model {base}: {found.get('license_name') or found['license']}"
    return text + (f" ([text]({found['license_link']}))." if "license_link" in found else ".")


# What people read


def introduction(args, family):
    base, vae, dataset = (
        args.pretrained_model_name_or_path,
        args.pretrained_vae_model_name_or_path,
        args.dataset_name,
    )
    if args.transformer_config:
        text = f"A {type(family.denoiser).__name__} trained from scratch"
        text += f" in the pipeline of {linked(base)}" if base else ""
    else:
        text = f"{'LoRA weights for' if args.use_lora else 'Finetuned from'} {linked(base)}"
    text += f" with the VAE {linked(vae)}" if vae else ""
    data = f"the dataset {linked(dataset)}" if dataset else "tar shards" if args.train_shards else "a folder of images"
    objective = "the diffusion loss alone"
    if args.lpl_weight != 0:
        objective = f"the [Latent Perceptual Loss]({PAPER}) besides the diffusion loss"
    text += f", trained on {data} for {args.max_train_steps} steps at {args.resolution} pixels with {objective}."
    prompt = args.instance_prompt or args.trigger_word
    return text + (f" Write `{prompt}` in your prompt to get what it has learnt." if prompt else "")


def linked(name):
    """Markdown for a Hub id, or for a folder of this machine, of which nobody else need know but its own name."""
    return f"`{public_name(name)}`" if is_folder_name(name) else f"[{name}](https://huggingface.co/{name})"


def image_name(number):
    return f"samples/prompt-{number}.jpg"


def show_images(args, images, base_images):
    """Saves the first image of each prompt, and all beside those of the base model; returns their section."""
    prompts, per_prompt = args.validation_prompts, args.num_validation_images
    rows, labels = [], []
    for i in range(len(prompts)):
        mine = slice(i * per_prompt, (i + 1) * per_prompt)
        save_image(images[mine][0], Path(args.output_dir, image_name(i)))
        rows += [base_images[mine], images[mine]] if base_images else [images[mine]]
        labels += ["base", "finetuned"] if base_images else [f"prompt {i + 1}"]
    save_image(labelled_grid(rows, labels), Path(args.output_dir, COMPARISON))
    what = "The base model above, this one below, with the same seeds; " if base_images else "Samples; "
    guidance = args.validation_guidance_scale
    settings = f"{args.validation_inference_steps} steps" + (
        f", guidance {guidance:g}" if guidance is not None else ""
    )
    first, last = args.seed, args.seed + per_prompt - 1
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    numbered = "\n".join(f"{i + 1}. {escaped(prompt)}" for i, prompt in enumerate(prompts))
    return f"![Samples]({COMPARISON})\n\n{what}{settings}, {seeds}. The prompts:\n\n{numbered}"


def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def labelled_grid(rows, labels):
    """Rows of PIL images of one size, one image `[H, W]` of all, a label at the left of each row."""
    width, height = rows[0][0].size
    size = max(10, height // 20)
    font = ImageFont.load_default(size)
    margin = int(max(font.getlength(label) for label in labels)) + size
    grid = Image.new("RGB", (margin + width * len(rows[0]), height * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (row, label) in enumerate(zip(rows, labels)):
        draw.text((size // 2, int((y + 0.5) * height)), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(row):
            grid.paste(image, (margin + x * width, y * height))
    return grid


def describe_files(args, family):
    """What there is besides what the code loads."""
    name, lines = family.denoiser_name, []
    for precision in args.save_dtype[1:]:
        lines += [f'in {precision}: `variant="{VARIANTS[precision]}"`']
    if args.save_non_ema and not args.use_lora:
        lines += [f'without averaging: `subfolder="{name}", variant="{NON_EMA}"`']
    elif args.save_non_ema:
        where = f"pytorch_lora_weights_{NON_EMA}.safetensors" if family.stock_lora else f"{NON_EMA}/"
        lines += [f"without averaging: `{where}`"]
    if args.output_kohya_format:
        lines += [f"for ComfyUI, A1111, Forge and kohya's scripts: `{KOHYA_FILE}`"]
    if args.push_to_hub and args.hub_strategy != "end":
        lines += ["to go on with the training: the `checkpoint-` folders"]
    return "\n".join(["## Other files", "", *(f"- {line}" for line in lines)]) if lines else ""


def training_facts(args):
    """Flags as they were resolved, and what the log says, name -> text."""
    log = read_log(args.output_dir)
    facts = {"Seed": args.seed, "Steps": args.max_train_steps, "Resolution": args.resolution}
    facts["Learning rate"] = f"{args.learning_rate:g}, {args.lr_scheduler}"
    if log:
        last = log[max(0, len(log) - max(1, len(log) // 10)) :]
        facts["Loss at the end"] = ", ".join(
            f"{name} {mean(last, name):.4g}" for name in ("l2", "lpl") if any(name in line for line in last)
        )
        shares = sorted({name for line in log for name in line if name.endswith("_share") and name[:-6] in line})
        for name in shares:
            title = f"Share of {name.removesuffix('_share')} in the loss, measured"
            facts[title] = f"{mean(log, name):.1%} over the whole run, {mean(last, name):.1%} at the end"
    versions = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    facts["Libraries"] = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    return facts


def duration(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def command(args):
    """The command line of the run, without paths and secrets."""
    words = []
    for name, value in args.changed.items():
        if value is False:
            words += [f"--no-{name}"] if name.startswith("lpl_") else [f"--{name} false"]
        elif value is True:
            words += [f"--{name}"]
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name} " + " ".join(shlex.quote(without_path(str(value))) for value in values)]
    return " \\\n  ".join([f"accelerate launch {Path(sys.argv[0]).name}", *words])


def without_path(word):
    """Of a file or folder only its own name."""
    path = os.path.isabs(word) or os.sep in word and Path(word).exists()
    return Path(word).resolve().name if path else word


def table(rows):
    lines = [f"| {name} | {escaped(str(text))} |" for name, text in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def escaped(text):
    """Plain text for a line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def findable(name):
    """For code: a Hub id, or where a folder could be."""
    return f"path/to/{public_name(name)}" if is_folder_name(name) else name


def public_name(name):
    """A Hub id as it is; of a folder of this machine only its own name."""
    return Path(name).resolve().name if is_folder_name(name) else name


# The curve of the losses


def read_log(output):
    """The lines of `train_log.jsonl`, a list of dicts."""
    path = Path(output, LOG_FILE)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean(log, name):
    values = [line[name] for line in log if name in line]
    return sum(values) / len(values)


def draw_losses(log, path, args):
    """A picture of the loss's terms and LPL's share over the steps; returns whether there was anything to draw."""
    if not log:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    terms = [name for name in log[-1] if f"{name}_share" in log[-1] or name == "l2"]
    shares = [name for name in terms if name != "l2"]
    figure, axes = plt.subplots(1, 1 + bool(shares), figsize=(5 + 5 * bool(shares), 3.5), squeeze=False)
    for names, axis, suffix in ((terms, axes[0, 0], ""), (shares, axes[0, -1], "_share")):
        for name, color in zip(names, ("C0", "C1", "C2", "C3")[len(terms) - len(names) :]):
            lines = [line for line in log if name + suffix in line]
            steps, values = [line["step"] for line in lines], [line[name + suffix] for line in lines]
            axis.plot(steps, values, color=color, alpha=0.3, marker="." if len(steps) < 20 else None)
            axis.plot(steps, smoothed(values), color=color, label=name + suffix)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend()
    if shares:
        axes[0, 1].set_ylabel("share of the loss")
        axes[0, 1].set_ylim(0)
        if args.lpl_weight == "auto":
            axes[0, 1].axhline(args.lpl_target_share, color="gray", linestyle="--", label="--lpl_target_share")
        axes[0, 1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def smoothed(values):
    """Means over the last tenth of the run, at each point."""
    window = max(1, len(values) // 10)
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


# The code of the card


CUDA = '.to("cuda")'


def code_of_card(args, family):
    """Python that loads the result from the Hub, as it was trained, and draws the first validation prompt."""
    base, result = args.pretrained_model_name_or_path, args.hub_model_id
    pipeline, denoiser = family.pipeline_class.__name__, family.denoiser_class.__name__
    precision = args.save_dtype[0]
    dtype = {"dtype": f"torch.{str(DTYPES[precision]).removeprefix('torch.')}"} if precision != "fp32" else {}
    saved = {"variant": quoted(precision), **dtype} if dtype else {}
    custom = {} if hasattr(diffusers, pipeline) else {"trust_remote_code": True}  # its code is among the files
    pipeline = "DiffusionPipeline" if custom else pipeline
    imports, classes, lines = ["import torch"] * bool(dtype), {pipeline}, []
    if not args.use_lora and not args.save_only_trained:
        lines += [f"pipe = {loading(pipeline, result, **custom, **saved)}{CUDA}"]
    else:
        # Without a dtype the text encoders would come in the precision of their files, the UNet in float32.
        dtype = dtype or {"dtype": "torch.float32"}
        given = {name: quoted(getattr(args, name)) for name in ("revision", "variant") if getattr(args, name)}
        given |= custom | dtype
        imports = ["import torch"]
        if args.pretrained_vae_model_name_or_path:
            vae = type(family.vae).__name__
            classes.add(vae)
            lines += [f"vae = {loading(vae, findable(args.pretrained_vae_model_name_or_path), **dtype)}"]
            given["vae"] = "vae"
        if args.save_only_trained:
            name = family.denoiser_name
            classes.add(denoiser)
            lines += [f"{name} = {loading(denoiser, result, subfolder=quoted(name), **saved)}"]
            given[name] = name
        lines += [f"pipe = {loading(pipeline, findable(base), **given)}{CUDA}"]
        if args.use_lora and family.stock_lora:
            lines += [f"pipe.load_lora_weights({quoted(result)})"]
        elif args.use_lora:
            imports += ["from peft import PeftModel"]
            lines += [f"PeftModel.from_pretrained(pipe.transformer, {quoted(result)})"]
        scheduler = Path(args.output_dir, "scheduler", "scheduler_config.json")
        if scheduler.exists():  # it is saved if training changed it
            scheduler_class = json.loads(scheduler.read_text())["_class_name"]
            classes.add(scheduler_class)
            lines += [f"pipe.scheduler = {loading(scheduler_class, result, subfolder=quoted('scheduler'))}"]
    if args.validation_prompts:
        settings = family.prompt(args.validation_prompts[0])
        settings |= {**family.size_settings(args.resolution), **family.sampling}
        settings = [f"{name}={quoted(value)}" for name, value in settings.items()]
        lines += [f"image = pipe({', '.join(settings)}).images[0]"]
    return "\n".join([*imports, f"from diffusers import {', '.join(sorted(classes))}", "", *lines])


def loading(model_class, source, **kwargs):
    """A call of from_pretrained; the arguments are code."""
    words = [quoted(source), *(f"{name}={value}" for name, value in kwargs.items())]
    return f"{model_class}.from_pretrained({', '.join(words)})"


def quoted(value):
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


# Evaluation results


def add_results(folder, report, model=None):
    """Put what an evaluation has found into a card: as `model-index` for the Hub, and as a table.

    Args:
        report: a dict as in `report.json`: `models`, a list of `{name, metrics: {name: number}}`, and `settings`, of
            which `reference` and `num_samples` are named.
        model: the name of the model in the report, if it has several.
    Raises UserError: there is no card, or no such model.
    """
    path = Path(folder, CARD)
    if not path.exists():
        raise UserError(f"there is no model card {path}: train with --push_to_hub, which writes one.")
    named = {entry["name"]: entry["metrics"] for entry in report["models"]}
    model = model if model is not None or len(named) > 1 else next(iter(named))
    if model not in named:
        raise UserError(f"--model: the report has {', '.join(named)}; name one of them.")
    metrics = {name: value for name, value in named[model].items() if math.isfinite(value)}
    settings = report.get("settings", {})
    reference = public_name(str(settings.get("reference", "reference")))
    card = ModelCard.load(path)
    where = {"task_type": card.data.pipeline_tag, "dataset_type": "imagefolder", "dataset_name": reference}
    card.data.model_name = card.text.strip().splitlines()[0].removeprefix("# ")
    card.data.eval_results = [
        EvalResult(metric_type=name, metric_value=value, metric_name=name.replace("_", " "), **where)
        for name, value in metrics.items()
    ]
    heading = "## Evaluation"
    rows = table({name.replace("_", " "): f"{value:.5g}" for name, value in metrics.items()})
    known = ", ".join(f"{name} {public_name(str(value))}" for name, value in settings.items())
    before, _, after = card.text.partition(f"{heading}\n")
    rest = after[after.index("\n## ") :] if "\n## " in after else ""
    section = f"{heading}\n\n{rows}\n\nMeasured with: {escaped(known)}.\n"
    if not after:
        before, rest = before.rstrip() + "\n\n", ""
    card.text = before + section + rest
    card.save(path)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="the output folder of a training run")
    parser.add_argument("--report", required=True, help="json file of evaluation results")
    parser.add_argument("--model", help="which of the report's models this is, if it has several")
    return parser.parse_args(argv)


def main(args):
    try:
        add_results(args.folder, json.loads(Path(args.report).read_text(encoding="utf-8")), args.model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--report {args.report} is no report of an evaluation ({first_line(error)}).") from error
    card = Path(args.folder, CARD)
    print(f"{card} has the results; `hf upload OWNER/NAME {card} {CARD}` uploads it.")


if __name__ == "__main__":
    run(main, parse_args())
