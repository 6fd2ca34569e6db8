"""Whatever kills, stops or starves a run, resumed it ends as the undisturbed one, bit by bit.

The runs are processes of their own, started as users start them. A run's state is read from its folder alone: the log
has a row for each step with the measured speed, so a row that was written anew is another one.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import read_log


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_lpl_sd.py"
STEPS = {1: 200, 2: 100}  # of a run on so many processes
EVERY = 5  # steps between checkpoints, where a test does not say otherwise
PATIENCE = 120  # seconds for what takes ten

MORTAL = '''
"""mortal.py RANK WHAT WHERE SCRIPT FLAGS...: the process of this rank dies by SIGKILL.

WHAT is an audit event of Python, at which it dies, or `half`: when half of a file has been written. WHERE is a
pattern of the path.
"""

import os
import re
import runpy
import signal
import sys


rank, what, where = sys.argv[1:4]


def die(path):
    if re.search(where, str(path)) and os.environ.get("RANK", "0") == rank:
        if what == "half":
            os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def half(save):
    def save_and_die(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        die(path)

    return save_and_die


if what == "half":
    import safetensors.torch
    import torch

    torch.save, safetensors.torch.save_file = half(torch.save), half(safetensors.torch.save_file)
else:
    sys.addaudithook(lambda event, args: event == what and die(args[0]))
sys.argv = sys.argv[4:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
'''


class Run:
    """A script on one process, or on several by `accelerate launch`, with a file for what they say.

    ignored: a signal that the process started here ignores.
    """

    def __init__(self, script, text_file, processes=1, ignored=None):
        launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml"]
        launcher += ["--num_processes", processes, "--mixed_precision", "no", "--main_process_port", 0]
        command = [sys.executable, *(launcher if processes > 1 else ()), *script]
        self.processes, self._file = processes, text_file
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with open(text_file, "w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: ignored and signal.signal(ignored, signal.SIG_IGN),
            )
        self._tree = {self.process.pid: psutil.Process(self.process.pid)}

    @property
    def text(self):
        """What they have said so far."""
        return self._file.read_text()

    @property
    def workers(self):
        """Rank -> psutil.Process."""
        self.processes_now()
        if self.processes == 1:
            return {0: self._tree[self.process.pid]}
        children = [p for p in self._tree.values() if lives(p) and p.ppid() == self.process.pid]
        return {int(p.environ()["RANK"]): p for p in children if "RANK" in p.environ()}

    def processes_now(self):
        """All of them that live, also those whose parent does not."""
        for known in list(self._tree.values()):
            try:
                self._tree |= {p.pid: p for p in known.children(recursive=True)}
            except psutil.NoSuchProcess:
                pass
        self.process.poll()
        return [p for p in self._tree.values() if lives(p)]

    def until(self, condition):
        """Waits for a condition while the run goes on."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < end, self.text[-3000:]
            time.sleep(0.002)

    def signal(self, number, ranks=None):
        """To all processes at once, the launcher too, or to some ranks; -1 is the launcher."""
        whom = self.processes_now()
        if ranks is not None:
            ranked = {-1: self._tree[self.process.pid], **self.workers}
            whom = [ranked[rank] for rank in ranks]
        for process in whom:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass

    def end(self):
        """Waits for its end, after which none of its processes may be left, and returns the exit code."""
        code = self.process.wait(PATIENCE)
        psutil.wait_procs(self.processes_now(), 5)
        assert not self.processes_now()
        return code


def lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def start(tiny_sd, photos, tmp_path_factory):
    """Starts train_lpl_sd.py and returns its `Run`. dies: rank, what, where, as of `mortal.py`; more as of `Run`.

    With dropout, an average and a schedule there is much to forget.
    """
    folder, runs = tmp_path_factory.mktemp("runs"), []
    model = shutil.copytree(tiny_sd, folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "dropout": 0.2}))
    (folder / "mortal.py").write_text(MORTAL)

    def command(output, *words, steps=("--max_train_steps", STEPS[1])):
        flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, "--output_dir", output]
        flags += ["--report_to", "none", "--resolution", 64, "--train_batch_size", 2, "--logging_steps", 1]
        flags += ["--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 10, "--lpl_weight", 0, "--seed", 0]
        return [SCRIPT, *flags, "--checkpointing_steps", EVERY, *steps, *words]

    def start(output, *words, processes=1, steps=None, dies=(), **more):
        steps = steps or ("--max_train_steps", STEPS[processes])
        script = [folder / "mortal.py", *dies] if dies else []
        script += command(output, *words, steps=steps)
        runs.append(Run(script, folder / f"{len(runs)}.txt", processes, **more))
        return runs[-1]

    start.command = command
    yield start
    for run in runs:
        run.signal(signal.SIGKILL)
        run.process.wait()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """processes -> the folder of a run that nothing has happened to."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def output(processes):
        if processes not in done:
            run = start(folder / str(processes), processes=processes)
            assert run.end() == 0, run.text[-3000:]
            assert f"2 samples x {processes} processes" in run.text
            assert [row["step"] for row in read_log(folder / str(processes))] == [*range(1, STEPS[processes] + 1)]
            done[processes] = folder / str(processes)
        return done[processes]

    return output


LATEST = ("--resume_from_checkpoint", "latest")


def rows(output):
    """The log's complete rows as they were written."""
    log = output / "train_log.jsonl"
    return [row for row in log.read_text().splitlines(keepends=True) if row.endswith("\n")] if log.exists() else []


def kept(before, after):
    """How many rows of a log were still there when the next run wrote to it: the step at which that one began."""
    return next((i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after)))


def steps_of_checkpoints(output):
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))


def must_be_kept(output):
    """The step of the last checkpoint that was complete for sure: the log has a step after it."""
    return max(0, len(rows(output)) - 1) // EVERY * EVERY


def files_of(output, last):
    """Path -> content: the result, and the last checkpoint with all that a run needs to go on."""
    files = {path.relative_to(output): path for path in sorted(output.rglob("*")) if path.is_file()}
    others = [path for path in files if path.parts[0].startswith(("checkpoint-", "train_log"))]
    wanted = [path for path in files if path not in others or path.parts[0] == f"checkpoint-{last}"]
    return {path.as_posix(): content(files[path]) for path in wanted}


def content(path):
    """Its bytes, without times; of a process's random state what is random, since it counts forward passes, too."""
    if path.name == "train_log.jsonl":
        return [(row["step"], row["loss"], row["lr"]) for row in read_log(path.parent)]
    if path.name == "training_state.json":
        state = json.loads(path.read_text())
        assert state.pop("spent") and state["files"].pop("train_log.jsonl")
        return state
    if not path.name.startswith("random_states"):
        return path.read_bytes()
    state = torch.load(path, weights_only=False)
    return state["random_state"], state["numpy_random_seed"][1].tolist(), state["torch_manual_seed"].tolist()


def assert_as_undisturbed(output, reference):
    log, expected = ([(row["step"], row["loss"], row["lr"]) for row in read_log(o)] for o in (output, reference))
    assert log == expected
    files, expected = files_of(output, len(log)), files_of(reference, len(log))
    assert {"unet/diffusion_pytorch_model.safetensors", "model_index.json"} < expected.keys()
    assert f"checkpoint-{len(log)}/unet_ema/diffusion_pytorch_model.safetensors" in expected
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


def kill_at_random(start, rng, output, *words, processes=1, victims=None, early=False):
    """Starts or resumes a run, kills it at a random moment, and checks at which step it had begun.

    victims: the ranks to kill, if not all with the launcher; early: at any moment from its start on.
    """
    before, due = rows(output), must_be_kept(output)
    new_steps, seconds = rng.randint(1, 12), rng.uniform(0, 6 if early else 0.1)
    run = start(output, *words, *LATEST, processes=processes)
    if not early:
        run.until(lambda: len(rows(output)) - kept(before, rows(output)) >= new_steps)
    time.sleep(seconds)
    assert run.process.poll() is None, run.text[-3000:]
    run.signal(signal.SIGKILL, victims)
    code = run.end()
    after = rows(output)
    begun = kept(before, after)
    told = f"{len(before)} steps done, {due} sure; begun at {begun}, killed after {len(after)}"
    print(f"{told}: {'all' if victims is None else f'rank {victims}'}, exit code {code}")
    assert code != 0 if victims else code == -signal.SIGKILL
    if len(after) > begun:
        assert f"2 samples x {processes} processes" in run.text and begun % EVERY == 0
    else:
        assert early
    assert begun >= due
    assert [json.loads(row)["step"] for row in after] == [*range(1, len(after) + 1)]


def go_on(start, output, *words, processes=1, **more):
    """Resumes a run, which comes to its end, and returns what it said."""
    before, due = rows(output), must_be_kept(output)
    run = start(output, *words, *LATEST, processes=processes, **more)
    assert run.end() == 0, run.text[-3000:]
    assert kept(before, rows(output)) >= due
    assert not list(output.glob("tmp-*"))
    return run.text


