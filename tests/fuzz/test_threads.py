"""Threads and forks: the same bits from all of them, no deadlock, and no more threads than torch was told to use."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.state import num_tiles
from tests.fuzz.cases import FULL, blocked_state, identical, phi_of, plain_step_backward
from tests.helpers import random_network, structured_gradient

HIDDEN_SIZES = range(4, 65) if FULL else (4, 5, 6, 7, 13, 20, 33, 64)


def every_result(net: l2l.CoordinatewiseLSTM, numel: int) -> list[torch.Tensor]:
    """What every operator returns and writes for a fixed input."""
    grad, data, phi = structured_gradient((numel,)), blocked_state(net, numel, 1), phi_of(net)
    grad_data = blocked_state(net, numel, 2)
    results = [*ops.step(grad, None, data, phi, net.config)]
    results += plain_step_backward(grad, grad_data, grad, data, phi, net.config)
    params = [torch.zeros(numel // 2), torch.zeros(3, 50).t(), torch.zeros(numel)]
    grads = [grad[: numel // 2], structured_gradient((50, 3)), grad]
    states = [blocked_state(net, p.numel(), 5) for p in params]
    tiles = [0, num_tiles(numel // 2), num_tiles(numel // 2) + 3]
    record = torch.empty(64 * (tiles[2] + num_tiles(numel)))
    ops.step_(params, grads, states, phi, net.config, 0.7, 0.1, False, record=record, record_tiles=tiles)
    grad_phi, starts = ops.segment_backward(
        states, [p.numel() for p in params], tiles, [record] * 3, [], [1.0, 0.5], [1.0, 1.0], [0.9, 0.9], phi,
        net.config, need_grad_start=True,
    )  # fmt: skip
    return [*results, *params, *states, record, grad_phi, *starts]


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_the_same_bits_for_any_number_of_threads(hidden_size, isa):
    """In tiles that do not divide evenly among threads, and twice with each number."""
    net = random_network(hidden_size=hidden_size, num_layers=1 + hidden_size % 3)
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results = every_result(net, 64 * 7 + 9)
        expected = expected or results
        assert all(identical(a, b) for a, b in zip(expected, results, strict=True)), f"{threads} threads"


def test_many_tiles_fill_every_slice(isa):
    """More tiles than slices of the gradient sum, and a number that no slice length divides."""
    net = random_network(hidden_size=4, num_layers=1)
    torch.set_num_threads(1)
    expected = every_result(net, 64 * 131 + 1)
    torch.set_num_threads(3)
    assert all(identical(a, b) for a, b in zip(expected, every_result(net, 64 * 131 + 1), strict=True))


def test_python_threads_at_once(isa):
    """Each with its own network and number of coordinates, all operators, while the others run theirs."""
    cases = [(random_network(seed, hidden_size=4 + 5 * seed), 100 + 300 * seed) for seed in range(4)]
    expected = [every_result(net, numel) for net, numel in cases]
    failures: list[object] = []
    barrier = threading.Barrier(len(cases))

    def run(case: int) -> None:
        try:
            barrier.wait()
            for _ in range(5):
                results = every_result(*cases[case])
                if not all(identical(a, b) for a, b in zip(expected[case], results, strict=True)):
                    failures.append(case)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(case,)) for case in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_errors_in_several_threads_at_once():
    """An error in one call leaves the others alone."""
    net = random_network()
    expected = every_result(net, 500)
    outcomes: list[bool] = []

    def fail() -> None:
        for _ in range(50):
            try:
                ops.step(torch.zeros(5), None, torch.zeros(2, 80, 64), phi_of(net), net.config)
            except ValueError:
                continue
            outcomes.append(False)

    def succeed() -> None:
        for _ in range(5):
            outcomes.append(all(identical(a, b) for a, b in zip(expected, every_result(net, 500), strict=True)))

    threads = [threading.Thread(target=target) for target in (fail, succeed, fail, succeed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 10


# ---- in processes of their own ----


def run_script(script: str, *arguments: str) -> dict:
    """The JSON that a script prints; a crash or a deadlock fails the test."""
    preamble = """
        import json, os, sys, threading, torch
        import l2l_fast as l2l
        from tests.fuzz.cases import identical
        from tests.fuzz.test_threads import every_result
        from tests.helpers import random_network
        # So small that PyTorch's own operators need one thread; in a child they would wait for threads that are gone.
        net = random_network(hidden_size=4, num_layers=1)

        def in_child(work):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.write(writer, json.dumps(work()).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                answer = pipe.read()
            return os.waitpid(child, 0)[1] == 0 and json.loads(answer or "null")
    """
    source = textwrap.dedent(preamble) + textwrap.dedent(script)
    run = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stderr[-3000:]}"
    return json.loads(run.stdout)


def test_after_fork():
    """In a child, and in its child: whether or not the parent had used several threads, in the main thread or not."""
    result = run_script("""
        torch.set_num_threads(2)
        fresh = in_child(lambda: [bool(r.isfinite().all()) for r in every_result(net, 2000)])
        expected = every_result(net, 2000)
        check = lambda: [identical(a, b) for a, b in zip(expected, every_result(net, 2000))]
        used = in_child(check)
        grandchild = in_child(lambda: in_child(check))
        from_thread = []
        thread = threading.Thread(target=lambda: from_thread.append(in_child(check)))
        thread.start(); thread.join()
        answer = {"fresh": fresh, "used": used, "grandchild": grandchild, "from_thread": from_thread[0]}
        answer["parent"] = check()
        print(json.dumps(answer))
    """)
    for case, outcome in result.items():
        assert outcome and all(outcome), f"{case}: {outcome}"


def test_fork_while_other_threads_compute():
    result = run_script("""
        torch.set_num_threads(2)
        expected = every_result(net, 2000)
        check = lambda: [identical(a, b) for a, b in zip(expected, every_result(net, 2000))]
        stop = threading.Event()
        outcomes = []
        def busy():
            while not stop.is_set():
                outcomes.append(all(check()))
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for t in threads: t.start()
        children = [in_child(check) for _ in range(5)]
        stop.set()
        for t in threads: t.join()
        print(json.dumps({"children": [c and all(c) for c in children], "parent": outcomes}))
    """)
    assert all(result["children"]) and all(result["parent"])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_honoured(threads):
    """The kernels run in PyTorch's own pool: no thread beyond its own, and its own are used."""
    result = run_script(
        """
        torch.set_num_threads(int(sys.argv[1]))
        tasks = lambda: set(os.listdir("/proc/self/task"))

        def ticks(task):
            fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        before = tasks()
        grad, data, phi = torch.ones(64 * 60), torch.zeros(60, 8, 64), net.phi().detach()
        for _ in range(int(sys.argv[2])):
            l2l.ops.step(grad, None, data, phi, net.config)
            if len(tasks() - before) >= int(sys.argv[1]) - 1 and all(ticks(t) for t in tasks() - before):
                break
        busy = [ticks(t) for t in tasks() - before]
        print(json.dumps({"new": len(busy), "busy": sum(t > 0 for t in busy)}))
        """,
        str(threads),
        "3000",
    )
    assert result["new"] == threads - 1 and result["busy"] == threads - 1
