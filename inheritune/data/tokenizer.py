"""Text to token ids and back: plain bytes, any of tiktoken's vocabularies by name, or a GPT-2-style file of ranks.

`load_tokenizer(spec)` is the only door. What comes out has `name`, `n_vocab`, `eot` (the end-of-text id), `sha256`
(of the ranks file, else None), `path` (of the ranks file, else None), `encode`, `encode_batch`, `decode_bytes`,
`decode` and `describe`. Special tokens spelled out in a text are ordinary text; only we write end-of-text ids.
"""

import base64
import binascii
import os

import numpy as np

from inheritune.base.errors import UserError, nearest
from inheritune.base.files import sha256

END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"  # what a ranks file is called inside a data or model folder
MAX_RANKS_BYTES = 64 << 20  # ten times the largest public vocabulary

# How GPT-2 cuts text into words before merging bytes, in the form that tiktoken's own `gpt2` uses.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def load_tokenizer(spec, folder=None):
    """The tokenizer called `spec`: `bytes`, a tiktoken name such as `gpt2`, or the path of a `.tiktoken` ranks file.

    A relative path is looked up in `folder` first, so the name in a data folder's meta.json finds the copy beside it.
    Raises UserError when there is no such vocabulary, it cannot be fetched, or the file is malformed.
    """
    if spec == "bytes":
        return Bytes()
    if spec.endswith(".tiktoken"):
        beside = os.path.join(folder or "", spec)
        path = beside if os.path.exists(beside) else spec
        return from_ranks(path, read_ranks(path))
    return from_tiktoken(spec)


def utf8(text):
    """The UTF-8 bytes of `text`. Half a surrogate pair, which has none, becomes U+FFFD as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Tokenizer:
    """What both kinds share. Token arrays are 1-D uint32."""

    name: str
    n_vocab: int
    eot: int
    sha256 = None
    path = None

    def encode(self, text):
        """The ids of `text` as a list of ints, without an end-of-text."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids):
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def describe(self):
        """The `tokenizer` entry of a meta.json."""
        entry = {"name": self.name, "n_vocab": self.n_vocab, "eot": self.eot}
        return entry | {"sha256": self.sha256} if self.sha256 else entry


class Bytes(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; 256 ends a text. Needs no download and no training."""

    name, n_vocab, eot = "bytes", 257, 256

    def encode_batch(self, texts):
        """One array of ids for each of `texts`."""
        return [np.frombuffer(utf8(text), np.uint8).astype(np.uint32) for text in texts]

    def decode_bytes(self, ids):
        """The bytes of `ids` (any iterable of ints); the end-of-text id shows as <|endoftext|>."""
        pieces = []
        for i in ids:
            if not 0 <= i <= self.eot:
                raise UserError(f"token id {i} is not in the bytes vocabulary (0 to {self.eot})")
            pieces.append(END_OF_TEXT.encode() if i == self.eot else bytes((i,)))
        return b"".join(pieces)


class BPE(Tokenizer):
    """Byte-pair encoding by a tiktoken.Encoding."""

    def __init__(self, name, encoding, eot, path=None, sha256=None):
        self.name, self.encoding, self.eot = name, encoding, eot
        self.n_vocab = encoding.n_vocab
        self.path, self.sha256 = path, sha256

    def encode_batch(self, texts):
        """One array of ids for each of `texts`: those of tiktoken's `encode_ordinary`, without Python lists."""
        return [self._encode(text) for text in texts]

    def _encode(self, text):
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(utf8(text).decode())
        except ValueError:  # its regular expressions overflow on about a million blanks in a row
            start = " ".join(text[:1000].split())[:60]
            message = f"tiktoken gives up on the text that begins {start!r}; shorten the runs of blanks in it"
            raise UserError(message) from None

    def decode_bytes(self, ids):
        """The bytes of `ids` (any iterable of ints); the end-of-text id shows as <|endoftext|>."""
        try:
            return self.encoding.decode_bytes(list(ids))
        except (KeyError, OverflowError) as e:
            raise UserError(f"the {self.name} vocabulary of {self.n_vocab} lacks a token id ({e})") from None


def from_tiktoken(name):
    """A vocabulary that tiktoken knows by name, fetches once, and keeps in TIKTOKEN_CACHE_DIR."""
    import requests
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        known = ", ".join(["bytes", *sorted(names)])
        hint = nearest(name, ["bytes", *names])
        raise UserError(f"no tokenizer {name!r}{hint}; choose {known} or the path of a .tiktoken ranks file")
    try:
        encoding = tiktoken.get_encoding(name)
    except (requests.RequestException, OSError, ValueError) as e:
        raise UserError(
            f"tiktoken could not fetch the {name} vocabulary ({type(e).__name__}); without a network, set "
            "TIKTOKEN_CACHE_DIR to a filled cache or give --tokenizer the path of a .tiktoken ranks file"
        ) from None
    return BPE(name, encoding, encoding.eot_token)


def from_ranks(path, ranks):
    """A GPT-2-style vocabulary from {token bytes: rank}: GPT-2's pattern, end-of-text after the last rank."""
    import tiktoken

    encoding = tiktoken.Encoding(
        name=RANKS_FILE,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )
    return BPE(RANKS_FILE, encoding, len(ranks), path, sha256(path))


def read_ranks(path):
    """{token bytes: rank} from a ranks file: on each line a token in base64, one space and its rank.

    Raises UserError naming file and line unless the ranks are 0 to n-1, each once, the tokens differ, and all
    256 single bytes are among them, so that every text can be encoded and every id decoded.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no tokenizer file {path}")
    size = os.path.getsize(path)
    if size > MAX_RANKS_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a ranks file has at most {MAX_RANKS_BYTES:,}")
    with open(path, "rb") as f:
        lines = f.read().splitlines()

    ranks, taken = {}, {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        encoded, space, rank = line.partition(b" ")
        if not space or not rank.isdigit() or len(rank) > 9:
            raise UserError(f"{where}: expected a token in base64, one space and its rank")
        try:
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except binascii.Error:
            raise UserError(f"{where}: {encoded[:40].decode('latin-1')!r} is not base64") from None
        if not token:
            raise UserError(f"{where}: the token is empty")
        if token in ranks:
            raise UserError(f"{where}: the token of rank {ranks[token]} a second time")
        if rank in taken:
            raise UserError(f"{where}: rank {rank} is taken by line {taken[rank]}")
        ranks[token], taken[rank] = rank, number

    for byte in range(256):
        if bytes((byte,)) not in ranks:
            raise UserError(f"{path}: no token for byte {byte}; it is cut short or not a ranks file")
    missing = next((rank for rank in range(len(ranks)) if rank not in taken), None)
    if missing is not None:
        raise UserError(f"{path}: {len(ranks)} tokens, but none of them has rank {missing}")
    return ranks
