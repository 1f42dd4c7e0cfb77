"""The optimizer, each parameter's own learning rate, and how the optimizer's state is saved and loaded."""

import contextlib
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inheritune.base.errors import UserError, first_line
from inheritune.models.open_model import Model
from inheritune.training.device import pick_dtype
from inheritune.training.distributed import distribute, gather
from inheritune.training.settings import TrainSettings

# frozen: what a checkpoint keeps for each parameter, under "parameter name/state name"
ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
BUFFER = 2**28  # bytes of a shared buffer on the CPU, a power of two: torch rounds pinned memory up to one


def make_optimizer(model: Model, settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (paper, sec. 3), or Muon for the blocks' matrices and AdamW for the rest.

    Each of its parameter groups has a "rate": train.py multiplies the schedule's learning rate by it.
    """
    groups = parameter_groups(model, settings)
    options = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
    options["fused"] = device.type in ("cpu", "cuda")  # one kernel
    if settings.optimizer == "muon":
        return MuonAndAdamW(groups, options, pick_dtype(settings.dtype, device))
    return torch.optim.AdamW(groups, **options)


def parameter_groups(model: Model, settings: TrainSettings) -> list[dict]:
    """The parameters of a model in torch's groups, matrices of the blocks first.

    Only the blocks' matrices decay, also those that lie in a tensor of three dimensions: a mixture's experts.
    Embeddings (and a tied head), norms and biases do not.
    """
    n, decay = len(model.blocks), settings.layer_lr_decay
    layer = {p: i for i, block in enumerate(model.blocks) for p in block.parameters()}
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = {p for table in tables for p in table.parameters()}
    groups = {}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        decays = p in layer and p.dim() > 1
        matrix = decays and p.dim() == 2  # Muon takes these alone
        # layer_lr_decay=0.8 in a model of 12 blocks: the last norm and block 11 × 1, block 10 × 0.8, …,
        # block 0 × 0.8^11, embeddings × 0.8^12
        below = n if p in embeddings else n - 1 - layer.get(p, n - 1)
        rate = decay**below
        group = {"params": [], "matrices": matrix, "rate": rate}
        group["weight_decay"] = settings.weight_decay if decays else 0.0
        groups.setdefault((not matrix, not decays, rate), group)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the groups of matrices and AdamW for the others, as one optimizer with one state.

    torch's Muon takes matrices only. Its update is scaled to the size of AdamW's (`match_rms_adamw`), so both
    share one learning rate.

    dtype: what the run computes in. In a float32 run Muon orthogonalises in float32, too.
    """

    def __init__(self, groups: list[dict], options: dict, dtype: torch.dtype):
        matrices = [group for group in groups if group["matrices"]]
        others = [group for group in groups if not group["matrices"]]
        muon = torch.optim.Muon(matrices, lr=options["lr"], adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, **options)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self.parts = {True: muon, False: adamw}  # by what their groups have under "matrices"
        self.precision = KeepFloat32 if dtype == torch.float32 else contextlib.nullcontext

    @torch.no_grad()
    def step(self):
        for matrices, part in self.parts.items():  # each on its groups and the common state, as they are now
            part.param_groups = [group for group in self.param_groups if group["matrices"] == matrices]
            part.state = self.state
            with self.precision():
                part.step()


class KeepFloat32(torch.overrides.TorchFunctionMode):
    """A context in which `tensor.bfloat16()` stays what it was.

    torch's Muon calls it before it orthogonalises a matrix. Most CPUs emulate bfloat16: a product of two
    128 x 128 matrices takes an AMD Zen 3 1.65 ms in it and 0.06 ms in float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].clone()  # the caller changes it in place
        return func(*args, **(kwargs or {}))


def snapshot(
    model: Model, optimizer: torch.optim.Optimizer, into: dict | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies, on the CPU, of (parameters {"name": tensor}, optimizer state {"name/state name": tensor}).

    into: where the copies are kept. Tensors that it has already are used again, because allocating takes
        longer than copying. A rank whose `into` is None keeps nothing.

    With FSDP every rank must call, because tensors are gathered, one at a time.
    """
    parameters, state = dict(model.named_parameters()), optimizer_tensors(model, optimizer)
    named = parameters | state
    if into is not None:
        into.update(host_tensors({name: tensor for name, tensor in named.items() if name not in into}))
    for name, tensor in named.items():
        tensor = gather(tensor.detach())
        if into is not None:
            into[name].copy_(tensor, non_blocking=tensor.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # needs a GPU
    if into is None:
        return {}, {}
    return {name: into[name] for name in parameters}, {name: into[name] for name in state}


def host_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Unset tensors on the CPU with these names, shapes and dtypes, in pinned memory if any is on a GPU.

    Tensors share buffers: an allocation for each is rounded up, which took 50 % more memory for GPT-2 XL.
    """
    pinned, buffer, used, copies = any(t.is_cuda for t in tensors.values()), None, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if buffer is None or used + size > buffer.numel():
            buffer, used = torch.empty(max(BUFFER, size), dtype=torch.uint8, pin_memory=pinned), 0
        copies[name] = buffer[used : used + size].view(tensor.dtype).view(tensor.shape)
        used += (size + 63) // 64 * 64  # every dtype is aligned
    return copies


def optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as {"parameter name/state name": tensor}."""
    named = model.named_parameters()
    return {f"{name}/{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer(folder: str, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer of `model` from a checkpoint folder. Its file is empty if no step was made.

    Raises UserError when the file is missing, damaged, or of another model.
    """
    path = os.path.join(folder, "optimizer.safetensors")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} is missing or damaged ({first_line(e)}); delete the folder to go on from the one before"
        ) from None

    names, packed = {p: name for name, p in model.named_parameters()}, {}
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, group) in enumerate(parameters if tensors else ()):
        packed[i] = {}
        for key in MUON if "ns_steps" in group else ADAMW:  # Muon's groups have ns_steps
            name = f"{names[p]}/{key}"
            tensor, shape = tensors.pop(name, None), () if key == "step" else p.shape
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                raise UserError(f"{path}: {name} is missing or does not fit the model; it is another run's")
            packed[i][key] = distribute(tensor, p) if tensor.dim() else tensor.clone()
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} does not fit the model; it is another run's")
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
