"""The networks that images are compared with, as tiny random ones, against the models and Pillow used by hand."""

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_tokenizer

import features
from arguments import UserError
from features import ClipScorer, check_clip, check_extractor, load_extractor, short_name


WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"image_size": 32, "patch_size": 8, "intermediate_size": 32, **WIDTHS}
TEXT = {"vocab_size": 514, "max_position_embeddings": 16, "intermediate_size": 32, **WIDTHS}
EOS = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # of the tiny tokenizer
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SQUARE = {"height": 32, "width": 32}


def tiny(kind, **more):
    """A random model with weights far enough from 0 that two images differ."""
    configs = {
        "Dinov2": {"image_size": 28, "patch_size": 14, **WIDTHS},
        "ViT": VIT,
        "ViTMAE": VIT,
        "VideoMAE": VIT,
        "IJepa": VIT,
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "Segformer": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "decoder_hidden_size": 8},
        "CLIP": {"text_config": {**TEXT, **EOS}, "vision_config": VIT, "projection_dim": 12},
        "Siglip": {"text_config": TEXT, "vision_config": VIT},
        "Bert": TEXT,
    }
    name = next(name for name in configs if kind.removeprefix(name) in ("Model", "ForImageClassification"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**configs[name]), **more)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


def save(folder, model, size=SQUARE):
    """With preprocessing that no model has by default: images of this size, bilinear."""
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(folder)
    return str(folder)


def pixels(images, size=(32, 32), resample=Image.Resampling.BILINEAR, mean=MEAN, std=STD):
    """Images as a model takes them, by Pillow."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], resample) for image in images]
    arrays = (np.stack([np.asarray(picture) for picture in pictures]) / 255 - mean) / std
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float()


@pytest.fixture
def images():
    """Five pictures, uint8 [5, 3, 48, 40]: coarse ones, so that resizing leaves something."""
    coarse = torch.rand(5, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").to(torch.uint8)


def by_hand(model, x):
    """What the model's own head takes of an image, or what the model calls the image's embedding."""
    taken = []
    head = getattr(model, "classifier", None) or getattr(model, "visual_projection", None)
    if head is not None and not isinstance(model, transformers.CLIPModel):
        head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].flatten(1)))
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            ids = torch.tensor([[512, 3, 4, 513]])
            norm = model.get_image_features(pixel_values=x).pooler_output.norm(dim=1, keepdim=True)
            return model(input_ids=ids, pixel_values=x).image_embeds * norm
        outputs = model(x)
    return taken[0] if taken else outputs.pooler_output.flatten(1)


@pytest.mark.parametrize(
    ("kind", "dim", "taken"),
    [
        ("Dinov2Model", 16, "pooled output"),
        ("ViTModel", 16, "pooled output"),
        ("ViTForImageClassification", 16, "class token"),  # a ViT's pooler is not among its weights
        ("ResNetModel", 16, "pooled output"),
        ("ResNetForImageClassification", 16, "pooled output"),
        ("CLIPModel", 12, "pooled output"),
        ("SiglipModel", 16, "pooled output"),
    ],
)
def test_features_are_what_the_model_makes_of_the_image_as_pillow_resizes_it(tmp_path, images, kind, dim, taken):
    model = tiny(kind)
    size = (28, 28) if kind == "Dinov2Model" else (32, 32)
    extractor = load_extractor(save(tmp_path, model, dict(zip(("height", "width"), size))), "cpu")
    found = extractor(images)
    expected = by_hand(model, pixels(images, size))
    assert expected.std(dim=0).max() > 0.01  # images differ
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.logits is None
    assert (extractor.settings["dim"], extractor.settings["features"]) == (dim, taken)


@pytest.mark.parametrize(("kind", "positions"), [("SegformerModel", (2, 3)), ("IJepaModel", 1)])
def test_without_a_pooled_output_the_mean_over_positions_is_taken(tmp_path, images, kind, positions):
    model = tiny(kind)
    with torch.no_grad():
        states = model(pixels(images)).last_hidden_state
    found = load_extractor(save(tmp_path, model), "cpu")(images).features
    torch.testing.assert_close(found, states.mean(dim=positions), rtol=1e-4, atol=1e-5)


def test_a_vit_without_pooler_gives_its_class_token(tmp_path, images):
    model = tiny("ViTModel", add_pooling_layer=False)
    with torch.no_grad():
        expected = model(pixels(images)).last_hidden_state[:, 0]
    name = save(tmp_path, model)
    extractor = load_extractor(name, "cpu")
    torch.testing.assert_close(extractor(images).features, expected, rtol=1e-4, atol=1e-5)
    assert load_extractor(name, "cpu").settings == extractor.settings  # the missing weights are not random ones


def test_images_are_cut_where_the_checkpoint_says_so_but_for_dinov2(tmp_path, images, monkeypatch):
    model = tiny("Dinov2Model")
    model.save_pretrained(tmp_path)
    cut = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(image_mean=MEAN, image_std=STD, **cut).save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path), "cpu")
    expected = by_hand(model, pixels(images, (40, 40), Image.Resampling.BICUBIC)[..., 6:34, 6:34])
    torch.testing.assert_close(extractor(images).features, expected, rtol=1e-4, atol=1e-5)
    assert extractor.settings["resize"] == "28 x 28, bicubic, the centre of a larger one"

    monkeypatch.setattr(features, "DINOV2", str(tmp_path))
    extractor = load_extractor("dinov2", "cpu")
    expected = by_hand(model, pixels(images, (224, 224), Image.Resampling.BICUBIC))
    torch.testing.assert_close(extractor(images).features, expected, rtol=1e-4, atol=1e-5)
    assert extractor.settings["resize"] == "224 x 224, bicubic"


def test_a_folder_without_preprocessing_gets_that_of_imagenet(tmp_path, images):
    model = tiny("ViTModel")
    model.save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path), "cpu")
    imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = by_hand(model, pixels(images, (32, 32), Image.Resampling.BICUBIC, *imagenet))
    torch.testing.assert_close(extractor(images).features, expected, rtol=1e-4, atol=1e-5)
    assert "ImageNet" in extractor.settings["preprocessing"]


def test_the_report_names_the_weights_and_no_path(tmp_path):
    settings = []
    for seed in (1, 2):
        model = tiny("ViTModel")
        model.layernorm.weight.data += seed
        settings.append(load_extractor(save(tmp_path / f"vit{seed}", model), "cpu").settings)
    assert settings[0]["weights_hash"] != settings[1]["weights_hash"]
    assert settings[0]["model"] == settings[0]["name"] == "vit1"
    assert str(tmp_path) not in json.dumps(settings)
    assert (settings[0]["mean"], settings[0]["std"], settings[0]["resize"]) == (MEAN, STD, "32 x 32, bilinear")


# What can't be used


def damage(folder, part):
    """Leaves out the weights whose names contain this."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})
    return folder


