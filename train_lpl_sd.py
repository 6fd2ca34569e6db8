"""Finetune Stable Diffusion (1.x, 2.x, SDXL) and Kolors, all of its UNet or LoRAs, with the Latent Perceptual Loss.

    accelerate launch train_lpl_sd.py --pretrained_model_name_or_path MODEL --train_data_dir PHOTOS --output_dir OUT

The flags are those of Diffusers' train_text_to_image*.py scripts; those that start with --lpl_ are new.
"""

from arguments import (
    Parser,
    add_data_arguments,
    add_diffusion_arguments,
    add_lora_arguments,
    add_lpl_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_output_arguments,
    add_training_arguments,
    run,
)
from arguments import parse_args as parse_and_check


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.set_defaults(pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline", "KolorsPipeline"))
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser, output_dir="sd-lpl-finetuned", xformers=True)
    add_lora_arguments(parser, text_encoders=True)
    add_diffusion_arguments(parser)
    add_lpl_arguments(parser)
    add_objective_arguments(parser)
    add_output_arguments(parser, guidance_scale=7.5)
    return parse_and_check(parser, argv)


if __name__ == "__main__":
    args = parse_args()  # before the libraries below take their seconds: --help and a wrong flag answer at once

# ruff: noqa: E402
import logging
import math
import os
from functools import partial
from itertools import islice
from typing import NamedTuple


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks at import that torchvision is missing
import torch

import interruption
from checkpoints import Checkpoints, last_step
from data_utils import build_dataloader, make_stream
from dry_run import dry_run
from engines import prepare
from held_out import HeldOut
from hub import Hub
from loading import DTYPES
from loss_terms import (
    NO_OBJECTIVES,
    describe_gate,
    describe_lpl,
    describe_objectives,
    diagnose,
    is_measured,
    loss_weights,
    lpl_threshold,
    make_lpl,
    make_objectives,
    measure_weights,
    resume_lpl,
    weighted_terms,
)
from lpl_utils import lpl_term
from model_families import find_family
from noise import add_noise, sample_noise, stratified_quantiles, training_target
from objectives import Prediction
from train_utils import (
    Log,
    add_class_images,
    cache,
    draw,
    finish,
    make_accelerator,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    sample_generators,
    start_run,
    step_ema,
)


logger = logging.getLogger(__name__)


class Forward(NamedTuple):
    """What one forward pass leaves behind."""

    diffusion_loss: torch.Tensor  # [], mean over the batch
    lpl_loss: torch.Tensor  # [], before its weight; 0 without LPL
    lpl_stats: dict
    objective_losses: dict  # name -> [], mean over the batch, before its weight
    sample_losses: dict  # name of a term -> [B], without a gradient
    model_pred: torch.Tensor  # [B, C, h, w]
    noise_levels: torch.Tensor  # [B], sigma / alpha, on the CPU


