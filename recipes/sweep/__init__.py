"""Hyperparameter sweeps: trials, the search space, and the report.

May import recipes.run and recipes.monitor.metric_registry.
"""
