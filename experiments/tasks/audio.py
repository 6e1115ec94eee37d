"""What tasks of recordings share: 16-bit waveforms, sample by sample, padded at the end, with their lengths.

They lie in memory as int16 and are standardised by mean and deviation of the training split's samples at the full rate.
At a lower rate every second (third, ...) sample is read, as the S4 line does, without a filter before.
"""

import io
import wave
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.tasks.base import Examples, StandardisedTask, held_back

VALIDATION_SEED = 0


def read_wav(where: str, content: bytes, rate: int) -> np.ndarray:
    """The samples of a mono 16-bit WAV file, int16 (l,). Raises ValueError naming it where it is anything else."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            count, samples = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{where} is no WAV file ({str(error) or 'it ends too early'})") from error
    if found != (1, 16, rate):
        raise ValueError(f"{where} has {found[0]} channels of {found[1]} bits at {found[2]} Hz, not 1 of 16 at {rate}")
    if len(samples) != 2 * count or not count:
        raise ValueError(f"{where} is cut short: {len(samples) // 2} of {count} samples")
    return np.frombuffer(samples, "<i2")


def padded(recordings: Sequence[tuple[int, np.ndarray]], length: int) -> Examples:
    """Labels and waveforms as int16 (n, length, 1), zeros behind; what is beyond `length` is cut off."""
    inputs = np.zeros((len(recordings), length, 1), np.int16)
    for row, (_, samples) in zip(inputs, recordings, strict=True):
        row[: len(samples), 0] = samples[:length]
    lengths = np.asarray([min(len(samples), length) for _, samples in recordings], np.int32)
    return Examples(inputs, np.asarray([label for label, _ in recordings], np.int32), lengths)


def slower(examples: Examples, stride: int) -> Examples:
    """Every stride-th sample."""
    lengths = -(-examples.lengths // stride)
    return Examples(np.ascontiguousarray(examples.inputs[:, ::stride]), examples.targets, lengths)


def standard(examples: Examples) -> tuple[float, float]:
    """Mean and deviation of all samples that are no padding, which is 0 and adds to no sum."""
    count = int(examples.lengths.sum())
    mean = float(examples.inputs.sum(dtype=np.int64)) / count
    squares = sum(float(np.square(row, dtype=np.int64).sum()) for row in examples.inputs)
    return mean, max(squares / count - mean**2, 1.0) ** 0.5


def task(
    title: str,
    splits: Mapping[str, Sequence[tuple[int, np.ndarray]]],
    *,
    classes: int,
    full_rate: int,
    rate: int,
    length: int,
    validation: int = 0,
) -> StandardisedTask:
    """The task of labelled waveforms at full_rate, read at `rate`, in Hz.

    length: samples kept of each, at the full rate; 0: all of the longest. validation: training recordings held back.
    Raises ValueError for a rate that does not divide the full one, or a negative length.
    """
    if rate < 1 or full_rate % rate:
        raise ValueError(f"{title}: rate={rate} must divide the recordings' {full_rate} Hz")
    if length < 0:
        raise ValueError(f"{title}: length={length} must not be negative")
    length = length or max(len(samples) for part in splits.values() for _, samples in part)
    data = {split: padded(part, length) for split, part in splits.items()}
    if validation:
        data = held_back(data, validation, VALIDATION_SEED)
    mean, std = standard(data["train"])
    data = {split: slower(examples, full_rate // rate) for split, examples in data.items()}
    sizes = ", ".join(f"{len(examples.targets):,} {split}" for split, examples in data.items())
    source = f"{title} at {rate:,} Hz ({sizes})"
    ends = dict(encoder="continuous", input_size=1, classes=classes, source=source, data=data)
    return StandardisedTask(**ends, mean=(mean,), std=(std,))
