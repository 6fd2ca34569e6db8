"""The distance between latents against formulas and layers written out here; files, folders and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from arguments import UserError
from latent_lpips import KINDS, LatentVGG, augment, latent_lpips, load_latent_lpips, stage_distance
from latent_lpips_files import PUBLISHED, check_latent_lpips, published_for


CHANNELS = (6, 8, 8, 10, 10)
SD_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}


def build_network(seed=0, **settings):
    """A random network whose batch norms have statistics that no batch has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LatentVGG(**{"channels": CHANNELS, "scaling_factor": 0.18215, "shift_factor": 0.0, **settings})
        for name, values in network.named_buffers():
            if name.endswith(("running_var", *(f"weight_{l}" for l in range(5)))):
                values.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                values.normal_(0, 0.3)
    return network.eval()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    build_network(num_classes=3).save_pretrained(folder)
    return folder


# The distance


def test_one_stage_is_the_formula_of_lpips():
    phi_hat, phi, weight = draw(2, 3, 4, 5, seed=1), draw(2, 3, 4, 5, seed=2), torch.tensor([0.5, 2.0, 0.0])
    expected = []
    for x, y in zip(phi_hat.double(), phi.double()):
        total = 0.0
        for i in range(4):
            for j in range(5):
                a, b = x[:, i, j] / x[:, i, j].pow(2).sum().sqrt(), y[:, i, j] / y[:, i, j].pow(2).sum().sqrt()
                total += sum(w * (p - q) ** 2 for w, p, q in zip(weight.tolist(), a.tolist(), b.tolist()))
        expected.append(total / 20)
    assert stage_distance(phi_hat, phi, weight).tolist() == pytest.approx(expected, rel=1e-5)


def test_half_precision_features_are_compared_in_float32():
    phi_hat, phi = draw(2, 8, 6, 6, seed=1).bfloat16(), draw(2, 8, 6, 6, seed=2).bfloat16()
    found = stage_distance(phi_hat, phi, torch.ones(8))
    assert found.dtype == torch.float32
    assert torch.equal(found, stage_distance(phi_hat.float(), phi.float(), torch.ones(8)))


def test_a_dead_feature_vector_counts_as_zero_and_gets_no_gradient():
    phi_hat, phi = draw(1, 3, 1, 2, seed=1), draw(1, 3, 1, 2, seed=2)
    phi_hat[..., 0] = 0
    phi_hat.requires_grad_()
    distance = stage_distance(phi_hat, phi, torch.ones(3))
    distance.sum().backward()
    unit = [F.normalize(x[0, :, 0, 1], dim=0) for x in (phi_hat, phi)]
    assert distance.item() == pytest.approx((1 + (unit[0] - unit[1]).square().sum().item()) / 2, rel=1e-5)
    assert torch.equal(phi_hat.grad[..., 0], torch.zeros(1, 3, 1))
    assert phi_hat.grad[..., 1].abs().max() > 0


def test_the_distance_is_the_sum_over_stages_with_their_weights_and_zero_for_the_same_latents():
    network, z_hat, z = build_network(), draw(2, 4, 8, 8, seed=1), draw(2, 4, 8, 8, seed=2)
    expected = torch.zeros(2)
    for l, (a, b) in enumerate(zip(network.features(z_hat), network.features(z))):
        squares = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        expected += torch.einsum("bchw,c->b", squares, getattr(network, f"weight_{l}")) / squares[0, 0].numel()
    assert torch.allclose(latent_lpips(network, z_hat, z), expected, rtol=1e-4)
    assert torch.equal(latent_lpips(network, z, z), torch.zeros(2))


def test_its_gradient_is_that_of_finite_differences():
    network = build_network(seed=3).double()
    z_hat, z = draw(1, 4, 8, 8, seed=1, dtype=torch.float64), draw(1, 4, 8, 8, seed=2, dtype=torch.float64)
    z_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(latent_lpips(network, z_hat, z).sum(), z_hat)
    for seed in range(3):
        direction = F.normalize(draw(1, 4, 8, 8, seed=10 + seed, dtype=torch.float64).flatten(), dim=0).view_as(z)
        with torch.no_grad():
            ends = [latent_lpips(network, z_hat + step * direction, z).item() for step in (1e-6, -1e-6)]
        assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_the_smallest_latents_can_be_compared(side):
    z_hat = draw(2, 4, side, side, seed=1).requires_grad_()
    latent_lpips(build_network(), z_hat, draw(2, 4, side, side, seed=2)).sum().backward()
    assert z_hat.grad.isfinite().all() and z_hat.grad.abs().amax((1, 2, 3)).min() > 0


