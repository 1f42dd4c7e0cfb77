"""The Hugging Face GPT-2 layout, which is also ours: `config.json` + `model.safetensors`, read and written.

Transformers and lm-eval open a checkpoint folder as it is. What GPT-2's layout has no room for stands as extra keys
in config.json: `bias` (a model without biases carries zeros, and drops them again when we read it), `n_vocab` and
`tokenizer`. Files from the hub differ from what `save_pretrained` writes; both are read, and what model.py does not
implement is refused by name.
"""

import contextlib
import os
import re
from collections.abc import Mapping

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, sync_folder, write_json
from inheritune.weights.tensors import DTYPES, pieces, read_header, stored, write_tensors

INPUT_FIRST = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)  # (in, out) on disk

MOST = {
    "n_layer": 1000,
    "n_head": 2**16,
    "n_embd": 2**20,
    "n_positions": 2**26,
    "vocab_size": 2**26,
}  # or it is damaged


def download(name, weights=True):
    """Fetch a Hugging Face GPT-2 (an id such as gpt2-large) and return the local folder of its files; without
    `weights` only its config.json.

    Raises UserError in one line when there is no such model, no network, or only a pickle file.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what goes wrong is said once, below

    def cached(file):
        return isinstance(hub.try_to_load_from_cache(name, file), str)

    def fetch(file):
        try:
            return hub.hf_hub_download(name, file)
        except LocalEntryNotFoundError:  # also an EntryNotFoundError, but means: could not ask
            raise
        except EntryNotFoundError:
            return None

    try:
        if not cached("config.json"):  # ask once, before the client's half minute of retries
            with contextlib.suppress(EntryNotFoundError):
                hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=10)
        config = fetch("config.json")
        if config is None:  # needs the hub
            raise UserError(f"{name} on the Hugging Face hub has no config.json: not a transformers model")
        whole, parts = "model.safetensors", "model.safetensors.index.json"
        if weights and (
            cached(parts) or not fetch(whole)
        ):  # no question about what is not there: it may be offline
            index = fetch(parts)
            shards = set(read_index(index).values()) if index else {whole}
            for shard in sorted(shards):
                if fetch(shard) is None:
                    raise UserError(
                        f"{name} on the Hugging Face hub has no {shard}, perhaps only a pickle, which is never "
                        "opened: convert it with transformers' save_pretrained and give that folder"
                    )
    except UserError:
        raise
    except RepositoryNotFoundError:  # needs the hub
        raise UserError(f"no folder {name!r} here and no model of that id on the Hugging Face hub") from None
    except (
        Exception
    ) as e:  # the hub client's own errors, its HTTP library's, the disk's: all mean "not to be had"
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"no folder {name!r} here, and the Hugging Face hub did not give it ({type(e).__name__}: {reason:.150}); "
            "check the name and the network, or give a folder that holds config.json and model.safetensors"
        ) from None
    return os.path.dirname(config)


def read_index(path):
    """{tensor name: file name} of a sharded model. Raises UserError."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(f, str) and os.path.basename(f) == f and f.endswith(".safetensors")
        for f in shards.values()
    ):
        raise UserError(f"{path} has no usable weight_map; fetch the model again")
    return shards


def read_config(folder):
    """The configuration of a checkpoint folder (or of nanoGPT's ckpt.pt): a dict with the fields of model.GPTConfig.
    Raises UserError, naming everything that model.py does not implement."""
    if os.fspath(folder).endswith(".pt"):
        from inheritune.weights import nanogpt  # which builds on this file

        return nanogpt.read(folder)[1]
    path = os.path.join(folder, "config.json")
    c = read_json(path)
    if c.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}; only gpt2 is implemented")
    sizes = {k: c.get(k) for k in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    bad = [
        f"{k} is {v!r:.50} (1 to {MOST[k]:,})"
        for k, v in sizes.items()
        if type(v) is not int or not 0 < v <= MOST[k]
    ]
    if not bad and sizes["n_embd"] % sizes["n_head"]:
        bad.append(f"n_embd {sizes['n_embd']} is not a multiple of n_head {sizes['n_head']}")
    if bad:
        raise UserError(f"{path}: {', '.join(bad)}")
    required = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * c["n_embd"]),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
        "scale_attn_weights": (True,),
        "layer_norm_epsilon": (1e-5,),
    }
    refused = [f"{k}={c[k]!r}" for k, ok in required.items() if k in c and c[k] not in ok]
    if refused:
        raise UserError(f"{path}: {', '.join(refused)} is not implemented here (GPT-2 as released is)")
    n_vocab = c.get("n_vocab", c["vocab_size"])
    tokenizer = c.get("tokenizer", "gpt2" if n_vocab == 50257 else "")
    eot = c.get("eos_token_id")
    if type(n_vocab) is not int or not 0 < n_vocab <= c["vocab_size"]:
        raise UserError(f"{path}: n_vocab {n_vocab!r} is not between 1 and vocab_size {c['vocab_size']}")
    if not isinstance(tokenizer, str) or type(c.get("bias", True)) is not bool:
        raise UserError(f"{path}: tokenizer must be a name and bias true or false")
    return dict(
        block_size=c["n_positions"],
        vocab_size=c["vocab_size"],
        n_layer=c["n_layer"],
        n_head=c["n_head"],
        n_embd=c["n_embd"],
        dropout=0.0,
        bias=c.get("bias", True),
        scale_attn_by_inverse_layer_idx=bool(c.get("scale_attn_by_inverse_layer_idx", False)),
        n_vocab=n_vocab,
        tokenizer=tokenizer,
        # small vocabularies made by hand often keep GPT-2's 50256 in their config: then nothing ends a text
        eot=eot if type(eot) is int and 0 <= eot < n_vocab else n_vocab - 1,
    )


