# Inheritune in minutes on a laptop without GPU or network: `make demo`, or python grow.py config/demo.py
reference = "results/mini/reference"  # 8 blocks, trained with AdamW, for half an hour, on this text
k_start = 4  # half of them, as the paper starts
k_step = 2

out_dir = "out/demo"
dataset = "data/python"
batch_tokens = 32 * 128
batch_size = 32
max_iters = 160
eval_interval = 40
eval_tokens = 65_536
dtype = "float32"  # also where auto means bfloat16: these numbers are committed

optimizer = "muon"  # a part of what is gained is the optimizer's
learning_rate = 4e-3
min_lr = 4e-4
warmup_iters = 20
