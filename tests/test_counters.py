import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from counters import LiveBytes, count_flops


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
