"""What a run would train and what a step of it costs, counted on fake tensors: no GPU, no memory, no weights.

Where the VAE's weights are at hand, also what its decoder's features are like, measured on pictures of the run.
"""

import copy
import json
import math
import os
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from arguments import UserError
from counters import FlopCounter, LiveBytes, RealMasks, module_bytes
from engines import blocks_of
from loading import DTYPES, load_vae
from loss_terms import NO_OBJECTIVES, TITLES, Objectives, lpl_share, make_lpl
from lpl_utils import STATS, _decoder_blocks, compare_gradients, outlier_mask
from train_utils import optimizer_bytes, sample_generators


def dry_run(accelerator, args, family, model, lpl, tau, objectives, ema, batch, training_step):
    """Count one optimizer step, print the report and return its numbers.

    Args:
        family: loaded with --dry_run, so that its models have no values; model: its model, prepared.
        tau: threshold of LPL on sigma / alpha; objectives: the terms beside LPL.
        batch: a batch of the run; training_step: the script's, a function of args, family, model, lpl and batch.

    Returns: dict of `trainable_parameters`, `parameters` (the denoiser's); `weights`, `optimizer`, `ema`, `buckets`
        (what several processes exchange gradients with), `gathered` (weights that are whole for a moment, where an
        engine shards them), `frozen` (networks of the terms beside LPL) and, of a whole step with every sample
        decoded, `peak` and (with the diffusion loss alone, but for the decoder's weights, which are among `weights`)
        `peak_l2`, in bytes, on one device; `cpu`, bytes that an engine keeps in the CPU's memory for each device;
        `flops`, expected for an optimizer step of one process, `flops_l2` with the diffusion loss alone, and
        `flops_of`, name of another term -> what it adds; `lpl_samples` and `lpl_steps`, the shares of them that LPL
        sees once it has started; `blocks`, those of `measure_blocks`: on the main process, empty without LPL or where
        they can't be measured.
    """
    engine = planned_engine(os.environ, accelerator.num_processes)
    pictures, batch = batch, encode_ahead(args, family, batch)
    count, own = count_what_stays(args, engine, family, model, ema)
    fixed = sum(count[name] for name in STAYS)
    count["frozen"] = module_bytes(*objectives.modules)
    # Every sample passes the gate: without it, and where alpha is not 0.
    every = Namespace(**{**vars(args), "lpl_sigma_threshold": math.inf})
    family.sample_timesteps = lambda generators, quantiles=(): family.timesteps[:1].repeat(len(generators))
    step = partial(count_step, accelerator, every, own, family, model, batch, training_step)

    passes = args.gradient_accumulation_steps
    peak_l2, flops_l2, _ = step(None)
    count |= {"peak_l2": fixed + peak_l2, "flops_l2": passes * flops_l2, "flops_of": {}}
    count |= {"lpl_samples": 0.0, "lpl_steps": 0.0}
    peaks, share = [peak_l2], lpl_share(family, tau)
    if lpl is not None:
        peak, flops, decoded = step(lpl)
        peaks.append(peak)
        samples = args.train_batch_size * passes * accelerator.num_processes
        count |= {"lpl_samples": share, "lpl_steps": 1 - (1 - share) ** samples}
        expected = expected_decoded(args.train_batch_size, share, args.lpl_max_samples)
        count["flops_of"]["LPL"] = passes * expected * (flops - flops_l2) / decoded
    for name, objective in objectives.terms.items():
        peak, flops, _ = step(None, Objectives({name: objective}))
        peaks.append(peak)
        seen = share if name in objectives.gated and name not in objectives.sizes else 1
        count["flops_of"][TITLES[name]] = passes * seen * (flops - flops_l2)
    if len(count["flops_of"]) > 1:
        peaks.append(step(lpl, Objectives(objectives.terms))[0])
    count["peak"] = fixed + count["frozen"] + max(peaks)
    count["flops"] = count["flops_l2"] + sum(count["flops_of"].values())
    if accelerator.is_main_process:
        report_settings(args, family, ema)
        report(args, engine, count, family, lpl, tau)
    count["blocks"] = []
    if accelerator.is_main_process and lpl is not None:
        count["blocks"] = report_blocks(args, family, lpl, pictures)
    accelerator.print("\nNothing was trained or written.")
    return count