# The files of Kang et al.


def build_published(seed=0, in_channels=4, prefix=""):
    """Keys and values as in the published files, and the network as plain layers that end with each stage."""
    generator, state, slices, index, width_in = torch.Generator().manual_seed(seed), {}, [], 0, in_channels
    for s, (width, convolutions) in enumerate(zip(CHANNELS, (2, 2, 3, 3, 3)), start=1):
        layers = []
        for _ in range(convolutions):
            pair = nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width)
            for values in (*pair[0].parameters(), *pair[1].parameters(), pair[1].running_mean):
                values.data.normal_(0, 0.3, generator=generator)
            pair[1].running_var.uniform_(0.5, 2, generator=generator)
            for offset, layer in enumerate(pair):
                names = layer.state_dict().items()
                state |= {f"{prefix}net.slice{s}.{index + offset}.{name}": value for name, value in names}
            layers += [*pair, nn.ReLU()]
            index, width_in = index + 3, width
        layers.append(nn.MaxPool2d(2) if s > 3 else nn.Identity())
        index += 1
        slices.append(nn.Sequential(*layers).eval())
        lin = torch.rand(1, width, 1, 1, generator=generator)
        state |= {f"{prefix}lin{s - 1}.model.1.weight": lin, f"{prefix}lins.{s - 1}.model.1.weight": lin}
    return state, slices


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix, prefix", [(".pth", ""), (".pth", "module."), (".safetensors", "")])
def test_a_published_file_gives_the_features_of_vgg16_bn_without_its_first_three_poolings(tmp_path, suffix, prefix):
    state, slices = build_published(prefix=prefix)
    assert f"{prefix}net.slice5.41.running_var" in state, "vgg16_bn's last batch norm is its feature 41"
    network = load_latent_lpips(save(state, tmp_path / f"net{suffix}"), SD_VAE)
    x = z = draw(2, 4, 12, 8)
    for l, (stage, found) in enumerate(zip(slices, network.features(z), strict=True)):
        x = stage(x)
        assert torch.allclose(found, x, atol=1e-5) and x.abs().max() > 0.01
        assert torch.equal(network.weights[l], state[f"{prefix}lin{l}.model.1.weight"].flatten())
    assert x.shape == (2, 10, 3, 2)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert (network.config.scaling_factor, network.config.shift_factor) == (0.18215, 0.0)


