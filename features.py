"""Features of images, for metrics that compare sets of them, and CLIPScore.

check_extractor, check_clip    what can be said of a name without loading anything
load_extractor                 a network by its name: uint8 images -> `Features`
extract                        the features of many images
ClipScorer                     how well images fit their captions

The networks compute in float32, without TF32 and whatever the size of a batch. The libraries are imported where they
are needed, so that a wrong name is told at once. Shapes: N images, B in a batch, D features, C classes.
"""

import importlib.util
import pickle
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from arguments import UserError, first_line
from model_checks import is_folder_name, public_name, read_json


FLAG, CLIP_FLAG = "--feature_extractor", "--clip_model"
DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14"  # the former is that of Stein et al., 2023
REMEDY = {
    FLAG: "give dinov2, inception, or a Hub id or the folder of a vision model of transformers",
    CLIP_FLAG: "give a Hub id or the folder of a CLIP model of transformers, with its tokenizer and preprocessing",
}
PREPROCESSING = "preprocessor_config.json"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# What libraries raise for a checkpoint or images that do not fit; running out of memory is a RuntimeError as well.
MISFITS = (ImportError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)


class Features(NamedTuple):
    """features: float32 `[B, D]`, logits: float32 `[B, C]` or None; on the CPU."""

    features: object
    logits: object = None


def inception_available():
    """Whether torch-fidelity, and the torchvision that it imports, are installed."""
    return all(importlib.util.find_spec(package) for package in ("torch_fidelity", "torchvision"))


def check_extractor(name):
    """What the name and a folder's config.json say. Raises UserError."""
    if name == "inception" and not inception_available():
        raise UserError(
            f"{FLAG} inception needs a package that is not installed: `pip install torch-fidelity`, with the "
            "torchvision of this torch, or leave it out."
        )
    if name not in ("dinov2", "inception"):
        _check_name(name, FLAG, DINOV2)


def check_clip(name):
    """The same for a CLIP model. Raises UserError."""
    _check_name(name, CLIP_FLAG, CLIP)


def _check_name(name, flag, example):
    if is_folder_name(name):
        read_json(Path(name) / "config.json", flag, REMEDY[flag])
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{flag} {name} is neither a folder nor a Hub id such as {example}: {REMEDY[flag]}.")


def short_name(name):
    """What the names of its metrics end with: letters, digits and underscores."""
    return re.sub(r"\W+", "_", public_name(name).rpartition("/")[2]).strip("_") or "model"


def load_extractor(name, device, cache_dir=None):
    """The network "dinov2", "inception", or that of a Hub id or folder. Raises UserError."""
    check_extractor(name)
    if name == "inception":
        return InceptionExtractor(device)
    return TransformersExtractor(name, device, cache_dir)


