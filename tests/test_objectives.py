"""The objectives that LPL is compared with, against plain re-implementations on stock models."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from reference_objectives import (
    predicted,
    reference_late_weight,
    reference_latent_lpips,
    reference_self_perceptual,
)
from tiny_models import build_tiny_sd

import train_lpl_dit
import train_lpl_sd
from counters import LiveBytes
from data_utils import build_dataloader, make_stream
from latent_lpips import LatentVGG, augment
from loss_terms import make_objectives
from model_families import find_family
from noise import sample_noise, training_target
from objectives import (
    RGB,
    ELatentLPIPS,
    LateReweighting,
    Prediction,
    SelfPerceptual,
    gated_losses,
    min_snr_weight,
    predict_eps,
    rows,
)
from train_utils import sample_generators


ALONE = Namespace(distributed_type=DistributedType.NO, reduce=lambda sums, reduction: sums)
TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLOW = ("StableDiffusion3", "QwenImage", "Sana")  # with a shift; of videos, with statistics; another architecture
SP = ("--self_perceptual_weight", 1, "--lpl_weight", 0)
LORA = ("--use_lora", "--rank", 2)


def levels(timesteps):
    abar = SCHEDULER.alphas_cumprod[timesteps]
    return abar.sqrt(), (1 - abar).sqrt()


@pytest.fixture(scope="module")
def load(tiny_sd, tiny_pipeline, photos, tmp_path_factory):
    """A prediction type of Stable Diffusion, its kind of VAE or one of FLOW; flags -> script, args, family."""
    built = {"epsilon": tiny_sd}

    def run(kind, *words):
        if kind in FLOW:
            built[kind] = tiny_pipeline(kind)
        elif kind not in built:
            settings = {"prediction_type": kind} if kind in TYPES else {"vae_kind": kind}
            built[kind] = build_tiny_sd(tmp_path_factory.mktemp("model") / kind, **settings)
        script = train_lpl_dit if kind in FLOW else train_lpl_sd
        flags = ["--pretrained_model_name_or_path", built[kind], "--train_data_dir", photos, "--resolution", 64]
        flags += ["--seed", 3, "--output_dir", tmp_path_factory.mktemp("out"), *words]
        args = script.parse_args([str(word) for word in flags])
        return script, args, find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)

    return run


def batch_of(args, size=3):
    return next(build_dataloader(make_stream(args), size))


def move(family):
    """The trained weights leave those that training began with."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in family.trained_parameters:
            p += 0.1 * torch.randn(p.shape, generator=generator)


# Self-perceptual


def noised(kind, args, family, batch):
    """What a training step makes of a batch, from the seed alone: latents, noise, alpha and sigma, timesteps."""
    timesteps = family.sample_timesteps(sample_generators(args.seed, batch["positions"], purpose=0))
    generators = sample_generators(args.seed, batch["positions"], purpose=1)
    with torch.no_grad():
        latents = family.latents(batch, generators)
    return latents, sample_noise(latents, generators), *schedule(kind, timesteps), timesteps


def schedule(kind, timesteps):
    """alpha and sigma of the tiny models' schedulers."""
    return (1 - timesteps / 1000, timesteps / 1000) if kind == "StableDiffusion3" else levels(timesteps)


def uniform_timesteps(kind, args, batch):
    """t' from the samples' generators: each of a thousand levels alike, which SD3's shift of 3 moves towards noise."""
    generators = sample_generators(args.seed, batch["positions"], purpose=2)
    index = torch.cat([torch.randint(1000, (1,), generator=generator) for generator in generators])
    s = (index + 1) / 1000
    return 1000 * 3 * s / (1 + 2 * s) if kind == "StableDiffusion3" else index


def caller(kind, family, batch):
    """(denoiser, noisy latents, timesteps, numbers of the samples) -> its output, by its own signature."""
    with torch.no_grad():
        encoded = family.encode_prompts(batch["captions"])

    def call(denoiser, noisy, timesteps, samples):
        texts = encoded["prompt_embeds"][samples]
        more = {}
        if kind == "StableDiffusion3":
            more = {"pooled_projections": encoded["pooled_prompt_embeds"][samples]}
        return denoiser(noisy, timestep=timesteps, encoder_hidden_states=texts, **more).sample

    return call


