"""What LPL costs, beside a step of the diffusion loss alone and beside the bare decoder. No weights, no download.

    python benchmarks/cost.py --output cost.md
    python benchmarks/cost.py --models small --tables steps

All at true sizes with random weights. Peaks (with every sample passing the gate) and arithmetic (as the gate lets them
pass) are counted by the scripts' own --dry_run, which takes some five minutes for each model. Times are real: on a CPU
those of `small` and of the term alone at 128 pixels, on a GPU all, beside the bytes that were allocated. In the
scripts' own loop the variants take turns, all in a round on the same batch, and a ratio is taken within each round:
printed are medians, and in brackets the lowest and highest.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import diffusers
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path[:0] = [str(Path(__file__).parent)]
import memory  # noqa: E402
from data import print_table, ratio, take_turns  # noqa: E402
from dry_runs import (  # noqa: E402
    PIPELINES,
    ROOT,
    SDXL_VAE,
    VAE,
    XL,
    build_class_folder,
    count,
    readme_commands,
    trained_pipeline,
    write_model,
)
from objective_costs import LORA, SETTING, TABLE_5, images_per_step  # noqa: E402
from tiny_models import build_photo_folder  # noqa: E402

import pipeline_class_conditional  # noqa: E402
import train_lpl_dit  # noqa: E402
import train_lpl_sd  # noqa: E402
from counters import LiveBytes, count_flops, module_bytes  # noqa: E402
from family import uses_decoder  # noqa: E402
from latent_lpips import LatentVGG  # noqa: E402
from latent_lpips_files import scaling_of  # noqa: E402
from loss_terms import NO_OBJECTIVES, make_lpl, make_objectives  # noqa: E402
from lpl_utils import LatentPerceptualLoss, outlier_mask  # noqa: E402


# The models


class Model(NamedTuple):
    """What is trained, a name in PIPELINES, and how. The caches leave the VAE's and the text encoders out of it."""

    pipeline: str
    resolution: int
    flags: list


def small_pipeline():
    """Half the widths of SD's decoder; LPL is to l2 in arithmetic about as with the paper's MM-DiT and its VAE."""
    whole = trained_pipeline(MMDIT, "epsilon")
    model_class, config = whole["transformer"]
    config |= {"num_layers": 8, "num_attention_heads": 8, "patch_size": 1, "sample_size": 8}
    vae = {**VAE, "block_out_channels": (64, 128, 256, 256)}
    return {**whole, "transformer": (model_class, config), "vae": ("AutoencoderKL", vae)}


MMDIT = ROOT / "transformer_configs" / "mmdit-28x1536.json"
PIPELINES["mmdit"] = trained_pipeline(MMDIT, "epsilon")
PIPELINES["mmdit-sdxl-vae"] = {**PIPELINES["mmdit"], "vae": ("AutoencoderKL", SDXL_VAE)}
PIPELINES["small"] = small_pipeline()
CAPTIONS = [*SETTING, "--cache_text_embeddings"]
CHECKPOINTED = ["--gradient_checkpointing", "--resolution", 1024]
MODELS = {
    "sd15": Model(readme_commands()["Stable Diffusion 1.5"][0], 512, CAPTIONS),
    "sdxl": Model(XL, 1024, [*CAPTIONS, *CHECKPOINTED]),
    "sdxl-lora": Model(XL, 1024, [*CAPTIONS, *CHECKPOINTED, *LORA]),
    "mmdit": Model("mmdit", 512, SETTING),
    "mmdit-sdxl-vae": Model("mmdit-sdxl-vae", 512, SETTING),
    "flux-lora": Model("black-forest-labs/FLUX.1-dev", 512, [*CAPTIONS, *LORA, "--gradient_checkpointing"]),
    # tau and with it the share of samples that LPL sees as at 512 pixels
    "small": Model(
        "small", 64, [*SETTING, "--resolution", 64, "--train_batch_size", 8, "--mixed_precision", "no"]
        + ["--lpl_base_resolution", 32],
    ),
}  # fmt: skip


# The variants


