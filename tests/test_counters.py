import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from counters import FlopCounter, LiveBytes, count_flops, module_bytes, without_values


KIB = 1024
FLOATS = 256  # 256 float32 = 1 KiB


def test_live_rises_with_each_result_and_falls_when_it_is_freed():
    x = torch.ones(FLOATS)
    with LiveBytes() as memory:
        assert memory.live == 0
        a = x + 1
        assert memory.live == KIB
        b = torch.cat([a, a])
        assert memory.live == 3 * KIB
        del a
        assert memory.live == 2 * KIB
        c = b.to(torch.float64)
        assert memory.live == 6 * KIB
        del b, c
        assert memory.live == 0
    assert memory.peak == 6 * KIB


def test_peak_includes_temporaries_of_an_expression():
    x = torch.ones(FLOATS)
    with LiveBytes() as memory:
        y = ((x + 1) * 2) - 3  # each step holds its operand and its result, so two at a time
    assert (memory.live, memory.peak) == (KIB, 2 * KIB)
    del y
    assert memory.live == 0


def test_tensors_freed_after_the_context_are_subtracted():
    with LiveBytes() as memory:
        kept = torch.zeros(FLOATS)
    assert memory.live == KIB
    del kept
    assert memory.live == 0


def test_views_and_inplace_operations_add_nothing():
    x = torch.ones(16, 16)
    with LiveBytes() as memory:
        views = [x.t(), x[:, 3], x.view(-1), x.reshape(4, 64), x.detach()]
        x.add_(1)
        assert (memory.live, memory.peak) == (0, 0)
        y = x + 1
        views += [y.t(), y[1:], y.expand(3, 16, 16)]
        y.mul_(2)
        assert (memory.live, memory.peak) == (KIB, KIB)
        del y
        assert memory.live == KIB, "a view keeps its whole storage alive"
        views.clear()
        assert memory.live == 0


def test_tensors_from_python_data_count():
    with LiveBytes() as memory:
        x = torch.tensor([1.0] * FLOATS)
        assert memory.live == KIB
    assert x.sum() == FLOATS


def test_backward_counts_saved_activations_and_gradients():
    x = torch.ones(FLOATS, requires_grad=True)
    with LiveBytes() as memory:
        y = x.exp()  # kept: y is its own derivative
        z = y.sin()  # keeps y
        loss = z.sum()
        del y, z
        assert memory.live == KIB + 4
        loss.backward()
        del loss
        # What is left is x.grad, and nothing else.
        assert memory.live == KIB
        # In the backward of sin: y, cos(y) and its product with the gradient, and the scalars loss and dloss.
        assert memory.peak == 3 * KIB + 8
    assert torch.allclose(x.grad, torch.e * torch.cos(torch.tensor(torch.e)).expand(FLOATS))


def test_fake_tensors_are_counted_without_being_allocated():
    side = 2**16
    with FakeTensorMode(), LiveBytes() as memory:
        x = torch.empty(side, side, dtype=torch.bfloat16, requires_grad=True)  # 8 GiB
        y = x.exp()
        assert memory.live == 2 * 2 * side**2
        y.sum().backward()
        del y
        assert memory.live == 2 * 2 * side**2
        assert x.grad.shape == x.shape


def test_flops_of_a_matmul_are_two_per_multiply_add():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(lambda: a + 1) == 0


def test_flops_include_the_backward_pass():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_flops_of_a_convolution():
    conv = torch.nn.Conv2d(4, 6, 3, padding=1)
    # 8 x 8 outputs of 6 channels, each over 4 channels of a 3 x 3 window.
    assert count_flops(lambda: conv(torch.ones(2, 4, 8, 8))) == 2 * (2 * 8 * 8 * 6) * (4 * 3 * 3)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("keys", [7, 11])
