"""What differs between denoisers: how to load one, encode a prompt, call it, read its prediction, unscale its latents.

Each family is a class with the same few methods; the training loop knows nothing else about the model.
Shapes: B batch, C latent channels, h x w latent positions, H x W pixels.
"""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from arguments import UserError, check_configs, is_folder_name, vae_folder
from counters import without_values


diffusers.utils.logging.set_verbosity_error()  # else every long caption is reported whenever it comes up
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet under text conditioning; epsilon, v or sample prediction.

    Args:
        args: the script's flags.
        device: where the models work.
        weight_dtype, vae_dtype: precision of what is frozen (text encoders; with LoRA the UNet) and of the VAE. What
            is trained is in float32.

    `model` is the module to train: the UNet, or with --train_text_encoder both in one.

    Raises:
        UserError: the model can't be loaded or does not fit the flags.
    """

    pipeline_class = StableDiffusionPipeline
    text_encoder_names = ("text_encoder",)
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    settings = {"requires_safety_checker": False}

    def __init__(self, args, device, weight_dtype, vae_dtype):
        self.args, self.device, self.weight_dtype = args, device, weight_dtype
        dtypes = {"default": torch.float32, "unet": weight_dtype if args.use_lora else torch.float32}
        dtypes |= {"vae": vae_dtype, **dict.fromkeys(self.text_encoder_names, weight_dtype)}
        self.pipe = self._load_pipeline(**self._load_vae(vae_dtype), **self.unused, **self.settings, dtype=dtypes)
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        self.text_encoders = {name: getattr(self.pipe, name) for name in self.text_encoder_names}
        self.pipe.scheduler = self._inference_scheduler(self.pipe.scheduler)
        # What DDPMScheduler does not know of the pipeline's scheduler does not concern training.
        self.noise_scheduler = DDPMScheduler.from_config(dict(self.pipe.scheduler.config))
        self.prediction_type = self.noise_scheduler.config.prediction_type
        abar = self.noise_scheduler.alphas_cumprod
        self.alphas, self.sigmas = abar.sqrt(), (1 - abar).sqrt()  # [T], on the CPU
        self.timestep_weights = timestep_weights(args, len(abar))  # [T]

        for module in (self.vae, *self.text_encoders.values()):
            module.requires_grad_(False).eval()
        self.adapted = self._add_adapters() if args.use_lora else {}
        if args.dry_run:
            for module in (self.unet, self.vae, *self.text_encoders.values()):
                without_values(module)
        self.model = self.unet
        if args.train_text_encoder:
            self.model = UNetWithTextEncoders(self.unet, self.text_encoders.values(), self._encode, self.unet_inputs)
        if args.gradient_checkpointing:
            self._checkpoint_activations()
        if args.enable_xformers_memory_efficient_attention and not args.dry_run:
            self._use_xformers()
        self._embeddings = None  # caption -> embeddings, if they are cached
        self.placed = {}
        self.place(encoder=True, decoder=args.lpl_weight != 0, text_encoders=True)

    # Where the frozen models are

    def place(self, **parts):
        """Move the VAE's `encoder` or `decoder` or the `text_encoders` to the device (True) or to the CPU (False)."""
        self.placed |= parts
        for part, on_device in parts.items():
            for module in self.modules(part) if not self.args.dry_run else ():
                module.to(self.device if on_device else "cpu")

    def modules(self, part):
        vae = self.vae
        modules = {
            "encoder": (vae.encoder, vae.quant_conv),
            "decoder": (vae.decoder, vae.post_quant_conv),
            "text_encoders": self.text_encoders.values(),
        }
        return [module for module in modules[part] if module is not None]

    # Latents

    def encode_images(self, pixel_values):
        """Images `[B, 3, H, W]` in [-1, 1] -> the parameters of their latents' posterior, `[B, 2 C, h, w]`."""
        return self.vae.encode(pixel_values.to(self.device, self.vae.dtype, non_blocking=True)).latent_dist.parameters

    def latents(self, batch, generators):
        """Scaled latents `[B, C, h, w]`, float32, drawn from their posterior; one generator per sample."""
        posterior = batch["posteriors"] if "posteriors" in batch else self.encode_images(batch["pixel_values"])
        posterior = DiagonalGaussianDistribution(posterior.to(self.device, non_blocking=True))
        latents = posterior.sample(generators).float()
        return (latents - (self.vae.config.get("shift_factor") or 0)) * self.vae.config.scaling_factor

    def decode_images(self, latents):
        """Scaled latents `[B, C, h, w]` -> a list of PIL images."""
        latents = latents.float() / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0)
        images = self.vae.decode(latents.to(self.vae.dtype)).sample
        return self.pipe.image_processor.postprocess(images.float())

    # Prompts

    def encode_prompts(self, captions):
        """Captions -> embeddings, name of the pipeline's argument -> `[B, ...]`; an empty one is no prompt."""
        if self._embeddings is None:
            return self._encode(captions)
        rows = [self._embeddings[caption] for caption in captions]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: embeddings.to(self.device, non_blocking=True) for name, embeddings in stacked.items()}

    @torch.no_grad()
    def cache_prompts(self, captions, share_work):
        """Encode captions once, and take the text encoders off the device."""

        def embed(caption):
            return {name: embedding[0].cpu() for name, embedding in self._encode([caption]).items()}

        captions = sorted(set(captions))
        self._embeddings = dict(zip(captions, share_work(captions, embed, "Caching text embeddings")))
        self.place(text_encoders=False)

    def _encode(self, captions):
        embeds, _ = self.pipe.encode_prompt(captions, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def conditioning(self, batch):
        """What the denoiser is told about a batch, for `predict`."""
        captions = batch["captions"]
        return {"captions": captions} if self.args.train_text_encoder else self.encode_prompts(captions)

    @staticmethod
    def unet_inputs(prompt_embeds):
        """The UNet's keyword arguments."""
        return {"encoder_hidden_states": prompt_embeds}

    # Noise

    def sample_timesteps(self, generators):
        """Timesteps `[B]`, from CPU generators, so that nobody waits for the device to know them."""
        if self.args.timestep_bias_strategy == "none":
            draws = [torch.randint(0, len(self.alphas), (1,), generator=generator) for generator in generators]
        else:
            draws = [torch.multinomial(self.timestep_weights, 1, generator=generator) for generator in generators]
        return torch.cat(draws)

    def noise_levels(self, timesteps):
        """alpha, sigma `[B]` of z_t = alpha z_0 + sigma eps, on the CPU like `timesteps`."""
        return self.alphas[timesteps], self.sigmas[timesteps]

    def predict(self, model, noisy_latents, timesteps, conditioning):
        """The output of `model` `[B, C, h, w]`, in the convention of `self.prediction_type`."""
        inputs = conditioning if self.args.train_text_encoder else self.unet_inputs(**conditioning)
        return model(noisy_latents, timesteps.to(self.device, non_blocking=True), **inputs, return_dict=False)[0]

    # Drawing

    @torch.no_grad()
    def draw(self, prompt, generator, **settings):
        """One PIL image for a prompt, with the model as it is."""
        inputs = self.encode_prompts([prompt])
        inputs |= {f"negative_{name}": embeddings for name, embeddings in self.encode_prompts([""]).items()}
        components = {**self.pipe.components, **dict.fromkeys(self.text_encoder_names)}
        pipe = self.pipeline_class(**components, **self.settings)
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(**inputs, generator=generator, output_type="latent", **settings).images
        return self.decode_images(latents)[0]

    # Saving and loading what is trained

    def save_weights(self, folder):
        """What a checkpoint needs: `unet/`, or LoRA weights that `load_lora_weights` of the pipeline reads."""
        if not self.args.use_lora:
            return self.unet.save_pretrained(Path(folder, "unet"))
        layers = {}
        for name, model in self.adapted.items():
            # In peft's names: diffusers' own are for attention layers only, and a mix loads in part, silently.
            state = get_peft_model_state_dict(model)
            if name != "unet":  # as older transformers, and other tools, call a text encoder's modules
                state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
            layers[f"{name}_lora_layers"] = {key: value.contiguous() for key, value in state.items()}
        self.pipeline_class.save_lora_weights(folder, **layers, **_collate_lora_metadata(self.adapted))

    def load_weights(self, folder):
        """What `save_weights` wrote."""
        if not self.args.use_lora:
            saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
            return self.unet.load_state_dict(saved.state_dict())
        state, _ = self.pipeline_class.lora_state_dict(folder)
        for name, model in self.adapted.items():
            part = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
            if not hasattr(model, "text_model"):
                part = {key.removeprefix("text_model."): value for key, value in part.items()}
            wrong = set_peft_model_state_dict(model, part)
            missing = [key for key in wrong.missing_keys if "lora_" in key]
            if missing or wrong.unexpected_keys:
                raise ValueError(f"its LoRA is another one: {(missing or wrong.unexpected_keys)[0]}")

    def save_result(self, folder):
        """LoRA weights, or a stock pipeline: the new UNet, a scheduler that says how it was trained, the rest."""
        base = self.args.pretrained_model_name_or_path
        if is_folder_name(base):  # no paths of this machine in what may be shared
            self.unet.register_to_config(_name_or_path=Path(base).resolve().name)
        self.save_weights(folder)  # first what training made, should the base model be out of reach
        if self.args.use_lora:
            if self.args.prediction_type or self.args.rescale_betas_zero_snr:  # the base model's does not say so
                self.pipe.scheduler.save_pretrained(Path(folder, "scheduler"))
            return
        try:
            frozen = {"unet": self.unet, "scheduler": self.pipe.scheduler, **self._load_vae(torch.float32)}
            # All in float32 like the UNet: a text encoder is loaded in the precision of its file.
            pipe = self._load_pipeline(**frozen, dtype=torch.float32)
        except UserError as error:
            raise UserError(
                f"the UNet is saved in {Path(folder, 'unet')}, the rest of the pipeline not: {error}"
            ) from error
        for part in (pipe, pipe.vae) if is_folder_name(base) else ():
            part.register_to_config(_name_or_path=Path(base).resolve().name)
        pipe.save_pretrained(folder)

    def load_result(self, folder):
        """The result as its user will load it: a stock pipeline on the device. What was trained leaves the device."""
        self.place(encoder=False, decoder=False, text_encoders=False)
        self.model.to("cpu")
        settings = {**self.unused, **self.settings, "dtype": self.weight_dtype}  # its sampler can't mix precisions
        if self.args.use_lora:
            pipe = self._load_pipeline(scheduler=self.pipe.scheduler, **self._load_vae(self.weight_dtype), **settings)
            pipe.load_lora_weights(folder)
        else:
            pipe = load(self.pipeline_class, folder, "--output_dir", **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    # Loading

    def _load_pipeline(self, **components):
        name, hub = self.args.pretrained_model_name_or_path, hub_flags(self.args)
        if self.args.dry_run:
            return load_without_values(self.pipeline_class, name, hub, **components)
        flag = "--pretrained_model_name_or_path"
        return load(self.pipeline_class, name, flag, variant=self.args.variant, **hub, **components)

    def _load_vae(self, dtype):
        """`{"vae": the VAE of --pretrained_vae_model_name_or_path}`, or nothing if the flag is not given."""
        if not self.args.pretrained_vae_model_name_or_path:
            return {}
        config, hub = given_vae_config(self.args), {"cache_dir": self.args.cache_dir}
        vae_class = getattr(diffusers, config["_class_name"])
        if self.args.dry_run:
            return {"vae": from_config_without_values(vae_class, config, dtype)}
        return {"vae": load(vae_class, vae_source(self.args), VAE_FLAG, dtype=dtype, **hub)}

    def _add_adapters(self):
        """LoRA on the UNet and, if asked for, on the text encoders; returns name -> model with adapters."""
        args = self.args
        shared = {"r": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        shared |= {"use_dora": args.use_dora, "init_lora_weights": "gaussian"}
        layers = (args.lora_layers or "to_k,to_q,to_v,to_out.0").split(",")
        adapted = {"unet": self.unet.requires_grad_(False)}
        try:
            self.unet.add_adapter(LoraConfig(target_modules=[layer.strip() for layer in layers], **shared))
        except ValueError as error:
            raise UserError(f"--lora_layers {args.lora_layers}: {str(error).splitlines()[0]}") from error
        if args.train_text_encoder:
            for name, text_encoder in self.text_encoders.items():
                layers = range(self._layers_used(name, text_encoder))
                names = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "layers_pattern": "layers"}
                text_encoder.add_adapter(LoraConfig(**names, layers_to_transform=list(layers), **shared))
            adapted |= self.text_encoders
        cast_training_params(list(adapted.values()), torch.float32)
        return adapted

    @staticmethod
    def _layers_used(name, text_encoder):
        """Layers of a text encoder that the UNet hears of: the others would train on nothing, and DDP refuses that."""
        return text_encoder.config.num_hidden_layers

    def _checkpoint_activations(self):
        self.unet.enable_gradient_checkpointing()
        for text_encoder in self.text_encoders.values() if self.args.train_text_encoder else ():
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def _use_xformers(self):
        try:
            self.unet.enable_xformers_memory_efficient_attention()
        except (ValueError, ModuleNotFoundError, NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--enable_xformers_memory_efficient_attention: {reason}; leave it out.") from error

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


class StableDiffusionXL(StableDiffusion):
    """SDXL's base model: two text encoders, and the UNet is told of the image's size and of the crop."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    unused = {"feature_extractor": None, "image_encoder": None}
    settings = {}

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False}
        embeds, _, pooled, _ = self.pipe.encode_prompt(captions, **settings)
        if self.pipe.config.force_zeros_for_empty_prompt:  # so the pipeline does without a negative prompt
            empty = torch.tensor([caption == "" for caption in captions]).to(embeds.device, non_blocking=True)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def conditioning(self, batch):
        target_size = torch.full_like(batch["original_sizes"], self.args.resolution)
        time_ids = torch.cat([batch["original_sizes"], batch["crop_top_lefts"], target_size], dim=1)  # [B, 6]
        time_ids = time_ids.to(self.device, torch.float32, non_blocking=True)  # bf16 rounds 1023 to 1024
        return {**super().conditioning(batch), "time_ids": time_ids}

    @staticmethod
    def unet_inputs(prompt_embeds, pooled_prompt_embeds, time_ids):
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return {"encoder_hidden_states": prompt_embeds, "added_cond_kwargs": added}

    @staticmethod
    def _layers_used(name, text_encoder):
        # The last but one layer's output is used of both; the second gives the pooled output of its last layer, too.
        return text_encoder.config.num_hidden_layers - (name == "text_encoder")


FAMILIES = {family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL)}
VAE_FLAG = "--pretrained_vae_model_name_or_path"


class UNetWithTextEncoders(torch.nn.Module):
    """What is trained with --train_text_encoder, in one forward pass, as DDP and gradient accumulation want it."""

    def __init__(self, unet, text_encoders, encode, unet_inputs):
        super().__init__()
        self.unet, self.text_encoders = unet, torch.nn.ModuleList(text_encoders)
        self._encode, self._unet_inputs = encode, unet_inputs

    def forward(self, noisy_latents, timesteps, captions, return_dict, **more):
        inputs = self._unet_inputs(**self._encode(captions), **more)
        return self.unet(noisy_latents, timesteps, **inputs, return_dict=return_dict)


def find_family(args):
    """The class for the model of the flags, which are checked against its configs, before any weights are loaded."""
    name, flag, hub = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", hub_flags(args)
    index = load(DiffusionPipeline, name, flag, "load_config", **hub)
    if index["_class_name"] not in args.pipelines:
        raise UserError(
            f"{flag} {name} is a {index['_class_name']}; this script finetunes {', '.join(args.pipelines)}."
        )
    unet_config = load(UNet2DConditionModel, name, flag, "load_config", subfolder="unet", **hub)
    scheduler_config = load(DDPMScheduler, name, flag, "load_config", subfolder="scheduler", **hub)
    if args.pretrained_vae_model_name_or_path:
        vae_config = given_vae_config(args)
    else:
        vae_config = load(AutoencoderKL, name, flag, "load_config", subfolder="vae", **hub)
    check_configs(args, vae_config, unet_config, scheduler_config)
    return FAMILIES[index["_class_name"]]


def hub_flags(args):
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def vae_source(args):
    name = args.pretrained_vae_model_name_or_path
    return vae_folder(name) if is_folder_name(name) else name


def given_vae_config(args):
    return load(AutoencoderKL, vae_source(args), VAE_FLAG, "load_config", cache_dir=args.cache_dir)


def timestep_weights(args, num_timesteps):
    """How often each timestep is drawn, `[T]`, sums to 1: the --timestep_bias_ flags of the Diffusers SDXL script."""
    weights, biased = torch.ones(num_timesteps), round(args.timestep_bias_portion * num_timesteps)
    favoured = {
        "none": slice(0),
        "earlier": slice(biased),
        "later": slice(num_timesteps - biased, None),
        "range": slice(args.timestep_bias_begin, args.timestep_bias_end),
    }
    weights[favoured[args.timestep_bias_strategy]] *= args.timestep_bias_multiplier
    return weights / weights.sum()


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


def load_without_values(pipeline_class, name, hub, dtype, **components):
    """The pipeline of `from_pretrained`, its models on the meta device: their config files are enough."""
    flag = "--pretrained_model_name_or_path"
    settings = {}
    for part, entry in load(pipeline_class, name, flag, "load_config", **hub).items():
        if not isinstance(entry, (list, tuple)):
            settings |= {} if part.startswith("_") else {part: entry}
            continue
        if part in components or entry[1] is None:
            components.setdefault(part, None)
            continue
        model_class = getattr(diffusers if entry[0] == "diffusers" else transformers, entry[1])
        part_dtype = dtype.get(part, dtype["default"])
        if issubclass(model_class, diffusers.ModelMixin):
            config = load(model_class, name, flag, "load_config", subfolder=part, **hub)
            components[part] = from_config_without_values(model_class, config, part_dtype)
        elif issubclass(model_class, transformers.PreTrainedModel):
            config = load(model_class.config_class, name, flag, subfolder=part, **hub)
            with torch.device("meta"):
                components[part] = model_class(config).to(part_dtype)
        else:
            components[part] = load(model_class, name, flag, subfolder=part, **hub)
    known = {key: value for key, value in settings.items() if key not in components}
    return pipeline_class(**{**known, **components})


def from_config_without_values(model_class, config, dtype):
    with torch.device("meta"):
        return model_class.from_config(config).to(dtype)
