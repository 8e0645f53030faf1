"""Finding the groups of every parameter, and saying where that is not possible."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from fisherfn.core import trees
from fisherfn.core.errors import OptionError, TreeMismatchError
from fisherfn.groups import spec as make
from fisherfn.groups.configs import MODEL_TYPES, Architecture, is_config, model_type
from fisherfn.groups.modules import Owners
from fisherfn.groups.names import component
from fisherfn.groups.spec import REDUCTIONS, GroupSpec

_LOG = logging.getLogger(__name__)

#: Which parameters: a regular expression searched in the path, or a predicate of path and tensor.
Where: TypeAlias = "str | re.Pattern[str] | Callable[[str, Tensor], bool]"
#: What they get: a spec, a function tensor -> spec, or the name of a simple kind.
What: TypeAlias = "GroupSpec | Callable[[Tensor], GroupSpec] | str"
_SIMPLE: dict[str, Callable[[tuple[int, ...]], GroupSpec]] = {
    "channel": make.channels,
    "row": make.rows,
    "element": make.elements,
    "tensor": make.whole,
}
_ATTENTION = re.compile(r"(?:^|\.)(?:q_proj|k_proj|v_proj|qkv_proj|o_proj)$")
_WITHIN = re.compile(r"att(?:n|ention)[^.]*(?:\.[^.]+)+\.weight$", re.IGNORECASE)
_STACKED = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+\.(?P<rest>.+)\.weight$")


class Inferred(Mapping[str, GroupSpec]):
    """Specs by path, and what was not understood; `print` it.

    Attributes:
        unknown: Why the groups of a parameter are not known, by path. Such a parameter is one group
            as a whole, or keeps the channels of its layer where only its heads are not known.
    """

    def __init__(self, specs: Mapping[str, GroupSpec], unknown: Mapping[str, str]) -> None:
        """Keep both, read-only."""
        self._specs = dict(specs)
        self.unknown: Mapping[str, str] = MappingProxyType(dict(unknown))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy both."""
        return Inferred, (self._specs, dict(self.unknown))

    def __getitem__(self, path: str) -> GroupSpec:
        """Return the spec at a path."""
        return self._specs[path]

    def __iter__(self) -> Iterator[str]:
        """Go through the paths in the order of the parameters."""
        return iter(self._specs)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._specs)

    def __repr__(self) -> str:
        """Count what was found."""
        groups = sum([spec.num_groups for spec in self._specs.values()])
        return (
            f"Inferred({len(self)} parameters, {groups} groups, {len(self.unknown)} not understood)"
        )

    def __str__(self) -> str:
        """Lay the specs out as a table, what was not understood at the end."""
        head = ("parameter", "shape", "groups", "axis", "layout", "known from")
        lines: list[tuple[str, ...]] = [head]
        for path, spec in self._specs.items():
            shape = "x".join([str(n) for n in spec.shape]) or "scalar"
            parts = " + ".join([f"{n} {name}" for name, n in spec.parts])
            layout = parts or (f"runs of {spec.run}" if spec.run > 1 else spec.layout)
            axis = "" if spec.axis is None else str(spec.axis)
            lines.append((path, shape, f"{spec.num_groups} {spec.kind}", axis, layout, spec.source))
        widths = [max([len(line[i]) for line in lines]) for i in range(len(head))]
        text = [
            "  ".join([c.ljust(w) for c, w in zip(line, widths, strict=True)]).rstrip()
            for line in lines
        ]
        text += [f"not understood: {path}: {why}" for path, why in self.unknown.items()]
        return "\n".join(text)


