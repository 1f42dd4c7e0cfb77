# The paper's three rounds on GPT-2 medium: 12, 14, 16 blocks until the 24-block reference is matched.
# python grow.py config/grow_gpt2_medium.py        (uses all GPUs of this machine)
reference = "out-gpt2-medium"
reference_config = "config/train_gpt2_medium.py"
k_start = 12  # paper sec. 4: half
k_step = 2  # paper Algorithm 1

out_dir = "out-grow-gpt2-medium"
dataset = "data/openwebtext"

batch_tokens = 384 * 1024  # paper v4: 394K, as the reference
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
