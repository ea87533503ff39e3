"""Numbers about a run: step times, metrics, time breakdown, profiles, and the reporter that shows them.

May import recipes.checkpoint and the folders below it.
"""
