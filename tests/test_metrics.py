"""Spectra of signals known on paper, distances of features by other means, intervals that hold what they say."""

import itertools
import math

import numpy as np
import pytest
import scipy
import torch
from sklearn.neighbors import NearestNeighbors

from counters import LiveBytes
from metrics import (
    Moments,
    difference,
    frechet_distance,
    frechet_distances,
    half_samples,
    inception_scores,
    interval,
    kernel_distances,
    luminance,
    mean_values,
    moments,
    power_spectrum_error,
    precision_recall_density_coverage,
    radial_log_power,
    radial_power,
    sharpness,
    spectrum_errors,
)


SIZE = 64


def sinusoid(cycles_x: int, cycles_y: int = 0, amplitude=0.5, height=SIZE, width=SIZE) -> torch.Tensor:
    """A grey picture with so many cycles over its width and its height."""
    y = torch.arange(height, dtype=torch.float64)[:, None] / height
    x = torch.arange(width, dtype=torch.float64)[None, :] / width
    return (amplitude * torch.sin(2 * math.pi * (cycles_x * x + cycles_y * y)))[None, None]


def noise(batch: int, seed: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def periodic_box(images: torch.Tensor) -> torch.Tensor:
    """Average of 3 pixels in x and y with wrap-around: transfer function (1 + 2 cos w_x) / 3 * (1 + 2 cos w_y) / 3."""
    for dim in (-2, -1):
        images = (images.roll(1, dim) + images + images.roll(-1, dim)) / 3
    return images


@pytest.mark.parametrize("cycles", [(5, 0), (0, 12), (3, 4), (31, 0)])
def test_sinusoid_lands_in_the_ring_of_its_frequency(cycles):
    assert radial_log_power(sinusoid(*cycles)).argmax().item() + 1 == math.hypot(*cycles)


def test_rings_count_cycles_per_shorter_side():
    # 16 cycles over 128 pixels are 8 cycles per 64 pixels, whichever side is the longer one.
    assert radial_log_power(sinusoid(16, height=64, width=128)).argmax().item() + 1 == 8
    assert radial_log_power(sinusoid(0, 16, height=128, width=64)).argmax().item() + 1 == 8


def test_power_of_a_sinusoid_is_that_computed_by_hand():
    # The 1-D Hann window's spectrum is N (-1/4, 1/2, -1/4), so a/2 exp(...) spreads as (1/16, 1/4, 1/16) a^2/4 N^2 in
    # power along x, the same along y, and the window's energy is (3/8 N)^2. The ring of 8 cycles (7.5 to 8.5) holds,
    # for each sign of the frequency, (8, 0) and (8, +-1), as hypot(8, 1) = 8.06, so 3/8 of the 1/4 along x:
    # 1/4 (1/4 + 2/16) a^2/4 N^4 / (9/64 N^2).
    amplitude = 0.7
    power = 2 * (1 / 4) * (1 / 4 + 2 / 16) * amplitude**2 / 4 * SIZE**2 / (9 / 64)
    radius = torch.tensor([math.hypot(x, y) for x in range(-32, 32) for y in range(-32, 32)])
    members = ((radius > 7.5) & (radius < 8.5)).sum().item()
    measured = radial_log_power(sinusoid(8, amplitude=amplitude))[7].item()
    assert measured == pytest.approx(math.log(power / members), abs=1e-9)


def test_scaling_shifts_log_power_by_twice_the_log():
    images = noise(4, seed=0)
    shift = radial_log_power(0.3 * images + 0.5) - radial_log_power(images)
    torch.testing.assert_close(shift, torch.full_like(shift, 2 * math.log(0.3)))


def test_white_noise_is_flat_at_its_variance():
    log_power = radial_log_power(0.2 * noise(400, seed=1))
    # Ring 1 has 8 members of 400 images each, correlated by the window: 3 % standard error there, less elsewhere.
    torch.testing.assert_close(log_power, torch.full_like(log_power, 2 * math.log(0.2)), atol=0.12, rtol=0)
    assert abs(log_power.mean().item() - 2 * math.log(0.2)) < 0.01


def test_brightness_does_not_leak():
    images = 0.01 * noise(2, seed=2)
    torch.testing.assert_close(radial_log_power(images + 100), radial_log_power(images), atol=1e-6, rtol=0)


def test_luminance_weighs_the_channels():
    grey = noise(2, seed=3)
    torch.testing.assert_close(radial_log_power(grey.expand(-1, 3, -1, -1)), radial_log_power(grey))
    green = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)
    green[:, 1] = grey[:, 0]
    torch.testing.assert_close(luminance(green), 0.587 * grey[:, 0])


