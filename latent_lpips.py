"""E-LatentLPIPS: a perceptual distance between latents (Kang et al., 2024, "Distilling Diffusion Models into
Conditional GANs", Sec. 3.2), without a decoder.

    LatentVGG            the network: VGG-16 with batch norm on scaled latents
    load_latent_lpips    one that was published, or that train_latent_classifier.py made
    stage_distance       LPIPS between the features of one stage
    augment              one random transformation for both latents of a pair

Shapes: B batch, C latent channels, h x w latent positions, C_l the channels of stage l.
"""

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from arguments import UserError, first_line
from latent_lpips_files import CHANNELS, FLAG, REMEDY, check_class, find_network, scaling_of
from loading import load
from model_checks import latent_channels


CONVOLUTIONS = (2, 2, 3, 3, 3)  # of the stages
KINDS = ("blit", "geometric", "color", "cutout")
INFINITY = float("inf")
# What reading a damaged file, or one of another kind, raises
BROKEN = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
BROKEN += (pickle.UnpicklingError, SafetensorError)


class LatentVGG(ModelMixin, ConfigMixin):
    """VGG-16 with batch norm whose first three poolings are left out, as latents are small already (Kang et al.).

    Args:
        in_channels: C.
        channels: C_l of the five stages.
        num_classes: of the classifier that `forward` is; None for none.
        scaling_factor, shift_factor: of the latents that it was trained on, (encoded - shift) * scaling; a number, or
            a list of one for each channel.

    The weights of LPIPS's comparison ("lin"), `[C_l]` each, are the buffers `weight_0` ... `weight_4`: ones, unless
    they were calibrated on people's judgements. Batch norm must use its statistics in a loss: call `eval()`.
    """

    @register_to_config
    def __init__(self, in_channels=4, channels=CHANNELS, num_classes=None, scaling_factor=None, shift_factor=None):
        super().__init__()
        widths = (in_channels, *channels)
        self.stages = nn.ModuleList(map(_stage, widths, channels, CONVOLUTIONS))
        for l, width in enumerate(channels):
            self.register_buffer(f"weight_{l}", torch.ones(width))
        self.classifier = None if num_classes is None else nn.Linear(channels[-1], num_classes)

    @property
    def weights(self):
        return [getattr(self, f"weight_{l}") for l in range(len(self.stages))]

    def features(self, latents):
        """Scaled latents `[B, C, h, w]` -> the outputs of the stages, `[B, C_l, h, w]`, the last two pooled:

        `[B, C_4, h // 2, w // 2]` and `[B, C_5, h // 4, w // 4]`. What a pooling would leave nothing of, a side of one
        position, stays as it is, so that the smallest latents can be compared, too.
        """
        found, x = [], latents
        for l, stage in enumerate(self.stages):
            x = stage(x)
            if l >= 3:
                x = F.max_pool2d(x, [min(2, side) for side in x.shape[-2:]])
            found.append(x)
        return found

    def forward(self, latents):
        """Scaled latents `[B, C, h, w]` -> logits `[B, num_classes]`."""
        return self.classifier(self.features(latents)[-1].mean((2, 3)))


def _stage(width_in, width, convolutions):
    layers = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        width_in = width
    return nn.Sequential(*layers)


# The distance


def stage_distance(phi_hat, phi, weight):
    """LPIPS of one stage (Zhang et al., 2018, Eq. 1): features `[B, C_l, h, w]` twice, weight `[C_l]` -> `[B]`.

    Both are divided, position by position, by their length over channels; the squared difference, weighted by channel,
    is summed over them, and its mean taken over positions; all in at least float32. A feature vector that is zero
    stays zero, and gets no gradient.
    """
    difference = _unit(phi_hat) - _unit(phi)
    return (difference.square() * weight.to(difference).view(1, -1, 1, 1)).sum(1).mean((1, 2))


def _unit(x):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (length + 1e-10).masked_fill(length == 0, INFINITY)


def latent_lpips(network, z_hat, z):
    """The distance of scaled latents `[B, C, h, w]`, summed over the network's stages -> `[B]`."""
    stages = zip(network.features(z_hat), network.features(z), network.weights)
    return sum(stage_distance(phi_hat, phi, weight) for phi_hat, phi, weight in stages)


# Ensembling


