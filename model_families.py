"""What differs between denoisers: how to load one, encode a prompt, call it, read its prediction, unscale its latents.

Each family is a class with the same few methods; the training loop knows nothing else about the model.
Shapes: B batch, C latent channels, h x w latent positions, H x W pixels.
"""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor

from arguments import UserError, check_configs, is_folder_name, vae_folder


diffusers.utils.logging.set_verbosity_error()  # else every long caption is reported whenever it comes up
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet under text conditioning; epsilon, v or sample prediction.

    Args:
        args: the script's flags.
        device: where the frozen models work.
        weight_dtype, vae_dtype: precision of the text encoder and of the VAE. The UNet is loaded in float32.

    Raises:
        UserError: the model can't be loaded or does not fit the flags.
    """

    pipeline_class = StableDiffusionPipeline
    not_trained_with = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def __init__(self, args, device, weight_dtype, vae_dtype):
        self.args, self.device = args, device
        self._check_configs()
        dtypes = {"default": torch.float32, "text_encoder": weight_dtype, "vae": vae_dtype}
        vae = self._load_vae(vae_dtype)
        self.pipe = self._load_pipeline(**vae, **self.not_trained_with, dtype=dtypes)
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        self.pipe.scheduler = self._inference_scheduler(self.pipe.scheduler)
        # What DDPMScheduler does not know of the pipeline's scheduler does not concern training.
        self.noise_scheduler = DDPMScheduler.from_config(dict(self.pipe.scheduler.config))
        self.prediction_type = self.noise_scheduler.config.prediction_type
        self.pipe.text_encoder.requires_grad_(False).eval().to(device)
        self.vae.requires_grad_(False).eval()
        self.place_vae(decoder=args.lpl_weight != 0)
        abar = self.noise_scheduler.alphas_cumprod
        self.alphas, self.sigmas = abar.sqrt(), (1 - abar).sqrt()  # [T], on the CPU

    def place_vae(self, decoder):
        """Encoder on the device; the decoder too, or (without LPL, between drawings) not."""
        self.vae.to(self.device)
        if not decoder:
            self.vae.decoder.to("cpu")

    def encode_images(self, pixel_values, generators):
        """Images `[B, 3, H, W]` in [-1, 1] -> scaled latents `[B, C, h, w]`, float32; one generator per sample."""
        posterior = self.vae.encode(pixel_values.to(self.device, self.vae.dtype, non_blocking=True)).latent_dist
        latents = posterior.sample(generators).float()
        return (latents - (self.vae.config.get("shift_factor") or 0)) * self.vae.config.scaling_factor

    def encode_prompts(self, captions):
        """Captions -> keyword arguments of the UNet."""
        embeds, _ = self.pipe.encode_prompt(captions, self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def decode_images(self, latents):
        """Scaled latents -> a list of PIL images."""
        latents = latents.float() / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0)
        images = self.vae.decode(latents.to(self.vae.dtype)).sample
        return self.pipe.image_processor.postprocess(images.float())

    def sample_timesteps(self, generators):
        """Uniform timesteps `[B]`, from CPU generators, so that nobody waits for the device to know them."""
        steps = len(self.alphas)
        return torch.cat([torch.randint(0, steps, (1,), generator=generator) for generator in generators])

    def noise_levels(self, timesteps):
        """alpha, sigma `[B]` of z_t = alpha z_0 + sigma eps, on the CPU like `timesteps`."""
        return self.alphas[timesteps], self.sigmas[timesteps]

    def predict(self, denoiser, noisy_latents, timesteps, conditioning):
        """The denoiser's output `[B, C, h, w]`, in the convention of `self.prediction_type`."""
        return denoiser(
            noisy_latents, timesteps.to(self.device, non_blocking=True), **conditioning, return_dict=False
        )[0]

    def drawing_pipeline(self, unet):
        """A pipeline for validation images that shares the frozen models."""
        components = {**self.pipe.components, "unet": unet}
        pipe = self.pipeline_class(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_pipeline(self, unet, folder):
        """Save a stock pipeline: the new UNet, a scheduler that says how it was trained, the rest as it was."""
        unet.save_pretrained(Path(folder, "unet"))  # first what training made, should the base model be out of reach
        try:
            frozen = {"scheduler": self.pipe.scheduler, **self._load_vae(torch.float32)}
            # All in float32 like the UNet: a text encoder is loaded in the precision of its file.
            pipe = self._load_pipeline(unet=unet, **frozen, dtype=torch.float32)
        except UserError as error:
            raise UserError(
                f"the UNet is saved in {Path(folder, 'unet')}, the rest of the pipeline not: {error}"
            ) from error
        pipe.save_pretrained(folder)

    # Loading and checking

    def _check_configs(self):
        """What can be refused before the weights are downloaded and loaded."""
        name, flag, hub = self.args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", self._hub()
        index = load(self.pipeline_class, name, flag, "load_config", **hub)
        if index["_class_name"] != self.pipeline_class.__name__:
            raise UserError(f"{flag} {name} is a {index['_class_name']}, not a {self.pipeline_class.__name__}.")
        unet_config = load(UNet2DConditionModel, name, flag, "load_config", subfolder="unet", **hub)
        scheduler_config = load(DDPMScheduler, name, flag, "load_config", subfolder="scheduler", **hub)
        if self.args.pretrained_vae_model_name_or_path:
            vae_config = self._vae_config()
        else:
            vae_config = load(AutoencoderKL, name, flag, "load_config", subfolder="vae", **hub)
        check_configs(self.args, vae_config, unet_config, scheduler_config)

    def _hub(self, **more):
        return {"revision": self.args.revision, "cache_dir": self.args.cache_dir, **more}

    def _load_pipeline(self, **components):
        name, hub = self.args.pretrained_model_name_or_path, self._hub(variant=self.args.variant)
        return load(self.pipeline_class, name, "--pretrained_model_name_or_path", **hub, **components)

    def _vae_source(self):
        name = self.args.pretrained_vae_model_name_or_path
        return vae_folder(name) if is_folder_name(name) else name

    def _vae_config(self):
        flag = "--pretrained_vae_model_name_or_path"
        return load(AutoencoderKL, self._vae_source(), flag, "load_config", cache_dir=self.args.cache_dir)

    def _load_vae(self, dtype):
        """`{"vae": the VAE of --pretrained_vae_model_name_or_path}`, or nothing if the flag is not given."""
        if not self.args.pretrained_vae_model_name_or_path:
            return {}
        vae_class = getattr(diffusers, self._vae_config()["_class_name"])
        settings = {"dtype": dtype, "cache_dir": self.args.cache_dir}
        return {"vae": load(vae_class, self._vae_source(), "--pretrained_vae_model_name_or_path", **settings)}

    def _inference_scheduler(self, scheduler):
        """The scheduler that is saved: it must know the prediction type and the noise schedule trained with."""
        changes, scheduler_class = {}, type(scheduler)
        if self.args.prediction_type:
            changes["prediction_type"] = self.args.prediction_type
        if self.args.rescale_betas_zero_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if self.args.rescale_betas_zero_snr or self.args.prediction_type == "sample":
            scheduler_class = DDIMScheduler  # PNDM, Stable Diffusion's default, can do neither; nor does it clip
            changes["clip_sample"] = scheduler.config.get("clip_sample", False)
        return scheduler_class.from_config(scheduler.config, **changes)


def add_noise(latents, noise, alpha, sigma):
    """z_t = alpha z_0 + sigma eps: `[B, C, h, w]` each, alpha and sigma `[B]`."""
    alpha, sigma = (s.to(latents, non_blocking=True).view(-1, 1, 1, 1) for s in (alpha, sigma))
    return alpha * latents + sigma * noise


def training_target(latents, noise, alpha, sigma, prediction_type):
    """What the denoiser should output: eps, v = alpha eps - sigma z_0, z_0, or (flow matching) eps - z_0."""
    alpha, sigma = (s.to(latents, non_blocking=True).view(-1, 1, 1, 1) for s in (alpha, sigma))
    return {
        "epsilon": lambda: noise,
        "v_prediction": lambda: alpha * noise - sigma * latents,
        "sample": lambda: latents,
        "flow_prediction": lambda: noise - latents,
    }[prediction_type]()


def sample_noise(latents, generators, offset=0.0):
    """Noise like `latents`, one generator per sample; `offset` adds noise that is constant over positions."""
    noise = randn_tensor(latents.shape, generator=generators, device=latents.device, dtype=latents.dtype)
    if offset:
        shape = (*latents.shape[:2], 1, 1)
        noise = noise + offset * randn_tensor(shape, generators, device=latents.device, dtype=latents.dtype)
    return noise


def load(model_class, name, flag, method="from_pretrained", **kwargs):
    """Load from a folder or the Hub; what goes wrong there is the user's to mend, in one sentence."""
    try:
        return getattr(model_class, method)(name, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag} {name} can't be loaded ({reason}): give a folder or a Hub id in reach.") from error
