"""What the config files of models say about the flags: checked before weights are loaded, if local without libraries.

check_model_folders    a local model, with the flags
check_configs          any model, once its configs are there; sets the defaults that depend on them
class_ids, label_of    the classes of class-conditional models
"""

import difflib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from arguments import UserError, check_unused
from buckets import make_buckets, parse_buckets


SIZES = (
    "in_channels out_channels patch_size sample_size pos_embed_max_size num_classes num_embeds_ada_norm num_layers "
    "num_attention_heads attention_head_dim"
).split()


def read_transformer_config(path):
    """What --transformer_config says, as far as it can be checked without the transformer. Raises UserError."""
    config = read_json(path, "--transformer_config", "give a transformer's config.json")
    if not isinstance(config.get("_class_name"), str):
        raise UserError(
            f"--transformer_config: {path} has no _class_name, such as DiTTransformer2DModel: give a transformer's "
            "config.json."
        )
    for name in SIZES:
        if config.get(name) is not None and not (isinstance(config[name], int) and config[name] > 0):
            raise UserError(f"--transformer_config: {name} must be a whole number above 0, not {config[name]!r}.")
    return config


# What diffusers.BitsAndBytesConfig knows; it passes over the rest without a word
QUANTIZATION_KEYS = (
    "load_in_4bit load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant "
    "bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload "
    "llm_int8_has_fp16_weight"
).split()


