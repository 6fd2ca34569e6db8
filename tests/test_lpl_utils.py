import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference_lpl import (
    reference_features,
    reference_lpl,
    reference_lpl_of_features,
    reference_outlier_mask,
    reference_unscale,
)
from tiny_models import build_tiny_vae
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lpl_utils
from counters import LiveBytes
from lpl_utils import (
    LatentPerceptualLoss,
    calibrate,
    compare_gradients,
    lpl_term,
    outlier_mask,
    predict_z0,
    sigma_gate,
)


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
NORMALIZATIONS = ("shared", "target", "separate", "channel_l2")
WITHOUT_FACTOR = ("AutoencoderKLFlux2", "AutoencoderKLQwenImage")  # VAEs that scale latents by statistics
ROUNDED = ("AutoencoderDC", "AutoencoderKLQwenImage")  # attention, upsampling: in float32, whatever comes
OTHER_KINDS = ("AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderTiny", *WITHOUT_FACTOR)


# Helpers


def vae64(**kwargs):
    return build_tiny_vae(**kwargs).double()


def decoder_blocks(vae):
    """The decoder's blocks, in the order in which they run, by hand."""
    decoder = vae.decoder
    if type(vae).__name__ == "AutoencoderTiny":  # conv, act, three stages [block, block, up, conv], block, conv
        return [decoder.layers[i] for i in (3, 7, 11, 14)]
    if type(vae).__name__ == "AutoencoderDC":
        return [block for block in reversed(decoder.up_blocks) if len(block) > 0]
    return [decoder.mid_block, *decoder.up_blocks]


def latents(batch, height=8, width=None, noise=0.5, spike=None, dtype=torch.float64, seed=0):
    """(z0_hat, z0): a prediction that misses by `noise`, with an outlier of size `spike` at one position."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, height, width or height)
    z0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    z0_hat = z0 + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    if spike is not None:
        z0_hat[:, :, 1, 2] += spike
        z0[:, :, -2, 1] -= spike
    return z0_hat.to(dtype), z0.to(dtype)


def latents_of(vae, *args, **kwargs):
    """`latents` as the denoiser of this VAE sees them: FLUX.2's has a channel for each of 2 x 2 positions."""
    packed = type(vae).__name__ == "AutoencoderKLFlux2"
    return [F.pixel_unshuffle(z, 2) if packed else z for z in latents(*args, **kwargs)]


def unscale_of(vae):
    """What undoes the scaling of `latents_of` this VAE; None where the VAE says it itself."""
    if type(vae).__name__ == "AutoencoderKLFlux2":
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.bn.eps) ** 0.5
        return lambda z: F.pixel_shuffle(z * std[:, None, None] + mean[:, None, None], 2)
    if type(vae).__name__ == "AutoencoderKLQwenImage":  # a video of one frame, [B, C, 1, h, w]
        pairs = list(zip(vae.config.latents_mean, vae.config.latents_std))
        return lambda z: torch.stack([z[:, [c]] * std + mean for c, (mean, std) in enumerate(pairs)], dim=1)
    return None


def lpl_of(vae, **options):
    """A LatentPerceptualLoss for any kind of VAE."""
    return LatentPerceptualLoss(vae, unscale=unscale_of(vae), **options)


def value_and_gradient(loss_fn, z0_hat, z0, weights=None):
    """Per-sample losses, the gradient of their weighted sum, and the statistics."""
    z0_hat = z0_hat.clone().requires_grad_()
    loss, stats = loss_fn(z0_hat, z0)
    weights = torch.ones_like(loss) if weights is None else weights
    (gradient,) = torch.autograd.grad((loss * weights).sum(), z0_hat)
    return loss.detach(), gradient, stats


def assert_equal_to(actual, expected, rtol=1e-9):
    assert actual.shape == expected.shape
    assert expected.norm() > 0, "an all-zero expectation proves nothing"
    assert (actual.double() - expected.double()).norm() <= rtol * expected.double().norm()


class Same(nn.Module):
    def forward(self, x, latent_embeds=None):
        return x


class Up(nn.Module):
    def forward(self, x, latent_embeds=None):
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def stub_vae(*up_blocks, channels=1, mid_block=None):
    """A float64 VAE whose decoder hands the latents themselves to `mid_block` and `up_blocks`."""
    vae = vae64(latent_channels=channels, scaling_factor=1.0, post_quant_conv=False)
    vae.decoder.conv_in = nn.Identity()
    vae.decoder.mid_block = mid_block or Same()
    vae.decoder.up_blocks = nn.ModuleList(up_blocks)
    return vae


class CallCounter:
    """Counts a module's calls with a hook of its own."""

    def __init__(self, module):
        self.calls = 0
        module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls += 1


class BackwardOperations(TorchDispatchMode):
    """Counts the convolutions' backward operations."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "convolution_backward" in func.name()
        return func(*args, **(kwargs or {}))


def registered_hooks(vae):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vae.modules())


# Table 1


def noised(prediction_type, batch=6, seed=0):
    """(training target, z_t, z0, alpha, sigma) in float64."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, 4, 3, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(batch, 4, 3, 5, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, batch, dtype=torch.float64)
    alpha, sigma = (1 - t, t) if prediction_type == "flow" else ((1 - t).sqrt(), t.sqrt())
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    target = {"epsilon": eps, "v_prediction": a * eps - s * z0, "sample": z0, "flow": eps - z0}[prediction_type]
    return target, a * z0 + s * eps, z0, alpha, sigma


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_z0(prediction_type):
    target, z_t, z0, alpha, sigma = noised(prediction_type)
    z0_hat = predict_z0(target, z_t, alpha, sigma, prediction_type)
    assert z0_hat.dtype == torch.float64
    torch.testing.assert_close(z0_hat, z0, rtol=1e-12, atol=1e-12)


def test_clean_estimates_of_one_number_are_those_of_table_1():
    # D = 0.5, z_t = 2, alpha = 0.8, sigma = 0.6; flow: t = 0.6.
    d, z_t = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 2.0)
    expected = {
        "epsilon": (2 - 0.6 * 0.5) / 0.8,
        "v_prediction": 0.8 * 2 - 0.6 * 0.5,
        "sample": 0.5,
        "flow": 2 - 0.6 * 0.5,
    }
    for prediction_type, value in expected.items():
        alpha = torch.tensor([0.4 if prediction_type == "flow" else 0.8])
        actual = predict_z0(d, z_t, alpha, torch.tensor([0.6]), prediction_type)
        assert actual.item() == pytest.approx(value, rel=1e-6), prediction_type


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_estimates_of_half_precision_predictions_are_float32(prediction_type):
    target, z_t, z0, alpha, sigma = (x.float() for x in noised(prediction_type))
    exact = predict_z0(target.bfloat16().float(), z_t.bfloat16().float(), alpha, sigma, prediction_type)
    z0_hat = predict_z0(target.bfloat16(), z_t.bfloat16(), alpha, sigma, prediction_type)
    assert z0_hat.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(z0_hat, exact, rtol=1e-6, atol=1e-6)


def test_an_unknown_prediction_type_is_refused():
    target, z_t, _, alpha, sigma = noised("sample")
    with pytest.raises(ValueError, match="velocity"):
        predict_z0(target, z_t, alpha, sigma, "velocity")


# The gate


def test_the_gate_includes_its_threshold_and_survives_alpha_0():
    alpha = torch.tensor([1.0, 0.5, 0.5, 0.0, 1.0])
    sigma = torch.tensor([0.0, 1.5, 1.6, 1.0, 3.0])
    assert sigma_gate(alpha, sigma, 3.0).tolist() == [True, True, False, False, True]
    assert sigma_gate(alpha, sigma, 3.0).dtype == torch.bool
    assert sigma_gate(alpha[:0], sigma[:0], 3.0).shape == (0,)


@pytest.mark.parametrize(
    "schedule, shares",
    [
        ("sd", (0.674, 0.835, 0.966)),
        ("zero_terminal_snr", (0.633, 0.767, 0.860)),
        ("flow", (0.750, 0.857, 0.923)),
    ],
)
def test_gate_shares_are_those_of_the_method(schedule, shares):
    if schedule == "flow":
        t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        alpha, sigma = 1 - t, t
    else:
        from diffusers import DDPMScheduler

        abar = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            rescale_betas_zero_snr=schedule == "zero_terminal_snr",
        ).alphas_cumprod
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    for tau, share in zip((3, 6, 12), shares):
        assert sigma_gate(alpha, sigma, tau).double().mean().item() == pytest.approx(share, abs=5.01e-4)


# Algorithm 1


