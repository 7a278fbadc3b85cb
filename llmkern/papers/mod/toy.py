"""Multi-objective decoding on a toy where nothing is estimated: six tokens, five steps, all 7776 sequences enumerated.

A small network is fitted to a random corpus and is the reference. From it one policy is trained for each of three rewards,
by gradient ascent on the exact objective

    J(pi) = sum_y pi(y) (R(y) - beta log(pi(y) / ref(y))),        optimum  pi*(y) ~ ref(y) exp(R(y) / beta).

For weights w the policies are then combined, without training, into a policy for R_w = sum_i w_i R_i, and J of each
combination is computed exactly: the mix of whole sequences (what the theory speaks of), the mix token by token through
``llmkern.mix_logits`` (what can be decoded), the mean of next-token probabilities, and the mean of parameters; the last
also after permuting and sign-flipping hidden units of two policies, which changes no output of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import llmkern

WEIGHTS: tuple[tuple[float, ...], ...] = ((1 / 3, 1 / 3, 1 / 3), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (1.2, 0.3, -0.5))
METHODS = (
    "optimum",
    "MOD, sequences",
    "MOD, tokens",
    "probability mean",
    "merge",
    "merge, symmetry",
    "retrain",
)


@dataclass(frozen=True)
class Size:
    """Everything that decides what is computed, apart from the seed and beta."""

    vocabulary: int = 6
    length: int = 5
    hidden: int = 48
    corpus: int = 400
    rewards: int = 3
    reference_steps: int = 400
    policy_steps: int = 500
    learning_rate: float = 0.01


class Network(NamedTuple):
    """Two-layer tanh network from a one-hot prefix to next-token logits; float64 throughout."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class Outcome(NamedTuple):
    """Exact value of one policy: J = reward - beta kl."""

    objective: float
    reward: float
    kl: float


class Row(NamedTuple):
    """One cell of the table; `outcome` is None where the method is not defined (probabilities of negative weight)."""

    seed: int
    beta: float
    weights: tuple[float, ...]
    method: str
    outcome: Outcome | None


class Tree:
    """All sequences of a vocabulary and length, and for each of their steps the row of its prefix."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.sequences = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        features, rows, first = [], [], 0
        for step in range(length):
            count = vocabulary**step
            # Digits of the prefix number, most significant first: the order of cartesian_prod.
            number = torch.arange(count)
            tokens = [(number // vocabulary ** (step - 1 - i)) % vocabulary for i in range(step)]
            one_hot = torch.zeros(count, length, vocabulary + 1, dtype=torch.float64)
            one_hot[:, step:, vocabulary] = 1
            for i, token in enumerate(tokens):
                one_hot[number, i, token] = 1
            features.append(one_hot.flatten(1))
            rows.append(first + torch.arange(len(self.sequences)) // vocabulary ** (length - step))
            first += count
        self.features = torch.cat(features)
        self.prefixes = torch.stack(rows, 1)

    def sequence_log_probs(self, logits: Tensor) -> Tensor:
        """log pi(y) of every sequence from the next-token logits of every prefix."""
        return logits.log_softmax(-1)[self.prefixes, self.sequences].sum(-1)


def new_network(size: Size, generator: torch.Generator) -> Network:
    inputs = size.length * (size.vocabulary + 1)
    w1 = torch.randn(size.hidden, inputs, dtype=torch.float64, generator=generator) / size.length**0.5
    w2 = torch.randn(size.vocabulary, size.hidden, dtype=torch.float64, generator=generator) / size.hidden**0.5
    zero = {"dtype": torch.float64}
    return Network(w1, torch.zeros(size.hidden, **zero), w2, torch.zeros(size.vocabulary, **zero))


def logits_of(network: Network, tree: Tree) -> Tensor:
    return torch.tanh(tree.features @ network.w1.T + network.b1) @ network.w2.T + network.b2


def fit(network: Network, tree: Tree, loss_of_log_probs, steps: int, learning_rate: float) -> Network:  # type: ignore[no-untyped-def]
    """Minimise a function of the log-probs of all sequences."""
    parameters = [p.clone().requires_grad_() for p in network]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss_of_log_probs(tree.sequence_log_probs(logits_of(Network(*parameters), tree))).backward()
        optimizer.step()
    return Network(*[p.detach() for p in parameters])


def random_rewards(size: Size, tree: Tree, reference: Tensor, generator: torch.Generator) -> Tensor:
    """(rewards, sequences): a random score for each token and each pair of neighbours, unit variance under reference."""
    shape = (size.rewards, size.vocabulary)
    single = torch.randn(*shape, dtype=torch.float64, generator=generator)
    pair = torch.randn(*shape, size.vocabulary, dtype=torch.float64, generator=generator)
    y = tree.sequences
    raw = single[:, y].sum(-1) + pair[:, y[:, :-1], y[:, 1:]].sum(-1)
    p = reference.exp()
    centred = raw - (raw * p).sum(-1, keepdim=True)
    return centred / (centred.square() * p).sum(-1, keepdim=True).sqrt()


def tilt(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Log-probs of the exact optimum, ref exp(R / beta) / Z."""
    return (reference + reward / beta).log_softmax(-1)


