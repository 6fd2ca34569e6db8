"""A class for each kind of denoiser, with what differs from `Family`; the training loop knows nothing of a model.

Shapes: B batch, C latent channels, h x w latent positions, H x W pixels.
"""

import inspect
from functools import partial
from types import SimpleNamespace

import diffusers
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KolorsPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import LabelEmbedding, get_2d_rotary_pos_embed
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from family import VARIANTS, Family, block_names
from frozen import layers_of
from latent_lpips import load_latent_lpips
from latent_lpips_files import PUBLISHED, published_for, scaling_of
from loading import (
    check_lora_layers,
    check_text_widths,
    from_config_without_values,
    given_vae_config,
    hub_flags,
    load,
    load_part,
)
from model_checks import check_configs, label_of, latent_channels, pipeline_name
from noise import new_scheduler
from pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: a UNet under text conditioning; epsilon, v or sample prediction."""

    pipeline_class, denoiser_name, denoiser_class = StableDiffusionPipeline, "unet", UNet2DConditionModel
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    settings = {"requires_safety_checker": False}
    block_lists = ("down_blocks", "mid_block", "up_blocks")

    def hidden_states(self, output, noisy_latents, conditioning):
        return output[0] if isinstance(output, tuple) else output  # what comes second is for the skip connections

    def _encode(self, captions):
        embeds, _ = self.pipe.encode_prompt(captions, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds):
        """The denoiser's keyword arguments besides latents and timestep."""
        return {"encoder_hidden_states": prompt_embeds}


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
        names = ("original_sizes", "crop_top_lefts", "target_sizes")
        time_ids = torch.cat([batch[name] for name in names], dim=1)  # [B, 6]
        time_ids = time_ids.to(self.device, torch.float32, non_blocking=True)  # bf16 rounds 1023 to 1024
        return {**super().conditioning(batch), "time_ids": time_ids}

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds, pooled_prompt_embeds, time_ids):
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return {"encoder_hidden_states": prompt_embeds, "added_cond_kwargs": added}

    @staticmethod
    def _layers_used(name, text_encoder):
        # The last but one layer's output is used of both; the second gives the pooled output of its last layer, too.
        return text_encoder.config.num_hidden_layers - (name == "text_encoder")


