import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from objectives import min_snr_weight


SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def levels(timesteps):
    abar = SCHEDULER.alphas_cumprod[timesteps]
    return abar.sqrt(), (1 - abar).sqrt()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_the_diffusers_scripts(prediction_type):
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(SCHEDULER, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)]).min(0).values
    weights = weights / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr_weight(*levels(timesteps), 5.0, prediction_type), weights, rtol=1e-4, atol=0)


def test_every_prediction_type_weighs_the_error_of_z0_alike():
    # The same wrong z_0 seen as an error of eps, v, z_0 and velocity: all must come to min(SNR, gamma) |error|^2.
    error = torch.tensor([0.3])
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])  # SNR 16/9
    for gamma, bound in ((5.0, 16 / 9), (1.0, 1.0)):
        expected = bound * error.square()
        errors = {"sample": error, "epsilon": alpha / sigma * error, "v_prediction": error / sigma}
        for kind, value in errors.items():
            weight = min_snr_weight(alpha, sigma, gamma, kind)
            torch.testing.assert_close(weight * value.square(), expected)
    t = torch.tensor([0.4])  # flow: alpha = 1 - t, sigma = t, and z_0's error is t times the velocity's
    weight = min_snr_weight(1 - t, t, 5.0, "flow")
    torch.testing.assert_close(weight * (error / t).square(), (0.6 / 0.4) ** 2 * error.square())


def test_no_signal_gives_weight_zero():
    alpha, sigma = torch.tensor([0.0]), torch.tensor([1.0])
    assert min_snr_weight(alpha, sigma, 5.0, "v_prediction") == 0
    assert min_snr_weight(alpha, sigma, 5.0, "sample") == 0
