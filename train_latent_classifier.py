"""Train the network of E-LatentLPIPS for a VAE that has none yet: a VGG that tells images' classes from their latents.

    accelerate launch train_latent_classifier.py --pretrained_vae_model_name_or_path VAE --train_data_dir CLASSES \
        --resolution 256 --output_dir OUT

OUT is what --e_latent_lpips_model of the training scripts takes. Kang et al. (2024) have trained theirs on ImageNet.
"""

import json
import os
import sys
from pathlib import Path

from arguments import LOG_FILE, NotUploaded, Parser, UserError, check_unused, first_line, flags_in, number, run
from data_utils import build_dataloader, cache_latents, hold_out, open_samples, read_data
from latent_lpips_files import CHANNELS, FLAG, scaling_of
from model_checks import VAES, is_folder_name, latent_channels, read_json, vae_folder


CHECKPOINT = "checkpoint.pt"
SOURCES = ("train_data_dir", "dataset_name", "train_shards")
AT_LEAST_ONE = (
    "resolution train_batch_size num_train_epochs max_train_steps max_train_samples checkpointing_steps logging_steps"
).split()
NOT_NEGATIVE = "seed lr_warmup_steps max_bad_images dataloader_num_workers".split()
# What the functions that read data for the training scripts ask for, and is so here
ABSENT = {
    "num_classes": 2**31,  # any
    "proportion_empty_prompts": 0.0,
    "center_crop": True,
    "dry_run": False,
    **dict.fromkeys("samples caption_column caption_weights instance_prompt trigger_word buckets".split()),
    "validation_prompts": None,
}
ALWAYS = "is not needed: leave it out, latents are always cached, of the middle of each image"
REFUSED = {
    "--e_latent_lpips_model": "is for the training scripts, which read the --output_dir of this one",
    "--center_crop": ALWAYS,
    "--cache_latents": ALWAYS,
    "--streaming": "is not there, as latents are cached: leave it out; --max_train_samples takes a part of a dataset",
    "--caption_column": "is not there: the classes are in --label_column",
    "--num_classes": "is not needed: leave it out, the classes are those of the data",
    "--gradient_accumulation_steps": "is not there, as batch norm is about a batch: raise --train_batch_size",
}


