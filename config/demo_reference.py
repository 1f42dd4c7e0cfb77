# The reference of config/demo.py: 8 blocks, trained from scratch on the documentation that Python carries.
dataset = "data/pydocs"
n_layer = 8
n_head = 4
n_embd = 96
block_size = 64
bias = False

batch_tokens = 32 * 64
batch_size = 32
max_iters = 1000
eval_interval = 100
eval_tokens = 65_536
log_interval = 20

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