def infer(
    params: Any,
    module_or_config: Any = None,
    *,
    rules: Mapping[Any, What] | Sequence[tuple[Where, What]] = (),
    reduction: str = "sum",
    bucket: int | None = None,
) -> Inferred:
    """Find the groups of every parameter: channels, heads, rows, elements.

    Each parameter is asked, in this order: the rules; the architecture of a Hugging Face
    configuration, for heads of attention (Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 3,
    Phi-3, GPT-2, GPT-NeoX, OPT, BERT, RoBERTa, T5); the type of its module. Parameters of at most
    one axis (biases, norms) are elements. Without module and configuration, `*.weight` is taken as
    torch lays out linear layers and convolutions, `[out, in, ...]`, unless its name says otherwise.
    What is not understood is never guessed: it becomes one group as a whole (or keeps the channels
    of its layer, where only the heads are not known), it is listed in `unknown`, and it is logged.

    Args:
        params: Tree of tensors.
        module_or_config: The `nn.Module` (or what `ff.functional` made of it) that the parameters
            belong to, or the configuration of a Hugging Face model, as object or mapping.
        rules: Pairs of where and what, or a mapping; the first that fits decides. Where: a regular
            expression that is searched in the path, or a predicate `(path, tensor) -> bool`. What:
            a `GroupSpec`, a function `tensor -> GroupSpec`, or "channel", "row", "element",
            "tensor".
        reduction: "sum" or "mean": how `reduce` joins scalars. The trace is conserved by both.
        bucket: Rows of an embedding in one group; by default each row is one.

    Returns:
        A mapping from path to `GroupSpec`, with `unknown`; it prints as a table.

    Raises:
        OptionError: Another `reduction`, a `bucket` that is no positive integer, a rule that is
            none, or something that is neither module nor configuration.
        ShapeError: The heads of the configuration do not divide a parameter.
        TreeMismatchError: A parameter has another shape than in the module, or than a rule's spec,
            or two parameters have one path.

    Cost: no arithmetic; parameters may be on the `meta` device.

    Example:
        >>> import torch
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> params = {name: p.detach() for name, p in attention.named_parameters()}
        >>> specs = infer(params, attention)
        >>> specs["in_proj_weight"].parts, specs["out_proj.weight"].axis
        ((('q', 2), ('k', 2), ('v', 2)), 1)
    """
    if reduction not in REDUCTIONS:
        raise OptionError(
            f"groups.infer: expected reduction to be one of {list(REDUCTIONS)}, got {reduction!r}. "
            "Both conserve the trace when they are expanded."
        )
    if bucket is not None:
        make.check_bucket("infer", bucket)
    asked = _Asked(module_or_config, _rules(rules), bucket)
    specs: dict[str, GroupSpec] = {}
    paths = trees.unique_paths("groups.infer", params)
    for path, leaf in zip(paths, trees.leaves(params), strict=True):
        if not isinstance(leaf, Tensor):
            raise TreeMismatchError(
                f"groups.infer: expected params to hold tensors, got {type(leaf).__name__} at "
                f"'{path}'. Pass what functional() returned."
            )
        found = asked.spec(path, leaf)
        specs[path] = found.renamed(reduction=reduction) if reduction == "mean" else found
    for path, why in asked.unknown.items():
        _LOG.warning("groups.infer: not understood: %s: %s", path, why)
    return Inferred(specs, asked.unknown)


class _Asked:
    """Everything that may know something about a parameter."""

    def __init__(self, given: Any, rules: Sequence[tuple[Where, What]], bucket: int | None) -> None:
        self.rules, self.bucket = rules, bucket
        self.unknown: dict[str, str] = {}
        modules = _modules(given)
        self.owners = Owners(*modules) if modules and callable(given) else None
        configs = [getattr(module, "config", None) for module in modules]
        config = next((x for x in configs if x is not None), None) if self.owners else given
        if self.owners is None and given is not None and not is_config(given):
            raise OptionError(
                f"groups.infer: expected a module or a configuration with a model_type, got "
                f"{type(given).__name__}. Leave it out to go by names and shapes."
            )
        self.kind = model_type(config) if config is not None and is_config(config) else None
        self.architecture = Architecture.of(config) if self.kind else None

    def spec(self, path: str, leaf: Tensor) -> GroupSpec:
        """Return the spec of one parameter."""
        shape = tuple(leaf.shape)
        for where, what in self.rules:
            if _fits(where, path, leaf):
                return _made(what, path, leaf)
        found = self._known(path, shape)
        if found is None:
            found = make.whole(shape).renamed(source="not understood")
        if self.bucket is not None and found.kind == "row":
            found = make.rows(shape, axis=found.axis or 0, bucket=self.bucket).renamed(
                source=found.source
            )
        return found

    def _known(self, path: str, shape: tuple[int, ...]) -> GroupSpec | None:
        if self.owners is not None and path in self.owners:
            own = self.owners.shape(path)
            if own is not None and own != shape:
                raise TreeMismatchError(
                    f"groups.infer: expected shape {own}, as in the module, got {shape} at "
                    f"'{path}'. Pass the module that the parameters belong to."
                )
        if self.architecture is not None:
            role = self.architecture.role(path)
            heads = role is not None and role.owner not in ("channel", "row")
            if role is not None and (heads or self.owners is None):
                found = self.architecture.spec(path, role, shape)
                return found.renamed(source=f"configuration of {self.architecture.name}")
        if self.owners is not None and path in self.owners:
            found = self.owners.spec(path, shape)
            if found is not None:
                self._note_heads(path, found)
                return found.renamed(source=f"module {self.owners.owner(path)}")
        if len(shape) < 2:
            return make.elements(shape).renamed(source="at most one axis")
        return self._by_convention(path, shape)

    def _by_convention(self, path: str, shape: tuple[int, ...]) -> GroupSpec | None:
        if self.owners is not None:
            owner = f"of {self.owners.owner(path)}" if path in self.owners else "of no module"
            self.unknown[path] = f"a parameter {owner}, whose layout is not known"
            return None
        if self.kind is not None:
            known = ", ".join(MODEL_TYPES)
            self.unknown[path] = (
                f"no such parameter in the table of {self.kind!r}"
                if self.architecture
                else f"the architecture {self.kind!r} has no table (there are {known})"
            )
            return None
        name = path.replace("/", ".")
        if not re.search(r"(?:^|\.)weight$", name):
            self.unknown[path] = "no name of a torch layer; pass the module"
            return None
        if len(shape) == 2 and re.search(r"embed|(?:^|\.)w[tp]e\.", name, re.IGNORECASE):
            return make.rows(shape).renamed(source="its name")
        if re.search(r"(?:^|\.)c_(?:attn|proj|fc)\.|q_attn\.|transpose|deconv", name):
            self.unknown[path] = "may be stored transposed; pass the module or the configuration"
            return None
        found = make.channels(shape).renamed(source="convention [out, in, ...]")
        self._note_heads(path, found)
        return found

    def _note_heads(self, path: str, found: GroupSpec) -> None:
        """Report a projection of attention whose heads nobody knows."""
        if found.kind != "channel" or len(found.shape) != 2:
            return
        name = path.replace("/", ".")
        match = _STACKED.search(name)
        sure = match is not None and _ATTENTION.search(component(match["rest"]))
        # without a table, whatever is called attention may have heads
        if not sure and (self.architecture is not None or not _WITHIN.search(name)):
            return
        who = f"the architecture {self.kind!r} has no table" if self.kind else "no configuration"
        self.unknown[path] = f"heads of attention: {who}; kept as channels"


