"""What all denoisers share: loading one, encoding prompts, its noise levels, calling it, drawing, saving.

`Family` is the seam between the training loop and a model; `model_families.py` has a short class for each kind.
Shapes: B batch, C latent channels, h x w latent positions, H x W pixels, T noise levels.
"""

import difflib
import inspect
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from arguments import UserError, first_line
from counters import without_values
from disk_cache import files_hash, weights_hash
from kohya import KOHYA_FILE, kohya_metadata, to_kohya
from loading import (
    DTYPES,
    from_config_without_values,
    given_vae_config,
    hub_flags,
    initialize,
    load,
    load_vae,
    load_without_values,
    quantization_config,
)
from model_checks import is_folder_name, latent_channels
from noise import (
    dynamic_shift,
    flow_sigmas,
    flow_timestep_weights,
    is_flow_scheduler,
    prediction_type,
    timestep_weights,
)


diffusers.utils.logging.set_verbosity_error()  # else every long caption is reported whenever it comes up
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
LORA_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
VARIANTS = {"fp32": None, "fp16": "fp16", "bf16": "bf16"}  # precision of files -> their variant
NON_EMA = "non_ema"  # variant of the weights beside their average, as Stable Diffusion's repositories have it
NON_EMA_LORA = LORA_FILE.replace(".", f"_{NON_EMA}.")


