import pytest
import torch
from counting import count_flops, count_params
from torch import nn

import sampling
from benchmarks.textbook import Textbook
from genotypes import SPACES, Genotype, derive, edge_list
from model import ChildNetwork
from model_search import Network
from operations import Norm
from sampling import Z


def random_z(network: Network, seed: int = 0) -> Z:
    return network.sample(0.8, torch.Generator().manual_seed(seed))


def fill_textbook(textbook: Textbook, network: Network) -> None:
    """Copy parameters and statistics in the order in which both networks list them."""
    textbook.stem.load_state_dict(network.stem.state_dict())
    textbook.classifier.load_state_dict(network.classifier.state_dict())
    for theirs, ours in zip(textbook.cells, network.cells, strict=True):
        pairs = [(theirs.pre0, ours.prepare0), (theirs.pre1, ours.prepare1)]
        for their_edge, our_edge in zip(theirs.edges, ours.edges, strict=True):
            pairs += zip(their_edge, our_edge.ops.values(), strict=True)
        for theirs_op, our_op in pairs:
            for target, source in zip(theirs_op.parameters(), our_op.parameters(), strict=True):
                target.data.copy_(source.data)


def theta(module: nn.Module) -> list[torch.Tensor]:
    """stem, cells, classifier: parameters in the order of the graph, whatever the attribute order."""
    parts = [module.stem, *module.cells, module.classifier]
    return [p for part in parts for p in part.parameters()]


@pytest.mark.parametrize(("size", "layers"), [((12, 12), 3), ((9, 7), 5)])
def test_supernet_equals_the_textbook_form(size: tuple[int, int], layers: int) -> None:
    torch.manual_seed(0)
    network = Network(4, 5, layers)
    textbook = Textbook(4, 5, layers)
    fill_textbook(textbook, network)
    network.double(), textbook.double()
    images = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    grads = []
    for call in (lambda z: network(images, z), lambda z: textbook(images, *z)):
        z = random_z(network)
        loss = nn.functional.cross_entropy(call(z), targets)
        model = network if not grads else textbook
        grads.append((loss, torch.autograd.grad(loss, [images, *network.alphas(), *theta(model)])))
    assert grads[0][0].item() == pytest.approx(grads[1][0].item(), rel=1e-12)
    for got, wanted in zip(grads[0][1], grads[1][1], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-7, atol=1e-10)
    ours = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    theirs = [m for m in textbook.modules() if isinstance(m, nn.BatchNorm2d)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.running_mean, b.running_mean) and torch.allclose(a.running_var, b.running_var)
        assert a.num_batches_tracked == b.num_batches_tracked == 1
    network.eval(), textbook.eval()
    z = Z(*(part.detach() for part in random_z(network)))
    assert torch.allclose(network(images, z), textbook(images, *z), rtol=1e-10)


def test_counts_of_the_reference() -> None:
    with torch.device("meta"):
        network = Network(16, 10, 8)
        alphas = Z(*(alpha.detach() for alpha in network.alphas()))
        assert count_params(network) == 1_930_618
        assert count_flops(network, torch.empty(1, 3, 32, 32), alphas) == 300_255_744
    assert sum(p.numel() for p in network.thetas()) == 1_930_618
    assert [tuple(a.shape) for a in network.alphas()] == [(14, 8), (14, 8)]


def test_gradient_in_alpha_passes_gradcheck() -> None:
    torch.manual_seed(0)
    network = Network(2, 3, 3, nodes=1).double()
    images, targets = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def loss(normal: torch.Tensor, reduce: torch.Tensor) -> torch.Tensor:
        network.alpha_normal, network.alpha_reduce = nn.Parameter(normal), nn.Parameter(reduce)
        del network.alpha_normal, network.alpha_reduce
        network.alpha_normal, network.alpha_reduce = normal, reduce
        return nn.functional.cross_entropy(network(images, random_z(network)), targets)

    alphas = [alpha.detach().clone().requires_grad_() for alpha in network.alphas()]
    del network.alpha_normal, network.alpha_reduce
    assert torch.autograd.gradcheck(loss, alphas)


def random_genotype(space: str, nodes: int, seed: int) -> Genotype:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(edge_list(nodes)), len(SPACES[space]))
    logits = [torch.randn(shape, generator=generator) for _ in range(2)]
    logits[0][:, 0] += 1  # none often, so that nodes without an input occur
    return derive(*logits, space=space)


@pytest.mark.parametrize("space", SPACES)
def test_one_hot_and_derive_are_inverse(space: str) -> None:
    network = Network(2, 3, 3, space=space)
    for seed in range(20):
        genotype = random_genotype(space, 4, seed)
        z = network.one_hot(genotype)
        assert torch.equal(z.normal.sum(-1), torch.ones(14))
        assert derive(*z, space=space) == genotype


