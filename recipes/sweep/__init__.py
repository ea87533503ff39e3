"""Sweeps: trials that Optuna chooses, the search space, and the report.

May import recipes.monitor, recipes.run and conf.
"""
