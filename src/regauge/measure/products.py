"""What a traced model's products of matrices were made of, as data."""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, ConfigDict

NATIVE, SIMULATED, FLOAT = "native", "simulated", "float"


class Product(BaseModel):
    """One product of matrices as it ran: a site's, or attention's scores (queries by keys) and sums (probabilities by
    values).

    Attributes:
        name: of the site; `blocks.3.attn.scores`, `blocks.3.attn.sums`; a module's path where it is neither.
        inputs, weights: what both factors are: `int8-asym, static`, `int4-asym`, `float32`.
        runs: `native` (bytes are multiplied and summed in int32), `simulated` (both factors are whole multiples of a
            step, and floats multiply them) or `float`.
        why: why it is no product of integers, as a clause; "" where it is.
        static: whether no step was taken from the values at hand.
        times: how often it ran.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    inputs: str
    weights: str
    runs: str
    why: str = ""
    static: bool = False
    times: int = 1

    @property
    def integer(self) -> bool:
        """Integers by integers, which 32 bits sum."""
        return not self.why


class Trace(BaseModel):
    """Every product of matrices of one forward pass.

    Attributes:
        model: its path.
        tokens: of the pass.
        products: in the order in which they first ran.
        unseen: sites that no token reached.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    tokens: int
    products: tuple[Product, ...]
    unseen: tuple[str, ...] = ()

    @property
    def floats(self) -> tuple[Product, ...]:
        """Those that are not of integers."""
        return tuple(one for one in self.products if not one.integer)

    @property
    def integer(self) -> bool:
        """Whether every product is of integers, and every site was seen."""
        return not self.floats and not self.unseen

    @property
    def static(self) -> bool:
        """Whether no step is taken from the values at hand."""
        return all(one.static for one in self.products)

    def __str__(self) -> str:
        total, found = len(self.products), Counter(one.runs for one in self.products)
        told = ", ".join(f"{found[how]} {how}" for how in (NATIVE, SIMULATED, FLOAT) if found[how])
        whole = total - len(self.floats)
        steps = "every step is static" if self.static else "some steps are each call's own"
        return f"{whole} of {total} products are of integers ({told}); {steps}"