def read_quantization_config(path):
    """What --bnb_quantization_config_path says. Raises UserError."""
    flag = "--bnb_quantization_config_path"
    config = read_json(path, flag, 'write one such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    for key in config.keys() - set(QUANTIZATION_KEYS):
        near = difflib.get_close_matches(key, QUANTIZATION_KEYS, n=1, cutoff=0)[0]
        raise UserError(f"{flag}: there is no setting {key} in bitsandbytes: leave it out, or is {near} meant?")
    if (config.get("load_in_4bit") is True) == (config.get("load_in_8bit") is True):
        raise UserError(f"{flag}: {path} must say either load_in_4bit or load_in_8bit: true.")
    return config


def is_folder_name(name):
    """Whether a model name means a folder rather than a Hub id (`owner/name`)."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def public_name(name):
    """A Hub id as it is; of a folder of this machine only its own name."""
    return Path(name).resolve().name if is_folder_name(name) else name


def class_ids(args):
    """{name: label} of the model's classes: all their names together, as the index has them, and each by itself.

    What names two classes is not among them.
    """
    labels = {}
    for label, names in args.id2label.items():
        for name in dict.fromkeys((names, *(name.strip() for name in names.split(",")))):
            labels.setdefault(name, []).append(label)
    return {name: found[0] for name, found in labels.items() if len(found) == 1}


def label_of(args, prompt):
    """The class label that a validation prompt names or is. Raises UserError."""
    ids = class_ids(args)
    label = int(prompt) if prompt.isdecimal() else ids.get(prompt)
    if label is None or label >= args.num_classes:
        near = difflib.get_close_matches(prompt, ids, n=3)
        raise UserError(
            f"--validation_prompts {prompt} is no class of the model: give a number below {args.num_classes} or a "
            f"class's name" + (f", such as {', '.join(near)}." if near else ".")
        )
    return label


# Pipelines whose prompts are class labels
CLASS_CONDITIONAL = ("DiTPipeline", "ClassConditionalPipeline")
# Transformers that can be trained without a pipeline, on class labels
FROM_SCRATCH = dict(zip(("DiTTransformer2DModel", "ClassConditionalSD3Transformer2DModel"), CLASS_CONDITIONAL))


def pipeline_name(args, index):
    """The class of the pipeline with this `model_index.json`, or without one of the transformer from scratch."""
    name, new_transformer = args.pretrained_model_name_or_path, (args.transformer_config or {}).get("_class_name")
    if name is None:
        if new_transformer not in FROM_SCRATCH:
            raise UserError(
                f"--transformer_config: a new {new_transformer} needs --pretrained_model_name_or_path with the "
                f"pipeline around it; without one, _class_name must be {' or '.join(FROM_SCRATCH)}."
            )
        return FROM_SCRATCH[new_transformer]
    pipeline = index.get("_class_name")
    pipeline = pipeline[-1] if isinstance(pipeline, list) else pipeline  # [file, class] of a pipeline of ours
    if pipeline not in args.pipelines:
        for_unets = "StableDiffusionPipeline" in args.pipelines
        part, script = ("transformer", "train_lpl_dit.py") if for_unets else ("unet", "train_lpl_sd.py")
        other = f"; for those with a {part} there is {script}" if part in index else ""
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {pipeline}; this script finetunes "
            f"{', '.join(args.pipelines)}{other}."
        )
    if new_transformer and index.get("transformer", [None])[-1] not in (new_transformer, "Transformer2DModel"):
        raise UserError(
            f"--transformer_config: its _class_name is {new_transformer}, but the transformer of {name} is a "
            f"{index.get('transformer', [None])[-1]}: give the config of one of that class."
        )
    return pipeline


def check_model_folders(args):
    """A local model is checked by its config files, as `check_configs` does for all models once they are there.

    Returns whether everything was local.
    """
    name, vae_name = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    vae_config, index, scheduler_config, denoiser_config = None, {}, {}, args.transformer_config
    if name is None and not (args.transformer_config and vae_name):
        raise UserError(
            "no model: give --pretrained_model_name_or_path, or to train from scratch --transformer_config and "
            "--pretrained_vae_model_name_or_path."
        )
    if vae_name and is_folder_name(vae_name):
        vae_config = read_json(vae_folder(vae_name) / "config.json", "--pretrained_vae_model_name_or_path")
    if name is not None and not is_folder_name(name):
        return False
    if name is not None:
        flag = "--pretrained_model_name_or_path"
        index = read_json(Path(name) / "model_index.json", flag)
        pipeline_name(args, index)
        if not vae_name:
            vae_config = read_json(Path(name) / "vae" / "config.json", flag)
        for part in (part for part, entry in index.items() if isinstance(entry, list) and entry[0] == "transformers"):
            needed = {"tokenizer": "tokenizer_config.json", "text_encoder": "config.json"}
            file = needed.get(part.removesuffix("_2").removesuffix("_3"))
            if file is not None:
                read_json(Path(name) / part / file, flag)
        if index.get("_class_name") == "KolorsPipeline":
            read_json(Path(name) / "text_encoder" / "config.json", flag)
            if not (Path(name) / "tokenizer" / "tokenizer.model").is_file():
                raise UserError(f"{flag}: there is no {Path(name) / 'tokenizer' / 'tokenizer.model'}; {REMEDY}.")
        denoiser = "unet" if "unet" in index else "transformer"
        denoiser_config = args.transformer_config or read_json(Path(name) / denoiser / "config.json", flag)
        scheduler_config = read_json(Path(name) / "scheduler" / "scheduler_config.json", flag)
    if vae_config is None:
        return False
    check_configs(args, index, vae_config, denoiser_config, scheduler_config)
    return True


def vae_folder(name):
    """`--pretrained_vae_model_name_or_path` may be the VAE's own folder or that of a pipeline which has one."""
    return Path(name) / "vae" if (Path(name) / "model_index.json").exists() else Path(name)


REMEDY = "give a Hub id or the folder of a saved model"


def read_json(path, flag, remedy=REMEDY):
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it does not hold settings in braces")
        return values
    except FileNotFoundError:
        raise UserError(f"{flag}: there is no {path}; {remedy}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {path} can't be read ({error}); correct it, or {remedy}.") from None


def check_configs(args, index, vae_config, denoiser_config, scheduler_config):
    """What the models' configs say about the flags; sets the defaults that depend on them. Raises UserError.

    Args:
        index: `model_index.json`; empty, like scheduler_config, for a model from scratch.
    """
    pipeline = pipeline_name(args, index)
    args.denoiser_config = denoiser_config
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list)}
    args.absent_parts = [part for part, entry in parts.items() if entry[-1] is None]  # such as SD3's T5
    needed = [part for part in args.absent_parts if part in ("text_encoder", "text_encoder_2", "transformer", "vae")]
    if needed:
        raise UserError(f"--pretrained_model_name_or_path: the model has no {needed[0]}: give one that is complete.")
    check_conditioning(args, index, pipeline, denoiser_config)
    check_vae(args, pipeline, vae_config, denoiser_config)
    check_resolution(args, pipeline, vae_config, denoiser_config)
    check_schedule(args, pipeline, scheduler_config)
    if args.output_kohya_format and pipeline not in KOHYA:
        raise UserError(
            f"--output_kohya_format is for Stable Diffusion, SDXL and FLUX.1, not for {pipeline}: leave it out."
        )
    if args.save_only_trained and pipeline == "ClassConditionalPipeline":
        raise UserError(f"--save_only_trained: diffusers has no {pipeline}, its code is in whole ones: leave it out.")
    if args.save_only_trained and args.pretrained_model_name_or_path is None:
        raise UserError("--save_only_trained: there is no pipeline with the other parts: leave it out.")


