"""How often the 95 % intervals of a difference between two models hold the true one.

    python benchmarks/intervals.py

Two "models" whose features are Gaussian and share much of their noise, as paired samples do, are evaluated many times
over with new noise. The true difference is the mean over all of these. Prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import metrics


DIM, REFERENCE, K = 8, 400, 5


def draw(num_samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of two models [N, DIM] each; the second has a little noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = (torch.randn(num_samples, DIM, generator=generator) for _ in range(2))
    return 1.1 * shared + 0.2, 1.05 * (0.95 * shared + 0.3 * own) + 0.1


def evaluate(features, reference, subsets):
    scores = {
        "frechet_distance": metrics.frechet_distances(features, metrics.moments(reference), subsets),
        "kernel_distance": metrics.kernel_distances(features, reference, subsets),
    }
    return scores | metrics.precision_recall_density_coverage(features, reference, subsets, K)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the intervals.")
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--half_samples", type=int, default=100)
    args = parser.parse_args()
    reference = torch.randn(REFERENCE, DIM, generator=torch.Generator().manual_seed(0))
    print("| samples | metric | intervals that hold the true difference | their width over what it should be |")
    print("|---|---|---|---|")
    for count in (50, 200, 800):
        found = []
        for seed in range(1, args.repetitions + 1):
            subsets = metrics.half_samples(count, args.half_samples, seed)
            first, second = (evaluate(features, reference, subsets) for features in draw(count, seed))
            found.append({name: metrics.difference(first[name], second[name], count) for name in first})
        for name in found[0]:
            values = torch.tensor([row[name]["difference"] for row in found])
            low, high = torch.tensor([row[name]["interval"] for row in found]).T
            held = ((low <= values.mean()) & (values.mean() <= high)).double().mean()
            width = (high - low).mean() / (2 * 1.96 * values.std())
            print(f"| {count} | {name} | {held:.0%} | {width:.2f} |", flush=True)


if __name__ == "__main__":
    main()
