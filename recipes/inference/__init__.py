"""A trained model at work: what RUN_DIR, CHECKPOINT or HF_FOLDER is, its weights, and decoding under the ring.

May import recipes.checkpoint and the folders below it.
"""
