"""Models to be compared, and the folders of samples that they draw, for `evaluate_lpl.py`.

Sample i is drawn from the same noise, of seed + i, and for the same caption or class, whatever the model, the batch
size and the number of processes. It is kept as `{i}_seed{seed + i}.png`, which says in its text how it was made, and
appears when it is complete; a run that was interrupted draws what is missing.
"""

import hashlib
import inspect
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DDPMScheduler, DiffusionPipeline
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from arguments import UserError, first_line
from disk_cache import files_hash, weights_hash
from family import LORA_FILE, NON_EMA, NON_EMA_LORA
from loading import given_vae_config, hub_flags, load, load_part, load_vae
from model_checks import PIPELINES, VAES, denoiser_of, is_folder_name
from model_families import FAMILIES, ClassConditional
from noise import is_flow_scheduler, prediction_type
from samplers import make_sampler


@dataclass
class Model:
    """One of the models to be compared, and what of it is known before its weights are loaded."""

    name: str
    source: str  # Hub id or folder: a pipeline, or a denoiser that was saved alone
    base: str  # the pipeline around it: `source` itself, or --base_model
    lora: str | None
    raw: bool  # without the average
    family: type = None
    num_classes: int | None = None
    id2label: dict = field(default_factory=dict)
    resolution: int | None = None  # pixels that it was made for

    def read_configs(self, args):
        """Raises UserError if this is none of the models that the training scripts give."""
        hub = {"cache_dir": args.cache_dir}
        index = load(DiffusionPipeline, self.base, "--model", "load_config", **hub)
        name = index["_class_name"]
        name = name[-1] if isinstance(name, list) else name
        if name not in FAMILIES:
            raise UserError(f"--model {self.base} is a {name}; what can be evaluated is a {', '.join(FAMILIES)}.")
        self.family = FAMILIES[name]
        for flag, parameter in (("guidance_scale", self.family.guidance_name), ("guidance_rescale",) * 2):
            if getattr(args, flag) is not None and parameter not in call_parameters(self.family):
                raise UserError(f"--{flag} has no effect on {self.name}: {name} does not take it; leave it out.")
        config = load(self.family.denoiser_class, self.source, "--model", "load_config", subfolder=self.part, **hub)
        if args.pretrained_vae_model_name_or_path:
            vae = given_vae_config(args)
        else:
            vae = load(AutoencoderKL, self.base, "--model", "load_config", subfolder="vae", **hub)
        if issubclass(self.family, ClassConditional):
            self.num_classes = config.get("num_classes") or config.get("num_embeds_ada_norm")
            self.id2label = {int(label): names for label, names in (index.get("id2label") or {}).items()}
        self.resolution = args.resolution or made_for(name, config, vae)
        check_size(self.name, name, self.resolution, config, vae)

    @property
    def part(self):
        return self.family.denoiser_name

    def load(self, args, device, dtype):
        """The stock pipeline, on the device, with the sampler of the flags; and what the report calls the sampler."""
        hub = {"cache_dir": args.cache_dir}
        given = {}
        if self.source != self.base or (self.raw and self.lora is None):
            variant = NON_EMA if self.raw else args.variant
            files = {"subfolder": self.part, "variant": variant, "dtype": dtype}
            given[self.part] = load(self.family.denoiser_class, self.source, "--model", **files, **hub)
        if args.pretrained_vae_model_name_or_path:
            given["vae"] = load_vae(args, dtype)
        pipe = self._load_pipeline(args, dtype, given)
        if self.lora is not None:
            self._add_lora(pipe)
        trained = self.lora or self.source
        own = own_scheduler(trained, args.cache_dir) if trained != self.base else None
        pipe.scheduler, sampler = make_sampler(own or pipe.scheduler, args.sampler)
        trained = pipe.scheduler.config.get("num_train_timesteps", 1000)
        if max(args.num_inference_steps) > trained and not is_flow_scheduler(pipe.scheduler):
            raise UserError(f"--num_inference_steps: {self.name} was trained at {trained} noise levels: give no more.")
        pipe.set_progress_bar_config(disable=True)
        if args.offload and device.type == "cuda":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return pipe, sampler

    def load_vae(self, args, device):
        """Its VAE alone, in float32: some overflow in the precision that samples are drawn in."""
        if args.pretrained_vae_model_name_or_path:
            return load_vae(args, torch.float32).to(device)
        return load_part(ModelSource(self.base, args.cache_dir, args.variant), "vae", torch.float32).to(device)

    def _load_pipeline(self, args, dtype, given):
        family = self.family
        if family.pipeline_class.__module__.startswith("diffusers."):
            settings = {**family.unused, **family.settings, **given, "variant": args.variant, "dtype": dtype}
            return load(family.pipeline_class, self.base, "--model", cache_dir=args.cache_dir, **settings)
        # Part by part: nothing that lies beside the weights is run.
        source = ModelSource(self.base, args.cache_dir, args.variant)
        if self.part not in given:
            files = {"subfolder": self.part, "variant": args.variant, "dtype": dtype}
            given[self.part] = load(family.denoiser_class, self.base, "--model", **files, **hub_flags(source))
        vae = given.get("vae") or load_part(source, "vae", dtype)
        return family.pipeline_class(given[self.part], vae, load_part(source, "scheduler"), id2label=self.id2label)

    def _add_lora(self, pipe):
        try:
            if self.family.stock_lora:
                self._load_stock_lora(pipe)
            else:
                folder = str(Path(self.lora, NON_EMA)) if self.raw else self.lora
                model = PeftModel.from_pretrained(getattr(pipe, self.part), folder).eval()
                strange = adapter_state(model, "default").keys() ^ load_peft_weights(folder, device="cpu").keys()
                if strange:  # peft passes over them
                    raise ValueError(f"it and this model differ in {min(strange)}")
                setattr(pipe, self.part, model)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            remedy = "give the folder or Hub id of a LoRA that was trained on this model"
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(f"--lora {self.lora} can't be loaded ({reason}): {remedy}.") from error

    def _load_stock_lora(self, pipe):
        ours = is_folder_name(self.lora) and Path(self.lora, LORA_FILE).exists()
        name = NON_EMA_LORA if self.raw else LORA_FILE if ours else None
        pipe.load_lora_weights(self.lora, adapter_name="lora", **({"weight_name": name} if name else {}))
        parts = (self.part, *self.family.text_encoder_names)
        models = [model for part in parts if hasattr(model := getattr(pipe, part), "peft_config")]
        found = sum(len(adapter_state(model, "lora")) for model in models)
        # Diffusers passes over what finds no place. Files of other programs call things otherwise.
        wanted = len(load_file(Path(self.lora, name))) if ours else found
        if found != wanted or not found:
            raise ValueError(f"{found} of its weights fit")