def evaluate(log_probs: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Outcome:
    p = log_probs.exp()
    gained, kl = float((p * reward).sum()), float((p * (log_probs - reference)).sum())
    return Outcome(gained - beta * kl, gained, kl)


def mix_sequences(policies: Sequence[Tensor], reference: Tensor, weights: Sequence[float]) -> Tensor:
    """Reverse-KL mix of distributions over whole sequences: ref prod_i (pi_i / ref)^w_i / Z."""
    return (reference + sum(w * (a - reference) for w, a in zip(weights, policies))).log_softmax(-1)


def mix_tokens(tree: Tree, logits: Sequence[Tensor], reference: Tensor, weights: Sequence[float]) -> Tensor:
    """The same mix at each step, through the library's op; log-probs of the sequences that it generates."""
    return tree.sequence_log_probs(llmkern.mix_logits(list(logits), list(weights), reference=reference))


def mean_probabilities(tree: Tree, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return tree.sequence_log_probs(sum(w * row.softmax(-1) for w, row in zip(weights, logits)).log())  # type: ignore[union-attr]


def merge(networks: Sequence[Network], weights: Sequence[float], reference: Network) -> Network:
    """reference + sum_i w_i (network_i - reference), which for weights that sum to one is the weighted average."""
    return Network(*[r + sum(w * (p - r) for w, p in zip(weights, same)) for r, *same in zip(reference, *networks)])


def permute_and_flip(network: Network, generator: torch.Generator) -> Network:
    """The same function with its hidden units in another order, half of them with their signs turned (tanh is odd)."""
    order = torch.randperm(len(network.b1), generator=generator)
    sign = torch.randint(0, 2, (len(order),), generator=generator).double() * 2 - 1
    return Network(sign[:, None] * network.w1[order], sign * network.b1[order], network.w2[:, order] * sign, network.b2)


class Toy:
    """Reference, rewards and random state of one seed."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        self.tree = Tree(size.vocabulary, size.length)
        generator = torch.Generator().manual_seed(seed)
        start = new_network(size, generator)
        # The corpus: draws from another random network, so that there is something to learn.
        source = new_network(size, generator)
        truth = self.tree.sequence_log_probs(2 * logits_of(source, self.tree)).exp()
        drawn = torch.multinomial(truth, size.corpus, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=len(truth)).double() / size.corpus
        loss = lambda log_probs: -(counts * log_probs).sum()  # noqa: E731
        self.network = fit(start, self.tree, loss, size.reference_steps, size.learning_rate)
        self.reference_logits = logits_of(self.network, self.tree)
        self.reference = self.tree.sequence_log_probs(self.reference_logits)
        self.rewards = random_rewards(size, self.tree, self.reference, generator)
        self.generator = generator

    def train(self, reward: Tensor, beta: float) -> Network:
        """A policy trained from the reference on the exact objective."""

        def loss(log_probs: Tensor) -> Tensor:
            return -(log_probs.exp() * (reward - beta * (log_probs - self.reference))).sum()

        return fit(self.network, self.tree, loss, self.size.policy_steps, self.size.learning_rate)

    def rows(self, beta: float, weights_list: Sequence[tuple[float, ...]] = WEIGHTS) -> list[Row]:
        tree, reference = self.tree, self.reference
        networks = [self.train(reward, beta) for reward in self.rewards]
        logits = [logits_of(network, tree) for network in networks]
        policies = [tree.sequence_log_probs(row) for row in logits]
        turned = [networks[0], *(permute_and_flip(network, self.generator) for network in networks[1:])]
        rows = []
        for weights in weights_list:
            reward = sum(w * r for w, r in zip(weights, self.rewards))
            assert isinstance(reward, Tensor)
            merged, merged_turned = (merge(nets, weights, self.network) for nets in (networks, turned))
            found = {
                "optimum": tilt(reference, reward, beta),
                "MOD, sequences": mix_sequences(policies, reference, weights),
                "MOD, tokens": mix_tokens(tree, logits, self.reference_logits, weights),
                "merge": tree.sequence_log_probs(logits_of(merged, tree)),
                "merge, symmetry": tree.sequence_log_probs(logits_of(merged_turned, tree)),
                "retrain": tree.sequence_log_probs(logits_of(self.train(reward, beta), tree)),
            }
            if min(weights) >= 0:
                found["probability mean"] = mean_probabilities(tree, logits, weights)
            for method in METHODS:
                outcome = evaluate(found[method], reference, reward, beta) if method in found else None
                rows.append(Row(self.seed, beta, weights, method, outcome))
        return rows
