"""The text that a checkpoint writes, piece by piece, and what is refused."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs import language_model, smnist
from experiments import checkpoint, commandline, generate, setup
from ssm import generation, pretrained
from ssm.language_model import LanguageModel

PROMPT = "hello 日本"
END = "<|end|>"


def write_tokenizer(file):
    """Byte-level BPE: the 256 bytes, a special token, and three merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(["hello hello"], trainer)
    tokenizer.save(str(file))
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mamba of 264 tokens, four more than its tokenizer has."""
    folder = tmp_path_factory.mktemp("published") / "mamba"
    model = LanguageModel(vocabulary=264, width=8, depth=1, pattern="mamba", mixers={"mamba": dict(state_size=2)})
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    variables["params"]["embedding"]["embedding"] *= 50  # so that texts differ
    pretrained.save(folder, pretrained.export(model, variables))
    write_tokenizer(folder / "tokenizer.json")
    return folder


def run(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = commandline.run(generate.main, ["generate", *map(str, arguments)])
    return status, *capsys.readouterr()


def written(folder, **options):
    """Tokens that `ssm.generation` writes after PROMPT, and the tokenizer."""
    model, variables, *_ = pretrained.load(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(PROMPT).ids]
    return generation.generate(model, variables, prompts, **options).tokens_bl[0].tolist(), tokenizer


def test_text(folder, capsys):
    """The prompt, what is written after it, and the speed: another seed or temperature writes something else."""
    arguments = ["--checkpoint", folder, "--prompt", PROMPT, "--max-tokens", 30]
    texts = set()
    for seed, temperature in ((3, 0.7), (4, 0.7), (3, 0.0)):
        status, out, err = run(capsys, *arguments, "--seed", seed, "--temperature", temperature)
        tokens, tokenizer = written(folder, max_tokens=30, temperature=temperature, key=jax.random.key(seed))
        unfinished = "\N{REPLACEMENT CHARACTER}"
        assert status == 0 and out.removesuffix("\n").rstrip(unfinished) == PROMPT + tokenizer.decode(tokens).rstrip(
            unfinished
        )
        assert "prompt: 9 tokens" in err and "new: 30 tokens" in err and err.endswith(" tokens/s\n")
        texts.add(out)
    assert len(texts) == 3


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_characters_are_whole(kind, folder):
    """The last byte of a character brings all of it."""
    text = generate.Bytes() if kind == "bytes" else generate.Tokenizer(folder / "tokenizer.json")
    decode = text.decoder(text.encode("x"))
    pieces = [decode(token) for token in text.encode("é日🙂 !")]
    assert pieces == ["", "é", "", "", "日", "", "", "", "🙂", " ", "!"]


def test_each_piece_is_printed_when_it_is_drawn(folder, capsys, monkeypatch):
    seen = []

    def drawn(*_, **__):
        for token in generate.Tokenizer(folder / "tokenizer.json").encode("a日b"):
            seen.append(capsys.readouterr().out)
            yield np.array([token])

    monkeypatch.setattr(generation, "stream", drawn)
    run(capsys, "--checkpoint", folder, "--prompt", "x")
    assert seen == ["x", "a", "", "", "日"]


@pytest.mark.parametrize("where", ["config", "--stop"])
def test_stop(where, folder, tmp_path, capsys):
    """The first stop token ends the text and is not printed."""
    tokens, tokenizer = written(folder, max_tokens=20, temperature=0.7, key=jax.random.key(0))
    stop = next(token for token in tokens[3:] if len(tokenizer.id_to_token(token)) == 1)
    loaded = pretrained.load(folder)
    if where == "config":
        loaded.config["eos_token_id"] = [stop, 263]
    pretrained.save(tmp_path / "mamba", loaded)
    more = ["--stop", tokenizer.id_to_token(stop)] if where == "--stop" else []
    arguments = ["--checkpoint", tmp_path / "mamba", "--tokenizer", folder / "tokenizer.json", "--prompt", PROMPT]
    status, out, err = run(capsys, *arguments, *more)
    before = tokens[: tokens.index(stop)]
    assert status == 0 and f"new: {len(before) + 1} tokens" in err
    assert out.removesuffix("\n").startswith(PROMPT) and tokenizer.decode(before).startswith(out[len(PROMPT) : -1])


# Runs of experiments.train -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a model of bytes, before its first step."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_bytes(bytes(range(256)) * 8)
    config = language_model.get_config("mamba,smoke")
    config.task.path = str(folder / "text")
    path = folder / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    checkpoint.save(path / "checkpoints", 0, setup.prepare(config).program.new_state(), {}, keep=1)
    return path


def test_run(workdir, capsys):
    status, out, _ = run(capsys, "--checkpoint", workdir, "--prompt", PROMPT, "--max-tokens", 12, "--temperature", 0)
    ready = setup.prepare(ConfigDict(json.loads((workdir / "config.json").read_text())))
    state, _ = checkpoint.restore(workdir / "checkpoints", 0, ready.program.like)
    prompts = [list(PROMPT.encode())]
    tokens = generation.generate(ready.model, {"params": state.params}, prompts, max_tokens=12).tokens_bl[0]
    text = generate.Bytes().decoder([])
    assert status == 0 and out == PROMPT + "".join(text(int(token)) for token in tokens) + "\n"


# Wrong input ---------------------------------------------------------------------------------------

WRONG = {
    "--prompt=": "prompt 0 is empty",
    "--max-tokens=0": "max_tokens is 0; it must be at least 1",
    "--temperature=-1": "temperature is -1.0; it must be 0",
    "--top-p=0": "top_p is 0.0; it must be above 0",
    "--top-k=-2": "top_k is -2; it must be 0",
    "--stop=hello you": "--stop 'hello you' is 6 tokens; it must be one",
    "--stop=": "--stop '' is 0 tokens; it must be one",
    "--tokenizer=nowhere": "nowhere is no tokenizer: No such file or directory (os error 2); name one by --tokenizer",
    f"--tokenizer={__file__}": "test_generate.py is no tokenizer: invalid type",
    "--checkpoint=nowhere": "nowhere is neither a folder nor the name ORG/NAME of a model",
    "--checkpoint=.": "config.json does not exist",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_input(argument, folder, capsys):
    status, out, err = run(capsys, "--checkpoint", folder, "--prompt", "x", argument)
    assert status == 2 and WRONG[argument] in err and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_wrong_runs(workdir, folder, tmp_path, capsys):
    refused = lambda *arguments: run(capsys, "--prompt=x", "--checkpoint", *arguments)  # noqa: E731
    assert "which need no tokenizer" in refused(workdir, "--tokenizer", folder / "tokenizer.json")[2]
    assert "--stop 'ab' is 2 bytes; it must be one" in refused(workdir, "--stop", "ab")[2]
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    status, _, err = refused(tmp_path)
    assert status == 2 and f"error: {tmp_path} has no checkpoint: neither a run's" in err and err.count("\n") == 1


def test_run_of_a_classifier(mnist, tmp_path, capsys):
    config = smnist.get_config("smoke")
    config.task.source, config.task.data_dir = "idx", str(mnist)
    config.batch_size = config.eval_batch_size = 8
    (tmp_path / "config.json").write_text(config.to_json())
    status, _, err = run(capsys, "--checkpoint", tmp_path, "--prompt=x")
    assert status == 2 and err == f"error: {tmp_path} is a run of task smnist, whose model writes no text\n"