def test_killed_at_random_moments(start, undisturbed, tmp_path):
    rng, output = random.Random(0), tmp_path / "out"
    for early in [False] * 5 + [True] + [False] * 4:
        kill_at_random(start, rng, output, "--checkpoints_total_limit", 1, early=early)
    go_on(start, output, "--checkpoints_total_limit", 1)
    assert steps_of_checkpoints(output) == [STEPS[1]]
    assert_as_undisturbed(output, undisturbed(1))


# What dies, and what it leaves behind; each run goes on from the one before.
PLACES = (
    ("half", "tmp-checkpoint-5/optimizer.bin$", {"tmp-checkpoint-5"}),
    ("half", "tmp-checkpoint-5/unet_ema/.*safetensors$", {"tmp-checkpoint-5"}),
    ("open", "tmp-checkpoint-10/training_state.json", {"tmp-checkpoint-10", "checkpoint-5"}),
    ("os.rename", "tmp-checkpoint-10$", {"tmp-checkpoint-10", "checkpoint-5"}),
    ("os.rename", "/checkpoint-5$", {"checkpoint-10", "checkpoint-5"}),
    ("os.remove", "optimizer.bin$", {"checkpoint-15", "checkpoint-10", "tmp-checkpoint-5-old"}),
    ("os.rename", "tmp-train_log.jsonl", {"checkpoint-15", "checkpoint-10", "tmp-train_log.jsonl"}),
    ("half", "tmp-result-.*/unet/.*safetensors$", {"checkpoint-200", "tmp-result-*"}),
    ("os.rename", "tmp-result-[^/]*/unet$", {"checkpoint-200", "tmp-result-*"}),
)


def test_killed_while_files_are_written_or_removed(start, undisturbed, tmp_path):
    output = tmp_path / "out"
    for what, where, left in PLACES:
        before, due = rows(output), must_be_kept(output)
        run = start(output, *LATEST, "--checkpoints_total_limit", 1, dies=(0, what, where))
        assert run.end() == -signal.SIGKILL, f"{what} {where}: {run.text[-3000:]}"
        there = [path for path in output.iterdir() if path.name.startswith(("checkpoint-", "tmp-"))]
        print(f"{what} {where}: {sorted(path.name for path in there)}")
        assert all(any(path.match(name) for path in there) for name in left) and len(there) == len(left)
        assert kept(before, rows(output)) >= due
    go_on(start, output, "--checkpoints_total_limit", 1)
    assert_as_undisturbed(output, undisturbed(1))


def test_one_or_both_of_two_processes_killed(start, undisturbed, tmp_path):
    rng, output = random.Random(1), tmp_path / "out"
    for victims in (None, [0], [1], None, [1], [0]):
        kill_at_random(start, rng, output, processes=2, victims=victims)
    done = steps_of_checkpoints(output)[-1]
    for rank, what, where in (
        (1, "half", f"tmp-checkpoint-{done + 5}/random_states_1.pkl$"),
        (0, "os.rename", f"tmp-checkpoint-{done + 5}$"),
    ):
        before, due = rows(output), must_be_kept(output)
        run = start(output, *LATEST, processes=2, dies=(rank, what, where))
        assert run.end() not in (0, None)
        assert steps_of_checkpoints(output)[-1] == done == kept(before, rows(output)) >= due
        assert len(rows(output)) == done + 5
    go_on(start, output, processes=2)
    assert_as_undisturbed(output, undisturbed(2))


def test_a_checkpoint_without_the_random_state_of_one_process(start, undisturbed, tmp_path):
    reference, output = undisturbed(2), tmp_path / "out"
    for name in ("checkpoint-95", "checkpoint-100"):
        shutil.copytree(reference / name, output / name)
    shutil.copy(reference / "train_log.jsonl", output)
    (output / "checkpoint-100" / "random_states_1.pkl").unlink()
    run = start(output, "--resume_from_checkpoint", "checkpoint-100", processes=2)
    assert run.end() != 0
    sentence = f"--resume_from_checkpoint {output}/checkpoint-100 is damaged (random_states_1.pkl is missing): choose"
    assert sentence in run.text and SCRIPT.name + '", line' not in run.text
    said = go_on(start, output, processes=2)
    assert "checkpoint-100 is damaged (random_states_1.pkl is missing) and passed over" in said
    assert f"Resuming from {output}/checkpoint-95 at step 95" in said
    assert_as_undisturbed(output, reference)


