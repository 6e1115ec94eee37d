"""A compilation cache, JAX at its strictest for our mathematics, and the fixtures that every test shares."""

import os
import pathlib

# Nearly all of the time goes into compiling small functions once: compile them fast rather than well.
FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", f"{FLAGS} --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A simulated warpgroup that waits holds a thread of XLA's pool; with one a core, none may be left to be waited for.
os.environ.setdefault("PJRT_NPROC", "16")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No implicit promotion of dtype or rank in our mathematics; optax and users rely on it."""
    if request.path.parent.name not in ("ssm", "kernels_pallas"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Float64 in JAX for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded by the test's own name: independent of the order of tests."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def simulated(monkeypatch):
    """Kernels are taken though this machine cannot run them: in a simulator, which has one device."""
    from kernels_pallas import dispatch

    monkeypatch.setattr(dispatch, "backend_refusal", lambda implementation: "")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def untyped():
    """No run-time check of annotations: what a user has, whose wrong shapes meet our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
