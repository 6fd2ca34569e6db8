"""Bad input: one sentence that names the flag or file and the remedy, at once, and nothing is touched."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import build_tiny_vae

import arguments
import train_lpl_sd


ROOT = Path(arguments.__file__).parent


@pytest.fixture
def refuse(tiny_sd, photos, tmp_path, capsys):
    """Parses flags that must be refused and returns the sentence."""

    def run(*words, model=tiny_sd, data=("--train_data_dir", photos), resolution=64):
        flags = ["--pretrained_model_name_or_path", model, *data, "--resolution", resolution]
        flags += ["--output_dir", tmp_path / "out", *words]
        with pytest.raises(SystemExit) as exit:
            train_lpl_sd.parse_args([str(word) for word in flags])
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message
        return message

    return run


def edit_config(model, tmp_path, part, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(model, copy)
    path = copy / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lpl_weight", "-1"], "--lpl_weight -1.0 must not be negative; 0 switches LPL off"),
        (["--lpl_weight", "much"], "'much' is neither auto nor a number"),
        (["--lpl_weight", "nan"], "'nan' is neither auto nor a number"),
        (["--lpl_num_blocks", "5"], "--lpl_num_blocks 5: the VAE's decoder has 4 up blocks"),
        (["--lpl_num_blocks", "-1"], "--lpl_num_blocks -1 must be not negative"),
        (["--lpl_target_share", "1"], "--lpl_target_share 1.0 must be between 0 and 1"),
        (["--max_train_steps", "9", "--lpl_start_step", "9"], "--lpl_start_step 9 is after the last step, 9"),
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
        (["--lpl_wieght", "1"], "--lpl_wieght"),
    ],
)
def test_wrong_flags(refuse, words, sentence):
    assert sentence in refuse(*words)


def test_resolution_that_the_vae_cannot_halve(refuse):
    assert "--resolution 60 must be a multiple of 8, the VAE's factor: 64?" in refuse(resolution=60)


def test_no_data(refuse, tmp_path):
    assert "--train_data_dir FOLDER or --dataset_name ID" in refuse(data=())
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


def test_vae_that_does_not_fit(refuse, tiny_sd, tmp_path):
    build_tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    message = refuse("--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert "the VAE has 8 latent channels, the UNet takes 4" in message
    other = edit_config(tiny_sd, tmp_path, "vae/config.json", _class_name="VQModel")
    assert "the VAE is a VQModel; this script supports AutoencoderKL" in refuse(model=other)


def test_output_of_another_run_is_kept(refuse, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    assert "is incomplete (no training_state.json)" in refuse("--resume_from_checkpoint", "checkpoint-5")
    (checkpoint / "training_state.json").write_text("{}")
    assert "holds another run: choose another folder, or continue it with --resume_from_checkpoint latest" in refuse()
    shutil.rmtree(checkpoint)
    (tmp_path / "out" / "model_index.json").write_text("{}")
    assert "holds a saved model" in refuse()
    assert "holds a saved model" in refuse("--resume_from_checkpoint", "latest")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model_index.json"]


def test_the_commands_of_the_readme_are_accepted(tiny_sd, photos, tmp_path):
    blocks = (ROOT / "README.md").read_text().split("```bash")[1:]
    commands = [block.split("```")[0] for block in blocks if "train_lpl_sd.py" in block]
    assert commands
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        words = words[words.index("train_lpl_sd.py") + 1 :]
        words[words.index("--pretrained_model_name_or_path") + 1] = str(tiny_sd)
        words[words.index("--train_data_dir") + 1] = str(photos)
        words[words.index("--output_dir") + 1] = str(tmp_path / "out")
        train_lpl_sd.parse_args(words)


def test_answers_come_before_the_libraries_load(tiny_sd, photos):
    command = [sys.executable, ROOT / "train_lpl_sd.py", "--pretrained_model_name_or_path", tiny_sd]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:], "--train_data_dir", photos, "--resolution", "60"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "--resolution 60" in result.stderr
    assert "torch" not in result.stderr  # -X importtime lists every module that was imported
    started = time.monotonic()
    result = subprocess.run([*command, "--help"], capture_output=True, text=True)
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
