"""What the Latent Perceptual Loss is compared with: other objectives and timestep weights. So far min-SNR."""

import torch


def min_snr_weight(alpha, sigma, gamma, prediction_type):
    """Per-sample loss weights `[B]` of Hang et al. 2023, "Efficient diffusion training via min-SNR weighting".

    With SNR = (alpha / sigma)^2: min(SNR, gamma) on the error of z_0, translated to what the model predicts:
    / SNR for `epsilon`, / (SNR + 1) for `v_prediction`, as it is for `sample`, * sigma^2 for `flow`.

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
    if prediction_type == "flow":
        return weight * noise
    raise ValueError(f"min-SNR has no rule for prediction_type {prediction_type!r}.")
