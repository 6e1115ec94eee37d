"""ListOps of Long Range Arena (arXiv:2011.04006, section 2.2), drawn from a seed.

expressions.py  one seed's expressions, a pure function of its number
files.py        so many of them in a folder, on all cores
builder.py      the same as a data set of TensorFlow Datasets, which needs no TensorFlow
"""
