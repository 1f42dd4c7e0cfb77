# Inheritune: the first 24 of GPT-2 XL's 48 blocks, trained on OpenWebText.
# torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_xl.py
out_dir = "out-inheritune-gpt2-xl"

# The reference: OpenAI's GPT-2 from the hub. For the paper's own, train it first
# (config/train_gpt2_xl.py) and set init_from to its run folder, out-gpt2-xl.
init_from = "gpt2-xl"
inherit_layers = 24  # paper sec. 4: half, matched in one round

batch_tokens = 128 * 1024  # paper v4: 128K, as the reference
batch_size = 4  # per GPU and forward pass, at most
learning_rate = 1.5e-4  # paper sec. 3
