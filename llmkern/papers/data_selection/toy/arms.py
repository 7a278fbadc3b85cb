"""What each method selects of a pool, scored with the embeddings of a teacher that was trained on the pool itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern.ops.pairwise_scores import neg_clip_loss, norm_sim
from llmkern.ops.vas_score import SecondMoment, second_moment, vas_score
from llmkern.papers.data_selection.rank import keep_top, ranks
from llmkern.papers.data_selection.tensors import clip_score
from llmkern.papers.data_selection.toy.corpora import CLEAN, GENERIC, OFF_TARGET, SHUFFLED, Corpus
from llmkern.papers.data_selection.toy.towers import Fit, Pair, train
from llmkern.papers.data_selection.vas_d import vas_d

# First cut and second cut, both of the original pool: those of VAS on DataComp-small.
FIRST, SECOND = 0.45, 0.3
ROUNDS = 20
ARMS = (
    "none",
    "random",
    "CLIPScore",
    "CLIPScore, VAS",
    "CLIPScore, VAS-D",
    "CLIPScore, NormSim_inf",
    "negCLIPLoss",
    "negCLIPLoss, NormSim_inf",
    "negCLIPLoss, NormSim_2",
    "oracle",
)


@dataclass(frozen=True)
class Setting:
    """A corpus' training and scoring."""

    fit: Fit = field(default_factory=Fit)
    batch_size: int = 2048
    num_partitions: int = 5

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def score(corpus: Corpus, teacher: Pair, setting: Setting, seed: int) -> dict[str, Tensor]:
    """Every score of the pool, and the image embeddings for VAS-D."""
    image, text = teacher.embed(corpus.image, corpus.text)
    target = teacher.embed(corpus.target, corpus.text[:1])[0]
    temperature = 1 / float(teacher.log_scale.detach().clamp(max=4.6).exp())
    return {
        "image": image,
        "clip": clip_score(image, text),
        "neg_clip": neg_clip_loss(
            image,
            text,
            temperature=temperature,
            batch_size=setting.batch_size,
            num_partitions=setting.num_partitions,
            seed=seed,
        ),
        "vas": vas_score(image, second_moment(target)),
        "norm_inf": norm_sim(image, target, p=math.inf),
        "norm_2": norm_sim(image, target, p=2),
    }


def select(arm: str, corpus: Corpus, scores: dict[str, Tensor], seed: int) -> Tensor:
    """Indices of the pool that an arm keeps."""
    n = len(corpus.kind)
    count, every = int(n * SECOND), np.arange(n)
    rng = np.random.default_rng([seed, 3])
    if arm == "none":
        return torch.arange(n)
    if arm == "random":
        return torch.from_numpy(np.sort(rng.permutation(n)[:count]))
    if arm == "oracle":
        clean = np.flatnonzero(corpus.kind.numpy() == CLEAN)
        return torch.from_numpy(np.sort(rng.permutation(clean)[:count]))
    first = "clip" if arm.startswith("CLIPScore") else "neg_clip"
    second = {"VAS": "vas", "NormSim_inf": "norm_inf", "NormSim_2": "norm_2"}.get(arm.partition(", ")[2])
    if "," not in arm:
        return torch.from_numpy(_best(every, scores[first], count))
    rows = _best(every, scores[first], int(n * FIRST))
    if second is None:
        pool = SecondMoment(scores["image"].shape[1]).add(scores["image"])
        return torch.from_numpy(rows[vas_d(scores["image"][torch.from_numpy(rows)], count, ROUNDS, first=pool)])
    return torch.from_numpy(_best(rows, scores[second], count))


def _best(rows: np.ndarray, values: Tensor, count: int) -> np.ndarray:
    uids = rows.astype(np.uint64)[:, None].repeat(2, 1)
    return rows[keep_top(values[torch.from_numpy(rows)].numpy(), uids, count)]


def run_seed(corpus: Corpus, setting: Setting, seed: int) -> dict[str, Any]:
    """Teacher, scores, a student an arm; everything that the tables show of a seed."""
    everyone = torch.arange(len(corpus.kind))
    teacher = train(corpus.image, corpus.text, everyone, corpus.vocabulary, setting.fit, 1000 + seed)
    scores = score(corpus, teacher, setting, seed)
    kind = corpus.kind
    matched = ((kind == CLEAN) | (kind == OFF_TARGET)).numpy()
    clean = (kind == CLEAN).numpy()
    found: dict[str, Any] = {"seed": seed, "arms": {}, "auc": {}}
    for name in ("clip", "neg_clip", "vas", "norm_inf"):
        values = scores[name].numpy()
        found["auc"][name] = {"matched": auc(values, matched), "clean": auc(values, clean)}
    found["teacher"] = evaluate(teacher, corpus)
    for arm in ARMS:
        rows = select(arm, corpus, scores, seed)
        student = train(corpus.image, corpus.text, rows, corpus.vocabulary, setting.fit, seed)
        share = {name: float((kind[rows] == k).float().mean()) for name, k in KINDS.items()}
        found["arms"][arm] = {**evaluate(student, corpus), "rows": len(rows), "kinds": share}
    return found


KINDS = {"clean": CLEAN, "shuffled": SHUFFLED, "generic": GENERIC, "off-target": OFF_TARGET}


def evaluate(pair: Pair, corpus: Corpus) -> dict[str, float]:
    """Accuracy (share of test images whose text ranks first), share in the first ten, mean reciprocal rank."""
    image, text = pair.embed(corpus.test_image, corpus.test_text)
    similarity = image @ text.t()
    own = similarity.gather(1, corpus.answer[:, None])
    rank = 1 + (similarity > own).sum(1)
    return {
        "accuracy": float((rank == 1).float().mean()),
        "first ten": float((rank <= 10).float().mean()),
        "reciprocal rank": float((1 / rank).float().mean()),
    }


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties for half."""
    places = ranks(values)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((places[positive].sum() - n * (n - 1) / 2) / (n * m))