def variants_of(model):
    """Title -> flags, by which a run differs; what is not named is the default: all that pass, 4 up blocks, gate 3 at
    256 pixels and in proportion."""
    batch = images_per_step(model.flags)
    l2 = ["--lpl_weight", 0]
    gates = {snr: ["--lpl_sigma_threshold", snr, "--lpl_base_resolution", model.resolution] for snr in (3**-0.5, 3)}
    return {
        "l2": l2,
        "LPL, plain autograd": ["--lpl_chunk_size", 0, "--no-lpl_gradient_checkpointing"],
        "LPL, block-checkpointed": ["--lpl_chunk_size", 0, "--lpl_gradient_checkpointing"],
        STREAMED: [],
        "LPL, streamed, block-checkpointed": ["--lpl_gradient_checkpointing"],
        COMPILED: ["--lpl_compile"],
        **{
            f"LPL, {name} of the batch": ["--lpl_max_samples", batch / n if batch >= n else 1 / n]
            for name, n in SHARES.items()
        },
        **{f"LPL, {n} up blocks": ["--lpl_num_blocks", n] for n in (3, 2, 1)},
        **{f"LPL, gate {tau:.3g}": flags for tau, flags in gates.items()},
        "self-perceptual": [*l2, "--self_perceptual_weight", 1],
        "E-LatentLPIPS": [*l2, "--e_latent_lpips_weight", 1],
        "RGB": [*l2, "--rgb_weight", 1],
    }


STREAMED, COMPILED = "LPL, streamed", "LPL, compiled blocks"
SHARES = {"a half": 2, "a quarter": 4, "an eighth": 8}
EIGHTH = "LPL, an eighth of the batch"
# Of the MM-DiT at 512 pixels: images per second and memory, l2 = 1
PAPER = {"LPL, gate 0.577": [of / l2 for of, l2 in zip(TABLE_5["LPL, gate of SNR 3"], TABLE_5["l2"])]}


# What is counted


class Counts:
    """The numbers of dry runs, each run once. Models and data are written to a folder."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def __call__(self, name, *flags):
        """Of a model's name and flags beside its own."""
        if (name, flags) not in self.known:
            model = self.folder / name
            if not model.exists():
                write_model(model, MODELS[name].pipeline)
            self.known[name, flags] = count(model, self.photos(name), *MODELS[name].flags, *flags)
        return self.known[name, flags]

    def photos(self, name):
        """A folder of them, with captions or sorted into classes."""
        if "text_encoder" in PIPELINES[MODELS[name].pipeline]:
            photos = self.folder / "photos"
            return photos if photos.exists() else build_photo_folder(photos, n=8, size=1024)
        classes = self.folder / "classes"
        return classes if classes.exists() else build_class_folder(classes)


# What is measured


class Over(Exception):
    """Leaves a script's loop."""


