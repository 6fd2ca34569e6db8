"""--push_to_hub and --resume_from_checkpoint hub, whatever the network and the Hub do.

The runs are processes of their own, started as users start them but for `impatient.py`, against stand-ins for the
Hub. A scenario starts them and drives their Hub; the tests look at what is left. Three scenarios go on at a time. When
a run ends, all that it has left, said and sent is searched for the token.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import read_log
from loopback_hub import Fault, LoopbackHub, Repo
from safetensors.torch import load, load_file


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
IMPATIENT = ROOT / "tests" / "impatient.py"
TOKEN = "hf_to_be_seen_nowhere"
MODEL = "tester/model"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
RESULT = "README.md model_index.json scheduler text_encoder tokenizer unet vae".split()
PATIENCE = 300  # seconds for what takes twenty
CHECKPOINTS = ("--hub_strategy", "checkpoint")
ALL_CHECKPOINTS = ("--hub_strategy", "all_checkpoints")
LORA = ["--use_lora", "--rank", 2, "--use_ema", "--ema_decay", 0.5]
ENDLESS = 10**6


class WatchedHub(LoopbackHub):
    """Tells when requests come, and remembers those whose address or body has the token."""

    def __init__(self, **settings):
        super().__init__(TOKEN, **settings)
        self._watched, self._watching, self.leaks = [], threading.Lock(), []

    def when(self, pattern, do, count=1):
        """Calls `do()` before the count-th request from now on that has this pattern; the request waits for it."""
        self._watched.append([pattern, do, count])

    def hold(self, pattern):
        """The next request with this pattern waits for the event that is returned."""
        release = threading.Event()
        self.when(pattern, lambda: release.wait(PATIENCE))
        return release

    def met(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def arrived(self, line):
        fault, due = super().arrived(line), []
        with self._watching:
            for watched in [watched for watched in self._watched if re.search(watched[0], line)]:
                watched[2] -= 1
                if watched[2] == 0:
                    self._watched.remove(watched)
                    due.append(watched[1])
        for do in due:
            do()
        return fault

    def answer(self, line, headers, body):
        if TOKEN.encode() in line.encode() + body:
            self.leaks.append(line)
        return super().answer(line, headers, body)


def files_with(word, *folders):
    paths = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in paths if word.encode() in path.read_bytes()]


class Run:
    """A training process; what it says goes to a file."""

    def __init__(self, command, output, text_file, environment, hub):
        self.output, self.hub, self._file = output, hub, text_file
        self.home = Path(environment["HF_HOME"])
        with open(text_file, "w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                cwd=ROOT,
            )

    @property
    def text(self):
        """What it has said so far."""
        return self._file.read_text()

    @property
    def step(self):
        """The last one in its log."""
        try:
            return read_log(self.output)[-1]["step"]
        except (OSError, ValueError, IndexError):
            return 0

    @property
    def checkpoints(self):
        return sorted(int(path.name[11:]) for path in self.output.glob("checkpoint-*"))

    def until(self, condition):
        """Waits for a condition while the run goes on."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.text[-3000:]
            time.sleep(0.01)

    def until_said(self, words):
        self.until(lambda: words in self.text)

    def end(self):
        """Waits for its end and returns the exit code. The token must be nowhere."""
        try:
            self.code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.text[-3000:]) from None
        assert TOKEN not in self.text
        assert not files_with(TOKEN, self.output, self.home)
        if self.hub is not None:
            assert not self.hub.leaks
            commits = [files for repo in self.hub.repos.values() for _, files in repo.history]
            assert not any(TOKEN.encode() in data for files in commits for data in files.values())
        return self.code

    def succeed(self):
        assert self.end() == 0, self.text[-3000:]
        assert "Traceback" not in self.text
        return self

    def error(self, code=1):
        """The sentence with which it must have ended."""
        assert self.end() == code, self.text[-3000:]
        assert "Traceback" not in self.text
        (sentence,) = re.findall(r"^[\w.]+: error: (.*)$", self.text, re.MULTILINE)
        return sentence