def training_step(args, family, model, lpl, batch, max_samples=None, objectives=NO_OBJECTIVES):
    """Noise a batch, let the model denoise it, and compare: in latent space, in the decoder, as `objectives` do."""
    generators = sample_generators(args.seed, batch["positions"], purpose=0)
    device_generators = sample_generators(args.seed, batch["positions"], purpose=1, device=family.device)
    timesteps = family.sample_timesteps(generators, batch.get("quantiles", ()))
    alpha, sigma = family.noise_levels(timesteps)
    with torch.no_grad():
        conditioning = family.conditioning(batch)
        latents = family.latents(batch, device_generators)
        noise = sample_noise(latents, device_generators, args.noise_offset)
    noisy_latents = add_noise(latents, noise, alpha, sigma)

    model_pred = family.predict(model, noisy_latents, timesteps, conditioning)
    target = training_target(latents, noise, alpha, sigma, family.prediction_type)
    losses = (model_pred.float() - target).square().mean((1, 2, 3))  # [B]
    weights = loss_weights(args, alpha, sigma, family.prediction_type)
    if weights is not None:
        losses = losses * weights.to(losses.device, non_blocking=True)
    sample_losses = {"l2": losses.detach()}
    own = slice(batch.get("num_instances"))  # what follows are images of the class, for prior preservation

    lpl_loss, lpl_stats = torch.zeros_like(losses[0]), {}
    if lpl is not None:
        lpl_loss, lpl_stats = lpl_term(
            lpl,
            model_pred[own].detach() if args.late_reweight else model_pred[own],
            z_t=noisy_latents[own],
            z0=latents[own],
            alpha=alpha[own],
            sigma=sigma[own],
            prediction_type=family.prediction_type,
            tau=lpl_threshold(args),
            max_samples=max_samples,
            generator=generators[0],
        )
        chosen = lpl_stats["chosen"].to(losses.device, non_blocking=True)
        seen = lpl_stats["sample_loss"].to(losses.dtype)
        sample_losses["lpl"] = torch.zeros_like(losses[own]).index_add(0, chosen, seen)
    objective_losses = {}
    if objectives.terms:
        levels = timesteps, alpha, sigma, family.prediction_type
        prediction = Prediction.of(model_pred, noisy_latents, latents, noise, *levels, conditioning).take(own)
        found = objectives.losses(prediction, partial(sample_generators, args.seed, batch["positions"][own]))
        sample_losses |= {name: each.detach() for name, each in found.items()}
        objective_losses = {name: each.mean() for name, each in found.items()}
    diffusion_loss = objectives.reweigh(losses[own], lpl, lpl_stats, alpha[own], sigma[own]).mean()
    if "num_instances" in batch:
        diffusion_loss = diffusion_loss + args.prior_loss_weight * losses[own.stop :].mean()
    terms = diffusion_loss, lpl_loss, lpl_stats, objective_losses, sample_losses
    return Forward(*terms, model_pred, sigma / alpha)


