"""The fleet and energy arithmetic of the TSC reports, every number an argument.

The reports leave out utilisation, weights and most factors. `Fleet.of_report` and the `Energy`
objects `REPORT_A100` and `REPORT_H100` are the readings that give the reports' figures. The
defaults count weights on every GPU, all tokens of a user, and one copy of the prefix a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOURS = 8760


def cache_bytes(
    layers: int, kv_heads: int, head_dim: int, tokens: int, value_bytes: int = 2
) -> int:
    """Keys and values of a cache.

    >>> cache_bytes(12, 12, 64, 1024), cache_bytes(32, 32, 128, 4096)
    (37748736, 2147483648)
    """
    return 2 * layers * kv_heads * head_dim * tokens * value_bytes


@dataclass(frozen=True)
class Fleet:
    """GPUs that hold the caches of all users at once; nothing but memory is counted.

    ``ratio``: how much smaller a user's own tokens become. ``fixed``: GPUs added whatever the
    number of users. ``weights``: bytes of the model on each GPU. ``counts_prefix``: whether the
    shared prefix is held, by every user without and once a GPU with compression.
    """

    tokens: int = 4096
    prefix: int = 2048
    token_bytes: int = cache_bytes(32, 8, 128, 1)
    gpu_bytes: float = 80e9
    weights: float = 16e9
    ratio: float = 32.0
    fixed: int = 0
    counts_prefix: bool = True
    price: float = 2.0

    @classmethod
    def of_report(cls) -> Fleet:
        """The reading that gives the reports' numbers of GPUs: no weights, the prefix left out of
        both columns, two GPUs more with compression.

        >>> fleet = Fleet.of_report()
        >>> [(fleet.without(n), fleet.with_compression(n)) for n in (2000, 5000, 10000)]
        [(7, 3), (17, 3), (34, 4)]
        """
        return cls(weights=0.0, fixed=2, counts_prefix=False)

    @property
    def _own(self) -> int:
        return (self.tokens - self.prefix) * self.token_bytes

    def without(self, users: int) -> int:
        """GPUs without compression."""
        per_user = self.tokens * self.token_bytes if self.counts_prefix else self._own
        return math.ceil(users * per_user / (self.gpu_bytes - self.weights))

    def with_compression(self, users: int) -> int:
        """GPUs with compression and a shared prefix."""
        held = self.prefix * self.token_bytes if self.counts_prefix else 0
        free = self.gpu_bytes - self.weights - held
        return self.fixed + math.ceil(users * self._own / (self.ratio * free))

    def saving(self, users: int) -> float:
        """Dollars a year.

        >>> round(Fleet.of_report().saving(10000))
        525600
        """
        return (self.without(users) - self.with_compression(users)) * self.price * HOURS

    def implied_price(self, users: int, saving: float) -> float:
        """Dollars an hour that would give this saving a year."""
        return saving / (self.without(users) - self.with_compression(users)) / HOURS


@dataclass(frozen=True)
class Energy:
    """GPUs at full power all year. ``pue``: energy of the site over that of its computers;
    ``co2``: kg a kWh; ``water``: litres a kWh of site energy; ``car``: tonnes of CO2 a year."""

    watts: float
    pue: float = 1.3
    co2: float = 0.390
    water: float = 1.8
    car: float = 4.6

    def mwh(self, gpus: int) -> float:
        """
        >>> [round(each.mwh(30), 2) for each in (REPORT_A100, REPORT_H100)]
        [102.49, 239.15]
        """
        return gpus * self.watts * HOURS * self.pue / 1e6

    def tonnes(self, gpus: int) -> float:
        """CO2 a year.

        >>> [round(each.tonnes(30), 2) for each in (REPORT_A100, REPORT_H100)]
        [39.97, 93.27]
        """
        return self.mwh(gpus) * self.co2

    def litres(self, gpus: int) -> float:
        """Water a year.

        >>> round(REPORT_A100.litres(30))
        184486
        """
        return self.mwh(gpus) * 1000 * self.water

    def cars(self, gpus: int) -> float:
        """Passenger cars that emit as much."""
        return self.tonnes(gpus) / self.car


REPORT_A100 = Energy(300.0)
"""NVIDIA's A100 80GB PCIe; CO2 of the U.S. grid in 2022 (EIA); water by LBNL, 2016; car by EPA."""

REPORT_H100 = Energy(700.0)
"""NVIDIA's H100 SXM, the rest as for `REPORT_A100`."""


def shared_prefix_factor(share: float, users: int) -> float:
    """How much smaller ``users`` caches are that have a ``share`` of their tokens in common.

    >>> round(shared_prefix_factor(0.5, 4), 2), round(shared_prefix_factor(0.75, 1000), 2)
    (1.6, 3.99)
    """
    return 1 / (1 - share + share / users)


def eviction_ratio(
    layers: int, early: int, kept: float, key_bits: int, value_bits: int, page: int
) -> float:
    """Ratio against fp16 of K/V bits with one fp16 scale a page, a share ``kept`` of the frames in
    all but the first ``early`` layers.

    >>> [round(eviction_ratio(22, 5, kept, 4, 2, 64), 2) for kept in (1, 0.6, 0.3)]
    [4.92, 7.13, 10.72]
    """
    mean_kept = (early + (layers - early) * kept) / layers
    return 16 / (mean_kept * ((key_bits + value_bits) / 2 + 16 / page))
