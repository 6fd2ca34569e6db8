import itertools
from argparse import Namespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from tiny_models import build_tiny_vae

import train_lpl_dit
import train_lpl_sd
from data_utils import build_dataloader, make_stream
from model_families import find_family
from objectives import calibrate_lpl, loss_weights, make_lpl, min_snr_weight


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
        (["--lpl_weighting", "uniform"], "_omega", [1.0] * 5),
        (["--lpl_reduction", "sum"], "reduction", "sum"),
        (["--no-lpl_outlier_mask"], "mask_outliers", False),
        (["--lpl_outlier_source", "union"], "outlier_source", "union"),
        (["--lpl_chunk_size", "3"], "chunk_size", 3),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
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


def test_calibration_goes_on_until_it_has_seen_enough_samples():
    lpl, asked = Namespace(blocks=[0], omega=torch.ones(1), weighting="uniform", weight=None), []

    def forward(batch):  # only every tenth batch has a sample with little enough noise
        asked.append(batch)
        chosen = torch.arange(batch % 10 == 9)
        stats = {"chosen": chosen, "block_loss": torch.ones(len(chosen), 1), "sample_weight": 1.0}
        return Namespace(diffusion_loss=torch.tensor(0.5), lpl_stats=stats)

    accelerator = Namespace(print=print, device=torch.device("cpu"), reduce=lambda sums, reduction: sums)
    args = Namespace(lpl_weight="auto", lpl_target_share=0.2)
    calibrate_lpl(accelerator, args, lpl, forward, itertools.count())
    assert len(asked) == 160  # 16 samples
    # w * 16 is a fifth of the total if it is a quarter of the diffusion loss, 160 * 0.5
    assert lpl.weight == pytest.approx(160 * 0.5 / 4 / 16)


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
