"""What the Latent Perceptual Loss is compared with: other perceptual objectives, and weights of the diffusion loss.

    SelfPerceptual      Lin & Yang 2024    hidden features of the model itself, as it was when training began
    ELatentLPIPS        Kang et al. 2024   features of a classifier of latents
    RGB                 Sec. 4.3           the decoded images
    CleanLatent                            the clean latents: what LPL is without a decoder
    min_snr_weight      Hang et al. 2023   diffusion loss, weighted by the signal-to-noise ratio
    LateReweighting     Eq. 15             diffusion loss, weighted as much as LPL would add to it

An objective is called with a `Prediction` and gives a loss per sample `[B]`; gate, weight and mean are the caller's
(`loss_terms.py`). All of them are streamed: they run their frozen network forward and backward for a few samples at a
time, and keep nothing but the gradient with respect to its input.

Shapes: B batch, C latent channels, h x w latent positions, H x W pixels, T noise levels. Latents are scaled.
"""

from dataclasses import dataclass, fields, replace

import torch

from latent_lpips import augment, stage_distance
from lpl_utils import _float, predict_z0, sigma_gate, streamed
from noise import add_noise


@dataclass
class Prediction:
    """What a denoiser says of a batch z_t = alpha z_0 + sigma eps, and what is true."""

    z0_hat: torch.Tensor  # [B, C, h, w], with a gradient
    z0: torch.Tensor  # [B, C, h, w]
    eps_hat: torch.Tensor  # [B, C, h, w], with a gradient
    eps: torch.Tensor  # [B, C, h, w]
    alpha: torch.Tensor  # [B], on the CPU, like sigma and t
    sigma: torch.Tensor  # [B]
    t: torch.Tensor  # [B], timesteps as the noise schedule counts them
    conditioning: dict  # name -> tensor or list, B long, as `Family.conditioning` gives it

    @classmethod
    def of(cls, model_pred, z_t, z0, eps, t, alpha, sigma, prediction_type, conditioning):
        """From the denoiser's output `[B, C, h, w]`; finite where alpha = 0, too, where `epsilon` can't tell z_0."""
        divisor = torch.where(alpha > 0, alpha, 1) if prediction_type == "epsilon" else alpha
        z0_hat = predict_z0(model_pred, z_t, divisor, sigma, prediction_type)
        eps_hat = predict_eps(model_pred, z_t, alpha, sigma, prediction_type)
        return cls(z0_hat, z0, eps_hat, eps, alpha, sigma, t, conditioning)

    def take(self, index):
        """The samples of this index `[k]`, on the CPU."""
        return Prediction(**{field.name: rows(getattr(self, field.name), index) for field in fields(self)})


def rows(values, index):
    """Those of a tensor, of a list, or of each value of a dict; `index` is a slice or a tensor on the CPU."""
    if isinstance(values, dict):
        return {name: rows(value, index) for name, value in values.items()}
    if isinstance(index, slice):
        return values[index]
    if isinstance(values, torch.Tensor):
        return values[index.to(values.device, non_blocking=True)]
    return [values[i] for i in index.tolist()]


def predict_eps(model_pred, z_t, alpha, sigma, prediction_type):
    """The noise implied by a prediction (Lin & Yang, Eq. 9, and the same for what else can be predicted).

    Arguments and result are those of `lpl_utils.predict_z0`; `sample` divides by sigma.
    """
    dtype = torch.promote_types(torch.promote_types(model_pred.dtype, z_t.dtype), torch.float32)
    model_pred, z_t = model_pred.to(dtype), z_t.to(dtype)
    alpha, sigma = (s.to(z_t, non_blocking=True).view(-1, 1, 1, 1) for s in (alpha, sigma))
    if prediction_type == "epsilon":
        return model_pred
    if prediction_type == "v_prediction":
        return alpha * model_pred + sigma * z_t
    if prediction_type == "sample":
        return (z_t - alpha * model_pred) / sigma
    if prediction_type in ("flow_prediction", "flow"):
        return z_t + alpha * model_pred
    raise ValueError(f"there is no rule for prediction_type {prediction_type!r}.")


DISTANCES = {"l2": torch.square, "l1": torch.abs}
NEAR, SPREAD = 40, 100  # of 1,000 timesteps (Table 3 of Lin & Yang: t +- 40, N(t, 100), read as a deviation)


