"""When a checkpoint is due, what is in it, and how a run goes on from one.

A checkpoint is a folder `checkpoint-{step}` in --output_dir. It appears under this name when it is complete, and
before older ones are removed, so that one is there whenever a run is killed. `training_state.json` has the step, the
position in the data, LPL's frozen weights, the settings, and a list of all files with their sizes; beside it are the
weights, the optimizer, the average, the schedule, the loss scaler, and the random state of every process.
"""

import json
import math
import os
import shutil
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import SCALER_NAME, gather_object

import interruption
from arguments import (
    LOG_FILE,
    OBJECTIVES,
    STATE_FILE,
    UserError,
    all_checkpoints,
    checkpoint_step,
    complete_checkpoints,
    first_line,
    read_training_state,
)
from engines import engine_name


class Checkpoints:
    """Saves and restores a run. All processes call all methods together.

    Args:
        weights: see `engines`; ema: the average of them, or None.
        stream: the data, see `data_utils`.
        hub: where checkpoints are uploaded (see `hub.Hub`), or None.
    """

    def __init__(self, accelerator, args, weights, ema, lr_scheduler, stream, hub=None):
        self.accelerator, self.args, self.hub = accelerator, args, hub
        self.weights, self.ema, self.lr_scheduler, self.stream = weights, ema, lr_scheduler, stream
        self.started = self.saved_at = time.monotonic()
        self.spent = {}  # hardware -> seconds, before this process

    # When

    def wishes(self):
        """What this process would like after this step, two numbers: to stop, and a checkpoint."""
        minutes = self.args.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return [float(interruption.received() is not None), float(late)]

    def is_due(self, step, wishes):
        """wishes: their means over all processes, so that all of them come to the same answer."""
        return step % self.args.checkpointing_steps == 0 or any(wishes)

    def is_over(self, step, wishes):
        """Whether the run ends here, since a signal has asked for it; then it says how to go on."""
        if not wishes[0] or step >= self.args.max_train_steps:
            return False
        uploads = self.args.push_to_hub and self.args.hub_strategy != "end"
        elsewhere = ", on another machine with --resume_from_checkpoint hub" if uploads else ""
        self.accelerator.print(
            f"\nStopped by {interruption.received() or 'a signal to another process'} after step {step}, with a "
            f"checkpoint: the same command with --resume_from_checkpoint latest goes on{elsewhere}."
        )
        self.accelerator.end_training()
        return True

    def time_spent(self):
        """Hardware -> seconds of the whole run, resumed or not; `2 x NVIDIA L4`, for instance."""
        count, device = self.accelerator.num_processes, self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} process"
        name = f"{count} x {name}"
        return {**self.spent, name: self.spent.get(name, 0) + time.monotonic() - self.started}

    # Save

    def save(self, step, position, lpl, objectives):
        """Write `checkpoint-{step}`, then remove old ones. position: samples consumed; lpl: the loss, or None.

        Raises UserError if it can't be written; older checkpoints are untouched then.
        """
        args, output = self.args, Path(self.args.output_dir)
        final, temporary = output / f"checkpoint-{step}", output / f"tmp-checkpoint-{step}"
        state = {"step": step, "position": position, "lpl": lpl.state_dict() if lpl is not None else None}
        state |= {"objectives": objectives.state_dict()}
        state |= {"seed": args.seed, "num_samples": self.stream.num_samples, "has_ema": self.ema is not None}
        state["streams"] = gather_object([self.stream.state(position, self.accelerator.num_processes)])
        state["settings"], state["spent"] = settings_of(self.accelerator, args), self.time_spent()

        self._try(gather_object, self._prepare, temporary)
        self._try(gather_object, self._write, temporary)
        if self.accelerator.is_main_process:  # the others go on
            self._try(list, self._complete, temporary, final, state)
            for left in later_checkpoints(output, step):
                remove(left)
            if args.checkpoints_total_limit:
                for old in complete_checkpoints(output)[: -args.checkpoints_total_limit]:
                    if self.hub is None or self.hub.may_remove(old):
                        remove(old)
            if self.hub is not None:
                self.hub.add(final)
        self.saved_at = time.monotonic()

    def _try(self, gather, do, temporary, *more):
        """Do something; if it fails here, or in a process that `gather` hears of, clean up and raise UserError."""
        reason = None
        try:
            do(temporary, *more)
        except Exception as error:
            reason = why_not_written(error, temporary.parent)
        reasons = [reason for reason in gather([reason]) if reason]
        if reasons:
            shutil.rmtree(temporary, ignore_errors=True)
            last = complete_checkpoints(temporary.parent)
            kept = f"{last[-1]} is intact" if last else "there is no older one"
            name = temporary.with_name(temporary.name.removeprefix("tmp-"))
            raise UserError(f"{name} can't be written ({reasons[0]}); {kept}. Make room, then resume.")

    def _prepare(self, temporary):
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _write(self, temporary):
        accelerator = self.accelerator
        with torch.random.fork_rng(devices=[]):  # models that are made to be saved draw initial weights
            self.weights.save(temporary, self.ema)
        rank, scaler = accelerator.process_index, accelerator.scaler if accelerator.is_main_process else None
        save_accelerator_state(temporary, [], [], [self.lr_scheduler], [], rank, accelerator.step, scaler)

    def _complete(self, temporary, final, state):
        log = final.with_name(LOG_FILE)
        if log.exists():  # whoever goes on elsewhere has the whole curve
            shutil.copyfile(log, temporary / LOG_FILE)
        paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        state["files"] = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in paths}
        state_file = temporary / STATE_FILE
        state_file.write_text(json.dumps(state, indent=2, default=torch.Tensor.tolist), encoding="utf-8")
        for path in (*paths, state_file, temporary):
            flush(path)
        remove(final)  # there only after resuming from an older one
        os.replace(temporary, final)
        flush(final.parent)

    # Load

    def load(self, folder):
        """Restore what `save` wrote and return its state. Raises UserError: damaged, or not of such a run.

        What the flags now say of optimizer and schedule counts. If LPL was another one, `lpl` of the state is None,
        and so is `objectives` if what they compare was.
        """
        accelerator, stream, ema = self.accelerator, self.stream, self.ema
        state = read_training_state(folder)
        self.spent = state.get("spent", {})
        check_data(accelerator, stream, folder, state)
        if state["streams"]:
            stream.load_state(state["streams"][accelerator.process_index % len(state["streams"])])
        if accelerator.is_main_process and Path(folder, LOG_FILE).exists():  # whichever machine has written it
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder, LOG_FILE), Path(self.args.output_dir, LOG_FILE))
        groups = [dict(group) for group in self.weights.optimizer.param_groups]
        try:
            self.weights.load(folder, ema if state["has_ema"] else None)
            rank = accelerator.process_index
            scaler = accelerator.scaler if Path(folder, SCALER_NAME).exists() else None  # it begins with fp16
            restored = load_accelerator_state(folder, [], [], [self.lr_scheduler], [], rank, scaler)
            if "step" not in restored and rank < state["settings"]["num_processes"]:
                raise ValueError(f"the random states of process {rank}")  # accelerate goes on without them
        except Exception as error:  # whatever a damaged file makes torch, safetensors or accelerate raise
            reason = first_line(error)
            raise UserError(f"--resume_from_checkpoint {folder} is damaged ({reason}): choose another one.") from error
        accelerator.step = state["step"] * self.args.gradient_accumulation_steps  # it accumulates from here on
        if ema is not None and not state["has_ema"]:
            accelerator.print("--use_ema: that run had no average, so it begins here.")
            for mean, master in zip(ema.shadow_params, self.weights.masters):
                mean.copy_(master.detach())
        self._apply_flags(groups)
        changed = changed_settings(accelerator, self.args, state)
        if changed:
            accelerator.print(f"Unlike the run to resume: {'; '.join(changed.values())}.")
        measured = isinstance(self.args.lpl_weight, str)
        if LPL_SETTINGS & changed.keys() or measured and WEIGHTS & changed.keys():
            state["lpl"] = None
        if OBJECTIVE_SETTINGS & changed.keys() or "objectives" not in state:
            state["objectives"] = None
        nothing = state["step"] >= self.args.max_train_steps
        accelerator.print(f"Resuming from {folder} at step {state['step']}{', the last one' * nothing}.")
        later = later_checkpoints(self.args.output_dir, state["step"])
        if later:
            names = ", ".join(path.name for path in later)
            accelerator.print(f"Once the next checkpoint is complete, those of the run that is left go: {names}.")
        return state

    def _apply_flags(self, groups):
        """Puts the hyperparameters of `groups` where the checkpoint's are now."""
        for group, given in zip(self.weights.optimizer.param_groups, groups):
            group |= {name: given[name] for name in HYPERPARAMETERS & given.keys()}
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, lr, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = lr * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def why_not_written(error, folder):
    """A full disk has many names."""
    full = shutil.disk_usage(folder).free < 2**20
    return "No space left on device" if full else first_line(error)


