"""The flags that the training scripts share, in groups, and the checks that need no library and no download.

Names and defaults are those of the Diffusers example scripts; what is new starts with `--lpl_`. Only the standard
library is imported, so that `--help` and a wrong flag answer at once.
"""

import argparse
import difflib
import errno
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import interruption


class UserError(ValueError):
    """A mistake of the user's: one plain sentence that names the flag or file and the remedy."""

    exit_status = 1


class NotUploaded(UserError):
    """All is done and on the disk, but not on the Hub."""

    exit_status = 3


# Functions to call before the process ends, however training ended; they return whether threads are still at work.
LAST_WORK = []


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and what kind of value a flag takes instead of its name again."""

    def _get_default_metavar_for_optional(self, action):
        kinds = {int: "N", number: "X", weight: "X|auto|variance:X", boolean: "true|false"}
        return kinds.get(action.type, "TEXT")

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one sentence instead of a page of usage.

    refused: flags that users may know from other scripts -> what to do instead.
    """

    refused = {}

    def __init__(self, description):
        settings = {"usage": "%(prog)s [flags]", "formatter_class": HelpFormatter}
        super().__init__(description=description, allow_abbrev=False, **settings)

    def parse_args(self, argv=None, namespace=None):
        """As of argparse, but a flag that is not there is told first, with the one that may be meant."""
        argv = sys.argv[1:] if argv is None else argv
        known = self._option_string_actions
        for flag in (flag for flag in flags_in(argv) if flag not in known):
            if flag in self.refused:
                self.error(f"{flag} {self.refused[flag]}.")
            similar = difflib.get_close_matches(flag, known, n=1)
            self.error(f"there is no flag {flag}" + (f"; is {similar[0]} meant?" if similar else ": see --help."))
        return super().parse_args(argv, namespace)

    def error(self, message):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def flags_in(argv):
    """The flags among a command line's words, in their order."""
    return [word.split("=")[0] for word in argv if word.startswith("--")]


