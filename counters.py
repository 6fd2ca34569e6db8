"""Exact counts of memory and arithmetic that need no GPU, nor, under `FakeTensorMode`, the memory itself."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created inside this context that are still alive.

    live (int): bytes alive now; still falls after the context has ended, as the tensors made in it are freed.
    peak (int): the largest `live` so far, in bytes.

    Every storage counts once, with the bytes it had when it was first seen, however many views share it. Tensors that
    existed before the context count as 0, so do kernels' private workspaces and allocator rounding. Backward passes
    started inside the context are included. Under `FakeTensorMode`, enter this mode last:
    `with FakeTensorMode(), LiveBytes() as memory:`.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # `torch.tensor` hands its fresh storage to lift_fresh: there, and only there, an argument is new memory.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in self._storages((args, kwargs)):
                self._known.setdefault(storage, None)
        result = func(*args, **kwargs)
        for storage in self._storages(result):
            if storage not in self._known:
                self._add(storage)
        return result

    @staticmethod
    def _storages(tree):
        return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]

    def _add(self, storage):
        self._known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._subtract, storage.nbytes())

    def _subtract(self, nbytes):
        self.live -= nbytes


def count_flops(fn):
    """Floating-point operations (int) of all matrix products, convolutions and attentions that `fn()` runs.

    A multiply-add counts as 2. Element-wise work counts as 0. Backward passes run inside `fn` are included.
    """
    with FlopCounter() as counter:
        fn()
    return counter.total


def _cpu_attention(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad, query, key, value, *args, **kwargs):
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, *settings, **kwargs):
    wanted = settings[-1]  # the gradients of x, weight and bias
    positions = (x if transposed else grad).shape[2:].numel()
    return 2 * len(grad) * positions * weight.numel() * sum(wanted[:2])  # each costs as much as the forward pass


FORMULAS = flop_registry | {  # torch's own know the attention kernels of GPUs only, and no groups of convolutions
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts what `count_flops` says, of all that runs in this context, in `total`.

    torch's `FlopCounterMode` takes operations apart and hooks modules, which `LiveBytes` beside it would count.
    Under `torch.inference_mode`, where `linear` arrives as one unknown operation, it counts too little: use `no_grad`.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def without_values(module):
    """Gives a module fake parameters and buffers: on the CPU by their word, of the same shapes, without memory.

    What is computed from them is fake as well, also together with real tensors. What was shared (tied weights) still
    is. The module can't be moved any more. Returns the module.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known = WeakIdKeyDictionary()

    def fake(tensor):
        if tensor not in known:
            with mode:
                known[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                known[tensor] = torch.nn.Parameter(known[tensor], requires_grad=tensor.requires_grad)
        return known[tensor]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors |= {name: fake(tensor) for name, tensor in tensors.items() if tensor is not None}
        for name, value in vars(part).items():  # tables that are no buffers, from the meta device
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(part, name, fake(value))
            elif isinstance(value, list) and any(isinstance(item, torch.Tensor) and item.is_meta for item in value):
                setattr(part, name, [fake(item) for item in value])
    return module


class RealMasks(TorchFunctionMode):
    """Lets real masks choose from fake tensors: by their positions, whose number a fake mask could not tell."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            tensor, mask = args
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and not isinstance(mask, FakeTensor):
                args = tensor, mask.nonzero(as_tuple=True)
        return func(*args, **(kwargs or {}))


def module_bytes(*modules):
    """Bytes of the parameters and buffers of modules, each storage once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
