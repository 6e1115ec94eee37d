"""Data sets that are generated here rather than downloaded."""
