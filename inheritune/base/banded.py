"""Linear layers for sampling in fp32 on CPUs. A few rows times a large matrix is bound by reading the matrix,
for which BLAS uses one core; as a batch of products with bands of the matrix it uses all of them."""

import torch

FEW = 32  # rows of input up to which reading the matrix is the limit


class BandedLinear(torch.nn.Linear):
    def forward(self, x):
        rows, least = x.numel() // self.in_features, 8 * torch.get_num_threads()
        n = next((n for n in range(least, 4 * least) if self.out_features % n == 0), 1)  # equal bands
        if n == 1 or rows > FEW or torch.is_grad_enabled():
            return super().forward(x)
        bands = self.weight.view(n, -1, self.in_features)  # (n, out/n, in)
        y = torch.bmm(x.reshape(rows, -1).expand(n, -1, -1), bands.mT)  # (n, rows, out/n)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def use_bands(model: torch.nn.Module):
    """Turn the model's linear layers into BandedLinears, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = BandedLinear
