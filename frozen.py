"""The hidden features of the denoiser as it was when training began: what the self-perceptual objective compares.

Shapes: B batch, C latent channels, h x w latent positions.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from arguments import UserError
from counters import without_values
from loading import cast, from_config_without_values


class FrozenDenoiser:
    """The denoiser as it was when training began, as far as the last of `layers`.

    With LoRA it is the denoiser that is trained, without its adapters. Else it is a copy, to be made of the weights
    that training begins with: before an engine shards them, and before a checkpoint is loaded.

    Args:
        family: the family of the model.
        layers: names out of `family.blocks`.
        dtype: precision of the copy, and of the pass: under autocast if it is a half one.

    `layers` are in the order in which they run. `modules` is what takes memory besides the model: the copy, if any.
    """

    def __init__(self, family, layers, dtype):
        blocks = family.blocks
        self.layers, self.modules = sorted(layers, key=blocks.index), []
        self._family, self._dtype = family, dtype
        if not family.args.use_lora:
            unread = blocks[blocks.index(self.layers[-1]) + 1 :]
            self.modules = [self._copy(family.denoiser, unread)]

    def _copy(self, denoiser, unread):
        """The denoiser without the blocks `unread`, frozen, on the device."""
        if self._family.args.dry_run:
            frozen = from_config_without_values(type(denoiser), denoiser.config, self._dtype)
            for name in unread:
                frozen.set_submodule(name, torch.nn.Identity())
            if denoiser.is_gradient_checkpointing:
                frozen.enable_gradient_checkpointing()
            return without_values(frozen).requires_grad_(False).eval()
        instead = {id(denoiser.get_submodule(name)): torch.nn.Identity() for name in unread}
        frozen = cast(copy.deepcopy(denoiser, instead), self._dtype).requires_grad_(False).eval()
        return frozen.to(self._family.device)

    @property
    def _model(self):
        """What is called; not as an engine wraps it, so that there this is no step of training."""
        return self.modules[0] if self.modules else self._family.model

    @contextmanager
    def active(self):
        """The model is the frozen one inside, for a forward pass of `features` and for its backward pass.

        Adapters are off: their layers do not read them. Nothing else about them changes, as engines hold them.
        """
        modules = list(self._model.modules())
        training = [module for module in modules if module.training]
        adapted = [module for module in modules if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
        try:
            for module in training:
                module.training = False
            for module in adapted:
                module._disable_adapters = True
            yield
        finally:
            for module in training:
                module.training = True
            for module in adapted:
                module._disable_adapters = False

    def features(self, noisy_latents, timesteps, conditioning):
        """The image's hidden states after each of `layers`, in the precision of the pass; call it inside `active`.

        A list of `[B, ...]`, differentiable in the latents. No later block runs. Where weights are sharded all
        processes must call it, as often as each other, and take the gradient as often.

        Args:
            noisy_latents: `[B, C, h, w]`; timesteps: `[B]`, on the CPU; conditioning: of `Family.conditioning`.
        """
        with self._autocast(), self._ending_at_the_last_layer():
            outputs = self._family.call(self._model, noisy_latents, timesteps, conditioning)
        return [self._family.hidden_states(output, noisy_latents, conditioning) for output in outputs]

    def _autocast(self):
        half = self._dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self._family.device.type, self._dtype if half else None, enabled=half)

    @contextmanager
    def _ending_at_the_last_layer(self):
        """Inside, the model returns what its `layers` have returned, a list, and leaves out what would follow.

        The model's own `forward` returns, so that the hooks which engines have on the model see an output.
        """
        model, outputs = self._model, []
        denoiser = self._family.denoiser if model is self._family.model else model
        forward = model.forward

        def end_early(*args, **kwargs):
            try:
                forward(*args, **kwargs)
            except _LastLayer:
                return outputs

        with ExitStack() as stack:
            for name in self.layers:
                hook = denoiser.get_submodule(name).register_forward_hook(lambda *call: outputs.append(call[-1]))
                stack.enter_context(hook)
            stack.enter_context(_raising_after(denoiser, denoiser.get_submodule(self.layers[-1])))
            stack.enter_context(_attribute(model, "forward", end_early))
            yield


def layers_of(wanted, blocks):
    """Names out of `blocks`, a denoiser's in the order they run, for the words of --sp_layers.

    A number N is the N-th block of a transformer; `mid`, `downN`, `upN`, `encoder` and `decoder` are of a UNet. By
    default `mid` (of the few UNets without one, the last before the way up), or the block at 2 / 7 of a transformer's
    depth, the best one of Table 5 (8 of 28). Raises UserError.
    """
    kinds = {"down": [], "up": [], "mid": []}
    for name in blocks:
        if name.startswith(("down_blocks.", "mid_block", "up_blocks.")):
            kinds[name.split("_")[0]].append(name)
    unet = bool(kinds["down"])
    known = {str(number): [name] for number, name in enumerate(blocks, 1)}
    default = str(max(1, round(len(blocks) * 2 / 7)))
    if unet:
        known = {"mid": kinds["mid"]} if kinds["mid"] else {}
        known |= {"encoder": kinds["down"], "decoder": kinds["up"]}
        known |= {f"{kind}{n}": [name] for kind in ("down", "up") for n, name in enumerate(kinds[kind], 1)}
        default = "mid" if kinds["mid"] else f"down{len(kinds['down'])}"
    wanted = wanted or [default]
    for word in wanted:
        if word not in known:
            there = ", ".join(known) if unet else f"1 to {len(blocks)}"
            flag = "--sp_layers" if len(wanted) > 1 else "--sp_layer"
            raise UserError(f"{flag} {word}: this model has no such layer; there are {there}.")
    chosen = {name for word in wanted for name in known[word]}
    return [name for name in blocks if name in chosen]


class _LastLayer(Exception):
    """Nothing is left to be done."""


@contextmanager
def _raising_after(denoiser, block):
    """Inside, _LastLayer is raised after `block`, but not in a checkpoint, which an error would leave half made."""

    def end(module, *_):
        if module is block:
            raise _LastLayer

    def checkpoint(module, *args, **kwargs):
        output = checkpointed(module, *args, **kwargs)
        end(module)
        return output

    checkpointed = getattr(denoiser, "_gradient_checkpointing_func", None)
    if checkpointed is not None and denoiser.gradient_checkpointing and torch.is_grad_enabled():
        context = _attribute(denoiser, "_gradient_checkpointing_func", checkpoint)
    else:
        context = block.register_forward_hook(end)
    with context:
        yield


@contextmanager
def _attribute(module, name, value):
    """An attribute of this module alone is another one inside."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
