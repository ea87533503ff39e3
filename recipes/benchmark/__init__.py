"""Benchmarks: comparisons of configurations, attention alone, the roofline, and the longest sequence that fits.

May import recipes.launch and the folders below it.
"""