def adapter_state(model, adapter):
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def read_models(args):
    """The models' configs, which must agree in what they draw; sets --resolution. Raises UserError."""
    models = [Model(name, *entry) for name, entry in zip(args.names, args.entries)]
    for model in models:
        model.read_configs(args)
    first = models[0]
    for model in models[1:]:
        if model.num_classes != first.num_classes:
            kinds = [f"{m.num_classes} classes" if m.num_classes else "captions" for m in (first, model)]
            raise UserError(f"{first.name} draws {kinds[0]} and {model.name} {kinds[1]}: they can't be compared.")
        for label in model.id2label.keys() & first.id2label.keys():
            if model.id2label[label] != first.id2label[label]:
                raise UserError(
                    f"class {label} is {first.id2label[label]} for {first.name} and {model.id2label[label]} for "
                    f"{model.name}: their samples would not be pairs."
                )
        if model.resolution != first.resolution:
            raise UserError(
                f"{first.name} is made for {first.resolution} pixels and {model.name} for {model.resolution}: say "
                "with --resolution what to draw."
            )
    args.resolution = first.resolution
    return models


class ModelSource:
    """What `loading` wants to know of the flags."""

    def __init__(self, name, cache_dir, variant):
        self.pretrained_model_name_or_path, self.cache_dir, self.variant = name, cache_dir, variant
        self.revision, self.dry_run = None, False


