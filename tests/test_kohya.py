"""A LoRA in kohya's format is the same LoRA to whoever reads it."""

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

from arguments import UserError
from family import lora_state
from kohya import KOHYA_FILE, kohya_metadata, to_kohya


RANK, ALPHA = 3, 8
SD, XL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
UNET = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_in", "conv_out", "linear_1", "linear_2"]
UNET += ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"]
DOUBLE = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
DOUBLE += ["attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj"]
DOUBLE += ["ff_context.net.2", "norm1.linear", "norm1_context.linear"]
SINGLE = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
KOHYA_FLUX = {  # layer -> its input and output, from the documentation of sd-scripts' converter
    "double_blocks_0_img_attn_proj": (3072, 3072),
    "double_blocks_0_img_attn_qkv": (3072, 9216),
    "double_blocks_0_img_mlp_0": (3072, 12288),
    "double_blocks_0_img_mlp_2": (12288, 3072),
    "double_blocks_0_img_mod_lin": (3072, 18432),
    "double_blocks_0_txt_attn_proj": (3072, 3072),
    "double_blocks_0_txt_attn_qkv": (3072, 9216),
    "double_blocks_0_txt_mlp_0": (3072, 12288),
    "double_blocks_0_txt_mlp_2": (12288, 3072),
    "double_blocks_0_txt_mod_lin": (3072, 18432),
    "single_blocks_0_linear1": (3072, 21504),
    "single_blocks_0_linear2": (15360, 3072),
    "single_blocks_0_modulation_lin": (3072, 9216),
}


@pytest.fixture(params=["SD", "SDXL"])
def model(request, tiny_sd, tiny_sdxl):
    return {"SD": tiny_sd, "SDXL": tiny_sdxl}[request.param]


def adapt(model, layers):
    """Adds random adapters and returns their state."""
    scale = {"r": RANK, "lora_alpha": ALPHA}
    model.add_adapter(LoraConfig(target_modules=layers, init_lora_weights="gaussian", **scale))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    return lora_state(model)


def adapted_pipeline(folder, layers, text=False):
    """A pipeline with random adapters, and their state as it is saved."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(folder)
    state = {f"unet.{key}": value for key, value in adapt(pipe.unet, layers).items()}
    for name in text_encoders(pipe) if text else ():
        part = adapt(getattr(pipe, name), TEXT)
        state |= {f"{name}.text_model.{key.removeprefix('text_model.')}": value for key, value in part.items()}
    return pipe, state


def text_encoders(pipe):
    return [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]


def merged_weights(pipe):
    """Name -> weight of all modules, with the adapters in them, as peft computes them."""
    result = {}
    for component in ("unet", *text_encoders(pipe)):
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
                result[f"{component}.{name}"] = module.get_base_layer().weight.detach()
    return result


def delta(down, up, alpha):
    """The change of a linear or convolutional layer's weights."""
    product = torch.einsum("or,r...->o...", up.flatten(1), down)
    return alpha / len(down) * product


def saved(state, pipeline, folder):
    save_file(to_kohya(state, ALPHA, pipeline), folder / KOHYA_FILE, metadata=kohya_metadata(state, ALPHA, pipeline))
    return folder


@pytest.mark.parametrize("layers, text", [(ATTENTION, True), (UNET, False)], ids=["attention and text", "all"])
def test_the_stock_pipeline_reads_what_was_trained(model, layers, text, tmp_path):
    trained, state = adapted_pipeline(model, layers, text)
    fresh = DiffusionPipeline.from_pretrained(model)
    fresh.load_lora_weights(saved(state, type(trained).__name__, tmp_path), weight_name=KOHYA_FILE)
    expected, found = merged_weights(trained), merged_weights(fresh)
    assert len(expected) == len(state) // 2 and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_but_for_alpha_the_tensors_are_those_of_the_stock_converter(tiny_sdxl):
    _, state = adapted_pipeline(tiny_sdxl, ATTENTION, text=True)
    kohya, stock = to_kohya(state, ALPHA, XL), convert_state_dict_to_kohya(state)
    assert kohya.keys() == stock.keys()
    for key in kohya:
        assert kohya[key] == ALPHA if key.endswith("alpha") else torch.equal(kohya[key], stock[key])


