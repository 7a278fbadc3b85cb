"""``llmkern mod`` and the directories it reads."""

import csv
import json
import shutil

import pytest
import torch
from tiny_models import EOS, llama, save, word_tokenizer

import llmkern
from llmkern.__main__ import main
from llmkern.integrations.transformers import MixtureForCausalLM
from llmkern.papers.mod import sweep as sweep_module
from llmkern.papers.mod.sweep import simplex


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [str(save(root / f"model{seed}", seed, vocabulary=96 + 8 * seed)) for seed in range(3)]


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of a good directory, to be spoilt."""
    return shutil.copytree(folders[1], tmp_path / "broken")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("w20 w31 w7\n\nw5\nw44 w45 w46 w47 w48\n")
    return path


def run(capsys, *arguments):
    """Exit status, stdout and stderr of the command line."""
    try:
        status = main(["mod", *map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    return err.strip().rsplit("\n", 1)[-1]


# Directories ----------------------------------------------------------------------------------------------------------


def test_loaded_mixture_equals_the_models(folders):
    mixture = MixtureForCausalLM.from_pretrained(folders[:2], [0.6, 0.4], reference=folders[2], divergence="jsd")
    ids = mixture.tokenizer("w20 w31 w7", return_tensors="pt")["input_ids"]
    direct = MixtureForCausalLM([llama(0), llama(1, 104)], [0.6, 0.4], reference=llama(2, 112), divergence="jsd")
    assert torch.equal(mixture.generate(ids, max_new_tokens=8), direct.generate(ids, max_new_tokens=8))


def test_a_longer_tokenizer_fits(folders, tmp_path):
    longer = save(tmp_path / "longer", 1, tokenizer=word_tokenizer(extra=5), vocabulary=104)
    mixture = MixtureForCausalLM.from_pretrained([folders[0], longer])
    assert mixture.config.vocab_size == 96


def load_error(*directories, **options):
    with pytest.raises((ValueError, TypeError)) as caught:
        MixtureForCausalLM.from_pretrained(list(directories), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("MixtureForCausalLM: expected ")
    return text


def test_refused_directories(folders, tmp_path):
    expected = "expected models[1] to be a directory with config.json, *.safetensors and tokenizer files, got "
    absent = tmp_path / "nowhere"
    assert f"{expected}{absent}, which is absent; check the path" in load_error(folders[0], absent)
    file = tmp_path / "file"
    file.write_text("")
    assert f"{expected}{file}, which is a file" in load_error(folders[0], file)
    empty = tmp_path / "empty"
    empty.mkdir()
    message = load_error(folders[0], empty)
    assert f"{expected}{empty} without config.json and *.safetensors and tokenizer.json; save the model" in message
    assert "expected reference to be a directory" in load_error(folders[0], reference=str(absent))
    with pytest.raises(TypeError, match="models as a list of directories, got"):
        MixtureForCausalLM.from_pretrained(folders[0])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_refused_without_a_file(folders, broken, missing):
    (broken / missing).unlink()
    shown = "*.safetensors" if missing.startswith("model") else missing
    assert f"got {broken} without {shown};" in load_error(folders[0], broken)


def test_pickled_weights_are_not_read(folders, broken):
    (broken / "model.safetensors").unlink()
    torch.save(llama(1, 104).state_dict(), broken / "pytorch_model.bin")
    assert "without *.safetensors" in load_error(folders[0], broken)


@pytest.mark.parametrize("keep", [0, 7, 4000], ids=["empty", "in the length", "in the weights"])
def test_refused_truncated_weights(folders, broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"expected models[1] to hold a readable model, got {broken}: " in load_error(folders[0], broken)


@pytest.mark.parametrize(
    ("file", "what", "text"),
    [
        ("config.json", "config.json", "{"),
        ("config.json", "config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        ("config.json", "config.json", '{"model_type": "a made-up one"}'),
        ("tokenizer.json", "tokenizer", "{}"),
    ],
)
def test_refused_corrupt_text(folders, broken, file, what, text):
    (broken / file).write_text(text)
    message = load_error(folders[0], broken)
    assert f"expected models[1] to hold a readable {what}, got {broken}: " in message


def test_refused_config_of_other_shapes(folders, broken):
    (broken / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    expected = "expected lm_head.weight of models[1] to have the shape (32000, 64) of its config.json, got ("
    message = load_error(folders[0], broken)
    assert expected in message
    assert message.endswith(f"in {broken}; save it anew")


def test_refused_missing_weights(folders, broken):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = load_error(folders[0], broken)
    assert f"every weight of its model, got {broken} without 1 of them, the first model.norm.weight" in message


def test_refused_other_tokenizer(folders, tmp_path):
    other = save(tmp_path / "other", 1, tokenizer=word_tokenizer(swap=True))
    expected = (
        f"hold the tokenizer of models[0] ({folders[0]}), got id 10 as 'w11' in place of 'w10'; mix models of one"
    )
    assert f"expected models[1] ({other}) to {expected}" in load_error(folders[0], other)
    assert f"expected reference ({other}) to {expected}" in load_error(folders[0], folders[1], reference=other)


# Generate -------------------------------------------------------------------------------------------------------------


def test_generate_streams_what_the_mixture_writes(folders, capsys, prompts):
    models = ["--model", folders[0], "--model", folders[1], "--weights=-0.5,1.5", "--max-new-tokens", 6]
    mixture = MixtureForCausalLM.from_pretrained(folders[:2], [-0.5, 1.5])

    def text(prompt, **options):
        ids = mixture.tokenizer(prompt, return_tensors="pt")["input_ids"]
        return mixture.tokenizer.decode(mixture.generate(ids, max_new_tokens=6, **options)[0], skip_special_tokens=True)

    status, out, err = run(capsys, "generate", *models, "--prompt", "w20 w31", "--temperature", 0)
    assert (status, out.strip()) == (0, text("w20 w31"))
    assert "tokens/s" in err

    sampling = ["--temperature", 1.5, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.001, "--seed", 7]
    status, out, _ = run(capsys, "generate", *models, "--prompt-file", prompts, *sampling)
    filters = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.001}
    lines = [line for line in prompts.read_text().splitlines() if line]
    assert status == 0
    assert out.split() == " ".join(text(line, seed=[7 + i], **filters) for i, line in enumerate(lines)).split()


def test_generate_with_reference_and_prefix(folders, capsys):
    call = ["generate", "--model", folders[0], "--model", folders[1], "--prompt", "w20", "--max-new-tokens", 5]
    options = ["--divergence", "alpha", "--alpha", 0.5, "--reference", folders[2], "--prefix", "--temperature", 0]
    status, out, _ = run(capsys, *call, *options)
    mixture = MixtureForCausalLM.from_pretrained(
        folders[:2], reference=folders[2], divergence="alpha", alpha=0.5, prefix=True
    )
    ids = mixture.tokenizer("w20", return_tensors="pt")["input_ids"]
    expected = mixture.tokenizer.decode(mixture.generate(ids, max_new_tokens=5)[0], skip_special_tokens=True)
    assert (status, out.strip()) == (0, expected)


def test_refused_arguments(folders, capsys, tmp_path):
    base = ["generate", "--model", folders[0], "--model", folders[1], "--prompt", "w20"]

    def error(*arguments):
        return refused(capsys, *base, *arguments)

    assert error("--weights", "1") == ("mod generate: expected --weights with 2 numbers, one per --model, got 1")
    assert "argument --weights: expected finite numbers with commas between, such as .5,.5, got 'a,b'" in error(
        "--weights", "a,b"
    )
    assert "--weights: expected weights that are not all zero, got '0,0'" in error("--weights", "0,0")
    assert "argument --top-p: expected a number in (0, 1], got '0'" in error("--top-p", "0")
    assert "argument --min-p: expected a number in [0, 1], got '2'" in error("--min-p", "2")
    assert "argument --temperature: expected a number of at least 0, got '-1'" in error("--temperature=-1")
    assert "argument --temperature: expected a number of at least 0, got 'nan'" in error("--temperature", "nan")
    assert "argument --top-k: expected a whole number of at least 0, got '1.5'" in error("--top-k", "1.5")
    assert "argument --max-new-tokens: expected a whole number of at least 1, got '0'" in error("--max-new-tokens", "0")
    assert "argument --divergence: invalid choice: 'kl'" in error("--divergence", "kl")
    assert "expected reference with divergence='jsd'" in error("--divergence", "jsd")
    assert "expected alpha in (0, 1] with divergence='alpha', got None" in error("--divergence", "alpha")
    assert "mod generate: expected --device to be auto or a device of this machine, got 'tpu9'" in error(
        "--device", "tpu9"
    )
    assert "at most 64 tokens, the context of the models, got 1 of prompt and 64 of --max-new-tokens" in error()
    absent = tmp_path / "absent"
    assert (
        f"expected models[2] to be a directory with config.json, *.safetensors and tokenizer files, got {absent}"
        in error("--model", absent)
    )
    assert "expected --prompt or --prompt-file, got neither" in refused(capsys, "generate", "--model", folders[0])
    assert "expected prompts of at least one token, got ''" in refused(
        capsys, "generate", "--model", folders[0], "--prompt", ""
    )
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    one = ["generate", "--model", folders[0], "--prompt-file"]
    assert f"expected --prompt-file to hold at least one prompt, got {blank} without any" in refused(
        capsys, *one, blank
    )
    assert f"one prompt a line, got {absent}: No such file or directory" in refused(capsys, *one, absent)
    blank.write_bytes(b"\xff\xfe\x00")
    assert "expected --prompt-file to be a text file in UTF-8" in refused(capsys, *one, blank)


# Sweep ----------------------------------------------------------------------------------------------------------------


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_simplex_grid():
    assert list(simplex(1, 3)) == [(1.0,)]
    assert list(simplex(2, 4)) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    points = list(simplex(3, 5))
    assert len(points) == len(set(points)) == 21
    assert all(min(point) >= 0 and sum(point) == pytest.approx(1) for point in points)


@pytest.mark.parametrize("prefix", [False, True])
def test_sweep_measures_the_text_that_it_writes(folders, capsys, tmp_path, prompts, prefix):
    """One point recomputed from the models: each prompt alone, each token by a look at the whole text before it."""
    out = tmp_path / "out"
    options = ["--reference", folders[2], "--divergence", "jsd", *(["--prefix"] if prefix else [])]
    models = ["--model", folders[0], "--model", folders[1]]
    status, table, _ = run(
        capsys,
        "sweep",
        *models,
        *options,
        "--grid",
        1,
        "--weights=0.7,0.3",
        "--prompts",
        prompts,
        "--out",
        out,
        "--max-new-tokens",
        6,
        "--batch-size",
        2,
        "--seed",
        3,
    )
    rows = read_csv(out / "sweep.csv")
    assert status == 0
    assert "Nats per generated token" in table
    assert [(row["weight_1"], row["weight_2"]) for row in rows] == [("1", "0"), ("0", "1"), ("0.7", "0.3")]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    mixture = MixtureForCausalLM.from_pretrained(folders[:2], reference=folders[2], divergence="jsd", prefix=prefix)
    policies = [*mixture.policies, mixture.reference]
    sums, tokens, texts = torch.zeros(7, dtype=torch.float64), 0, []
    lines = [line for line in prompts.read_text().splitlines() if line]
    weights = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    for i, line in enumerate(lines):
        ids = mixture.tokenizer(line, return_tensors="pt")["input_ids"]
        text = mixture.generate(ids, weights=weights[0], do_sample=True, top_k=0, max_new_tokens=6, seed=[3 + i])[0]
        texts.append(mixture.tokenizer.decode(text[ids.shape[1] :], skip_special_tokens=True))
        carry = torch.zeros(1, 2, dtype=torch.float64)
        for at in range(ids.shape[1], len(text)):
            with torch.no_grad():
                seen = [model(text[None, :at]).logits[:, -1, :96].double().log_softmax(-1) for model in policies]
            mix = llmkern.mix_logits(
                seen[:2], weights, reference=seen[2], divergence="jsd", carry=carry if prefix else None
            )
            said = torch.stack([row[0, text[at]] for row in [mix, *seen]])
            sums += torch.cat([said, torch.stack([(mix.exp() * (mix - row)).sum() for row in seen])])
            carry = carry + said[1:3] - said[3]
            tokens += 1
    row = rows[2]
    names = ["logprob_mix", *(f"{kind}_{name}" for kind in ("logprob", "kl") for name in ("1", "2", "reference"))]
    # The file holds six digits.
    assert [float(row[name]) for name in names] == pytest.approx((sums / tokens).tolist(), rel=1e-5)
    assert int(row["tokens"]) == tokens
    assert json.loads(row["samples"]) == texts
    for name in names[4:]:
        assert float(row[name]) > 0


def test_end_of_text_is_the_last_token_counted():
    tokens = torch.tensor([[5, EOS, EOS, 0], [5, 6, 7, 8], [EOS, 0, 0, 0]])
    counted = sweep_module._until_end(tokens, EOS).sum(-1)
    assert counted.tolist() == [2, 4, 1]
    assert sweep_module._until_end(tokens, [EOS, 6]).sum(-1).tolist() == [2, 2, 1]
    assert sweep_module._until_end(tokens, None).all()


def test_sweep_resumes(folders, capsys, tmp_path, prompts, monkeypatch):
    out = tmp_path / "out"
    call = ["sweep", "--model", folders[0], "--model", folders[1], "--prompts", prompts, "--out", out]
    call += ["--max-new-tokens", 4]
    done = []
    continue_ = sweep_module._continue

    def stop_after_two(mixture, weights, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(weights)
        return continue_(mixture, weights, *rest)

    monkeypatch.setattr(sweep_module, "_continue", stop_after_two)
    status, _, err = run(capsys, *call, "--grid", 4)
    assert (status, "interrupted" in err) == (130, True)
    half = read_csv(out / "sweep.csv")
    assert [row["weight_1"] for row in half] == ["1", "0.75"]

    def count(mixture, weights, *rest):
        done.append(weights)
        return continue_(mixture, weights, *rest)

    done.clear()
    monkeypatch.setattr(sweep_module, "_continue", count)
    status, text, _ = run(capsys, *call, "--grid", 4)
    assert status == 0
    assert done == [(0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    assert "3 of 5 points computed now" in text
    whole = read_csv(out / "sweep.csv")
    assert whole[:2] == half

    done.clear()
    assert run(capsys, *call, "--grid", 2)[0] == 0
    assert done == []
    assert read_csv(out / "sweep.csv") == whole

    fresh = tmp_path / "fresh"
    monkeypatch.setattr(sweep_module, "_continue", continue_)
    assert run(capsys, *[fresh if part == out else part for part in call], "--grid", 4)[0] == 0
    assert read_csv(fresh / "sweep.csv") == whole

    error = refused(capsys, *call, "--grid", 4, "--seed", 1)
    path = out / "sweep.csv"
    assert f"expected {path} to be a sweep of the same models, prompts and options, got rows of others; choose" in error
    path.write_text("a,b\n1,2\n")
    assert "got columns a,b; choose another --out, or remove the file" in refused(capsys, *call)
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "got a file that cannot be read" in refused(capsys, *call)


def test_refused_sweeps(folders, capsys, tmp_path, prompts):
    call = ["sweep", "--model", folders[0], "--model", folders[1], "--prompts", prompts]
    file = tmp_path / "file"
    file.write_text("")
    assert f"mod sweep: expected --out to be a folder that can be made, got {file}" in refused(
        capsys, *call, "--out", file, "--max-new-tokens", 4
    )
    out = ["--out", tmp_path / "out"]
    assert "expected --weights with 2 numbers, one per --model, got 1,0,0" in refused(
        capsys, *call, *out, "--weights", "1,0,0"
    )
    assert "argument --grid: expected a whole number of at least 1, got '0'" in refused(
        capsys, *call, *out, "--grid", 0
    )
    assert "required: --out" in refused(capsys, *call)
    assert "required: action" in refused(capsys)
