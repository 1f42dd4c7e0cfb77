# The reference of config/replicate_smoke.py.
dataset = "data/python"
n_layer = 8
n_head = 4
n_embd = 32
block_size = 32

batch_tokens = 16 * 32
batch_size = 16
max_iters = 120
eval_interval = 10
eval_tokens = 8192
save_interval = 60
keep_last = 1

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 10