@pytest.mark.parametrize("cycles", [3, 10, 20, 30])
def test_blurred_sinusoid_loses_what_the_filter_takes(cycles):
    image = sinusoid(cycles)
    lost = radial_log_power(periodic_box(image)) - radial_log_power(image)
    transfer = (1 + 2 * math.cos(2 * math.pi * cycles / SIZE)) / 3
    assert lost[cycles - 1].item() == pytest.approx(2 * math.log(abs(transfer)), abs=1e-9)


def test_band_errors_of_blurred_noise_follow_the_transfer_function():
    # Transfer function of a periodic Gaussian blur, applied in Fourier space: exp(-s^2 w^2 / 2), so 2 ln H = -s^2 w^2.
    s, images = 0.8, noise(200, seed=4)
    w = 2 * math.pi * torch.fft.fftfreq(SIZE, dtype=torch.float64)
    w2 = w[:, None] ** 2 + w[None, :] ** 2
    blurred = torch.fft.ifft2(torch.fft.fft2(images) * torch.exp(-(s**2) * w2 / 2)).real
    errors = power_spectrum_error(blurred, images)
    rings = torch.arange(1, 33)
    # 32 rings: the bands end at 75/256 * 32 = 9.4 and 150/256 * 32 = 18.75.
    for name, (low, high) in {"low": (1, 9), "mid": (10, 18), "high": (19, 32)}.items():
        inside = rings[low - 1 : high].double()
        expected = -(s**2) * (2 * math.pi * inside / SIZE).square().mean().item()
        assert errors[name] == pytest.approx(expected, abs=0.015), name
    assert errors["high"] < errors["mid"] < errors["low"] < 0


def test_error_is_zero_for_itself_and_changes_sign_when_swapped():
    a, b = noise(3, seed=5), periodic_box(noise(5, seed=6))
    assert power_spectrum_error(a, a) == {"low": 0.0, "mid": 0.0, "high": 0.0}
    forth, back = power_spectrum_error(a, b), power_spectrum_error(b, a)
    assert all(forth[name] == pytest.approx(-back[name]) for name in forth)


def test_own_bands():
    a, b = sinusoid(16), sinusoid(16, amplitude=1.0)
    assert power_spectrum_error(b, a, bands={"half": (15 / 32, 16 / 32)}) == {"half": pytest.approx(2 * math.log(2))}
    with pytest.raises(ValueError, match="holds no ring"):
        power_spectrum_error(a, b, bands={"none": (0.5, 0.501)})


def test_constant_images_stay_finite():
    assert radial_log_power(torch.full((1, 3, 16, 16), 0.25)).isfinite().all()


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="got"):
        radial_log_power(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="Sizes differ"):
        power_spectrum_error(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 32, 32))


# Sharpness


