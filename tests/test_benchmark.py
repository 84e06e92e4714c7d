"""The benchmark tool: it runs, compares equal things, and its arithmetic is right. Nothing here is timed."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from l2l_fast import _C, CoordinatewiseLSTM
from l2l_fast.evaluation import benchmark
from l2l_fast.evaluation.benchmark import cases, command, contenders, memory, products, table, timing

CPU = torch.device("cpu")
PAPER = CoordinatewiseLSTM().config


def run(capsys, tmp_path, *arguments):
    path = tmp_path / "result.json"
    status = benchmark.main([*arguments, "--json", str(path)])
    return status, capsys.readouterr().out, json.loads(path.read_text())


def test_quick_run_prints_a_table_and_writes_json(capsys, tmp_path):
    threads = torch.get_num_threads()
    measures = ["--only", "step", "segment", "backward", "episode"]
    sizes = ["--sizes", "100", "--threads", "1", "--rounds", "1"]
    status, out, result = run(capsys, tmp_path, "--quick", "--contenders", "eager", "fused", *sizes, *measures)
    assert status == 0
    assert torch.get_num_threads() == threads

    lines = [line for line in out.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert {"measure", "N", "threads", "isa", "eager", "fused", "x eager", "of peak", "of copy", "Adam"} <= set(columns)
    assert "compile" not in columns  # not asked for, so no empty column
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1

    rows = result["rows"]
    assert len(lines) == len(rows) + 2
    isas = len(cases.default_isas(CPU))
    for measure in ("step", "segment", "segment backward", "MNIST episode"):
        assert sum(row["measure"] == measure for row in rows) == isas, measure
    for row in rows:
        assert row["fused"] > 0
        if row["measure"] != "segment backward":
            assert row["times_eager"] == pytest.approx(row["eager"] / row["fused"])
        if row["measure"] == "step":
            assert row["multiply_adds_per_second"] == pytest.approx(4980 / row["fused"] * 1e9)
            assert row["fraction_of_fma_peak"] == pytest.approx(row["multiply_adds_per_second"] / row["peak"])
            assert row["adam"] > 0
        if row["measure"] == "MNIST episode":
            assert row["n"] == 15910
        assert len(row["samples"]["fused"]) == 1
    assert result["machine"]["command"].startswith("python -m l2l_fast bench --quick")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_memory_of_a_segment_stays_within_its_limit(capsys, tmp_path):
    options = ["--quick", "--only", "memory", "--contenders", "eager", "fused", "--threads", "1"]
    status, out, result = run(capsys, tmp_path, *options)
    assert status == 0
    step, segment = result["rows"]
    assert (step["measure"], segment["measure"]) == ("step memory", "segment memory")
    assert 320 <= step["fused"] < 340  # the state
    assert 320 * 2 + 4 * 6 <= segment["fused"]  # two states and T + 1 = 6 gradients cannot be missed
    # Sums and scratch of the threads do not grow with N: at most 4 MB.
    assert segment["fused"] <= cases.memory_limit(PAPER, 5) + 4e6 / segment["n"]
    assert segment["eager"] > 4 * segment["fused"]


def test_costs_of_the_papers_network():
    assert cases.step_multiply_adds(PAPER) == 4980
    # Forward again 4,960; d h and d x of both layers 3 * 80 * 20 + 20; weights as the step.
    assert cases.backward_multiply_adds(PAPER) == 4960 + 4820 + 4980
    assert cases.step_bytes(PAPER) == 320 + 320 + 12
    assert cases.memory_limit(PAPER, 20) == 4 * 21 + 2 * 320 + 16


@pytest.mark.parametrize("options", [{}, {"num_layers": 1, "hidden_size": 4, "preprocess": "identity"}])
def test_contenders_compute_the_same(options):
    assert contenders.check_agreement(CoordinatewiseLSTM(**options), n=100, steps=3) < 1e-5


def test_contenders_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(contenders.PlainLSTM, "features", lambda self, grad: torch.stack([grad, grad], -1))
    with pytest.raises(RuntimeError, match="disagree"):
        contenders.check_agreement(CoordinatewiseLSTM(), n=100, steps=3)


def test_compiled_contender_computes_the_same():
    net = contenders.make_network(CPU)
    compiled, eager = contenders.PlainStep(net, 130, compiled=True), contenders.PlainStep(net, 130)
    for _ in range(2):
        compiled()
        eager()
    torch.testing.assert_close(compiled.theta, eager.theta, rtol=1e-4, atol=1e-6)


def test_adam_and_forgetting():
    adam = contenders.build("step", "adam", contenders.make_network(CPU), 10, 1)
    adam()
    assert bool((adam.theta != 0).any())
    fused = contenders.build("segment", "fused", contenders.make_network(CPU), 10, 2)
    fused()
    fused.forget()
    assert fused.optimizer is None
    assert all(parameter.grad is None for parameter in fused.net.parameters())


def test_rounds_alternate_and_end_in_time():
    calls: list[str] = []

    def sampler(name):
        return lambda: calls.append(name) or float(len(calls))

    samples = timing.interleave({name: sampler(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert samples["a"] == [1, 6, 8, 10]
    assert timing.medians(samples)["a"] == 7
    assert len(timing.interleave({"a": sampler("a")}, rounds=9, seconds=0.0)["a"]) == 3


def test_timing_counts_units_of_work_after_a_warm_up():
    calls = []
    sample = timing.timed(lambda: calls.append(0), units=1e9, min_seconds=0.0, device=CPU)
    assert len(calls) == 1
    assert 0 < sample() < 1e-6  # seconds of a call, divided by its units
    assert len(calls) == 2


def test_instruction_set_is_put_back():
    before = _C.isa()
    assert timing.with_isa("baseline", lambda: float(_C.isa() == "baseline"))() == 1.0
    assert _C.isa() == before


def test_plain_contender_shrinks_to_the_memory_that_is_there(monkeypatch):
    arguments = command._parser().parse_args(["--sizes", "1e6"])
    bench = cases.Bench(command._options(arguments, CPU, print))
    monkeypatch.setattr(cases, "peak_extra_bytes", lambda *_: 20_000.0)
    monkeypatch.setattr(cases, "available_bytes", lambda _: 12e9)
    # 0.8 * (12 GB - 1e6 * (3 * 320 + 80) B) / 20,000 B, two digits kept.
    assert bench._fitting("segment", "eager", 10**6) == 430_000
    assert bench._fitting("segment", "fused", 10**6) == 10**6
    assert bench._fitting("segment", "eager", 10**5) == 10**5  # what the memory was measured with always fits


@pytest.mark.skipif(products.unavailable() is not None, reason=str(products.unavailable()))
def test_products_alone_build_and_run():
    isa = _C.isa()
    library = products.load(isa)
    for name in products.PRODUCTS:
        assert products.sampler(library, name, threads=2, seconds=0.001)() > 1e6


def test_table_rounds_and_leaves_out_what_is_unknown():
    rows = [
        table.Row("step", 10**6, 2, "avx512", "ns", {"eager": 1234.6, "fused": 61.73}, 4980, 652, 1e11, 2e10, ["a"]),
        table.Row("memory", 1500, 2, "", "B", {"eager": 20000.0, "fused": None}, notes=["other", "a"]),
    ]
    text = table.render(rows)
    assert "| step    |   1e6 |" in text and "| memory  | 1,500 |" in text
    assert "1235" in text and "61.7" in text and " 20 |" in text and "81 %" in text and "53 %" in text
    assert text.endswith("1. a\n2. other")
    assert rows[1].derived()["times_eager"] is None
    assert "Adam" not in text


@pytest.mark.parametrize("arguments", [["--sizes", "0"], ["--sizes", "1.5"], ["--threads", "x"], ["--only", "nothing"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert error.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_unknown_instruction_set(capsys):
    assert benchmark.main(["--isa", "sse9"]) == 2
    assert "sse9" in capsys.readouterr().err


@pytest.mark.parametrize("path, words", [("missing/x", "there is no folder"), ("{tmp}", "a folder"), ("", "the name")])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(path, words, tmp_path, capsys):
    assert benchmark.main(["--quick", "--json", path.replace("{tmp}", str(tmp_path))]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("bench: ") and "--json: " in err and words in err and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys):
    assert benchmark.main(["--device", "cuda"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_kernels_are_told_from_copies_and_ranges():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [("void l2l::step_kernel<20, 1, 3840>", cuda), ("Memcpy DtoD (Device -> Device)", cuda)]
    names += [("Memset (Device)", cuda), ("Optimizer.step#LearnedOptimizer.step", cuda), ("aten::add", cpu)]
    events = [SimpleNamespace(name=name, device_type=device) for name, device in names]
    events.append(SimpleNamespace(name="a range", device_type=cuda, is_user_annotation=True))
    assert timing.count_kernels(events) == 1


def test_available_memory_is_plausible():
    assert 1e6 < memory.available_bytes(CPU) < 1e15
