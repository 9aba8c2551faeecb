"""The fused kernels against PyTorch's own operations in float64."""

import copy
import os
import platform
from collections.abc import Iterator
from random import Random

import pytest
import torch
from torch import Tensor, nn

from fused import build
from fused import operation as kernels
from genotypes import random_genotype
from model import ChildNetwork
from model_search import Network
from operations import Conv, FactorizedReduce, Norm, make_op
from sampling import Z

OPS = (
    "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7", "dil_conv_3x3", "dil_conv_5x5",
    "max_pool_3x3", "max_pool_5x5", "max_pool_7x7", "avg_pool_3x3",
)  # fmt: skip


NARROWER = {"avx2": "-mno-avx512f", "sse": "-mno-avx512f -mno-avx2 -mno-fma -mno-avx"}  # for 8 and 4 floats a vector


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(params=[*NARROWER])
def narrower(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same source for processors with narrower vectors."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86")
    monkeypatch.setenv("SNAS_CXXFLAGS", f"{os.environ.get('SNAS_CXXFLAGS', '')} {NARROWER[request.param]}")
    wider = build.library()
    for cached in (build.library, build.path):
        cached.cache_clear()
    narrow = build.library()
    assert narrow is not None and narrow.vector_width() == {"avx2": 8, "sse": 4}[request.param]
    assert wider is not None and wider.vector_width() >= narrow.vector_width()
    yield
    monkeypatch.undo()
    for cached in (build.library, build.path):
        cached.cache_clear()


def run(
    op: nn.Module, x: Tensor, scale: float | None, total: Tensor | None, fused: bool, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """Output, gradients and statistics: float32 through the kernels, or float64 through PyTorch."""
    dtype = torch.float32 if fused else torch.float64
    op = copy.deepcopy(op).to(dtype)
    inputs = {"x": x.to(dtype).requires_grad_()}
    if scale is not None:
        inputs["scale"] = torch.tensor(scale, dtype=dtype, requires_grad=True)
    if total is not None:
        inputs["total"] = total.to(dtype).requires_grad_()
    more = {} if keep is None else {"keep": keep.to(dtype)}
    with kernels.switched(fused):
        assert kernels.usable(inputs["x"]) == fused
        y = op(inputs["x"], inputs.get("scale"), None if total is None else inputs["total"] * 1, **more)
    wanted = inputs | dict(op.named_parameters())
    grads = torch.autograd.grad(y, list(wanted.values()), torch.arange(y.numel(), dtype=dtype).sin().view(y.shape))
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True)) | dict(op.named_buffers())


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        tolerance = 1e-4 * max(1.0, wanted[name].abs().max().item())
        assert torch.allclose(value.double(), wanted[name].double(), rtol=1e-3, atol=tolerance), name


def agrees(name: str, channels: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    op = make_op(name, channels, stride, affine=channels in (12, 36))
    for n, p in op.named_parameters():
        if "norm" in n:
            nn.init.uniform_(p, 0.2, 1.0)
    x = torch.randn(6, channels, *size).contiguous(memory_format=torch.channels_last)
    total = torch.randn(6, channels, -(-size[0] // stride), -(-size[1] // stride))
    total = total.contiguous(memory_format=torch.channels_last)
    for scale, given in ((-0.3, total), (None, None)):
        assert_close(run(op, x, scale, given, True), run(op, x, scale, given, False))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3), (16, 12)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 8, 12, 16, 20, 36, 40])
@pytest.mark.parametrize("name", OPS)
def test_an_operation_is_pytorchs_with_its_gradients_and_statistics(
    name: str, channels: int, stride: int, size: tuple[int, int]
) -> None:
    agrees(name, channels, stride, size)


def test_it_is_at_every_width_of_vectors(narrower: None) -> None:
    for name in OPS:
        for channels in (3, 8, 12, 20, 36):
            for stride in (1, 2):
                agrees(name, channels, stride, (7, 12))
    for size in ((9, 9), (5, 1), (41, 41)):  # whose bands end in the middle of a matrix product's block of rows
        for channels in (16, 32):
            agrees("dil_conv_3x3", channels, 1, size)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("name", ["sep_conv_5x5", "max_pool_3x3"])