class Kolors(StableDiffusionXL):
    """Kolors: SDXL's UNet, which hears of captions from ChatGLM alone."""

    pipeline_class = KolorsPipeline
    text_encoder_names = ("text_encoder",)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: flow matching, three text encoders (T5 may be missing), a pooled embedding."""

    pipeline_class, denoiser_class = StableDiffusion3Pipeline, SD3Transformer2DModel
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    unused = {"feature_extractor": None, "image_encoder": None}
    lora_layers = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0"
    lora_layers += ",attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out"

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        embeds, _, pooled, _ = self.pipe.encode_prompt(captions, None, None, **settings)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds, pooled_prompt_embeds):
        return {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds}


class Flux(Family):
    """FLUX.1: flow matching on packed latents with positions; the guidance scale is one of dev's inputs."""

    pipeline_class, denoiser_class = FluxPipeline, FluxTransformer2DModel
    text_encoder_names = ("text_encoder", "text_encoder_2")
    unused = {"feature_extractor": None, "image_encoder": None}
    lora_layers = StableDiffusion3.lora_layers + ",ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    pack = 2

    def _encode(self, captions):
        embeds, pooled, _ = self.pipe.encode_prompt(captions, None, device=self.device, **self.text_settings)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def denoiser_inputs(self, latents, prompt_embeds, pooled_prompt_embeds):
        inputs = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds}
        inputs |= self._positions(latents, prompt_embeds)
        if self.denoiser.config.guidance_embeds:
            scale = 3.5 if self.args.guidance_scale is None else self.args.guidance_scale
            inputs["guidance"] = torch.full((len(latents),), scale, device=self.device)
        return inputs

    def _positions(self, latents, prompt_embeds):
        batch, _, height, width = latents.shape
        settings = {"device": self.device, "dtype": prompt_embeds.dtype}
        image = self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, **settings)
        return {"img_ids": image, "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, **settings)}

    def scale_timesteps(self, timesteps):
        return super().scale_timesteps(timesteps) / 1000

    def to_tokens(self, latents):
        return self.pipe._pack_latents(latents, *latents.shape)

    def from_tokens(self, output, latents):
        factor = self.pipe.vae_scale_factor
        height, width = (side * factor for side in latents.shape[-2:])
        return self.pipe._unpack_latents(output, height, width, factor)

    def _sample(self, pipe, prompt, **settings):  # without a negative prompt: its guidance is distilled
        latents = pipe(**self.encode_prompts([prompt]), **settings).images
        return pipe._unpack_latents(latents, settings["height"], settings["width"], pipe.vae_scale_factor)


class PixArtSigma(Family):
    """PixArt-Sigma: T5 embeddings with their mask; predicts a variance as well."""

    pipeline_class, denoiser_class = PixArtSigmaPipeline, PixArtTransformer2DModel
    sampling = {"use_resolution_binning": False}
    stock_lora = False

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        embeds, mask, _, _ = self.pipe.encode_prompt(captions, clean_caption=True, **settings)  # as the pipeline does
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def denoiser_inputs(self, latents, prompt_embeds, prompt_attention_mask):
        sizes = {"resolution": None, "aspect_ratio": None}
        inputs = {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": prompt_attention_mask}
        return {**inputs, "added_cond_kwargs": sizes}


class PixArtAlpha(PixArtSigma):
    """PixArt-alpha; the model for 1024 pixels is told of the image's size and aspect ratio."""

    pipeline_class = PixArtAlphaPipeline

    def _new_denoiser(self, config):
        return super()._new_denoiser({**config, "use_additional_conditions": None})  # as the pipeline: by its size

    def denoiser_inputs(self, latents, prompt_embeds, prompt_attention_mask):
        inputs = super().denoiser_inputs(latents, prompt_embeds, prompt_attention_mask)
        if self.denoiser.config.sample_size == 128:  # as the pipeline tells
            height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
            sizes = {"resolution": [height, width], "aspect_ratio": [height / width]}
            sizes = {name: torch.tensor([value]).to(prompt_embeds) for name, value in sizes.items()}
            inputs["added_cond_kwargs"] = {name: size.repeat(len(latents), 1) for name, size in sizes.items()}
        return inputs


class Sana(Family):
    """Sana: flow matching on the latents of a deep-compression VAE; Gemma reads an instruction before each caption."""

    pipeline_class, denoiser_class = SanaPipeline, SanaTransformer2DModel
    sampling = {"use_resolution_binning": False}

    def _encode(self, captions):
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        rows = {}
        for empty in (False, True):  # the pipeline puts no instruction before a negative prompt
            chosen = [i for i, caption in enumerate(captions) if (caption == "") == empty]
            if chosen:
                settings["complex_human_instruction"] = None if empty else instruction
                embeds, mask, _, _ = self.pipe.encode_prompt([captions[i] for i in chosen], **settings)
                rows |= dict(zip(chosen, zip(embeds, mask)))
        embeds, mask = zip(*(rows[i] for i in range(len(captions))))
        return {"prompt_embeds": torch.stack(embeds), "prompt_attention_mask": torch.stack(mask)}

    def denoiser_inputs(self, latents, prompt_embeds, prompt_attention_mask):
        return {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": prompt_attention_mask}

    def scale_timesteps(self, timesteps):
        return super().scale_timesteps(timesteps) * self.denoiser.config.timestep_scale


class Flux2Klein(Family):
    """FLUX.2 klein: the latents' patches of 2 x 2 positions are its channels, normalised as by the VAE's batch norm.

    C is 4 times that of the VAE, h and w are half of its own. Guidance is no input; text is read without a mask.
    """

    pipeline_class, denoiser_class = Flux2KleinPipeline, Flux2Transformer2DModel
    block_lists = Flux.block_lists
    pack = 2

    @property
    def lora_layers(self):
        single = range(self.denoiser.config.num_single_layers)  # there to_out is a layer itself
        names = ["to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in single)]
        return ",".join([Family.lora_layers, *names])

    @property
    def unread(self):
        return ["time_guidance_embed.guidance_embedder"] if self.denoiser.config.guidance_embeds else []

    def modules(self, part):
        return [*super().modules(part), *([self.vae.bn] if part == "decoder" else [])]

    def scale(self, latents):
        mean, std = self._statistics(latents)
        return (self.pipe._patchify_latents(latents) - mean) / std

    def unscale(self, latents):
        mean, std = self._statistics(latents)
        return self.pipe._unpatchify_latents(latents * std + mean)

    def _statistics(self, latents):
        norm = self.vae.bn
        statistics = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        return (values.to(latents, non_blocking=True).view(1, -1, 1, 1) for values in statistics)

    def flow_shift(self, sequence_length):
        """It depends on the number of sampling steps as well: here on the pipeline's default."""
        steps = inspect.signature(self.pipeline_class.__call__).parameters["num_inference_steps"].default
        return compute_empirical_mu(sequence_length, steps)

    def _encode(self, captions):
        embeds, _ = self.pipe.encode_prompt(captions, self.device, **self.text_settings)
        return {"prompt_embeds": embeds}

    def denoiser_inputs(self, latents, prompt_embeds):
        positions = {
            "img_ids": self.pipe._prepare_latent_ids(latents),
            "txt_ids": self.pipe._prepare_text_ids(prompt_embeds),
        }
        positions = {name: ids.to(self.device, non_blocking=True) for name, ids in positions.items()}
        return {"encoder_hidden_states": prompt_embeds, **positions}

    def scale_timesteps(self, timesteps):
        return super().scale_timesteps(timesteps) / 1000

    def to_tokens(self, latents):
        return self.pipe._pack_latents(latents)

    def from_tokens(self, output, latents):
        return output.mT.reshape(latents.shape)

    def hidden_states(self, output, noisy_latents, conditioning):
        return last_tokens(super().hidden_states(output, noisy_latents, conditioning), noisy_latents, patch=1)

    def _sample(self, pipe, prompt, **settings):
        negative = self.encode_prompts([""])["prompt_embeds"]
        latents = pipe(**self.encode_prompts([prompt]), negative_prompt_embeds=negative, **settings).images
        return self.scale(latents)  # the pipeline has made them the VAE's


class Chroma(Flux):
    """Chroma: FLUX.1 without CLIP; guidance is no input, and the padding of T5's embeddings is masked."""

    pipeline_class, denoiser_class = ChromaPipeline, ChromaTransformer2DModel
    text_encoder_names = ("text_encoder",)

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        embeds, _, mask, *_ = self.pipe.encode_prompt(captions, **settings)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def denoiser_inputs(self, latents, prompt_embeds, prompt_attention_mask):
        tokens = latents[0, 0].numel() // self.pack**2
        mask = self.pipe._prepare_attention_mask(len(latents), tokens, None, prompt_attention_mask)
        inputs = {"encoder_hidden_states": prompt_embeds, "attention_mask": mask}
        return inputs | self._positions(latents, prompt_embeds)

    def hidden_states(self, output, noisy_latents, conditioning):
        return last_tokens(super().hidden_states(output, noisy_latents, conditioning), noisy_latents, self.pack)

    def _checkpoint_activations(self):
        for block in (*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # diffusers' own loses the mask

    def _sample(self, pipe, prompt, **settings):
        latents = Family._sample(self, pipe, prompt, **settings)
        return pipe._unpack_latents(latents, settings["height"], settings["width"], pipe.vae_scale_factor)


class QwenImage(Flux):
    """Qwen-Image: packed latents of a VAE for videos, which has a mean and a deviation for each channel."""

    pipeline_class, denoiser_class = QwenImagePipeline, QwenImageTransformer2DModel
    text_encoder_names = ("text_encoder",)
    unused = {}
    sampling = {"negative_prompt": ""}  # else the pipeline samples without guidance
    guidance_name = "true_cfg_scale"
    lora_layers = Family.lora_layers
    block_lists = Family.block_lists
    pack = 1  # its patch_size says so already
    ragged = True

    @property
    def unread(self):
        last = f"transformer_blocks.{self.denoiser.config.num_layers - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp"  # what becomes of the text there

    def encode_images(self, pixel_values):
        return super().encode_images(pixel_values.unsqueeze(2)).squeeze(2)

    def decode(self, latents):
        return super().decode(latents).squeeze(2)

    def scale(self, latents):
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def unscale(self, latents):
        mean, std = self._statistics(latents)
        return (latents * std + mean).unsqueeze(2)

    def _statistics(self, latents):
        statistics = self.vae.config.latents_mean, self.vae.config.latents_std
        return (torch.tensor(values).to(latents, non_blocking=True).view(1, -1, 1, 1) for values in statistics)

    def _encode(self, captions):
        longest = inspect.signature(self.pipeline_class.__call__).parameters["max_sequence_length"].default
        settings = {"max_sequence_length": longest, **self.text_settings}
        embeds, mask = self.pipe.encode_prompt(captions, self.device, **settings)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return {"prompt_embeds": [row[:length] for row, length in zip(embeds, lengths)]}

    def denoiser_inputs(self, latents, prompt_embeds):
        height, width = (side // 2 for side in latents.shape[-2:])
        inputs = {"encoder_hidden_states": pad_sequence(prompt_embeds, batch_first=True)}
        lengths = torch.tensor([len(row) for row in prompt_embeds])
        if (lengths < lengths.max()).any():
            mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
            inputs["encoder_hidden_states_mask"] = mask.to(self.device, non_blocking=True)
        return {**inputs, "img_shapes": [[(1, height, width)]] * len(latents)}

    def from_tokens(self, output, latents):
        return super().from_tokens(output, latents).squeeze(2)

    def _sample(self, pipe, prompt, negative_prompt, **settings):
        inputs = {"prompt_embeds": prompt, "negative_prompt_embeds": negative_prompt}
        inputs = {name: self.encode_prompts([text])["prompt_embeds"][0][None] for name, text in inputs.items()}
        latents = pipe(**inputs, **settings).images
        return pipe._unpack_latents(latents, settings["height"], settings["width"], pipe.vae_scale_factor).squeeze(2)


class ZImage(Family):
    """Z-Image: its time runs from noise to image; it takes and gives lists of samples."""

    pipeline_class, denoiser_class = ZImagePipeline, ZImageTransformer2DModel
    timestep_name = "t"
    block_lists = ("layers",)
    pack = 2
    ragged = True

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        embeds, _ = self.pipe.encode_prompt(list(captions), **settings)  # writes into the list
        return {"prompt_embeds": embeds}

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds):
        return {"cap_feats": prompt_embeds}

    def scale_timesteps(self, timesteps):
        return (1000 - super().scale_timesteps(timesteps)) / 1000

    def to_tokens(self, latents):
        return list(latents.unsqueeze(2).unbind())

    def from_tokens(self, output, latents):
        return -torch.stack(output).squeeze(2)  # it predicts z_0 - eps

    def hidden_states(self, output, noisy_latents, conditioning):
        return output[:, : noisy_latents[0, 0].numel() // self.pack**2]  # then comes padding, and the text


class Lumina2(Family):
    """Lumina-Image 2: its time runs from noise to image; Gemma reads an instruction before each caption."""

    pipeline_class, denoiser_class = Lumina2Pipeline, Lumina2Transformer2DModel
    block_lists = ("layers",)

    def _encode(self, captions):
        # The pipeline puts no instruction before a negative prompt.
        captions = [caption and f"{self.pipe.system_prompt} <Prompt Start> {caption}" for caption in captions]
        embeds, mask = self.pipe._get_gemma_prompt_embeds(captions, self.device, **self.text_settings)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def flow_shift(self, sequence_length):
        return super().flow_shift(latent_channels(self.vae.config))  # what the pipeline takes for the number of tokens

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds, prompt_attention_mask):
        return {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": prompt_attention_mask}

    def scale_timesteps(self, timesteps):
        return 1 - super().scale_timesteps(timesteps) / len(self.timesteps)

    def from_tokens(self, output, latents):
        return -output  # it predicts z_0 - eps

    def hidden_states(self, output, noisy_latents, conditioning):
        """Before the image's tokens come those of the text, as many as each caption has, and after them padding."""
        tokens = noisy_latents[0, 0].numel() // self.denoiser.config.patch_size**2
        lengths = conditioning["prompt_attention_mask"].sum(1).tolist()
        return torch.stack([row[length : length + tokens] for row, length in zip(output, lengths)])


class AuraFlow(Family):
    """AuraFlow: flow matching; what is padding of the text embeddings is zero, and no mask is needed."""

    pipeline_class, denoiser_class = AuraFlowPipeline, AuraFlowTransformer2DModel
    lora_layers = StableDiffusion3.lora_layers
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")

    def _encode(self, captions):
        settings = {"device": self.device, "do_classifier_free_guidance": False, **self.text_settings}
        embeds, _, _, _ = self.pipe.encode_prompt(captions, **settings)
        return {"prompt_embeds": embeds}

    @staticmethod
    def denoiser_inputs(latents, prompt_embeds):
        return {"encoder_hidden_states": prompt_embeds}

    def scale_timesteps(self, timesteps):
        return super().scale_timesteps(timesteps) / 1000

    def hidden_states(self, output, noisy_latents, conditioning):
        patch = self.denoiser.config.patch_size
        return last_tokens(super().hidden_states(output, noisy_latents, conditioning), noisy_latents, patch)

    def _sample(self, pipe, prompt, **settings):
        mask = torch.ones(1, 1)  # the pipeline wants one and does not read it
        return super()._sample(
            pipe, prompt, prompt_attention_mask=mask, negative_prompt_attention_mask=mask, **settings
        )


class HunyuanDiT(Family):
    """HunyuanDiT: two text encoders with masks; versions to 1.1 are told of the image's size and of the crop.

    Predicts a variance as well. It has no gradient checkpointing.
    """

    pipeline_class, denoiser_class = HunyuanDiTPipeline, HunyuanDiT2DModel
    text_encoder_names = ("text_encoder", "text_encoder_2")
    unused = {"safety_checker": None, "feature_extractor": None}
    settings = {"requires_safety_checker": False}
    sampling = {"use_resolution_binning": False}
    stock_lora = False
    block_lists = ("blocks",)

    def _encode(self, captions):
        embeddings = {}
        for i, suffix in enumerate(("", "_2")):
            settings = {"device": self.device, "do_classifier_free_guidance": False, "text_encoder_index": i}
            embeds, _, mask, _ = self.pipe.encode_prompt(captions, **settings)
            embeddings |= {f"prompt_embeds{suffix}": embeds, f"prompt_attention_mask{suffix}": mask}
        return embeddings

    def conditioning(self, batch):
        names = ("original_sizes", "target_sizes", "crop_top_lefts")
        sizes = torch.cat([batch[name] for name in names], dim=1)  # [B, 6]
        sizes = sizes.to(self.device, torch.float32, non_blocking=True)  # bf16 rounds 1023 to 1024
        return {**super().conditioning(batch), "image_meta_size": sizes}

    def denoiser_inputs(
        self,
        latents,
        prompt_embeds,
        prompt_attention_mask,
        prompt_embeds_2,
        prompt_attention_mask_2,
        image_meta_size,
    ):
        config = self.denoiser.config
        grid = tuple(side // config.patch_size for side in latents.shape[-2:])
        made_for = 512 // self.pipe.vae_scale_factor // config.patch_size
        crop = get_resize_crop_region_for_grid(grid, made_for)
        head = self.denoiser.inner_dim // self.denoiser.num_heads
        return {
            "encoder_hidden_states": prompt_embeds,
            "text_embedding_mask": prompt_attention_mask,
            "encoder_hidden_states_t5": prompt_embeds_2,
            "text_embedding_mask_t5": prompt_attention_mask_2,
            "image_meta_size": image_meta_size,
            "style": torch.zeros(len(latents), dtype=torch.long, device=self.device),
            "image_rotary_emb": get_2d_rotary_pos_embed(head, crop, grid, device=self.device, output_type="pt"),
        }

    def scale_timesteps(self, timesteps):
        return timesteps.float()  # it computes their embeddings in their precision


class ClassConditional(Family):
    """Models that are told a class label; captions are label numbers, an empty one means no class.

    The size of a model's position embeddings follows --resolution, so that it can be trained in two stages.
    """

    text_encoder_names = ()
    stock_lora = False

    def conditioning(self, batch):
        labels = [self.num_classes if label == "" else label for label in batch["captions"]]
        return {"class_labels": torch.tensor(labels).to(self.device, non_blocking=True)}

    @staticmethod
    def denoiser_inputs(latents, class_labels):
        return {"class_labels": class_labels}

    def _given_denoiser(self, dtype):
        return super()._given_denoiser(dtype, **self._resized())

    def _resized(self):
        """What changes in the transformer's config for --resolution."""
        return {"sample_size": self.args.latent_size}

    def _load_pipeline(self, transformer, vae, scheduler=None, dtype=None):
        """Part by part: the Hub would have a pipeline of ours run the code that is saved with it."""
        if scheduler is None and self.args.pretrained_model_name_or_path is None:
            scheduler = new_scheduler(self.args)
        elif scheduler is None:
            scheduler = load_part(self.args, "scheduler")
        pipe = self.pipeline_class(transformer, vae, scheduler, id2label=self.args.id2label)
        pipe.register_to_config(id2label=self.args.id2label)  # DiTPipeline forgets it
        return pipe

    def _load_vae(self, dtype):
        return super()._load_vae(dtype) or {"vae": load_part(self.args, "vae", dtype)}

    def prompt(self, prompt):
        return {"class_labels": [label_of(self.args, prompt)]}


class DiT(ClassConditional):
    """DiT on ImageNet's classes; predicts a variance as well. Its pipeline takes class 1000 for none."""

    pipeline_class, denoiser_class = DiTPipeline, DiTTransformer2DModel

    def __init__(self, *args):
        super().__init__(*args)
        self.num_classes = self.denoiser.config.num_embeds_ada_norm
        for module in self.denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0  # it drops labels, in each block others; --proportion_empty_prompts does

    @staticmethod
    def size_settings(resolution):
        return {}  # the transformer's sample_size tells

    @torch.no_grad()
    def draw(self, prompt, generator, **settings):
        pipe = DiTPipeline(self.denoiser, VAEOfAnyPrecision(self.vae), self.pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe(**self.prompt(prompt), generator=generator, **settings).images[0]


class VAEOfAnyPrecision:
    """For DiTPipeline, which decodes what it has drawn in the precision of the transformer."""

    def __init__(self, vae):
        self.vae, self.config = vae, vae.config

    def decode(self, latents):
        return SimpleNamespace(sample=self.vae.decode(latents.to(self.vae.dtype)).sample.float())


class ClassConditionalMMDiT(ClassConditional):
    """The paper's multi-modal DiT on class labels, which stock diffusers lacks."""

    pipeline_class, denoiser_class = ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel

    def __init__(self, *args):
        super().__init__(*args)
        self.num_classes = self.denoiser.config.num_classes

    def _resized(self):
        config = self.args.denoiser_config
        base = config.get("base_sample_size") or config.get("sample_size") or self.args.latent_size
        return {"sample_size": self.args.latent_size, "base_sample_size": base}

    def _sample(self, pipe, prompt, **settings):
        return pipe(**self.prompt(prompt), **settings).images

    @property
    def loader(self):
        if self.args.use_lora:
            return super().loader
        variant = VARIANTS[self.args.save_dtype[0]]
        variant = f'variant="{variant}", ' if variant else ""
        return f"DiffusionPipeline.from_pretrained(..., {variant}trust_remote_code=True)"

    def _load_saved(self, folder, **settings):
        return load(DiffusionPipeline, folder, "--output_dir", trust_remote_code=True, **settings)


def last_tokens(hidden_states, latents, patch):
    """The image's `[B, n, D]` where the text's come before: a token is a patch of latents, `patch` positions wide."""
    return hidden_states[:, -(latents[0, 0].numel() // patch**2) :]


FAMILIES = {
    family.pipeline_class.__name__: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        Kolors,
        StableDiffusion3,
        Flux,
        PixArtAlpha,
        PixArtSigma,
        Sana,
        Chroma,
        Flux2Klein,
        QwenImage,
        ZImage,
        Lumina2,
        AuraFlow,
        HunyuanDiT,
        DiT,
        ClassConditionalMMDiT,
    )
}


def find_family(args):
    """The class for the model of the flags, which are checked against its configs, before any weights are loaded."""
    name, flag, hub = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", hub_flags(args)
    index, scheduler_config = {}, {}
    if name is not None:
        index = load(DiffusionPipeline, name, flag, "load_config", **hub)
        scheduler_config = load(DDPMScheduler, name, flag, "load_config", subfolder="scheduler", **hub)
    family = FAMILIES[pipeline_name(args, index)]
    denoiser_config = args.transformer_config
    if name is not None:
        config = load(family.denoiser_class, name, flag, "load_config", subfolder=family.denoiser_name, **hub)
        check_text_widths(family.denoiser_class, denoiser_config or config, config)
        denoiser_config = denoiser_config or config
    if args.pretrained_vae_model_name_or_path:
        vae_config = given_vae_config(args)
    else:
        vae_config = load(AutoencoderKL, name, flag, "load_config", subfolder="vae", **hub)
    check_configs(args, index, vae_config, denoiser_config, scheduler_config)
    if args.lora_layers:
        denoiser = from_config_without_values(family.denoiser_class, denoiser_config, torch.float32)
        check_lora_layers(denoiser, [layer.strip() for layer in args.lora_layers.split(",")])
    check_objectives(args, family, denoiser_config, vae_config)
    return family


def check_objectives(args, family, denoiser_config, vae_config):
    """The layers and the network that flags of the objectives name must fit the models. Raises UserError."""
    if args.sp_layers:
        denoiser = from_config_without_values(family.denoiser_class, denoiser_config, torch.float32)
        layers_of(args.sp_layers, block_names(denoiser, family.block_lists))
    if args.e_latent_lpips_weight:
        vae = from_config_without_values(getattr(diffusers, vae_config["_class_name"]), vae_config, torch.float32)
        if args.dry_run and args.e_latent_lpips_model == PUBLISHED:
            published_for(vae.config)  # is not downloaded
        elif args.dry_run:
            scaling_of(vae.config)
        else:
            load_latent_lpips(args.e_latent_lpips_model, vae.config, args.cache_dir)
