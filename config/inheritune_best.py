# The best use found for a trained reference at 1,000 steps: its first half under Muon (results/mini/pilot.md)
#   python prepare.py && python train.py config/inheritune_best.py
# For another model change init_from, inherit_layers, dataset and batch, and search for its learning rate.
out_dir = "out-inheritune-best"
dataset = "data/python"

init_from = "results/mini/reference"
inherit_layers = 4

batch_tokens = 32 * 128
batch_size = 32
max_iters = 1000
eval_interval = 100
eval_tokens = 65_536
dtype = "float32"  # also where auto means bfloat16: these numbers are committed

optimizer = "muon"
learning_rate = 8e-3
min_lr = 8e-4
warmup_iters = 100
