"""--push_to_hub and --resume_from_checkpoint from there, against a stand-in for the Hub."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import torch
from conftest import read_log
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from loopback_hub import Fault, LoopbackHub, Repo
from PIL import Image
from safetensors.torch import load, load_file
from tiny_models import build_tiny_vae

import hub as the_hub
import model_card
import train_utils
from arguments import NotUploaded, UserError, check_output_dir


ROOT = Path(the_hub.__file__).parent
TOKEN = "hf_to_be_seen_nowhere"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny_sd, tiny_pipeline):
    with LoopbackHub(TOKEN) as hub:
        hub.repos["tester/base"] = Repo.of_folder(tiny_sd)
        hub.repos["tester/pixart"] = Repo.of_folder(tiny_pipeline("PixArtSigma"))
        yield hub


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """A Hub, and the flags that say what goes there from this process, or comes from there."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("AT_START", "AT_END", "AFTER_A_SIGNAL"):
        monkeypatch.setattr(the_hub, name, (0.01, 0.01))
    monkeypatch.setattr(the_hub, "LAST_WORK", [])
    tokens = {"hf_reader": "tester", "hf_other": "someone"}
    with LoopbackHub(TOKEN, tokens, read_only={"hf_reader"}) as stand_in:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": stand_in.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{stand_in.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        close_session()
        flags = Namespace(
            hub_token=TOKEN, hub_model_id="tester/run", hub_private_repo=False, hub_strategy="checkpoint"
        )
        flags.output_dir, flags.logging_dir, flags.resume_from_checkpoint = str(tmp_path / "out"), "logs", None
        flags.output, flags.hub, flags.dry_run = tmp_path / "out", stand_in, False
        flags.pretrained_model_name_or_path = flags.revision = flags.cache_dir = None
        stand_in.repos |= {"someone/model": Repo(), "tester/public": Repo()}
        yield flags
    close_session()


# The repository


def test_the_repository_has_the_folders_name_by_default(flags):
    flags.hub_model_id, flags.output_dir = None, "runs/my-fox"
    the_hub.Hub(flags)
    assert flags.hub_model_id == "tester/my-fox" and not flags.hub.repos["tester/my-fox"].private


@pytest.mark.parametrize("name", ["run", "tester/run"])
def test_a_private_repository_is_private_from_the_beginning(flags, name):
    flags.hub_model_id, flags.hub_private_repo = name, True
    the_hub.Hub(flags)
    assert flags.hub_model_id == "tester/run" and flags.hub.repos["tester/run"].private
    the_hub.Hub(flags)  # as it is one's own


@pytest.mark.parametrize(
    "name, token, reason",
    [
        ("someone/model", TOKEN, "You don't have write access to someone/model"),
        ("someone/new", TOKEN, "You don't have the rights to create someone/new"),
        ("of/three/parts", TOKEN, "Repo id must"),
        ("tester/public", "hf_reader", "You don't have"),
        ("tester/new", "hf_reader", "You don't have the rights to create tester/new"),
        ("tester/new", "hf_wrong", "Invalid credentials"),
        ("tester/new", None, "Invalid username or password"),
    ],
)
def test_a_repository_that_cannot_be_written_to_is_refused(flags, name, token, reason):
    flags.hub_model_id, flags.hub_token = name, token
    with pytest.raises(UserError, match=rf"--push_to_hub: .* {name} \({reason}.*\): .*--hub_model_id"):
        the_hub.Hub(flags)
    assert flags.hub.repos.keys() == {"someone/model", "tester/public"}


def test_a_private_push_to_a_public_repository_is_refused(flags):
    flags.hub_model_id, flags.hub_private_repo = "tester/public", True
    with pytest.raises(UserError, match="--hub_private_repo: tester/public exists and is public"):
        the_hub.Hub(flags)


def test_a_hub_out_of_reach_is_one_sentence(flags, capsys):
    flags.hub.down()
    with pytest.raises(UserError, match=r"--push_to_hub: .* tester/run \(.*refused.*\)"):
        the_hub.Hub(flags)
    flags.resume_from_checkpoint = "out/checkpoint-2"
    repository = the_hub.Hub(flags)
    assert re.search(r"refused.* The run goes on, and so do the attempts\.\n$", capsys.readouterr().err)
    flags.hub.up()
    flags.output.mkdir()
    (flags.output / "model").write_text("trained")
    commit, repo = repository.push_result(["model"]), flags.hub.repos["tester/run"]
    assert commit == f"{flags.hub.endpoint}/tester/run/commit/{repo.shas[-1]}"
    assert repo.files == {"model": b"trained"}