def flush(path):
    """What was written is there even if the machine goes down."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not all file systems do that
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(folder):
    """A folder that is being removed does not pass for a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f"tmp-{folder.name}-old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def later_checkpoints(output, step):
    """Those that an earlier run has made beyond a step from which another one went on."""
    return [path for path in all_checkpoints(output) if checkpoint_step(path) > step]


def last_step(args, num_samples, samples_per_step):
    """The optimizer step with which --num_train_epochs end, also if the first ones had another number of samples."""
    done = {"step": 0, "position": 0}
    if args.resume_from_checkpoint:
        done = read_training_state(args.resume_from_checkpoint)
    left = args.num_train_epochs * num_samples - done["position"]
    return done["step"] + max(0, math.ceil(left / samples_per_step))


def check_data(accelerator, stream, folder, state):
    if state["num_samples"] != stream.num_samples:
        raise UserError(
            f"--resume_from_checkpoint {folder}: that run had {state['num_samples'] or 'a stream of'} samples, now "
            f"there are {stream.num_samples or 'those of a stream'}; give it the same data, or start a new run from "
            "its weights with another --output_dir."
        )
    if state["num_samples"] is None and len(state["streams"]) != accelerator.num_processes:
        raise UserError(
            f"--resume_from_checkpoint {folder}: with --streaming the order depends on the number of processes, which "
            f"was {len(state['streams'])}; start as many."
        )


