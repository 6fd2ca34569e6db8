"""Exact counts of memory and arithmetic that need no GPU, nor, under `FakeTensorMode`, the memory itself."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
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
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()
