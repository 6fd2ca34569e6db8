import json
import os
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


@pytest.fixture
def train(tiny_sd, photos, tmp_path):
    """Runs train_lpl_sd.py in this process and returns the output folder; flags as words, `name` its last part."""
    from accelerate.state import AcceleratorState, GradientState

    import train_lpl_sd

    def run(*words, name="out", model=tiny_sd, data=("--train_data_dir", photos), steps=4):
        output = tmp_path / name
        flags = ["--pretrained_model_name_or_path", model, *data, "--output_dir", output, "--report_to", "none"]
        flags += ["--resolution", 64, "--train_batch_size", 2, "--max_train_steps", steps, "--logging_steps", 1]
        flags += ["--seed", 0] if "--resume_from_checkpoint" not in words else []
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train_lpl_sd.main(train_lpl_sd.parse_args([str(word) for word in (*flags, *words)]))
        return output

    return run


@pytest.fixture
def train_on_two_processes(photos, tmp_path):
    """Launches train_lpl_sd.py twice side by side, with `train`'s flags, and returns the output folder."""
    import train_lpl_sd

    def run(*words, model, steps):
        output = tmp_path / "two"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
        command += [train_lpl_sd.__file__, "--pretrained_model_name_or_path", model, "--train_data_dir", photos]
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
