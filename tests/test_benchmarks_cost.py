"""benchmarks/cost.py counts, times and compares what it says."""

import functools
import re
from types import SimpleNamespace

import cost
import pytest
import torch
from dry_runs import ROOT, trained_pipeline
from tiny_models import build_tiny_vae

import train_lpl_sd
from counters import count_flops


TINY_VAE = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
TINY_VAE |= {key: cost.VAE[key] for key in ("down_block_types", "up_block_types")}
FLAGS = ["--resolution", 64, "--train_batch_size", 8, "--mixed_precision", "no", "--cache_latents", "--center_crop"]


@pytest.fixture(scope="module", autouse=True)
def toy():
    """A model of the name `toy` for the tables."""
    tiny = trained_pipeline(ROOT / "transformer_configs" / "mmdit-tiny.json", "epsilon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cost.PIPELINES, "toy", {**tiny, "vae": ("AutoencoderKL", TINY_VAE)})
        patch.setitem(cost.MODELS, "toy", cost.Model("toy", 64, FLAGS))
        patch.setattr(cost.memory, "VAES", {"toy": build_tiny_vae, "SD": build_tiny_vae})
        yield


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return cost.Counts(tmp_path_factory.mktemp("counts"))


def cells_of(text):
    """Tables: title -> rows of cells, the head first."""
    found = re.findall(r"^([^|\n].*)\n\n((?:\|.*\n?)+)", text, re.M)
    return {title: [[c.strip() for c in line.split("|")[1:-1]] for line in body.splitlines()] for title, body in found}


def test_masks_from_all_positions_are_the_measure_of_the_others(capsys):
    cost.mask_table(160, rounds=2, channels=4)
    ((title, (head, _, *rows)),) = cells_of(capsys.readouterr().out).items()
    assert title.startswith("Masks of 4 maps of 160 x 160")
    assert [row[0] for row in rows] == ["all", "65536", "16384", "4096"]
    masked, otherwise = ([float(row[i].rstrip("%")) for row in rows] for i in (3, 4))
    assert otherwise[:2] == [0, 0] and 0 < otherwise[3] < masked[0] < 5  # 25,600 positions: all are below 65,536


# What is counted


EVERY = ("--lpl_sigma_threshold", 1e9)  # all samples pass


@pytest.mark.slow
def test_a_part_of_the_batch_costs_that_part_of_lpl(counts):
    l2, whole = counts("toy", "--lpl_weight", 0)["flops"], counts("toy", *EVERY)["flops"]
    flags = cost.variants_of(cost.MODELS["toy"])
    for title, part in (("a half", 1 / 2), ("a quarter", 1 / 4), ("an eighth", 1 / 8)):
        found = counts("toy", *EVERY, *flags[f"LPL, {title} of the batch"])["flops"]
        assert found - l2 == pytest.approx(part * (whole - l2)) and found > l2


def test_a_part_of_a_batch_that_is_too_small_is_a_probability():
    flags = cost.variants_of(cost.Model("toy", 64, [*FLAGS, "--train_batch_size", 4]))
    found = [flags[f"LPL, {part} of the batch"] for part in ("a half", "a quarter", "an eighth")]
    assert found == [["--lpl_max_samples", n] for n in (2, 1, 1 / 8)]


@pytest.mark.slow
def test_gates_let_pass_what_stable_diffusions_noise_levels_say(counts):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)
    l2, whole = counts("toy", "--lpl_weight", 0)["flops"], counts("toy", *EVERY)["flops"]
    flags = cost.variants_of(cost.MODELS["toy"])
    for title, snr in (("LPL, gate 0.577", 3), ("LPL, gate 3", 1 / 9)):
        share = (abar / (1 - abar) >= snr).double().mean().item()
        assert counts("toy", *flags[title])["flops"] - l2 == pytest.approx(share * (whole - l2))


