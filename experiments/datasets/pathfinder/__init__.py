"""Pathfinder (Linsley et al. 2018, arXiv:1805.08315), at the sizes and parameters of Long Range Arena.

parameters.py  what the benchmark's release gave the generator, per size
sprites.py     pictures of paddles and discs, and where the next paddle may go: tables of integers
contours.py    contours placed by the published rules, from the tables (compiled)
drawing.py     and painted (compiled)
images.py      images and labels as a function of (resolution, seed, split, index)
files.py       whole splits in a folder, on all cores
builder.py     the same as a data set of TensorFlow Datasets, which needs no TensorFlow
__main__.py    the command that generates, and the one that draws a sheet of examples
"""