def test_weights_that_are_needed_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"its weights lack layernorm\.bias, layernorm\.weight"):
        load_extractor(damage(save(tmp_path, tiny("Dinov2Model")), "layernorm"), "cpu")


def test_weights_that_are_not_needed_may_lack(tmp_path, images):
    name = save(tmp_path, tiny("Dinov2Model"), {"height": 28, "width": 28})
    whole = load_extractor(name, "cpu")(images).features
    assert torch.equal(load_extractor(damage(name, "mask_token"), "cpu")(images).features, whole)


def test_weights_that_are_there_must_be_finite(tmp_path):
    """Else other features would be taken, as where they lack."""
    model = tiny("ViTModel")
    model.pooler.dense.bias.data[0] = torch.nan
    with pytest.raises(UserError, match=r"^--feature_extractor .* gives no features \(they are not finite\)"):
        load_extractor(save(tmp_path, model), "cpu")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("BertModel", "BertModel does not take images"),
        ("ViTMAEModel", "differ each time"),
        ("VideoMAEModel", "unpack"),
    ],
)
def test_other_models_are_refused(tmp_path, kind, words):
    with pytest.raises(UserError, match=f"^--feature_extractor {tmp_path}.*{words}.*give dinov2"):
        load_extractor(save(tmp_path, tiny(kind)), "cpu")


def test_a_config_of_no_model_of_transformers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="^--feature_extractor .*Unrecognized model"):
        load_extractor(str(tmp_path), "cpu")


@pytest.mark.parametrize("name", ["dinov2", "owner/model"])
def test_a_model_out_of_reach_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match=r"^--feature_extractor \w+/[\w-]+ can't be loaded .*: give a folder"):
        load_extractor(name, "cpu", cache_dir=tmp_path)


@pytest.mark.parametrize("check", [check_extractor, check_clip])
def test_names_are_checked_without_loading(tmp_path, check):
    flag = {check_extractor: "--feature_extractor", check_clip: "--clip_model"}[check]
    for name, words in (
        (f"{tmp_path}/none", "there is no"),
        (str(tmp_path), "there is no .*config.json"),
        ("dinov3", "neither a folder nor a Hub id"),
        ("owner/na me", "neither a folder nor a Hub id"),
    ):
        with pytest.raises(UserError, match=f"^{flag}.*{words}.*give "):
            check(name)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(UserError, match=f"^{flag}: .*config.json can't be read"):
        check(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    check(str(tmp_path))
    check("owner/model.name-1")


def test_a_check_takes_no_library():
    code = "import sys, features; features.check_extractor('dinov2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(features.__file__).parent).returncode == 0


def test_short_names_can_be_part_of_a_metrics_name(tmp_path):
    assert [short_name(name) for name in ("dinov2", "inception")] == ["dinov2", "inception"]
    assert short_name("owner/vit-base-patch16.224") == "vit_base_patch16_224"
    assert short_name(f"{tmp_path}/my model/") == "my_model"
    assert short_name("../--") == "model"


# The computation


@pytest.fixture
def extractor(tmp_path):
    return load_extractor(save(tmp_path, tiny("ViTModel")), "cpu")


def test_a_batch_gives_what_its_images_give_alone(extractor, images):
    alone = torch.cat([extractor(image[None]).features for image in images])
    found = extractor(images)
    torch.testing.assert_close(found.features, alone, rtol=1e-5, atol=1e-6)
    assert found.features.dtype == torch.float32 and found.logits is None


def test_gradients_and_tf32_are_off_only_while_features_are_computed(extractor, images):
    seen = []
    extractor.model.register_forward_pre_hook(
        lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.is_grad_enabled()))
    )
    torch.set_float32_matmul_precision("high")
    try:
        extractor(images)
        with pytest.raises(ValueError, match="size"):
            extractor._outputs({"pixel_values": torch.zeros(1, 3, 8, 8)})
        assert seen == [("highest", False)] * 2
        assert (torch.get_float32_matmul_precision(), torch.is_grad_enabled()) == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")


