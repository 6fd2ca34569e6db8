"""The decoder's blocks as --dry_run prints them, against hooks on `vae.decode` and weights set by hand."""

import math
import re
import shutil

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import build_photo_folder, build_tiny_sd, build_tiny_vae

import dry_run
import train_lpl_dit
import train_lpl_sd


@pytest.fixture
def run(photos, tmp_path, monkeypatch):
    """Runs a script's dry run in this process and returns its numbers; `counting`: with those of a step."""
    count_step = dry_run.count_step

    def run(model, *words, script=train_lpl_sd, data=photos, resolution=64, counting=False):
        monkeypatch.setattr(dry_run, "count_step", count_step if counting else lambda *args: (0, 0, 1))
        flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--resolution", resolution]
        flags += ["--output_dir", tmp_path / "out", "--report_to", "none", "--seed", 0, "--dry_run"]
        flags += ["--train_batch_size", 2, "--max_train_steps", 2, *words]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return script.main(script.parse_args([str(word) for word in flags]))

    return run


@pytest.fixture
def seen(monkeypatch):
    """The latents that were decoded, `[C, h, w]` each, as the denoiser sees them."""
    latents, draw = [], dry_run.make_lpl

    def make_lpl(*args):
        lpl = draw(*args)
        features = lpl.features
        lpl.features = lambda z: latents.append(z[0].clone()) or features(z)
        return lpl

    monkeypatch.setattr(dry_run, "make_lpl", make_lpl)
    return latents


@pytest.fixture
def batches(monkeypatch):
    """The batch that is measured."""
    batches, measure = [], dry_run.measure_blocks
    monkeypatch.setattr(dry_run, "measure_blocks", lambda *args: batches.append(args[-1]) or measure(*args))
    return batches