def run(main, args, resumable=False):
    """Call a script's `main` and end the process.

    A `UserError` becomes one sentence and exit code 1, the rest keeps its traceback. If the script is `resumable`,
    a signal is handled as `interruption` says.
    """
    if resumable:
        interruption.install()
    at_once = "RANK" in os.environ  # libraries' threads of several processes now and then wait for each other
    try:
        error = complaint(main, args, resumable)
        if error is not None:
            print(f"\n{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 0 if error is None else error.exit_status
    except Exception:
        if not at_once:
            raise
        traceback.print_exc()
        status = 1
    finally:
        at_once |= any([work() for work in LAST_WORK])
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def complaint(main, args, resumable):
    """The UserError that ended `main`, or what can be said as one; or None."""
    remedy = "go on with --resume_from_checkpoint latest" if resumable else "start again"
    try:
        main(args)
    except UserError as error:
        return error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return UserError(f"the disk is full ({error}); make room, and {remedy}.")
    except KeyboardInterrupt:
        if_any = "if there is a checkpoint, " if resumable else ""
        return UserError(f"stopped at once; {if_any}{remedy}.")


def first_line(error):
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def as_flags(**names):
    """Inside, errors name these flags for others: the data is read by the training scripts' functions."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for theirs, ours in names.items():
            text = text.replace(f"--{theirs}", f"--{ours}")
        raise UserError(text) from error


OBJECTIVES = ("self_perceptual", "e_latent_lpips", "rgb", "clean_latent")


def weight(text):
    """A number, or as it stands how to measure one: `auto`, `auto:SHARE` or `variance:RATIO`."""
    kind, colon, value = text.partition(":")
    try:
        if kind not in ("auto", "variance"):
            return number(text)
        if colon and (0 < number(value) < 1 if kind == "auto" else number(value) > 0) or text == "auto":
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number, nor auto, auto:SHARE (below 1) or variance:RATIO")


def number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# One flag a line reads best.
# fmt: off
def add_model_arguments(parser, transformers=False):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=not transformers, help="Hub id or folder of the pipeline to "
        "finetune")
    if transformers:
        add("--transformer_config", metavar="FILE", help="train a new transformer of this config.json, such as one of "
            "transformer_configs/: in the pipeline above, whose other parts stay, or on class labels with "
            "--pretrained_vae_model_name_or_path alone")
        add("--bnb_quantization_config_path", metavar="FILE", help="with --use_lora: json file for bitsandbytes, such "
            'as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}, which quantises the transformer; needs a GPU')
    add("--revision", help="revision of the Hub model")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--pretrained_vae_model_name_or_path", help="Hub id or folder of another VAE with the same latents, for "
        "instance the paper's asymmetric one")
    add("--vae_dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="precision of the VAE and so of "
        "LPL's decoder; auto: bf16 with --mixed_precision bf16, else fp32")
    add("--cache_dir", help="where downloads, and the index of --train_shards, are kept")
    if transformers:
        add("--max_sequence_length", type=int, help="tokens of a caption for T5, Gemma or Qwen; by default as many as "
            "the pipeline takes")
        add("--guidance_scale", type=number, help="what FLUX.1-dev is told its guidance is while it learns; "
            "by default 3.5")
        add("--offload", action="store_true", help="keep text encoders and the VAE's encoder on the CPU but for the "
            "moments in which they work: best with the caches, which need them at the start only")


def add_data_arguments(parser, labels=False):
    group = parser.add_argument_group("data")
    add = group.add_argument
    sources = "image folder with metadata.jsonl, .csv or .parquet (file_name and a caption column), or with a text "
    sources += "file of the same name beside each image"
    if labels:
        sources += ", or for class-conditional models one sub-folder per class"
    add("--train_data_dir", "--instance_data_dir", help=sources)
    add("--dataset_name", help="Hub id or local folder of a datasets dataset")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--streaming", action="store_true", help="read the dataset while it is downloaded; needs --max_train_steps")
    add("--shuffle_buffer_size", type=int, default=1000, help="images of a stream that are shuffled, and held in "
        "memory, at a time")
    add("--train_shards", nargs="+", metavar="TAR", help="tar shards as webdataset writes them, such as "
        "'data/{000000..001242}.tar': images with captions in .txt or .json" + " or class labels in .cls" * labels)
    add("--image_column", help="column with the images; of shards the images' extension")
    add("--caption_column", nargs="+", metavar="COLUMN", help="column with the captions, strings or lists to choose "
        "from; by default text or the only column that can be meant. Of several, one is drawn each time")
    add("--caption_weights", nargs="+", type=number, metavar="X", help="how often each of several caption columns is "
        "drawn, by default all alike")
    add("--instance_prompt", help="caption of all images that have none of their own")
    add("--trigger_word", metavar="WORD", help="put in front of every caption that does not have it")
    add("--with_prior_preservation", action="store_true", help="also train on images of the class, which the model "
        "draws itself before it is trained, so that it does not forget what else there is (DreamBooth)")
    add("--class_data_dir", help="folder with these images; what is missing is drawn into it")
    add("--class_prompt", help="their caption, such as a photo of a dog")
    add("--num_class_images", type=int, default=100, help="how many there shall be")
    add("--prior_loss_weight", type=number, default=1.0, help="weight of their diffusion loss; they have no LPL")
    if labels:
        add("--label_column", help="column with the class labels of class-conditional models, by default label")
    add("--max_train_samples", type=int, help="use this many samples only")
    add("--max_bad_images", type=int, help="unreadable images to leave out before giving up; by default none, of "
        "shards and streams 1 in 100")
    add("--proportion_empty_prompts", type=number, help="share of captions dropped, drawn at each step; 0.1, the "
        "default for class labels, keeps classifier-free guidance working; else 0")
    add("--resolution", type=int, help="side of the training images in pixels; by default " + ("what "
        "class-conditional models are made for, else 512" if labels else "1024 for SDXL, else 512"))
    add("--aspect_ratio_buckets", nargs="?", const="auto", metavar="H,W;...", help="crop each image to the size "
        "nearest to its own shape instead of a square; without sizes: of about as many pixels as --resolution squared")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--image_interpolation_mode", default="lanczos", help="how images are resized",
        choices=["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images")
    add("--cache_latents", action="store_true", help="encode every image once, before training, and take the VAE's "
        "encoder off the device; needs --center_crop")
    add("--cache_text_embeddings", action="store_true", help="encode every caption once, before training, and take "
        "the text encoders off the device")
    add("--latent_cache_dir", metavar="FOLDER", help="keep these caches on the disk, for later runs too; by itself it "
        "stands for both flags")


def add_training_arguments(parser, output_dir, xformers=False):
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", default=output_dir, help="where checkpoints, samples and the finetuned pipeline go")
    add("--seed", type=int, help="makes everything reproducible; drawn and logged if not given")
    add("--train_batch_size", type=int, default=16, help="samples per process and forward pass")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="recompute activations, in the decoder too: less memory")
    add("--learning_rate", type=number, help="peak learning rate; by default 1e-4, with prodigy 1")
    add("--scale_lr", action="store_true", help="multiply it by processes, batch size and accumulation steps")
    add("--lr_scheduler", default="constant", help="learning-rate schedule, in optimizer steps",
        choices="linear cosine cosine_with_restarts polynomial constant constant_with_warmup".split())
    add("--lr_warmup_steps", type=int, help="optimizer steps of warm-up, 500 by default (schedules that have one)")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=number, default=1.0, help="power of the polynomial schedule")
    add("--optimizer", type=str.lower, choices=["adamw", "prodigy", "adafactor"], default="adamw",
        help="prodigy needs `pip install prodigyopt`")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state; needs `pip install "
        "bitsandbytes`")
    add("--adam_beta1", type=number, default=0.9, help="beta1 of AdamW and Prodigy")
    add("--adam_beta2", type=number, default=0.999, help="beta2 of AdamW and Prodigy")
    add("--adam_weight_decay", type=number, default=1e-2, help="weight decay of all optimizers")
    add("--adam_epsilon", type=number, default=1e-8, help="epsilon of AdamW and Prodigy")
    add("--prodigy_beta3", type=number, help="Prodigy's beta3; by default the square root of beta2")
    add("--prodigy_decouple", type=boolean, nargs="?", const=True, default=True, help="weight decay as in AdamW")
    add("--prodigy_use_bias_correction", type=boolean, nargs="?", const=True, default=True,
        help="Adam's bias correction in Prodigy")
    add("--prodigy_safeguard_warmup", type=boolean, nargs="?", const=True, default=True,
        help="keep Prodigy's estimate small during the warm-up")
    add("--max_grad_norm", type=number, default=1.0, help="gradients are clipped to this norm")
    add("--use_ema", action="store_true", help="average the weights; validate with and save the average")
    add("--ema_decay", type=number, help="decay of the average; by default 0.99975 with LPL, 0.9999 without (Fig. 10)")
    add("--offload_ema", action="store_true", help="keep the average on the CPU between steps")
    add("--foreach_ema", action="store_true", help="faster update of the average")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default what `accelerate config` says")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")
    if xformers:
        add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention instead of "
            "torch's; needs `pip install xformers` and a GPU")
    add("--nccl_timeout", type=int, metavar="SECONDS", help="how long processes wait for each other before they give "
        "up; by default torch's, 10 minutes with NCCL")
    add("--dry_run", action="store_true", help="print the resolved settings, what is trained, what a step costs in "
        "memory and arithmetic, counted without a GPU, and what LPL finds in each block of the decoder; then stop")


def add_lora_arguments(parser, text_encoders=False):
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--use_lora", action="store_true", help="train low-rank adapters instead of all weights")
    add("--rank", type=int, default=4, help="rank of the adapters")
    add("--lora_alpha", type=number, help="their scale is lora_alpha / rank; by default lora_alpha is the rank")
    add("--lora_layers", help="modules to adapt, comma-separated ends of their names; by default the attention's, as "
        "in the Diffusers scripts")
    add("--lora_dropout", type=number, default=0.0, help="dropout before the adapters")
    add("--use_dora", action="store_true", help="weight-decomposed adapters (DoRA)")
    if text_encoders:
        add("--train_text_encoder", action="store_true", help="adapters for the text encoders, too")


def add_diffusion_arguments(parser, flow=False):
    group = parser.add_argument_group("diffusion loss")
    add = group.add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction", "sample", "flow_prediction"][: 3 + flow],
        help="what the model predicts; by default what the checkpoint's scheduler says")
    if flow:
        add("--weighting_scheme", choices=["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"], help="flow "
            "matching: how noise levels are drawn (logit_normal, mode) before the family's own shift, or weighted in "
            "the loss (sigma_sqrt, cosmap); by default logit_normal for SD3, mode for class labels, else none")
        add("--logit_mean", type=number, default=0.0, help="mean of logit_normal; positive means less noise")
        add("--logit_std", type=number, default=1.0, help="standard deviation of logit_normal")
        add("--mode_scale", type=number, default=1.29, help="how strongly mode favours the middle")
    add("--stratified_timesteps", action="store_true", help="spread the noise levels of each optimizer step evenly "
        "over all samples and processes: less variance, and all processes decode about as many samples for LPL")
    add("--rescale_betas_zero_snr", action="store_true", help="zero terminal SNR (Lin et al.), not with epsilon")
    add("--snr_gamma", type=number, help="min-SNR loss weights; 5.0 in the paper of Hang et al.")
    add("--noise_offset", type=number, default=0.0, help="scale of the noise that is constant over positions")
    add("--timestep_bias_strategy", choices=["none", "earlier", "later", "range"], default="none",
        help="timesteps to draw more often")
    add("--timestep_bias_multiplier", type=number, default=1.0, help="how many times as often")
    add("--timestep_bias_portion", type=number, default=0.25, help="their share of all timesteps (earlier, later)")
    add("--timestep_bias_begin", type=int, default=0, help="the first of them (range)")
    add("--timestep_bias_end", type=int, default=1000, help="the one after the last of them (range)")


def add_lpl_arguments(parser):
    group = parser.add_argument_group("latent perceptual loss")
    add = group.add_argument
    add("--lpl_weight", type=weight, default="auto", help="weight of LPL; auto measures it once, so that LPL is "
        "--lpl_target_share of the total, variance:X so that its variance is X times that of the diffusion loss; 0 "
        "switches LPL off")
    add("--lpl_target_share", type=number, default=0.2, help="share of the total loss that auto aims at (Fig. 9)")
    add("--lpl_sigma_threshold", type=number, default=3.0, help="LPL applies where sigma/alpha is at most this at "
        "--lpl_base_resolution, in proportion at others; SNR >= 1/threshold^2: 0.577 is SNR 3, 1 is SNR 1, 3 is SNR "
        "1/9, 6 is SNR 1/36")
    add("--lpl_base_resolution", type=int, default=256, help="resolution that the threshold is given for")
    add("--lpl_num_blocks", type=int, default=4, help="decoder up blocks compared after the mid block; 3 is cheaper")
    add("--lpl_normalization", choices=["shared", "target", "separate", "channel_l2"], default="shared",
        help="whose statistics standardise the features")
    add("--lpl_detach_stats", action=argparse.BooleanOptionalAction, help="no gradient through those statistics; the "
        "default, but for separate, which would only lower the contrast without that gradient")
    add("--lpl_weighting", choices=["inverse", "exponential", "uniform", "balanced"], default="inverse",
        help="how the blocks are weighted by resolution; balanced measures the weights")
    add("--lpl_reduction", choices=["mean", "sum"], default="mean", help="over the positions of a feature map")
    add("--lpl_outlier_mask", action=argparse.BooleanOptionalAction, default=True, help="Algorithm 1")
    add("--lpl_outlier_source", choices=["prediction", "target", "union"], default="prediction",
        help="whose features are searched for outliers")
    add("--lpl_outlier_positions", type=int, metavar="N", help="take the percentiles that tell outliers from at most "
        "N positions of a feature map, such as 16384: faster; by default from all")
    add("--lpl_start_step", type=int, default=0, help="optimizer step from which on LPL applies")
    add("--lpl_chunk_size", type=int, default=1, help="samples decoded at a time, or run through the network of "
        "another objective: memory against speed; 0: all, and LPL keeps the whole graph")
    add("--lpl_max_samples", type=number, help="decode at most this many samples per process and forward pass; below "
        "1: each with this probability; unbiased")
    add("--lpl_gradient_checkpointing", action=argparse.BooleanOptionalAction, help="recompute the decoder's "
        "activations; by default above 1024 pixels")
    add("--lpl_compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the decoder's blocks; "
        "inductor if no backend is named")
    add("--lpl_channels_last", action="store_true", help="the decoder's memory format, which convolutions of some "
        "GPUs prefer")


def add_objective_arguments(parser, transformers=False):
    group = parser.add_argument_group("other objectives", "What LPL is compared with. A weight is a number; or auto, "
        "measured once so that the term is 0.2 of the total, or auto:SHARE; or variance:X, measured once so that its "
        "variance is X times that of the diffusion loss, 0.1 in Table 5.")
    add = group.add_argument
    add("--l2_weight", type=weight, metavar="X", default=1.0, help="weight of the diffusion loss")
    add("--self_perceptual_weight", type=weight, default=0.0, help="weight of the error in hidden features of the "
        "model itself, as it is at the start (Lin & Yang 2024; there it is the only term: --l2_weight 0 --lpl_weight "
        "0)")
    if transformers:
        add("--sp_layer", type=int, metavar="N", help="compare what the N-th block gives, counted from 1; by default "
            "2 / 7 of the depth, the best of Table 5")
        add("--sp_layers", type=int, nargs="+", metavar="N", help="several blocks, whose errors are added")
    else:
        add("--sp_layer", metavar="LAYER", help="compare what this block gives: mid (by default), down1, up1, ...")
        add("--sp_layers", nargs="+", metavar="LAYER", help="several blocks, whose errors are added; encoder and "
            "decoder stand for all of theirs")
    add("--sp_timestep", choices=["uniform", "near", "normal"], default="uniform", help="the noise level of that "
        "comparison: any; 40 of 1,000 timesteps from that of the sample; or around it with a deviation of 100")
    add("--sp_distance", choices=["l2", "l1"], default="l2", help="of these features")
    add("--sp_formulation", choices=["joint", "split"], default="joint", help="predicted latents and noise together, "
        "or each beside the true other one (Eq. 17 of Lin & Yang)")
    add("--e_latent_lpips_weight", type=weight, default=0.0, help="weight of LPIPS on latents (Kang et al. 2024)")
    add("--e_latent_lpips_model", default="Mingguksky/elatentlpips", metavar="MODEL", help="its network: those "
        "that are published (for SD 1.x, 2.x, SDXL, SD3, FLUX.1; not for commercial use), a file of that kind, or the "
        "Hub id or folder of one that train_latent_classifier.py made")
    add("--e_latent_lpips_augmentations", nargs="+", choices=["blit", "geometric", "color", "cutout"], help="random "
        "transformations of both latents, an ensemble over the steps; by default none, as in Table 5")
    add("--rgb_weight", type=weight, default=0.0, help="weight of the squared error of the decoded images")
    add("--clean_latent_weight", type=weight, default=0.0, help="weight of the squared error of the clean latents "
        "that the prediction implies: what LPL is without a decoder")
    add("--gate_objectives", nargs="+", choices=OBJECTIVES, help="of these, those that apply only where LPL does "
        "(Table 5 has both)")
    add("--late_reweight", action="store_true", help="do not add LPL, but weigh the diffusion loss where LPL applies "
        "as much as LPL would (Eq. 15), the control of Table 6")


def add_output_arguments(parser, guidance_scale=None):
    group = parser.add_argument_group("checkpoints, validation, logging")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints")
    add("--checkpoint_minutes", type=number, help="also a checkpoint when the last one is older than this")
    add("--checkpoints_total_limit", type=int, help="older checkpoints are removed after a new one is complete")
    add("--resume_from_checkpoint", help="folder of a checkpoint, or latest; hub: the newest of --hub_model_id; "
        "owner/name or owner/name/checkpoint-N: of another repository on the Hub")
    add("--validation_prompts", nargs="+", help="prompts (class names or numbers) to draw during training")
    add("--validation_prompt", help="the same for one prompt")
    add("--validation_steps", type=int, help="optimizer steps between drawings, 500 by default")
    add("--validation_epochs", type=int, help="passes over the data between drawings, instead")
    add("--num_validation_images", type=int, default=4, help="images per prompt")
    add("--validation_guidance_scale", type=number, default=guidance_scale, help="classifier-free guidance of the "
        "drawings; by default " + ("7.5" if guidance_scale else "the pipeline's own"))
    add("--validation_inference_steps", type=int, default=25, help="sampler steps of the drawings")
    add("--eval_steps", type=int, help="optimizer steps between evaluations on images held out of training: the "
        "losses at fixed noise levels")
    add("--eval_share", type=number, default=0.1, help="share of the training images that is held out")
    add("--eval_data_dir", metavar="FOLDER", help="a folder of other images for that, like --train_data_dir")
    add("--eval_samples", type=int, default=0, help="images to draw at each evaluation, with the --validation_ flags' "
        "guidance and steps; their Frechet and kernel distances to those held out are logged, as of a small sample")
    add("--eval_feature_extractor", metavar="MODEL", default="dinov2", help="Hub id or folder of the vision model "
        "whose features are compared, dinov2 or inception")
    add("--skip_final_inference", action="store_true", help="do not load the result and draw the prompts at the end")
    add("--logging_dir", default="logs", help="tracker files, inside --output_dir")
    add("--logging_steps", type=int, default=10, help="optimizer steps between log lines")
    add("--report_to", choices=["tensorboard", "wandb", "trackio", "all", "none"], default="tensorboard",
        help="tracker; all: those that are installed")
    add("--tracker_project_name", default="lpl-finetune", help="name of the project in the tracker")
    group = parser.add_argument_group("result")
    add = group.add_argument
    add("--save_dtype", nargs="+", choices=["fp32", "fp16", "bf16"], default=["fp32"], help="precision of the saved "
        "weights; of a pipeline also several, fp16 and bf16 as variants of these names")
    add("--max_shard_size", default="10GB", help="largest weight file of a pipeline, such as 5GB")
    add("--save_only_trained", action="store_true", help="save what was trained, not the whole pipeline")
    add("--save_non_ema", action="store_true", help="with --use_ema: also the weights without the average, as variant "
        "non_ema")
    add("--output_kohya_format", action="store_true", help="with --use_lora: also a file for ComfyUI, A1111, Forge "
        "and kohya's scripts (Stable Diffusion, SDXL, FLUX.1)")
    add("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub, with a model card")
    add("--hub_strategy", choices=["end", "checkpoint", "all_checkpoints"], default="end", help="what is uploaded: "
        "the result; also the newest checkpoint, or every checkpoint, while training goes on")
    add("--hub_model_id", help="owner/name or name of the Hub repository; by default the output folder's name")
    add("--hub_token", help="write token; by default that of `hf auth login`")
    add("--hub_private_repo", action="store_true", help="create the repository as a private one")
# fmt: on


# Flags of the Diffusers scripts that a script here may not have, and what to do instead.
FLOW = "belongs to flow-matching transformers: here, timesteps are weighted with --snr_gamma and drawn with "
FLOW += "--timestep_bias_strategy"
ENCODER = "is not there: leave it out; --cache_text_embeddings takes the text encoders off the device before training"
PARTS = "is not needed: leave it out, all tokenizers and text encoders are those of --pretrained_model_name_or_path"
RANK = "is not needed: leave it out and start with `accelerate launch`, which numbers the processes"
REFUSED = {
    "--sample_batch_size": "is not needed: every process draws the images of --class_data_dir one at a time",
    "--prior_generation_precision": "is not there: the images of --class_data_dir are drawn in --mixed_precision",
    "--repeats": "is not needed: images come again until --max_train_steps or --num_train_epochs is reached",
    "--text_encoder_lr": "is not there: --learning_rate is for all that is trained",
    "--lora_blocks": "is not there: --lora_layers takes names with their blocks, such as "
    "transformer_blocks.12.attn.to_k",
    "--use_rslora": "is not there: --lora_alpha times the square root of --rank does the same",
    "--final_validation_prompt": "is not there: what --validation_prompt says is drawn at the end, too",
    "--complex_human_instruction": "is not there: captions get the instruction that SanaPipeline has by default: "
    "leave it out",
    "--enable_vae_tiling": "is not there: images are decoded one at a time; if memory is short even so, use "
    "--vae_dtype bf16 or a smaller --resolution",
    "--do_fp8_training": "is not there: save memory with --mixed_precision bf16, --gradient_checkpointing and "
    "--use_8bit_adam",
    "--system_prompt": "is not there: captions get the one that Lumina2Pipeline has by default: leave it out",
    "--text_encoder_out_layers": "is not there: captions are read from the layers that the pipeline draws with by "
    "default: leave it out",
    "--remote_text_encoder": ENCODER,
    "--fsdp_text_encoder": ENCODER,
    "--pretrained_tokenizer_4_name_or_path": PARTS,
    "--pretrained_text_encoder_4_name_or_path": PARTS,
    "--caption_dropout": "is --proportion_empty_prompts here",
    "--micro_conditions": "is not needed: leave it out, the model's config says whether it is told of the size",
    "--max_token_length": "is --max_sequence_length here, for transformers; for UNets leave it out",
    "--input_perturbation": "trains on other noise than the target's, so that LPL can't tell the clean latent: leave "
    "it out",
    "--dream_training": "changes the target by a second forward pass: leave it out; LPL, on by default, is what this "
    "script offers for sharper images",
    "--dream_detail_preservation": "belongs to --dream_training: leave both out; LPL is on by default",
    "--non_ema_revision": "is not needed: name the weights to start from with --revision or --variant non_ema",
    "--local_rank": RANK,
    "--local-rank": RANK,
    "--enable_npu_flash_attention": "is for NPUs, on which this script was never run: leave it out, torch chooses the "
    "attention",
    "--debug_loss": "is not needed: the losses are in train_log.jsonl and the tracker, at every step with "
    "--logging_steps 1",
    "--use_aspect_ratio_buckets": "is --aspect_ratio_buckets here",
    "--weighting_scheme": FLOW,
    "--logit_mean": FLOW,
    "--logit_std": FLOW,
    "--mode_scale": FLOW,
    "--guidance_scale": "belongs to guidance-distilled transformers: for the drawings there is "
    "--validation_guidance_scale",
    "--max_sequence_length": "belongs to transformers and their text encoders: leave it out",
    "--precondition_outputs": "is not there: leave it out, the loss is on what the model predicts",
    "--train_text_encoder": "is not there for transformers, whose text encoders stay as they are: leave it out",
    "--enable_xformers_memory_efficient_attention": "is for UNets: leave it out, torch's own attention is as lean",
    "--label_column": "is for class-conditional transformers: train_lpl_dit.py",
    "--transformer_config": "is for transformers: train_lpl_dit.py",
    "--offload": "is not there: take the encoders off the device with --cache_latents and --cache_text_embeddings",
    "--bnb_quantization_config_path": "is for transformers: save memory with --mixed_precision bf16, "
    "--gradient_checkpointing and --use_8bit_adam",
    "--upcast_before_saving": "is not needed, as weights are saved in float32 unless --save_dtype says otherwise: "
    "leave it out",
    "--adam_weight_decay_text_encoder": "is not there: --adam_weight_decay is for all that is trained, the text "
    "encoders' adapters too",
}


# What is so in a script that has no flag for it
ABSENT = {
    "transformer_config": None,
    "bnb_quantization_config_path": None,
    "max_sequence_length": None,
    "offload": False,
    "label_column": None,
    "train_text_encoder": False,
    "enable_xformers_memory_efficient_attention": False,
    "weighting_scheme": "none",
    "num_classes": None,
    "buckets": None,
}


def parse_args(parser, argv=None):
    """Parse and check; a wrong flag ends the program with one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser.refused = REFUSED
    args = argparse.Namespace(**{**ABSENT, **vars(parser.parse_args(argv))})
    flags = (action.dest for action in parser._actions if hasattr(args, action.dest) and action.dest != "hub_token")
    args.changed = {name: value for name in flags if (value := getattr(args, name)) != parser.get_default(name)}
    args.given_flags = sorted(set(flags_in(argv)))
    try:
        check_ranges(args)
        check_combinations(args)
        check_packages(args)
        set_defaults(args)
        check_folders(args)
        args.idle_lpl_flags = idle_lpl_flags(args)
    except UserError as error:
        parser.error(str(error))
    return args


AT_LEAST_ONE = (
    "resolution train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps max_train_samples "
    "lpl_base_resolution checkpointing_steps checkpoints_total_limit validation_steps validation_epochs "
    "num_validation_images validation_inference_steps logging_steps lr_num_cycles rank max_sequence_length "
    "num_class_images shuffle_buffer_size nccl_timeout eval_steps lpl_outlier_positions"
).split()
NOT_NEGATIVE = (
    "learning_rate lr_warmup_steps lr_power adam_weight_decay adam_epsilon noise_offset lpl_num_blocks lpl_start_step "
    "lpl_chunk_size max_bad_images dataloader_num_workers seed timestep_bias_begin"
).split()
POSITIVE = (
    "lpl_sigma_threshold snr_gamma lpl_max_samples max_grad_norm lora_alpha timestep_bias_multiplier logit_std "
    "prior_loss_weight checkpoint_minutes"
).split()
BELOW_ONE = "adam_beta1 adam_beta2 prodigy_beta3 ema_decay lora_dropout".split()
SHARES = "proportion_empty_prompts timestep_bias_portion".split()


def check_ranges(args):
    """Checks of single flags. Raises UserError."""
    for names, fits, what in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        (POSITIVE, lambda value: value > 0, "greater than 0"),
        (BELOW_ONE, lambda value: 0 <= value < 1, "from 0 to below 1"),
        (SHARES, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                raise UserError(f"--{name} {value} must be {what}.")
    if not -1 <= getattr(args, "mode_scale", 0) <= 1.75:
        raise UserError(f"--mode_scale {args.mode_scale} must be from -1 to 1.75: others leave the timesteps' range.")
    if not 0 < args.lpl_target_share < 1:
        raise UserError(f"--lpl_target_share {args.lpl_target_share} must be between 0 and 1.")
    if (args.lpl_max_samples or 0) > 1 and args.lpl_max_samples % 1:
        raise UserError(f"--lpl_max_samples {args.lpl_max_samples} must be a whole number, or below 1.")
    if args.timestep_bias_begin >= args.timestep_bias_end:
        raise UserError(
            f"--timestep_bias_begin {args.timestep_bias_begin} must be below --timestep_bias_end "
            f"{args.timestep_bias_end}."
        )


SP_FLAGS = "--sp_layer --sp_layers --sp_timestep --sp_distance --sp_formulation".split()
LPIPS_FLAGS = "--e_latent_lpips_model --e_latent_lpips_augmentations".split()


def idle_lpl_flags(args):
    """The --lpl_ flags that are given without effect, as LPL is off."""
    if args.lpl_weight:
        return []
    used = {"--lpl_weight"}
    if any(getattr(args, f"{name}_weight") for name in OBJECTIVES):
        used |= {"--lpl_chunk_size"}
    if args.rgb_weight:
        used |= {"--lpl_gradient_checkpointing", "--no-lpl_gradient_checkpointing"}
    if args.gate_objectives:
        used |= {"--lpl_sigma_threshold", "--lpl_base_resolution"}
    return [flag for flag in args.given_flags if flag.startswith(("--lpl_", "--no-lpl_")) and flag not in used]


LORA_FLAGS = (
    "--rank --lora_alpha --lora_layers --lora_dropout --use_dora --train_text_encoder --output_kohya_format".split()
)
ADAM_FLAGS = "--adam_beta1 --adam_beta2 --adam_epsilon".split()
PRODIGY_FLAGS = "--prodigy_beta3 --prodigy_decouple --prodigy_use_bias_correction --prodigy_safeguard_warmup".split()
EMA_FLAGS = "--ema_decay --offload_ema --foreach_ema --save_non_ema".split()
HUB_FLAGS = "--hub_model_id --hub_token --hub_private_repo --hub_strategy".split()
PROMPT_FLAGS = "--validation_steps --validation_epochs --num_validation_images --skip_final_inference".split()
DRAWING_FLAGS = "--validation_guidance_scale --validation_inference_steps".split()
EVAL_FLAGS = "--eval_data_dir --eval_share --eval_samples --eval_feature_extractor".split()
BIAS_FLAGS = "--timestep_bias_multiplier --timestep_bias_portion --timestep_bias_begin --timestep_bias_end".split()


def check_combinations(args):
    """No flag is silently without effect, and none contradicts another. Raises UserError."""
    draws = args.validation_prompts or args.validation_prompt is not None or args.eval_samples
    for flags, needed, there in (
        (LORA_FLAGS, "--use_lora", args.use_lora),
        (EMA_FLAGS, "--use_ema", args.use_ema),
        (HUB_FLAGS, "--push_to_hub", args.push_to_hub),
        (PRODIGY_FLAGS, "--optimizer prodigy", args.optimizer == "prodigy"),
        (["--lr_num_cycles"], "--lr_scheduler cosine_with_restarts", args.lr_scheduler == "cosine_with_restarts"),
        (["--lr_power"], "--lr_scheduler polynomial", args.lr_scheduler == "polynomial"),
        (["--dataset_config_name", "--streaming"], "--dataset_name", args.dataset_name),
        (["--shuffle_buffer_size"], "--streaming", args.streaming),
        (["--caption_weights"], "--caption_column", args.caption_column),
        (PROMPT_FLAGS, "--validation_prompts", args.validation_prompts or args.validation_prompt is not None),
        (DRAWING_FLAGS, "--validation_prompts or --eval_samples", draws),
        (EVAL_FLAGS, "--eval_steps", args.eval_steps),
        (["--eval_feature_extractor"], "--eval_samples", args.eval_samples),
        (SP_FLAGS, "--self_perceptual_weight", args.self_perceptual_weight),
        (LPIPS_FLAGS, "--e_latent_lpips_weight", args.e_latent_lpips_weight),
        (BIAS_FLAGS[:1], "--timestep_bias_strategy", args.timestep_bias_strategy != "none"),
        (BIAS_FLAGS[1:2], "--timestep_bias_strategy earlier or later", args.timestep_bias_strategy[-2:] == "er"),
        (BIAS_FLAGS[2:], "--timestep_bias_strategy range", args.timestep_bias_strategy == "range"),
    ):
        unused = [flag for flag in flags if flag in args.given_flags]
        if unused and not there:
            raise UserError(f"{unused[0]} has no effect without {needed}: add it, or leave {unused[0]} out.")
    if args.timestep_bias_strategy != "none" and args.timestep_bias_multiplier == 1:
        raise UserError(
            "--timestep_bias_strategy has no effect without --timestep_bias_multiplier: 2 draws these timesteps "
            "twice as often."
        )
    if args.optimizer == "adafactor":
        check_unused(args, ADAM_FLAGS, "--optimizer adafactor")
    check_objectives(args)
    if args.lpl_weight not in ("auto", 0):
        check_unused(args, ["--lpl_target_share"], f"--lpl_weight {args.lpl_weight}")
    if args.lpl_weight != 0 and not args.lpl_outlier_mask:
        check_unused(args, ["--lpl_outlier_source", "--lpl_outlier_positions"], "--no-lpl_outlier_mask")
    if args.lpl_weight != 0 and args.lpl_normalization in ("target", "channel_l2"):
        check_unused(args, ["--no-lpl_detach_stats"], f"--lpl_normalization {args.lpl_normalization}")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        raise UserError("--lr_warmup_steps needs a schedule with a warm-up: --lr_scheduler constant_with_warmup?")
    if args.lpl_weight != 0 and args.max_train_steps and args.lpl_start_step >= args.max_train_steps:
        raise UserError(
            f"--lpl_start_step {args.lpl_start_step} is never reached in {args.max_train_steps} steps: start earlier, "
            "or switch LPL off with --lpl_weight 0."
        )
    if args.bnb_quantization_config_path and not args.use_lora:
        raise UserError("--bnb_quantization_config_path: quantised weights can't be trained; add --use_lora.")
    if args.transformer_config and args.use_lora:
        raise UserError("--transformer_config trains new weights, --use_lora adapters to trained ones: leave one out.")
    if args.use_8bit_adam and args.optimizer != "adamw":
        raise UserError(f"--use_8bit_adam and --optimizer {args.optimizer} exclude each other: give one of them.")
    if args.cache_text_embeddings and args.train_text_encoder:
        raise UserError(
            "--cache_text_embeddings keeps what the text encoders give before training, while --train_text_encoder "
            "changes them: leave one of them out."
        )
    check_result(args)
    if args.hub_token and args.report_to in ("wandb", "all"):
        raise UserError(
            "--hub_token would end up in wandb, which records the command line: log in with `hf auth login` instead, "
            "and leave --hub_token out."
        )
    check_data(args)
    check_evaluation(args)
    check_prompts(args)
    for first, second in (
        ("train_data_dir", "dataset_name"),
        ("train_data_dir", "train_shards"),
        ("dataset_name", "train_shards"),
        ("validation_steps", "validation_epochs"),
        ("validation_prompts", "validation_prompt"),
    ):
        if getattr(args, first) and getattr(args, second):
            raise UserError(f"--{first} and --{second} exclude each other: give one of them.")


def check_objectives(args):
    """The terms of the loss and their weights. Sets `sp_layers` to those of either flag, as words."""
    weights = {name: getattr(args, f"{name}_weight") for name in ("l2", "lpl", *OBJECTIVES)}
    if isinstance(args.l2_weight, str):
        raise UserError(f"--l2_weight {args.l2_weight}: give a number, as the other terms are measured by this one.")
    for name, value in weights.items():
        if not isinstance(value, str) and value < 0:
            raise UserError(f"--{name}_weight {value} must not be negative; 0 leaves this term out.")
    if not any(weights.values()):
        raise UserError("all weights are 0, so there is nothing to learn: give one of --l2_weight, --lpl_weight.")
    if str(args.lpl_weight).startswith("auto:"):
        share = args.lpl_weight.removeprefix("auto:")
        raise UserError(f"--lpl_weight {args.lpl_weight}: write --lpl_weight auto --lpl_target_share {share}.")
    measured = {name: value for name, value in weights.items() if isinstance(value, str)}
    for name, value in measured.items():
        if value.startswith("variance") and not args.l2_weight:
            raise UserError(f"--{name}_weight {value} is in units of the diffusion loss: raise --l2_weight above 0.")
    by_default = {name: args.lpl_target_share if name == "lpl" else 0.2 for name in measured}
    if args.late_reweight:  # LPL is no term then
        weights["lpl"] = 0
        measured.pop("lpl", None)
    shares = [float(value[5:] or by_default[name]) for name, value in measured.items() if value.startswith("auto")]
    given = [value for name, value in weights.items() if name not in measured]
    if shares and (sum(shares) >= 1 or not any(given)):
        names = ", ".join(f"--{name}_weight {value}" for name, value in measured.items())
        raise UserError(f"{names}: nothing is left that they could be a share of; give one of the weights a number.")
    for name in args.gate_objectives or ():
        if not weights[name]:
            raise UserError(f"--gate_objectives {name} needs --{name}_weight: add it, or leave it out.")
    if args.late_reweight and not args.lpl_weight:
        raise UserError("--late_reweight weighs as LPL would: leave out --lpl_weight 0.")
    if args.late_reweight and args.l2_weight != 1:
        raise UserError(f"--late_reweight weighs the diffusion loss itself: leave out --l2_weight {args.l2_weight}.")
    if not args.l2_weight:
        check_unused(args, ["--snr_gamma", "--with_prior_preservation"], "--l2_weight 0")
        if args.weighting_scheme in ("sigma_sqrt", "cosmap"):  # the others say how noise levels are drawn
            check_unused(args, ["--weighting_scheme"], "--l2_weight 0")
    if args.sp_layer is not None and args.sp_layers:
        raise UserError("--sp_layer and --sp_layers exclude each other: give one of them.")
    if args.sp_layer is not None:
        args.sp_layers = [args.sp_layer]
    args.sp_layers = args.sp_layers and [str(layer) for layer in args.sp_layers]
    if args.self_perceptual_weight and args.transformer_config:
        raise UserError(
            "--self_perceptual_weight compares inside the model as it is at the start, which knows nothing yet with "
            "--transformer_config: train it without at first."
        )


def check_data(args):
    """The flags that say where images and captions come from. Sets those of the caches that follow from others."""
    if not (args.train_data_dir or args.dataset_name or args.train_shards):
        raise UserError("no data: give --train_data_dir FOLDER, --dataset_name ID, or --train_shards TARS.")
    if args.caption_weights is not None:
        count = len(args.caption_column)
        if count == 1:
            check_unused(args, ["--caption_weights"], "a single caption column")
        if len(args.caption_weights) != count or min(args.caption_weights) <= 0:
            raise UserError(f"--caption_weights needs {count} numbers above 0, one for each of --caption_column.")
    if args.trigger_word is not None and not args.trigger_word.strip():
        raise UserError("--trigger_word is empty: name the word, or leave the flag out.")
    if args.streaming:
        whole = "--cache_latents --cache_text_embeddings --latent_cache_dir --aspect_ratio_buckets "
        whole += "--max_train_samples --with_prior_preservation --num_train_epochs --validation_epochs"
        check_unused(args, whole.split(), "--streaming")
        if args.max_train_steps is None:
            raise UserError("--streaming: nobody knows how long an epoch is: say when to end with --max_train_steps.")
    if args.aspect_ratio_buckets:  # the model draws its images of the class as squares
        check_unused(args, ["--with_prior_preservation"], "--aspect_ratio_buckets")
    if args.latent_cache_dir and not (args.cache_latents or args.cache_text_embeddings):
        args.cache_latents, args.cache_text_embeddings = True, not args.train_text_encoder
    if args.cache_latents and not args.center_crop:
        flag = "--cache_latents" if "--cache_latents" in args.given_flags else "--latent_cache_dir"
        raise UserError(f"{flag} keeps one crop of each image, so random crops are impossible: add --center_crop.")
    if args.latent_cache_dir is not None and not args.latent_cache_dir.strip():
        raise UserError("--latent_cache_dir is empty: name a folder, or leave the flag out.")
    if args.latent_cache_dir and Path(args.latent_cache_dir).is_file():
        raise UserError(f"--latent_cache_dir {args.latent_cache_dir} is a file: name a folder.")


def check_evaluation(args):
    """The --eval_ flags."""
    if args.eval_data_dir is not None:
        check_unused(args, ["--eval_share"], "--eval_data_dir")
        if not (args.eval_data_dir.strip() and Path(args.eval_data_dir).is_dir()):
            raise UserError(f"--eval_data_dir {args.eval_data_dir} is no folder: give one with images.")
    elif args.eval_steps and args.streaming:
        raise UserError("--eval_steps: of a stream no images can be held out: give some in --eval_data_dir.")
    if args.eval_samples == 1 or args.eval_samples < 0:
        raise UserError(f"--eval_samples {args.eval_samples} must be at least 2, or 0 for none.")
    if not 0 < args.eval_share < 1:
        raise UserError(f"--eval_share {args.eval_share} must be between 0 and 1.")
    if args.eval_samples:
        from features import check_extractor

        with as_flags(feature_extractor="eval_feature_extractor"):
            check_extractor(args.eval_feature_extractor)
    if not args.eval_steps or args.eval_data_dir is not None:
        args.eval_share = 0.0  # all are trained on


def check_result(args):
    """How the result is saved and uploaded."""
    if args.use_lora:
        check_unused(args, ["--save_only_trained", "--max_shard_size"], "--use_lora")
        if args.output_kohya_format and args.use_dora:
            raise UserError(
                "--output_kohya_format: no other tool reads the magnitudes of --use_dora as they are meant: leave one "
                "of them out."
            )
        if len(args.save_dtype) > 1:
            raise UserError("--save_dtype: LoRA files have one precision, name one.")
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", args.max_shard_size, re.IGNORECASE):
        raise UserError(f"--max_shard_size {args.max_shard_size} is no size: give one such as 5GB or 500MB.")
    if args.hub_token is not None:
        args.hub_token = args.hub_token.strip()
        if not re.fullmatch(r"[!-~]+", args.hub_token):
            raise UserError("--hub_token is empty or has characters that no token has: copy it anew.")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "--hub_token: other users of this machine can see it, and `accelerate launch` prints it should the "
                "run fail; `hf auth login` or the variable HF_TOKEN keep it to yourself.",
                file=sys.stderr,
            )
    if args.resume_from_checkpoint == "hub" and not args.push_to_hub:
        raise UserError(
            "--resume_from_checkpoint hub goes on from the repository of --push_to_hub: add it, or name a repository "
            "to read from, as owner/name."
        )


def check_prompts(args):
    """DreamBooth's flags: the prompt of all images, and those of prior preservation."""
    if args.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if not (getattr(args, name) or "").strip():
                raise UserError(f"--with_prior_preservation needs --{name}: add it.")
    else:
        for flag in ("--class_data_dir", "--class_prompt", "--num_class_images", "--prior_loss_weight"):
            if flag in args.given_flags:
                raise UserError(f"{flag} has no effect without --with_prior_preservation: add it, or leave it out.")
    if args.instance_prompt is not None and not args.instance_prompt.strip():
        raise UserError("--instance_prompt is empty: give the caption of the images that have none.")


def check_unused(args, flags, because):
    for flag in flags:
        if flag in args.given_flags:
            remedy = "leave one of them out" if "--" in because else "leave it out"
            raise UserError(f"{flag} has no effect with {because}: {remedy}.")


def check_packages(args):
    """What is asked for must be installed. Raises UserError."""
    xformers = "--enable_xformers_memory_efficient_attention"
    for needed, flag, package in (
        (args.report_to not in ("all", "none"), f"--report_to {args.report_to}", args.report_to),
        (args.use_8bit_adam, "--use_8bit_adam", "bitsandbytes"),
        (args.optimizer == "prodigy", "--optimizer prodigy", "prodigyopt"),
        (args.bnb_quantization_config_path, "--bnb_quantization_config_path", "bitsandbytes"),
        (args.enable_xformers_memory_efficient_attention, xformers, "xformers"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            otherwise = "give --report_to none" if package == args.report_to else "leave it out"
            raise UserError(f"{flag} needs a package that is not installed: `pip install {package}`, or {otherwise}.")


def set_defaults(args):
    """Defaults that depend on other flags."""
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = 500
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 1e-4
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.lpl_detach_stats is None:
        args.lpl_detach_stats = args.lpl_normalization != "separate"
    if args.validation_prompt is not None:
        args.validation_prompts = [args.validation_prompt]
    args.save_dtype = sorted(set(args.save_dtype), key=["fp32", "bf16", "fp16"].index)


def check_folders(args):
    """Checks of what is on the disk: model, output, checkpoint to resume, images (kept for `make_stream`)."""
    from latent_lpips_files import check_latent_lpips
    from model_checks import (
        CLASS_CONDITIONAL,
        check_model_folders,
        label_of,
        read_quantization_config,
        read_transformer_config,
    )

    args.samples = None
    if args.e_latent_lpips_weight:
        check_latent_lpips(args.e_latent_lpips_model)
    if args.transformer_config is not None:
        args.transformer_config = read_transformer_config(Path(args.transformer_config))
    if args.bnb_quantization_config_path is not None:
        args.bnb_quantization_config_path = read_quantization_config(Path(args.bnb_quantization_config_path))
    known = check_model_folders(args)
    check_output_dir(args)
    if (args.train_data_dir or args.train_shards) and (known or not set(args.pipelines) & set(CLASS_CONDITIONAL)):
        from data_utils import read_data

        args.samples = read_data(args)
        for prompt in (args.validation_prompts or ()) if args.num_classes is not None else ():
            label_of(args, prompt)  # is it a class?


def check_output_dir(args):
    """Nothing that the user has is overwritten; sets `args.resume_from_checkpoint` to a folder or None."""
    import hub

    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file: name a folder.")
    said = f"--resume_from_checkpoint {wanted}"
    if wanted == "hub":  # the same command on any machine, at any time
        if not args.dry_run:
            hub.fetch_newest(args)
        wanted = "latest"
    checkpoints = complete_checkpoints(output)
    damaged = [(folder, reason) for folder in all_checkpoints(output)[::-1] if (reason := damage(folder))]
    results = "model_index.json pytorch_lora_weights.safetensors adapter_model.safetensors".split()
    results += "*/diffusion_pytorch_model*.safetensors */model*.safetensors */scheduler_config.json".split()
    finished = any(path for name in results for path in output.glob(name))
    if wanted is None and (checkpoints or damaged):
        raise UserError(
            f"--output_dir {output} holds another run: choose another folder, or continue it with "
            "--resume_from_checkpoint latest."
        )
    if wanted in (None, "latest") and finished and not checkpoints:
        raise UserError(f"--output_dir {output} holds a saved model: choose another folder.")
    if wanted == "latest":
        for folder, reason in damaged:
            print(f"{said}: {folder} is damaged ({reason}) and passed over.", file=sys.stderr)
        if damaged and not checkpoints:
            raise UserError(f"{said}: no checkpoint in {output} is complete; start anew with another --output_dir.")
        if not checkpoints:
            print(f"{said}: no checkpoint in {output} yet, starting at step 0.")
        args.resume_from_checkpoint = str(checkpoints[-1]) if checkpoints else None
    elif wanted:
        folder = next((path for path in (Path(wanted), output / wanted) if path.is_dir()), None)
        if folder is None and hub.is_checkpoint_on_the_hub(wanted):
            if args.dry_run:
                raise UserError(f"--dry_run downloads no checkpoint: leave out {said}.")
            folder = hub.fetch_checkpoint(args, wanted, occupied=finished)
            checkpoints, damaged = complete_checkpoints(output), []
        if folder is None:
            raise UserError(f"{said}: there is no such folder; `latest` finds the newest.")
        if reason := damage(folder):
            raise UserError(f"--resume_from_checkpoint {folder} is damaged ({reason}): choose another checkpoint.")
        elsewhere = folder.resolve().parent != output.resolve()
        if elsewhere and (checkpoints or damaged or finished):
            raise UserError(
                f"--output_dir {output} holds another run than --resume_from_checkpoint {folder}: choose another "
                "--output_dir."
            )
        args.resume_from_checkpoint = str(folder)


STATE_FILE = "training_state.json"  # of a checkpoint
LOG_FILE = "train_log.jsonl"


def complete_checkpoints(output):
    """The folders `checkpoint-{step}` that are complete, oldest first."""
    return [folder for folder in all_checkpoints(output) if damage(folder) is None]


def all_checkpoints(output):
    paths = (path for path in Path(output).glob("checkpoint-*") if checkpoint_step(path) is not None)
    return sorted(paths, key=checkpoint_step)


def checkpoint_step(path):
    """The step in a checkpoint's name, None if it is no such name."""
    name, _, step = path.name.partition("-")
    return int(step) if name == "checkpoint" and step.isdecimal() else None


def damage(folder):
    """What a checkpoint's list of files shows to be missing or cut, or None."""
    try:
        files = read_training_state(folder)["files"]
        for name, size in files.items():
            path = Path(folder, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return f"{STATE_FILE} is missing or damaged"


def read_training_state(folder):
    """What `checkpoints` wrote to a checkpoint's `training_state.json`."""
    try:
        return json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--resume_from_checkpoint {folder} is damaged ({error}): choose another one.") from error
