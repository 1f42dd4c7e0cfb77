"""Text to token ids and back: plain bytes, tiktoken's vocabularies by name, and Hugging Face tokenizers.

`load_tokenizer` opens all three, `tokenizer_files` gives what a checkpoint keeps for transformers. Special
tokens spelled out in a text are ordinary text, except in prompts; only the writer of a data folder puts
end-of-text ids between documents.
"""

import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from inheritune.base.errors import UserError, nearest
from inheritune.base.files import read_files, read_optional
from inheritune.base.tokenizer_identity import (
    OLDER_FILES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    find_end_of_text,
    has_tokenizer,
    is_gpt2,
    open_tokenizer,
    package_errors,
    vocabulary_sha256,
)

END_OF_TEXT = "<|endoftext|>"
# tiktoken gets at most this many at a time: its regular expressions overflow on longer runs of blanks
MAX_CHARACTERS = 1 << 17

# GPT-2's own two files, which tiktoken fetches for `gpt2` and keeps: {our name: (address, sha256)}.
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {
    "vocab.json": (f"{URL}/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": (f"{URL}/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}


def load_tokenizer(spec: str, folder: str | None = None) -> "Tokenizer":
    """The tokenizer called `spec`: `bytes`, a tiktoken name such as `gpt2`, or the path of a tokenizer.json
    or of a folder that holds one.

    folder: the data or checkpoint folder in whose meta.json or config.json `spec` was read; its tokenizer
        files win over a tiktoken name
    """
    if spec == "bytes":
        return Bytes()
    if folder and has_tokenizer(folder):
        return HuggingFace(folder)
    known = ["bytes", *sorted(tiktoken.list_encoding_names())]
    if spec in known:
        return from_tiktoken(spec)
    path = os.path.join(folder or "", spec)
    if spec.endswith((".json", ".model")) or os.path.isdir(path):
        return HuggingFace(path)
    choices = f"{', '.join(known)} or the path of a tokenizer.json or of a folder that holds one"
    raise UserError(f"no tokenizer {spec!r}{nearest(spec, known)}; choose {choices}")


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of `text`. Half a surrogate pair has none; it becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Tokenizer:
    """What all kinds have in common. Arrays of ids are 1-D, of any unsigned type."""

    name: str
    n_vocab: int
    eot: int  # the id that ends a text
    end_of_text: str = END_OF_TEXT  # how its token is written
    sha256: str | None = None  # of a Hugging Face tokenizer's vocabulary
    bos_ids: list[int] = []  # noqa: RUF012  (ids that a text begins with, as Llama's and Gemma's do)
    files: dict[str, bytes] = {}  # noqa: RUF012  (what a data folder keeps of it)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str], continues: Sequence[bool] = ()) -> tuple[np.ndarray, list[int]]:
        """(the ids of all texts in one array, how many each has).

        continues[i]: text i continues one that was cut (see CUT); it gets the ids it has in the uncut text.
        """
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`, perhaps with half a character at an end; end-of-text is spelled out.
        Raises UserError for an id that is not in the vocabulary."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            raise UserError(f"token ids {min(ids)} to {max(ids)} exceed the vocabulary of {self.n_vocab}")
        return ids

    def recognise_special(self) -> None:
        """For prompts: from now on a special token in a text becomes its id (HuggingFace alone has any)."""

    def describe(self) -> dict:
        """The `tokenizer` entry of a meta.json. `bos`: the id that begins each window, if there is one."""
        entry = {"name": self.name, "n_vocab": self.n_vocab, "eot": self.eot}
        entry |= {"bos": self.bos_ids[0]} if self.bos_ids else {}
        return entry | {"sha256": self.sha256} if self.sha256 else entry


class TextStream:
    """The text of ids that come one at a time, given out in whole characters. `before` holds the ids before
    them, such as a prompt's: whether a blank comes before a token can depend on them."""

    CONTEXT = 8  # ids decoded together with the new one

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
        self.decode = tokenizer.decode
        self.ids = list(before)[-self.CONTEXT :]
        self.shown = self.decode(self.ids)

    def add(self, token: int) -> str:
        """The text that `token` adds; '' while its last character is incomplete."""
        self.ids.append(token)
        return "" if self.decode(self.ids).endswith("\ufffd") else self.end()

    def end(self) -> str:
        """What is left: characters that stayed incomplete, as U+FFFD."""
        new = self.decode(self.ids)[len(self.shown) :]
        self.ids = self.ids[-self.CONTEXT :]
        self.shown = self.decode(self.ids)
        return new


class Bytes(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; 256 ends a text. Needs no download and no training."""

    name, n_vocab, eot = "bytes", 257, 256
    spelled = (*(bytes((i,)) for i in range(256)), END_OF_TEXT.encode())

    def encode_batch(self, texts, continues=()):
        encoded = list(map(utf8, texts))
        return np.frombuffer(b"".join(encoded), np.uint8), list(map(len, encoded))

    def decode_bytes(self, ids):
        ids = list(ids)
        try:
            return bytes(ids)
        except ValueError:  # an end-of-text is among them
            return b"".join([self.spelled[i] for i in self.check_ids(ids)])


class TikToken(Tokenizer):
    """Byte-pair encoding by a tiktoken.Encoding."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding, self.name = encoding, encoding.name
        self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token

    def encode_batch(self, texts, continues=()):  # the ids of `encode_ordinary`, without Python lists
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        ids = [[encode(part) for part in cut(utf8(text).decode())] for text in texts]
        return np.concatenate(list(itertools.chain(*ids))), [sum(map(len, arrays)) for arrays in ids]

    def decode_bytes(self, ids):
        try:
            return self.encoding.decode_bytes(list(ids))
        except (KeyError, OverflowError) as e:  # there are gaps between the ids of some vocabularies
            raise UserError(f"the {self.name} vocabulary of {self.n_vocab} lacks a token id ({e})") from None


def cut(text: str) -> Iterator[str]:
    """Yield the parts of a text, each of at most MAX_CHARACTERS characters."""
    while len(text) > MAX_CHARACTERS:
        place = last_cut(text, MAX_CHARACTERS)
        yield text[:place]
        text = text[place:]
    yield text


# All vocabularies we know start a new token at a space after a letter or digit (tiktoken's also at a line end
# after one), so a cut there changes no token. The match ends at the last such space, else at the last such
# line end.
CUT = re.compile(r"(?s).*[^\W_](?= )|.*[^\W_](?=\n)")


def last_cut(text: str, most: int) -> int:
    """The last place among the first `most` characters at which a cut changes no token, or else `most`."""
    place = CUT.match(text, 0, most)
    return place.end() if place else most


def from_tiktoken(name: str) -> TikToken:
    """A vocabulary that tiktoken knows by name, fetches once, and keeps in TIKTOKEN_CACHE_DIR."""
    import requests

    try:
        return TikToken(tiktoken.get_encoding(name))
    except (requests.RequestException, OSError, ValueError, AssertionError) as e:  # the last: another size
        cure = "set TIKTOKEN_CACHE_DIR to a filled cache or give --tokenizer the path of a tokenizer.json"
        what = f"tiktoken could not fetch the {name} vocabulary ({type(e).__name__})"
        raise UserError(f"{what}; without a network, {cure}") from None


class HuggingFace(Tokenizer):
    """A tokenizer of the `tokenizers` package. Its ids are transformers' without special tokens.

    Where vocabulary, merges and rules are GPT-2's, its name is `gpt2`; else `tokenizer.json`, and `sha256`
    identifies its vocabulary, however the file is laid out.
    """

    def __init__(self, path: str):
        self.path, self.tokenizer = path, open_tokenizer(path)
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are ordinary text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        self.eot = find_end_of_text(folder, self.tokenizer)
        if self.eot is None:
            cure = f'put {{"eos_token": "the token"}} into {TOKENIZER_CONFIG} beside the tokenizer'
            raise UserError(f"{folder or '.'} does not say which token ends a text: {cure}")
        self.end_of_text = self.tokenizer.id_to_token(self.eot)
        # the ids that stand before any text (BOS)
        plain, whole = (self.tokenizer.encode("a", add_special_tokens=s).ids for s in (False, True))
        places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.bos_ids = whole[: next(places, 0)]
        self.n_ids = 1 + max(self.known_ids(folder))
        if is_gpt2(self.tokenizer, self.eot):
            self.name, self.n_vocab = "gpt2", 50257  # no text gets the ids of added special tokens
            return
        digest = vocabulary_sha256(self.tokenizer, self.end_of_text)
        self.name, self.sha256, self.n_vocab = TOKENIZER_FILE, digest, self.n_ids
        config = read_optional(folder, TOKENIZER_CONFIG) or {"tokenizer_class": "PreTrainedTokenizerFast"}
        config["eos_token"] = self.end_of_text
        self.files = {TOKENIZER_FILE: self.tokenizer.to_str().encode(), TOKENIZER_CONFIG: as_json(config)}

    def encode_batch(self, texts, continues=()):
        # one thread: the caller has its own (the package would take one a core)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        texts = [utf8(text).decode() for text in texts]
        with package_errors(self.path):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            for i in np.flatnonzero(continues):
                ids[i] = self.encode_rest(texts[i])
        lengths = list(map(len, ids))
        return np.fromiter(itertools.chain(*ids), np.uint32, sum(lengths)), lengths

    def encode_rest(self, text: str) -> list[int]:
        """The ids of the rest of a text. Llama's tokenizers put a blank before any text, so the rest comes
        after an "a", and the id of the "a" is left out."""
        encoding = self.tokenizer.encode("a" + text, add_special_tokens=False)
        if any(start < 1 < end for start, end in encoding.offsets):  # a token of the "a" and more
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > 1]

    def known_ids(self, folder: str) -> set[int]:
        """All ids, without special tokens for which the model in `folder` has no row: Gemma 3's tokenizer has
        an image token for the larger models of its family. No text gives their ids."""
        rows = (read_optional(folder, "config.json") or {}).get("vocab_size")
        rows = rows if type(rows) is int else math.inf
        added = self.tokenizer.get_added_tokens_decoder().items()
        without_row = {i for i, token in added if token.special and i >= rows}
        ids = {*self.tokenizer.get_vocab(with_added_tokens=True).values()} - without_row
        return ids | {self.eot, *self.bos_ids}

    def recognise_special(self):
        self.tokenizer.encode_special_tokens, self.n_vocab = False, self.n_ids

    def decode(self, ids):
        return self.tokenizer.decode(self.check_ids(ids), skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


# What a checkpoint keeps


def tokenizer_files(config, folder: str | None = None) -> dict[str, bytes]:
    """{file name: bytes} that a checkpoint with this config (its `tokenizer` and `block_size`) holds beside
    its weights, so that AutoTokenizer gives our ids.

    Files in `folder` (of the data or of a model) are taken as they are. If it has none, the files of `bytes`
    and `gpt2` are made. Other tiktoken names have none; nor has `gpt2` when it cannot be fetched.
    """
    found = read_files(folder, (TOKENIZER_FILE, TOKENIZER_CONFIG, *OLDER_FILES)) if folder else {}
    if TOKENIZER_FILE in found or "vocab.json" in found or config.tokenizer not in ("bytes", "gpt2"):
        return found
    made = {TOKENIZER_FILE: bytes_tokenizer()} if config.tokenizer == "bytes" else gpt2_files()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if config.tokenizer == "bytes" else "GPT2Tokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "model_max_length": config.block_size,
        "split_special_tokens": True,  # special tokens in a text are ordinary text there, too
        "clean_up_tokenization_spaces": False,
    }
    return found | made | {TOKENIZER_CONFIG: as_json(settings)} if made else found


@functools.cache
def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in GPT-2's files: printable ones, else U+0100 and on."""
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(range(0x100, 0x200))
    return [chr(byte) if chr(byte) in letters else chr(next(others)) for byte in range(256)]


def bytes_tokenizer() -> bytes:
    """tokenizer.json of the tokenizer `bytes`: byte-level BPE that neither merges nor cuts."""
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer.to_str(pretty=True).encode()


@functools.cache  # asks the network once, so that all checkpoints of a process hold the same files
def gpt2_files() -> dict[str, bytes]:
    """vocab.json and merges.txt of `gpt2`, or {} after a line on stderr where they cannot be had."""
    try:
        from_tiktoken("gpt2")
        return {name: tiktoken.load.read_file_cached(*source) for name, source in GPT2_FILES.items()}
    except UserError as e:
        print(f"checkpoints have no tokenizer files: {e}", file=sys.stderr)
        return {}


def as_json(content: dict) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