def test_flops_of_attention(fake, keys):
    batch, heads, queries, width = 2, 3, 7, 5
    product = 2 * batch * heads * queries * keys * width
    with FakeTensorMode() if fake else torch.enable_grad():
        query = torch.ones(batch, heads, queries, width, requires_grad=True)
        key, value = torch.ones(2, batch, heads, keys, width, requires_grad=True)
        # q k^T and its product with v.
        assert count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == 2 * product
        with torch.no_grad():
            assert count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == 2 * product
        # Backward: q k^T once more, and for each of those two products the gradients of both its factors.
        both = count_flops(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward())
        assert both == 2 * product + 5 * product
        assert query.grad.shape == query.shape


def test_flops_are_those_of_torchs_own_counter():
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.SiLU(), torch.nn.ConvTranspose2d(8, 4, 2)]
    layers += [torch.nn.GroupNorm(2, 4), torch.nn.Flatten(2), torch.nn.Linear(64, 5), torch.nn.Linear(5, 6, False)]
    net = torch.nn.Sequential(*layers)
    net[0].requires_grad_(False)  # whose gradients are not computed, and not counted
    x = torch.ones(2, 3, 15, 15)

    def step():
        out = checkpoint(net, x, use_reentrant=False)
        torch.baddbmm(torch.ones(4, 4), out, out.mT).sum().backward()

    with FlopCounterMode(display=False) as reference:
        step()
    assert count_flops(step) == reference.get_total_flops() > 0


def test_counting_flops_does_not_change_what_lives():
    net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))

    def peaks(flops):
        net.zero_grad()
        with LiveBytes() as memory:
            for _ in range(2):
                with flops if flops else torch.enable_grad():
                    checkpoint(net, torch.ones(8, 16), use_reentrant=False).sum().backward()
        return memory.peak, memory.live

    assert peaks(FlopCounter()) == peaks(None)


# Modules without values


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(10).half().requires_grad_(False)
        self.register_parameter("none", None)
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.head(self.embed(x)) + self.norm.weight


def test_without_values_keeps_everything_else():
    module, like = without_values(Tied()), Tied()
    assert module.state_dict().keys() == like.state_dict().keys()
    pairs = zip((*module.parameters(), *module.buffers()), (*like.parameters(), *like.buffers()), strict=True)
    for tensor, other in pairs:
        assert isinstance(tensor, FakeTensor) and type(other) in (torch.nn.Parameter, torch.Tensor)
        assert (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
        assert tensor.requires_grad == other.requires_grad
        assert isinstance(tensor, torch.nn.Parameter) == isinstance(other, torch.nn.Parameter)
    assert module.head.weight is module.embed.weight
    assert module_bytes(module) == module_bytes(like)


def test_without_values_computes_with_real_tensors():
    module, x = without_values(Tied()), torch.tensor([1, 2, 3])
    target = torch.ones(3, 10)
    loss = F.mse_loss(module(x), target)
    loss.backward()
    assert isinstance(loss, FakeTensor) and loss.shape == ()
    assert module.head.weight.grad.shape == (10, 4)
    assert module.norm.weight.grad is None
    assert count_flops(lambda: module(x)) == 2 * 3 * 4 * 10


def test_without_values_takes_no_memory():
    with torch.device("meta"):
        module = torch.nn.Linear(2**20, 2**20)
    assert module_bytes(without_values(module)) == 4 * (2**40 + 2**20)  # 4 TiB, which no machine here would give
    with LiveBytes() as memory:
        module(torch.ones(2, 2**20)).sum().backward()
    assert memory.peak >= module_bytes(module)


def test_module_bytes_counts_each_storage_once():
    module = torch.nn.Linear(3, 5)
    assert module_bytes(module) == 4 * (15 + 5)
    assert module_bytes(module, module, torch.nn.Sequential(module)) == 4 * (15 + 5)
    assert module_bytes(module, torch.nn.Linear(3, 5, bias=False)) == 4 * (15 + 5 + 15)
    tied = Tied()
    # The embedding, which is the head, the head's bias, the norm's four half vectors and its count of batches.
    assert module_bytes(tied) == 4 * 40 + 4 * 10 + 2 * 4 * 10 + 8
    tied.register_buffer("view", tied.embed.weight.detach()[2:])
    assert module_bytes(tied) == 4 * 40 + 4 * 10 + 2 * 4 * 10 + 8
    assert module_bytes() == 0
