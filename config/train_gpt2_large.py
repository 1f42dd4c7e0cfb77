# GPT-2 large, 774M, on OpenWebText: the paper's 36-block reference.
# torchrun --nproc_per_node=8 train.py config/train_gpt2_large.py
out_dir = "out-gpt2-large"

n_layer = 36  # paper sec. 3, table of set-ups
n_head = 20
n_embd = 1280
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

batch_tokens = 128 * 1024  # paper v4: 128K (v2: 16K)
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 2e-4  # paper sec. 3
