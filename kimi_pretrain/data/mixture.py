"""Which domain sample i of a run comes from, and how many that domain gave before it.

Pure arithmetic on integers (design 4.8): no state is carried from sample to sample, so a
run is resumed, split over readers or looked at in the middle by its sample numbers alone.

Within a stage the domains follow a fixed pattern that repeats. It is Tijdeman's solution of
the chairman assignment problem ("The chairman assignment problem", Discrete Mathematics 32,
1980): after any number of samples, the count of every domain differs from weight x samples
by at most 1 - 1/(2K - 2), K domains; no order can promise less. Batches thereby hold the
mixture they were asked for, and not one that wanders as independent draws do.

Counts carry over from stage to stage. The share of a domain may change ten times, its
epochs go on where they were: no window comes twice before all others of the epoch.
"""

import difflib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, inf, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import MixtureStageConfig

# Longest pattern. Weights with a common denominator up to it are exact (all that are given
# with four decimals or fewer); others are rounded to multiples of its reciprocal.
MAX_PERIOD = 1 << 16

Counts = NDArray[np.int64]


def shares(weights: Sequence[float]) -> list[int]:
    """Samples of each domain in one period; the weights need not add up to one.

    A weight is taken as the decimal it is written as: 0.1 is one tenth. A positive weight
    keeps at least one sample. Raises ValueError if a weight is negative or not finite, or
    if none is positive.
    """
    exact = [Fraction(repr(float(w))) if np.isfinite(w) else Fraction(-1) for w in weights]
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise ValueError(f"weights must be finite, not negative and not all zero: {weights}")
    scale = lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    whole = [w // gcd(*whole) for w in whole]
    total = sum(whole)
    if total <= MAX_PERIOD:
        return whole
    # Largest remainders; one sample is set aside for each domain that would round to none.
    result = [max(w * MAX_PERIOD // total, 1 if w else 0) for w in whole]
    by_remainder = sorted(
        range(len(whole)), key=lambda k: result[k] * total - whole[k] * MAX_PERIOD
    )
    missing = MAX_PERIOD - sum(result)
    for k in by_remainder[: max(missing, 0)]:
        result[k] += 1
    if missing < 0:
        result[max(range(len(result)), key=result.__getitem__)] += missing
    return result


def pattern(shares: Sequence[int]) -> NDArray[np.int16]:
    """The domain of each sample of one period, int16 [sum of shares].

    Tijdeman's rule as earliest deadline first. With weight w and d = 1/(2K - 2), the unit j
    (from 0) of a domain may be sample n (from 1) once n >= (j + d) / w and must be it by
    n = floor((j + 1 - d) / w) + 1; of those allowed, the most urgent is taken.
    """
    period = sum(shares)
    active = np.flatnonzero(shares)
    slack = max(2 * len(active) - 2, 1)  # 1 / d
    share = np.asarray(shares, dtype=np.int64)
    domain = np.repeat(active, share[active])
    unit = np.concatenate([np.arange(n) for n in share[active]])
    release = -(-(unit * slack + 1) * period // (share[domain] * slack))
    deadline = ((unit + 1) * slack - 1) * period // (share[domain] * slack)
    order = np.argsort(release, kind="stable")
    urgency = list(zip(deadline[order].tolist(), domain[order].tolist(), strict=True))
    # Units that have arrived by each sample.
    arrived = np.searchsorted(release[order], np.arange(1, period + 1), side="right").tolist()
    waiting: list[tuple[int, int]] = []
    result = np.empty(period, dtype=np.int16)
    for n in range(period):
        for arrival in urgency[arrived[n - 1] if n else 0 : arrived[n]]:
            heapq.heappush(waiting, arrival)
        result[n] = heapq.heappop(waiting)[1]
    return result


@dataclass(frozen=True)
class _Stage:
    """Samples [first, last) of the run follow one pattern."""

    first: int
    last: int | None
    shares: Counts  # samples a period, int64 [domains]
    pattern: NDArray[np.int16]  # [period]
    ranks: Counts  # samples of the same domain before this one in its period, int64 [period]
    before: Counts  # samples of each domain before this stage, int64 [domains]

    def counts(self, sample: int) -> Counts:
        """Samples of each domain among the first `sample` of the run; it lies in this stage."""
        cycles, rest = divmod(sample - self.first, len(self.pattern))
        partial = np.bincount(self.pattern[:rest], minlength=len(self.shares))
        return self.before + cycles * self.shares + partial


class Mixture:
    """The domain of every sample of a run, by its number.

    `domains` fixes the meaning of the domain numbers. `stages` are the configured ones:
    weights by domain name (an absent domain has weight 0) and a length in tokens. A stage
    begins with the first sample that starts at or after its first token. Raises ConfigError
    if a stage cannot be read.

    `samples` is the length of the run the stages allow, None if the last one is open.
    """

    def __init__(
        self, domains: Sequence[str], stages: Sequence[MixtureStageConfig], sequence_length: int
    ) -> None:
        if not stages:
            raise ConfigError("data.mixture", [], "a mixture has a stage", "one without `tokens`")
        self.domains = tuple(domains)
        self._stages: list[_Stage] = []
        first, tokens = 0, 0
        before = np.zeros(len(self.domains), dtype=np.int64)
        for number, stage in enumerate(stages):
            name = f"data.mixture[{number}]"
            part = np.asarray(_stage_shares(name, stage.weights, self.domains), dtype=np.int64)
            order = pattern(part.tolist())
            ranks = np.empty(len(order), dtype=np.int64)
            for domain in range(len(self.domains)):
                of_domain = np.flatnonzero(order == domain)
                ranks[of_domain] = np.arange(len(of_domain))
            last = None
            if stage.tokens is not None:
                tokens += stage.tokens
                last = -(-tokens // sequence_length)
            if stage.tokens is not None and stage.tokens <= 0:
                raise ConfigError(f"{name}.tokens", stage.tokens, "must be positive", "null")
            if last is None and number < len(stages) - 1:
                raise ConfigError(
                    f"{name}.tokens", None, "only the last stage may be open", "a number of tokens"
                )
            self._stages.append(_Stage(first, last, part, order, ranks, before))
            if last is not None:
                before = self._stages[-1].counts(last)
                first = last
        self.samples = self._stages[-1].last

    def locate(self, samples: NDArray[Any]) -> tuple[Counts, Counts]:
        """Domain of each sample, and how many samples of that domain came before it.

        samples: integers [n]; both results int64 [n]. Raises ConfigError past the last stage.
        """
        samples = np.asarray(samples, dtype=np.int64)
        if samples.size and int(samples.min()) < 0:
            raise ValueError(f"samples count from 0, got {int(samples.min())}")
        if samples.size and self.samples is not None and int(samples.max()) >= self.samples:
            raise ConfigError(
                "data.mixture",
                f"sample {int(samples.max())}",
                f"its stages end after {self.samples} samples",
                "tokens: null in the last stage",
            )
        domain, ordinal = np.empty_like(samples), np.empty_like(samples)
        for stage in self._stages:
            here = samples >= stage.first
            if stage.last is not None:
                here &= samples < stage.last
            if not here.any():
                continue
            cycles, position = np.divmod(samples[here] - stage.first, len(stage.pattern))
            of = stage.pattern[position].astype(np.int64)
            domain[here] = of
            ordinal[here] = stage.before[of] + cycles * stage.shares[of] + stage.ranks[position]
        return domain, ordinal

    def counts(self, sample: int) -> Counts:
        """Samples of each domain among the first `sample` of the run, int64 [domains]."""
        for stage in self._stages:
            if sample <= (inf if stage.last is None else stage.last):
                return stage.counts(sample)
        raise ValueError(f"the mixture ends after {self.samples} samples, got {sample}")


def _stage_shares(name: str, weights: Mapping[str, float], domains: Sequence[str]) -> list[int]:
    for domain in weights:
        if domain not in domains:
            close = difflib.get_close_matches(domain, domains, n=1) or [", ".join(domains)]
            raise ConfigError(f"{name}.weights", domain, "must name a domain of the data", close[0])
    try:
        return shares([weights.get(domain, 0.0) for domain in domains])
    except ValueError:
        raise ConfigError(
            f"{name}.weights",
            dict(weights),
            "weights must be finite, not negative, and one of them positive",
            f"{{{domains[0]}: 1.0}}",
        ) from None
