"""Score models side by side, with the same noise, prompts and order for all: is one better, and how sure is that?

    accelerate launch evaluate_lpl.py --model BEFORE AFTER --reference PHOTOS --num_samples 1000 --output_dir OUT

OUT gets report.html, report.md and report.json, and the samples. A run that was interrupted goes on where it ended
when it is started again.
"""

import itertools
import os
import re
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryFile

from arguments import Parser, UserError, flags_in, number, run
from features import CLIP, check_clip, check_extractor, inception_available, short_name
from images import IMAGE_EXTENSIONS, images_in, reason
from model_checks import is_folder_name


AT_LEAST_ONE = "num_samples max_reference_samples resolution batch_size k num_inference_steps".split()
NOT_NEGATIVE = "seed max_bad_images dataloader_num_workers guidance_scale guidance_rescale".split()
# Flags that say how samples are drawn, and so nothing of those that are there
DRAWING = (
    "--lora --base_model --variant --weights --sampler --num_inference_steps --guidance_scale --guidance_rescale "
    "--mixed_precision --offload --resolution"
).split()


# One flag a line reads best.
# fmt: off
def parse_args(argv=None):
    """Parse and check; a wrong flag ends the program with one sentence and exit code 2."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--model", nargs="+", metavar="MODEL", help="folders or Hub ids of the models, results of the training "
        "scripts or others; each is compared with those before it")
    add("--lora", nargs="+", metavar="LORA", help="a LoRA for each model, none for one without; a single --model "
        "stands for all, and so does a single LoRA")
    add("--base_model", help="the pipeline around models that were saved alone (--save_only_trained, checkpoints)")
    add("--samples", nargs="+", metavar="FOLDER", help="instead of models: folders of images, in the same order")
    add("--names", nargs="+", metavar="NAME", help="what the report calls them; by default their folders")
    add("--weights", nargs="+", choices=["ema", "raw"], default=["ema"], help="of each model or all: what was saved, "
        "with --use_ema the average, or (raw) the weights beside it, of --save_non_ema")
    add("--pretrained_vae_model_name_or_path", help="Hub id or folder of another VAE for all models; of --samples the "
        "VAE of their model, which reconstructs the reference")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--cache_dir", help="where downloads are kept")
    add = parser.add_argument_group("reference").add_argument
    add("--reference", required=True, metavar="DATA", help="real images: a folder or tar shards as for training, a "
        "datasets dataset, or an .npz of the ADM evaluator; its captions or classes are what is drawn")
    add("--reference_split", default="train", metavar="SPLIT", help="split of a dataset, such as validation")
    add("--reference_is", choices=["imagenet-1k", "cc12m"], help="data that the paper measured on: its results are "
        "shown beside where all else is the same, too")
    add("--dataset_config_name", help="configuration of a dataset")
    add("--image_column", help="column with the images; of shards the images' extension")
    add("--caption_column", nargs="+", metavar="COLUMN", help="column with the captions")
    add("--label_column", help="column with the class labels")
    add("--instance_prompt", help="caption of all images that have none of their own")
    add("--max_reference_samples", type=int, default=50_000, help="use this many of its samples, drawn with the seed")
    add("--max_bad_images", type=int, help="unreadable images to leave out before giving up; by default none")
    add = parser.add_argument_group("samples").add_argument
    add("--num_samples", type=int, help="samples of each model; by default as many as there are reference images")
    add("--resolution", type=int, help="side of the images in pixels; by default what the model is made for")
    add("--seed", type=int, default=0, help="sample i starts from the noise of seed + i")
    add("--batch_size", type=int, default=8, help="images that each process draws or measures at a time")
    add("--sampler", choices=["auto", "rk4", "pipeline"], default="auto", help="auto: DDIM with trailing timesteps, "
        "for flow matching Euler; rk4: Runge-Kutta, four times the work a step; pipeline: the model's own")
    add("--num_inference_steps", nargs="+", type=int, default=[50], metavar="N", help="sampler steps; several give "
        "curves")
    add("--guidance_scale", nargs="+", type=number, metavar="X", help="classifier-free guidance, by default the "
        "pipeline's own; several give curves")
    add("--guidance_rescale", type=number, help="rescaling of the guidance (Lin et al.), for pipelines that have it")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision to draw in; by default what `accelerate "
        "config` says")
    add("--offload", action="store_true", help="keep on the GPU only what is at work: slower, less memory")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images")
    add = parser.add_argument_group("scores").add_argument
    add("--feature_extractor", nargs="+", metavar="MODEL", help="Hub ids or folders of transformers' vision models, "
        "dinov2 (large) or inception (needs `pip install torch-fidelity`); by default both of these. Metrics of the "
        "first have no suffix")
    add("--clip_model", help=f"Hub id or folder for CLIPScore; by default {CLIP} for models that read text, or none "
        "with --feature_extractor")
    add("--k", type=int, default=5, help="nearest neighbours of precision, recall, density and coverage")
    add("--half_samples", type=int, default=100, metavar="R", help="random halves of the samples, on which each "
        "metric is computed as well: the intervals come from their spread")
    add("--output_dir", required=True, help="where the report and the samples go")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.given_flags = sorted(set(flags_in(argv)))
    args.command = shlex.join(["evaluate_lpl.py", *argv])
    try:
        check(args)
    except UserError as error:
        parser.error(str(error))
    return args
# fmt: on


def check(args):
    """What needs no library and no download. Raises UserError; sets the entries to compare and their names."""
    for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            values = getattr(args, name) if isinstance(getattr(args, name), list) else [getattr(args, name)]
            for value in values:
                if value is not None and value < least:
                    raise UserError(f"--{name} {value} must be at least {least}.")
    if args.seed >= 2**62:
        raise UserError(f"--seed {args.seed} is too large: give one below {2**62}.")
    if args.half_samples < 2:
        raise UserError(f"--half_samples {args.half_samples} must be at least 2, which an interval needs.")
    if bool(args.model) == bool(args.samples):
        raise UserError("give either --model, to draw samples, or --samples, folders with images.")
    if args.samples:
        for flag in DRAWING:
            if flag in args.given_flags:
                raise UserError(f"{flag} has no effect with --samples, which are drawn already: leave it out.")
        for folder in args.samples:
            if not Path(folder).is_dir() or not images_in(folder):
                raise UserError(f"--samples {folder} is no folder with images ({' '.join(IMAGE_EXTENSIONS)}).")
    else:
        check_models(args)
    for name in ("num_inference_steps", "guidance_scale"):
        values = getattr(args, name)
        if values is not None and len(set(values)) < len(values):
            raise UserError(f"--{name} has a value twice: leave one out.")
    args.names = names_of(args)
    check_reference(args)
    check_scores(args)
    check_output(args)


def check_output(args):
    output = Path(args.output_dir)
    for folder in [args.reference, *(args.samples or ())]:
        if Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--output_dir {output} lies in {folder}, whose images it would add to: choose another.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file: name a folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {output} can't be written ({reason(error)}): choose another.") from error


def check_models(args):
    """Puts together what belongs to a model: sets `args.entries`, (source, base, LoRA or None, whether raw)."""
    lists = {"--model": args.model, "--lora": args.lora or ["none"], "--weights": args.weights}
    count = max(map(len, lists.values()))
    for flag, values in lists.items():
        if len(values) not in (1, count):
            longest = max(lists, key=lambda name: len(lists[name]))
            raise UserError(
                f"{flag} has {len(values)} entries and {longest} {count}: give one for each, or one for all."
            )
    args.entries = []
    for model, lora, weights in zip(*(values * (count if len(values) == 1 else 1) for values in lists.values())):
        for name in filter(None, [model, lora, args.base_model]):
            if name != "none" and is_folder_name(name) and not Path(name).exists():
                raise UserError(f"there is no folder {name}: give that of a saved model or LoRA, or a Hub id.")
        base = check_model(args, model)
        if lora != "none" and is_folder_name(lora) and not list(Path(lora).glob("*.safetensors")):
            raise UserError(f"--lora {lora} holds no LoRA (*.safetensors): name the --output_dir of a LoRA training.")
        trained = model if lora == "none" else lora
        there = any(path for pattern in ("*non_ema*", "*/*non_ema*") for path in Path(trained).glob(pattern))
        if weights == "raw" and is_folder_name(trained) and not there:
            raise UserError(
                f"--weights raw: {trained} holds no weights beside the average: train with --save_non_ema."
            )
        args.entries.append((model, base, None if lora == "none" else lora, weights == "raw"))
    if args.base_model and all(source == base for source, base, *_ in args.entries):
        raise UserError("--base_model has no effect: every --model is a whole pipeline; leave it out.")


def check_model(args, model):
    """The pipeline around a model: itself, or --base_model."""
    if not is_folder_name(model) or Path(model, "model_index.json").exists():
        return model
    if not any(Path(model, part, "config.json").exists() for part in ("unet", "transformer")):
        if Path(model, "config.json").exists():
            raise UserError(f"--model {model} is a denoiser alone: name the folder that it is in.")
        if list(Path(model).glob("*.safetensors")):
            raise UserError(f"--model {model} holds a LoRA: give its base as --model, and this as --lora.")
        raise UserError(f"--model {model} holds no model: name the --output_dir of a finished training.")
    if not args.base_model:
        raise UserError(f"--model {model} holds no whole pipeline: add --base_model, the one that was finetuned.")
    return args.base_model


def names_of(args):
    """A name for each of the models, which is a folder's, too."""
    sources = args.samples or [lora or source for source, _, lora, _ in args.entries]
    names = args.names or [Path(source).resolve().name if is_folder_name(source) else source for source in sources]
    if args.model and args.names is None and len(set(args.weights)) > 1:
        names = [name + "-raw" * raw for name, (*_, raw) in zip(names, args.entries)]
    if len(names) != len(sources):
        raise UserError(f"--names needs {len(sources)} names, one for each of what is compared.")
    names = [re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model" for name in names]
    if len(set(names)) < len(names) and args.names is None:  # such as a/result and b/result
        longer = (source.rstrip("/").split("/")[-2:] for source in sources)
        names = [re.sub(r"[^\w.+-]+", "-", "-".join(parts)) for parts in longer]
    if len(set(names)) < len(names):
        raise UserError("two of what is compared have the same name: tell them apart with --names.")
    return names


def check_reference(args):
    """Sets `args.reference_kind`: npz, or the training scripts' flag for such data."""
    name, is_folder = args.reference, Path(args.reference).is_dir()
    args.reference_kind = "dataset_name"
    if name.endswith(".npz"):
        args.reference_kind = "npz"
    elif ".tar" in name and not is_folder:
        args.reference_kind = "train_shards"
    elif is_folder and not any(Path(name, file).exists() for file in ("dataset_dict.json", "state.json")):
        if any(path.suffix.lower() in IMAGE_EXTENSIONS for path in Path(name).rglob("*")):
            args.reference_kind = "train_data_dir"
    there = args.reference_kind == "train_shards" or Path(name).exists()  # shards' names have patterns
    if not there and (is_folder_name(name) or args.reference_kind == "npz"):
        raise UserError(f"--reference {name}: there is no such file or folder.")
    given = [flag for flag in ("--reference_split", "--dataset_config_name") if flag in args.given_flags]
    if given and args.reference_kind != "dataset_name":
        raise UserError(f"{given[0]} has no effect on --reference {name}, which is no datasets dataset: leave it out.")


def check_scores(args):
    """The feature extractors; sets their default."""
    if args.feature_extractor is None:
        args.feature_extractor = ["dinov2"]
        if inception_available():
            args.feature_extractor.append("inception")
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print("Inception's metrics are left out: `pip install torch-fidelity` brings them.", file=sys.stderr)
    for name in args.feature_extractor:
        check_extractor(name)
    short = [short_name(name) for name in args.feature_extractor]
    if len(set(short)) < len(short):
        raise UserError(f"--feature_extractor: two have the same name ({', '.join(short)}): rename a folder.")
    if args.clip_model is not None:
        check_clip(args.clip_model)


if __name__ == "__main__":
    args = parse_args()  # before the libraries below take their seconds: --help and a wrong flag answer at once

# ruff: noqa: E402
from datetime import timedelta
from functools import partial


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks at import that torchvision is missing
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from comparison import (
    Reference,
    check_counts,
    draw_set,
    make_report,
    open_folders,
    prompts_in,
    reconstruct_reference,
    score_set,
    wants_clip,
)
from evaluation import Measured, measure, write_statistics
from evaluation_report import write_report
from features import ClipScorer, load_extractor
from loading import DTYPES, load_vae
from metrics import moments
from sampling import all_agree, identity, read_models


def main(args):
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    waits = InitProcessGroupKwargs(timeout=timedelta(days=7))  # for the slowest, and for the main process's scores
    accelerator = Accelerator(cpu=cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[waits])
    dtype = DTYPES[accelerator.mixed_precision]
    if cpu and dtype == torch.float16:
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    output = Path(args.output_dir)

    # What is compared, and with what. All that may be missing is loaded before hours go into samples.
    models = read_models(args) if args.model else []
    sets, rebuilt = [] if models else open_folders(args), {}
    reference = Reference(args, models)
    prompts = reference.prompts(args, models) if models else None
    check_counts(args, len(prompts or sets[0].images), reference)
    extractors = [load_extractor(name, "cpu", args.cache_dir) for name in args.feature_extractor]
    reference.check(extractors)
    clip = ClipScorer(args.clip_model, "cpu", args.cache_dir) if wants_clip(args, models) else None
    captions = {s.name: prompts_in(s.images) for s in sets} if clip else {}

    # The samples, paired; and what the models' VAE makes of the real images, which is as good as they can get.
    for model in models:
        pipe, sampler = model.load(args, accelerator.device, dtype)
        facts = all_agree(identity(pipe) if accelerator.is_main_process else None)
        facts |= {"sampler": sampler, "prompts": reference.prompts_hash()}
        own_vae = model.load_vae(args, accelerator.device)
        vae = reconstruct_reference(accelerator, args, own_vae, reference, rebuilt)
        for setting in itertools.product(args.num_inference_steps, args.guidance_scale or [None]):
            drawn = draw_set(accelerator, args, model, pipe, facts, setting, prompts)
            sets.append(drawn._replace(vae=vae))
        del pipe
    if args.samples and args.pretrained_vae_model_name_or_path:
        given = load_vae(args, torch.float32).to(accelerator.device)
        vae = reconstruct_reference(accelerator, args, given, reference, rebuilt)
        sets = [drawn._replace(vae=vae) for drawn in sets]

    # What the metrics see of them.
    for network in filter(None, [*extractors, clip]):
        network.to(accelerator.device)
    see = partial(measure, accelerator, extractors=extractors, batch_size=args.batch_size)
    see = partial(see, workers=args.dataloader_num_workers)
    real = see(reference.images, title="Measuring the reference") if reference.images else Measured()
    floors = {name: see(images, title="Measuring reconstructions") for name, images in rebuilt.items()}
    scored = {}
    for s in sets:
        texts = captions.get(s.name, prompts)
        measured = see(s.images, clip=clip, captions=texts, title=f"Measuring {s.name}")
        if accelerator.is_main_process:
            real.moments |= reference.moments
            device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # it has no float64
            scored[s.name] = score_set(args, measured, real, floors.get(s.vae), device)
    accelerator.state.destroy_process_group()
    if not accelerator.is_main_process:
        return
    report = make_report(args, reference, sets, scored, real, floors, (extractors, clip))
    for extractor in extractors if real.features else ():
        path = output / "statistics" / f"reference_{extractor.name}.npz"
        write_statistics(path, moments(real.features[extractor.name]), extractor)
    write_report(report, output)
    print(f"See {output / 'report.html'}, report.md and report.json.")


if __name__ == "__main__":
    run(main, args)