@pytest.mark.parametrize(
    "pipeline, module, name",
    [
        (SD, "text_encoder.text_model.encoder.layers.11.mlp.fc1", "lora_te_text_model_encoder_layers_11_mlp_fc1"),
        (
            XL,
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
        ),
        (
            XL,
            "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
        ),
        (SD, "unet.down_blocks.0.attentions.0.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        (
            SD,
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0",
            "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0",
        ),
        (
            SD,
            "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        ),
        (SD, "unet.mid_block.resnets.1.time_emb_proj", "lora_unet_mid_block_resnets_1_time_emb_proj"),
        (SD, "unet.down_blocks.2.downsamplers.0.conv", "lora_unet_down_blocks_2_downsamplers_0_conv"),
        (
            XL,
            "unet.up_blocks.0.attentions.1.transformer_blocks.9.attn1.to_q",
            "lora_unet_up_blocks_0_attentions_1_transformer_blocks_9_attn1_to_q",
        ),
        (XL, "unet.add_embedding.linear_2", "lora_unet_label_emb_0_2"),
        (FLUX, "transformer.transformer_blocks.18.norm1.linear", "lora_unet_double_blocks_18_img_mod_lin"),
        (FLUX, "transformer.single_transformer_blocks.37.proj_out", "lora_unet_single_blocks_37_linear2"),
        (FLUX, "transformer.proj_out", "lora_unet_final_layer_linear"),
        (FLUX, "transformer.time_text_embed.text_embedder.linear_2", "lora_unet_vector_in_out_layer"),
        (FLUX, "transformer.time_text_embed.guidance_embedder.linear_1", "lora_unet_guidance_in_in_layer"),
    ],
)
def test_names_are_those_of_published_files(pipeline, module, name):
    tensors = to_kohya(lora(module, 5, 6), ALPHA, pipeline)
    assert tensors.keys() == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}


def lora(module, inputs, outputs):
    return {
        f"{module}.lora_A.weight": torch.randn(RANK, inputs),
        f"{module}.lora_B.weight": torch.randn(outputs, RANK),
    }


def flux_lora(layers, width=3072):
    """Adapters of a FLUX that is never built: name of a module -> its tensors."""
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": width // 128}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config, guidance_embeds=True)
    torch.manual_seed(0)
    state = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and layers(name):
            state |= lora(f"transformer.{name}", module.in_features, module.out_features)
    return state


def in_double(name):
    return name.startswith("transformer_blocks")


def changes(state):
    """Module -> what its adapters, without a scale, make of a random input: the whole change would be too large."""
    result = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            inputs = torch.randn(down.shape[1], 2, generator=torch.Generator().manual_seed(7))
            up = state[key.replace("lora_A", "lora_B")]
            result[key.removesuffix(".lora_A.weight").removeprefix("transformer.")] = up @ (down @ inputs)
    return result


@pytest.mark.parametrize(
    "layers",
    [lambda name: True, lambda name: name.endswith(("to_q", "to_v", "add_v_proj")), lambda name: "to_k" in name],
    ids=["all", "queries and values", "keys"],
)
def test_diffusers_reads_the_flux_that_was_trained(layers, tmp_path):
    state = flux_lora(layers)
    read = changes(FluxPipeline.lora_state_dict(saved(state, FLUX, tmp_path), weight_name=KOHYA_FILE))
    expected = changes(state)
    assert expected.keys() <= read.keys()
    for name, change in read.items():  # what was not adapted is read, too, if it is a part of a layer that was
        wanted = expected[name] * ALPHA / RANK if name in expected else torch.zeros_like(change)
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-2)


def test_flux_has_the_layers_of_the_original_code():
    state = flux_lora(lambda name: "blocks." in name)
    kohya = to_kohya(state, ALPHA, FLUX)
    names = {key.split(".")[0] for key in kohya}
    assert names == {f"lora_unet_{name}" for name in KOHYA_FLUX}
    for name, (inputs, outputs) in KOHYA_FLUX.items():
        down, up = (kohya[f"lora_unet_{name}.lora_{kind}.weight"] for kind in ("down", "up"))
        assert down.shape[1] == inputs and up.shape[0] == outputs and len(down) == up.shape[1]
        assert kohya[f"lora_unet_{name}.alpha"].shape == ()


