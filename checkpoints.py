"""When a checkpoint is due, what is in it, and how a run goes on from one.

A checkpoint is a folder `checkpoint-{step}` in --output_dir. It appears under this name when it is complete, and
before older ones are removed, so that one is there whenever a run is killed. `training_state.json` has the step, the
position in the data, LPL's frozen weights, the settings, and a list of all files with their sizes; beside it are the
weights, the optimizer, the average, the schedule, the loss scaler, and the random state of every process.
"""

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import gather_object

import interruption
from arguments import STATE_FILE, UserError, complete_checkpoints, read_training_state
from engines import engine_name


logger = logging.getLogger(__name__)


def last_step(args, num_samples, samples_per_step):
    """The optimizer step with which --num_train_epochs end, also if the first ones had another number of samples."""
    done = {"step": 0, "position": 0}
    if args.resume_from_checkpoint:
        done = read_training_state(args.resume_from_checkpoint)
    left = math.ceil(args.num_train_epochs * num_samples) - done["position"]
    return done["step"] + max(0, math.ceil(left / samples_per_step))


class Checkpoints:
    """Saves and restores a run. All processes call all methods together.

    Args:
        weights: see `engines`; ema: the average of them, or None.
        stream: the data, see `data_utils`.
    """

    def __init__(self, accelerator, args, weights, ema, lr_scheduler, stream):
        self.accelerator, self.args = accelerator, args
        self.weights, self.ema, self.lr_scheduler, self.stream = weights, ema, lr_scheduler, stream
        self.saved_at = time.monotonic()

    def wishes(self):
        """What this process would like after this step, two numbers: to stop, and a checkpoint."""
        minutes = self.args.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return [float(interruption.received() is not None), float(late)]

    def is_due(self, step, wishes):
        """wishes: their means over all processes, so that all of them come to the same answer."""
        return step % self.args.checkpointing_steps == 0 or any(wishes)

    def save(self, step, position, lpl):
        """Write `checkpoint-{step}`, then remove old ones. position: samples consumed; lpl: the loss, or None.

        Raises UserError if it can't be written; older checkpoints are untouched then.
        """
        accelerator, args = self.accelerator, self.args
        output = Path(args.output_dir)
        final, temporary = output / f"checkpoint-{step}", output / f"tmp-checkpoint-{step}"
        streams = gather_object([self.stream.state(position, accelerator.num_processes)])
        try:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            self.weights.save(temporary, self.ema)
            rank, scaler = accelerator.process_index, accelerator.scaler if accelerator.is_main_process else None
            save_accelerator_state(temporary, [], [], [self.lr_scheduler], [], rank, accelerator.step, scaler)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                state = {"step": step, "position": position, "lpl": lpl.state_dict() if lpl is not None else None}
                state |= {"seed": args.seed, "num_samples": self.stream.num_samples, "streams": streams}
                state |= {"has_ema": self.ema is not None, "settings": settings_of(accelerator, args)}
                files = (path for path in sorted(temporary.rglob("*")) if path.is_file())
                state["files"] = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
                text = json.dumps(state, indent=2, default=torch.Tensor.tolist)
                (temporary / STATE_FILE).write_text(text, encoding="utf-8")
                remove(final)  # there only after resuming from an older one
                os.replace(temporary, final)
        except Exception as error:  # a full disk has many names
            shutil.rmtree(temporary, ignore_errors=True)
            last = complete_checkpoints(output)
            kept = f"{last[-1]} is intact" if last else "there is no older one"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{final} can't be written ({reason}); {kept}. Make room, then resume.") from error
        if accelerator.is_main_process and args.checkpoints_total_limit:
            for old in complete_checkpoints(output)[: -args.checkpoints_total_limit]:
                remove(old)
        self.saved_at = time.monotonic()

    def load(self, folder):
        """Restore what `save` wrote and return its state. Raises UserError: damaged, or not of such a run."""
        accelerator, args = self.accelerator, self.args
        state = read_training_state(folder)
        check_same_data(accelerator, self.stream, folder, state)
        check_settings(accelerator, args, folder, state)
        if state["streams"]:
            self.stream.load_state(state["streams"][accelerator.process_index % len(state["streams"])])
        ema = self.ema if state["has_ema"] else None
        if self.ema is not None and ema is None:
            accelerator.print("--use_ema: that run had no average, so it begins here.")
        given = [dict(group) for group in self.weights.optimizer.param_groups]
        try:
            self.weights.load(folder, ema)
            where = "on_device" if accelerator.num_processes > 1 and accelerator.device.type == "cuda" else "cpu"
            rank, scaler = accelerator.process_index, accelerator.scaler
            restored = load_accelerator_state(folder, [], [], [self.lr_scheduler], [], rank, scaler, where)
        except Exception as error:  # whatever a damaged file makes torch, safetensors or accelerate raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--resume_from_checkpoint {folder} is damaged ({reason}): choose another one.") from error
        if "step" not in restored and accelerator.process_index < state["settings"]["num_processes"]:
            raise UserError(f"--resume_from_checkpoint {folder} is damaged (its random states): choose another one.")
        self.ema_from_weights_if_new(state)
        self.apply_flags(given)
        accelerator.print(f"Resuming from {folder} at step {state['step']}.")
        return state

    def ema_from_weights_if_new(self, state):
        if self.ema is not None and not state["has_ema"]:
            for mean, master in zip(self.ema.shadow_params, self.weights.masters):
                mean.copy_(master.detach())

    def apply_flags(self, given):
        """Optimizer and schedule have come with the saved run's hyperparameters; the flags' count."""
        for group, flags in zip(self.weights.optimizer.param_groups, given):
            group |= {name: flags[name] for name in ("initial_lr", "betas", "eps", "weight_decay") if name in flags}
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in self.weights.optimizer.param_groups]
        for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def is_over(self, step, wishes):
        """Whether the run ends here, since a signal has asked for it; then it says how to go on."""
        if not wishes[0] or step >= self.args.max_train_steps:
            return False
        self.accelerator.print(
            f"\nStopped by {interruption.received() or 'a signal to another process'} after step {step}, with a "
            "checkpoint: the same command with --resume_from_checkpoint latest goes on."
        )
        self.accelerator.end_training()
        return True


