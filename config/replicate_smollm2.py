# SmolLM2-135M-Instruct, cut to half of its 30 blocks and trained on 204,800 tokens of English prose: which
# blocks to keep, and what training makes of them; controls: random initialisation, and the whole model. An
# hour an arm on one core.        bash runs/smollm2_cut.sh
reference = "data/smollm2"
arms = (
    # which 15 blocks
    "inheritune:1 first_plus_last:1 ends:1 alternate:1 consecutive:1 influence:2 greedy:2 "
    # controls: the same model from random initialisation; the whole model on the same tokens
    "random@learning_rate=2e-3@min_lr=2e-4:2 whole:1 "
    # more than next-token loss: the whole model as the teacher, for equal steps and for equal compute; Muon
    "greedy@teacher=reference@kd_alpha=0:1 greedy@max_iters=64@teacher=reference@kd_alpha=0:1 "
    "greedy@optimizer=muon:1 "
    # the search for the learning rate
    "influence@learning_rate=2e-4@min_lr=2e-5:1 influence@learning_rate=1e-3@min_lr=1e-4:1 "
    "random:1 random@learning_rate=1e-3@min_lr=1e-4:1 "
    # five times as long
    "greedy@max_iters=500:1 random@max_iters=500@learning_rate=2e-3@min_lr=2e-4:1"
)
layers = 15
final_tokens = 65_536
results = "results/smollm2_cut"

out_dir = "out/smollm2_cut"
dataset = "data/smollm2_text"
also_validate = "data/smollm2_web"
block_size = 256
batch_tokens = 8 * 256
batch_size = 8
max_iters = 100
eval_interval = 25  # every 51,200 tokens
eval_tokens = 16_384
log_interval = 5
keep_last = 1
device = "cpu"
dtype = "float32"
threads = 1  # two arms side by side on two cores

learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 10
