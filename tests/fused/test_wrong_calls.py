"""Nothing that the kernels would misread leaves Python."""

import pytest
import torch
from torch import Tensor, nn

from fused import operation as kernels
from fused.operation import Part
from model_search import Network
from operations import make_op
from sampling import Z

pytestmark = pytest.mark.usefixtures("compiled")


WRONG = {
    "channels of x": (ValueError, lambda op, x, z, t, k: op(torch.randn(2, 32, 8, 8), z, t, k)),
    "type of Z": (TypeError, lambda op, x, z, t, k: op(x, z.double(), t, k)),
    "half of Z": (TypeError, lambda op, x, z, t, k: op(x, z.half(), t, k)),
    "device of Z": (TypeError, lambda op, x, z, t, k: op(x, z.to("meta"), t, k)),
    "values of Z": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [op.parts()], z.expand(3), (3,), t, k)),
    "shape of Z": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [op.parts()], z.view(1, 1), (0,), t, k)),
    "scale": (RuntimeError, lambda op, x, z, t, k: op(x, torch.ones(3), t, k)),
    "places": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [op.parts()], z.view(1), (), t, k)),
    "shape of the sum": (ValueError, lambda op, x, z, t, k: op(x, z, t[:, :, :7], k)),
    "type of the sum": (TypeError, lambda op, x, z, t, k: op(x, z, t.double(), k)),
    "layout of the sum": (ValueError, lambda op, x, z, t, k: op(x, z, t.contiguous(), k)),
    "the sum is x": (ValueError, lambda op, x, z, t, k: op(x, z, x, k)),
    "images of keep": (ValueError, lambda op, x, z, t, k: op(x, z, t, k[:1])),
    "type of keep": (TypeError, lambda op, x, z, t, k: op(x, z, t, k.double())),
    "type of the module": (TypeError, lambda op, x, z, t, k: op.double()(x, z, t, k)),
    "depthwise weight": (ValueError, lambda op, x, z, t, k: spoilt(op, "half1.depthwise", 8, 1, 3, 3)(x, z, t, k)),
    "pointwise weight": (ValueError, lambda op, x, z, t, k: spoilt(op, "half2.pointwise", 16, 8, 1, 1)(x, z, t, k)),
    "side of a kernel": (ValueError, lambda op, x, z, t, k: spoilt(op, "half1.depthwise", 16, 1, 9, 9)(x, z, t, k)),
    "batch norm": (ValueError, lambda op, x, z, t, k: spoilt_norm(op, running_var=torch.ones(8))(x, z, t, k)),
    "no operation": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [], total=t)),
    "no parts": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [()], total=t)),
    "ReLU of nothing": (ValueError, lambda op, x, z, t, k: kernels.apply(x, [[Part(kernels.NOTHING, relu=True)]])),
    "half of the statistics": (ValueError, lambda op, x, z, t, k: spoilt_norm(op, running_mean=None)(x, z, t, k)),
    "device of the counter": (
        TypeError,
        lambda op, x, z, t, k: spoilt_norm(op, num_batches_tracked=torch.tensor(0, device="meta"))(x, z, t, k),
    ),
    "dimensions of x": (RuntimeError, lambda op, x, z, t, k: op(x[0], z, t, k)),
}


def spoilt(op: nn.Module, name: str, *shape: int) -> nn.Module:
    op.get_submodule(name).weight = nn.Parameter(torch.randn(shape))
    return op


def spoilt_norm(op: nn.Module, **buffers: Tensor | None) -> nn.Module:
    for name, value in buffers.items():
        setattr(op.half2.norm, name, value)
    return op


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_call_is_an_exception(mistake: str) -> None:
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    total, keep = torch.zeros_like(x), torch.ones(2, 1, 1, 1)
    op = make_op("sep_conv_3x3", 16, 1, affine=True)
    op(x, torch.tensor(0.5), total, keep)
    error, call = WRONG[mistake]
    with pytest.raises(error):
        call(op, x, torch.tensor(0.5), total, keep)


def test_z_of_another_type_or_shape_is_no_z() -> None:
    network, images = Network(4, 3, 3), torch.randn(2, 3, 8, 8)
    z = network.sample(1.0)
    for change in (Tensor.double, Tensor.half, Tensor.bfloat16, lambda t: t.to("meta")):
        with pytest.raises(TypeError, match="Z of the normal cells"):
            network(images, Z(change(z.normal), change(z.reduce)))
    with pytest.raises(ValueError, match="Z of the reduce cells has the shape"):
        network(images, Z(z.normal, z.reduce[:7]))
