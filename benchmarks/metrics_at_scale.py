"""Measure what the distances of two sets of features cost at the size of a paper's evaluation.

    OMP_NUM_THREADS=2 python benchmarks/metrics_at_scale.py

Each metric runs for the full set and random halves of it, in a process of its own, on random features that spread
mostly in 64 dimensions, as real ones do in few. Prints a Markdown table of seconds and of the peak memory: resident
for a process on the CPU, with its two sets of features and the libraries; allocated on the GPU with --device cuda.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))
from metrics import (  # noqa: E402
    frechet_distances,
    half_samples,
    kernel_distances,
    moments,
    precision_recall_density_coverage,
)


METRICS = {
    "precision, recall, density, coverage": precision_recall_density_coverage,
    "kernel distance": kernel_distances,
    "Frechet distance": lambda x, y, *args, **kwargs: frechet_distances(x, moments(y), *args, **kwargs),
}


def measure(name, samples, dim, halves, device):
    """Seconds and peak bytes of a metric; to be run in a fresh process."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, dim, generator=generator)
    x, y = (torch.randn(samples, dim, generator=generator) for _ in range(2))
    for features in (x, y):
        features.addmm_(torch.randn(samples, 64, generator=generator), spread)
    subsets = half_samples(samples, halves, seed=0)
    start = time.perf_counter()
    METRICS[name](x, y, subsets, device=device)
    seconds = time.perf_counter() - start
    if torch.device(device).type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50000, help="of each of the two sets")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    args = parser.parse_args()
    print(
        f"| {args.samples:,} x {args.samples:,} x {args.dim:,}, {args.halves} halves | seconds | GiB |\n|---|---|---|"
    )
    for name in args.metrics:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(measure, (name, args.samples, args.dim, args.halves, args.device))
        print(f"| {name} | {seconds:.0f} | {peak / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