KOHYA = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline")


def check_conditioning(args, index, pipeline, denoiser_config):
    """Captions or class labels. Sets `num_classes` (None for captions), `id2label` and what captions alone have."""
    labels = pipeline in CLASS_CONDITIONAL
    args.num_classes = None
    if labels:
        args.num_classes = denoiser_config.get("num_classes", denoiser_config.get("num_embeds_ada_norm", 1000))
        if not hasattr(args, "id2label"):  # else the data's names are there already
            args.id2label = {int(label): name for label, name in (index.get("id2label") or {}).items()}
        captions = "--caption_weights --caption_column --instance_prompt --trigger_word --with_prior_preservation"
        captions = [*captions.split(), "--cache_text_embeddings"]
        check_unused(args, captions, f"the class labels of {pipeline}")
        args.cache_text_embeddings = False  # which --latent_cache_dir stands for as well
        check_unused(args, ["--max_sequence_length"], pipeline)
        if pipeline == "DiTPipeline" and args.num_classes != 1000:
            raise UserError(
                "--transformer_config: num_embeds_ada_norm must be 1000, because DiTPipeline takes label 1000 for no "
                "class; with fewer classes the rest of the labels stay unused."
            )
    else:
        check_unused(args, ["--label_column"], f"the captions of {pipeline}")
    if pipeline == "Flux2KleinPipeline" or not denoiser_config.get("guidance_embeds"):
        check_unused(args, ["--guidance_scale"], f"{pipeline}, which is not told of its guidance")
    if pipeline == "KolorsPipeline" and args.train_text_encoder:
        raise UserError(
            "--train_text_encoder: that of Kolors is a large language model, which is not trained: leave it out."
        )
    if pipeline == "HunyuanDiTPipeline":
        check_unused(args, ["--gradient_checkpointing"], f"{pipeline}, whose transformer has none")
    if pipeline == "QwenImagePipeline" and denoiser_config.get("guidance_embeds"):
        raise UserError("the transformer has guidance_embeds, which is not there for Qwen-Image: give one without.")
    if pipeline in ("SanaPipeline", "Lumina2Pipeline") and "" in (args.validation_prompts or ()):
        raise UserError(f"--validation_prompts: to {pipeline} an empty prompt is a negative one: name something.")
    longest = room_for_text(pipeline, denoiser_config)
    if longest == 0:
        check_unused(args, ["--max_sequence_length"], f"{pipeline}, whose text embeddings have a fixed length")
    length = args.max_sequence_length or {"Lumina2Pipeline": 256, "ZImagePipeline": 512}.get(pipeline, 0)
    if length > longest:
        name = f"--max_sequence_length {length}" + ("" if args.max_sequence_length else " (the default)")
        raise UserError(f"{name}: {pipeline} draws with at most {longest:g}, give that or less.")
    if args.proportion_empty_prompts is None:
        args.proportion_empty_prompts = 0.1 if labels else 0.0


