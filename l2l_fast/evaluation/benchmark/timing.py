"""Medians of alternating rounds: every contender and every peak of the machine is sampled once per round, so that a
disturbance, a changed clock or a busy neighbour hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ... import _C

Sampler = Callable[[], float]


def interleave(samplers: Mapping[str, Sampler], rounds: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """``rounds`` samples of each, one of each per round, starting at another one in every round.

    Stops after ``seconds``, but not before three rounds (or ``rounds``, if fewer).
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for r in range(rounds):
        if r >= 3 and time.perf_counter() - begin > seconds:
            break
        gc.collect()
        for k in range(len(names)):
            name = names[(k + r) % len(names)]
            samples[name].append(samplers[name]())
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def timed(run: Callable[[], object], units: float, min_seconds: float, device: torch.device) -> Sampler:
    """Samples seconds per unit of work of ``run()``, which does ``units``; calls it once to warm up."""
    run()

    def sample() -> float:
        _synchronize(device)
        calls, begin = 0, time.perf_counter()
        while True:
            run()
            calls += 1
            if time.perf_counter() - begin >= min_seconds:
                break
        _synchronize(device)
        return (time.perf_counter() - begin) / (calls * units)

    return sample


def with_isa(isa: str, sampler: Sampler) -> Sampler:
    """The sampler with the CPU kernels of one instruction set."""

    def sample() -> float:
        before = _C.isa()
        _C.set_isa(isa)
        try:
            return sampler()
        finally:
            _C.set_isa(before)

    return sample


def fma_peak(threads: int, device: torch.device, seconds: float) -> Sampler:
    """Samples multiply-adds per second: independent chains in registers on CPU threads, or cuBLAS float32 on a GPU."""
    if device.type == "cuda":
        a = torch.randn(4096, 4096, device=device)
        product = timed(lambda: a @ a, 4096.0**3, seconds, device)
        return lambda: 1.0 / product()
    pool = ThreadPoolExecutor(threads)
    return lambda: sum(pool.map(_C.fma_rate, [seconds] * threads))


def copy_bandwidth(device: torch.device, seconds: float, megabytes: int) -> Sampler:
    """Samples bytes per second of a large tensor copy, counting what is read and what is written."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), 2.0 * source.numel() * source.element_size(), seconds, device)
    return lambda: 1.0 / copy()


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels that a GPU runs for one ``run()``, as the profiler counts them."""
    _synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        _synchronize(device)
    return count_kernels(profile.events())


def count_kernels(events: Iterable[Any]) -> int:
    """Of a profile's events those that are kernels on a GPU: neither copies nor the ranges that the profiler names."""
    others = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(others)
        for event in events
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