@pytest.mark.parametrize("resumed", [False, True])
def test_offline_mode_and_an_upload_exclude_each_other(flags, monkeypatch, resumed):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    flags.resume_from_checkpoint = "out/checkpoint-2" if resumed else None
    with pytest.raises(UserError, match="--push_to_hub: .*offline mode.*leave --push_to_hub out"):
        the_hub.Hub(flags)


def test_a_resumed_run_with_a_wrong_token_is_refused_too(flags):
    flags.hub_token, flags.resume_from_checkpoint = "hf_wrong", "out/checkpoint-2"
    with pytest.raises(UserError, match="--push_to_hub: .*Invalid credentials"):
        the_hub.Hub(flags)


def test_the_license_of_the_base_is_known_though_the_hub_goes_away(flags):
    flags.pretrained_model_name_or_path = "someone/model"
    flags.hub.repos["someone/model"] = Repo(files={"README.md": b"---\nlicense: mit\n---\n"})
    the_hub.Hub(flags)
    flags.hub.down()
    assert model_card.base_metadata(flags)["license"] == "mit"


@pytest.mark.parametrize("environment", [False, True], ids=["--hub_token", "HF_TOKEN"])
def test_the_token_is_not_said(flags, monkeypatch, environment):
    if environment:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        flags.hub_token = None
    assert the_hub.reason(ValueError(f"Bearer {TOKEN} is wrong."), flags) == "Bearer ... is wrong"


# Trying again


def failed(status, **headers):
    response = httpx.Response(status, headers=headers, request=httpx.Request("POST", "http://127.0.0.1/api"))
    return HfHubHTTPError("It failed.", response=response)


def from_another(error, cause):
    error.__cause__ = cause
    return error


PASSES = [failed(status) for status in (408, 409, 412, 429, 500, 502, 503, 504)]
PASSES += [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.ReadTimeout("slow"), ConnectionResetError()]
PASSES += [from_another(UserError("no"), failed(500)), from_another(RuntimeError("no"), httpx.ConnectError("refused"))]
PASSES += [json.JSONDecodeError("no JSON", "<html>", 0)]
STAYS = [failed(status) for status in (400, 401, 403, 404, 413)]
STAYS += [ValueError("no"), FileNotFoundError("gone"), OfflineModeIsEnabled("offline"), UserError("no")]
STAYS += [from_another(UserError("no"), failed(403))]


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_passes_is_tried_again(error):
    errors, waited, reported = [error, error], [], []

    def do():
        if errors:
            raise errors.pop()
        return "done"

    assert the_hub.persist(do, (1, 2), waited.append, reported.append) == "done"
    assert waited == [1, 2] and reported == [error]


@pytest.mark.parametrize("error", PASSES[:1] + STAYS, ids=repr)
def test_what_does_not_pass_is_raised_at_once(error):
    attempts, waited = [], []

    def do():
        attempts.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        the_hub.persist(do, (1, 2), waited.append)
    assert raised.value is error
    assert len(attempts) == (3 if error in PASSES else 1) and len(waited) == len(attempts) - 1


@pytest.mark.parametrize("asked, waited", [("7", 7), ("1", 2), ("100000", 300), ("Fri, 31 Dec 1999 23:59:59 GMT", 2)])
def test_the_hub_says_how_long_to_wait(asked, waited):
    slept, errors = [], [failed(429, **{"Retry-After": asked})]

    def do():
        if errors:
            raise errors.pop()

    the_hub.persist(do, (2,), slept.append)
    assert slept == [waited]


@pytest.mark.parametrize("where", ["POST .*/repos/create", "POST .*/preupload/", "PUT .*/lfs/", "POST .*/commit/"])
def test_an_answer_that_does_not_come_is_asked_for_anew(flags, monkeypatch, where):
    monkeypatch.setattr(the_hub, "ANSWER", 0.2)
    flags.hub.faults.append(Fault(where, "slow", seconds=3))
    repository = the_hub.Hub(flags)
    repository.add(write_checkpoint(flags.output, 2))
    repository.close()
    assert sum(bool(re.match(where, line)) for line in flags.hub.requests) == 2
    assert folders(flags.hub.repos["tester/run"]) == ["checkpoint-2"] and not repository.missing


# What goes there


