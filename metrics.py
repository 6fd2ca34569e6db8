"""Measures of sets of images, as pure functions of tensors, and how sure a difference of two of them is.

radial_power, spectrum_errors               power spectra (Berrada et al. 2024, Figs. 4 and 5)
sharpness                                   variance of the Laplacian
frechet_distances, kernel_distances,        distances of two sets of features
precision_recall_density_coverage
inception_scores, mean_values               of class probabilities, and of one value per sample
half_samples, interval, difference          how sure

A metric is computed for the full set of samples and for random halves of it, in one pass. A bool tensor `subsets`
[S, N] says which samples are in each; row 0, all True, is the full set. Results are float64, [S]: element 0 is the
metric, the spread of the others tells its standard error. Halves drawn without replacement (Politis & Romano 1994,
subsampling), and not the bootstrap, whose duplicates distort neighbours and covariances: for a mean, their variance
S^2 / m (1 - m / N) at m = N / 2 is S^2 / N, that of the full sample's mean.

Shapes: B images, 3 (RGB) or 1 (grey) channels, H x W pixels, R rings of frequency; N samples, M reference samples,
D features, S subsets. Features lie on the CPU; what is computed from them, on `device`, in float64 throughout.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

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


def radial_power(images: torch.Tensor) -> torch.Tensor:
    """Radially averaged power spectrum of each image.

    The mean of every image is removed and a Hann window applied, so that neither brightness nor the borders leak into
    the spectrum. Power is averaged over the frequencies of a ring. It is normalised such that white noise of variance
    v has power v at every frequency.

    Args:
        images: [B, 3 or 1, H, W], in any range; the values are used as they are.

    Returns:
        [B, R] float64, in squares of the images' unit, with R = min(H, W) // 2. Element r - 1 holds the ring of r
        cycles per min(H, W) pixels (from r - 1/2 to r + 1/2), so the last one is the Nyquist frequency. Frequency 0
        and the corners beyond Nyquist are left out.
    """
    luma = luminance(images.double())
    height, width = luma.shape[-2:]
    rings = min(height, width) // 2

    # Periodic Hann windows: a sinusoid with whole cycles leaks into its direct neighbours only.
    window = torch.outer(*(torch.hann_window(size, dtype=luma.dtype, device=luma.device) for size in (height, width)))
    windowed = (luma - luma.mean(dim=(-2, -1), keepdim=True)) * window
    power = torch.fft.fft2(windowed).abs().square() / window.square().sum()

    frequencies = [torch.fft.fftfreq(size, dtype=luma.dtype, device=luma.device) for size in (height, width)]
    radius = torch.hypot(frequencies[0][:, None], frequencies[1][None, :]) * min(height, width)
    ring = radius.round().long().clamp(max=rings + 1).flatten()
    total = power.new_zeros(len(power), rings + 2).index_add_(1, ring, power.flatten(1))
    return (total / torch.bincount(ring, minlength=rings + 2))[:, 1 : rings + 1]


def radial_log_power(images: torch.Tensor) -> torch.Tensor:
    """Log of the radially averaged power spectrum of a set of images (Figs. 4 and 5 of Berrada et al.).

    Args:
        images: [B, 3 or 1, H, W], in [-1, 1] or [0, 1]. The values are used as they are: the same images in [-1, 1]
            have 2 ln 2 more than in [0, 1].

    Returns:
        [R] in nats, the rings of `radial_power`, averaged over the images before the logarithm.
    """
    return log_of_power(radial_power(images).mean(dim=0))


def log_of_power(power):
    # A floor far below the rounding error of an 8-bit image keeps constant images finite.
    return power.clamp(min=1e-20).log()


def ring_frequencies(rings: int) -> torch.Tensor:
    """The frequencies of R rings as fractions of the Nyquist frequency, [R] float64."""
    return torch.arange(1, rings + 1, dtype=torch.float64) / rings


def _in_band(rings, band):
    """Which of the rings lie in a band (from exclusive, to inclusive), [R] bool."""
    frequency, (low, high) = ring_frequencies(rings), band
    return (frequency > low) & (frequency <= high)


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
    difference = (radial_log_power(images) - radial_log_power(reference).to(images.device)).cpu()
    errors = {}
    for name, (low, high) in bands.items():
        inside = _in_band(len(difference), (low, high))
        if not inside.any():
            raise ValueError(f"The band {name} from {low} to {high} holds no ring of {len(difference)}.")
        errors[name] = difference[inside].mean().item()
    return errors


def spectrum_differences(
    power: torch.Tensor, reference_log_power: torch.Tensor, subsets: torch.Tensor
) -> torch.Tensor:
    """Log power of each subset less the reference's, [S, R] in nats, from `radial_power` [N, R] of the samples."""
    return log_of_power(mean_values(power, subsets)) - reference_log_power


