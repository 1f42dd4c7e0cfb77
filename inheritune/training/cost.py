"""What training costs, by formula: parameters, FLOPs, memory; and the share of a device's peak reached.

Nothing here makes a model; bench/memory.py compares the memory with real steps.
"""

import re

import torch

from model import CHUNKED_LOSS, LOSS_ROWS, GPTConfig

# Dense bf16 tensor-core peaks (fp32 sums; V100, T4: fp16) in TFLOP/s and memory in GB, from the makers' data
# sheets. A card is the first one all of whose words are in its name, where only FORMS may stand besides.
PEAKS = {
    "GB300": (2500, 288),
    "B300": (2250, 288),
    "GB200": (2500, 186),
    "B200": (2250, 180),
    "H200 NVL": (835, 141),
    "H200": (989, 141),
    "GH200": (989, 96),
    "H100 NVL": (835, 94),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "A100 80GB": (312, 80),
    "A100 40GB": (312, 40),
    "RTX PRO 6000 Blackwell": (504, 96),
    "RTX 6000 Ada": (364, 48),
    "RTX A6000": (155, 48),
    "L40S": (362, 48),
    "L40": (181, 48),
    "L4": (121, 24),
    "A40": (150, 48),
    "A30": (165, 24),
    "A10G": (70, 24),
    "A10": (125, 24),
    "RTX 5090": (209, 32),
    "RTX 4090": (165, 24),
    "RTX 3090": (71, 24),
    "V100": (125, 32),
    "T4": (65, 16),
}
FORMS = re.compile(
    r"NVIDIA|Tesla|GeForce|Generation|Server|Workstation|Edition|SXM\d*|PCIE?|AC|HBM\d\w*|\d+GB", re.I
)


def flops_per_token(config: GPTConfig, teacher: GPTConfig | None = None) -> float:
    """Of training, and of a teacher's forward passes: a third of what training it would take."""
    return config.flops_per_token + (teacher.flops_per_token / 3 if teacher else 0)


def training_memory(
    config: GPTConfig,
    micro_batch: int,
    accumulation: int,
    half: bool,
    shards: int = 1,
    checkpoint_activations: str = "none",
    compiled: bool = False,
    teacher: GPTConfig | None = None,
    ranks: int = 1,
) -> dict[str, float]:
    """Bytes by name on one device at the fullest moment of a step, the allocator's overhead not counted.

    half: whether autocast computes in 16 bits; shards: over how many ranks the model is sharded; ranks: over
    how many DDP trains it.
    """
    n_params = config.num_params
    rows = micro_batch * config.block_size
    embedding = 4 * config.vocab_size * config.n_embd

    # Always there. Autocast's 16-bit copies of the weights stay for the backward pass. Shards: embedding and
    # two blocks (one ahead of its turn) are gathered, as weights in 16 bits, as gradients in fp32; and only
    # blocks are compiled.
    gathered = embedding + 2 * 4 * config.block_params if shards > 1 else 0
    copies = (gathered / 2 if half else gathered) if shards > 1 else (2 * n_params if half else 0)
    weights = 4 * n_params / shards + copies
    moments = 8 * n_params / shards  # AdamW's two
    gradients = 4 * n_params / shards

    # The loss: activations and logits, and gradients if there was a backward pass before.
    fused = compiled and (teacher is not None or shards == 1)  # the loss
    kept, again = activation_bytes(config.n_layer, half, checkpoint_activations, half and shards > 1)
    tokens = rows * config.n_embd
    earlier = gathered + (gradients if accumulation > 1 or ranks > 1 else 0)  # DDP keeps them in its buckets
    loss = {
        "weights": weights,
        "moments": moments,
        "gradients": earlier,
        "activations": tokens * kept,
        "logits": logits_memory(rows, config, half, fused, teacher is not None),
    }
    # The last block's backward pass: what it computes again, and the head's gradient.
    block = loss | {"gradients": earlier + embedding, "activations": tokens * (kept + again), "logits": 0}
    # The end: all gradients, and the tied embedding's from the head, from the look-up, and their sum.
    parts = (3 if accumulation > 1 else 2) * embedding
    end = loss | {"gradients": gathered + gradients + parts, "activations": 0, "logits": 0}
    terms = max(loss, block, end, key=lambda terms: sum(terms.values()))
    return terms | {"teacher": teacher_memory(teacher, half)} if teacher else terms


def activation_bytes(n_layer: int, half: bool, checkpoint_activations: str, narrow=False) -> tuple[int, int]:
    """Bytes per token and channel: kept for the backward pass by all blocks, computed again there by one.

    narrow: whether the residual stream is in 16 bits too, as in shards; autocast leaves it in fp32.
    """
    act, x = (
        2 if half else 4,
        2 if narrow else 4,
    )  # bytes of what matrix products take and return; of the stream
    # the inputs of both norms; and in act: the norms' outputs, q k v, attention, c_fc, GELU
    everything = 2 * x + act * (2 + 3 + 1 + 4 + 4)
    if checkpoint_activations == "full":  # a block's input is kept
        return n_layer * x, everything
    if checkpoint_activations == "cheap":  # a block's input; q k v, attention, attn.c_proj, c_fc
        return n_layer * (x + act * (3 + 1 + 1 + 4)), x + act * (2 + 4)
    return n_layer * everything, 0


def logits_memory(rows: int, config: GPTConfig, half: bool, fused: bool, teacher: bool) -> int:
    """Bytes of the logits of `rows` tokens, the teacher's among them, and what the loss makes of them."""
    if teacher:  # both sides' logits and, fused, gradients in fp32 and in their dtype; else six fp32 copies
        each = (10 if half else 16) if fused else (28 if half else 32)
    elif fused:  # logits and gradient
        each = 4 if half else 8
    elif half or not CHUNKED_LOSS:  # in fp32, the log-softmax of all logits and two gradients
        each = 12
    else:  # a chunk of logits, its gradient, and the head's, which the forward pass computes already
        return min(rows, LOSS_ROWS) * config.vocab_size * 2 * 4 + 4 * config.vocab_size * config.n_embd
    return rows * config.vocab_size * each


def teacher_memory(teacher: GPTConfig, half: bool) -> int:
    """Bytes of a teacher's weights: in 16 bits its matrices, and the head then has a copy of its own."""
    n_params = teacher.num_params
    return 2 * n_params + 4 * teacher.vocab_size * teacher.n_embd if half else 4 * n_params


def mfu(tokens_per_s: float, per_token: float, device: torch.device, world: int) -> float | None:
    """Model FLOPs utilisation of a speed over all `world` devices, with `per_token` FLOPs a token; None where
    their peak is not known."""
    peak = peak_flops(device)
    return tokens_per_s * per_token / (peak * world) if peak else None


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak in FLOP/s of a CUDA device that the table knows, else None (a guess would make MFU a lie)."""
    if device.type != "cuda":
        return None
    card = find_card(torch.cuda.get_device_name(device))  # needs a GPU
    return PEAKS[card][0] * 1e12 if card else None  # needs a GPU


def find_card(name: str) -> str | None:
    """The key of PEAKS for a device's name, word for word: an A10G is no A10, a laptop's RTX 4090 is none."""
    words = set(re.split(r"[ -]", name))
    for card in PEAKS:
        own = set(card.split())
        if own <= words and all(FORMS.fullmatch(word) for word in words - own):
            return card
    return None
