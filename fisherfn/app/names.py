"""Layers and components of parameters, as reports name them; see `fisherfn.groups.names`."""

from __future__ import annotations

from fisherfn.groups.names import Place as Place
from fisherfn.groups.names import places as places
