"""The terms of the loss: flags become objects, and weights that are left open are measured once."""

import itertools
import json
import threading
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from tiny_models import build_tiny_vae

import train_lpl_dit
import train_lpl_sd
from arguments import UserError
from data_utils import build_dataloader, make_stream
from loss_terms import (
    Objectives,
    Weights,
    is_measured,
    layers_of,
    loss_weights,
    make_lpl,
    measure_weights,
    weighted_terms,
)
from model_families import find_family
from objectives import LateReweighting
from train_lpl_sd import Forward


@pytest.fixture
def parse(tiny_sd, photos, tmp_path):
    def run(*words):
        flags = [
            "--pretrained_model_name_or_path",
            tiny_sd,
            "--train_data_dir",
            photos,
            "--output_dir",
            tmp_path / "out",
        ]
        return train_lpl_sd.parse_args([str(word) for word in (*flags, "--resolution", 64, "--seed", 3, *words)])

    return run


@pytest.mark.parametrize(
    "words, attribute, value",
    [
        (["--lpl_num_blocks", "2"], "depth", 3),
        (["--lpl_normalization", "separate"], "normalization", "separate"),
        (["--no-lpl_detach_stats"], "detach_stats", False),
        (["--lpl_normalization", "separate"], "detach_stats", False),
        (["--lpl_weighting", "uniform"], "_omega", [1.0] * 5),
        (["--lpl_reduction", "sum"], "reduction", "sum"),
        (["--no-lpl_outlier_mask"], "mask_outliers", False),
        (["--lpl_outlier_source", "union"], "outlier_source", "union"),
        (["--lpl_outlier_positions", "4096"], "outlier_positions", 4096),
        (["--lpl_chunk_size", "3"], "chunk_size", 3),
        (["--lpl_gradient_checkpointing"], "gradient_checkpointing", True),
        (["--lpl_weight", "2.5"], "weight", 2.5),
        (["--lpl_weight", "2.5", "--lpl_weighting", "balanced"], "weight", None),  # omega is measured first
    ],
)
def test_every_lpl_flag_reaches_the_loss(parse, words, attribute, value):
    vae = build_tiny_vae()
    assert getattr(make_lpl(parse(*words), vae), attribute) == value
    if value is not None:
        assert getattr(make_lpl(parse(), vae), attribute) != value


def test_the_threshold_grows_with_the_resolution(parse):
    assert train_lpl_sd.lpl_threshold(parse()) == 3 * 64 / 256
    assert train_lpl_sd.lpl_threshold(parse("--lpl_sigma_threshold", 6, "--lpl_base_resolution", 128)) == 6 * 64 / 128


def test_every_data_flag_reaches_the_stream(parse):
    words = ["--center_crop", "--random_flip", "--image_interpolation_mode", "nearest", "--max_train_samples", 4]
    stream = make_stream(parse(*words, "--proportion_empty_prompts", 0.3, "--max_bad_images", 2))
    assert (stream.center_crop, stream.random_flip, stream.image_interpolation_mode) == (True, True, "nearest")
    assert (stream.proportion_empty_prompts, stream.max_bad_images, stream.seed) == (0.3, 2, 3)
    assert (stream.resolution, stream.num_samples) == (64, 4)


@pytest.fixture
def parse_sd3(tiny_pipeline, photos, tmp_path):
    def run(*words):
        flags = ["--pretrained_model_name_or_path", tiny_pipeline("StableDiffusion3"), "--train_data_dir", photos]
        flags += ["--output_dir", tmp_path / "out", "--resolution", 64, "--seed", 3]
        return train_lpl_dit.parse_args([str(word) for word in (*flags, *words)])

    return run


def test_the_weights_of_flow_matching_are_those_of_the_sd3_script(parse_sd3):
    sigma = torch.arange(1, 1001) / 1000
    alpha = 1 - sigma
    for scheme in ("sigma_sqrt", "cosmap"):
        weights = loss_weights(parse_sd3("--weighting_scheme", scheme), alpha, sigma, "flow_prediction")
        torch.testing.assert_close(weights, compute_loss_weighting_for_sd3(scheme, sigma))
    for scheme in ("none", "logit_normal", "mode"):  # these are in how often a noise level is drawn
        assert loss_weights(parse_sd3("--weighting_scheme", scheme), alpha, sigma, "flow_prediction") is None
    weights = loss_weights(parse_sd3("--snr_gamma", 2), alpha, sigma, "flow_prediction")
    expected = torch.minimum((alpha / sigma) ** 2, torch.tensor(2.0)) * sigma**2
    torch.testing.assert_close(weights, expected)


