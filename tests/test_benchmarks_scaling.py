"""benchmarks/scaling.py counts and compares what it says."""

import itertools
import re

import numpy as np
import pytest
import scaling
import torch
from diffusers import DDPMScheduler
from torch._subclasses import FakeTensorMode


# What is counted


def test_bytes_of_storages_that_are_resized():
    kept = torch.empty(1000)  # there before
    with scaling.RankBytes() as memory:
        kept.untyped_storage().resize_(0)
        assert (memory.live, memory.peak) == (-4000, 0)
        kept.untyped_storage().resize_(12000)
        assert (memory.live, memory.peak) == (8000, 8000)
        made = torch.ones(100)
        assert memory.peak == 8400
        del made
        assert memory.live == 8000
    kept.untyped_storage().resize_(0)
    assert memory.live == 8000, "it is not counted any more"


def test_each_storage_counts_once_for_its_first_owner():
    class Weights:
        family = type("Family", (), {"model": torch.nn.Linear(10, 10)})
        masters = list(family.model.parameters())
        optimizer = torch.optim.AdamW(masters)

    Weights.family.model(torch.ones(1, 10)).sum().backward()
    Weights.optimizer.step()
    Weights.optimizer.zero_grad()
    average = type("Average", (), {"shadow_params": [p.clone() for p in Weights.masters]})
    sizes = scaling.held(Weights, average)
    steps = 2 * 4  # AdamW counts them for each tensor
    assert (sizes["weights"], sizes["optimizer"], sizes["ema"]) == (440, 2 * 440 + steps, 440)
    with FakeTensorMode():
        fake = [torch.ones(1000)]  # has no memory, nor an address to ask for
    more = torch.ones(500)
    assert scaling.held(Weights, None)["others"] - sizes["others"] == more.nbytes + 440
    assert fake[0].device.type == "cpu"


# LPL's work over the ranks


def test_the_noise_levels_are_stable_diffusions():
    family, seen = scaling.schedule(512)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    abar = DDPMScheduler(**betas).alphas_cumprod
    assert torch.equal(seen, ((1 - abar) / abar).sqrt() <= 6)
    assert 0.8 < seen.double().mean() < 0.9
    assert torch.equal(family.timesteps, torch.arange(1000))


def test_samples_decoded_are_those_that_the_threshold_lets_pass():
    family, seen = scaling.schedule(512)
    share = seen.double().mean().item()
    drawn = scaling.decoded_by_ranks(family, seen, 8, 4, 50, stratified=False)
    assert drawn.shape == (50, 8) and drawn.max() == 4
    assert drawn.mean() == pytest.approx(4 * share, abs=4 * np.sqrt(4 * share * (1 - share) / 400))
    strata = scaling.decoded_by_ranks(family, seen, 8, 4, 50, stratified=True)
    assert set(np.unique(strata)) == {3, 4}  # of 4 x 83.5%
    assert (strata.max(1) - strata.min(1)).max() == 1
    assert strata.sum(1).std() < 1 < drawn.sum(1).std()


def test_imbalance_is_what_all_wait_for():
    assert scaling.imbalance(np.array([[2, 2], [1, 1]])) == 0
    assert scaling.imbalance(np.array([[2, 0], [0, 2]])) == 1
    # Of two processes, each sample passing with probability 0.8: the most is 1 but where both do not pass.
    share, passing = 0.8, list(itertools.product([0, 1], repeat=2))
    chance = [share ** sum(p) * (1 - share) ** (2 - sum(p)) for p in passing]
    expected = sum(c * max(p) for c, p in zip(chance, passing)) / share - 1
    found = scaling.imbalance((np.random.default_rng(0).random((100_000, 2)) < share).astype(float))
    assert found == pytest.approx(expected, abs=0.005)


# Runs


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="0 of 1 processes.*\n(.*\n)*.*no flag --resolutoin; is --resolution meant"):
        scaling.launch("1 process", tmp_path / "run", ["--resolutoin", 64])


@pytest.mark.slow
def test_all_tables(tmp_path, capsys):
    words = ["--rounds", 1, "--steps", 2, "--samples", 300, "--engines", "1 process", "DDP", "FSDP2"]
    scaling.main([str(word) for word in [*words, "--output", tmp_path / "tables.md"]])
    assert capsys.readouterr().out == ""
    tables = re.findall(r"^([^|\n].*)\n\n\|(.*)\n\|[-|]+\n((?:\|.*\n?)+)", (tmp_path / "tables.md").read_text(), re.M)
    time, memory, balance = ([line.strip("| ").split(" | ") for line in body.splitlines()] for *_, body in tables)
    assert [row[:2] for row in time] == [["1 process", "1"], ["DDP", "2"], ["FSDP2", "2"]]
    assert time[0][3] == time[0][4] == "1.00 (1.00 to 1.00)" and all(float(row[2]) > 0 for row in time)

    held = {row[0]: [float(number) for number in row[1:]] for row in memory}
    weights, optimizer, average, total, ratio, peak = held["1 process"]
    assert (optimizer, average) == (pytest.approx(2 * weights, rel=0.01), pytest.approx(weights, rel=0.01))
    assert total == pytest.approx(4 * weights, rel=0.01) and ratio == 1 and peak > weights
    assert held["DDP"][:5] == held["1 process"][:5]
    assert held["FSDP2"][4] == pytest.approx(0.5, rel=0.01)
    assert [row[:2] for row in balance] == [[str(p), str(b)] for p in (2, 8, 64) for b in (1, 4, 16)]
