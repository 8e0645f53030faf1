"""Contraction rules, one file a kind of layer, and the forms that scores take."""

from fisherfn.layers import convolution as convolution
from fisherfn.layers import elementwise as elementwise
from fisherfn.layers import embedding as embedding
from fisherfn.layers import linear as linear
from fisherfn.layers import normalisation as normalisation
from fisherfn.layers.registry import register_rule as register_rule
