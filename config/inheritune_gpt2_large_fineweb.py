# Inheritune on FineWeb-Edu: the first 16 of the 32-block reference.
# torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large_fineweb.py
out_dir = "out-inheritune-gpt2-large-fineweb"
dataset = "data/fineweb-edu"

# The reference has no released weights: train it first, config/train_gpt2_large_fineweb.py.
init_from = "out-gpt2-large-fineweb"
inherit_layers = 16  # paper sec. 4: half
n_layer = 16  # these four only restate what the reference has, so that --dry_run works before it is trained
n_head = 20
n_embd = 1280
bias = False

batch_tokens = 60 * 1024  # 61,440, from the released log (2 x 10 x 3 GPUs); on 8 GPUs use --batch_tokens=65536
batch_size = 10  # per GPU and forward pass, at most
learning_rate = 2e-4  # the released FineWeb script

max_iters = 100_000  # paper sec. 3: T = 100K everywhere
warmup_iters = 2000  # paper sec. 3
min_lr = 1e-5  # paper sec. 3: cosine to 1e-5 at the last step
weight_decay = 0.1  # paper sec. 3, on linear layers only
beta1 = 0.9
beta2 = 0.999  # the released FineWeb script
grad_clip = 1.0  # paper sec. 3 (on the mean gradient; the released scripts clip its sum over micro-batches)
dropout = 0.0  # paper sec. 3
eval_interval = 1000  # the released logs
