"""The model card of a run: what was trained on what, how, what it looks like, and how to use it.

write_model_card    `README.md` in the output folder, with the pictures that it shows
add_results         evaluation results, into the card's metadata and its text

python model_card.py FOLDER --report report.json    adds what an evaluation has found to the card in a folder
"""

from arguments import LOG_FILE, OBJECTIVES, Parser, UserError, all_checkpoints, first_line, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="the output folder of a training run")
    parser.add_argument("--report", required=True, help="json file of evaluation results")
    parser.add_argument("--model", help="which of the report's models this is, if it has several")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the libraries below take their seconds

# ruff: noqa: E402
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from PIL import Image, ImageDraw, ImageFont, ImageOps

from family import NON_EMA, VARIANTS
from kohya import KOHYA_FILE
from latent_lpips_files import PUBLISHED
from loading import DTYPES, hub_flags
from model_checks import is_folder_name, public_name


CARD, LOSSES, COMPARISON = "README.md", "loss.png", "samples/base_and_finetuned.jpg"
LARGEST, MOST_PROMPTS, MOST_IMAGES = 1024, 8, 4  # pixels of a side of an image in the comparison, rows, columns
PAPER = "https://arxiv.org/abs/2411.04873"
TERMS = {
    "l2": "the diffusion loss",
    "lpl": f"the [Latent Perceptual Loss]({PAPER})",
    "self_perceptual": "the [self-perceptual loss](https://arxiv.org/abs/2401.00110)",
    "e_latent_lpips": "[E-LatentLPIPS](https://arxiv.org/abs/2405.05967)",
    "rgb": "the squared error of the decoded images",
    "clean_latent": "the squared error of the clean latents",
}
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
    sections += [f"## How to use it\n\n{fenced(code_of_card(args, family), 'python')}", describe_files(args, family)]
    sections += [f"## Training\n\n{table(training | training_facts(args))}"]
    sections += [f"All flags that differ from their defaults:\n\n{fenced(command(args), 'bash')}"]
    if draw_losses(read_log(output), output / LOSSES, args):
        sections += [f"![Losses and their shares over the training steps]({LOSSES})"]
    sections += [f"## {heading}\n\n{table(rows)}" for heading, rows in facts.items() if rows]
    sections += [f"## License\n\n{describe_license(args, base)}"]
    if args.lpl_weight != 0:
        sections += [f"## Citation\n\nThe Latent Perceptual Loss:\n\n```bibtex\n{CITATION}\n```"]
    text = "\n\n".join(section for section in sections if section)
    keep_notes(output / CARD)
    ModelCard(f"---\n{metadata(args, family, base, images).to_yaml()}\n---\n\n{text}\n").save(output / CARD)


def keep_notes(path):
    """A README.md that no training script has written is somebody's own."""
    if path.exists() and "diffusers-training" not in path.read_text(encoding="utf-8", errors="replace"):
        kept = path.with_name("README.old.md")
        os.replace(path, kept)
        print(f"Your {path} is {kept} now, as the model card is to have its name.", file=sys.stderr)


# What the Hub reads


def metadata(args, family, base, images):
    """ModelCardData: what the Hub finds and shows the model by. base: the base model's (see `base_metadata`)."""
    base_model = None if args.transformer_config else args.pretrained_model_name_or_path
    sources = {"base_model": base_model, "datasets": args.dataset_name}
    # The Hub refuses metadata with a name that is not an id.
    found = {key: name for key, name in sources.items() if name and not is_folder_name(name)}
    if "base_model" in found:
        found["base_model_relation"] = "adapter" if args.use_lora else "finetune"
    task = "text-to-image" if args.num_classes is None else "unconditional-image-generation"
    tags = [task, "diffusers", "diffusers-training", *["latent-perceptual-loss"] * adds_lpl(args)]
    tags += TAGS.get(family.pipeline_class.__name__, []) + ["lora", "template:sd-lora"] * args.use_lora
    prompt = args.instance_prompt or args.trigger_word
    if prompt:
        found["instance_prompt"] = prompt
    if images and args.num_classes is None:
        urls = (image_name(i) for i in range(len(args.validation_prompts)))
        texts = (text.strip() or "-" for text in args.validation_prompts)  # the Hub wants one
        found["widget"] = [{"text": text, "output": {"url": url}} for text, url in zip(texts, urls)]
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
LICENSES = (  # what the Hub takes for one; it refuses all files together with a card that names another
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other"
).split()


