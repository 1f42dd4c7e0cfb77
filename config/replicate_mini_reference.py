# The reference of config/replicate_mini.py: 8 blocks on the Python corpus, bytes.
dataset = "data/python"
n_layer = 8
n_head = 4
n_embd = 128
block_size = 128

batch_tokens = 32 * 128
batch_size = 32
max_iters = 2000
eval_interval = 100
eval_tokens = 65_536
log_interval = 20
keep_last = 1
dtype = "float32"  # also where auto means bfloat16: these numbers are committed

learning_rate = 6e-3
min_lr = 6e-4
warmup_iters = 100
