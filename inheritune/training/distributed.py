"""The processes of one run, and how they agree: a failure on any rank is the same one-line error on every rank."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from inheritune.base.errors import UserError, describe_os_error

PATIENCE = datetime.timedelta(hours=24)  # how long ranks wait for one that downloads or prepares


class Ranks:
    """This process's place among `world` processes: one alone, or as torchrun says."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.first = self.rank == 0
        self.patient = None  # gloo group for objects, with a timeout that outlasts a download

    @contextlib.contextmanager
    def joined(self, device):
        """The process group, while the run lasts: NCCL for CUDA, gloo for the rest."""
        if self.world == 1:
            yield
            return
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun --max-restarts keeps its store: without a name of their own, ranks started anew would wait for
        # the addresses of dead ones
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def agree(self, work):
        """work() on every rank, and its result; if it raises UserError or OSError anywhere, UserError everywhere."""
        result = error = None
        try:
            result = work()
        except (UserError, OSError) as e:
            error = describe_os_error(e) if isinstance(e, OSError) else str(e)
        errors = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error, group=self.patient)
        failed = next((e for e in errors if e is not None), None)
        if failed is not None:
            raise UserError(failed)
        return result

    def once(self, work):
        """work() on rank 0 alone, its result on every rank; its failure is everybody's."""
        result = [self.agree(work if self.first else lambda: None)]
        if self.world > 1:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        return result[0]

    def once_per_node(self, work):
        """work() on the first rank of each node, then on the others, which find it done: for downloads."""
        if self.local == 0:
            result = self.agree(work)
        else:
            self.agree(lambda: None)
        return result if self.local == 0 else work()

    def sum(self, tensor, device):
        """The elementwise sum of a CPU tensor over all ranks, on the CPU."""
        if self.world == 1:
            return tensor
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
        return tensor.cpu()


def seed_all(*numbers):
    """Seed torch's generators of this process from whole numbers, alike for alike numbers."""
    mixed = 0
    for n in numbers:
        mixed = (mixed * 6364136223846793005 + n + 1442695040888963407) % 2**63
    torch.manual_seed(mixed)
