"""Training, evaluation and records: the code that knows of files, data and time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
