# GPT-2 medium, 355M, on OpenWebText: the paper's 24-block reference.
# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium.py
out_dir = "out-gpt2-medium"

n_layer = 24  # paper sec. 3, table of set-ups
n_head = 16
n_embd = 1024
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

batch_tokens = 384 * 1024  # paper v4: 394K (v2 says 50K = 48 * 1024)
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 3e-4  # paper sec. 3
