"""Fit the network that predicts a frame from its tokens (`tscfile.transforms.prediction`).

Hidden units are learnt by stochastic gradients (Adam) on what a linear fit leaves, outputs and
linear part then by least squares on the hidden units as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import FrameContext
from ..transforms.prediction import Features
from .checkpoint import Checkpoint, State
from .tables import quantize_columns, restored_columns

Floats = NDArray[np.float32]

_RATE, _DECAY = 2e-3, 0.02
_WARM_UP = 30
_BATCH = 4096
_LEARNT = ("weight", "bias", "output")
_ADAM = {"steps": "step", "mean": "exp_avg", "square": "exp_avg_sq"}
"""What is kept of the optimizer between epochs, by the name it has there."""

_RIDGE = 1e-4


@dataclass(frozen=True)
class Sample:
    """Windows that the network learns from: tokens int32 ``[n]`` and the coordinates to be
    predicted, float16 ``[n, P]``, in units of ``scale`` float32 ``[P]``."""

    tokens: Sequence[NDArray[np.int32]]
    targets: Sequence[NDArray[np.float16]]
    scale: Floats

    def context(self, number: int) -> FrameContext:
        tokens = self.tokens[number]
        return FrameContext(np.arange(len(tokens), dtype=np.int32), tokens)

    def target(self, number: int) -> Floats:
        return self.targets[number].astype(np.float32) * self.scale


def fit_network(
    features: Features, sample: Sample, n_hidden: int, epochs: int, seed: int, device: str,
    checkpoint: Checkpoint, progress: Callable[[str], None],
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Arrays ``hidden``, ``hidden_scales``, ``hidden_bias``, ``linear``, ``output``, … of a
    book."""
    n = features.n_features
    alone = _least_squares(sample, lambda context: features.all(context), n)
    noise = _remaining(features, sample, alone)
    state = _learn_hidden(
        features, sample, alone, noise, n_hidden, epochs, seed, device, checkpoint, progress
    )
    hidden, hidden_scales = quantize_columns(state["weight"])
    used = restored_columns(hidden, hidden_scales)

    def with_hidden(context: FrameContext) -> Floats:
        found = features.all(context)
        return np.concatenate([found, np.maximum(found @ used + state["bias"], 0)], axis=1)

    progress("network: outputs")
    both = _least_squares(sample, with_hidden, n + n_hidden)
    linear, linear_scales = quantize_columns(both[:n])
    output, output_scales = quantize_columns(both[n:-1])
    return {
        "hidden": hidden,
        "hidden_scales": hidden_scales,
        "hidden_bias": state["bias"].astype(np.float32),
        "linear": linear,
        "linear_scales": linear_scales,
        "output": output,
        "output_scales": output_scales,
    }


def _least_squares(
    sample: Sample, inputs: Callable[[FrameContext], Floats], n_inputs: int
) -> Floats:
    """Float32 ``[n_inputs + 1, P]``, the last row a constant (the book's mean takes it over)."""
    square = np.zeros((n_inputs + 1, n_inputs + 1))
    cross = np.zeros((n_inputs + 1, len(sample.scale)))
    for i in range(len(sample.tokens)):
        found = inputs(sample.context(i))
        found = np.concatenate([found, np.ones((len(found), 1), np.float32)], axis=1)
        square += found.T @ found
        cross += found.T @ sample.target(i)
    ridge = _RIDGE * np.trace(square[:-1, :-1]) / max(n_inputs, 1) * np.eye(n_inputs + 1)
    ridge[-1, -1] = 1e-9
    weights: Floats = np.linalg.solve(square + ridge, cross).astype(np.float32)
    return weights


def _remaining(features: Features, sample: Sample, linear: Floats) -> NDArray[np.float64]:
    """Mean square of each coordinate that the linear fit leaves, ``[P]``."""
    total, n_frames = np.zeros(len(sample.scale)), 0
    for i in range(len(sample.tokens)):
        rest = sample.target(i) - features.all(sample.context(i)) @ linear[:-1] - linear[-1]
        total += (rest.astype(np.float64) ** 2).sum(axis=0)
        n_frames += len(rest)
    return total / n_frames


