"""Measure how training scales: two processes of each engine against one, and LPL's work over many. No GPU needed.

    python benchmarks/scaling.py --output scaling.md

The training script runs as its users start it, with the repository's accelerate configs, on a random transformer of
some ten MB. Machines are noisy, so the engines take turns and a ratio is taken within each round: printed are medians,
and in brackets the lowest and highest. What is counted is exact: the bytes of a process's own tensors after a step,
and the most that are alive during one. How LPL's work is spread needs no model, only the noise levels that are drawn.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
from data import print_table  # noqa: E402
from tiny_models import build_photo_folder  # noqa: E402
from tiny_transformers import build_tiny_pipeline  # noqa: E402

from counters import LiveBytes  # noqa: E402


ENGINES = {  # the accelerate config, and how many processes
    "1 process": ("single_gpu", 1),
    "DDP": ("ddp", 2),
    "FSDP2": ("fsdp2_full", 2),
    "ZeRO-2": ("zero2", 2),
    "ZeRO-3, offload": ("zero3_offload", 2),
}
WARM_UP = 2  # steps that are not timed


# Two processes of each engine


def build_model(folder, width=256, layers=4):
    """A random SD3.5 of 9.5 million parameters, most of them in matrices that ZeRO-3 shards (more than 1e5 values)."""
    sizes = {"num_layers": layers, "num_attention_heads": 4, "attention_head_dim": width // 4}
    return build_tiny_pipeline(folder, "StableDiffusion3", **sizes, caption_projection_dim=width)


def launch(engine, folder, flags, precision="no", script="train_lpl_dit", processes=None):
    """Runs a training script and returns, for each rank, what `work` reports.

    Raises:
        RuntimeError: it failed; the text is the end of what it has written.
    """
    config, usual = ENGINES[engine]
    processes = processes or usual
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        processes,
        "--main_process_port",
        0,
    ]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--mixed_precision", precision]
    command += [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "FSDP2" else []
    reports = Path(folder, "reports")
    reports.mkdir(parents=True)
    command += [__file__, "--work", reports, script, *flags, "--output_dir", Path(folder, "out")]
    on_cpu = {"DS_ACCELERATOR": "cpu"} if engine.startswith("ZeRO") else {"ACCELERATE_USE_CPU": "true"}
    on_cpu = {} if engine == "FSDP2" else on_cpu
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **on_cpu}
    run = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    found = [json.loads(path.read_text()) for path in sorted(reports.iterdir())]
    if run.returncode or len(found) != processes:
        raise RuntimeError(
            f"{engine}: {len(found)} of {processes} processes have come to an end\n{run.stderr[-3000:]}"
        )
    return found


def work(reports, script, flags):
    """Runs a training script in this process and writes to `reports`, a folder, what it found, for its rank.

    `seconds` of each step but for the first and the last; bytes held after the last but one: `weights`, `optimizer`
    (its state, and float32 weights of its own), `ema`, and `others`; `peak`, the most bytes alive in the last.
    """
    module = importlib.import_module(script)
    args = module.parse_args(flags)
    there, found = {}, {"seconds": []}

    def look(accelerator, args, weights, ema, *more):
        there.update(weights=weights, ema=ema)
        return checkpoints(accelerator, args, weights, ema, *more)

    class MeasuringLog(module.Log):
        def step(self, step, *more):
            now = time.perf_counter()
            if 1 < step < args.max_train_steps:
                found["seconds"].append(now - self.before)
            if step == args.max_train_steps:
                self.memory.__exit__(None, None, None)
                found["peak"] = (
                    sum(found[name] for name in ("weights", "optimizer", "ema", "others")) + self.memory.peak
                )
            super().step(step, *more)
            if step == args.max_train_steps - 1:
                found.update(held(**there))
                self.memory = RankBytes()
                self.memory.__enter__()
            self.before = time.perf_counter()

    checkpoints, module.Checkpoints, module.Log = module.Checkpoints, look, MeasuringLog
    module.main(args)
    found["rank"] = int(os.environ.get("RANK", 0))
    Path(reports, f"{found['rank']}.json").write_text(json.dumps(found))


def held(weights, ema):
    """Bytes of the tensors of this process, each storage once, by whose they are."""
    gc.collect()
    optimizer = weights.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    state = [value for values in optimizer.state.values() for value in values.values()]
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    model = weights.family.model
    parameters = list(model.parameters())
    partitions = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    owners = {"weights": [*parameters, *partitions, *model.buffers()], "optimizer": [*moved, *state]}
    owners["optimizer"] += weights.masters
    owners |= {"ema": ema.shadow_params if ema is not None else []}
    owners |= {"others": [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]}
    found, known = {}, set()
    for name, tensors in owners.items():
        mine = storages(tensors)
        found[name] = sum(storage.nbytes() for key, storage in mine.items() if key not in known)
        known |= mine.keys()
    return found


def storages(tensors):
    """Address -> storage with memory of this process: of DTensors, that of the local part."""
    local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in local)
    found = {storage.data_ptr(): storage for storage in storages if storage.device.type != "meta"}  # nor fake ones
    return {address: storage for address, storage in found.items() if address}


class RankBytes(LiveBytes):
    """Counts also what FSDP2 does to storages that it keeps: it frees and fills them by resizing."""

    @staticmethod
    def _storages(tree):
        leaves = torch.utils._pytree.tree_iter(tree)
        local = (getattr(leaf, "_local_tensor", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        return [tensor.untyped_storage() for tensor in local]

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_

        def resize(storage, size):
            before = storage.nbytes()
            result = self._resize(storage, size)
            self.live += storage.nbytes() - before
            self.peak = max(self.peak, self.live)
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        del torch.UntypedStorage.resize_  # the inherited one is there again
        return super().__exit__(*error)


def measure_engines(folder, rounds, steps, engines=ENGINES):
    photos, model = build_photo_folder(folder / "photos", n=16, size=72), build_model(folder / "model")
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--report_to", "none", "--use_ema"]
    flags += ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", WARM_UP + steps + 1, "--seed", 0]
    flags += ["--lpl_weight", 1, "--max_sequence_length", 16]
    found = {engine: [] for engine in engines}
    for round in range(rounds):
        for engine in engines:
            found[engine].append(launch(engine, folder / f"{engine} {round}", flags))
            print(f"round {round + 1}, {engine}", file=sys.stderr, flush=True)
    seconds = {
        engine: [
            median(max(times) for times in zip(*(rank["seconds"][WARM_UP - 1 :] for rank in ranks))) for ranks in runs
        ]
        for engine, runs in found.items()
    }
    alone = next(iter(engines))
    rows = [("", "processes", "ms per step", f"step, {alone} = 1", f"samples/s, {alone} = 1")]
    for engine, times in seconds.items():
        processes = len(found[engine][0])
        ratios = [a / b for a, b in zip(times, seconds[alone])]
        speed = [processes / r for r in ratios]
        spans = [f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (ratios, speed)]
        rows.append((engine, processes, f"{1000 * median(times):.0f}", *spans))
    print_table(f"Time of a step, 2 samples of 64 pixels on each process; {steps} steps, {rounds} rounds", *rows)

    rows = [("", "weights", "optimizer", "average", "sum", "sum, 1 process = 1", "peak of a step beyond what stays")]
    total = {engine: max(sum(rank[n] for n in OWN) for rank in runs[0]) for engine, runs in found.items()}
    for engine, runs in found.items():
        rank = max(runs[0], key=lambda rank: sum(rank[name] for name in OWN))
        numbers = [*(rank[name] for name in OWN), total[engine]]
        beyond = max(rank["peak"] - sum(rank[name] for name in (*OWN, "others")) for rank in runs[0])
        ratio = f"{total[engine] / total[alone]:.3f}"
        rows.append((engine, *(f"{n / 2**20:.1f}" for n in numbers), ratio, f"{beyond / 2**20:.1f}"))
    print_table("MiB that the fullest process holds of what is trained, in float32", *rows)


OWN = ("weights", "optimizer", "ema")


# LPL's work over the ranks


def schedule(resolution):
    """A family without a model, with Stable Diffusion's noise levels, and `[T]` bool: which of them LPL sees."""
    from diffusers import DDIMScheduler

    from arguments import Parser, add_diffusion_arguments, add_lpl_arguments
    from family import Family
    from loss_terms import lpl_threshold
    from lpl_utils import sigma_gate
    from noise import new_scheduler

    parser = Parser("")
    add_diffusion_arguments(parser)
    add_lpl_arguments(parser)
    family = Family.__new__(Family)
    family.args = parser.parse_args([])
    family.args.resolution, family.args.prediction_type = resolution, "epsilon"
    family._set_noise_levels(DDIMScheduler.from_config(new_scheduler(family.args).config))
    return family, sigma_gate(family.alphas, family.sigmas, lpl_threshold(family.args))