@contextmanager
def _exactly():
    """No gradients, and no TF32, which has 10 bits and is what convolutions take else."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Network:
    """A `model` that works on `device`."""

    def to(self, device):
        self.model.to(device)
        self.device = device


# Vision models of transformers


class TransformersExtractor(Network):
    """A vision model of transformers: uint8 images `[B, 3, H, W]` -> `Features`.

    Images are resized and normalised as the checkpoint says, but for `dinov2`, which sees them whole, as with Stein et
    al. (2023): its checkpoint would cut off a border. The features are the first of these that the checkpoint has
    weights for: what the model itself makes of an image (DINOv2: the normalised
    class token, CLIP: the embedding), the class token, the mean of the last hidden states.
    """

    def __init__(self, name, device, cache_dir=None):
        source = DINOV2 if name == "dinov2" else name
        self.name, self.device = short_name(name), device
        self.model, missing = _load_model(source, FLAG, device, cache_dir)
        self.processor = _load_processor(source, FLAG, cache_dir)
        preprocessing = PREPROCESSING if self.processor else f"that of ImageNet, for want of a {PREPROCESSING}"
        self.processor = self.processor or _default_processor(self.model.config)
        self.resizing = WHOLE if name == "dinov2" else {}
        self.kind, dim, size = self._probe(source, missing)
        self.settings = {
            "name": self.name,
            "model": public_name(source),
            "dim": dim,
            "features": self.kind,
            **_describe(self.processor, size, self.resizing),
            "preprocessing": preprocessing,
            "weights_hash": _weights_hash(self.model),
        }

    def __call__(self, images):
        return Features(FEATURES[self.kind](self._outputs(self._inputs(images))).float().cpu())

    def _inputs(self, images):
        return _preprocess(self.processor, images, self.device, **self.resizing)

    def _outputs(self, inputs):
        with _exactly():
            return getattr(self.model, "get_image_features", self.model)(**inputs)

    def _probe(self, source, missing):
        """Which of FEATURES the checkpoint can give, how many they are, and the size (height, width) of its images.

        Raises UserError if it gives none, or others each time.
        """
        import torch

        image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        try:
            inputs = self._inputs(image)
            once, again = self._outputs(inputs), self._outputs(inputs)
            found = {kind: FEATURES[kind](once) for kind in FEATURES if _gives(self.model, once, kind)}
            if found and not missing and not next(iter(found.values())).isfinite().all():
                raise ValueError("they are not finite")
            kind = next((kind for kind, features in found.items() if features.isfinite().all()), None)
            if kind and not torch.allclose(found[kind], FEATURES[kind](again), rtol=1e-3, atol=1e-5):
                raise ValueError("they differ each time")
        except MISFITS as error:
            raise UserError(f"{FLAG} {source} gives no features ({first_line(error)}): {REMEDY[FLAG]}.") from error
        if kind is None:
            why = f"its weights lack {', '.join(missing[:3])}" if missing else "not one vector of an image"
            raise UserError(f"{FLAG} {source} gives no features ({why}): {REMEDY[FLAG]}.")
        return kind, found[kind].shape[1], tuple(inputs["pixel_values"].shape[-2:])


WHOLE = {"do_center_crop": False, "size": {"height": 224, "width": 224}}
FEATURES = {
    "pooled output": lambda outputs: outputs.pooler_output.flatten(1),
    "class token": lambda outputs: outputs.last_hidden_state[:, 0],
    "mean of the last hidden states": lambda outputs: _mean_position(outputs.last_hidden_state),
}


def _mean_position(states):
    """Tokens `[B, T, D]` or a map `[B, D, h, w]` -> `[B, D]`."""
    return states.mean(dim=1) if states.ndim == 3 else states.flatten(2).mean(dim=2)


def _gives(model, outputs, kind):
    """Whether this kind of features, one vector per image, is among the outputs `[B, D]`, `[B, D, 1, 1]`."""
    pooled, states = getattr(outputs, "pooler_output", None), getattr(outputs, "last_hidden_state", None)
    if kind == "pooled output":
        return pooled is not None and pooled.ndim in (2, 4) and pooled[0].numel() == pooled.shape[1]
    if kind == "class token":
        return states is not None and any(name.endswith("cls_token") for name, _ in model.named_parameters())
    return states is not None and states.ndim in (3, 4)


def _load_model(source, flag, device, cache_dir):
    """The model in eval mode, and the names of the weights that its checkpoint lacks: these are NaN.

    So they can't pass for values in what is made of them, and what they are not needed for is seen by its values.
    """
    import torch
    from transformers import AutoModel

    from loading import load

    try:
        settings = {"dtype": torch.float32, "cache_dir": cache_dir, "output_loading_info": True}
        model, info = load(AutoModel, source, flag, **settings)
    except ImportError as error:
        raise UserError(f"{flag} {source} needs a package that is not installed ({first_line(error)}).") from error
    if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
        raise UserError(f"{flag} {source}: {type(model).__name__} does not take images; {REMEDY[flag]}.")
    weights, missing = model.state_dict(), sorted(info["missing_keys"])
    for name in missing:
        if weights[name].is_floating_point():
            weights[name].fill_(torch.nan)
    return model.to(device).eval().requires_grad_(False), missing


def _weights_hash(model):
    from disk_cache import weights_hash

    return weights_hash(model)


# Preprocessing: by Pillow, also where torchvision is installed, so that a machine's packages don't change the values


def _load_processor(source, flag, cache_dir):
    """The checkpoint's image processor, or None if it has none."""
    from transformers import AutoImageProcessor
    from transformers.models.auto import image_processing_auto

    from loading import load

    if not load(image_processing_auto, source, flag, "get_image_processor_config", cache_dir=cache_dir):
        return None
    return load(AutoImageProcessor, source, flag, backend="pil", cache_dir=cache_dir)