@pytest.mark.parametrize(
    "resolution, distance, planted, found",
    [
        # invalid side: planted - (dilation - 1) + (erosion - 1), or 0 when the dilation closes the hole
        (256, 1, 1, 3),  # dilation ceil(1.5) = 2 -> 1 (skipped), erosion ceil(2.5) = 3
        (256, 2, 2, 4),  # 1, ceil(1.25) = 2 -> 3
        (256, 4, 3, 3),  # 1, 1: both skipped
        (512, 1, 2, 0),  # 3, 5
        (512, 1, 3, 5),
        (512, 1, 6, 8),
        (512, 2, 1, 3),  # ceil(1.5) = 2 -> 1, ceil(2.5) = 3
        (512, 4, 1, 3),  # 1, ceil(1.25) = 2 -> 3
        (512, 8, 5, 5),  # 1, 1
        (1024, 1, 4, 0),  # ceil(6) = 6 -> 5, ceil(10) = 10 -> 11
        (1024, 1, 5, 11),
        (1024, 1, 7, 13),
        (1024, 2, 3, 5),  # 3, 5
        (1024, 8, 1, 3),  # 1, ceil(1.25) = 2 -> 3
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_planted_outliers_are_found_dilated_and_eroded_to_the_right_extent(resolution, distance, planted, found, sign):
    side, first = 64, 20
    features = torch.rand(1, 2, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features[0, 1, first : first + planted, first : first + planted] = 1000.0 * sign
    mask = outlier_mask(features, distance, resolution)
    expected = torch.ones(1, 2, side, side, dtype=torch.bool)
    start = first - (found - planted) // 2
    expected[0, 1, start : start + found, start : start + found] = False
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


def test_the_maps_border_is_never_eroded():
    features = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert outlier_mask(features, 1, 1024).all()
    # A corner is dilated (5) from two sides only, 7 -> 5, and eroded (11) towards the inside only, 5 -> 10.
    features[:, :, :7, :7] = 1000.0
    expected = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    expected[:, :, :10, :10] = False
    assert torch.equal(outlier_mask(features, 1, 1024), expected)


@pytest.mark.parametrize("resolution, distance", [(64, 1), (256, 1), (512, 1), (512, 4), (1024, 1), (362.04, 1)])
def test_masks_of_heavy_tailed_features_equal_the_reference(resolution, distance):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 3, 37, 52, generator=generator, dtype=torch.float64) ** 5
    features[0, :, 5:10, 40:46] = 5000.0  # large enough to outlive every dilation
    features[1, :, :6, 47:] = -5000.0
    expected = reference_outlier_mask(features, distance, resolution)
    assert 0 < expected.double().mean() < 1
    assert torch.equal(outlier_mask(features, distance, resolution), expected)


def test_masks_of_1_to_49_positions_equal_the_reference():
    generator = torch.Generator().manual_seed(4)
    for positions, resolution in itertools.product(range(1, 50), (8, 1024)):
        features = torch.randn(2, 2, 1, positions, generator=generator, dtype=torch.float64) ** 3
        features = features if positions % 2 else features.transpose(-1, -2)
        mask = outlier_mask(features, 1, resolution)
        assert torch.equal(mask, reference_outlier_mask(features, 1, resolution)), positions
        if resolution == 8:  # no dilation, no erosion: the bulk of the map stays
            assert mask.double().mean() >= 0.75, positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_a_constant_map_is_valid_everywhere(dtype, value):
    for side in (1, 2, 3, 40):
        assert outlier_mask(torch.full((1, 2, side, side), value, dtype=dtype), 1, 512).all()


@pytest.mark.parametrize("smooth", [1, 9])
@pytest.mark.parametrize("positions", [1000, 4096])
def test_percentiles_of_fewer_positions_are_off_by_what_chance_allows(positions, smooth):
    # Dvoretzky, Kiefer, Wolfowitz: ranks by n random positions are off by more than e with a chance of at most
    # 2 exp(-2 n e^2). Evenly spaced ones see a smooth map no worse.
    noise = torch.randn(3, 4, 256, 256, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    flat = F.avg_pool2d(noise**3, smooth, stride=1).flatten(2)
    error = math.sqrt(math.log(2 / 1e-6) / (2 * positions))
    low, high, std = lpl_utils._bulk(flat, positions)
    for found, rank in ((low, 0.02), (high, 0.98)):
        assert ((flat <= found).double().mean(-1) - rank).abs().max() < error
    assert (std / flat.std(-1, keepdim=True) - 1).abs().max() < 0.5  # its own variance is that of sixth powers


def test_a_pattern_of_period_two_is_seen_whole():
    checkerboard = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).tile(64, 64).view(1, 1, -1)
    for positions in (64, 1000, 4096, 5000):
        assert [v.item() for v in lpl_utils._bulk(checkerboard, positions)] == pytest.approx([0, 1, 0.5], abs=0.01)


def test_all_positions_are_the_default_and_more_than_there_are_change_nothing():
    features = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(6), dtype=torch.float64) ** 5
    for positions in (1600, 10**6):
        assert torch.equal(outlier_mask(features, 1, 512, positions), outlier_mask(features, 1, 512))


def test_masks_carry_no_gradient():
    features = torch.randn(1, 1, 8, 8, requires_grad=True)
    assert not outlier_mask(features, 1, 512).requires_grad


# Eq. 3 on paper


def hand_case():
    """Two channels of 2 x 2 positions. Differences: channel 0: 0, 2, -2, 0; channel 1: 0, 0, 0, 4."""
    z0_hat = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]], [[3.0, -3.0], [3.0, -3.0]]]], dtype=torch.float64)
    z0 = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[3.0, -3.0], [3.0, 1.0]]]], dtype=torch.float64)
    return z0_hat, z0


def hand_loss(variances):
    """Mean squares are (4 + 4) / 4 = 2 and 16 / 4 = 4; the median of two variances is the lower one."""
    eps = 1e-4 * min(variances)
    return (2 / (variances[0] + eps) + 4 / (variances[1] + eps)) / 2


def test_shared_statistics_by_hand():
    z0_hat, z0 = hand_case()
    lpl = LatentPerceptualLoss(stub_vae(Same(), channels=2), num_blocks=0)
    loss, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
    assert loss.item() == pytest.approx(hand_loss((1, 9)), rel=1e-12)
    # d/dphi_hat = 2 (phi_hat - phi) / (4 positions * 2 channels * (variance + eps))
    scale = torch.tensor([1 + 1e-4, 9 + 1e-4], dtype=torch.float64).view(1, 2, 1, 1)
    assert_equal_to(gradient, 2 * (z0_hat - z0) / 8 / scale, rtol=1e-12)


def test_target_statistics_by_hand():
    z0_hat, z0 = hand_case()
    lpl = LatentPerceptualLoss(stub_vae(Same(), channels=2), num_blocks=0, normalization="target")
    # Channel 1 of the target: 3, -3, 3, 1 has mean 1 and variance (4 + 16 + 4 + 0) / 4 = 6.
    assert lpl(z0_hat, z0)[0].item() == pytest.approx(hand_loss((1, 6)), rel=1e-12)


def test_separate_statistics_by_hand():
    z0_hat, z0 = hand_case()
    lpl = LatentPerceptualLoss(stub_vae(Same(), channels=2), num_blocks=0, normalization="separate")
    # Both tensors' lowest variance is 1, so eps is 1e-4 for both. Channel 0 has mean 0 and variance 1 in both.
    channel_0 = 2 / (1 + 1e-4)
    hat, target = math.sqrt(9 + 1e-4), math.sqrt(6 + 1e-4)
    pairs = [(3, 2), (-3, -4), (3, 2), (-3, 0)]  # (phi_hat - 0, phi - 1)
    channel_1 = sum((a / hat - b / target) ** 2 for a, b in pairs) / 4
    assert lpl(z0_hat, z0)[0].item() == pytest.approx((channel_0 + channel_1) / 2, rel=1e-12)


