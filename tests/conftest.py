import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A tiny random Stable Diffusion pipeline for images of 64 pixels."""
    from tiny_models import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """The same for SDXL."""
    from tiny_models import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("models") / "sdxl", xl=True, scheduler="Euler")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Ten small pictures with captions."""
    from tiny_models import build_photo_folder

    return build_photo_folder(tmp_path_factory.mktemp("photos"), n=10, size=72)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """family -> a tiny random pipeline of a transformer, for images of 64 pixels; built once."""
    from tiny_transformers import build_tiny_pipeline

    folder, built = tmp_path_factory.mktemp("transformers"), {}

    def build(family):
        if family not in built:
            built[family] = build_tiny_pipeline(folder / family, family)
        return built[family]

    return build


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """Eight small pictures of two classes that the tiny DiT knows: volcano (980) and golden retriever (207)."""
    from tiny_models import build_photo_folder

    folder = tmp_path_factory.mktemp("classes")
    for name, seed in (("golden retriever", 1), ("volcano", 2)):
        (build_photo_folder(folder / name, n=4, size=72, seed=seed) / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def time_limit():
    """A hang is a failure: what waits in Python can be interrupted by a signal."""

    def stop(*_):
        raise TimeoutError("it hangs")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture
def train(tiny_sd, photos, tmp_path):
    """Runs train_lpl_sd.py in this process and returns the output folder; flags as words, `name` its last part."""
    import train_lpl_sd

    def run(*words, name="out", model=tiny_sd, data=("--train_data_dir", photos), steps=4):
        return run_script(train_lpl_sd, words, tmp_path / name, model, data, steps)

    return run


@pytest.fixture
def train_dit(photos, tmp_path):
    """The same for train_lpl_dit.py; model None leaves the flag out."""
    import train_lpl_dit

    def run(*words, model, name="out", data=("--train_data_dir", photos), steps=3):
        return run_script(train_lpl_dit, words, tmp_path / name, model, data, steps)

    return run


def run_script(script, words, output, model, data, steps):
    from accelerate.state import AcceleratorState, GradientState

    flags = [] if model is None else ["--pretrained_model_name_or_path", model]
    flags += [*data, "--output_dir", output, "--report_to", "none", "--resolution", 64, "--train_batch_size", 2]
    flags += ["--max_train_steps", steps, "--logging_steps", 1]
    flags += ["--seed", 0] if "--resume_from_checkpoint" not in words else []
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(script.parse_args([str(word) for word in (*flags, *words)]))
    return output


@pytest.fixture
def train_on_two_processes(photos, tmp_path):
    """Launches a script twice side by side, with `train`'s flags, and returns the output folder."""
    import train_lpl_sd

    def run(*words, model, steps, script=train_lpl_sd, data=photos):
        output = tmp_path / "two"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
        command += [script.__file__, "--pretrained_model_name_or_path", model, "--train_data_dir", data]
        command += ["--output_dir", output, "--report_to", "none", "--resolution", 64, "--train_batch_size", 2]
        command += ["--max_train_steps", steps, "--logging_steps", 1, "--seed", 0, *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        result = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "2 samples x 2 processes" in result.stderr
        return output

    return run


def read_log(output):
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture
def refuse(parse, known_flags, capsys):
    """Parses flags that must be refused and returns the sentence; `parse` and `known_flags` are the module's."""
    from arguments import REFUSED

    def run(*words, **settings):
        with pytest.raises(SystemExit) as exit:
            parse(*words, **settings)
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message
        assert named_flags(message) <= known_flags | {*words, *REFUSED}, "it names a flag that is not there"
        return message

    return run


def named_flags(message):
    return set(re.findall(r"--[a-z][\w-]*", message))
