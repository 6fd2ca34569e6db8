"""The paper's ablations on the small reproduction: grids of one setting each, with several seeds.

    python benchmarks/ablations.py --jobs 2
    python benchmarks/ablations.py --grid gate weight --seeds 5 --jobs 2

Everything but the setting is as in benchmarks/reproduce.py, which the runs are shared with: what is there is not
trained again. A plot is in the shape of the paper's figure; its units are ours.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parent))
import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402
from reproduce import (  # noqa: E402
    DRAWN,
    FEW,
    L2,
    METRICS,
    MORE,
    PAPER,
    Experiment,
    add_run_arguments,
    change,
    complete,
    heading,
    shown,
    t_interval,
    table,
    values,
)
from reproduction_models import WIDTHS  # noqa: E402

from evaluation_report import COLORS, LOOK, save_figure  # noqa: E402


LPL = ""  # no flags: the defaults
OBJECTIVES = [arm for arm in MORE if not arm.startswith("LPL")]
# FID of the paper at 512 pixels, where l2 has 4.88
PAPERS = {arm: fid for rows in PAPER.values() for *_, arm, _, l2, fid in rows if arm and l2 == 4.88}
COMPARED = [arm for arm in OBJECTIVES if arm.startswith(("self-perceptual", "E-LatentLPIPS"))]  # in Table 5
PLOTTED = ("frechet_distance", "frechet_distance_reconstructed", "spectrum_error")
DRAWN_METRICS = (*PLOTTED, "frechet_distance_random", "frechet_distance_reconstructed_random", "recall")


class Grid(NamedTuple):
    """One setting. rows: its values, numbers if there is a plot -> flags of train_lpl_dit.py, or a name of DRAWN."""

    title: str
    rows: dict
    metrics: tuple = ()  # to plot, if any
    axis: str = "linear"  # of the values, as matplotlib calls it
    disks: bool = False  # whose area is a step's time
    baselines: dict = {}  # value -> flags of what it is compared with, if that is not l2
    papers: dict = {}  # value -> FID, of PAPERS


def of(flag, numbers, default):
    """Value -> flags; the default's are those of LPL itself, which is trained once for all grids."""
    return {number: LPL if number == default else f"--{flag} {number}" for number in numbers}


