"""A device's memory, and whether replicas fit in it, asked of the compiler before they train."""

import os
from collections.abc import Callable

import jax

FULL = "RESOURCE_EXHAUSTED"  # how XLA's error begins where memory runs out


def limit(devices: int) -> int:
    """Bytes that a program may take on one of the devices; a CPU's, which are simulated, share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices


def fitting(
    step: Callable, arguments: Callable[[int], tuple], count: int, devices: int, limit: int
) -> jax.stages.Compiled:
    """The step of `count` replicas, compiled. arguments: of so many replicas, at least as shapes.

    Raises ValueError where a device of `limit` bytes cannot hold its part of them.
    """
    try:
        compiled = step.lower(*arguments(count)).compile()
        needed = bytes_needed(compiled)
    except jax.errors.JaxRuntimeError as error:  # some compilers see for themselves that it does not fit
        if FULL not in str(error):
            raise
        one = bytes_needed(step.lower(*arguments(devices)).compile())
        needed = max(count // devices * one, limit + 1)
    if needed > limit:
        fit = int(count * limit / needed) // devices * devices
        raise ValueError(
            f"{count} replicas need {needed / 2**30:.3g} GiB of a device's {limit / 2**30:.3g}: {fit} would fit. Take"
            " fewer config.replicas.learning_rates or seeds, more devices, or a smaller batch_size"
        )
    return compiled


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Of one device while the program runs: what goes in, what comes out in other places, and between."""
    use = compiled.memory_analysis()
    arrays = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    return arrays + use.temp_size_in_bytes + use.generated_code_size_in_bytes
