"""The one interface of a model, and the functions that open whichever model a folder holds.

There are two implementations: GPTConfig and GPT (model.py), and DecoderConfig and Decoder (hf_decoder.py) for
every other causal model that transformers opens. Outside of this file nobody asks which of the two it is:
callers use what is listed here. Whoever reads for GPT-2 alone can skip hf_decoder.py, meta_model.py and
cut_config.py.

A configuration is a frozen dataclass:
    n_layer n_head n_embd block_size vocab_size n_vocab tokenizer eot dropout
    limit                       the most tokens that the model can read; block_size is the run's choice
    num_params block_params     parameters of the model, and of its largest block
    flops_per_token             FLOPs of training, forward and backward
    block_prefix                "transformer.h.": names of block 3's tensors begin with "transformer.h.3."
    recompute_choices           the values of checkpoint_activations that the model implements
    scratch_settings            train.py's settings that make a new model like it; None: there are none
    has_parts                   whether recipes can take parts of its blocks (GPT-2's attention, MLP, …)
    scale_attn_by_inverse_layer_idx  whether block i divides attention logits by i + 1 (GPT-2 only)
    warning                     what readers of its config.json must know, or ""
    with_blocks(blocks)         the configuration of a model that has these blocks of this one
    content(dtype=torch.float32)  the content of config.json in a folder whose tensors have this dtype
    full_content()              config.json's content, with defaults for the keys that it leaves out
    arrange(parameters)         {parameter name: tensor} → the state dict of a folder, fp32 on the CPU

A model is an nn.Module; `arrange` and `fill` map its parameters to its folder's tensors:
    config blocks head          blocks: an nn.ModuleList; head: the linear layer that gives the logits
    forward(idx, targets=None)  logits (B, T, vocab_size), or the mean fp32 loss over targets (B, T)
    hidden(idx)                 what enters the head, (B, T, C)
    generate(idx, …)            yields the next ids (B,) step after step; arguments as GPT.generate's
    attention_steps(idx)        (None, what enters block 0), then each block's (attention matrices, output)
    fill(state, source)         copies a folder's state dict into the parameters; errors name `source`
    num_params()                of its parameters, tied ones once
    checkpoint_activations      what the backward pass recomputes: one of the config's `recompute_choices`
    empty(config)               a class method: the model with unset weights, to be filled
"""

from inheritune.models.hf_decoder import Decoder, DecoderConfig, read_decoder
from inheritune.weights.gpt2_format import OtherArchitecture, read_model
from inheritune.weights.tensors import LazyTensor
from model import GPT, GPTConfig

Config = GPTConfig | DecoderConfig
Model = GPT | Decoder


def open_config(folder: str) -> Config:
    """The configuration of a checkpoint folder, of which only config.json is read. Raises UserError."""
    try:
        return GPTConfig.from_folder(folder)
    except OtherArchitecture:
        return DecoderConfig.from_folder(folder)


def open_weights(folder: str, config: Config) -> dict[str, LazyTensor]:
    """The state dict of a checkpoint folder, in the stored dtype; tensors are read when they are used.

    Raises UserError unless names and shapes are those of `config`, the folder's own.
    """
    return read_model(folder)[0] if isinstance(config, GPTConfig) else read_decoder(folder, config)


def model_class(config: Config) -> type[Model]:
    """The class of a configuration's models: call it for random weights, its `empty` for unset ones."""
    return GPT if isinstance(config, GPTConfig) else Decoder


def load_model(folder: str) -> Model:
    """The model of a checkpoint folder, fp32 on the CPU. Raises UserError."""
    config = open_config(folder)
    weights = open_weights(folder, config)
    model = model_class(config).empty(config)
    model.fill(weights, folder)
    return model
