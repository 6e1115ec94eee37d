"""Times language models that read prompts and write on, at every batch size that fits in the device's memory.

    python -m experiments.generation_speed --config=configs/generation_speed.py:1.4b [--only NAME] [--json FILE]

Weights are random, the matrices in the dtype of the activations. Prompts are read some rows at a time by
`ssm.generation.prefill`; then the likeliest token is taken and read by the model's `step`, many tokens in one compiled
program whose state stays where it is. The share is of the bandwidth that a copy reaches in the same run, for the bytes
that a step cannot avoid: the weights and an attention's cache read, any other state read and written.
"""

import argparse
import gc
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import commandline, records
from experiments.memory import FULL, limit
from kernels_pallas.benchmark import copy_bandwidth
from kernels_pallas.records import append
from ssm import generation, naming
from ssm.language_model import LanguageModel, unstack_blocks
from ssm.mixers import attention
from ssm.models import DTYPES


def build(fields: Mapping[str, Any]) -> LanguageModel:
    return naming.build("model", LanguageModel, fields)


def weights(model: LanguageModel, seed: int) -> dict:
    """Random variables, initialised one layer for all, which compiles sooner."""

    def is_matrix(path):
        return path[-1].key in ("kernel", "embedding")

    @jax.jit
    def make(key):
        params = model.clone(scan_layers=True).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        params = params if model.scan_layers else unstack_blocks(params)
        dtype = DTYPES[model.dtype]
        return jax.tree_util.tree_map_with_path(lambda path, p: p.astype(dtype) if is_matrix(path) else p, params)

    return {"params": make(jax.random.key(seed))}


def size(tree) -> int:
    """Bytes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def moved(state: tuple) -> int:
    """Bytes of a state that a step reads and writes; of an attention's, it writes next to nothing."""
    return sum(size(layer) * (1 if isinstance(layer, attention.State) else 2) for layer in state)


@partial(jax.jit, donate_argnums=0)
def place(state: tuple, rows: tuple, first: int) -> tuple:
    """The state with some rows of it from `first` on."""
    return jax.tree.map(lambda s, r: jax.lax.dynamic_update_slice_in_dim(s, r, first, 0), state, rows)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=(2, 3))
def write(model: LanguageModel, variables, logits, state: tuple, count: int) -> tuple[tuple, jax.Array]:
    """((logits, state), tokens) after `count` more tokens of each row, the likeliest each time."""

    def advance(carry, _):
        token = jnp.argmax(carry[0], -1).astype(jnp.int32)
        return model.apply(variables, token, carry[1], method="step"), token

    return jax.lax.scan(advance, (logits, state), length=count)


def read(model: LanguageModel, variables, prompts: np.ndarray, at_once: int) -> tuple[jax.Array, tuple, float]:
    """Logits and state after the prompts, `at_once` rows at a time, and the seconds, compilation not counted."""
    rows, logits = min(len(prompts), at_once), []
    state = None if rows == len(prompts) else jax.jit(partial(model.initial_state, len(prompts)))()

    def some(first, state):
        logits, part = generation.prefill(model, variables, prompts[first : first + rows])
        return logits, part if state is None else place(state, part, first)

    _, compiled = jax.block_until_ready(some(0, state))
    state = None if state is None else compiled
    start = time.perf_counter()
    for first in range(0, len(prompts), rows):
        # queued ahead, all of them would have their part of the state in memory at once
        one, state = jax.block_until_ready(some(first, None if rows == len(prompts) else state))
        logits.append(one)
    return jnp.concatenate(logits), state, time.perf_counter() - start


def measure(model: LanguageModel, variables, batch: int, config: ConfigDict) -> dict[str, float]:
    """Seconds of reading `batch` prompts, where there are any, and of one step."""
    found = {}
    if config.prompt:
        prompts = np.random.default_rng(config.seed).integers(0, model.vocabulary, (batch, config.prompt))
        logits, state, found["read"] = read(model, variables, prompts, config.prompts_at_once)
    else:
        logits, state = jax.jit(lambda: (jnp.zeros((batch, model.vocabulary)), model.initial_state(batch)))()
    count = config.tokens_at_once
    (logits, state), _ = jax.block_until_ready(write(model, variables, logits, state, count))
    start, calls = time.perf_counter(), config.new_tokens // count
    for _ in range(calls):
        (logits, state), _ = write(model, variables, logits, state, count)
    jax.block_until_ready((logits, state))
    found["step"] = (time.perf_counter() - start) / (calls * count)
    if not jnp.isfinite(logits).all():
        raise FloatingPointError("the logits of what was written are not finite: nothing was measured")
    return found