def test_the_same_dry_run_is_run_once(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(cost, "count", lambda model, photos, *flags: runs.append(flags) or {"run": len(runs)})
    counts = cost.Counts(tmp_path)
    assert [counts("toy", "--seed", n)["run"] for n in (1, 2, 1)] == [1, 2, 1]
    assert runs == [(*FLAGS, "--seed", n) for n in (1, 2)]


def test_the_papers_numbers_are_those_of_table_5():
    assert cost.PAPER == {"LPL, gate 0.577": [pytest.approx(0.58, abs=0.005), pytest.approx(1.75, abs=0.005)]}
    assert cost.PAPER.keys() <= cost.variants_of(cost.MODELS["toy"]).keys()


# What is measured


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0

    def __call__(self):
        return self.now


@pytest.fixture
def take(tiny_sd, photos, tmp_path, monkeypatch):
    """Runs turns of variants (title -> flags) of a script whose steps take `seconds(args)`; what it saw is in `seen`.

    seconds: returns the seconds of a step, or raises.
    """

    def run(variants, seconds, rounds=2):
        def parse(*more):
            words = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", photos, "--resolution", 64]
            words += ["--output_dir", tmp_path / "out", "--report_to", "none", "--seed", 0, "--lpl_weight", 1]
            words += ["--train_batch_size", 2, "--max_train_steps", 100, "--lpl_sigma_threshold", 80, *more]
            return train_lpl_sd.parse_args([str(word) for word in words])

        clock, step, weigh, seen = Clock(), train_lpl_sd.training_step, train_lpl_sd.weighted_terms, []

        def timed_step(args, family, model, lpl, batch, *more):
            clock.now += seconds(args)
            seen.append([batch["positions"].tolist()])
            return step(args, family, model, lpl, batch, *more)

        def seen_terms(*args):
            terms = weigh(*args)
            seen[-1] += [set(terms), len(args[1].blocks) if args[1] else 0]
            return terms

        monkeypatch.setattr(train_lpl_sd, "training_step", timed_step)
        monkeypatch.setattr(train_lpl_sd, "weighted_terms", seen_terms)
        turns = cost.Turns(train_lpl_sd, {title: parse(*more) for title, more in variants.items()}, rounds, clock)
        turns.run(parse())
        assert train_lpl_sd.training_step is timed_step, "the script is as it was"
        turns.seen = seen
        return turns

    return run


def test_variants_take_turns_in_the_scripts_loop(take):
    variants = {"l2": ["--lpl_weight", 0], "LPL": [], "two blocks": ["--lpl_num_blocks", 2]}
    variants["RGB"] = ["--lpl_weight", 0, "--rgb_weight", 1]
    turns = take(variants, lambda args: 1 if args.lpl_weight == 0 else 4)
    assert turns.seconds == {"l2": [1, 1], "LPL": [4, 4], "two blocks": [4, 4], "RGB": [1, 1]}
    assert (turns.missing, turns.peaks) == ([], {})
    kinds = [({"l2"}, 0), ({"l2", "lpl"}, 5), ({"l2", "lpl"}, 3), ({"l2", "rgb"}, 0)]  # with the mid block
    assert [tuple(terms) for _, *terms in turns.seen] == 3 * kinds
    batches = [positions for positions, *_ in turns.seen]
    rounds = [batches[i : i + 4] for i in (0, 4, 8)]
    assert all(round == [round[0]] * 4 for round in rounds), "all in a round see the same batch"
    assert rounds[0][0] != rounds[1][0] != rounds[2][0]
    assert cost.measured_cells(turns, "LPL", batch=2) == ["0.5", "0.25 (0.25 to 0.25)", ""]


def test_a_variant_that_runs_out_of_memory_leaves_the_others_their_turns(take):
    def seconds(args):
        if args.lpl_num_blocks == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    turns = take({"l2": ["--lpl_weight", 0], "two blocks": ["--lpl_num_blocks", 2], "LPL": []}, seconds)
    assert turns.seconds == {"l2": [1, 1], "LPL": [1, 1]} and turns.missing == ["two blocks"]
    assert cost.measured_cells(turns, "two blocks", batch=2) == ["out of memory", "", ""]
    assert cost.measured_cells(turns, "LPL", batch=2)[0] == "2"


def test_without_l2_there_is_nothing_to_compare_with():
    turns = SimpleNamespace(variants={"LPL": None}, seconds={"LPL": [2, 4, 6]}, peaks={"LPL": 2**30})
    assert cost.measured_cells(turns, "LPL", batch=8) == ["2", "", "", "1", ""]
    assert cost.measured_cells(turns, "l2", batch=8) == ["out of memory", "", "", "", ""]


def test_memory_of_other_variants_does_not_count():
    turns = cost.Turns(SimpleNamespace(training_step=None, weighted_terms=None, Log=None), {}, rounds=1)
    decoder, copy = torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(5, 5, bias=False)
    turns.own = {"l2": [], "LPL": [decoder], "RGB": [decoder], "self-perceptual": [copy]}
    others = {}
    for turns.current in turns.own:
        others[turns.current] = turns.bytes_of_others()
    assert others == {"l2": 400 + 100, "LPL": 100, "RGB": 100, "self-perceptual": 400}


# The term alone


def test_the_bare_decoder_is_three_forward_passes():
    vae, flops = build_tiny_vae(), []

    def add(layer, args, output):
        places = output.numel() // (output.shape[1] if output.ndim == 4 else output.shape[-1])
        flops.append(2 * places * layer.weight.numel())

    for layer in vae.decoder.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and layer is not vae.decoder.conv_out:
            layer.register_forward_hook(add)
    vae.post_quant_conv.register_forward_hook(add)
    vae.decode(torch.randn(1, 4, 8, 8))
    attention = 4 * 64**2 * 16  # 64 positions of 16 channels; backward with the scores once more
    floor = count_of(cost.BARE)[1]
    assert floor == 3 * sum(flops) + (2 + 2.5) * attention
    assert count_of("LPL")[1] == floor < count_of("recomputed", gradient_checkpointing=True)[1]


@functools.cache
def count_of(title, **options):
    return cost.count_term("toy", torch.float32, 64, title, options)


def test_peaks_of_the_term_grow_with_what_is_kept():
    plain, streamed = (count_of("LPL", chunk_size=n)[0] for n in (0, 1))
    recomputed = count_of("LPL", gradient_checkpointing=True)[0]
    assert recomputed < streamed < plain and count_of(cost.BARE)[0] < plain
    half = cost.count_term("toy", torch.bfloat16, 64, cost.BARE, {})[0]
    assert half < count_of(cost.BARE)[0]


def test_bare_and_whole_run_the_same_convolutions_on_real_tensors():
    terms = [cost.make_term("toy", torch.float32, 64, "cpu", title, {}) for title in (cost.BARE, "LPL")]
    assert count_flops(terms[0]) == count_flops(terms[1]) == count_of(cost.BARE)[1]


def test_times_are_those_of_the_bare_decoder_round_by_round(monkeypatch, capsys):
    pauses = {cost.BARE: 0.02, "LPL": 0.06, "other": 0.02}
    monkeypatch.setattr(cost, "make_term", lambda *setting: lambda: cost.time.sleep(pauses[setting[-2]]))
    terms = {"LPL": {}, "other": {}}
    arithmetic, times = cost.floor_table("toy", torch.float32, [], [64], rounds=3, terms=terms)
    assert arithmetic == [] and [len(rounds) for rounds in times] == [3]
    assert sorted(times[0])[1] == pytest.approx(3, rel=0.3)
    ((_, rows),) = cells_of(capsys.readouterr().out).items()
    assert rows[0] == ["", "64 px: ms", f"{cost.BARE} = 1"] and [row[0] for row in rows[2:]] == list(pauses)
    assert rows[2][2] == "1 (1 to 1)" and float(rows[3][1]) == pytest.approx(60, rel=0.3)


def test_a_term_that_runs_out_of_memory_is_a_cell(monkeypatch, capsys):
    def term():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost, "make_term", lambda *setting: term if setting[-2] == "LPL" else lambda: None)
    assert cost.floor_table("toy", torch.float32, [], [64], rounds=2, terms={"LPL": {}, "other": {}}) == ([], [])
    ((_, rows),) = cells_of(capsys.readouterr().out).items()
    assert [row[1] == "out of memory" for row in rows[2:]] == [False, True, False]


