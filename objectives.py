"""The objectives that a script can be asked for: LPL from its flags, and weights of the diffusion loss."""

import math
from functools import partial
from itertools import islice

import torch

from arguments import UserError
from lpl_utils import LatentPerceptualLoss, calibrate, sigma_gate


CALIBRATION_BATCHES, MOST_CALIBRATION_BATCHES = 16, 512  # more than 16 only to see
CALIBRATION_SAMPLES = 16  # with little enough noise


def make_lpl(args, vae, unscale=None):
    """The Latent Perceptual Loss that the `--lpl_` flags describe. Raises UserError if this VAE can't give it."""
    if args.lpl_compile and args.buckets:  # each block is compiled for every size, which torch takes for a mistake
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, len(args.buckets) * (args.lpl_num_blocks + 1))
    try:
        lpl = LatentPerceptualLoss(
            vae,
            num_blocks=args.lpl_num_blocks,
            normalization=args.lpl_normalization,
            detach_stats=args.lpl_detach_stats,
            weighting=args.lpl_weighting,
            reduction=args.lpl_reduction,
            mask_outliers=args.lpl_outlier_mask,
            outlier_source=args.lpl_outlier_source,
            chunk_size=args.lpl_chunk_size,
            unscale=unscale,
            gradient_checkpointing=args.lpl_gradient_checkpointing,
            compile_backend=None if args.dry_run else args.lpl_compile,
        )
    except ValueError as error:
        raise UserError(f"LPL can't be computed: {error} (--lpl_weight 0 trains without it)") from error
    if args.lpl_weight != "auto" and args.lpl_weighting != "balanced":
        lpl.weight = args.lpl_weight  # nothing is left to be measured
    return lpl


def lpl_threshold(args):
    """tau, the highest sigma / alpha to which LPL applies: in proportion to the resolution (Sec. 4.1)."""
    return args.lpl_sigma_threshold * args.resolution / args.lpl_base_resolution


def calibrate_lpl(accelerator, args, lpl, step, batches):
    """Measure what LPL's weight needs; nothing is trained, and the random state is as before.

    Args:
        step: batch -> an object with `diffusion_loss` and `lpl_stats`; batches: an iterator.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    reduce = partial(accelerator.reduce, reduction="sum")
    measurements, seen = [], 0
    with torch.no_grad(), torch.random.fork_rng(devices):
        for batch in islice(batches, MOST_CALIBRATION_BATCHES):
            forward = step(batch)
            measurements.append((forward.diffusion_loss, forward.lpl_stats))
            seen += len(forward.lpl_stats["chosen"])
            enough = len(measurements) >= CALIBRATION_BATCHES
            if enough and reduce(torch.tensor(seen, device=accelerator.device)) >= CALIBRATION_SAMPLES:
                break
        accelerator.print(f"Measured LPL on {len(measurements)} batches.")
        share = args.lpl_target_share if args.lpl_weight == "auto" else None
        try:
            calibrate(lpl, measurements, share, reduce)
        except ValueError as error:
            remedy = "raise --lpl_sigma_threshold, give --lpl_weight a number, or if it overflows try --vae_dtype fp32"
            raise UserError(f"{error}: {remedy}.") from error
    if args.lpl_weight != "auto":
        lpl.weight = args.lpl_weight
    omega = [round(weight, 5) for weight in lpl.omega.tolist()]
    accelerator.print(f"LPL's weight is {lpl.weight:.5g}; its blocks' weights are {omega}.")


def resume_lpl(args, lpl, state):
    """What calibration froze is not measured again; a number given now for `--lpl_weight` counts, though."""
    try:
        lpl.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"--lpl_num_blocks {args.lpl_num_blocks} differs from the run to resume: {error}") from error
    if args.lpl_weight != "auto":
        lpl.weight = args.lpl_weight


def lpl_share(family, tau):
    """Share of the samples that LPL sees: those with sigma / alpha at most tau, as often as they are drawn."""
    weights = family.timestep_weights.double()
    return (weights[sigma_gate(family.alphas, family.sigmas, tau)].sum() / weights.sum()).item()


def describe_lpl(args, family, lpl):
    """What a model card says of LPL, name -> text; empty without it."""
    if lpl is None:
        return {}
    tau, measured = lpl_threshold(args), args.lpl_weight == "auto"
    weight = "not reached" if lpl.weight is None else f"{lpl.weight:.5g}"
    aim = f", measured so that LPL is {args.lpl_target_share:.0%} of the loss" if measured else ""
    statistics = "without a gradient" if args.lpl_detach_stats else "with their gradient"
    masked = f"masked, searched in the {args.lpl_outlier_source}" if args.lpl_outlier_mask else "not masked"
    facts = {
        "Weight": weight + aim,
        "Samples": f"those with sigma/alpha at most {tau:g}, {lpl_share(family, tau):.1%} of all",
        "Compared": f"the decoder's mid block and {args.lpl_num_blocks} up blocks, {args.lpl_weighting} weights",
        "Normalisation": f"{args.lpl_normalization} statistics, {statistics}; {args.lpl_reduction} over positions",
        "Outliers": masked,
    }
    if args.lpl_start_step:
        facts["After step"] = args.lpl_start_step
    return facts


def loss_weights(args, alpha, sigma, prediction_type):
    """Per-sample weights `[B]` of the diffusion loss by the flags, or None: min-SNR, or those of Esser et al. 2024.

    alpha, sigma: `[B]`.
    """
    if args.snr_gamma:
        return min_snr_weight(alpha, sigma, args.snr_gamma, prediction_type)
    if args.weighting_scheme == "sigma_sqrt":
        return sigma**-2
    if args.weighting_scheme == "cosmap":
        return 2 / (math.pi * (alpha.square() + sigma.square()))  # 1 - 2 sigma + 2 sigma^2
    return None


def min_snr_weight(alpha, sigma, gamma, prediction_type):
    """Per-sample loss weights `[B]` of Hang et al. 2023, "Efficient diffusion training via min-SNR weighting".

    With SNR = (alpha / sigma)^2: min(SNR, gamma) on the error of z_0, translated to what the model predicts:
    / SNR for `epsilon`, / (SNR + 1) for `v_prediction`, as it is for `sample`, * sigma^2 for
    `flow_prediction` (for short `flow`).

    Args:
        alpha, sigma: `[B]`, sigma > 0. Where alpha = 0 the weight is 0 (`epsilon`: 1, its limit).
        gamma: the bound, 5 in the paper.
    """
    signal, noise = alpha.square(), sigma.square()
    if prediction_type == "epsilon":
        return torch.clamp(gamma * noise / signal, max=1)
    weight = torch.clamp(signal / noise, max=gamma)
    if prediction_type == "v_prediction":
        return weight * noise / (signal + noise)
    if prediction_type == "sample":
        return weight
    if prediction_type in ("flow_prediction", "flow"):
        return weight * noise
    raise ValueError(f"min-SNR has no rule for prediction_type {prediction_type!r}.")
