"""The chores of a training script: accelerator, randomness, optimizer, EMA, checkpoints, drawings, logs.

Nothing here knows of the Latent Perceptual Loss. Functions that all processes must call together say so.
"""

import json
import math
import os
import secrets
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors import SafetensorError
from tqdm.auto import tqdm

from arguments import UserError, complete_checkpoints


DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOG_FILE = "train_log.jsonl"


def make_accelerator(args):
    """An Accelerator for these flags; draws a seed if none is given, the same on all processes."""
    project = ProjectConfiguration(
        project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
    )
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=project,
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"--mixed_precision {args.mixed_precision}: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU.")
    if args.resume_from_checkpoint:
        seed = read_training_state(args.resume_from_checkpoint)["seed"]
        if args.seed not in (None, seed):
            raise UserError(f"--seed {args.seed}: the run to resume has seed {seed}; leave the flag out.")
        args.seed = seed
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


def make_optimizer(args, parameters, num_processes):
    lr = args.learning_rate
    if args.scale_lr:
        lr *= args.gradient_accumulation_steps * args.train_batch_size * num_processes
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(parameters, lr, betas, args.adam_epsilon, args.adam_weight_decay)


def make_lr_scheduler(args, optimizer):
    """Counts optimizer steps; not given to `accelerator.prepare`, which would step it once per process."""
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    cycles = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    return get_scheduler(args.lr_scheduler, optimizer, **schedule, **cycles)


def make_ema(args, model, default_decay):
    """A float32 average of the model's weights; in bf16 a decay near 1 would never move it."""
    decay = default_decay if args.ema_decay is None else args.ema_decay
    device = "cpu" if args.offload_ema else next(model.parameters()).device
    ema = EMAModel(
        model.parameters(), decay, model_cls=type(model), model_config=model.config, foreach=args.foreach_ema
    )
    ema.to(device=device, dtype=torch.float32)
    return ema


def step_ema(ema, model):
    """One update, on the model's device also when the average is kept on the CPU."""
    home, device = ema.shadow_params[0].device, next(model.parameters()).device
    ema.to(device)
    ema.step(model.parameters())
    ema.to(home)


@contextmanager
def ema_weights(ema, model):
    """Inside, the model has the average weights; afterwards its own again. Does nothing if `ema` is None."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def register_checkpoint_models(accelerator, name, model, ema):
    """Checkpoints hold `name/` and `name_ema/` in diffusers' format, which `from_pretrained` loads."""
    model_class = type(model)

    def save(models, weights, folder):
        if accelerator.is_main_process:
            model.save_pretrained(Path(folder, name))
            if ema is not None:
                ema.save_pretrained(Path(folder, f"{name}_ema"))
        weights.clear()

    def load(models, folder):
        models.clear()
        model.load_state_dict(model_class.from_pretrained(folder, subfolder=name).state_dict())
        if ema is not None:
            device = ema.shadow_params[0].device
            ema.load_state_dict(EMAModel.from_pretrained(Path(folder, f"{name}_ema"), model_class).state_dict())
            ema.to(device=device, dtype=torch.float32)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator, args, state):
    """Write `checkpoint-{step}` to a temporary folder, rename it, then remove old ones. All processes call this.

    `state` (`step`, `position`, `seed`, `num_samples`, ...) goes to `training_state.json`, whose presence marks a
    checkpoint as complete.
    """
    output = Path(args.output_dir)
    final, temporary = output / f"checkpoint-{state['step']}", output / f"tmp-checkpoint-{state['step']}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / "training_state.json").write_text(json.dumps(state, indent=2, default=torch.Tensor.tolist))
            shutil.rmtree(final, ignore_errors=True)  # there only after resuming from an older one
            os.replace(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
        last = complete_checkpoints(output)
        kept = f"{last[-1]} is intact" if last else "there is no older one"
        raise UserError(f"{final} can't be written ({error}); {kept}. Make room, then resume.") from error
    if accelerator.is_main_process:
        if args.checkpoints_total_limit:
            for old in complete_checkpoints(output)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, folder, num_samples):
    """Restore what `save_checkpoint` wrote and return its `state`. All processes call this."""
    state = read_training_state(folder)
    if state["num_samples"] != num_samples:
        raise UserError(
            f"--resume_from_checkpoint {folder}: that run had {state['num_samples']} samples, now there are "
            f"{num_samples}; give it the same data, or start a new run from its weights with another --output_dir."
        )
    try:
        accelerator.load_state(folder)
    except Exception as error:  # whatever a damaged file makes torch, safetensors or accelerate raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--resume_from_checkpoint {folder} is damaged ({reason}): choose another one.") from error
    accelerator.print(f"Resuming from {folder} at step {state['step']}.")
    return state


