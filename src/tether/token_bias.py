"""Is one token of the vocabulary favoured or banned? A wager on each bias of each token, for the price of a column sum.

    distributions [tokens, vocab] + drawn tokens ──▶ bias_gains: log of the wager on (bias b, token v)

Had the sampler added b to v's logit, y would come from q(y) = π(y)·e^{b·1[y=v]}/(1 + π(v)·c) with c = e^b − 1; a ban is
b = −∞. With a share ε of π left in q, the ratio is exact where v is among the likeliest of a place. Elsewhere it is
held against the bound 1 + π(v)·κ ≤ e^{κ·π(v)}, κ = (1 − ε)·c, so that only Σ π(v) is wanted: still a fair game, as its
expectation is at most 1. Read next: `tokens.py`, whose facts these are, and `honesty.py`.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

DOUBT = 0.01
"""Share ε of π in every q_h: round-off may carry a token over a cut, and must not refute it."""
BIASES = (-math.inf, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
"""What may be added to one token's logit after temperature; −∞ is a ban."""


def bias_gains(
    expected: Float[Tensor, "vocab"],
    table: Float[Tensor, "tokens likeliest"],
    places: Int[Tensor, "tokens likeliest"],
    tokens: Int[Tensor, "tokens"],
    own: Float[Tensor, "tokens"],
) -> Float[Tensor, "biases vocab"]:
    """Σ over tokens of log q(y)/π(y) for each bias of each v.

    `expected`: Σ π(v); `table` and `places`: probabilities and ids of the likeliest; `own`: π(y).
    """
    expected, table, own = expected.double(), table.double(), own.double()
    is_likely = (places == tokens[:, None]).any(dim=1)
    rows = []
    for bias in BIASES:
        factor = math.exp(bias)
        kappa = (1.0 - DOUBT) * (factor - 1.0)
        others = 1.0 / (1.0 + table * (factor - 1.0)).clamp(min=1e-6)
        exact = torch.log1p((1.0 - DOUBT) * (others - 1.0)) + kappa * table
        mine = 1.0 / (1.0 + own * (factor - 1.0)).clamp(min=1e-6)
        said = torch.log((1.0 - DOUBT) * factor * mine + DOUBT) - torch.log1p((1.0 - DOUBT) * (mine - 1.0))
        gain = -kappa * expected
        gain.index_add_(0, places.reshape(-1), exact.reshape(-1))
        gain.index_add_(0, tokens, torch.where(is_likely, said, math.log(DOUBT + (1.0 - DOUBT) * factor)))
        rows.append(gain)
    return torch.stack(rows)


@dataclass(frozen=True)
class Biased:
    """The token that the evidence singles out."""

    token: int
    seen: float
    """How often it was drawn."""
    expected: float
    """How often the policy would have drawn it."""
    bias: float | None
    """Of its logit; None where it looks banned."""

    def told(self, text: str) -> str:
        """In words, of the token as text."""
        found = f"token {self.token} ({text!r}) was drawn {self.seen:.0f} times where {self.expected:.1f} are expected"
        return f"{found}: it looks " + ("banned" if self.bias is None else f"biased by {self.bias:+.2g} in its logit")


class TokenWager:
    """What was bet and won on the biases of each token, over all starting updates; empty before the first look."""

    def __init__(self) -> None:
        self.wealth: Float[Tensor, "biases vocab"] = torch.zeros(len(BIASES), 0)
        """log of the wager."""
        self.counts: Float[Tensor, "2 vocab"] = torch.zeros(2, 0)
        """How often each token was drawn, and Σ π of it."""

    def add(self, tokens: Int[Tensor, "tokens"], expected: Tensor, gains: Tensor, share: float) -> None:
        """Take in a look's drawn tokens, Σ π(v) and `bias_gains`; log `share` is laid anew from here on."""
        vocab = gains.shape[1]
        if not self.wealth.shape[1]:
            self.wealth, self.counts = torch.full((len(BIASES), vocab), -math.inf), torch.zeros(2, vocab)
        before = torch.logaddexp(self.wealth.double(), torch.tensor(share, dtype=torch.float64))
        self.wealth = (before + gains.double().cpu()).float()
        seen = torch.bincount(tokens.cpu(), minlength=vocab)
        self.counts = self.counts + torch.stack([seen.float(), expected.float().cpu()])

    def log_evidence(self) -> float:
        """log of the mean wager over all biases of all tokens."""
        count = self.wealth.numel()
        return float(torch.logsumexp(self.wealth.double().flatten(), dim=0)) - math.log(count) if count else -math.inf

    def best(self) -> float:
        """log of the odds of the likeliest bias, over the number of tokens that it was chosen from."""
        return float(self.wealth.max()) - math.log(self.wealth.shape[1]) if self.wealth.numel() else -math.inf

    def singled_out(self) -> Biased:
        """The token and the bias under which what was drawn is most probable."""
        place, token = divmod(int(self.wealth.argmax()), self.wealth.shape[1])
        seen, expected = self.counts[:, token].tolist()
        if place == 0:
            return Biased(token, seen, expected, None)
        finite = torch.tensor(BIASES[1:], dtype=torch.float64)
        odds = torch.softmax(self.wealth[1:, token].double(), dim=0)
        bias = float(odds @ finite)
        if place in (1, len(BIASES) - 1) and seen > 0.0:  # the grid ends here, and the bias may not
            bias = math.copysign(max(abs(bias), abs(math.log(seen / expected))), bias)
        return Biased(token, seen, expected, bias)

    def state(self) -> dict[str, str]:
        """As plain values."""
        return {"wealth": _packed(self.wealth), "counts": _packed(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.wealth, self.counts = (
            _unpacked(state[name], rows) for name, rows in (("wealth", len(BIASES)), ("counts", 2))
        )


def _packed(numbers: Tensor) -> str:
    return base64.b64encode(zlib.compress(numbers.numpy().astype("<f4").tobytes())).decode("ascii")


def _unpacked(text: str, rows: int) -> Tensor:
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float32)
    return torch.from_numpy(numbers.reshape(rows, -1))
