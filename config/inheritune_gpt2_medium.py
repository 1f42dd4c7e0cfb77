# Inheritune: the first 16 of GPT-2 medium's 24 blocks, trained on OpenWebText.
# torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_medium.py
out_dir = "out-inheritune-gpt2-medium"

# The reference: OpenAI's GPT-2 from the hub. For the paper's own, train it first
# (config/train_gpt2_medium.py) and set init_from to its run folder, out-gpt2-medium.
init_from = "gpt2-medium"
inherit_layers = (
    16  # paper sec. 4: of rounds 12, 14, 16 the last matched; config/grow_gpt2_medium.py runs all
)

batch_tokens = 384 * 1024  # paper v4: 394K, as the reference
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 3e-4  # paper sec. 3