# The bars


@pytest.mark.parametrize("share, met", [(1.0, "yes"), (1.1, "no")])
def test_bars_are_met_up_to_their_limits(monkeypatch, capsys, share, met):
    """Every number is its limit times `share`."""

    def counts(name, *flags):
        if flags[:2] == ("--lpl_weight", 0):
            return {"peak": 100, "flops": 100}
        peak = 100 + 8 * 2**30 * share if name == "sdxl" else 106 * share
        return {"peak": peak, "flops": 125 * share}

    monkeypatch.setattr(cost.memory, "measure", lambda *setting: (8 * 2**30 * share, 0))
    turns = SimpleNamespace(variants={"l2": 0, cost.EIGHTH: 0})
    turns.seconds = {"l2": [1, 2, 4], cost.EIGHTH: [1, 2.5 * share, 50]}
    cost.bars_table(counts, {"a VAE": ([1.25 * share, 1], [[9, 1.25 * share, 1]])}, {"sdxl": turns})
    ((_, rows),) = cells_of(capsys.readouterr().out).items()
    assert len(rows) == 2 + 10 and {row[2] for row in rows[2:]} == {met}
    assert [row[1] for row in rows[2:4]] == ["1.060", "8.000 GiB"] or met == "no"


# Whole runs


@pytest.mark.slow
def test_all_tables(monkeypatch, tmp_path, capsys):
    for name in ("small", "sdxl", "mmdit", "mmdit-sdxl-vae"):
        monkeypatch.setitem(cost.MODELS, name, cost.MODELS["toy"])
    monkeypatch.setattr(cost, "FLOORS", ["toy"])
    monkeypatch.setattr(cost, "COUNTED_AT", [64])
    monkeypatch.setattr(cost, "ON_A_CPU", [32])
    variants = ["l2", "LPL, plain autograd", "LPL, block-checkpointed", cost.STREAMED, "LPL, 2 up blocks"]
    variants += ["LPL, 1 up blocks", "LPL, gate 0.577", "self-perceptual", "E-LatentLPIPS", "RGB"]
    monkeypatch.setattr(cost, "TERMS", {"LPL": {}, "LPL, no mask": {"mask_outliers": False}})
    words = ["--models", "small", "--rounds", "1", "--output", str(tmp_path / "out.md"), "--variants"]
    cost.main([*words, *variants])
    assert capsys.readouterr().out == ""
    tables = cells_of((tmp_path / "out.md").read_text())
    (small, *_, term, bars) = tables.values()
    assert [row[0] for row in small[2:]] == variants and all(float(row[1]) > 0 for row in small[2:])
    counted = {row[0]: row[4:] for row in small[2:]}
    assert counted["l2"][1] == counted["l2"][4] == "1.00" and counted["LPL, gate 0.577"][2] == "1.75"
    arithmetic = {title: float(row[4]) for title, row in counted.items()}
    blocks = [arithmetic[title] for title in ("LPL, 1 up blocks", "LPL, 2 up blocks", cost.STREAMED)]
    assert blocks == sorted(blocks) and blocks[0] > 1
    assert arithmetic["LPL, block-checkpointed"] > arithmetic[cost.STREAMED] == arithmetic["LPL, plain autograd"]
    assert [row[4] for row in term[2:]] == ["1.00"] * 3 and [len(row) for row in term[2:]] == [7] * 3
    assert {row[2] for row in bars[2:]} <= {"yes", "no"} and "nan" not in str(bars)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_memory_is_measured(counts):
    variants = {"l2": ["--lpl_weight", 0], "LPL, plain autograd": ["--lpl_chunk_size", 0], "LPL, streamed": []}
    turns = cost.time_steps("toy", counts.photos("toy"), variants, rounds=2)
    assert 0 < turns.peaks["l2"] <= turns.peaks["LPL, streamed"] <= turns.peaks["LPL, plain autograd"]
    assert all(len(seconds) == 2 for seconds in turns.seconds.values())
