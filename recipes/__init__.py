"""The recipes: what a person runs (`pretrain`, `forward`, `export`), and a folder for each thing they are made of.

May import conf, data and ring_attention. Imports point downward; pyproject.toml lists the layers.
"""
