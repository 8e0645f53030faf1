"""Groups of parameters: channels, heads, rows, and whole layers (`ff.groups`).

>>> import torch
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
>>> params = {name: p.detach() for name, p in net.named_parameters()}
>>> specs = infer(params, net)
>>> {path: (spec.kind, spec.num_groups) for path, spec in specs.items()}
{'0.weight': ('channel', 2), '0.bias': ('element', 2), '1.weight': ('element', 2), \
'1.bias': ('element', 2)}
"""

from fisherfn.groups.algebra import expand as expand
from fisherfn.groups.algebra import reduce as reduce
from fisherfn.groups.heads import heads as heads
from fisherfn.groups.infer import Inferred as Inferred
from fisherfn.groups.infer import infer as infer
from fisherfn.groups.labels import regroup as regroup
from fisherfn.groups.labels import relabel as relabel
from fisherfn.groups.reports import layers as layers
from fisherfn.groups.reports import totals as totals
from fisherfn.groups.spec import GroupSpec as GroupSpec
from fisherfn.groups.spec import channels as channels
from fisherfn.groups.spec import elements as elements
from fisherfn.groups.spec import rows as rows
from fisherfn.groups.spec import whole as whole
