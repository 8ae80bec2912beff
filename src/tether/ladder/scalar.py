"""A scalar autograd: a number that remembers what it was computed from, and so knows what would move it.

A `Scalar` holds a value and, for each number that it was computed from, the partial derivative with respect to it.
`backward()` walks that record from the result to its beginnings and multiplies and adds these derivatives: the chain
rule, nothing else. It is slow and obvious on purpose, since the tensor programs are proved against it.

    >>> x = Scalar(3.0)
    >>> y = x * x + exp(-x)
    >>> y.backward()
    >>> round(x.gradient, 6), round(2 * 3.0 - math.exp(-3.0), 6)
    (5.950213, 5.950213)

The functions below take a float as well as a Scalar (a `Number`), so a formula that is written once serves for values
and for gradients. Python's own `max` and `min` work too: they compare values and return one of their arguments, so the
gradient goes to the one that was chosen. Only the standard library is used. Read next: `plain.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias


class Scalar:
    """A number in a computation. `value` is what it is, `gradient` what `backward()` of a later number left here."""

    __slots__ = ("_inputs", "_slopes", "gradient", "value")

    def __init__(self, value: float, inputs: Sequence[Scalar] = (), slopes: Sequence[float] = ()) -> None:
        self.value = value
        self.gradient = 0.0
        self._inputs = inputs  # what this was computed from
        self._slopes = slopes  # ∂self/∂input, one for each input

    def backward(self) -> None:
        """Set `gradient` to ∂self/∂node on every node that self was computed from, and on self to 1.

        What an earlier call left on these nodes is overwritten, not added to. No recursion: the depth of the
        computation is not limited by Python's stack.
        """
        waiting = self._count_uses()
        for node in waiting:
            node.gradient = 0.0
        self.gradient = 1.0
        ready = [self]
        while ready:  # a node is ready once everything that uses it has passed its share on: topological order
            node = ready.pop()
            for source, slope in zip(node._inputs, node._slopes, strict=True):
                source.gradient += slope * node.gradient
                waiting[source] -= 1
                if not waiting[source]:
                    ready.append(source)

    def _count_uses(self) -> dict[Scalar, int]:
        """For every node below self, how many times the computation of self uses it."""
        uses: dict[Scalar, int] = {}
        unseen = [self]
        while unseen:
            for source in unseen.pop()._inputs:
                if source not in uses:
                    uses[source] = 0
                    unseen.append(source)
                uses[source] += 1
        return uses

    def __add__(self, other: Number) -> Scalar:
        if isinstance(other, Scalar):
            return Scalar(self.value + other.value, (self, other), (1.0, 1.0))
        return Scalar(self.value + other, (self,), (1.0,))

    def __mul__(self, other: Number) -> Scalar:
        if isinstance(other, Scalar):
            return Scalar(self.value * other.value, (self, other), (other.value, self.value))
        return Scalar(self.value * other, (self,), (other,))

    def __pow__(self, exponent: float) -> Scalar:
        """x^n for a constant n; d/dx = n·x^(n−1)."""
        return Scalar(self.value**exponent, (self,), (exponent * self.value ** (exponent - 1) if exponent else 0.0,))

    def __neg__(self) -> Scalar:
        return self * -1.0

    def __sub__(self, other: Number) -> Scalar:
        return self + -other

    def __rsub__(self, other: float) -> Scalar:
        return -self + other

    def __truediv__(self, other: Number) -> Scalar:
        if isinstance(other, Scalar):
            quotient = self.value / other.value
            return Scalar(quotient, (self, other), (1 / other.value, -quotient / other.value))
        return Scalar(self.value / other, (self,), (1 / other,))

    def __rtruediv__(self, other: float) -> Scalar:
        return Scalar(other / self.value, (self,), (-other / self.value**2,))

    __radd__ = __add__
    __rmul__ = __mul__

    def __lt__(self, other: Number) -> bool:
        return self.value < value_of(other)

    def __le__(self, other: Number) -> bool:
        return self.value <= value_of(other)

    def __gt__(self, other: Number) -> bool:
        return self.value > value_of(other)

    def __ge__(self, other: Number) -> bool:
        return self.value >= value_of(other)

    def __repr__(self) -> str:
        return f"Scalar({self.value})"


Number: TypeAlias = Scalar | float


def value_of(x: Number) -> float:
    """The float inside; a float is its own value."""
    return x.value if isinstance(x, Scalar) else x


def exp(x: Number) -> Number:
    """e^x; d/dx = e^x."""
    if not isinstance(x, Scalar):
        return math.exp(x)
    result = math.exp(x.value)
    return Scalar(result, (x,), (result,))


def log(x: Number) -> Number:
    """Natural logarithm; d/dx = 1/x."""
    return Scalar(math.log(x.value), (x,), (1 / x.value,)) if isinstance(x, Scalar) else math.log(x)


def tanh(x: Number) -> Number:
    """d/dx = 1 − tanh²x."""
    if not isinstance(x, Scalar):
        return math.tanh(x)
    result = math.tanh(x.value)
    return Scalar(result, (x,), (1 - result * result,))


def total(numbers: Iterable[Number]) -> Number:
    """Σ x, rounded once; as one node, where adding in turn would make one for each term."""
    terms = list(numbers)
    scalars = [term for term in terms if isinstance(term, Scalar)]
    result = math.fsum(value_of(term) for term in terms)
    return Scalar(result, scalars, (1.0,) * len(scalars)) if scalars else result


def dot(left: Sequence[Number], right: Sequence[Number]) -> Number:
    """Σ_i left_i·right_i, as one node. Raises ValueError where the lengths differ.

    >>> dot([1.0, 2.0], [3.0, 4.0])
    11.0
    """
    inputs, slopes, products = [], [], []
    for a, b in zip(left, right, strict=True):
        x, y = value_of(a), value_of(b)
        products.append(x * y)
        for factor, slope in ((a, y), (b, x)):
            if isinstance(factor, Scalar):
                inputs.append(factor)
                slopes.append(slope)
    result = math.fsum(products)
    return Scalar(result, inputs, slopes) if inputs else result


def logsumexp(numbers: Sequence[Number]) -> Number:
    """log Σ_v e^{z_v}, as one node; d/dz_v = e^{z_v − logsumexp}, the softmax. −∞ adds nothing; nothing overflows.

    >>> round(value_of(logsumexp([1000.0, 1000.0])), 4)
    1000.6931
    """
    terms = [value_of(z) for z in numbers]
    peak = max(terms)
    result = peak + math.log(math.fsum(math.exp(z - peak) for z in terms))
    scalars = [z for z in numbers if isinstance(z, Scalar)]
    return Scalar(result, scalars, [math.exp(z.value - result) for z in scalars]) if scalars else result


def gradients(loss: Number, parameters: Iterable[Number]) -> list[float]:
    """∂loss/∂parameter for each parameter; 0 for one that the loss does not depend on."""
    leaves = [parameter for parameter in parameters if isinstance(parameter, Scalar)]
    if isinstance(loss, Scalar):
        loss.backward()
    return [leaf.gradient for leaf in leaves]


class Adam:
    """θ ← θ − lr/(1 − b₁ⁿ) · m/(√v/√(1 − b₂ⁿ) + ε) at step n: PyTorch's form, with ε 1e-5 and no weight decay.

    m ← b₁m + (1 − b₁)g and v ← b₂v + (1 − b₂)g² for each number's gradient g. Kingma & Ba 2015.
    """

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-5) -> None:
        self.learning_rate = learning_rate
        self.betas = betas
        self.epsilon = epsilon
        self.steps = 0
        self.moments: list[tuple[float, float]] = []  # m and v of each number; none before the first step

    def step(self, numbers: Sequence[Number], slopes: Sequence[float]) -> list[Number]:
        """The numbers after one step down their slopes."""
        b1, b2 = self.betas
        before = self.moments or [(0.0, 0.0)] * len(slopes)
        self.steps += 1
        self.moments = [
            (b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g) for (m, v), g in zip(before, slopes, strict=True)
        ]
        rate, scale = self.learning_rate / (1 - b1**self.steps), math.sqrt(1 - b2**self.steps)
        return [
            x - rate * m / (math.sqrt(v) / scale + self.epsilon)
            for x, (m, v) in zip(numbers, self.moments, strict=True)
        ]