# One flag a line reads best.
# fmt: off
def parse_args(argv=None):
    """Parse and check; a wrong flag ends the program with one sentence and exit code 2."""
    parser = Parser(__doc__)
    parser.refused = REFUSED
    add = parser.add_argument_group("VAE").add_argument
    add("--pretrained_model_name_or_path", help="Hub id or folder of the pipeline whose VAE makes the latents")
    add("--pretrained_vae_model_name_or_path", help="instead: Hub id or folder of the VAE itself")
    add("--revision", help="revision of the Hub model")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--cache_dir", help="where downloads, and the index of --train_shards, are kept")
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="image folder with one sub-folder per class, or a metadata file with a label column")
    add("--dataset_name", help="Hub id or local folder of a datasets dataset")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--train_shards", nargs="+", metavar="TAR", help="tar shards as webdataset writes them: images with class "
        "labels in .cls")
    add("--image_column", help="column with the images; of shards the images' extension")
    add("--label_column", help="column with the class labels, by default label")
    add("--max_train_samples", type=int, help="use this many samples only")
    add("--max_bad_images", type=int, help="unreadable images to leave out before giving up; by default none, of "
        "shards 1 in 100")
    add("--eval_share", type=number, default=0.1, help="share of the images that is held out, to measure the accuracy")
    add("--resolution", type=int, default=512, help="side of the images in pixels, best that of the diffusion model")
    add("--random_flip", action="store_true", help="mirror half of the images; both are encoded")
    add("--image_interpolation_mode", default="lanczos", help="how images are resized",
        choices=["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
    add("--dataloader_num_workers", type=int, default=0, help="processes that load latents")
    add("--latent_cache_dir", metavar="FOLDER", help="keep the latents on the disk instead of in memory, for later "
        "runs too")
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="latent-classifier", help="where the network goes")
    add("--width", type=number, default=1.0, help="multiplies the channels of VGG-16, for small VAEs and datasets")
    add("--seed", type=int, help="makes everything reproducible; drawn and printed if not given")
    add("--train_batch_size", type=int, default=64, help="samples per process and step")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps")
    add("--learning_rate", type=number, default=1e-3, help="peak learning rate of AdamW")
    add("--lr_scheduler", default="cosine", help="learning-rate schedule",
        choices="linear cosine polynomial constant constant_with_warmup".split())
    add("--lr_warmup_steps", type=int, default=0, help="steps of warm-up (schedules that have one)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default what `accelerate config` says")
    add("--checkpointing_steps", type=int, default=1000, help="steps between checkpoints, each in place of the last")
    add("--resume_from_checkpoint", choices=["latest"], help="go on from the checkpoint in --output_dir, if there is "
        "one")
    add("--logging_steps", type=int, default=10, help="steps between lines of train_log.jsonl")
    add("--push_to_hub", action="store_true", help="upload the network to the Hugging Face Hub")
    add("--hub_model_id", help="owner/name or name of the Hub repository; by default the output folder's name")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.given_flags = flags_in(argv)
    vars(args).update(ABSENT, id2label={})
    try:
        check(args)
    except UserError as error:
        parser.error(str(error))
    return args
# fmt: on


def check(args):
    """What needs no library and no download, the images included. Raises UserError; sets `args.samples`."""
    for names, fits, what in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        (["learning_rate", "width"], lambda value: value > 0, "greater than 0"),
        (["eval_share"], lambda value: 0 < value < 1, "between 0 and 1"),
    ):
        for name in names:
            if getattr(args, name) is not None and not fits(getattr(args, name)):
                raise UserError(f"--{name} {getattr(args, name)} must be {what}.")
    given = [f"--{name}" for name in SOURCES if getattr(args, name)]
    if len(given) != 1:
        raise UserError(
            f"give one of --{', --'.join(SOURCES[:2])} and --{SOURCES[2]}; given: {' and '.join(given) or 'none'}."
        )
    if not args.dataset_name:
        check_unused(args, ["--dataset_config_name"], given[0])
    if args.hub_model_id and not args.push_to_hub:
        raise UserError("--hub_model_id has no effect without --push_to_hub: add it, or leave --hub_model_id out.")
    if args.lr_scheduler == "constant":
        check_unused(args, ["--lr_warmup_steps"], "--lr_scheduler constant")
    check_vae_folder(args)
    check_output(Path(args.output_dir), args.resume_from_checkpoint)
    if not args.dataset_name:
        args.samples = read_data(args)


