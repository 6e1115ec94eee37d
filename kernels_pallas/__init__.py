"""The recurrences of the lineage as operations on arrays: one folder per operation, each usable alone.

An operation is one public function with `implementation="auto" | "reference" | "xla" | "gpu" | "tpu"`, as far as it has
them; `auto` takes the fastest that is right for the call on the backend it runs on. This package imports JAX only.
"""