IN_A_FULL_DISK = """
mount -t tmpfs -o size=$SIZE none "$DISK" || exit 99
"$@"
echo $? > "$DISK.code"
ls "$DISK/out" > "$DISK.files"
cat "$DISK/out/train_log.jsonl" > "$DISK.log"
mount -o remount,size=64m none "$DISK"
"$@"
echo $? > "$DISK.code2"
cp -r "$DISK/out" "$DISK.out"
"""


def pages(folder):
    """Bytes on a tmpfs of a folder's files."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def run_in(disk, size, command):
    """Runs a command with its output on a disk of `size` bytes, and again when there is room.

    Returns both exit codes and all that was said. The disk is of this process alone and is gone with it.
    """
    disk.mkdir()
    shell = ["unshare", "-Urm", "sh", "-c", IN_A_FULL_DISK, "sh", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SIZE": str(size), "DISK": str(disk)}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE)
    if done.returncode == 99:
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return [int(disk.with_suffix(suffix).read_text()) for suffix in (".code", ".code2")], done.stdout + done.stderr


@pytest.mark.parametrize(
    "what, last_step, left",
    [("checkpoint", 150, [50, 100]), ("result", 200, [100, 200]), ("log", None, [100])],
)
def test_a_full_disk(start, undisturbed, tmp_path, what, last_step, left):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("unshare -Urm is not permitted")
    reference, disk = undisturbed(1), tmp_path / "disk"
    checkpoint, log = pages(reference / "checkpoint-200"), (reference / "train_log.jsonl").stat().st_size
    size = {"checkpoint": 2.5 * checkpoint, "result": 2 * checkpoint + log + 100_000, "log": checkpoint + 0.25 * log}
    command = [sys.executable, *start.command(disk / "out", *LATEST, "--checkpointing_steps", left[0])]
    codes, said = run_in(disk, int(size[what]), [str(word) for word in command])
    assert codes == [1, 0] and "Traceback" not in said, said[-3000:]
    (message,) = (line for line in said.splitlines() if "error:" in line)
    assert "No space left on device" in message and "ake room" in message
    place = {"checkpoint": f"{disk}/out/checkpoint-150 ", "result": f"the checkpoints in {disk}/out are intact"}
    assert place.get(what, "the disk is full") in message
    files = tmp_path.joinpath("disk.files").read_text().split()
    folders = [name for name in files if name.startswith(("checkpoint-", "tmp-"))]
    assert sorted(folders) == sorted(f"checkpoint-{step}" for step in left)
    done = tmp_path.joinpath("disk.log").read_text().count("\n")
    assert done == last_step or last_step is None and 100 < done < 200
    assert f"Resuming from {disk}/out/checkpoint-{left[-1]} at step {left[-1]}" in said
    assert_as_undisturbed(tmp_path / "disk.out", reference)


GOES_ON = "the same command with --resume_from_checkpoint latest goes on."


def stop(start, output, name, *words, processes=1, after=7, ranks=None, **more):
    """Starts or resumes a run, sends it a signal after some steps, and returns it when it has ended."""
    done = len(rows(output))
    run = start(output, *words, *LATEST, processes=processes, **more)
    run.until(lambda: len(rows(output)) >= done + after and len(run.workers) == processes)
    run.signal(getattr(signal, name), ranks)
    run.code = run.end()
    assert f"2 samples x {processes} processes" in run.text
    return run


def assert_stopped(run, output, name):
    """The last step has a checkpoint, and it is told how to go on."""
    step = len(rows(output))
    assert re.search(f"Stopped by {name}.* after step {step}, with a checkpoint: {re.escape(GOES_ON)}", run.text)
    assert steps_of_checkpoints(output)[-1] == step < STEPS[run.processes]
    assert "Traceback" not in run.text.partition("Stopped by")[0]
    assert not list(output.glob("tmp-*"))


def test_signals_to_a_run_and_its_loaders(start, undisturbed, tmp_path):
    output, loaders = tmp_path / "out", ("--dataloader_num_workers", 2)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        begin = len(rows(output))
        run = stop(start, output, name, *loaders)
        assert run.code == 0, run.text[-3000:]
        assert "Traceback" not in run.text
        assert_stopped(run, output, name)
        assert begin == 0 or f"checkpoint-{begin} at step {begin}" in run.text
    go_on(start, output, *loaders)
    assert_as_undisturbed(output, undisturbed(1))


def test_signals_to_two_processes(start, undisturbed, tmp_path):
    output = tmp_path / "out"
    run = stop(start, output, "SIGTERM", processes=2, ranks=[1])  # the others stop at the same step
    assert run.code == 0, run.text[-3000:]
    assert_stopped(run, output, "a signal to another process")
    run = stop(start, output, "SIGUSR1", processes=2, ranks=[0])
    assert run.code == 0, run.text[-3000:]
    assert_stopped(run, output, "SIGUSR1")
    run = stop(start, output, "SIGUSR1", processes=2, ignored=signal.SIGUSR1)  # as SLURM, to all
    assert run.code == 0, run.text[-3000:]
    assert_stopped(run, output, "SIGUSR1")
    run = stop(start, output, "SIGTERM", processes=2)  # the launcher sends it once more, and fails
    assert_stopped(run, output, "SIGTERM")
    run = stop(start, output, "SIGINT", processes=2, ranks=[-1])  # from a terminal: the others have no terminal
    assert_stopped(run, output, "SIG")
    go_on(start, output, processes=2)
    assert_as_undisturbed(output, undisturbed(2))


def test_a_signal_while_validation_images_are_drawn(start, tmp_path):
    output = tmp_path / "out"
    drawing = (
        "--validation_prompts fox --validation_steps 7 --num_validation_images 50 --validation_inference_steps 50"
    )
    run = start(output, *drawing.split())
    run.until(lambda: len(rows(output)) == 7)
    time.sleep(1)  # an image takes about as long, all fifty a minute
    run.signal(signal.SIGTERM)
    begun = time.monotonic()
    assert run.end() == 0, run.text[-3000:]
    assert time.monotonic() - begun < 20
    assert not (output / "samples").exists()
    assert len(rows(output)) == 8
    assert_stopped(run, output, "SIGTERM")


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_a_signal_before_training(start, tmp_path, name):
    run, number = start(tmp_path / "out"), getattr(signal, name)
    handled = Path("/proc", str(run.process.pid), "status")
    if not handled.exists():
        pytest.skip("no /proc")
    bit = 1 << (signal.SIGUSR1 - 1)
    run.until(lambda: int(handled.read_text().partition("SigCgt:")[2].split()[0], 16) & bit)
    run.signal(number)
    assert run.end() == 0
    assert f"Stopped by {name} before anything was done" in run.text and "Traceback" not in run.text
    assert not list(tmp_path.glob("out/*"))


def test_checkpoints_by_the_clock(start, undisturbed, tmp_path):
    run = start(tmp_path / "out", "--checkpoint_minutes", 0.01, "--checkpointing_steps", 200)
    assert run.end() == 0, run.text[-3000:]
    steps = steps_of_checkpoints(tmp_path / "out")
    seconds = [2 / row["images_per_second"] for row in read_log(tmp_path / "out")]
    print(f"checkpoints {steps} in {sum(seconds):.1f} s of training")
    assert len(steps) > 2 and steps[-1] == 200
    for first, last in zip(steps, steps[1:-1]):
        assert sum(seconds[first:last]) > 0.9 * 0.01 * 60
    assert_as_undisturbed(tmp_path / "out", undisturbed(1))


def test_epochs_end_with_the_data_whatever_they_were_begun_with(start, tmp_path):
    whole, epochs = tmp_path / "out", ("--num_train_epochs", 2)  # of 10 samples
    run = start(whole, steps=epochs)
    assert run.end() == 0, run.text[-3000:]
    assert [row["step"] for row in read_log(whole)] == [*range(1, 11)]
    for name, words, processes, per_step, told in (
        ("two", ("--checkpointing_steps", 1), 2, 4, "2 processes (was 1 process)"),
        ("batch", ("--checkpointing_steps", 1, "--train_batch_size", 3), 1, 3, "--train_batch_size 3 (was "),
    ):
        output = tmp_path / name
        shutil.copytree(whole / "checkpoint-5", output / "checkpoint-5")
        run = start(output, *words, *LATEST, steps=epochs, processes=processes)
        assert run.end() == 0, run.text[-3000:]
        last = read_log(output)[-1]["step"]
        assert 10 + (last - 5) * per_step >= 20 > 10 + (last - 6) * per_step
        assert steps_of_checkpoints(output)[-1] == last
        state = json.loads((output / f"checkpoint-{last}" / "training_state.json").read_text())
        assert state["settings"]["num_processes"] == processes and state["position"] == 10 + (last - 5) * per_step
        assert "Unlike the run to resume: " in run.text and told in run.text