class Turns:
    """Lets a training script's own loop go through variants in turn, all in a round on the same batch.

    Args:
        script: the module; variants: title -> its flags, parsed.
        rounds: that are timed, after one that is not: it compiles, and makes the optimizer's state.
        clock: seconds.

    seconds: title -> `[rounds]`, of a step from the batch to the moved weights.
    peaks: title -> the most bytes allocated on the GPU, without what other variants have there; empty on a CPU.
    missing: titles of those that ran out of memory.
    """

    def __init__(self, script, variants, rounds, clock=time.perf_counter):
        self.script, self.variants, self.rounds, self.clock = script, dict(variants), rounds, clock
        self.training_step, self.weighted_terms, self.make_log = (
            getattr(script, name) for name in ("training_step", "weighted_terms", "Log")
        )
        self.missing = []

    def run(self, args):
        """args: parsed flags of a run that has all that any variant needs on the device."""
        ours = {"training_step": self.step, "weighted_terms": self.weigh}
        ours |= {"make_objectives": self.make, "Log": self.log}
        while self.variants:
            self.seconds, self.peaks = {title: [] for title in self.variants}, {}
            self.terms, self.own, self.batch, self.turn, self.current = {}, {}, None, 0, None
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            try:
                with mock.patch.multiple(self.script, **ours):
                    self.script.main(args)
            except Over:
                return
            except torch.OutOfMemoryError:
                if self.current is None:
                    raise
                self.missing.append(self.current)
                del self.variants[self.current]
            finally:
                self.terms = self.own = self.batch = None  # nothing of this model stays on the device
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    # In place of the script's

    def make(self, accelerator, args, family):
        self.device = accelerator.device
        for title, variant in self.variants.items():
            lpl = make_lpl(variant, family.vae, family.unscale) if variant.lpl_weight != 0 else None
            objectives = make_objectives(accelerator, variant, family)
            self.terms[title] = lpl, objectives
            decoder = [part for part in family.modules("decoder") if part is not None]
            self.own[title] = [*objectives.modules, *(decoder if uses_decoder(variant) else [])]
        return NO_OBJECTIVES

    def step(self, args, family, model, lpl, batch, max_samples=None, objectives=NO_OBJECTIVES):
        titles = list(self.variants)
        self.current = titles[self.turn % len(titles)]
        if self.current == titles[0]:
            self.batch = batch
        variant, (lpl, objectives) = self.variants[self.current], self.terms[self.current]
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start = self.clock()
        return self.training_step(variant, family, model, lpl, self.batch, variant.lpl_max_samples, objectives)

    def weigh(self, args, lpl, objectives, forward):
        return self.weighted_terms(self.variants[self.current], *self.terms[self.current], forward)

    def log(self, *args):
        log = self.make_log(*args)
        log.is_due, log.step = (lambda step: False), self.end
        return log

    def end(self, *args):
        self.synchronize()
        if self.turn >= len(self.variants):
            self.seconds[self.current].append(self.clock() - self.start)
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - self.bytes_of_others()
                self.peaks[self.current] = max(peak, self.peaks.get(self.current, 0))
        self.turn += 1
        if self.turn == (1 + self.rounds) * len(self.variants):
            raise Over

    def bytes_of_others(self):
        everything = {module for modules in self.own.values() for module in modules}
        return module_bytes(*everything - set(self.own[self.current]))

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def add_weights(folder, device):
    """Random ones in bf16 for the files of `write_model`; one layer for text encoders, as what they say is cached."""
    for part, entry in json.loads((folder / "model_index.json").read_text()).items():
        if part.startswith("text_encoder"):
            model_class = getattr(transformers, entry[1])
            config = model_class.config_class.from_pretrained(folder / part)
            config.num_hidden_layers = 1
        elif part in ("unet", "transformer", "vae"):
            model_class = getattr(diffusers, entry[1], None) or getattr(pipeline_class_conditional, entry[1])
            config = model_class.load_config(folder / part)
        else:
            continue
        with made_in(torch.bfloat16, device):
            made = model_class(config) if part.startswith("text_encoder") else model_class.from_config(config)
        made.save_pretrained(folder / part)