def base_metadata(args):
    """The metadata of the base model's card, {} if there is none in reach."""
    name = args.pretrained_model_name_or_path
    if name is None:
        return {}
    try:
        path = Path(name, CARD) if is_folder_name(name) else hf_hub_download(name, CARD, **hub_flags(args))
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is not needed, and many things can be wrong with one
        return {}


def license_of(args, base):
    """What the metadata says of the license: the base model's, in words that the Hub takes."""
    name = args.pretrained_model_name_or_path
    known = base.get("license") or ["other"] * bool(base.get("license_name"))
    if not known:
        return {}
    known = [str(license).strip().lower() for license in (known if isinstance(known, list) else [known])]
    found = {"license": known[0] if len(known) == 1 else known}
    if not set(known) <= set(LICENSES):
        found = {"license": "other", "license_name": "-".join(" ".join(known).split())}
    if "other" in known:
        found["license_name"] = str(base.get("license_name") or f"{public_name(name).split('/')[-1].lower()}-license")
    link = str(base.get("license_link") or "")
    if "://" in link:
        found["license_link"] = link
    elif link and not is_folder_name(name):  # a file of the base model's repository
        found["license_link"] = f"https://huggingface.co/{name}/blob/{args.revision or 'main'}/{link}"
    return found


def describe_license(args, base):
    found, name = license_of(args, base), args.pretrained_model_name_or_path
    vae = args.pretrained_vae_model_name_or_path
    text = "The license of these weights is for their author to say."
    if name and "license" not in found:
        text = f"The license of {linked(name)} is not known here; its terms hold for these weights, too."
    elif name:
        terms = found.get("license_name") or found["license"]
        terms = terms if isinstance(terms, str) else ", ".join(terms)
        text = f"That of {linked(name)}: " + (
            f"[{escaped(terms)}]({found['license_link']})." if "license_link" in found else f"{escaped(terms)}."
        )
    text += f" The VAE {linked(vae)} has its own." if vae else ""
    if args.e_latent_lpips_weight != 0 and is_published(args.e_latent_lpips_model):
        text += f" These weights learned from {linked(PUBLISHED)}, which is CC BY-NC: not for commercial use."
    return text


def is_published(name):
    """Whether a network for E-LatentLPIPS is one that Kang et al. have published, or a copy of it."""
    copied = name.endswith("_latest_vgg16_tuned.pth") or Path(name, "elatentlpips_ckpt").is_dir()
    return copied or f"{name}/".startswith(f"{PUBLISHED}/")


# What people read


def introduction(args, family):
    base, vae, how = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path, "trained"
    if args.transformer_config:
        text, how = f"A `{type(family.denoiser).__name__}`", "trained from scratch"
        text += f" in the pipeline of {linked(base)}" if base else ""
    else:
        text = f"{'LoRA weights for' if args.use_lora else 'Finetuned from'} {linked(base)}"
    text += f" with the VAE {linked(vae)}" if vae else ""
    data = "tar shards" if args.train_shards else "a folder of images"
    if args.dataset_name:
        data = f"the dataset {linked(args.dataset_name, 'datasets/')}"
    text += f", {how} on {data} for {args.max_train_steps} steps at {args.resolution} pixels with {objective(args)}."
    prompt = args.instance_prompt or args.trigger_word
    return text + (f" Write {code_span(prompt)} in your prompt to get what it has learnt." if prompt else "")


def objective(args):
    """The terms of the loss, in words."""
    terms = [TERMS["lpl"]] * adds_lpl(args)
    terms += [TERMS[name] for name in OBJECTIVES if getattr(args, f"{name}_weight") != 0]
    weighted = f", whose weights come from {TERMS['lpl']}" if args.late_reweight else ""
    if args.l2_weight == 0:
        return " and ".join(terms) + " alone" * (len(terms) == 1)
    besides = f"{' and '.join(terms)} besides " if terms else ""
    return f"{besides}{TERMS['l2']}{weighted}" + " alone" * (not terms and not weighted)


