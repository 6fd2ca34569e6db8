"""Measures of sets of images, as pure functions of tensors. So far: power spectra (Berrada et al., Figs. 4 and 5).

Shapes: B images, 3 (RGB) or 1 (grey) channels, H x W pixels, R rings of frequency.
"""

import torch


# The paper's images have 512 pixels, so a Nyquist frequency of 256 cycles; Sec. 4.2 divides at f = 75 and 150.
BANDS = {"low": (0.0, 75 / 256), "mid": (75 / 256, 150 / 256), "high": (150 / 256, 1.0)}


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Rec. 601 luma of RGB images: [B, 3 or 1, H, W] -> [B, H, W], in the units of the input."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"Expected images of shape [B, 3 or 1, H, W], got {list(images.shape)}.")
    if images.shape[1] == 1:
        return images[:, 0]
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def radial_log_power(images: torch.Tensor) -> torch.Tensor:
    """Log of the radially averaged power spectrum of a set of images (Figs. 4 and 5 of Berrada et al.).

    The mean of every image is removed and a Hann window applied, so that neither brightness nor the borders leak into
    the spectrum. Power is averaged over the images and over the frequencies of a ring before the logarithm. It is
    normalised such that white noise of variance v has power v at every frequency.

    Args:
        images: [B, 3 or 1, H, W], in [-1, 1] or [0, 1]. The values are used as they are: the same images in [-1, 1]
            have 2 ln 2 more than in [0, 1].

    Returns:
        [R] in nats, with R = min(H, W) // 2. Element r - 1 holds the ring of r cycles per min(H, W) pixels (from
        r - 1/2 to r + 1/2), so the last one is the Nyquist frequency. Frequency 0 and the corners beyond Nyquist are
        left out.
    """
    luma = luminance(images.double())
    height, width = luma.shape[-2:]
    rings = min(height, width) // 2

    # Periodic Hann windows: a sinusoid with whole cycles leaks into its direct neighbours only.
    window = torch.outer(*(torch.hann_window(size, dtype=luma.dtype, device=luma.device) for size in (height, width)))
    windowed = (luma - luma.mean(dim=(-2, -1), keepdim=True)) * window
    power = torch.fft.fft2(windowed).abs().square().mean(dim=0) / window.square().sum()

    frequencies = [torch.fft.fftfreq(size, dtype=luma.dtype, device=luma.device) for size in (height, width)]
    radius = torch.hypot(frequencies[0][:, None], frequencies[1][None, :]) * min(height, width)
    ring = radius.round().long().clamp(max=rings + 1).flatten()
    total = torch.bincount(ring, weights=power.flatten(), minlength=rings + 2)
    mean = total / torch.bincount(ring, minlength=rings + 2)
    # A floor far below the rounding error of an 8-bit image keeps constant images finite.
    return mean[1 : rings + 1].clamp(min=1e-20).log()


def power_spectrum_error(
    images: torch.Tensor, reference: torch.Tensor, bands: dict[str, tuple[float, float]] = BANDS
) -> dict[str, float]:
    """Mean difference of the radial log power of two sets of images, by band of frequency (Fig. 5 of Berrada et al.).

    Args:
        images, reference: [B, 3 or 1, H, W], in the same range and of the same size; the number of images may differ.
        bands: name -> (from, to) as fractions of the Nyquist frequency, from exclusive, to inclusive. The default
            divides where the paper does.

    Returns:
        name -> mean over the band of log power(images) - log power(reference), in nats. Negative where `images` lack
        detail.
    """
    if images.shape[-2:] != reference.shape[-2:]:
        raise ValueError(f"Sizes differ: {list(images.shape[-2:])} and {list(reference.shape[-2:])}.")
    difference = radial_log_power(images) - radial_log_power(reference).to(images.device)
    frequency = torch.arange(1, len(difference) + 1, device=difference.device) / len(difference)
    errors = {}
    for name, (low, high) in bands.items():
        inside = (frequency > low) & (frequency <= high)
        if not inside.any():
            raise ValueError(f"The band {name} from {low} to {high} holds no ring of {len(difference)}.")
        errors[name] = difference[inside].mean().item()
    return errors
