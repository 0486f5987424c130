"""Imported by the process that others are forked from: what an agent would load before its first training."""

import torch

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
