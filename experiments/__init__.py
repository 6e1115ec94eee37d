"""Training, evaluation and records: the code that knows of files, data and time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only

# On a CPU, XLA's FFTs wait for threads of the pool that they run on: with as many of them at once as the pool has
# threads, all of them wait for ever. S4's kernels are one FFT a layer; NPROC sizes the pool on small machines.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))