def decoded(vae, unscaled, names):
    """Outputs of the modules of a decoder in `vae.decode`, name -> `[B, C, h, w]`, by plain hooks, in order."""
    outputs, handles = {}, []
    for name in names:
        hook = lambda module, args, output, name=name: outputs.update({name: output})  # noqa: E731
        handles.append(vae.decoder.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        vae.decode(unscaled)
    for handle in handles:
        handle.remove()
    return {name: phi.squeeze(2) if phi.ndim == 5 else phi for name, phi in outputs.items()}


def ratio(phi):
    """|mean| / std of features `[B, C, h, w]`, on average over samples and channels; some maps of a ReLU are 0."""
    variance = phi.var((2, 3), correction=0)
    return (phi.mean((2, 3)).abs() / (variance + 1e-4 * variance.median(1, keepdim=True).values).sqrt()).mean().item()


BLOCKS = {  # of tiny decoders: the names, in the order in which they run, and the sides at 64 pixels
    "AutoencoderKL": ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"),
    "AsymmetricAutoencoderKL": ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"),
    "AutoencoderTiny": ("layers.3", "layers.7", "layers.11", "layers.14"),
    "AutoencoderDC": ("up_blocks.3", "up_blocks.2", "up_blocks.1", "up_blocks.0"),
}
SIDES = {5: (8, 16, 32, 64, 64), 4: (8, 16, 32, 64)}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_what_hooks_on_the_decoder_see(run, seen, tmp_path, tiny_pipeline, kind):
    if kind == "AutoencoderDC":
        model, script = tiny_pipeline("Sana"), train_lpl_dit
    else:
        model, script = build_tiny_sd(tmp_path / "model", vae=build_tiny_vae(kind=kind)), train_lpl_sd
    blocks = run(model, "--no-lpl_outlier_mask", "--lpl_num_blocks", 2, script=script)["blocks"]
    vae = getattr(diffusers, kind).from_pretrained(model, subfolder="vae")
    latents = torch.stack(seen)
    features = decoded(vae, latents / vae.config.scaling_factor, BLOCKS[kind])

    assert [block["name"] for block in blocks] == list(features) == list(BLOCKS[kind])
    for block, phi, side in zip(blocks, features.values(), SIDES[len(blocks)], strict=True):
        assert block["shape"] == tuple(phi.shape[1:]) and block["shape"][1:] == (side, side)
        assert block["amplitude"] == pytest.approx(math.sqrt((phi**2).mean()), rel=1e-4)
        assert block["mean_over_std"] == pytest.approx(ratio(phi), rel=1e-3)
        assert block["weight"] == 8 / side and block["outliers"] is None
    compared = 2 + ("mid_block" in BLOCKS[kind])
    assert [block["compared"] for block in blocks] == [l < compared for l in range(len(blocks))]


@pytest.mark.parametrize(("family", "kind"), [("Flux2Klein", "AutoencoderKLFlux2"),
                                              ("QwenImage", "AutoencoderKLQwenImage")])  # fmt: skip
def test_blocks_of_decoders_whose_latents_are_scaled_by_statistics(run, seen, tiny_pipeline, family, kind):
    model = tiny_pipeline(family)
    blocks = run(model, "--no-lpl_outlier_mask", "--lpl_num_blocks", 1, script=train_lpl_dit)["blocks"]
    vae = getattr(diffusers, kind).from_pretrained(model, subfolder="vae")
    latents = torch.stack(seen)
    if kind == "AutoencoderKLQwenImage":
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        unscaled = (latents * std + mean).unsqueeze(2)
    else:
        norm = vae.bn
        latents = latents * (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
        unscaled = torch.nn.functional.pixel_shuffle(latents + norm.running_mean.view(1, -1, 1, 1), 2)
    features = decoded(vae, unscaled, [block["name"] for block in blocks])
    assert len(blocks) == 5 and list(features) == [block["name"] for block in blocks]
    for block, phi in zip(blocks, features.values()):
        assert block["shape"] == tuple(phi.shape[1:])
        assert block["amplitude"] == pytest.approx(math.sqrt((phi**2).mean()), rel=1e-4)


def test_latents_are_those_of_the_first_pictures_of_the_run(run, seen, batches, tiny_sd):
    run(tiny_sd)
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(batches[0]["pixel_values"]).latent_dist
    noise = (torch.stack(seen) / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert noise.shape == (2, 4, 8, 8)
    assert noise.mean().abs() < 0.2 and noise.std() == pytest.approx(1, abs=0.15)
    assert (noise[0] - noise[1]).abs().max() > 1, "each has its own"


def test_a_larger_run_is_measured_on_crops_of_its_middle(run, seen, batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "PIXELS", 40)
    seen_pixels, encode = [], diffusers.AutoencoderKL.encode
    vae = build_tiny_vae(block_out_channels=(8, 16, 16))  # factor 4
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "encode", lambda self, x: seen_pixels.append(x.clone()) or encode(self, x)
    )
    photos = build_photo_folder(tmp_path / "photos", n=4, size=64)
    model = build_tiny_sd(tmp_path / "model", vae=vae)
    flags = ("--lpl_num_blocks", 2, "--center_crop", "--train_batch_size", 3)
    blocks = run(model, *flags, data=photos)["blocks"]
    assert len(seen_pixels) == len(seen) == 2, "not all of a batch of 3"
    for picture, crop in zip(batches[0]["pixel_values"], seen_pixels):
        assert torch.equal(crop[0], picture[:, 12:52, 12:52])
    assert [block["shape"][1:] for block in blocks] == [(16, 16), (32, 32), (64, 64), (64, 64)]
    assert "on 2 pictures of 40 x 40 pixels" in capsys.readouterr().out


# Numbers known beforehand


def scaled_output(vae, factor):
    """The last up block's output times a factor: of the sums that its blocks are, all terms, by their weights."""
    first, last = vae.decoder.up_blocks[-1].resnets  # 16 -> 8 channels, so the first has no identity; norms follow
    with torch.no_grad():
        for convolution in (first.conv2, first.conv_shortcut, last.conv2):
            for parameter in convolution.parameters():
                parameter *= factor


def test_twice_the_weights_are_twice_the_amplitude_and_nothing_else(run, tmp_path):
    plain, doubled = build_tiny_vae(), build_tiny_vae()
    scaled_output(doubled, 2)
    once, twice = (run(build_tiny_sd(tmp_path / str(i), vae=vae))["blocks"] for i, vae in enumerate((plain, doubled)))
    assert once[:-1] == twice[:-1]
    assert twice[-1]["amplitude"] == pytest.approx(2 * once[-1]["amplitude"], rel=1e-5)
    assert twice[-1]["mean_over_std"] == pytest.approx(once[-1]["mean_over_std"], rel=1e-4)
    assert twice[-1]["outliers"] == pytest.approx(once[-1]["outliers"], abs=1e-4)


@pytest.fixture
def change_vae(monkeypatch):
    """Has a function look at, or change, the VAE that the dry run loads."""
    load = dry_run.load_vae

    def change(function):
        def load_vae(*args):
            vae = load(*args)
            function(vae)
            return vae

        monkeypatch.setattr(dry_run, "load_vae", load_vae)

    return change


@pytest.mark.parametrize(
    ("resolution", "left_out"),
    [(64, 6 * 6), (512, 8 * 8)],  # kernels of one position; at 512 pixels 1 off each side and 2 more
)
def test_planted_outliers_are_found_with_the_kernels_of_the_run(
    run, change_vae, tmp_path, monkeypatch, tiny_sd, resolution, left_out
):
    def plant(module, args, output):
        ramp = torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64).repeat(1, 8, 1, 1)
        ramp[:, :2, 20:26, 30:36] = 100  # in a quarter of the channels
        return ramp

    monkeypatch.setattr(dry_run, "PIXELS", 64)
    change_vae(lambda vae: vae.decoder.up_blocks[3].register_forward_hook(plant))
    photos = build_photo_folder(tmp_path / "photos", n=2, size=resolution)
    blocks = run(tiny_sd, data=photos, resolution=resolution)["blocks"]
    assert blocks[-1]["shape"] == (8, resolution, resolution)
    assert blocks[-1]["outliers"] == pytest.approx(left_out / 64**2 / 4, rel=1e-6)
    assert [block["outliers"] is None for block in blocks] == [True, True, False, False, False]
    spikes, ramp = 2 * 36 / (8 * 64**2), 1 / 3  # the ramp's mean square
    assert blocks[-1]["amplitude"] == pytest.approx(math.sqrt(spikes * 100**2 + (1 - spikes) * ramp), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        (("--lpl_weighting", "uniform"), [1, 1, 1, 1, 1]),
        (("--lpl_weighting", "exponential"), [1 / 2, 1 / 4, 1 / 16, 1 / 256, 1 / 256]),
        (("--lpl_weighting", "balanced"), [None] * 5),
    ],
)
def test_weights_follow_the_flag(run, tiny_sd, capsys, flags, weights):
    blocks = run(tiny_sd, *flags, "--lpl_num_blocks", 2)["blocks"]
    assert [block["weight"] for block in blocks] == weights
    assert capsys.readouterr().out.count("measured later") == weights.count(None)