def test_sharpness_is_the_variance_of_the_laplacian():
    images = torch.randint(0, 256, (2, 1, 9, 7), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    expected = [scipy.ndimage.laplace(image.double().numpy(), mode="mirror").var() for image in images[:, 0]]
    assert sharpness(images).tolist() == pytest.approx(expected, rel=1e-12)
    # A grey image's luma is itself, but for the weights' rounding
    assert sharpness(images.expand(-1, 3, -1, -1)).tolist() == pytest.approx(expected, rel=1e-6)


def test_blurring_takes_sharpness_and_high_frequencies():
    images = noise(4, seed=8)
    blurred = periodic_box(images)
    assert (sharpness(blurred) < 0.2 * sharpness(images)).all()
    high = radial_power(blurred)[:, 19:] / radial_power(images)[:, 19:]
    assert (high < 0.25).all()


# Spectra of subsets


def test_power_of_each_image():
    images = noise(3, seed=9)
    power = radial_power(images)
    assert power.shape == (3, 32) and power.dtype == torch.float64
    for image, own in zip(images, power):
        torch.testing.assert_close(own.log(), radial_log_power(image[None]))
    pixels = (images * 50 + 128).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(radial_power(pixels), radial_power(pixels.float()))


def test_spectrum_errors_of_subsets_are_those_of_their_images():
    images, reference, subsets = noise(6, seed=10), periodic_box(noise(5, seed=11)), half_samples(6, 3, seed=0)
    log_power = radial_log_power(reference)
    errors = spectrum_errors(radial_power(images), log_power, subsets)
    assert set(errors) == {"spectrum_error"} | {f"spectrum_error_{band}" for band in ("low", "mid", "high")}
    for i, subset in enumerate(subsets):
        for band, expected in power_spectrum_error(images[subset], reference).items():
            assert errors[f"spectrum_error_{band}"][i].item() == pytest.approx(expected)
        expected = (radial_log_power(images[subset]) - log_power).abs().mean().item()
        assert errors["spectrum_error"][i].item() == pytest.approx(expected)


def test_absolute_errors_do_not_cancel():
    # Two rings off by +1 and -1 nat: the band's mean is 0, the mean absolute error is not.
    power = torch.tensor([[1.0, -1.0]]).exp()
    errors = spectrum_errors(power, torch.zeros(2), torch.ones(1, 1, dtype=torch.bool), bands={"all": (0, 1)})
    assert errors["spectrum_error"].item() == pytest.approx(1)
    assert errors["spectrum_error_all"].item() == pytest.approx(0, abs=1e-7)


def test_bands_without_rings_are_left_out():
    # 4 pixels have rings at 1/2 and 1 of the Nyquist frequency: none in the low band, which ends at 0.29.
    power = radial_power(noise(2, seed=12)[..., :4, :4])
    errors = spectrum_errors(power, power.mean(dim=0).log(), torch.ones(1, 2, dtype=torch.bool))
    assert set(errors) == {"spectrum_error", "spectrum_error_mid", "spectrum_error_high"}


# Distances of features


def features(count, dim, seed, scale=1.0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def frechet_with_sqrtm(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)


def test_frechet_distance_of_diagonal_gaussians_in_closed_form():
    # Per dimension (mean_a - mean_b)^2 + (s_a - s_b)^2 with standard deviations s: 1 + 1, 0 + 9, 4 + 0.
    a = Moments(torch.tensor([0.0, 1, 2]).double(), torch.diag(torch.tensor([1.0, 4, 9])).double(), 1000)
    b = Moments(torch.tensor([1.0, 1, 0]).double(), torch.diag(torch.tensor([4.0, 25, 9])).double(), 1000)
    assert frechet_distance(a, b) == pytest.approx(15)
    assert frechet_distance(b, a) == pytest.approx(15)


def test_moments_are_numpys():
    x = features(30, 5, seed=0, scale=0.1, shift=100.0)
    mean, covariance, count = moments(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False))
    assert count == 30


@pytest.mark.parametrize("count, reference_count, dim", [(60, 50, 6), (20, 50, 30), (50, 20, 30), (16, 14, 30)])
def test_frechet_distances_match_scipys_square_root(count, reference_count, dim):
    x, y, subsets = features(count, dim, 0, 1.3, 0.2), features(reference_count, dim, 1), half_samples(count, 3, 0)
    distances = frechet_distances(x, moments(y), subsets)
    # The square root of a singular product is where scipy loses digits.
    expected = [frechet_with_sqrtm(x[subset], y) for subset in subsets]
    assert distances.tolist() == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(distances[0].item(), rel=1e-9)


@pytest.mark.parametrize("count, dim", [(50, 6), (20, 60)])
def test_frechet_distance_to_itself_is_0(count, dim):
    x = features(count, dim, seed=2, shift=3.0)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distances(x, moments(x), half_samples(count, 0, 0)).item() == pytest.approx(0, abs=1e-9)


def test_kernel_distances_match_the_definition():
    x, y, subsets = features(9, 4, 3, shift=0.5), features(7, 4, 4), half_samples(9, 3, seed=1)

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / 4 + 1) ** 3

    def mmd(x, y):
        own = [sum(kernel(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
        return sum(own) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))

    expected = [mmd(x[subset], y) for subset in subsets]
    assert kernel_distances(x, y, subsets).tolist() == pytest.approx(expected, rel=1e-9)
    # The same tensor twice is two sets whose samples happen to be the same: pairs across them count.
    assert kernel_distances(y, y, subsets[:1, :7]).item() == pytest.approx(mmd(y, y), rel=1e-9)


def test_kernel_distance_is_unbiased():
    full = half_samples(20, 0, seed=0)
    pairs = ((features(20, 3, 2 * i), features(20, 3, 2 * i + 1)) for i in range(200))
    values = torch.cat([kernel_distances(*pair, full) for pair in pairs])
    assert abs(values.mean().item()) < 4 * values.std().item() / math.sqrt(200)
    assert values.min() < 0 < values.max()


def naive_measures(samples, reference, k):
    """Precision, recall, density, coverage by their definitions."""
    samples, reference = samples.double().numpy(), reference.double().numpy()

    def radii(x):
        return NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x).kneighbors()[0][:, -1]

    distances = scipy.spatial.distance.cdist(reference, samples)
    inside = distances < radii(reference)[:, None]
    recalled = distances < radii(samples)
    return [inside.any(0).mean(), recalled.any(1).mean(), inside.sum(0).mean() / k, inside.any(1).mean()]


