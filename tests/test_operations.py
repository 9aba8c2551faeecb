import pytest
import torch
import torch.nn.functional as F

from fused.plain import spatial_conv
from genotypes import SPACES
from operations import FactorizedReduce, Norm, drop_mask, drop_probability, make_op

ALL_OPS = sorted({op for space in SPACES.values() for op in space} - {"none"})


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (5, 6)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ALL_OPS)
def test_every_op_halves_or_keeps_any_size(name: str, stride: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *size)
    y = make_op(name, 6, stride, affine=True)(x)
    assert y.shape == (2, 6, -(-size[0] // stride), -(-size[1] // stride))


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="sep_conv"):
        make_op("my_sep_conv_3x3", 4, 1, True)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (16, 8), (12, 10), (3, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_fast_spatial_conv_is_the_plain_one_with_its_gradients(
    kernel: int, stride: int, dilation: int, size: tuple[int, int]
) -> None:
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation, 4)
    fast = spatial_conv(x, weight, stride, dilation, True)
    upstream = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, (x, weight), upstream)
    got = torch.autograd.grad(fast, (x, weight), upstream)
    assert torch.allclose(fast, plain) and all(torch.allclose(g, w) for g, w in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(spatial_conv(x, weight, stride, dilation, True), plain)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 8, 16, 16), (2, 3, 5, 7), (64, 16, 4, 4), (3, 33, 1, 2)])
def test_scaled_norm_is_batch_norm_times_scale_with_its_gradients(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    base = torch.randn(shape)
    results = []
    for fold in (True, False):
        x = base.clone(memory_format=memory_format).requires_grad_()
        scale = torch.tensor(0.37, requires_grad=True)
        norm = Norm(shape[1], affine=False) if fold else torch.nn.BatchNorm2d(shape[1], affine=False)
        y = norm(x, scale) if fold else norm(x) * scale
        y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(shape))
        results.append([y.detach(), x.grad, scale.grad, norm.running_mean, norm.running_var, norm.num_batches_tracked])
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_factorized_reduce_takes_the_even_and_the_odd_pixels() -> None:
    reduce = FactorizedReduce(4, 6, affine=False).eval()
    x = torch.randn(2, 4, 8, 8)
    positive = x.relu()
    wanted = torch.cat([reduce.even(positive)[:, :, ::2, ::2], reduce.odd(positive)[:, :, 1::2, 1::2]], 1)
    assert torch.allclose(reduce(x), reduce.norm(wanted), atol=1e-6)


def test_average_pooling_does_not_count_the_padding() -> None:
    pool = make_op("avg_pool_3x3", 2, 1, affine=False).eval()
    assert torch.allclose(pool(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4, 4), atol=1e-4)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 2, 1, 2)
    mask = drop_mask(x, drop_probability(x, 0.25))
    assert mask.shape == (4000, 1, 1, 1) and {round(v, 5) for v in mask.unique().tolist()} == {0.0, round(1 / 0.75, 5)}
    assert mask.mean().item() == pytest.approx(1, abs=0.04)
    assert drop_probability(x, 0.0) is None