def encode_ahead(args, family, batch):
    """The batch as the caches of the flags would have it; the encoders leave the device."""
    if args.cache_latents:
        batch = {**batch, "posteriors": family.encode_images(batch["pixel_values"]).detach()}
        family.place(encoder=False)
    if args.cache_text_embeddings:
        with RealMasks():
            family.cache_prompts(batch["captions"], lambda captions, embed: {text: embed(text) for text in captions})
    return batch


STAYS = ("weights", "optimizer", "ema", "buckets", "gathered")


def count_what_stays(args, engine, family, model, ema):
    """Numbers of parameters, and what a device holds all the time, in bytes; and the Share, if there is an engine."""
    trained = [p for p in model.parameters() if p.requires_grad]
    placed = (family.modules(part) for part, on_device in family.placed.items() if on_device)
    averaged = sum(4 * p.numel() for p in trained) if ema is not None and not args.offload_ema else 0
    count = {
        "trainable_parameters": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in family.denoiser.parameters()),
        "weights": module_bytes(model, *chain(*placed)) - saved_by_quantising(args, family.denoiser),
        "optimizer": optimizer_bytes(args, trained),
        "ema": averaged,
        "buckets": sum(4 * p.numel() for p in trained) if engine.processes > 1 else 0,
        "gathered": 0,
        "cpu": 0,
    }
    if engine.name is None:
        return count, None
    weights = sum(p.nbytes for p in model.parameters())
    share = share_of(engine, units_of(model), precise=4 if args.mixed_precision in ("no", "fp32") else 2)
    compute_in(model, torch.float32 if share.precise == 4 else torch.bfloat16)
    count |= {"weights": count["weights"] - weights, "optimizer": 0, "ema": 0}
    count |= {"buckets": share.buckets, "gathered": share.gathered}
    there = [
        ("weights", share.weights, engine.offload_weights),
        ("optimizer", share.optimizer, engine.offload_optimizer),
    ]
    if ema is not None:
        there.append(("ema", share.average, engine.offload_optimizer or args.offload_ema))
    for name, size, away in there:
        count["cpu" if away else name] += size
    count["cpu"] += share.gradients_on_cpu
    return count, share


def saved_by_quantising(args, denoiser):
    """Bytes that bitsandbytes takes off the frozen linear layers, of which the largest is unpacked as it works."""
    config = args.bnb_quantization_config_path
    if not config:
        return 0
    linear = (module for module in denoiser.modules() if isinstance(module, torch.nn.Linear))
    weights = [module.weight for module in linear if not module.weight.requires_grad]
    if config.get("load_in_8bit"):
        packed = sum(w.numel() + 4 * w.shape[0] for w in weights)  # a scale for each row
    elif config.get("bnb_4bit_use_double_quant"):
        packed = sum(w.numel() / 2 + w.numel() / 64 * (1 + 4 / 256) for w in weights)
    else:
        packed = sum(w.numel() / 2 + w.numel() / 64 * 4 for w in weights)  # a scale for every 64 values
    return sum(w.nbytes for w in weights) - math.ceil(packed) - max(w.nbytes for w in weights)


