"""The section's part of the report: plots, tables, samples."""

from __future__ import annotations

import html
from typing import Any

import torch
from matplotlib.axes import Axes

from llmkern.demo.base import Context
from llmkern.demo.mod.evaluate import BASE, INNER, MERGE, MOD, OUTER, PROBABILITIES, Estimate, Row, find, weights_text
from llmkern.demo.mod.findings import paired
from llmkern.demo.mod.policies import Scale
from llmkern.demo.mod.rewards import OBJECTIVES
from llmkern.demo.mod.samples import Samples
from llmkern.demo.mod.speed import Speed
from llmkern.demo.report import COLORS, figure_svg, html_table, new_axes

LINES = {MOD: ("blue", "o-"), MERGE: ("orange", "s--"), PROBABILITIES: ("green", "^:")}


def histories(context: Context, key: str) -> dict[str, list[list[float]]]:
    """(step, reward, KL) of each policy's tuning."""
    found = {}
    for name in OBJECTIVES:
        made = context.cache.load(f"policy.{name}", key)
        assert made is not None
        found[name] = made["history"]
    return found


def cells(row: Row) -> list[str]:
    """Rewards, KL and J as the tables show them; the base has no weights, hence no J."""
    shown = [str(Estimate.of(row.reward[:, i])) for i in range(2)]
    shown.append(str(Estimate.of(row.kl.abs()))[1:])
    return [*shown, "" if row.method == BASE else str(Estimate.of(row.objective))]


def body(
    context: Context,
    rows: list[Row],
    scale: Scale,
    samples: list[Samples],
    speed: Speed,
    sentences: list[str],
    tuning: dict[str, list[list[float]]],
) -> str:
    settings = context.settings
    seeds, prompts = settings.sweep.seeds, settings.sweep.prompts
    found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"""
<p>Two policies were tuned from the base model towards two objectives that are computed from the text alone and partly
conflict: <b>comments</b>, the share of characters that stand in comments, and <b>calls</b>, opening brackets of calls
per hundred characters outside comments. Each maximised its reward less &beta; = {settings.policy.beta:g} times the KL
divergence from the base. Multi-objective decoding (MOD, arXiv 2406.18853) then mixes their next-token logits with any
weights, without further training.</p>
<h3>What came out</h3><ul>{found}</ul>
<h3>Rewards and divergence</h3>
<p class="note">Rewards are in standard deviations above the mean of the base model (base: {_base_units(scale)}).
J = w &middot; rewards &minus; &beta; KL is what MOD maximises if both policies are optimal and whole sequences are
mixed; here the policies were tuned briefly and the mix is made token by token. KL is in nats per continuation of
{settings.policy.length} tokens. Mean &plusmn; half of the 95 % interval (Student's t) over {seeds} decoding seeds.
A seed changes the random numbers of decoding and nothing else: the {prompts} prompts from held-out modules, base and
policies are the same in all rows, so the intervals say nothing about tuning the policies again. At (1, 0) and (0, 1)
merging and averaging are the policy itself.</p>
{_main_table(rows)}
<figure>{_frontier(rows)}<figcaption>Left: the frontier, with intervals; each line runs from policy 2 (calls) over the
weights &frac14;, &frac12;, &frac34; to policy 1 (comments); the single points are weights outside the simplex. Middle:
J by the weight of comments. Right: weighted reward against the KL that it cost; along a grey line J is constant, so
higher lines are better, and reward alone favours whoever drifts further.</figcaption></figure>
<h3>MOD less the others, seed by seed</h3>{_paired_table(rows)}
<h3>Tuning</h3><figure>{_tuning(tuning)}<figcaption>Reward and KL of the two policies while they were tuned, on their
own samples.</figcaption></figure>
<h3>Samples</h3><p class="note">Drawn by <code>MixtureForCausalLM.generate</code> with temperature 0.8 and top-p 0.95;
the same random numbers everywhere. Grey: the prompt, from a held-out module.</p>{_samples(samples)}
<h3>Speed of the sampler</h3>{_speed_table(context, speed)}
<p class="note">Medians, both in turns in this run. The loop runs two policies whose vocabulary is tiny, so the models
take most of its time; the single call has the shape of a real model's head.</p>"""


def _base_units(scale: Scale) -> str:
    mean, deviation = scale.mean.tolist(), scale.deviation.tolist()
    return (
        f"comments {mean[0]:.2f} ± {deviation[0]:.2f} of the characters, "
        f"calls {mean[1]:.2f} ± {deviation[1]:.2f} per hundred characters"
    )


def _main_table(rows: list[Row]) -> str:
    lines, ruled, previous = [], [], None
    best: dict[tuple[float, float], float] = {}
    for row in rows:
        if row.method != BASE:
            best[row.weights] = max(best.get(row.weights, -torch.inf), row.objective.mean().item())
    for i, row in enumerate(rows):
        shown = cells(row)
        if row.method != BASE and row.objective.mean().item() == best[row.weights] and 0.0 not in row.weights:
            shown[-1] = f"<b>{shown[-1]}</b>"
        weights = "" if row.method == BASE else weights_text(row.weights)
        name = row.method + (" = logit averaging" if row.method == MOD and sum(row.weights) == 1 else "")
        lines.append([html.escape(name), weights, *shown])
        if row.method != previous:
            ruled.append(i)
        previous = row.method
    header = ["method", "weights<br>comments, calls", "comments", "calls", "KL to base", "J"]
    return html_table(header, lines, ruled) + (
        '<p class="note">Bold: the highest J at these weights. The policies were tuned under reverse KL; the '
        "other divergences are shown for their effect, not as optima. Turned: policy 2 written in other coordinates, "
        "with the same outputs.</p>"
    )