class Place:
    """Where a scenario's runs are, with the flags that they share."""

    def __init__(self, folder, sd, photos, stack):
        self.folder, self.sd, self.photos, self._stack = folder, sd, photos, stack

    def hub(self, **settings):
        return self._stack.enter_context(WatchedHub(**settings))

    def start(
        self, *words, hub=None, name="out", steps=4, push=True, home=None, processes=1, model=None, **environment
    ):
        """Flags may be overridden by `words`; name: of the output folder. A new one has an HF_HOME of its own."""
        home = home or self.folder / f"home of {name}"
        environment = {"HF_HOME": str(home), **(hub.environment() if hub else {"HF_TOKEN": ""}), **environment}
        launcher = []
        if processes > 1:
            launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml"]
            launcher += ["--num_processes", processes, "--mixed_precision", "no", "--main_process_port", 0]
            environment["ACCELERATE_USE_CPU"] = "true"
        flags = ["--pretrained_model_name_or_path", model or self.sd, "--train_data_dir", self.photos]
        flags += ["--output_dir", self.folder / name, "--max_train_steps", steps, "--checkpointing_steps", 2]
        flags += ["--resolution", 64, "--train_batch_size", 2, "--logging_steps", 1, "--learning_rate", 0.001]
        flags += ["--lpl_weight", 0.5, "--lpl_sigma_threshold", 80, "--seed", 0, "--report_to", "none"]
        flags += ["--push_to_hub", "--hub_model_id", MODEL] if push else []
        script = ROOT / ("train_lpl_dit.py" if model else "train_lpl_sd.py")
        command = [sys.executable, *launcher, IMPATIENT, script, *flags, *words]
        return Run(command, self.folder / name, self.folder / f"{name}.txt", environment, hub)


def after(*scenarios):
    """The test gets what each of these functions of a `Place` returns, as `ended`."""
    return pytest.mark.parametrize("ended", scenarios, indirect=True, ids=lambda scenario: scenario.__name__)


@pytest.fixture(scope="module")
def started(request, tiny_sd, photos, tiny_pipeline, tmp_path_factory):
    chosen = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    scenarios = dict.fromkeys(spec.params["ended"] for spec in chosen if spec and "ended" in spec.params)
    tiny_pipeline("PixArtSigma")
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(3))
        futures = {}
        for scenario in scenarios:
            place = Place(tmp_path_factory.mktemp(scenario.__name__), tiny_sd, photos, stack)
            place.pixart = tiny_pipeline("PixArtSigma")
            futures[scenario] = pool.submit(scenario, place)
        yield futures


@pytest.fixture
def ended(request, started):
    return started[request.param].result()


def checkpoints(files):
    """Steps of the checkpoints of which there is anything among the files of a commit."""
    return sorted({int(found[1]) for path in files if (found := re.match(r"checkpoint-(\d+)/", path))})


def assert_complete(files):
    """All checkpoints of a commit are what their own lists say."""
    for step in checkpoints(files):
        folder = f"checkpoint-{step}/"
        sizes = {path.removeprefix(folder): len(data) for path, data in files.items() if path.startswith(folder)}
        state = json.loads(files[f"{folder}training_state.json"])
        del sizes["training_state.json"]
        assert sizes == state["files"] and state["step"] == step


def assert_all_there(hub, run, steps, result=True):
    """The repository has these checkpoints and the result as they are on the disk, and was never half filled."""
    repo = hub.repos[MODEL]
    for _, files in repo.history:
        assert_complete(files)
    assert checkpoints(repo.files) == list(steps)
    kept = [f"checkpoint-{step}" for step in steps]
    if result:
        lora = [path.name for path in run.output.glob("*.safetensors")]
        parts = ["README.md", *lora] if lora else RESULT
        assert {path.split("/")[0] for path in repo.files} >= {*parts}
        kept += parts
    for path in (path for name in kept for path in [run.output / name, *(run.output / name).rglob("*")]):
        if path.is_file():
            assert repo.files[path.relative_to(run.output).as_posix()] == path.read_bytes()


