# GPT-2 medium, 355M, on OpenWebText: the paper's 24-block reference.
# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium.py
out_dir = "out-gpt2-medium"
dataset = "data/openwebtext"

n_layer = 24  # paper sec. 3, table of set-ups
n_head = 16
n_embd = 1024
block_size = 1024
bias = False  # paper sec. 3
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

batch_tokens = 384 * 1024  # paper v4: 394K (v2 says 50K = 48 * 1024)
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 3e-4  # paper sec. 3

max_iters = 100_000  # paper sec. 3: T = 100K everywhere
warmup_iters = 2000  # paper sec. 3
min_lr = 1e-5  # paper sec. 3: cosine to 1e-5 at the last step
weight_decay = 0.1  # paper sec. 3, on linear layers only
beta1 = 0.9
beta2 = 0.95  # paper sec. 3
grad_clip = 1.0  # paper sec. 3 (on the mean gradient; the released scripts clip its sum over micro-batches)
dropout = 0.0  # paper sec. 3
eval_interval = 1000  # the released logs
