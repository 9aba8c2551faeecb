"""What learns or counts, and the putting back of its state from a checkpoint."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """Whatever a checkpoint has to bring back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def put_back(part: Stateful, state: Any) -> None:
    """Load a state into a part.

    Raises:
        ValueError: it is the state of something else.
    """
    kinds, fixed = _kinds(part.state_dict()), _fixed(part)
    try:
        part.load_state_dict(state)
        fits = _alike(kinds, _kinds(part.state_dict())) and fixed == _fixed(part) and _moments_fit(part)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(str(error)) from None
    if not fits:
        raise ValueError("other kinds or shapes")


def _kinds(value: Any) -> Any:
    """What a state consists of: its containers with the kinds of things in them, and the shapes of tensors."""
    if isinstance(value, Mapping):
        return {key: _kinds(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_kinds(one) for one in value]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return float if type(value) in (int, float) else type(value)


def _alike(before: Any, after: Any) -> bool:
    """Whether what was there before is of the same kind; an optimizer gets its moments."""
    if isinstance(before, dict):
        return isinstance(after, dict) and all(key in after and _alike(before[key], after[key]) for key in before)
    if isinstance(before, list):
        return isinstance(after, list) and len(before) == len(after) and all(map(_alike, before, after))
    return bool(before == after)


def _fixed(part: Stateful) -> dict[str, Any]:
    """What a schedule of learning rates has from the options, and no step changes."""
    if not isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        return {}
    moving = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
    return {name: value for name, value in part.state_dict().items() if name not in moving}


_MOMENTS = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}


def _moments_fit(part: Stateful) -> bool:
    """Whether what an optimizer keeps is of its parameters."""
    names = next((names for kind, names in _MOMENTS.items() if isinstance(part, kind)), None)
    if names is None or not isinstance(part, torch.optim.Optimizer):
        return True
    kept = [(p, name, value) for p, state in part.state.items() for name, value in state.items()]
    whole = all(state.keys() == names for state in part.state.values())
    return whole and all(
        isinstance(value, torch.Tensor) and value.shape == (() if name == "step" else p.shape)
        for p, name, value in kept
    )