def assert_same_tensors(expected, weights):
    assert expected.keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in expected.items())


def rows(output):
    """The log without what was measured."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in read_log(output)]


# The repository


def refused_repositories(place):
    """Runs that must end before they begin, by what is wrong; with the Hub of each."""
    starts = {
        "no token": (["--hub_model_id", "mine"], {"HF_TOKEN": ""}),
        "a wrong one": (["--hub_token", f"{TOKEN}?"], {"HF_TOKEN": ""}),
        "a read-only one": ([], {"HF_TOKEN": "hf_reader"}),
        "somebody else's": (["--hub_model_id", "someone/model"], {}),
        "not a name": (["--hub_model_id", "of/three/parts"], {}),
        "a public one": (["--hub_private_repo"], {}),
        "down": ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        "down, and nothing here": (["--resume_from_checkpoint", "hub"], {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        "a private one, by nobody": (["--resume_from_checkpoint", "someone/secret"], {"HF_TOKEN": ""}),
    }
    hub, runs = place.hub(tokens={"hf_reader": "tester"}, read_only={"hf_reader"}), {}
    hub.repos |= {"someone/model": Repo(), MODEL: Repo(), "someone/secret": Repo(private=True)}
    for number, (name, (words, environment)) in enumerate(starts.items()):
        runs[name] = place.start(*words, hub=hub, name=name, **environment)
        if number % 3 == 2:
            [run.process.wait(PATIENCE) for run in runs.values()]
    return hub, runs


@after(refused_repositories)
@pytest.mark.parametrize(
    "name, sentence",
    [
        ("no token", r"--push_to_hub: .* mine \(.*\): log in with `hf auth login`, give --hub_token"),
        ("a wrong one", r"--push_to_hub: .* tester/model \(.*\): log in with `hf auth login`, give --hub_token"),
        ("a read-only one", r"--push_to_hub: .* tester/model \(You don't have .*\)"),
        ("somebody else's", r"--push_to_hub: .* someone/model \(You don't have write access to someone/model\)"),
        ("not a name", r"--push_to_hub: .* of/three/parts \(Repo id must .*\).*--hub_model_id"),
        ("a public one", r"--hub_private_repo: tester/model exists and is public; name another --hub_model_id"),
        ("down", r"--push_to_hub: .* tester/model \(.*refused.*\): .* or leave --push_to_hub out"),
        ("down, and nothing here", r"--resume_from_checkpoint hub: .*\(.*refused.*\), and there is no checkpoint in "),
        ("a private one, by nobody", r"--resume_from_checkpoint someone/secret: .*`hf auth login` or --hub_token"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_done(ended, name, sentence):
    hub, runs = ended
    run = runs[name]
    assert re.search(sentence, run.error(2 if sentence.startswith("--resume") else 1))
    assert "LPL applies" not in run.text and not run.output.exists()
    assert hub.repos.keys() == {"someone/model", MODEL, "someone/secret"}
    assert all(len(repo.history) == 1 for repo in hub.repos.values())


# What is uploaded, and when


def newest_alone(place):
    """--hub_strategy checkpoint: the Hub lets the first upload wait until training is over."""
    hub = place.hub()
    release = hub.hold("POST .*/commit/")
    run = place.start(*CHECKPOINTS, "--hub_private_repo", "--hub_model_id", "model", hub=hub, steps=8)
    run.until(lambda: run.step == 8 and 8 in run.checkpoints)
    commits_before = len(hub.repos[MODEL].history)
    release.set()
    return hub, run.succeed(), commits_before


@after(newest_alone)
def test_training_does_not_wait_for_uploads(ended):
    hub, run, commits_before = ended
    assert commits_before == 1  # all steps were done by then
    assert run.checkpoints == [2, 4, 6, 8]


@after(newest_alone)
def test_only_the_newest_checkpoint_is_kept_in_the_repository(ended):
    hub, run, _ = ended
    assert_all_there(hub, run, [8])
    history = hub.repos[MODEL].history
    assert [checkpoints(files) for _, files in history] == [[], [2], [2, 8], [8], [8]]  # never without one
    assert hub.repos[MODEL].private
    messages = [message for message, _ in history]
    assert messages[1:3] == ["Checkpoint of step 2", "Checkpoint of step 8"] and messages[-1] == "End of training"


def few_on_the_disk(place):
    """--checkpoints_total_limit 1, and the Hub lets the first upload wait until training is over."""
    hub = place.hub()
    hub.repos[MODEL] = Repo(files={"notes.txt": b"mine", "unet/old.bin": b"old"})
    release = hub.hold("PUT .*/lfs/")
    limits = ["--checkpoints_total_limit", 1, "--report_to", "tensorboard", "--hub_token", f"{TOKEN}\n"]
    run = place.start(*ALL_CHECKPOINTS, *limits, hub=hub, steps=8, HF_TOKEN="")
    run.until(lambda: run.step == 8 and 8 in run.checkpoints and 6 not in run.checkpoints)
    run.checkpoints_meanwhile = run.checkpoints
    release.set()
    return hub, run.succeed()


@after(few_on_the_disk)
def test_a_checkpoint_is_not_removed_while_it_is_read(ended):
    hub, run = ended
    assert run.checkpoints_meanwhile == [2, 8]
    assert_all_there(hub, run, [2, 8])
    dropped = re.findall(r"checkpoint-(\d+) is removed before it could be uploaded", run.text)
    assert dropped == ["4", "6"]


@after(few_on_the_disk)
def test_other_files_of_ones_own_repository_stay_but_for_an_older_result(ended):
    hub, run = ended
    assert hub.repos[MODEL].files["notes.txt"] == b"mine" and "unet/old.bin" not in hub.repos[MODEL].files
    assert not hub.repos[MODEL].private
    assert (run.output / "logs").is_dir()
    assert not {path.split("/")[0] for path in hub.repos[MODEL].files} & {"logs", "train_log.jsonl"}


@after(few_on_the_disk)
def test_the_token_would_be_found(ended, tmp_path):
    _, run = ended
    assert files_with("hparams", run.output) and files_with("tester/model", run.output)
    secrets = tmp_path / "checkpoint-2" / "state"
    secrets.parent.mkdir()
    secrets.write_bytes(b"\0" + TOKEN.encode())
    assert files_with(TOKEN, tmp_path) == [secrets]


def at_the_end(place):
    """By default, of a transformer, after a login."""
    hub, home = place.hub(), place.folder / "login"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    run = place.start(hub=hub, home=home, HF_TOKEN="", model=place.pixart)
    run.until(lambda: hub.met("POST /api/models/tester/model/commit"))
    run.process.wait(PATIENCE)
    (home / "token").unlink()
    return hub, run.succeed()


@after(at_the_end)
def test_by_default_the_result_alone_is_uploaded(ended):
    hub, run = ended
    repo = hub.repos[MODEL]
    assert [message for message, _ in repo.history[1:]] == ["End of training"]
    assert checkpoints(repo.files) == [] and run.checkpoints == [2, 4]
    uploaded = {path for path in repo.files}
    local = {path.relative_to(run.output).as_posix() for path in run.output.rglob("*") if path.is_file()}
    assert uploaded == {path for path in local if not path.startswith("checkpoint-") and path != "train_log.jsonl"}
    assert all(repo.files[path] == (run.output / path).read_bytes() for path in uploaded)


# Faults


def down_at_the_start(place):
    """A run that is gone on with while the Hub is away, which then comes back."""
    place.start(push=False).succeed()
    hub = place.hub()
    hub.down()
    words = [*ALL_CHECKPOINTS, "--resume_from_checkpoint", "hub"]
    run = place.start(*words, hub=hub, steps=40)
    run.until_said("checkpoint-6 is not uploaded yet")
    hub.up()
    return hub, run.succeed()


@after(down_at_the_start)
def test_a_resumed_run_goes_on_without_the_hub_and_uploads_when_it_is_back(ended):
    hub, run = ended
    assert re.search(r"^--resume_from_checkpoint hub: .*refused.*; going on from .*/checkpoint-4\.$", run.text, re.M)
    assert re.search(r"^--push_to_hub: .*refused.* The run goes on, and so do the attempts\.$", run.text, re.M)
    assert_all_there(hub, run, range(6, 41, 2))


def down_in_the_middle(place):
    hub = place.hub()
    hub.when("POST .*/objects/batch", hub.down)
    run = place.start(*ALL_CHECKPOINTS, hub=hub, steps=20)
    run.until_said("checkpoint-2 is not uploaded yet")
    hub.up()
    return hub, run.succeed()


@after(down_in_the_middle)
def test_nothing_is_missing_after_a_hub_that_was_away(ended):
    hub, run = ended
    assert_all_there(hub, run, range(2, 21, 2))
    assert run.text.count("is not uploaded yet") >= 1
    assert not re.search(r"is not uploaded \(", run.text)


def down_at_the_end(place):
    """From the second checkpoint on. Then the commands that were printed are run."""
    hub = place.hub()
    hub.when("POST .*/preupload/", hub.down, count=2)
    run = place.start(*ALL_CHECKPOINTS, "--hub_private_repo", hub=hub, name="the output")
    run.sentence = run.error(3)
    run.history_before = len(hub.repos[MODEL].history)
    hub.up()
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(place.folder / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    del hub.repos[MODEL]  # it may have been another one's fault
    for command in re.findall(r"`(hf upload [^`]*)`", run.sentence):
        subprocess.run(["sh", "-ec", command], env=environment, check=True, cwd=place.folder, capture_output=True)
    return hub, run


@after(down_at_the_end)
def test_a_result_that_is_not_uploaded_is_safe(ended):
    from diffusers import StableDiffusionPipeline

    _, run = ended
    assert run.history_before == 2
    assert f"the result is safe in {run.output}" in run.sentence and "`hf auth login`" in run.sentence
    unet = StableDiffusionPipeline.from_pretrained(run.output, local_files_only=True).unet
    assert_same_tensors(load_file(run.output / "checkpoint-4" / WEIGHTS), unet.state_dict())


@after(down_at_the_end)
def test_the_commands_that_are_printed_do_what_was_not_done(ended):
    hub, run = ended
    commands = re.findall(r"`(hf upload [^`]*)`", run.sentence)
    assert len(commands) == 2 and shlex.split(commands[1])[3] == str(run.output / "checkpoint-4")
    assert_all_there(hub, run, [4])
    assert hub.repos[MODEL].private
    uploaded = {path.split("/")[0] for path in hub.repos[MODEL].files}
    assert uploaded == {path.name for path in run.output.iterdir()} - {"checkpoint-2", "train_log.jsonl"}


def many_faults(place):
    """Each of them meets an attempt to upload; as often as it is needed to get past the client's own attempts."""
    hub = place.hub()
    commit, preupload, batch, put = "POST .*/commit/", "POST .*/preupload/", "POST .*/objects/batch", "PUT .*/lfs/"
    kinds = (500, 502, 503, 504, "cut", "reset", "lost")
    hub.faults += [Fault(pattern, kind) for pattern in (preupload, commit) for kind in kinds]
    hub.faults += [Fault(pattern, kind) for pattern in (batch, put) for kind in (500, 503, "cut", "reset", "lost")]
    hub.faults += [Fault(commit, 429, seconds=1), Fault("GET .*/tree/", 503), Fault("GET .*/tree/", "reset")]
    run = place.start(*CHECKPOINTS, *LORA, hub=hub, steps=6)
    return hub, run.succeed()


