"""Loads models from a folder or the Hub, or without their values for --dry_run, and prepares what is to be trained."""

import difflib
import inspect
import re
from argparse import Namespace

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import SafetensorError

from arguments import UserError, first_line
from model_checks import is_folder_name, vae_folder


VAE_FLAG = "--pretrained_vae_model_name_or_path"
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(model_class, name, flag, method="from_pretrained", **kwargs):
    """Load from a folder or the Hub; what goes wrong there is the user's to mend, in one sentence."""
    try:
        return getattr(model_class, method)(name, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = first_line(error).rstrip(".")
        remedy = "give a folder or a Hub id in reach"
        if "no file named" in reason and not kwargs.get("variant"):
            remedy += ", or --variant fp16 if it has weights of that kind alone"
        raise UserError(f"{flag} {name} can't be loaded ({reason}): {remedy}.") from error


def load_part(args, part, dtype=None):
    """A model of diffusers, or the scheduler, from the pipeline of --pretrained_model_name_or_path."""
    name, flag, hub = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", hub_flags(args)
    class_name = load(DiffusionPipeline, name, flag, "load_config", **hub)[part][1]
    part_class = getattr(diffusers, class_name, None)
    if part_class is None:
        raise UserError(f"{flag} {name}: diffusers has no {class_name}: give a model with another {part}.")
    if part == "scheduler":
        return load(part_class, name, flag, subfolder=part, **hub)
    if args.dry_run:
        config = load(part_class, name, flag, "load_config", subfolder=part, **hub)
        return from_config_without_values(part_class, config, dtype)
    return load(part_class, name, flag, subfolder=part, variant=args.variant, dtype=dtype, **hub)


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
        libraries = {"diffusers": diffusers, "transformers": transformers}
        model_class = getattr(libraries.get(entry[0]) or getattr(diffusers.pipelines, entry[0]), entry[1])
        part_dtype = dtype.get(part, dtype["default"])
        if issubclass(model_class, diffusers.ModelMixin):
            config = load(model_class, name, flag, "load_config", subfolder=part, **hub)
            components[part] = from_config_without_values(model_class, config, part_dtype)
        elif issubclass(model_class, transformers.PreTrainedModel):
            config = load(model_class.config_class, name, flag, subfolder=part, **hub)
            with torch.device("meta"):
                components[part] = cast(model_class(config), part_dtype)
        else:
            components[part] = load(model_class, name, flag, subfolder=part, **hub)
    known = {key: value for key, value in settings.items() if key not in components}
    return pipeline_class(**{**known, **components})


def from_config_without_values(model_class, config, dtype):
    with torch.device("meta"):
        return cast(model_class.from_config(config), dtype)


def cast(model, dtype):
    """What `from_pretrained` casts: all but the buffers that are not saved."""
    saved = model.state_dict().keys()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in unsaved.items():
        module, _, name = name.rpartition(".")
        model.get_submodule(module)._buffers[name] = buffer
    return model


def hub_flags(args):
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def vae_source(args):
    name = args.pretrained_vae_model_name_or_path
    return vae_folder(name) if is_folder_name(name) else name


def given_vae_config(args):
    return load(AutoencoderKL, vae_source(args), VAE_FLAG, "load_config", cache_dir=args.cache_dir)


def load_vae(args, dtype):
    """The VAE that the run works with: its own or the pipeline's, with its values, also for --dry_run."""
    if not args.pretrained_vae_model_name_or_path:
        return load_part(Namespace(**{**vars(args), "dry_run": False}), "vae", dtype)
    vae_class = getattr(diffusers, given_vae_config(args)["_class_name"])
    return load(vae_class, vae_source(args), VAE_FLAG, dtype=dtype, cache_dir=args.cache_dir)


def quantization_config(args):
    """What --bnb_quantization_config_path says."""
    if not torch.accelerator.is_available():
        raise UserError("--bnb_quantization_config_path needs a GPU: leave it out.")
    try:
        return diffusers.BitsAndBytesConfig(**args.bnb_quantization_config_path)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--bnb_quantization_config_path: {error}") from error


def check_lora_layers(denoiser, layers):
    """Every name of --lora_layers must be the end of some module's. Raises UserError with those that come near."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    names = [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            ends = {".".join(name.split(".")[-n:]) for name in names for n in (1, 2, 3)}
            ends = {end for end in ends if not end[0].isdigit()}
            near = difflib.get_close_matches(layer, sorted(ends), n=4, cutoff=0.4) or sorted(ends)[:8]
            raise UserError(f"--lora_layers {layer}: no module has a name like this; there are {', '.join(near)}.")


def check_text_widths(denoiser_class, config, pipelines):
    """A new transformer must take the embeddings that the pipeline's text encoders give. Raises UserError."""
    names = ["joint_attention_dim", "pooled_projection_dim", "caption_channels", "cap_feat_dim"]
    if denoiser_class.__name__ == "HunyuanDiT2DModel":  # whose pooled projection is its own
        names = ["cross_attention_dim", "cross_attention_dim_t5"]
    for name in names:
        default = inspect.signature(denoiser_class.__init__).parameters.get(name)
        if default is not None and config.get(name, default.default) != pipelines.get(name, default.default):
            raise UserError(
                f"--transformer_config: {name} must be {pipelines.get(name, default.default)}, the width of the "
                f"pipeline's text embeddings, not {config.get(name, default.default)}."
            )


# The outputs, and the gates of adaptive norms
ZERO = r"^proj_out|^norm_out\.linear_2$|^all_final_layer\..*\.linear$|norm\w*\.linear$|adaLN_modulation"


def initialize(transformer):
    """New weights: the output starts as zero, and so do the gates of adaptive norms (adaLN-Zero, Peebles & Xie)."""
    for name, module in transformer.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            if re.search(ZERO, name):
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.xavier_uniform_(module.weight.data.flatten(1))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    return transformer
