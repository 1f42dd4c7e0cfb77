# The reference of config/demo.py: 8 blocks, trained from scratch on the documentation that Python carries.
dataset = "data/pydocs"
n_layer = 8
n_head = 2
n_embd = 64
block_size = 64
bias = False

batch_tokens = 16 * 64
batch_size = 16
max_iters = 400
eval_interval = 50
eval_tokens = 32_768
log_interval = 25

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 40
