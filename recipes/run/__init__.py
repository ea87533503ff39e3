"""A run from the outside: how it ends early, what its folder holds, and where each rank is.

The lowest folder of recipes: imports only conf, no torch and no DeepSpeed.
"""
