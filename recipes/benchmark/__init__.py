"""Measurements: comparisons, attention alone, its roofline, and the longest sequence.

May import recipes.launch and the folders below it.
"""