class SelfPerceptual:
    """Lin & Yang 2024, Eq. 10 to 12: both sides noised to a new t', and compared inside the frozen starting model.

        x_t' = forward(z0, eps, t'),  x_t'_hat = forward(z0_hat, eps_hat, t'),
        loss = || f*(x_t'_hat, t', c) - f*(x_t', t', c) ||^2

    f* gives the features of one layer or several; the mean over a layer's is taken, and the sum over layers.

    Args:
        frozen: has `active()`, a context for a forward pass and its backward pass, and `features(noisy latents
            [b, C, h, w], timesteps [b], conditioning) -> L tensors [b, ...]`: a `frozen.FrozenDenoiser`.
        timesteps: the noise schedule's, `[T]`, ascending; noise_levels: timesteps -> alpha, sigma.
        timestep: how t' is drawn: `uniform`; `near`, t +- 40; `normal` around t with a deviation of 100 (of 1,000).
            The last two are clamped to the schedule (Table 3).
        distance: `l2`, squared, or `l1` (Table 4).
        formulation: `joint`, Eq. 12, which is 0 for t' = t; `split`, Eq. 14 to 17: z0_hat with the true noise, and
            eps_hat with the true latents, one after the other.
        chunk_size: samples that run through the model at a time; 0: all.
    """

    def __init__(
        self,
        frozen,
        timesteps,
        noise_levels,
        timestep="uniform",
        distance="l2",
        formulation="joint",
        chunk_size=1,
    ):
        self.frozen, self.timesteps, self.noise_levels = frozen, timesteps, noise_levels
        self.modules = frozen.modules
        self.timestep, self.distance, self.formulation = timestep, DISTANCES[distance], formulation
        self.chunk_size = chunk_size

    def __call__(self, prediction, generators=None):
        """Losses `[B]`. generators: one per sample, on the CPU, to draw t' from."""
        p, t = prediction, self.draw(prediction.t, generators)
        levels = self.noise_levels(t)
        noised = add_noise(p.z0, p.eps, *levels)
        if self.formulation == "joint":
            return self._compare(add_noise(p.z0_hat, p.eps_hat, *levels), noised, t, p.conditioning)
        of_latents = self._compare(add_noise(p.z0_hat, p.eps, *levels), noised, t, p.conditioning)
        return of_latents + self._compare(add_noise(p.z0, p.eps_hat, *levels), noised, t, p.conditioning)

    def draw(self, t, generators=None):
        """t' `[B]` for the timesteps `[B]`."""
        T, generators = len(self.timesteps), generators or [None] * len(t)
        index = torch.searchsorted(self.timesteps, t.to(self.timesteps))
        if self.timestep == "uniform":
            index = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
        elif self.timestep == "near":
            signs = torch.cat([torch.randint(2, (1,), generator=g) for g in generators])
            index = index + (2 * signs - 1) * round(NEAR * T / 1000)
        else:
            draws = torch.cat([torch.randn(1, generator=g) for g in generators])
            index = index + (draws * SPREAD * T / 1000).round().long()
        return self.timesteps[index.clamp(0, T - 1)]

    def _compare(self, noised_hat, noised, t, conditioning):
        """Distances `[B]` of the features of two batches of noisy latents."""

        def features(noisy_latents, part):
            return self.frozen.features(noisy_latents, t[part], rows(conditioning, part))

        def compare(_, phi_hat, phi, __):
            return per_sample(self.distance(_float(phi_hat) - _float(phi)))

        with self.frozen.active():  # the backward pass too is run inside `streamed`
            return streamed(features, compare, noised_hat, noised, self.chunk_size or len(noised))[0]


class ELatentLPIPS:
    """Kang et al. 2024: LPIPS on latents, in the features of a classifier of latents; as a loss, no augmentations.

    Without the L1 distance of the latents, which the authors' package adds.

    Args:
        network: a `latent_lpips.LatentVGG`.
        augmentations: kinds of `latent_lpips.augment`; with them, an ensemble over the steps of training.
        chunk_size: samples that run through the network at a time; 0: all.
    """

    def __init__(self, network, augmentations=(), chunk_size=1):
        self.network, self.augmentations, self.chunk_size = network.eval(), frozenset(augmentations), chunk_size
        self.modules = [network]

    def __call__(self, prediction, generators=None):
        """Losses `[B]`. generators: one per sample, on the CPU, to draw augmentations from."""
        z0_hat, z0 = prediction.z0_hat.float(), prediction.z0.float()
        z0_hat, z0 = augment((z0_hat, z0), self.augmentations, generators)

        def compare(l, phi_hat, phi, _):
            return without_stats(stage_distance(phi_hat, phi, self.network.weights[l]))

        features = lambda latents, _: self.network.features(latents)  # noqa: E731
        return streamed(features, compare, z0_hat, z0, self.chunk_size or len(z0))[0]


class RGB:
    """Squared error of the decoded images, in [-1, 1], mean over pixels and colours (Sec. 4.3).

    Args:
        decode: latents `[b, C, h, w]` -> images `[b, 3, H, W]`, differentiable.
        chunk_size: samples that are decoded at a time; 0: all.
    """

    def __init__(self, decode, chunk_size=1):
        self.decode, self.chunk_size = decode, chunk_size

    def __call__(self, prediction, generators=None):
        """Losses `[B]`; nothing is drawn."""

        def compare(_, image_hat, image, __):
            return per_sample((_float(image_hat) - _float(image)).square())

        features = lambda latents, _: [self.decode(latents)]  # noqa: E731
        z0_hat, z0 = prediction.z0_hat, prediction.z0
        return streamed(features, compare, z0_hat, z0, self.chunk_size or len(z0))[0]