def decoded_by_ranks(family, seen, processes, batch, steps, stratified, seed=0):
    """How many samples each process decodes in each step, `[steps, processes]`, as the training scripts draw them."""
    from noise import stratified_quantiles
    from train_utils import sample_generators

    decoded = np.zeros((steps, processes))
    for step in range(steps):
        for rank in range(processes):
            first = (step * processes + rank) * batch
            generators = sample_generators(seed, range(first, first + batch), purpose=0)
            quantiles = stratified_quantiles(seed, step, batch, processes, rank) if stratified else ()
            decoded[step, rank] = seen[family.sample_timesteps(generators, quantiles)].sum()
    return decoded


def imbalance(decoded):
    """How much longer all wait for the process that decodes most than if each decoded as many: 0 is none."""
    return decoded.max(1).sum() / decoded.mean(1).sum() - 1


def measure_balance(samples, resolution=512):
    family, seen = schedule(resolution)
    share = seen.double().mean().item()
    rows = [("processes", "batch", "decoded by each on average", "most decoded / mean - 1", "--stratified_timesteps")]
    for processes in (2, 8, 64):
        for batch in (1, 4, 16):
            steps = max(20, samples // (processes * batch))
            found = [decoded_by_ranks(family, seen, processes, batch, steps, flag) for flag in (False, True)]
            extra = [f"{imbalance(decoded):.1%}" for decoded in found]
            rows.append((processes, batch, f"{batch * share:.2f}", *extra))
    print_table(f"LPL's work over the processes; it sees {share:.1%} of the samples at {resolution} pixels", *rows)


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", help="a file for the tables, which are printed else")
    add("--rounds", type=int, default=3, help="in which the engines take turns")
    add("--steps", type=int, default=6, help="that are timed in a round")
    add("--samples", type=int, default=40_000, help="noise levels drawn for each row of LPL's balance")
    add("--engines", nargs="*", choices=ENGINES, default=list(ENGINES), help="the first is what the others are set to")
    add("--work", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words=None):
    args = parse_args(words)
    if args.work:
        reports, script, *flags = args.work
        return work(reports, script, flags)
    with contextlib.ExitStack() as stack:
        if args.output:
            file = stack.enter_context(open(args.output, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if args.engines:
            measure_engines(folder, args.rounds, args.steps, args.engines)
        measure_balance(args.samples)


if __name__ == "__main__":
    main()
