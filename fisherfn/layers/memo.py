"""What depends on the inputs of a layer alone, kept while cotangents of the same forward come."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class Budget:
    """How many bytes may still be kept."""

    def __init__(self, number: int) -> None:
        """Allow `number` bytes."""
        self.number = number

    def take(self, size: int) -> bool:
        """Return whether there is room for `size` bytes, and book them."""
        if size > self.number:
            return False
        self.number -= size
        return True


class Memo:
    """A place to keep the tensors of one layer under names."""

    def __init__(self, budget: Budget) -> None:
        """Start empty."""
        self._budget = budget
        self._granted: bool | None = None
        self._parts: dict[Hashable, Memo] = {}
        self._found: dict[Hashable, Tensor] = {}

    def reserve(self, size: int) -> bool:
        """Return whether there is room for `size` bytes in all; the first answer holds."""
        if self._granted is None:
            self._granted = self._budget.take(size)
        return self._granted

    def part(self, name: Hashable) -> Memo:
        """Return the memo of a part, such as a range of the examples."""
        return self._parts.setdefault(name, Memo(self._budget))

    def get(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what is kept under a name, made if it is not there."""
        if name not in self._found:
            self._found[name] = make()
        return self._found[name]