def augment(pair, kinds, generators):
    """One random transformation per sample, the same for both latents of a pair (the E of E-LatentLPIPS).

    Those of ADA (Karras et al., 2020, App. B) and, for colours, of DiffAugment (Zhao et al., 2020), all of which are
    applied every time, as Kang et al. do. All geometry is one bilinear sampling, with reflections beyond the border,
    and without the filter against aliasing of the original.

    Args:
        pair: two tensors `[B, C, h, w]`.
        kinds: a set of
            "blit": mirroring, turns by multiples of 90 degrees, shifts by whole positions, up to 1/8 of the side;
            "geometric": scales 2^N(0, 0.2^2), isotropic and anisotropic, rotations, shifts by N(0, 0.125^2) sides;
            "color": brightness +-0.5, saturation (about the mean over channels) x 0 ... 2, contrast (about the mean
                of the sample) x 0.5 ... 1.5;
            "cutout": a rectangle of half the sides, anywhere, is zero.
        generators: B torch.Generator of the CPU, or None.

    Returns the pair of the same shape, differentiable; what is not square is turned within its shape. Without kinds
        the pair itself.
    """
    if not kinds:
        return pair
    pair = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in pair]
    size = pair[0].shape[-2:]
    uniform, normal = _random_numbers(generators or [None] * len(pair[0]))
    if {"blit", "geometric"} & set(kinds):
        pair = _move(pair, _geometry(kinds, size, uniform[:6], normal))
    if "color" in kinds:
        pair = [_recolor(z, *(u.to(z, non_blocking=True).view(-1, 1, 1, 1) for u in uniform[6:9])) for z in pair]
    if "cutout" in kinds:
        kept = _outside(size, *uniform[9:11]).to(pair[0], non_blocking=True)
        pair = [z * kept for z in pair]
    return tuple(pair)


def _random_numbers(generators):
    """11 uniform and 4 normal ones, `[B]` each: as many, whatever the kinds."""
    uniform = torch.stack([torch.rand(11, generator=generator) for generator in generators])
    normal = torch.stack([torch.randn(4, generator=generator) for generator in generators])
    return uniform.unbind(1), normal.unbind(1)


def _geometry(kinds, size, uniform, normal):
    """Where each position of the result comes from, `[B, 3, 3]`: (x, y, 1) in positions from the centre."""
    mirror, turn, shift_x, shift_y, before, after = uniform
    height, width = size
    come_from = torch.eye(3).expand(len(mirror), 3, 3)
    if "blit" in kinds:
        steps = [((2 * u - 1) / 8 * side).round() for u, side in ((shift_x, width), (shift_y, height))]
        come_from = come_from @ _scale(1 - 2 * (mirror < 0.5).float(), torch.ones_like(mirror))
        come_from = come_from @ _rotation((4 * turn).floor() * torch.pi / 2) @ _shift(*steps)
    if "geometric" in kinds:
        isotropic, anisotropic = (torch.exp2(0.2 * n) for n in normal[:2])
        come_from = come_from @ _scale(isotropic, isotropic) @ _rotation(2 * torch.pi * before)
        come_from = come_from @ _scale(anisotropic, 1 / anisotropic) @ _rotation(2 * torch.pi * after)
        come_from = come_from @ _shift(normal[2] / 8 * width, normal[3] / 8 * height)
    return come_from


def _matrix(*entries):
    """Two rows of three numbers or `[B]` each -> `[B, 3, 3]`."""
    like = next(entry for entry in entries if torch.is_tensor(entry))
    rows = torch.stack([torch.as_tensor(entry).expand_as(like) for entry in (*entries, 0, 0, 1)], dim=1)
    return rows.view(-1, 3, 3)


def _scale(x, y):
    return _matrix(x, 0, 0, 0, y, 0)


def _rotation(angle):
    return _matrix(angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0)


def _shift(x, y):
    return _matrix(1, 0, x, 0, 1, y)


def _move(pair, come_from):
    height, width = pair[0].shape[-2:]
    half = torch.tensor([width / 2, height / 2, 1])  # grid_sample goes from -1 to 1 along each side
    theta = (come_from * half / half.view(3, 1))[:, :2].to(pair[0], non_blocking=True)
    both = torch.cat(pair, dim=1)
    grid = F.affine_grid(theta, both.shape, align_corners=False)
    return F.grid_sample(both, grid, padding_mode="reflection", align_corners=False).chunk(2, dim=1)