def check_output(output, resumed):
    """Nothing that the user has is overwritten. Raises UserError."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file: name a folder.")
    if output.joinpath("config.json").exists() or list(output.glob("*.safetensors")):
        raise UserError(f"--output_dir {output} holds a saved model: choose another folder.")
    if output.joinpath(CHECKPOINT).exists() and not resumed:
        raise UserError(
            f"--output_dir {output} holds another run: choose another folder, or continue it with "
            "--resume_from_checkpoint latest."
        )


def check_vae_folder(args):
    """Raises UserError if there is no VAE, or a folder without its config."""
    name, flag = args.pretrained_vae_model_name_or_path, "--pretrained_vae_model_name_or_path"
    pipeline, its_flag = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
    if not (name or pipeline):
        raise UserError(f"no VAE: give {flag}, or {its_flag}.")
    if name:
        check_unused(args, [its_flag, "--revision", "--variant"], flag)
    if is_folder_name(name or pipeline):
        folder = vae_folder(name) if name else Path(pipeline, "vae")
        read_json(folder / "config.json", flag if name else its_flag)


if __name__ == "__main__":
    args = parse_args()  # before the libraries below take their seconds: --help and a wrong flag answer at once

# ruff: noqa: E402
import math
import secrets
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, parse_flag_from_env, set_seed
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from huggingface_hub import create_repo
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

import interruption
from data_sources import caption_of, labels_of
from disk_cache import cache_latents_on_disk
from images import IMAGE_ERRORS
from latent_lpips import LatentVGG
from loading import load_vae
from train_utils import replace_text, sample_generators, share_work


WEIGHT_DECAY = 0.05


class Latents:
    """A VAE's encoder, and the scale of its latents. Raises UserError if it is none of those that are supported."""

    def __init__(self, args, device, dtype):
        self.vae, self.device = load_vae(args, dtype).to(device).requires_grad_(False).eval(), device
        config, kind = self.vae.config, type(self.vae).__name__
        if kind not in VAES:
            raise UserError(
                f"the VAE is a {kind}, this script supports {', '.join(VAES)}: give another one with "
                "--pretrained_vae_model_name_or_path."
            )
        factor = 2 ** (len(config[VAES[kind][0]]) - 1)
        if args.resolution % factor:
            nearest = max(1, round(args.resolution / factor)) * factor
            raise UserError(f"--resolution {args.resolution} must be a multiple of {factor}: {nearest}?")
        self.channels, self.is_video = latent_channels(config), kind == "AutoencoderKLQwenImage"
        self.scaling_factor, self.shift_factor = scaling_of(config)

    @torch.no_grad()
    def encode(self, pixel_values):
        """Images `[B, 3, H, W]` in [-1, 1] -> the parameters of their posterior `[B, 2 C, h, w]`, or latents."""
        pixel_values = pixel_values.to(self.device, self.vae.dtype)
        encoded = self.vae.encode(pixel_values.unsqueeze(2) if self.is_video else pixel_values)
        encoded = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded[0]
        return encoded.squeeze(2) if self.is_video else encoded

    def scaled(self, encoded, generators=None):
        """What `encode` gives -> scaled latents `[B, C, h, w]`, drawn with the generators, or else the mean."""
        encoded = encoded.to(self.device, non_blocking=True)
        if encoded.shape[1] == 2 * self.channels:
            posterior = DiagonalGaussianDistribution(encoded)
            encoded = posterior.mode() if generators is None else posterior.sample(generators)
        shift, factor = (torch.tensor(v, device=self.device) for v in (self.shift_factor, self.scaling_factor))
        return (encoded.float() - shift.view(-1, 1, 1)) * factor.view(-1, 1, 1)