PUBLISHED_VAES = {
    "sd15": SD_VAE,
    "sdxl": {**SD_VAE, "scaling_factor": 0.13025},
    "sd3": {**SD_VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {**SD_VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}


def test_of_the_published_ones_the_vae_chooses(tmp_path):
    for seed, (kind, vae_config) in enumerate(PUBLISHED_VAES.items()):
        state, _ = build_published(seed, in_channels=vae_config["latent_channels"])
        save(state, tmp_path / "elatentlpips_ckpt" / f"{kind}_latest_vgg16_tuned.pth")
    for seed, (kind, vae_config) in enumerate(PUBLISHED_VAES.items()):
        assert published_for(vae_config) == f"elatentlpips_ckpt/{kind}_latest_vgg16_tuned.pth"
        network = load_latent_lpips(str(tmp_path), vae_config)
        expected, _ = build_published(seed, in_channels=vae_config["latent_channels"])
        assert torch.equal(network.weight_4, expected["lin4.model.1.weight"].flatten())


# Folders


def test_a_saved_network_comes_back_with_its_weights_frozen(saved):
    network, expected, z = load_latent_lpips(str(saved), SD_VAE), build_network(num_classes=3), draw(2, 4, 8, 8)
    assert torch.equal(network(z), expected(z))
    assert all(map(torch.equal, network.weights, expected.weights))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network.config.scaling_factor == 0.18215


def test_scales_of_single_channels_must_be_those_of_the_vae(tmp_path):
    mean, std = [0.1, -0.2, 0.3], [2.0, 0.5, 4.0]
    vae_config = {"_class_name": "AutoencoderKLQwenImage", "z_dim": 3, "latents_mean": mean, "latents_std": std}
    build_network(in_channels=3, scaling_factor=[0.5, 2.0, 0.25], shift_factor=mean).save_pretrained(tmp_path)
    assert load_latent_lpips(str(tmp_path), vae_config).config.scaling_factor == [0.5, 2.0, 0.25]
    with pytest.raises(UserError, match="scaling_factor of 0.25, 0.5, 2, not"):
        load_latent_lpips(str(tmp_path), {**vae_config, "latents_std": [2.0, 0.5, 3.0]})
    with pytest.raises(UserError, match="shift_factor"):
        load_latent_lpips(str(tmp_path), {**vae_config, "latents_mean": [0.1, -0.2, 0.0]})


# What is refused


@pytest.mark.parametrize(
    "vae_config, what",
    [
        ({**SD_VAE, "latent_channels": 16}, "for latents of 4 channels, the VAE's have 16"),
        ({**SD_VAE, "scaling_factor": 0.13025}, "a scaling_factor of 0.18215, not of 0.13025"),
        ({**SD_VAE, "shift_factor": 0.5}, "a shift_factor of 0, not of 0.5"),
        ({"_class_name": "AutoencoderKLFlux2", "latent_channels": 4}, "neither a scaling_factor nor latents_mean"),
    ],
)
def test_a_network_for_other_latents_is_refused(saved, vae_config, what):
    with pytest.raises(UserError, match=what):
        load_latent_lpips(str(saved), vae_config)


@pytest.mark.parametrize(
    "vae_config, what",
    [
        ({**SD_VAE, "scaling_factor": 0.5}, "latents of 4 channels, scaling_factor 0.5, shift_factor 0.0"),
        ({**SD_VAE, "latent_channels": 16, "scaling_factor": 0.3611}, "scaling_factor 0.3611, shift_factor 0.0"),
        ({"z_dim": 1, "latents_mean": [0.0], "latents_std": [1.0]}, "a scale for each"),
    ],
)
def test_for_another_vae_nothing_is_published_and_one_is_trained(vae_config, what):
    with pytest.raises(UserError, match=f"--my_flag {PUBLISHED} .*{what}.*train_latent_classifier.py"):
        load_latent_lpips(PUBLISHED, vae_config, flag="--my_flag")


@pytest.mark.parametrize("name", [PUBLISHED, "owner/name", "owner/name/deep/net.pth"])
def test_what_the_hub_does_not_give_is_one_sentence(tmp_path, name):
    check_latent_lpips(name)
    with pytest.raises(UserError, match=f"--e_latent_lpips_model.*{name.split('/')[1]}.* can't be"):
        load_latent_lpips(name, SD_VAE, cache_dir=str(tmp_path))


def damaged(tmp_path):
    """Kind of damage -> the file's path."""
    good, _ = build_published()
    some = next(iter(good))
    changed = {
        "a key too many": good | {"head.weight": torch.ones(1)},
        "a layer too many": good | {"net.slice1.9.weight": torch.ones(1)},
        "a key missing": {key: value for key, value in good.items() if key != "net.slice3.15.running_mean"},
        "another shape": good | {"net.slice2.7.weight": torch.ones(8, 6, 1, 1)},
        "not finite": good | {some: torch.full_like(good[some], torch.nan)},
        "no tensors": {key: 1 for key in good},
        "no dict": [1, 2],
    }
    paths = {kind: save(state, tmp_path / f"{i}.pth") for i, (kind, state) in enumerate(changed.items())}
    whole = open(save(good, tmp_path / "whole.pth"), "rb").read()
    for kind, content in {"cut": whole[: len(whole) // 2], "empty": b"", "other": b"hello"}.items():
        tmp_path.joinpath(f"{kind}.pth").write_bytes(content)
        tmp_path.joinpath(f"{kind}.safetensors").write_bytes(content)
        paths |= {f"{kind} {suffix}": str(tmp_path / f"{kind}.{suffix}") for suffix in ("pth", "safetensors")}
    return paths


def test_a_damaged_file_or_one_of_another_format_is_one_sentence_that_names_it(tmp_path):
    paths = damaged(tmp_path)
    assert len(paths) == 13
    for kind, path in paths.items():
        with pytest.raises(UserError) as error:
            load_latent_lpips(path, SD_VAE)
        message = str(error.value)
        assert message.startswith(f"--e_latent_lpips_model {path} ") and "\n" not in message, kind
        assert "train_latent_classifier.py" in message, kind


def test_a_folder_that_is_cut_or_damaged_is_refused(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    weights = (saved / "diffusion_pytorch_model.safetensors").read_bytes()
    fewer = load_file(saved / "diffusion_pytorch_model.safetensors")
    del fewer["stages.0.0.weight"]
    for name, prepare in {
        "no weights": lambda path: None,
        "cut": lambda path: path.write_bytes(weights[:1000]),
        "fewer": lambda path: save_file(fewer, path, metadata={"format": "pt"}),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        prepare(folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match=f"--e_latent_lpips_model {folder} (can't be loaded|lacks)"):
            load_latent_lpips(str(folder), SD_VAE)


@pytest.mark.parametrize(
    "name, what",
    [
        ("./nowhere", "there is no"),
        ("/nowhere/net.pth", "there is no"),
        ("nowhere.pth", "no file, no folder and no Hub id"),
        ("folder/nowhere.pth", "no file, no folder and no Hub id"),
        ("nowhere", "no file, no folder and no Hub id"),
        ("", "is empty"),
        ("{tmp}/empty", "holds no network"),
        ("{tmp}/unet", "is a UNet2DConditionModel and no network"),
        ("{tmp}/broken", "can't be read"),
        ("{tmp}/net.txt", "is no .pth or .safetensors file"),
    ],
)
def test_a_name_that_can_not_be_right_is_refused_without_loading_anything(tmp_path, monkeypatch, name, what):
    monkeypatch.chdir(tmp_path)
    for folder, config in (("empty", None), ("unet", '{"_class_name": "UNet2DConditionModel"}'), ("broken", "{")):
        tmp_path.joinpath(folder).mkdir()
        if config:
            tmp_path.joinpath(folder, "config.json").write_text(config)
    tmp_path.joinpath("net.txt").write_text("")
    with pytest.raises(UserError, match=f"^--my_flag.*{what}.*train_latent_classifier.py"):
        check_latent_lpips(name.format(tmp=tmp_path), "--my_flag")


def test_what_exists_or_may_be_on_the_hub_passes(saved, tmp_path):
    tmp_path.joinpath("net.pth").touch()
    for name in (PUBLISHED, "owner/name", "owner/name/net.safetensors", str(saved), str(tmp_path / "net.pth")):
        check_latent_lpips(name)


# Ensembling


NAMES = "mirror turn shift_x shift_y before after brightness saturation contrast cut_x cut_y".split()
NEUTRAL = {**dict.fromkeys(NAMES, 0.5), "mirror": 0.9, "turn": 0.0, "before": 0.0, "after": 0.0}


@pytest.fixture
def transform(monkeypatch):
    """`augment` of a pair for which chance gives these numbers; by default they change nothing."""

    def run(pair, kind, normal=(0, 0, 0, 0), **uniform):
        numbers = [torch.tensor([value]) for value in (NEUTRAL | uniform).values()], torch.tensor(normal).view(4, 1)
        monkeypatch.setattr("latent_lpips._random_numbers", lambda generators: numbers)
        return augment(pair, {kind}, None)

    return run


def test_without_kinds_the_pair_comes_back_as_it_is():
    pair = draw(2, 4, 8, 8, seed=1), draw(2, 4, 8, 8, seed=2)
    assert augment(pair, set(), None) is pair


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("kinds", [*({kind} for kind in KINDS), set(KINDS)], ids=[*KINDS, "all"])
def test_a_pair_is_transformed_alike_and_each_sample_by_its_own_generator(kinds):
    z = draw(3, 4, 12, 8)
    first, second = augment((z, z.clone()), kinds, generators(1, 2, 3))
    assert torch.equal(first, second) and first.shape == z.shape
    assert not torch.allclose(first, z, atol=0.05)
    alone = augment((z[1:2], z[1:2]), kinds, generators(2))[0]
    assert torch.allclose(alone, first[1:2], atol=1e-6)
    assert not torch.allclose(augment((z[1:2], z[1:2]), kinds, generators(3))[0], alone, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_numbers_leave_the_latents_but_for_the_cut(transform, kind):
    z = draw(1, 4, 12, 8)
    expected = z.clone()
    if kind == "cutout":
        expected[..., 3:9, 2:6] = 0
    assert torch.allclose(transform((z, z), kind)[0], expected, atol=1e-5)


def test_blit_is_flip_turn_and_shift(transform):
    z = draw(1, 4, 16, 16)
    assert torch.allclose(transform((z, z), "blit", mirror=0.1)[0], z.flip(3), atol=1e-5)
    turned = [transform((z, z), "blit", turn=turn)[0] for turn in (0.3, 0.6, 0.9)]
    turns = [k for found in turned for k in range(4) if torch.allclose(found, z.rot90(k, (2, 3)), atol=1e-4)]
    assert sorted(turns) == [1, 2, 3]
    shifted = transform((z, z), "blit", shift_x=0.99, shift_y=0.2)[0]  # 2 and -1 positions of 16, or the reverse
    by = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if is_shifted(shifted, z, y, x)]
    assert by in ([(1, -2)], [(-1, 2)])


def is_shifted(found, z, y, x):
    inner = (..., slice(3, -3), slice(3, -3))
    return torch.allclose(found[inner], z.roll((y, x), (2, 3))[inner], atol=1e-4)


def test_what_is_not_square_is_turned_by_positions_within_its_shape(transform):
    z = draw(1, 2, 8, 12)
    found = transform((z, z), "blit", turn=0.3)[0]
    assert found.shape == z.shape
    middle = z[..., 2:-2]
    assert any(torch.allclose(found[..., 2:-2], middle.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3))


def test_geometric_scales_by_powers_of_two_and_shifts_by_parts_of_the_sides(transform):
    ramp = torch.arange(32.0).expand(1, 1, 16, 32)  # linear in x: bilinear sampling is exact inside
    middle = (slice(None), slice(None), slice(6, 10), slice(12, 20))
    x = ramp[middle] - 15.5
    for normal, expected in (
        ([5.0, 0, 0, 0], 2 * x),
        ([-5.0, 0, 0, 0], x / 2),
        ([0, 5.0, 0, 0], 2 * x),
        ([0, 0, 0.5, 0], x + 2),  # 0.5 x 1/8 of 32 positions
        ([0, 0, 0, 0.5], x),
    ):
        found = transform((ramp, ramp), "geometric", [float(n) for n in normal])[0][middle] - 15.5
        assert torch.allclose(found, expected, atol=1e-3), normal
    tall = ramp.mT
    found = transform((tall, tall), "geometric", [0.0, 5.0, 0.0, 0.0])[0].mT[middle] - 15.5
    assert torch.allclose(found, x / 2, atol=1e-3), "anisotropic: what is stretched along x shrinks along y"


def test_both_rotations_of_geometric_are_parts_of_a_whole_turn(transform):
    z = draw(1, 2, 8, 8)
    found = transform((z, z), "geometric", [0.0] * 4, before=0.15, after=0.1)[0]
    assert any(torch.allclose(found, z.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3))


def test_color_changes_brightness_saturation_and_contrast_about_each_ones_own_mean(transform):
    pair = draw(1, 3, 4, 4, seed=1) + 1, draw(1, 3, 4, 4, seed=2) - 1
    for found, z in zip(transform(pair, "color", brightness=0.75), pair):
        assert torch.allclose(found, z + 0.25, atol=1e-5)
    for found, z in zip(transform(pair, "color", saturation=0.0), pair):
        assert torch.allclose(found, z.mean(1, keepdim=True).expand_as(z), atol=1e-5)
    for found, z in zip(transform(pair, "color", contrast=1.0), pair):
        assert torch.allclose(found - z.mean(), 1.5 * (z - z.mean()), atol=1e-5)


def test_augmentation_hands_gradients_back_to_where_values_come_from(transform):
    z, weights = draw(1, 4, 8, 8).requires_grad_(), draw(1, 4, 8, 8, seed=1)
    (weights * transform((z, z.detach()), "blit", mirror=0.1)[0]).sum().backward()
    assert torch.allclose(z.grad, weights.flip(3), atol=1e-5)


def test_the_gradient_of_all_kinds_together_is_that_of_finite_differences():
    z = draw(1, 2, 6, 6, dtype=torch.float64).requires_grad_()

    def first(z):
        return augment((z, z.detach()), set(KINDS), [torch.Generator().manual_seed(3)])[0]

    assert torch.autograd.gradcheck(first, z)
