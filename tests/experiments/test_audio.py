"""Free Spoken Digits and Speech Commands from tiny files in their official layouts."""

import io
import pathlib
import wave

import jax
import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import audio, speech_commands
from tests.experiments.test_cifar import write

GENERATOR = np.random.default_rng(0)


def wav(samples: np.ndarray, rate: int, channels: int = 1, width: int = 2) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.astype(f"<i{width}").tobytes())
    return stream.getvalue()


def samples(count: int) -> np.ndarray:
    return GENERATOR.integers(-3000, 3000, count)


DIGITS = {f"recordings/{d}_{s}_{i}.wav": samples(20 + 3 * d + i) for d in range(10) for s in "ab" for i in range(7)}
COMMANDS = {f"{word}/{i:08x}_nohash_0.wav": samples(9 - i) for word in speech_commands.WORDS for i in range(4)}


def digits(path: pathlib.Path, **changed: bytes | None) -> pathlib.Path:
    content = {name: wav(x, 8000) for name, x in DIGITS.items()} | {
        f"recordings/{k}.wav": v for k, v in changed.items()
    }
    return write(path, {name: x for name, x in content.items() if x is not None})


def commands(path: pathlib.Path, changed: dict[str, bytes | None] | None = None) -> pathlib.Path:
    """Recording 1 of every word validates, recording 2 of most tests."""
    lists = {"validation_list.txt": 1, "testing_list.txt": 2}
    content = {f"./{name}": wav(x, 16000) for name, x in COMMANDS.items()}
    content["./_background_noise_/hum.wav"] = wav(samples(90), 16000)
    content |= {
        f"./{file}": "".join(f"{name}\n" for name in COMMANDS if f"{i:08x}" in name and "zero" not in name).encode()
        for file, i in lists.items()
    }
    content |= {f"./{name}": x for name, x in (changed or {}).items()}
    return write(path, {name: x for name, x in content.items() if x is not None})


def load(name: str, path: pathlib.Path, **fields) -> tasks.Task:
    return tasks.load({"name": name, "data_dir": str(path), **fields})


@pytest.mark.parametrize("kind", ["x", "x.tgz"])
def test_digits_are_split_by_index_and_padded(tmp_path, kind):
    task = load("spoken_digits", digits(tmp_path / kind), validation=0)
    assert (task.examples("train"), task.examples("test"), task.length, task.classes) == (40, 100, 53, 10)
    for split, index in (("train", lambda i: i >= 5), ("test", lambda i: i < 5)):
        names = [name for name in sorted(DIGITS) if index(int(name[-5]))]
        part = task.data[split]
        for row, name in enumerate(names):
            expected = DIGITS[name]
            assert (part.targets[row], part.lengths[row]) == (int(name.split("/")[1][0]), len(expected))
            np.testing.assert_array_equal(part.inputs[row, : len(expected), 0], expected)
            assert not part.inputs[row, len(expected) :].any()
    assert part.inputs.dtype == np.int16 and "Free Spoken Digits from" in task.source and "8,000 Hz" in task.source