def spectrum_errors(
    power: torch.Tensor,
    reference_log_power: torch.Tensor,
    subsets: torch.Tensor,
    bands: dict[str, tuple[float, float]] = BANDS,
) -> dict[str, torch.Tensor]:
    """How far the power spectra of sets of images are from a reference's (Fig. 5 of Berrada et al.).

    Args:
        power: [N, R], `radial_power` of the samples.
        reference_log_power: [R], `radial_log_power` of reference images in the same range and of the same size.
        bands: name -> (from, to) as fractions of the Nyquist frequency, from exclusive, to inclusive.

    Returns:
        spectrum_error: [S], mean absolute difference over the rings, in nats.
        spectrum_error_<band>: [S], mean difference over the band's rings, in nats, negative where the samples lack
        detail. A band that holds no ring, as in tiny images, is left out.
    """
    differences = spectrum_differences(power, reference_log_power, subsets)
    errors = {"spectrum_error": differences.abs().mean(dim=1)}
    for name, band in bands.items():
        inside = _in_band(differences.shape[1], band)
        if inside.any():
            errors[f"spectrum_error_{name}"] = differences[:, inside].mean(dim=1)
    return errors


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of each image's luma: [B, 3 or 1, H, W] -> [B] float64.

    As OpenCV's `Laplacian(luma, CV_64F).var()`: 4 neighbours, borders mirrored about the outermost pixel. It grows
    with the square of the images' unit; published values are of images in 0..255.
    """
    luma = luminance(images.double())
    padded = torch.nn.functional.pad(luma[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return (neighbours - 4 * luma).var(dim=(-2, -1), correction=0)


# Sets of features


def _check_features(metric, needed, features, subsets=None):
    """ValueError if a feature is not finite, or a subset (None: the reference set) has too few samples."""
    if not features.isfinite().all():
        raise ValueError(f"{metric} needs finite values; some are NaN or infinite.")
    if subsets is None and len(features) < needed:
        raise ValueError(f"{metric} needs at least {needed} reference samples; there are {len(features)}.")
    if subsets is not None and subsets.sum(dim=1).min() < needed:
        least = f"{needed} samples" if len(subsets) == 1 else f"{2 * needed} samples, {needed} in each half"
        raise ValueError(f"{metric} needs at least {least}; there are {len(features)}.")


class Moments(NamedTuple):
    """mean [D] and unbiased covariance [D, D] of `count` samples' features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int


def moments(features: torch.Tensor) -> Moments:
    """The moments of features [N, D]. ValueError for fewer than 2 samples or features that are not finite."""
    _check_features("frechet_distance", 2, features)
    mean = features.mean(dim=0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for chunk in features.split(4096):
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred)
    return Moments(mean, covariance / (len(features) - 1), len(features))


def _root(covariance):
    """A factor L [D, rank] of a covariance L L^T, from its eigenvectors. Singular ones (N <= D) have fewer columns."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Wasserstein-2 distance of two Gaussians with these moments (Dowson & Landau 1982; Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2). With C = L L^T, the last trace is the sum of the
    singular values of L_a^T L_b, which needs no root of a product that is not symmetric.
    """
    product = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    shift = (a.mean - b.mean).square().sum()
    return (shift + a.covariance.trace() + b.covariance.trace() - 2 * product).clamp(min=0).item()


