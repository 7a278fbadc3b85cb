"""Two small towers and their training with ``llmkern.clip_loss``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern._library import bad_value
from llmkern.ops.pairwise_scores import clip_loss
from llmkern.papers.data_selection.files import atomic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Fit:
    """How a pair of towers is trained, teacher and students alike."""

    steps: int = 300
    batch: int = 512
    width: int = 64
    hidden: int = 128
    learning_rate: float = 3e-3


class Tower(nn.Module):
    """Unit rows of a bag of words (integers, 0 is padding) or of plain vectors."""

    def __init__(self, inputs: Tensor, vocabulary: int, fit: Fit) -> None:
        super().__init__()
        self.words = not inputs.is_floating_point()
        wide = fit.width if self.words else inputs.shape[1]
        if self.words:
            self.table = nn.EmbeddingBag(vocabulary, fit.width, mode="mean", padding_idx=0)
            nn.init.normal_(self.table.weight, std=0.3)
        self.layers = nn.Sequential(nn.Linear(wide, fit.hidden), nn.GELU(), nn.Linear(fit.hidden, fit.width))
        self.skip = nn.Linear(wide, fit.width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.table(inputs.long()) if self.words else inputs
        return F.normalize(self.layers(x) + self.skip(x), dim=1)


class Pair(nn.Module):
    def __init__(self, image: Tensor, text: Tensor, vocabulary: int, fit: Fit) -> None:
        super().__init__()
        self.image, self.text = Tower(image, vocabulary, fit), Tower(text, vocabulary, fit)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    @torch.no_grad()
    def embed(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def train(
    image: Tensor,
    text: Tensor,
    rows: Tensor,
    vocabulary: int,
    fit: Fit,
    seed: int,
    *,
    group: ProcessGroup | None = None,
    checkpoint: Path | None = None,
    every: int = 50,
    done: Callable[[int], None] = lambda steps: None,
) -> Pair:
    """Towers trained on these rows; a seed fixes the start and, for sets of one size, the places of every batch.

    With a ``group``, as torchrun makes it, each process takes its part of every batch and all end with the same towers.
    What was trained is kept in ``checkpoint`` after so many steps, and a run that finds that file goes on from there:
    under ``torchrun --max-restarts`` a process that dies costs the steps since then. With gloo, set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, else a restart may meet addresses of the dead.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair = Pair(image, text, vocabulary, fit)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=fit.learning_rate, weight_decay=0.01)
    batch = min(fit.batch, len(rows))
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if batch % size:
        raise bad_value("train", f"a batch that {size} processes can share", batch)
    own = slice(batch // size * rank, batch // size * (rank + 1))
    start = 0 if checkpoint is None else _resume(checkpoint, pair, optimizer, generator)
    for step in range(start, fit.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = fit.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / fit.steps)
        chosen = rows[torch.randperm(len(rows), generator=generator)[:batch]][own]
        # The bound of CLIP: logits beyond a hundred times the similarity make training unstable.
        scale = pair.log_scale.clamp(max=4.6).exp()
        loss = clip_loss(pair.image(image[chosen]), pair.text(text[chosen]), scale, group=group)
        optimizer.zero_grad()
        loss.backward()
        if group is not None:
            for parameter in pair.parameters():
                torch.distributed.all_reduce(parameter.grad, group=group)
        optimizer.step()
        if checkpoint is not None and rank == 0 and (step + 1) % every == 0:
            state = {"steps": step + 1, "pair": pair.state_dict(), "optimizer": optimizer.state_dict()}
            with atomic(checkpoint) as file:
                torch.save({**state, "generator": generator.get_state()}, file)
        done(step + 1)
    return pair.eval()


def _resume(checkpoint: Path, pair: Pair, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """The number of steps that the file holds, loaded into all; zero where there is none."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint)
    pair.load_state_dict(state["pair"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return state["steps"]
