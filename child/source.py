"""The child of a genotype: finding the genotype, making the network, giving it weights."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import genotypes
import options
import utils
from child import baselines, cells
from child.baselines import Baseline
from genotypes import Genotype
from loading import records
from loading.augmentation import symmetries
from loading.records import Stored
from loading.sets import DataInfo
from model import ChildNetwork
from model_search import Network
from options import UserError
from options.child_option import ChildOptions
from resources import cost
from resources.cost import Deployed
from training import checkpoint

Trainable = ChildNetwork | Baseline
_TRIES = 20_000  # draws of random:SEED with --match_params


def make_network(opt: ChildOptions, genotype: Genotype | None, info: DataInfo) -> Trainable:
    """The network of the options and the data, randomly initialised from the seed.

    Args:
        opt: its sizes. genotype: of its cells; None for the others of --network.
    Raises:
        UserError: the images are too small for it, or for the auxiliary head.
    """
    height, width = info.image_size
    if genotype is None:
        if min(height, width) < 4:
            raise UserError(f"--network {opt.network} halves images twice, {width}x{height} is too small")
        torch.manual_seed(utils.fold(opt.seed, "init"))
        return baselines.make(opt.network, opt.init_channels, len(info.classes), info.channels, opt.match_params)
    halvings = 5 if opt.stem == "imagenet" else 2  # before the auxiliary head
    least = 7 if opt.stem == "imagenet" else 8
    side = -(-min(height, width) // 2**halvings)
    if opt.auxiliary and side < least:
        raise UserError(
            f"--auxiliary True needs features of {least}x{least} at two thirds of the depth, images of "
            f"{width}x{height} give {side}x{side}; use --auxiliary False"
        )
    torch.manual_seed(utils.fold(opt.seed, "init"))
    return ChildNetwork(
        genotype, opt.init_channels, len(info.classes), opt.layers, opt.auxiliary, opt.stem, in_channels=info.channels
    )


def price(opt: ChildOptions, genotype: Genotype | None, info: DataInfo) -> dict[str, int]:
    """params, flops and mac of make_network's, without auxiliary head."""
    if genotype is not None:
        return Deployed.of(info, opt.init_channels, opt.layers, opt.stem).price(genotype)
    with torch.random.fork_rng(devices=[]):
        return cost.count(make_network(opt, None, info), info.channels, (info.image_size[0], info.image_size[1]))


def passes(opt: ChildOptions) -> int:
    """How often the network runs to test an image: over the symmetries of --tta."""
    return len(symmetries(torch.zeros(1, 1, 1, 1), opt.test_flip))


def find_genotype(opt: ChildOptions, info: DataInfo) -> Genotype:
    """The genotype that --genotype names.

    Raises:
        UserError: there is none of that name, its file is malformed, or no random one has the parameters wanted.
    """
    name, folder = opt.genotype, Path(opt.experiments_dir) / opt.genotype
    fixed = name in genotypes.GENOTYPES or name.startswith("random:") or Path(name).is_file()
    if fixed and opt.genotype_epoch is not None:
        raise UserError(f"--genotype_epoch goes with an experiment, and --genotype {name} is none")
    if name in genotypes.GENOTYPES:
        return genotypes.GENOTYPES[name]
    if name.startswith("random:"):
        return _random_genotype(opt, info)
    if opt.genotype_epoch is not None:
        kept = checkpoint.epochs(folder, "weights")
        if opt.genotype_epoch not in kept:
            there = f"it has {', '.join(map(str, kept))}" if kept else "no search lies there"
            raise UserError(f"--genotype_epoch {opt.genotype_epoch} is not kept in {folder}; {there}")
        return _of_checkpoint(checkpoint.path_of(folder, "weights", opt.genotype_epoch))
    for path in (Path(name), folder / "genotype.json"):
        if path.is_file():
            return _of_checkpoint(path) if _is_checkpoint(path) else cells.read_genotype(path)
    file, _, cell = name.rpartition(":")
    if Path(file).is_file():
        return cells.read_genotype(Path(file), cell)
    raise UserError(
        f"--genotype {name} is no experiment in {opt.experiments_dir} that ended, no file, and none of "
        f"{', '.join(genotypes.GENOTYPES)}, random:SEED; --genotype_epoch takes that of an epoch"
    )


def _of_checkpoint(path: Path) -> Genotype:
    """What the search of a checkpoint stood at."""
    content = checkpoint.load(path)
    state = content["parts"]["network"]
    if content.get("stem") != "weights":
        raise UserError(f"--genotype {path} is a child's checkpoint, not a search's")
    return genotypes.derive(state["alpha_normal"], state["alpha_reduce"], content["options"]["space"])


