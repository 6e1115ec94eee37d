"""Times a config's training step, whole: forward, backward and update, on one batch that lies on the device.

    python -m experiments.throughput --config=configs/throughput.py:pathx [--json FILE] [--config.FIELD=VALUE]

Every variant of `config.variants` is timed in the same run, and compared with `config.baseline`. Of a language model
there is also the share of the device's published rate that its matrix products take (`experiments.flops`).
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from experiments import commandline, flops, records, setup
from kernels_pallas.records import append

WARM_UP = 3  # steps


def seconds_per_step(config: ConfigDict) -> tuple[float, int, setup.Setup]:
    """Of the steps, queued one behind another as in training; the tokens of a step, and what was run."""
    ready = setup.prepare(config)
    program = ready.program
    step, state, batch = program.make_train_step(), program.new_state(), next(program.batches(0))
    for timed in (WARM_UP, config.timed_steps):
        start = time.perf_counter()
        for _ in range(timed):
            state, summary = step(state, batch)
        jax.block_until_ready((state, summary))
        seconds = (time.perf_counter() - start) / timed
    program.check(summary.health)
    return seconds, program.tokens, ready


def variant(config: ConfigDict, fields: str) -> ConfigDict:
    """The config with a variant's fields set."""
    arguments = [f"--config.{field}" for field in fields.split()]
    return commandline.override(config.copy_and_resolve_references().unlock(), arguments)


def share_of_peak(ready: setup.Setup, tokens_per_second: float, devices: int) -> dict[str, float]:
    """FLOP a token, and its share of what the devices are published to do; less where these are not known."""
    if ready.task.kind != "language_model":
        return {}
    per_token = flops.training(ready.model, ready.rows, ready.task.length)
    found, peak = {} if per_token is None else {"flops_per_token": round(per_token)}, flops.peak(devices)
    return found | ({"share_of_peak": round(per_token * tokens_per_second / peak, 4)} if found and peak else {})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE.py:PRESET")
    parser.add_argument("--json", metavar="FILE", help="append one line a variant")
    arguments, overrides = parser.parse_known_args(argv[1:])
    config = commandline.override(commandline.load_config(arguments.config), overrides)
    baseline = config.get("baseline")
    if baseline not in config.get("variants", {}):
        raise ValueError("the config's baseline must be one of its variants, which name what is timed")
    about = records.measured("experiments.throughput", argv, config.devices)
    print(f"{about['device']}, jax {jax.__version__}")
    model = config.model
    shape = f"{config.preset}: {model.depth} x {model.pattern} of width {model.width}, {model.dtype}"
    times = {}
    for name in sorted(config.variants, key=lambda name: name != baseline):
        times[name], tokens, ready = seconds_per_step(variant(config, config.variants[name]))
        seconds, ratio = times[name], times[baseline] / times[name]
        record = dict(
            op="training_step", shape=f"B{config.batch_size} L{ready.task.length} {shape}", dtype=model.dtype,
            implementation=name, milliseconds=round(1e3 * seconds, 3), baseline=baseline,
            baseline_milliseconds=round(1e3 * times[baseline], 3), tokens_per_second=round(tokens / seconds),
            parameters=sum(row.count for row in ready.rows), **{"pass": "forward+backward"},
            **share_of_peak(ready, tokens / seconds, config.devices),
        ) | about  # fmt: skip
        share = f" {100 * record['share_of_peak']:5.1f} % of the peak" if "share_of_peak" in record else ""
        print(
            f"{record['shape']}  {name:8} {1e3 * seconds:9.2f} ms a step {tokens / seconds / 1e6:8.2f} Mtok/s"
            f" {ratio:6.2f} x {baseline}{share}",
            flush=True,
        )
        append(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
