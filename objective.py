"""What a search minimises."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sampling import Z

Terms = dict[str, Tensor]  # further scalars, logged under their names


class Objective(nn.Module):
    """Mean cross-entropy in nats: the architecture costs nothing. Others say what they add, and use the hooks."""

    def forward(self, logits: Tensor, targets: Tensor, z: Z) -> tuple[Tensor, Terms]:
        """Logits (B, classes), targets (B,), the Z that the network ran -> the loss, further scalars."""
        return F.cross_entropy(logits.float(), targets), {}

    def begin(self) -> None:
        """Called before the first step of a search, but not where one goes on: its state has what was found then."""

    def after_step(self) -> None:
        """Called after every update."""

    def after_epoch(self, optimizer: Optimizer) -> None:
        """Called after an epoch's training, before its evaluation; may change alpha and what its optimizer keeps."""

    def price(self, z: Z) -> float:
        """What the child of a one-hot Z costs beyond its cross-entropy; infinite if it may not be a search's result."""
        return 0.0

    def report(self) -> dict[str, Any]:
        """Its columns of metrics.jsonl, at the end of an epoch."""
        return {}

    def summary(self, row: Mapping[str, Any]) -> str:
        """What people want to know of them, in a line."""
        return ""
