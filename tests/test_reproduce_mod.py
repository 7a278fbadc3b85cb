"""Exact identities of the enumerable toy, on a miniature of it, and its command."""

import csv

import pytest
import torch

from llmkern.__main__ import main
from llmkern.papers.mod.experiment import conclusions, regimes
from llmkern.papers.mod.toy import (
    METHODS,
    WEIGHTS,
    Size,
    Toy,
    Tree,
    evaluate,
    fit,
    logits_of,
    mean_probabilities,
    merge,
    mix_sequences,
    mix_tokens,
    new_network,
    permute_and_flip,
    tilt,
)

SMALL = Size(vocabulary=3, length=3, hidden=(6, 5), corpus=60, reference_steps=30, policy_steps=30)


@pytest.fixture(scope="module")
def toy():
    return Toy(SMALL, seed=0)


@pytest.fixture(scope="module")
def networks(toy):
    return [toy.train(reward, beta=1.0) for reward in toy.rewards]


def test_sequence_log_probs_against_a_plain_product(toy):
    """Every sequence scored step by step through the network's own input, as a decoder would."""
    tree, network = toy.tree, toy.network
    rows = logits_of(network, tree).log_softmax(-1)
    prefixes = {(): 0}
    for step in range(1, SMALL.length):
        for sequence in tree.sequences.tolist():
            prefixes.setdefault(tuple(sequence[:step]), len(prefixes))
    for number, sequence in enumerate(tree.sequences.tolist()):
        total = 0.0
        for step, token in enumerate(sequence):
            row = prefixes[tuple(sequence[:step])]
            hot = [sequence[i] if i < step else SMALL.vocabulary for i in range(SMALL.length)]
            one_hot = torch.nn.functional.one_hot(torch.tensor(hot), SMALL.vocabulary + 1)
            assert torch.equal(tree.features[row], one_hot.flatten().double())
            total += rows[row, token]
        torch.testing.assert_close(toy.reference[number], torch.as_tensor(total))
    torch.testing.assert_close(toy.reference.exp().sum(), torch.tensor(1.0).double())


def test_rewards_have_unit_variance_under_the_reference(toy):
    p = toy.reference.exp()
    torch.testing.assert_close(toy.rewards @ p, torch.zeros(SMALL.rewards).double())
    torch.testing.assert_close(toy.rewards.square() @ p, torch.ones(SMALL.rewards).double())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_mix_of_exact_optima_is_the_optimum(toy, weights, beta):
    """The theorem: policies that are optimal for their own rewards, mixed as sequences."""
    policies = [tilt(toy.reference, reward, beta) for reward in toy.rewards]
    reward = torch.tensor(weights).double() @ toy.rewards
    best = tilt(toy.reference, reward, beta)
    torch.testing.assert_close(mix_sequences(policies, toy.reference, weights), best)
    # No other policy does better: J of the optimum is beta log Z, and any other falls short by beta KL.
    value = evaluate(best, toy.reference, reward, beta).objective
    log_z = (toy.reference + reward / beta).logsumexp(-1)
    torch.testing.assert_close(torch.tensor(value).double(), beta * log_z)
    for policy in policies:
        short = (policy.exp() * (policy - best)).sum()
        found = evaluate(policy, toy.reference, reward, beta).objective
        torch.testing.assert_close(torch.tensor(found).double(), value - beta * short)


def test_tokens_of_one_model_are_that_model(toy, networks):
    logits = [logits_of(network, toy.tree) for network in networks]
    for i, row in enumerate(logits):
        weights = [float(i == j) for j in range(3)]
        wanted = toy.tree.sequence_log_probs(row)
        torch.testing.assert_close(mix_tokens(toy.tree, logits, toy.reference_logits, weights), wanted)
        torch.testing.assert_close(mean_probabilities(toy.tree, logits, weights), wanted)
        torch.testing.assert_close(mix_tokens(toy.tree, [row], toy.reference_logits, [1.0]), wanted)


