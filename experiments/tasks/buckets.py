"""Batches of examples of about one length, so that little of a batch is padding.

`config.task.buckets = (1024, 2048)` are the lengths that batches may have, in tokens; the last is that of the stored
examples. A batch has the least that holds its longest example, and a program is compiled for each. Every epoch is an
order of its own and a pure function of (seed, epoch): the examples of a permutation, but for those at its end that fill
no batch, are dealt to the buckets; what fills no batch of one bucket goes on to the next longer one; and the batches of
all buckets are shuffled. An evaluation reads the examples by length.
"""

import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np


def check(bounds: Sequence[int], lengths: np.ndarray | None, longest: int, where: str) -> None:
    """Raises ValueError where no batches can be made of examples of these lengths."""
    if lengths is None or lengths.ndim != 1:
        raise ValueError(f"{where}: buckets={tuple(bounds)} are for examples with one length each")
    if list(bounds) != sorted(set(bounds)) or bounds[0] < 1 or bounds[-1] != longest:
        raise ValueError(f"{where}: buckets={tuple(bounds)} must ascend from at least 1 to the examples' {longest}")


def bound(bounds: Sequence[int], lengths: np.ndarray) -> int:
    """The least that holds the longest of the lengths."""
    return bounds[np.searchsorted(bounds, lengths.max())]


def mean(bounds: Sequence[int], lengths: np.ndarray) -> float:
    """Tokens that a batch has of an example, where all buckets fill their batches."""
    return float(np.asarray(bounds)[np.searchsorted(bounds, lengths)].mean())


def plan(bounds: Sequence[int], lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's batches as indices, (batches, batch_size)."""
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
    order = random.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    bucket = np.searchsorted(bounds, lengths[order])
    batches, rest = [], order[:0]
    for number in range(len(bounds)):
        members = np.concatenate([rest, order[bucket == number]])
        whole = len(members) // batch_size * batch_size
        batches.append(members[:whole].reshape(-1, batch_size))
        rest = members[whole:]
    return random.permutation(np.concatenate(batches))


def shuffled(bounds: Sequence[int], lengths: np.ndarray, batch_size: int, seed: int) -> grain.MapDataset:
    """Batch number -> indices, without end."""
    per_epoch = len(lengths) // batch_size
    epoch = functools.lru_cache(2)(lambda number: plan(bounds, lengths, batch_size, seed, number))
    return grain.MapDataset.range(sys.maxsize).map(lambda step: epoch(step // per_epoch)[step % per_epoch])