def make_grids(steps, ema_decay, max_samples, num_blocks):
    """Name -> Grid; what depends on the size of the experiment is in proportion to these, its defaults."""
    reached = round(min(ema_decay, steps / (steps + 9)), 3)  # as the average warms up
    decays = [round(1 - 1 / max(2, steps * share), 3) for share in (0.008, 0.02, 0.04, 0.08)] + [reached]
    most = [max(1, round(max_samples * share)) for share in (1 / 4, 1 / 2, 1, 2, 4)]
    starts = [0, steps // 2, steps]
    longer = {start: f"--max_train_steps {steps + start}" for start in starts}
    guided = {arm: f"{arm}, guidance 2" for arm in ("LPL", *COMPARED, "l2, latents x 1.1")}
    fig_6 = ("frechet_distance", "coverage", "density", "precision", "recall")
    return {
        "num_blocks": Grid(
            "Fig. 7: blocks of the decoder that are compared, the mid block being the first",
            {0: L2, **{1 + n: f"--lpl_num_blocks {n}" for n in range(num_blocks)}, 1 + num_blocks: LPL},
            PLOTTED,
            disks=True,
        ),
        "normalization": Grid(
            "Sec. 4.3: normalisation of the features",
            {
                "shared": LPL,
                "target": "--lpl_normalization target",
                "separate": MORE["LPL, separate"],
                "channel_l2": "--lpl_normalization channel_l2",
            },
            papers={"shared": PAPERS["LPL"], "separate": PAPERS["LPL, separate"]},
        ),
        "weighting": Grid(
            "Sec. 4.3: weights of the blocks",
            {"inverse": LPL, **{name: f"--lpl_weighting {name}" for name in ("exponential", "uniform", "balanced")}},
            papers={"inverse": PAPERS["LPL"], "uniform": PAPERS["LPL, uniform"]},
        ),
        "gate": Grid("Fig. 6: threshold", of("lpl_sigma_threshold", (0.577, 1, 3, 6, 20), 3), fig_6, axis="log"),
        "weight": Grid("Fig. 9: share of the loss", of("lpl_target_share", (0.05, 0.1, 0.2, 0.35, 0.5), 0.2), PLOTTED),
        "detach": Grid(
            "Gradient through the statistics",
            {
                "shared, detached": LPL,
                "shared": "--no-lpl_detach_stats",
                "separate, detached": f"{MORE['LPL, separate']} --lpl_detach_stats",
                "separate": MORE["LPL, separate"],
            },
        ),
        "outliers": Grid(
            "Algorithm 1: whose features are searched for outliers",
            {
                "prediction": LPL,
                "target": "--lpl_outlier_source target",
                "union": "--lpl_outlier_source union",
                "no mask": "--no-lpl_outlier_mask",
            },
        ),
        "ema_decay": Grid(
            "Fig. 10: decay of the average weights at the end, LPL and l2",
            of("ema_decay", decays, reached),
            PLOTTED,
            axis="logit",
            baselines={decay: f"{L2} --ema_decay {decay}" if decay != reached else L2 for decay in decays},
        ),
        "max_samples": Grid(
            "Samples of a batch that are decoded",
            of("lpl_max_samples", most, max_samples),
            PLOTTED,
            axis="log",
            disks=True,
        ),
        "mid_block": Grid(
            "The mid block alone, with as many and with 4 times as many samples",
            {
                f"all blocks, {max_samples}": LPL,
                f"mid block, {max_samples}": "--lpl_num_blocks 0",
                f"all blocks, {most[-1]}": f"--lpl_max_samples {most[-1]}",
                f"mid block, {most[-1]}": f"--lpl_num_blocks 0 --lpl_max_samples {most[-1]}",
            },
        ),
        "start": Grid(
            "Table 4: steps of l2 alone before LPL, against as many of l2",
            {start: f"{flags} --lpl_start_step {start}" if start else LPL for start, flags in longer.items()},
            PLOTTED,
            baselines={start: f"{L2} {flags}" if start else L2 for start, flags in longer.items()},
        ),
        "contrast": Grid(
            "Latents of the samples times a factor before decoding, those of LPL and of l2",
            {1: LPL, **{factor: f"LPL, latents x {factor}" for factor in (1.1, 1.2, 1.3)}},
            DRAWN_METRICS,
            baselines={1: L2, **{factor: f"l2, latents x {factor}" for factor in (1.1, 1.2, 1.3)}},
        ),
        "guidance": Grid(
            "Classifier-free guidance of the samples of LPL and of l2, the paper's being 2",
            {1: LPL, **{scale: f"LPL, guidance {scale}" for scale in (1.5, 2, 3)}},
            DRAWN_METRICS,
            baselines={1: L2, **{scale: f"l2, guidance {scale}" for scale in (1.5, 2, 3)}},
        ),
        "objectives": Grid(
            "Tables 5 and 6: other objectives",
            {
                "LPL": LPL,
                "self-perceptual alone": f"{L2} --l2_weight 0 --self_perceptual_weight 1",
                "l2 on noise and z0": FEW["l2 on noise and z0"],
                **{name: MORE[name] for name in OBJECTIVES},
            },
            papers=PAPERS,
        ),
        "objectives_guided": Grid(
            "Table 5 with its guidance of 2, of l2 as well",
            guided,
            baselines=dict.fromkeys(guided, "l2, guidance 2"),
            papers=PAPERS,
        ),
    }


def flags_of(grid):
    """All that a grid needs, l2 first."""
    return [L2, *grid.rows.values(), *grid.baselines.values()]


def baseline(grid, value):
    return grid.baselines.get(value, L2)


def seconds(experiment, flags):
    """`t_interval` of what a step takes, relative to one of l2 with the same seed."""
    per_step = experiment.seconds_per_step
    return t_interval([per_step(flags, seed) / per_step(L2, seed) for seed in experiment.seeds])


def grid_table(experiment, grid, reports):
    """A row for each value: the distance, and the changes against its baseline."""
    head = ["", "FD", *(f"{name}, change" for name in METRICS.values()), "seconds per step, l2 = 1"]
    head += ["the paper's FID, change"] if grid.papers else []
    rows = []
    for value, flags in grid.rows.items():
        cells = [shown(t_interval(values(reports[flags], "frechet_distance")))]
        for name, title in METRICS.items():
            pair = [values(reports[which], name) for which in (flags, baseline(grid, value))]
            relative = "nats" not in title
            cells.append(shown(change(*pair, relative), "+", " %" if relative else ""))
        cells.append(shown(seconds(experiment, flags)))
        if grid.papers:
            cells.append(f"{100 * (grid.papers[value] / 4.88 - 1):+.0f} %" if value in grid.papers else "")
        rows.append([value, *cells])
    return table(head, rows)


def draw_grid(experiment, grid, reports, path):
    """A panel for each metric: means, with the intervals of the changes against the baseline, which is drawn too."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(3.2 * len(grid.metrics) + 1, 3), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(grid.metrics), squeeze=False)[0], grid.metrics):
            means, reaches, base = zip(*(changes(grid, value, reports, name) for value in grid.rows))
            bars = None if None in reaches else reaches
            axis.plot(list(grid.rows), base, color=COLORS[0], linestyle="--", label="l2")
            axis.errorbar(list(grid.rows), means, bars, color=COLORS[1], marker="o", ms=3, capsize=2, label="LPL")
            if grid.disks:
                areas = [60 * seconds(experiment, flags)[0] for flags in grid.rows.values()]
                axis.scatter(list(grid.rows), means, areas, color=COLORS[1], alpha=0.3, linewidth=0)
            axis.set_xscale(grid.axis)
            axis.set_xticks(list(grid.rows), [f"{value:g}" for value in grid.rows], fontsize=7)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_title(METRICS[name], fontsize=10)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        figure.supxlabel(grid.title, fontsize=9)
        save_figure(figure, path)


def changes(grid, value, reports, name):
    """Mean, half-width of the change's interval, and mean of the baseline."""
    ours, theirs = (values(reports[flags], name) for flags in (grid.rows[value], baseline(grid, value)))
    return mean(ours), change(ours, theirs, relative=False)[1], mean(theirs)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    grids = make_grids(args.steps, args.ema_decay, args.lpl_max_samples, len(WIDTHS[args.size]))
    parts = [heading(argv)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for prediction_type in args.prediction_types:
        needed = {flags: DRAWN.get(flags, flags) for name in args.grid for flags in flags_of(grids[name])}
        experiment = Experiment(args, prediction_type, needed)
        experiment.run()
        reports = experiment.reports()
        parts += [f"## {prediction_type}, {args.seeds} seeds"]
        for name in args.grid:
            parts += [f"### {name}", f"{grids[name].title}.", grid_table(experiment, grids[name], reports)]
            if grids[name].metrics:
                picture = args.output.with_name(f"{args.output.stem}-{prediction_type}-{name}.png")
                draw_grid(experiment, grids[name], reports, picture)
                parts += [f"![{name}]({picture.name})"]
    args.output.write_text("\n\n".join(parts) + "\n")
    print(args.output.read_text() + f"\nSee {args.output}.")


def parse_args(argv=None):
    names = make_grids(1, 0.5, 1, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--grid", nargs="+", choices=names, default=list(names), help="which; by default all")
    return complete(parser.parse_args(argv), parser, "ablations")


if __name__ == "__main__":
    main()