def test_mix_of_tokens_is_the_mix_of_sequences_for_length_one():
    """Where a sequence is one token the two are one, also for weights that do not sum to one."""
    tree = Tree(7, 1)
    logits = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0)).double()
    policies = [tree.sequence_log_probs(row) for row in logits]
    for weights in ((0.5, 0.5), (1.2, 0.3), (1.0, -0.4)):
        mixed = mix_tokens(tree, logits[:2], logits[2], weights)
        torch.testing.assert_close(mixed, mix_sequences(policies[:2], policies[2], weights))


def test_symmetry_changes_no_function_and_so_not_mod(toy, networks):
    generator = torch.Generator().manual_seed(5)
    turned = [permute_and_flip(network, generator) for network in networks]
    plain, other = ([logits_of(network, toy.tree) for network in nets] for nets in (networks, turned))
    for network, moved, a, b in zip(networks, turned, plain, other):
        assert not torch.equal(network[0], moved[0])
        assert not torch.equal(network[2], moved[2])
        torch.testing.assert_close(b, a)
    for weights in WEIGHTS:
        mixes = [mix_tokens(toy.tree, logits, toy.reference_logits, weights) for logits in (plain, other)]
        torch.testing.assert_close(mixes[1], mixes[0])
        merged = [logits_of(merge(nets, weights, toy.network), toy.tree) for nets in (networks, turned)]
        assert not torch.allclose(merged[0], merged[1])


def test_merge_of_one_is_that_one(toy, networks):
    for found, wanted in zip(merge(networks, (0.0, 1.0, 0.0), toy.network), networks[1]):
        torch.testing.assert_close(found, wanted)


def test_training_climbs_towards_the_optimum(toy):
    reward = toy.rewards[0]
    best = evaluate(tilt(toy.reference, reward, 1.0), toy.reference, reward, 1.0).objective
    values = []
    for steps in (0, 30, 300):

        def loss(log_probs):
            return -(log_probs.exp() * (reward - (log_probs - toy.reference))).sum()

        tuned = toy.tree.sequence_log_probs(logits_of(fit(toy.network, toy.tree, loss, steps, 0.02), toy.tree))
        values.append(evaluate(tuned, toy.reference, reward, 1.0).objective)
    assert abs(values[0]) < 1e-12
    assert values[0] < values[1] < values[2] <= best


def test_rows_are_complete_and_in_order(toy):
    rows = toy.rows(beta=1.0)
    assert [(row.weights, row.method) for row in rows] == [(w, m) for w in WEIGHTS for m in METHODS]
    for row in rows:
        undefined = row.method == "probability mean" and min(row.weights) < 0
        assert (row.outcome is None) == undefined
        if row.outcome is not None:
            best = next(r.outcome for r in rows if r.weights == row.weights)
            assert row.outcome.objective <= best.objective + 1e-12
            assert row.outcome.kl >= 0


def test_conclusions_count_what_the_rows_hold(toy):
    rows = toy.rows(beta=1.0)
    ahead = sum(
        ours.outcome.objective > theirs.outcome.objective
        for ours in rows
        for theirs in rows
        if (ours.method, theirs.method) == ("MOD, tokens", "merge") and ours.weights == theirs.weights
    )
    assert f"ahead of merging in {ahead} of {len(WEIGHTS)} cells" in conclusions({"here": rows})[0]


def test_same_seed_same_network():
    first, second = (new_network(SMALL, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_command_writes_table_csv_and_plot(tmp_path, capsys):
    assert main(["reproduce", "mod", "--seeds", "1", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "7776 sequences" in out
    for method in METHODS:
        assert method in out
    with (tmp_path / "out" / "toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(regimes(SMALL)) * len(WEIGHTS) * len(METHODS)
    for row in rows:
        if row["J"]:
            left = float(row["reward"]) - float(row["beta"]) * float(row["kl"])
            # The file holds six decimals of each of the three.
            assert abs(float(row["J"]) - left) <= 2e-6
    assert (tmp_path / "out" / "toy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bad", [["--seeds", "0"], ["--steps", "-1"]])
def test_bad_counts_are_refused(bad, capsys):
    assert main(["reproduce", "mod", *bad]) == 2
    assert f"expected {bad[0]} of at least 1, got {bad[1]}" in capsys.readouterr().err


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["reproduce", "mod", "--out", str(tmp_path / "taken")]) == 2
    assert "expected --out as a folder that can be written" in capsys.readouterr().err
