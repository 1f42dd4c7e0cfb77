"""Set before torch is imported: one thread (the bits of a sum depend on their number), and no hub to wait for."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CUDA_VISIBLE_DEVICES="", WANDB_MODE="offline"
)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the tests themselves are one process
    os.environ.pop(name, None)