def assert_naive_measures(samples, reference, subsets, k, **options):
    measures = precision_recall_density_coverage(samples, reference, subsets, k, **options)
    assert list(measures) == ["precision", "recall", "density", "coverage"]
    measured = torch.stack(list(measures.values()), dim=1).tolist()
    assert measured == [naive_measures(samples[subset], reference, k) for subset in subsets]
    return measured[0]


@pytest.mark.parametrize(
    "count, reference_count, dim, k",
    [(60, 80, 8, 3), (80, 60, 2, 5), (120, 130, 64, 5), (12, 6, 3, 5), (40, 50, 4, 1)],
)
def test_precision_recall_density_coverage_match_their_definitions(count, reference_count, dim, k):
    samples, reference = features(count, dim, 5, 0.9, 0.3), features(reference_count, dim, 6)
    assert_naive_measures(samples, reference, half_samples(count, 4, seed=2), k)


@pytest.mark.parametrize("scale", [0.05, 20.0], ids=["narrow", "wide"])
def test_measures_of_samples_that_spread_otherwise(scale):
    # Wide ones have balls that hold the whole reference, narrow ones lie together in the balls of the reference.
    assert_naive_measures(features(60, 3, 7, scale), features(70, 3, 8), half_samples(60, 6, seed=3), k=5, chunk=200)


def test_ties_and_duplicates():
    # On a grid, distances are exact and many are equal: the neighbour that gives a ball its radius is not inside it.
    generator = torch.Generator().manual_seed(9)
    samples, reference = (torch.randint(0, 6, (60, 2), generator=generator).float() for _ in range(2))
    assert_naive_measures(samples, reference, half_samples(60, 4, seed=4), k=3)


def test_balls_of_samples_with_many_duplicates_are_empty():
    # 8 of each: the 5th neighbour is 0 away, and nothing is less than that. Rounding must not decide.
    x = features(33, 100, 31).repeat(8, 1)
    shuffled = x[torch.randperm(264, generator=torch.Generator().manual_seed(0))]
    values = assert_naive_measures(x, shuffled, half_samples(264, 0, seed=0), k=5, chunk=4001)
    assert values == [0, 0, 0, 0]


def test_subsets_whose_neighbours_are_far_down_the_list():
    # Of each sample's 64 nearest neighbours, which are looked at first, none is in the second subset.
    near, far = features(150, 2, 10, 0.1), features(10, 2, 11, 0.1, 5.0)
    samples = torch.cat([near, far, near[:1]])
    subsets = torch.ones(2, 161, dtype=torch.bool)
    subsets[1, :150] = False
    assert_naive_measures(samples, features(50, 2, 12, 3.0), subsets, k=5)


