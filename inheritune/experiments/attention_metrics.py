"""What an attention matrix looks like: rank, mass, entropy, sink (paper, sec. 2), as functions of the matrices alone.

A matrix A (T, T) holds in row i what position i attends to: non-negative, each row sums to 1, zero above the diagonal.
Every function takes a batch of them (…, T, T) and returns one number for each, (…), in float64 on the CPU (Apple GPUs
have no float64). Products, eigenvalues and entropies are computed on A's device in A's dtype: an attention matrix in
fp32 is no more exact than that.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

TOLERANCE = 1e-6  # of the whole: a share that reaches its threshold up to rounding has reached it


def count_to(values, share):
    """How many of the largest `values` (…, n), all ≥ 0, are needed to make up `share` of their sum; 0 of nothing."""
    values = values.cpu().double().clamp(min=0).sort(dim=-1, descending=True).values
    total = values.sum(-1, keepdim=True)
    short = values.cumsum(-1) < (share - TOLERANCE) * total  # (…, n): not there yet
    return torch.where(total[..., 0] > 0, short.sum(-1) + 1, 0).cpu().double()


def spectrum(A):
    """The squared singular values (…, T) of each matrix, ascending: the eigenvalues of A Aᵀ."""
    gram = A @ A.mT
    if A.device.type == "mps":  # needs a GPU
        gram = gram.cpu()  # no eigenvalues there
    if A.is_cuda:  # needs a GPU
        return torch.linalg.eigvalsh(gram)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # LAPACK takes one small matrix after another
        parts = gram.flatten(0, -3).chunk(torch.get_num_threads())
        return torch.cat(list(pool.map(torch.linalg.eigvalsh, parts))).view(A.shape[:-1])


def without_first(A):
    """A with column 0, the usual sink, set to zero."""
    A = A.clone()
    A[..., 0] = 0
    return A


def column_mass(A, eta=0.9):
    """m*(eta): the fewest columns that hold the share eta of ||A||² (squared Frobenius norm)."""
    return count_to(A.square().sum(-2), eta)


def entropy(A):
    """Mean entropy of a row, in nats."""
    return torch.special.entr(A).sum(-1).cpu().double().mean(-1)


def sink_mass(A):
    """What a row gives to column 0, on average; row 0 can give to nothing else and counts."""
    return A[..., 0].cpu().double().mean(-1)


def measures(A, taus=(0.9,), eta=0.9):
    """{name: one number per matrix (…)} of all of these: `rank_<tau>` is k*(tau), the fewest squared singular values
    that make up the share tau of their sum, `rank_without_first` the same for taus[0] without column 0."""
    values = spectrum(A)
    return {
        **{f"rank_{tau:g}": count_to(values, tau) for tau in taus},
        "rank_without_first": count_to(spectrum(without_first(A)), taus[0]),
        "mass": column_mass(A, eta),
        "entropy": entropy(A),
        "sink": sink_mass(A),
    }
