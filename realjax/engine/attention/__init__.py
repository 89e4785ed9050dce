"""Attention kernels: one file each, and in `choose.py` which of them serves what."""