def test_nothing_else_of_the_output_folder_is_uploaded(flags):
    here = ["photos/a.png", "credentials.json", "logs/hparams.yml", "train_log.jsonl", "checkpoint-2/unet/w.bin"]
    here += ["tmp-checkpoint-9/half", ".cache/x", "notes/README.md", "unet2/w.bin", "samples/mine.jpg"]
    there = ["unet/config.json", "unet/deep/w.bin", "README.md", "samples/final.png", "samples/prompt-0.jpg"]
    for name in here + there:
        (flags.output / name).parent.mkdir(parents=True, exist_ok=True)
        (flags.output / name).write_text(name)
    the_hub.Hub(flags).push_result(["unet/*", "README.md", *train_utils.SAMPLES])
    assert flags.hub.repos["tester/run"].files == {name: name.encode() for name in there}


def write_checkpoint(output, step, size=1000):
    """A folder that counts as a complete checkpoint."""
    folder, draw = output / f"checkpoint-{step}", random.Random(step)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(draw.randbytes(size))
    (folder / "schedule.json").write_bytes(draw.randbytes(50))
    state = {"step": step, "files": {"unet/weights.safetensors": size, "schedule.json": 50}}
    (folder / "training_state.json").write_text(json.dumps(state))
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folders(repo):
    return sorted({path.split("/")[0] for path in repo.files})


def test_a_new_checkpoint_replaces_the_older_ones(flags):
    repository = the_hub.Hub(flags)
    for step in (9, 2, 4):  # the first is of a run that was left
        repository.add(write_checkpoint(flags.output, step))
        repository.close()
        repository._thread, repository._closing = None, False
    repo = flags.hub.repos["tester/run"]
    assert [folders(Repo(files=files)) for _, files in repo.history] == [
        [],
        ["checkpoint-9"],
        ["checkpoint-2", "checkpoint-9"],
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4"],
    ]


@pytest.mark.parametrize("resumed, kept", [(True, ["checkpoint-2"]), (False, [])])
def test_a_run_that_was_left_goes_from_the_repository(flags, capsys, resumed, kept):
    flags.hub_strategy = "all_checkpoints"
    flags.resume_from_checkpoint = "checkpoint-2" if resumed else None
    files = {f"checkpoint-{step}/training_state.json": b"{}" for step in (2, 4, 6)}
    flags.hub.repos["tester/run"] = Repo(files={**files, "checkpoint-9": b"a file", "checkpoint-3/old": b"goes"})
    repository = the_hub.Hub(flags)
    repository.add(write_checkpoint(flags.output, 3))
    repository.add(write_checkpoint(flags.output, 5))
    repository.close()
    assert folders(flags.hub.repos["tester/run"]) == [*kept, "checkpoint-3", "checkpoint-5", "checkpoint-9"]
    assert "checkpoint-3/old" not in flags.hub.repos["tester/run"].files
    said = re.findall(r"(checkpoint-3 replaces checkpoint-\d) of another run in tester/run", capsys.readouterr().err)
    assert len(said) == 3 - len(kept)


def test_an_older_result_leaves_nothing_behind(flags):
    shards = ["index.json", "diffusion_pytorch_model-00001-of-00002.safetensors"]
    old = {f"unet/{name}": b"old" for name in shards} | {"pytorch_lora_weights_kohya.safetensors": b"old"}
    old |= {"non_ema/adapter_model.safetensors": b"old"}
    kept = {name: b"stays" for name in ("README.md", "checkpoint-2/w", "notes/mine.txt")}
    flags.hub.repos["tester/run"] = Repo(files=old | kept)
    (flags.output / "unet").mkdir(parents=True)
    (flags.output / "unet" / "new").write_text("trained")
    the_hub.Hub(flags).push_result(["unet/*", "README.md"])
    assert flags.hub.repos["tester/run"].files == {**kept, "unet/new": b"trained"}


def test_an_error_of_the_card_does_not_keep_the_result_here(flags, capsys):
    def write_card():
        raise OSError("a picture that is too large")

    (flags.output / "unet").mkdir(parents=True)
    (flags.output / "unet" / "new").write_text("trained")
    train_utils.publish(flags, the_hub.Hub(flags), ["unet/*"], write_card)
    assert list(flags.hub.repos["tester/run"].files) == ["unet/new"]
    said = capsys.readouterr()
    assert "a picture that is too large" in said.err and f"Uploaded to {flags.hub.endpoint}/tester/run" in said.out


def test_a_signal_before_the_upload_is_said_with_what_does_it(flags, monkeypatch):
    monkeypatch.setattr("interruption.received", lambda: "SIGTERM")
    with pytest.raises(NotUploaded, match=r"SIGTERM came before .*`hf upload tester/run .*'unet/\*'") as error:
        train_utils.publish(flags, the_hub.Hub(flags), ["unet/*"], lambda: None)
    assert error.value.exit_status == 3 and not flags.hub.repos["tester/run"].files