def adds_lpl(args):
    """Whether LPL is a term of the loss, and not only where the weights of the diffusion loss are from."""
    return args.lpl_weight != 0 and not args.late_reweight


def linked(name, kind=""):
    """Markdown for a Hub id, or for a folder of this machine, of which nobody else need know but its own name."""
    return f"`{public_name(name)}`" if is_folder_name(name) else f"[{name}](https://huggingface.co/{kind}{name})"


def image_name(number):
    return f"samples/prompt-{number}.jpg"


def show_images(args, images, base_images):
    """Saves the first image of each prompt, and all beside those of the base model; returns their section."""
    prompts, per_prompt = args.validation_prompts, args.num_validation_images
    rows, labels = [], []
    for i in range(len(prompts)):
        mine, number = slice(i * per_prompt, (i + 1) * per_prompt), f"{i + 1} " if len(prompts) > 1 else ""
        save_image(images[mine][0], Path(args.output_dir, image_name(i)))
        if i >= MOST_PROMPTS:
            continue
        rows += [part[mine][:MOST_IMAGES] for part in (base_images, images) if part]
        labels += [f"{number}base", f"{number}finetuned"] if base_images else [number.strip()]
    save_image(labelled_grid(rows, labels), Path(args.output_dir, COMPARISON))
    what = "The base model above, this one below, with the same seeds" if base_images else "Samples"
    settings = [f"{what}; {args.validation_inference_steps} steps"]
    if args.validation_guidance_scale is not None:
        settings += [f"guidance {args.validation_guidance_scale:g}"]
    first, last = args.seed, args.seed + min(per_prompt, MOST_IMAGES) - 1
    settings += [f"seed {first}" if first == last else f"seeds {first} to {last}"]
    kind = "prompts" if args.num_classes is None else "classes"
    kind = f"first {MOST_PROMPTS} of these {kind}" if len(prompts) > MOST_PROMPTS else kind
    numbered = "\n".join(f"{i + 1}. {escaped(prompt) or '(empty)'}" for i, prompt in enumerate(prompts))
    return f"![Samples]({COMPARISON})\n\n{', '.join(settings)}. The {kind}:\n\n{numbered}"


def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, subsampling=0)  # details are what one looks for


def labelled_grid(rows, labels):
    """Rows of PIL images of one size -> one image of all, each made smaller to LARGEST, a label beside each row."""
    if max(rows[0][0].size) > LARGEST:
        rows = [[ImageOps.contain(image, (LARGEST, LARGEST)) for image in row] for row in rows]
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
    if args.push_to_hub and args.hub_strategy != "end" and all_checkpoints(args.output_dir):
        lines += ["to go on with the training: the `checkpoint-` folders"]
    return "\n".join(["## Other files", "", *(f"- {line}" for line in lines)]) if lines else ""


def training_facts(args):
    """Flags as they were resolved, and what the log says, name -> text."""
    facts = {"Seed": args.seed, "Steps": args.max_train_steps, "Resolution": args.resolution}
    rate = f"{args.learning_rate:g}" + " x samples per step" * args.scale_lr
    facts["Optimizer"] = f"{args.optimizer}, learning rate {rate}, {args.lr_scheduler}"
    log = read_log(args.output_dir)
    terms = loss_terms(log)
    if log:
        losses = {name: mean(last_tenth(log), name) for name in terms if name in log[-1]}
        facts["Losses at the end"] = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    for name in terms[1:]:
        lines = [line for line in log if name in line]
        steps = "" if len(lines) == len(log) else f" from step {lines[0]['step']} to {lines[-1]['step']}"
        average, end = mean(lines, f"{name}_share"), mean(last_tenth(lines), f"{name}_share")
        facts[f"Share of {name} in the loss"] = f"{average:.1%} on average{steps}, {end:.1%} at the end"
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
            values = [without_path(name, str(word)) for word in (value if isinstance(value, list) else [value])]
            between = "=" if len(values) == 1 and values[0].startswith("-") else " "  # else argparse sees a flag
            words += [f"--{name}{between}{shlex.join(values)}"]
    return " \\\n  ".join([f"accelerate launch {Path(sys.argv[0]).name}", *words])


