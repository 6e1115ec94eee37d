"""Kernels through the compiler for Hopper GPUs on a machine that has none."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PRELUDE = """
import os
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # nothing runs here
import jax
import jax_plugins.xla_cuda13
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
'''
jax.devices()
topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x2")
mesh = Mesh(np.array(topology.devices[:DEVICES]), ("x",))
one = NamedSharding(mesh, PartitionSpec())

def compile(function, arrays):
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()
    print("compiled")
    return compiled.as_text()


"""


def run(script: str, devices: int = 1) -> tuple[str, str]:
    """What a script prints, to stdout and stderr, that compiles for so many GPUs.

    It finds `jax`, `mesh`, `one` (of arrays that are the same on all) and `compile(function, arrays)` -> HLO.
    """
    pytest.importorskip("jax_cuda13_plugin", reason="the compiler for GPUs is not installed")
    described = {"MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", f"DEVICES = {devices}\n{PRELUDE}{script}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | described
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout, done.stderr


def spills(script: str) -> tuple[int, set[str]]:
    """How many functions a script compiles, and the bytes that their kernels spill, as ptxas says; see `run`."""
    out, err = run(script)
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", out + err)
    compiled = out.count("compiled\n")
    assert len(found) >= compiled
    return compiled, {number for pair in found for number in pair}
