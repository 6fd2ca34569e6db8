"""The objectives that LPL is compared with once more, literally: whole graphs, plain hooks, loops over samples.

Written from the papers, on stock models, without the frozen copy, the chunks and the early end of `objectives.py`.
"""

import numpy as np
import torch
import torch.nn.functional as F


def predicted(model_pred, z_t, alpha, sigma, prediction_type):
    """z0_hat and eps_hat `[B, C, h, w]` (Lin & Yang, Eq. 8 and 9, and by the same two lines for the others)."""
    z0_hat, eps_hat = [], []
    for pred, z, a, s in zip(model_pred, z_t, alpha.tolist(), sigma.tolist()):
        if prediction_type == "epsilon":
            z0_hat.append((z - s * pred) / a)
            eps_hat.append(pred)
        elif prediction_type == "v_prediction":
            z0_hat.append(a * z - s * pred)
            eps_hat.append(s * z + a * pred)
        elif prediction_type == "sample":
            z0_hat.append(pred)
            eps_hat.append((z - a * pred) / s)
        else:  # flow: pred = eps - z0, and a + s = 1
            z0_hat.append(z - s * pred)
            eps_hat.append(z + a * pred)
    return torch.stack(z0_hat), torch.stack(eps_hat)


def reference_self_perceptual(call, layers, latents, noise, z0_hat, eps_hat, levels, formulation="joint", l1=False):
    """Algorithm 1 of Lin & Yang from line 28 on, and Eq. 17: losses `[B]`, one sample after the other.

    Args:
        call: runs the stock model on (noisy latents `[1, C, h, w]`, number of the sample).
        layers: its modules whose outputs count; of a tuple as long as a transformer's, the second is the image.
        levels: alpha and sigma `[B]` at t'.
    """

    def forward(z0, eps, i):
        return levels[0][i] * z0[i : i + 1] + levels[1][i] * eps[i : i + 1]

    def features(noisy, i):
        seen = []

        def keep(layer, _, output):
            image = 0 if "Down" in type(layer).__name__ or "Up" in type(layer).__name__ else 1
            seen.append(output[image] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        call(noisy, i)
        for hook in hooks:
            hook.remove()
        return seen

    def distance(noisy_hat, noisy, i):
        pairs = zip(features(noisy_hat, i), features(noisy, i), strict=True)
        return sum((F.l1_loss if l1 else F.mse_loss)(f_hat, f) for f_hat, f in pairs)

    losses = []
    for i in range(len(latents)):
        real = forward(latents, noise, i)
        if formulation == "joint":
            losses.append(distance(forward(z0_hat, eps_hat, i), real, i))
        else:
            of_latents = distance(forward(z0_hat, noise, i), real, i)
            losses.append(of_latents + distance(forward(latents, eps_hat, i), real, i))
    return torch.stack(losses)


def reference_latent_lpips(network, z_hat, z):
    """Zhang et al. 2018, Eq. 1, over the stages of a network whose first three poolings are left out: `[B]`."""
    distances = torch.zeros(len(z))
    for number, stage in enumerate(network.stages):
        z_hat, z = stage(z_hat), stage(z)
        if number >= 3:
            z_hat, z = F.max_pool2d(z_hat, 2), F.max_pool2d(z, 2)
        weight = getattr(network, f"weight_{number}")
        difference = F.normalize(z_hat, dim=1, eps=1e-10) - F.normalize(z, dim=1, eps=1e-10)
        distances = distances + torch.einsum("bchw,c->bhw", difference**2, weight).mean((1, 2))
    return distances


def reference_late_weight(l2, lpl, lpl_weight, decay=1.0):
    """Eq. 15 below the threshold, from the lists of losses of the updates so far, the last one being the newest."""

    def variance(updates):
        counts = [decay ** (len(updates) - 1 - i) * np.ones(len(losses)) for i, losses in enumerate(updates)]
        values, counts = np.concatenate(updates).astype(np.float64), np.concatenate(counts)
        mean = (counts * values).sum() / counts.sum()
        return (counts * (values - mean) ** 2).sum() / counts.sum()

    return 1 + lpl_weight * variance(lpl) / variance(l2)
