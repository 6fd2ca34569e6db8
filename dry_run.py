"""What a run would train and what a step of it costs, counted on fake tensors: no GPU, no memory, no weights."""

import math
from argparse import Namespace

from counters import FlopCounter, LiveBytes, module_bytes
from lpl_utils import sigma_gate
from train_utils import optimizer_bytes


GIB, TERA = 2**30, 1e12


def dry_run(accelerator, args, family, model, lpl, tau, ema, batch, training_step):
    """Count one optimizer step, print the report and return its numbers.

    Args:
        family: loaded with --dry_run, so that its models have no values; model: its model, prepared.
        tau: threshold of LPL on sigma / alpha.
        batch: a batch of the run; training_step: the script's, a function of args, family, model, lpl and batch.

    Returns: dict of `trainable_parameters`, `parameters`; `weights`, `optimizer`, `ema` and, of a whole step with
        every sample decoded, `peak` and (without LPL) `peak_l2`, in bytes, on one device; `flops`, expected for an
        optimizer step, and `flops_l2` without LPL; `lpl_samples` and `lpl_steps`, the shares of them that LPL sees.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    on_device = [model, *(module for part, there in family.placed.items() if there for module in family.modules(part))]
    count = {
        "trainable_parameters": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in family.unet.parameters()),
        "weights": module_bytes(*on_device),
        "optimizer": optimizer_bytes(args, trained),
        "ema": sum(p.numel() * 4 for p in trained) if ema is not None and not args.offload_ema else 0,
    }
    if args.cache_latents:
        batch = {**batch, "posteriors": family.encode_images(batch["pixel_values"]).detach()}
    if args.cache_text_embeddings:
        family.cache_prompts(batch["captions"], lambda captions, embed, _: [embed(caption) for caption in captions])
    fixed = count["weights"] + count["optimizer"] + count["ema"]

    every = Namespace(**{**vars(args), "lpl_sigma_threshold": math.inf})
    whole = args.lpl_max_samples if (args.lpl_max_samples or 0) >= 1 else None

    def step(step_lpl):
        """Peak bytes, FLOPs and samples decoded of one forward pass, its backward pass and the optimizer's step."""
        decoded = 0
        with LiveBytes() as memory, FlopCounter() as flops:
            for _ in range(min(2, args.gradient_accumulation_steps)):  # the second has the first one's gradients
                forward = training_step(every, family, model, step_lpl, batch, whole)
                loss = forward.diffusion_loss + forward.lpl_loss
                decoded += len(forward.lpl_stats["chosen"]) if step_lpl is not None else 0
                del forward
                accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, args.max_grad_norm)
        for p in trained:
            p.grad = None
        passes = min(2, args.gradient_accumulation_steps)
        return fixed + memory.peak, flops.total / passes, decoded / passes

    count["peak_l2"], flops_l2, _ = step(None)
    count["peak"], count["flops_l2"] = count["peak_l2"], flops_l2 * args.gradient_accumulation_steps
    count["flops"], count["lpl_samples"], count["lpl_steps"] = count["flops_l2"], 0.0, 0.0
    if lpl is not None:
        count["peak"], flops_lpl, decoded = step(lpl)
        gate = sigma_gate(family.alphas, family.sigmas, tau)
        share = min(1.0, (family.timestep_weights * gate).sum().item())
        per_pass, per_step = args.train_batch_size, args.train_batch_size * args.gradient_accumulation_steps
        count["lpl_samples"] = share
        count["lpl_steps"] = 1 - (1 - share) ** (per_step * accelerator.num_processes)
        expected = expected_decoded(per_pass, share, args.lpl_max_samples)
        per_sample = (flops_lpl - flops_l2) / decoded
        count["flops"] += expected * per_sample * args.gradient_accumulation_steps
    report(args, count, model, family)
    return count


def expected_decoded(batch, share, max_samples):
    """Samples that `lpl_term` decodes on average, of a batch whose samples pass the gate with probability `share`."""
    if max_samples is None or max_samples < 1:
        return batch * share * (max_samples or 1)
    chance = [math.comb(batch, k) * share**k * (1 - share) ** (batch - k) for k in range(batch + 1)]
    return sum(p * min(k, max_samples) for k, p in enumerate(chance))


def report(args, count, model, family):
    hidden = ("pipelines", "given_flags", "given_lpl_flags", "folder_samples", "hub_token", "dry_run")
    print("\nSettings")
    for name, value in sorted(vars(args).items()):
        if name not in hidden and value is not None and value is not False:
            print(f"  --{name} {value}")
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    frozen = [f"{part} of the VAE" if part != "text_encoders" else "text encoders" for part in family.placed]
    there = [name for name, on_device in zip(frozen, family.placed.values()) if on_device]
    total, share = count["parameters"], count["trainable_parameters"] / count["parameters"]
    print(
        f"\n{type(family).__name__}: {count['trainable_parameters']:,} trainable parameters ({', '.join(trained)}), "
        f"{share:.2%} of the UNet's {total:,}"
    )
    print(f"On the device besides the UNet: {', '.join(there) or 'nothing'}")
    if count["lpl_samples"]:
        print(f"LPL sees {count['lpl_samples']:.1%} of the samples, in {count['lpl_steps']:.1%} of the steps")
    print(f"\nCounted per process, batch {args.train_batch_size} at {args.resolution} pixels, without drawing images:")
    activations = count["peak"] - count["weights"] - count["optimizer"] - count["ema"]
    rows = [
        ("weights", count["weights"] / GIB, "GiB"),
        (f"state of {args.optimizer}", count["optimizer"] / GIB, "GiB"),
        ("average weights", count["ema"] / GIB, "GiB"),
        ("gradients, activations and the rest, at the peak", activations / GIB, "GiB"),
        ("peak memory", count["peak"] / GIB, "GiB"),
        ("  of which LPL adds", (count["peak"] - count["peak_l2"]) / GIB, "GiB"),
        ("arithmetic per optimizer step, on average", count["flops"] / TERA, "TFLOP"),
        ("  of which LPL's", (count["flops"] - count["flops_l2"]) / TERA, "TFLOP"),
    ]
    for name, value, unit in rows:
        print(f"  {name:<50}{value:>10.3f} {unit}")
    print("The allocator's rounding and the libraries' workspaces come on top. Nothing was trained or written.")