def count_step(accelerator, args, share, family, model, batch, training_step, lpl, objectives=NO_OBJECTIVES):
    """Peak bytes of an optimizer step that is logged; FLOPs and samples decoded of a forward and backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    max_samples = args.lpl_max_samples if (args.lpl_max_samples or 0) >= 1 else None
    passes = min(2, args.gradient_accumulation_steps)  # the second has the first one's gradients
    decoded, flops = 0, FlopCounter()
    with gpu_norms(), RealMasks(), LiveBytes() as memory, counted_visits(family, memory), ExitStack() as stack:
        if share is not None:
            stack.enter_context(shared_gradients(share, trained, memory))
        for _ in range(passes):
            with flops:
                forward = training_step(args, family, model, lpl, batch, max_samples, objectives)
            loss = forward.diffusion_loss + forward.lpl_loss + sum(forward.objective_losses.values())
            if lpl is not None:
                decoded += len(forward.lpl_stats["chosen"])
            if lpl is not None and not args.late_reweight:
                compare_gradients(forward.model_pred, forward.diffusion_loss, forward.lpl_loss)
            with flops:
                accelerator.backward(loss)
        if share is None:
            accelerator.clip_grad_norm_(trained, args.max_grad_norm)
    for p in trained:
        p.grad = None
    # After the backward pass: AdamW, which fp16 keeps from being fused, and the average have intermediate results.
    unfused = args.optimizer == "adamw" and not args.use_8bit_adam and args.mixed_precision == "fp16"
    update = max(1 + unfused, args.offload_ema + args.foreach_ema) * sum(4 * p.numel() for p in trained)
    if share is not None:
        update = max(share.update, (args.offload_ema + args.foreach_ema) * share.average)
    return max(memory.peak, update), flops.total / passes, decoded / passes


@contextmanager
def counted_visits(family, memory):
    """Adds what comes to the device for a moment only (--offload) to `memory`, a LiveBytes."""

    @contextmanager
    def on_device(part):
        visiting = 0 if family.placed[part] else module_bytes(*family.modules(part))
        memory.live += visiting
        memory.peak = max(memory.peak, memory.live)
        try:
            yield
        finally:
            memory.live -= visiting

    family.on_device = on_device
    try:
        yield
    finally:
        del family.on_device


@contextmanager
def gpu_norms():
    """Lets autocast compute norms (and resize) in float32, as on a GPU; on the CPU it leaves them in bf16."""
    norms = {name: getattr(F, name) for name in ("group_norm", "layer_norm", "rms_norm", "interpolate")}

    def in_float32(norm):
        def compute(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
                kwargs = {name: arg.float() if isinstance(arg, torch.Tensor) else arg for name, arg in kwargs.items()}
            return norm(*args, **kwargs)

        return compute

    try:
        for name, norm in norms.items():
            setattr(F, name, in_float32(norm))
        yield
    finally:
        for name, norm in norms.items():
            setattr(F, name, norm)


def expected_decoded(batch, share, max_samples):
    """Samples that `lpl_term` decodes on average, of a batch whose samples pass the gate with probability `share`."""
    if max_samples is None or max_samples < 1:
        return batch * share * (max_samples or 1)
    chance = [math.comb(batch, k) * share**k * (1 - share) ** (batch - k) for k in range(batch + 1)]
    return sum(p * min(k, max_samples) for k, p in enumerate(chance))


class Engine(NamedTuple):
    """What an accelerate config asks for."""

    name: str | None = None  # as `engines.engine_name` has it
    processes: int = 1
    reshard: bool = True  # FSDP2: blocks are not kept whole from the forward to the backward pass
    offload_weights: bool = False  # to the CPU's memory
    offload_optimizer: bool = False  # with gradients, float32 weights and their average


def planned_engine(environment, processes):
    """The Engine of the variables that `accelerate launch` sets. Raises UserError if training would refuse it."""

    def is_set(name, default="false"):
        return environment.get(name, default).lower() == "true"

    if is_set("ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP1 is not supported: set fsdp_version: 2 in the accelerate config.")
        offload = is_set("FSDP_OFFLOAD_PARAMS")
        return Engine("FSDP2", processes, is_set("FSDP_RESHARD_AFTER_FORWARD", "true"), offload, offload)
    if not is_set("ACCELERATE_USE_DEEPSPEED"):
        return Engine(None, processes)
    file, prefix = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"), "ACCELERATE_DEEPSPEED_"
    zero = json.loads(Path(file).read_text())["zero_optimization"] if file != "none" else {}
    stage = zero.get("stage", environment.get(f"{prefix}ZERO_STAGE", "2"))
    if str(stage) == "0":
        raise UserError("DeepSpeed's zero_stage 0 shards nothing: use DDP, or zero_stage 2 or 3.")
    homes = [
        zero.get(f"offload_{part}", {}).get(
            "device", environment.get(f"{prefix}OFFLOAD_{part.upper()}_DEVICE", "none")
        )
        for part in ("param", "optimizer")
    ]
    weights, optimizer = (home != "none" for home in homes)
    return Engine(f"ZeRO-{stage}", processes, True, weights and str(stage) == "3", optimizer)


class Share(NamedTuple):
    """What one process of an engine has of a model, in bytes; where, the Engine says."""

    precise: int  # bytes of a value in the precision of the run
    weights: int
    optimizer: int  # AdamW's moments, and what float32 weights there are beside the model's
    average: int
    gathered: int  # on the device: weights that are whole while they are used
    buckets: int  # there, all the time
    reducing: int  # there, while gradients are exchanged
    gradients: int  # there, when the last ones are exchanged
    gradients_on_cpu: int
    update: int  # there, after the backward pass: the last exchange, or the optimizer's gradients


def share_of(engine, units, precise):
    """The Share of the process that has most.

    Args:
        units: name -> the parameters that FSDP2 gathers together, "" being the root (see `units_of`).
        precise: bytes of a value in the precision of the run, 2 or 4.
    """
    return (fsdp_share if engine.name == "FSDP2" else zero_share)(engine, units, precise)


def fsdp_share(engine, units, precise):
    """FSDP2 shards each tensor by its first dimension. Each block is gathered while the one before is still there.

    Blocks inside of blocks are there together, the root's own parameters all the time. Of a block, gradients are whole
    in the run's precision, and in float32 on their way to the other processes while the next block's are computed.
    """

    def part(p):
        return math.ceil(p.shape[0] / engine.processes) * (p.numel() // p.shape[0])

    everything = [p for unit in units.values() for p in unit]
    moved = sum(part(p) for p in everything if p.requires_grad)
    own = {name: (values(unit), values(unit, trained=True)) for name, unit in units.items()}
    root, root_trained = own.pop("")
    nested = [[own[outer] for outer in own if f"{name}.".startswith(f"{outer}.")] for name in own]
    together = [[sum(sizes) for sizes in zip(*stack)] for stack in nested] or [[0, 0]]
    largest, largest_trained = (max(sizes, default=0) for sizes in (zip(*own.values()) if own else ((), ())))
    blocks = max(size for size, _ in together) + largest
    if not engine.reshard:
        blocks = values(everything) - root + largest
    of_block = precise * max(size for _, size in together) + 4 * largest_trained
    on_device = not engine.offload_optimizer
    return Share(
        precise=precise,
        weights=sum(part(p) * p.element_size() for p in everything),
        optimizer=8 * moved,
        average=4 * moved,
        gathered=precise * (root + blocks),
        buckets=0,
        reducing=max(precise * root_trained + of_block, (precise + 4) * root_trained),
        gradients=4 * moved * on_device,
        gradients_on_cpu=4 * moved * (not on_device),
        update=4 * moved * on_device,
    )


BUCKET, LIVE, PREFETCHED, SMALL = 5 * 10**8, 10**9, 5 * 10**7, 10**5  # DeepSpeed's defaults, in values


def zero_share(engine, units, precise):
    """DeepSpeed has the weights in the run's precision and moves float32 copies, of which each process has a part.

    Gradients wait for each other in a bucket of a fixed size, and are copied once more when they leave it. ZeRO-3
    shards also the weights, but for those of small tensors, and of others keeps up to a number of values whole.
    """
    everything = [p for unit in units.values() for p in unit]
    trained, size = values(everything, trained=True), values(everything)
    moved, sharded = math.ceil(trained / engine.processes), engine.name == "ZeRO-3"
    small = sum(p.numel() for p in everything if p.numel() <= SMALL)
    whole = small + min(size - small, LIVE + PREFETCHED)
    on_device, several = not engine.offload_optimizer, trained > BUCKET
    gradients, converted = precise * moved, 0 if precise == 4 else 4 * moved
    bucket = 0 if sharded else precise * BUCKET  # ZeRO-3 keeps it
    full = min(BUCKET, trained)
    mine = math.ceil(full / engine.processes) if on_device != sharded else 0  # else they go where they stay
    leaving = precise * (full + mine)
    left = precise * math.ceil(max(0, trained - BUCKET) / engine.processes)  # when the last bucket is full
    return Share(
        precise=precise,
        weights=precise * (math.ceil(size / engine.processes) if sharded else size),
        optimizer=12 * moved,
        average=4 * moved,
        gathered=precise * whole if sharded else 0,
        buckets=precise * BUCKET + gradients * on_device if sharded else 0,
        reducing=bucket + leaving * several,
        gradients=0 if sharded else left * on_device,
        gradients_on_cpu=0 if on_device else 4 * moved + gradients * sharded,
        update=max(bucket + leaving, ((0 if sharded else 2 * gradients) + converted) * on_device),
    )


def values(parameters, trained=False):
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def units_of(module):
    """Name -> the parameters that FSDP2 gathers with the block of this name, without blocks in it; "": the rest."""
    classes = set(blocks_of(module))
    units = {"": [], **{name: [] for name, child in module.named_modules() if type(child).__name__ in classes}}
    for name, p in module.named_parameters():
        parts = name.split(".")
        outer = (".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1))
        units[next(unit for unit in outer if unit in units)].append(p)
    return {name: unit for name, unit in units.items() if unit or not name}


def compute_in(module, dtype):
    """Gives a module without values parameters of a precision, as it has them when an engine computes."""
    made = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = torch.nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
            part._parameters[name] = made.get(id(p))


@contextmanager
def shared_gradients(share, trained, memory):
    """Lets gradients leave as they are computed, as an engine does, and counts in `memory` what stays of them."""
    kept, seen, hooks = share.gradients / max(1, values(trained)), set(), []

    def leave(p):
        p.grad = None
        if not seen:
            memory.live += share.reducing
        if id(p) not in seen:  # of further forward passes, they are added up
            memory.live += round(kept * p.numel())
        seen.add(id(p))
        memory.peak = max(memory.peak, memory.live)

    hooks = [p.register_post_accumulate_grad_hook(leave) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


PICTURES, PIXELS = 2, 256  # what one CPU core decodes in well under a minute
MEASURED_IN = {torch.float16: torch.float32}  # on a CPU, convolutions in fp16 take a hundred times as long


@torch.no_grad()
def measure_blocks(args, family, lpl, batch):
    """What LPL finds in each block of the decoder, with the VAE's weights, on centre crops of the first pictures.

    Args:
        lpl: the run's, which compares the first of these blocks; batch: of `pixel_values` `[B, 3, H, W]` and
            `positions`.

    Returns: the number of pictures, their side in pixels, and a dict for each block, in the order in which they run:
        `name` in the decoder; `shape` (channels, height, width) of a sample's features at --resolution; `amplitude`,
        the root of their mean square over samples, channels and positions; `outliers`, the share of positions that
        Algorithm 1 leaves out as at --resolution, None where LPL masks nothing; `mean_over_std`, |mean| / std over
        the positions LPL compares, on average over samples and channels; `weight`, omega, None if it is balanced
        later; `compared`, whether LPL compares it.

    Raises:
        UserError: the VAE can't be loaded, or its features are not finite in the run's precision.
    """
    vae = load_vae(args, MEASURED_IN.get(family.vae.dtype, family.vae.dtype))
    largest = torch.finfo(family.vae.dtype).max
    measured = copy.copy(family)
    measured.vae = vae
    _, up_blocks = _decoder_blocks(vae.decoder)
    all_blocks = Namespace(**{**vars(args), "lpl_num_blocks": len(up_blocks), "lpl_compile": None})
    whole = make_lpl(all_blocks, vae, measured.unscale)

    unit = args.resolution // args.latent_size * family.pack
    side = min(args.resolution, PIXELS, *batch["pixel_values"].shape[-2:]) // unit * unit
    pictures = centre_crop(batch["pixel_values"][:PICTURES], side)
    generators = sample_generators(args.seed, batch["positions"][:PICTURES], purpose=1)
    samples = []
    for picture, generator in zip(pictures, generators):
        phis = whole.features(measured.latents({"pixel_values": picture[None]}, [generator]))
        if not all((phi.abs() <= largest).all() for phi in phis):  # nor is NaN
            precision = PRECISIONS[family.vae.dtype]
            raise UserError(f"its features are not finite in {precision}: use another precision for the VAE.")
        _, stats = whole._compare(phis, phis)
        samples.append(
            {
                "squares": [phi.float().square().mean().item() for phi in phis],
                "outliers": [outlier_share(whole, phi, phis[0], args.resolution / side) for phi in phis],
                "mean_over_std": stats[0, :, STATS.index("mean_over_std")].tolist(),
            }
        )

    def mean(kind, l):
        return sum(sample[kind][l] for sample in samples) / len(samples)

    names = {module: name for name, module in vae.decoder.named_modules()}
    blocks = [
        {
            "name": names[block],
            "shape": (phi.shape[1], *(length * args.resolution // side for length in phi.shape[2:])),
            "amplitude": math.sqrt(mean("squares", l)),
            "outliers": None if samples[0]["outliers"][l] is None else mean("outliers", l),
            "mean_over_std": mean("mean_over_std", l),
            "weight": None if args.lpl_weighting == "balanced" else whole.omega[l].item(),
            "compared": l < len(lpl.blocks),
        }
        for l, (block, phi) in enumerate(zip(whole.blocks, phis))
    ]
    return len(samples), side, blocks


def centre_crop(pictures, side):
    top, left = ((length - side) // 2 for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]


def outlier_share(lpl, phi, first, growth):
    """Share of positions of features `[1, C, h, w]` that Algorithm 1 leaves out, None if LPL does not mask them.

    growth: how much larger than these the features of the run are; the mask's kernels are for those.
    """
    if not lpl.mask_outliers or phi.shape[-1] < 4 * first.shape[-1]:
        return None
    valid = outlier_mask(phi, 1, growth * math.sqrt(phi.shape[-2] * phi.shape[-1]))
    return 1 - valid.float().mean().item()


HIDDEN = ("pipelines", "changed", "given_flags", "idle_lpl_flags", "samples", "hub_token", "dry_run")
HIDDEN += ("num_classes", "id2label", "denoiser_config", "absent_parts", "latent_size", "buckets")
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


def report_settings(args, family, ema):
    """All settings as they were resolved, first those given."""
    settings = {name: value for name, value in vars(args).items() if name not in HIDDEN}
    settings |= {"prediction_type": family.prediction_type, "vae_dtype": PRECISIONS[family.vae.dtype]}
    settings |= {"ema_decay": ema.decay} if ema is not None else {}
    given = {flag.removeprefix("--no-").removeprefix("--") for flag in args.given_flags}
    if "seed" not in given:
        del settings["seed"]  # every run draws its own
    for title, names in (("Settings", settings.keys() & given), ("Settings by default", settings.keys() - given)):
        print(f"\n{title}")
        for name in sorted(names):
            value = settings[name]
            if value is not None and (value is not False or name in given):
                print(f"  --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")


def report(args, engine, count, family, lpl, tau):
    """What `dry_run` returns."""
    trained = {str(p.dtype).removeprefix("torch.") for p in family.model.parameters() if p.requires_grad}
    trained = {"float32"} if engine.name is not None else trained  # what it has been given to compute in is another
    denoiser = {"unet": "UNet"}.get(family.denoiser_name, family.denoiser_name)
    print(f"\n{family.pipeline_class.__name__}")
    print(
        f"  Trained: {count['trainable_parameters']:,} parameters in {' and '.join(trained)}; "
        f"the {denoiser} has {count['parameters']:,}"
    )
    if lpl is not None:
        start = f" from step {args.lpl_start_step} on" if args.lpl_start_step else ""
        print(
            f"  LPL sees {count['lpl_samples']:.1%} of the samples (sigma/alpha at most {tau:g}), in "
            f"{count['lpl_steps']:.1%} of the steps{start}"
        )

    rest = count["peak"] - count["frozen"] - sum(count[name] for name in STAYS)
    due = "LPL" if count["flops_of"].keys() <= {"LPL"} else "all but l2"
    placed = [denoiser, *(PARTS[part] for part, there in family.placed.items() if there and family.modules(part))]
    rows = [
        ("weights", count["weights"], ", ".join(placed)),
        ("optimizer's state", count["optimizer"], "8-bit adamw" if args.use_8bit_adam else args.optimizer),
        ("average weights", count["ema"], "EMA"),
        ("gathered", count["gathered"], "weights that are whole while they are used"),
        ("buckets", count["buckets"], "gradients on their way between processes"),
        ("frozen networks", count["frozen"], "of the other objectives"),
        ("the rest at the peak", rest, "gradients, activations"),
        ("peak", count["peak"], "if LPL sees every sample" if lpl is not None else ""),
        (f"  of it due to {due}", count["peak"] - count["peak_l2"], ""),
    ]
    how = f"batch {args.train_batch_size}, {args.resolution} pixels"
    if engine.processes > 1 or engine.name is not None:
        how += f", {engine.name or 'DDP'} on {engine.processes} devices"
    print(f"\nMemory of a step, on each device ({how})")
    width = max(24, *(len(name) + 1 for name, _, _ in rows))
    for name, nbytes, note in rows:
        if nbytes or name.startswith(" ") and count["flops_of"]:
            print(f"  {name:<{width}}{size(nbytes, 'B', 1024):>12}  {note}".rstrip())
    if count["cpu"]:
        what = "what waits in the CPU's memory, for each device"
        print(f"  {'offloaded':<24}{size(count['cpu'], 'B', 1024):>12}  {what}")
    print("  On top come the allocator's rounding, the libraries' workspaces and, while it draws, the sampler.")

    work = f"{args.gradient_accumulation_steps} x {args.train_batch_size} samples per device"
    print(f"\nArithmetic of an optimizer step, on average ({work})")
    parts = {"total": count["flops"], **{f"  of it due to {name}": n for name, n in count["flops_of"].items()}}
    width = max(24, *(len(name) + 1 for name in parts))
    for name, flops in parts.items():
        print(f"  {name:<{width}}{size(flops, 'FLOP', 1000):>12}")


def report_blocks(args, family, lpl, batch):
    """The blocks of `measure_blocks`, printed as a table; none, and a line that says why, if that fails."""
    print(f"\nBlocks of the decoder ({type(family.vae).__name__})", flush=True)
    try:
        pictures, side, blocks = measure_blocks(args, family, lpl, batch)
    except (UserError, RuntimeError) as error:  # as of operations that a CPU does not have in half precision
        print(f"  Not measured: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return []
    precision = PRECISIONS[MEASURED_IN.get(family.vae.dtype, family.vae.dtype)]
    rows = [("block", "shape", "amplitude", "outliers", "|mean|/std", "weight", "LPL")]
    for block in blocks:
        rows.append(
            (
                block["name"],
                " x ".join(str(length) for length in block["shape"]),
                f"{block['amplitude']:.4g}",
                "not masked" if block["outliers"] is None else f"{block['outliers']:.2%}",
                f"{block['mean_over_std']:.3g}",
                "measured later" if block["weight"] is None else f"{block['weight']:.4g}",
                "compared" if block["compared"] else "not compared",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for name, *numbers, compared in rows:
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:]))
        print(f"  {name:<{widths[0]}}  {cells}  {compared}")
    how_many = f"{pictures} picture{'s' if pictures > 1 else ''} of {side} x {side} pixels"
    print(f"  Measured in {precision} on {how_many}. shape: channels x height x width at {args.resolution} pixels;")
    print("  amplitude: root mean square of the clean features; outliers: share of positions that Algorithm 1 masks;")
    print("  |mean|/std: mean over channels; weight: omega of Eq. 3.")
    return blocks


PARTS = {"encoder": "VAE encoder", "decoder": "VAE decoder", "text_encoders": "text encoders"}


def size(number, unit, step):
    """With the prefix that suits it: 1536 B -> 1.50 KiB."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if step == 1024 else ["", "k", "M", "G", "T", "P"]
    power = 0
    while number >= step and power + 1 < len(prefixes):
        number, power = number / step, power + 1
    return f"{number:.2f} {prefixes[power]}{unit}"
