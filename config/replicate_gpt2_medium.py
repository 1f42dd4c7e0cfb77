# The paper's comparison on GPT-2 medium, 24 -> 16 blocks, with the controls it lacks; --dry_run has the cost.
# python replicate.py config/replicate_gpt2_medium.py        (uses all GPUs of this machine)
reference_config = "config/train_gpt2_medium.py"  # one reference for each seed
arms = "all:1 reference:3 random:3 random_matched:3 inheritune:3"  # seeds of each arm
layers = 16  # paper sec. 4
rounds_from = 12
rounds_step = 2  # paper Algorithm 1
results = "results/gpt2_medium"

out_dir = "out-replicate-gpt2-medium"

batch_tokens = 384 * 1024  # paper v4: 394K, as the reference
batch_size = 8  # per GPU and forward pass, at most
learning_rate = 3e-4  # paper sec. 3
