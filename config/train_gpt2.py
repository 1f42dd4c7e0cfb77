# GPT-2 small, 124M, on OpenWebText: the reference of the paper's lazy-transfer experiment.
# torchrun --nproc_per_node=8 train.py config/train_gpt2.py
# The defaults (inheritune/training/settings.py) are this model's.
out_dir = "out-gpt2"
scale_attn_by_inverse_layer_idx = True  # the released model.py, and v2 of the paper; v4 does not mention it