def _is_checkpoint(path: Path) -> bool:
    """Whatever its name: these begin as archives do, and a cell is text."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def searches(opt: ChildOptions) -> dict[str, Stored | None]:
    """The splits of the searches that the genotype and the initial weights come from, by name; None if unknown.

    Raises:
        UserError: a file is no split, or --network is given with the name of a search that does not exist.
    """
    found: dict[str, Stored | None] = {}
    alone = opt.network != "cells" and "genotype" not in options.given(opt)
    if not alone and opt.genotype not in genotypes.GENOTYPES and not opt.genotype.startswith("random:"):
        files = [path for path in (Path(opt.genotype), Path(opt.genotype.rpartition(":")[0])) if path.is_file()]
        place = files[0] if files else Path(opt.experiments_dir) / opt.genotype
        if opt.network != "cells" and not place.exists():
            raise UserError(
                f"--genotype {opt.genotype}: no such search, whose split --network {opt.network} would take"
            )
        found[opt.genotype] = _split_of(place)
    if opt.init_from is not None:
        found[opt.init_from] = _split_of(Path(opt.experiments_dir) / opt.init_from)
    return found


def _split_of(place: Path) -> Stored | None:
    """That of a checkpoint, of a file beside a split.json, or of an experiment."""
    folder = place.parent if place.is_file() else place
    if not (place.is_file() and _is_checkpoint(place)) and (folder / "split.json").is_file():
        return records.read_split(folder / "split.json", "the search's split")
    weights = place if place.is_file() else checkpoint.newest(place, "weights")
    if weights is None or not _is_checkpoint(weights):
        return None
    return records.of_record(checkpoint.load(weights)["split"])


def fingerprint(network: nn.Module) -> str:
    """A digest of the weights of a child, its auxiliary head apart."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith("auxiliary."):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _random_genotype(opt: ChildOptions, info: DataInfo) -> Genotype:
    source = random.Random(int(opt.genotype.partition(":")[2]))
    if opt.match_params is None:
        return genotypes.random_genotype(opt.space, source)
    seen, deployed, flops = [], Deployed.of(info, opt.init_channels, opt.layers, opt.stem), opt.match_flops
    for _ in range(_TRIES):
        genotype = genotypes.random_genotype(opt.space, source)
        price = deployed.price(genotype)
        seen.append(price)
        alike = abs(price["params"] - opt.match_params) <= 0.05 * opt.match_params
        if alike and (flops is None or abs(passes(opt) * price["flops"] - flops) <= 0.1 * flops):
            return genotype
    ranges = {key: (min(one[key] for one in seen), max(one[key] for one in seen)) for key in ("params", "flops")}
    more = "" if flops is None else f", --match_flops {flops}"
    raise UserError(
        f"--match_params {opt.match_params}{more}: of {len(seen)} random genotypes of this size none came near enough; "
        f"they have {ranges['params'][0]:,} to {ranges['params'][1]:,} parameters and "
        f"{passes(opt) * ranges['flops'][0]:,} to {passes(opt) * ranges['flops'][1]:,} multiply-adds"
    )


def load_child(content: Mapping[str, Any]) -> tuple[Trainable, Genotype | None]:
    """The network of a child's checkpoint, in eval mode, without auxiliary head; averaged weights if there are."""
    opt, info = options.restore(ChildOptions, content["options"]), DataInfo(**content["data"])
    stored = content["extra"]["genotype"]
    genotype = Genotype.from_dict(stored) if stored else None
    parts = content["parts"]
    average = {k.removeprefix("module."): v for k, v in parts.get("average", {}).items() if k != "n_averaged"}
    state = average or parts["network"]
    own = {name: value for name, value in state.items() if not name.startswith("auxiliary.")}
    layers = opt.layers if opt.network == "cells" else 0
    return utils.rebuilt(
        lambda: make_network(replace(opt, auxiliary=False), genotype, info), own, layers
    ).eval(), genotype


def inherit(opt: ChildOptions, network: ChildNetwork, genotype: Genotype) -> list[str]:
    """Copy the weights of the supernet of --init_from wherever names and shapes agree.

    The running statistics that come with them are a supernet's: estimate them anew (evaluation.estimate_statistics).

    Returns:
        The names of convolutions' and linear layers' weights that the supernet did not give.
    Raises:
        UserError: the experiment has no supernet, or one that does not hold the genotype.
    """
    supernet = Network.from_checkpoint(supernet_checkpoint(opt))
    try:
        supernet.one_hot(genotype)
    except ValueError as error:
        raise UserError(f"--init_from {opt.init_from}: {error}") from None
    own, found = network.state_dict(), supernet.child_state_dict(genotype)
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(own | fitting)
    names = [name for name, _ in network.named_parameters() if not name.startswith("auxiliary.")]
    taken = sum(name in fitting for name in names)
    print(
        f"init     {taken} of {len(names)} weights from the supernet of {opt.init_from}; "
        "the others start as in a new network"
    )
    return [name for name, p in network.named_parameters() if p.dim() > 1 and name in names and name not in fitting]


def supernet_checkpoint(opt: ChildOptions) -> dict[str, Any]:
    """The newest checkpoint of the search --init_from; raises UserError."""
    folder = Path(opt.experiments_dir) / str(opt.init_from)
    newest = checkpoint.newest(folder, "weights")
    if newest is None:
        raise UserError(f"--init_from {opt.init_from}: no search checkpoint in {folder}")
    return checkpoint.load(newest)