@after(many_faults)
def test_what_passes_is_tried_again(ended):
    hub, run = ended
    assert not [fault for fault in hub.faults if fault.times]
    assert_all_there(hub, run, [6])
    for step in (2, 4, 6):
        assert run.text.count(f"checkpoint-{step} is not uploaded yet") <= 1


def faults_at_the_end(place):
    hub = place.hub()
    hub.faults += [Fault("POST .*/validate-yaml", kind) for kind in (502, 500, "cut")]
    hub.faults += [Fault("POST .*/commit/", kind) for kind in (504, "reset", "lost")]
    run = place.start(hub=hub, steps=2)
    return hub, run.succeed()


@after(faults_at_the_end)
def test_the_result_is_tried_again_too(ended):
    hub, run = ended
    assert not [fault for fault in hub.faults if fault.times]
    assert_all_there(hub, run, [])
    assert [message for message, _ in hub.repos[MODEL].history[1:]] == ["End of training"]  # once
    assert f"Uploaded to {hub.endpoint}/{MODEL}/commit/{hub.repos[MODEL].shas[-1]}" in run.text


def revoked(place):
    """The token is taken back while the second checkpoint goes up."""
    hub = place.hub()
    hub.when("POST .*/preupload/", lambda: hub.users.clear(), count=2)
    run = place.start(*ALL_CHECKPOINTS, hub=hub, steps=20)
    run.sentence = run.error(3)
    return hub, run