def test_the_gate_sees_the_noise_level_that_built_the_noisy_latents(parse_sd3, monkeypatch):
    # sigma/alpha at most 4 * 64 / 256 = 1, and SD3's scheduler triples that ratio.
    args = parse_sd3("--lpl_sigma_threshold", 4, "--lpl_weight", 1)
    family = find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)
    batch = next(build_dataloader(make_stream(args), batch_size=24))
    monkeypatch.setattr(family, "latents", lambda batch, generators: torch.ones(24, 16, 8, 8))
    monkeypatch.setattr(train_lpl_dit, "sample_noise", lambda latents, *_: torch.zeros_like(latents))
    seen = []  # alpha, as z_t = alpha * 1 + sigma * 0
    family.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0].mean((1, 2, 3))), with_kwargs=True
    )
    forward = train_lpl_dit.training_step(args, family, family.model, make_lpl(args, family.vae), batch)
    ratio = (1 - seen[0]) / seen[0]
    torch.testing.assert_close(forward.noise_levels, ratio, rtol=1e-4, atol=0)
    assert forward.lpl_stats["chosen"].tolist() == (ratio <= 1).nonzero().flatten().tolist()
    assert (ratio <= 1).any() and ((ratio > 1) & (ratio <= 3)).any()  # some pass, some would before the shift


# Weights that are measured


