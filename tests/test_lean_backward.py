"""Frozen layers that keep less for the backward pass: the same numbers, and how many bytes they keep."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_tiny_vae
from torch import nn
from torch.utils.checkpoint import checkpoint

from counters import LiveBytes, count_flops
from lean_backward import lean_backward
from lpl_utils import LatentPerceptualLoss


def value_and_gradient(network, x, lean):
    x = x.clone().requires_grad_()
    with lean_backward(lean):
        y = network(x)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    return y.detach(), gradient


class Odd(nn.Module):
    """Everything that must be left alone, or be seen through."""

    def __init__(self):
        super().__init__()
        self.norm, self.plain = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, affine=False)
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=1, groups=2, bias=False)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.volume = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        y = self.norm(x)
        x = F.silu(y) + y  # the norm's output is used twice
        x = self.same(F.silu(self.plain(x))) * F.silu(x)
        x = self.reflected(F.silu(self.norm(x).mul_(2).add_(1), inplace=True))
        return self.strided(self.volume(x.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("frozen", [True, False])
def test_value_and_gradients_are_those_of_autograd(frozen):
    torch.manual_seed(0)
    network, x = Odd().double().requires_grad_(not frozen), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for actual, expected in zip(*(value_and_gradient(network, x, lean) for lean in (True, False))):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_weights_that_are_trained_still_get_their_gradients():
    torch.manual_seed(0)
    network, x = Odd().double(), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    for p in network.norm.parameters():
        p.requires_grad_(False)
    found = []
    for lean in (True, False):
        network.zero_grad()
        with lean_backward(lean):
            y = network(x)
        y.sin().sum().backward()
        found.append([p.grad for p in network.parameters() if p.requires_grad])
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def kept_bytes(network, x, lean):
    """Bytes alive after a forward pass that its result does not account for."""
    with LiveBytes() as memory:
        x = x.clone().requires_grad_()
        with lean_backward(lean):
            y = network(x)
        return memory.live - y.nbytes - x.nbytes


def test_of_norm_silu_and_convolution_one_map_is_kept_instead_of_three():
    layers = [layer for _ in range(5) for layer in (nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))]
    network, x = nn.Sequential(*layers).requires_grad_(False), torch.randn(1, 4, 32, 32)
    statistics = 2 * 2 * 4  # mean and deviation of two groups, of each norm
    assert kept_bytes(network, x, lean=False) == 14 * x.nbytes + 5 * statistics  # 3 a layer, x being there anyway
    assert kept_bytes(network, x, lean=True) == 4 * x.nbytes + 5 * statistics


def test_a_checkpoint_recomputes_leanly_and_no_last_convolution():
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 1))
    block.requires_grad_(False).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def checkpointed(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (lean_backward(False), lean_backward()))

    torch.testing.assert_close(value_and_gradient(checkpointed, x, True), value_and_gradient(block, x, False))
    first, last = 2 * 2 * 64 * 4 * 4 * 9, 2 * 2 * 64 * 4 * 4
    # Forward and backward of both; of the forward pass again only what the second SiLU needs.
    assert count_flops(lambda: value_and_gradient(checkpointed, x, True)) == 2 * (first + last) + first


def test_nothing_happens_without_gradients_or_if_switched_off():
    x = torch.randn(1, 4, 8, 8)
    conv = nn.Conv2d(4, 4, 3).requires_grad_(False)
    with torch.no_grad(), lean_backward():
        assert conv(x).grad_fn is None
    with lean_backward(False):
        assert conv(x.requires_grad_()).grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AsymmetricAutoencoderKL"])
def test_the_streamed_loss_needs_less_memory_and_no_more_arithmetic_than_autograd_for_one_sample(kind):
    torch.manual_seed(0)
    vae = build_tiny_vae(kind)
    z0, z0_hat = torch.randn(2, 1, 4, 16, 16)
    peaks, flops = [], []
    for chunk_size in (0, 1):
        lpl = LatentPerceptualLoss(vae, chunk_size=chunk_size)

        def term(lpl=lpl):
            lpl(z0_hat.clone().requires_grad_(), z0)[0].sum().backward()

        term()
        with LiveBytes() as memory:
            term()
        peaks.append(memory.peak)
        flops.append(count_flops(term))
    assert peaks[1] < 0.65 * peaks[0]
    assert flops[1] == flops[0]
