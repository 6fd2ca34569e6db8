"""--report_to: what the trackers have afterwards, read from their own files."""

import io
import json
import struct
import sys

import numpy as np
import pytest
from conftest import read_log
from PIL import Image


PROMPTS = ["a fox", "two boats"]


@pytest.fixture
def report(train, tmp_path, monkeypatch):
    """Trains two steps, all of them logged and drawn (two images for each of two prompts)."""
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_CONSOLE": "off", "WANDB_SILENT": "true"}
    for name, value in {**settings, "TRACKIO_DIR": tmp_path / "trackio"}.items():
        monkeypatch.setenv(name, str(value))

    def run(tracker):
        flags = ("--report_to", tracker, "--tracker_project_name", f"by-{tracker}", "--lpl_sigma_threshold", 80)
        flags += ("--validation_prompts", *PROMPTS, "--num_validation_images", 2, "--validation_steps", 1)
        output = train(*flags, "--validation_inference_steps", 2, steps=2)
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # writes what is left, as the end of the process does
        return output

    return run


def assert_images(images, output, name):
    """Arrays or image files: what was drawn, as the grid in `samples/` shows it row by row."""
    grid = np.asarray(Image.open(output / "samples" / f"{name}.png"))
    cells = [grid[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
    images = [np.asarray(i if isinstance(i, np.ndarray) else Image.open(i).convert("RGB")) for i in images]
    assert all((image == cell).all() for image, cell in zip(images, cells, strict=True))


def wandb_history(run):
    """What was logged, a dictionary per step; the file is a log of protobufs in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    data, position, message, history = path.read_bytes(), 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little for another header
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)  # checksum; 1 whole, 2 first, 3 middle, 4 last
        message += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            items, message = Record.FromString(message).history.item, b""
            history += [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}] if items else []
    return history


def assert_wandb(folder, output):
    """Scalars and images of a step are in one record."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    history = wandb_history(run)
    assert [row["_step"] for row in history] == [1, 2]
    for row, logged in zip(history, read_log(output)):
        assert {name: row.get(name, row["_step"]) for name in logged} == logged
        assert row["validation/captions"] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
        assert_images([run / "files" / n for n in row["validation/filenames"]], output, f"step-{row['_step']:06d}")
    assert_images([run / "files" / name for name in history[1]["final/filenames"]], output, "final")


def assert_tensorboard(folder, output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for name in ("lpl_share", "loss"):
        logged = [row[name] for row in read_log(output)]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(logged, rel=1e-6)
    drawn = [(event, f"step-{event.step:06d}") for event in events.Images("validation")]
    drawn += [(event, "final") for event in events.Images("final")]
    assert [name for _, name in drawn] == ["step-000001", "step-000002", "final"]
    for event, name in drawn:
        row = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert_images(np.split(row, 4, axis=1), output, name)


def test_wandb_has_scalars_and_images(report, tmp_path):
    pytest.importorskip("wandb")
    output = report("wandb")
    assert_wandb(tmp_path, output)
    assert not (output / "logs").exists()


def test_all_trackers_that_are_installed_have_scalars_and_images(report, tmp_path):
    pytest.importorskip("wandb")
    output = report("all")
    assert_wandb(tmp_path, output)
    assert_tensorboard(output / "logs" / "by-all", output)


def test_trackio_has_scalars_and_images(report):
    # Not in requirements-test.txt: it needs Pillow below 13, which constraints.txt is beyond.
    trackio = pytest.importorskip("trackio")
    output = report("trackio")
    (run,) = trackio.Api().runs("by-trackio")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("by-trackio", run.name, run_id=run.id)
    scalars = [row for row in rows if "lpl_share" in row]
    assert [(row["step"], row["lpl_share"]) for row in scalars] == [
        (row["step"], row["lpl_share"]) for row in read_log(output)
    ]
    for title, step, name in (
        ("validation", 1, "step-000001"),
        ("validation", 2, "step-000002"),
        ("final", 2, "final"),
    ):
        (row,) = [row for row in rows if f"{title}/0" in row and row["step"] == step]
        images = [row[f"{title}/{i}"] for i in range(4)]
        assert [image["caption"] for image in images] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
        assert_images([trackio.utils.MEDIA_DIR / image["file_path"] for image in images], output, name)
