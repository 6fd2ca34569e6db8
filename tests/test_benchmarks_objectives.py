"""benchmarks/objective_costs.py counts and compares what it says."""

import json

import objective_costs
import pytest
import torch
from dry_runs import ROOT, build_class_folder, count, write_model
from objective_costs import PAPERS_GATE, SETTING, TABLE_5, main, only, papers_arms, table


TINY = ROOT / "transformer_configs" / "mmdit-tiny.json"
CONFIG = json.loads(TINY.read_text())
WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
TOKENS = (512 // 8 // CONFIG["patch_size"]) ** 2  # of the image; the class is one more
BATCH = 2


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Flags -> the numbers of a dry run of the tiny MM-DiT at 512 pixels, each counted once."""
    folder, known = tmp_path_factory.mktemp("costs"), {}
    model = write_model(folder / "model", (TINY, "epsilon"))
    classes = build_class_folder(folder / "classes")

    def run(*flags):
        if flags not in known:
            known[flags] = count(model, classes, *SETTING, "--train_batch_size", BATCH, *flags)
        return known[flags]

    return run


# What is counted


def test_l2_has_no_other_term(counted):
    n = counted(*only())
    assert (n["flops_of"], n["frozen"]) == ({}, 0)
    assert (n["peak"], n["flops"]) == (n["peak_l2"], n["flops_l2"]) and n["flops"] > 0


def linear(width_in, width_out):
    return width_in * width_out + width_out


def block_parameters():
    """Of a block for two streams: modulation, queries, keys and values, output, MLP; norms of queries and keys."""
    d = WIDTH
    stream = linear(d, 6 * d) + 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    return 2 * stream + 4 * CONFIG["attention_head_dim"]


def test_the_frozen_copy_is_the_embedders_and_the_first_blocks_in_bf16(counted):
    d, patch = WIDTH, CONFIG["in_channels"] * CONFIG["patch_size"] ** 2
    embedders = linear(patch, d) + linear(256, d) + 3 * linear(d, d) + linear(d, d) + (CONFIG["num_classes"] + 1) * d
    out = linear(d, 2 * d) + linear(d, patch)  # small, and left there
    for blocks in (1, 2):
        frozen = counted(*only("self_perceptual", "--sp_layer", blocks))["frozen"]
        parameters = embedders + blocks * block_parameters() + out
        positions = CONFIG["pos_embed_max_size"] ** 2 * d  # a table
        assert frozen - 2 * parameters in (2 * positions, 4 * positions)


def test_self_perceptual_grows_by_the_arithmetic_of_the_blocks_between(counted):
    first, second = (
        counted(*only("self_perceptual", "--sp_layer", blocks))["flops_of"]["Self-perceptual loss"]
        for blocks in (1, 2)
    )
    d, tokens = WIDTH, TOKENS + 1
    passes = 3  # with the true latents; with the predicted ones, forward and back to them
    matrices = 2 * 12 * d * d * tokens
    modulation = 2 * 2 * 6 * d * d  # of both streams; has no gradient
    attention = 4 * tokens * tokens * d  # forward; backward with the scores once more
    assert second - first == BATCH * (passes * matrices + 2 * modulation + (2 + 2.5) * attention)


def test_self_perceptual_with_lora_has_no_copy(counted):
    lora = ["--use_lora", "--rank", 16]
    with_copy, without = (counted(*only("self_perceptual", "--sp_layer", 1, *more)) for more in ([], lora))
    assert without["frozen"] == 0 < with_copy["frozen"]
    assert counted(*only(None, *lora))["weights"] == without["weights"]
    assert without["flops_of"].keys() == with_copy["flops_of"].keys()


def test_e_latent_lpips_is_vgg_forward_twice_and_backward_once(counted):
    n = counted(*only("e_latent_lpips"))
    channels = [4, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [9 * before * after for before, after in zip(channels, channels[1:])]
    positions = [64 * 64] * 10 + [32 * 32] * 3
    forward = sum(2 * size * places for size, places in zip(convolutions, positions))
    assert n["flops_of"] == {"E-LatentLPIPS": BATCH * 3 * forward}
    norms = 4 * sum(channels[1:])  # and a number of batches seen, in each
    comparison = 64 + 128 + 256 + 512 + 512
    assert n["frozen"] == 4 * (sum(convolutions) + sum(channels[1:]) + norms + comparison) + 13 * 8


def test_the_gate_of_snr_3_passes_a_fifth_of_the_samples(counted):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)
    share = (abar / (1 - abar) >= 3).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.01)
    everywhere, gated = (
        counted(*only("e_latent_lpips", *gate)) for gate in ([], ["--gate_objectives", "e_latent_lpips", *PAPERS_GATE])
    )
    assert gated["flops_of"]["E-LatentLPIPS"] == pytest.approx(share * everywhere["flops_of"]["E-LatentLPIPS"])
    assert gated["peak"] == everywhere["peak"]


# The tables


ROW = {"peak": 3 * 2**30, "peak_l2": 0, "frozen": 2**28, "weights": 2**29, "flops": 6e12, "flops_l2": 0}
L2_ROW = {**ROW, "peak": 2**31, "frozen": 0, "weights": 2**28, "flops": 4e12}


def test_a_row_is_measured_by_the_l2_above_it(monkeypatch, capsys):
    rows = {"l2": L2_ROW, "E-LatentLPIPS": ROW, "LoRA: l2": {**ROW, "frozen": 0}, "LoRA: RGB": ROW}
    monkeypatch.setattr(objective_costs, "count", lambda model, photos, *flags: rows[flags[-1]])
    flags = ["--train_batch_size", 16, "--gradient_accumulation_steps", 2, "--train_batch_size", 1]
    table(None, None, flags, {title: [title] for title in rows}, TABLE_5)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["l2", "2.0", "1.00", "0.00", "2.00", "1.00", "1.00", "1.00"],
        ["E-LatentLPIPS", "3.0", "1.50", "0.50", "3.00", "1.50", "1.59", "1.25"],  # 67.5 / 42.5 and 16.6 / 13.3
        ["LoRA: l2", "3.0", "1.00", "0.00", "3.00", "1.00", "", ""],
        ["LoRA: RGB", "3.0", "1.00", "0.25", "3.00", "1.00", "", ""],
    ]


def test_all_of_table_5_is_counted_at_its_blocks():
    arms = papers_arms(28)
    assert TABLE_5.keys() <= arms.keys()
    layers = [flags[flags.index("--sp_layer") + 1] for flags in arms.values() if "--sp_layer" in flags]
    assert layers == [8, 16, 28, 8]


def test_sdxl_is_the_readmes_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(objective_costs, "count", lambda model, photos, *flags: seen.append(flags) or ROW)
    main(["--sdxl", "--rank", "8"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(seen) == 5
    assert all("| 1.50 |" in row for row in rows), "6 TFLOP of 4 forward passes with one image"
    assert all("--use_lora" in flags and "--rank" in flags[-8:] for flags in seen)


@pytest.mark.slow
def test_the_whole_table(capsys):
    main(["--model", "mmdit-tiny", "--train_batch_size", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    rows = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows.keys() == papers_arms(4).keys()
    assert rows["l2"][1] == rows["l2"][4] == rows["LoRA: l2"][1] == rows["LoRA: l2"][4] == "1.00"
    arithmetic = {title: float(row[4]) for title, row in rows.items()}
    assert arithmetic["LPL"] > arithmetic["LPL, gate of SNR 3"] > arithmetic["l2"]
    blocks = [arithmetic[f"self-perceptual, block {n}"] for n in (8, 16, 28)]
    assert blocks == sorted(blocks) and blocks[0] > 1
    frozen = {title: float(row[2]) for title, row in rows.items()}
    assert frozen["LPL"] == frozen["RGB"] > frozen["E-LatentLPIPS"] > frozen["l2"] == 0
    assert rows["LPL"][5:] == ["", ""] and rows["LPL, gate of SNR 3"][5:] == ["1.75", "1.73"]
