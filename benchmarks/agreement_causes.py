"""Why a library's answer differs from the definition, as far as its source shows."""

from __future__ import annotations

from dataclasses import dataclass

ANY = ""


@dataclass(frozen=True)
class Cause:
    """A known reason.

    Attributes:
        library: Whose.
        cases: Beginnings of the names of the cases that it explains.
        text: The reason.
        structure: "kfac" or "ekfac", if only one of them is meant.
        fisher: "exact" or "empirical", if only one of them is meant.
    """

    library: str
    cases: tuple[str, ...]
    text: str
    structure: str = ANY
    fisher: str = ANY

    def explains(self, library: str, case: str, structure: str, fisher: str) -> bool:
        """Whether it is about this answer."""
        return (
            library == self.library
            and case.startswith(self.cases)
            and self.structure in (ANY, structure)
            and self.fisher in (ANY, fisher)
        )


CAUSES = (
    Cause(
        "ASDL",
        ("",),
        "the pass of each class adds its bases to those of the passes before",
        "ekfac",
        "exact",
    ),
    Cause(
        "ASDL",
        ("convolution", "sequence", "embedding", "transformer"),
        "the squares of single positions are added, not those of their sum",
        "ekfac",
        "empirical",
    ),
    Cause(
        "ASDL",
        ("mlp, four draws",),
        "the losses of the draws are divided by their number before they are squared",
        "kfac",
    ),
    Cause(
        "ASDL",
        ("mlp, four draws",),
        "bases of the draws are added, and scales put in a row",
        "ekfac",
    ),
    Cause("ASDL", ("convolution, grouped",), "one factor has the inputs of all groups"),
    Cause(
        "ASDL",
        ("sequence, pooled",),
        "inputs of a linear layer are added over positions, and divided by examples only",
        "kfac",
    ),
    Cause(
        "ASDL",
        ("embedding", "transformer"),
        "an embedding's factor holds products of the counts of whole examples, not of tokens",
        "kfac",
    ),
    Cause(
        "ASDL",
        ("transformer",),
        "one class of all positions is pulled back at once, so that cross terms remain",
        "kfac",
        "exact",
    ),
    Cause("ASDL", ("layer used twice",), "both factors are sums over the calls", "kfac"),
    Cause("ASDL", ("layer used twice",), "a basis is made of each call, and added", "ekfac"),
    Cause(
        "BackPACK",
        ("convolution",),
        "cotangents are added over positions before they are squared, inputs are not",
    ),
    Cause("NNGeometry", ("convolution, grouped",), "one factor has the inputs of all groups"),
    Cause("NNGeometry", ("layer used twice",), "inputs of one call meet the cotangents of both"),
    Cause(
        "curvlinops",
        ("mlp, class weights", "sequence, masked"),
        "type-2 knows the logits alone: weights and ignored labels have no say",
        fisher="exact",
    ),
    Cause(
        "curvlinops",
        ("transformer",),
        "type-2 pulls columns of all positions back at once, so that cross terms remain; the mean "
        "of its own mc has none",
        "kfac",
        "exact",
    ),
    Cause("curvlinops", ("convolution, grouped",), "inputs are averaged over groups"),
    Cause("curvlinops", ("layer used twice",), "both factors are sums over the calls", "kfac"),
    Cause(
        "curvlinops",
        ("layer used twice",),
        "inputs of the last call meet the cotangents of both",
        "ekfac",
    ),
    Cause(
        "kronfluence",
        ("convolution", "sequence, pooled", "layer used twice"),
        "G is an average over positions, whose number differs from layer to layer",
        "kfac",
    ),
    Cause("kronfluence", ("convolution, grouped",), "inputs are averaged over groups"),
)


def causes(library: str, case: str, structure: str, fisher: str) -> str:
    """Return what is known, or nothing."""
    known = [c.text for c in CAUSES if c.explains(library, case, structure, fisher)]
    return "; ".join(known)
