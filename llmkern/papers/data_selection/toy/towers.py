"""Two small towers and their training with ``llmkern.clip_loss``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.ops.pairwise_scores import clip_loss


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


def train(image: Tensor, text: Tensor, rows: Tensor, vocabulary: int, fit: Fit, seed: int) -> Pair:
    """Towers trained on these rows; a seed fixes the start and, for sets of one size, the places of every batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair = Pair(image, text, vocabulary, fit)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=fit.learning_rate, weight_decay=0.01)
    batch = min(fit.batch, len(rows))
    for step in range(fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / fit.steps)
        chosen = rows[torch.randperm(len(rows), generator=generator)[:batch]]
        # The bound of CLIP: logits beyond a hundred times the similarity make training unstable.
        scale = pair.log_scale.clamp(max=4.6).exp()
        loss = clip_loss(pair.image(image[chosen]), pair.text(text[chosen]), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pair.eval()
