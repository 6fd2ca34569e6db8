"""The power spectrum against signals whose spectrum is known on paper."""

import math

import pytest
import torch

from metrics import luminance, power_spectrum_error, radial_log_power


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