def forbidden(place):
    """The right to write is."""
    hub = place.hub()
    hub.when("POST .*/preupload/", lambda: setattr(hub, "read_only", {TOKEN}), count=2)
    run = place.start(*CHECKPOINTS, hub=hub, steps=20)
    run.sentence = run.error(3)
    return hub, run


@after(revoked, forbidden)
def test_a_token_that_is_taken_back_does_not_end_training(ended):
    hub, run = ended
    assert run.step == 20 and (run.output / WEIGHTS).exists()
    assert checkpoints(hub.repos[MODEL].files) == [2]
    said = re.findall(r"checkpoint-(\d+) is not uploaded \((Invalid credentials|You don't have write)", run.text)
    assert said and len(said) == len(set(said))
    assert "is not uploaded yet" not in run.text  # it does not pass
    missing = re.findall(r"`hf upload tester/model \S+ (checkpoint-\d+)`", run.sentence)
    assert missing[-1] == "checkpoint-20" and len(missing) == (9 if hub.users == {} else 1)


# Ends before the end


def not_a_number(place):
    """The upload of the checkpoint of step 1 is not done when the loss is not finite any more."""
    hub = place.hub()
    release = hub.hold("POST .*/commit/")
    words = ["--learning_rate", 1e18, "--checkpointing_steps", 1, "--lpl_weight", 0]
    run = place.start(*CHECKPOINTS, *words, hub=hub)
    run.until_said("Waiting for the upload")
    release.set()
    run.sentence = run.error(1)
    return hub, run


