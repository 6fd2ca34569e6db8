"""Eq. 3 and Algorithm 1 once more, slow and literal: what `lpl_utils` is compared with.

Written from the paper and the method's description, without hooks, chunks or vectorised statistics: every sample,
layer and channel is a turn of a plain loop. It is differentiable, in the precision of the VAE (float64 in the tests).
"""

import math

import numpy as np
import torch


EPSILON = 1e-4


def reference_unscale(vae, z):
    """Scaled latents -> the decoder's latents."""
    shift = getattr(vae.config, "shift_factor", None)
    return z / vae.config.scaling_factor + (0.0 if shift is None else shift)


def reference_features(vae, z, num_blocks=4, unscale=None):
    """Scaled latents [B, C, h, w] -> features of the mid block and of `num_blocks` up blocks, called one by one."""
    x = reference_unscale(vae, z) if unscale is None else unscale(z)
    if getattr(vae, "post_quant_conv", None) is not None:
        x = vae.post_quant_conv(x)
    x = vae.decoder.mid_block(vae.decoder.conv_in(x))
    features = [x]
    for l in range(num_blocks):
        x = vae.decoder.up_blocks[l](x)
        features.append(x)
    return features


# Algorithm 1


def reference_kernel_sizes(distance, resolution):
    """(dilation, erosion): 3 and 5 at the full resolution of 512 pixels; even sizes: dilation down, erosion up."""
    dilation = math.ceil(3 * resolution / 512 / distance)
    erosion = math.ceil(5 * resolution / 512 / distance)
    return dilation - (dilation % 2 == 0), erosion + (erosion % 2 == 0)


def _neighbourhoods(mask, size, outside):
    """The `size` * `size` shifted copies of a bool map, `outside` standing for what lies beyond its border."""
    height, width = mask.shape
    reach = size // 2
    padded = np.full((height + 2 * reach, width + 2 * reach), outside)
    padded[reach : reach + height, reach : reach + width] = mask
    for i in range(size):
        for j in range(size):
            yield padded[i : i + height, j : j + width]


def reference_outlier_map(feature_map, distance, resolution):
    """Algorithm 1 for a single map [h, w]: bool array [h, w], True where the position is valid."""
    f = feature_map.detach().cpu().double().numpy()
    n = f.size
    ascending = np.sort(f.ravel())
    q1 = ascending[max(1, int(0.02 * n)) - 1]
    q2 = ascending[max(1, int(0.98 * n)) - 1]
    margin = 2 * f.std(ddof=1) if n > 1 else 0.0
    valid = (q1 - margin <= f) & (f <= q2 + margin)
    dilation, erosion = reference_kernel_sizes(distance, resolution)
    dilated = np.zeros_like(valid)
    for shifted in _neighbourhoods(valid, dilation, outside=False):
        dilated |= shifted
    eroded = np.ones_like(valid)
    for shifted in _neighbourhoods(dilated, erosion, outside=True):
        eroded &= shifted
    return eroded


def reference_outlier_mask(features, distance, resolution):
    """[B, C, h, w] -> bool tensor of that shape, True = valid."""
    maps = [[reference_outlier_map(m, distance, resolution) for m in sample] for sample in features]
    return torch.from_numpy(np.array(maps, dtype=bool).reshape(features.shape))


def reference_valid(phi_hat, phi, first_side, image_side, mask_outliers, outlier_source):
    """The valid positions of one sample's layer, [C, h, w]: all of them below 4x the first layer's side."""
    side = math.sqrt(phi.shape[-2] * phi.shape[-1])
    if not mask_outliers or side < 4 * first_side * (1 - 1e-9):
        return torch.ones(phi.shape, dtype=torch.bool), False
    distance = image_side / side
    of_prediction = reference_outlier_mask(phi_hat[None], distance, image_side)[0]
    of_target = reference_outlier_mask(phi[None], distance, image_side)[0]
    valid = {"prediction": of_prediction, "target": of_target, "union": of_prediction & of_target}[outlier_source]
    return valid, True


# Eq. 3


def _two_pass(values):
    """Mean and biased variance of a vector."""
    mean = values.sum() / len(values)
    return mean, ((values - mean) ** 2).sum() / len(values)


