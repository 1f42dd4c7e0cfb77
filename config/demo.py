# Inheritune in minutes on a laptop without GPU or network: `make demo`, or python grow.py config/demo.py
reference_config = "config/demo_reference.py"  # trained first, into out/demo/reference
k_start = 4  # half of its 8 blocks, as the paper starts
k_step = 2

out_dir = "out/demo"
dataset = "data/pydocs"
batch_tokens = 16 * 32
batch_size = 16
max_iters = 800
eval_interval = 100
eval_tokens = 16_384
log_interval = 50

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 80
