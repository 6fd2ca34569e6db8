"""SD3's two-stream transformer (MM-DiT) conditioned on class labels, and the pipeline that samples from it.

Diffusers has neither, so the pipeline saves a copy of this file in every folder it writes. Three ways to load one:

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)  # anywhere: runs the folder's copy

    transformer = ClassConditionalSD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    ClassConditionalPipeline.from_pretrained(folder, transformer=transformer)  # a local folder: runs this file

    DiffusionPipeline.from_pretrained("user/model", trust_remote_code=True)  # from the Hub: always the copy

Shapes: B batch, C latent channels, h x w latent positions. Scaled latents are what the transformer sees, unscaled
ones (/ scaling_factor + shift_factor) what the VAE decodes.
"""

import inspect
import json
from pathlib import Path

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalSD3Transformer2DModel(SD3Transformer2DModel):
    """SD3's transformer with a class label in the place of the text.

    The label's embedding is the one token of the context stream and, with the timestep, modulates every block.
    The width is num_attention_heads * attention_head_dim, also for the embeddings.

    Args:
        num_classes: number of classes. Label `num_classes` means "no class": what guidance compares with, and what
            training puts in the place of dropped labels.
        sample_size: side of the latents that the pipeline draws by default.
        base_sample_size: side of the latents that the positions are scaled for; by default sample_size. A model that
            is trained on at another size keeps it, and so its positions.
        patch_size: side of the square of latent positions that makes one token.
        in_channels, out_channels: latent channels.
        num_layers, num_attention_heads, attention_head_dim: blocks, heads, width of a head.
        pos_embed_max_size: largest side in tokens, so the largest image has pos_embed_max_size * patch_size latents.
        qk_norm: "rms_norm" (as SD 3.5) or None (as SD 3): normalisation of queries and keys.
    """

    # The parent's arguments that are settled here, so that they do not end up in config.json.
    ignore_for_config = [
        "joint_attention_dim",
        "caption_projection_dim",
        "pooled_projection_dim",
        "dual_attention_layers",
    ]

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 24,
        attention_head_dim: int = 64,
        pos_embed_max_size: int = 64,
        qk_norm: str | None = "rms_norm",
        base_sample_size: int | None = None,
    ):
        width = num_attention_heads * attention_head_dim
        super().__init__(
            sample_size=base_sample_size or sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            joint_attention_dim=width,
            caption_projection_dim=width,
            pooled_projection_dim=width,
            pos_embed_max_size=pos_embed_max_size,
            qk_norm=qk_norm,
        )
        self.register_to_config(sample_size=sample_size)
        self.class_embedder = torch.nn.Embedding(num_classes + 1, width)

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        """The prediction for noisy latents.

        Args:
            hidden_states: [B, C, h, w], scaled noisy latents.
            timestep: [B], 0 to 1000.
            class_labels: [B] int64, 0 to num_classes; the last means "no class".
            return_dict: False returns a tuple of one.

        Returns:
            Transformer2DModelOutput whose `sample` is [B, out_channels, h, w].
        """
        embedding = self.class_embedder(class_labels)
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=embedding[:, None],  # [B, 1, width]
            pooled_projections=embedding,
            timestep=timestep,
            return_dict=return_dict,
        )


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images of given classes.

    Args:
        transformer: a ClassConditionalSD3Transformer2DModel.
        vae: decodes the latents.
        scheduler: DDIM or another that works like it, for epsilon, v and sample prediction, or
            FlowMatchEulerDiscreteScheduler with a static shift.
        id2label: class number -> its names, separated by commas. `labels` is the way back.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        # Not the class above: in a saved folder the pipeline and the transformer come from two copies of this file.
        # And Diffusers looks here for a ModelMixin when from_pretrained is given a transformer.
        transformer: ModelMixin,
        vae: AutoencoderKL | AsymmetricAutoencoderKL | AutoencoderTiny | AutoencoderDC,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        id2label = {int(number): names for number, names in (id2label or {}).items()}  # JSON has strings for keys
        self.register_to_config(id2label=id2label)
        self.labels = {name.strip(): i for i, names in id2label.items() for name in (names, *names.split(","))}

    @property
    def vae_scale_factor(self):
        """Pixels per latent position, along one side."""
        if isinstance(self.vae, AutoencoderDC):
            return self.vae.spatial_compression_ratio
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class numbers of one class name or of a list of them.

        Raises:
            ValueError: the name is not in `labels`.
        """
        names = [label] if isinstance(label, str) else label
        for name in names:
            if name not in self.labels:
                known = f"such as {next(iter(self.labels))!r} (all: pipe.labels)" if self.labels else "by number"
                raise ValueError(f"No class is called {name!r}: name one that the model knows, {known}.")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Draws one image per label.

        Args:
            class_labels: numbers or names, one or a list; number `num_classes` means "no class".
            guidance_scale: how far to go from the prediction without to the one with the class; at 1 and below only
                the latter is computed.
            num_inference_steps: steps of the scheduler.
            height, width: in pixels; by default the transformer's sample_size.
            generator: one, or one per image.
            latents: [B, C, h, w], the noise to start from; drawn if not given.
            output_type: "pil", "np" (B, height, width, 3 in [0, 1]), "pt" (B, 3, height, width) or "latent", the
                scaled latents in float32.
            return_dict: False returns a tuple of one.

        Raises:
            ValueError: a class or a size that the model does not have, or a scheduler with dynamic shifting.
        """
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError("Set use_dynamic_shifting=False in the scheduler: class labels go with a static shift.")
        device, dtype = self._execution_device, self.transformer.dtype
        labels = self._class_numbers(class_labels).to(device)
        shape = self._latent_shape(len(labels), height, width)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents are of shape {tuple(latents.shape)}, but labels and size ask for {shape}.")
        latents = latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if "generator" in accepted else {}  # for those that add noise

        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if guided else latents
            if hasattr(self.scheduler, "scale_model_input"):
                inputs = self.scheduler.scale_model_input(inputs, t)
            # The steps are taken in float32, whatever the transformer works in.
            model_pred = self.transformer(inputs.to(dtype), t.expand(len(inputs)), labels).sample.float()
            if guided:
                conditional, unconditional = model_pred.chunk(2)
                model_pred = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(model_pred, t, latents, **step_options).prev_sample

        images = latents
        if output_type != "latent":
            images = self.vae.decode(self._unscale(latents).to(self.vae.dtype)).sample
            images = VaeImageProcessor().postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_numbers(self, class_labels):
        """One label or a list of them, names or numbers -> [B] int64."""
        numbers = []
        for label in [class_labels] if isinstance(class_labels, (int, str)) else class_labels:
            numbers += self.get_label_ids(label) if isinstance(label, str) else [int(label)]
        last = self.transformer.config.num_classes
        for number in numbers:
            if not 0 <= number <= last:
                raise ValueError(f"There is no class {number}: use 0 to {last - 1}, or {last} for no class.")
        return torch.tensor(numbers)

    def _latent_shape(self, batch, height, width):
        config, factor = self.transformer.config, self.vae_scale_factor
        height, width = height or config.sample_size * factor, width or config.sample_size * factor
        token = factor * config.patch_size
        if height % token or width % token:
            raise ValueError(f"height and width must be multiples of {token} pixels, not {height} and {width}.")
        return (batch, config.in_channels, height // factor, width // factor)

    def _unscale(self, latents):
        config = self.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def save_config(self, save_directory, **kwargs):
        """As the base class, with this file beside it, so that the folder loads where this repository is not.

        save_pretrained calls it after the components and before the upload to the Hub.
        """
        super().save_config(save_directory, **kwargs)
        index_file, code = Path(save_directory) / self.config_name, Path(__file__)
        index = json.loads(index_file.read_text())
        index["_class_name"] = [code.stem, type(self).__name__]
        index["transformer"] = [code.stem, ClassConditionalSD3Transformer2DModel.__name__]
        index_file.write_text(json.dumps(index, indent=2) + "\n")
        text = code.read_bytes()
        for folder in (Path(save_directory), Path(save_directory) / "transformer"):
            folder.mkdir(exist_ok=True)
            (folder / code.name).write_bytes(text)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As the base class, but names this class: asked for in person, it needs no copy of itself from the folder."""
        config = super().load_config(*args, **kwargs)
        (config[0] if isinstance(config, tuple) else config)["_class_name"] = cls.__name__
        return config