def made_for(pipeline, config, vae_config):
    """Pixels of a side: by the denoiser's config, or what the pipelines of those take that do not say."""
    size = config.get("sample_size")
    return size * pixels_per_latent(vae_config) if isinstance(size, int) else 1024


def pixels_per_latent(vae_config):
    if vae_config.get("_class_name") not in VAES:
        raise UserError(f"a {vae_config.get('_class_name')} is no VAE that is known here: {', '.join(VAES)}.")
    blocks, _, default, _ = VAES[vae_config["_class_name"]]
    return 2 ** (len(vae_config.get(blocks, range(default))) - 1)


def check_size(name, pipeline, resolution, config, vae_config):
    """Raises UserError if the model can't draw such images."""
    patch = pixels_per_latent(vae_config)
    if denoiser_of(pipeline) == "transformer":
        patch *= PIPELINES[pipeline].patch or config.get("patch_size", 1)
    if resolution % patch:
        raise UserError(f"--resolution {resolution} must be a multiple of {patch} for {name}.")
    if pipeline == "DiTPipeline" and resolution != made_for(pipeline, config, vae_config):
        size = made_for(pipeline, config, vae_config)
        raise UserError(f"--resolution {resolution}: {name} draws {size} pixels, the size it was made for.")


def identity(pipe):
    """Hashes of all `weights` that draw an image, and of the settings of its scheduler, adapters and tokenizers."""
    parts = [part for _, part in sorted(pipe.components.items())]
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    weights = weights_hash(*(module.base_model if isinstance(module, PeftModel) else module for module in modules))
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    for module in modules:
        for name, config in getattr(module, "peft_config", {}).items():
            settings[name, type(module).__name__] = [config.r, config.lora_alpha, config.rank_pattern, config.use_dora]
            settings[name, type(module).__name__] += [config.alpha_pattern]
    tokenizers = files_hash(*(part for part in parts if isinstance(part, PreTrainedTokenizerBase)))
    described = repr(sorted((str(name), str(value)) for name, value in settings.items())) + tokenizers
    return {"weights": weights, "scheduler_or_adapters": hashlib.sha256(described.encode()).hexdigest()}


def own_scheduler(name, cache_dir):
    """The scheduler that was saved with a LoRA or a denoiser because training changed it, or None."""
    try:
        config = DDPMScheduler.load_config(name, subfolder="scheduler", cache_dir=cache_dir)
    except OSError:
        return None
    return getattr(diffusers, config["_class_name"]).from_config(config)


def call_parameters(family):
    return inspect.signature(family.pipeline_class.__call__).parameters


def draw_samples(accelerator, pipe, family, prompts, folder, settings, args):
    """Draw what is missing of one sample per prompt; all processes call this and share the work.

    Args:
        prompts: captions or class labels, one a sample.
        folder: where the samples are and go.
        settings: all that the samples depend on besides, which those that are there must share: of the pipeline's
            call `num_inference_steps`, `guidance_scale` and `guidance_rescale`.
    """
    if accelerator.is_main_process:
        claim_folder(folder, settings)
    accelerator.wait_for_everyone()
    there = {path.name for path in folder.glob("*.png")}
    missing = [i for i in range(len(prompts)) if sample_name(i, args.seed) not in there]
    accelerator.wait_for_everyone()  # all have seen the same before the first one is added
    call = {"num_inference_steps": settings["num_inference_steps"]}
    for name, parameter in (("guidance_scale", family.guidance_name), ("guidance_rescale", "guidance_rescale")):
        if settings[name] is not None:
            call[parameter] = settings[name]
    call |= family.size_settings(args.resolution)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    title = f"Drawing {folder.name}"
    for batch in tqdm(batches, title, unit="batch", disable=not accelerator.is_local_main_process or not batches):
        images = draw_batch(pipe, family, [prompts[i] for i in batch], [args.seed + i for i in batch], call)
        for i, image in zip(batch, images):
            save_sample(image, folder, i, args.seed, prompts[i], settings)
    accelerator.wait_for_everyone()


