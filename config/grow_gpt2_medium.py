# The paper's three rounds on GPT-2 medium: 12, 14, 16 blocks until the 24-block reference is matched.
# python grow.py config/grow_gpt2_medium.py        (uses all GPUs of this machine)
reference = "out-gpt2-medium"
reference_config = "config/train_gpt2_medium.py"
k_start = 12  # paper sec. 4: half
k_step = 2  # paper Algorithm 1

out_dir = "out-grow-gpt2-medium"

batch_tokens = 384 * 1024  # paper v4: 394K, as the reference
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 3e-4  # paper sec. 3