@contextlib.contextmanager
def made_in(dtype, device):
    """New weights have this precision and are there."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def time_steps(name, photos, variants, rounds):
    """The `Turns` of a model: title -> flags are its variants."""
    script = train_lpl_sd if "unet" in PIPELINES[MODELS[name].pipeline] else train_lpl_dit
    with TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), MODELS[name].pipeline)
        add_weights(model, "cuda" if torch.cuda.is_available() else "cpu")
        vae = json.loads((model / "vae" / "config.json").read_text())
        factor, shift = scaling_of(vae)
        network = LatentVGG(vae["latent_channels"], scaling_factor=factor, shift_factor=shift)
        network.save_pretrained(model / "lpips")
        fixed = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--output_dir", folder]
        fixed += [*MODELS[name].flags, "--report_to", "none", "--seed", 0, "--stratified_timesteps"]
        fixed += ["--learning_rate", 1e-9, "--max_train_steps", 10**6, "--lpl_weight", 1]

        def parse(*more):
            network = ["--e_latent_lpips_model", model / "lpips"] if "--e_latent_lpips_weight" in more else []
            return script.parse_args([str(word) for word in (*fixed, *more, *network)])

        turns = Turns(script, {title: parse(*more) for title, more in variants.items()}, rounds)
        turns.run(parse())
    return turns


# The first table: a training step


def steps_table(counts, name, variants, rounds, counted=True):
    """Prints a row for each variant (title -> flags, l2 first) as soon as it is counted.

    rounds: of the times, which are taken before; 0 for none. Returns the `Turns`, or None.
    """
    model, batch = MODELS[name], images_per_step(MODELS[name].flags)
    turns = time_steps(name, counts.photos(name), variants, rounds) if rounds else None
    titles = ["images/s", "l2 = 1", "paper"] if turns else []
    titles += ["GiB, allocated", "l2 = 1"] if turns and turns.peaks else []
    titles += ["GiB, counted", "l2 = 1", "paper", "TFLOP per image", "l2 = 1", "paper's time"] if counted else []
    times = f"; times on {device_name()}, {rounds} rounds" if rounds else ""
    print(f"\nA training step of {name}, batch {batch}, {model.resolution} px{times}\n")
    print_row("", *titles)
    print("|---" * (1 + len(titles)) + "|")
    for title, flags in variants.items():
        cells = measured_cells(turns, title, batch) if turns else []
        if title != COMPILED and counted:
            cells += counted_cells(counts(name, *flags), counts(name, *variants["l2"]), title, batch)
        if cells:
            print_row(title, *cells, *[""] * (len(titles) - len(cells)))
    return turns


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def measured_cells(turns, title, batch):
    """Images per second, and on a GPU the peak that was allocated."""
    paper = f"{PAPER[title][0]:.2f}" if title in PAPER else ""
    if title not in turns.variants:
        return ["out of memory", "", paper, *[""] * (2 * bool(turns.peaks))]
    l2 = "l2" in turns.variants
    cells = [f"{batch / median(turns.seconds[title]):.3g}"]
    cells += [ratio(turns.seconds["l2"], turns.seconds[title]) if l2 else "", paper]
    if turns.peaks:
        cells += [f"{turns.peaks[title] / 2**30:.3g}", f"{turns.peaks[title] / turns.peaks['l2']:.2f}" if l2 else ""]
    return cells


def counted_cells(n, l2, title, batch):
    """Of the numbers of two dry runs: peak and arithmetic."""
    memory = [f"{n['peak'] / 2**30:.3g}", f"{n['peak'] / l2['peak']:.2f}"]
    paper = [f"{PAPER[title][1]:.2f}", f"{1 / PAPER[title][0]:.2f}"] if title in PAPER else ["", ""]
    return [*memory, paper[0], f"{n['flops'] / batch / 1e12:.3g}", f"{n['flops'] / l2['flops']:.2f}", paper[1]]


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"


# The second table: the term alone

TERMS = {  # title -> options of LatentPerceptualLoss
    "LPL": {},
    "LPL, plain autograd": {"chunk_size": 0},
    "LPL, blocks recomputed": {"gradient_checkpointing": True},
    "LPL, no mask": {"mask_outliers": False},
    "LPL, statistics of the target, no mask": {"normalization": "target", "mask_outliers": False},
    "LPL, thresholds from 16,384 positions": {"outlier_positions": 16384},
    "LPL, channels last": {"channels_last": True},
    "LPL, compiled blocks": {"compile_backend": "inductor"},
}
BARE = "bare decoder"
FLOORS = ("SD", "asymmetric x 1.5")  # VAEs of memory.py
COUNTED_AT, ON_A_CPU = (512, 1024), (128,)  # pixels; a GPU is timed where the term is counted


def bare(lpl, z0_hat, z0):
    """The floor: the decoder forward on both latents and back to one, as autograd does it, with nothing compared."""
    with torch.no_grad():
        lpl.features(z0)
    phis = lpl.features(z0_hat.requires_grad_())
    torch.autograd.grad(phis, z0_hat, [phi.detach() for phi in phis])


def whole(lpl, z0_hat, z0):
    lpl(z0_hat.requires_grad_(), z0)[0].sum().backward()


def make_term(vae_name, dtype, resolution, device, title, options):
    """A function that runs one sample of the term `title`, or of the bare decoder."""
    with made_in(dtype, device):
        vae = memory.VAES[vae_name]()
    lpl = LatentPerceptualLoss(vae, **({"chunk_size": 0} if title == BARE else options))
    side = resolution // getattr(vae, "spatial_compression_ratio", 8)
    z0, z0_hat = torch.randn(2, 1, vae.config.latent_channels, side, side, device=device)
    run = bare if title == BARE else whole
    return lambda: run(lpl, z0_hat.clone(), z0)


def count_term(*setting):
    """Peak bytes beyond the weights and FLOPs of a term as `make_term` takes it, without device."""
    *setting, title, options = setting
    with FakeTensorMode():
        term = make_term(*setting, "cpu", title, options)
        with LiveBytes() as live:
            term()
        return live.peak, count_flops(term)


def floor_table(vae_name, dtype, counted_at, timed_at, rounds, terms):
    """Prints what one sample of each term (title -> options) needs beside the bare decoder.

    counted_at, timed_at: resolutions; rounds: of the times.

    Returns: of LPL, bare decoder = 1: the FLOPs at each resolution, and the times, a list of the rounds for each.
    """
    terms = {BARE: {}, **terms}
    arithmetic, times = [], []
    heads, rows = [""], {title: [title] for title in terms}
    for resolution in counted_at:
        # What is compiled is not counted.
        counts = {
            title: count_term(vae_name, dtype, resolution, title, options)
            for title, options in terms.items()
            if "compile_backend" not in options
        }
        heads += [f"{resolution} px: GiB", f"{BARE} = 1", "TFLOP", f"{BARE} = 1"]
        for title, row in rows.items():
            pairs = zip(counts.get(title, ()), counts[BARE], (2**30, 1e12))
            cells = [cell for n, least, unit in pairs for cell in (f"{n / unit:.3g}", f"{n / least:.2f}")]
            row += cells or [""] * 4
        arithmetic.append(counts["LPL"][1] / counts[BARE][1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for resolution in timed_at if rounds else ():
        made = {title: make_term(vae_name, dtype, resolution, device, title, o) for title, o in terms.items()}
        seconds = take_turns({title: synchronized(term) for title, term in made.items() if fits(term)}, rounds)
        heads += [f"{resolution} px: ms", f"{BARE} = 1"]
        for title, row in rows.items():
            row.append(f"{1000 * median(seconds[title]):.0f}" if title in seconds else "out of memory")
            row.append(ratio(seconds[title], seconds[BARE]) if {title, BARE} <= seconds.keys() else "")
        if {"LPL", BARE} <= seconds.keys():
            times.append([a / b for a, b in zip(seconds["LPL"], seconds[BARE])])
    how = f"; times on {device_name()}, {rounds} rounds" if times else ""
    print_table(f"A sample of LPL, {vae_name} VAE, {str(dtype).removeprefix('torch.')}{how}", heads, *rows.values())
    return arithmetic, times


def fits(term):
    try:
        term()
    except torch.OutOfMemoryError:
        return False
    return True


def synchronized(term):
    def run():
        term()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


# The third table: Algorithm 1 alone


def mask_table(side, rounds, channels=128):
    """Prints what a mask costs whose thresholds come from fewer positions, and how many positions it calls otherwise.

    The maps `[1, channels, side, side]` are smooth noise with heavy tails.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, channels, side, side, generator=generator) ** 3
    features = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1).to(device)
    variants = {n: synchronized(lambda n=n: outlier_mask(features, 1, side, n)) for n in (None, 65536, 16384, 4096)}
    seconds = take_turns(variants, rounds)
    every = outlier_mask(features, 1, side)
    rows = [("positions", "ms", "all = 1", "masked", "masked otherwise than with all")]
    for n, times in seconds.items():
        mask = outlier_mask(features, 1, side, n)
        shares = (f"{share.double().mean().item():.3%}" for share in (~mask, mask != every))
        rows.append((n or "all", f"{1000 * median(times):.0f}", ratio(times, seconds[None]), *shares))
    print_table(f"Masks of {channels} maps of {side} x {side} on {device_name()}, {rounds} rounds", *rows)


