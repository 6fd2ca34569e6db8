"""benchmarks/ablations.py compares each value of a setting with its baseline. (test_benchmarks_reproduce runs it.)"""

import ablations
import pytest
import torch
from ablations import Grid, draw_grid, flags_of, grid_table, make_grids
from diffusers.training_utils import EMAModel
from PIL import Image
from reproduce import DRAWN, L2, METRICS, Drawn


GRIDS = make_grids(300, 0.99, 8, 3)


class Measured:
    """An experiment whose scores and times are known: by flags, of two seeds."""

    seeds = range(2)

    def __init__(self, distances):
        self.distances = distances

    def reports(self):
        return {flags: [self.report(d) for d in pair] for flags, pair in self.distances.items()}

    def report(self, distance):
        return {"models": [{"metrics": dict.fromkeys(METRICS, 1.0) | {"frechet_distance": distance}}]}

    def seconds_per_step(self, flags, seed):
        return 1.0 if flags.startswith(L2) else 3.0


def rows_of(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}


def test_each_value_is_compared_with_its_own_baseline():
    grid = GRIDS["start"]
    distances = {flags: (10.0, 10.0) for flags in flags_of(grid)}
    distances[grid.rows[300]] = (8.0, 8.0)
    distances[grid.baselines[300]] = (16.0, 16.0)
    measured = Measured(distances)
    rows = rows_of(grid_table(measured, grid, measured.reports()))
    assert rows.keys() == {"0", "150", "300"}
    assert (rows["300"]["FD"], rows["300"]["FD, change"]) == ("8 ± 0", "**-50 ± 0 %**")
    assert (rows["150"]["FD"], rows["150"]["FD, change"]) == ("10 ± 0", "+0 ± 0 %")
    assert rows["300"]["seconds per step, l2 = 1"] == "3 ± 0"


def test_the_papers_change_is_beside():
    grid = GRIDS["weighting"]
    measured = Measured({flags: (10.0, 12.0) for flags in flags_of(grid)})
    rows = rows_of(grid_table(measured, grid, measured.reports()))
    paper = {value: row["the paper's FID, change"] for value, row in rows.items()}
    assert paper == {"inverse": "-22 %", "uniform": "-10 %", "exponential": "", "balanced": ""}  # 3.79, 4.38 of 4.88


def test_start_trains_as_long_after_l2_as_without():
    grid = GRIDS["start"]
    assert grid.rows[150] == "--max_train_steps 450 --lpl_start_step 150"
    assert grid.baselines[150] == f"{L2} --max_train_steps 450"
    assert (grid.rows[0], grid.baselines[0]) == ("", L2)


def test_with_guidance_all_are_compared_with_l2_that_has_it():
    guidance, objectives = GRIDS["guidance"], GRIDS["objectives_guided"]
    for scale in (1.5, 2, 3):
        assert DRAWN[guidance.rows[scale]] == Drawn("", guidance_scale=scale)
        assert DRAWN[guidance.baselines[scale]] == Drawn(L2, guidance_scale=scale)
    for arm, row in objectives.rows.items():
        assert DRAWN[row].guidance_scale == 2
        assert DRAWN[objectives.baselines[arm]] == Drawn(L2, guidance_scale=2)


def test_the_default_is_trained_once_for_all_grids():
    for name, grid in GRIDS.items():
        default = "LPL, guidance 2" if name == "objectives_guided" else ""
        assert default in grid.rows.values(), name
        assert len(set(grid.rows.values())) == len(grid.rows), name
    assert list(GRIDS["num_blocks"].rows.items())[0] == (0, L2)


@pytest.mark.parametrize("steps, ema_decay", [(250, 0.99), (250, 0.96), (3000, 0.999)])
def test_the_decays_are_reached_in_these_steps(steps, ema_decay):
    average = EMAModel([torch.nn.Parameter(torch.zeros(1))], ema_decay)
    decays = list(make_grids(steps, ema_decay, 8, 3)["ema_decay"].rows)
    assert decays == sorted(decays) and len(set(decays)) == 5
    assert decays[-1] == pytest.approx(average.get_decay(steps), abs=5e-4)


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.metrics])
def test_plots(name, tmp_path):
    grid = GRIDS[name]
    measured = Measured({flags: (8.0 + i, 9.0 + i) for i, flags in enumerate(flags_of(grid))})
    draw_grid(measured, grid, measured.reports(), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 300 * len(grid.metrics) and len(image.getcolors(2**24)) > 50


def test_a_plot_shows_the_interval_of_the_change():
    grid = Grid("", {1: "--flag 1"})
    reports = Measured({L2: (10.0, 20.0), "--flag 1": (11.0, 21.0)}).reports()
    middle, reach, baseline = ablations.changes(grid, 1, reports, "frechet_distance")
    assert (middle, reach, baseline) == (16.0, 0.0, 15.0), "what the seeds have in common is no error"