# What it needs and leaves


def test_the_table_is_printed_in_columns(run, tiny_sd, capsys):
    blocks = run(tiny_sd, "--lpl_num_blocks", 2)["blocks"]
    out = capsys.readouterr().out
    table = out[out.index("Blocks of the decoder (AutoencoderKL)") :].splitlines()[1:7]
    assert len({re.search("(not )?compared$|LPL$", line).start() for line in table}) == 1
    assert [line.endswith("not compared") for line in table[1:]] == [False, False, False, True, True]
    for block, line in zip(blocks, table[1:], strict=True):
        outliers = "not masked" if block["outliers"] is None else f"{block['outliers']:.2%}"
        shape = " x ".join(map(str, block["shape"]))
        numbers = (f"{block['amplitude']:.4g}", outliers, f"{block['mean_over_std']:.3g}", f"{block['weight']:.4g}")
        assert re.split("  +", line.strip())[:-1] == [block["name"], shape, *numbers]
    assert "Measured in fp32 on 2 pictures of 64 x 64 pixels." in out
    assert out.endswith("\nNothing was trained or written.\n")


def test_it_is_a_function_of_seed_and_data(run, tiny_sd):
    state = torch.random.get_rng_state()
    first, *_, other = (run(tiny_sd, "--seed", seed)["blocks"] for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == run(tiny_sd, "--seed", 1)["blocks"] != other


@pytest.mark.parametrize(("precision", "measured_in"), [("bf16", "bf16"), ("fp16", "fp32")])
def test_a_vae_of_half_precision(run, tiny_sd, change_vae, capsys, precision, measured_in):
    dtypes = []
    full = run(tiny_sd)["blocks"]
    change_vae(lambda vae: dtypes.append(vae.dtype))
    half = run(tiny_sd, "--vae_dtype", precision)["blocks"]
    assert dtypes == [{"bf16": torch.bfloat16, "fp32": torch.float32}[measured_in]]
    assert f"Measured in {measured_in} on" in capsys.readouterr().out.split("Blocks of the decoder")[-1]
    assert (half == full) == (precision == "fp16")
    for a, b in zip(half, full, strict=True):
        assert a["amplitude"] == pytest.approx(b["amplitude"], rel=0.02)


def test_what_fp16_can_not_hold_is_said(run, tmp_path, capsys):
    vae = build_tiny_vae()
    scaled_output(vae, 1e6)
    model = build_tiny_sd(tmp_path / "model", vae=vae)
    assert len(run(model)["blocks"]) == 5
    capsys.readouterr()
    assert run(model, "--vae_dtype", "fp16")["blocks"] == []
    out = capsys.readouterr().out
    assert "Not measured: its features are not finite in fp16: use another precision for the VAE.\n" in out


def test_weights_that_are_not_finite_and_files_that_are_not_there_cost_the_table_alone(run, tiny_sd, tmp_path, capsys):
    short = ("--lpl_num_blocks", 1)  # the cost of the step is not the point
    counted = run(tiny_sd, *short, counting=True)
    assert len(counted.pop("blocks")) == 5
    broken, missing = (shutil.copytree(tiny_sd, tmp_path / name) for name in ("broken", "missing"))
    vae = build_tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_in.bias, math.nan)
    vae.save_pretrained(broken / "vae")
    for file in (missing / "vae").glob("*.safetensors"):
        file.unlink()
    for model, reason in ((broken, "LPL can't be computed: the decoder of AutoencoderKL overflows in torch.float32"),
                          (missing, f"--pretrained_model_name_or_path {missing} can't be loaded")):  # fmt: skip
        capsys.readouterr()
        assert run(model, *short, counting=True) == {**counted, "blocks": []}
        lines = capsys.readouterr().out.split("Blocks of the decoder (AutoencoderKL)\n")[1].splitlines()
        assert lines[0].startswith(f"  Not measured: {reason}") and lines[1:] == [
            "",
            "Nothing was trained or written.",
        ]