# The bars


def bars_table(counts, floors, measured):
    """floors: VAE and precision -> what `floor_table` has returned; measured: model -> `Turns`."""
    flags = {name: variants_of(model) for name, model in MODELS.items()}

    def over_l2(name, title, what):
        return counts(name, *flags[name][title])[what] / counts(name, *flags[name]["l2"])[what]

    rows = [("bar", "here", "met")]

    def bar(text, value, most, unit=""):
        rows.append((f"{text}: at most {most:g}{unit}", f"{value:.3f}{unit}", "yes" if value <= most else "no"))

    bar("MM-DiT at 512 px, batch 16: peak, l2 = 1", over_l2("mmdit", STREAMED, "peak"), 1.06)
    for batch in (1, 4):
        peak, _ = memory.measure("SD", 1024, batch)
        bar(f"LPL alone, SD's VAE at 1024 px, batch {batch}", peak / 2**30, 8, " GiB")
    for batch in (2, 16):
        n, l2 = (counts("sdxl", *more, "--train_batch_size", batch) for more in ([], flags["sdxl"]["l2"]))
        bar(f"SDXL at 1024 px, batch {batch}: LPL adds", (n["peak"] - l2["peak"]) / 2**30, 8, " GiB")
    for title, (arithmetic, times) in floors.items():
        bar(f"LPL alone, {title}: arithmetic, {BARE} = 1", max(arithmetic), 1.25)
        for found in times:
            bar(f"LPL alone, {title}: time, {BARE} = 1", median(found), 1.25)
    for name in ("sdxl", "mmdit-sdxl-vae"):
        bar(f"{name}, {EIGHTH}: arithmetic, l2 = 1", over_l2(name, EIGHTH, "flops"), 1.25)
        if name in measured and {EIGHTH, "l2"} <= measured[name].variants.keys():
            seconds = measured[name].seconds
            bar(f"{name}, {EIGHTH}: time, l2 = 1", median(a / b for a, b in zip(seconds[EIGHTH], seconds["l2"])), 1.25)
    print_table("Bars", *rows)