def random_crops(latents, generators):
    """Crops of 7/8 of the sides, at whole positions, where what a VAE encodes stays what it is."""
    crops, (height, width) = [], latents.shape[-2:]
    for z, generator in zip(latents, generators):
        top, left = (int(torch.randint(side // 8 + 1, (), generator=generator)) for side in (height, width))
        crops.append(z[:, top : top + height - height // 8, left : left + width - width // 8])
    return torch.stack(crops)


def make_accelerator(args, state):
    """Without --seed it is that of the checkpoint `state`, or drawn, the same on all processes."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=args.mixed_precision)
    except (ValueError, ImportError) as error:  # such as fp16 without a GPU
        raise UserError(f"the accelerate config or --mixed_precision can't be had: {first_line(error)}") from error
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UserError(
            f"the accelerate config asks for {accelerator.distributed_type.value}, for which this network is too "
            "small: launch with one for data parallelism, or without any."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    if args.seed is None:
        seed = state["settings"]["--seed"] if state else secrets.randbelow(2**31)
        args.seed = broadcast_object_list([seed])[0]
    set_seed(args.seed)
    return accelerator


def read_checkpoint(args):
    """The checkpoint to go on from, {} if there is none. Raises UserError."""
    path = Path(args.output_dir, CHECKPOINT)
    if not args.resume_from_checkpoint or not path.exists():
        return {}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): remove it, and start anew.") from error


def save_checkpoint(path, **state):
    temporary = path.with_name(f"tmp-{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def refuse_other_run(state, settings):
    """Raises UserError if a checkpoint is of a run with other settings, {flag: value}."""
    for name, value in settings.items():
        if state and state["settings"].get(name) != value:
            raise UserError(
                f"--resume_from_checkpoint: that run had {name} {state['settings'].get(name)}, this one {value}: give "
                "the same, or choose another --output_dir."
            )


def make_places(args, output):
    """The output folder and, if it is asked for, the repository. Raises UserError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output} can't be made ({error.strerror}): name another folder.") from error
    if args.push_to_hub:
        name = args.hub_model_id or output.resolve().name
        try:
            create_repo(name, exist_ok=True)
        except (HTTPError, OSError, ValueError) as error:
            raise UserError(
                f"--push_to_hub: the repository {name} can't be had ({first_line(error)}): check the name, the "
                "connection and `hf auth login`."
            ) from error


@torch.no_grad()
def evaluate(accelerator, args, network, latents, stream, index_of):
    """Cross-entropy and accuracy on the held-out images. All processes call this and share the work."""
    for buffer in network.buffers():  # statistics differ by the last batch, and those of the first process are saved
        broadcast(buffer)
    network.eval()
    found = torch.zeros(3, dtype=torch.float64)  # loss, right ones, all
    share = range(accelerator.process_index, stream.num_samples, accelerator.num_processes)
    for start in range(0, len(share), args.train_batch_size):
        encoded, labels = [], []
        for index in share[start : start + args.train_batch_size]:
            try:
                encoded.append(stream.cache(index, False)["posterior"])
            except IMAGE_ERRORS:  # it could not be read
                continue
            labels.append(index_of[caption_of(stream.samples, index)])
        if encoded:
            with accelerator.autocast():
                logits = network(latents.scaled(torch.stack(encoded))).float().cpu()
            labels = torch.tensor(labels)
            right = (logits.argmax(1) == labels).sum()
            found += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right, torch.tensor(len(labels))])
    network.train()
    loss, right, count = accelerator.reduce(found.float().to(accelerator.device)).tolist()
    return {"eval_loss": loss / max(count, 1), "eval_accuracy": right / max(count, 1)}


def save(args, network):
    """Raises NotUploaded."""
    network.eval().save_pretrained(args.output_dir)
    Path(args.output_dir, CHECKPOINT).unlink(missing_ok=True)
    if args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            network.push_to_hub(name)
        except Exception as error:  # whatever the network and the Hub make of it
            raise NotUploaded(
                f"the upload failed ({first_line(error)}); the network is safe in {args.output_dir}. When the Hub is "
                f"in reach and you are logged in (`hf auth login`): `hf upload {name} {args.output_dir} .`."
            ) from error


class Log:
    """Progress bar and train_log.jsonl, of which lines after the first step are of a run that was broken off."""

    def __init__(self, accelerator, args, step):
        self.path = Path(args.output_dir, LOG_FILE) if accelerator.is_main_process else None
        hide = not accelerator.is_local_main_process
        self.bar = tqdm(initial=step, total=args.max_train_steps, desc="steps", disable=hide)
        if self.path and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            replace_text(self.path, "".join(line for line in lines if json.loads(line)["step"] <= step))

    def write(self, step, **values):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def main(args):
    state = read_checkpoint(args)
    accelerator = make_accelerator(args, state)
    output, is_main = Path(args.output_dir), accelerator.is_main_process
    names = "seed width resolution random_flip eval_share learning_rate lr_scheduler".split()
    settings = {f"--{name}": getattr(args, name) for name in names}
    refuse_other_run(state, settings)
    if is_main:  # now, so that it is known before hours of training
        make_places(args, output)

    # The images, their classes, and their latents.
    stream = open_samples(args)
    classes = sorted(set(labels_of(stream.samples)))
    index_of = {label: index for index, label in enumerate(classes)}
    if len(classes) < 2:
        raise UserError("all images are of one class: there is nothing to tell apart; add images of other classes.")
    hold_out(stream, args.eval_share)
    held_out = stream.held_out
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    latents = Latents(args, accelerator.device, dtype)
    for images in (stream, held_out):
        if args.latent_cache_dir is None:
            cache_latents(images, latents.encode, partial(share_work, accelerator))
        else:
            shared = (latents.encode, latents.vae, args.latent_cache_dir, args.dataloader_num_workers)
            cache_latents_on_disk(accelerator, images, *shared)
    latents.vae = None

    # The network.
    channels = [max(1, round(args.width * width)) for width in CHANNELS]
    scale = (latents.scaling_factor, latents.shift_factor)
    network = LatentVGG(latents.channels, channels, len(classes), *scale)
    optimizer = torch.optim.AdamW(network.parameters(), args.learning_rate, weight_decay=WEIGHT_DECAY)
    model, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(model)
    global_batch = args.train_batch_size * accelerator.num_processes
    epoch = math.ceil(stream.num_samples / global_batch)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * epoch
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **schedule)

    # Where to start.
    settings |= {"samples": stream.num_samples, "classes": len(classes), "latent channels": latents.channels}
    step, position = 0, 0
    refuse_other_run(state, settings)
    if state:
        step, position = state["step"], state["position"]
        for part, name in ((network, "network"), (optimizer, "optimizer"), (lr_scheduler, "lr_scheduler")):
            part.load_state_dict(state[name])
    del state
    accelerator.print(
        f"{stream.num_samples} samples of {len(classes)} classes, {held_out.num_samples} held out; steps {step} to "
        f"{args.max_train_steps} of {args.train_batch_size} samples x {accelerator.num_processes} processes; seed "
        f"{args.seed}."
    )
    shard = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = build_dataloader(
        stream, args.train_batch_size, **shard, start_position=position, num_workers=args.dataloader_num_workers
    )
    log, losses = Log(accelerator, args, step), []
    interruption.defer()  # from here on a signal ends the run after a step, with a checkpoint
    network.train()
    while step < args.max_train_steps:
        batch = next(loader)
        generators = [
            sample_generators(args.seed, batch["positions"], purpose, device)
            for purpose, device in enumerate(("cpu", accelerator.device))
        ]
        z = random_crops(latents.scaled(batch["posteriors"], generators[1]), generators[0])
        labels = torch.tensor([index_of[label] for label in batch["captions"]], device=accelerator.device)
        loss = F.cross_entropy(model(z).float(), labels)
        stop = torch.tensor(float(interruption.received() is not None), device=accelerator.device)
        mean, stop = accelerator.reduce(torch.stack([loss.detach(), stop]), "mean").tolist()
        if not math.isfinite(mean):
            raise UserError(f"step {step + 1}: the loss is {mean}: start anew with a lower --learning_rate.")
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step, position = step + 1, position + global_batch
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()

        losses.append(mean)
        log.bar.update()
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            log.write(step, loss=sum(losses) / len(losses), lr=lr_scheduler.get_last_lr()[0])
            losses = []
        if step % epoch == 0 and step < args.max_train_steps:
            found = evaluate(accelerator, args, network, latents, held_out, index_of)
            log.write(step, **found)
            log.bar.set_postfix(loss=f"{mean:.3g}", accuracy=f"{found['eval_accuracy']:.1%}")
        if is_main and (step % args.checkpointing_steps == 0 or stop) and step < args.max_train_steps:
            parts = {"network": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
            parts = {name: part.state_dict() for name, part in parts.items()}
            where = {"step": step, "position": position, "settings": settings}
            save_checkpoint(output / CHECKPOINT, **where, **parts)
        if stop and step < args.max_train_steps:
            accelerator.print(f"\nStopped after step {step}: the same with --resume_from_checkpoint latest goes on.")
            return
    log.bar.close()

    # The result.
    found = evaluate(accelerator, args, network, latents, held_out, index_of)
    log.write(step, **found)
    if is_main:
        counts = Counter(labels_of(held_out.samples)).values()
        print(
            f"Held-out accuracy {found['eval_accuracy']:.1%}; always naming the most frequent class would be right in "
            f"{max(counts) / sum(counts):.1%}. For the training scripts: {FLAG} {output}"
        )
        save(args, network)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, args, resumable=True)
