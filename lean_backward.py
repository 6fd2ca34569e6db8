"""Backward passes through frozen layers that keep less: exact, and without computing a convolution again."""

from contextlib import nullcontext
from inspect import signature

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv3d_input
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


def lean_backward(enabled=True):
    """A context for the forward pass of a network whose weights are frozen; the backward pass needs none.

    Autograd keeps the input of every convolution, which only the gradient of its weight needs, and that of every SiLU.
    In here a frozen convolution keeps nothing but its weight, and a SiLU behind a group norm is computed from what the
    norm keeps. That leaves one feature map per convolution instead of three.
    """
    return _LeanBackward() if enabled and torch.is_grad_enabled() else nullcontext()


class _LeanBackward(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.norms = WeakIdKeyDictionary()  # output of a group norm -> its version, how to compute it again

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and len(args) == 7 and is_frozen(*args[1:3]) and not isinstance(args[4], str):
            return _FrozenConvolution.apply(CONVOLUTIONS[func], func, *args)
        if func is F.silu and args[0] in self.norms:
            version, norm = self.norms[args[0]]
            if version == args[0]._version:  # nothing was done to it in place
                return _SiluOfNorm.apply(args[0], norm["input"], {k: v for k, v in norm.items() if k != "input"})
        output = func(*args, **kwargs)
        if func is F.group_norm:
            arguments = GROUP_NORM.bind(*args, **kwargs).arguments
            if is_frozen(arguments.get("weight"), arguments.get("bias")):
                self.norms[output] = output._version, arguments
        return output


GROUP_NORM = signature(F.group_norm)
CONVOLUTIONS = {F.conv2d: conv2d_input, F.conv3d: conv3d_input}


def is_frozen(*weights):
    return not any(weight is not None and weight.requires_grad for weight in weights)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_gradient, convolution, x, weight, bias, *settings):
        # Not saved as a tensor, for whose sake a checkpoint would compute the last convolution again
        ctx.weight, ctx.shape, ctx.settings, ctx.input_gradient = weight, x.shape, settings, input_gradient
        return convolution(x, weight, bias, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradient = ctx.input_gradient(ctx.shape, ctx.weight, grad, *ctx.settings)
        return None, None, gradient, *[None] * (2 + len(ctx.settings))


class _SiluOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, norm):
        ctx.save_for_backward(x)
        ctx.norm = norm
        return F.silu(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, F.group_norm(x, **ctx.norm)), None, None
