# The 32-block FineWeb-Edu reference ("Large" with a dagger in the paper).
# torchrun --nproc_per_node=8 train.py config/train_gpt2_large_fineweb.py
# 32 blocks of 1280 make 694.9M parameters; the paper says 668M and its README 680M.
out_dir = "out-gpt2-large-fineweb"
dataset = "data/fineweb-edu"

n_layer = 32  # paper sec. 3, table of set-ups
n_head = 20
n_embd = 1280
block_size = 1024
bias = False  # paper sec. 3
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

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
