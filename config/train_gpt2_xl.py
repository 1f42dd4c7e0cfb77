# GPT-2 XL, 1.56B, on OpenWebText: the paper's 48-block reference.
# torchrun --nproc_per_node=8 train.py config/train_gpt2_xl.py
out_dir = "out-gpt2-xl"

n_layer = 48  # paper sec. 3, table of set-ups
n_head = 25
n_embd = 1600
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

batch_tokens = 128 * 1024  # paper v4: 128K (v2: 16K)
batch_size = 2  # per GPU and forward pass, at most
learning_rate = 1.5e-4  # paper sec. 3