def test_too_little_memory_for_the_drawings_is_no_error(flags, capsys):
    def load():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert train_utils.draw_all(flags, None, load) == []
    assert "The validation prompts are not drawn: CUDA out of memory." in capsys.readouterr().err


def test_a_link_has_the_name_of_its_repository(tmp_path):
    (tmp_path / "job-1234").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "job-1234")
    assert the_hub.default_name(Namespace(output_dir=str(tmp_path / "run"))) == "run"


def test_a_result_that_cannot_be_uploaded_is_said_with_what_is_missing(flags, capsys):
    write_checkpoint(flags.output, 2)
    (flags.output / "model").write_text("trained")
    repository = the_hub.Hub(flags)
    flags.hub.fail_commits.add("tester/run")
    repository.add(flags.output / "checkpoint-2")
    with pytest.raises(NotUploaded) as error:
        repository.push_result(["model"])
    says = capsys.readouterr().err
    assert says.count("checkpoint-2 is not uploaded yet (The test wants this commit to fail): trying again.") == 1
    assert "the upload failed (The test wants this commit to fail); the result is safe in" in str(error.value)
    commands = re.findall("`(hf upload .*?)`", str(error.value))
    assert [shlex.split(command)[2:5] for command in commands] == [
        ["tester/run", str(flags.output), "."],
        ["tester/run", f"{flags.output}/checkpoint-2", "checkpoint-2"],
    ]


# What comes from there


@pytest.fixture
def on_the_hub(flags, tmp_path):
    """step, ... -> a repository with these checkpoints, whose files can be changed."""

    def upload(*steps, repo_id="tester/run"):
        for step in steps:
            write_checkpoint(tmp_path / "elsewhere", step)
        flags.hub.repos[repo_id] = Repo.of_folder(tmp_path / "elsewhere") if steps else Repo()
        return flags.hub.repos[repo_id]

    return upload


def resume(flags, wanted="hub"):
    """What the script goes on from: the folder's name, and it must be complete; or None."""
    flags.resume_from_checkpoint = wanted
    check_output_dir(flags)
    if flags.resume_from_checkpoint is None:
        return None
    folder = Path(flags.resume_from_checkpoint)
    assert folder.parent == flags.output
    there = {path: data for path, data in contents(folder).items()}
    sizes = {path: len(data) for path, data in there.items() if path != "training_state.json"}
    assert sizes == json.loads(there["training_state.json"])["files"]
    return folder.name


def test_the_newest_checkpoint_comes_from_the_hub(flags, on_the_hub, tmp_path):
    on_the_hub(2, 10, 4)
    assert resume(flags) == "checkpoint-10"
    assert contents(flags.output / "checkpoint-10") == contents(tmp_path / "elsewhere" / "checkpoint-10")
    assert [path.name for path in flags.output.glob("checkpoint-*")] == ["checkpoint-10"]


def test_a_newer_one_than_here(flags, on_the_hub):
    on_the_hub(4)
    write_checkpoint(flags.output, 2)
    assert resume(flags) == "checkpoint-4"


@pytest.mark.parametrize("step", [4, 6])
def test_one_that_is_not_newer_than_here_is_not_downloaded(flags, on_the_hub, step):
    on_the_hub(4)
    write_checkpoint(flags.output, step)
    assert resume(flags) == f"checkpoint-{step}"
    assert len(flags.hub.requests) and not [line for line in flags.hub.requests if "/resolve/" in line]


@pytest.mark.parametrize("there_is", ["no repository", "no checkpoint"])
def test_nothing_on_the_hub_yet(flags, on_the_hub, capsys, there_is):
    if there_is == "no checkpoint":
        on_the_hub()
    assert resume(flags) is None
    assert "starting at step 0" in capsys.readouterr().out


def test_the_name_of_the_user_is_found(flags, on_the_hub):
    on_the_hub(2, repo_id="tester/out")
    flags.hub_model_id = None
    assert resume(flags) == "checkpoint-2"


@pytest.mark.parametrize("damage", ["missing", "cut", "no list"])
def test_an_incomplete_checkpoint_is_passed_over(flags, on_the_hub, capsys, damage):
    files = on_the_hub(2, 4).files
    if damage == "cut":
        files["checkpoint-4/unet/weights.safetensors"] = bytes(999)
    else:
        del files[f"checkpoint-4/{'schedule.json' if damage == 'missing' else 'training_state.json'}"]
    assert resume(flags) == "checkpoint-2"
    if damage != "no list":
        assert "tester/run: checkpoint-4 is not complete and passed over." in capsys.readouterr().err
    assert not (flags.output / "checkpoint-4").exists()