def test_small_distances_far_from_the_origin():
    # In float32, |x|^2 + |y|^2 - 2 x.y would keep no digit of distances of 0.1 between vectors of length 3,000.
    samples, reference = features(60, 8, 13, 0.05, 1000.0), features(60, 8, 14, 0.05, 1000.0)
    assert_naive_measures(samples, reference, half_samples(60, 2, seed=5), k=5)


@pytest.mark.parametrize("chunk", [2**22, 333, 4001])
def test_measures_of_identical_and_of_disjoint_sets(chunk):
    x = features(100, 16, 15)
    measures = precision_recall_density_coverage(x, x.clone(), half_samples(100, 0, 0), chunk=chunk)
    # Each ball holds its centre and 4 of the 5 nearest: 5 / k. The 5th is as far away as the radius says.
    assert {name: value.item() for name, value in measures.items()} == dict.fromkeys(measures, 1.0)
    measures = precision_recall_density_coverage(x, x + 100, half_samples(100, 0, 0))
    assert {name: value.item() for name, value in measures.items()} == dict.fromkeys(measures, 0.0)


def all_distances(x, y, subsets, **options):
    values = precision_recall_density_coverage(x, y, subsets, **options)
    return torch.stack([*values.values(), kernel_distances(x, y, subsets, **options)])


def test_neither_order_nor_chunks_count():
    x, y, subsets = features(70, 6, 16, shift=0.3), features(50, 6, 17), half_samples(70, 5, seed=6)
    distances, frechet = all_distances(x, y, subsets), frechet_distances(x, moments(y), subsets)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(18))
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(all_distances(x[order], y.flip(0), subsets[:, order]), distances, **close)
    torch.testing.assert_close(frechet_distances(x[order], moments(y), subsets[:, order]), frechet, **close)
    for chunk in (1, 333):
        torch.testing.assert_close(all_distances(x, y, subsets, chunk=chunk), distances, **close)


@pytest.mark.parametrize("metric", [precision_recall_density_coverage, kernel_distances])
def test_memory_grows_with_the_samples_and_not_with_their_pairs(metric):
    def peak(count):
        x, y, subsets = features(count, 16, 19), features(count, 16, 20), half_samples(count, 2, seed=7)
        with LiveBytes() as memory:
            metric(x, y, subsets, chunk=2**13)
        return memory.peak

    small, large = peak(400), peak(1200)
    assert large < 3.3 * small
    assert large < 1200 * 1200  # a byte for each pair


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same():
    x, y, subsets = features(700, 64, 21, shift=0.2), features(600, 64, 22), half_samples(700, 20, seed=8)
    torch.testing.assert_close(all_distances(x, y, subsets, device="cuda"), all_distances(x, y, subsets))
    frechet = [frechet_distances(x, moments(y), subsets, device) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*frechet)


# Classes


def test_inception_scores_of_known_probabilities():
    one_hot = torch.eye(4).repeat(3, 1)  # each of 4 classes 3 times, surely
    subsets = torch.ones(2, 12, dtype=torch.bool)
    subsets[1] = one_hot[:, :2].any(dim=1)  # two of the classes only
    assert inception_scores(1000 * one_hot, subsets).tolist() == pytest.approx([4, 2])
    assert inception_scores(torch.zeros(12, 4), subsets).tolist() == pytest.approx([1, 1])
    # Two images with p = (3/4, 1/4) and (1/4, 3/4): ln of the score is 3/4 ln 3/2 + 1/4 ln 1/2.
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert inception_scores(logits, subsets[:1, :2]).item() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # that it keeps all features, that one split has no spread
def test_torchmetrics_finds_the_same():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(torch.nn.Module):
        num_features = 8

        def forward(self, images):
            return images.flatten(1)

    x, y, full = features(40, 8, 23, 1.2, 0.4).double(), features(40, 8, 24).double(), half_samples(40, 0, seed=0)
    expected = {
        FrechetInceptionDistance(Features()): frechet_distances(x, moments(y), full),
        KernelInceptionDistance(Features(), subsets=1, subset_size=40): kernel_distances(x, y, full),
    }
    for metric, found in expected.items():
        for is_reference, each in enumerate((x, y)):
            metric.update(each[:, :, None, None], real=bool(is_reference))
        value = metric.compute()
        assert found.item() == pytest.approx((value[0] if isinstance(value, tuple) else value).item())
    score = InceptionScore(Features(), splits=1)
    score.update(x[:, :, None, None])
    assert inception_scores(x, full).item() == pytest.approx(score.compute()[0].item())


