"""The demo in miniature: it runs to a report, keeps what it has done, and goes on where it was killed."""

import copy
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkern.__main__ import main
from llmkern.demo import base
from llmkern.demo.cache import Cache, resumable_steps
from llmkern.demo.mod import evaluate, policies
from llmkern.demo.mod.decode import decode, sample_mod
from llmkern.demo.mod.rewards import call_density, comment_share
from llmkern.demo.settings import FAST
from llmkern.integrations.transformers import MixtureForCausalLM


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(folder: Path) -> list[str]:
    return ["demo", "--fast", "--cache", str(folder / "cache"), "--report", str(folder / "report")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(arguments(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(finished):
    """Context and policies of the finished run, from its cache."""
    console = base.Console(quiet=True)
    cache = Cache(finished / "cache")
    corpus = base.load_corpus(cache, FAST.corpus, console)
    model, key, curve = base.load_base_model(cache, corpus, FAST.base, console)
    context = base.Context(FAST, cache, console, corpus, model, key, curve)
    return context, *policies.load_policies(context)


def stored(folder: Path, stage: str) -> dict:
    (path,) = (folder / "cache").glob(f"{stage}-*.pt")
    return torch.load(path, weights_only=True)


def test_report_stands_alone(finished):
    page = (finished / "report" / "index.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 6
    assert not re.search(r"https?:|<script|<link|src=", page)
    for row in (
        "base model",
        "MOD = logit averaging",
        "merging",
        "probability mean",
        "MOD, forward KL",
        "merging, turned",
    ):
        assert f"<td>{row}</td>" in page, row
    assert "miniature" in page
    assert list((finished / "report").iterdir()) == [finished / "report" / "index.html"]


def test_nothing_half_written_remains(finished):
    names = {path.name.rpartition("-")[0] for path in (finished / "cache").iterdir()}
    rows = {f"row.{i:02d}" for i in range(20)}
    rope = {
        "rope.1",
        *(f"rope.{kind}.{bound}" for kind in ("quality", "time") for bound in ("1", "none")),
        "rope.time.torch",
    }
    selection = {
        "selection.functions",
        *(f"selection.{name}.{seed}" for name in ("code", "digits") for seed in range(2)),
    }
    shared = ("original", "original--SFT-of-as-many-factors", "direct-sharing", "SLW", "SFT", "SLW---SFT")
    sharp = {f"sharp.{row}.0" for row in shared}
    assert names == {"corpus", "base", "scale", "policy.comments", "policy.calls", *rows, *rope, *sharp, *selection}


def test_second_run_makes_nothing_again(finished, monkeypatch, capsys):
    def refuse(*_args):
        raise AssertionError("made again")

    monkeypatch.setattr(base, "_train_base", refuse)
    monkeypatch.setattr(base, "read_text", refuse)
    monkeypatch.setattr(policies, "_tune", refuse)
    monkeypatch.setattr(Cache, "save", refuse)
    first = re.findall(r"<table>.*?</table>", (finished / "report" / "index.html").read_text(), re.DOTALL)
    assert main(arguments(finished)) == 0
    again = re.findall(r"<table>.*?</table>", (finished / "report" / "index.html").read_text(), re.DOTALL)
    # The fourth is the table of speeds, which are measured each time.
    assert len(first) == 8
    assert [*again[:3], *again[4:]] == [*first[:3], *first[4:]]


# Runs the command of its arguments, and is killed while the ninth checkpoint of the base model is being stored.
DYING_RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
from llmkern.__main__ import main
count, replace = 0, os.replace
def dying(source, target):
    global count
    count += "base.partial" in str(target)
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
main(sys.argv[1:])
"""


def test_killed_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch):
    cache, step = tmp_path / "cache", 8
    died = subprocess.run([sys.executable, "-c", DYING_RUN, *arguments(tmp_path)], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    (partial,) = cache.glob("base.partial-*.pt")
    assert torch.load(partial, weights_only=True)["step"] == step
    assert not list(cache.glob("base-*.pt"))

    console = base.Console(quiet=True)
    seen = []

    def counting(*args):
        for number in resumable_steps(*args):
            seen.append(number)
            yield number

    monkeypatch.setattr(base, "resumable_steps", counting)
    corpus = base.load_corpus(Cache(cache), FAST.corpus, console)
    base.load_base_model(Cache(cache), corpus, FAST.base, console)
    assert seen == list(range(step, FAST.base.steps))
    assert not list(cache.glob("base.partial-*"))
    straight, resumed = stored(finished, "base"), stored(tmp_path, "base")
    assert resumed["history"] == straight["history"]
    for name, value in straight["model"].items():
        assert torch.equal(resumed["model"][name], value), name


def test_damaged_file_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.save("stage", "key", {"x": torch.arange(3)})
    path = cache.path("stage", "key")
    path.write_bytes(path.read_bytes()[:50])
    assert cache.load("stage", "key") is None
    assert cache.remember("stage", "key", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]


def test_fresh_removes_only_what_the_cache_wrote(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    cache = Cache(tmp_path)
    cache.save("stage", "key", {})
    cache.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bad_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--cache", str(tmp_path / "taken")]) == 2
    error = capsys.readouterr().err
    assert "expected a folder that can be written" in error
    assert error.count("\n") == 1


def test_objectives():
    text = "f(x)  # g(y)\nh[0](1)(2)\n(3)\n"
    assert comment_share(text) == len("#g(y)") / len("".join(text.split()))
    assert call_density(text) == 100 * 3 / len(text)
    assert comment_share("") == call_density("") == 0


def test_held_out_modules_are_whole(tuned):
    train, held_out = base.read_text(FAST.corpus)
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    context = tuned[0]
    assert context.corpus.tokenizer.decode(context.corpus.held_out[:200].tolist()) in "".join(held_out)


def test_gradient_is_that_of_the_objective():
    """Against the exact gradient, summed over all continuations of a model with three tokens."""
    settings = base.BaseSettings(hidden=8, layers=1, heads=1, mlp=8, context=8)
    start = base.new_model(settings, 3).double().eval()
    policy = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    everything = torch.cartesian_prod(*[torch.arange(3)] * 2)
    prompt = torch.tensor([[1, 2]])
    reward, beta = torch.randn(9).double(), 0.7

    def log_probs(model, prompts, tokens):
        rows = policies.continuation_log_probs(model, prompts, tokens)
        return rows.gather(-1, tokens[..., None]).squeeze(-1).sum(-1)

    prompts = prompt.expand(9, -1)
    ours, theirs = log_probs(policy, prompts, everything), log_probs(start, prompts, everything).detach()
    exact = torch.autograd.grad(-(ours.exp() * (reward - beta * (ours - theirs))).sum(), policy.parameters())

    # The mean over all pairs of continuations, as likely as the policy makes them, with a c_t that looks back only.
    probability = ours.detach().exp()
    earned = torch.stack([torch.zeros(9), everything[:, 0] * 0.4], 1).double()
    mean = [torch.zeros_like(g) for g in exact]
    for i in range(9):
        for j in range(9):
            pair = torch.tensor([i, j])
            loss, _ = policies.negative_objective(
                policy, start, prompt.expand(2, -1), everything[pair], reward[pair, None] - earned[pair], 2, beta
            )
            for total, part in zip(mean, torch.autograd.grad(loss, policy.parameters())):
                total += probability[i] * probability[j] * part
    for found, wanted in zip(mean, exact):
        # The norms of a Llama compute in float32 whatever its dtype.
        torch.testing.assert_close(found.float(), wanted.float())


def test_turned_policy_is_the_same_function(tuned):
    context, (_, second), *_ = tuned
    ids = base.windows(context.corpus.held_out, 3, 20, seed=0)
    turned = evaluate.turn(copy.deepcopy(second).double(), seed=3)
    torch.testing.assert_close(turned(ids).logits.float(), copy.deepcopy(second).double()(ids).logits.float())
    assert not torch.equal(turned.model.layers[0].mlp.up_proj.weight.float(), second.model.layers[0].mlp.up_proj.weight)


def test_merge_at_the_corners_and_outside(tuned):
    context, pair, *_ = tuned
    name = "model.layers.0.mlp.up_proj.weight"
    first, second, start = (m.get_parameter(name) for m in (*pair, context.model))
    assert not torch.equal(first, second)
    expected = {(1.0, 0.0): first, (0.5, 0.5): (first + second) / 2, (1.0, 1.0): first + second - start}
    for weights, wanted in expected.items():
        torch.testing.assert_close(evaluate.merge(pair, weights, context.model).get_parameter(name), wanted)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_rows_decode_as_generate_does(tuned, divergence):
    """What the table measures is what a user of MixtureForCausalLM gets."""
    context, pair, *_ = tuned
    weights = [0.25, 0.75]
    prompts = base.windows(context.corpus.held_out, 3, 16, seed=5)
    seeds = torch.arange(3)
    loop = decode([*pair, context.model], prompts, 10, sample_mod(weights, divergence), seeds).tokens
    mixture = MixtureForCausalLM(pair, weights=weights, reference=context.model, divergence=divergence)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "attention_mask": torch.ones_like(prompts)}
    assert torch.equal(mixture.generate(prompts, seed=seeds, **options)[:, 16:], loop)


def test_kl_of_a_row(tuned):
    """The sum over steps is the expected log-ratio: exactly zero for the base, and its average over draws otherwise."""
    context, pair, *_ = tuned
    prompts = base.windows(context.corpus.held_out, 1, 16, seed=6).expand(400, -1)
    models = [pair[0], pair[0], context.model]
    found = decode(models, prompts, 4, sample_mod([0.5, 0.5]), torch.arange(400))
    ours, theirs = (policies.continuation_log_probs(m, prompts, found.tokens) for m in (pair[0], context.model))
    drawn = (ours - theirs).gather(-1, found.tokens[..., None]).sum((1, 2))
    assert found.kl.mean() > 0
    assert abs(drawn.mean() - found.kl.mean()) < 4 * drawn.std() / 20
    base_only = decode([context.model], prompts[:2], 4, evaluate.sample_one(0), torch.arange(2))
    torch.testing.assert_close(base_only.kl, torch.zeros(2))
