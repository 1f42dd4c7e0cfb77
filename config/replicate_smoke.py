# Every arm of the comparison at toy size. In minutes it shows that all works, but nothing about the method:
#   python prepare.py && python replicate.py config/replicate_smoke.py
reference_config = "config/replicate_smoke_reference.py"  # one reference for each seed
arms = "all:1 reference:2 random:2 inheritune:2"  # seeds of each arm
layers = 4  # half of the reference's 8 blocks
rounds_from = 2
rounds_step = 2
seen = 0.5  # of the data, by all arms but `unseen`
results = "results/replicate_smoke"

out_dir = "out/replicate_smoke"
dataset = "data/python"
batch_tokens = 16 * 32
batch_size = 16
max_iters = 60
eval_interval = 10
eval_tokens = 8192
save_interval = 30
keep_last = 1
device = "cpu"
dtype = "float32"
threads = 1  # two arms side by side on two cores

learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 10
