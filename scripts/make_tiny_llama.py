"""Makes a small Llama with random weights and its tokenizer, offline, as a folder in the Hugging Face hub's format.

python scripts/make_tiny_llama.py FOLDER

The tokenizer is trained on Python's standard library. The same versions of the packages give the same files.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` is a folder of the checkout

from data.source import stdlib_files

SEED = 0
VOCAB_SIZE = 2048
TRAINING_BYTES = 4_000_000
CONTEXT_LENGTH = 2048
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
HEADER_START, HEADER_END, END_OF_TURN = "<|start_header|>", "<|end_header|>", "<|end_of_turn|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, HEADER_START, HEADER_END, END_OF_TURN]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{HEADER_START}{{{{ message['role'] }}}}{HEADER_END}\n"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] }}}}{END_OF_TURN}{{% endgeneration %}}"
    f"{{% else %}}{{{{ message['content'] }}}}{END_OF_TURN}{{% endif %}}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{HEADER_START}assistant{HEADER_END}\n{{% endif %}}"
)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("error: it takes one folder: type python scripts/make_tiny_llama.py FOLDER")
    folder = Path(arguments[0]).absolute()
    try:
        if folder.exists() and any(folder.iterdir()):
            sys.exit(f"error: {folder} is not empty: give a new or an empty folder")
        make(folder)
    except OSError as error:
        sys.exit(f"error: {error.strerror}: {error.filename}: give a new or an empty folder that can be written")


def make(folder: Path, vocab_size: int = VOCAB_SIZE, **shape: Any) -> None:
    """Write the model to `folder`, which must be new or empty. All files appear at once.

    Args:
        shape: what a transformers.LlamaConfig shall have in place of the numbers here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        complete = Path(temporary) / "model"
        complete.mkdir()
        write_tokenizer(complete, vocab_size)
        write_model(complete, vocab_size, shape)
        complete.rename(folder)  # or over it, while it is empty
    print(f"{folder} is complete", flush=True)


def write_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    print(f"training a tokenizer of {vocab_size:,} tokens on Python's standard library ...", flush=True)
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    # as Llama's: BOS before a text, unless add_special_tokens=False
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    ).save_pretrained(folder)


def texts() -> Iterator[str]:
    """Files of the standard library in a fixed random order, `TRAINING_BYTES` of them."""
    files, num_bytes = stdlib_files(), 0
    random.Random(SEED).shuffle(files)
    for name in files:
        text = Path(name).read_text(encoding="utf-8", errors="replace")
        yield text
        num_bytes += len(text.encode())
        if num_bytes >= TRAINING_BYTES:
            return


def write_model(folder: Path, vocab_size: int, shape: dict[str, Any]) -> None:
    print("drawing the weights ...", flush=True)
    import torch
    import transformers

    bos_id, eos_id, pad_id, end_of_turn_id = map(SPECIAL_TOKENS.index, (BOS, EOS, PAD, END_OF_TURN))
    usual_shape = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": CONTEXT_LENGTH,
    }
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id, **usual_shape | shape
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=bos_id,
        eos_token_id=[eos_id, end_of_turn_id],  # a text ends with the first, an answer of a chat with the second
        pad_token_id=pad_id,
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
