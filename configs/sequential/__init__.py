"""Images and waveforms read sample by sample, by the recipes of `configs.lra`, whose docstring names them.

Here as there SIZE fast is `paper` with activations in bfloat16, larger batches and fewer epochs, so that a run takes
minutes on one GPU.
"""
