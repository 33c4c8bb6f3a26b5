"""A PyTorch model trained by a plan: torchrun --nproc-per-node 4 examples/pytorch.py

Each process holds its part of the parameters and of the optimizer's state, as the plan says; alone it is one device.
"""

import torch
from torch import nn

import meshwright as mw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
inputs = torch.randn(32, 64)
batch = {"x": inputs, "y": inputs.roll(1, 1)}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


step = mw.torch.parallelize(model, loss, optimizer, batch)
losses = [step(batch) for _ in range(5)]
step.write_back()  # on every rank
if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
    raise SystemExit
print(step.plan)
print("losses", " ".join(f"{each:.4f}" for each in losses))
print(f"after them {loss(model, batch).item():.4f}")