# VAE classes: where their configs have a value per level of the encoder and of the decoder, how many by default, and
# how many channels by default
VAES = {
    "AutoencoderKL": ("block_out_channels", "up_block_types", 1, 4),
    "AsymmetricAutoencoderKL": ("down_block_out_channels", "up_block_types", 1, 4),
    "AutoencoderTiny": ("encoder_block_out_channels", "num_decoder_blocks", 4, 4),
    "AutoencoderDC": ("encoder_block_out_channels", "decoder_block_out_channels", 6, 32),
    "AutoencoderKLFlux2": ("block_out_channels", "up_block_types", 4, 32),
    "AutoencoderKLQwenImage": ("dim_mult", "dim_mult", 4, 16),
}


class Rules(NamedTuple):
    """What a stock pipeline counts on."""

    vaes: tuple = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")  # those that it can sample with
    shift: bool | None = None  # reads the VAE's shift_factor (True), or samples as if there were none (False)
    flow: bool | None = False  # samples by flow matching, or (None) can do both
    packs: bool = False  # makes one token, and its channels, of 2 x 2 latents
    patch: int | None = None  # side of a token in latents; by default the transformer's patch_size
    factor: int | None = None  # side of a latent in pixels, if that is fixed
    longest: float = math.inf  # text tokens that it takes at most; 0: a fixed number
    variance: bool = False  # may leave a predicted variance alone
    squares: bool = False  # takes squares alone


SHIFTED = Rules(vaes=("AutoencoderKL", "AutoencoderTiny"), shift=True, flow=True)
PACKED = SHIFTED._replace(packs=True, patch=2, longest=512)
ANY_SCALED = (*Rules().vaes, "AutoencoderDC")
PIPELINES = {
    "StableDiffusion3Pipeline": SHIFTED._replace(longest=512),
    "FluxPipeline": PACKED,
    "ChromaPipeline": PACKED,
    "Flux2KleinPipeline": Rules(vaes=("AutoencoderKLFlux2",), flow=True, packs=True, patch=2),
    "QwenImagePipeline": Rules(vaes=("AutoencoderKLQwenImage",), flow=True, packs=True, patch=2, longest=1024),
    "ZImagePipeline": SHIFTED._replace(patch=2),
    "Lumina2Pipeline": SHIFTED._replace(factor=8),
    "AuraFlowPipeline": Rules(shift=False, flow=True),
    "SanaPipeline": Rules(vaes=("AutoencoderDC", "AutoencoderTiny"), shift=False, flow=True),
    "StableDiffusionPipeline": Rules(),
    "StableDiffusionXLPipeline": Rules(),
    "KolorsPipeline": Rules(),
    "PixArtAlphaPipeline": Rules(shift=False, variance=True),
    "PixArtSigmaPipeline": Rules(shift=False, variance=True),
    "HunyuanDiTPipeline": Rules(shift=False, factor=8, longest=0),
    "DiTPipeline": Rules(vaes=ANY_SCALED, shift=False, variance=True, squares=True),
    "ClassConditionalPipeline": Rules(vaes=ANY_SCALED, flow=None),
}


def room_for_text(pipeline, denoiser_config):
    """Text tokens that a pipeline, or its transformer's positions, have room for."""
    if pipeline == "Lumina2Pipeline":  # the image comes after the text
        return denoiser_config.get("axes_lens", [300])[0] - 1
    if pipeline == "ZImagePipeline":  # the same, and text comes in pieces of 32 tokens
        return (denoiser_config.get("axes_lens", [1024])[0] - 2) // 32 * 32
    return PIPELINES[pipeline].longest


# What a new transformer's config must say, as the classes' defaults differ, if it is not all of these
NEEDED = ("in_channels", "out_channels", "patch_size")
NEEDED_BY = {"ZImageTransformer2DModel": NEEDED[:1], "HunyuanDiT2DModel": (NEEDED[0], NEEDED[2])}


def latent_channels(vae_config):
    """Channels of what a VAE encodes to."""
    default = VAES[vae_config["_class_name"]][-1] if "_class_name" in vae_config else None
    return vae_config.get("z_dim") or vae_config.get("latent_channels", default)


