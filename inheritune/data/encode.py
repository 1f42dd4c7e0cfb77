"""Tokenising in order with many processes: pieces of text in, batches of token bytes out, as if one had done it all."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

import numpy as np

from inheritune.base.errors import UserError
from inheritune.data.tokenizer import load_tokenizer, utf8

BATCH = 1 << 18  # characters that a worker tokenises at a time; larger ones are no faster, and fragment memory


def dtype_of(tokenizer):
    """uint16 where it can hold every id, else uint32; both little-endian."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def batched(pieces, stream_of, documents):
    """Yield ((position after, documents ended, share done), [(stream, text, ends), ...]) of about BATCH characters.

    `documents` is how many documents ended before the first piece.
    """
    batch, size = [], 0
    for piece in pieces:
        batch.append((stream_of(documents), piece.text, piece.end))
        documents += piece.end
        size += len(piece.text) + 20  # so that a million empty documents are no single batch
        if size >= BATCH:
            yield (piece.at, documents, piece.done), batch
            batch, size = [], 0
    if batch:
        yield (piece.at, documents, piece.done), batch


def encode_batch(batch, tokenizer):
    """{stream: (bytes of its ids, documents ended, bytes of text)} of a batch, an end-of-text after each document."""
    dtype = dtype_of(tokenizer)
    eot = np.array([tokenizer.eot], dtype)
    encoded = {}
    arrays = tokenizer.encode_batch([text for _, text, _ in batch])
    for (stream, text, ends), ids in zip(batch, arrays, strict=True):
        parts, ended, n_bytes = encoded.get(stream, ([], 0, 0))
        parts += [ids.astype(dtype), eot] if ends else [ids.astype(dtype)]
        encoded[stream] = parts, ended + ends, n_bytes + len(utf8(text))
    return {name: (np.concatenate(parts).tobytes(), ended, n) for name, (parts, ended, n) in encoded.items()}


def encode_in_order(batches, tokenizer, num_proc):
    """Yield (what came with it, `encode_batch` of it) for each of `batches`, in their order.

    With more than one process, two batches for each are under way at most, so memory does not grow. A text of
    less than 16 batches is not worth starting them.
    """
    first = list(itertools.islice(batches, 16))
    few = len(first) < 16
    batches = itertools.chain(iter(first), batches)
    del first
    if num_proc == 1 or few:
        for state, batch in batches:
            yield state, encode_batch(batch, tokenizer)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_proc,
        multiprocessing.get_context("spawn"),  # forking a process with threads (Arrow's, tqdm's) can hang
        start_worker,
        (tokenizer.path or tokenizer.name,),
    )
    waiting = collections.deque()
    try:
        for state, batch in batches:
            waiting.append((state, pool.submit(encode_in_worker, batch)))
            if len(waiting) == 2 * num_proc:
                state, encoded = waiting.popleft()
                yield state, encoded.result()
        while waiting:
            state, encoded = waiting.popleft()
            yield state, encoded.result()
    except concurrent.futures.process.BrokenProcessPool:
        message = "a tokenising process died (out of memory?); run again, with a smaller --num_proc, to go on"
        raise UserError(message) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(spec):
    """Get a worker process ready: it has its own tokenizer, leaves Ctrl-C to its parent, and dies with it."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, daemon=True).start()
    worker_tokenizer = load_tokenizer(spec)


def die_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode_in_worker(batch):
    return encode_batch(batch, worker_tokenizer)