def _learn_hidden(
    features: Features, sample: Sample, linear: Floats, noise: NDArray[np.float64],
    n_hidden: int, epochs: int, seed: int, device: str, checkpoint: Checkpoint,
    progress: Callable[[str], None],
) -> State:  # fmt: skip
    """``weight`` float32 ``[F, M]`` and ``bias`` ``[M]`` of the hidden units."""
    import torch

    n = features.n_features
    rng = np.random.default_rng(seed)
    state = checkpoint.get("network")
    if state is None:
        bound = 1 / np.sqrt(n)
        state = {
            "epoch": np.array(0),
            "weight": rng.uniform(-bound, bound, (n, n_hidden)).astype(np.float32),
            "bias": rng.uniform(-bound, bound, n_hidden).astype(np.float32),
            "output": np.zeros((n_hidden, len(sample.scale)), np.float32),
        }
    # Rate falls with the logarithm of the error, as far down as a coarse step reaches.
    level = water_level(noise, _BITS_PER_COORDINATE * len(noise))
    unit = np.sqrt(noise.mean())
    weights = torch.as_tensor((unit**2 / (noise + level)).astype(np.float32), device=device)
    vectors = torch.as_tensor(features.vectors, device=device)
    dense = [features.dense(sample.context(i)) for i in range(len(sample.tokens))]
    histories = [sample.context(i).history(features.history) for i in range(len(sample.tokens))]
    parameters = [
        torch.tensor(state[name], device=device, requires_grad=True)
        for name in _LEARNT
    ]
    fixed = torch.as_tensor(linear, device=device)
    adam = torch.optim.AdamW(parameters, _RATE, weight_decay=_DECAY)
    for name, value in zip(_LEARNT, parameters, strict=True):
        if f"{name}_steps" in state:
            kept = {key: torch.tensor(state[f"{name}_{short}"]) for short, key in _ADAM.items()}
            # The count of steps stays where it is; it is no sum over the weights.
            adam.state[value] = {
                key: each if key == "step" else each.to(device) for key, each in kept.items()
            }
    n_frames = sum(len(each) for each in sample.tokens)
    n_batches = max(1, -(-n_frames // _BATCH))
    for epoch in range(int(state["epoch"]), epochs):
        progress(f"network: epoch {epoch + 1} of {epochs}")
        order = np.random.default_rng((seed, epoch)).permutation(len(sample.tokens))
        for at, batch in enumerate(np.array_split(order, min(n_batches, len(order)))):
            done = (epoch + at / n_batches) / epochs
            warm = min(1.0, (epoch * n_batches + at + 1) / _WARM_UP)
            for group in adam.param_groups:
                group["lr"] = _RATE * warm * (1 - done)
            history = torch.as_tensor(np.concatenate([histories[i] for i in batch]), device=device)
            looked = vectors[history.clamp_min(0)] * (history >= 0)[..., None]
            inputs = torch.cat(
                [looked.flatten(1), torch.as_tensor(np.concatenate([dense[i] for i in batch]))
                 .to(device)], dim=1,
            )  # fmt: skip
            target = torch.as_tensor(np.concatenate([sample.target(i) for i in batch]))
            rest = (target.to(device) - inputs @ fixed[:-1] - fixed[-1]) / unit
            hidden = torch.relu(inputs @ parameters[0] + parameters[1])
            loss = ((rest - hidden @ parameters[2]).square() * weights).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        for name, value in zip(_LEARNT, parameters, strict=True):
            state[name] = value.detach().cpu().numpy()
            for short, key in _ADAM.items():
                state[f"{name}_{short}"] = adam.state[value][key].cpu().numpy()
        state["epoch"] = np.array(epoch + 1)
        checkpoint.put("network", state)
    return state


_BITS_PER_COORDINATE = 0.25
"""Rate of the coarse tiers that errors are weighed for."""


def water_level(variances: NDArray[np.float64], bits: float) -> float:
    """The distortion level at which Gaussian coordinates take ``bits`` together (reverse
    water-filling, Cover and Thomas, section 10.3).

    >>> round(water_level(np.array([16.0, 4.0, 0.0]), 3.0), 3)
    1.0
    """
    low, high = 1e-12, max(float(variances.max(initial=0.0)), 1e-11)
    for _ in range(100):
        level = np.sqrt(low * high)
        spent = 0.5 * np.log2(np.maximum(variances / level, 1)).sum()
        low, high = (level, high) if spent > bits else (low, level)
    return float(high)
