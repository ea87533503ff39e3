"""Imported once by the fork server from which `tests.pool` starts CPU ranks: a fork imports nothing again."""

import os

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # before torch is imported

from recipes.launch.startup import import_deepspeed

import_deepspeed()
