"""Small models as PyTorch users write them, with their losses and batches.

Dims: B batch, T position, D width, H heads, K heads of keys and values, F feed-forward width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, POSITIONS, WIDTH = 96, 16, 32


class Block(nn.Module):
    """GPT's: no bias for keys, whose gradient would be rounding alone."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        many, length, width = x_BTD.shape
        h = self.ln1(x_BTD)
        q, k, v = (
            f(h).view(many, length, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(many, length, width))
        return x_BTD + self.down(F.gelu(self.up(self.ln2(x_BTD)), approximate="tanh"))


class GPT(nn.Module):
    """Learnt positions, tied embeddings."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Embedding(POSITIONS, WIDTH),
        )
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.ln = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(places)
        for block in self.h:
            x_BTD = block(x_BTD)
        return self.head(self.ln(x_BTD))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


class LlamaBlock(nn.Module):
    def __init__(self, heads: int = 4, key_heads: int = 2, hidden: int = 48):
        super().__init__()
        self.heads, self.key_heads, size = heads, key_heads, WIDTH // heads
        self.ln1, self.ln2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, key_heads * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def attention(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        many, length, _ = x_BTD.shape
        q, k, v = (
            f(x_BTD).view(many, length, heads, -1).transpose(1, 2)
            for f, heads in (
                (self.q, self.heads),
                (self.k, self.key_heads),
                (self.v, self.key_heads),
            )
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(x_BTD.shape))

    def feed_forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.ln1(x_BTD), cos, sin)
        return x_BTD + self.feed_forward(self.ln2(x_BTD))


class MixtureBlock(LlamaBlock):
    """Two of four experts for each token, all computed, the others weighed by 0."""

    def __init__(self, experts: int = 4):
        super().__init__()
        del self.gate, self.up, self.down
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up_EDF = nn.Parameter(torch.randn(experts, WIDTH, 48) * 0.1)
        self.down_EFD = nn.Parameter(torch.randn(experts, 48, WIDTH) * 0.1)

    def feed_forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.router(x_BTD).softmax(-1).topk(2, -1)
        many, length, _ = x_BTD.shape
        shares_BTE = torch.zeros(many, length, self.up_EDF.shape[0]).scatter(-1, chosen, shares)
        hidden = F.silu(torch.einsum("btd,edf->betf", x_BTD, self.up_EDF))
        made_BETD = torch.einsum("betf,efd->betd", hidden, self.down_EFD)
        return torch.einsum("betd,bte->btd", made_BETD, shares_BTE)


class Llama(nn.Module):
    """RMS norm, rotary positions from a buffer, grouped queries, gated units."""

    def __init__(self, layers: int = 2, block: Callable[[], nn.Module] = LlamaBlock):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.ln, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        frequencies = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).float()
        angles = torch.outer(places, self.frequencies).repeat(1, 2)
        x_BTD = self.tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, angles.cos(), angles.sin())
        return self.head(self.ln(x_BTD))


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, groups=groups, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.across = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.across(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.pool, self.smooth = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.blocks = nn.Sequential(Residual(8, 8, 1, 1), Residual(8, 16, 2, 4))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.smooth(self.blocks(self.pool(F.relu(self.bn(self.stem(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))


# ---------------------------------------------------------------- losses and batches


def token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    logits_BTV = model(batch["tokens"])
    return F.cross_entropy(logits_BTV.view(-1, logits_BTV.shape[-1]), batch["targets"].view(-1))


def class_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def token_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.randint(VOCABULARY, (rows, POSITIONS)) for name in ("tokens", "targets")}


def image_batch(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


def feature_batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 8), torch.randint(10, (rows,))


@dataclass(frozen=True)
class Subject:
    """A model to train: how it is made, its loss and its batches."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    batch: Callable[..., Any]


SUBJECTS = {
    "perceptron": Subject(Perceptron, class_loss, feature_batch),
    "gpt": Subject(GPT, token_loss, token_batch),
    "llama": Subject(Llama, token_loss, token_batch),
    "mixture": Subject(lambda: Llama(block=MixtureBlock), token_loss, token_batch),
    "convnet": Subject(ConvNet, class_loss, image_batch),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-5, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-5, weight_decay=0.1),
}
