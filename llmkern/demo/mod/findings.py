"""What the numbers say, in sentences that are made from them."""

from __future__ import annotations

from llmkern import _library
from llmkern.demo.base import Context
from llmkern.demo.mod.evaluate import INNER, MERGE, MOD, OUTER, PROBABILITIES, Estimate, Row, find, weights_text
from llmkern.demo.mod.speed import Speed


def findings(context: Context, rows: list[Row], averaging: tuple[float, bool], speed: Speed) -> list[str]:
    inner = [(w, 1 - w) for w in INNER]
    sentences = [
        _compare(rows, MERGE, [*inner, *OUTER]),
        _compare(rows, PROBABILITIES, inner),
        _raw_rewards(rows),
        _symmetry(rows),
        _averaging(averaging),
    ]
    return [*sentences, *_speed(context, speed)]


def paired(rows: list[Row], other: str, weights: tuple[float, float]) -> Estimate:
    """J of MOD less J of the other, seed by seed: both drew with the same random numbers from the same prompts."""
    ours, theirs = find(rows, MOD, weights), find(rows, other, weights)
    assert ours is not None
    assert theirs is not None
    return Estimate.of(ours.objective - theirs.objective)


def _compare(rows: list[Row], other: str, weights: list[tuple[float, float]]) -> str:
    found = {w: paired(rows, other, w) for w in weights}
    ahead = [w for w, d in found.items() if d.mean - d.half > 0]
    behind = [w for w, d in found.items() if d.mean + d.half < 0]
    listed = "; ".join(f"{weights_text(w)}: {d}" for w, d in found.items())
    return (
        f"J of MOD less J of {other}, seed by seed ({listed}): MOD is ahead beyond the interval at {len(ahead)} of "
        f"{len(found)} weights, {other} at {len(behind)}."
    )


def _raw_rewards(rows: list[Row]) -> str:
    half, parts = (0.5, 0.5), []
    for method in (MOD, MERGE, PROBABILITIES):
        row = find(rows, method, half)
        assert row is not None
        parts.append(f"{method} {row.weighted.mean().item():+.2f} at {row.kl.mean().item():.2f} nats")
    return (
        f"Weighted reward alone, at {weights_text(half)}: {'; '.join(parts)}. It favours whoever goes further from the "
        "base, which is why J is compared."
    )


def _symmetry(rows: list[Row]) -> str:
    half = (0.5, 0.5)
    turned = next(row for row in rows if row.method.startswith(MERGE) and row.method != MERGE)
    plain = find(rows, MERGE, half)
    assert plain is not None
    return (
        "Writing policy 2 in other coordinates (MLP units permuted and sign-flipped, queries and keys negated) leaves "
        f"its outputs and so MOD as they are; J of merging at .5, .5 goes from {Estimate.of(plain.objective)} to "
        f"{Estimate.of(turned.objective)}. Merging needs policies that share a start; MOD needs a shared tokenizer."
    )


def _averaging(averaging: tuple[float, bool]) -> str:
    difference, same = averaging
    return (
        "Logit averaging is MOD under reverse KL where the weights sum to one, so it has no row of its own; computed "
        f"by hand it differs by {difference:.1e} at most in a log-probability, and the tokens are "
        f"{'the same' if same else 'not all the same (rounding at a tie)'}."
    )


def _speed(context: Context, speed: Speed) -> list[str]:
    ours, theirs = "llmkern", "Hugging Face chain"
    sizes, build = context.settings.speed, _library.cpu_build
    return [
        f"Sampling (temperature, top-k, top-p) in one decode loop of two models, batch {sizes.batch}, vocabulary "
        f"{context.corpus.tokenizer.get_vocab_size()}: {speed.loop_tokens[ours]:.0f} tokens/s with llmkern "
        f"({speed.loop_share[ours]:.0%} of the time in the sampler), {speed.loop_tokens[theirs]:.0f} with the Hugging "
        f"Face chain ({speed.loop_share[theirs]:.0%}).",
        f"One call at a real vocabulary ({sizes.models} models, batch {sizes.micro_batch}, {sizes.vocabulary} tokens, "
        f"bfloat16): {1e3 * speed.call_seconds[ours]:.2f} ms against {1e3 * speed.call_seconds[theirs]:.2f} ms, ratio "
        f"{speed.call_seconds[theirs] / speed.call_seconds[ours]:.1f}; kernels in use: "
        f"{build.isa or 'torch references'}.",
    ]
