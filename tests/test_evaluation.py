"""Sets of images and their scores: what is read, measured in any shares and batches, named and compared by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_photo_folder

import metrics
from arguments import UserError
from data_sources import read_image_folder
from data_utils import TrainingStream
from evaluation import (
    ArrayImages,
    ImageFiles,
    ListedImages,
    Measured,
    StreamImages,
    check_finite,
    in_order,
    measure,
    read_statistics,
    score,
    with_infix,
    write_statistics,
)
from features import Features


class Means:
    """An extractor: the mean colours of an image's quarters, 12 features, of which four can be logits, too."""

    def __init__(self, name="means", has_logits=False, poison=None):
        self.name, self.has_logits, self.poison = name, has_logits, poison

    def __call__(self, pixels):
        features = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1) / 255
        if self.poison is not None:
            features[(pixels[:, 0, 0, 0] == self.poison)] = torch.nan
        return Features(features, 9 * features[:, :4] if self.has_logits else None)


class Clip:
    """How red an image is, times the length of its caption."""

    def __call__(self, pixels, captions):
        lengths = torch.tensor([len(caption) for caption in captions], dtype=torch.float32)
        return pixels[:, 0].float().mean((1, 2)) * lengths


def process(rank=0, world=1):
    return SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=rank == 0, is_local_main_process=False
    )


def random_images(count, seed=0, side=16):
    """Coarse pictures, the first red value of which is their number: an array [N, H, W, 3]."""
    random = np.random.default_rng(seed)
    array = random.integers(0, 256, (count, side // 4, side // 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    array[:, 0, 0, 0] = np.arange(count)
    return array


def measured(array, *extractors, batch_size=4, **more):
    return measure(process(), ArrayImages(array, "x.npz"), extractors or [Means()], batch_size, **more)


# Sets of images


def test_files_are_their_pixels(tmp_path):
    array = random_images(3)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, array):
        Image.fromarray(pixels).save(path)
    images = ImageFiles(paths)
    assert len(images) == 3 and images.size == (16, 16) and images.name(1) == str(paths[1])
    assert torch.equal(images.stack(range(3)), torch.from_numpy(array).permute(0, 3, 1, 2))
    Image.new("L", (30, 20), 7).save(tmp_path / "grey.png")
    grey = ImageFiles([tmp_path / "grey.png"])
    assert grey.size == (20, 30) and grey[0].shape == (3, 20, 30) and (grey[0] == 7).all()
    assert ImageFiles([]).size is None


def test_files_of_several_sizes_are_refused(tmp_path):
    for name, size in (("a", (16, 16)), ("b", (16, 16)), ("c", (24, 16))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError) as error:
        ImageFiles([tmp_path / f"{name}.png" for name in "abc"])
    expected = f"{tmp_path}/a.png has 16 x 16 pixels and {tmp_path}/c.png 24 x 16: images that are compared must have"
    assert str(error.value) == f"{expected} one size."


@pytest.mark.parametrize("kept", [0, 30, 200])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kept):
    """From its head at once, from its end when its turn comes; also by a worker."""
    good, bad = (tmp_path / f"{name}.png" for name in ("good", "bad"))
    for path, seed in ((good, 0), (bad, 1)):
        random = np.random.default_rng(seed)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    bad.write_bytes(bad.read_bytes()[:kept])
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            measure(process(), ImageFiles([good, bad], "draw it again"), [Means()], 2, workers=workers)
        assert str(error.value).startswith(f"{bad} can't be read (")
        assert str(error.value).endswith("): draw it again.") and "\n" not in str(error.value)