def _modules(given: Any) -> list[nn.Module]:
    """Return a module and those inside of it that it wraps, as DDP and `ff.functional` do."""
    found: list[nn.Module] = [given] if isinstance(given, nn.Module) else []
    inner = getattr(given, "module", None)
    while isinstance(inner, nn.Module) and inner not in found:
        found.append(inner)
        inner = getattr(inner, "module", None)
    return found


def _rules(rules: Any) -> list[tuple[Where, What]]:
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    found: list[tuple[Where, What]] = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise OptionError(
                f"groups.infer: expected rules= to hold pairs (where, what), got {pair!r}. For "
                "example rules=[(r'attn', 'channel')]."
            )
        where, what = pair
        if isinstance(where, str):
            try:
                where = re.compile(where)
            except re.error as error:
                raise OptionError(
                    f"groups.infer: expected a regular expression in rules=, got {where!r} "
                    f"({error}). Escape special characters with re.escape."
                ) from None
        if not (isinstance(where, re.Pattern) or callable(where)):
            raise OptionError(
                f"groups.infer: expected a regular expression or a predicate in rules=, got "
                f"{type(where).__name__}. Write r'pattern' or lambda path, tensor: ..."
            )
        if not (isinstance(what, GroupSpec) or callable(what) or what in _SIMPLE):
            raise OptionError(
                f"groups.infer: expected a GroupSpec, a function of the tensor or one of "
                f"{list(_SIMPLE)} in rules=, got {what!r}. Heads need their number: "
                "lambda t: groups.heads(t.shape, 8)."
            )
        found.append(cast("tuple[Where, What]", (where, what)))
    return found


def _fits(where: Where, path: str, leaf: Tensor) -> bool:
    if isinstance(where, re.Pattern):
        return where.search(path) is not None
    assert callable(where)
    return bool(where(path, leaf))


def _made(what: What, path: str, leaf: Tensor) -> GroupSpec:
    """Return the spec that a rule gives to a parameter."""
    shape = tuple(leaf.shape)
    if isinstance(what, str):
        what = _SIMPLE[what](shape)
    found = what if isinstance(what, GroupSpec) else what(leaf)
    if not isinstance(found, GroupSpec):
        raise OptionError(
            f"groups.infer: expected a rule to give a GroupSpec, got {type(found).__name__} at "
            f"'{path}'. Use groups.channels, heads, rows, elements or whole."
        )
    if found.shape != shape:
        raise TreeMismatchError(
            f"groups.infer: expected a rule's spec of shape {shape}, got {found.shape} at "
            f"'{path}'. Make it from the tensor: lambda t: groups.channels(t.shape)."
        )
    return found.renamed(source=found.source or "rule")
