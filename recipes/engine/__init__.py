"""DeepSpeed around the model: the engine, the optimizer, the loss rule, and the tensor x pipeline baseline.

May import recipes.model and the folders below it.
"""