@torch.no_grad()
def draw_batch(pipe, family, prompts, seeds, settings):
    """PIL images of a pipeline. Raises UserError if there is too little memory."""
    inputs = {"class_labels" if issubclass(family, ClassConditional) else "prompt": prompts}
    inputs |= {k: [v] * len(prompts) if k == "negative_prompt" else v for k, v in family.sampling.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        return pipe(**inputs, generator=generators, **settings).images
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"too little memory to draw {len(prompts)} images at a time ({first_line(error)}): lower --batch_size, or "
            "use --mixed_precision bf16 or --offload."
        ) from error


def sample_name(index, seed):
    return f"{index:06d}_seed{seed + index}.png"


def save_sample(image, folder, index, seed, prompt, settings):
    """A PNG that says how it was made."""
    info = PngImagePlugin.PngInfo()
    for name, value in {**settings, "prompt": prompt, "seed": seed + index}.items():
        info.add_itxt(name, str(value))
    save_png(image, Path(folder, sample_name(index, seed)), info)


def save_png(image, path, info=None):
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, "PNG", pnginfo=info)
    os.replace(temporary, path)


def claim_folder(folder, settings):
    """Note what the samples of a folder depend on. Raises UserError if there are some that depend on other things."""
    path, remedy = Path(folder, "settings.json"), "choose another --output_dir, or remove that folder"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    if path.exists() or any(folder.glob("*.png")):
        try:
            there = json.loads(path.read_text())
            changed = [name for name in wanted | there if wanted.get(name) != there.get(name)]
        except (OSError, ValueError, TypeError):
            raise UserError(f"{folder} has images that do not say how they were made: {remedy}.") from None
        if changed:
            values = [there.get(changed[0]), wanted.get(changed[0])]
            hashes = any(isinstance(value, list) or len(str(value)) > 30 for value in values)
            shown = "" if hashes else f" ({values[0]}, now {values[1]})"
            raise UserError(f"{folder} has images made with other {changed[0].replace('_', ' ')}{shown}: {remedy}.")
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(temporary, path)


@torch.no_grad()
def reconstruct(accelerator, vae, images, folder, settings, batch_size):
    """What the VAE makes of `evaluation.Images`, as PNGs, whose paths are returned; gone on with like samples."""
    if accelerator.is_main_process:
        claim_folder(folder, settings)
    accelerator.wait_for_everyone()
    paths = [Path(folder, f"{i:06d}.png") for i in range(len(images))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    accelerator.wait_for_everyone()  # all have seen the same before the first one is added
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    for batch in tqdm(batches, "Reconstructing", unit="batch", disable=not accelerator.is_local_main_process):
        pixels = images.stack(batch).to(vae.device, vae.dtype) / 127.5 - 1
        for i, image in zip(batch, encode_and_decode(vae, pixels)):
            save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), paths[i])
    accelerator.wait_for_everyone()
    return paths


def encode_and_decode(vae, pixels):
    """Pixels `[B, 3, H, W]` in [-1, 1] -> uint8 on the CPU, by way of the mean of their posterior."""
    video = isinstance(vae, AutoencoderKLQwenImage)
    encoded = vae.encode(pixels.unsqueeze(2) if video else pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    decoded = vae.decode(latents).sample
    decoded = decoded.squeeze(2) if video else decoded
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def all_agree(value):
    """The main process's value, on all of them."""
    return broadcast_object_list([value])[0]


def describe(pipe, family, sampler, scale):
    """What a report says of how a model draws; scale: of the flags, or None."""
    default = call_parameters(family).get(family.guidance_name)
    return {
        "sampler": sampler,
        "timestep_spacing": pipe.scheduler.config.get("timestep_spacing"),
        "prediction_type": prediction_type(pipe.scheduler),
        "guidance_scale": default.default if scale is None and default is not None else scale,
    }
