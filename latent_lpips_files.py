"""Where a network for E-LatentLPIPS lies, and which of the published ones belongs to a VAE.

check_latent_lpips    what can be said of a name without downloads
find_network          its folder or file, downloaded if need be
scaling_of            how the latents of a VAE are scaled

No library is imported before it is needed, so that a wrong name is told at once.
"""

import re
from pathlib import Path

from arguments import UserError, first_line
from model_checks import latent_channels, read_json


FLAG = "--e_latent_lpips_model"
PUBLISHED = "Mingguksky/elatentlpips"  # of Kang et al.; CC BY-NC: not for commercial use
# Latent channels, scaling_factor and shift_factor of a VAE -> whose network they have published
PUBLISHED_FOR = {
    (4, 0.18215, 0): "sd15",
    (4, 0.13025, 0): "sdxl",
    (16, 1.5305, 0.0609): "sd3",
    (16, 0.3611, 0.1159): "flux",
}
CHANNELS = (64, 128, 256, 512, 512)  # of VGG-16
SUFFIXES = (".pth", ".safetensors")
HUB_ID, NETWORK = r"[\w.-]+/[\w.-]+", "LatentVGG"
TRAIN = "train one with train_latent_classifier.py"
REMEDY = f"give {PUBLISHED}, a file of its format ({' or '.join(SUFFIXES)}), or {TRAIN}"


def check_latent_lpips(name, flag=FLAG):
    """What the name says and, if it is a folder, its config.json. Raises UserError."""
    path = Path(name)
    if not name.strip():
        raise UserError(f"{flag} is empty: {REMEDY}.")
    if path.is_dir():
        if path.joinpath("config.json").exists():
            check_class(read_json(path / "config.json", flag, REMEDY), name, flag)
        elif not path.joinpath(_published_file("sd15")).parent.is_dir():
            raise UserError(f"{flag} {name} holds no network for latents: {REMEDY}.")
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{flag} {name} is no {' or '.join(SUFFIXES)} file: {REMEDY}.")
    elif name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{flag}: there is no {name}: {REMEDY}.")
    elif not _file_on_the_hub(name) and (not re.fullmatch(HUB_ID, name) or name.endswith(SUFFIXES)):
        raise UserError(f"{flag} {name} is no file, no folder and no Hub id: {REMEDY}.")


def check_class(config, name, flag):
    """Raises UserError if the config is another model's."""
    if config.get("_class_name") != NETWORK:
        kind = config.get("_class_name") or config.get("model_type") or "model of another kind"
        raise UserError(f"{flag} {name} is a {kind} and no network for latents: {REMEDY}.")


def _file_on_the_hub(name):
    """Repository and path in it of owner/name/path/to/file.pth, or None."""
    found = re.fullmatch(rf"({HUB_ID})/(.+)", name)
    return found.groups() if found and name.endswith(SUFFIXES) else None


def find_network(name, vae_config, cache_dir=None, flag=FLAG):
    """The `Path` of a file as Kang et al. have published theirs, or else the name of a saved `LatentVGG`.

    Of their repository it is the network for the VAE. Raises UserError if there is none, or it can't be downloaded.
    """
    check_latent_lpips(name, flag)
    path = Path(name)
    if path.is_dir() and not path.joinpath("config.json").exists():
        return path / published_for(vae_config, name, flag)
    if path.exists():
        return path if path.is_file() else name
    if name == PUBLISHED:
        return _download(name, published_for(vae_config, name, flag), cache_dir, flag)
    if _file_on_the_hub(name):
        return _download(*_file_on_the_hub(name), cache_dir, flag)
    return name


def _download(repo, file, cache_dir, flag):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, cache_dir=cache_dir))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"{flag}: {file} of the Hub's {repo} can't be had ({reason}): check name and connection, or {TRAIN}."
        ) from error


def published_for(vae_config, name=PUBLISHED, flag=FLAG):
    """The file in `PUBLISHED` for the latents of a VAE. Raises UserError if there is none."""
    factor, shift = scaling_of(vae_config)
    channels = latent_channels(vae_config)
    known = PUBLISHED_FOR.get((channels, factor, shift)) if isinstance(factor, float) else None
    if known is None:
        scale = f"scaling_factor {factor}, shift_factor {shift}" if isinstance(factor, float) else "a scale for each"
        raise UserError(
            f"{flag} {name} has networks for the VAEs of Stable Diffusion, SDXL, SD3 and FLUX.1, none for this one "
            f"(latents of {channels} channels, {scale}): {TRAIN}."
        )
    return _published_file(known)


def _published_file(known):
    return f"elatentlpips_ckpt/{known}_latest_vgg16_tuned.pth"


def scaling_of(vae_config):
    """(factor, shift) of scaled latents = (encoded - shift) * factor, numbers or lists of one for each channel.

    vae_config: that of a loaded VAE, which has the defaults. Raises UserError if it says nothing of it.
    """
    factor, shift = vae_config.get("scaling_factor"), vae_config.get("shift_factor")
    if factor is not None:
        return float(factor), float(shift or 0)
    if vae_config.get("latents_std") and vae_config.get("latents_mean"):
        return [1 / std for std in vae_config["latents_std"]], list(vae_config["latents_mean"])
    raise UserError(
        "E-LatentLPIPS is not there for this VAE, whose config has neither a scaling_factor nor latents_mean and "
        "latents_std (FLUX.2 scales its latents otherwise): use another objective."
    )