def reference_losses(kind, args, family, batch, layers, **settings):
    """`[B]`, with a gradient in the trained weights; the frozen model is a fresh load of the base."""
    latents, noise, alpha, sigma, timesteps = noised(kind, args, family, batch)
    call, everything = caller(kind, family, batch), slice(None)
    z_t = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
    model_pred = call(family.denoiser, z_t, timesteps, everything)
    prediction_type = "flow_prediction" if kind == "StableDiffusion3" else kind
    z0_hat, eps_hat = predicted(model_pred, z_t, alpha, sigma, prediction_type)
    stock = family.denoiser_class.from_pretrained(args.pretrained_model_name_or_path, subfolder=family.denoiser_name)
    stock.eval().requires_grad_(False)
    t_new = uniform_timesteps(kind, args, batch)
    return reference_self_perceptual(
        lambda noisy, i: call(stock, noisy, t_new[i : i + 1], slice(i, i + 1)),
        [stock.get_submodule(layer) for layer in layers],
        *(latents, noise, z0_hat, eps_hat, schedule(kind, t_new)),
        **settings,
    )


def gradients(loss, family):
    grads = torch.autograd.grad(loss, family.trained_parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(family.trained_parameters, grads)])  # fmt: skip


def assert_near(found, expected, rel=1e-4):
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= rel * expected.abs().max()