def test_a_vae_of_its_own_is_the_one_measured(run, tiny_sd, tmp_path):
    own = build_tiny_vae(seed=5)
    own.save_pretrained(tmp_path / "vae")
    pipeline = build_tiny_sd(tmp_path / "model", vae=own)
    given = run(tiny_sd, "--pretrained_vae_model_name_or_path", tmp_path / "vae")["blocks"]
    assert given == run(pipeline)["blocks"] != run(tiny_sd)["blocks"]


def test_a_vae_comes_in_the_variant_asked_for(run, tmp_path):
    model, seeds = build_tiny_sd(tmp_path / "model", vae=build_tiny_vae(seed=1)), {None: 1, "fp16": 2}
    build_tiny_vae(seed=2).save_pretrained(model / "vae", variant="fp16")
    for variant, seed in seeds.items():
        same = build_tiny_sd(tmp_path / f"of {seed}", vae=build_tiny_vae(seed=seed))
        flags = () if variant is None else ("--variant", variant)
        assert run(model, *flags)["blocks"] == run(same)["blocks"]


def test_without_lpl_there_is_no_table(run, tiny_sd, change_vae, capsys):
    change_vae(lambda vae: pytest.fail("a VAE was loaded"))
    assert run(tiny_sd, "--lpl_weight", 0)["blocks"] == []
    assert "Blocks of the decoder" not in capsys.readouterr().out
