"""A run as others see it: how it ends early, what lies in its folder, and where each rank is.

The lowest folder of recipes: imports conf alone, and neither torch nor DeepSpeed.
"""
