#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --job-name=inheritune --dependency=singleton --requeue
#SBATCH --signal=TERM@120
# One training on four machines under Slurm. Submit it as often as the run needs, it runs one at a time and goes on from
# the last checkpoint:  sbatch runs/slurm.sh config/train_gpt2_medium.py
# The clone and its data and out folders must be on storage that all machines see. Two minutes before the time is up
# Slurm sends SIGTERM (--signal): train.py saves a checkpoint and ends. Not tried on a cluster.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # for --max-restarts: each torchrun counts its own
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100    # seconds to save; a torch that does not know it gives 30
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
  --rdzv_id="$SLURM_JOB_ID" train.py "$@" --resume=auto
