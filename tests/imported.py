"""What the server of `tests.fork_server` imports, for the CPU."""

import os

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # before torch is imported

import datasets  # noqa: F401
import hydra  # noqa: F401
import transformers.conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401

from recipes.launch.startup import import_deepspeed

import_deepspeed()
