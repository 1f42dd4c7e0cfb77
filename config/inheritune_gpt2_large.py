# Inheritune: the first 18 of GPT-2 large's 36 blocks, trained on OpenWebText.
# torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large.py

# The reference: OpenAI's GPT-2 from the hub. For the paper's own, train it first
# (config/train_gpt2_large.py) and set init_from to its run folder, out-gpt2-large.
init_from = "gpt2-large"
inherit_layers = 18  # paper sec. 4: half, matched in one round

batch_tokens = 128 * 1024  # paper v4: 128K, as the reference
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 2e-4  # paper sec. 3
