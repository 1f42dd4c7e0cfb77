"""Tiny random models of transformers that are no GPT-2."""

import torch
import transformers

SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
KINDS = {
    "llama": ("Llama", GROUPED),
    "qwen2": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 6}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "gemma": ("Gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 6}),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": 257, "hidden_size": 32, "num_layers": 4, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64},
    ),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}),
    "mamba": ("Mamba", {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}),
    "jamba": (
        "Jamba",
        GROUPED
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2}
        | {"mamba_d_state": 4},
    ),
}


def build(kind: str, seed=0, **changes):
    """The model in eval mode, all parameters random and large enough for attention far from uniform."""
    name, sizes = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model