class CleanLatent:
    """Squared error of the predicted clean latents, mean over their values."""

    def __call__(self, prediction, generators=None):
        """Losses `[B]`; nothing is drawn."""
        return (prediction.z0_hat - prediction.z0).square().flatten(1).mean(1)


def per_sample(distances):
    """`[b, ...]` -> their means `[b]`, as `streamed` wants them of a comparison."""
    return without_stats(distances.flatten(1).mean(1))


def without_stats(losses):
    return losses, losses.detach().new_zeros(len(losses), 0)


def gated_losses(objective, prediction, passing, generators, size=None):
    """An objective of the samples that pass a gate, `[B]`, and 0 of the others.

    Args:
        passing: `[B]` bool, on the CPU.
        size: number of samples that the objective gets in any case: where processes share the weights of its network
            they must run it as often, whatever passes. The gradient of those that do not count is 0.
    """
    losses = torch.zeros_like(prediction.z0_hat[:, 0, 0, 0].detach())
    if size is None:
        index = passing.nonzero().flatten()
        counts = torch.ones(len(index), dtype=torch.bool)
    else:
        index = torch.arange(size) % len(passing)
        counts = passing[index] & (torch.arange(size) < len(passing))
    if not len(index):
        return losses
    chosen, generators = prediction.take(index), [generators[i] for i in index.tolist()]
    if not counts.all():  # without its own gradient, which may not be finite
        mask = counts.to(losses.device, non_blocking=True).view(-1, 1, 1, 1)
        z0_hat = torch.where(mask, chosen.z0_hat, chosen.z0)
        chosen = replace(chosen, z0_hat=z0_hat, eps_hat=torch.where(mask, chosen.eps_hat, chosen.eps))
    found = objective(chosen, generators) * counts.to(losses.device, non_blocking=True)
    return losses.index_add(0, index.to(losses.device, non_blocking=True), found.to(losses.dtype))


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


class LateReweighting:
    """Eq. 15: the diffusion loss of the samples that LPL would see counts as much more as LPL would add to it.

        w(sigma_t) = 1 + w_LPL * var(LPL) / var(l2) * [sigma_t <= tau alpha_t]

    If LPL were no more than a weight of timesteps, this would do as well (Table 6). The variances are those of the
    losses of single samples, LPL's of those that pass the gate; both are running ones. Eq. 15 changes with the scale
    of LPL, w_LPL * mean(LPL) / mean(l2) does not: `summary` has both.

    Args:
        tau: threshold on sigma / alpha.
        reduce: sums a tensor over all processes.
        decay: of the running sums, per call of `update`.
    """

    def __init__(self, tau, reduce=lambda sums: sums, decay=0.99):
        self.tau, self.reduce, self.decay = tau, reduce, decay
        self.sums = None  # [2, 3] of l2 and LPL: number, sum, sum of squares

    def update(self, l2, lpl):
        """Add the losses of single samples, `[B]` and (of those that LPL has seen) `[k]`. All processes call this."""
        new = [torch.stack([torch.ones_like(x), x, x.square()]).sum(1) for x in (l2.double(), lpl.double())]
        new = self.reduce(torch.stack(new))
        self.sums = new if self.sums is None else self.decay * self.sums.to(new.device, non_blocking=True) + new

    def weights(self, alpha, sigma, lpl_weight):
        """Eq. 15, `[B]`, on the losses' device."""
        _, variances = self.moments()
        gate = sigma_gate(alpha, sigma, self.tau).to(self.sums.device, non_blocking=True)
        return (1 + lpl_weight * ratio(variances) * gate).float()

    def moments(self):
        """Means `[2]` and variances `[2]` of l2 and LPL."""
        number, total, squares = self.sums.unbind(1)
        mean = total / number.clamp(min=1e-12)
        return mean, (squares / number.clamp(min=1e-12) - mean.square()).clamp(min=0)

    def summary(self, lpl_weight):
        """For a log: Eq. 15's weight and the ratios that it is and could be made of."""
        mean, variance = (ratio(moments).item() for moments in self.moments())
        return {
            "late_weight": 1 + lpl_weight * variance,
            "late_variance_ratio": lpl_weight * variance,
            "late_mean_ratio": lpl_weight * mean,
        }


def ratio(moments):
    """LPL's in units of l2's, `[]`; 0 as long as there is nothing to compare."""
    l2, lpl = moments
    return torch.where(l2 > 0, lpl / l2.clamp(min=1e-30), 0)
