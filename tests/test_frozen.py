"""Features of the frozen denoiser, against plain hooks in the stock model that training began with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_kolors import build_tiny_kolors
from tiny_models import build_tiny_vae
from tiny_transformers import build_tiny_pipeline
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

import train_lpl_dit
import train_lpl_sd
from counters import module_bytes
from engines import prepare
from frozen import FrozenDenoiser
from loading import DTYPES
from model_families import FAMILIES, find_family
from pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalSD3Transformer2DModel
from train_utils import make_accelerator, make_optimizer


ROOT = Path(train_lpl_dit.__file__).parent
CAPTIONS = ["a red fox", "Two boats at sea, in a caption of more tokens"]
UNETS = ("StableDiffusion", "StableDiffusionXL", "Kolors")
NAMES = [name.removesuffix("Pipeline") for name in FAMILIES]
LORA = ("--use_lora", "--rank", "2")
ENDS = [  # layers, and all the blocks that run
    ("StableDiffusion", ["mid_block", "down_blocks.0"], ["down_blocks.0", "down_blocks.1", "mid_block"]),
    ("StableDiffusion3", ["transformer_blocks.0"], ["transformer_blocks.0"]),
    ("Chroma", ["transformer_blocks.0"], ["transformer_blocks.0"]),
    ("ZImage", ["layers.0"], ["layers.0"]),
]


@pytest.fixture(scope="module")
def folder(tiny_sd, tiny_sdxl, tiny_pipeline, tmp_path_factory):
    """name -> a tiny pipeline."""
    built = {"StableDiffusion": tiny_sd, "StableDiffusionXL": tiny_sdxl}

    def find(name):
        if name not in built and name == "Kolors":
            built[name] = build_tiny_kolors(tmp_path_factory.mktemp("kolors"))
        elif name not in built and name == "ClassConditional":
            built[name] = build_class_conditional(tmp_path_factory.mktemp("mmdit"))
        return built.get(name) or tiny_pipeline(name)

    return find


def build_class_conditional(folder):
    config = json.loads((ROOT / "transformer_configs/mmdit-tiny.json").read_text())
    transformer = ClassConditionalSD3Transformer2DModel.from_config(config)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = ClassConditionalPipeline(
        transformer, build_tiny_vae(), scheduler, id2label={207: "golden retriever", 980: "volcano"}
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder, photos, class_folders, tmp_path):
    """name, flags -> the family."""

    def run(name, *words, model=None):
        script = train_lpl_sd if name in UNETS else train_lpl_dit
        data = class_folders if name in ("DiT", "ClassConditional") else photos
        flags = ["--pretrained_model_name_or_path", model or folder(name), "--train_data_dir", data]
        flags += ["--resolution", 64]
        args = script.parse_args([str(word) for word in (*flags, "--output_dir", tmp_path / "out", *words)])
        return find_family(args)(args, torch.device("cpu"), torch.float32, torch.float32)

    return run


def inputs_of(family, name):
    """Latents `[2, C, h, w]`, timesteps and conditioning of two samples, whose captions differ in length."""
    width = 64 if name == "DiT" else 96
    pixels = torch.rand(2, 3, 64, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    sizes = {"original_sizes": torch.full((2, 2), 96), "crop_top_lefts": torch.zeros(2, 2, dtype=torch.long)}
    sizes["target_sizes"] = torch.tensor([[64, 96]] * 2)
    captions = [207, 980] if name in ("DiT", "ClassConditional") else CAPTIONS
    with torch.no_grad():
        latents = family.latents({"pixel_values": pixels}, generators)
        conditioning = family.conditioning({"captions": captions, **sizes})
    return latents, family.timesteps[[len(family.timesteps) // 3, len(family.timesteps) // 2]], conditioning


def stock_denoiser(family):
    """The model as it was saved, frozen: of weights that have a gradient PyTorch computes norms in another order."""
    name, part = family.args.pretrained_model_name_or_path, family.denoiser_name
    return family.denoiser_class.from_pretrained(name, subfolder=part).requires_grad_(False).eval()


def stock_features(family, denoiser, latents, timesteps, conditioning):
    """name of a block -> the image's hidden states, of all blocks in the order of their calls, in a full pass.

    Which tokens are the image's the last block tells: those alone go into the model's output, so that they alone have
    a gradient. Of a block that returns text and image apart, the image is what has as many tokens.
    """
    seen = {}
    names = {
        module: name
        for name, module in denoiser.named_modules()
        if name == "mid_block" or (name.count(".") == 1 and name.split(".")[0].endswith(("blocks", "layers")))
        if not name.startswith(("proj", "time_text_embed", "distilled"))
    }
    hooks = [module.register_forward_hook(lambda m, _, out: seen.update({names[m]: out})) for module in names]
    output = family.call(denoiser, latents, timesteps, conditioning)[0]
    output = torch.stack(output) if isinstance(output, list) else output
    for hook in hooks:
        hook.remove()
    if family.denoiser_name == "unet":
        return {name: out[0] if isinstance(out, tuple) else out for name, out in seen.items()}
    last = list(seen.values())[-1]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    streams = [out for out in (last if isinstance(last, tuple) else (last,)) if out is not None]
    grads = torch.autograd.grad((output * weights).sum(), streams, retain_graph=True, allow_unused=True)
    (grad,) = (g for g in grads if g is not None and g.any())
    image = grad.ne(0).any(-1)  # [B, n]
    count = image[0].sum().item()
    assert (image.sum(1) == count).all()

    def of_the_image(out):
        if isinstance(out, tuple):
            (out,) = (stream for stream in out if stream is not None and stream.shape[1] == count)
        return out if out.shape[1] == count else torch.stack([row[mask] for row, mask in zip(out, image)])

    return {name: of_the_image(out) for name, out in seen.items()}


def randomize_adapters(family):
    generator = torch.Generator().manual_seed(7)
    for p in family.trained_parameters:
        p.data += 0.3 * torch.randn(p.shape, generator=generator)


def state_of(model):
    """All that the pass must leave alone: parameters, what has a gradient, modes, adapters, hooks, forwards."""
    parameters = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    own = ("training", "_disable_adapters", "forward", "_gradient_checkpointing_func")
    modules = {name: {k: vars(m).get(k) for k in own} for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return parameters, modules, hooks


def assert_same_state(before, after):
    (parameters, *rest), (others, *other_rest) = before, after
    assert rest == other_rest and parameters.keys() == others.keys()
    for name, (value, requires_grad, grad) in parameters.items():
        assert torch.equal(value, others[name][0]), name
        assert (requires_grad, grad) == others[name][1:], name


def features_and_gradient(features, latents):
    """The features, detached, and the gradient of a random combination of them."""
    generator = torch.Generator().manual_seed(9)
    total = sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features)
    (gradient,) = torch.autograd.grad(total, latents)
    return [f.detach() for f in features], gradient


@pytest.mark.parametrize("name", NAMES)
def test_the_features_are_the_hidden_states_of_the_image_after_each_block(load, name):
    family = load(name)
    latents, timesteps, conditioning = inputs_of(family, name)
    expected = stock_features(family, stock_denoiser(family), latents.requires_grad_(), timesteps, conditioning)
    assert list(expected) == family.blocks
    frozen = FrozenDenoiser(family, reversed(family.blocks), torch.float32)
    assert frozen.layers == family.blocks
    with frozen.active():
        features = frozen.features(latents, timesteps, conditioning)
    assert len(features) == len(expected)
    for feature, value in zip(features, expected.values()):
        assert torch.equal(feature, value)
        assert feature.numel() > 0 and len(feature) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_off_and_the_gradient_is_the_base_model_s(load, name, checkpointing):
    if checkpointing and name == "HunyuanDiT":
        pytest.skip("it has no gradient checkpointing")
    family = load(name, *LORA, *(["--gradient_checkpointing"] if checkpointing else []))
    randomize_adapters(family)
    latents, timesteps, conditioning = inputs_of(family, name)
    inputs = latents.requires_grad_(), timesteps, conditioning
    stock, blocks = stock_denoiser(family), family.blocks
    adapted = family.predict(family.model.train(), *inputs)
    before = state_of(family.model)
    for layers in (blocks[: (len(blocks) + 1) // 2], blocks[-1:]):
        expected = stock_features(family, stock, *inputs)
        expected = features_and_gradient([expected[layer] for layer in layers], latents)
        frozen = FrozenDenoiser(family, layers, torch.float32)
        assert frozen.modules == []
        with frozen.active():
            found = features_and_gradient(frozen.features(*inputs), latents)
        assert all(torch.equal(f, e) for f, e in zip(found[0], expected[0], strict=True))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6 * expected[1].abs().max().item())
    assert_same_state(before, state_of(family.model))
    assert torch.equal(family.predict(family.model, *inputs), adapted)
    assert not torch.allclose(adapted, family.predict(stock, *inputs), rtol=1e-3)


@pytest.mark.parametrize("words", [(), LORA, (*LORA, "--gradient_checkpointing")], ids=" ".join)
@pytest.mark.parametrize("name, layers, before", ENDS)
def test_no_block_runs_after_the_last_layer(load, name, layers, before, words):
    family = load(name, *words)
    inputs = inputs_of(family, name)
    frozen = FrozenDenoiser(family, layers, torch.float32)
    denoiser, calls = frozen.modules[0] if frozen.modules else family.denoiser, []
    names = {denoiser.get_submodule(block): block for block in family.blocks}
    for module in names:
        module.register_forward_pre_hook(lambda module, _: calls.append(names[module]))
    with frozen.active():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                features = frozen.features(inputs[0].requires_grad_(), *inputs[1:])
            assert calls == before and len(features) == len(layers)
            assert all(feature.requires_grad == grad for feature in features)
            calls.clear()


@pytest.mark.parametrize("name", ["StableDiffusion3", "ZImage"])
def test_no_checkpoint_is_left_half_made(load, name):
    family = load(name, *LORA, "--gradient_checkpointing")
    latents, timesteps, conditioning = inputs_of(family, name)
    checkpoint, begun, done = family.denoiser._gradient_checkpointing_func, [], []

    def noted(module, *args):
        begun.append(module)
        output = checkpoint(module, *args)
        done.append(module)
        return output

    family.denoiser._gradient_checkpointing_func = noted
    frozen = FrozenDenoiser(family, family.blocks[:1], torch.float32)
    with frozen.active():
        frozen.features(latents.requires_grad_(), timesteps, conditioning)
    assert begun == done and done[-1] is family.denoiser.get_submodule(family.blocks[0])


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusion3"])
def test_an_error_leaves_the_model_as_it_was(load, name):
    family = load(name, *LORA, "--gradient_checkpointing")
    latents, timesteps, conditioning = inputs_of(family, name)
    frozen = FrozenDenoiser(family, family.blocks[:2], torch.float32)
    before = state_of(family.model.train())
    wrong = {**conditioning, "prompt_embeds": conditioning["prompt_embeds"][..., :-1]}
    with pytest.raises(RuntimeError):
        with frozen.active():
            frozen.features(latents, timesteps, wrong)
    with pytest.raises(KeyError):
        with frozen.active():
            frozen.features(latents, timesteps, conditioning)
            raise KeyError
    assert_same_state(before, state_of(family.model))


def test_text_encoders_are_the_frozen_ones_as_well(load):
    plain, family = load("StableDiffusion"), load("StableDiffusion", *LORA, "--train_text_encoder")
    randomize_adapters(family)
    expected = stock_features(plain, plain.denoiser.eval(), *inputs_of(plain, "StableDiffusion"))
    inputs, layers = inputs_of(family, "StableDiffusion"), ["mid_block", "down_blocks.1"]
    assert inputs[2] == {"captions": CAPTIONS}
    frozen = FrozenDenoiser(family, layers, torch.float32)
    before = state_of(family.model.train())
    with frozen.active():
        first, second = frozen.features(*inputs)
    assert_same_state(before, state_of(family.model))
    assert torch.equal(first, expected["down_blocks.1"]) and torch.equal(second, expected["mid_block"])
    with torch.no_grad():
        assert not torch.allclose(frozen.features(*inputs)[1], second, rtol=1e-2)  # with the adapters


def test_dora_is_off_as_well(load):
    family = load("StableDiffusion", *LORA, "--use_dora")
    randomize_adapters(family)
    inputs = inputs_of(family, "StableDiffusion")
    expected = stock_features(family, stock_denoiser(family), *inputs)["up_blocks.0"]
    frozen = FrozenDenoiser(family, ["up_blocks.0"], torch.float32)
    with frozen.active():
        (found,) = frozen.features(*inputs)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert not torch.allclose(frozen.features(*inputs)[0], expected, rtol=1e-2)


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusion3"])
def test_a_pass_in_between_changes_no_gradient_of_training(load, name):
    def gradients(passes):
        family = load(name, *LORA, "--gradient_checkpointing", "--lora_dropout", 0.5)
        randomize_adapters(family)
        inputs = inputs_of(family, name)
        frozen = FrozenDenoiser(family, family.blocks[:2], torch.float32)
        torch.manual_seed(0)
        loss = family.predict(family.model.train(), *inputs).square().mean()
        for _ in range(passes):
            latents = inputs[0].clone().requires_grad_()
            with frozen.active():
                features_and_gradient(frozen.features(latents, *inputs[1:]), latents)
        loss.backward()
        return [p.grad for p in family.trained_parameters] + [torch.rand(3)]

    plain, found = gradients(0), gradients(2)
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))


@pytest.mark.parametrize("name, layer", [("StableDiffusion", "down_blocks.1"), ("Chroma", "transformer_blocks.0")])
def test_the_copy_stays_where_training_began_and_ends_with_the_last_layer(load, name, layer):
    family = load(name, "--gradient_checkpointing")
    later = family.blocks[family.blocks.index(layer) + 1 :]
    latents, *rest = inputs_of(family, name)
    frozen, inputs = FrozenDenoiser(family, [layer], torch.float32), (latents.requires_grad_(), *rest)
    expected = stock_features(family, stock_denoiser(family), *inputs)[layer]
    with torch.no_grad():
        for p in family.model.train().parameters():
            p += 0.1
    with frozen.active():
        (found,) = frozen.features(*inputs)
    assert torch.equal(found, expected) and all(p.requires_grad for p in family.trained_parameters)
    (copied,) = frozen.modules
    assert not any(p.requires_grad for p in copied.parameters()) and not any(m.training for m in copied.modules())
    assert later and all(module.training for module in family.model.modules())
    theirs = [key for key in family.denoiser.state_dict() if key.startswith(tuple(f"{block}." for block in later))]
    assert theirs and copied.state_dict().keys() == family.denoiser.state_dict().keys() - set(theirs)


@pytest.mark.parametrize("name", ["StableDiffusion", "Chroma", "Sana"])
def test_in_half_precision_copy_and_pass_are_those_of_a_model_loaded_so(load, name):
    family = load(name)
    latents, timesteps, conditioning = inputs_of(family, name)
    inputs, layers = (latents.requires_grad_(), timesteps, conditioning), family.blocks[:2]
    frozen = FrozenDenoiser(family, layers, torch.bfloat16)
    loaded = family.denoiser_class.from_pretrained(
        family.args.pretrained_model_name_or_path, subfolder=family.denoiser_name, dtype=torch.bfloat16
    ).eval()
    tensors = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for key, tensor in (*frozen.modules[0].named_parameters(), *frozen.modules[0].named_buffers()):
        assert tensor.dtype == tensors[key].dtype and torch.equal(tensor, tensors[key]), key
    with frozen.active():
        found, gradient = features_and_gradient(frozen.features(*inputs), latents)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock_features(family, loaded, *inputs)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    for layer, feature in zip(layers, found):
        assert torch.equal(feature, expected[layer])


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusion3"])
def test_a_dry_run_counts_the_bytes_of_the_copy(load, name):
    (layer, *_) = load(name).blocks
    real, dry = (FrozenDenoiser(load(name, *words), [layer], torch.bfloat16) for words in ((), ("--dry_run",)))
    assert module_bytes(*dry.modules) == module_bytes(*real.modules) > 0
    family = load(name, "--dry_run")
    frozen = FrozenDenoiser(family, [layer], torch.bfloat16)
    inputs = inputs_of(load(name), name)
    with frozen.active():
        features = frozen.features(inputs[0].requires_grad_(), *inputs[1:])
        (gradient,) = torch.autograd.grad(sum(f.float().sum() for f in features), inputs[0])
    assert isinstance(gradient, FakeTensor) and gradient.shape == inputs[0].shape


# Two processes


ENGINES = {"FSDP2": "fsdp2_lora", "ZeRO-3": "zero3_offload"}
STEPS, SAMPLES = 3, 2  # of each process
LAYERS = ["transformer_blocks.1", "transformer_blocks.0"]  # of four


def samples_of(rank, family):
    """What a process works on: latents `[2, C, h, w]`, timesteps `[2]`, captions."""
    channels = family.denoiser.config.in_channels
    latents = torch.randn(SAMPLES, channels, 8, 8, generator=torch.Generator().manual_seed(rank))
    return latents, family.timesteps[torch.tensor([300, 700]) + rank], CAPTIONS


def frozen_pass(frozen, family, rank):
    """Features without a gradient, and features and gradient, one after another."""
    latents, timesteps, captions = samples_of(rank, family)
    with torch.no_grad():
        conditioning = family.conditioning({"captions": captions})
    with frozen.active():
        with torch.no_grad():
            target = frozen.features(latents, timesteps, conditioning)
        features, gradient = features_and_gradient(
            frozen.features(latents.requires_grad_(), timesteps, conditioning), latents
        )
    return {"target": target, "features": features, "gradient": gradient}


def train_on_this_process(between, output, flags):
    """Steps of training; `between` forward and backward passes "frozen" or nothing happens; saves what came out."""
    args = train_lpl_dit.parse_args(flags)
    accelerator = make_accelerator(args)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # else weights as small as these stay whole
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    dtype = DTYPES[accelerator.mixed_precision]
    family = find_family(args)(args, accelerator.device, dtype, torch.float32)
    frozen = FrozenDenoiser(family, LAYERS, dtype)
    optimizer = make_optimizer(args, family.trained_parameters, accelerator)
    model, optimizer, weights = prepare(accelerator, args, family, optimizer)
    whole = [p for p in family.model.parameters() if not isinstance(p, DTensor) and getattr(p, "ds_persist", True)]
    assert not whole
    found, rank = {}, accelerator.process_index
    for _ in range(STEPS * args.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            latents, timesteps, captions = samples_of(rank, family)
            with torch.no_grad():
                conditioning = family.conditioning({"captions": captions})
            loss = (family.predict(model, latents, timesteps, conditioning) - latents).square().mean()
            if between == "frozen":
                found = frozen_pass(frozen, family, rank)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"weights": weights.whole(), "loss": loss.item(), **found}, Path(output, f"{rank}.pt"))
    accelerator.end_training()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A pipeline whose transformer has four blocks."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("deep"), "StableDiffusion3", num_layers=4)


@pytest.fixture
def train_on_two(deep, photos, tmp_path):
    """Engine, what happens in between -> what each of two processes has saved."""

    def run(engine, between):
        output = tmp_path / between
        output.mkdir()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--main_process_port", 0]
        command += [
            "--config_file",
            ROOT / "accelerate_configs" / f"{ENGINES[engine]}.yaml",
            "--mixed_precision",
            "no",
        ]
        command += [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "FSDP2" else []
        command += [__file__, between, output, "--pretrained_model_name_or_path", deep]
        command += ["--train_data_dir", photos, "--output_dir", output, "--report_to", "none", "--resolution", 64]
        command += ["--train_batch_size", SAMPLES, "--seed", 0, "--learning_rate", 0.01, *LORA]
        command += ["--gradient_checkpointing", "--gradient_accumulation_steps", 2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        environment |= {} if engine == "FSDP2" else {"DS_ACCELERATOR": "cpu"}
        environment.pop("ACCELERATE_USE_CPU", None)
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return [torch.load(output / f"{rank}.pt") for rank in range(2)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_where_weights_are_sharded_the_pass_is_that_of_one_process_and_training_goes_on(
    train_on_two, load, deep, engine
):
    if engine == "ZeRO-3":
        pytest.importorskip("deepspeed")
    plain, found = train_on_two(engine, "nothing"), train_on_two(engine, "frozen")
    family = load("StableDiffusion3", model=deep)
    frozen = FrozenDenoiser(family, LAYERS, torch.float32)
    for rank, of_rank in enumerate(found):
        expected = frozen_pass(frozen, family, rank)
        for name in ("target", "features"):
            torch.testing.assert_close(of_rank[name], expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_rank["gradient"], expected["gradient"], rtol=1e-4, atol=1e-5)
        assert of_rank["loss"] == plain[rank]["loss"]
    (weights, others) = (result[0]["weights"] for result in (plain, found))
    assert weights.keys() == others.keys() and len(weights) > 8
    assert all(torch.equal(weights[name], others[name]) for name in weights)


if __name__ == "__main__":
    train_on_this_process(*sys.argv[1:3], sys.argv[3:])