# CLIPScore


@pytest.fixture
def clip(tmp_path):
    """Folder and model. The tokenizer knows bytes, so a token is a character."""
    model = tiny("CLIPModel")
    build_tiny_tokenizer().save_pretrained(tmp_path)
    return save(tmp_path, model), model


def cosines(model, images, captions):
    """100 x cosine by CLIP's own forward pass, captions one by one without padding."""
    tokenizer, scores = build_tiny_tokenizer(), []
    for image, caption in zip(images, captions):
        ids = torch.tensor([tokenizer(caption)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels(image[None])).logits_per_image
        scores.append(100 * logits.item() / model.logit_scale.exp().item())
    return torch.tensor(scores, dtype=torch.float64)


def test_clip_score_is_100_times_the_cosine_and_never_negative(clip, images):
    name, model = clip
    captions = ["a fox", "boats", "an old street", "", "snow"]
    scores = ClipScorer(name)(images, captions)
    expected = cosines(model, images, captions)
    model.visual_projection.weight.data *= -1
    flipped = ClipScorer(save(name, model))(images, captions)
    assert scores.dtype == torch.float64 and expected.abs().min() > 1
    torch.testing.assert_close(scores, expected.clamp(min=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores - flipped, expected, rtol=1e-4, atol=1e-4)


def test_captions_beyond_the_models_tokens_are_cut(clip, images):
    name, _ = clip
    words = "abcdefghijklmnopqrstuvwxyz"  # one token each
    room = 16 - 2  # start and end
    captions = [" ".join(words[:n]) for n in (26, room, room - 1)]
    long, cut, shorter = ClipScorer(name)(images[[0, 0, 0]], captions)
    assert long == cut != shorter


def test_a_clip_model_must_be_whole(clip, tmp_path):
    name, _ = clip
    Path(name, "preprocessor_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match="^--clip_model .* lacks preprocessor_config.json: give "):
        ClipScorer(name)
    Path(tmp_path, "kept.json").rename(Path(name, "preprocessor_config.json"))
    broken = tiny("CLIPModel")
    broken.visual_projection.weight.data[0, 0] = torch.nan
    build_tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="^--clip_model .* not finite: give "):
        ClipScorer(save(tmp_path / "broken", broken))
    with pytest.raises(UserError, match="^--clip_model .* lacks text_projection.weight: give "):
        ClipScorer(damage(name, "text_projection"))
    with pytest.raises(UserError, match="^--clip_model .* lacks an encoder of texts: give "):
        ClipScorer(save(tmp_path / "vit", tiny("ViTModel")))


# InceptionV3, the class of torch-fidelity with random weights


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """Its module. Where torchvision is not installed, empty modules stand for what torch-fidelity imports of it."""
    monkeypatch.syspath_prepend(Path(sys.prefix, "inception"))  # where the Makefile puts it, for this test alone
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: `make .venv/inception/installed`")
    if importlib.util.find_spec("torchvision") is None:
        names = ("", ".datasets", ".transforms", ".transforms.functional")
        modules = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
        datasets = modules["torchvision.datasets"]
        datasets.CIFAR10 = datasets.CIFAR100 = datasets.STL10 = object
        modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture
def inception_weights(inception, monkeypatch, tmp_path):
    """Random ones that keep an image's variance, where torch looks for those that it has downloaded."""
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        weights = inception.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
        for weight in weights.values():
            if weight.ndim == 4:
                torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    path = tmp_path / "hub" / "checkpoints" / Path(inception.URL_INCEPTION_V3).name
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    return weights


def test_inception_gives_features_and_logits_without_biases(inception_weights, images):
    extractor = load_extractor("inception", "cpu")
    found = extractor(images[:3])
    assert found.features.shape == (3, 2048)
    assert found.features.std(dim=0).max() > 1e-3
    expected = found.features @ inception_weights["fc.weight"].T
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor(images[2:3]).features, found.features[2:], rtol=1e-4, atol=1e-5)
    assert extractor.settings["dim"] == 2048 and len(extractor.settings["weights_hash"]) == 64


def test_inception_without_its_weights_says_where_they_belong(inception, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(UserError, match=rf"\(no network\): put https://.*\.pth into {tmp_path}/hub/checkpoints"):
        load_extractor("inception", "cpu")


def test_inception_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--feature_extractor inception needs .*pip install torch-fidelity"):
        check_extractor("inception")
