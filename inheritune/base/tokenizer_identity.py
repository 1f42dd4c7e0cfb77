"""Which tokenizer a folder holds: GPT-2's, another one, or none. Data folders and checkpoints both ask here.

A tokenizer is GPT-2's if its vocabulary, merges and end-of-text token are GPT-2's, and if a probe text gets
GPT-2's ids. How the files are laid out does not matter.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from inheritune.base.errors import UserError, first_line
from inheritune.base.files import read_optional

TOKENIZER_FILE = "tokenizer.json"  # also what meta.json and config.json call a tokenizer in this file
TOKENIZER_CONFIG = "tokenizer_config.json"
OLDER_FILES = ("vocab.json", "merges.txt")  # the form in which GPT-2 was released
GPT2_SHA256 = "82d484ef560b28771489fef813b6815e19c204e503103af020aa2467f0d62ce5"  # by vocabulary_sha256
PROBE = "Hello  world's na\u00efve nai\u0308ve\n\n 123,"
PROBE_IDS = [15496, 220, 995, 338, 41492, 299, 1872, 136, 230, 303, 628, 17031, 11]


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a tokenizer in a form that we open: tokenizer.json, or GPT-2's two files."""
    found = [os.path.isfile(os.path.join(folder, name)) for name in (TOKENIZER_FILE, *OLDER_FILES)]
    return found[0] or all(found[1:])


def tokenizer_name(folder: str) -> str:
    """`gpt2` or `tokenizer.json`; "" for a folder without a tokenizer."""
    if not has_tokenizer(folder):
        return ""
    try:
        tokenizer = open_tokenizer(folder)
    except UserError:  # it is not GPT-2's; what is wrong with it is said when it is used
        return TOKENIZER_FILE
    return "gpt2" if is_gpt2(tokenizer, find_end_of_text(folder, tokenizer)) else TOKENIZER_FILE


def is_gpt2(tokenizer: tokenizers.Tokenizer, eot: int | None) -> bool:
    """Whether a tokenizer, whose token `eot` ends a text, gives every text the ids of GPT-2's."""
    if eot != 50256 or tokenizer.encode(PROBE, add_special_tokens=False).ids != PROBE_IDS:
        return False
    if not all(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        return False  # one that is not special may occur in a text
    return vocabulary_sha256(tokenizer, tokenizer.id_to_token(eot)) == GPT2_SHA256


def vocabulary_sha256(tokenizer: tokenizers.Tokenizer, end_of_text: str) -> str:
    """sha256 of the merges and of the tokens by their ids, but not of end-of-text and added tokens."""
    content = json.loads(tokenizer.to_str())
    added = {token["content"] for token in content["added_tokens"]} | {end_of_text}
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    tokens = [token for token in sorted(vocab, key=vocab.get) if token not in added]
    merges = content["model"].get("merges", [])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return hashlib.sha256(json.dumps([tokens, merges]).encode()).hexdigest()


def open_tokenizer(path: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that holds one or GPT-2's two files."""
    file = os.path.join(path, TOKENIZER_FILE) if os.path.isdir(path) else path
    cure = "where transformers' AutoTokenizer can open the model, its save_pretrained writes one"
    if file.endswith(".model"):
        raise UserError(f"{file} is sentencepiece's, not a {TOKENIZER_FILE}; {cure}")
    if not os.path.isfile(file) and not has_gpt2_files(path):
        raise UserError(f"there is no tokenizer {file}; {cure}")
    with package_errors(path):
        if os.path.isfile(file):
            return tokenizers.Tokenizer.from_file(file)
        vocab_and_merges = (os.path.join(path, name) for name in OLDER_FILES)
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*vocab_and_merges))
    config = read_optional(path, TOKENIZER_CONFIG) or {}
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, path)
    bos = special_token(config, "bos_token")
    if config.get("add_bos_token") and (number := find_id(tokenizer, bos)) is not None:  # OPT's texts
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def special_token(config: dict, key: str):
    """A token in tokenizer_config.json, by itself or as `{"content": "</s>", …}`."""
    token = config.get(key)
    return token.get("content") if isinstance(token, dict) else token


def find_id(tokenizer: tokenizers.Tokenizer, token) -> int | None:
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def has_gpt2_files(folder: str) -> bool:
    """Whether a folder holds the two files, and its tokenizer_config.json names no other class: Qwen2's files
    have the same names, but its tokenizer cuts a text in another way."""
    if not has_tokenizer(folder):
        return False
    kind = (read_optional(folder, TOKENIZER_CONFIG) or {}).get("tokenizer_class")
    return kind in (None, "GPT2Tokenizer", "GPT2TokenizerFast")


def add_tokens(tokenizer: tokenizers.Tokenizer, folder: str) -> None:
    """Add the tokens of added_tokens.json, `{"<user>": 50257}`. Those of special_tokens_map.json are special:
    spelled out in a text they are ordinary text. Raises UserError where one does not get its id."""
    special = []
    for token in (read_optional(folder, "special_tokens_map.json") or {}).values():
        special += token if isinstance(token, list) else [token]
    special = [token.get("content") if isinstance(token, dict) else token for token in special]
    added = read_optional(folder, "added_tokens.json") or {}
    by_number = sorted(added.items(), key=lambda item: str(item[1]).zfill(9))  # in a broken file, of any type
    for token, number in by_number:
        tokenizer.add_tokens([tokenizers.AddedToken(token, special=token in special)])
        if tokenizer.token_to_id(token) != number:
            what = f"{token} cannot get the id {number}"
            raise UserError(f"{folder}/added_tokens.json: {what}; save the tokenizer as tokenizer.json")


@contextlib.contextmanager
def package_errors(path: str) -> Iterator[None]:
    """Within this context an error of the tokenizers package, which has no class of its own for them, is a
    UserError. For some damaged files the package panics, which is not even an Exception."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        what = f"not a tokenizer of the tokenizers package ({first_line(e):.150}); fetch it again"
        raise UserError(f"{path}: {what}") from None


def find_end_of_text(folder: str, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id that ends a text: eos_token of tokenizer_config.json, else eos_token_id of config.json. None
    where neither names a token of this tokenizer."""
    eot = find_id(tokenizer, special_token(read_optional(folder, TOKENIZER_CONFIG) or {}, "eos_token"))
    if eot is None:
        eot = (read_optional(folder, "config.json") or {}).get("eos_token_id")
        eot = eot[0] if isinstance(eot, list) and eot else eot
    usable = type(eot) is int and 0 <= eot < 2**32 and tokenizer.id_to_token(eot) is not None
    return eot if usable else None
