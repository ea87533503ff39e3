"""The recipes that a person runs (`pretrain`, `forward`, `export`), and a folder for each of their parts.

May import conf, data and ring_attention. Imports point downward; pyproject.toml lists the layers.
"""
