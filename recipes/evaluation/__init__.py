"""What an evaluation asks of a model and how answers count: retrieval tasks, scores by position, the report.

May import data, ring_attention, conf, and the folders of recipes/ that build and run a model.
"""