@after(not_a_number)
def test_a_run_that_fails_finishes_its_uploads(ended):
    hub, run = ended
    assert "loss nan" in run.sentence or "loss inf" in run.sentence
    assert_all_there(hub, run, [1], result=False)
    assert run.text.index("error: ") < run.text.index("checkpoint-1 is uploaded to")


def interrupted_twice(place):
    hub = place.hub()
    release = hub.hold("PUT .*/lfs/")
    run = place.start(*CHECKPOINTS, hub=hub, steps=ENDLESS)
    run.until(lambda: run.step >= 2 and hub.met("PUT"))
    run.process.send_signal(signal.SIGINT)
    run.until_said("Waiting for the upload")
    time.sleep(3.2)  # launchers pass on a Ctrl-C at once
    run.process.send_signal(signal.SIGINT)
    run.until_said("Left.")
    try:
        run.process.wait(10)
        run.ended_at_once = True
    except subprocess.TimeoutExpired:
        run.ended_at_once = False
    release.set()
    run.end()
    return hub, run


@after(interrupted_twice)
def test_a_second_interrupt_leaves_the_upload(ended):
    hub, run = ended
    assert run.ended_at_once and "Traceback" not in run.text
    assert checkpoints(hub.repos[MODEL].files) == []
    (command,) = re.findall(r"Left. What is missing: `(hf upload .*)`\.", run.text)
    assert command.split()[-1] == f"checkpoint-{run.step}"