def remove(folder):
    """A folder that is being removed does not pass for a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f"tmp-{folder.name}-old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def check_same_data(accelerator, stream, folder, state):
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


# Settings that only say where, when and how fast
FREE = (
    "train_data_dir train_shards dataset_name pretrained_model_name_or_path pretrained_vae_model_name_or_path "
    "revision variant cache_dir output_dir offload offload_ema foreach_ema dataloader_num_workers cache_latents "
    "cache_text_embeddings latent_cache_dir class_data_dir gradient_checkpointing allow_tf32 "
    "enable_xformers_memory_efficient_attention dry_run lpl_chunk_size lpl_gradient_checkpointing lpl_compile "
    "checkpointing_steps checkpoint_minutes checkpoints_total_limit resume_from_checkpoint validation_prompts "
    "validation_prompt validation_steps validation_epochs num_validation_images validation_guidance_scale "
    "validation_inference_steps skip_final_inference logging_dir logging_steps report_to tracker_project_name "
    "push_to_hub hub_model_id hub_token hub_private_repo nccl_timeout seed max_bad_images num_train_epochs samples"
).split()
# Those with which the saved weights or the optimizer's state mean something else
FIXED = (
    "use_lora rank lora_alpha lora_layers use_dora train_text_encoder optimizer use_8bit_adam prediction_type "
    "rescale_betas_zero_snr engine"
).split()


def settings_of(accelerator, args):
    """What a resumed run is compared with: name -> value."""
    plain = (bool, int, float, str, list, type(None))
    settings = {name: value for name, value in vars(args).items() if name not in HIDDEN and isinstance(value, plain)}
    settings = {name: value for name, value in settings.items() if name not in FREE}
    return {**settings, "num_processes": accelerator.num_processes, "engine": engine_name(accelerator)}


HIDDEN = "pipelines given_flags given_lpl_flags absent_parts num_classes latent_size buckets".split()


def check_settings(accelerator, args, folder, state):
    """Refuses, or tells, what differs from the run to resume."""
    then, now = state["settings"], json.loads(json.dumps(settings_of(accelerator, args)))
    changed = [name for name in now if name in then and then[name] != now[name]]

    def shown(name, values):
        value = values[name]
        if name in ("engine", "num_processes"):
            return f"{value or 'without sharding'}" if name == "engine" else f"{value} processes"
        return f"without --{name}" if value in (None, False) else f"--{name}" + f" {value}" * (value is not True)

    for name in changed:
        fixed = name in FIXED or name == "num_processes" and (now["engine"] or "").startswith("ZeRO")
        if fixed:
            raise UserError(
                f"--resume_from_checkpoint {folder}: that run was {shown(name, then)}, this one is "
                f"{shown(name, now)}; go on as it was, or start a new run from its result."
            )
    if changed:
        differences = "; ".join(f"{shown(name, now)} (was {shown(name, then)})" for name in changed)
        accelerator.print(f"Unlike the run to resume: {differences}.")