TABLES = ("steps", "floor", "masks", "bars")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    titles = list(variants_of(MODELS["small"]))
    add("--variants", nargs="+", choices=titles, default=titles, metavar="TITLE", help="; ".join(titles))
    add("--tables", nargs="+", choices=TABLES, default=TABLES)
    add("--rounds", type=int, default=5, help="in which the variants take turns; 0: nothing is timed")
    add("--no_count", action="store_true", help="times alone; without the bars")
    add("--output", help="a file for the tables, which are printed else")
    return parser.parse_args(words)


def main(words=None):
    args = parse_args(words)
    gpu = torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        if args.output:
            file = stack.enter_context(open(args.output, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        counts = Counts(Path(stack.enter_context(TemporaryDirectory())))
        floors, measured = {}, {}
        for name in args.models if "steps" in args.tables else ():
            flags = variants_of(MODELS[name])
            chosen = {title: flags[title] for title in flags if title in ("l2", *args.variants)}
            turns = steps_table(counts, name, chosen, args.rounds * (gpu or name == "small"), not args.no_count)
            measured |= {name: turns} if turns else {}
        for vae in FLOORS if "floor" in args.tables else ():
            for precision, dtype in DTYPES.items():
                rounds = args.rounds * (gpu or precision == "fp32")  # on a CPU, convolutions in bf16 take far longer
                sides = () if args.no_count else COUNTED_AT, COUNTED_AT if gpu else ON_A_CPU
                floors[f"{vae} VAE, {precision}"] = floor_table(vae, dtype, *sides, rounds, TERMS)
        if "masks" in args.tables and args.rounds:
            mask_table(512, args.rounds)
        if "bars" in args.tables and not args.no_count:
            bars_table(counts, floors, measured)


if __name__ == "__main__":
    main()
