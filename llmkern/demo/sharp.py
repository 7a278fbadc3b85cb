"""Section of the demo: layers of the base model share an MLP, and low-rank factors recover what that loses."""

from __future__ import annotations

import html
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmkern.demo.base import Context, progress_bar
from llmkern.demo.report import COLORS, Section, figure_svg, html_table, new_axes
from llmkern.papers.sharp.files import quiet_transformers
from llmkern.papers.sharp.finetuning import FinetuneSettings
from llmkern.papers.sharp.study.rows import Seed, groups_of, make_row, test_windows
from llmkern.papers.sharp.study.settings import BOTH, DIRECT, ORIGINAL, ROWS, Row, StudySettings
from llmkern.papers.sharp.study.tables import IN, Found, closed, perplexities, saved, sentences
from llmkern.papers.sharp.warmup import WarmupSettings

TITLE = "Shared MLPs: one weight for adjacent layers, low-rank recovery"
SHOWN = (ORIGINAL, "original, SFT of as many factors", DIRECT, "SLW", "SFT", BOTH)
HEADER = ("", "MLP saved", "perplexity", "of the gap closed")


def run(context: Context) -> Section:
    quiet_transformers()
    rows = [replace(row, replace=context.settings.sharp.replace) for row in ROWS if row.name in SHOWN]
    seed = _seed(context)
    found: Found = {"rows": {}, "forms": {}, "histories": {"0": context.loss_curve}}
    with progress_bar(context.console, "sharing, warmup and fine-tuning", len(rows)) as show:
        for done, row in enumerate(rows):

            def note(_: int, words: str, done: int = done, row: Row = row) -> None:
                show(done, f"{row.name} {words}")

            found["rows"][row.name] = {"0": make_row(seed, row, note)}
        show(len(rows), "")
    context.console.print(_table(found))
    said = sentences(found)
    return Section(TITLE, said, _body(found, said, groups_of(seed.settings, rows[-1])))


def _seed(context: Context) -> Seed:
    """The study's view of the demo's base model."""
    sizes = context.settings.sharp
    settings = StudySettings(
        context.settings.corpus,
        context.settings.base,
        WarmupSettings(steps=sizes.warm_steps),
        FinetuneSettings(
            steps=sizes.tune_steps,
            batch=sizes.batch,
            learning_rate=sizes.learning_rate,
            log_every=max(1, sizes.tune_steps // 6),
            save_every=sizes.tune_steps,
        ),
        teacher_windows=sizes.teacher_windows,
        test_windows=sizes.test_windows,
    )
    return Seed(
        number=0,
        cache=context.cache,
        console=context.console,
        corpus=context.corpus,
        settings=settings,
        model=context.model,
        key=context.model_key,
        history=context.loss_curve,
        tests=test_windows(context.corpus, settings),
    )


def _cells(found: Found, name: str) -> list[str]:
    share, gap = saved(found, name) or 0.0, closed(found, name)
    shown = f"{100 * gap[0]:.0f} %" if gap and name not in (ORIGINAL, DIRECT) else ""
    return [name, f"{100 * share:.0f} %", f"{perplexities(found, name)[0]:.2f}", shown]


def _table(found: Found) -> Table:
    words = "SLW: the factors of a layer learn what its own MLP gave; SFT: all factors learn the text"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=words)
    for name in HEADER:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name in found["rows"]:
        table.add_row(*_cells(found, name))
    return table


def _body(found: Found, said: list[str], groups: tuple[tuple[int, ...], ...]) -> str:
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    figure, (left, right) = new_axes(2)
    for (name, one), color in zip(list(found["rows"].items())[3:], ("blue", "orange", "green")):
        row = one["0"]
        for layer, history in row.get("warmup", {}).items():
            left.plot(*zip(*history), ".-", color=COLORS[color], label=f"{name}, layer {layer}")
        if "tuning" in row:
            steps, _, losses = zip(*row["tuning"])
            right.plot(steps, losses, ".-", color=COLORS[color], label=name)
    right.axhline(found["rows"][ORIGINAL]["0"]["losses"][IN], color=COLORS["grey"], label=ORIGINAL)
    left.set(xlabel="step", ylabel="relative squared error", yscale="log", title="Single layer warmup")
    right.set(xlabel="step", ylabel="held-out nats per token", title="Fine-tuning")
    left.legend()
    right.legend()
    words = " and ".join(f"layers {', '.join(map(str, group))}" for group in groups)
    return f"""
<p>Adjacent layers use one MLP and keep small factors of their own, W<sub>p</sub> = W + B<sub>p</sub>A<sub>p</sub>
(SHARP, arXiv 2502.07832): here {words} of the base model. In the single layer warmup (SLW) the factors of a layer learn
to give what its own MLP gave; in fine-tuning (SFT) all of them learn the text. Both run through
<code>shared_lora_mlp</code>, forward and backward.</p>
<ul>{listed}</ul>
{html_table(HEADER, [[html.escape(cell) for cell in _cells(found, name)] for name in found["rows"]])}
<p class="note">Perplexity on held-out modules, one seed; the gap is what sharing alone adds to the original's. The
original with factors of the same size and the same fine-tuning says what the training by itself is worth.
<code>llmkern reproduce sharp</code> has more rows, layers and seeds.</p>
<figure>{figure_svg(figure, "sharp")}<figcaption>Left: error of the replaced layer's output on text kept from the
warmup. Right: held-out loss during fine-tuning.</figcaption></figure>"""
