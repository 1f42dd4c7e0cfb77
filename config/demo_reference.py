# The reference of config/demo.py: 8 blocks, trained from scratch on the documentation that Python carries.
dataset = "data/pydocs"
n_layer = 8
n_head = 4
n_embd = 64
block_size = 32

batch_tokens = 16 * 32
batch_size = 16
max_iters = 800
eval_interval = 100
eval_tokens = 16_384
log_interval = 50

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 80
