"""Kernels through the compiler for TPUs on a machine that has none."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
PRELUDE = """
import sys
import jax
from jax.experimental import topologies

def like(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

def compile(function, arrays):
    jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()

for name in sys.argv[1:]:
    print(name, file=sys.stderr)
    one = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0])
"""


def run(script: str, *arguments: str) -> str:
    """What a script prints where libtpu is installed; it describes TPUs without one."""
    pytest.importorskip("libtpu")
    described = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    environment = os.environ | described | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # tests run side by side
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def compiles(script: str) -> None:
    """Runs a script for each of TOPOLOGIES, whose name is `name`, that compiles for arguments `like` a shape."""
    run(PRELUDE + textwrap.indent(script, "    "), *TOPOLOGIES)
