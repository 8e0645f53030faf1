"""The models that are measured, in plain torch.nn."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Build linear layers of these sizes with ReLU in between."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(sizes):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn_3c3d() -> nn.Sequential:
    """Build the 3c3d network of DeepOBS: three convolutions, three dense layers, `[B, 3, 32, 32]`.

    Reference: Schneider, Balles & Hennig (2019), DeepOBS: a deep learning optimizer benchmark
    suite, ICLR.
    """
    return nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        *_same_pool(),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        *_same_pool(),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        *_same_pool(),
        nn.Flatten(),
        nn.Linear(128 * 3 * 3, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def _same_pool() -> tuple[nn.Module, nn.Module]:
    return nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, stride=2)  # inputs are not negative


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Build a block of this width."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, width]` to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT with learned positions and a head of its own."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        """Build the model for sequences of up to `length` tokens."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids `[B, T]` to logits `[B, T, vocabulary]`."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Build a block; the shortcut is a 1x1 convolution where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, channels_in, H, W]` to `[B, channels, H / stride, W / stride]`."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """Build ResNet-18 with the 3x3 stem that is usual for 32x32 images, ten classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        layers.append(Residual(channels, width, 1 if stage == 0 else 2))
        layers.append(Residual(width, width, 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
