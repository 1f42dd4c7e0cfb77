"""A model in shards: each rank keeps its part of every parameter, gradient and moment, and gathers a block when it is
that block's turn (FSDP2), for models that outgrow one card.

torch.distributed's part of this takes long to import, so only runs with shards do it. A tensor in shards is a DTensor.
"""


def shard(model, ranks, device, compiled):
    """Shard a GPT (whole, and alike on every rank) over all ranks, in place: its parameters become DTensors on the
    device, where no more than a block at a time has been whole. `compiled`: torch.compile each block.

    Ranks must from then on call the model equally often: every call gathers. Every backward pass averages gradients
    over ranks; leaving that for the last of an accumulation would take the memory of all gradients, whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    for block in model.transformer.h:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embeddings, the tied head, the last LayerNorm


def whole(tensor):
    """A tensor in shards, put together on every rank (all must ask); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor, parameter):
    """A copy of a tensor that every rank has whole; in shards, if the parameter of its shape is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