def test_what_is_damaged_here_comes_anew(flags, on_the_hub, tmp_path):
    on_the_hub(4)
    (write_checkpoint(flags.output, 4) / "unet" / "weights.safetensors").write_bytes(bytes(10))
    assert resume(flags) == "checkpoint-4"
    assert contents(flags.output / "checkpoint-4") == contents(tmp_path / "elsewhere" / "checkpoint-4")


def test_the_hub_out_of_reach(flags, on_the_hub, capsys):
    on_the_hub(4)
    flags.hub.down()
    with pytest.raises(UserError, match=r"hub: the Hub can't be asked \(.*refused\), and there is no checkpoint in"):
        resume(flags)
    write_checkpoint(flags.output, 2)
    assert resume(flags) == "checkpoint-2"
    assert re.search(r"the Hub can't be asked \(.*refused\); going on from .*checkpoint-2\.", capsys.readouterr().err)


@pytest.mark.parametrize(
    "wanted, token, folder",
    [
        ("tester/other", TOKEN, "checkpoint-4"),
        ("tester/other/checkpoint-2", TOKEN, "checkpoint-2"),
        ("tester/secret", TOKEN, "checkpoint-4"),
        ("tester/other", None, "checkpoint-4"),
    ],
)
def test_a_repository_that_is_named(flags, on_the_hub, wanted, token, folder):
    on_the_hub(2, 4, repo_id="tester/other")
    flags.hub.repos["tester/secret"] = Repo(private=True, files=flags.hub.repos["tester/other"].files)
    flags.hub_token = token
    assert resume(flags, wanted) == folder
    assert resume(flags, wanted) == folder  # as of several processes one comes later


@pytest.mark.parametrize(
    "wanted, sentence",
    [
        (
            "tester/other/checkpoint-3",
            "has no checkpoint-3 that is complete; --hub_strategy checkpoint",
        ),
        ("tester/public", "the repository has no checkpoint that is complete; --hub_strategy checkpoint"),
        ("tester/nowhere", r"neither such a folder nor a repository in reach \(.*\); a private one needs `hf auth"),
        ("someone/secret", r"neither such a folder nor a repository in reach \(.*\); .* --hub_token"),
        ("three/parts/here", "there is no such folder"),
        ("checkpoint-2", "there is no such folder"),
    ],
)
@pytest.mark.parametrize("token", [TOKEN, None, "hf_wrong"])
def test_what_cannot_be_resumed_is_refused(flags, on_the_hub, wanted, sentence, token):
    on_the_hub(2, repo_id="tester/other")
    flags.hub.repos["someone/secret"] = Repo(private=True, files=flags.hub.repos["tester/other"].files)
    flags.hub_token = token
    if token == "hf_wrong" and wanted.startswith("tester/"):
        sentence = r"in reach \(Invalid credentials.*\); a private one needs"
    with pytest.raises(UserError, match=f"^--resume_from_checkpoint {wanted}: .*{sentence}"):
        resume(flags, wanted)
    assert not flags.output.exists()


@pytest.mark.parametrize("holds", ["checkpoint-2", "model_index.json", "unet/diffusion_pytorch_model.safetensors"])
def test_another_run_is_not_mixed_with_it(flags, on_the_hub, holds):
    on_the_hub(4)
    (flags.output / holds).mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already; go on with it .*or choose another --output_dir"):
        resume(flags, "tester/run")
    assert [path.name for path in flags.output.iterdir()] == [holds.split("/")[0]]


WHERE = ["GET /api/models/", "GET .*/tree/", "GET .*/checkpoint-4/training_state", "GET .*/checkpoint-4/unet"]


@pytest.mark.parametrize("kind", [503, "reset"])
@pytest.mark.parametrize("wanted", ["hub", "tester/run"])
@pytest.mark.parametrize("where", WHERE)
def test_a_download_that_is_disturbed_is_tried_again(flags, on_the_hub, monkeypatch, where, kind, wanted):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own attempts
    on_the_hub(2, 4)
    flags.hub.faults.append(Fault(where, kind))
    assert resume(flags, wanted) == "checkpoint-4"
    assert not flags.hub.faults[0].times