def _default_processor(config):
    from transformers import BitImageProcessorPil

    size = getattr(getattr(config, "vision_config", config), "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return BitImageProcessorPil(size={"height": height, "width": width}, do_center_crop=False, **IMAGENET)


def _preprocess(processor, images, device, **resizing):
    """uint8 `[B, 3, H, W]` -> name -> tensor, as the model takes it."""
    inputs = processor(list(images.cpu()), return_tensors="pt", input_data_format="channels_first", **resizing)
    return inputs.to(device)


def _describe(processor, size, resizing):
    """How it makes images of this size (height, width), for a report."""
    from PIL.Image import Resampling

    resample = getattr(processor, "resample", None)
    kind = Resampling.BILINEAR if resample is None else Resampling(resample)
    resize = f"{size[0]} x {size[1]}, {kind.name.lower()}" if getattr(processor, "do_resize", True) else "none"
    cuts = getattr(processor, "do_center_crop", None) or (getattr(processor, "crop_pct", None) or 1) < 1
    resize += ", the centre of a larger one" if cuts and not resizing else ""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return {"resize": resize, "mean": mean and list(mean), "std": std and list(std)}


# InceptionV3


class InceptionExtractor(Network):
    """The InceptionV3 of FID (Heusel et al., 2017) with its resizing, as torch-fidelity reproduces both.

    uint8 images `[B, 3, H, W]` -> `Features` of the last pooling, D = 2048, and logits without their biases, C = 1008,
    both as in the TensorFlow code of FID and of the Inception Score (Salimans et al., 2016).
    """

    name = "inception"

    def __init__(self, device):
        try:
            import torch_fidelity.feature_extractor_inceptionv3 as inception
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"{FLAG} inception: torch-fidelity can't be imported ({first_line(error)}): install the torchvision "
                "of this torch, or leave it out."
            ) from error
        self.device, weights = device, inception.URL_INCEPTION_V3
        self.model = _load_inception(inception.FeatureExtractorInceptionV3, weights).to(device)
        self.model.config = {}  # it has none, and the hash wants one
        self.settings = {
            "name": self.name,
            "model": f"InceptionV3 of torch-fidelity, {Path(weights).name}",
            "dim": 2048,
            "features": "last pooling",
            "resize": "299 x 299, bilinear of TensorFlow 1, not antialiased",
            "weights_hash": _weights_hash(self.model),
        }

    def __call__(self, images):
        with _exactly():
            return Features(*(output.float().cpu() for output in self.model(images.to(self.device))))


def _load_inception(model_class, url):
    from torch.hub import get_dir

    try:
        return model_class("inception", ["2048", "logits_unbiased"])
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{FLAG} inception: its weights can't be loaded ({first_line(error)}): put {url} into "
            f"{get_dir()}/checkpoints, or set TORCH_HOME to the folder that has hub/checkpoints."
        ) from error


# CLIPScore


class ClipScorer(Network):
    """CLIPScore (Hessel et al., 2021) on the scale of the tables of text-to-image papers.

    max(100 cos(E_image, E_text), 0); Hessel et al. themselves scale by 2.5. Long captions are cut at the model's
    number of tokens.
    """

    def __init__(self, model=CLIP, device="cpu", cache_dir=None):
        import torch
        from transformers import AutoTokenizer

        from loading import load

        self.device = device
        self.model, missing = _load_model(model, CLIP_FLAG, device, cache_dir)
        self.processor = _load_processor(model, CLIP_FLAG, cache_dir)
        if missing or self.processor is None or not hasattr(self.model, "get_text_features"):
            lacks = PREPROCESSING if not self.processor else ", ".join(missing[:3]) or "an encoder of texts"
            raise UserError(f"{CLIP_FLAG} {model} lacks {lacks}: {REMEDY[CLIP_FLAG]}.")
        self.tokenizer = load(AutoTokenizer, model, CLIP_FLAG, cache_dir=cache_dir)
        self.settings = {"model": public_name(model), "weights_hash": _weights_hash(self.model)}
        grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
        if not self(grey, ["a photo"]).isfinite().all():
            raise UserError(f"{CLIP_FLAG} {model} gives scores that are not finite: {REMEDY[CLIP_FLAG]}.")

    def __call__(self, images, captions):
        """uint8 `[B, 3, H, W]` and B texts -> float64 `[B]` on the CPU."""
        length = self.model.config.text_config.max_position_embeddings
        texts = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        pixels = _preprocess(self.processor, images, self.device)
        with _exactly():
            image = self.model.get_image_features(**pixels).pooler_output.double()
            text = self.model.get_text_features(**texts.to(self.device)).pooler_output.double()
        return (100 * (image * text).sum(dim=1) / (image.norm(dim=1) * text.norm(dim=1))).clamp(min=0).cpu()
