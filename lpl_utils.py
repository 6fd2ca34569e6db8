"""The Latent Perceptual Loss (LPL) of Berrada et al., ICLR 2025: everything the method needs, on top of torch alone.

Read it beside the paper:

    predict_z0              Table 1        the clean latent that a prediction implies
    sigma_gate              Eq. 3, delta   which samples have little enough noise
    outlier_mask            Algorithm 1    which positions of a feature map count
    LatentPerceptualLoss    Eq. 2, Eq. 3   decoder features, normalised, masked, weighted, compared
    lpl_term                gate + cost bound + loss: the one call of a training step
    calibrate               Fig. 9         the weight that makes LPL a given share of the total loss

Shapes: B batch, C channels, h x w positions of a latent or feature map, L hooked decoder blocks.
Latents are *scaled* (what the denoiser sees) unless a name says *unscaled* (what the decoder wants).
"""

import inspect
import math
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lean_backward import lean_backward


NORMALIZATIONS = ("shared", "target", "separate", "channel_l2")
WEIGHTINGS = ("inverse", "exponential", "uniform", "balanced")
REDUCTIONS = ("mean", "sum")
OUTLIER_SOURCES = ("prediction", "target", "union")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
STATS = ("block_loss", "masked_share", "target_error", "variance_ratio", "mean_over_std")
FLOOR = 1e-12  # keeps a layer of constant maps finite; far below the variance of any real feature


