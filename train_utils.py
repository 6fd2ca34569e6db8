"""The chores of a training script: accelerator, randomness, optimizer, EMA, checkpoints, drawings, logs, the Hub.

Nothing here knows of the Latent Perceptual Loss. Functions that all processes must call together say so.
"""

import hashlib
import importlib
import json
import math
import os
import secrets
import shutil
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    patch_environment,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.integrations import unset_hf_deepspeed_config

import interruption
from arguments import LOG_FILE, NotUploaded, UserError, first_line
from checkpoints import refuse_other_run, why_not_written
from data_utils import all_captions, cache_latents, class_images, make_prior_stream
from disk_cache import cache_embeddings_on_disk, cache_latents_on_disk
from engines import check_engine
from family import NON_EMA, NON_EMA_LORA
from hub import upload_command
from kohya import KOHYA_FILE
from model_card import duration, write_model_card


def make_accelerator(args):
    """An Accelerator for these flags; draws a seed if none is given, the same on all processes."""
    project = ProjectConfiguration(
        project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
    )
    if args.dry_run:  # counted on the CPU, where bf16 has the bytes of fp16, by one process for all
        if os.environ.get("RANK", "0") != "0":
            sys.exit()
        args.seed = args.seed or 0  # any will do
        args.mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if args.mixed_precision == "fp16" and args.vae_dtype == "auto":
            args.vae_dtype = "fp32"
        precision = "no" if args.mixed_precision == "no" else "bf16"
        alone = {"WORLD_SIZE": 1, "ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}
        with patch_environment(**alone):  # no engine; `dry_run` knows what it would do
            accelerator = Accelerator(cpu=True, mixed_precision=precision, dynamo_backend="no")
        PartialState().num_processes = accelerator.state.num_processes = int(os.environ.get("WORLD_SIZE", 1))
        # DDP can't wrap a model without values, whose device is "cpu" and not "cpu:0".
        accelerator.state.distributed_type, accelerator.state.device = DistributedType.NO, torch.device("cpu")
        return accelerator
    # What the accelerate config says there, the flags and this script know better.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:  # would leave the frozen models of other processes empty
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # FSDP2 would keep whole gradients until the last forward pass of a step.
    each = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    accumulation = GradientAccumulationPlugin(args.gradient_accumulation_steps, sync_each_batch=each)
    group = {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        group["backend"] = "gloo"  # accelerate would take NCCL
    if args.nccl_timeout is not None:
        group["timeout"] = timedelta(seconds=args.nccl_timeout)
    try:
        accelerator = Accelerator(
            gradient_accumulation_plugin=accumulation,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=project,
            kwargs_handlers=[InitProcessGroupKwargs(**group)],
        )
    except (ValueError, ImportError) as error:  # such as fp16 without a GPU, or DeepSpeed without its package
        raise UserError(f"the accelerate config or --mixed_precision can't be had: {first_line(error)}") from error
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()  # else transformers would shard the frozen text encoders, too
    check_engine(accelerator, args)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    if args.resume_from_checkpoint:
        refuse_other_run(accelerator, args)
    elif args.seed is None:
        args.seed = broadcast_object_list([secrets.randbelow(2**31)])[0]
    set_seed(args.seed, device_specific=True)  # for dropout; the samples have generators of their own
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def sample_generators(seed, positions, purpose, device="cpu"):
    """One generator per sample, a function of the seed, the sample's position in the stream and a number alone.

    So the noise of a sample does not depend on how many processes share the work, on calibration or validation in
    between, or on whether the run was resumed.
    """
    sequences = (np.random.SeedSequence([seed, int(position), purpose]) for position in positions)
    return [torch.Generator(device).manual_seed(int(s.generate_state(1, np.uint64)[0])) for s in sequences]


def share_work(accelerator, items, compute, title):
    """`[compute(item) for item in items]`, an item at a time on every process, the results on all of them.

    All processes call this; the results must be on the CPU.
    """
    results = []
    rounds = range(0, len(items), accelerator.num_processes)
    for start in tqdm(rounds, desc=title, disable=not accelerator.is_local_main_process):
        mine = items[start + accelerator.process_index : start + accelerator.num_processes][:1]
        results += gather_object([compute(item) for item in mine])
    return results


def add_class_images(accelerator, args, family, stream):
    """Prior preservation: draw what is missing in --class_data_dir, and give the stream its images of the class.

    The processes share the work; interrupted, it is taken up where it ended.
    """
    there = [Path(path).name for path, _ in class_images(args)]
    missing = 0 if args.dry_run else max(0, args.num_class_images - len(there))
    if missing:
        accelerator.wait_for_everyone()  # all have seen the same images before the first one is added
        folder = Path(args.class_data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = (i for i in count() if not any(name.startswith(f"{i}-") for name in there))
        todo = list(islice(numbers, missing))[accelerator.process_index :: accelerator.num_processes]
        if not args.bnb_quantization_config_path:
            family.denoiser.to(accelerator.device)
        family.denoiser.eval()
        settings = family.size_settings(args.resolution)
        with family.on_device("decoder"), accelerator.autocast():
            for i in tqdm(todo, desc="Drawing class images", disable=not accelerator.is_local_main_process):
                image = family.draw(args.class_prompt, torch.Generator().manual_seed(args.seed + i), **settings)
                name = f"{i}-{hashlib.sha1(image.tobytes()).hexdigest()[:16]}.png"
                image.save(folder / f".{name}")
                os.replace(folder / f".{name}", folder / name)
        if not args.bnb_quantization_config_path:
            family.denoiser.to("cpu")  # the caches need the room
        accelerator.wait_for_everyone()
    stream.prior = make_prior_stream(args, stream)


def cache(accelerator, args, family, stream):
    """Encode ahead what the flags say; all processes share the work, and the encoders leave the device."""
    share, folder = partial(share_work, accelerator), args.latent_cache_dir
    if args.cache_latents:
        with torch.no_grad(), family.on_device("encoder"):
            for images in filter(None, (stream, stream.prior)):
                if folder is None:
                    cache_latents(images, family.encode_images, share)
                else:
                    shared = (family.encode_images, family.vae, folder, args.dataloader_num_workers)
                    cache_latents_on_disk(accelerator, images, *shared)
        family.place(encoder=False)
    if args.cache_text_embeddings:
        prompts = {"", *all_captions(stream), *(args.validation_prompts or ())}
        if folder is None:
            title = "Caching text embeddings"
            family.cache_prompts(prompts, lambda texts, embed: dict(zip(texts, share(texts, embed, title))))
        else:
            identity = family.text_identity()
            on_disk = partial(cache_embeddings_on_disk, accelerator, identity=identity, folder=folder)
            stream.embeddings = family.cache_prompts(prompts, on_disk)


def make_optimizer(args, parameters, accelerator):
    """The optimizer of the flags; what it keeps in memory is in `optimizer_bytes`."""
    lr = args.learning_rate
    if args.scale_lr:
        lr *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    if args.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr, weight_decay=args.adam_weight_decay)
    settings = {"lr": lr, "betas": (args.adam_beta1, args.adam_beta2)}
    settings |= {"eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        settings |= {"beta3": args.prodigy_beta3, "decouple": args.prodigy_decouple}
        settings |= {"use_bias_correction": args.prodigy_use_bias_correction}
        return Prodigy(parameters, safeguard_warmup=args.prodigy_safeguard_warmup, **settings)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    # Fused updates need no memory for intermediate results; under fp16 they would hide a skipped step.
    fused = accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16"
    return torch.optim.AdamW(parameters, fused=fused or None, **settings)


def optimizer_bytes(args, parameters):
    """Bytes of the state that `make_optimizer`'s optimizer keeps for float32 parameters."""

    def per_tensor(p):
        n = p.numel()
        if args.optimizer == "adafactor":  # the second moment's rows and columns; of a vector, all of it
            return 4 * (n // p.shape[-1] + n // p.shape[-2] if p.ndim > 1 else n)
        if args.optimizer == "prodigy":
            return 16 * n
        if args.use_8bit_adam and n >= 4096:  # two moments, with a scale for every 256 elements
            return 2 * (n + 4 * math.ceil(n / 256))
        return 8 * n

    return sum(per_tensor(p) for p in parameters)


def make_lr_scheduler(args, optimizer):
    """Counts optimizer steps; not given to `accelerator.prepare`, which would step it once per process."""
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    cycles = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    return get_scheduler(args.lr_scheduler, optimizer, **schedule, **cycles)


def make_ema(args, family, weights, default_decay):
    """A float32 average of the trained weights; in bf16 a decay near 1 would never move it."""
    decay = default_decay if args.ema_decay is None else args.ema_decay
    model = {}
    if not weights.sharded and all(p.requires_grad for p in family.denoiser.parameters()):
        # it can be saved as a denoiser of its own
        model = {"model_cls": type(family.denoiser), "model_config": family.denoiser.config}
    ema = EMAModel(weights.masters, decay, foreach=args.foreach_ema, **model)
    if not args.dry_run:
        ema.to(device="cpu" if args.offload_ema else None, dtype=torch.float32)
    return ema


def step_ema(ema, weights):
    """One update, on the model's device also when the average is kept on the CPU."""
    masters = weights.masters
    if masters:  # of a small model, ZeRO may have left this process nothing
        home = ema.shadow_params[0].device
        ema.to(masters[0].device)
        ema.step(masters)
        ema.to(home)


@contextmanager
def ema_weights(ema, weights):
    """Inside, the weights are their averages; afterwards themselves again. Does nothing if `ema` is None.

    All processes call this.
    """
    if ema is None:
        yield
        return
    kept = [master.detach().to("cpu", copy=True) for master in weights.masters]
    weights.set(ema.shadow_params)
    try:
        yield
    finally:
        weights.set(kept)


def start_run(accelerator, args, first_step):
    """Create the output folder, start the tracker with the run's settings. All processes call this."""
    output = Path(args.output_dir)
    log, marker = output / LOG_FILE, output / "tmp-shared"
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for left in ("tmp-checkpoint-*", "tmp-result-*", "tmp-shared"):  # by a run that was killed
            for folder in output.glob(left):
                shutil.rmtree(folder, ignore_errors=True)
        if log.exists():  # keep the steps before this run's first; a run that was killed may have gone further
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            replace_text(log, "".join(line for line in lines if json.loads(line)["step"] <= first_step))
        marker.mkdir()
    accelerator.wait_for_everyone()
    if not all(gather_object([marker.exists()])):
        raise UserError(f"--output_dir {output}: other machines do not see it; name a shared folder.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        marker.rmdir()
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
    settings.pop("hub_token", None)
    accelerator.init_trackers(args.tracker_project_name, settings)


def draw(accelerator, args, family, weights, ema, step):
    """Validation images from the average weights, if there are any. All processes call this and share the work.

    A signal ends it after an image, since the checkpoint that follows is worth more.
    """
    family.model.eval()
    with ema_weights(ema, weights), family.on_device("decoder"):
        share = draw_share(accelerator, family, weights, drawing_tasks(args, family))
    family.model.train()
    if share is None:
        return
    images = sorted(gather_object(share), key=lambda numbered: numbered[0])
    if accelerator.is_main_process:
        show_samples(accelerator, args, [image for _, image in images], step)


def draw_share(accelerator, family, weights, tasks):
    """This process's part of the images, (number, image) each; None after a signal. All processes call this."""
    images = []
    for start in range(0, len(tasks), accelerator.num_processes):
        stop = torch.tensor(float(interruption.received() is not None), device=accelerator.device)
        if accelerator.reduce(stop):
            return None
        mine = start + accelerator.process_index
        if mine < len(tasks):
            images.append((mine, tasks[mine](family.draw)))
        elif weights.sharded:  # the others need this process's part of the weights
            tasks[-1](family.draw)
    return images


def finish(accelerator, args, family, checkpoints, facts):
    """The result, with the average weights if there are any; then what its user does: load it, draw, share it.

    facts: what the model card shall say besides, headings -> {name: text}. All processes call this; but for the main
    one they leave when it has the weights, so that none waits for it.
    """
    weights, ema, time_spent = checkpoints.weights, checkpoints.ema, checkpoints.time_spent()
    raw = weights.whole() if args.save_non_ema else None
    if ema is not None:
        weights.set(ema.shadow_params)
        ema.to("cpu")
    weights.make_whole()
    accelerator.state.destroy_process_group()
    if not accelerator.is_main_process:
        return
    files = save_result(args, family, raw)
    weights.optimizer.state.clear()  # its memory is free for what is drawn
    accelerator.print(f"Saved to {args.output_dir}; load it with {family.loader}.")
    images, base_images = [], []
    if args.validation_prompts and not args.skip_final_inference:
        images = draw_all(args, family, family.load_result, args.output_dir)
        if images:
            show_samples(accelerator, args, images, args.max_train_steps, title="final")
            base_images = draw_base(args, family) if args.push_to_hub else []
    accelerator.end_training()
    if args.push_to_hub:
        forwards = f"{args.gradient_accumulation_steps} forward passes"
        training = {
            "Samples per step": f"{args.train_batch_size} x {accelerator.num_processes} processes x {forwards}",
            "Mixed precision": accelerator.mixed_precision,
            "Hardware": "; ".join(f"{name}, {duration(seconds)}" for name, seconds in time_spent.items()),
        }
        card = partial(write_model_card, args, family, training, facts, images, base_images)
        publish(args, checkpoints.hub, files, card)


SAMPLES = [f"samples/{name}" for name in ("step-*.png", "final.png", "prompt-*.jpg", "base_and_finetuned.jpg")]


def publish(args, hub, files, write_card):
    """Upload the result, its files given as patterns, with a card. Raises NotUploaded."""
    with suppress(Exception):  # the card needs the owner's name, which a Hub out of reach has not told yet
        hub.open()
    try:
        write_card()
    except Exception:  # whatever it is, the result is worth more
        traceback.print_exc()
    files = [*files, "README.md", "loss.png", *SAMPLES]
    if interruption.received():
        command = upload_command(args, args.output_dir, files)
        raise NotUploaded(f"{interruption.received()} came before the upload: `{command}` does it.")
    print(f"Uploaded to {hub.push_result(files)}")


def draw_all(args, family, load, *more):
    """PIL images of the validation prompts by what `load` gives; none after a signal, or from scratch."""
    if interruption.received():
        return []
    try:
        draw, tasks = load(*more), drawing_tasks(args, family)
        images = [task(draw) for task in tasks if draw is not None and not interruption.received()]
    except torch.OutOfMemoryError as error:
        print(f"The validation prompts are not drawn: {first_line(error)}", file=sys.stderr)
        return []
    return images if len(images) == len(tasks) else []


def draw_base(args, family):
    """The same of the model before it was trained; the card can do without."""
    try:
        return draw_all(args, family, family.load_base)
    except UserError as error:
        print(f"The model card has no images of the base model: {first_line(error)}", file=sys.stderr)
        return []


def save_result(args, family, raw=None):
    """The result appears in the output folder when it is complete, or as far as the base model is in reach.

    raw: weights to save besides, if those of the result are an average: name -> tensor. Returns patterns of its files.
    """
    files = []
    with TemporaryDirectory(dir=args.output_dir, prefix="tmp-result-") as folder:
        failure = None
        try:
            family.save_result(folder, raw)
        except UserError as error:
            failure = UserError(str(error).replace(folder, args.output_dir))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"the result can't be written ({why_not_written(error, args.output_dir)}); the checkpoints in "
                f"{args.output_dir} are intact. Make room, then resume."
            ) from error
        for name in (KOHYA_FILE, NON_EMA_LORA, NON_EMA):  # an older result's, which may not be made again
            replace_path(None, Path(args.output_dir, name))
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "model_index.json"):  # it comes last
            files.append(f"{path.name}/*" if path.is_dir() else path.name)
            replace_path(path, Path(args.output_dir, path.name))
        if failure is not None:
            raise failure
    return files


def drawing_tasks(args, family):
    """A function for each validation image, by prompts; it takes how to draw a PIL image of a prompt and settings.

    The seeds are the same at every step, so that drawings can be compared; no other random state is touched.
    """
    settings = drawing_settings(args, family)

    def task(prompt, seed):
        return lambda draw: draw(prompt, generator=torch.Generator().manual_seed(seed), **settings)

    seeds = range(args.seed, args.seed + args.num_validation_images)
    return [task(prompt, seed) for prompt in args.validation_prompts for seed in seeds]


def drawing_settings(args, family):
    """What the flags tell the pipeline."""
    settings = {**family.size_settings(args.resolution), "num_inference_steps": args.validation_inference_steps}
    if args.validation_guidance_scale is not None:
        settings[family.guidance_name] = args.validation_guidance_scale
    return settings


def show_samples(accelerator, args, images, step, title="validation"):
    """Validation images to the trackers and as a grid (a row per prompt) in `samples/`, whose path is returned."""
    captions = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
    path = Path(args.output_dir, "samples", f"step-{step:06d}.png" if title == "validation" else f"{title}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(args.validation_prompts), cols=args.num_validation_images).save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(title, np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            kind = importlib.import_module(tracker.name).Image
            shown = [kind(image, caption=text) for image, text in zip(images, captions)]
            one_by_one = {f"{title}/{i}": image for i, image in enumerate(shown)}  # trackio drops a list
            tracker.log({title: shown} if tracker.name == "wandb" else one_by_one, step=step)
    return path


class Log:
    """Progress bar, tracker and `train_log.jsonl`; losses are means over processes and forward passes.

    One reduction per optimizer step serves the bar and the check that the loss is finite.
    """

    def __init__(self, accelerator, args, first_step):
        self.accelerator, self.args = accelerator, args
        hide = not accelerator.is_local_main_process
        self.bar = tqdm(initial=first_step, total=args.max_train_steps, desc="steps", disable=hide)
        self.terms, self.samples, self.steps, self.started = [], [], [], time.perf_counter()

    def is_due(self, step):
        """Whether this step is logged: every --logging_steps, and the last."""
        return step % self.args.logging_steps == 0 or step == self.args.max_train_steps

    def add(self, terms, sample_losses, noise_levels):
        """One forward pass: the loss's terms (name -> scalar), and of each sample its losses and sigma / alpha.

        sample_losses: name -> `[b]`, of the first b of the B samples; noise_levels: `[B]`.
        """
        self.terms.append({name: term.detach().float() for name, term in terms.items()})
        losses = sum(F.pad(each.float(), (0, len(noise_levels) - len(each))) for each in sample_losses.values())
        self.samples.append(torch.stack([losses, noise_levels.to(losses, non_blocking=True)]))

    def reduce(self, step, wishes=()):
        """Global means since the last call, name -> float, `loss` being their sum, and those of more numbers.

        All processes call this. Raises UserError if it is not finite, naming the step and the noise levels of the
        samples to blame.
        """
        means = torch.stack([torch.stack([terms[name] for terms in self.terms]).mean() for name in self.terms[0]])
        means = torch.cat([means, torch.tensor(wishes).to(means, non_blocking=True)])
        values = self.accelerator.reduce(means, "mean").tolist()
        values, wishes = values[: len(self.terms[0])], values[len(self.terms[0]) :]
        losses = {"loss": sum(values), **dict(zip(self.terms[0], values))}
        if not math.isfinite(losses["loss"]):
            sample_losses, levels = self.accelerator.gather(torch.cat(self.samples, dim=1).T.contiguous()).T
            blame = ", ".join(f"{level:.3g}" for level in levels[~sample_losses.isfinite()][:8].tolist()) or "all"
            shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            self.bar.close()
            raise UserError(
                f"step {step + 1}: {shown}; the samples to blame have noise level sigma/alpha {blame}. The weights "
                "did not move and the last checkpoint is intact: resume from it with a lower --learning_rate or "
                "another --mixed_precision or --vae_dtype."
            )
        self.terms, self.samples = [], []
        return losses, wishes

    def step(self, step, losses, more):
        """Advance the bar, which shows this step's losses as `reduce` returned them.

        When a log is due, write their means over the steps since the last log, and `more` (name -> number).
        """
        self.steps.append(losses)
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in with_shares(losses).items()}, refresh=False)
        if step == self.args.max_train_steps:
            self.bar.close()
        if not self.is_due(step):
            return
        means = {name: np.mean([losses.get(name, 0) for losses in self.steps]) for name in losses}
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        values = {**with_shares(means), **more, "images_per_second": len(self.steps) * per_step / seconds}
        self.steps = []
        self.write(step, {name: float(value) for name, value in values.items()})

    def write(self, step, values):
        """A line of the log, name -> number, to the trackers as well."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with open(Path(self.args.output_dir, LOG_FILE), "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def with_shares(losses):
    """Adds what share of the loss each term has that is not the diffusion loss."""
    terms = [name for name in losses if name not in ("loss", "l2")]
    return losses | {f"{name}_share": losses[name] / losses["loss"] if losses["loss"] else 0.0 for name in terms}


def replace_text(path, text):
    """Writes a file so that at any time either the old or the new one is there."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def replace_path(new, old):
    """Moves a file or folder to where another one may be; None removes that one."""
    if old.is_dir():
        shutil.rmtree(old)
    elif new is None:
        old.unlink(missing_ok=True)
    if new is not None:
        os.replace(new, old)