def test_half_rate_takes_every_second_sample_and_keeps_the_scale(tmp_path):
    path = digits(tmp_path / "x")
    fields = ({}, {"rate": 4000}, {"length": 21})
    full, half, cut = (load("spoken_digits", path, validation=10, **more) for more in fields)
    assert (full.length, half.length, cut.length) == (53, 27, 21)
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(half.data[split].inputs, full.data[split].inputs[:, ::2])
        np.testing.assert_array_equal(half.data[split].lengths, (full.data[split].lengths + 1) // 2)
        np.testing.assert_array_equal(cut.data[split].inputs, full.data[split].inputs[:, :21])
        np.testing.assert_array_equal(cut.data[split].lengths, np.minimum(full.data[split].lengths, 21))
    assert (half.mean, half.std) == (full.mean, full.std)
    part = full.data["train"]
    real = np.concatenate([row[:n, 0] for row, n in zip(part.inputs, part.lengths, strict=True)])
    np.testing.assert_allclose([*full.mean, *full.std], [real.mean(), real.std()], rtol=1e-6)
    seen = full.preprocess(part.take(np.arange(3)), jax.random.key(0), True)
    np.testing.assert_allclose(seen["inputs"], (part.inputs[:3] - full.mean[0]) / full.std[0], rtol=1e-5, atol=1e-6)
    assert full.examples("train") == 30 and full.examples("validation") == 10


@pytest.mark.parametrize("kind", ["x", "x.tgz"])
def test_commands_are_split_by_the_official_lists(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(speech_commands, "LENGTH", 12)
    task = load("speech_commands", commands(tmp_path / kind))
    assert [task.examples(split) for split in task.splits] == [35 * 4 - 2 * 34, 34, 34]
    assert (task.splits, task.length, task.classes) == (("train", "validation", "test"), 12, 35)
    for split, index in (("validation", 1), ("test", 2)):
        words = [word for word in speech_commands.WORDS if word != "zero"]
        assert [speech_commands.WORDS[i] for i in task.data[split].targets] == words
        expected = np.stack([np.pad(COMMANDS[f"{w}/{index:08x}_nohash_0.wav"], (0, 3 + index)) for w in words])
        np.testing.assert_array_equal(task.data[split].inputs[..., 0], expected)
    assert load("speech_commands", tmp_path / kind, rate=8000).length == 6


def test_there_are_35_words():
    assert len(set(speech_commands.WORDS)) == 35 and list(speech_commands.WORDS) == sorted(speech_commands.WORDS)


GOOD = wav(samples(50), 8000)
WRONG_WAVS = {
    "truncated": (GOOD[:-1], "is cut short: 49 of 50 samples"),
    "header only": (wav(samples(0), 8000), "is cut short: 0 of 0 samples"),
    "half a header": (GOOD[:20], "is no WAV file"),
    "empty": (b"", r"is no WAV file \(it ends too early\)"),
    "text": (
        b"version https://git-lfs.github.com/spec/v1 and more",
        "is no WAV file .file does not start with RIFF id",
    ),
    "stereo": (wav(samples(50), 8000, channels=2), "has 2 channels of 16 bits at 8000 Hz, not 1 of 16 at 8000"),
    "rate": (wav(samples(50), 16000), "has 1 channels of 16 bits at 16000 Hz, not 1 of 16 at 8000"),
    "width": (wav(samples(50), 8000, width=4), "has 1 channels of 32 bits at 8000 Hz"),
}


@pytest.mark.parametrize("case", WRONG_WAVS)
def test_a_damaged_recording_is_named(tmp_path, case):
    content, message = WRONG_WAVS[case]
    with pytest.raises(ValueError, match=f"x: recordings/3_a_4.wav {message}"):
        load("spoken_digits", digits(tmp_path / "x", **{"3_a_4": content}))


LISTED = "cat/00000001_nohash_0.wav"
WRONG_COMMANDS = {
    "list": ({"testing_list.txt": None}, "has no testing_list.txt; the data set is"),
    "listed": ({LISTED: None}, f"has no {LISTED}, which its validation_list.txt names, nor 0 others"),
    "word": ({name: None for name in COMMANDS if "zero" in name}, "has no recording of 'zero'"),
    "wav": ({LISTED: GOOD}, f"{LISTED} has 1 channels of 16 bits at 8000 Hz, not 1 of 16 at 16000"),
}


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_incomplete_commands_are_named(tmp_path, case):
    changed, message = WRONG_COMMANDS[case]
    with pytest.raises(ValueError, match=message):
        load("speech_commands", commands(tmp_path / "x", changed))


def test_wrong_options(tmp_path):
    path = digits(tmp_path / "x")
    for fields, message in {
        ("rate", 3000): "rate=3000 must divide the recordings' 8000 Hz",
        ("rate", 0): "rate=0 must divide",
        ("length", -1): "length=-1 must not be negative",
        ("validation", 40): "validation=40 must be at least 0 and below the 40 training examples",
        ("data_dir", ""): "name data_dir; it holds recordings/",
        ("data_dir", "nowhere"): "data_dir='nowhere' does not exist; it holds recordings/",
    }.items():
        with pytest.raises(ValueError, match=message):
            tasks.load({"name": "spoken_digits", "data_dir": str(path), **dict([fields])})
    (path / "recordings" / "three.wav").write_bytes(GOOD)
    with pytest.raises(ValueError, match="recordings/three.wav is not named as a recording"):
        load("spoken_digits", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has 0 train, 0 test recordings; it holds"):
        load("spoken_digits", tmp_path / "empty")


def test_padding_changes_nothing_that_is_measured():
    part = audio.padded([(0, np.asarray([3, 5], "<i2")), (1, np.asarray([7], "<i2"))], 4)
    assert audio.standard(part) == (5.0, pytest.approx((8 / 3) ** 0.5))
