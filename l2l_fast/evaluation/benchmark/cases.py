"""The measurements themselves: each function yields finished rows of the table."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ... import _C
from ...kernels.operators import Config, segment_backward
from ...kernels.state import TILE, num_tiles
from ...problems import MNIST
from . import products
from .contenders import build, fused_runs_on, make_network
from .episode import FusedEpisode, PlainEpisode
from .memory import available_bytes, peak_extra_bytes
from .table import Row
from .timing import Sampler, copy_bandwidth, fma_peak, interleave, launches, medians, timed, with_isa


@dataclass(frozen=True)
class Options:
    sizes: tuple[int, ...]
    segment_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    contenders: tuple[str, ...]
    measures: tuple[str, ...]
    device: torch.device
    steps: int
    horizon: int
    rounds: int
    min_seconds: float
    max_seconds: float
    memory_size: int  # coordinates at which memory is measured, enough to drown constants
    plain_memory_size: int  # of the plain contenders, which need some GB at 100,000
    copy_megabytes: int
    say: Callable[[str], None]


def step_multiply_adds(config: Config) -> int:
    """Multiply-adds of one step of one coordinate."""
    features = 2 if config.preprocess == "log_sign" else 1
    inputs = [features] + [config.hidden_size] * (config.num_layers - 1)
    return sum(4 * config.hidden_size * (n + config.hidden_size) for n in inputs) + config.hidden_size


def backward_multiply_adds(config: Config) -> int:
    """Of the segment backward, per coordinate and step: forward again (no read-out), to the inputs, to the weights."""
    hidden = config.hidden_size
    to_inputs = 4 * hidden * hidden * (2 * config.num_layers - 1) + hidden
    return step_multiply_adds(config) - hidden + to_inputs + step_multiply_adds(config)


def step_bytes(config: Config) -> int:
    """State in and out, gradient in, parameter in and out."""
    return 2 * 4 * 2 * config.num_layers * config.hidden_size + 3 * 4


def memory_limit(config: Config, steps: int) -> int:
    """Bytes per coordinate that a segment may take at its peak: T + 1 gradients, the state at the start and now."""
    return 4 * (steps + 1) + 2 * 4 * 2 * config.num_layers * config.hidden_size + 16


class Bench:
    """One run: measured peaks of memory decide how large the plain contenders can be."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.net = make_network(options.device)
        self.config = self.net.config
        self.fused = fused_runs_on(options.device)

    def rows(self) -> Iterator[Row]:
        o = self.options
        for threads in o.threads:
            torch.set_num_threads(threads)
            if "products" in o.measures and o.device.type == "cpu":
                yield from self.products(threads)
            for measure, sizes in (("step", o.sizes), ("segment", o.segment_sizes)):
                if measure in o.measures:
                    for n in sizes:
                        yield from self.compare(measure, n, threads)
            if "gac" in o.measures and self.fused:
                for measure, sizes in (("step", o.sizes), ("segment", o.segment_sizes)):
                    yield from self.averaged(measure, sizes[-1], threads)
            if "backward" in o.measures and self.fused:
                for n in o.segment_sizes[-1:]:
                    yield from self.backward(n, threads)
            if "episode" in o.measures:
                yield from self.episode(threads)
        if "memory" in o.measures:
            for measure in ("step", "segment"):
                yield self.memory(measure)

    # ---- step and segment ----

    def compare(self, measure: str, n: int, threads: int) -> Iterator[Row]:
        o = self.options
        o.say(f"{measure}, N={n:,}, {threads} thread{'s' * (threads > 1)}")
        steps = o.steps if measure == "segment" else 1
        names = [name for name in o.contenders if name != "fused" or self.fused]
        sizes = {name: self._fitting(measure, name, n) for name in names}
        samplers: dict[str, Sampler] = {}
        counts: dict[str, int] = {}
        for name in [*names, "adam"] if measure == "step" else names:
            size = sizes.get(name, n)
            run = build(measure, name, self.net, size, steps)
            if name == "adam":
                samplers[name] = timed(run, n, o.min_seconds, o.device)
            else:
                self._add(samplers, name, run, size * steps)
            if o.device.type == "cuda":
                counts[name] = launches(run, o.device)
        self._add_peaks(samplers, threads)
        samples = interleave(samplers, o.rounds, o.max_seconds)
        notes = [f"{name} at N={size:,}, all that fits" for name, size in sizes.items() if size < n]
        if counts:
            notes.append(f"kernels per {measure}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        if measure == "segment":
            madds, moved = step_multiply_adds(self.config) + backward_multiply_adds(self.config), None
            notes.insert(0, f"T={steps}, per unrolled step")
        else:
            madds, moved = step_multiply_adds(self.config), step_bytes(self.config)
        yield from self._by_isa(measure, n, threads, samples, 1e9, "ns", madds, moved, notes)

    def _fitting(self, measure: str, name: str, n: int) -> int:
        """The largest number of coordinates up to ``n`` that memory allows a plain contender."""
        if name == "fused" or n <= self.options.plain_memory_size:
            return n
        peak = self._peak(measure, name, self.options.plain_memory_size)
        if peak is None:
            return n
        # The others stay in memory meanwhile: their states, and what the fused segment records.
        others = n * (3 * 4 * self.config.num_layers * 2 * self.config.hidden_size + 4 * self.options.steps)
        room = 0.8 * (available_bytes(self.options.device) - others)
        fitting = int(max(room, 0.0) / peak)
        if fitting >= n:
            return n
        digits = 10 ** max(len(str(fitting)) - 2, 0)
        return max(fitting // digits * digits, 1000)

    # ---- the segment backward alone ----

    def backward(self, n: int, threads: int) -> Iterator[Row]:
        o = self.options
        o.say(f"segment backward alone, N={n:,}")
        gradients = torch.randn(o.steps + 1, num_tiles(n) * TILE, device=o.device)
        state, phi = self.net.init_state(n).data, self.net.phi().detach()
        ones = [1.0] * o.steps

        def run() -> object:
            records = list(gradients)
            return segment_backward([state], [n], [0], records, [], ones, ones, ones, phi, self.config)

        samplers: dict[str, Sampler] = {}
        self._add(samplers, "fused", run, n * o.steps)
        self._add_peaks(samplers, threads)
        samples = interleave(samplers, o.rounds, o.max_seconds)
        madds = backward_multiply_adds(self.config)
        notes = [f"T={o.steps}, per unrolled step; the rest of the segment is the step"]
        yield from self._by_isa("segment backward", n, threads, samples, 1e9, "ns", madds, None, notes)

    # ---- global averaging cells ----

    def averaged(self, measure: str, n: int, threads: int) -> Iterator[Row]:
        """The network with two global averaging cells in each layer beside the plain one."""
        o = self.options
        o.say(f"{measure} with global averaging cells, N={n:,}, {threads} thread{'s' * (threads > 1)}")
        steps = o.steps if measure == "segment" else 1
        samplers: dict[str, Sampler] = {}
        for isa in o.isas if o.device.type == "cpu" else ("",):
            for name, cells in (("fused", 2), ("plain", 0)):
                run = build(measure, "fused", make_network(o.device, gac_cells=cells), n, steps)
                sampler = timed(run, n * steps, o.min_seconds, o.device)
                samplers[f"{name} {isa}".strip()] = with_isa(isa, sampler) if isa else sampler
        self._add_peaks(samplers, threads)
        samples = interleave(samplers, o.rounds, o.max_seconds)
        found = medians(samples)
        for row in self._by_isa(f"{measure}, 2 GAC", n, threads, samples, 1e9, "ns", None, None, []):
            plain, fused = found.get(f"plain {row.isa}", found.get("plain")), row.values["fused"]
            if plain is not None and fused is not None:
                row.notes.append(f"{row.isa}: {fused / (1e9 * plain):.2f} times the plain {measure}")
            yield row

    # ---- the episode ----

    def episode(self, threads: int) -> Iterator[Row]:
        o = self.options
        o.say(f"MNIST episode of {o.horizon} steps, {threads} thread{'s' * (threads > 1)}")
        problem = MNIST()
        samplers: dict[str, Any] = {}
        arguments = (self.net, problem, o.horizon, o.steps)
        coordinates = PlainEpisode(*arguments).coordinates
        for name in o.contenders:
            if name == "fused" and not self.fused:
                continue
            run = FusedEpisode(*arguments) if name == "fused" else PlainEpisode(*arguments, name == "compile")
            self._add(samplers, name, run, 1.0)
        samples = interleave(samplers, o.rounds, o.max_seconds)
        notes = [f"{o.horizon} steps, T={o.steps}, optimizee and meta-Adam included"]
        yield from self._by_isa("MNIST episode", coordinates, threads, samples, 1e3, "ms", None, None, notes)

    # ---- memory ----

    def memory(self, measure: str) -> Row:
        o = self.options
        o.say(f"peak memory of the {measure}")
        row = Row(f"{measure} memory", o.memory_size, o.threads[-1], "", "B", {})
        for name in o.contenders:
            if name == "fused" and not self.fused:
                continue
            size = o.memory_size if name == "fused" else o.plain_memory_size
            row.values[name] = self._peak(measure, name, size)
            if size < o.memory_size:
                row.notes.append(f"{name} at N={size:,}")
        if measure == "segment":
            row.notes.insert(0, f"T={o.steps}, limit {memory_limit(self.config, o.steps)}")
        return row

    @functools.cache  # noqa: B019  (a Bench lives for one run)
    def _peak(self, measure: str, name: str, n: int) -> float | None:
        o = self.options
        return peak_extra_bytes(measure, name, n, o.steps, o.threads[-1], o.device)

    # ---- the matrix products alone ----

    def products(self, threads: int) -> Iterator[Row]:
        o = self.options
        reason = products.unavailable()
        if reason is not None:
            o.say(reason)
            return
        o.say(f"matrix products alone, {threads} thread{'s' * (threads > 1)}")
        for isa in o.isas:
            library = _library(isa)
            samplers = {name: products.sampler(library, name, threads, o.min_seconds) for name in products.PRODUCTS}
            samplers["peak"] = with_isa(isa, fma_peak(threads, o.device, o.min_seconds))
            samples = interleave(samplers, o.rounds, o.max_seconds)
            found = medians(samples)
            for name, label in products.PRODUCTS.items():
                row = Row(label, None, threads, isa, "Gmadd/s", {"fused": found[name] / 1e9}, peak=found["peak"])
                row.samples = {"fused": samples[name], "peak": samples["peak"]}
                yield row

    # ---- common ----

    def _add(self, samplers: dict[str, Sampler], name: str, run: Callable[[], object], units: float) -> None:
        o = self.options
        if name != "fused" or o.device.type != "cpu":
            samplers[name] = timed(run, units, o.min_seconds, o.device)
            return
        for isa in o.isas:
            samplers[f"fused {isa}"] = with_isa(isa, timed(run, units, o.min_seconds, o.device))

    def _add_peaks(self, samplers: dict[str, Sampler], threads: int) -> None:
        o = self.options
        seconds = min(o.min_seconds, 0.1)
        for isa in o.isas:
            peak = fma_peak(threads, o.device, seconds)
            samplers[f"peak {isa}"] = peak if o.device.type != "cpu" else with_isa(isa, peak)
        samplers["copy"] = copy_bandwidth(o.device, seconds, o.copy_megabytes)

    def _by_isa(
        self,
        measure: str,
        n: int,
        threads: int,
        samples: dict[str, list[float]],
        scale: float,
        unit: str,
        multiply_adds: float | None,
        moved: float | None,
        notes: list[str],
    ) -> Iterator[Row]:
        found: dict[str, Any] = medians(samples)
        for isa in self.options.isas:
            fused = "fused" if "fused" in samples else f"fused {isa}"
            keys = {"eager": "eager", "compile": "compile", "fused": fused, "adam": "adam"}
            keys = {name: key for name, key in keys.items() if key in samples}
            row = Row(measure, n, threads, isa, unit, {name: scale * found[key] for name, key in keys.items()})
            row.multiply_adds, row.bytes, row.notes = multiply_adds, moved, copy.copy(notes)
            row.peak, row.bandwidth = found.get(f"peak {isa}"), found.get("copy")
            row.samples = {name: [scale * s for s in samples[key]] for name, key in keys.items()}
            row.samples.update({k: samples[k] for k in (f"peak {isa}", "copy") if k in samples})
            yield row


@functools.cache
def _library(isa: str) -> Any:
    return products.load(isa)


def default_isas(device: torch.device) -> tuple[str, ...]:
    """The instruction set in use and, where the processor has it, AVX2 (of a GPU: its architecture)."""
    if device.type == "cuda":
        return (f"sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}",)
    best = _C.isa().removesuffix("bf16")  # avx512bf16 differs from avx512 only in steps with bfloat16 products
    return tuple(dict.fromkeys([best, *(isa for isa in _C.isa_available()[:-1] if isa == "avx2")]))