def test_images_of_a_stream_are_those_of_training_cropped_in_the_middle(tmp_path):
    folder = build_photo_folder(tmp_path, n=4, size=(96, 80))
    samples = read_image_folder(str(folder))
    stream = TrainingStream(samples, seed=0, resolution=64, random_flip=True, center_crop=True)
    images = StreamImages(stream, 3)
    assert len(images) == 3 and len(StreamImages(stream)) == 4
    assert images[2].dtype == torch.uint8 and images.name(2) == str(folder / "photo_0002.png")
    expected = Image.open(folder / "photo_0002.png").resize((76, 64), Image.LANCZOS).crop((6, 0, 70, 64))
    difference = images[2].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1
    seen = torch.from_numpy(stream.view(2, flip=False)["pixel_values"])
    assert (images[2] / 127.5 - 1 - seen).abs().max() <= 1 / 255
    (folder / "photo_0000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"photo_0000.png can't be read \(.*\): repair or remove it."):
        images[0]


def test_several_samples_of_one_file_are_one_image(tmp_path):
    folder = build_photo_folder(tmp_path, n=3, size=64)
    samples = [(path, f"{caption} {i}") for path, caption in read_image_folder(str(folder)) for i in range(3)]
    images = StreamImages(TrainingStream(samples[::-1], seed=0, resolution=64))
    assert [images.name(i) for i in range(len(images))] == [str(folder / f"photo_000{i}.png") for i in range(3)]


def test_images_in_memory():
    array = random_images(5)
    images = ArrayImages(array, "ref.npz")
    assert images.size == (16, 16) and images.name(3) == "image 3 of ref.npz"
    assert torch.equal(images[3], torch.from_numpy(array[3]).permute(2, 0, 1))
    listed = ListedImages({3: Image.fromarray(array[3])}, 5)  # of a process whose share is one image
    assert len(listed) == 5 and torch.equal(listed[3], images[3]) and listed.name(3) == "sample 3"


# What is measured


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_what_is_measured_does_not_depend_on_the_batch_size(batch_size):
    array = random_images(7)
    captions = [f"{'x' * i}" for i in range(7)]
    extractors = [Means(), Means("other", has_logits=True)]
    found = measured(array, *extractors, batch_size=batch_size, clip=Clip(), captions=captions)
    pixels = torch.from_numpy(array).permute(0, 3, 1, 2)
    assert len(found) == 7 and found.moments == {}
    assert found.features.keys() == {"means", "other"} and found.logits.keys() == {"other"}
    expected = torch.stack([image.float().view(3, 2, 8, 2, 8).mean((2, 4)).flatten() / 255 for image in pixels])
    torch.testing.assert_close(found.features["means"], expected)
    torch.testing.assert_close(found.logits["other"], 9 * expected[:, :4])
    torch.testing.assert_close(found.power, metrics.radial_power(pixels.double() / 127.5 - 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sharpness, metrics.sharpness(pixels))
    torch.testing.assert_close(found.clip, Clip()(pixels, captions))


@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_of_several_processes_are_put_in_order(monkeypatch, world):
    """Seven images of nine processes: two have none. Each one's share is measured here, one after the other."""
    array, gathered = random_images(7), []

    def gather(part):
        gathered.extend(part)
        return gathered

    monkeypatch.setattr("evaluation.gather_object", gather)
    alone = measured(array)
    gathered.clear()
    for rank in (*range(1, world), 0):
        mine = {i: Image.fromarray(array[i]) for i in range(rank, 7, world)}  # no process has another's images
        found = measure(process(rank, world), ListedImages(mine, 7), [Means()], 2)
        assert (found is None) == (rank > 0)
    assert torch.equal(found.features["means"], alone.features["means"])
    torch.testing.assert_close(found.power, alone.power)
    torch.testing.assert_close(found.sharpness, alone.sharpness)


def test_in_order_knows_which_image_is_which():
    rows = {("sharpness",): torch.tensor([2.0, 0.0]), ("features", "a"): torch.tensor([[2.0], [0.0]])}
    others = {("sharpness",): torch.tensor([1.0]), ("features", "a"): torch.tensor([[1.0]])}
    found = in_order([([], {}), ([2, 0], rows), ([1], others)])
    assert found.sharpness.tolist() == [0, 1, 2] and found.features["a"].flatten().tolist() == [0, 1, 2]
    assert found.power is None and found.clip is None and found.logits == {}


def test_measuring_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    measured(random_images(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_features_that_are_not_finite_are_told_with_the_file():
    with pytest.raises(UserError, match="--feature_extractor means: its features of image 5 of x.npz are not finite"):
        measured(random_images(7), Means(poison=5))
    images = ArrayImages(random_images(3), "x.npz")
    features = torch.zeros(2, 4)
    check_finite(features, [0, 2], images, "means")
    features[1, 3] = -torch.inf
    with pytest.raises(UserError, match="image 2 of x.npz"):
        check_finite(features, [0, 2], images, "means")


# Scores


NEIGHBOURS = {"precision", "recall", "density", "coverage"}
SPECTRUM = {"spectrum_error", "spectrum_error_low", "spectrum_error_mid", "spectrum_error_high"}


def infixed(names):
    return {name.replace("spectrum_error", "spectrum_error_reconstructed") for name in names}


@pytest.fixture(scope="module")
def sets():
    """Samples, reference and reconstructions, with two extractors, the second of which knows classes."""
    extractors = [Means(), Means("inception", has_logits=True)]
    return [measured(random_images(count, seed), *extractors) for count, seed in ((40, 0), (50, 1), (50, 2))]


@pytest.fixture
def subsets():
    return metrics.half_samples(40, 3, seed=0)


def test_scores_of_one_extractor(sets, subsets):
    ours, theirs, _ = sets
    found = score(ours, theirs, None, subsets, ["means"], k=3)
    assert found.keys() == {"frechet_distance", "kernel_distance", "sharpness", *NEIGHBOURS, *SPECTRUM}
    assert all(values.shape == (4,) and values.dtype == torch.float64 for values in found.values())
    features, others = ours.features["means"], theirs.features["means"]
    for i, subset in enumerate(subsets):
        distance = metrics.frechet_distance(metrics.moments(features[subset]), metrics.moments(others))
        assert found["frechet_distance"][i].item() == pytest.approx(distance, rel=1e-6)
        assert found["sharpness"][i].item() == pytest.approx(ours.sharpness[subset].mean().item())
        levels = [power.mean(0).log() for power in (ours.power[subset], theirs.power)]
        error = (levels[0] - levels[1]).abs().mean().item()
        assert found["spectrum_error"][i].item() == pytest.approx(error)
    expected = metrics.precision_recall_density_coverage(features, others, subsets, 3)
    assert all(torch.equal(found[name], expected[name]) for name in NEIGHBOURS)
    assert torch.equal(found["kernel_distance"], metrics.kernel_distances(features, others, subsets))


def test_scores_of_two_extractors_with_reconstructions(sets, subsets):
    ours, theirs, reconstructed = sets
    found = score(ours, theirs, reconstructed, subsets, ["means", "inception"])
    once = {"frechet_distance", "kernel_distance", *NEIGHBOURS}
    again = {"frechet_distance_reconstructed", "kernel_distance_reconstructed"}
    names = {f"{name}{suffix}" for name in once | again for suffix in ("", "_inception")}
    assert found.keys() == {*names, *SPECTRUM, *infixed(SPECTRUM), "inception_score", "sharpness"}
    swapped = score(ours, reconstructed, theirs, subsets, ["inception", "means"])
    for name in ("frechet_distance", "kernel_distance"):
        assert torch.equal(swapped[name], found[f"{name}_reconstructed_inception"])
        assert torch.equal(swapped[f"{name}_means"], found[f"{name}_reconstructed"])
        assert torch.equal(swapped[f"{name}_reconstructed"], found[f"{name}_inception"])
    for name in SPECTRUM:
        assert torch.equal(swapped[name], found[name.replace("error", "error_reconstructed")])
    assert not torch.equal(found["frechet_distance"], found["frechet_distance_reconstructed"])
    scores = metrics.inception_scores(ours.logits["inception"], subsets)
    assert torch.equal(found["inception_score"], scores)


def test_scores_with_statistics_for_a_reference(sets, subsets):
    """No neighbours, no kernel, no spectrum; and only of the extractor that they are of."""
    ours, theirs, _ = sets
    reference = Measured(moments={"inception": metrics.moments(theirs.features["inception"])})
    found = score(ours, reference, None, subsets, ["means", "inception"])
    assert found.keys() == {"frechet_distance_inception", "inception_score", "sharpness"}
    whole = score(ours, theirs, None, subsets, ["means", "inception"])
    assert torch.equal(found["frechet_distance_inception"], whole["frechet_distance_inception"])


def test_statistics_that_came_with_the_reference_count(sets, subsets):
    """Of more images than there are, as a rule."""
    ours, theirs, reconstructed = sets
    given = metrics.moments(reconstructed.features["means"])
    reference = Measured(theirs.features, theirs.logits, theirs.power, theirs.sharpness, moments={"means": given})
    found = score(ours, reference, None, subsets, ["means"])
    expected = metrics.frechet_distances(ours.features["means"], given, subsets)
    assert torch.equal(found["frechet_distance"], expected)


def test_clip_scores_are_means(sets, subsets):
    ours, theirs, _ = sets
    clip = torch.arange(40.0)
    with_clip = Measured(ours.features, power=ours.power, sharpness=ours.sharpness, clip=clip)
    found = score(with_clip, theirs, None, subsets, ["means"])
    assert found["clip_score"].tolist() == pytest.approx([clip[subset].mean().item() for subset in subsets])


def test_too_few_samples_are_a_mistake_of_the_users(sets):
    ours, theirs, _ = sets
    with pytest.raises(UserError, match=r"there are 40. Give more images, or lower --k.") as error:
        score(ours, theirs, None, metrics.half_samples(40, 2, seed=0), ["means"], k=30)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, suffix, expected",
    [
        ("frechet_distance", "", "frechet_distance_reconstructed"),
        ("frechet_distance_inception", "_inception", "frechet_distance_reconstructed_inception"),
        ("kernel_distance_clip_vit", "_clip_vit", "kernel_distance_reconstructed_clip_vit"),
        ("spectrum_error", "", "spectrum_error_reconstructed"),
        ("spectrum_error_high", "", "spectrum_error_reconstructed_high"),
    ],
)
def test_names_of_what_is_compared_with_reconstructions(name, suffix, expected):
    assert with_infix(name, suffix) == expected
    assert with_infix(name, suffix, "") == name


# Statistics


def test_statistics_come_back_as_they_were(tmp_path, sets):
    moments = metrics.moments(sets[1].features["means"])
    path = tmp_path / "new" / "reference_means.npz"
    for _ in range(2):  # a second time over the first
        write_statistics(path, moments, SimpleNamespace(name="means", settings={"weights_hash": "1a2b"}))
    assert [file.name for file in path.parent.iterdir()] == ["reference_means.npz"]
    found, weights, images = read_statistics(path, ["other", "means"])
    assert images is None and weights == "1a2b" and found.keys() == {"means"} and found["means"].count == 50
    assert torch.equal(found["means"].mean, moments.mean)
    assert torch.equal(found["means"].covariance, moments.covariance)
    with np.load(path) as file:  # as ADM's evaluator reads it
        np.testing.assert_array_equal(file["mu"], sets[1].features["means"].double().mean(0).numpy())
        np.testing.assert_allclose(file["sigma"], np.cov(sets[1].features["means"].double().numpy().T))


def test_a_file_of_the_adm_evaluator(tmp_path):
    """Images, and Inception's statistics in float32 without a name; mu_s and sigma_s are of another layer."""
    array, mean = random_images(5), np.arange(4, dtype=np.float32)
    statistics = {"mu": mean, "sigma": np.eye(4, dtype=np.float32), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    np.savez(tmp_path / "both.npz", arr_0=array, **statistics)
    moments, weights, images = read_statistics(tmp_path / "both.npz", ["inception", "dinov2"])
    assert weights is None and moments.keys() == {"inception"} and moments["inception"].mean.dtype == torch.float64
    assert moments["inception"].mean.tolist() == [0, 1, 2, 3] and moments["inception"].count is None
    assert len(images) == 5 and torch.equal(images[2], torch.from_numpy(array[2]).permute(2, 0, 1))
    moments, _, images = read_statistics(tmp_path / "both.npz", ["dinov2"])  # the images will do
    assert moments == {} and len(images) == 5
    np.savez(tmp_path / "images.npz", array)  # numpy calls it arr_0
    moments, _, images = read_statistics(tmp_path / "images.npz", ["inception"])
    assert moments == {} and len(images) == 5


EYE = {"mu": np.zeros(4), "sigma": np.eye(4)}
IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays, sentence",
    [
        ({"other": EYE["mu"]}, "has neither mu and sigma nor images arr_0."),
        ({"mu": EYE["mu"]}, "has neither mu and sigma nor images arr_0."),
        ({**EYE, "mu": np.zeros((1, 4))}, "mu and sigma must be .D. and .D, D.."),
        ({**EYE, "mu": np.zeros(3)}, "mu and sigma must be .D. and .D, D.."),
        ({**EYE, "sigma": np.eye(4)[:3]}, "mu and sigma must be .D. and .D, D.."),
        ({**EYE, "mu": np.full(4, np.nan)}, "mu and sigma are not finite."),
        ({**EYE, "sigma": np.full((4, 4), np.inf)}, "mu and sigma are not finite."),
        (
            EYE,
            "holds statistics of inception, and --feature_extractor is dinov2, clip: add inception, or give images.",
        ),
        ({**EYE, "extractor": "vit"}, "holds statistics of vit, and --feature_extractor is dinov2, clip: add vit"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 must be images .N, H, W, 3., uint8."),
        ({"arr_0": IMAGES[0]}, "arr_0 must be images"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "arr_0 must be images"),
        ({"arr_0": np.array([{}], dtype=object)}, "can't be read as statistics or images"),
    ],
)
def test_statistics_that_will_not_do(tmp_path, arrays, sentence):
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"^--reference {path}:? {sentence}") as error:
        read_statistics(path, ["dinov2", "clip"])
    assert "\n" not in str(error.value)


def cut(path):
    np.savez(path, **EYE)
    path.write_bytes(path.read_bytes()[:300])


def one_array(path):
    with open(path, "wb") as file:
        np.save(file, EYE["mu"])


@pytest.mark.parametrize(
    "write", [cut, one_array, lambda path: path.write_bytes(b"no zip"), lambda path: path.write_bytes(b"")]
)
def test_files_that_are_no_statistics(tmp_path, write):
    path = tmp_path / "reference.npz"
    write(path)
    with pytest.raises(UserError, match=f"^--reference {path} can't be read as statistics or images"):
        read_statistics(path, ["inception"])