# How sure


def test_half_samples():
    subsets = half_samples(9, 2000, seed=0)
    assert subsets.shape == (2001, 9) and subsets[0].all()
    assert (subsets[1:].sum(dim=1) == 4).all()
    # Each sample is in 4/9 of them, each pair in 4/9 x 3/8; 5 standard errors of 2,000 draws are 0.056.
    together = subsets[1:].double().T @ subsets[1:].double() / 2000
    expected = torch.full((9, 9), 1 / 6, dtype=torch.float64).fill_diagonal_(4 / 9)
    torch.testing.assert_close(together, expected, atol=0.056, rtol=0)
    assert torch.equal(subsets, half_samples(9, 2000, seed=0))
    assert not torch.equal(subsets, half_samples(9, 2000, seed=1))


def test_mean_values():
    subsets = torch.tensor([[True, True, True], [True, False, True]])
    assert mean_values(torch.tensor([1.0, 5.0, 3.0]), subsets).tolist() == [3, 2]
    assert mean_values(torch.tensor([[1, 0], [5, 3], [3, 6]]), subsets).tolist() == [[3, 3], [2, 3]]


@pytest.mark.parametrize("count", [7, 8])
def test_all_halves_give_a_mean_its_textbook_standard_error(count):
    values = features(count, 1, 25)[:, 0].double()
    halves = list(itertools.combinations(range(count), count // 2))
    subsets = torch.zeros(1 + len(halves), count, dtype=torch.bool)
    subsets[0] = True
    for subset, half in zip(subsets[1:], halves):
        subset[list(half)] = True
    low, high = interval(mean_values(values, subsets), count, level=0.9)
    assert (low + high) / 2 == pytest.approx(values.mean().item())
    # Drawn at random, the halves' variance has the expectation of that of all halves about their own mean.
    error = values.std().item() / math.sqrt(count) * math.sqrt(len(halves) / (len(halves) - 1))
    assert (high - low) / 2 == pytest.approx(scipy.stats.norm.ppf(0.95) * error)


def differences_of_means(count, shift, repetitions=400):
    """Differences found between two models, the second better by `shift`, whose samples share 9/10 of their noise."""
    for i in range(repetitions):
        shared, own = features(count, 1, 2 * i)[:, 0], features(count, 1, 2 * i + 1)[:, 0]
        subsets = half_samples(count, 50, seed=i)
        yield difference(mean_values(3 * shared, subsets), mean_values(3 * shared + own + shift, subsets), count)


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    held = [low <= 0.3 <= high for low, high in (found["interval"] for found in differences_of_means(60, 0.3))]
    # 4 standard errors of 400 repetitions are 0.044; the normal quantiles and 50 halves alone cost 0.015.
    assert 0.89 < np.mean(held) < 0.99


def test_samples_needed_give_the_power_that_they_promise():
    # The samples differ by 0.4 with a standard deviation of 1: 7.849 / 0.4^2 = 49.
    found = list(differences_of_means(49, 0.4))
    told_apart = [low > 0 or high < 0 for low, high in (each["interval"] for each in found)]
    assert np.mean(told_apart) == pytest.approx(0.8, abs=0.08)


def test_difference_by_hand():
    a = torch.tensor([2.0, 2.0, 2.0, 2.0])
    b = torch.tensor([3.0, 2.5, 3.5, 3.0])
    # The halves' differences spread by 0.5; of 10 samples they are as uncertain as the whole, of 9 more so.
    found = difference(a, b, count=10)
    assert found["difference"] == 1
    assert found["interval"] == pytest.approx([1 - 1.959964 * 0.5, 1 + 1.959964 * 0.5])
    assert found["samples_needed"] == math.ceil(10 * (1.959964 + 0.841621) ** 2 * 0.5**2) == 20
    back = difference(b, a, count=10)
    assert (back["difference"], back["samples_needed"]) == (-1, 20)
    low, high = difference(a, b, count=9)["interval"]
    assert high - low == pytest.approx(2 * 1.959964 * 0.5 * math.sqrt(4 / 5))
    assert difference(a, b, 10, level=0.5)["interval"] == pytest.approx([1 - 0.674490 * 0.5, 1 + 0.674490 * 0.5])


def test_equal_models_are_never_told_apart():
    values = torch.tensor([2.0, 2.5, 1.5, 2.0])
    assert difference(values, values, 10) == {"difference": 0, "interval": [0, 0], "samples_needed": None}
    # Halves that all agree say nothing about how many samples it takes.
    assert difference(torch.zeros(4), torch.ones(4), 10)["samples_needed"] is None


def test_frechet_distances_differ_as_much_from_set_to_set_as_the_intervals_say():
    reference = moments(features(2000, 4, 26))
    subsets, found = half_samples(200, 60, seed=9), []
    for i in range(100):
        samples = features(200, 4, 100 + i)
        a, b = (frechet_distances(samples * scale, reference, subsets) for scale in (1.1, 1.3))
        found.append(difference(a, b, 200))
    spread = np.std([each["difference"] for each in found], ddof=1)
    claimed = np.mean([(each["interval"][1] - each["interval"][0]) / (2 * 1.959964) for each in found])
    # 100 repetitions know the spread to 7 %; the distance is not linear, so halves spread a little differently.
    assert claimed == pytest.approx(spread, rel=0.25)
    assert all(each["interval"][0] > 0 for each in found)


# What is refused


def test_too_few_samples():
    x, y = features(11, 3, 27), features(30, 3, 28)
    halves = half_samples(11, 2, seed=10)
    with pytest.raises(
        ValueError, match="coverage with 5 neighbours needs at least 12 samples, 6 in each half; there a"
    ):
        precision_recall_density_coverage(x, y, halves)
    precision_recall_density_coverage(x, y, halves[:1])
    with pytest.raises(ValueError, match="needs at least 6 samples; there are 5"):
        precision_recall_density_coverage(x[:5], y, halves[:1, :5])
    with pytest.raises(ValueError, match="needs at least 6 reference samples; there are 5"):
        precision_recall_density_coverage(x, y[:5], halves[:1])
    for metric, name in (
        (kernel_distances, "kernel_distance"),
        (lambda x, y, s: frechet_distances(x, MOMENTS, s), "fr"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* needs at least 4 samples, 2 in each half; there are 3"):
            metric(x[:3], y, half_samples(3, 2, seed=0))
    with pytest.raises(ValueError, match="frechet_distance needs at least 2 reference samples; there are 1"):
        moments(y[:1])
    with pytest.raises(ValueError, match="kernel_distance needs at least 2 reference samples; there are 1"):
        kernel_distances(x, y[:1], halves)
    with pytest.raises(ValueError, match="at least 2 samples; there are 1"):
        half_samples(1, 5, seed=0)
    with pytest.raises(ValueError, match="at least 2 half-samples; there are 1"):
        interval(torch.zeros(2), 10)


MOMENTS = Moments(torch.zeros(3).double(), torch.eye(3).double(), 100)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value):
    x, y, full = features(20, 3, 29), features(20, 3, 30), half_samples(20, 0, seed=0)
    broken = x.clone()
    broken[7, 1] = value
    for metric in (kernel_distances, precision_recall_density_coverage):
        for pair in ((broken, y), (x, broken)):
            with pytest.raises(ValueError, match="NaN or infinite"):
                metric(*pair, full)
    for call in (
        lambda: moments(broken),
        lambda: frechet_distances(broken, MOMENTS, full),
        lambda: inception_scores(broken, full),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()
