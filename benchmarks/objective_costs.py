"""What the objectives cost that LPL is compared with, beside Table 5: no weights, no download, no GPU.

    python benchmarks/objective_costs.py
    python benchmarks/objective_costs.py --sdxl

Memory and arithmetic of a training step by the scripts' own --dry_run: of the paper's MM-DiT on class labels, or with
--sdxl of the README's SDXL LoRA. Further flags are the training script's, such as --gradient_checkpointing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from dry_runs import ROOT, build_class_folder, count, readme_commands, write_model  # noqa: E402
from tiny_models import build_photo_folder  # noqa: E402


# Table 5 at 512 pixels; batch and checkpointing are not said there. The caches leave the VAE's encoder out of it.
SETTING = ["--resolution", 512, "--train_batch_size", 16, "--mixed_precision", "bf16", "--use_ema"]
SETTING += ["--cache_latents", "--center_crop"]
LORA = ["--use_lora", "--rank", 16]
# Of E-LatentLPIPS's time, a fifth is left with the gate, and at 512 pixels 20% of the samples have an SNR of 3.
PAPERS_GATE = ["--lpl_sigma_threshold", 3**-0.5, "--lpl_base_resolution", 512]
TABLE_5 = {  # images per second, per cent of the GPU's memory
    "l2": (16.6, 42.5),
    "E-LatentLPIPS": (13.3, 67.5),
    "E-LatentLPIPS, gate of SNR 3": (15.8, 43.5),
    "self-perceptual, block 8": (13.3, 70.6),
    "self-perceptual, block 16": (11.4, 75.1),
    "self-perceptual, block 28": (9.2, 82.4),
    "LPL, gate of SNR 3": (9.6, 74.3),
}


def only(objective=None, *flags):
    """The flags of this term beside the diffusion loss; the weight, in proportion to variances, is Table 5's."""
    off = [] if objective == "lpl" else ["--lpl_weight", 0]
    return [*off, *([f"--{objective}_weight", "variance:0.1"] if objective else []), *flags]


def papers_arms(depth):
    """Title -> flags, for a transformer with this many blocks: those of Table 5's 28 in proportion."""
    blocks = {f"block {n}": ("--sp_layer", max(1, round(depth * n / 28))) for n in (8, 16, 28)}
    gate = ["--gate_objectives", "e_latent_lpips", *PAPERS_GATE]
    return {
        "l2": only(),
        "LPL, gate of SNR 3": only("lpl", *PAPERS_GATE),
        "LPL": only("lpl"),
        "LPL, --lpl_max_samples 2": only("lpl", "--lpl_max_samples", 2),
        "E-LatentLPIPS": only("e_latent_lpips"),
        "E-LatentLPIPS, gate of SNR 3": only("e_latent_lpips", *gate),
        **{f"self-perceptual, {title}": only("self_perceptual", *layer) for title, layer in blocks.items()},
        "RGB": only("rgb"),
        "LoRA: l2": only(None, *LORA),
        "LoRA: self-perceptual, block 8": only("self_perceptual", *blocks["block 8"], *LORA),
    }


SDXL_ARMS = {
    "l2": only(),
    "LPL": only("lpl"),
    "E-LatentLPIPS": only("e_latent_lpips"),
    "self-perceptual, mid block": only("self_perceptual"),
    "RGB": only("rgb"),
}


def table(model, photos, setting, arms, papers=None):
    """Prints a row for each arm, which is measured by the l2 above it.

    setting: flags of all arms, with --train_batch_size; papers: Table 5, to be put beside.
    """
    titles = ["objective", "GiB at the peak", "l2 = 1", "frozen GiB", "TFLOP per image", "l2 = 1"]
    titles += ["paper: memory, l2 = 1", "paper: time per image, l2 = 1"] if papers else []
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    l2 = None
    for title, flags in arms.items():
        n = count(model, photos, *setting, *flags)
        if title.endswith("l2"):
            l2 = n
        cells = [title, *cells_of(n, l2, images_per_step([*setting, *flags]))]
        if papers:
            speed, memory = papers.get(title, (None, None))
            (speed_l2, memory_l2) = papers["l2"]
            cells += [f"{memory / memory_l2:.2f}", f"{speed_l2 / speed:.2f}"] if speed else ["", ""]
        print("| " + " | ".join(cells) + " |", flush=True)


def cells_of(n, l2, images):
    """Of the numbers of two dry runs: memory if every sample is compared, arithmetic as the gate lets them pass.

    What is frozen is there for the objective alone: its network, or the decoder.
    """
    frozen = n["frozen"] + n["weights"] - l2["weights"]
    memory = [f"{n['peak'] / 2**30:.1f}", f"{n['peak'] / l2['peak']:.2f}", f"{frozen / 2**30:.2f}"]
    return [*memory, f"{n['flops'] / images / 1e12:.2f}", f"{n['flops'] / l2['flops']:.2f}"]


def images_per_step(flags):
    """Of one process; what is given last counts."""
    given = dict(zip(flags, flags[1:]))
    return int(given["--train_batch_size"]) * int(given.get("--gradient_accumulation_steps", 1))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdxl", action="store_true", help="the README's SDXL LoRA at 1024 pixels")
    parser.add_argument("--model", default="mmdit-28x1536", help="name of a file of transformer_configs/")
    args, more = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.sdxl:
            name, flags = readme_commands()["SDXL LoRA on 24 GB"]
            photos = build_photo_folder(folder / "photos", n=8, size=1024)
            table(write_model(folder / "model", name), photos, [*flags, *more], SDXL_ARMS)
        else:
            config = ROOT / "transformer_configs" / f"{args.model}.json"
            model = write_model(folder / "model", (config, "epsilon"))
            arms = papers_arms(json.loads(config.read_text())["num_layers"])
            table(model, build_class_folder(folder / "classes"), [*SETTING, *more], arms, TABLE_5)


if __name__ == "__main__":
    main()