def config_json(config):
    """config.json's content for a model with `config` (a dict): what transformers reads, and our extra keys last."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config["vocab_size"],
        "n_positions": config["block_size"],
        "n_ctx": config["block_size"],
        "n_embd": config["n_embd"],
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": config["dropout"],
        "attn_pdrop": config["dropout"],
        "resid_pdrop": config["dropout"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config["scale_attn_by_inverse_layer_idx"],
        "tie_word_embeddings": True,
        "bos_token_id": config["eot"],
        "eos_token_id": config["eot"],
        "torch_dtype": "float32",
        "bias": config["bias"],
        "n_vocab": config["n_vocab"],
        "tokenizer": config["tokenizer"],
    }


class Weights(Mapping):
    """The tensors of a checkpoint folder by their canonical names (`transformer.…`), none read yet (tensors.Lazy).

    They have Hugging Face's orientation and the file's dtype. Names without the `transformer.` prefix are accepted,
    causal-mask buffers and the copy of the tied head are left out. Raises UserError for damaged or missing files.
    """

    def __init__(self, folder):
        self.folder, self.tensors = folder, {}
        index = os.path.join(folder, "model.safetensors.index.json")
        names = sorted(set(read_index(index).values())) if os.path.exists(index) else ["model.safetensors"]
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                pickled = os.path.exists(os.path.join(folder, "pytorch_model.bin"))
                hint = "only a pickle, which is never opened: save it with transformers' save_pretrained"
                raise UserError(
                    f"{folder} has no {name}{', ' + hint if pickled else '; is it a checkpoint?'}"
                )
            entries = read_header(path)
            file = open(path, "rb")  # noqa: SIM115  (as long as one of its tensors is in use)
            for key, (dtype, shape, offset) in entries.items():
                canonical = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
                if re.search(r"\.attn\.(bias|masked_bias)$", canonical):
                    continue
                if canonical in self.tensors:
                    raise UserError(f"{path} holds {canonical} twice")
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {canonical} is of type {dtype}, not one of {', '.join(DTYPES)}")
                self.tensors[canonical] = stored(file, canonical, dtype, shape, offset)
        head, wte = (self.tensors.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
        if head is not None and wte is not None:
            same = head.shape == wte.shape and len(wte.shape) == 2
            if not same or not all(map(torch.equal, pieces(head), pieces(wte))):
                raise UserError(
                    f"{folder}: lm_head.weight differs from wte.weight; untied heads are not implemented"
                )
            del self.tensors["lm_head.weight"]

    def __getitem__(self, name):
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def shapes(config):
    """{canonical name: shape in Hugging Face's orientation} of every tensor that a folder with `config` must hold."""
    C = config["n_embd"]
    block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C),
        "mlp.c_proj.bias": (C,),
    }
    wanted = {
        "transformer.wte.weight": (config["vocab_size"], C),
        "transformer.wpe.weight": (config["block_size"], C),
    }
    for i in range(config["n_layer"]):
        wanted |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    return wanted | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def check_weights(weights, config):
    """Raise UserError unless `weights` (a Weights) hold exactly the tensors of `config`, in the right shapes."""
    wanted = shapes(config)
    wrong = [f"{n} is missing" for n in wanted if n not in weights]
    wrong += [f"{n} is not a GPT-2 tensor" for n in weights if n not in wanted]
    found = {n: tuple(weights[n].shape) for n in wanted if n in weights}
    wrong += [f"{n} is {s}, config.json says {wanted[n]}" for n, s in found.items() if s != wanted[n]]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{weights.folder}: {'; '.join(wrong[:3])}{more}")


def open_model(folder):
    """(Weights, configuration as from `read_config`) of a checkpoint folder, checked against each other, or what serves
    as those of a ckpt.pt. Raises UserError."""
    if os.fspath(folder).endswith(".pt"):
        from inheritune.weights import nanogpt

        weights, config = nanogpt.read(folder)
    else:
        config, weights = read_config(folder), Weights(folder)
    check_weights(weights, config)
    return weights, config


def fill(parameters, state, source):
    """Copy `state` (canonical names, Hugging Face's orientation, any float dtype) into a model's parameters
    {name: tensor}.

    Raises UserError, naming `source`, when a model without biases would lose biases that are not zero.
    """
    with torch.no_grad():
        for name in state:
            if name in parameters:
                p = parameters[name].t() if name.endswith(INPUT_FIRST) else parameters[name]
                start = 0
                for piece in pieces(state[name]):
                    p[start : start + len(piece)].copy_(piece)
                    start += len(piece)
            elif state[name][:].any():
                raise UserError(f"{source}: {name} is not zero, though its config.json says bias: false")


def arrange(parameters, config):
    """A model's parameters {name: tensor} as a Hugging Face state dict: fp32 on the CPU, zeros for the biases that it
    does not have."""
    state = {}
    for name, shape in shapes(config).items():
        if name in parameters:
            p = parameters[name].detach().to("cpu", torch.float32)
            state[name] = p.t().contiguous() if name.endswith(INPUT_FIRST) else p.contiguous()
        else:
            state[name] = torch.zeros(shape)
    return state


def write_model(folder, state, config, tokenizer_files):
    """Write config.json and model.safetensors into an existing folder and fsync them; returns the latter's sha256.

    `state` has canonical names and Hugging Face's orientation; its tensors may be Lazy. The tokenizer's files,
    {file name: bytes}, go beside them. The folder is not yet what anybody looks for: the caller renames it into place.
    """
    digest = write_tensors(os.path.join(folder, "model.safetensors"), state)
    write_json(os.path.join(folder, "config.json"), config_json(config))
    for name, content in tokenizer_files.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    sync_folder(folder)
    return digest