def without_path(flag, word):
    """Of a file or folder only its own name."""
    path = flag == "train_shards" or word.startswith(("/", "~", "./", "../")) or "/" in word and Path(word).exists()
    return Path(word).resolve().name if path and flag not in TEXTS else word


TEXTS = "validation_prompts validation_prompt instance_prompt class_prompt trigger_word".split()


def table(rows):
    lines = [f"| {name} | {escaped(str(text))} |" for name, text in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def escaped(text):
    """Plain text for a line of Markdown, which may be an item of a list."""
    text = re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([-+.)])(?= |$)", r"\1\\\2", text)


def fenced(code, language):
    fence = ticks(code, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def code_span(text):
    text, fence = " ".join(text.split()), ticks(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def ticks(text, at_least):
    """More backticks in a row than there are in a text."""
    return "`" * max([at_least, *(1 + len(run) for run in re.findall("`+", text))])


def findable(name):
    """For code: a Hub id, or where a folder could be."""
    return f"path/to/{public_name(name)}" if is_folder_name(name) else name


# The curve of the losses


def read_log(output):
    """The lines of `train_log.jsonl` about training, a list of dicts."""
    path = Path(output, LOG_FILE)
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if "loss" in line]


def last_tenth(log):
    return log[-max(1, len(log) // 10) :]


def mean(log, name):
    values = [line[name] for line in log if name in line]
    return sum(values) / len(values)


def loss_terms(log):
    """Names of the terms that the loss had at some step, `l2` first; the others have a share."""
    names = dict.fromkeys(name for line in log for name in line)
    return [name for name in names if name == "l2" or f"{name}_share" in names]


def draw_losses(log, path, args):
    """A picture of the loss's terms and LPL's share over the steps; returns whether there was anything to draw."""
    if not log:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    terms = loss_terms(log)
    shares = terms[1:]
    panels = 1 + bool(shares)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.5), squeeze=False, sharex=True)
    for names, axis, suffix in ((terms, axes[0, 0], ""), (shares, axes[0, -1], "_share")):
        for name in names:
            lines = [line for line in log if name + suffix in line]
            steps, values = [line["step"] for line in lines], [line[name + suffix] for line in lines]
            look = {"color": f"C{terms.index(name)}", "marker": "." if len(steps) < 20 else None}
            axis.plot(steps, values, alpha=0.3, **look)
            axis.plot(steps, smoothed(values), label=name + suffix, **look)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend()
    if shares:
        axes[0, 1].set_ylabel("share of the loss")
        if args.lpl_weight == "auto" and "lpl" in shares:
            axes[0, 1].axhline(args.lpl_target_share, color="gray", linestyle="--", label="--lpl_target_share")
        axes[0, 1].set_ylim(0, 1.2 * axes[0, 1].get_ylim()[1])
        axes[0, 1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def smoothed(values):
    """Means over the last tenth of the run, at each point."""
    window, sums = max(1, len(values) // 10), np.cumsum([0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


# The code of the card


CUDA = '.to("cuda")'


def code_of_card(args, family):
    """Python that loads the result from the Hub, as it was trained, and draws the first validation prompt."""
    base, result = args.pretrained_model_name_or_path, args.hub_model_id
    pipeline, denoiser = family.pipeline_class.__name__, family.denoiser_class.__name__
    precision, whole = args.save_dtype[0], not args.use_lora and not args.save_only_trained
    # The parts of several repositories must agree: without a dtype, each would have that of its files, or float32.
    dtype = DTYPES[precision] if precision != "fp32" else None if whole else family.weight_dtype
    dtype = {"dtype": str(dtype)} if dtype else {}
    saved = {"variant": quoted(precision), **dtype} if precision != "fp32" else dtype
    custom = {} if hasattr(diffusers, pipeline) else {"trust_remote_code": True}  # its code is among the files
    pipeline = "DiffusionPipeline" if custom else pipeline
    classes, lines = {pipeline}, []
    if whole:
        lines += [f"pipe = {loading(pipeline, result, **custom, **saved)}{CUDA}"]
    else:
        given = {name: quoted(getattr(args, name)) for name in ("revision", "variant") if getattr(args, name)}
        given |= custom | dtype
        if args.pretrained_vae_model_name_or_path:
            vae = type(family.vae).__name__
            classes.add(vae)
            name = args.pretrained_vae_model_name_or_path
            part = {"subfolder": quoted("vae")} if Path(name, "model_index.json").exists() else {}
            lines += [f"vae = {loading(vae, findable(name), **part, **dtype)}"]
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
            lines += [f"PeftModel.from_pretrained(pipe.transformer, {quoted(result)})"]
        scheduler = Path(args.output_dir, "scheduler", "scheduler_config.json")
        if scheduler.exists():  # it is saved if training changed it
            scheduler_class = json.loads(scheduler.read_text())["_class_name"]
            classes.add(scheduler_class)
            lines += [f"pipe.scheduler = {loading(scheduler_class, result, subfolder=quoted('scheduler'))}"]
    prompts = args.validation_prompts
    if not prompts and args.num_classes is None:
        prompts = list(filter(None, [args.instance_prompt or args.trigger_word]))
    if prompts:
        settings = family.prompt(prompts[0])
        settings |= {**family.size_settings(args.resolution), **family.sampling}
        settings = [f"{name}={quoted(value)}" for name, value in settings.items()]
        lines += [f"image = pipe({', '.join(settings)}).images[0]"]
    imports = ["import torch"] * bool(dtype) + [f"from diffusers import {', '.join(sorted(classes))}"]
    imports += ["from peft import PeftModel"] * (args.use_lora and not family.stock_lora)
    return "\n".join([*imports, "", *lines])


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
            which `reference` is the data's name. What is no finite number is left out.
        model: the name of the model in the report, if it has several.
    Raises UserError: there is no card, no such model, or no number of it.
    """
    path = Path(folder, CARD)
    if not path.exists():
        raise UserError(f"there is no model card {path}: train with --push_to_hub, which writes one.")
    try:
        named = {entry["name"]: dict(entry["metrics"]) for entry in report["models"]}
        settings = settings_of_report(report.get("settings", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "--report: this is no report of an evaluation, which has a list `models` of names and metrics."
        ) from error
    if model is None and len(named) == 1:
        (model,) = named
    if model not in named:
        raise UserError(f"--model: the report has {', '.join(map(str, named)) or 'no model'}; name one of them.")
    metrics = {name: value for name, value in named[model].items() if is_finite(value)}
    if not metrics:
        raise UserError(f"--report: there is no number for {model}.")
    card = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    heading = re.search(r"^# (.*\S)", card.text, re.MULTILINE)
    card.data.model_name = heading[1] if heading else Path(folder).resolve().name
    where = {"task_type": card.data.pipeline_tag or "text-to-image", "dataset_type": "imagefolder"}
    where["dataset_name"] = settings.get("reference", "reference")
    titles = {name: name.replace("_", " ") for name in metrics}
    card.data.eval_results = [
        EvalResult(metric_type=name, metric_value=value, metric_name=titles[name], **where)
        for name, value in metrics.items()
    ]
    section = f"## Evaluation\n\n{table({titles[name]: f'{value:.5g}' for name, value in metrics.items()})}"
    if settings:
        section += f"\n\nMeasured with: {escaped(', '.join(f'{name} {value}' for name, value in settings.items()))}."
    old = re.search(r"^## Evaluation\s*$.*?(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    before, after = (card.text[: old.start()], card.text[old.end() :]) if old else (card.text, "")
    card.text = "\n\n".join(filter(None, [before.rstrip(), section, after.strip()])) + "\n"
    card.save(path)


def settings_of_report(settings):
    """Those that a line has room for, name -> text; the command has paths of this machine."""
    plain = {name: value for name, value in settings.items() if isinstance(value, (str, int, float))}
    for name, value in settings.items():
        if isinstance(value, list):  # of numbers, or of the networks that measured
            plain[name] = " ".join(str(part["model"] if isinstance(part, dict) else part) for part in value)
    plain.pop("command", None)
    return {name: public_name(str(value)) for name, value in plain.items()}


def is_finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def main(args):
    try:
        report = json.loads(Path(args.report).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--report {args.report} can't be read ({first_line(error)}).") from error
    add_results(args.folder, report, args.model)
    card = Path(args.folder, CARD)
    print(f"{card} has the results; `hf upload OWNER/NAME {card} {CARD}` uploads it.")


if __name__ == "__main__":
    run(main, args)
