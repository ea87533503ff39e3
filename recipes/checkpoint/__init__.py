"""Checkpoints: saving and loading, their manifest, and resharding for other ranks or ZeRO stages.

May import recipes.engine and the folders below it.
"""