def check_vae(args, pipeline, vae_config, denoiser_config):
    """The VAE fits LPL, the pipeline and the denoiser."""
    needed = NEEDED_BY.get(denoiser_config.get("_class_name"), NEEDED) if args.transformer_config else ()
    for name in needed:
        if name not in args.transformer_config:
            raise UserError(f"--transformer_config does not say {name}: add it.")
    vae_class, another = vae_config.get("_class_name"), "another one with --pretrained_vae_model_name_or_path"
    if vae_class not in VAES:
        raise UserError(f"the VAE is a {vae_class}, this script supports {', '.join(VAES)}: give {another}.")
    rules = PIPELINES[pipeline]
    if vae_class not in rules.vaes:
        raise UserError(f"the VAE is a {vae_class}, which {pipeline} can't sample with: give {another}.")
    channels = latent_channels(vae_config)
    packed = 4 if rules.packs else 1
    taken = denoiser_config.get("in_channels", channels * packed) // packed
    if channels != taken:
        raise UserError(
            f"the VAE has {channels} latent channels, the {denoiser_of(pipeline)} takes {taken}: give the VAE that "
            "belongs to the model with --pretrained_vae_model_name_or_path"
            + (", or change in_channels of --transformer_config." if args.transformer_config else ".")
        )
    if vae_class == "AutoencoderKLQwenImage":
        check_statistics(vae_config, channels)
    if args.transformer_config:
        check_output(pipeline, denoiser_config, channels)
    shift = vae_config.get("shift_factor")
    if rules.shift and vae_class == "AutoencoderKL" and shift is None:
        raise UserError(
            f"the VAE has no shift_factor, which {pipeline} reads: write it into its config.json (0 shifts nothing), "
            f"or give {another}."
        )
    if shift and rules.shift is False:
        raise UserError(f"the VAE has a shift_factor, which {pipeline} does not undo when it samples: give {another}.")
    if args.vae_dtype == "fp16" and vae_config.get("force_upcast"):
        raise UserError(
            "--vae_dtype fp16: this VAE overflows in fp16, as its config says (force_upcast): use --vae_dtype bf16 or "
            "fp32, or a VAE that was made for fp16 with --pretrained_vae_model_name_or_path."
        )
    _, decoder, default, _ = VAES[vae_class]
    blocks = len(vae_config.get(decoder, range(default)))
    blocks -= sum(layers == 0 for layers in vae_config.get("decoder_layers_per_block", ()))  # these have no block
    if args.lpl_weight != 0 and args.lpl_num_blocks > blocks:
        raise UserError(
            f"--lpl_num_blocks {args.lpl_num_blocks}: the VAE's decoder has {blocks} up blocks, give that or fewer."
        )


def check_statistics(config, channels):
    """The mean and deviation that Qwen-Image's VAE has for each channel, and its levels."""
    for name in ("latents_mean", "latents_std"):
        values = config.get(name, [1] * channels)
        if not isinstance(values, list) or len(values) != channels or (name == "latents_std" and min(values) <= 0):
            what = "numbers above 0" if name == "latents_std" else "numbers"
            raise UserError(f"the VAE's config.json: {name} must be {channels} {what}, one for each channel.")
    levels = len(config.get("dim_mult", range(4)))
    if len(config.get("temperal_downsample", range(3))) != levels - 1:
        raise UserError(
            f"the VAE's config.json: temperal_downsample must have {levels - 1} values, for {levels} levels."
        )


def check_output(pipeline, config, channels):
    """What a new transformer's config says of its patches and of what it predicts."""
    rules = PIPELINES[pipeline]
    wanted = channels * (4 if rules.packs and pipeline != "QwenImagePipeline" else 1)  # it packs afterwards
    possible = (wanted, 2 * wanted) if rules.variance else (wanted,)
    given = config.get("out_channels") or wanted
    if given not in possible:
        or_twice = f" (or {2 * wanted}, if it predicts a variance as well)" if len(possible) > 1 else ""
        raise UserError(f"--transformer_config: out_channels must be {wanted}{or_twice}, not {given}.")
    if pipeline == "HunyuanDiTPipeline" and not config.get("learn_sigma", True):
        raise UserError("--transformer_config: learn_sigma must be true, its pipeline counts on a predicted variance.")
    others = {"QwenImagePipeline": ("patch_size", 2), "ZImagePipeline": ("all_patch_size", [2])}
    name, wanted = others.get(pipeline, ("patch_size", 1) if rules.packs else (None, None))
    if name and config.get(name, wanted) not in (wanted, [wanted]):
        raise UserError(f"--transformer_config: {name} must be {wanted}, as {pipeline} counts on, not {config[name]}.")


UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "KolorsPipeline")


def denoiser_of(pipeline):
    return "UNet" if pipeline in UNETS else "transformer"


def check_resolution(args, pipeline, vae_config, denoiser_config):
    """The images' sizes fit VAE and denoiser. Sets the resolution if it is not given, `latent_size` and `buckets`."""
    encoder, _, default, _ = VAES[vae_config["_class_name"]]
    factor = 2 ** (len(vae_config.get(encoder, range(default))) - 1)
    rules = PIPELINES[pipeline]
    if rules.factor not in (None, factor):
        raise UserError(
            f"the VAE makes a latent of {factor} x {factor} pixels, and {pipeline} counts on {rules.factor} x "
            f"{rules.factor}: give another one with --pretrained_vae_model_name_or_path."
        )
    made_for = denoiser_config.get("sample_size") if pipeline in CLASS_CONDITIONAL else None
    if args.resolution is None:
        args.resolution = 1024 if denoiser_config.get("addition_embed_type") == "text_time" else 512
        args.resolution = made_for * factor if made_for else args.resolution
    if args.lpl_gradient_checkpointing is None:
        args.lpl_gradient_checkpointing = args.resolution > 1024
    patch = factor
    if denoiser_of(pipeline) == "transformer":
        patch *= rules.patch or denoiser_config.get("patch_size", 1)
    what = "the VAE's factor" if patch == factor else "the VAE's factor times the transformer's patches"
    if args.resolution % patch:
        nearest = max(1, round(args.resolution / patch)) * patch
        raise UserError(f"--resolution {args.resolution} must be a multiple of {patch}, {what}: {nearest}?")
    args.latent_size = args.resolution // factor
    if pipeline == "DiTPipeline" and args.use_lora and made_for and args.latent_size != made_for:
        raise UserError(
            f"--resolution {args.resolution}: DiTPipeline draws at the size its model was made for, "
            f"{made_for * factor} pixels, with a LoRA too: leave it out, or train all weights."
        )
    name, tokens = room_for_images(pipeline, denoiser_config)
    positions = f"the transformer has positions for {tokens * patch} pixels ({name})"
    if args.resolution > tokens * patch:
        raise UserError(f"--resolution {args.resolution}: {positions}, give that or less.")
    args.buckets = buckets_of(args, pipeline, patch)
    for height, width in args.buckets or ():
        flag = f"--aspect_ratio_buckets {height},{width}"
        if height % patch or width % patch:
            raise UserError(f"{flag}: both sides must be multiples of {patch}, {what}.")
        if max(height, width) > tokens * patch:
            raise UserError(f"{flag}: {positions}, give sizes whose sides are that or less.")


def room_for_images(pipeline, denoiser_config):
    """What of a transformer's config says so, and the tokens that its positions have room for along a side."""
    if pipeline in ("ZImagePipeline", "Lumina2Pipeline"):
        return "axes_lens", min((denoiser_config.get("axes_lens") or [math.inf])[1:], default=math.inf)
    largest = denoiser_config.get("pos_embed_max_size")
    if pipeline == "AuraFlowPipeline":  # it counts both directions
        largest = math.isqrt(largest or 1024)
    return "pos_embed_max_size", largest or math.inf


def buckets_of(args, pipeline, patch):
    """The sizes (height, width) of --aspect_ratio_buckets, or None; `patch` pixels are the unit of all sides."""
    if args.aspect_ratio_buckets is None:
        return None
    if PIPELINES[pipeline].squares:
        raise UserError(f"--aspect_ratio_buckets is not for {pipeline}, which takes squares alone: leave it out.")
    if args.aspect_ratio_buckets == "auto":
        return make_buckets(args.resolution, patch * math.ceil(args.resolution / (16 * patch)))
    return parse_buckets(args.aspect_ratio_buckets)