def _recolor(z, brightness, saturation, contrast):
    z = z + brightness - 0.5
    grey = z.mean(1, keepdim=True)
    z = grey + (z - grey) * 2 * saturation
    mean = z.mean((1, 2, 3), keepdim=True)
    return mean + (z - mean) * (0.5 + contrast)


def _outside(size, x, y):
    """1 outside of the rectangle around (x, y), in sides, and 0 inside: `[B, 1, h, w]`."""
    height, width = ((torch.arange(side) + 0.5) / side for side in size)
    inside_y = (height - y.view(-1, 1)).abs() < 0.25
    inside_x = (width - x.view(-1, 1)).abs() < 0.25
    return ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])


# Loading


def load_latent_lpips(name, vae_config, cache_dir=None, flag=FLAG):
    """A `LatentVGG` for the latents of a VAE: float32, frozen, in eval mode. Raises UserError if it does not fit.

    Args:
        name: a Hub id or folder of a saved `LatentVGG`; or a file as Kang et al. publish theirs, also as
            owner/name/path/in/repository.pth; or their repository itself, `PUBLISHED`, which has one for several VAEs.
        vae_config: of the loaded VAE.
    """
    found = find_network(name, vae_config, cache_dir, flag)
    if isinstance(found, Path):
        network = _read_published(found, vae_config, flag)
    else:
        check_class(load(LatentVGG, found, flag, "load_config", cache_dir=cache_dir), name, flag)
        settings = {"cache_dir": cache_dir, "output_loading_info": True}
        network, info = load(LatentVGG, found, flag, **settings)
        if info["missing_keys"]:
            raise UserError(f"{flag} {name} lacks weights such as {min(info['missing_keys'])}: {REMEDY}.")
    _check_fit(network.config, vae_config, name, flag)
    if not all(values.isfinite().all() for values in network.state_dict().values()):
        raise UserError(f"{flag} {name} has weights that are not finite: {REMEDY}.")
    return network.float().requires_grad_(False).eval()


def _check_fit(config, vae_config, name, flag):
    channels = latent_channels(vae_config)
    if config.in_channels != channels:
        raise UserError(
            f"{flag} {name} is for latents of {config.in_channels} channels, the VAE's have {channels}: {REMEDY}."
        )
    for kind, ours, theirs in zip(
        ("scaling_factor", "shift_factor"), (config.scaling_factor, config.shift_factor), scaling_of(vae_config)
    ):
        ours, theirs = (torch.as_tensor(value, dtype=torch.float64).expand(channels) for value in (ours or 0, theirs))
        if not torch.allclose(ours, theirs):
            given = ", ".join(f"{value:g}" for value in ours.unique()[:3].tolist())
            raise UserError(
                f"{flag} {name} was trained on another VAE's latents, with a {kind} of {given}, not of "
                f"{theirs[0].item():g}: {REMEDY}."
            )


def _read_published(path, vae_config, flag):
    """The network of a file of Kang et al., which is that of torchvision's vgg16_bn, cut into slices."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = dict(filter(None, (_translate(key, value) for key, value in state.items())))
        channels = [state[f"stages.{l}.0.weight"].shape[0] for l in range(len(CONVOLUTIONS))]
        factor, shift = scaling_of(vae_config)
        network = LatentVGG(state["stages.0.0.weight"].shape[1], channels, None, factor, shift)
        expected = network.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in expected or key not in state or expected[key].shape != state[key].shape:
                raise ValueError(f"unexpected or missing: {key}")
    except BROKEN as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{flag} {path} can't be read as a network for latents ({reason}): {REMEDY}.") from error
    network.load_state_dict(state)
    return network


STARTS = (0, 7, 14, 24, 34)  # of the slices, among vgg16_bn's features


def _translate(key, value):
    """Key and value in `LatentVGG`, None for what is there twice. Raises ValueError."""
    if found := re.fullmatch(r"net\.slice([1-5])\.(\d+)\.(\w+)", key):
        l, index, name = int(found[1]) - 1, int(found[2]), found[3]
        return f"stages.{l}.{index - STARTS[l]}.{name}", value
    if found := re.fullmatch(r"lin([0-4])\.model\.1\.weight", key):
        return f"weight_{found[1]}", value.flatten()
    if re.fullmatch(r"lins\.[0-4]\.model\.1\.weight", key):
        return None
    raise ValueError(f"unexpected: {key}")