def rising(config: ConfigDict, run: Callable[[int], bool]) -> None:
    """Runs larger and larger batches until one does not fit, then the largest power of two that does."""
    batch, largest = config.first_batch, 0
    while run(batch):
        if batch >= config.largest_batch:
            return
        largest, batch = batch, min(batch * config.growth, config.largest_batch)
    while (batch := batch // 2) > largest and not run(batch):
        pass


def fitting(needed: int, measurement: Callable[[], dict]) -> dict | None:
    """What was measured; None where the device's memory does not hold the bytes needed, or did not hold all of it.

    What cannot fit is not tried: an allocation that fails may leave its part of the memory taken.
    """
    if needed > limit(devices=1):
        return None
    try:
        return measurement()
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
    gc.collect()  # the error held what the measurement had on the device
    return None


def figures(config: ConfigDict, model: LanguageModel, batch: int, times: Mapping[str, float], parameters: int) -> dict:
    """Rates of a measurement, tokens of all rows a second: of the prompts, of what is written, of both together."""
    tokens, seconds = batch * config.new_tokens, config.new_tokens * times["step"] + times.get("read", 0.0)
    found = dict(batch=batch, prompt=config.prompt, new_tokens=config.new_tokens, parameters=parameters)
    found |= dict(milliseconds=round(1e3 * times["step"], 4), written_per_second=round(batch / times["step"]))
    found |= dict(state_bytes=size(jax.eval_shape(partial(model.initial_state, batch))))
    if "read" in times:
        found["read_per_second"] = round(batch * config.prompt / times["read"])
        found["together_per_second"] = round(tokens / seconds)
    return found


def memory(fields: Mapping[str, Any], lengths: Sequence[int]) -> list[int]:
    """Bytes of one row's state after so many tokens, an attention seeing all of them."""

    def after(length):
        mixers = {name: dict(options) for name, options in fields["mixers"].items()}
        if "attention" in mixers:
            mixers["attention"]["window"] = length
        model = build(fields | {"mixers": mixers})
        return size(jax.eval_shape(partial(model.initial_state, 1)))

    return [after(length) for length in lengths]


def line(record: Mapping[str, Any]) -> str:
    """A measurement as it is printed."""
    words = [f"{record['comparison']:10} {record['implementation']:12} B{record['batch']:<5}"]
    words += [f"{record['milliseconds']:9.3f} ms a step {record['written_per_second']:10,} tok/s"]
    words += [f"({100 * record['share_of_copy_bandwidth']:3.0f} % of a copy's bandwidth)"]
    if "read_per_second" in record:
        words += [f"reading {record['read_per_second']:9,} together {record['together_per_second']:8,} tok/s"]
    if record["baseline_milliseconds"] and record["implementation"] != record["baseline"]:
        words += [f"{record['baseline_milliseconds'] / record['milliseconds']:6.2f} x {record['baseline']}"]
    return "  ".join(words)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.generation_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE.py:PRESET")
    parser.add_argument("--only", metavar="NAME", help="one of what is compared")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    arguments, overrides = parser.parse_known_args(argv[1:])
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # of a GPU's memory: states are to fill it
    config = commandline.override(commandline.load_config(arguments.config), overrides)
    if arguments.json:
        pathlib.Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    about = records.measured("experiments.generation_speed", argv, devices=1)
    bandwidth = copy_bandwidth()
    about["copy_gigabytes_per_second"] = round(bandwidth / 1e9)
    print(f"{about['device']}, jax {jax.__version__}, a copy moves {bandwidth / 1e9:.0f} GB/s")
    names = {name for models in config.comparisons.values() for name in models}
    if arguments.only not in (None, *names):
        raise naming.unknown("--only", arguments.only, names)
    for comparison, models in config.comparisons.items():
        baseline: dict[int, float] = {}
        for name in sorted(models, key=lambda name: (name != config.baseline, name)):
            if arguments.only in (None, name):
                head = dict(op=config.op, comparison=comparison, implementation=name, baseline=config.baseline)
                compare(config, models[name].to_dict(), head, about, bandwidth, baseline, arguments.json)
    return 0


def compare(config, fields, head, about, bandwidth, baseline, file) -> None:
    """Measures one model at every batch size, and prints and keeps each as soon as it is there."""
    model = build(fields)
    head = head | {"dtype": model.dtype, "pass": "forward"}
    stack = f"{model.depth} x {model.pattern} of width {model.width}, {model.dtype}"
    if config.state_lengths:
        tokens = list(config.state_lengths)
        grown = {"op": "state_memory", "shape": stack, "tokens": tokens, "bytes": memory(fields, tokens)}
        append(file, head | grown | about)
    variables = weights(model, config.seed)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables))

    def run(batch: int) -> bool:
        state = jax.eval_shape(partial(model.initial_state, batch))
        times = fitting(size((variables, state)), partial(measure, model, variables, batch, config))
        if times is None:
            print(f"{head['comparison']:10} {head['implementation']:12} B{batch:<5} does not fit in memory", flush=True)
            return False
        if head["implementation"] == head["baseline"]:
            baseline[batch] = round(1e3 * times["step"], 4)
        record = head | figures(config, model, batch, times, parameters) | {
            "shape": f"B{batch} P{config.prompt} N{config.new_tokens} {stack}",
            "baseline_milliseconds": baseline.get(batch),
            "share_of_copy_bandwidth": round((size(variables) + moved(state)) / times["step"] / bandwidth, 3),
        }  # fmt: skip
        print(line(record), flush=True)
        append(file, record | about)
        return True

    rising(config, run)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
