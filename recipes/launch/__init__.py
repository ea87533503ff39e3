"""Ranks: starting or joining them, their signals, their watchdog, and the errors that end them.

May import recipes.monitor and the folders below it.
"""