def main(args):
    accelerator = make_accelerator(args)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    use_lpl = args.lpl_weight != 0
    if not use_lpl and not args.eval_steps and args.idle_lpl_flags:
        logger.warning(f"--lpl_weight 0 switches LPL off, so without effect: {', '.join(args.idle_lpl_flags)}.")

    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        logger.warning(f"--learning_rate {args.learning_rate} is low for Prodigy, which finds its own: leave it at 1.")

    family_class = find_family(args)
    # Now, so that a wrong token or name is known at once.
    hub = Hub(args) if args.push_to_hub and accelerator.is_main_process and not args.dry_run else None

    # The data: sample number `position` of an endless stream, the same for any number of processes and workers.
    stream = make_stream(args)
    shard = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = partial(
        build_dataloader, stream, args.train_batch_size, **shard, num_workers=args.dataloader_num_workers
    )
    global_batch = args.train_batch_size * accelerator.num_processes
    samples_per_step = global_batch * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = last_step(args, stream.num_samples, samples_per_step)
    if args.validation_steps is None:
        args.validation_steps = 500
        if args.validation_epochs:
            args.validation_steps = args.validation_epochs * math.ceil(stream.num_samples / samples_per_step)

    # The models: one to train, and what is frozen around it.
    weight_dtype = DTYPES[accelerator.mixed_precision]
    default_vae_dtype = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    vae_dtype = DTYPES[default_vae_dtype if args.vae_dtype == "auto" else args.vae_dtype]
    family = family_class(args, accelerator.device, weight_dtype, vae_dtype)
    if args.snr_gamma and family.alphas[-1] == 0 and family.prediction_type != "flow_prediction":
        logger.warning("--snr_gamma gives the last timestep weight 0, as it has no signal: nothing is learnt there.")

    # The perceptual loss: the frozen decoder, hooked.
    lpl, tau = None, lpl_threshold(args)
    if gate := describe_gate(args, family):
        logger.info(gate)
    if use_lpl:
        lpl = make_lpl(args, family.vae, family.unscale)
    objectives = make_objectives(accelerator, args, family)  # with the model as it is now
    held_out = None
    if args.eval_steps and not args.dry_run:
        held_out = HeldOut(accelerator, args, family, lpl, stream.held_out)
    if args.with_prior_preservation:
        add_class_images(accelerator, args, family, stream)
    if not args.dry_run:
        cache(accelerator, args, family, stream)

    # Optimizer, schedule, average weights.
    optimizer = make_optimizer(args, family.trained_parameters, accelerator)  # not held here: FSDP2 frees them
    model, optimizer, weights = prepare(accelerator, args, family, optimizer)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    adds_lpl = use_lpl and not args.late_reweight
    ema = make_ema(args, family, weights, default_decay=0.99975 if adds_lpl else 0.9999) if args.use_ema else None
    if args.dry_run:
        return dry_run(accelerator, args, family, model, lpl, tau, objectives, ema, next(batches()), training_step)

    # Where to start.
    checkpoints = Checkpoints(accelerator, args, weights, ema, lr_scheduler, stream, hub)
    global_step, position = 0, 0  # optimizer steps done, samples consumed
    if args.resume_from_checkpoint:
        state = checkpoints.load(args.resume_from_checkpoint)
        global_step, position = state["step"], state["position"]
        if lpl is not None and state["lpl"]:
            resume_lpl(args, lpl, state["lpl"])
        if state["objectives"]:
            objectives.load_state_dict(state["objectives"])
    start_run(accelerator, args, global_step)
    logger.info(
        f"{stream.num_samples or 'A stream of'} samples; {args.max_train_steps} steps of {args.train_batch_size} "
        f"samples x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} forward passes; "
        f"seed {args.seed}."
    )

    log = Log(accelerator, args, global_step)
    dataloader = batches(start_position=position)
    groups = args.gradient_accumulation_steps * accelerator.num_processes
    strata = partial(stratified_quantiles, args.seed, batch_size=args.train_batch_size, num_groups=groups)
    interruption.defer()  # from here on a signal ends the run after a step, with a checkpoint
    while global_step < args.max_train_steps:
        step_lpl = lpl if global_step >= args.lpl_start_step else None
        if not is_measured(step_lpl, objectives):
            step = partial(training_step, args, family, model, step_lpl, objectives=objectives)
            measure_weights(accelerator, args, step_lpl, objectives, step, batches(start_position=position))

        # One optimizer step, of several forward passes if gradients are accumulated.
        diagnostics = {}
        for micro_step, batch in enumerate(islice(dataloader, args.gradient_accumulation_steps)):
            if args.stratified_timesteps:
                group = micro_step * accelerator.num_processes + accelerator.process_index
                batch["quantiles"] = strata(global_step, group=group)
            with accelerator.accumulate(model):
                forward = training_step(args, family, model, step_lpl, batch, args.lpl_max_samples, objectives)
                terms = weighted_terms(args, step_lpl, objectives, forward)
                if accelerator.sync_gradients and log.is_due(global_step + 1):
                    diagnostics = diagnose(step_lpl, objectives, forward, terms)
                loss = sum(terms.values())
                log.add(terms, forward.sample_losses, forward.noise_levels)
                if accelerator.sync_gradients:  # stops here if they are not finite, before the weights move
                    losses, wishes = log.reduce(global_step, checkpoints.wishes())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(weights.parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            position += global_batch
        global_step += 1
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema is not None:
                step_ema(ema, weights)
        log.step(global_step, losses, {"lr": lr_scheduler.get_last_lr()[0], **diagnostics})

        if held_out is not None and held_out.is_due(global_step) and not wishes[0]:
            step = partial(training_step, args, family, model, objectives=objectives)
            log.write(global_step, held_out(step, weights, ema))
        if checkpoints.is_due(global_step, wishes):
            checkpoints.save(global_step, position, lpl, objectives)
        if checkpoints.is_over(global_step, wishes):
            return
        if args.validation_prompts and global_step % args.validation_steps == 0:
            draw(accelerator, args, family, weights, ema, global_step)

    facts = {"Latent Perceptual Loss": describe_lpl(args, family, lpl)}
    finish(accelerator, args, family, checkpoints, facts | {"Other terms": describe_objectives(args, objectives)})


if __name__ == "__main__":
    run(main, args, resumable=True)