def frechet_distances(
    features: torch.Tensor, reference: Moments, subsets: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`frechet_distance` of each subset of features [N, D] to the reference: [S], lower is better.

    The singular values are the roots of the eigenvalues of the Gram matrix of the samples times L of the reference,
    of whichever order is less, samples or features. Holds two float64 copies of the features on `device`. ValueError
    for fewer than 2 samples in a subset or features that are not finite.
    """
    _check_features("frechet_distance", 2, features, subsets)
    mean, covariance, subsets = reference.mean.to(device), reference.covariance.to(device), subsets.to(device)
    centred = features.to(device).double() - mean
    projected = centred @ _root(covariance)
    shifts = mean_values(centred, subsets).square().sum(dim=1)
    counts = subsets.sum(dim=1)
    traces = (mean_values(torch.einsum("nd,nd->n", centred, centred), subsets) - shifts) * counts / (counts - 1)
    products = torch.stack([_sum_of_singular_values(projected[subset]) for subset in subsets])
    return (shifts + traces + covariance.trace() - 2 * products).clamp(min=0).cpu()


def _sum_of_singular_values(x):
    """Of x [m, r] less its mean, over the root of m - 1."""
    x = x - x.mean(dim=0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram / (len(x) - 1)).clamp(min=0).sqrt().sum()


def kernel_distances(
    features: torch.Tensor,
    reference: torch.Tensor,
    subsets: torch.Tensor,
    device: torch.device | str = "cpu",
    chunk: int = 2**22,
) -> torch.Tensor:
    """Unbiased squared maximum mean discrepancy of each subset to the reference (KID, Binkowski et al. 2018).

    The kernel is theirs, (x.y / D + 1)^3. They average blocks of 1,000 samples; all samples at once have the same
    expectation and less variance. Unbiased, so that values for equal distributions lie around 0 on either side.

    Args:
        features, reference: [N, D], [M, D].
        chunk: how many pairs of samples are held at once.

    Returns:
        [S], lower is better. ValueError for fewer than 2 samples in a subset or features that are not finite.
    """
    _check_features("kernel_distance", 2, features, subsets)
    _check_features("kernel_distance", 2, reference)
    weights, everything = subsets.double(), torch.ones(1, len(reference), dtype=torch.float64)
    own = (_kernel_sums(features, features, weights, device, chunk, others_only=True) * weights.T).sum(dim=0)
    own_reference = _kernel_sums(reference, reference, everything, device, chunk, others_only=True).sum()
    cross = weights @ _kernel_sums(features, reference, everything, device, chunk)[:, 0]
    n, m = weights.sum(dim=1), len(reference)
    return own / (n * (n - 1)) + own_reference / (m * (m - 1)) - 2 * cross / (n * m)


def _kernel_sums(x, y, weights, device, chunk, others_only=False):
    """Sums over y [M, D] of weights [C, M] times the kernel, for each of x [N, D]: [N, C].

    others_only: x and y are the same set, and a sample's pair with itself counts 0.
    """
    y, weights = y.to(device).double(), weights.to(device)
    sums = torch.zeros(len(x), len(weights), dtype=torch.float64)
    for start in range(0, len(x), rows := max(1, chunk // len(y))):
        kernel = x[start : start + rows].to(device).double() @ y.T
        kernel.div_(y.shape[1]).add_(1).pow_(3)
        if others_only:
            kernel.diagonal(start).zero_()
        sums[start : start + len(kernel)] = kernel @ weights.T
    return sums


def precision_recall_density_coverage(
    features: torch.Tensor,
    reference: torch.Tensor,
    subsets: torch.Tensor,
    k: int = 5,
    device: torch.device | str = "cpu",
    chunk: int = 2**22,
) -> dict[str, torch.Tensor]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), of each subset.

    A sample's ball reaches to, and excludes (as in Naeem et al.'s code), its k-th nearest neighbour in its own set:
    of reference samples in the whole reference set, of others in the subset.
    precision   share of the samples that lie in the ball of a reference sample
    recall      share of the reference that lies in the ball of a sample
    density     mean number, over k, of reference samples' balls that a sample lies in: unlike the others, may exceed 1
    coverage    share of the reference whose ball holds a sample

    Args:
        features, reference: [N, D], [M, D].
        chunk: how many pairs of samples are held at once.

    Returns:
        name -> [S], higher is better. Results are exact. ValueError for k samples or fewer in a subset or in the
        reference, or features that are not finite.
    """
    name = f"precision, recall, density or coverage with {k} neighbours"
    _check_features(name, k + 1, features, subsets)
    _check_features(name, k + 1, reference)
    subsets, everything = subsets.to(device), torch.ones(1, len(reference), dtype=torch.bool, device=device)
    reference_radii = _radii(reference, everything, k, device, chunk)
    radii, members = _radii(features, subsets, k, device, chunk), subsets.T.float()
    bounds = torch.where(subsets.T, radii, math.inf).amin(dim=1), radii.amax(dim=1)
    balls = torch.zeros(len(features), dtype=torch.float64, device=device)
    recalled, covered = torch.zeros(2, len(subsets), dtype=torch.float64, device=device)
    for rows, distances in _squared_distances(reference, features, device, chunk):
        inside = distances < reference_radii[rows]
        balls += inside.sum(dim=0)
        covered += _any_member(inside, members).sum(dim=0)
        recalled += _in_a_ball(distances, radii, bounds, members, chunk).sum(dim=0)
    measures = {
        "precision": mean_values(balls > 0, subsets),
        "recall": recalled / len(reference),
        "density": mean_values(balls, subsets) / k,
        "coverage": covered / len(reference),
    }
    return {name: values.cpu() for name, values in measures.items()}


def _squared_distances(x, y, device, chunk):
    """Yields (slice of rows, their squared distances to y [M, D] as float32 [rows, M]) until all of x [N, D] are done.

    |x|^2 + |y|^2 - 2 x.y cancels for near neighbours, so it is taken in float64 (never TF32). Rounded to float32,
    equal distances become equal numbers, also in another chunk; identical samples are 0 apart.
    """
    y = y.to(device).double()
    y_norms = torch.einsum("nd,nd->n", y, y)
    for start in range(0, len(x), rows := max(1, chunk // len(y))):
        block = x[start : start + rows].to(device).double()
        norms = torch.einsum("nd,nd->n", block, block)[:, None] + y_norms
        squared = torch.addmm(norms, block, y.T, alpha=-2)
        squared.masked_fill_(squared < norms.mul_(1e-12), 0)
        yield slice(start, start + len(block)), squared.float()


def _radii(features, subsets, k, device, chunk):
    """Squared distance of each sample to its k-th nearest other one in each subset: [N, S], 0 if not in it itself."""
    # Made at once: small results kept between the large blocks would leave holes in the heap, of GiB in all.
    radii = torch.zeros(len(features), len(subsets), device=device)
    for rows, distances in _squared_distances(features, features, device, chunk):
        distances.diagonal(rows.start).fill_(math.inf)
        # At k = 5, all but one in 10^13 halves hold k of so many neighbours. Elsewhere more are looked at.
        width = min(8 * k + 24, len(features))
        radii[rows] = _kth_members(distances, subsets, subsets[:, rows], k, width)
    return torch.where(subsets.T, radii, 0)


def _kth_members(distances, subsets, wanted, k, width):
    """The k-th smallest of distances [rows, N] among each subset [S, N], found among the `width` smallest: [rows, S].

    Only those `wanted` [S, rows] have to be right.
    """
    nearest = distances.topk(width, largest=False)
    members = subsets[:, nearest.indices].cumsum(dim=-1, dtype=torch.int32)  # [S, rows, width]
    position = (members < k).sum(dim=-1)
    radii = nearest.values.gather(1, position.T.clamp(max=width - 1))
    beyond = ((position == width) & wanted).any(dim=0)
    if beyond.any():
        wider = min(4 * width, distances.shape[1])
        radii[beyond] = _kth_members(distances[beyond], subsets, wanted[:, beyond], k, wider)
    return radii


def _any_member(hits, members):
    """Whether any of hits [rows, N] is in each subset, members [N, S] float 0 or 1: [rows, S]."""
    return hits.float() @ members > 0


def _in_a_ball(distances, radii, bounds, members, chunk):
    """Whether any of distances [rows, N] is below the radius of its sample, radii [N, S], in each subset: [rows, S].

    What is below the smallest of a sample's radii, bounds[0] [N], is so in all of its subsets. Only what lies between
    that and the largest, bounds[1] [N], is compared with each, in rows that are not decided yet.
    """
    surely = distances < bounds[0]
    found = _any_member(surely, members)
    perhaps = (distances < bounds[1]) & ~surely & ~found.all(dim=1)[:, None]
    pairs, found = perhaps.nonzero(), found.int()
    for row, column in (part.unbind(dim=1) for part in pairs.split(max(1, chunk // radii.shape[1]))):
        found.index_add_(0, row, (distances[row, column, None] < radii[column]).int())
    return found > 0


# Means over samples


def mean_values(values: torch.Tensor, subsets: torch.Tensor) -> torch.Tensor:
    """Mean over each subset of a value per sample: [N] -> [S], or of several: [N, D] -> [S, D]; float64."""
    counts = subsets.sum(dim=1).view(-1, *[1] * (values.ndim - 1))
    return (subsets.double() @ values.double()) / counts


def inception_scores(logits: torch.Tensor, subsets: torch.Tensor) -> torch.Tensor:
    """exp of the mean divergence of p(class | image) from p(class) (Salimans et al. 2016) of each subset: [S].

    p(class) is the mean over the whole subset, so that order does not count. Published scores are mostly means over 10
    parts of the set, in order, and a little lower.

    Args:
        logits: [N, classes], before the softmax. ValueError if one is not finite.
    """
    _check_features("inception_score", 1, logits, subsets)
    log_probabilities = logits.double().log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    entropy = torch.special.entr(probabilities).sum(dim=1)
    marginal_entropy = torch.special.entr(mean_values(probabilities, subsets)).sum(dim=1)
    return (marginal_entropy - mean_values(entropy, subsets)).exp()


# How sure


def half_samples(num_samples: int, count: int, seed: int) -> torch.Tensor:
    """The full set and `count` random halves of N // 2 of it: bool [1 + count, N], row 0 all True.

    The same for the same arguments, so that models that are given the same noise are compared on the same halves.
    """
    if count and num_samples < 2:
        raise ValueError(f"A half-sample needs at least 2 samples; there are {num_samples}.")
    generator = torch.Generator().manual_seed(seed)
    subsets = torch.zeros(1 + count, num_samples, dtype=torch.bool)
    subsets[0] = True
    for subset in subsets[1:]:
        subset[torch.randperm(num_samples, generator=generator)[: num_samples // 2]] = True
    return subsets


def _standard_error(values, count):
    """From a metric's values [S] for the full set of `count` samples and for its halves."""
    if len(values) < 3:
        raise ValueError(f"An interval needs at least 2 half-samples; there are {len(values) - 1}.")
    half = count // 2
    # For a mean, the variance over subsets of m of N is S^2 (N - m) / (m N); that of the mean of all is S^2 / N.
    return values[1:].std().item() * math.sqrt(half / (count - half))


def interval(values: torch.Tensor, count: int, level: float = 0.95) -> list[float]:
    """Confidence interval [low, high] of a metric from its values [S] for N = `count` samples and their halves.

    Centred at the full set's value; the halves tell its standard error, for the normal distribution. It says how the
    metric of N samples, with the bias that it has at N, varies with the samples; the reference stays as it is. Near
    its limit of 1, coverage varies more in a half than its size explains: the interval is up to twice too wide.
    """
    reach = NormalDist().inv_cdf((1 + level) / 2) * _standard_error(values, count)
    return [values[0].item() - reach, values[0].item() + reach]


def difference(a: torch.Tensor, b: torch.Tensor, count: int, level: float = 0.95) -> dict:
    """How much b's metric exceeds a's, from the values [S] of two models for the same noise and subsets.

    Returns:
        difference: of the full sets, b - a.
        interval: [low, high], see `interval`. Paired, so that what both models share cancels.
        samples_needed: how many samples it would take for an interval at this level to exclude 0 with 80 % power, were
            this the true difference: N ((z_{(1 + level) / 2} + z_0.8) s / d)^2 for d with standard error s at N.
            None if d is 0 or no half-sample tells anything about s.
    """
    differences = b - a
    found, error = differences[0].item(), _standard_error(differences, count)
    needed = None
    if found and error:
        z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(0.8)
        needed = math.ceil(count * (z * error / found) ** 2)
    return {"difference": found, "interval": interval(differences, count, level), "samples_needed": needed}
