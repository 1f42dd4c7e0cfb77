# The 32-block FineWeb-Edu reference ("Large" with a dagger in the paper).
# torchrun --nproc_per_node=8 train.py config/train_gpt2_large_fineweb.py --batch_tokens=65536
# 32 blocks of 1280 make 694.9M parameters; the paper says 668M and its README 680M.
out_dir = "out-gpt2-large-fineweb"
dataset = "data/fineweb-edu"

n_layer = 32  # paper sec. 3, table of set-ups
n_head = 20
n_embd = 1280
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it

batch_tokens = 60 * 1024  # 61,440, from the released log: 2 x 10 x 3 GPUs, which 8 GPUs cannot share
batch_size = 10  # per GPU and forward pass, at most
learning_rate = 2e-4  # the released FineWeb script
beta2 = 0.999  # the released FineWeb script
