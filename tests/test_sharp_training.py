"""Warmup and fine-tuning of shared MLPs: each lowers its loss, resumes to the same bits, refuses what is bad."""

import copy
import errno
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from shared_models import GROUPS, logits, model_of, refusal
from tiny_models import EOS, WORDS, word_tokenizer

from llmkern.demo.cache import Cache
from llmkern.integrations import shared_mlp
from llmkern.papers.sharp import finetuning, text, warmup
from llmkern.papers.sharp.conversion import convert
from llmkern.papers.sharp.evaluate import mean_loss, write_samples

STEPS = warmup.WarmupSettings(steps=40, tokens=64, evaluate_every=20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def original():
    return model_of()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, WORDS, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(original, ids, tmp_path):
    return warmup.TeacherCache(tmp_path / "cache", original, ids, (2, 3, 5), shard_rows=4)


def factors(model):
    return {name: t.clone() for name, t in model.state_dict().items() if ".lora_" in name}


def test_warmup_lowers_every_layers_error(original, ids, teacher):
    model = convert(original, GROUPS, rank=12, init="svd")
    before = mean_loss_against(original, model, ids)
    histories = warmup.warm_up(model, teacher, STEPS)
    assert sorted(histories) == [2, 3, 5]
    for history in histories.values():
        assert [step for step, _ in history] == [0, 20, 40]
        assert history[-1][1] < 0.9 * history[0][1]
    assert mean_loss_against(original, model, ids) < before
    # What it minimises is the distance between the two MLPs on what the layer gets in the original.
    x, y = teacher.read(5, 3)
    mlp = model.model.layers[3].mlp
    found = float(((mlp(x) - y).square().mean() / y.square().mean()).detach())
    assert found == pytest.approx(histories[3][-1][1])
    torch.testing.assert_close(original.model.layers[3].mlp(x), y)


def part_that_moves(model, run):
    """Of bfloat16 factors under 40 steps of Adam of 1e-4, a fraction of what they resolve; the rest are as before."""
    before = factors(model)
    run()
    after = factors(model)
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    return sum(int((t != before[name]).sum()) for name, t in after.items()) / sum(t.numel() for t in after.values())


def test_half_precision_is_warmed_up_in_float32(device, original, ids, tmp_path):
    half = copy.deepcopy(original).to(device, torch.bfloat16)
    teacher = warmup.TeacherCache(tmp_path, half, ids.to(device), (2, 3, 5), shard_rows=4)
    model = convert(half, GROUPS, rank=4, init="svd")
    assert part_that_moves(model, lambda: warmup.warm_up(model, teacher, replace(STEPS, learning_rate=1e-4))) > 0.5


def test_pre_activations_are_kept_while_a_layer_is_warmed_up_and_at_no_other_time(original, teacher, monkeypatch):
    kept, real = [], shared_mlp.shared_lora_mlp

    def watch(x, *args, keep=False, **options):
        kept.append(keep)
        return real(x, *args, keep=keep, **options)

    monkeypatch.setattr(shared_mlp, "shared_lora_mlp", watch)
    found = []
    for keeping in (warmup.keeping, nullcontext):
        monkeypatch.setattr(warmup, "keeping", keeping)
        model = convert(original, GROUPS, rank=4)
        warmup.warm_up(model, teacher, STEPS, layers=[3])
        found.append(factors(model))
        assert all(kept) == (keeping is not nullcontext)
        kept.clear()
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
    logits(model, torch.arange(3, 9)[None])
    assert kept
    assert not any(kept)


def mean_loss_against(original, model, ids):
    return float((logits(model, ids) - logits(original, ids)).square().mean())


def test_layers_are_independent_and_resume_to_the_same_bits(original, teacher, tmp_path, monkeypatch):
    whole = convert(original, GROUPS, rank=4)
    warmup.warm_up(whole, teacher, STEPS)
    parts, work = convert(original, GROUPS, rank=4), Cache(tmp_path / "work", 0.0)
    warmup.warm_up(parts, teacher, STEPS, work, layers=[5])

    def stop(*args):
        raise KeyboardInterrupt

    steps = []

    def draw(teacher, layer, settings, step, real=warmup._draw):
        steps.append((layer, step))
        return stop() if len(steps) == 30 else real(teacher, layer, settings, step)

    monkeypatch.setattr(warmup, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        warmup.warm_up(convert(original, GROUPS, rank=4), teacher, STEPS, work)
    assert steps[-1] == (2, 29)
    again = convert(original, GROUPS, rank=4)
    steps.extend([None] * 100)
    warmup.warm_up(again, teacher, STEPS, work)
    # The step that was stopped is the first, and layer 5 was done before.
    assert steps[130:] == [(2, step) for step in range(29, 40)] + [(3, step) for step in range(40)]
    wanted = factors(whole)
    assert all(torch.equal(t, wanted[name]) for name, t in factors(again).items())
    assert not list((tmp_path / "work").glob("*.partial*"))


def test_teacher_files_are_whole_and_found_again(original, ids, teacher, tmp_path, monkeypatch):
    teacher.fill()
    paths = sorted(teacher.folder.iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.safetensors" for i in range(6)]
    assert sum(path.stat().st_size for path in paths) - teacher.nbytes < 6 * 1000
    paths[2].unlink()
    made = []
    real = warmup.watch_mlps
    monkeypatch.setattr(warmup, "watch_mlps", lambda *args: (made.append(1), real(*args)))
    again = warmup.TeacherCache(tmp_path / "cache", original, ids, (5, 3, 2), shard_rows=4)
    again.fill()
    assert (again.folder, len(made)) == (teacher.folder, 1)
    other = warmup.TeacherCache(tmp_path / "cache", original, ids + 1, (2, 3, 5), shard_rows=4)
    assert other.folder != teacher.folder
    paths[3].write_bytes(b"half")
    assert "it makes the file anew" in refusal(again.read, 3, 2)
    again.fill()
    assert len(again.read(3, 2)[0]) == 64


def test_full_disk_is_a_sentence(original, ids, teacher, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(warmup.shutil, "disk_usage", lambda _: usage)
    found = refusal(teacher.fill)
    assert f"expected {teacher.nbytes} bytes of free disk under" in found
    assert "got 10 bytes" in found
    sizes = (999_999, 1_000_000, 12_345_678_900)
    assert [warmup._size(size) for size in sizes] == ["999999 bytes", "1.00 MB", "12.35 GB"]
    monkeypatch.undo()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "expected space on the disk, got none left" in refusal(teacher.fill)
    assert not list(teacher.folder.iterdir())


def test_warmup_refusals(original, ids, teacher, tmp_path):
    model = convert(original, GROUPS, rank=2)
    known = "expected layers among those with factors and outputs of the original"
    assert f"{known}, [2, 3, 5], got [4]" in refusal(warmup.warm_up, model, teacher, STEPS, layers=[4])
    uneven = convert(original, GROUPS, rank={"up_proj": 2})
    uneven.model.layers[2].mlp.up_proj = None
    assert f"{known}, [3, 5], got [2]" in refusal(warmup.warm_up, uneven, teacher, STEPS, layers=[2, 3])
    bare = convert(original, GROUPS, rank=0)
    assert "a model with factors, got one without any" in refusal(warmup.warm_up, bare, teacher, STEPS)
    assert "more than 16 rows of text, got 8" in refusal(warmup.TeacherCache, tmp_path, original, ids[:8], (2,))


# Fine-tuning ----------------------------------------------------------------------------------------------------------

SETTINGS = finetuning.FinetuneSettings(steps=12, batch=4, log_every=4, save_every=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def examples(ids):
    rows = [torch.arange(3, 19).roll(i).tolist() for i in range(16)]
    return [text.Example(row[: 16 - i % 3], i % 5) for i, row in enumerate(rows)]


@pytest.mark.parametrize("trl", [False, True])
def test_finetuning_learns_and_leaves_the_base(original, examples, tmp_path, trl):
    if trl:
        pytest.importorskip("trl")
    model = convert(original, GROUPS, rank=4)
    base = {name: t.clone() for name, t in model.state_dict().items() if ".lora_" not in name}
    settings = replace(SETTINGS, trl=trl, answer_only=True, gradient_checkpointing=not trl)
    history = finetuning.finetune(
        model, examples, tmp_path, settings, held_out=examples[:4], tokenizer=word_tokenizer()
    )
    assert [step for step, *_ in history] == [4, 8, 12]
    assert history[-1][1] < history[0][1]
    assert history[-1][2] < history[0][2]
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in base.items())
    (used,) = tmp_path.glob("*/checkpoint-12/training_args.bin")
    arguments = torch.load(used, weights_only=False)
    assert type(arguments).__name__ == ("SFTConfig" if trl else "TrainingArguments")
    assert arguments.gradient_checkpointing is not trl


@pytest.mark.parametrize("answer_only", [False, True])
def test_what_finetuning_minimises(original, ids, tmp_path, answer_only):
    """Cross entropy of all tokens but the first, or of those of answers alone; a rate of nothing leaves it as it is."""
    model = convert(original, GROUPS, rank=4, init="svd")
    examples = [text.Example(row.tolist(), 10) for row in ids[:16]]
    settings = replace(SETTINGS, steps=4, learning_rate=1e-12, answer_only=answer_only)
    ((_, trained, held_out),) = finetuning.finetune(model, examples, tmp_path, settings, held_out=examples)
    first = 9 if answer_only else 0
    losses = torch.nn.functional.cross_entropy(logits(model, ids[:16])[:, :-1].mT, ids[:16, 1:], reduction="none")
    assert [trained, held_out] == pytest.approx([losses[:, first:].mean().item()] * 2, abs=2e-4)


def test_half_precision_is_fine_tuned_in_float32(original, examples, tmp_path):
    model = convert(copy.deepcopy(original).bfloat16(), GROUPS, rank=4, init="svd")
    settings = replace(SETTINGS, steps=40, learning_rate=1e-4, log_every=40, save_every=40)
    assert part_that_moves(model, lambda: finetuning.finetune(model, examples, tmp_path, settings)) > 0.5
    assert all(p.grad is None for p in model.parameters())


def test_finetuning_resumes_and_skips_a_half_written_checkpoint(original, examples, tmp_path):
    """To the same bits, a finished run too, of which the Trainer would take one step more."""
    straight = convert(original, GROUPS, rank=4)
    finetuning.finetune(straight, examples, tmp_path, SETTINGS)
    (out,) = tmp_path.iterdir()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    wanted = factors(straight)
    for whole, steps in ((True, range(9, 13)), (False, range(1, 13))):
        if not whole:
            state = out / "checkpoint-8" / "trainer_state.json"
            state.write_text(state.read_text()[:40])
        assert finetuning.last_whole_checkpoint(out, 12) == (str(out / "checkpoint-8") if whole else None)
        again, seen = convert(original, GROUPS, rank=4), {}
        history = finetuning.finetune(again, examples, tmp_path, SETTINGS, show=seen.__setitem__)
        assert list(seen) == list(steps)
        assert [step for step, *_ in history] == [4, 8, 12]
        assert all(torch.equal(t, wanted[name]) for name, t in factors(again).items())


def test_finetuning_refusals(original, examples, tmp_path):
    bare = convert(original, GROUPS, rank=0)
    assert "a model with parameters to train" in refusal(finetuning.finetune, bare, examples, tmp_path, SETTINGS)
    model, unknown = convert(original, GROUPS, rank=2), [*examples, text.Example([5, WORDS], 0)]
    assert "token ids from 0 to 95, got 5 to 96" in refusal(finetuning.finetune, model, unknown, tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_labels_and_padding():
    example = text.Example([5, 6, 7, 8], 2)
    assert example.labels(answer_only=True) == [-100, -100, 7, 8]
    assert example.labels(answer_only=False) == [5, 6, 7, 8]
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    batch = finetuning.collate(rows)
    assert batch["labels"].tolist() == [[5, 6, -100], [-100, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_texts(tmp_path):
    tokenizer = word_tokenizer()
    (tmp_path / "a.jsonl").write_text('{"prompt": "w5 w6", "completion": " w7"}\n\n{"text": "w8 w9 w10"}\n')
    (tmp_path / "b.txt").write_text("w4 w5\nw6 w7 w8")
    examples = text.read_examples("sharp", tokenizer, [tmp_path / "a.jsonl", tmp_path / "b.txt"], 4)
    assert [(e.ids, e.prompt) for e in examples] == [([5, 6, 7, 2], 2), ([8, 9, 10], 0), ([4, 5, 6, 7], 0)]
    windows = text.read_windows("sharp", tokenizer, [tmp_path / "a.jsonl", tmp_path / "b.txt"], 3)
    assert windows.tolist() == [[5, 6, 7], [8, 9, 10], [4, 5, 6]]
    (tmp_path / "c.jsonl").write_text('{"question": 1}\n')
    assert "got line 1 of" in refusal(text.read_file, "sharp", tmp_path / "c.jsonl")
    assert "at least 99 tokens, got 5" in refusal(text.read_windows, "sharp", tokenizer, [tmp_path / "b.txt"], 99)


def test_loss_and_samples(original, ids):
    wanted = original(input_ids=ids, labels=ids).loss
    assert mean_loss(original, ids, batch_size=5) == pytest.approx(wanted.item(), rel=1e-5)
    words = word_tokenizer()
    found = write_samples(original, words, ["w5 w6 w7", "w9"], 5)
    for prompt, written in zip(("w5 w6 w7", "w9"), found):
        tokens, given = words(prompt)["input_ids"], len(words(prompt)["input_ids"])
        for _ in range(5):
            tokens.append(int(logits(original, torch.tensor([tokens]))[0, -1].argmax()))
        end = tokens.index(EOS) if EOS in tokens else len(tokens)
        assert written == words.decode(tokens[given:end], skip_special_tokens=True)