def _paired_table(rows: list[Row]) -> str:
    inner = [(w, 1 - w) for w in INNER]
    lines = []
    for weights in [*inner, *OUTER]:
        against = [str(paired(rows, MERGE, weights))]
        against.append(str(paired(rows, PROBABILITIES, weights)) if weights in inner else "not defined")
        lines.append([weights_text(weights), *against])
    return html_table(["weights", f"J of MOD less {MERGE}", f"J of MOD less {PROBABILITIES}"], lines)


def _series(rows: list[Row], method: str) -> list[Row]:
    found = [find(rows, method, (w, 1 - w)) for w in (0.0, *INNER, 1.0)]
    return [row for row in found if row is not None]


def _frontier(rows: list[Row]) -> str:
    figure, (left, middle, right) = new_axes(3, width=12.5, height=4.4)
    for method, (color, style) in LINES.items():
        line = _series(rows, method)
        x, y = ([Estimate.of(row.reward[:, i]) for row in line] for i in range(2))
        objective, kl = ([Estimate.of(value) for value in values] for values in _objective_and_kl(line))
        gained = [Estimate.of(row.weighted) for row in line]
        _errorbars(left, x, y, style, COLORS[color], method)
        _errorbars(middle, [Estimate(r.weights[0], 0) for r in line], objective, style, COLORS[color], method)
        _errorbars(right, kl, gained, style, COLORS[color], method)
        for weights in OUTER:
            row = find(rows, method, weights)
            if row is not None:
                x, y = ([Estimate.of(row.reward[:, i])] for i in range(2))
                _errorbars(left, x, y, style[0], COLORS[color], None)
                if method == MOD:
                    left.annotate(weights_text(weights), (x[0].mean, y[0].mean), (8, 8), textcoords="offset points")
    base = next(row for row in rows if row.method == BASE)
    left.plot(*base.reward.mean(0).tolist(), "D", color=COLORS["grey"], label=BASE)
    right.plot(0, 0, "D", color=COLORS["grey"])
    low, high = right.get_xlim()
    right.set_ylim(right.get_ylim())
    for level in torch.arange(-4, 4, 0.25).tolist():
        right.plot(
            [low, high], [level + rows[0].beta * low, level + rows[0].beta * high], color="#e0e3e8", lw=0.8, zorder=0
        )
    right.set_xlim(low, high)
    left.set(xlabel="comments", ylabel="calls", title="Rewards")
    middle.set(xlabel="weight of comments", ylabel="J", title="Objective J")
    right.set(xlabel="KL to the base (nats)", ylabel="weighted reward", title="Reward against its cost")
    right.grid(False)
    left.legend(loc="best")
    return figure_svg(figure, "frontier")


def _objective_and_kl(line: list[Row]) -> tuple[list[Any], list[Any]]:
    return [row.objective for row in line], [row.kl for row in line]


def _errorbars(axes: Axes, x: list[Estimate], y: list[Estimate], style: str, color: str, label: str | None) -> None:
    axes.errorbar(
        [e.mean for e in x],
        [e.mean for e in y],
        xerr=[e.half for e in x],
        yerr=[e.half for e in y],
        fmt=style,
        color=color,
        label=label,
        markersize=5,
        elinewidth=0.8,
        lw=1.5,
    )


def _tuning(tuning: dict[str, list[list[float]]]) -> str:
    figure, (left, right) = new_axes(2, width=11, height=3.2)
    for (name, history), color in zip(tuning.items(), ("blue", "orange")):
        steps, reward, kl = zip(*history)
        left.plot(steps, reward, color=COLORS[color], label=name)
        right.plot(steps, kl, color=COLORS[color], label=name)
    left.set(xlabel="step", ylabel="own reward", title="Reward")
    right.set(xlabel="step", ylabel="nats per continuation", title="KL to the base")
    left.legend()
    return figure_svg(figure, "tuning")


def _samples(samples: list[Samples]) -> str:
    blocks = []
    for sample in samples:
        given = html.escape(sample.prompt)
        shown = "".join(
            f'<div><h4>{html.escape(title)}</h4><pre><span class="given">{given}</span>{html.escape(text)}</pre></div>'
            for title, text in sample.continuations.items()
        )
        blocks.append(f'<div class="samples">{shown}</div>')
    return "".join(blocks)


def _speed_table(context: Context, speed: Speed) -> str:
    sizes = context.settings.speed
    lines = [
        [
            name,
            f"{speed.loop_tokens[name]:.0f}",
            f"{speed.loop_share[name]:.0%}",
            f"{1e3 * speed.call_seconds[name]:.2f} ms",
        ]
        for name in speed.loop_tokens
    ]
    header = [
        "sampler",
        "loop, tokens/s",
        "of it in the sampler",
        f"one call, {sizes.models} &times; {sizes.micro_batch} &times; {sizes.vocabulary} bf16",
    ]
    return html_table(header, lines)
