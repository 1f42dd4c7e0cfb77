# The comparison of config/replicate_mini.py on English prose (plays, Bible, addresses, a novel), one seed.
#   bash runs/english_corpus.sh && python replicate.py config/replicate_english.py
reference_config = "config/replicate_mini_reference.py"
arms = (
    "random@max_iters=1000:1 inheritune@max_iters=1000:1 "
    "random@max_iters=1000@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1 "
    "inheritune@max_iters=1000@optimizer=muon@learning_rate=8e-3@min_lr=8e-4:1"
)
layers = 4  # half of the reference's 8 blocks
rounds_from = 2
rounds_step = 2
final_tokens = 524_288
results = "results/english"

out_dir = "out/english"
dataset = "data/english"
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
