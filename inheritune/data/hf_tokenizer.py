"""The tokenizer of a checkpoint in the form that transformers and lm-eval open: tokenizer.json beside the weights.

AutoTokenizer on a checkpoint folder gives our ids for every text, `<|endoftext|>` spelled out in it included: with
`split_special_tokens` in tokenizer_config.json special tokens in a text are ordinary text there too. (Only whoever
opens tokenizer.json with the tokenizers library itself has to ask: `encode_special_tokens = True`.)

Both files are plain JSON, made here without either library. tiktoken merges whichever neighbours make the token of
lowest rank, Hugging Face whichever pair stands first in a list of merges, so the list is worked out from the ranks.
"""

import functools
import json
import os
import re
import sys

from inheritune.base.errors import UserError
from inheritune.data.tokenizer import END_OF_TEXT, RANKS_FILE, load_tokenizer

# What Hugging Face folders hold of a tokenizer.
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def files(config, source=None):
    """{file name: bytes} of a checkpoint's tokenizer: what its folder holds beside config.json and the weights.

    What is found in the folder `source` is taken as it stands; what is missing is made for the GPTConfig `config`.
    There is nothing for transformers when the vocabulary is not to be had, which stderr says once, or is not the
    config's.
    """
    names = (*HF_FILES, RANKS_FILE) if config.tokenizer == RANKS_FILE else HF_FILES
    found = {name: content for name in names if source and (content := read(os.path.join(source, name))) is not None}
    if not config.tokenizer or "tokenizer.json" in found or "vocab.json" in found:
        return found
    made = make(config.tokenizer, config.n_vocab, config.eot, source, found.get(RANKS_FILE))
    return found | {"tokenizer.json": made, "tokenizer_config.json": settings(config.block_size)} if made else found


def read(path):
    """The bytes of a file, or None where there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        return f.read()


@functools.lru_cache(maxsize=8)
def make(name, n_vocab, eot, folder, ranks):
    """tokenizer.json (bytes) for the tokenizer `name`, or None; remembered, as every save asks again.

    `ranks`, the content of folder's ranks file, is there to tell one from another. A vocabulary that could not be
    fetched is remembered, too: a process asks the network once, and a run's checkpoints do not depend on it.
    """
    if name == RANKS_FILE and ranks is None:
        return None
    try:
        tokenizer = load_tokenizer(name, folder)
    except UserError as e:
        print(f"checkpoints have no tokenizer.json: {e}", file=sys.stderr)
        return None
    if (tokenizer.n_vocab, tokenizer.eot) != (n_vocab, eot):
        return None
    content = of_bytes() if name == "bytes" else of_encoding(tokenizer.encoding)
    return as_json(content)


def as_json(content):
    """The bytes of a JSON file that does not depend on where or when it is written."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def settings(block_size):
    """The content of tokenizer_config.json."""
    return as_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "model_max_length": block_size,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
    )


def of_bytes():
    """tokenizer.json's content for the tokenizer `bytes`: byte-level BPE that never merges and never cuts."""
    vocab = {stand_in: byte for byte, stand_in in enumerate(stand_ins())}
    return layout({"vocab": vocab, "merges": [], "ignore_merges": False}, {END_OF_TEXT: 256}, [])


def of_encoding(encoding):
    """tokenizer.json's content for a tiktoken.Encoding."""
    ranks, letters = encoding._mergeable_ranks, stand_ins()

    def show(token):
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.get)
    merges = [f"{show(pair[0])} {show(pair[1])}" for token in ordered if (pair := last_merge(token, ranks))]
    cut = {"type": "Split", "pattern": {"Regex": portable(encoding._pat_str)}, "behavior": "Isolated", "invert": False}
    model = {
        "vocab": {show(token): ranks[token] for token in ordered},
        "merges": merges,
        "ignore_merges": True,  # as in tiktoken, a word that is a token is that token, whether merges lead to it or not
    }
    return layout(model, encoding._special_tokens, [cut])


def layout(model, special, cuts):
    """tokenizer.json's content.

    model: vocab as {token in stand-ins: id} with its merges; special: {text: id}; cuts: what cuts a text into words.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = dict(sorted(special.items(), key=lambda item: item[1]))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **plain} for text, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **model,
            "vocab": model["vocab"] | special,
        },
    }


def stand_ins():
    """The 256 printable characters by which GPT-2's files call the bytes: themselves where printable, else from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


def last_merge(token, ranks):
    """The pair (left, right) that byte-pair encoding joins into `token`, or None where it never comes to that.

    Merging depends on nothing outside the bytes merged, so this pair is the only one that ever makes the token.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], sys.maxsize))
        joined = parts[best] + parts[best + 1]
        if joined not in ranks:
            return None
        parts[best : best + 2] = [joined]
    return tuple(parts) if len(parts) == 2 else None


def portable(pattern):
    """tiktoken's pattern in the dialect that Hugging Face compiles (Oniguruma's Ruby syntax).

    There `$` is also the end of a line, and `{1,3}+` repeats instead of refusing to give back, which at the end of
    an alternative, where tiktoken has it, makes no difference.
    """
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern).replace("$", r"\z")
