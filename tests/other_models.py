"""Tiny random models of transformers that are no GPT-2 of ours, of each causal type that can be made tiny."""

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inheritune.models.initialisations import assemble
from inheritune.models.open_model import model_class, open_config, open_weights

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
# {size: names of keys that get it, where a configuration has them}
SIZES = {
    257: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length mamba_d_ssm",
    48: "intermediate_size n_inner d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size mlp_hidden_size block_ff_dim",
    32: "hidden_size d_model n_embd dim embedding_size hidden_dim word_embed_proj_dim attention_hidden_size "
    "lru_width",
    16: "shared_expert_intermediate_size moe_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size qk_head_dim",
    8: "head_dim attention_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank "
    "global_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_d_head mamba_d_state mamba_num_heads "
    "mamba_head_dim ssm_state_size state_size mamba_chunk_size chunk_size mamba_headdim index_head_dim "
    "attention_chunk_size",
    6: "sliding_window attention_window_size window_size local_attention",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts rotary_dim "
    "time_step_rank mamba_dt_rank linear_num_value_heads linear_conv_kernel_dim index_topk",
    2: "num_key_value_heads n_kv_heads multi_query_group_num num_kv_heads num_experts_per_tok top_k moe_topk "
    "moe_k num_experts_per_token linear_num_key_heads n_mamba_heads index_n_heads first_k_dense_replace "
    "max_window_layers eos_token_id eod_token_id",
    1: "n_group topk_group n_shared_experts mamba_n_groups n_groups bos_token_id",
    0: "pad_token_id",
}
SIZE_OF = {key: size for size, keys in SIZES.items() for key in keys.split()}
# tested beyond the sweep; the GPT-2 here is one that model.py refuses, and Mixtral a mixture of experts
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox"]
KINDS += ["smollm3", "gpt2", "mixtral"]
OTHERS = {
    "gpt2": {"activation_function": "relu"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "qwen2": {"use_sliding_window": True},
}


def tiny_config(kind: str, depth=4, **changes):
    config = transformers.CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    known = {*config.to_dict(), *(config.attribute_map or {})}
    sizes = {key: size for key, size in SIZE_OF.items() if key in known}
    sizes |= {key: depth for key in DEPTHS if key in known}
    if "kv_lora_rank" in known:  # keys and values are made for each head
        sizes["num_key_value_heads"] = SIZE_OF["num_attention_heads"]
    return type(config)(**sizes | OTHERS.get(kind, {}) | changes)


def build(kind: str, seed=0, **changes):
    """The model in eval mode, all parameters random and large enough for attention far from uniform.

    Raises whatever transformers raises, and ValueError for a type that keeps large sizes.
    """
    config = tiny_config(kind, **changes)
    make = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        count = make(config, dtype=torch.float32).num_parameters()
    if count > 2e7:
        raise ValueError(f"{kind} has {count:,} parameters")
    torch.manual_seed(seed)
    model = make(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def cut(folder: str, blocks: list[int]):
    """Our model with these blocks of the model in a folder."""
    config = open_config(folder)
    weights, new = open_weights(folder, config), config.with_blocks(blocks)
    model = model_class(new).empty(new)
    model.fill(assemble(weights, [(weights, i) for i in blocks], config), folder)
    return model


def without(model, blocks: list[int], idx):
    """Logits of ids idx (B, T) of a model of transformers whose blocks but `blocks` return their input."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    (stack,) = (m for m in lists if len(m) == model.config.num_hidden_layers)
    others = [block for i, block in enumerate(stack) if i not in blocks]

    def skip(block, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return type(output)((x, *output[1:])) if isinstance(output, (tuple, list)) else x

    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in others]
    try:
        with torch.no_grad():
            return model(idx, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