class Family:
    """What all families share; each says only what differs.

    Args:
        args: the script's flags.
        device: where the models work.
        weight_dtype, vae_dtype: precision of what is frozen (text encoders; with LoRA the denoiser) and of the VAE.
            What is trained is in float32.

    `denoiser` is the UNet or transformer, and `model` the module to train: the denoiser, or with
    --train_text_encoder both in one. Noise levels are a grid: `timesteps`, `alphas`, `sigmas` and `timestep_weights`
    (how often each is drawn), `[T]` on the CPU.

    Raises:
        UserError: the model can't be loaded or does not fit the flags.
    """

    pipeline_class = None
    denoiser_name, denoiser_class = "transformer", None
    text_encoder_names = ("text_encoder",)
    unused = {}  # components that are not loaded
    settings = {}  # of the pipeline's constructor
    sampling = {}  # of its call, as training wants it
    lora_layers = "to_k,to_q,to_v,to_out.0"
    stock_lora = True  # whether the stock pipeline reads LoRA files
    pack = 1  # side of the patches into which the pipeline packs latents
    ragged = False  # whether the length of embeddings depends on the caption
    block_lists = ("transformer_blocks",)  # the denoiser's blocks, part by part, in the order in which they run
    unread = ()  # modules whose output nobody reads: without a gradient DDP would wait for theirs
    timestep_name, guidance_name = "timestep", "guidance_scale"  # in the denoiser's call, in the pipeline's

    def __init__(self, args, device, weight_dtype, vae_dtype):
        self.args, self.device, self.weight_dtype = args, device, weight_dtype
        self.unused = {**self.unused, **dict.fromkeys(args.absent_parts)}
        length = args.max_sequence_length
        self.text_settings = {} if length is None else {"max_sequence_length": length}
        self.sampling = {**self.sampling, **self.text_settings}
        dtypes = {"default": torch.float32, self.denoiser_name: weight_dtype if args.use_lora else torch.float32}
        dtypes |= {"vae": vae_dtype, **dict.fromkeys(self.text_encoder_names, weight_dtype)}
        given = {**self._given_denoiser(dtypes[self.denoiser_name]), **self._load_vae(vae_dtype)}
        self.pipe = self._load_pipeline(**given, **self.unused, **self.settings, dtype=dtypes)
        self.denoiser, self.vae = getattr(self.pipe, self.denoiser_name), self.pipe.vae
        self.text_encoders = {name: getattr(self.pipe, name) for name in self.text_encoder_names}
        self.text_encoders = {name: encoder for name, encoder in self.text_encoders.items() if encoder is not None}
        self.pipe.scheduler = self._inference_scheduler(self.pipe.scheduler)
        self._set_noise_levels(self.pipe.scheduler)
        if self._base_name != args.pretrained_model_name_or_path:
            self.denoiser.register_to_config(_name_or_path=self._base_name)

        for module in (self.vae, *self.text_encoders.values()):
            module.requires_grad_(False).eval()
        with torch.random.fork_rng():
            torch.manual_seed(args.seed or 0)  # adapters begin alike in all processes
            self.adapted = self._add_adapters() if args.use_lora else {}
        if args.output_kohya_format:
            self._for_kohya(torch.float32, device="meta")  # may refuse
        for name in self.unread:
            self.denoiser.get_submodule(name).requires_grad_(False)
        if args.dry_run:
            for module in (self.denoiser, self.vae, *self.text_encoders.values()):
                without_values(module)
        self.model = self.denoiser
        if args.train_text_encoder:
            encoders = self.text_encoders.values()
            self.model = DenoiserWithTextEncoders(self.denoiser, encoders, self._encode, self.denoiser_inputs)
        if args.gradient_checkpointing:
            self._checkpoint_activations()
        if args.enable_xformers_memory_efficient_attention and not args.dry_run:
            self._use_xformers()
        self._embeddings = None  # caption -> embeddings, if they are cached
        self.placed = {}
        self.place(encoder=not args.offload, decoder=uses_decoder(args), text_encoders=not args.offload)

    @property
    def trained_parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    # Where the frozen models are

    def place(self, **parts):
        """Move the VAE's `encoder` or `decoder` or the `text_encoders` to the device (True) or to the CPU (False)."""
        self.placed |= parts
        for part, on_device in parts.items():
            for module in self.modules(part) if not self.args.dry_run else ():
                module.to(self.device if on_device else "cpu")

    @contextmanager
    def on_device(self, part):
        """The modules of a part are on the device inside, and afterwards where they were (--offload)."""
        was_placed = self.placed[part]
        if not was_placed:
            self.place(**{part: True})
        try:
            yield
        finally:
            if not was_placed:
                self.place(**{part: False})

    def modules(self, part):
        vae = self.vae
        modules = {
            "encoder": (vae.encoder, getattr(vae, "quant_conv", None)),
            "decoder": (vae.decoder, getattr(vae, "post_quant_conv", None)),
            "text_encoders": self.text_encoders.values(),
        }
        return [module for module in modules[part] if module is not None]

    # Latents

    def encode_images(self, pixel_values):
        """Images `[B, 3, H, W]` in [-1, 1] -> the parameters of their latents' posterior, `[B, 2 C, h, w]`.

        Of a VAE without a posterior the latents themselves, `[B, C, h, w]`.
        """
        with self.on_device("encoder"):
            encoded = self.vae.encode(pixel_values.to(self.device, self.vae.dtype, non_blocking=True))
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded[0]

    def latents(self, batch, generators):
        """Scaled latents `[B, C, h, w]`, float32, drawn from their posterior; one generator per sample."""
        latents = batch["posteriors"] if "posteriors" in batch else self.encode_images(batch["pixel_values"])
        latents = latents.to(self.device, non_blocking=True)
        if latents.shape[1] == 2 * latent_channels(self.vae.config):
            latents = DiagonalGaussianDistribution(latents).sample(generators)
        return self.scale(latents.float())

    def scale(self, latents):
        """What the VAE encodes to, `[B, C, h, w]` -> what the denoiser sees."""
        return (latents - (self.vae.config.get("shift_factor") or 0)) * self.vae.config.scaling_factor

    def unscale(self, latents):
        """What the denoiser sees -> what `vae.decode` takes; differentiable."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0)

    def decode(self, latents):
        """Scaled latents `[B, C, h, w]` -> images `[B, 3, H, W]` in [-1, 1]."""
        return self.vae.decode(self.unscale(latents.float()).to(self.vae.dtype)).sample

    def decode_images(self, latents):
        """Scaled latents `[B, C, h, w]` -> a list of PIL images."""
        return VaeImageProcessor().postprocess(self.decode(latents).float())

    # Prompts

    def encode_prompts(self, captions, rows=None):
        """Captions -> embeddings, name of the pipeline's argument -> `[B, ...]`; an empty one is no prompt.

        Embeddings whose length depends on the caption are a list of B tensors, so that no caption sees the others.
        If embeddings are cached, `rows` are those of the captions, should they be at hand.
        """
        if self._embeddings is None:
            with self.on_device("text_encoders"):
                return self._encode(captions)
        rows = rows or [self._embeddings[caption] for caption in captions]
        if self.ragged:
            return {name: [row[name].to(self.device, non_blocking=True) for row in rows] for name in rows[0]}
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: embeddings.to(self.device, non_blocking=True) for name, embeddings in stacked.items()}

    @torch.no_grad()
    def cache_prompts(self, captions, store):
        """Encode captions once, and take the text encoders off the device.

        `store` makes of a list of captions, and a function that encodes one, a map from caption to embeddings, which
        is returned.
        """

        def embed(caption):
            return {name: embedding[0].cpu() for name, embedding in self._encode([caption]).items()}

        captions = sorted(set(captions))
        # In 4 bits the denoiser is on the device already: large text encoders need its room.
        in_the_way = (self.args.bnb_quantization_config_path or {}).get("load_in_4bit") and not self.args.dry_run
        if in_the_way:
            self.denoiser.to("cpu")
        self.place(text_encoders=True)
        self._embeddings = store(captions, embed)
        self.place(text_encoders=False)
        if in_the_way:
            self.denoiser.to(self.device)
        return self._embeddings

    def text_identity(self):
        """All that a caption's embeddings depend on, for a cache on the disk."""
        tokenizers = [self.pipe.components[name] for name in sorted(self.pipe.components) if "tokenizer" in name]
        return {
            "pipeline": [self.pipeline_class.__name__, diffusers.__version__, transformers.__version__],
            "settings": [self.text_settings, self.pipe.config.get("force_zeros_for_empty_prompt")],
            "tokenizers": files_hash(*filter(None, tokenizers)),
            "weights": weights_hash(*self.text_encoders.values()),
        }

    def conditioning(self, batch):
        """What the denoiser is told about a batch, for `predict`."""
        captions = batch["captions"]
        if self.args.train_text_encoder:
            return {"captions": captions}
        return self.encode_prompts(captions, batch.get("embeddings"))

    # Noise

    def _set_noise_levels(self, scheduler):
        self.prediction_type = prediction_type(scheduler)
        if self.prediction_type == "flow_prediction":
            patch_size = self.denoiser.config.get("patch_size", 1) * self.pack
            self.sigmas = flow_sigmas(scheduler, self.flow_shift((self.args.latent_size // patch_size) ** 2))
            self.alphas = 1 - self.sigmas
            self.timesteps = self.sigmas * len(self.sigmas)
            self.timestep_weights = flow_timestep_weights(self.args, len(self.sigmas))
            return
        # What DDPMScheduler does not know of the pipeline's scheduler does not concern training.
        abar = DDPMScheduler.from_config(dict(scheduler.config)).alphas_cumprod
        self.alphas, self.sigmas = abar.sqrt(), (1 - abar).sqrt()
        self.timesteps = torch.arange(len(abar))
        self.timestep_weights = timestep_weights(self.args, len(abar))

    def flow_shift(self, sequence_length):
        """mu of the noise levels, where the scheduler lets it depend on the number of tokens."""
        return dynamic_shift(self.pipe.scheduler.config, sequence_length)

    def sample_timesteps(self, generators, quantiles=()):
        """Timesteps `[B]`, from CPU generators, so that nobody waits for the device to know them.

        Of the first samples the quantiles can be given, numbers in [0, 1) (see `noise.stratified_quantiles`).
        """
        if (self.timestep_weights == self.timestep_weights[0]).all():
            draws = [torch.randint(0, len(self.timesteps), (1,), generator=generator) for generator in generators]
        else:
            draws = [torch.multinomial(self.timestep_weights, 1, generator=generator) for generator in generators]
        index = torch.cat(draws)
        if len(quantiles):
            found = torch.searchsorted(self.timestep_weights.double().cumsum(0), quantiles, right=True)
            index[: len(quantiles)] = found.clamp(max=len(self.timesteps) - 1)
        return self.timesteps[index]

    def noise_levels(self, timesteps):
        """alpha, sigma `[B]` of z_t = alpha z_0 + sigma eps, on the CPU like `timesteps`."""
        if self.prediction_type == "flow_prediction":
            sigmas = timesteps / len(self.sigmas)
            return 1 - sigmas, sigmas
        return self.alphas[timesteps], self.sigmas[timesteps]

    # The denoiser

    def predict(self, model, noisy_latents, timesteps, conditioning):
        """The output of `model` `[B, C, h, w]`, in the convention of `self.prediction_type`."""
        return self.from_tokens(self.call(model, noisy_latents, timesteps, conditioning)[0], noisy_latents)

    def call(self, model, noisy_latents, timesteps, conditioning):
        """What `model` returns, a tuple whose first entry is its output."""
        if self.args.train_text_encoder:
            inputs = dict(conditioning)
        else:
            inputs = self.denoiser_inputs(noisy_latents, **conditioning)
        inputs[self.timestep_name] = self.scale_timesteps(timesteps).to(self.device, non_blocking=True)
        try:
            return model(self.to_tokens(noisy_latents), **inputs, return_dict=False)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            if self.args.transformer_config is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"--transformer_config: this transformer can't work in the pipeline: {first_line(error)}"
            ) from error

    @property
    def blocks(self):
        """Names of the denoiser's blocks, as in `named_modules`, in the order in which they run."""
        return block_names(self.denoiser, self.block_lists)

    def hidden_states(self, output, noisy_latents, conditioning):
        """The image's `[B, ...]` in what one of the blocks returns: of text and image, the second."""
        return output[1] if isinstance(output, tuple) else output

    def scale_timesteps(self, timesteps):
        """As the denoiser wants them; a scheduler that samples diffusion as well cuts those of flow matching."""
        flow = self.prediction_type == "flow_prediction"
        return timesteps.long() if flow and not is_flow_scheduler(self.pipe.scheduler) else timesteps

    def to_tokens(self, latents):
        """Latents as the denoiser takes them."""
        return latents

    def from_tokens(self, output, latents):
        """What the denoiser gives for `latents`, in their shape."""
        return output[:, : latents.shape[1]]  # some predict a variance as well, which the loss leaves alone

    # Drawing

    @staticmethod
    def prompt(prompt):
        """The pipeline's arguments for a prompt of the flags."""
        return {"prompt": prompt}

    @staticmethod
    def size_settings(resolution):
        """What tells the pipeline the size of its images."""
        return {"height": resolution, "width": resolution}

    @torch.no_grad()
    def draw(self, prompt, generator, **settings):
        """One PIL image for a prompt, with the model as it is."""
        components = {**self.pipe.components, **dict.fromkeys(self.text_encoder_names)}
        pipe = self.pipeline_class(**components, **self.settings)
        pipe.set_progress_bar_config(disable=True)
        settings |= {**self.sampling, "generator": generator, "output_type": "latent"}
        return self.decode_images(self._sample(pipe, prompt, **settings))[0]

    def _sample(self, pipe, prompt, **settings):
        """Scaled latents `[1, C, h, w]` from the pipeline's sampler, given embeddings."""
        inputs = self.encode_prompts([prompt]) | {"negative_prompt": None}
        inputs |= {f"negative_{name}": embeddings for name, embeddings in self.encode_prompts([""]).items()}
        return pipe(**inputs, **settings).images

    # Saving and loading what is trained

    @property
    def loader(self):
        """How to load the result."""
        if self.args.use_lora and not self.stock_lora:
            return "PeftModel.from_pretrained(pipe.transformer, ...)"
        if self.args.use_lora:
            return f"{self.pipeline_class.__name__}.load_lora_weights"
        variant = VARIANTS[self.args.save_dtype[0]]
        words = [f'subfolder="{self.denoiser_name}"'] if self.args.save_only_trained else []
        words += [f'variant="{variant}"'] if variant else []
        loaded = self.denoiser_class if self.args.save_only_trained else self.pipeline_class
        return f"{loaded.__name__}.from_pretrained" + (f"(..., {', '.join(words)})" if words else "")

    def save_weights(self, folder):
        """What a checkpoint needs: the denoiser's folder, or LoRA weights (see `save_lora`)."""
        if self.args.use_lora:
            return self.save_lora(folder)
        self.denoiser.save_pretrained(Path(folder, self.denoiser_name))

    def save_lora(self, folder, dtype=torch.float32, name=LORA_FILE):
        """A file that `load_lora_weights` of the pipeline reads or, where it can't, a folder for peft."""
        if not self.stock_lora:
            config, state = self.denoiser.peft_config["default"], lora_state(self.denoiser, dtype)
            config.save_pretrained(folder)
            state = {f"base_model.model.{key}": value for key, value in state.items()}
            return save_file(state, Path(folder, PEFT_FILE), metadata={"format": "pt"})
        layers = {f"{part}_lora_layers": state for part, state in self._lora_states(dtype).items()}
        metadata = _collate_lora_metadata(self.adapted)
        self.pipeline_class.save_lora_weights(folder, weight_name=name, **layers, **metadata)

    def _lora_states(self, dtype):
        """Part of the pipeline -> the weights of its adapters by name."""
        states = {}
        for part, model in self.adapted.items():
            # In peft's names: diffusers' own are for attention layers only, and a mix loads in part, silently.
            states[part] = lora_state(model, dtype)
            if part != self.denoiser_name:  # as older transformers, and other tools, call a text encoder's modules
                state = states[part].items()
                states[part] = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state}
        return states

    def load_weights(self, folder):
        """What `save_weights` wrote."""
        if not self.args.use_lora:
            saved = self.denoiser_class.from_pretrained(folder, subfolder=self.denoiser_name)
            return self.denoiser.load_state_dict(saved.state_dict())
        state = load_file(Path(folder, LORA_FILE if self.stock_lora else PEFT_FILE))
        for name, model in self.adapted.items():
            prefix = f"{name}." if self.stock_lora else "base_model.model."
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if not hasattr(model, "text_model"):
                part = {key.removeprefix("text_model."): value for key, value in part.items()}
            wrong = set_peft_model_state_dict(model, part)
            missing = [key for key in wrong.missing_keys if "lora_" in key]
            if missing or wrong.unexpected_keys:
                raise ValueError(f"its LoRA is another one: {(missing or wrong.unexpected_keys)[0]}")

    def save_result(self, folder, raw=None):
        """LoRA weights, or a stock pipeline: the new denoiser, a scheduler that says how it was trained, the rest.

        In every precision of --save_dtype. raw: weights that are not the average, to be saved besides, name -> tensor.
        """
        args = self.args
        if args.use_lora or args.save_only_trained:
            if args.prediction_type or args.rescale_betas_zero_snr:  # the base model's does not say so
                self.pipe.scheduler.save_pretrained(Path(folder, "scheduler"))
        if args.use_lora:
            return self._save_loras(folder, raw, DTYPES[args.save_dtype[0]])
        # First what training made, should the base model be out of reach.
        for precision in args.save_dtype:
            self._save_denoiser(folder, in_precision(self.denoiser, DTYPES[precision]), VARIANTS[precision])
        try:
            if not args.save_only_trained:
                self._save_pipeline(folder)
        finally:
            if raw is not None:  # last, as diffusers removes the shards of other variants when it saves float32
                self._save_denoiser(folder, in_precision(self.denoiser, DTYPES[args.save_dtype[0]], raw), NON_EMA)

    def _save_pipeline(self, folder):
        """All of it, in every precision."""
        configs = {}
        for precision in self.args.save_dtype:
            pipe = self._load_rest(folder, in_precision(self.denoiser, DTYPES[precision]), DTYPES[precision])
            pipe.save_pretrained(folder, variant=VARIANTS[precision], max_shard_size=self.args.max_shard_size)
            configs = configs or {path: path.read_bytes() for path in Path(folder).glob("*/config.json")}
        for path, content in configs.items():  # text encoders come in the precision that theirs name: the first
            path.write_bytes(content)

    @property
    def _base_name(self):
        """The base model's Hub id, or the folder's own name: no paths of this machine in what may be shared."""
        name = self.args.pretrained_model_name_or_path
        return Path(name).resolve().name if name is not None and is_folder_name(name) else name

    def _save_denoiser(self, folder, denoiser, variant):
        folder = Path(folder, self.denoiser_name)
        denoiser.save_pretrained(folder, variant=variant, max_shard_size=self.args.max_shard_size)

    def _save_loras(self, folder, raw, dtype):
        self.save_lora(folder, dtype)
        if self.args.output_kohya_format:
            state, metadata = self._for_kohya(dtype)
            save_file(state, Path(folder, KOHYA_FILE), metadata=metadata)
        if raw is not None:
            self.model.load_state_dict(raw, strict=False)
            if self.stock_lora:
                self.save_lora(folder, dtype, name=NON_EMA_LORA)
            else:
                self.save_lora(Path(folder, NON_EMA), dtype)

    def _load_rest(self, folder, denoiser, dtype):
        """The pipeline around a denoiser that is saved in `folder`, all of it loaded in one precision."""
        try:
            frozen = {self.denoiser_name: denoiser, "scheduler": self.pipe.scheduler}
            frozen |= dict.fromkeys(self.args.absent_parts)
            pipe = self._load_pipeline(**frozen, **self._load_vae(dtype), dtype=dtype)
        except UserError as error:
            saved = Path(folder, self.denoiser_name)
            raise UserError(f"what was trained is saved in {saved}, the rest of the pipeline not: {error}") from error
        for part in (pipe, pipe.vae):
            path = part.config.get("_name_or_path")
            if path and is_folder_name(path):
                part.register_to_config(_name_or_path=Path(path).resolve().name)
        return pipe

    def _for_kohya(self, dtype, device=None):
        """The adapters and the metadata of a file for other tools. Raises UserError: they have no name for a layer."""
        states = self._lora_states(dtype).items()
        state = {f"{part}.{key}": value.to(device) for part, state in states for key, value in state.items()}
        settings = self.args.lora_alpha, self.pipeline_class.__name__
        return to_kohya(state, *settings), kohya_metadata(state, *settings)

    def rebuild_denoiser(self, state):
        """The denoiser anew, on the CPU, from name -> whole tensor (with LoRA the adapters'); it can only be saved."""
        config = self.denoiser.config
        with torch.device("meta"):
            denoiser = self.denoiser_class.from_config(config)
        if self.args.use_lora:
            self._add_adapter(denoiser).peft_config = self.denoiser.peft_config
            self.adapted[self.denoiser_name] = denoiser
        denoiser.load_state_dict(state, strict=not self.args.use_lora, assign=True)
        self.denoiser = self.model = denoiser

    def load_result(self, folder):
        """The result as its user will load it: a stock pipeline on the device. What was trained leaves the device.

        Returns a function that draws one PIL image of a prompt with the pipeline's settings.
        """
        self._leave_device()
        settings = {**self.unused, **self.settings, "dtype": self.weight_dtype}  # its sampler can't mix precisions
        variant = VARIANTS[self.args.save_dtype[0]]
        if not self.args.use_lora and not self.args.save_only_trained:
            return self._drawing(self._load_saved(folder, variant=variant, **settings))
        given = {"scheduler": self.pipe.scheduler, **self._load_vae(self.weight_dtype)}
        if self.args.save_only_trained:
            files = {"subfolder": self.denoiser_name, "variant": variant, "dtype": self.weight_dtype}
            given[self.denoiser_name] = load(self.denoiser_class, folder, "--output_dir", **files)
            return self._drawing(self._load_pipeline(**given, **settings))
        pipe = self._load_pipeline(**given, **self._given_denoiser(self.weight_dtype), **settings)
        if self.stock_lora:
            pipe.load_lora_weights(folder, weight_name=LORA_FILE)
        else:
            PeftModel.from_pretrained(pipe.transformer, folder)
        return self._drawing(pipe)

    def load_base(self):
        """The model before it was trained, as `load_result` gives the one after it; None if it began from scratch."""
        if self.args.transformer_config:
            return None
        given = {**self._load_vae(self.weight_dtype), **self._given_denoiser(self.weight_dtype)}
        return self._drawing(self._load_pipeline(**given, **self.unused, **self.settings, dtype=self.weight_dtype))

    def _leave_device(self):
        self.place(encoder=False, decoder=False, text_encoders=False)
        tensors = chain(self.model.parameters(), self.model.buffers())
        empty = any(tensor.is_meta for tensor in tensors)  # it was rebuilt to be saved
        if not empty and not self.args.bnb_quantization_config_path:  # in 8 bits it can't be moved, and is small
            self.model.to("cpu")

    def _drawing(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        if self.args.offload and self.device.type == "cuda":
            pipe.enable_model_cpu_offload(device=self.device)
        else:
            pipe.to(self.device)
        return lambda prompt, **settings: pipe(**self.prompt(prompt), **self.sampling, **settings).images[0]

    def _load_saved(self, folder, **settings):
        return load(self.pipeline_class, folder, "--output_dir", **settings)

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
        if self.args.dry_run:
            config = given_vae_config(self.args)
            return {"vae": from_config_without_values(getattr(diffusers, config["_class_name"]), config, dtype)}
        return {"vae": load_vae(self.args, dtype)}

    def _given_denoiser(self, dtype, **changes):
        """`{denoiser_name: the denoiser}` if it is not the pipeline's as it is, but new, quantised or changed."""
        args, name = self.args, self.args.pretrained_model_name_or_path
        if args.transformer_config:
            config = {**args.transformer_config, "sample_size": args.latent_size}
            return {self.denoiser_name: self._new_denoiser(config)}
        if not changes and not args.bnb_quantization_config_path:
            return {}
        flag, hub = "--pretrained_model_name_or_path", {**hub_flags(args), "subfolder": self.denoiser_name}
        if args.dry_run:
            config = load(self.denoiser_class, name, flag, "load_config", **hub)
            denoiser = from_config_without_values(self.denoiser_class, {**config, **changes}, dtype)
            return {self.denoiser_name: denoiser}
        if args.bnb_quantization_config_path:
            changes["quantization_config"] = quantization_config(args)
        denoiser = load(self.denoiser_class, name, flag, variant=args.variant, dtype=dtype, **hub, **changes)
        return {self.denoiser_name: denoiser}

    def _new_denoiser(self, config):
        """A denoiser with new weights, which are a function of the seed."""
        known = inspect.signature(self.denoiser_class.__init__).parameters.keys()
        for key in config.keys() - known:  # published configs have keys that are of no use any more
            near = difflib.get_close_matches(key, known - config.keys(), n=1, cutoff=0.8)
            if near:
                name = self.denoiser_class.__name__
                raise UserError(f"--transformer_config: a {name} has no {key}; is {near[0]} meant?")
        try:
            if self.args.dry_run:
                return from_config_without_values(self.denoiser_class, config, torch.float32)
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                return initialize(self.denoiser_class.from_config(config))
        except Exception as error:  # constructors do not agree on what they raise
            raise UserError(
                f"--transformer_config describes no {self.denoiser_class.__name__}: {first_line(error)}"
            ) from error

    def _add_adapters(self):
        """LoRA on the denoiser and, if asked for, on the text encoders; returns name -> model with adapters."""
        adapted = {self.denoiser_name: self._add_adapter(self.denoiser.requires_grad_(False))}
        if self.args.train_text_encoder:
            for name, text_encoder in self.text_encoders.items():
                layers = range(self._layers_used(name, text_encoder))
                names = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "layers_pattern": "layers"}
                text_encoder.add_adapter(self._lora_config(layers_to_transform=list(layers), **names))
            adapted |= self.text_encoders
        for model in adapted.values():
            for config in model.peft_config.values():
                config.base_model_name_or_path = self._base_name
        cast_training_params(list(adapted.values()), torch.float32)
        return adapted

    def _add_adapter(self, denoiser):
        layers = [layer.strip() for layer in (self.args.lora_layers or self.lora_layers).split(",")]
        config = self._lora_config(target_modules=layers)
        try:
            if self.stock_lora:
                denoiser.add_adapter(config)
            else:
                inject_adapter_in_model(config, denoiser)
        except ValueError as error:
            raise UserError(f"--lora_layers {self.args.lora_layers}: {str(error).splitlines()[0]}") from error
        return denoiser

    def _lora_config(self, **layers):
        args = self.args
        scale = {"r": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        return LoraConfig(use_dora=args.use_dora, init_lora_weights="gaussian", **scale, **layers)

    @staticmethod
    def _layers_used(name, text_encoder):
        """Layers of a text encoder that the UNet hears of: the others would train on nothing, and DDP refuses that."""
        return text_encoder.config.num_hidden_layers

    def _checkpoint_activations(self):
        self.denoiser.enable_gradient_checkpointing()
        for text_encoder in self.text_encoders.values() if self.args.train_text_encoder else ():
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def _use_xformers(self):
        try:
            self.denoiser.enable_xformers_memory_efficient_attention()
        except (ValueError, ModuleNotFoundError, NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--enable_xformers_memory_efficient_attention: {reason}; leave it out.") from error

    def _inference_scheduler(self, scheduler):
        """The scheduler that is saved: it must know the prediction type and the noise schedule trained with."""
        if prediction_type(scheduler) == "flow_prediction":
            return scheduler
        changes, scheduler_class = {}, type(scheduler)
        if self.args.prediction_type:
            changes["prediction_type"] = self.args.prediction_type
        if self.args.rescale_betas_zero_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if self.args.rescale_betas_zero_snr or self.args.prediction_type == "sample":
            scheduler_class = DDIMScheduler  # PNDM, Stable Diffusion's default, can do neither; nor does it clip
            changes["clip_sample"] = scheduler.config.get("clip_sample", False)
        return scheduler_class.from_config(scheduler.config, **changes)


def block_names(denoiser, lists):
    """Names of the blocks in these parts of a denoiser, lists or single ones, as in `named_modules`."""
    names = []
    for name in lists:
        part = getattr(denoiser, name)
        if isinstance(part, torch.nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(part))]
        elif part is not None:
            names.append(name)
    return names


def uses_decoder(args):
    """Whether a term of the loss decodes."""
    return args.lpl_weight != 0 or args.rgb_weight != 0


class DenoiserWithTextEncoders(torch.nn.Module):
    """What is trained with --train_text_encoder, in one forward pass, as DDP and gradient accumulation want it."""

    def __init__(self, denoiser, text_encoders, encode, denoiser_inputs):
        super().__init__()
        self.denoiser, self.text_encoders = denoiser, torch.nn.ModuleList(text_encoders)
        self._encode, self._denoiser_inputs = encode, denoiser_inputs

    def forward(self, noisy_latents, timestep, captions, return_dict, **more):
        inputs = self._denoiser_inputs(noisy_latents, **self._encode(captions), **more)
        return self.denoiser(noisy_latents, timestep, **inputs, return_dict=return_dict)


def lora_state(model, dtype=torch.float32):
    """Name -> weights of a model's adapters; peft need not look for embedding layers in the base, there are none."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.to(dtype).contiguous() for name, value in state.items()}


def in_precision(model, dtype, changes=None):
    """The model if it is in this precision, else a copy on the CPU that can only be saved.

    changes: other weights for a copy, name -> tensor.
    """
    if model.dtype == dtype and changes is None:
        return model
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
    state = {**model.state_dict(), **(changes or {})}.items()
    copy.load_state_dict({k: v.to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in state}, assign=True)
    return copy
