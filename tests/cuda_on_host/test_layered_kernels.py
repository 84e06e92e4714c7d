"""The layered kernels of csrc/cuda on the CPU (averaging cells, extra inputs, several outputs), against the float64
reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l2l_fast import State
from l2l_fast.kernels import reference
from l2l_fast.kernels.config import Config

from .kernels import AUTOMATIC, BFLOAT16, FLOAT16, FLOAT32, SHORT_FLAGS, SOURCE, Tensor
from .library import DeviceError, Library

TILE = 64
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def library() -> Library:
    built = Library.build([SOURCE], flags=SHORT_FLAGS)
    built.set_device("sm_90,multiprocessors=2")
    return built


def relative(got: np.ndarray, expected: torch.Tensor) -> float:
    """The error of what is finite; infinite if that is not the same in both."""
    want = expected.detach().double().numpy().reshape(got.shape)
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite):
        return float("inf")
    return float(np.linalg.norm((got - want)[finite]) / max(np.linalg.norm(want[finite]), 1e-30))


class Case:
    """Some tensors of an optimizee, on the device and for the reference."""

    def __init__(
        self,
        library: Library,
        config: Config,
        numels: list[int],
        groups: int,
        dtypes: tuple[int, int],
        bad: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """bad: tensor and coordinate of gradients that are NaN."""
        rng = np.random.default_rng(0)
        self.library, self.config, self.numels, self.groups = library, config, numels, groups
        self.total = sum(numels)
        size = reference.phi_size(config)
        self.phi = (rng.standard_normal(size) * 0.3).astype(np.float32)
        self.param_values = [rng.standard_normal(n).astype(np.float32) for n in numels]
        grads = [(rng.standard_normal(n) * np.exp(rng.uniform(-14, 3, n))).astype(np.float32) for n in numels]
        for k, i in bad:
            grads[k][i] = np.nan
        self.params = [Tensor(library, x, dtypes[0]) for x in self.param_values]
        self.grads = [Tensor(library, x, dtypes[1]) for x in grads]
        self.extra = rng.standard_normal((config.extra_inputs, self.total)).astype(np.float32)
        hidden = config.hidden_size
        # Averages of earlier steps: the same for all coordinates of a group.
        self.logical = []
        for _ in range(config.num_layers):
            h = rng.standard_normal((self.total, hidden)) * 0.5
            h[:, : config.gac_cells] = np.repeat(
                rng.standard_normal((groups, config.gac_cells)), self.total // groups, axis=0
            )
            self.logical.append((torch.from_numpy(h), torch.from_numpy(rng.standard_normal((self.total, hidden)))))
        parts = reference.separate_states(self.logical, numels, groups)
        data = [State.from_logical([(h.float(), c.float()) for h, c in part]).data.numpy() for part in parts]
        self.states = [library.array(x) for x in data]
        self.records = [library.array(np.full(-(-n // TILE) * TILE, np.nan, np.float32)) for n in numels]
        self.means = np.full((config.num_layers, groups, config.gac_cells), np.nan, np.float32)
        self.out = library.array(np.full((config.num_outputs, self.total), np.nan, np.float32))

    def run(self, first: int, last: int, *, lr: float = 0.5, decay: float = 0.9, in_place: bool = True) -> np.ndarray:
        """Phases first ... last - 1; returns the sums."""
        c = self.config
        stream: list[int] = []
        for k, n in enumerate(self.numels):
            stream += [self.params[k].array.pointer, self.params[k].dtype, self.grads[k].array.pointer]
            stream += [self.grads[k].dtype, self.states[k].pointer, self.states[k].pointer, self.records[k].pointer]
            stream += [1, n, 1, 1]
        means = self.library.array(self.means)
        sums = self.library.array(np.full((2, self.groups, c.gac_cells), np.nan, np.float64))
        self.library.call(
            "step",
            sizes_of(c, self.groups),
            np.array([c.p, c.output_scale, lr, decay], np.float32),
            self.library.array(self.phi),
            np.array([False, in_place, AUTOMATIC, first, last, False], np.int64),
            len(self.numels),
            np.array(stream, np.int64),
            self.library.array(self.extra) if c.extra_inputs else None,
            self.out,
            means,
            sums,
        )
        self.means = means.numpy()
        return sums.numpy()

    def check(self, lr: float = 0.5, decay: float = 0.9, tolerance: float = TOLERANCE) -> None:
        grads = [torch.from_numpy(g.numpy().astype(np.float64)) for g in self.grads]
        extra = torch.from_numpy(self.extra).double()
        rows = [reference.join(list(row.split(self.numels)), self.groups) for row in extra]
        out, state = reference.lstm_step(
            reference.join(grads, self.groups),
            self.logical,
            torch.from_numpy(self.phi).double(),
            self.config,
            self.groups,
            torch.stack(rows) if rows else None,
        )
        out = out.view(self.config.num_outputs, -1)
        separate = [reference.separate(row, self.numels, self.groups) for row in out]
        assert relative(self.out.numpy(), torch.stack([torch.cat(row) for row in separate])) < tolerance
        hidden, layers = self.config.hidden_size, self.config.num_layers
        for k, (n, part) in enumerate(zip(self.numels, reference.separate_states(state, self.numels, self.groups))):
            got = State(torch.from_numpy(self.states[k].numpy()), n, hidden, layers).to_logical()
            for pair, expected in zip(got, part):
                for a, b in zip(pair, expected):
                    assert relative(a.numpy(), b) < tolerance
            rounded = [1e-6, 8e-3, 1e-3][self.params[k].dtype]
            start = torch.from_numpy(self.param_values[k]).double()
            assert relative(self.params[k].numpy(), decay * start + lr * separate[0][k]) < tolerance + rounded
            assert np.array_equal(self.records[k].numpy()[:n], self.grads[k].numpy(), equal_nan=True)
            assert not self.records[k].numpy()[n:].any()


CONFIGS = [
    Config(20, 2, "log_sign", 10.0, 0.1, 2, 0, 1),
    Config(20, 2, "log_sign", 10.0, 0.1, 2, 1, 8),
    Config(8, 1, "identity", 10.0, 1.0, 8, 3, 2),
    Config(8, 2, "identity", 10.0, 1.0, 0, 2, 3),
    Config(4, 2, "log_sign", 10.0, 0.1, 3, 1, 2),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("numels", "groups"), [([1], 1), ([63, 0, 65, 300], 1), ([10, 40, 130], 5), ([128 * 10], 128)])
def test_step(library: Library, config: Config, numels: list[int], groups: int) -> None:
    case = Case(library, config, numels, groups, (FLOAT32, FLOAT32))
    case.run(0, config.num_layers + 1)
    case.check()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("numels", "groups"), [([63, 65, 300], 1), ([10, 40, 130], 5)])
def test_bad_coordinates_stay_alone(library: Library, config: Config, numels: list[int], groups: int) -> None:
    """In two steps, the second without a bad gradient, whole and cut into phases; no average knows of them."""
    bad = ((0, 0), (2, 3), (2, numels[2] - 1))
    whole, cut = (Case(library, config, numels, groups, (FLOAT32, FLOAT32), bad) for _ in range(2))
    for _ in range(2):
        sums = whole.run(0, config.num_layers + 1)
        for phase in range(config.num_layers + 1):
            parts = cut.run(phase, phase + 1)
            if phase < config.num_layers:
                cut.means[phase] = parts[0] / np.maximum(parts[1], 1)
        assert np.isfinite(whole.means).all() and np.isfinite(sums).all()
        assert np.array_equal(cut.means, whole.means)
        assert np.array_equal(cut.out.numpy(), whole.out.numpy(), equal_nan=True)
        assert sums[1].sum() == (whole.total - len(bad)) * config.gac_cells
    whole = Case(library, config, numels, groups, (FLOAT32, FLOAT32), bad)
    whole.run(0, config.num_layers + 1)
    whole.check()


def test_a_group_of_bad_coordinates(library: Library) -> None:
    bad = tuple((k, i) for k, n in enumerate([10, 40]) for i in range(n // 5))
    for groups, numels in ((1, [2, 8]), (5, [10, 40])):
        case = Case(library, CONFIGS[0], numels, groups, (FLOAT32, FLOAT32), bad)
        case.run(0, 3)
        assert np.isfinite(case.means).all()
        case.check()


@pytest.mark.parametrize("dtypes", [(BFLOAT16, FLOAT32), (FLOAT16, BFLOAT16), (FLOAT32, FLOAT16)])
def test_dtypes(library: Library, dtypes: tuple[int, int]) -> None:
    case = Case(library, CONFIGS[1], [70, 9], 1, dtypes)
    case.run(0, 3)
    case.check()


@pytest.mark.parametrize("groups", [1, 5])
def test_cut_into_phases(library: Library, groups: int) -> None:
    """As a sharded optimizer does it: the caller turns sums into averages between layers."""
    config = CONFIGS[1]
    whole, cut = (Case(library, config, [95, 200], groups, (FLOAT32, FLOAT32)) for _ in range(2))
    whole.run(0, 3)
    for phase in range(3):
        sums = cut.run(phase, phase + 1)
        if phase < config.num_layers:
            cut.means[phase] = sums[0] / sums[1]
    cut.check()
    assert np.array_equal(cut.out.numpy(), whole.out.numpy())
    assert np.array_equal(cut.means, whole.means)


def test_one_launch_for_many_tensors(library: Library) -> None:
    case = Case(library, CONFIGS[0], [1 + k % 70 for k in range(300)], 1, (FLOAT32, FLOAT32))
    before = library.cdll.cuda_on_host_counter(b"launches")
    case.run(0, 3)
    # A table of 300 tensors travels in more than one launch's arguments; the step itself is one.
    uploads = -(-300 * 104 // 32000) if 300 * 104 > 32504 else 0
    assert library.cdll.cuda_on_host_counter(b"launches") - before == 1 + uploads
    case.check()


def test_the_same_in_any_order_of_threads(library: Library) -> None:
    results = []
    for seed in (0, -1, 3, 4):
        with library.seed(seed):
            case = Case(library, CONFIGS[1], [63, 150], 1, (FLOAT32, FLOAT32))
            case.run(0, 3)
            case.check()
            results.append((case.out.numpy(), case.means))
    for out, means in results[1:]:
        assert np.array_equal(out, results[0][0]) and np.array_equal(means, results[0][1])


def run_step_backward(library: Library, config: Config, numel: int, groups: int, bad: tuple[int, ...] = ()) -> None:
    """The functional step's gradients against autograd through the reference. bad: coordinates whose gradient is NaN;
    d phi contains them."""
    rng = np.random.default_rng(1)
    phi = (rng.standard_normal(reference.phi_size(config)) * 0.3).astype(np.float32)
    grad = (rng.standard_normal(numel) * np.exp(rng.uniform(-12, 2, numel))).astype(np.float32)
    grad[list(bad)] = np.nan
    extra = rng.standard_normal((config.extra_inputs, numel)).astype(np.float32)
    upstream = rng.standard_normal((config.num_outputs, numel)).astype(np.float32)
    shape = (config.num_layers, 2, numel, config.hidden_size)
    logical, end = (torch.from_numpy(rng.standard_normal(shape)).float() for _ in range(2))

    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (grad, extra, phi)]
    state = logical.double().requires_grad_()
    pairs = [(part[0], part[1]) for part in state]
    out, new = reference.lstm_step(leaves[0], pairs, leaves[2], config, groups, leaves[1] if extra.size else None)
    loss = (out.view(upstream.shape) * torch.from_numpy(upstream)).sum()
    loss = loss + sum((a * b).sum() for pair, ends in zip(new, end) for a, b in zip(pair, ends))
    expected = torch.autograd.grad(loss, [*leaves, state], allow_unused=True)

    def tiled(x: torch.Tensor) -> np.ndarray:
        data = State.from_logical([(part[0], part[1]) for part in x]).data.clone()
        if numel % TILE:
            data[-1, :, numel % TILE :] = torch.nan  # what is in the padding must not matter
        return data.numpy()

    held = [library.array(x) for x in (grad, extra, upstream, tiled(logical), tiled(end))]
    shapes = [grad.shape, extra.shape, held[3].numpy().shape]
    results = [library.array(np.full(shape, np.nan, np.float32)) for shape in shapes]
    grad_phi = library.array(np.full(phi.shape, np.nan, np.float32))
    stream = [held[0].pointer, FLOAT32, results[0].pointer, FLOAT32, *(x.pointer for x in held[1:])]
    stream += [*(x.pointer for x in results[1:]), 1, numel, 1]
    library.call(
        "step_backward",
        sizes_of(config, groups),
        np.array([config.p, config.output_scale], np.float32),
        library.array(phi),
        np.array(stream, np.int64),
        grad_phi,
    )
    grad_state = State(torch.from_numpy(results[2].numpy()), numel, config.hidden_size, config.num_layers).to_logical()
    good = np.delete(np.arange(numel), bad)
    assert relative(results[0].numpy()[good], expected[0][good]) < TOLERANCE
    assert not extra.size or relative(results[1].numpy(), expected[1]) < TOLERANCE
    assert bad or relative(grad_phi.numpy(), expected[2]) < TOLERANCE
    assert relative(torch.stack([torch.stack(pair) for pair in grad_state]).numpy(), expected[3]) < TOLERANCE


def sizes_of(config: Config, groups: int) -> np.ndarray:
    log_sign = config.preprocess == "log_sign"
    numbers = [config.hidden_size, config.num_layers, log_sign, config.gac_cells, config.extra_inputs]
    return np.array([*numbers, config.num_outputs, groups], np.int64)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("numel", "groups"), [(1, 1), (200, 1), (130, 5), (400, 40)])
def test_step_backward(library: Library, config: Config, numel: int, groups: int) -> None:
    run_step_backward(library, config, numel, groups)


@pytest.mark.parametrize("config", CONFIGS[:3])
@pytest.mark.parametrize(("numel", "groups"), [(70, 1), (130, 5)])
def test_step_backward_with_bad_coordinates(library: Library, config: Config, numel: int, groups: int) -> None:
    run_step_backward(library, config, numel, groups, (0, 5, numel - 1))


def run_segment_backward(
    library: Library,
    config: Config,
    numels: list[int],
    groups: int,
    steps: int,
    bad: int | None = None,
    alike: bool = False,
    tolerance: float = 1e-4,
) -> np.ndarray:
    """d phi and the gradients of the start states of a segment, against the reference. bad: a coordinate whose
    gradients are NaN; d phi contains it. alike: all coordinates are, so that rounding errors do not cancel."""
    rng = np.random.default_rng(2)
    hidden, layers = config.hidden_size, config.num_layers
    phi = (rng.standard_normal(reference.phi_size(config)) * 0.3).astype(np.float32)
    grads = [[rng.standard_normal(n) * np.exp(rng.uniform(-9, 2, n)) for n in numels] for _ in range(steps + 1)]

    def random_states() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        parts = [torch.from_numpy(rng.standard_normal((layers, 2, n, hidden)) * 0.3) for n in numels]
        return [[(pair[0], pair[1]) for pair in part] for part in parts]

    logical, ends = random_states(), random_states()
    if alike:
        grads = [[np.full(n, 0.1 + 0.3 * t) for n in numels] for t in range(steps + 1)]
        logical = ends = [[(torch.zeros_like(h), torch.zeros_like(c)) for h, c in x] for x in logical]
    weights, lrs, decays = rng.uniform(0, 2, steps), rng.uniform(0.5, 1, steps), rng.uniform(0.9, 1, steps)
    grads = [[torch.from_numpy(g.astype(np.float32)).double() for g in row] for row in grads]
    for row in grads:
        if bad is not None:
            row[0][bad] = torch.nan
    expected, expected_starts = reference.segment_backward(
        logical, grads, weights, lrs, decays, torch.from_numpy(phi).double(), config, ends, groups
    )

    # The averages, as the step would have written them.
    averages, state = [], reference.join_states(logical, groups)
    for row in grads[:-1]:
        _, state = reference.lstm_step(
            reference.join(row, groups), state, torch.from_numpy(phi).double(), config, groups
        )
        # That of the finite coordinates, any of which has it.
        cells = [h.view(groups, -1, hidden)[:, :, : config.gac_cells].nanmean(dim=1) for h, _ in state]
        averages.append(library.array(torch.stack(cells).float().numpy()))

    tiles = [-(-n // TILE) for n in numels]
    places = np.cumsum([0, *tiles])
    records = []
    for row in grads:
        record = np.full(places[-1] * TILE, np.nan, np.float32)  # what is in the padding must not matter
        for place, g in zip(places, row):
            record[place * TILE : place * TILE + len(g)] = g.numpy()
        records.append(library.array(record))

    def on_device(states: list) -> list:
        data = [State.from_logical([(h.float(), c.float()) for h, c in x]).data.numpy() for x in states]
        for n, x in zip(numels, data):
            if n % TILE:
                x[-1, :, n % TILE :] = np.nan
        return [library.array(x) for x in data]

    starts, ends_held = on_device(logical), on_device(ends)
    results = [library.array(np.full(x.numpy().shape, np.nan, np.float32)) for x in starts]
    stream = [[n, places[k], starts[k].pointer, ends_held[k].pointer, results[k].pointer] for k, n in enumerate(numels)]
    coefficients = np.zeros((steps + 1, 3), np.float32)
    coefficients[1:, 0], coefficients[:steps, 1], coefficients[:steps, 2] = weights, lrs, decays
    grad_phi = library.array(np.full(phi.shape, np.nan, np.float32))
    library.call(
        "segment_backward",
        sizes_of(config, groups),
        np.array([config.p, config.output_scale], np.float32),
        library.array(phi),
        len(numels),
        np.array(stream, np.int64),
        steps,
        np.array([record.pointer for record in records], np.int64),
        np.array([mean.pointer for mean in averages], np.int64),
        coefficients,
        grad_phi,
        0,
    )
    assert bad is not None or relative(grad_phi.numpy(), expected) < tolerance
    for n, result, logical_start in zip(numels, results, expected_starts):
        got = State(torch.from_numpy(result.numpy()), n, hidden, layers).to_logical()
        for pair, want in zip(got, logical_start):
            for a, b in zip(pair, want):
                assert relative(a.numpy(), b) < 1e-4
        assert n % TILE == 0 or not result.numpy()[-1, :, n % TILE :].any()
    return grad_phi.numpy()


SEGMENT_CONFIGS = [
    Config(20, 2, "log_sign", 10.0, 0.1, 2, 0, 1),
    Config(8, 1, "identity", 10.0, 1.0, 8, 0, 1),
    Config(4, 2, "log_sign", 10.0, 0.1, 3, 0, 1),
]


@pytest.mark.parametrize("config", SEGMENT_CONFIGS)
@pytest.mark.parametrize(
    ("numels", "groups", "steps"), [([1], 1, 1), ([63, 65, 200], 1, 5), ([10, 40, 130], 5, 3), ([30 * 10], 30, 7)]
)
def test_segment_backward(library: Library, config: Config, numels: list[int], groups: int, steps: int) -> None:
    run_segment_backward(library, config, numels, groups, steps)


@pytest.mark.parametrize("config", SEGMENT_CONFIGS)
@pytest.mark.parametrize(("numels", "groups", "steps"), [([63, 70], 1, 5), ([10, 130], 5, 3)])
def test_segment_backward_with_a_bad_coordinate(
    library: Library, config: Config, numels: list[int], groups: int, steps: int
) -> None:
    run_segment_backward(library, config, numels, groups, steps, bad=4)


def test_segment_backward_is_one_launch_and_repeats(library: Library) -> None:
    results = []
    for seed in (0, 3):
        with library.seed(seed):
            before = library.cdll.cuda_on_host_counter(b"launches")
            results.append(run_segment_backward(library, SEGMENT_CONFIGS[0], [63, 200], 1, 4))
            assert library.cdll.cuda_on_host_counter(b"launches") - before == 1
    assert np.array_equal(*results)


def test_averages_over_many_tiles_are_those_of_one_coordinate(library: Library) -> None:
    """A thread visits hundreds of tiles of coordinates that are alike, whose average is what each of them is."""
    means = []
    for numel in (1, 512_000):
        case = Case(library, CONFIGS[0], [numel], 1, (FLOAT32, FLOAT32))
        case.grads = [Tensor(library, np.full(numel, 0.3, np.float32), FLOAT32)]
        case.states = [library.array(np.zeros_like(case.states[0].numpy()))]
        case.run(0, CONFIGS[0].num_layers + 1)
        means.append(case.means)
    np.testing.assert_allclose(means[1], means[0], rtol=2e-6)


def test_sums_over_many_tiles_of_a_block_are_float64(library: Library) -> None:
    """A block visits 1,000 tiles of coordinates that are alike: in float32, each addition would err the same way."""
    run_segment_backward(library, SEGMENT_CONFIGS[1], [256_000], 1, 1, alike=True, tolerance=2e-5)


def test_reads_and_writes_stay_in_bounds_and_do_not_race() -> None:
    checked = Library.build([SOURCE], sanitizer="access", flags=SHORT_FLAGS)
    checked.set_device("sm_90,multiprocessors=2")
    for seed in (0, 1):
        with checked.seed(seed):
            for config, groups in ((CONFIGS[1], 1), (CONFIGS[1], 5)):
                case = Case(checked, config, [65, 130], groups, (FLOAT32, FLOAT32))
                case.run(0, 3)
                case.check()
                run_step_backward(checked, config, 130, groups)
                run_segment_backward(checked, replace(config, extra_inputs=0, num_outputs=1), [65, 130], groups, 3)


def test_a_missing_grid_barrier_is_found(tmp_path: Path) -> None:
    """The kernel without its grid-wide barrier must not pass."""
    header = Path(__file__).parents[2] / "csrc" / "cuda" / "layered_step.cuh"
    text = header.read_text()
    barrier = "  cooperative_groups::this_grid().sync();\n  for (int k = warp;"
    assert text.count(barrier) == 1
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for file in header.parent.iterdir():
        (folder / file.name).write_text(file.read_text())
    (folder.parent / "core").mkdir()
    for file in (header.parents[1] / "core").iterdir():
        (folder.parent / "core" / file.name).write_text(file.read_text())
    weaker = barrier.replace("cooperative_groups::this_grid().sync();", "__syncthreads();")
    (folder / "layered_step.cuh").write_text(text.replace(barrier, weaker))
    source = tmp_path / "broken.cu"
    source.write_text(SOURCE.read_text().replace('"cuda/operations.cuh"', f'"{folder}/operations.cuh"'))
    broken = Library.build([source], sanitizer="access", flags=SHORT_FLAGS)
    broken.set_device("sm_90,multiprocessors=2")
    case = Case(broken, CONFIGS[0], [600, 300], 1, (FLOAT32, FLOAT32))
    with pytest.raises((DeviceError, AssertionError)):
        for seed in range(4):
            with broken.seed(seed):
                case.run(0, 3)
        case.check()