def predict_z0(model_pred, z_t, alpha, sigma, prediction_type):
    """The clean latent implied by a prediction at z_t = alpha z_0 + sigma eps (Table 1).

    Args:
        model_pred, z_t: `[B, C, h, w]`, scaled latents.
        alpha, sigma: `[B]`, on any device. `epsilon` divides by alpha: leave samples with alpha = 0 out beforehand.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow_prediction`, for short `flow` (optimal-transport
            path, alpha = 1 - sigma, the network predicts eps - z_0).

    Returns: `[B, C, h, w]` in at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(model_pred.dtype, z_t.dtype), torch.float32)
    model_pred, z_t = model_pred.to(dtype), z_t.to(dtype)
    alpha, sigma = (s.to(z_t, non_blocking=True).view(-1, *[1] * (z_t.ndim - 1)) for s in (alpha, sigma))
    if prediction_type == "epsilon":
        return (z_t - sigma * model_pred) / alpha
    if prediction_type == "v_prediction":
        return alpha * z_t - sigma * model_pred
    if prediction_type == "sample":
        return model_pred
    if prediction_type in ("flow_prediction", "flow"):
        return z_t - sigma * model_pred
    raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}.")


def sigma_gate(alpha, sigma, tau):
    """delta of Eq. 3: `[B]` bool, true where the noise-to-signal ratio sigma / alpha is at most tau."""
    return sigma <= tau * alpha  # no division: alpha is 0 at the end of a zero-terminal-SNR schedule


def outlier_mask(features, distance, resolution, positions=None):
    """Algorithm 1: which positions of each feature map are no outliers.

    A position is valid if it lies within the 2nd and 98th percentiles, widened by two standard deviations. One
    dilation of the valid mask drops lone outliers, one erosion widens the outliers that remain.

    Args:
        features: `[B, C, h, w]`; no gradient flows.
        distance: image side / feature side, 1 for maps at the decoder's output resolution.
        resolution: side of the square image, in pixels (`sqrt(height * width)` for others).
        positions: percentiles and deviation of at most this many positions, evenly spaced; None: of all.

    Returns: `[B, C, h, w]` bool, true = valid.
    """
    flat = features.detach().flatten(-2)  # [B, C, n]
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    low, high, std = _bulk(flat, positions)
    valid = (low - 2 * std <= flat) & (flat <= high + 2 * std)  # not strict: a constant map has no outliers
    valid = valid.view_as(features)

    # The paper's kernels are for 512-pixel images and maps at full resolution; they cover a share of the image.
    dilation, erosion = (math.ceil(base * resolution / 512 / distance) for base in (3, 5))
    dilation -= dilation % 2 == 0  # even sizes would shift the mask: dilate less, erode more
    erosion += erosion % 2 == 0
    return ~_dilate(~_dilate(valid, dilation), erosion)


def _bulk(flat, positions=None):
    """2nd and 98th percentile and standard deviation `[B, C, 1]` of maps `[B, C, n]`, see `outlier_mask`."""
    stride = math.ceil(flat.shape[-1] / positions) if positions else 1
    flat = flat[..., :: stride + (stride % 2 == 0)]  # an even one would see one phase of an upsampling only
    n = flat.shape[-1]
    low, high = (flat.kthvalue(max(1, int(q * n)), dim=-1, keepdim=True).values for q in (0.02, 0.98))
    return low, high, flat.std(-1, keepdim=True, correction=min(1, n - 1))


def _dilate(mask, size):
    """Which positions of `[..., h, w]` bool have a true one in the square of this odd `size` around them."""
    for dim in (-1, -2):
        mask = F.pad(mask, [0, 0] * (-1 - dim) + [size // 2] * 2)
        width = 1  # position i has seen those from i to i + width - 1
        while width < size:
            step = min(width, size - width)
            length = mask.shape[dim] - step
            mask = mask.narrow(dim, 0, length) | mask.narrow(dim, step, length)
            width += step
    return mask


class LatentPerceptualLoss:
    """Eq. 3 without its expectation: one value per sample.

        LPL = sum_l  omega_l / C_l  sum_c  reduce_positions( rho_{l,c} (phi'_{l,c} - phi_hat'_{l,c})^2 )

    The decoder of `vae` is frozen and put in eval mode. Its features are read by hooks on the mid block, if there is
    one, and on the first `num_blocks` up blocks, inside `vae.decode`, which is left at the last block asked for.

    By default the loss is *streamed*: the decoder runs forward and backward on `chunk_size` samples at a time, and
    only dLPL/dz0_hat is kept. The result is exact, because the decoder has no operation across samples, and memory
    does not depend on the batch. `chunk_size=0` leaves the graph to autograd.

    Args:
        vae: an autoencoder of diffusers: `AutoencoderKL`, `AsymmetricAutoencoderKL` (mid and up blocks),
            `AutoencoderDC` (up blocks alone) or `AutoencoderTiny` (the last block of each stage). Others with such
            decoders, `AutoencoderKLFlux2` and `AutoencoderKLQwenImage` for instance, need `unscale`.
        num_blocks: up blocks to compare, not counting the mid block; 3 is the economical choice (Fig. 7).
        normalization: whose statistics standardise the features, per sample and channel over the valid positions.
            `shared`: both tensors with those of the prediction (Sec. 3.2); `target`: both with those of the clean
            latent; `separate`: each with its own (Sec. 4.3's ablation); `channel_l2`: both divided, position by
            position, by the length of the clean feature vector, as in LPIPS.
        detach_stats: no gradient through the statistics. With the gradient (the literal Eq. 3) a model can lower the
            loss by inflating the variance of its features. `separate` needs that gradient: the amplitude of its
            features cancels, and without the gradient each step makes it smaller, whatever it is.
        weighting: omega_l from the resolutions r_l: `inverse` r_1 / r_l, `exponential` 2^(-r_l / r_1), `uniform` 1;
            `balanced`: uniform until `balance` is called with measured means.
        reduction: over positions, `mean` of the valid ones or `sum` in units of the first layer's number of positions.
        mask_outliers, outlier_source: Algorithm 1 on layers with at least 4 times the first layer's resolution, on
            the features of the `prediction`, of the `target`, or leaving out what either calls an outlier (`union`).
        outlier_positions: that algorithm's percentiles from at most this many positions of a map; None: from all.
        chunk_size: samples that are decoded at a time, keeping little for the backward pass; 0: plain autograd.
        unscale: maps scaled latents to what `vae.decode` takes, by default `z / scaling_factor + shift_factor` of the
            VAE; may change their shape. A decoder of videos takes `[B, C, 1, h, w]`.
        gradient_checkpointing: recompute the decoder's blocks in the backward pass; also on when the VAE's own is.
        compile_backend: `torch.compile` the decoder's blocks with this backend, `inductor` for instance.
        channels_last: convert the decoder to this memory format.

    Raises:
        ValueError: an unknown option; no blocks to hook or fewer than asked for; a decoder that is not a function of
            its latents alone (adds noise, keeps state); no `unscale` for a VAE without a scaling factor.
    """

    def __init__(
        self,
        vae,
        num_blocks=4,
        normalization="shared",
        detach_stats=True,
        weighting="inverse",
        reduction="mean",
        mask_outliers=True,
        outlier_source="prediction",
        outlier_positions=None,
        chunk_size=1,
        unscale=None,
        gradient_checkpointing=False,
        compile_backend=None,
        channels_last=False,
    ):
        for name, value, known in (
            ("normalization", normalization, NORMALIZATIONS),
            ("weighting", weighting, WEIGHTINGS),
            ("reduction", reduction, REDUCTIONS),
            ("outlier_source", outlier_source, OUTLIER_SOURCES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}.")
        if chunk_size < 0:
            raise ValueError(f"chunk_size {chunk_size} must be 0 (plain autograd) or a number of samples.")
        if outlier_positions is not None and outlier_positions < 1:
            raise ValueError(f"outlier_positions {outlier_positions} must be a number of positions.")
        self.vae = vae.requires_grad_(False).eval()
        self.normalization, self.detach_stats, self.reduction = normalization, detach_stats, reduction
        self.weighting, self.mask_outliers, self.outlier_source = weighting, mask_outliers, outlier_source
        self.outlier_positions = outlier_positions
        self.chunk_size, self.gradient_checkpointing = chunk_size, gradient_checkpointing
        if unscale is None and getattr(vae.config, "scaling_factor", None) is None:
            raise ValueError(
                f"{type(vae).__name__} has no scaling_factor: LPL needs to be told how to unscale latents."
            )
        self.unscale = unscale or self._unscale
        self.weight = None  # w_LPL: set by the caller or by `calibrate`; kept here to be saved with omega

        mid_blocks, up_blocks = _decoder_blocks(getattr(vae, "decoder", None))
        if not up_blocks:
            raise ValueError(f"{type(vae).__name__} has no decoder blocks to hook: LPL can't use this VAE.")
        fewest, most = 1 - len(mid_blocks), len(up_blocks)
        if not fewest <= num_blocks <= most:
            name = type(vae).__name__
            raise ValueError(f"num_blocks {num_blocks}: this {name} has {most} up blocks, give {fewest} to {most}.")
        if channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            for weight in vae.decoder.parameters():  # `Module.to` fails with videos' and with fake ones
                if weight.ndim in formats:
                    weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
        # Not all decoders run their blocks in the order of the list: take those that fire first.
        self.blocks = mid_blocks + up_blocks
        self.depth = len(mid_blocks) + num_blocks
        self._forwards = {}  # block -> its compiled forward
        self.blocks = [block for block, _ in self._decode(self._probe_latents()[0])]
        self._probe()
        if compile_backend:
            # Block by block: hooks on a decoder that is compiled as a whole would never fire.
            compiled = partial(torch.compile, backend=compile_backend, dynamic=False)
            self._forwards = {block: compiled(block.forward) for block in self.blocks}
            if chunk_size == 0:  # the caller's graph, which may be kept for another backward pass
                torch._functorch.config.donated_buffer = False

    def __call__(self, z0_hat, z0):
        """Compare predicted and true clean latents.

        Args:
            z0_hat, z0: `[B, C, h, w]`, scaled latents; B may be 0. The loss is differentiable in `z0_hat` alone.

        Returns:
            loss: `[B]`, at least float32.
            stats: name -> `[B, L]`, detached:
                `block_loss`      each layer's term before omega,
                `masked_share`    share of positions that are masked,
                `target_error`    squared error in units of the clean features' variance,
                `variance_ratio`  variance of predicted / of clean features (geometric mean over channels): when it
                                  grows while `target_error` does not fall, the model plays the normalisation,
                `mean_over_std`   |mean| / std of the predicted features: where large, bf16 loses accuracy.
        """
        if z0_hat.shape != z0.shape:
            raise ValueError(f"z0_hat {tuple(z0_hat.shape)} and z0 {tuple(z0.shape)} must have the same shape.")
        self.vae.eval()  # some decoders have batch norms, and a training loop may have flipped the mode
        z0 = z0.detach()
        if len(z0) == 0:
            empty = torch.zeros(0, len(self.blocks), device=z0.device)
            loss = z0_hat.flatten(1).sum(1).to(torch.promote_types(z0_hat.dtype, torch.float32))
            return loss, dict.fromkeys(STATS, empty)
        if self.chunk_size == 0 and torch.is_grad_enabled():
            with torch.no_grad():
                phi = self.features(z0)
            loss, stats = self._compare(self.features(z0_hat), phi)
        else:
            size = self.chunk_size or len(z0)
            loss, stats = streamed(lambda z, _: self.features(z), self._compare_block, z0_hat, z0, size)
        return loss, dict(zip(STATS, stats.unbind(-1)))

    def balance(self, block_loss_means):
        """Set omega_l = m_1 / m_l from measured means `[L]` of the layers' terms, so that layers contribute alike."""
        means = torch.as_tensor(block_loss_means).detach().cpu().double()
        if not (means > 0).all():
            raise ValueError("balanced weighting needs a positive mean for every hooked block.")
        self._omega = (means[0] / means).tolist()

    @property
    def omega(self):
        """The blocks' weights omega_l, `[L]` float64."""
        return torch.tensor(self._omega, dtype=torch.float64)

    def state_dict(self):
        """What calibration froze: `{"omega": [L] tensor, "weight": float or None}`."""
        return {"omega": self.omega, "weight": self.weight}

    def load_state_dict(self, state_dict):
        omega = [float(weight) for weight in state_dict["omega"]]
        if len(omega) != len(self.blocks):
            raise ValueError(f"the saved omega is for {len(omega)} blocks, this loss has {len(self.blocks)}.")
        self._omega, self.weight = omega, state_dict["weight"]

    # Eq. 2: the decoder's features

    def features(self, z):
        """Features of scaled latents `[B, C, h, w]`: L tensors `[B, C_l, h_l, w_l]` in the order of the blocks."""
        return [output for _, output in self._decode(self.unscale(_float(z)))]

    def _decode(self, unscaled):
        """Decode until `self.depth` hooked blocks have run: their (block, output), in that order."""
        fired = []

        def keep(block, args, output):
            fired.append((block, output.squeeze(2) if output.ndim == 5 else output))  # a video of one frame
            if len(fired) == self.depth:
                raise _LastBlock

        with self._hooked(keep), self._lean(), torch.autocast(unscaled.device.type, enabled=False):
            try:
                self.vae.decode(unscaled.to(self.vae.dtype))
            except _LastBlock:
                pass
        assert len(fired) == self.depth, "a hooked decoder block did not run"
        return fired

    @contextmanager
    def _hooked(self, hook):
        """Hooks on the blocks, which are checkpointed on request; the decoder runs whole samples in one piece."""
        with ExitStack() as stack:

            def override(target, name, value):
                if name in vars(target):
                    stack.callback(setattr, target, name, getattr(target, name))
                else:
                    stack.callback(delattr, target, name)
                setattr(target, name, value)

            recompute = self.gradient_checkpointing or getattr(self.vae.decoder, "gradient_checkpointing", False)
            override(self.vae, "use_slicing", False)
            override(self.vae, "use_tiling", False)
            if "feat_cache" in inspect.signature(self.vae.decoder.forward).parameters:
                # A decoder of videos keeps copies of its features for the next frame; an image has none.
                decode = self.vae.decoder.forward
                override(self.vae.decoder, "forward", lambda z, **caches: decode(z))
            for block in self.blocks:
                stack.enter_context(block.register_forward_hook(hook))
                forward = self._forwards.get(block, block.forward)
                if recompute and torch.is_grad_enabled():
                    # Around `forward` alone, so that the hook does not fire again when the block is recomputed.
                    how = {"use_reentrant": False, "preserve_rng_state": False}
                    how["context_fn"] = lambda: (nullcontext(), _Again(self._lean))
                    forward = partial(checkpoint, forward, **how)
                override(block, "forward", forward)
            yield

    @contextmanager
    def _lean(self):
        """The decoder keeps little for the backward pass, unless that is left to autograd or to a compiler.

        Its own checkpointing, which would compute again without this, is off meanwhile.
        """
        own = [part for part in self.vae.decoder.modules() if getattr(part, "gradient_checkpointing", False)]
        try:
            for part in own:
                part.gradient_checkpointing = False
            with lean_backward(self.chunk_size > 0 and not self._forwards):
                yield
        finally:
            for part in own:
                part.gradient_checkpointing = True

    def _unscale(self, z):
        config = self.vae.config
        return z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)

    def _probe_latents(self):
        """Two batches of small unscaled latents."""
        config = self.vae.config
        channels = getattr(config, "latent_channels", None) or config.z_dim  # as some VAEs of videos call them
        frames = [1] if any(isinstance(module, torch.nn.Conv3d) for module in self.vae.decoder.modules()) else []
        noise = torch.randn((2, 2, channels, *frames, 8, 8), generator=torch.Generator().manual_seed(0))
        here = next(chain(self.vae.decoder.parameters(), self.vae.parameters()))  # the encoder may be elsewhere
        return (noise / (getattr(config, "scaling_factor", None) or 1)).to(here)

    @torch.no_grad()
    def _probe(self):
        """Run the decoder on small latents: the resolutions r_l, and proof that features depend on latents alone."""
        z, other = self._probe_latents()
        first, _, again = ([phi for _, phi in self._decode(x)] for x in (z, other, z))
        name = type(self.vae).__name__
        for a, b in zip(first, again) if type(first[0]) is torch.Tensor else ():  # fake tensors have no values
            if not a.isfinite().all():
                raise ValueError(f"the decoder of {name} overflows in {a.dtype}: use another precision for the VAE.")
            if (a - b).float().abs().mean() > 1e-2 * a.float().std():
                raise ValueError(f"the decoder of {name} adds noise or keeps state between calls: LPL can't use it.")
        growth = [phi.shape[-1] / first[0].shape[-1] for phi in first]  # r_l / r_1
        rule = {"inverse": lambda r: 1 / r, "exponential": lambda r: 2**-r}.get(self.weighting, lambda r: 1.0)
        self._omega = [rule(r) for r in growth]

    # Eq. 3: normalise, mask, weigh, compare

    def _compare(self, phi_hats, phis):
        """Loss `[B]` and stats `[B, L, len(STATS)]` of two lists of features."""
        return _compare_all(self._compare_block, phi_hats, phis)

    def _compare_block(self, l, phi_hat, phi, first):
        """Layer l's weighted term `[B]` and its stats `[B, len(STATS)]`; `first`: the first layer's features."""
        positions = phi.shape[-2] * phi.shape[-1]
        valid, alive, count = None, torch.ones((), dtype=torch.bool, device=phi.device), positions
        if self.mask_outliers and phi.shape[-1] >= 4 * first.shape[-1]:
            valid = self._valid_positions(phi_hat, phi)
            count = valid.sum((-2, -1))  # [B, C]
            alive = count >= max(16, 0.05 * positions)

        mean_hat, var_hat, mean, var, squared = _Moments.apply(phi_hat, phi, valid, count)  # [B, C]
        if self.detach_stats:
            mean_hat, var_hat = mean_hat.detach(), var_hat.detach()
        var_hat, var = _above_zero(var_hat, alive), _above_zero(var, alive)

        # The means cancel in `shared` and `target`, and one variance per channel can be divided out after the sum.
        if self.normalization == "shared":
            term = squared / var_hat
        elif self.normalization == "target":
            term = squared / var
        elif self.normalization == "separate":
            standard = (_float(phi) - mean[..., None, None]) * var.rsqrt()[..., None, None]
            standard_hat = (_float(phi_hat) - mean_hat[..., None, None]) * var_hat.rsqrt()[..., None, None]
            term = _spatial_mean((standard - standard_hat).square(), valid, count)
        else:
            length = _float(phi).square().sum(1, keepdim=True)  # [B, 1, h, w]
            length = length + 1e-4 * length.flatten(1).median(1).values.view(-1, 1, 1, 1)
            term = _spatial_mean((_float(phi) - phi_hat).square() / length.clamp(min=FLOOR), valid, count)
        if self.reduction == "sum":
            term = term * count / (first.shape[-2] * first.shape[-1])
        term = torch.where(alive, term, 0).mean(1)  # 1 / C_l

        with torch.no_grad():
            alive_share = alive.expand_as(var).float().mean(1).clamp(min=FLOOR)
            target_error = torch.where(alive, squared / var, 0).mean(1)
            variance_ratio = ((var_hat / var).log().mean(1) / alive_share).exp()  # 1 / 1 in the other channels
            masked = 1 - (count / positions).mean(1) if valid is not None else torch.zeros_like(term)
            mean_over_std = torch.where(alive, mean_hat.abs() / var_hat.sqrt(), 0).mean(1) / alive_share
            stats = torch.stack([term, masked, target_error, variance_ratio, mean_over_std], dim=-1)
        return self._omega[l] * term, stats

    def _valid_positions(self, phi_hat, phi):
        """rho of Eq. 3, `[B, C, h, w]` bool."""
        # distance = image side / feature side and resolution = image side, so only the feature side matters.
        side = math.sqrt(phi.shape[-2] * phi.shape[-1])
        valid = None
        for source, features in (("prediction", phi_hat), ("target", phi)):
            if self.outlier_source in (source, "union"):
                mask = _by_channels(lambda maps: outlier_mask(maps, 1, side, self.outlier_positions), features)
                valid = mask if valid is None else valid & mask
        return valid


