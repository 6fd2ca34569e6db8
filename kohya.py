"""A LoRA in the format of kohya's sd-scripts, which many other tools read: SD 1.x and 2.x, SDXL and FLUX.1.

A module has the keys `{layer}.lora_down.weight`, `.lora_up.weight` and `.alpha` (the scale is alpha / rank, as in
peft). What the tools read, by their source:

- UNets of SD and SDXL: `lora_unet_` and diffusers' name of the module with underscores. So name them sd-scripts (for
  SD; for SDXL it trains the names of Stability's code, `input_blocks_4_1`, and renames diffusers' when it makes a
  network from a file), ComfyUI and Forge (both namings), A1111 (both, but it looks for SDXL's
  `up_blocks_0_upsamplers_0_conv` in a wrong place) and diffusers. Only SDXL's `add_embedding` has Stability's name,
  `label_emb`: A1111 knows no other, and diffusers loses the number in its own.
- Text encoders: `lora_te_` for SD, `lora_te1_` and `lora_te2_` for SDXL, in all of them.
- FLUX: the names of Black Forest Labs' code, in which q, k and v (in single blocks proj_mlp, too) are one layer, in
  sd-scripts, ComfyUI, Forge and diffusers. `FluxPipeline.load_lora_weights` leaves out the embedders and the last
  layers, and reads linear1 of FLUX's own width, 3072, only.
- DoRA: LyCORIS alone reads magnitudes as peft means them, so they are not written.
"""

import re

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

from arguments import UserError


KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
SD, SDXL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"
LABEL_EMBEDDING = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}

# Kohya's layer -> those of diffusers whose rows it has, in their order.
FLUX_DOUBLE_BLOCK = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
FLUX_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
FLUX_MODULATION, FLUX_OUTPUT = "final_layer_adaLN_modulation_1", "final_layer_linear"
FLUX_OTHERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in_out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    FLUX_MODULATION: ("norm_out.linear",),
    FLUX_OUTPUT: ("proj_out",),
}
A, B = "lora_A.weight", "lora_B.weight"


def to_kohya(state, lora_alpha, pipeline):
    """A LoRA's tensors in kohya's names.

    Args:
        state: name -> tensor, as in the file that the pipeline's `load_lora_weights` reads; all of one rank.
        lora_alpha: that of all modules.
        pipeline: the name of the pipeline's class, one of those above.

    Raises:
        UserError: the format has no name for a module.
    """
    return _flux(state, lora_alpha) if pipeline == FLUX else _unet(state, lora_alpha, pipeline)


def _unet(state, lora_alpha, pipeline):
    """By diffusers' converter, which takes the rank for alpha, and every text encoder for one of SDXL's."""
    result = {}
    for key, tensor in convert_state_dict_to_kohya(state).items():
        layer, _, kind = key.partition(".")
        for name, other in LABEL_EMBEDDING.items():
            layer = layer.replace(name, other)
        if pipeline == SD:
            layer = layer.replace("lora_te1_", "lora_te_")
        result[f"{layer}.{kind}"] = torch.tensor(float(lora_alpha)) if kind == "alpha" else tensor
    return result


def _flux(state, lora_alpha):
    modules, result = _modules(state), {}
    for module in modules:
        layer, parts = _flux_layer(module)
        if f"{layer}.alpha" not in result:
            tensors = _flux_tensors(layer, parts, modules, lora_alpha)
            result |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    return result


def kohya_metadata(state, lora_alpha, pipeline):
    """What sd-scripts would write of a LoRA that `to_kohya` takes into the file's metadata: name -> string.

    A1111 tells SD 1, SD 2 and SDXL by it.
    """
    modules = _modules(state)
    metadata = {
        "ss_network_module": "networks.lora_flux" if pipeline == FLUX else "networks.lora",
        "ss_network_dim": str(len(next(iter(modules.values()))[A])),
        "ss_network_alpha": str(float(lora_alpha)),
    }
    version = {SDXL: "sdxl_base_v1-0", FLUX: "flux1"}.get(pipeline) or _sd_version(modules)
    if version:
        metadata |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return metadata


def _sd_version(modules):
    """SD 1 and SD 2 have text embeddings of another width; None where no module takes such."""
    text = r"unet\..*\.attn2\.to_[kv]|text_encoder\..*\.self_attn\.\w+"
    widths = {tensors[A].shape[1] for module, tensors in modules.items() if re.fullmatch(text, module)}
    return {768: "sd_v1", 1024: "sd_v2"}.get(*widths) if len(widths) == 1 else None


def _modules(state):
    """Name of a module -> last part of a key -> tensor."""
    modules = {}
    for key, tensor in state.items():
        module, *kind = key.rsplit(".", 2)
        modules.setdefault(module, {})[".".join(kind)] = tensor
    return modules


def _flux_layer(module):
    """Kohya's name of a module's layer, and the names of all modules that it consists of."""
    pattern = r"transformer\.(?:(single_)?transformer_blocks\.(\d+)\.)?(.+)"
    single, block, name = re.fullmatch(pattern, module).groups()
    prefix, layers = "lora_unet_", FLUX_OTHERS
    if block is not None:
        prefix += f"{'single' if single else 'double'}_blocks_{block}_"
        layers = FLUX_SINGLE_BLOCK if single else FLUX_DOUBLE_BLOCK
    for layer, parts in layers.items():
        if name in parts:
            return prefix + layer, [module.removesuffix(name) + part for part in parts]
    raise UserError(
        f"--output_kohya_format: kohya's format has no name for {module}: leave the flag or, in --lora_layers, "
        "that layer out."
    )


def _flux_tensors(layer, parts, modules, lora_alpha):
    """One layer of kohya's: the ranks of the parts that are adapted add up, and so do their alphas."""
    adapted = [modules[part] for part in parts if part in modules]
    down, up, alpha = adapted[0][A], adapted[0][B], lora_alpha
    if len(parts) > 1:  # all take the same input, and each has rows of its own
        down = torch.cat([tensors[A] for tensors in adapted])
        up = torch.block_diag(*(_rows(part, modules, down) for part in parts))
        alpha = lora_alpha * len(adapted)
    if layer.endswith((FLUX_MODULATION, FLUX_OUTPUT)):  # diffusers reads them without their alpha
        up, alpha = up * (lora_alpha / len(down)), len(down)
    if layer.endswith(FLUX_MODULATION):  # shift and scale have changed places in diffusers
        up = torch.cat(up.chunk(2)[::-1])
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))}


def _rows(part, modules, down):
    """Up matrix of one part of a layer, `[out, rank]`, or `[out, 0]` if it is not adapted."""
    if part in modules:
        return modules[part][B]
    width = down.shape[1]
    return down.new_zeros(4 * width if part.endswith("proj_mlp") else width, 0)
