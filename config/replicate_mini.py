# The comparison at a size that two CPU cores can make: Python's own sources, as bytes; 19 hours of one core.
#   python prepare.py && python replicate.py config/replicate_mini.py
# An arm may have settings of its own: random@max_iters=500 (inheritune/experiments/arms.py).
reference_config = "config/replicate_mini_reference.py"  # one reference for each seed
arms = (
    "random:3 random@max_iters=500:3 random@max_iters=1000:3 random_2x:1 random_matched:1 "
    "inheritune:3 inheritune@max_iters=500:3 inheritune@max_iters=1000:3 inheritune@max_iters=4000:1 "
    # the other methods, for half of the reference's steps
    "released_slice@max_iters=1000:3 half_width@max_iters=1000:3 stacking@max_iters=1000:3 "
    "hybrid@max_iters=1000:3 last@max_iters=1000:3 alternate@max_iters=1000:3 "
    "first_plus_last@max_iters=1000:3 ends@max_iters=1000:3 ends@max_iters=500:1 kd@max_iters=1000:1 "
    "kd_inherit@max_iters=600:1 onto@max_iters=667:1 middle@max_iters=500:1 attn@max_iters=500:1 "
    "mlp@max_iters=500:1 attn_mlp@max_iters=500:1 "
    # Muon
    "reference@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1 "
    "random@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1 "
    "random@max_iters=1000@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:3 "
    "random@max_iters=1000@optimizer=muon@learning_rate=1.6e-2@min_lr=1.6e-3:1 "
    "inheritune@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1 "
    "inheritune@max_iters=1000@optimizer=muon@learning_rate=4e-3@min_lr=4e-4:1 "
    "inheritune@max_iters=1000@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:3 "
    "ends@max_iters=1000@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1 "
    # the search for more than the first k blocks: learning rate, warm-up, batch
    "inheritune@max_iters=1000@learning_rate=3e-3@min_lr=3e-4:1 "
    "inheritune@max_iters=1000@learning_rate=1.2e-2@min_lr=1.2e-3:1 "
    "inheritune@max_iters=1000@warmup_iters=20:1 "
    "inheritune@max_iters=2000@batch_tokens=2048@batch_size=16:1"
)
layers = 4  # half of the reference's 8 blocks
rounds_from = 2
rounds_step = 2
final_tokens = 524_288
results = "results/mini"

out_dir = "out/mini"
dataset = "data/python"
batch_tokens = 32 * 128
batch_size = 32
max_iters = 2000
eval_interval = 100
eval_tokens = 65_536
log_interval = 20
keep_last = 1
device = "cpu"
dtype = "float32"  # also where auto means bfloat16: these numbers are committed
threads = 1  # two arms side by side on two cores

learning_rate = 6e-3
min_lr = 6e-4
warmup_iters = 100
