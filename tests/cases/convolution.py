"""Convolutions in one to three dimensions and transposed ones, with every option."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from cases.base import Built, Case, normal, table
from cases.builders import between
from oracles import Categorical


def _lopsided(layer: nn.Conv1d) -> Built:
    """One more zero on the right than on the left; torch says once that this may copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer(torch.zeros(1, 2, 7))
    return between(layer, 4, 2, 7)


def _fully_convolutional() -> Built:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return Built(net.double(), normal(2, 2, 3, 3))


def _classifier_3c3d() -> Built:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    return Built(net.double(), normal(3, 2, 6, 6))


ALL = table(
    Case("conv1d", lambda: between(nn.Conv1d(2, 4, 3), 4, 2, 7)),
    Case("conv1d_stride_padding", lambda: between(nn.Conv1d(2, 4, 3, 2, 1), 4, 2, 7)),
    Case("conv1d_same", lambda: between(nn.Conv1d(2, 4, 3, padding="same"), 4, 2, 7)),
    Case("conv1d_same_lopsided", lambda: _lopsided(nn.Conv1d(2, 4, 4, padding="same"))),
    Case(
        "conv1d_same_dilated",
        lambda: between(nn.Conv1d(2, 4, 2, padding="same", dilation=2), 4, 2, 7),
    ),
    Case("conv1d_valid", lambda: between(nn.Conv1d(2, 4, 3, padding="valid"), 4, 2, 7)),
    Case("conv1d_dilation", lambda: between(nn.Conv1d(2, 4, 3, dilation=2), 4, 2, 7)),
    Case("conv1d_groups", lambda: between(nn.Conv1d(4, 6, 3, groups=2), 6, 4, 6)),
    Case("conv1d_depthwise", lambda: between(nn.Conv1d(4, 4, 3, groups=4), 4, 4, 6)),
    Case(
        "conv1d_circular",
        lambda: between(nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), 4, 2, 6),
    ),
    Case("conv1d_no_bias", lambda: between(nn.Conv1d(2, 4, 3, bias=False), 4, 2, 6)),
    Case("conv1d_ragged_stride", lambda: between(nn.Conv1d(2, 3, 3, stride=3), 3, 2, 8)),
    Case("conv2d", lambda: between(nn.Conv2d(2, 3, 3), 3, 2, 5, 4)),
    Case(
        "conv2d_everything",
        lambda: between(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
            6,
            4,
            6,
            5,
        ),
    ),
    Case("conv2d_same", lambda: between(nn.Conv2d(2, 3, (1, 3), padding="same"), 3, 2, 4, 5)),
    Case("conv2d_depthwise", lambda: between(nn.Conv2d(3, 6, 3, groups=3), 6, 3, 5, 4)),
    Case(
        "conv2d_circular",
        lambda: between(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3, 2, 4, 4),
    ),
    Case(
        "conv2d_reflect",
        lambda: between(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 3, 2, 4, 4),
    ),
    Case("conv2d_pointwise", lambda: between(nn.Conv2d(3, 4, 1), 4, 3, 3, 3)),
    Case("conv2d_global", lambda: between(nn.Conv2d(2, 4, 4), 4, 2, 4, 4)),
    Case("conv3d", lambda: between(nn.Conv3d(2, 3, 2), 3, 2, 3, 3, 4)),
    Case(
        "conv3d_everything",
        lambda: between(
            nn.Conv3d(2, 4, (2, 1, 2), stride=(1, 2, 2), padding=(1, 0, 1), groups=2),
            4,
            2,
            3,
            3,
            4,
        ),
    ),
    Case("conv_transpose1d", lambda: between(nn.ConvTranspose1d(2, 4, 3), 4, 2, 5)),
    Case(
        "conv_transpose1d_everything",
        lambda: between(
            nn.ConvTranspose1d(
                4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
            ),
            6,
            4,
            5,
        ),
    ),
    Case(
        "conv_transpose2d",
        lambda: between(
            nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), 3, 2, 3, 4
        ),
    ),
    Case(
        "conv_transpose2d_groups",
        lambda: between(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=False), 4, 4, 3, 3),
    ),
    Case("conv_transpose3d", lambda: between(nn.ConvTranspose3d(2, 3, 2, 2), 3, 2, 2, 2, 2)),
    Case("fully_convolutional", _fully_convolutional, Categorical(class_axis=1)),
    Case("classifier_3c3d", _classifier_3c3d),
)
