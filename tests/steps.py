"""What the tests of one-token kernels share: a simulator, and compilation that shows what happens to the state."""

import contextlib

import jax
from jax.experimental.pallas import tpu as pltpu

HOPPER = """
from kernels_pallas import dispatch

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="float32", split=DEVICES > 1):
    return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*["x"] * split)))

def in_place(step, state, arrays):
    with jax.set_mesh(mesh):
        run = jax.jit(step, donate_argnums=0).trace(state, arrays).lower(lowering_platforms=("cuda",))
        hlo = run.compile().as_text()
    assert "output_to_operand_aliasing={{1}: (" in hlo
    assert " copy(" not in hlo and " fusion(" not in hlo, "the state is read and written by the kernel alone"
    print("compiled")
    print("collectives", *[name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}" in hlo])
"""
TPU = """
from kernels_pallas import dispatch

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="float32", split=False):
    return jax.ShapeDtypeStruct(shape, of, sharding=one)

def in_place(step, state, arrays):
    compiled = jax.jit(step, donate_argnums=0).trace(state, arrays).lower(lowering_platforms=("tpu",)).compile()
    assert "output_to_operand_aliasing={{1}: (" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < compiled.memory_analysis().alias_size_in_bytes / 2
"""


def simulator(implementation: str):
    if implementation == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
    return pltpu.force_tpu_interpret_mode() if implementation == "tpu" else contextlib.nullcontext()


def outputs_and_gradients(step, p: dict, bars: tuple):
    """Of step(**p)."""

    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(lambda p: step(**p), p)
        return outputs, pull(jax.tree.map(lambda bar, y: bar.astype(y.dtype), bars, outputs))[0]

    return both(p, bars)
