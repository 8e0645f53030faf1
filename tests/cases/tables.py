"""All tables, joined."""

from __future__ import annotations

from cases import (
    attention,
    convolution,
    elementwise,
    language,
    layers,
    layout,
    products,
    reuse,
    traps,
    unseen,
)

LAYERS = layers.ALL | convolution.ALL | elementwise.ALL | products.ALL
ATTENTION = attention.ALL

#: Everything that runs in milliseconds; the language models are apart.
ALL = LAYERS | ATTENTION | reuse.ALL | layout.ALL | unseen.ALL | traps.ALL
LANGUAGE = language.ALL