MID, FIRST = ("mid_block",), ("transformer_blocks.0",)
CASES = {
    "epsilon": ("epsilon", (), MID, {}),
    "v": ("v_prediction", (), MID, {}),
    "sample": ("sample", (), MID, {}),
    "flow": ("StableDiffusion3", (), FIRST, {}),
    "in pairs": ("epsilon", ("--lpl_chunk_size", 2), MID, {}),
    "all at once": ("StableDiffusion3", ("--lpl_chunk_size", 0), FIRST, {}),
    "l1": ("epsilon", ("--sp_distance", "l1"), MID, {"l1": True}),
    "split": ("v_prediction", ("--sp_formulation", "split"), MID, {"formulation": "split"}),
    "split flow": ("StableDiffusion3", ("--sp_formulation", "split"), FIRST, {"formulation": "split"}),
    "layers": ("epsilon", ("--sp_layers", "mid", "encoder", "up1"),
               ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"), {}),
    "flow layers": ("StableDiffusion3", ("--sp_layers", 2, 1), ("transformer_blocks.0", "transformer_blocks.1"), {}),
    "LoRA": ("epsilon", LORA, MID, {}),
    "flow LoRA": ("StableDiffusion3", LORA, FIRST, {}),
    "checkpointed LoRA": ("StableDiffusion3", (*LORA, "--gradient_checkpointing"), FIRST, {}),
    "checkpointed": ("epsilon", ("--gradient_checkpointing",), MID, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind, words, layers, settings", CASES.values(), ids=CASES)
def test_self_perceptual_is_algorithm_1_of_its_paper_also_in_its_gradients(load, kind, words, layers, settings):
    script, args, family = load(kind, *SP, *words)
    objectives, batch = make_objectives(ALONE, args, family), batch_of(args)
    move(family)
    family.model.train()
    forward = script.training_step(args, family, family.model, None, batch, objectives=objectives)
    expected = reference_losses(kind, args, family, batch, layers, **settings)
    torch.testing.assert_close(forward.sample_losses["self_perceptual"], expected, rtol=1e-4, atol=0)
    (loss,) = forward.objective_losses.values()
    assert_near(gradients(loss, family), gradients(expected.mean(), family))


@pytest.mark.parametrize("words", [(), LORA], ids=["full", "LoRA"])
def test_what_is_trained_moves_and_what_it_is_compared_in_does_not(load, words):
    script, args, family = load("epsilon", *SP, *words)
    objectives, batch = make_objectives(ALONE, args, family), batch_of(args)
    optimizer = torch.optim.Adam(family.trained_parameters, lr=0.02)
    before = reference_losses("epsilon", args, family, batch, MID).detach()
    for _ in range(3):
        forward = script.training_step(args, family, family.model, None, batch, objectives=objectives)
        sum(forward.objective_losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    forward = script.training_step(args, family, family.model, None, batch, objectives=objectives)
    after = reference_losses("epsilon", args, family, batch, MID).detach()
    assert ((after - before).abs() > 0.05 * before).all()
    torch.testing.assert_close(forward.sample_losses["self_perceptual"], after, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "StableDiffusion3"])
def test_at_the_sample_s_own_timestep_the_joint_form_vanishes_and_the_split_form_does_not(load, kind, monkeypatch):
    monkeypatch.setattr(SelfPerceptual, "draw", lambda self, t, generators: t)
    losses = []
    for formulation in ("joint", "split"):
        script, args, family = load(kind, *SP, "--sp_formulation", formulation)
        objectives, batch = make_objectives(ALONE, args, family), batch_of(args, size=6)
        with torch.no_grad():
            forward = script.training_step(args, family, family.model, None, batch, objectives=objectives)
        losses.append(forward.sample_losses["self_perceptual"])
    joint, split = losses
    assert (split > 1e-9).all() and (joint <= 1e-5 * split).all()


def new_self_perceptual(timestep, T=1000, step=1):
    return SelfPerceptual(Namespace(modules=[]), torch.arange(T) * step, None, timestep=timestep)


def test_uniform_timesteps_are_drawn_from_the_whole_schedule_whatever_the_sample_s():
    draws = new_self_perceptual("uniform", T=5).draw(torch.full((5000,), 4), sample_generators(0, range(5000), 2))
    counts = np.bincount(draws.numpy(), minlength=5)
    assert len(counts) == 5 and abs(counts / 5000 - 0.2).max() < 0.03


def test_near_timesteps_are_40_away_on_either_side_and_clamped():
    objective = new_self_perceptual("near")
    draws = objective.draw(torch.full((2000,), 500), sample_generators(0, range(2000), 2))
    assert set(draws.tolist()) == {460, 540} and abs((draws == 540).float().mean() - 0.5) < 0.05
    assert set(objective.draw(torch.full((50,), 10), None).tolist()) == {0, 50}
    assert set(objective.draw(torch.full((50,), 980), None).tolist()) == {940, 999}
    shifted = SelfPerceptual(Namespace(modules=[]), torch.linspace(0.3, 1000, 500), None, timestep="near")
    found = shifted.draw(shifted.timesteps[[100] * 50], None)  # of half as many levels it is half as many
    assert set(found.tolist()) == set(shifted.timesteps[[80, 120]].tolist())


def test_normal_timesteps_have_a_deviation_of_100_and_are_clamped():
    objective = new_self_perceptual("normal")
    draws = objective.draw(torch.full((4000,), 500), sample_generators(0, range(4000), 2)).double()
    assert abs(draws.mean() - 500) < 6 and abs(draws.std() - 100) < 4
    within = [((draws - 500).abs() <= limit).double().mean().item() for limit in (100, 200)]
    assert within == pytest.approx([0.683, 0.954], abs=0.02)
    clamped = objective.draw(torch.full((2000,), 999), sample_generators(0, range(2000), 2))
    assert clamped.max() == 999 and abs((clamped == 999).float().mean() - 0.5) < 0.05


def prediction_of(args, family, batch, kind):
    """A wrong prediction of a batch, z0_hat and eps_hat being leaves."""
    latents, noise, alpha, sigma, timesteps = noised(kind, args, family, batch)
    generator = torch.Generator().manual_seed(4)
    wrong = [x + 0.5 * torch.randn(x.shape, generator=generator) for x in (latents, noise)]
    with torch.no_grad():
        conditioning = family.conditioning(batch)
    z0_hat, eps_hat = (x.requires_grad_() for x in wrong)
    return Prediction(z0_hat, latents, eps_hat, noise, alpha, sigma, timesteps, conditioning)


@pytest.mark.parametrize("kind", ["epsilon", "StableDiffusion3"])
def test_every_sample_is_compared_under_its_own_conditioning(load, kind):
    _, args, family = load(kind, *SP, "--lpl_chunk_size", 2)
    objective = make_objectives(ALONE, args, family).terms["self_perceptual"]
    batch = batch_of(args)
    p, order = prediction_of(args, family, batch, kind), torch.tensor([2, 0, 1])
    t_new = torch.tensor([100, 400, 700]) if kind == "epsilon" else family.timesteps[[100, 400, 700]]
    objective.draw = lambda t, generators: t_new
    with torch.no_grad():
        losses = objective(p)
        other_texts = objective(replace(p, conditioning=rows(p.conditioning, order)))
        objective.draw = lambda t, generators: t_new[order]
        permuted = objective(p.take(order))
    torch.testing.assert_close(permuted, losses[order], rtol=1e-4, atol=0)
    assert ((other_texts - losses).abs() > 1e-3 * losses).all()


def test_rows_of_whatever_a_conditioning_holds():
    values = {"text": torch.arange(3), "nested": {"ids": torch.arange(6).view(3, 2)}, "ragged": ["a", "b", "c"]}
    for index, expected in ((torch.tensor([2, 0, 2]), [2, 0, 2]), (slice(1, 3), [1, 2]), (slice(None), [0, 1, 2])):
        found = rows(values, index)
        assert found["text"].tolist() == expected and found["ragged"] == ["abc"[i] for i in expected]
        assert found["nested"]["ids"].tolist() == [[2 * i, 2 * i + 1] for i in expected]


# What a prediction implies


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_true_target_implies_the_true_noise_and_any_prediction_the_noisy_latents(prediction_type):
    generator = torch.Generator().manual_seed(0)
    z0, eps, wrong = torch.randn(3, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.6, 0.97], dtype=torch.float64)
    alpha = 1 - sigma if prediction_type == "flow_prediction" else (1 - sigma**2).sqrt()
    z_t = alpha.view(-1, 1, 1, 1) * z0 + sigma.view(-1, 1, 1, 1) * eps
    target = training_target(z0, eps, alpha, sigma, prediction_type)
    torch.testing.assert_close(predict_eps(target, z_t, alpha, sigma, prediction_type), eps)
    p = Prediction.of(target + wrong, z_t, z0, eps, torch.arange(3), alpha, sigma, prediction_type, {})
    torch.testing.assert_close(alpha.view(-1, 1, 1, 1) * p.z0_hat + sigma.view(-1, 1, 1, 1) * p.eps_hat, z_t)
    assert (p.eps_hat - eps).abs().max() > 0.01
    expected = predicted(target + wrong, z_t, alpha, sigma, prediction_type)
    torch.testing.assert_close((p.z0_hat, p.eps_hat), expected)


@pytest.mark.parametrize("prediction_type", TYPES[1:])
def test_without_a_signal_all_is_noise_and_the_latents_are_what_the_model_makes_up(prediction_type):
    z0, eps, wrong = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    target = training_target(z0, eps, alpha, sigma, prediction_type)
    p = Prediction.of(target + wrong, eps, z0, eps, torch.arange(2), alpha, sigma, prediction_type, {})
    torch.testing.assert_close((p.z0_hat, p.eps_hat), (z0 + (wrong if prediction_type == "sample" else -wrong), eps))


# E-LatentLPIPS and RGB


@pytest.fixture(scope="module")
def network():
    """A small classifier whose statistics no batch has."""
    generator = torch.Generator().manual_seed(0)
    network = LatentVGG(4, (6, 6, 8, 8, 8))
    for name, value in network.state_dict().items():
        if "running" in name or name.startswith("weight_"):
            value.uniform_(0.3, 1.5, generator=generator)
        elif value.dtype.is_floating_point:
            value.normal_(0, 0.3, generator=generator)
    return network.requires_grad_(False).eval()


def latents_of(size=3, channels=4, side=8):
    """Two latents of which one is a leaf, and generators for the samples."""
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(size, channels, side, side, generator=generator)
    z0_hat = z0 + 0.4 * torch.randn(z0.shape, generator=generator)
    return z0_hat.requires_grad_(), z0, sample_generators(0, range(size), 2)


def plain(z0_hat, z0):
    """A Prediction of which an objective reads the latents alone."""
    some = torch.full((len(z0),), 0.5)
    return Prediction(z0_hat, z0, z0_hat, z0, some, some, some, {})


@pytest.mark.parametrize("chunk_size", [1, 2, 0])
def test_e_latent_lpips_is_plain_lpips_in_the_network_s_features(network, chunk_size):
    z0_hat, z0, generators = latents_of()
    found = ELatentLPIPS(network.train(), chunk_size=chunk_size)(plain(z0_hat, z0), generators)
    expected = reference_latent_lpips(network.eval(), z0_hat, z0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    weights = torch.tensor([1.0, -2.0, 3.0])
    grads = [torch.autograd.grad((losses * weights).sum(), z0_hat)[0] for losses in (found, expected)]
    assert_near(*grads)


@pytest.mark.parametrize("kinds", [("blit",), ("geometric", "cutout"), ("blit", "color")])
def test_augmentations_are_the_same_on_both_sides_and_drawn_anew_by_each_sample(network, kinds):
    z0_hat, z0, _ = latents_of()
    objective = ELatentLPIPS(network, kinds)
    draw = lambda: sample_generators(0, range(3), 2)  # noqa: E731
    assert (objective(plain(z0.clone().requires_grad_(), z0), draw()) == 0).all()
    found = objective(plain(z0_hat, z0), draw())
    expected = reference_latent_lpips(network, *augment((z0_hat, z0), kinds, draw()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_near(*(torch.autograd.grad(losses.sum(), z0_hat)[0] for losses in (found, expected)))
    unaugmented = ELatentLPIPS(network)(plain(z0_hat, z0))
    assert ((found - unaugmented).abs() > 1e-3 * unaugmented).any()


VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")


def stock_images(vae, z):
    """Scaled latents -> images, by the config of each kind of VAE."""
    config = vae.config
    if config.get("latents_mean"):
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return vae.decode((z * std + mean).unsqueeze(2)).sample.squeeze(2)
    return vae.decode(z / config.scaling_factor + (config.get("shift_factor") or 0)).sample


@pytest.mark.parametrize("kind", VAES + FLOW)
def test_rgb_is_the_squared_error_of_what_the_stock_vae_decodes(load, kind):
    _, args, family = load(kind, "--rgb_weight", 1, "--lpl_weight", 0)
    objective = make_objectives(ALONE, args, family).terms["rgb"]
    stock = type(family.vae).from_pretrained(args.pretrained_model_name_or_path, subfolder="vae").eval()
    z0_hat, z0, _ = latents_of(2, channels=stock.config.get("z_dim") or stock.config.latent_channels)
    found = objective(plain(z0_hat, z0))
    expected = (stock_images(stock, z0_hat) - stock_images(stock, z0)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_near(*(torch.autograd.grad(losses.sum(), z0_hat)[0] for losses in (found, expected)))
    assert all(p.grad is None for p in family.vae.parameters())


def test_rgb_keeps_less_than_the_stock_decoder_leaves_to_autograd(load):
    _, args, family = load("epsilon", "--rgb_weight", 1, "--lpl_weight", 0)
    lean = make_objectives(ALONE, args, family).terms["rgb"]
    peaks = []
    for objective in (lean, RGB(lambda z: family.vae.decode(family.unscale(z)).sample)):
        z0_hat, z0, _ = latents_of(1)
        with LiveBytes() as memory:
            objective(plain(z0_hat, z0)).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] < 0.6 * peaks[1]


def test_the_gradient_of_rgb_is_that_of_finite_differences(load):
    _, args, family = load("epsilon", "--rgb_weight", 1, "--lpl_weight", 0)
    vae, (z0_hat, z0, _) = family.vae.double(), latents_of(2)
    objective = RGB(lambda z: vae.decode(family.unscale(z)).sample)
    z0_hat, z0 = z0_hat.detach().double().requires_grad_(), z0.double()
    (gradient,) = torch.autograd.grad(objective(plain(z0_hat, z0)).sum(), z0_hat)
    step = 1e-3 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (stock_images(vae, z0_hat + s * step) for s in (1, -1))
        image = stock_images(vae, z0)
        change = ((ahead - image).square().mean((1, 2, 3)) - (behind - image).square().mean((1, 2, 3))).sum() / 2
    assert (gradient * step).sum().item() == pytest.approx(change.item(), rel=1e-3)


@pytest.mark.parametrize("kind", VAES + FLOW)
def test_the_error_of_clean_latents_is_their_mean_square(load, kind):
    _, args, family = load(kind, "--clean_latent_weight", 1, "--lpl_weight", 0)
    z0_hat, z0, _ = latents_of(2, channels=4)
    found = make_objectives(ALONE, args, family).terms["clean_latent"](plain(z0_hat, z0))
    expected = [((a - b) ** 2).mean() for a, b in zip(z0_hat.detach().numpy(), z0.numpy())]
    assert found.tolist() == pytest.approx(expected)


def test_a_vae_that_decodes_in_slices_and_tiles_still_does_afterwards(load):
    _, args, family = load("epsilon", "--rgb_weight", 1, "--lpl_weight", 0)
    objective = make_objectives(ALONE, args, family).terms["rgb"]
    family.vae.enable_slicing(), family.vae.enable_tiling()
    z0_hat, z0, _ = latents_of(2)
    objective(plain(z0_hat, z0)).sum().backward()
    assert family.vae.use_slicing and family.vae.use_tiling and z0_hat.grad.any()


# The gate


class Cubes:
    """An objective whose gradient is not that of its mean: sum (z0_hat - z0)^3 + eps_hat, and a number drawn."""

    def __call__(self, p, generators):
        assert len(p.z0) == len(generators) == len(p.conditioning["rows"])
        drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return ((p.z0_hat - p.z0) ** 3).sum((1, 2, 3)) + (drawn.view(-1, 1, 1, 1) * p.eps_hat).sum((1, 2, 3))


def gate_case(spoil=False):
    z0_hat, z0, _ = latents_of(5)
    passing = torch.tensor([True, False, True, False, False])
    if spoil:
        z0_hat = torch.where(passing.view(-1, 1, 1, 1), z0_hat, torch.inf).detach().requires_grad_()
    eps_hat = torch.randn(z0.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    some = torch.full((5,), 0.5)
    p = Prediction(z0_hat, z0, eps_hat, z0, some, some, some, {"rows": list(range(5))})
    return p, passing


@pytest.mark.parametrize("size", [None, 5, 8, 2])
@pytest.mark.parametrize("spoil", [False, True])
def test_samples_outside_the_gate_count_as_zero_and_leak_nothing(size, spoil):
    p, passing = gate_case(spoil)
    if size == 2:
        p, passing = p.take(slice(2)), passing[:2]
    generators = lambda: sample_generators(7, range(len(passing)), 2)  # noqa: E731
    found = gated_losses(Cubes(), p, passing, generators(), size)
    index = passing.nonzero().flatten()
    expected = Cubes()(p.take(index), [generators()[i] for i in index])
    assert (found[~passing] == 0).all()
    torch.testing.assert_close(found[passing], expected)
    inputs = (p.z0_hat, p.eps_hat)
    grads, wanted = (torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(grads, wanted)
    assert (grads[0][~passing] == 0).all() and grads[0][passing].any()


@pytest.mark.parametrize("size", [None, 5])
def test_where_no_sample_passes_the_loss_is_zero_and_so_is_its_gradient(size):
    p, passing = gate_case(spoil=True)
    found = gated_losses(Cubes(), p, torch.zeros_like(passing), sample_generators(7, range(5), 2), size)
    assert found.tolist() == [0] * 5
    for grad in torch.autograd.grad(found.sum() + 0 * p.eps_hat.sum(), (p.z0_hat, p.eps_hat), allow_unused=True):
        assert grad is None or not grad.any()


@pytest.mark.parametrize("passing", [[False, True], [False, False]])
@pytest.mark.parametrize("size", [None, 2])
def test_what_cannot_be_predicted_without_a_signal_does_not_reach_the_model(passing, size):
    model_pred = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, z0, generators = latents_of(2)
    alpha, sigma = torch.tensor([0.0, 0.8]), torch.tensor([1.0, 0.6])
    conditioning = {"rows": [0, 1]}
    p = Prediction.of(model_pred, z0, z0, z0, torch.arange(2), alpha, sigma, "epsilon", conditioning)
    losses = gated_losses(Cubes(), p, torch.tensor(passing), generators, size)
    (losses.sum() + 0 * model_pred.sum()).backward()
    assert losses.isfinite().all() and model_pred.grad.isfinite().all() and not model_pred.grad[0].any()
    assert model_pred.grad[1].any() == passing[1]


def test_an_objective_that_must_run_as_often_on_all_processes_always_gets_as_many_samples():
    sizes = []

    class Counted(Cubes):
        def __call__(self, p, generators):
            sizes.append(len(p.z0))
            return super().__call__(p, generators)

    p, passing = gate_case()
    for gate in (passing, torch.zeros_like(passing), torch.ones_like(passing)):
        gated_losses(Counted(), p, gate, sample_generators(7, range(5), 2), size=7)
    gated_losses(Counted(), p.take(slice(2)), passing[:2], sample_generators(7, range(2), 2), size=7)
    assert sizes == [7, 7, 7, 7]


# Weights of the diffusion loss


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


ALPHA, SIGMA = torch.tensor([0.8, 0.6, 0.6]), torch.tensor([0.6, 0.8, 0.8001])  # sigma / alpha: 0.75, 4/3, above


def losses_of_updates(count=4):
    rng = np.random.default_rng(0)
    return [(rng.gamma(2, 1, 6), rng.gamma(2, 3, size)) for size in (3, 0, 6, 2)[:count]]


def test_eq_15_by_hand():
    late = LateReweighting(tau=SIGMA[1].item() / ALPHA[1].item(), decay=1)
    late.update(torch.tensor([1.0]), torch.tensor([]))  # of one sample there is no variance
    assert late.weights(ALPHA, SIGMA, 2.0).tolist() == [1, 1, 1]
    late.sums = None
    late.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]))  # variances 1 and 8/3, means 2 and 2
    heavier = 1 + 0.3 * 8 / 3
    torch.testing.assert_close(late.weights(ALPHA, SIGMA, 0.3), torch.tensor([heavier, heavier, 1]))
    found = {"late_weight": heavier, "late_variance_ratio": 0.3 * 8 / 3, "late_mean_ratio": 0.3 * 2 / 2}
    assert late.summary(0.3) == pytest.approx(found)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_the_moments_of_eq_15_run_and_forget(decay):
    updates, late = losses_of_updates(), LateReweighting(tau=1, decay=decay)
    for l2, lpl in updates:
        late.update(torch.tensor(l2), torch.tensor(lpl))
    expected, other = (reference_late_weight(*zip(*updates), 0.7, rate) for rate in (decay, 1.9 - decay))
    assert late.weights(ALPHA, SIGMA, 0.7)[0].item() == pytest.approx(expected, rel=1e-6)
    assert other != pytest.approx(expected, rel=1e-3)


def test_the_moments_of_eq_15_are_those_of_all_processes():
    updates, together = losses_of_updates(), LateReweighting(tau=1)
    halves, sent = [LateReweighting(tau=1), LateReweighting(tau=1)], [[], []]
    for l2, lpl in updates:
        together.update(torch.tensor(l2), torch.tensor(lpl))
        for half, mine, part in zip(halves, sent, ((l2[:2], lpl[:1]), (l2[2:], lpl[1:]))):
            half.reduce = lambda sums, mine=mine: mine.append(sums) or sums
            half.update(*map(torch.tensor, part))
    both, sums = LateReweighting(tau=1), (first + second for first, second in zip(*sent))
    both.reduce = lambda _: next(sums)
    for l2, lpl in updates:
        both.update(torch.tensor(l2[:2]), torch.tensor(lpl[:1]))
    torch.testing.assert_close(both.sums, together.sums)
    assert not torch.allclose(halves[0].sums, together.sums)


def test_the_ratio_of_means_does_not_depend_on_the_scale_of_lpl_while_eq_15_does():
    updates, found = losses_of_updates(), []
    for scale in (1, 10):
        late = LateReweighting(tau=1)
        for l2, lpl in updates:
            late.update(torch.tensor(l2), torch.tensor(scale * lpl))
        found.append(late.summary(0.5 / scale))
    assert found[1]["late_mean_ratio"] == pytest.approx(found[0]["late_mean_ratio"])
    assert found[1]["late_variance_ratio"] == pytest.approx(10 * found[0]["late_variance_ratio"])