def interrupted_at_the_end(place):
    """Ctrl-C, once, while the last checkpoint goes up."""
    hub = place.hub()
    release = hub.hold("POST .*/commit/")
    run = place.start(*CHECKPOINTS, hub=hub)
    run.until_said("Waiting for the upload")
    run.process.send_signal(signal.SIGINT)
    try:
        run.sentence = run.error(3)
    finally:
        release.set()
    return hub, run


@after(interrupted_at_the_end)
def test_an_interrupt_at_the_end_leaves_the_upload_of_the_checkpoint_alone(ended):
    hub, run = ended
    assert WEIGHTS in hub.repos[MODEL].files
    commands = re.findall(r"the result is at http\S+ What is missing: `(hf upload .*)`\.$", run.sentence)
    assert [shlex.split(command)[4] for command in commands] == ["checkpoint-4"]


# Elsewhere


def elsewhere(place, *words, **settings):
    """A run of 40 steps, one that SIGTERM ends with uploads waiting, and one that goes on with it on another machine.

    Returns the Hub and the three runs.
    """
    words = [*words, "--checkpointing_steps", 5]
    whole = place.start(*words, push=False, name="whole", steps=40, **settings)
    whole.succeed()
    hub = place.hub()
    release = hub.hold("POST .*/preupload/")
    first = place.start(*words, *ALL_CHECKPOINTS, hub=hub, name="first", steps=40, **settings)
    first.until(lambda: hub.met("/preupload/") and first.step > 5)
    first.process.send_signal(signal.SIGTERM)
    first.until_said("Waiting for the upload")
    release.set()
    first.succeed()
    resume = ["--resume_from_checkpoint", "hub", *ALL_CHECKPOINTS]
    second = place.start(*words, *resume, hub=hub, name="second", steps=40, **settings)
    return hub, whole, first, second.succeed()


def of_all_weights(place):
    return elsewhere(place)


def of_a_lora_and_its_average(place):
    return elsewhere(place, *LORA, "--output_kohya_format", "--save_non_ema")


def of_a_transformer(place):
    return elsewhere(place, *LORA, model=place.pixart)


@after(of_all_weights, of_a_lora_and_its_average, of_a_transformer)
def test_uploads_are_finished_after_a_signal(ended):
    hub, _, first, second = ended
    assert "Stopped by SIGTERM" in first.text and "--resume_from_checkpoint hub" in first.text
    assert 5 < first.step < 40
    assert f"checkpoint-{first.step} is uploaded to {MODEL}" in first.text


@after(of_all_weights, of_a_lora_and_its_average, of_a_transformer)
def test_on_another_machine_the_run_goes_on_bit_by_bit(ended):
    hub, whole, first, second = ended
    assert f"Resuming from {second.output}/checkpoint-{first.step} at step {first.step}" in second.text
    assert rows(second.output) == rows(whole.output) and [row["step"] for row in rows(whole.output)] == [*range(1, 41)]
    weights = [path.relative_to(whole.output) for path in whole.output.rglob("*.safetensors")]
    weights = [path for path in weights if not path.parts[0].startswith("checkpoint-")]
    assert weights
    for path in weights:
        assert_same_tensors(load_file(whole.output / path), load_file(second.output / path))
        assert (second.output / path).read_bytes() == hub.repos[MODEL].files[path.as_posix()]
    assert_all_there(hub, second, sorted({*range(5, 41, 5), first.step}), result=True)


def of_two_processes(place):
    whole = place.start(push=False, name="whole", steps=6, processes=2).succeed()
    hub = place.hub()
    first = place.start(*CHECKPOINTS, hub=hub, name="first", processes=2).succeed()
    resume = ["--resume_from_checkpoint", "hub", *CHECKPOINTS]
    second = place.start(*resume, hub=hub, name="second", steps=6, processes=2).succeed()
    return hub, whole, first, second


