"""What training costs, by formula: FLOPs and memory.

Nothing here makes weights; bench/memory.py compares the memory with real steps.
"""

from dataclasses import replace

import torch

from inheritune.models.open_model import Config
from inheritune.training.device import is_compiled, pick_dtype
from inheritune.training.settings import TrainSettings
from model import CHUNKED_LOSS, LOSS_ROWS


def flops_with_teacher(config: Config, teacher: Config | None = None) -> float:
    """FLOPs of a token in training, a teacher's forward pass among them: a third of training the teacher."""
    if teacher is None:
        return config.flops_per_token
    return config.flops_per_token + replace(teacher, block_size=config.block_size).flops_per_token / 3


def training_memory(plan, settings: TrainSettings, shards: int = 1) -> dict[str, float]:
    """{name: bytes} on one device at the fullest moment of a step: of a GPU, unless the settings say CPU. The
    allocator's overhead is not counted.

    Every model is counted as if it were a GPT-2 of its width: MLP of 4 C, as many keys as queries, tied head.

    plan: a planning.Plan, of which model, teacher, batch and number of ranks count
    shards: over how many ranks the model is sharded; 1: it is trained by DDP
    """
    s, config, teacher = settings, plan.config, plan.teacher
    device = torch.device("cpu" if s.device == "cpu" else "cuda")
    half = s.dtype != "float32" and (device.type == "cuda" or pick_dtype(s.dtype, device) != torch.float32)
    compiled = is_compiled(s.compile, device)
    n_params, act = config.num_params, 2 if half else 4
    rows = plan.micro_batch * config.block_size
    embedding = config.vocab_size * config.n_embd

    # What is always there. Autocast's 16-bit copies of the weights stay for the backward pass. Of a sharded
    # model the embedding and two blocks (one is fetched early) are gathered.
    copies = 2 * n_params if half else 0
    if shards > 1:
        copies = act * (embedding + 2 * config.block_params)
    weights = 4 * n_params / shards + copies
    # Muon has one moment for a block's parameter, not two (counted for norms, too)
    muon = 4 * config.n_layer * config.block_params if s.optimizer == "muon" else 0
    moments = (8 * n_params - muon) / shards
    gradients = 4 * n_params / shards

    def memory_at(gradients, activations, logits=0):
        names = "weights", "moments", "gradients", "activations", "logits"
        return dict(zip(names, (weights, moments, gradients, activations, logits), strict=True))

    # When the loss is taken: activations and logits, and gradients if there was a backward pass before. The
    # head's gradient comes later; in a sharded model it is there together with the logits.
    kept, recomputed = activation_bytes(config.n_layer, half, s.checkpoint_activations, half and shards > 1)
    tokens = rows * config.n_embd
    ddp = shards == 1 and plan.world > 1  # which keeps the gradients in its buckets
    earlier = gradients if plan.accumulation > 1 or ddp else 0
    of_head = (act if shards > 1 else 4) * embedding
    logits = logits_memory(rows, config, half, compiled, teacher is not None)
    loss = memory_at(earlier + (of_head if shards > 1 else 0), tokens * kept, logits)
    # In the last block's backward pass: what it recomputes, and the head's gradient.
    block = memory_at(earlier + of_head, tokens * (kept + recomputed))
    # At the end: all gradients, and two more of the tied embedding (head, look-up); with accumulation
    # also the sum.
    parts = (3 if plan.accumulation > 1 else 2) * of_head
    end = memory_at(gradients + parts, 0)
    terms = max(loss, block, end, key=lambda terms: sum(terms.values()))
    return terms | {"teacher": teacher_memory(teacher, half)} if teacher else terms


def activation_bytes(n_layer: int, half: bool, checkpoint_activations: str, narrow=False) -> tuple[int, int]:
    """Bytes per token and channel: (those that all blocks keep for the backward pass, those that one of them
    recomputes there).

    narrow: whether blocks return 16 bits, as in a sharded model; under autocast they return fp32
    """
    act = 2 if half else 4  # bytes of what a matrix product reads and returns
    x = 2 if narrow else 4  # bytes of what a block returns
    # 2 x: the inputs of both norms; times act: the norms' outputs, q k v, attention, c_fc, GELU
    everything = 2 * x + act * (2 + 3 + 1 + 4 + 4)
    if checkpoint_activations == "full":  # keeps a block's input
        return n_layer * x, everything
    if checkpoint_activations == "cheap":  # keeps a block's input; q k v, attention, attn.c_proj, c_fc
        return n_layer * (x + act * (3 + 1 + 1 + 4)), x + act * (2 + 4)
    return n_layer * everything, 0


def logits_memory(rows: int, config: Config, half: bool, compiled: bool, teacher: bool) -> int:
    """Bytes of the logits of `rows` tokens, of a teacher's logits, and of what the loss makes of both.

    A compiled loss is one kernel, which makes no fp32 copies.
    """
    act = 2 if half else 4  # bytes of a logit
    if teacher:
        each = 2 * act  # both sides' logits
        each += 4 if compiled else 6 * 4  # the gradient in fp32, or six copies in fp32
    elif compiled:
        each = act  # the gradient takes the place of the logits
    elif half or not CHUNKED_LOSS:
        each = 3 * 4  # in fp32, the log-softmax of all logits and two gradients
    else:  # a chunk of logits, its gradient, and the head's, which the forward pass computes already
        return min(rows, LOSS_ROWS) * config.vocab_size * 2 * 4 + 4 * config.vocab_size * config.n_embd
    return rows * config.vocab_size * each


def teacher_memory(teacher: Config, half: bool) -> int:
    """Bytes of a teacher's weights. With `half`, linear layers and the head, which is untied then, take 2
    bytes a parameter; the embedding takes 4."""
    embedding = teacher.vocab_size * teacher.n_embd
    return 2 * teacher.num_params + 4 * embedding if half else 4 * teacher.num_params
