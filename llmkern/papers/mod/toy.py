"""Multi-objective decoding on a toy where nothing is estimated: six tokens, five steps, all 7776 sequences enumerated.

A small network is fitted to a random corpus and is the reference. From it one policy is trained for each of three
rewards, by gradient ascent on the exact objective

    J(pi) = sum_y pi(y) (R(y) - beta log(pi(y) / ref(y))),        optimum  pi*(y) ~ ref(y) exp(R(y) / beta).

For weights w the policies are then combined, without training, into a policy for R_w = sum_i w_i R_i, and J of each
combination is computed exactly: the mix of whole sequences (what the theory speaks of), the mix token by token through
``llmkern.mix_logits`` (what can be decoded), the mean of next-token probabilities, and the mean of parameters; the last
also after permuting and sign-flipping hidden units of two policies, which changes no output of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    hidden: tuple[int, ...] = (32, 32)
    corpus: int = 400
    rewards: int = 3
    reference_steps: int = 300
    policy_steps: int = 300
    learning_rate: float = 0.02


# A tanh network from a one-hot prefix to next-token logits, float64: weight and bias of each layer in turn.
Network = list[Tensor]


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
    """All sequences of a vocabulary and length, and the prefixes on the way to them, shorter ones first."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.sequences = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        features = []
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
        self.features = torch.cat(features)

    def sequence_log_probs(self, logits: Tensor) -> Tensor:
        """log pi(y) of every sequence from the next-token logits of every prefix, level by level."""
        rows = logits.log_softmax(-1)
        total, first = rows.new_zeros(1), 0
        for step in range(self.length):
            count = self.vocabulary**step
            total = (total[:, None] + rows[first : first + count]).flatten()
            first += count
        return total


def new_network(size: Size, generator: torch.Generator) -> Network:
    widths = [size.length * (size.vocabulary + 1), *size.hidden, size.vocabulary]
    network: Network = []
    for inputs, outputs in pairwise(widths):
        # A one-hot prefix has length entries that are one, whatever its width.
        fan_in = size.length if not network else inputs
        weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator) / fan_in**0.5
        network += [weight, torch.zeros(outputs, dtype=torch.float64)]
    return network


def logits_of(network: Network, tree: Tree) -> Tensor:
    x = tree.features
    *hidden, weight, bias = network
    for w, b in zip(hidden[::2], hidden[1::2]):
        x = torch.tanh(x @ w.T + b)
    return x @ weight.T + bias


def fit(network: Network, tree: Tree, loss: Callable[[Tensor], Tensor], steps: int, learning_rate: float) -> Network:
    """Minimise a function of the log-probs of all sequences."""
    parameters = [p.clone().requires_grad_() for p in network]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss(tree.sequence_log_probs(logits_of(parameters, tree))).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def random_rewards(size: Size, tree: Tree, reference: Tensor, generator: torch.Generator) -> Tensor:
    """(rewards, sequences): random scores of tokens and pairs of neighbours; mean 0, variance 1 under the reference."""
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
    shift = torch.stack([w * (a - reference) for w, a in zip(weights, policies)]).sum(0)
    return (reference + shift).log_softmax(-1)


def mix_tokens(tree: Tree, logits: Sequence[Tensor], reference: Tensor, weights: Sequence[float]) -> Tensor:
    """The same mix at each step, through the library's op; log-probs of the sequences that it generates."""
    return tree.sequence_log_probs(llmkern.mix_logits(list(logits), list(weights), reference=reference))


def mean_probabilities(tree: Tree, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean = torch.stack([w * row.softmax(-1) for w, row in zip(weights, logits)]).sum(0)
    return tree.sequence_log_probs(mean.log())


def merge(networks: Sequence[Network], weights: Sequence[float], reference: Network) -> Network:
    """reference + sum_i w_i (network_i - reference), which for weights that sum to one is the weighted average."""
    return [r + sum(w * (p - r) for w, p in zip(weights, same)) for r, *same in zip(reference, *networks)]


def permute_and_flip(network: Network, generator: torch.Generator) -> Network:
    """The same function with hidden units in another order, about half with their signs turned (tanh is odd)."""
    turned = list(network)
    for layer in range(0, len(network) - 2, 2):
        weight, bias, following = turned[layer : layer + 3]
        order = torch.randperm(len(bias), generator=generator)
        sign = torch.randint(0, 2, (len(bias),), generator=generator).double() * 2 - 1
        turned[layer : layer + 3] = [sign[:, None] * weight[order], sign * bias[order], following[:, order] * sign]
    return turned


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

        def loss(log_probs: Tensor) -> Tensor:
            return -(counts * log_probs).sum()

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
            reward = torch.tensor(weights, dtype=torch.float64) @ self.rewards
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