FLOW_FLAGS = "--weighting_scheme --logit_mean --logit_std --mode_scale".split()
DDPM_FLAGS = "--rescale_betas_zero_snr --timestep_bias_strategy".split()


def check_schedule(args, pipeline, scheduler_config):
    """Formulation and noise levels. Sets `prediction_type` of models from scratch and `weighting_scheme`."""
    timesteps, flag = scheduler_config.get("num_train_timesteps", 1000), "--pretrained_model_name_or_path"
    if args.timestep_bias_strategy == "range" and args.timestep_bias_end > timesteps:
        raise UserError(
            f"--timestep_bias_end {args.timestep_bias_end} must be at most {timesteps}, the number of the model's "
            "timesteps."
        )
    saved = scheduler_config.get("prediction_type", "epsilon")
    if "FlowMatch" in scheduler_config.get("_class_name", "") or saved == "flow_prediction":
        saved = "flow_prediction"
    flow, its_own = PIPELINES[pipeline].flow, f"the scheduler in {flag} is a {scheduler_config.get('_class_name')}"
    if flow and saved != "flow_prediction":
        raise UserError(
            f"{its_own} without flow matching, which {pipeline} needs: give a model with its own, "
            "FlowMatchEulerDiscreteScheduler."
        )
    if flow is False and "FlowMatch" in scheduler_config.get("_class_name", ""):
        raise UserError(f"{its_own}, with which {pipeline} can't sample: give a model with its own scheduler.")
    if pipeline == "AuraFlowPipeline" and scheduler_config.get("use_dynamic_shifting"):
        raise UserError(
            f"{its_own} with use_dynamic_shifting, with which {pipeline} can't sample: set it to false in "
            "scheduler_config.json, and shift to what the noise levels shall be shifted by."
        )
    if not scheduler_config:  # from scratch
        saved = args.prediction_type or ("epsilon" if pipeline == "DiTPipeline" else "flow_prediction")
        args.prediction_type = saved
    prediction_type = args.prediction_type or saved
    if "flow_prediction" in (prediction_type, saved) and prediction_type != saved:
        raise UserError(
            f"--prediction_type {prediction_type}: the model was trained with {saved}, and flow matching can't be "
            "exchanged for diffusion: leave the flag out (class-conditional models from scratch have the choice)."
        )
    if prediction_type == "flow_prediction" and pipeline == "DiTPipeline":
        raise UserError(
            "--prediction_type flow_prediction: DiTPipeline can't sample so; train a transformer of class "
            "ClassConditionalSD3Transformer2DModel (transformer_configs/mmdit-28x896.json)."
        )
    if prediction_type == "flow_prediction":
        check_unused(args, DDPM_FLAGS, "flow matching")
        if args.weighting_scheme is None:
            schemes = {"StableDiffusion3Pipeline": "logit_normal", "ClassConditionalPipeline": "mode"}
            args.weighting_scheme = schemes.get(pipeline, "none")
        if args.weighting_scheme in ("sigma_sqrt", "cosmap"):
            check_unused(args, ["--snr_gamma"], f"--weighting_scheme {args.weighting_scheme}")
    else:
        name = prediction_type if "prediction" in prediction_type else f"{prediction_type} prediction"
        check_unused(args, FLOW_FLAGS, f"{name}, which is no flow matching")
        args.weighting_scheme = "none"
    for scheme, flags in (("logit_normal", ["--logit_mean", "--logit_std"]), ("mode", ["--mode_scale"])):
        if args.weighting_scheme != scheme:
            check_unused(args, flags, f"--weighting_scheme {args.weighting_scheme}")
    zero_snr = args.rescale_betas_zero_snr or scheduler_config.get("rescale_betas_zero_snr")
    if zero_snr and prediction_type == "epsilon":
        raise UserError(
            "with zero terminal SNR (--rescale_betas_zero_snr, or the model's scheduler) nothing of the image is left "
            "at the last step, where predicting noise teaches nothing: add --prediction_type v_prediction."
        )