@pytest.mark.parametrize("where", WHERE)
def test_a_download_that_fails_is_not_another_checkpoint(flags, on_the_hub, where, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    on_the_hub(2, 4)
    flags.hub.faults.append(Fault(where, "reset", times=10**6))
    for wanted in ("hub", "tester/run"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {wanted}: "):
            resume(flags, wanted)
    flags.hub.faults.clear()
    assert resume(flags) == "checkpoint-4"


@pytest.mark.slow  # connecting to it takes its time
def test_a_hub_that_goes_away_between_two_requests(flags, on_the_hub, monkeypatch, capsys):
    """The client does not always say that it has downloaded nothing, if there is a folder."""
    download = the_hub.snapshot_download

    def too_late(**settings):
        flags.hub.down()
        return download(**settings)

    monkeypatch.setattr(the_hub, "snapshot_download", too_late)
    on_the_hub(4)
    flags.output.mkdir()
    (flags.output / "notes").write_text("mine")
    for wanted in ("hub", "tester/run"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {wanted}: "):
            resume(flags, wanted)
        flags.hub.up()
    write_checkpoint(flags.output, 2)
    assert resume(flags) == "checkpoint-2"
    assert "the Hub can't be asked" in capsys.readouterr().err


# A run


def test_a_run_goes_on_from_what_it_has_uploaded(flags, train, tmp_path, capsys):
    common = ["--checkpointing_steps", 2, "--lpl_weight", 0.5, "--lpl_sigma_threshold", 80]
    push = ["--push_to_hub", "--hub_model_id", "run", "--hub_strategy", "checkpoint", "--hub_token", f"{TOKEN}\n"]
    whole = train(*common, name="whole", steps=4)
    first = train(*common, *push, name="first", steps=2)
    repo = flags.hub.repos["tester/run"]
    assert [message for message, _ in repo.history[1:]] == ["Checkpoint of step 2", "End of training"]
    checkpoint = {path.removeprefix("checkpoint-2/"): data for path, data in repo.files.items() if "check" in path}
    assert checkpoint == contents(first / "checkpoint-2")
    assert {"model_index.json", "README.md", WEIGHTS} < repo.files.keys() and "train_log.jsonl" not in repo.files
    second = train(*common, *push, "--resume_from_checkpoint", "hub", name="second", steps=4)
    assert [row["loss"] for row in read_log(second)] == [row["loss"] for row in read_log(whole)]
    expected, pushed = load_file(whole / WEIGHTS), load(repo.files[WEIGHTS])
    assert expected.keys() == pushed.keys() and all(expected[name].equal(pushed[name]) for name in expected)
    assert folders(repo)[1] == "checkpoint-4" and "checkpoint-2" not in folders(repo)
    said = "".join(capsys.readouterr())
    assert "Uploaded to http://" in said and TOKEN not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# Whole runs, and what others have of them


def launch(hub, command, home, cwd=ROOT, **environment):
    environment = {**os.environ, **hub.environment(), "HF_HOME": home, "OMP_NUM_THREADS": "1", **environment}
    words, pipe = [str(word) for word in command], subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def runs(hub, tiny_sd, photos, tmp_path_factory):
    """Three trainings at once, of two steps each: name -> output folder, exit code and what was printed."""
    place = tmp_path_factory.mktemp("runs")
    shared = ["--train_data_dir", photos, "--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 2]
    shared += ["--lpl_sigma_threshold", 80, "--validation_prompt", 'a "red" fox', "--num_validation_images", 1]
    shared += ["--validation_inference_steps", 2, "--checkpointing_steps", 1, "--seed", 0, "--push_to_hub"]
    local, by_id = (["--pretrained_model_name_or_path", model] for model in (tiny_sd, "tester/base"))
    flags = {
        "full": [*local, "--hub_model_id", "tester/full", "--hub_token", TOKEN, "--hub_private_repo"],
        "a LoRA": [*by_id, "--hub_model_id", "lora", "--use_lora", "--prediction_type", "v_prediction"],
        "refused": [*local, "--hub_model_id", "tester/refused", "--hub_token", "hf_wrong"],
    }
    flags["full"] += ["--logging_dir", "./logs"]
    environments = {"full": {"HF_TOKEN": ""}, "refused": {"HF_TOKEN": ""}}
    (place / "full" / "tmp-checkpoint-9").mkdir(parents=True)  # as a killed run leaves it
    (place / "full" / "tmp-checkpoint-9" / "half").write_text("written")
    hub.fail_commits.add("tester/lora")
    started = {}
    for name, more in flags.items():
        script = ["tests/impatient.py", "train_lpl_sd.py"]
        command = [sys.executable, *script, *shared, "--output_dir", place / name, *more]
        started[name] = launch(hub, command, place / f"home of {name}", **environments.get(name, {}))
    printed = {name: process.communicate()[0] for name, process in started.items()}
    return {name: (place / name, process.returncode, printed[name]) for name, process in started.items()}


def train_and_push(hub, place, flags):
    """Runs train_lpl_dit.py for one step with each of the flags, at once; outputs are in `place`, by name."""
    shared = ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 1, "--num_validation_images", 1]
    shared += ["--validation_inference_steps", 2, "--seed", 0, "--push_to_hub", "--hub_token", TOKEN]
    started = {}
    for name, more in flags.items():
        output = ["--output_dir", place / name, "--hub_model_id", f"tester/{name}"]
        command = [sys.executable, "train_lpl_dit.py", *shared, *output, *more]
        started[name] = launch(hub, command, place / f"home of {name}")
    for name, process in started.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def transformers(hub, photos, class_folders, tmp_path_factory):
    """Trainings of transformers, for what a stock pipeline can't load by itself; returns their folder."""
    place = tmp_path_factory.mktemp("transformers")
    build_tiny_vae().save_pretrained(place / "vae")
    flags = {
        "peft": ["--pretrained_model_name_or_path", "tester/pixart", "--use_lora", "--learning_rate", 0.1],
        "classes": ["--transformer_config", "transformer_configs/mmdit-tiny.json", "--lpl_sigma_threshold", 80],
    }
    flags["peft"] += ["--train_data_dir", photos, "--validation_prompt", "a red fox"]
    flags["classes"] += ["--train_data_dir", class_folders, "--validation_prompt", "volcano"]
    flags["classes"] += ["--pretrained_vae_model_name_or_path", place / "vae", "--learning_rate", 0.01]
    train_and_push(hub, place, flags)
    return place


@pytest.fixture(scope="module")
def packed(hub, tiny_pipeline, photos, tmp_path_factory):
    """The same of models with VAEs of their own: a LoRA and a pipeline."""
    place = tmp_path_factory.mktemp("packed")
    flags = {"klein": ["--use_lora", "--learning_rate", 0.1], "qwen-image": ["--learning_rate", 0.01]}
    for name, family in (("klein", "Flux2Klein"), ("qwen-image", "QwenImage")):
        hub.repos[f"tester/base-of-{name}"] = Repo.of_folder(tiny_pipeline(family))
        flags[name] += ["--pretrained_model_name_or_path", f"tester/base-of-{name}", "--train_data_dir", photos]
        flags[name] += ["--validation_prompt", "a red fox"]
    train_and_push(hub, place, flags)
    return place


DRAW = """
import sys
import torch
folder, code, settings = sys.argv[1:]
exec(code)
image.save(f"{folder}/image of the card.png")
generator = torch.Generator().manual_seed(0)
pipe(**eval(settings), generator=generator, num_inference_steps=2).images[0].save(f"{folder}/image.png")
"""


FOX = {"prompt": "a red fox", "height": 64, "width": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, name, settings",
    [
        ("transformers", "peft", {**FOX, "use_resolution_binning": False}),
        ("transformers", "classes", {"class_labels": [1]}),  # volcano; 64 pixels are what it was trained for
        ("packed", "klein", FOX),
        ("packed", "qwen-image", {**FOX, "negative_prompt": ""}),
    ],
)
@pytest.mark.slow
def test_the_code_in_a_transformers_card_draws_what_was_trained(hub, request, tmp_path, place, name, settings):
    place = request.getfixturevalue(place)
    card = hub.repos[f"tester/{name}"].files["README.md"].decode()
    assert str(place) not in card
    assert ModelCard(card).data.pipeline_tag == (
        "text-to-image" if "prompt" in settings else "unconditional-image-generation"
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    command = [sys.executable, "-c", DRAW, tmp_path, code.replace('.to("cuda")', ""), repr(settings)]
    process = launch(hub, command, tmp_path / "home", cwd=tmp_path)  # where our own module is out of reach
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert Image.open(tmp_path / "image of the card.png").size == (64, 64)
    assert_same_image(place / name / "samples" / "final.png", tmp_path / "image.png")


@pytest.fixture(scope="module")
def repeated_upload(hub, runs, tmp_path_factory):
    """The command that the failed upload's message names, run when the Hub works again."""
    command = re.search(r"`(hf upload .*)`", runs["a LoRA"][2])[1]
    hub.fail_commits.clear()
    hf = Path(sys.executable).with_name("hf")
    process = launch(hub, [hf, *shlex.split(command)[1:]], tmp_path_factory.mktemp("home"))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed


PULL = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

folder, code = sys.argv[1:]
def draw(name, pipe):
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": torch.Generator().manual_seed(0)}
    pipe('a "red" fox', **settings).images[0].save(f"{folder}/{name}.png")

pipe = StableDiffusionPipeline.from_pretrained("tester/full")
save_file(pipe.unet.state_dict(), f"{folder}/unet.safetensors")
draw("full", pipe)
exec(code)
image.save(f"{folder}/image of the card.png")
draw("a LoRA", pipe)
"""


@pytest.fixture(scope="module")
def pulled(hub, runs, repeated_upload, tmp_path_factory):
    """What a user has who knows the repositories alone, and the code in the LoRA's card."""
    (code,) = re.findall(r"```python\n(.*?)```", hub.repos["tester/lora"].files["README.md"].decode(), re.DOTALL)
    folder = tmp_path_factory.mktemp("pulled")
    process = launch(hub, [sys.executable, "-c", PULL, folder, code.replace('.to("cuda")', "")], folder / "home")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return folder


def assert_same_image(first, second):
    first, second = (np.asarray(Image.open(path).convert("RGB"), int) for path in (first, second))
    assert first.std() > 0 and np.abs(first - second).max() <= 1


@pytest.mark.slow
def test_a_pipeline_is_pushed_without_checkpoints_and_logs(hub, runs):
    output, returncode, printed = runs["full"]
    assert returncode == 0, printed
    repo = hub.repos["tester/full"]
    assert repo.private
    parts = "README.md loss.png model_index.json samples scheduler text_encoder tokenizer unet vae".split()
    assert sorted({path.split("/")[0] for path in repo.files}) == parts
    assert load(repo.files[WEIGHTS]).keys() == load_file(output / WEIGHTS).keys()
    others = {"checkpoint-1", "checkpoint-2", "logs", "train_log.jsonl"}
    assert {path.name for path in output.iterdir()} == {*parts, *others}


@pytest.mark.slow
def test_the_pushed_pipeline_is_the_local_one(runs, pulled):
    output = runs["full"][0]
    expected, weights = load_file(output / WEIGHTS), load_file(pulled / "unet.safetensors")
    assert expected.keys() == weights.keys() and all((expected[name] == weights[name]).all() for name in expected)
    assert_same_image(output / "samples" / "final.png", pulled / "full.png")


@pytest.mark.slow
def test_the_code_in_a_loras_card_draws_what_the_local_lora_draws(runs, pulled):
    assert_same_image(runs["a LoRA"][0] / "samples" / "final.png", pulled / "a LoRA.png")
    assert Image.open(pulled / "image of the card.png").size == (64, 64)


@pytest.mark.slow
def test_cards_name_their_base_and_nothing_of_this_machine(hub, runs, tiny_sd, repeated_upload):
    for name, base in (("full", None), ("lora", "tester/base")):
        text = hub.repos[f"tester/{name}"].files["README.md"].decode()
        card = ModelCard(text)
        assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
        assert card.data.get("base_model") == base
        assert card.data.get("base_model_relation") == ("adapter" if base else None)
        assert ("lora" in card.data.tags) == bool(base)
        pictures = set(re.findall(r"!\[[^]]*\]\((.*?)\)", text))
        assert any(path.startswith("samples/") for path in pictures)
        assert pictures <= hub.repos[f"tester/{name}"].files.keys()
        assert str(tiny_sd.parent) not in text


@pytest.mark.slow
def test_a_wrong_token_ends_the_run_before_a_model_is_loaded(hub, runs):
    output, returncode, printed = runs["refused"]
    assert returncode == 1
    sentence = printed.splitlines()[-1]
    assert re.search(r"--push_to_hub: .* tester/refused \(.*\): .*`hf auth login`.*--hub_token", sentence)
    assert "Traceback" not in printed and "LPL" not in printed and not output.exists()
    assert "tester/refused" not in hub.repos


@pytest.mark.slow
def test_a_failed_upload_costs_nothing_and_says_how_to_repeat_it(hub, runs, repeated_upload):
    output, returncode, printed = runs["a LoRA"]
    assert returncode == 3 and "Traceback" not in printed
    sentence = next(line for line in printed.splitlines() if "error: " in line)
    assert f"the upload failed (The test wants this commit to fail); the result is safe in {output}" in sentence
    pushed = {path for path in contents(output) if not path.startswith(("checkpoint-", "logs/", "train_log"))}
    assert {"README.md", "pytorch_lora_weights.safetensors", "samples/final.png"} < pushed
    assert hub.repos["tester/lora"].files.keys() == pushed
    for path in pushed:
        assert hub.repos["tester/lora"].files[path] == (output / path).read_bytes()


@pytest.mark.slow
def test_the_token_is_in_no_file_and_not_printed(runs):
    output, _, printed = runs["full"]
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"hparams.yml", "README.md", "optimizer.bin"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in printed and "hf_wrong" not in runs["refused"][2]