def test_one_hot_refuses_what_the_supernet_does_not_hold() -> None:
    network = Network(2, 3, 3)
    with pytest.raises(ValueError, match="nasnet"):
        network.one_hot(random_genotype("nasnet", 4, 0))
    with pytest.raises(ValueError, match="nodes"):
        network.one_hot(random_genotype("snas", 2, 0))
    twice = ((("skip_connect", 0), ("sep_conv_3x3", 0)), (), (), ())
    with pytest.raises(ValueError, match="two ops"):
        network.one_hot(Genotype(twice, (2, 3, 4, 5), twice, (2, 3, 4, 5)))


def test_skipping_zero_weights_changes_nothing() -> None:
    """Without a gradient in Z unused ops are left out; with one, they are multiplied by zero."""
    torch.manual_seed(0)
    network = Network(4, 3, 3).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    z = network.one_hot(random_genotype("snas", 4, 3))
    calls = []
    unused = [op for cell in network.cells for edge in cell.edges for op in edge.ops.values()]
    for op in unused:
        inner = op.own
        op.own = lambda *args, inner=inner: calls.append(1) or inner(*args)  # type: ignore[method-assign]
    short = network(images, z)
    few = len(calls)
    full = network(images, Z(*(part.requires_grad_() for part in z)))
    assert torch.allclose(short, full, rtol=1e-10)
    assert 0 < few < (len(calls) - few) / 5


def test_resampled_cells_draw_their_own_z_and_shared_ones_do_not() -> None:
    torch.manual_seed(0)
    network = Network(2, 3, 5).eval()
    images = torch.randn(2, 3, 8, 8)
    own = network.sample(1.0, torch.Generator().manual_seed(0), per_cell=True)
    assert own.normal.shape == (3, 14, 8) and own.reduce.shape == (2, 14, 8)
    assert not torch.allclose(own.normal[0], own.normal[1])
    shared = network.sample(1.0, torch.Generator().manual_seed(0))
    repeated = Z(shared.normal.expand(3, -1, -1), shared.reduce.expand(2, -1, -1))
    assert torch.allclose(network(images, shared), network(images, repeated))
    assert not torch.allclose(network(images, shared), network(images, own))


def test_alphas_are_logits_in_the_state_dict_and_not_among_theta() -> None:
    network = Network(2, 3, 3)
    assert {"alpha_normal", "alpha_reduce"} <= network.state_dict().keys()
    assert not {id(a) for a in network.alphas()} & {id(p) for p in network.thetas()}
    assert len(network.alphas()) + len(network.thetas()) == len(list(network.parameters()))
    assert network.alpha_normal.abs().max() < 0.01  # near uniform


def test_drop_path_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = Network(2, 3, 3, drop_path_prob=0.5)
    images, z = torch.randn(4, 3, 8, 8), Z(*(p.detach() for p in random_z(network)))
    assert not torch.equal(network(images, z), network(images, z))
    network.eval()
    assert torch.equal(network(images, z), network(images, z))


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = Network(4, 3, 3, in_channels=1)
    network(torch.randn(4, 1, 9, 9), random_z(network)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_stem_norm_learns_and_those_of_cells_do_not() -> None:
    network = Network(4, 3, 3)
    assert network.stem[1].affine
    assert not any(m.affine for cell in network.cells for m in cell.modules() if isinstance(m, Norm))


@pytest.mark.parametrize("sampler", ["straight_through", "dsnas"])
def test_a_drawn_z_runs_what_it_draws_and_gives_the_loss_and_gradients_of_its_child(sampler: str) -> None:
    torch.manual_seed(0)
    network = Network(4, 3, 3).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    z = network.sample(0.7, torch.Generator().manual_seed(1), sampler=sampler)
    genotype = derive(z.normal, z.reduce)
    child = ChildNetwork(genotype, 4, 3, 3, affine=False).double()
    child.load_state_dict(network.child_state_dict(genotype))
    ours, theirs = network(images, z).square().sum(), child(images)[0].square().sum()
    assert torch.allclose(ours, theirs, rtol=1e-10)
    ours.backward()
    theirs.backward()
    grads = {name: p.grad for name, p in network.named_parameters() if not name.startswith("alpha")}
    reached = sum(p.numel() for p in child.parameters())
    assert sum(p.numel() for p in network.thetas() if p.grad is not None) == reached  # of what is drawn alone
    assert torch.allclose(grads["stem.0.weight"], child.stem[0].weight.grad, rtol=1e-9)
    for alpha, rows in zip(network.alphas(), z, strict=True):
        silent = rows[:, 0] == 1  # where none is drawn nothing is learned
        assert alpha.grad is not None and (alpha.grad[silent] == 0).all() and alpha.grad[~silent].any(-1).all()


def test_every_sampler_is_a_z_of_the_supernet() -> None:
    torch.manual_seed(0)
    network, images = Network(2, 3, 5), torch.randn(2, 3, 8, 8)
    for name in sampling.SAMPLERS:
        for per_cell in (False, True):
            z = network.sample(1.0, torch.Generator().manual_seed(0), per_cell, name)
            assert torch.isfinite(network(images, z)).all()
            assert isinstance(z, sampling.Drawn) == isinstance(z.detach(), sampling.Drawn) == (name in sampling.SPARSE)
            assert not z.detach().normal.requires_grad
