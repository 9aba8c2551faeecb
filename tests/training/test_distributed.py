"""Two processes of a run, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import main_constraint
import retrain
import search
from model_search import Network
from objective import Objective
from options import UserError
from training import checkpoint, distributed, loop
from training.distributed import World
from training.evaluation import estimate_statistics, predict

ROOT = Path(__file__).parents[2]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TARGETS = torch.arange(8) % 3


_TINY = """
import sys
import torch
import utils
torch.set_num_threads(2)
with utils.no_denormals():
    x = torch.full((4, 16, 64, 64), 1e-30)  # enough for both threads
    print(int(x.mul(1e-9).count_nonzero()), int(torch.nn.functional.avg_pool2d(x * 1e-8, 3, 1).count_nonzero()))
print(int(torch.tensor(1e-30).mul(1e-9) > 0))
"""


def test_numbers_next_to_nothing_are_none_in_a_run() -> None:
    """They come with weights of Z at low temperatures, and computing with them takes many times as long."""
    if not torch.set_flush_denormal(torch.tensor(1e-30).mul(1e-9).item() == 0):
        pytest.skip("this processor cannot leave them out")
    done = subprocess.run([sys.executable, "-c", _TINY], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == ["0", "0", "1"], done.stderr


def learner_of(world: World, sampler: str) -> tuple[search.Learner, Any]:
    """A supernet, its optimizers and the Z of a process."""
    torch.manual_seed(0)
    network = Network(4, 3, 3, nodes=2)
    sgd, adam = torch.optim.SGD(network.thetas(), 0.1), torch.optim.Adam(network.alphas(), 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 2)
    buffers = distributed.buffers_of([network])
    learner = search.Learner(network, Objective(), sgd, adam, scheduler, 1e9, 1e9, False, world, buffers)
    source = torch.Generator().manual_seed(10 + world.rank)
    return learner, network.sample(0.7, source, sampler=sampler)


def step(world: World, sampler: str) -> search.Learner:
    learner, z = learner_of(world, sampler)
    images, targets = IMAGES[world.rank :: 2], TARGETS[world.rank :: 2]
    search.search_step(learner, images, targets, z, torch.autocast("cpu", enabled=False))
    return learner


def work(rank: int, place: str, sampler: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    world = World(rank, 2)
    learner = step(world, sampler)
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3))
    torch.manual_seed(1)
    nn.init.normal_(module[2].weight)
    batches = [(images, targets) for images, targets in zip(IMAGES.split(3), TARGETS.split(3), strict=True)]
    estimate_statistics(module, module, world.share(iter(batches)), world)
    logits, labels = predict(module, world.share(iter(batches)), world)
    found = {
        "grads": {name: p.grad for name, p in learner.network.named_parameters()},
        "state": learner.network.state_dict(), "norm": module[0].state_dict(), "logits": logits, "labels": labels,
        "linear": module[2].state_dict(), "sum": world.sum(torch.tensor([1.0 + rank])),
    }  # fmt: skip
    torch.save(found, f"{place}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sampler", ["concrete", "dsnas"])
def test_the_gradient_is_the_mean_of_two_processes_alone(sampler: str, tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path), sampler), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    own = []
    for rank in (0, 1):
        learner, _ = learner_of(distributed.ALONE, sampler)
        part = IMAGES[rank::2], TARGETS[rank::2]
        z = learner.network.sample(0.7, torch.Generator().manual_seed(10 + rank), sampler=sampler)
        search.search_step(learner, *part, z, torch.autocast("cpu", enabled=False))
        own.append(learner)
    for name, wanted in own[0].network.named_parameters():
        other = own[1].network.get_parameter(name).grad
        grads = [grad for grad in (wanted.grad, other) if grad is not None]
        if not grads:
            assert first["grads"][name] is None and second["grads"][name] is None, name
            continue
        mean = sum(grads, torch.zeros_like(grads[0])) / 2
        torch.testing.assert_close(first["grads"][name], mean, msg=name)
        assert torch.equal(first["grads"][name], second["grads"][name])
    for name, value in first["state"].items():  # weights, alpha and statistics are those of all
        assert torch.equal(value, second["state"][name]) or name.endswith("num_batches_tracked"), name
    stat = "stem.1.running_mean"
    both = [learner.network.state_dict()[stat] for learner in own]
    torch.testing.assert_close(first["state"][stat], (both[0] + both[1]) / 2)
    assert first["sum"].item() == second["sum"].item() == 3

    module = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3))
    module[2].load_state_dict(first["linear"])
    estimate_statistics(module, module, zip(IMAGES.split(3), TARGETS.split(3), strict=True))
    for name, value in module[0].state_dict().items():
        torch.testing.assert_close(first["norm"][name], value)
        assert torch.equal(first["norm"][name], second["norm"][name])
    with torch.no_grad():
        torch.testing.assert_close(first["logits"], module(IMAGES))
    assert torch.equal(first["labels"], TARGETS) and torch.equal(first["logits"], second["logits"])


def torchrun(given: list[str], **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *given]
    environment = {**os.environ, "SNAS_KERNELS": "on"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **how
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_search_and_a_retraining_on_two_processes(arguments: list[str], tmp_path: Path) -> None:
    given = [*arguments, "--select=4", "--finalists=2", "--finalist_epochs=1", "--save_freq=1", "--target_params=3000"]
    process = torchrun(["main_constraint.py", *given])
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = tmp_path / "experiments" / "run"
    assert said.count("epoch   1") == 1 and ", 2 processes" in said and said.count("genotype ") == 1
    assert 0 < len(json.loads((folder / "selection.json").read_text())["children"]) <= 4
    assert rows(folder)[-1]["child_params"] <= 3000
    # a process alone has the same figures for the weights that two have trained and evaluated
    (folder / "weights_epoch_2.pt").unlink()
    content = checkpoint.load(folder / "weights_epoch_1.pt")
    assert content["metrics"].keys() == rows(folder)[0].keys()
    child = [*arguments[:3], "--genotype=run", "--name=child", "--epochs=2", "--layers=3", "--init_channels=4",
             "--batch_size=4", "--auxiliary=False", "--crop_padding=1", "--cutout=False", "--device=cpu", "--ema_decay=0.5"]  # fmt: skip
    process = torchrun(["retrain.py", *child])
    _, errors = process.communicate(timeout=300)
    if "terminate called without an active exception" in errors:  # seen once in thirty runs: PyTorch at its very end
        process = torchrun(["retrain.py", *child, "--resume=True"])
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    tested = json.loads((tmp_path / "experiments" / "child" / "test.json").read_text())
    again = retrain.main([*child, "--eval_only=True"]).figures
    assert {k: v for k, v in again.items() if k != "loss"} == {k: v for k, v in tested.items() if k != "loss"}
    assert again["loss"] == pytest.approx(tested["loss"], rel=1e-5)
    main_constraint.main([*given, "--resume=True"])  # from the first epoch, with one process
    assert [row["epoch"] for row in rows(folder)] == [1, 2]


def test_a_signal_stops_all_and_a_dead_process_ends_all(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "run"
    process = torchrun(["main.py", *arguments, "--epochs=5000"], start_new_session=True)
    for _ in range(1200):
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun hands it on
    _, errors = process.communicate(timeout=120)
    assert "main.py: interrupted; add --resume True to go on from" in errors, errors
    assert checkpoint.latest(folder, "weights") is not None
    process = torchrun(["main.py", *arguments, "--epochs=5000", "--resume=True"])
    before = len(rows(folder))
    for _ in range(1200):
        if len(rows(folder)) > before:
            break
        time.sleep(0.1)
    own = subprocess.run(["pgrep", "-f", f"main.py.*{tmp_path}.*--epochs=5000"], capture_output=True, text=True)
    workers = [int(pid) for pid in own.stdout.split() if int(pid) != process.pid]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run has ended" in errors or "interrupted" in errors, errors


def test_an_epoch_goes_on_with_as_many_processes_or_others() -> None:
    """The state of a mean, which each process has its part of."""

    class Two(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, [2 * number for number in item]]

    mean = loop.Mean(Two(0, 2))
    mean.add({"a": torch.tensor(1.0)}, 3)
    state = mean.state()
    assert state == {"names": ["a"], "sums": [[3.0, 3.0], [6.0, 6.0]]}
    for rank, wanted in ((0, [3.0, 3.0]), (1, [6.0, 6.0])):
        again = loop.Mean(World(rank, 2))
        again.go_on(state, torch.device("cpu"))
        assert again._own() == wanted
    for rank, size, wanted in ((0, 1, [9.0, 9.0]), (0, 3, [9.0, 9.0]), (2, 3, [0.0, 0.0])):
        again = loop.Mean(World(rank, size))
        again.go_on(state, torch.device("cpu"))
        assert again._own() == wanted


def test_what_cannot_be_divided_is_refused() -> None:
    world = World(0, 4)
    for size in (6, 4):
        with pytest.raises(UserError, match="all 4 processes together: take a multiple of 4, at least 8"):
            distributed.check(world, size, 100)
    with pytest.raises(UserError, match="more than the 10 training images"):
        distributed.check(world, 16, 10)
    distributed.check(world, 8, 8)


def test_shares_and_a_process_alone() -> None:
    assert [*World(1, 3).share(iter(range(8)))] == [1, 4, 7]
    alone = distributed.ALONE
    assert (
        alone.join([1, 2]) == [1, 2] and alone.of_first("x") == "x" and alone.label == () and World(2, 3).label == (2,)
    )
    value = Tensor([1.0])
    assert alone.sum(value) is value