def test_channel_l2_by_hand():
    z0_hat, z0 = hand_case()
    lpl = LatentPerceptualLoss(stub_vae(Same(), channels=2), num_blocks=0, normalization="channel_l2")
    # Squared lengths of the target: 1 + 9 at three positions, 1 + 1 at the last: lower median 10.
    squares = [(0, 0, 10), (4, 0, 10), (4, 0, 10), (0, 16, 2)]
    expected = sum((a + b) / (length + 1e-4 * 10) for a, b, length in squares) / 4 / 2
    assert lpl(z0_hat, z0)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "weighting, reduction, factors",
    [
        # Layers of side 2, 4, 8, 8; upsampling keeps means, variances and mean squares.
        ("inverse", "mean", (1, 1 / 2, 1 / 4, 1 / 4)),
        ("exponential", "mean", (2**-1, 2**-2, 2**-4, 2**-4)),
        ("uniform", "mean", (1, 1, 1, 1)),
        ("balanced", "mean", (1, 1, 1, 1)),
        ("inverse", "sum", (1, 4 / 2, 16 / 4, 16 / 4)),
        ("uniform", "sum", (1, 4, 16, 16)),
    ],
)
def test_depth_weights_and_reductions_by_hand(weighting, reduction, factors):
    z0_hat, z0 = hand_case()
    vae = stub_vae(Up(), Up(), Same(), channels=2)
    lpl = LatentPerceptualLoss(vae, num_blocks=3, weighting=weighting, reduction=reduction, mask_outliers=False)
    loss, stats = lpl(z0_hat, z0)
    assert loss.item() == pytest.approx(sum(factors) * hand_loss((1, 9)), rel=1e-12)
    areas = torch.tensor([1, 4, 16, 16] if reduction == "sum" else [1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(stats["block_loss"].double(), areas[None] * hand_loss((1, 9)), rtol=1e-6, atol=0)
    omega = torch.tensor(factors, dtype=torch.float64) / areas
    torch.testing.assert_close(lpl.omega.double().cpu(), omega, rtol=1e-6, atol=0)


def test_outliers_leave_the_loss_and_the_statistics_by_hand():
    # 64 positions of -1 and +1, one replaced by 100; the target is 0.5 away everywhere else, and 0 there.
    board = torch.tensor([[(-1.0) ** (i + j) for j in range(8)] for i in range(8)], dtype=torch.float64)
    z0_hat = board.clone()[None, None]
    z0 = z0_hat + 0.5
    z0_hat[0, 0, 4, 4], z0[0, 0, 4, 4] = 100.0, 0.0
    loss, stats = LatentPerceptualLoss(stub_vae(Up(), Up(), Up(), Same()))(z0_hat, z0)
    # The first two layers (sides 8 and 16) are not masked; without [4, 4] the board sums to -1.
    mean = (100 - 1) / 64
    variance = (63 + 100**2) / 64 - mean**2
    unmasked = (63 * 0.25 + 100**2) / 64 / (variance * (1 + 1e-4))
    # On the others (32, 64, 64) the outlier's copies are 1/64 of the map, less than 2 %, and all masked.
    masked = 0.25 / ((1 - (1 / 63) ** 2) * (1 + 1e-4))
    blocks = [unmasked, unmasked, masked, masked, masked]
    torch.testing.assert_close(
        stats["block_loss"].double(), torch.tensor([blocks], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert stats["masked_share"].flatten().tolist() == pytest.approx([0, 0, 1 / 64, 1 / 64, 1 / 64])
    expected = sum(omega * block for omega, block in zip((1, 1 / 2, 1 / 4, 1 / 8, 1 / 8), blocks))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_variance_ratio_and_mean_over_std_by_hand():
    z0 = torch.randn(2, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z0 = (z0 - z0.mean((2, 3), keepdim=True)) / z0.std((2, 3), keepdim=True, unbiased=False)
    gain = torch.tensor([2.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    lpl = LatentPerceptualLoss(stub_vae(Same(), channels=2), num_blocks=0)
    stats = lpl(gain * z0 + 6, z0)[1]
    # Geometric mean of 4 and 9; |mean| / std is 6 / 2 and 6 / 3. The epsilon may enter, at 1e-4 relative.
    assert stats["variance_ratio"].flatten().tolist() == pytest.approx([6, 6], rel=1e-3)
    assert stats["mean_over_std"].flatten().tolist() == pytest.approx([2.5, 2.5], rel=1e-3)
    # mean ((g - 1) z + 6)^2 = (g - 1)^2 + 36, over the target's variance 1.
    expected = (1 + 36 + 4 + 36) / 2 / (1 + 1e-4)
    assert stats["target_error"].flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)


# Eq. 3 against the reference

OPTIONS = [
    {"normalization": normalization, "detach_stats": detach}
    for normalization, detach in itertools.product(NORMALIZATIONS, (True, False))
] + [
    {"weighting": "exponential"},
    {"weighting": "uniform", "reduction": "sum"},
    {"reduction": "sum", "detach_stats": False},
    {"mask_outliers": False},
    {"mask_outliers": False, "normalization": "channel_l2", "reduction": "sum"},
    {"outlier_source": "target"},
    {"outlier_source": "target", "normalization": "separate"},
    {"outlier_source": "union"},
    {"outlier_source": "union", "normalization": "target", "reduction": "sum"},
    {"num_blocks": 0},
    {"num_blocks": 1},
    {"num_blocks": 2, "detach_stats": False},
    {"num_blocks": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_value_gradient_and_statistics_equal_the_reference(options):
    vae = vae64()
    z0_hat, z0 = latents(2, 13, 14, spike=40)  # 108 pixels: the last layers' masks are eroded
    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
    expected, expected_gradient, expected_stats = value_and_gradient(
        lambda a, b: reference_lpl(vae, a, b, **options), z0_hat, z0, weights
    )
    if options.get("mask_outliers", True) and options.get("num_blocks", 4) > 1:
        assert (expected_stats["masked_share"].amax(1) > 0).all(), "the case must exercise the mask"

    loss, gradient, stats = value_and_gradient(LatentPerceptualLoss(vae, **options), z0_hat, z0, weights)
    assert_equal_to(loss, expected)
    assert_equal_to(gradient, expected_gradient)
    layers = options.get("num_blocks", 4) + 1
    assert all(value.shape == (2, layers) and not value.requires_grad for value in stats.values())
    # Statistics need not be float64, and the reference's ratios leave out the epsilon.
    tolerances = {"block_loss": 1e-6, "target_error": 1e-6, "variance_ratio": 1e-3, "mean_over_std": 1e-3}
    for name, rtol in tolerances.items():
        torch.testing.assert_close(stats[name].double(), expected_stats[name], rtol=rtol, atol=0)
    torch.testing.assert_close(stats["masked_share"].double(), expected_stats["masked_share"], rtol=0, atol=1e-6)


def test_masks_with_dilation_and_erosion_inside_the_loss_equal_the_reference_on_non_square_latents():
    # 480 x 256 pixels: sqrt(area) = 350.5, where Algorithm 1 dilates by 3 and erodes by 5 at full resolution (by 1 and
    # 3 were it 256).
    vae = vae64(block_out_channels=(4, 4, 4, 4))
    z0_hat, z0 = latents(1, 60, 32, spike=60)
    expected, expected_gradient, stats = value_and_gradient(lambda a, b: reference_lpl(vae, a, b), z0_hat, z0)
    assert stats["masked_share"][0, -1] > 0
    loss, gradient, _ = value_and_gradient(LatentPerceptualLoss(vae), z0_hat, z0)
    assert_equal_to(loss, expected)
    assert_equal_to(gradient, expected_gradient)


def features_inside_decode(vae, z):
    """Of scaled latents, by hooks on a decoding that runs to its end."""
    features, video = [], type(vae).__name__ == "AutoencoderKLQwenImage"
    handles = [
        block.register_forward_hook(lambda module, args, output: features.append(output[:, :, 0] if video else output))
        for block in decoder_blocks(vae)
    ]
    unscale = unscale_of(vae)
    vae.decode(unscale(z) if unscale else reference_unscale(vae, z))
    for handle in handles:
        handle.remove()
    return features


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"post_quant_conv": False},
        {"shift_factor": 0.3, "scaling_factor": 1.5},
        {"block_out_channels": (8, 16, 16)},
        *({"kind": kind} for kind in OTHER_KINDS),
        {"kind": "AutoencoderDC", "scaling_factor": 1.5, "block_out_channels": (4, 8, 8, 16, 16)},
        # As published: the last stage has no layers, and the final convolution upsamples.
        {"kind": "AutoencoderDC", "encoder_layers_per_block": (0, 1, 1, 1), "decoder_layers_per_block": (0, 1, 1, 1)},
        {"kind": "AutoencoderKLFlux2", "post_quant_conv": False},
        {"kind": "AutoencoderKLQwenImage", "block_out_channels": (8, 16, 16)},
    ],
    ids=str,
)
def test_the_loss_of_every_vae_is_that_of_the_features_that_occur_inside_decode(build):
    vae = vae64(**build)
    z0_hat, z0 = latents_of(vae, 2, 12, 10, spike=10)
    side = math.sqrt(12 * 10) * 2 ** (len(build.get("block_out_channels", (8, 16, 16, 16))) - 1)

    def reference(z0_hat, z0):
        return reference_lpl_of_features(features_inside_decode(vae, z0_hat), features_inside_decode(vae, z0), side)

    expected, expected_gradient, expected_stats = value_and_gradient(reference, z0_hat, z0)
    assert (expected_stats["masked_share"] > 0).any(), "the case must exercise the mask"
    num_blocks = len(decoder_blocks(vae)) - hasattr(vae.decoder, "mid_block")
    loss, gradient, stats = value_and_gradient(lpl_of(vae, num_blocks=num_blocks), z0_hat, z0)
    rtol = 1e-4 if build.get("kind") in ROUNDED else 1e-9
    assert_equal_to(loss, expected, rtol)
    assert_equal_to(gradient, expected_gradient, rtol)
    torch.testing.assert_close(stats["block_loss"].double(), expected_stats["block_loss"], rtol=1e-4, atol=0)


def test_a_custom_unscale_replaces_the_factor_and_shift():
    vae = vae64(shift_factor=0.3)

    def unscale(z):
        return 2 * z - torch.arange(4, dtype=z.dtype).view(1, 4, 1, 1)

    z0_hat, z0 = latents(2)
    expected = value_and_gradient(lambda a, b: reference_lpl(vae, a, b, unscale=unscale), z0_hat, z0)
    actual = value_and_gradient(LatentPerceptualLoss(vae, unscale=unscale), z0_hat, z0)
    assert_equal_to(actual[0], expected[0])
    assert_equal_to(actual[1], expected[1])


def test_only_the_decoder_need_be_on_the_device():
    vae = build_tiny_vae()
    z0_hat, z0 = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = LatentPerceptualLoss(vae)(z0_hat, z0)[0]
    vae.encoder.to("meta")
    vae.quant_conv.to("meta")
    assert torch.equal(LatentPerceptualLoss(vae)(z0_hat, z0)[0], expected) and expected > 0


def test_the_reference_walks_through_the_decoder_as_decode_does():
    vae = vae64()
    z = latents(1)[0]
    x = reference_features(vae, z)[-1]
    image = vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(x)))
    torch.testing.assert_close(image, vae.decode(reference_unscale(vae, z)).sample, rtol=1e-12, atol=1e-12)


def slope(lpl, z0_hat, z0, direction, step=1e-5):
    """Along `direction`: the central difference of the summed loss, and what its gradient says."""
    _, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
    with torch.no_grad():
        above, below = (lpl(z0_hat + sign * step * direction, z0)[0].sum() for sign in (1, -1))
    return ((above - below) / (2 * step)).item(), (gradient * direction).sum().item()


@pytest.mark.parametrize("chunk_size", [0, 1])
@pytest.mark.parametrize(
    "kind, normalization", [("AutoencoderKL", n) for n in NORMALIZATIONS] + [(kind, "target") for kind in OTHER_KINDS]
)
def test_the_gradient_through_decoder_and_statistics_matches_finite_differences(kind, normalization, chunk_size):
    lpl = lpl_of(vae64(kind=kind), normalization=normalization, detach_stats=False, chunk_size=chunk_size)
    z0_hat, z0 = latents_of(lpl.vae, 2)
    direction = torch.randn(z0_hat.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step, rtol = 1e-5, 1e-6
    if normalization in ("shared", "separate"):
        rtol = 1e-3  # the epsilon, 1e-4 of the prediction's median variance, moves with it but carries no gradient
    if kind in ROUNDED:
        step, rtol = 1e-4, 5e-3
    difference, derivative = slope(lpl, z0_hat, z0, direction, step)
    assert difference == pytest.approx(derivative, rel=rtol)


@pytest.mark.parametrize("normalization", ["shared", "separate"])
def test_the_gradient_is_exact_where_the_epsilon_stays_put(normalization):
    vae = stub_vae(Up(), Up(), Same(), channels=4)
    lpl = LatentPerceptualLoss(vae, num_blocks=3, normalization=normalization, detach_stats=False)
    z0_hat, z0 = latents(2)
    direction = torch.randn(z0_hat.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sample, variances in enumerate(z0_hat.var((2, 3))):
        direction[sample, variances.argsort()[1]] = 0  # the lower median of four: it sets the epsilon
    difference, derivative = slope(lpl, z0_hat, z0, direction)
    assert difference == pytest.approx(derivative, rel=1e-7)


def test_detached_statistics_change_the_gradient_but_not_the_value():
    vae, (z0_hat, z0) = vae64(), latents(2)
    detached = value_and_gradient(LatentPerceptualLoss(vae, detach_stats=True), z0_hat, z0)
    attached = value_and_gradient(LatentPerceptualLoss(vae, detach_stats=False), z0_hat, z0)
    assert_equal_to(detached[0], attached[0], rtol=1e-12)
    assert (detached[1] - attached[1]).norm() > 0.05 * attached[1].norm()


@pytest.mark.parametrize("gain", [0.2, 1.0, 5.0])
def test_without_the_statistics_gradient_separate_lowers_any_contrast(gain):
    noise = torch.randn(2, 1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z0_hat, z0 = ((x - x.mean()) / x.std(unbiased=False) for x in (noise[0] + noise[1], noise[1]))
    z0_hat, rho = gain * z0_hat, (z0_hat * z0).mean().item()
    for detach_stats, by_hand in ((False, 0), (True, 2 * (1 - rho))):  # of the loss 2 - 2 rho, by the log of the gain
        lpl = LatentPerceptualLoss(
            stub_vae(Same(), channels=1), num_blocks=0, normalization="separate", detach_stats=detach_stats
        )
        loss, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
        assert loss.item() == pytest.approx(2 - 2 * rho, rel=1e-3)  # up to the epsilon
        assert (gradient * z0_hat).sum().item() == pytest.approx(by_hand, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("detach_stats", [True, False])
@pytest.mark.parametrize(
    "kind, normalization", [("AutoencoderKL", n) for n in NORMALIZATIONS] + [(kind, "shared") for kind in OTHER_KINDS]
)
def test_equal_latents_give_zero_loss_and_zero_gradient(kind, normalization, detach_stats):
    lpl = lpl_of(vae64(kind=kind), normalization=normalization, detach_stats=detach_stats)
    _, z0 = latents_of(lpl.vae, 2, spike=40)
    loss, gradient, _ = value_and_gradient(lpl, z0, z0)
    assert loss.abs().max() == 0
    assert gradient.abs().max() == 0


class OutlierPattern(nn.Module):
    """Adds -1000 or 1000 to channel 0 in the middle of every 5 x 5 cell, the last `spared` ones excepted."""

    def __init__(self, spared):
        super().__init__()
        self.spared = spared

    def forward(self, x, latent_embeds=None):
        pattern = torch.zeros(x.shape[-2:], dtype=x.dtype)
        pattern[2::5, 2::5] = 1000.0
        middles = pattern.flatten().nonzero().flatten()
        # Of n positions, n / 25 are middles: just under 2 % are low, 2 % are high, so both percentiles lie in between.
        pattern.view(-1)[middles[: len(middles) // 2 - 1]] = -1000.0
        pattern.view(-1)[middles[-self.spared :]] = 0.0
        return torch.cat([x[:, :1] + pattern, x[:, 1:]], 1)


@pytest.mark.parametrize(
    "normalization, spared, kept",
    [
        *[(normalization, 1, 2) for normalization in NORMALIZATIONS],
        ("shared", 204, 2),  # 204 * 25 positions are just under 5 % of 320 * 320 = 5120
        ("shared", 205, 3),  # and 205 * 25 are enough
    ],
)
def test_a_nearly_fully_masked_channel_contributes_nothing_and_no_nan(normalization, spared, kept):
    # At 320 pixels nothing is dilated, and an erosion of 5 turns the middles into whole cells of 25 positions.
    vae = stub_vae(Up(), Up(), Up(), OutlierPattern(spared), channels=3)
    z0 = torch.randn(1, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z0[:, 0] *= 3  # the median of the others' variances differs from that of all three
    z0_hat = z0 + 0.5 * torch.randn(z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"normalization": normalization, "detach_stats": False}
    expected, expected_gradient, expected_stats = value_and_gradient(
        lambda a, b: reference_lpl(vae, a, b, **options), z0_hat, z0
    )
    assert expected_stats["kept"].tolist() == [[3, 3, 3, 3, kept]]
    assert expected_stats["masked_share"][0, -1] == pytest.approx((1 - 25 * spared / 320**2) / 3)

    loss, gradient, stats = value_and_gradient(LatentPerceptualLoss(vae, **options), z0_hat, z0)
    assert_equal_to(loss, expected)
    assert_equal_to(gradient, expected_gradient)
    assert all(value.isfinite().all() for value in stats.values())
    torch.testing.assert_close(stats["block_loss"].double(), expected_stats["block_loss"], rtol=1e-6, atol=0)
    for name in ("variance_ratio", "mean_over_std"):  # over the channels that are left; the reference has no epsilon
        torch.testing.assert_close(stats[name].double(), expected_stats[name], rtol=1e-3, atol=0)


class Spot(nn.Module):
    """Adds 100 to the first position of channel 0."""

    def forward(self, x, latent_embeds=None):
        x = x.clone()
        x[:, 0, 0, 0] += 100
        return x


def test_a_masked_channel_with_fewer_than_16_valid_positions_contributes_nothing_by_hand():
    # One position, upsampled to 4 x 4: without the spot 16 positions are valid, with it 15 of channel 0.
    z0_hat = torch.tensor([1.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    z0 = torch.tensor([2.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    vae = stub_vae(Up(), Up(), Spot(), channels=2)
    stats = LatentPerceptualLoss(vae, num_blocks=3, normalization="channel_l2")(z0_hat, z0)[1]
    # Squared differences 1 and 9, squared length 4 + 1 = 5, at the spot 102^2 + 1.
    both = (1 + 9) / (5 + 1e-4 * 5) / 2
    only_channel_1 = (15 * 9 / (5 + 1e-4 * 5) + 9 / (102**2 + 1 + 1e-4 * 5)) / 16 / 2
    assert stats["block_loss"].flatten().tolist() == pytest.approx([both, both, both, only_channel_1], rel=1e-6)
    assert stats["masked_share"].flatten().tolist() == pytest.approx([0, 0, 0, 1 / 32])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (2, 2), (3, 5)])
def test_the_smallest_latents_give_finite_losses_and_gradients(height, width, normalization):
    lpl = LatentPerceptualLoss(vae64(), normalization=normalization, detach_stats=False)
    loss, gradient, _ = value_and_gradient(lpl, *latents(2, height, width))
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() > 0


class ZeroMostChannels(nn.Module):
    def forward(self, x, latent_embeds=None):
        return torch.cat([torch.zeros_like(x[:, :3]), x[:, 3:]], 1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_channels_that_are_constantly_zero_give_no_nan(normalization):
    # Three of four channels are dead, so the median of the variances is 0.
    vae = stub_vae(Up(), Up(), Up(), Same(), channels=4, mid_block=ZeroMostChannels())
    lpl = LatentPerceptualLoss(vae, normalization=normalization, detach_stats=False)
    loss, gradient, _ = value_and_gradient(lpl, *latents(1))
    assert loss.isfinite().all() and loss.item() < 100
    assert gradient.isfinite().all()
    assert gradient[:, 3].abs().max() > 0 and gradient[:, :3].abs().max() == 0


# Balanced weights and what calibration froze


def test_balanced_weights_are_uniform_until_measured_and_then_equalise_the_layers():
    vae, (z0_hat, z0) = vae64(), latents(3)
    lpl = LatentPerceptualLoss(vae, weighting="balanced")
    loss, stats = lpl(z0_hat, z0)
    assert_equal_to(loss, reference_lpl(vae, z0_hat, z0, weighting="uniform")[0])
    means = stats["block_loss"].mean(0)
    lpl.balance(means)
    omega = (means[0] / means).double()
    torch.testing.assert_close(lpl.omega.double().cpu(), omega, rtol=1e-6, atol=0)
    loss, stats = lpl(z0_hat, z0)
    expected = reference_lpl(vae, z0_hat, z0, omega=omega.tolist())[0]
    assert_equal_to(loss, expected, rtol=1e-6)
    contributions = (stats["block_loss"] * lpl.omega).mean(0).double()
    torch.testing.assert_close(contributions, contributions[:1].expand(5), rtol=1e-5, atol=0)


def test_saved_weights_are_those_of_the_calibration():
    vae, (z0_hat, z0) = vae64(), latents(2)
    lpl = LatentPerceptualLoss(vae, weighting="balanced")
    before = lpl(z0_hat, z0)[0]
    lpl.balance(torch.tensor([1.0, 0.5, 2.0, 4.0, 0.25]))
    after = lpl(z0_hat, z0)[0]
    assert (after - before).abs().min() > 0
    restored = LatentPerceptualLoss(vae, weighting="balanced")
    restored.load_state_dict(lpl.state_dict())
    assert torch.equal(restored(z0_hat, z0)[0], after)
    assert restored.omega.tolist() == [1.0, 2.0, 0.5, 0.25, 4.0]


# Streaming


@pytest.mark.parametrize(
    "kind, options",
    [("AutoencoderKL", {}), ("AutoencoderKL", {"detach_stats": False, "outlier_source": "union"})]
    + [("AutoencoderKLFlux2", {"detach_stats": False})]
    + [pytest.param("AutoencoderKLQwenImage", {"detach_stats": False}, marks=pytest.mark.slow)],
    ids=str,
)
def test_streamed_values_and_gradients_equal_plain_autograd(kind, options):
    vae = vae64(kind=kind)
    z0_hat, z0 = latents_of(vae, 5, spike=40)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.3, 1e3], dtype=torch.float64)
    plain = lpl_of(vae, chunk_size=0, **options)
    expected = value_and_gradient(plain, z0_hat, z0, weights)
    expected_stats = plain(z0_hat, z0)[1]
    for chunk_size in (1, 2, 3):
        lpl = lpl_of(vae, chunk_size=chunk_size, **options)
        actual = value_and_gradient(lpl, z0_hat, z0, weights)
        rtol = 1e-6 if kind in ROUNDED else 1e-9
        assert_equal_to(actual[0], expected[0], rtol)
        for sample in (0, 1, 3, 4):
            assert_equal_to(actual[1][sample], expected[1][sample], rtol)
        assert actual[1][2].abs().max() == 0
        for name, value in lpl(z0_hat, z0)[1].items():
            torch.testing.assert_close(value, expected_stats[name], rtol=1e-6, atol=1e-9)


def test_the_streamed_gradient_flows_on_to_the_model():
    vae, (z0_hat, z0) = vae64(), latents(2)
    layer = nn.Conv2d(4, 4, 1).double()
    gradients = []
    for chunk_size in (0, 1):
        loss, _ = LatentPerceptualLoss(vae, chunk_size=chunk_size)(layer(z0_hat), z0)
        gradients.append(torch.autograd.grad(loss.mean() ** 2, layer.weight)[0])
    assert_equal_to(gradients[1], gradients[0])


@pytest.mark.parametrize("chunk_size", [0, 1, 2])
def test_no_backward_runs_without_gradients(chunk_size):
    lpl = LatentPerceptualLoss(build_tiny_vae(), chunk_size=chunk_size)
    z0_hat, z0 = latents(3, dtype=torch.float32)
    expected = lpl(z0_hat, z0)[0]
    with BackwardOperations() as operations:
        with torch.no_grad():
            loss, _ = lpl(z0_hat.requires_grad_(), z0)
        assert operations.calls == 0
        lpl(z0_hat.detach(), z0)
        assert operations.calls == 0, "nothing asks for a gradient"
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        lpl(z0_hat, z0)[0].sum().backward()
        assert operations.calls > 0, "the count must see a backward pass where there is one"


@pytest.mark.parametrize("kind", ["AutoencoderKL", *WITHOUT_FACTOR])
def test_no_gradient_reaches_the_target_or_the_decoders_weights(kind):
    for chunk_size in (0, 2):
        vae = build_tiny_vae(kind)
        assert all(p.requires_grad for p in vae.parameters())
        z0_hat, z0 = (z.requires_grad_() for z in latents_of(vae, 3, dtype=torch.float32))
        loss, _ = lpl_of(vae, chunk_size=chunk_size)(z0_hat, z0)
        loss.sum().backward()
        assert z0_hat.grad.norm() > 0
        assert z0.grad is None
        assert all(p.grad is None for p in vae.parameters())


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_an_empty_batch_gives_an_empty_differentiable_loss(chunk_size):
    lpl = LatentPerceptualLoss(build_tiny_vae(), chunk_size=chunk_size)
    z0_hat, z0 = torch.zeros(0, 4, 8, 8, requires_grad=True), torch.zeros(0, 4, 8, 8)
    loss, stats = lpl(z0_hat, z0)
    assert loss.shape == (0,)
    assert all(value.shape == (0, 5) for value in stats.values())
    loss.sum().backward()
    assert z0_hat.grad.shape == z0_hat.shape


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reducing_a_few_channels_at_a_time_changes_nothing(normalization, monkeypatch):
    vae, (z0_hat, z0) = vae64(), latents(2, spike=40)
    lpl = LatentPerceptualLoss(vae, normalization=normalization, detach_stats=False, chunk_size=2)
    expected = value_and_gradient(lpl, z0_hat, z0)
    # 2 samples of 64 * 64 positions: 3 channels of 8 or 16 at a time in the last layers; of 16 * 16: all at once.
    monkeypatch.setattr(lpl_utils, "SLICE", 3 * 2 * 64 * 64)
    actual = value_and_gradient(lpl, z0_hat, z0)
    assert_equal_to(actual[0], expected[0], rtol=1e-12)
    assert_equal_to(actual[1], expected[1], rtol=1e-12)
    for name, value in actual[2].items():
        torch.testing.assert_close(value, expected[2][name], rtol=1e-12, atol=1e-12)


def peak_bytes(lpl, batch):
    """Most bytes alive during value and gradient, on top of the latents themselves."""
    z0_hat, z0 = latents_of(lpl.vae, batch, dtype=torch.float32)
    z0_hat.requires_grad_()
    with LiveBytes() as memory:
        loss, stats = lpl(z0_hat, z0)
        loss.mean().backward()
    return memory.peak


def test_streaming_keeps_the_peak_of_live_bytes_independent_of_the_batch():
    vae = build_tiny_vae()
    latent_bytes = 4 * 8 * 8 * 4
    per_sample = {}
    for chunk_size in (0, 1, 2):
        lpl = LatentPerceptualLoss(vae, chunk_size=chunk_size)
        peak_bytes(lpl, 2)  # whatever is done once only
        small, large = peak_bytes(lpl, 2), peak_bytes(lpl, 8)
        per_sample[chunk_size] = (large - small) / 6
    # Each sample adds its gradient, at most a few copies of its latents, and its row of statistics; nothing else.
    assert per_sample[1] <= 4 * latent_bytes + 512
    assert per_sample[2] <= 4 * latent_bytes + 512
    assert per_sample[0] > 500 * latent_bytes


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize(
    "kind, asked, share",
    [
        ("AutoencoderKL", "vae", 0.8),
        ("AutoencoderKL", "loss", 0.8),
        ("AutoencoderDC", "loss", 0.8),  # knows no checkpointing of its own
        ("AutoencoderTiny", "vae", 0.96),  # most of its peak is in a single block
        ("AutoencoderKLFlux2", "vae", 0.8),
        pytest.param("AutoencoderKLQwenImage", "loss", 0.8, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_changes_nothing_but_the_peak_of_live_bytes(kind, asked, share, chunk_size):
    def plain_and_checkpointed(dtype):
        for checkpointed in (False, True):
            vae = build_tiny_vae(kind).to(dtype)
            if checkpointed and asked == "vae":
                vae.enable_gradient_checkpointing()
            by_loss = checkpointed and asked == "loss"
            yield lpl_of(vae, chunk_size=chunk_size, gradient_checkpointing=by_loss)

    z0_hat, z0 = latents_of(build_tiny_vae(kind), 3, spike=40)
    expected, actual = (value_and_gradient(lpl, z0_hat, z0) for lpl in plain_and_checkpointed(torch.float64))
    assert_equal_to(actual[0], expected[0], rtol=1e-12)
    assert_equal_to(actual[1], expected[1], rtol=1e-12)
    peak, reduced = (peak_bytes(lpl, 4) for lpl in plain_and_checkpointed(torch.float32))
    if chunk_size == 0:  # streamed, little is kept in any case
        assert reduced < share * peak


def test_a_graph_can_be_left_for_another_backward_pass():
    vae, gradients = vae64(), []
    for how in ({}, {"gradient_checkpointing": True}, {"compile_backend": "aot_eager"}):
        z0_hat, z0 = latents(2)
        z0_hat.requires_grad_()
        lpl = LatentPerceptualLoss(vae, num_blocks=1, chunk_size=0, **how)
        lpl(z0_hat, z0)[0].sum().backward()  # as in a step that is not logged
        loss = lpl(z0_hat, z0)[0].sum()
        gradients += [z0_hat.grad, *(torch.autograd.grad(loss, z0_hat, retain_graph=True)[0] for _ in range(2))]
    for gradient in gradients[1:]:
        assert_equal_to(gradient, gradients[0])
    torch._dynamo.reset()


# Cheaper


def test_channels_last_of_a_decoder_of_videos():
    vae = build_tiny_vae("AutoencoderKLQwenImage").double()
    z0_hat, z0 = latents_of(vae, 2)
    expected = value_and_gradient(lpl_of(vae), z0_hat, z0)
    lpl = lpl_of(vae, channels_last=True)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    for actual, wanted in zip(value_and_gradient(lpl, z0_hat, z0)[:2], expected[:2]):
        assert_equal_to(actual, wanted, rtol=1e-9)


def test_channels_last_changes_the_decoder_and_no_value():
    z0_hat, z0 = latents(2, 16, spike=40)
    expected = value_and_gradient(LatentPerceptualLoss(vae64()), z0_hat, z0)
    lpl = LatentPerceptualLoss(vae64(), channels_last=True)
    assert lpl.features(z0)[-1].is_contiguous(memory_format=torch.channels_last)
    for actual, wanted in zip(value_and_gradient(lpl, z0_hat, z0)[:2], expected[:2]):
        assert_equal_to(actual, wanted, rtol=1e-9)


def test_the_loss_takes_its_percentiles_from_as_many_positions_as_asked(monkeypatch):
    seen = []
    bulk = lpl_utils._bulk
    monkeypatch.setattr(lpl_utils, "_bulk", lambda flat, positions: seen.append(positions) or bulk(flat, positions))
    z0_hat, z0 = latents(1, 16)
    for positions in (None, 64):
        LatentPerceptualLoss(vae64(), outlier_positions=positions)(z0_hat, z0)
    assert seen and set(seen) == {None, 64} and seen == sorted(seen, key=lambda n: n is not None)


# Precision


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("dtype, noise", [(torch.bfloat16, 0.5), (torch.float16, 0.5), (torch.float16, 0.05)])
def test_a_half_precision_decoder_gives_nearly_the_float32_value_and_gradient(dtype, noise, chunk_size):
    # At 128 pixels a mean's gradient is below float16's normal range (6e-5): it must not underflow.
    z0_hat, z0 = latents(2, 16, noise=noise, dtype=torch.float32)
    expected = value_and_gradient(LatentPerceptualLoss(build_tiny_vae(), chunk_size=chunk_size), z0_hat, z0)
    lpl = LatentPerceptualLoss(build_tiny_vae().to(dtype), chunk_size=chunk_size)
    loss, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
    assert loss.dtype == gradient.dtype == torch.float32
    assert_equal_to(loss, expected[0], rtol=0.05)
    for actual, exact in zip(gradient, expected[1]):
        assert torch.cosine_similarity(actual.flatten(), exact.flatten(), dim=0) > 0.99
        assert actual.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)


def test_the_streamed_gradient_does_not_underflow_in_a_float16_decoder():
    # With channel_l2 on the smallest differences, the features' gradients are far below float16's smallest number.
    z0_hat, z0 = latents(2, 16, noise=0.05, dtype=torch.float32)
    z0_hat[1] = z0[1] + 20 * (z0_hat[1] - z0[1])  # and one sample's are much larger than the other's
    expected = value_and_gradient(LatentPerceptualLoss(build_tiny_vae(), normalization="channel_l2"), z0_hat, z0)
    for chunk_size in (1, 2):
        lpl = LatentPerceptualLoss(build_tiny_vae().half(), normalization="channel_l2", chunk_size=chunk_size)
        _, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
        for actual, exact in zip(gradient, expected[1]):
            assert torch.cosine_similarity(actual.flatten(), exact.flatten(), dim=0) > 0.99
            assert actual.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_half_precision_latents_are_compared_in_float32(chunk_size):
    z0_hat, z0 = latents(1, dtype=torch.bfloat16)
    lpl = LatentPerceptualLoss(build_tiny_vae(), chunk_size=chunk_size)
    loss, gradient, _ = value_and_gradient(lpl, z0_hat, z0)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    exact, exact_gradient, _ = value_and_gradient(lpl, z0_hat.float(), z0.float())
    assert_equal_to(loss, exact, rtol=1e-5)
    assert_equal_to(gradient, exact_gradient, rtol=5e-3)
    # A float32 estimate that equals the bfloat16 latents, as a perfect prediction gives, has no loss.
    assert lpl(z0.float(), z0)[0].item() == 0


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_autocast_around_the_loss_changes_neither_value_nor_gradient(chunk_size):
    z0_hat, z0 = latents(2, dtype=torch.float32)
    lpl = LatentPerceptualLoss(build_tiny_vae(), chunk_size=chunk_size)
    expected, expected_gradient, _ = value_and_gradient(lpl, z0_hat, z0)
    z0_hat.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = lpl(z0_hat, z0)
    (gradient,) = torch.autograd.grad(loss.sum(), z0_hat)
    assert loss.dtype == torch.float32
    assert_equal_to(loss.detach(), expected, rtol=1e-6)
    assert_equal_to(gradient, expected_gradient, rtol=1e-6)


# The decoder: hooks, depth, modes, refusals


@pytest.mark.parametrize("chunk_size", [0, 1])
@pytest.mark.parametrize(
    "kind, num_blocks",
    [("AutoencoderKL", n) for n in (0, 2, 4)]
    + [(k, n) for k in ("AutoencoderDC", "AutoencoderTiny", *WITHOUT_FACTOR) for n in (1, 4)],
)
def test_the_forward_pass_stops_at_the_last_block_asked_for(kind, num_blocks, chunk_size):
    vae = build_tiny_vae(kind)
    blocks, depth = decoder_blocks(vae), num_blocks + hasattr(vae.decoder, "mid_block")
    kinds = (nn.Conv2d, nn.Conv3d)
    last_convolution = [module for module in vae.decoder.modules() if isinstance(module, kinds)][-1]
    wanted = [CallCounter(block) for block in blocks[:depth]]
    unwanted = [CallCounter(module) for module in (*blocks[depth:], last_convolution)]
    z0_hat, z0 = latents_of(vae, 2, dtype=torch.float32)
    lpl = lpl_of(vae, num_blocks=num_blocks, chunk_size=chunk_size)
    lpl(z0_hat.requires_grad_(), z0)[0].sum().backward()
    assert all(counter.calls >= 2 for counter in wanted)
    assert all(counter.calls == 0 for counter in unwanted)
    vae.decode(lpl.unscale(z0))
    assert all(counter.calls == 1 for counter in unwanted), "they must be what a decoding runs"


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_hooks_are_gone_after_a_call_and_after_an_exception(chunk_size):
    vae = build_tiny_vae()
    lpl = LatentPerceptualLoss(vae, chunk_size=chunk_size)
    z0_hat, z0 = latents(2, dtype=torch.float32)
    assert registered_hooks(vae) == 0
    expected = lpl(z0_hat.requires_grad_(), z0)[0]
    assert registered_hooks(vae) == 0

    def fail(*args):
        raise RuntimeError("out of memory, say")

    original = vae.decoder.up_blocks[1].forward
    vae.decoder.up_blocks[1].forward = fail
    with pytest.raises(RuntimeError, match="out of memory, say"):
        lpl(z0_hat, z0)
    assert registered_hooks(vae) == 0
    vae.decoder.up_blocks[1].forward = original
    torch.testing.assert_close(lpl(z0_hat, z0)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["AutoencoderKL", *WITHOUT_FACTOR])
def test_the_vae_works_as_before_after_the_loss(kind):
    vae = build_tiny_vae(kind)
    z0_hat, z0 = latents_of(vae, 1, dtype=torch.float32)
    lpl = lpl_of(vae)
    unscaled = lpl.unscale(z0)
    image = vae.decode(unscaled).sample.detach()
    posterior = vae.encode(image).latent_dist.parameters
    expected = value_and_gradient(lpl, z0_hat, z0)
    assert torch.equal(vae.decode(unscaled).sample, image)
    assert torch.equal(vae.encode(image).latent_dist.parameters, posterior)
    actual = value_and_gradient(lpl, z0_hat, z0)  # nor does the loss keep anything
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def qwen_image(dtype=torch.float32):
    """A VAE of videos, its LPL, and latents."""
    vae = build_tiny_vae("AutoencoderKLQwenImage").to(dtype)
    return vae, lpl_of(vae), latents_of(vae, 2, dtype=dtype)


def kept_tensors(module):
    """Names of what a module holds on to besides its parameters and buffers."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
        or isinstance(value, (list, tuple))
        and any(isinstance(item, torch.Tensor) for item in value)
    ]


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_a_decoder_of_videos_keeps_no_features_for_a_next_frame(chunk_size):
    vae, _, (z0_hat, z0) = qwen_image()
    lpl, held = lpl_of(vae, chunk_size=chunk_size), []
    with torch.no_grad():
        vae.clear_cache()
        caches = {"feat_cache": vae._feat_map, "feat_idx": [0]}
        vae.decoder(unscale_of(vae)(z0), **caches)
        assert kept_tensors(vae) == ["_feat_map"], "the decoder must be one that keeps features"
        vae.clear_cache()
    for block in decoder_blocks(vae):
        block.register_forward_hook(lambda *_: held.append(kept_tensors(vae)))
    lpl(z0_hat.requires_grad_(), z0)[0].sum().backward()
    assert len(held) >= 2 * 5 and not any(held)
    assert not [name for module in vae.modules() for name in kept_tensors(module)]
    assert "forward" not in vars(vae.decoder)


def test_the_features_of_a_decoder_of_videos_are_those_with_its_caches():
    vae, lpl, (z0_hat, _) = qwen_image(torch.float64)
    z0_hat.requires_grad_()
    ours, theirs = lpl.features(z0_hat), features_inside_decode(vae, z0_hat)
    assert [phi.shape for phi in ours] == [phi.shape for phi in theirs] and len(ours) == 5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    gradients = [torch.autograd.grad(sum(phi.square().mean() for phi in phis), z0_hat)[0] for phis in (ours, theirs)]
    assert_equal_to(*gradients, rtol=1e-12)


def test_a_decoder_of_videos_takes_the_memory_of_its_features_alone():
    vae, lpl, (z0_hat, _) = qwen_image()
    z0_hat.requires_grad_()

    def block_by_block(z):
        x = vae.decoder.conv_in(vae.post_quant_conv(unscale_of(vae)(z)))
        features = []
        for block in decoder_blocks(vae):
            x = block(x)
            features.append(x)
        return features

    bytes_of = {}
    for name, features in (
        ("ours", lpl.features),
        ("without caches", block_by_block),
        ("with caches", lambda z: features_inside_decode(vae, z)),
    ):
        with LiveBytes() as memory:
            kept = features(z0_hat)
        bytes_of[name] = memory.peak
        del kept
    latent_bytes = 4 * z0_hat.numel()
    assert bytes_of["ours"] <= bytes_of["without caches"] + 2 * latent_bytes  # `decode`'s callers hold some
    assert bytes_of["without caches"] < 0.95 * bytes_of["with caches"]


def test_a_block_whose_hook_does_not_fire_is_an_error():
    vae = build_tiny_vae()

    def forward_around_the_hook(sample, latent_embeds=None):
        sample = vae.decoder.mid_block(vae.decoder.conv_in(sample), latent_embeds)
        for l, up_block in enumerate(vae.decoder.up_blocks):
            sample = up_block.forward(sample) if l == 1 else up_block(sample)
        return sample

    vae.decoder.forward = forward_around_the_hook
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        LatentPerceptualLoss(vae)(*latents(2, dtype=torch.float32))


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderKLFlux2"])
def test_a_decoder_put_back_into_train_mode_is_used_in_eval_mode(kind, chunk_size):
    vae = vae64(kind=kind)
    z0_hat, z0 = latents_of(vae, 2)
    lpl = lpl_of(vae, chunk_size=chunk_size)
    expected = value_and_gradient(lpl, z0_hat, z0)
    statistics = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    assert statistics, "a decoder with batch norms"
    vae.train()
    actual = value_and_gradient(lpl, z0_hat, z0)
    assert_equal_to(actual[0], expected[0], rtol=1e-12)
    assert_equal_to(actual[1], expected[1], rtol=1e-12)
    assert not any(module.training for module in vae.modules())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in vae.named_buffers())


@pytest.mark.parametrize(
    "kind",
    ["AutoencoderKL", "AutoencoderKLFlux2", pytest.param("AutoencoderKLQwenImage", marks=pytest.mark.slow)],
)
def test_tiling_and_slicing_do_not_change_the_loss(kind):
    vae = vae64(kind=kind)
    z0_hat, z0 = latents_of(vae, 3, 12)
    lpl = lpl_of(vae, chunk_size=2)
    expected, image = value_and_gradient(lpl, z0_hat, z0), vae.decode(lpl.unscale(z0)).sample
    sides = {"min": 64, "stride": 48} if kind == "AutoencoderKLQwenImage" else {}  # the others' follow sample_size
    vae.enable_tiling(**{f"tile_sample_{n}_{d}": side for n, side in sides.items() for d in ("height", "width")})
    vae.enable_slicing()
    assert (vae.decode(lpl.unscale(z0)).sample - image).abs().max() > 1e-6, "tiles must be smaller than the image"
    actual = value_and_gradient(lpl_of(vae, chunk_size=2), z0_hat, z0)
    assert_equal_to(actual[0], expected[0])
    assert_equal_to(actual[1], expected[1])


class Noisy(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, latent_embeds=None):
        x = self.block(x, latent_embeds)
        return x + 0.1 * torch.randn_like(x)


class Stateful(Noisy):
    last = 0.0

    def forward(self, x, latent_embeds=None):
        x = self.block(x, latent_embeds) + self.last
        self.last = x.mean().detach()
        return x


@pytest.mark.parametrize("wrapper", [Noisy, Stateful])
def test_a_decoder_that_adds_noise_or_keeps_state_is_refused(wrapper):
    vae = build_tiny_vae()
    vae.decoder.up_blocks[1] = wrapper(vae.decoder.up_blocks[1])
    with pytest.raises(ValueError):
        LatentPerceptualLoss(vae)(*latents(2, dtype=torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": -1},
        {"normalization": "layer"},
        {"weighting": "linear"},
        {"reduction": "max"},
        {"outlier_source": "both"},
        {"chunk_size": -1},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError):
        LatentPerceptualLoss(build_tiny_vae(), **options)


@pytest.mark.parametrize(
    "build, num_blocks, message",
    [
        ({}, 5, "this AutoencoderKL has 4 up blocks, give 0 to 4"),
        ({"kind": "AutoencoderDC"}, 5, "this AutoencoderDC has 4 up blocks, give 1 to 4"),
        ({"kind": "AutoencoderDC", "decoder_layers_per_block": (0, 1, 1, 1)}, 4, "has 3 up blocks, give 1 to 3"),
        ({"kind": "AutoencoderTiny"}, 5, "this AutoencoderTiny has 4 up blocks, give 1 to 4"),
        ({"kind": "AutoencoderTiny"}, 0, "this AutoencoderTiny has 4 up blocks, give 1 to 4"),
        ({"kind": "AutoencoderKLQwenImage"}, 5, "this AutoencoderKLQwenImage has 4 up blocks, give 0 to 4"),
    ],
)
def test_more_blocks_than_there_are_or_none_are_refused_with_their_number(build, num_blocks, message):
    with pytest.raises(ValueError, match=message):
        lpl_of(build_tiny_vae(**build), num_blocks=num_blocks)


@pytest.mark.parametrize("kind", WITHOUT_FACTOR)
def test_a_vae_without_a_scaling_factor_needs_to_be_told_how_to_unscale(kind):
    message = f"{kind} has no scaling_factor: LPL needs to be told how to unscale latents"
    with pytest.raises(ValueError, match=message):
        LatentPerceptualLoss(build_tiny_vae(kind))


def test_a_vae_without_blocks_to_hook_is_refused():
    vae = build_tiny_vae()
    vae.decoder = nn.Conv2d(4, 3, 3)
    with pytest.raises(ValueError, match="AutoencoderKL has no decoder blocks"):
        LatentPerceptualLoss(vae)


class DecoderWithoutMidBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_blocks = nn.ModuleList([Same(), Up(), Up()])

    def forward(self, z):
        for block in self.up_blocks:
            z = block(z)
        return z


def test_a_decoder_without_a_mid_block_starts_with_its_first_up_block():
    vae = stub_vae(channels=2)
    vae.decoder = DecoderWithoutMidBlock()
    z0_hat, z0 = hand_case()
    loss, stats = LatentPerceptualLoss(vae, num_blocks=2)(z0_hat, z0)
    assert stats["block_loss"].shape == (1, 2)
    assert loss.item() == pytest.approx((1 + 1 / 2) * hand_loss((1, 9)), rel=1e-12)
    with pytest.raises(ValueError):
        LatentPerceptualLoss(vae, num_blocks=0)


class ReversedDecoder(nn.Module):
    """Runs its list of up blocks from the last to the first."""

    def __init__(self, *up_blocks):
        super().__init__()
        self.up_blocks = nn.ModuleList(up_blocks)

    def forward(self, z):
        for block in reversed(self.up_blocks):
            z = block(z)
        return z


def test_blocks_are_counted_in_the_order_in_which_they_run():
    vae, reverse = stub_vae(channels=2), stub_vae(channels=2)
    vae.decoder, reverse.decoder = DecoderWithoutMidBlock(), ReversedDecoder(Up(), Up(), Same())
    vae.decoder.up_blocks = nn.ModuleList([Same(), Up(), Up()])
    for num_blocks in (1, 2, 3):
        expected = LatentPerceptualLoss(vae, num_blocks=num_blocks)(*hand_case())[1]["block_loss"]
        actual = LatentPerceptualLoss(reverse, num_blocks=num_blocks)(*hand_case())[1]["block_loss"]
        assert actual.shape == (1, num_blocks) and torch.equal(actual, expected)
    assert LatentPerceptualLoss(reverse, num_blocks=3).omega.tolist() == [1, 1 / 2, 1 / 4]


@pytest.mark.parametrize("built", ["before", "after"])
def test_compiled_blocks_give_the_same_values_and_gradients(built):
    vae, (z0_hat, z0) = vae64(), latents(2)
    expected = value_and_gradient(LatentPerceptualLoss(vae, num_blocks=1, chunk_size=2), z0_hat, z0)
    lpl = LatentPerceptualLoss(vae, num_blocks=1, chunk_size=2)
    for block in (vae.decoder.mid_block, vae.decoder.up_blocks[0]):
        block.forward = torch.compile(block.forward, backend="aot_eager")
    if built == "after":
        lpl = LatentPerceptualLoss(vae, num_blocks=1, chunk_size=2)
    actual = value_and_gradient(lpl, z0_hat, z0)
    assert_equal_to(actual[0], expected[0])
    assert_equal_to(actual[1], expected[1])


@pytest.mark.parametrize(
    "kind, backend, recompute",
    [
        *itertools.product(["AutoencoderTiny"], ["aot_eager"], (False, True)),
        *(pytest.param("AutoencoderDC", "aot_eager", again, marks=pytest.mark.slow) for again in (False, True)),
        # aot_eager's backward pass of a group norm wants another layout than its forward pass gives
        ("AutoencoderKLFlux2", "eager", False),
        pytest.param("AutoencoderKLQwenImage", "eager", False, marks=pytest.mark.slow),
    ],
)
def test_every_hooked_block_is_compiled_on_request(kind, backend, recompute):
    vae = vae64(kind=kind)
    z0_hat, z0 = latents_of(vae, 2)
    expected = value_and_gradient(lpl_of(vae), z0_hat, z0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lpl = lpl_of(vae, gradient_checkpointing=recompute, compile_backend=backend)
    actual = value_and_gradient(lpl, z0_hat, z0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    rtol = 1e-5 if kind in ROUNDED else 1e-9
    assert_equal_to(actual[0], expected[0], rtol)
    assert_equal_to(actual[1], expected[1], rtol)
    torch._dynamo.reset()


# The term that the training scripts add

GATED = [0, 2, 3]  # of five samples, tau = 3


def gated_batch():
    alpha = torch.tensor([0.9, 0.1, 0.8, 0.5, 0.0])
    sigma = (1 - alpha**2).sqrt()
    assert sigma_gate(alpha, sigma, 3.0).nonzero().flatten().tolist() == GATED
    return alpha, sigma


def cheap_lpl(z0_hat, z0):
    """In the place of the decoder: the loss of sample i is the mean of its estimate."""
    loss = z0_hat.flatten(1).mean(1)
    return loss, {"block_loss": loss.detach()[:, None]}


def cheap_term(max_samples, seed=None):
    """lpl_term on samples whose losses are 1, 2, 4, 8, 16: the sum tells which ones were decoded."""
    alpha, sigma = gated_batch()
    z0 = torch.zeros(5, 1, 2, 2, dtype=torch.float64)
    model_pred = (2.0 ** torch.arange(5, dtype=torch.float64)).view(5, 1, 1, 1).expand(5, 1, 2, 2).clone()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loss, stats = lpl_term(
        cheap_lpl, model_pred.requires_grad_(), z0, z0, alpha, sigma, "sample", 3.0, max_samples, generator
    )
    return loss, stats, model_pred


@pytest.mark.parametrize("max_samples", [0, -1, 1.5])
def test_a_bound_that_is_no_number_of_samples_is_refused(max_samples):
    with pytest.raises(ValueError, match="max_samples"):
        cheap_term(max_samples)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_term_is_the_sum_over_gated_samples_over_the_whole_batch(prediction_type):
    vae = vae64()
    alpha, sigma = (x.double() for x in gated_batch())
    if prediction_type == "flow":
        alpha, sigma = 1 - sigma**2, sigma**2
    gate = sigma <= 3.0 * alpha
    assert 0 < gate.sum() < 5
    generator = torch.Generator().manual_seed(0)
    model_pred, z_t, z0 = (torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    model_pred.requires_grad_()
    lpl = LatentPerceptualLoss(vae)
    loss, stats = lpl_term(lpl, model_pred, z_t, z0, alpha, sigma, prediction_type, 3.0)
    (gradient,) = torch.autograd.grad(loss, model_pred)

    z0_hat = predict_z0(model_pred[gate], z_t[gate], alpha[gate], sigma[gate], prediction_type)
    values, reference_stats = reference_lpl(vae, z0_hat, z0[gate])
    expected = values.sum() / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_equal_to(gradient, torch.autograd.grad(expected, model_pred)[0])
    assert gradient[~gate].abs().max() == 0
    assert isinstance(stats["gated_share"], float)
    assert stats["gated_share"] == gate.sum().item() / 5
    torch.testing.assert_close(stats["block_loss"].double(), reference_stats["block_loss"], rtol=1e-6, atol=0)


def test_samples_with_alpha_0_leak_nothing_through_the_gate():
    vae = build_tiny_vae()
    alpha, sigma = torch.tensor([0.0, 0.9]), torch.tensor([1.0, 0.19**0.5])
    z0_hat, z0 = latents(2, dtype=torch.float32)
    model_pred = z0_hat.clone()
    model_pred[0] = torch.inf
    model_pred.requires_grad_()
    loss, _ = lpl_term(LatentPerceptualLoss(vae), model_pred, z0, z0, alpha, sigma, "epsilon", 3.0)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert model_pred.grad.isfinite().all()
    assert model_pred.grad[0].abs().max() == 0 and model_pred.grad[1].norm() > 0


@pytest.mark.parametrize("max_samples", [None, 2, 0.5])
def test_a_batch_without_gated_samples_gives_a_differentiable_zero(max_samples):
    z0_hat, z0 = latents(3, dtype=torch.float32)
    z0_hat.requires_grad_()
    alpha, sigma = torch.zeros(3), torch.ones(3)
    lpl = LatentPerceptualLoss(build_tiny_vae())
    loss, stats = lpl_term(lpl, z0_hat, z0, z0, alpha, sigma, "epsilon", 3.0, max_samples)
    assert loss.shape == () and loss.item() == 0
    assert stats["gated_share"] == 0.0
    loss.backward()
    assert z0_hat.grad is not None and z0_hat.grad.abs().max() == 0


def test_without_a_bound_every_gated_sample_counts():
    loss, stats, _ = cheap_term(None)
    assert loss.item() == pytest.approx((1 + 4 + 8) / 5, rel=1e-6)
    assert stats["gated_share"] == 0.6
    assert stats["block_loss"].flatten().tolist() == pytest.approx([1, 4, 8])


@pytest.mark.parametrize("max_samples", [1, 2, 3, 7])
def test_a_number_of_samples_is_drawn_uniformly_and_unbiased(max_samples):
    k = min(3, max_samples)
    subsets = list(itertools.combinations((1.0, 4.0, 8.0), k))
    outcomes = [sum(subset) * (3 / k) / 5 for subset in subsets]
    # If each subset is equally likely, the expectation is exactly the unbounded term.
    assert sum(outcomes) / len(outcomes) == pytest.approx((1 + 4 + 8) / 5)
    draws, counts = 600, [0] * len(outcomes)
    for seed in range(draws):
        loss, stats, _ = cheap_term(max_samples, seed)
        (i,) = [i for i, outcome in enumerate(outcomes) if loss.item() == pytest.approx(outcome, rel=1e-6)]
        counts[i] += 1
        assert sorted(stats["block_loss"].flatten().tolist()) == pytest.approx(subsets[i])
        assert stats["gated_share"] == 0.6
    p = 1 / len(outcomes)
    assert all(abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p)) for count in counts)


@pytest.mark.parametrize("max_samples", [0.25, 0.6])
def test_a_share_of_samples_is_drawn_independently_and_unbiased(max_samples):
    subsets = [s for size in range(4) for s in itertools.combinations((1.0, 4.0, 8.0), size)]
    outcomes = [sum(subset) / max_samples / 5 for subset in subsets]
    likelihoods = [max_samples ** len(s) * (1 - max_samples) ** (3 - len(s)) for s in subsets]
    assert sum(p * outcome for p, outcome in zip(likelihoods, outcomes)) == pytest.approx((1 + 4 + 8) / 5)
    draws, counts = 800, [0] * len(outcomes)
    for seed in range(draws):
        loss, stats, _ = cheap_term(max_samples, seed)
        (i,) = [i for i, o in enumerate(outcomes) if loss.item() == pytest.approx(o, rel=1e-6, abs=1e-12)]
        counts[i] += 1
        assert len(stats["block_loss"]) == len(subsets[i])
    for count, p in zip(counts, likelihoods):
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize("max_samples", [2, 0.6])
def test_the_gradient_of_a_bounded_term_carries_the_same_weight(max_samples):
    for seed in range(20):
        loss, _, model_pred = cheap_term(max_samples, seed)
        loss.backward()
        # The loss is linear in the predictions, so their product with the gradient is the loss itself.
        assert (model_pred.grad * model_pred).sum().item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-12)
        weight = 3 / 2 if max_samples == 2 else 1 / max_samples
        per_sample = model_pred.grad.flatten(1).sum(1)
        assert set(per_sample.round(decimals=6).tolist()) <= {0.0, round(weight / 5, 6)}


@pytest.mark.parametrize("max_samples", [2, 0.5])
def test_the_choice_follows_the_generator_and_leaves_the_global_one_alone(max_samples):
    state = torch.get_rng_state()
    first = [cheap_term(max_samples, seed)[0].item() for seed in range(10)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [cheap_term(max_samples, seed)[0].item() for seed in range(10)] == first
    assert len(set(first)) > 1


# Calibration and diagnostics


def test_calibration_balances_the_layers_and_gives_lpl_the_share_asked_for():
    lpl = LatentPerceptualLoss(vae64(), weighting="balanced")
    batches = []
    for seed in range(3):
        z0_hat, z0 = latents(3, seed=seed)
        alpha = torch.tensor([0.9, 0.1, 0.8] if seed else [0.1, 0.1, 0.1])  # nothing passes in the first batch
        batches.append((lpl, z0_hat, z0, z0, alpha, (1 - alpha**2).sqrt(), "sample", 3.0))
    diffusion_losses = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    measurements = [(loss, lpl_term(*batch)[1]) for loss, batch in zip(diffusion_losses, batches)]
    calibrate(lpl, measurements, target_share=0.2)

    terms, layers = 0.0, 0.0
    for batch in batches:
        loss, stats = lpl_term(*batch)
        terms += loss.item()
        layers = layers + (lpl.omega * stats["block_loss"]).sum(0)
    torch.testing.assert_close(layers, layers[:1].expand(5), rtol=1e-9, atol=0)
    added = lpl.weight * terms
    assert added / (added + diffusion_losses.sum().item()) == pytest.approx(0.2, rel=1e-9)

    restored = LatentPerceptualLoss(lpl.vae, weighting="balanced")
    restored.load_state_dict(lpl.state_dict())
    assert restored.weight == lpl.weight and torch.equal(restored.omega, lpl.omega)


def test_calibration_without_any_gated_sample_is_refused():
    lpl = LatentPerceptualLoss(build_tiny_vae())
    z0_hat, z0 = latents(2, dtype=torch.float32)
    _, stats = lpl_term(lpl, z0_hat, z0, z0, torch.zeros(2), torch.ones(2), "sample", 3.0)
    with pytest.raises(ValueError):
        calibrate(lpl, [(torch.tensor(1.0), stats)], target_share=0.2)


def test_gradient_norms_and_cosine_by_hand():
    model_pred = torch.tensor([3.0, 4.0], requires_grad=True)
    # Gradients (3, 4) and (5, 0): norms 5 and 5, cosine 15 / 25.
    first, second = model_pred.square().sum() / 2, 5 * model_pred[0]
    norms = compare_gradients(model_pred, first, second)
    assert norms["grad_norm_diffusion"].item() == pytest.approx(5)
    assert norms["grad_norm_lpl"].item() == pytest.approx(5)
    assert norms["grad_cosine"].item() == pytest.approx(0.6)
    (first + second).backward()  # the graph is still there
    assert model_pred.grad.tolist() == [8.0, 4.0]
