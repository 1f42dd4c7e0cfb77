"""Linear layers in bands. pytest tests/base/test_banded.py"""

import pytest
import torch
from torch import nn

from inheritune.base.banded import FEW, BandedLinear, use_bands
from tests.tiny import tiny_model


@pytest.mark.parametrize("out", [48, 50257, 97, 3, 1])  # 50257 = 29 x 1733; 97 is prime
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_rows_through_a_banded_layer_are_those_of_torchs(out, bias):
    torch.manual_seed(0)
    layer = BandedLinear(24, out, bias=bias)
    for shape in ((24,), (1, 24), (1, 1, 24), (5, 1, 24), (4, 8, 24), (3, FEW, 24)):
        x = torch.randn(shape)
        with torch.inference_mode():
            got = layer(x)
        assert got.shape == (*shape[:-1], out) and got.is_contiguous()
        wanted = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_in_bands_has_the_same_logits_and_parameters():
    model, idx = tiny_model(n_embd=64, n_head=4), torch.randint(257, (2, 8))
    names = list(model.state_dict())
    with torch.inference_mode():
        plain = model(idx)
        use_bands(model)
        banded = model(idx)
    assert all(isinstance(m, BandedLinear) for m in model.modules() if isinstance(m, nn.Linear))
    assert list(model.state_dict()) == names and model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(banded, plain, rtol=1e-5, atol=1e-5)
