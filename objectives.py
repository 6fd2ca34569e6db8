"""The objectives that a script can be asked for: LPL from its flags, and what it is compared with (so far min-SNR)."""

import torch

from arguments import UserError
from lpl_utils import LatentPerceptualLoss, sigma_gate


def make_lpl(args, vae, unscale=None):
    """The Latent Perceptual Loss that the `--lpl_` flags describe. Raises UserError if this VAE can't give it."""
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
