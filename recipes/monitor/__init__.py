"""Numbers about a run: step times, metrics, time breakdown, profiles, and the reporter that logs them.

May import recipes.checkpoint and the layers below it (pyproject.toml).
"""