def test_in_eval_mode_the_running_statistics_are_used_and_kept(name: str, scale: float | None) -> None:
    torch.manual_seed(0)
    op = make_op(name, 8, 1, affine=False)
    x = torch.randn(5, 8, 6, 6)
    for _ in range(3):
        op(x)
    op.eval()
    before = {key: value.clone() for key, value in op.state_dict().items()}
    assert_close(run(op, x, scale, None, True), run(op, x, scale, None, False))
    assert all(torch.equal(before[key], value) for key, value in op.state_dict().items())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_batch_norm_alone(affine: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    norm = Norm(20, affine=affine)
    x = 5 + torch.randn(4, 20, 3, 5)
    total = None if scale is None else torch.randn(4, 20, 3, 5).contiguous(memory_format=torch.channels_last)
    assert_close(run(norm, x, scale, total, True), run(norm, x, scale, total, False))


@pytest.mark.parametrize("name", ["sep_conv_3x3", "max_pool_3x3", "skip_connect"])
def test_a_factor_for_each_image_and_a_scale_of_an_affine_batch_norm(name: str) -> None:
    torch.manual_seed(0)
    op = make_op(name, 20, 1, affine=True)
    for p in op.parameters():
        nn.init.uniform_(p, -1, 1)
    x = torch.randn(5, 20, 6, 6).contiguous(memory_format=torch.channels_last)
    total = torch.randn(5, 20, 6, 6).contiguous(memory_format=torch.channels_last)
    keep = torch.tensor([0, 2.0, 1, 0, 0.5]).view(5, 1, 1, 1)
    assert_close(run(op, x, 0.4, total, True, keep), run(op, x, 0.4, total, False, keep))
    y = torch.zeros(5, 20, 6, 6).contiguous(memory_format=torch.channels_last)
    assert (op(x, None, y, keep)[[0, 3]] == 0).all()


def test_a_maximum_met_twice_gives_its_gradient_once() -> None:
    x = torch.zeros(2, 4, 6, 6)
    x[0] = 1.0  # whole windows are equal; PyTorch takes the first pixel
    op = make_op("max_pool_3x3", 4, 1, affine=False)
    assert_close(run(op, x, 1.0, None, True), run(op, x, 1.0, None, False))


@pytest.mark.parametrize("name", ["sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3", "avg_pool_3x3"])
def test_what_is_no_number_is_not_hidden(name: str) -> None:
    x = torch.randn(2, 4, 6, 6)
    x[0, 1, 2, 3] = torch.nan
    op = make_op(name, 4, 1, affine=False)
    assert op(x).isnan().any() and op(x)[:, 0].isnan().any() == (name in ("sep_conv_3x3", "dil_conv_5x5"))
    assert make_op(name, 4, 1, affine=False).eval()(x).isnan().sum() > 1


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    op = make_op("sep_conv_5x5", 16, 1, affine=False)
    x = torch.randn(21, 16, 8, 8)
    one = run(op, x, 0.7, None, True)
    torch.set_num_threads(2)
    two = run(op, x, 0.7, None, True)
    assert all(torch.equal(one[name], two[name]) for name in one)


def step(network: Network, images: Tensor) -> list[Tensor]:
    """Logits, gradients of Z and theta, statistics after a training step."""
    draw = network.sample(0.8, torch.Generator().manual_seed(3))
    z = Z(*(part.detach().to(images.dtype).requires_grad_() for part in draw))
    logits = network(images, z)
    grads = torch.autograd.grad(logits.square().mean(), [*z, *network.thetas()])
    return [logits.detach(), *grads, *(b.clone().float() for b in network.buffers())]


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Median over tensors of the relative error: a ReLU that flips by rounding may change a few."""
    errors = [(g.double() - w.double()).norm() / (w.double().norm() + 1e-6) for g, w in zip(got, wanted, strict=True)]
    return torch.stack(errors).median().item()


@pytest.mark.parametrize("space", ["snas", "amoebanet", "convs"])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_supernet_step_is_as_exact_as_without_the_kernels(space: str, drop: float) -> None:
    torch.manual_seed(0)
    base, images = Network(8, 5, 3, space=space, nodes=2, drop_path_prob=drop), torch.randn(8, 3, 16, 16)
    results = []
    for enabled, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        kernels.enabled = enabled
        torch.manual_seed(1)
        network = copy.deepcopy(base)
        mask = torch.rand(8, 1, 1, 1)  # drop path draws in the type of the images
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("model_search.drop_mask", lambda x, p, mask=mask: (mask > p).to(x.dtype))
            results.append(step(network.to(dtype), images.to(dtype)))
    fused, plain = distance(results[0], results[2]), distance(results[1], results[2])
    assert fused < 1e-4 and fused < 3 * plain + 1e-6


@pytest.mark.parametrize("enabled", [True, False])
def test_recomputed_cells_give_the_same_step_and_statistics(enabled: bool) -> None:
    kernels.enabled = enabled
    torch.manual_seed(0)
    base, images = Network(4, 5, 3, nodes=2, drop_path_prob=0.4), torch.randn(4, 3, 8, 8)
    results = []
    for recompute in (False, True):
        network = copy.deepcopy(base)
        network.recompute = recompute
        torch.manual_seed(1)
        results.append(step(network, images))
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_other_types_modes_and_devices_fall_back() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert kernels.usable(x)
    assert not kernels.usable(x.double())
    assert not kernels.usable(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(x)


def test_detached_z_and_one_value_a_channel() -> None:
    network = Network(4, 3, 3)
    z = Z(*(part.detach() for part in network.sample(1.0)))
    network(torch.randn(2, 3, 8, 8), z).sum().backward()
    assert network.alpha_normal.grad is None and network.stem[0].weight.grad is not None
    with pytest.raises(ValueError, match="more than one value"):
        make_op("sep_conv_3x3", 4, 1, affine=False)(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("seed", range(6))
def test_the_child_is_the_supernet_at_one_hot_z(seed: int) -> None:
    torch.manual_seed(seed)
    genotype = random_genotype("snas", Random(seed))
    supernet = Network(8, 3, 3)
    child = ChildNetwork(genotype, 8, 3, 3, affine=False)
    child.load_state_dict(supernet.child_state_dict(genotype))
    images, z = torch.randn(4, 3, 12, 12), supernet.one_hot(genotype)
    outputs = [supernet(images, z), child(images)[0]]
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)
    theta = dict(child.named_parameters())
    used = [name for name, p in theta.items() if name.startswith("cells.0.ops")]
    theirs = dict(zip(used, torch.autograd.grad(outputs[1].sum(), [theta[n] for n in used]), strict=True))
    outputs[0].sum().backward()
    for p in supernet.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    ours = supernet.child_state_dict(genotype)
    assert used and all(torch.allclose(theirs[n], ours[n], rtol=1e-2, atol=1e-4) for n in used)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
@pytest.mark.parametrize("channels", [(3, 5), (16, 32), (20, 20), (64, 16)])
def test_the_stride_two_identity_and_the_preparation_of_a_cell(
    channels: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, channels[0], *size).contiguous(memory_format=torch.channels_last)
    for op in (FactorizedReduce(*channels, affine=False), Conv(*channels, 1, 1, affine=True)):
        assert_close(run(op, x, 0.3, None, True), run(op, x, 0.3, None, False))