def forward_of(args, seed, lpl=True, gated=(), size=4):
    """A forward pass of whose numbers nothing is special; LPL and what is gated see two samples of it."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name in ("self_perceptual", "e_latent_lpips", "rgb") if getattr(args, f"{name}_weight")]
    own = torch.arange(size) >= size - 2
    sample_losses = {"l2": torch.rand(size, generator=rng) + 0.2}
    stats, lpl_loss = {}, torch.tensor(0.0)
    if lpl:
        block_loss = torch.rand(2, args.lpl_num_blocks + 1, generator=rng) * torch.tensor([9.0, 5, 3, 2, 1])
        stats = {"chosen": own.nonzero().flatten(), "block_loss": block_loss, "sample_weight": 1 / size}
        sample_losses["lpl"] = torch.zeros(size)
    for number, name in enumerate(names, 1):
        losses = number * torch.rand(size, generator=rng).square()
        sample_losses[name] = losses * own if name in gated else losses
    levels = torch.where(own, 0.1, 9.0)
    objective_losses = {name: sample_losses[name].mean() for name in names}
    return Forward(sample_losses["l2"].mean(), lpl_loss, stats, objective_losses, sample_losses, None, levels)


@pytest.fixture
def measure(parse):
    """flags -> args, LPL or None, objectives and the forward passes on which their weights were measured."""

    def run(*words, lpl=True, gated=(), change=lambda forward: forward):
        args = parse(*words)
        loss = make_lpl(args, build_tiny_vae()) if lpl and args.lpl_weight else None
        late = LateReweighting(1.0) if args.late_reweight else None
        passes = [change(forward_of(args, seed, loss is not None, gated)) for seed in range(16)]
        objectives = Objectives(dict.fromkeys(passes[0].objective_losses), gated, tau=1.0, late=late)
        numbers = {name: getattr(args, f"{name}_weight") for name in objectives.terms}
        objectives.weights |= {name: value for name, value in numbers.items() if not isinstance(value, str)}
        if loss is not None:
            assert not is_measured(loss, objectives)
        measure_weights(alone(), args, loss, objectives, lambda number: passes[number], itertools.count())
        assert is_measured(loss, objectives)
        return args, loss, objectives, passes

    return run


def alone(reduce=lambda sums, reduction: sums):
    return Namespace(print=print, device=torch.device("cpu"), reduce=reduce)


def shares_of(args, lpl, objectives, passes):
    """Name -> share of the sum of all terms over these passes, by numpy."""
    sums = {"l2": args.l2_weight * sum(passed.sample_losses["l2"].mean().item() for passed in passes)}
    for name, weight in objectives.weights.items():
        sums[name] = weight * sum(passed.sample_losses[name].mean().item() for passed in passes)
    if lpl is not None and not args.late_reweight:
        omega = lpl.omega.numpy()
        losses = [(passed.lpl_stats["block_loss"].numpy() @ omega).sum() / 4 for passed in passes]
        sums["lpl"] = lpl.weight * sum(losses)
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()}


E_LPIPS, SELF, RGB = "--e_latent_lpips_weight", "--self_perceptual_weight", "--rgb_weight"
SHARES = {
    "one": ((RGB, "auto", "--lpl_weight", 0), {"rgb": 0.2, "l2": 0.8}),
    "one and LPL": ((RGB, "auto:0.3"), {"rgb": 0.3, "lpl": 0.2, "l2": 0.5}),
    "all": (
        (RGB, "auto:0.1", E_LPIPS, "auto:0.25", SELF, "auto", "--lpl_target_share", 0.3),
        {"rgb": 0.1, "e_latent_lpips": 0.25, "self_perceptual": 0.2, "lpl": 0.3, "l2": 0.15},
    ),
    "beside numbers": ((RGB, "auto:0.4", SELF, 0.7, "--lpl_weight", 2), {"rgb": 0.4}),
    "beside balanced LPL": ((RGB, "auto:0.4", "--lpl_weighting", "balanced"), {"rgb": 0.4, "lpl": 0.2}),
    "beside a variance": ((RGB, "auto:0.4", "--lpl_weight", "variance:0.1", E_LPIPS, "variance:2"), {"rgb": 0.4}),
    "without l2": ((RGB, "auto:0.3", SELF, 1, "--l2_weight", 0), {"rgb": 0.3, "lpl": 0.2, "l2": 0}),
    "with Eq. 15": ((RGB, "auto:0.3", SELF, "auto", "--late_reweight"), {"rgb": 0.3, "self_perceptual": 0.2}),
}


@pytest.mark.parametrize("words, expected", SHARES.values(), ids=SHARES)
def test_auto_is_the_share_of_the_whole_loss_that_was_asked_for(measure, words, expected):
    found = shares_of(*measure(*words))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_before_lpl_starts_auto_is_a_share_of_what_there_is_and_stays_as_it_is(measure):
    args, _, objectives, passes = measure(RGB, "auto:0.3", lpl=False)
    assert shares_of(args, None, objectives, passes) == pytest.approx({"rgb": 0.3, "l2": 0.7}, rel=1e-5)
    weights, lpl = dict(objectives.weights), make_lpl(args, build_tiny_vae())
    passes = [forward_of(args, seed) for seed in range(16)]
    measure_weights(alone(), args, lpl, objectives, lambda number: passes[number], itertools.count())
    assert objectives.weights == weights
    assert shares_of(args, lpl, objectives, passes)["lpl"] == pytest.approx(0.2, rel=1e-5)


def test_with_eq_15_lpl_s_weight_is_that_with_which_it_would_be_a_share_beside_l2(measure):
    args, lpl, objectives, passes = measure("--late_reweight", RGB, 3, "--lpl_target_share", 0.4)
    losses = sum((passed.lpl_stats["block_loss"].numpy() @ lpl.omega.numpy()).sum() / 4 for passed in passes)
    others = sum(passed.diffusion_loss.item() + 3 * passed.objective_losses["rgb"].item() for passed in passes)
    assert lpl.weight * losses / (others + lpl.weight * losses) == pytest.approx(0.4, rel=1e-5)
    assert "lpl" not in weighted_terms(args, lpl, objectives, passes[0])


@pytest.mark.parametrize("weighting", ["inverse", "balanced"])
def test_variance_is_that_ratio_to_the_variance_of_the_diffusion_loss(measure, weighting):
    words = (RGB, "variance:0.1", E_LPIPS, "variance:0.5", "--lpl_weight", "variance:2", "--l2_weight", 3)
    args, lpl, objectives, passes = measure(*words, "--lpl_weighting", weighting, gated=("rgb",))

    def variance(losses):
        return np.var(np.concatenate(losses), dtype=np.float64)

    l2 = variance([3 * passed.sample_losses["l2"].numpy() for passed in passes])
    for name, ratio in (("rgb", 0.1), ("e_latent_lpips", 0.5)):
        losses = [objectives.weights[name] * passed.sample_losses[name].numpy() for passed in passes]
        assert variance(losses) == pytest.approx(ratio * l2, rel=1e-5)
    omega = lpl.weight * lpl.omega.numpy()
    losses = [np.append(passed.lpl_stats["block_loss"].numpy() @ omega, [0, 0]) for passed in passes]
    assert variance(losses) == pytest.approx(2 * l2, rel=1e-5)
    means = omega * sum(passed.lpl_stats["block_loss"].double().sum(0).numpy() for passed in passes)
    assert (means == pytest.approx(means[0])) == (weighting == "balanced")


def test_images_of_the_class_are_not_among_the_samples_whose_variance_is_compared(measure):
    def with_class(forward):  # for prior preservation: their losses are behind one's own
        losses = forward.sample_losses | {"l2": torch.cat([forward.sample_losses["l2"], torch.full((4,), 50.0)])}
        return forward._replace(sample_losses=losses)

    words = (RGB, "variance:0.1", "--lpl_weight", "variance:0.3")
    weights = []
    for change in (lambda forward: forward, with_class):
        _, lpl, objectives, _ = measure(*words, change=change)
        weights += [lpl.weight, objectives.weights["rgb"]]
    assert weights[2:] == pytest.approx(weights[:2])


def test_several_processes_measure_what_one_does(parse):
    words = (RGB, "auto:0.3", E_LPIPS, "variance:0.5", "--lpl_weighting", "balanced")
    args = parse(*words)
    passes = [forward_of(args, seed, gated=("rgb",)) for seed in range(6)]
    barrier, sent = threading.Barrier(2), {}

    def solve(passes, reduce=lambda sums: sums):
        lpl, objectives = make_lpl(args, build_tiny_vae()), Objectives(dict.fromkeys(("e_latent_lpips", "rgb")))
        Weights(args, lpl, objectives, passes, reduce).solve()
        return [lpl.weight, *lpl.omega.tolist(), *objectives.weights.values()]

    def process(rank, found):
        def reduce(sums):
            sent[rank] = sums
            barrier.wait(timeout=20)
            total = sent[0] + sent[1]
            barrier.wait(timeout=20)
            return total

        found[rank] = solve(passes[rank::2], reduce)

    found = {}
    threads = [threading.Thread(target=process, args=(rank, found)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    expected = solve(passes)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-6)
    assert solve(passes[::2]) != pytest.approx(expected, rel=1e-3)


def spoiled(name, value):
    def change(forward):
        losses = forward.sample_losses | {name: torch.full_like(forward.sample_losses[name], value)}
        found = {key: loss.mean() for key, loss in losses.items() if key in forward.objective_losses}
        return forward._replace(sample_losses=losses, objective_losses=found, diffusion_loss=losses["l2"].mean())

    return change


@pytest.mark.parametrize(
    "words, name, value, sentence",
    [
        ((RGB, "auto"), "rgb", 0, "rgb is 0; give --rgb_weight a number"),
        ((RGB, "auto"), "rgb", float("inf"), "rgb is not finite; give --rgb_weight a number"),
        ((RGB, "auto"), "l2", float("nan"), "not finite"),
        ((RGB, "variance:0.1"), "rgb", 0.5, "rgb is 0; give --rgb_weight a number"),
        ((RGB, "variance:0.1"), "rgb", float("nan"), "rgb is not finite; give --rgb_weight a number"),
        ((RGB, "variance:0.1"), "l2", 0.5, "l2 is 0"),
        ((RGB, "variance:0.1"), "l2", float("inf"), "l2 is not finite"),
        ((RGB, "auto", SELF, 1, "--l2_weight", 0), "self_perceptual", 0, "the rest of the loss is 0"),
    ],
)
def test_weights_that_cannot_be_measured_are_refused(measure, words, name, value, sentence):
    with pytest.raises(UserError, match=sentence):
        measure(*words, "--lpl_weight", 0, change=spoiled(name, value))


@pytest.mark.parametrize("loss", [0.0, float("inf")])
def test_lpl_that_cannot_be_measured_is_refused(measure, loss):
    def change(forward):
        return forward._replace(lpl_stats=forward.lpl_stats | {"block_loss": torch.full((2, 5), loss)})

    for weight in ("auto", "variance:0.1"):
        with pytest.raises(UserError, match="LPL's weight can't be measured.*--lpl_weight a number"):
            measure("--lpl_weight", weight, RGB, "auto", change=change)


@pytest.mark.parametrize(
    "words, gated, batches",
    [
        ((), (), 160),  # only every tenth has a sample with little enough noise, and 16 are wanted
        ((RGB, "auto", "--lpl_weight", 0), ("rgb",), 160),
        ((RGB, "auto", "--lpl_weight", 0), (), 16),
    ],
)
def test_measuring_goes_on_until_it_has_seen_enough_samples(parse, words, gated, batches):
    args, asked = parse(*words), []
    lpl = make_lpl(args, build_tiny_vae()) if args.lpl_weight else None

    def step(number):
        asked.append(number)
        forward = forward_of(args, number, lpl is not None, gated)
        levels = torch.tensor([9.0, 9, 9, 0.1 if number % 10 == 9 else 9])
        return forward._replace(noise_levels=levels)

    objectives = Objectives({name: None for name in ("rgb",) if args.rgb_weight}, gated, tau=1.0)
    measure_weights(alone(), args, lpl, objectives, step, itertools.count())
    assert asked == list(range(batches))


def test_eq_15_begins_with_the_variances_of_what_was_measured(measure):
    args, lpl, objectives, passes = measure("--late_reweight")
    l2 = np.concatenate([passed.sample_losses["l2"].numpy() for passed in passes])
    seen = np.concatenate([passed.lpl_stats["block_loss"].numpy() @ lpl.omega.numpy() for passed in passes])
    found = objectives.late.summary(lpl.weight)
    assert found["late_variance_ratio"] == pytest.approx(lpl.weight * seen.var() / l2.var(), rel=0.05)  # they run
    assert found["late_mean_ratio"] == pytest.approx(lpl.weight * seen.mean() / l2.mean(), rel=0.05)


# The terms as they are added


def test_what_is_resumed_is_not_measured_again(measure):
    _, _, objectives, _ = measure(RGB, "auto", E_LPIPS, 0.4, "--late_reweight")
    state = json.loads(json.dumps(objectives.state_dict(), default=torch.Tensor.tolist))
    resumed = Objectives(dict.fromkeys(objectives.terms), late=LateReweighting(1.0))
    resumed.load_state_dict(state)
    assert resumed.weights == objectives.weights == {"rgb": objectives.weights["rgb"], "e_latent_lpips": 0.4}
    assert torch.equal(resumed.late.sums, objectives.late.sums) and is_measured(None, resumed)


def test_the_terms_are_weighted_losses_by_name(measure):
    args, lpl, objectives, passes = measure("--l2_weight", 2, RGB, 0.5, SELF, 3)
    forward = passes[0]._replace(lpl_loss=torch.tensor(7.0))
    terms = weighted_terms(args, lpl, objectives, forward)
    expected = {"l2": 2 * forward.diffusion_loss.item(), "lpl": lpl.weight * 7}
    expected |= {"self_perceptual": 3 * forward.objective_losses["self_perceptual"].item()}
    expected |= {"rgb": 0.5 * forward.objective_losses["rgb"].item()}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)
    assert "lpl" not in weighted_terms(args, None, objectives, forward)


UNET = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ([], [2]),
        (["up2", "down1"], [0, 4]),
        (["encoder", "mid"], [0, 1, 2]),
        (["decoder", "up1"], [3, 4]),
    ],
)
def test_layers_of_a_unet(wanted, expected):
    assert layers_of(wanted, UNET) == [UNET[i] for i in expected]


def test_layers_of_a_transformer_are_counted_from_one_and_by_default_8_of_28():
    blocks = [f"blocks.{i}" for i in range(28)]
    assert layers_of([], blocks) == ["blocks.7"]
    assert layers_of(["28", "16", "8"], blocks) == ["blocks.7", "blocks.15", "blocks.27"]
    assert layers_of([], blocks[:1]) == ["blocks.0"]
    with pytest.raises(UserError, match="29: this model has no such layer; there are 1 to 28"):
        layers_of(["29"], blocks)
