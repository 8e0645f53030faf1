"""Named tables of models with data; every rule and every trap has one."""

from cases.base import Built, Case, Net, Setup, normal, seeded, table, tokens
from cases.tables import ALL, ATTENTION, LANGUAGE, LAYERS

__all__ = [
    "ALL",
    "ATTENTION",
    "LANGUAGE",
    "LAYERS",
    "Built",
    "Case",
    "Net",
    "Setup",
    "normal",
    "seeded",
    "table",
    "tokens",
]
