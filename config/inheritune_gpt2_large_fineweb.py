# Inheritune on FineWeb-Edu: the first 16 of the 32-block reference.
# torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large_fineweb.py --batch_tokens=65536
out_dir = "out-inheritune-gpt2-large-fineweb"
dataset = "data/fineweb-edu"

# The reference has no released weights: train it first, config/train_gpt2_large_fineweb.py.
init_from = "out-gpt2-large-fineweb"
inherit_layers = 16  # paper sec. 4: half
n_layer = 16  # these three only restate what the reference has, so that --dry_run works before it is trained
n_head = 20
n_embd = 1280

batch_tokens = 60 * 1024  # 61,440, from the released log: 2 x 10 x 3 GPUs, which 8 GPUs cannot share
batch_size = 10  # per GPU and forward pass, at most
learning_rate = 2e-4  # the released FineWeb script
beta2 = 0.999  # the released FineWeb script
