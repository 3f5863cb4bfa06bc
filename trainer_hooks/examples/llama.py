"""A small Llama-style decoder with RMSNorm, rotary positions and SwiGLU, without biases.

B = sequences, T = positions, D = model width, H = heads, K = head width, F = feed-forward width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder and of its context."""

    vocabulary_size: int = 256
    width: int = 32
    num_layers: int = 2
    num_heads: int = 4
    context: int = 32

    @property
    def feed_forward_width(self) -> int:
        """8/3 of the width, rounded up to a multiple of 8."""
        return -(-8 * self.width // 3 // 8) * 8


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        B, T, D = x_BTD.shape
        q, k, v = (
            layer(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return out


class FeedForward(nn.Module):
    """Feed-forward layer with SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward_width, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward_width, bias=False)
        self.down = nn.Linear(config.feed_forward_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        out: Tensor = self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out


class Block(nn.Module):
    """Attention and feed-forward layer, each after a norm and with a residual connection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK)
        out: Tensor = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return out


class Llama(nn.Module):
    """Decoder whose embedding and head are two matrices."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        half = config.width // config.num_heads // 2
        angles = torch.outer(torch.arange(config.context).float(), 10_000.0 ** (-torch.arange(half).float() / half))
        self.register_buffer("cos_TK", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin_TK", angles.sin().repeat(1, 2), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = (2 * config.num_layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=depth * parameter.shape[1] ** -0.5)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Map (B, T) byte values to (B, T, V) logits."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TK, self.sin_TK)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Return the input with rotary position embedding: entry k is paired with entry k + K/2."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat([-second, first], dim=-1) * sin_TK


def next_token_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per byte, of (B, T + 1) windows."""
    tokens = windows.long()
    logits_BTV = model(tokens[:, :-1])
    return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())