# Of an optimizer, those that the flags say:
HYPERPARAMETERS = set(
    "initial_lr betas eps weight_decay beta3 decouple use_bias_correction safeguard_warmup fused".split()
)
# Settings. Those that only say where, when and how fast:
FREE = set(
    "train_data_dir train_shards dataset_name pretrained_model_name_or_path pretrained_vae_model_name_or_path "
    "revision variant cache_dir output_dir offload offload_ema foreach_ema dataloader_num_workers cache_latents "
    "cache_text_embeddings latent_cache_dir class_data_dir gradient_checkpointing allow_tf32 "
    "enable_xformers_memory_efficient_attention lpl_chunk_size lpl_gradient_checkpointing lpl_compile "
    "lpl_channels_last dry_run checkpointing_steps checkpoint_minutes checkpoints_total_limit resume_from_checkpoint "
    "validation_prompts validation_prompt validation_steps validation_epochs num_validation_images "
    "validation_guidance_scale validation_inference_steps skip_final_inference logging_dir logging_steps report_to "
    "tracker_project_name push_to_hub hub_strategy hub_model_id hub_token hub_private_repo save_dtype max_shard_size "
    "save_only_trained save_non_ema output_kohya_format nccl_timeout seed max_bad_images num_train_epochs eval_steps "
    "eval_data_dir eval_samples eval_feature_extractor".split()
)
# That follow from others:
FREE |= set(
    "pipelines changed given_flags idle_lpl_flags sp_layer absent_parts num_classes latent_size buckets "
    "samples".split()
)
# With which the saved weights, or the optimizer's state, mean something else:
FIXED = set(
    "use_lora rank lora_alpha lora_layers use_dora train_text_encoder optimizer use_8bit_adam prediction_type "
    "rescale_betas_zero_snr engine".split()
)
# Of which LPL's frozen weights are a function:
LPL_SETTINGS = set(
    "lpl_target_share lpl_sigma_threshold lpl_base_resolution lpl_num_blocks lpl_normalization lpl_weighting "
    "lpl_reduction lpl_outlier_mask lpl_outlier_source lpl_outlier_positions resolution".split()
)

# And those of the other terms:
WEIGHTS = {f"{name}_weight" for name in ("l2", "lpl", *OBJECTIVES)}
OBJECTIVE_SETTINGS = LPL_SETTINGS | WEIGHTS
OBJECTIVE_SETTINGS |= set(
    "gate_objectives sp_layers sp_timestep sp_distance sp_formulation e_latent_lpips_model "
    "e_latent_lpips_augmentations late_reweight".split()
)


def settings_of(accelerator, args):
    """What a resumed run is compared with: name -> value."""
    plain = (bool, int, float, str, list, type(None))
    settings = {name: value for name, value in vars(args).items() if name not in FREE and isinstance(value, plain)}
    settings |= {"mixed_precision": accelerator.mixed_precision}  # the flag may leave it to the accelerate config
    return {**settings, "num_processes": accelerator.num_processes, "engine": engine_name(accelerator)}


def changed_settings(accelerator, args, state):
    """Name -> what is now and was then, of the settings that differ from those of a checkpoint's state."""
    then, now = state["settings"], json.loads(json.dumps(settings_of(accelerator, args)))
    changed = (name for name in now if name in then and then[name] != now[name])
    return {name: f"{shown(name, now[name])} (was {shown(name, then[name])})" for name in changed}


def shown(name, value):
    if name == "num_processes":
        return f"{value} process{'es' * (value > 1)}"
    if name == "engine":
        return value or "whole weights"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if value is None or value is False:
        return f"no --{name}"
    return f"--{name}" if value is True else f"--{name} {value}"


def refuse_other_run(accelerator, args):
    """Before anything is loaded: could the checkpoint to resume from be one of this run? Raises UserError."""
    state = read_training_state(args.resume_from_checkpoint)
    fixed = FIXED | ({"num_processes"} if (engine_name(accelerator) or "").startswith("ZeRO") else set())
    for name, what in changed_settings(accelerator, args, state).items():
        if name in fixed:
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint}: its run can't go on with {what}; go on as "
                "it was, or start a new run from its result."
            )
    if args.seed not in (None, state["seed"]):
        raise UserError(f"--seed {args.seed}: the run to resume has seed {state['seed']}; leave the flag out.")
    args.seed = state["seed"]
