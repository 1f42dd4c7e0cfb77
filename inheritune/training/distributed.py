"""The processes of one run: how they agree, and how they train one model (DDP, or FSDP2 with --shard).

FSDP2 is imported by runs with --shard alone, because that takes a second.
"""

import contextlib
import datetime
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from inheritune.base.errors import Stopped, UserError, error_line, is_one_line
from inheritune.models.open_model import Model

BUCKETS = 12  # gradient buckets of DDP in a large model, roughly; each is a graph of a compiled model
PATIENCE = datetime.timedelta(hours=24)  # how long ranks wait for one that downloads or prepares


class AgreedError(UserError):
    """A UserError that every rank raises at the same place, so that rank 0 can print it for all."""


class Ranks:
    """The processes of a run, as one of them sees them. `Ranks()` is a process on its own."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0):
        self.rank, self.world = rank, world  # this process's number, and how many there are
        self.local = local  # this process's number on its machine
        self.is_first = self.rank == 0
        self.patient = None  # gloo group for objects, with a timeout that outlasts a download

    @contextlib.contextmanager
    def joined(self, device: str | torch.device) -> Iterator[None]:
        """A context with torch's process group: NCCL for GPUs, gloo for other devices.

        An error that only this rank raises ends the process at once. To take the group down would wait for
        the other ranks, which may be in the middle of a collective.
        """
        if self.world == 1:
            yield
            return
        self.join(device)
        try:
            yield
        except (AgreedError, Stopped):  # all ranks raise these
            dist.destroy_process_group()
            raise
        except (Exception, KeyboardInterrupt) as e:
            if isinstance(e, KeyboardInterrupt):
                said = "interrupted twice, ended at once"
            elif is_one_line(e):
                said = error_line(e)
            else:
                said = "".join(traceback.format_exception(e)).rstrip()
            sys.stdout.flush()
            print(f"{os.path.basename(sys.argv[0])}: rank {self.rank}: {said}", file=sys.stderr, flush=True)
            os._exit(1)
        dist.destroy_process_group()

    def join(self, device):
        """Make the process group."""
        on_gpu = torch.cuda.is_available() and str(device).split(":")[0] in ("auto", "cuda")
        needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
        needed += ["LOCAL_RANK"] if on_gpu and torch.cuda.device_count() > 1 else []  # which GPU is ours
        lacking = [name for name in needed if name not in os.environ]
        if lacking:
            raise UserError(
                f"WORLD_SIZE is {self.world}, but {', '.join(lacking)} not set: use torchrun, or unset it"
            )
        # torchrun's store survives a restart, and still holds the addresses of the dead ranks. So its keys
        # begin with the number of restarts. Several machines may count these differently: that is refused.
        env = os.environ
        shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and env["GROUP_WORLD_SIZE"] != "1" and env["TORCHELASTIC_MAX_RESTARTS"] != "0":
            raise UserError(
                "--max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                "environment of torchrun, and --rdzv_backend=c10d"
            )
        store, rank, world = next(dist.rendezvous("env://"))
        if shared:
            store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def agree(self, work: Callable[[], Any]) -> Any:
        """work() on every rank. A UserError or OSError on one of them becomes an AgreedError on all."""
        result = error = None
        try:
            result = work()
        except (UserError, OSError) as e:
            error = error_line(e)
        errors = [error]
        if self.world > 1:
            errors *= self.world
            dist.all_gather_object(errors, error, group=self.patient)
        if any(errors):
            raise AgreedError(next(filter(None, errors)))
        return result

    def once(self, work: Callable[[], Any]) -> Any:
        """work() on rank 0 alone. All ranks return its result, or raise its AgreedError."""
        result = [self.agree(work if self.is_first else lambda: None)]
        if self.world > 1:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        return result[0]

    def once_per_node(self, work: Callable[[], Any]) -> Any:
        """work() on the first rank of each machine, then on the others, which find a download there."""
        result = self.agree(work if self.local == 0 else lambda: None)
        return result if self.local == 0 else work()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Asked on the CPU, so that nobody waits for a GPU."""
        asked = torch.tensor(float(flag))
        if self.world > 1:
            dist.all_reduce(asked, group=self.patient)
        return asked.item() > 0

    def sum(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The elementwise sum of a CPU tensor over all ranks, on the CPU."""
        if self.world == 1:
            return tensor
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
        return tensor.cpu()


class DistributedModel:
    """A model that all ranks train: each has all of it (DDP), or a part of every tensor (FSDP2, --shard).

    Attributes:
    module: the plain model, whose parameters are trained and saved
    forward: what training calls; it averages gradients over ranks
    local_forward: what validation calls. Under FSDP2 every rank must call it equally often (each call
        gathers); under DDP not.
    autocast_dtype: of the callers' autocast; fp32 means none

    Arguments:
    dtype: what the model computes in
    compiled: whether torch compiles it
    shard: FSDP2 in place of DDP, if there are several ranks
    """

    def __init__(
        self, module: Model, ranks: Ranks, device: torch.device, dtype: torch.dtype, compiled, shard
    ):
        self.module, self.device = module, device
        self.sharded = shard and ranks.world > 1
        self.autocast_dtype = torch.float32 if self.sharded else dtype  # FSDP2 has a dtype of its own
        if self.sharded:
            shard_blocks(module, ranks, device, dtype, compiled)
            self.forward = self.local_forward = module
            return
        module.to(device)
        # dynamic=False: a smaller last group of a validation would make all graphs after it dynamic
        self.forward = self.local_forward = torch.compile(module, dynamic=False) if compiled else module
        if ranks.world > 1:
            ids, mb = [device.index] if device.type == "cuda" else None, 4 * module.num_params() / 2**20
            bucket = mb / BUCKETS if mb > 25 * BUCKETS else None  # None: torch's own 25 MB
            self.forward = DistributedDataParallel(
                self.local_forward, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=bucket
            )

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """The context of a micro-batch's forward and backward pass.

        DDP averages gradients over ranks in the last micro-batch of a step. FSDP does it in every one, as
        gradients that wait are not sharded.
        """
        ddp = isinstance(self.forward, DistributedDataParallel)
        return self.forward.no_sync() if ddp and not last else contextlib.nullcontext()

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradient to max_norm (0: leave it); return the norm it had, the same on all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm or math.inf)
        return gather(norm).item()

    def zero_gradients(self) -> None:
        """Drop the gradients. DDP's are set to zero: they are views of its buckets, which it keeps."""
        self.module.zero_grad(set_to_none=not isinstance(self.forward, DistributedDataParallel))

    @contextlib.contextmanager
    def validating(self) -> Iterator[torch.nn.Module]:
        """A context that gives validation its forward, and returns to training afterwards.

        After a forward pass FSDP keeps embeddings and head gathered, for a backward pass. Here is none, so
        they are sharded again.
        """
        yield self.local_forward
        self.forward.train()  # here and not in every step, because it walks over all modules
        if self.sharded:
            self.module.reshard()


def shard_blocks(module, ranks, device, dtype, compiled):
    """Shard a model, alike on every rank, over all ranks: its parameters become DTensors on the device.

    Block after block goes to the device, so that it never holds the whole model. FSDP gathers parameters in
    `dtype`, and the model computes in it. (Under autocast it would gather fp32, and 16-bit copies would come
    on top.) Gradients are summed in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if compiled:
        # One graph serves all blocks, unless scale_attn_by_inverse_layer_idx gives each another constant.
        # Then each has graphs of its own, for training and for validation; torch would stop after eight.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(module.blocks))
    mesh = init_device_mesh(device.type, (ranks.world,))
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)}
    for block in module.blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, **options)
    if compiled:  # as one kernel it holds no fp32 copies of the logits
        module.loss = torch.compile(module.loss, dynamic=False)
    fully_shard(module, **options)  # embeddings, head, the last norm


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, whole on every rank (all ranks must call); any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor of a checkpoint's file as the optimizer keeps it: sharded like `parameter`, or a copy.
    (On a GPU the optimizer makes a copy itself.)"""
    if not hasattr(parameter, "full_tensor"):
        return tensor if parameter.is_cuda else tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def seed_all(*numbers: int) -> None:
    """Seed torch's generators in this process from whole numbers."""
    # frozen: the mixing of seeds
    mixed = 0
    for n in numbers:
        mixed = (mixed * 6364136223846793005 + n + 1442695040888963407) % 2**63
    torch.manual_seed(mixed)