def read_training_state(folder):
    try:
        return json.loads(Path(folder, "training_state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--resume_from_checkpoint {folder} is damaged ({error}): choose another one.") from error


def start_run(accelerator, args, first_step):
    """Create the output folder, start the tracker with the run's settings. All processes call this."""
    log = Path(args.output_dir, LOG_FILE)
    if accelerator.is_main_process:
        log.parent.mkdir(parents=True, exist_ok=True)
        if (
            log.exists()
        ):  # keep what comes before the step at which this run starts; a killed one may have gone further
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= first_step))
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
    accelerator.init_trackers(args.tracker_project_name, settings)


@torch.no_grad()
def draw_samples(accelerator, args, pipe, decode, step):
    """Images for every validation prompt, to the tracker and as a grid (a row per prompt) in `samples/`.

    The seeds are the same at every step, so that drawings can be compared; no other random state is touched.
    `decode` turns scaled latents into PIL images, in the VAE's own precision.
    """
    images = []
    for prompt in args.validation_prompts:
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_validation_images)]
        with accelerator.autocast():
            latents = pipe(
                [prompt] * args.num_validation_images,
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=generators,
                output_type="latent",
            ).images
        images += decode(latents)
    folder = Path(args.output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    grid = make_image_grid(images, rows=len(args.validation_prompts), cols=args.num_validation_images)
    grid.save(folder / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.asarray(grid), step, dataformats="HWC")


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
        """One forward pass: the loss's terms (name -> scalar), and per sample `[B]` the loss and sigma / alpha."""
        self.terms.append({name: term.detach().float() for name, term in terms.items()})
        self.samples.append(torch.stack([sample_losses, noise_levels.to(sample_losses, non_blocking=True)]))

    def reduce(self, step):
        """Global means since the last call, name -> float, `loss` being their sum. All processes call this.

        Raises UserError if it is not finite, naming the step and the noise levels of the samples to blame.
        """
        means = torch.stack([torch.stack([terms[name] for terms in self.terms]).mean() for name in self.terms[0]])
        values = self.accelerator.reduce(means, "mean").tolist()
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
        return losses

    def step(self, step, losses, more):
        """Advance the bar, which shows this step's losses as `reduce` returned them.

        When a log is due, write their means over the steps since the last log, and `more` (name -> number).
        """
        self.steps.append(losses)
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in with_shares(losses).items()}, refresh=False)
        if not self.is_due(step):
            return
        means = {name: np.mean([losses.get(name, 0) for losses in self.steps]) for name in losses}
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        values = {**with_shares(means), **more, "images_per_second": len(self.steps) * per_step / seconds}
        values = {name: float(value) for name, value in values.items()}
        self.steps = []
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with open(Path(self.args.output_dir, LOG_FILE), "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def with_shares(losses):
    """Adds what share of the loss each term has that is not the diffusion loss."""
    terms = [name for name in losses if name not in ("loss", "l2")]
    return losses | {f"{name}_share": losses[name] / losses["loss"] for name in terms}