def _decoder_blocks(decoder):
    """The blocks of a decoder whose outputs can be compared: a list of the mid block, if any, and one of the rest."""
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, torch.nn.Sequential):  # AutoencoderTiny: its stages end before an Upsample or the last layer
        pairs = zip(layers, layers[1:])
        return [], [block for block, after in pairs if isinstance(after, torch.nn.Upsample) or after is layers[-1]]
    mid_block, up_blocks = getattr(decoder, "mid_block", None), getattr(decoder, "up_blocks", None) or []
    # An empty Sequential is false: AutoencoderDC has one for a stage without layers, which would repeat a feature.
    return [mid_block] if mid_block else [], [block for block in up_blocks if block]


class _Again(ExitStack):
    """What `make` makes, as a context that can be entered again: more than one backward pass may compute a block."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __enter__(self):
        self.enter_context(self.make())
        return super().__enter__()


class _LastBlock(Exception):
    """Leaves `vae.decode` once the last hooked block has run: what follows is never computed."""


def streamed(features, compare, x_hat, x, chunk_size):
    """Sum over layers of a distance between a frozen network's features of two inputs, a few samples at a time.

    The network runs forward and backward on each chunk in here, and only the gradient with respect to `x_hat` is
    kept: exact, if the network has no operation across samples, with memory that does not depend on the batch.

    Args:
        features: (inputs `[b, ...]`, the slice of the batch that they are) -> L tensors `[b, ...]`.
        compare: (layer l, its features of x_hat, of x, the first layer's of x_hat) -> loss `[b]`, stats `[b, S]`.
        x_hat, x: `[B, ...]`, B > 0; the loss is differentiable in `x_hat` alone.

    Returns:
        loss: `[B]`; stats: `[B, L, S]`, detached.
    """
    if torch.is_grad_enabled() and x_hat.requires_grad:
        with torch.autocast(x.device.type, enabled=False):  # its backward pass runs in here as well
            return _Streamed.apply(x_hat, x, features, compare, chunk_size)
    with torch.no_grad():
        chunks = (slice(i, i + chunk_size) for i in range(0, len(x), chunk_size))
        pairs = ([features(inputs[chunk], chunk) for inputs in (x_hat, x)] for chunk in chunks)
        losses, stats = zip(*(_compare_all(compare, *pair) for pair in pairs))
    return torch.cat(losses), torch.cat(stats)


def _compare_all(compare, phi_hats, phis):
    """Loss `[b]` and stats `[b, L, S]` of two lists of features, see `streamed`."""
    losses, stats = zip(*(compare(l, *pair, phi_hats[0]) for l, pair in enumerate(zip(phi_hats, phis))))
    return sum(losses), torch.stack(stats, dim=1)


class _Streamed(torch.autograd.Function):
    """`streamed`, as an operation whose backward pass only multiplies."""

    @staticmethod
    def forward(ctx, x_hat, x, features, compare, chunk_size):
        losses, stats, gradient = [], [], torch.empty_like(x_hat)
        for i in range(0, len(x), chunk_size):
            chunk = slice(i, i + chunk_size)
            loss, stat, gradient[chunk] = _forward_backward(features, compare, x_hat[chunk], x[chunk], chunk)
            losses.append(loss)
            stats.append(stat)
        loss, stats = torch.cat(losses), torch.cat(stats)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * _like(grad_loss, gradient)).to(gradient.dtype), None, None, None, None


def _forward_backward(features, compare, x_hat, x, chunk):
    """Loss, stats and d loss / d x_hat of a few samples; the features' gradients are taken one layer at a time."""
    phis = list(features(x, chunk))  # gradients are off inside an autograd function's forward
    with torch.enable_grad():
        x_hat = x_hat.detach().requires_grad_()
        phi_hats = features(x_hat, chunk)
        half = phi_hats[0].dtype == torch.float16
        losses, stats, gradients = [], [], []
        for l, phi_hat in enumerate(phi_hats):
            leaf = (_float(phi_hat) if half else phi_hat).detach().requires_grad_()
            loss, stat = compare(l, leaf, phis[l], phi_hats[0])
            gradients += torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
            stats.append(stat)
            phis[l] = None
        scale = 1
        if half:  # these gradients, about 1 / (channels * positions), vanish: scale each sample by a power of two
            largest = torch.stack([g.abs().flatten(1).amax(1) for g in gradients]).amax(0)  # [b]
            powers = torch.exp2(-torch.where(largest > 0, largest, 1).log2().floor())
            gradients = [(g * _like(powers, g)).half() for g in gradients]
            scale = _like(powers, x_hat)
        (gradient,) = torch.autograd.grad(phi_hats, x_hat, gradients)
    return sum(losses), torch.stack(stats, dim=1), gradient / scale


def _like(per_sample, x):
    """`[b]` -> `[b, 1, ...]`, to be multiplied with `x`."""
    return per_sample.view(-1, *[1] * (x.ndim - 1))


# Sums over positions, in at least float32

SLICE = 2**24  # elements of a feature map that are held in float32 at a time


def _float(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_channels(function, *maps):
    """`function` of maps `[B, C, ...]`, called for a few channels at a time: its float32 copies stay small."""
    channels = maps[0].shape[1]
    step = max(1, SLICE * channels // maps[0].numel())
    if step >= channels:
        return function(*maps)
    whole = None
    for part in (slice(i, i + step) for i in range(0, channels, step)):
        result = function(*(m if m is None else m[:, part] for m in maps))
        if whole is None and result.shape[2:] == maps[0].shape[2:]:
            whole = torch.empty_like(maps[0], dtype=result.dtype)  # in its memory format
        elif whole is None:
            whole = result.new_empty(len(result), channels, *result.shape[2:])
        whole[:, part] = result
    return whole


def _spatial_mean(x, valid, count):
    """Mean over the valid positions: `[B, C, h, w]` -> `[B, C]`; 0 where there are none."""
    sums = _by_channels(lambda x, valid: (x if valid is None else torch.where(valid, x, 0)).sum((-2, -1)), x, valid)
    return sums / (count if valid is None else count.clamp(min=1))


class _Moments(torch.autograd.Function):
    """Over the valid positions of x and y `[B, C, h, w]`: mean and variance of x, of y, and the mean of (x - y)^2.

    Variances are biased; all are `[B, C]`. Differentiable in x. Nothing is kept for the backward pass but x and y.
    """

    @staticmethod
    def forward(ctx, x, y, valid, count):
        positions = x.shape[-2] * x.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Without a mask a number, which a copy to the device would wait for
        count = x.new_full(x.shape[:2], count, dtype=dtype) if valid is None else count.to(dtype).clamp(min=1)

        def moments(x, y, valid, count):
            outside = None if valid is None else ~valid
            x, y, more = _float(x), _float(y), positions / count

            def zeroed(values):
                return values if valid is None else values.masked_fill_(outside, 0)

            found = []
            for part in (x, y):
                # From near the mean, so that the zeros of the masked positions do not stand out.
                centre = part.mean((-2, -1), keepdim=True)
                var, mean = torch.var_mean(zeroed(part - centre), (-2, -1), correction=0)
                found += [centre[..., 0, 0] + more * mean, more * (var - (more - 1) * mean.square())]
            squares = torch.linalg.vector_norm(zeroed(x - y), dim=(-2, -1)).square() / count
            return torch.stack([*found, squares], dim=-1)

        found = _by_channels(moments, x, y, valid, count).unbind(-1)
        ctx.save_for_backward(x, y, valid, count, found[0])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[2:4])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean, grad_var, _, __, grad_square):
        x, y, valid, count, mean = ctx.saved_tensors
        factors = [grad if grad is None else grad / count for grad in (grad_mean, grad_var, grad_square)]

        def slope(x, y, valid, mean, of_mean, of_var, of_square):
            x, total = _float(x), 0
            if of_square is not None:
                total = (x - y).mul_(2 * of_square[..., None, None])
            if of_var is not None:
                total = total + (x - mean[..., None, None]).mul_(2 * of_var[..., None, None])
            if of_mean is not None:
                total = total + of_mean[..., None, None].expand_as(x)
            return (total if valid is None else total.masked_fill(~valid, 0)).to(dtype)

        dtype = x.dtype
        return _by_channels(slope, x, y, valid, mean, *factors), None, None, None


def _above_zero(var, alive):
    """Variances `[B, C]` with the epsilon of their later root inside: 1e-4 of the layer's median.

    Of the channels that are alive (have enough valid positions); the others get 1: they contribute nothing, but must
    not divide by zero.
    """
    median = torch.where(alive, var.detach(), math.nan).nanmedian(1, keepdim=True).values.nan_to_num(0)
    return torch.where(alive, var + 1e-4 * median, 1).clamp(min=FLOOR)


def lpl_term(lpl, model_pred, z_t, z0, alpha, sigma, prediction_type, tau, max_samples=None, generator=None):
    """The LPL term of one training step: Eq. 3 with its gate, and a bound on its cost.

    Args:
        lpl: a `LatentPerceptualLoss`.
        model_pred, z_t, z0: `[B, C, h, w]` scaled latents; alpha, sigma: `[B]` **on the CPU**, so that choosing the
            samples needs no synchronisation with the device.
        prediction_type: see `predict_z0`.
        tau: threshold on sigma / alpha at this resolution.
        max_samples: decode all samples that pass (None), K of them chosen uniformly (K >= 1), or each with
            probability K (0 < K < 1). The sum is rescaled, so that its expectation stays the same.
        generator: CPU generator of that choice.

    Returns:
        loss: scalar, sum over the passing samples divided by the **whole** batch: a gated-out sample counts as zero.
        stats: those of the loss, `[k, L]` for the k samples decoded; `gated_share`, the share of the batch that
            passed; `sample_weight`, what each decoded sample's loss was multiplied by, 1 / B included; `chosen` `[k]`,
        their indices in the batch (CPU), and `sample_loss` `[k]`.
    """
    if max_samples is not None and (max_samples <= 0 or max_samples > 1 and max_samples % 1):
        raise ValueError(f"max_samples {max_samples} must be a probability or a whole number of samples.")
    passing = sigma_gate(alpha, sigma, tau).nonzero().flatten()
    chosen, weight = passing, 1.0
    if max_samples is not None and max_samples < 1:
        chosen = passing[torch.rand(len(passing), generator=generator) < max_samples]
        weight = 1 / max_samples
    elif max_samples is not None and len(passing) > max_samples:
        chosen = passing[torch.randperm(len(passing), generator=generator)[: int(max_samples)]]
        weight = len(passing) / len(chosen)

    # Select first, divide after: no inf or NaN of a sample outside the gate can leak through a mask.
    index = chosen.to(z0.device, non_blocking=True)
    z0_hat = predict_z0(model_pred[index], z_t[index], alpha[chosen], sigma[chosen], prediction_type)
    loss, stats = lpl(z0_hat, z0[index])
    sample_weight = weight / len(z0)
    stats |= {"gated_share": len(passing) / len(z0), "sample_weight": sample_weight}
    stats |= {"chosen": chosen, "sample_loss": loss.detach()}
    return sample_weight * loss.sum(), stats


@torch.no_grad()
def calibrate(lpl, measurements, target_share=None, reduce=lambda sums: sums):
    """Freeze what has to be measured: omega if the weighting is `balanced`, and w if a share is asked for.

    The weight is the w for which w * LPL is `target_share` of diffusion loss + w * LPL (the paper's w = 3 is "about a
    fifth of the total", Fig. 9), from sums over batches of both terms as they are added, zeros included.

    Args:
        lpl: a `LatentPerceptualLoss`; its `omega` and `weight` are set.
        measurements: pairs (diffusion loss, stats of `lpl_term`), one per batch.
        target_share: s in (0, 1), or None if the weight is given.
        reduce: sums a tensor over all processes.

    Raises:
        ValueError: no sample passed the gate, or LPL or the diffusion loss is not finite.
    """
    # [1 + L]: the diffusion loss and each layer's term before omega
    sums = sum(
        torch.cat([loss.reshape(1).double(), stats["sample_weight"] * stats["block_loss"].sum(0).double()])
        for loss, stats in measurements
    )
    diffusion_loss, block_losses = (part.cpu() for part in reduce(sums).split([1, len(lpl.blocks)]))
    if not (block_losses > 0).all() or not sums.isfinite().all():
        reason = "no sample passed the gate" if sums.isfinite().all() else "a loss was not finite"
        raise ValueError(f"LPL's weight can't be measured: {reason}")
    if lpl.weighting == "balanced":
        lpl.balance(block_losses)
    if target_share is not None:
        ratio = diffusion_loss / (lpl.omega * block_losses).sum()
        lpl.weight = (target_share / (1 - target_share) * ratio).item()


def compare_gradients(model_pred, diffusion_loss, lpl_loss):
    """Norms of both terms' gradients with respect to the prediction, and their cosine; keeps the graph."""
    gradients = [torch.autograd.grad(loss, model_pred, retain_graph=True)[0] for loss in (diffusion_loss, lpl_loss)]
    first, second = (g.detach().float().flatten() for g in gradients)
    return {
        "grad_norm_diffusion": first.norm(),
        "grad_norm_lpl": second.norm(),
        "grad_cosine": F.cosine_similarity(first, second, dim=0),
    }


def summarize(stats):
    """The stats of `lpl_term` as numbers for a log: means over the decoded samples, one per block and kind."""
    summary = {"gated_share": stats["gated_share"]}
    if len(stats["chosen"]):
        for name in STATS:
            summary |= {f"{name}/{l}": value for l, value in enumerate(stats[name].mean(0).tolist())}
    return summary