@pytest.mark.parametrize("adapted", ["qkvm", "qkv", "qv", "m"])
def test_rows_of_a_fused_layer_are_those_of_its_parts(adapted):
    parts = {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "m": "proj_mlp"}
    block = "transformer.single_transformer_blocks.0."
    state = flux_lora(lambda name: name in [block[12:] + parts[part] for part in adapted], width=256)
    kohya = to_kohya(state, ALPHA, FLUX)
    layer = "lora_unet_single_blocks_0_linear1"
    down, up, alpha = (kohya[f"{layer}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert len(kohya) == 3 and len(down) == RANK * len(adapted)
    rows = delta(down, up, alpha).split([256, 256, 256, 1024])
    for part, found in zip(parts, rows):
        if part in adapted:
            tensors = (state[f"{block}{parts[part]}.lora_{kind}.weight"] for kind in "AB")
            torch.testing.assert_close(found, delta(*tensors, ALPHA))
        else:
            assert not found.any()


def test_the_stock_pipeline_reads_the_double_blocks_of_a_tiny_flux(tiny_pipeline, tmp_path):
    folder = tiny_pipeline("Flux")
    torch.manual_seed(0)
    trained, fresh = (FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer") for _ in range(2))
    layers = [f"transformer_blocks.0.{layer}" for layer in DOUBLE]
    state = {f"transformer.{key}": value for key, value in adapt(trained, layers).items()}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=None, transformer=fresh, **parts)
    pipe.load_lora_weights(saved(state, FLUX, tmp_path), weight_name=KOHYA_FILE)
    adapted = [name for name, module in trained.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(adapted) == sorted(layers)
    for name in adapted:
        modules = [transformer.get_submodule(name) for transformer in (trained, fresh)]
        for module in modules:
            module.merge()
        torch.testing.assert_close(*(module.get_base_layer().weight for module in modules))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_kept(dtype):
    state = {key: value.to(dtype) for key, value in flux_lora(lambda name: True, width=256).items()}
    kohya = to_kohya(state, ALPHA, FLUX)
    assert {value.dtype for key, value in kohya.items() if "lora_" in key.split(".", 1)[1]} == {dtype}


@pytest.mark.parametrize(
    "pipeline, width, version",
    [
        (SD, 768, {"ss_base_model_version": "sd_v1", "ss_v2": "False"}),
        (SD, 1024, {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        (SD, 16, {}),
        (XL, 2048, {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}),
    ],
)
def test_metadata_say_which_model_it_is_for(pipeline, width, version, tmp_path):
    block = "unet.mid_block.attentions.0.transformer_blocks.0."
    state = lora(f"{block}attn1.to_q", 1280, 1280) | lora(f"{block}attn2.to_k", width, 1280)
    with safe_open(saved(state, pipeline, tmp_path) / KOHYA_FILE, "pt") as file:
        metadata = file.metadata()
    network = {"ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "8.0"}
    assert metadata == network | version


def test_metadata_of_flux_and_of_layers_that_do_not_tell_the_version():
    metadata = kohya_metadata(flux_lora(in_double, width=256), ALPHA, FLUX)
    assert metadata["ss_network_module"] == "networks.lora_flux" and metadata["ss_base_model_version"] == "flux1"
    layer = "transformer_blocks.0.attn1.to_q"
    assert "ss_v2" not in kohya_metadata(lora(f"unet.mid_block.attentions.0.{layer}", 768, 768), ALPHA, SD)
    text = lora("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 1024, 1024)
    assert kohya_metadata(text, ALPHA, SD)["ss_v2"] == "True"


@pytest.mark.parametrize("module", ["transformer_blocks.0.norm2.linear", "single_transformer_blocks.0.ff.net.2"])
def test_what_has_no_name_is_refused(module):
    with pytest.raises(
        UserError, match=f"--output_kohya_format: .* no name for transformer.{module}: .*--lora_layers"
    ):
        to_kohya(lora(f"transformer.{module}", 4, 4), ALPHA, FLUX)