def _lower_median(values):
    """The median that is one of the values: the lower one of an even number. A plain number."""
    return sorted(v.detach().item() for v in values)[(len(values) - 1) // 2]


def reference_block_loss(phi_hat, phi, valid, masked, first_positions, normalization, detach_stats, reduction):
    """One sample's layer [C, h, w] -> (1 / C) sum_c || rho_c * (phi'_c - phi_hat'_c) ||^2, and statistics."""
    channels, positions = phi.shape[0], phi[0].numel()
    needed = max(16, 0.05 * positions) if masked else 1
    kept = [c for c in range(channels) if int(valid[c].sum()) >= needed]
    stats = {"masked_share": 1 - valid.double().mean().item(), "kept": len(kept)}
    total = 0.0 * (phi_hat * 0).sum()
    if not kept:
        return total, stats

    mean_hat, var_hat, mean, var = {}, {}, {}, {}
    for c in kept:
        mean_hat[c], var_hat[c] = _two_pass(phi_hat[c][valid[c]])
        mean[c], var[c] = _two_pass(phi[c][valid[c]])
        if detach_stats:
            mean_hat[c], var_hat[c] = mean_hat[c].detach(), var_hat[c].detach()
    epsilon_hat = EPSILON * _lower_median(var_hat.values())
    epsilon = EPSILON * _lower_median(var.values())

    length_squared = (phi**2).sum(0)
    length = (length_squared + EPSILON * _lower_median(length_squared.flatten())).sqrt()

    for c in kept:
        a, b = phi_hat[c][valid[c]], phi[c][valid[c]]
        if normalization == "shared":
            scale = (var_hat[c] + epsilon_hat).sqrt()
            a, b = (a - mean_hat[c]) / scale, (b - mean_hat[c]) / scale
        elif normalization == "target":
            scale = (var[c] + epsilon).sqrt()
            a, b = (a - mean[c]) / scale, (b - mean[c]) / scale
        elif normalization == "separate":
            a = (a - mean_hat[c]) / (var_hat[c] + epsilon_hat).sqrt()
            b = (b - mean[c]) / (var[c] + epsilon).sqrt()
        elif normalization == "channel_l2":
            a, b = a / length[valid[c]], b / length[valid[c]]
        else:
            raise ValueError(normalization)
        squares = ((b - a) ** 2).sum()
        total = total + squares / (len(a) if reduction == "mean" else first_positions)

    error, log_ratio, mean_over_std = 0.0, 0.0, 0.0
    for c in kept:
        a, b = phi_hat[c][valid[c]].detach(), phi[c][valid[c]].detach()
        error += (((b - a) ** 2).mean() / (var[c] + epsilon)).item()
        log_ratio += (var_hat[c] / var[c]).log().item()
        mean_over_std += (mean_hat[c].abs() / var_hat[c].sqrt()).item()
    stats["target_error"] = error / channels
    stats["variance_ratio"] = math.exp(log_ratio / len(kept))
    stats["mean_over_std"] = mean_over_std / len(kept)
    return total / channels, stats


def reference_omega(sides, weighting):
    """omega_l from the layers' sides (square root of the number of positions)."""
    ratios = [side / sides[0] for side in sides]
    return {
        "inverse": [1 / r for r in ratios],
        "exponential": [2.0**-r for r in ratios],
        "uniform": [1.0 for r in ratios],
    }[weighting]


def reference_lpl_of_features(
    features_hat,
    features,
    image_side,
    normalization="shared",
    detach_stats=True,
    weighting="inverse",
    reduction="mean",
    mask_outliers=True,
    outlier_source="prediction",
    omega=None,
):
    """Lists of [B, C_l, h_l, w_l] -> (loss [B], {name: tensor [B, L]}).

    image_side: square root of the decoded image's number of pixels. omega: list of L numbers in place of `weighting`.
    """
    sides = [math.sqrt(phi.shape[-2] * phi.shape[-1]) for phi in features]
    omega = reference_omega(sides, weighting) if omega is None else omega
    losses, rows = [], []
    for b in range(len(features[0])):
        loss, row = 0.0, []
        for l in range(len(features)):
            phi_hat, phi = features_hat[l][b], features[l][b].detach()
            valid, masked = reference_valid(phi_hat, phi, sides[0], image_side, mask_outliers, outlier_source)
            first_positions = features[0][b][0].numel()
            block, stats = reference_block_loss(
                phi_hat, phi, valid, masked, first_positions, normalization, detach_stats, reduction
            )
            loss = loss + omega[l] * block
            row.append({"block_loss": float(block.detach()), **stats})
        losses.append(loss)
        rows.append(row)
    names = rows[0][0]
    stats = {
        name: torch.tensor([[layer[name] for layer in row] for row in rows], dtype=torch.float64) for name in names
    }
    return torch.stack(losses), stats


def reference_lpl(vae, z0_hat, z0, num_blocks=4, unscale=None, factor=8, **options):
    """Scaled latents [B, C, h, w] -> (loss [B], {name: tensor [B, L]}); factor: pixels per latent position."""
    image_side = math.sqrt(z0.shape[-2] * z0.shape[-1]) * factor
    with torch.no_grad():
        features = reference_features(vae, z0, num_blocks, unscale)
    features_hat = reference_features(vae, z0_hat, num_blocks, unscale)
    return reference_lpl_of_features(features_hat, features, image_side, **options)