@after(of_two_processes)
def test_two_processes_go_on_from_the_hub(ended):
    hub, whole, first, second = ended
    assert "2 samples x 2 processes" in second.text
    assert f"Resuming from {second.output}/checkpoint-4 at step 4" in second.text
    assert rows(second.output) == rows(whole.output)
    assert_same_tensors(load_file(whole.output / WEIGHTS), load_file(second.output / WEIGHTS))
    assert_all_there(hub, second, [6])


def a_broken_download(place):
    """The Hub goes away while the newest checkpoint comes from it; then it is there again."""
    first_hub = place.hub()
    place.start(*ALL_CHECKPOINTS, hub=first_hub, name="first").succeed()
    runs = {}
    for name, kind, times in (("mended", "reset", 1), ("for good", 503, 10**6)):
        hub = place.hub()
        hub.repos[MODEL] = first_hub.repos[MODEL]
        hub.faults.append(Fault("GET .*/resolve/.*/checkpoint-4/optimizer.bin", kind, times))
        runs[name] = place.start("--resume_from_checkpoint", MODEL, hub=hub, name=name, push=False, steps=6)
    hub = place.hub()
    hub.repos[MODEL] = first_hub.repos[MODEL]
    hub.when("GET .*/resolve/.*/checkpoint-4/optimizer.bin", hub.down)
    runs["away"] = place.start("--resume_from_checkpoint", "hub", hub=hub, name="away", steps=6)
    for run in runs.values():
        run.end()
    return runs


@after(a_broken_download)
def test_a_broken_download_never_means_an_older_checkpoint(ended):
    run = ended["mended"].succeed()
    assert "checkpoint-4 at step 4" in run.text and [row["step"] for row in read_log(run.output)] == [*range(1, 7)]
    for name in ("for good", "away"):
        assert re.search(r"--resume_from_checkpoint (tester/model|hub): ", ended[name].error(2))
        assert not (ended[name].output / "train_log.jsonl").exists()


# What others have of it


READ = """
import sys
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

kind, base, file = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
if kind == "lora":
    pipe.load_lora_weights("tester/model")
save_file({name: tensor.contiguous() for name, tensor in pipe.unet.state_dict().items()}, file)
"""


def read_back(place, hub, kind, base):
    file = place.folder / "read.safetensors"
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(place.folder / "reader"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, kind, str(base), file]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return load_file(file)


def pipeline_for_others(place):
    hub = place.hub()
    run = place.start(*ALL_CHECKPOINTS, "--use_ema", "--save_non_ema", hub=hub).succeed()
    return hub, run, read_back(place, hub, "pipeline", MODEL)


def lora_for_others(place):
    hub = place.hub()
    run = place.start(*ALL_CHECKPOINTS, *LORA, "--output_kohya_format", "--save_non_ema", hub=hub).succeed()
    return hub, run, read_back(place, hub, "lora", place.sd)


@after(pipeline_for_others)
def test_a_repository_with_checkpoints_loads_as_a_pipeline(ended):
    hub, run, weights = ended
    assert_all_there(hub, run, [2, 4])
    assert_same_tensors(load_file(run.output / WEIGHTS), weights)


@after(lora_for_others)
def test_a_repository_with_checkpoints_loads_as_a_lora(ended):
    hub, run, weights = ended
    files = hub.repos[MODEL].files
    names = {path for path in files if "lora_weights" in path and "/" not in path}
    assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"} < names and len(names) == 3
    trained = load(files["pytorch_lora_weights.safetensors"])
    trained = {name.removeprefix("unet."): tensor for name, tensor in trained.items()}
    loaded = {re.sub(r"\.default(_\d+)?\.", ".", name): tensor for name, tensor in weights.items() if "lora_" in name}
    assert_same_tensors(trained, loaded)
