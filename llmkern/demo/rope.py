"""Section of the demo: attention in almost linear time on the base model, once its scores are bounded."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from llmkern.demo.base import Context, progress_bar, train_language_model, windows
from llmkern.demo.cache import stage_key
from llmkern.demo.report import COLORS, Section, figure_svg, html_table, new_axes
from llmkern.papers.rope import measure
from llmkern.papers.rope.model import UnitNorm, bound_text, new_model

TITLE = "Almost linear attention: what bounded scores buy"
STYLES = (("blue", "o-"), ("orange", "s--"), ("green", "^:"))


@dataclass
class Measured:
    """One model: its curve of losses while it was tuned, its plan and errors, its times by length."""

    bound: str
    history: list[list[float]]
    quality: dict[str, Any]
    timings: list[dict[str, Any]]


def run(context: Context) -> Section:
    models = {bound: _tuned(context, bound) for bound in context.settings.rope.bounds}
    found, sdpa = _measure(context, models)
    context.console.print(_table(context, found, sdpa))
    sentences = findings(context, found, sdpa)
    return Section(TITLE, sentences, _body(context, found, sdpa, sentences))


def _tuned(context: Context, bound: float) -> tuple[Any, str, list[list[float]]]:
    """The base model with unit queries and keys at temperature B, trained on for a few steps."""
    sizes = context.settings.rope
    training = replace(
        context.settings.base,
        steps=sizes.steps,
        learning_rate=sizes.learning_rate,
        evaluate_every=max(1, sizes.steps // 4),
    )
    key = stage_key(training, context.model_key, bound)
    model = new_model(training, context.corpus.tokenizer.get_vocab_size(), bound)
    # The names of a Llama's weights: unit norms have none of their own.
    assert not list(UnitNorm().parameters())
    stage, title = f"rope.{bound_text(bound)}", f"bounding scores, B = {bound_text(bound)}"
    made = context.cache.load(stage, key)
    if made is None:
        model.load_state_dict(context.model.state_dict())
        arguments = (context.cache, context.corpus, training, context.console, model, stage, key, title)
        made = train_language_model(*arguments)
        context.cache.save(stage, key, made)
        context.cache.remove(f"{stage}.partial", key)
    model.load_state_dict(made["model"])
    return model.eval().requires_grad_(False), key, made["history"]


def _measure(
    context: Context, models: dict[float, tuple[Any, str, list[list[float]]]]
) -> tuple[list[Measured], list[dict[str, Any]]]:
    sizes, cache = context.settings.rope, context.cache
    text = context.corpus.train
    lengths = [n for n in sizes.lengths if n < len(text)]
    held_out = windows(context.corpus.held_out, 1, min(sizes.quality_length, len(context.corpus.held_out) - 1), seed=29)
    every = [(bound_text(bound), *models[bound]) for bound in models]
    every.append(("none", context.model, context.model_key, context.loss_curve))
    found: list[Measured] = []
    sdpa: list[dict[str, Any]] = []
    with progress_bar(context.console, "timing attention", len(lengths) * (1 + len(every))) as show:

        def timed(name: str, key: str, model: Any, n: int, make: Any) -> dict[str, Any]:
            def measured() -> dict[str, Any]:
                return make(_first_head(model, text, n)).plain()

            return cache.remember(f"rope.time.{name}", stage_key(key, n, sizes), measured)

        for label, model, key, history in every:
            done = len(found) * len(lengths)

            def quality(model: Any = model) -> dict[str, Any]:
                return asdict(measure.measure_quality(model, held_out, sizes.rtol))

            stored = cache.remember(f"rope.quality.{label}", stage_key(key, sizes), quality)
            timings = []
            for i, n in enumerate(lengths):
                timings.append(timed(label, key, model, n, lambda heads: measure.time_llmkern(heads, sizes.rtol)))
                show(done + i + 1, f"B = {label}, {n} tokens")
            found.append(Measured(label, history, stored, timings))
        for i, n in enumerate(lengths):
            sdpa.append(timed("torch", every[0][2], every[0][1], n, measure.time_sdpa))
            show(len(found) * len(lengths) + i + 1, f"torch, {n} tokens")
    return found, sdpa


def _first_head(model: Any, text: Tensor, n: int) -> measure.Heads:
    # The first layer's input is the text alone, so no attention has to run to get there.
    return measure.record_attention(model, text[None, :n].long(), layers=1)[0].head(0)


# Words ----------------------------------------------------------------------------------------------------------------


def _header(sdpa: list[dict[str, Any]], narrow: bool = False) -> list[str]:
    """Narrow ones for a terminal of 80 columns."""
    names = ["B", "loss", "degree", "error"] if narrow else ["B", "held-out loss", "degree", "row error"]
    return [*names, *(f"n={t['length']}" if narrow else f"{t['length']} tokens" for t in sdpa)]


def _cells(one: Measured, sdpa: list[dict[str, Any]]) -> list[str]:
    degree = one.quality["degree"]
    shown = [one.bound, f"{one.history[-1][2]:.3f}", str(degree) if degree else "exact"]
    shown.append(f"{one.quality['row_error']:.1e}" if degree else "")
    for ours, torchs in zip(one.timings, sdpa):
        fast = ours["method"] == "polynomial"
        shown.append(f"{torchs['seconds'] / ours['seconds']:.1f}x" if fast else "exact")
    return shown


def _torch_cells(sdpa: list[dict[str, Any]]) -> list[str]:
    return ["torch", "", "", "", *(f"{t['seconds']:.3f} s" for t in sdpa)]


def _table(context: Context, found: list[Measured], sdpa: list[dict[str, Any]]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"rtol {context.settings.rope.rtol:g}; times as fast as torch, forward and backward of one causal head",
    )
    for name in _header(sdpa, narrow=True):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        table.add_row(*_cells(one, sdpa))
    table.add_row(*_torch_cells(sdpa))
    return table


def findings(context: Context, found: list[Measured], sdpa: list[dict[str, Any]]) -> list[str]:
    """What the table says, the cost of the bound included."""
    rtol, base = context.settings.rope.rtol, found[-1]
    sentences = []
    for one in found[:-1]:
        cost = one.history[-1][2] - base.history[-1][2]
        sentence = f"Scores bounded by B = {one.bound}: held-out loss {cost:+.3f} against the base model"
        if one.timings and one.timings[-1]["method"] == "polynomial":
            ours, torchs = one.timings[-1], sdpa[-1]
            sentence += (
                f", and attention {torchs['seconds'] / ours['seconds']:.1f} times as fast as torch's at "
                f"{ours['length']} tokens, in its first head by a polynomial of degree {ours['degree']}"
            )
        if one.quality["degree"]:
            sentence += (
                f"; over all layers the worst row errs by {one.quality['row_error']:.1e} of max|v - o|, certified is "
                f"{rtol:g}"
            )
        sentences.append(f"{sentence}.")
    if base.quality["degree"]:
        sentences.append(
            f"Without a bound scores reach {base.quality['largest_score']:.1f} on this text, and the plan still "
            f"certifies degree {base.quality['degree']}; nothing keeps them there."
        )
    else:
        sentences.append(
            f"Without a bound scores reach {base.quality['largest_score']:.1f}, and attention stays exact; a "
            f"polynomial that is asked for is refused: {base.quality['reason']}."
        )
    return sentences


def _body(context: Context, found: list[Measured], sdpa: list[dict[str, Any]], sentences: list[str]) -> str:
    sizes = context.settings.rope
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    rows = [[html.escape(cell) for cell in _cells(one, sdpa)] for one in found]
    rows.append(_torch_cells(sdpa))
    figure, (left, right) = new_axes(2)
    left.plot(
        [t["length"] for t in sdpa], [t["seconds"] for t in sdpa], ".-", color=COLORS["grey"], label="torch, exact"
    )
    for one, (color, style) in zip(found[:-1], STYLES):
        known = [t for t in one.timings if t["method"] == "polynomial"]
        if known:
            points = [t["length"] for t in known], [t["seconds"] for t in known]
            left.plot(*points, style, color=COLORS[color], label=f"llmkern, B = {one.bound}")
        right.plot(*list(zip(*one.history))[::2], style, color=COLORS[color], label=f"B = {one.bound}")
    right.axhline(found[-1].history[-1][2], color=COLORS["grey"], label="base model, no bound")
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="Forward and backward of one head")
    right.set(xlabel="step of tuning", ylabel="held-out nats per token", title="What the bound costs")
    left.legend()
    right.legend()
    return f"""
<p>With unit queries and keys at a fixed temperature, |score| &le; B. Then <code>rope_attention</code> replaces exp by a
polynomial whose sums over keys need no pairs of tokens, in time almost linear in their number (arXiv 2505.11892,
2412.17316), and certifies for every row that it errs by at most rtol = {sizes.rtol:g} of max|v &minus; o|; where it
cannot, or where that is no faster, attention is exact. The base model was given such scores and trained on for
{sizes.steps} steps; then its first head read the text.</p>
<h3>What came out</h3><ul>{listed}</ul>
{html_table(_header(sdpa), rows, [len(rows) - 1])}
<p class="note">Times as fast as torch's attention, causal, forward and backward, the making of the plan included;
the degree is that of the most demanding layer. Held-out loss in nats per token, after a short tuning: a model trained
with its bound from the start does better (<code>llmkern rope</code>).</p>
<figure>{figure_svg(figure, "rope")}<figcaption>Left: time against the number of tokens. Right: held-out loss while the
base model gets used to its bound.</figcaption></figure>"""
