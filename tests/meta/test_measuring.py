"""The measuring layer: which tasks training, validation, selection, tuning and evaluation see, and what they log."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, comparison
from l2l_fast.evaluation.experiments import running
from l2l_fast.meta import evaluate, evaluation
from l2l_fast.meta.protocol import episode_seed
from l2l_fast.meta.rollout import finite_prefix
from l2l_fast.problems import Problem, Quadratic
from tests.meta.test_trainer import log_of, network, trainer, weights_of
from tests.test_experiments import small

Calls = list[tuple[int, str]]


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """Every ``sample(seed, split)``, in order."""
    seen: Calls = []
    sample = Problem.sample

    def recording(self, seed, split="train", device=None):
        seen.append((seed, split))
        return sample(self, seed, split, device)

    monkeypatch.setattr(Problem, "sample", recording)
    return seen


def test_training_and_validation_tasks(calls):
    trainer(validate_every=2, validation_episodes=3, seed=7).fit(5, progress=False)
    validation = [(seed, "validation") for seed in range(3)]
    episodes = [(episode_seed(7, k), "train") for k in range(5)]
    assert calls == [*episodes[:2], *validation, *episodes[2:4], *validation, episodes[4]]


def test_evaluation_and_baselines(calls):
    run = trainer()
    run.evaluate(3)
    run.evaluate(seeds=[5], split="validation")
    assert calls == [(0, "test"), (1, "test"), (2, "test"), (5, "validation")]
    calls.clear()
    evaluate(network(), Quadratic(dim=3, batch=2), [4, 9], 2)
    baselines.run(Quadratic(dim=3, batch=2), "sgd", 0.1, [4, 9], 2)
    baselines.run(Quadratic(dim=3, batch=2), "sgd", 0.1, [4], 2, split="train")
    assert calls == [(4, "test"), (9, "test")] * 2 + [(4, "train")]
    calls.clear()
    baselines.search(Quadratic(dim=3, batch=2), "sgd", 4, seeds=[2, 3, 5], sweep_tasks=1)
    assert set(calls) == {(2, "validation"), (3, "validation"), (5, "validation")}
    calls.clear()
    baselines.compare(Quadratic(dim=3, batch=2), 4, [8, 9], names=["sgd"], tuning_seeds=[6], split="train")
    assert set(calls[:-2]) == {(6, "validation")} and calls[-2:] == [(8, "train"), (9, "train")]


def test_tasks_are_shown_at_their_end(monkeypatch):
    """As by ``baselines.run``: at the last theta, and not where a loss was infinite."""
    problem, ends = Quadratic(dim=3, batch=4), []

    def keep(task):
        ends.append((task.origin, task.losses_by_problem(), task().item()))

    losses = evaluate(network(), problem, [6, 2], 5, on_end=keep)
    assert "task 6 of" in ends[0][0] and "task 2 of" in ends[1][0] and len(ends) == 2
    for (_, by_problem, value), curve in zip(ends, losses.tolist()):
        assert by_problem.shape == (4,) and value == pytest.approx(4 * curve[-1])
        assert by_problem.sum().item() == pytest.approx(value) and by_problem.std() > 0
    ends.clear()
    wild = network()
    with torch.no_grad():
        wild.bias_out.fill_(1e30)
    assert evaluate(wild, problem, [6, 2], 5, on_end=keep)[:, -1].isinf().all() and not ends


def test_a_comparison_sees_the_same_test_tasks_for_all(calls):
    comparison.compare(network(), Quadratic(dim=3, batch=2), 4, 3, tuning_episodes=2, names=["sgd", "adam"])
    tests = [call for call in calls if call[1] == "test"]
    assert tests == [*[(seed, "test") for seed in range(3)] * 3, (0, "test")]  # the last counts the problems
    assert {call for call in calls if call[1] != "test"} == {(0, "validation"), (1, "validation")}


def test_selection_uses_tasks_that_no_trainer_validated_on(calls, tmp_path):
    experiment = small(tmp_path)
    running.train(experiment, tmp_path / "out", progress=False)
    validation = {seed for seed, split in calls if split == "validation"}
    used = {seed for seed in validation if seed < 10_000}
    assert used == set(range(experiment.training["validation_episodes"]))
    assert validation - used == set(running._SELECTION_SEEDS) and len(running._SELECTION_SEEDS) >= 20
    assert {split for _, split in calls} == {"train", "validation"}


@pytest.mark.parametrize("autograd", [False, True])
def test_the_log_says_what_happened(autograd, tmp_path):
    options = {"problem": Quadratic(dim=3, batch=4), "horizon": 5, "unroll": 2, "autograd": autograd, "lr": 1e-2}
    run = trainer(log=tmp_path / "log", validate_every=2, **options).fit(4, progress=False)
    records = log_of(tmp_path / "log")
    assert records[0].pop("torch") == torch.__version__ and records[0].pop("event") == "settings"
    assert records[0] == run.settings()
    for record in records[1:]:
        # The network does not stand still within an episode: followed by hand, episode by episode.
        before = trainer(**options, validate_every=0)
        count = record["episode"]
        if record["event"] == "validation":
            net = before.fit(count, progress=False).net
            losses = evaluate(net, options["problem"], range(2), 5, split="validation")
            assert record["loss_final"] == pytest.approx(losses[:, 5].mean().item(), rel=1e-6)
            assert record["loss_mean"] == pytest.approx(losses[:, 1:].mean().item(), rel=1e-6)
        else:
            if count > 1:
                before.fit(count - 1, progress=False)
            curve = _episode_by_hand(before, count)
            assert record["loss_first"] == pytest.approx(curve[0], rel=1e-5)
            assert record["loss_final"] == pytest.approx(curve[5], rel=1e-5)
            assert record["loss_mean"] == pytest.approx(sum(curve[1:]) / 5, rel=1e-5)
            assert len(record["grad_norms"]) == 3 and record["skipped_updates"] == 0
            assert record["lr"] == 1e-2


def _episode_by_hand(run: l2l.MetaTrainer, count: int) -> list[float]:
    """f / num_problems along the episode, phi updated after every segment as the trainer does."""
    task = run.problem.sample(episode_seed(run.seed, count - 1), "train")
    optimizer = l2l.LearnedOptimizer(task.parameters(), run.net)
    curve = []

    def value() -> None:
        optimizer.zero_grad()
        loss = task()
        loss.backward()
        curve.append(loss.item() / task.num_problems)

    value()
    for start, end in run.protocol.segments():
        optimizer.start_segment()
        for _ in range(start, end):
            optimizer.step()
            value()
        optimizer.backward_segment([1 / task.num_problems] * (end - start))
        run._meta_step()
    return curve


def test_validation_is_of_the_network_as_it_is_and_of_the_whole_horizon(monkeypatch):
    seen = []
    original = evaluation.evaluate

    def recording(net, problem, seeds, horizon, **options):
        seen.append((weights_of(net), list(seeds), horizon, options["split"]))
        return original(net, problem, seeds, horizon, **options)

    monkeypatch.setattr("l2l_fast.meta.trainer.evaluate", recording)
    run = trainer(validate_every=3, validation_episodes=4).fit(3, progress=False)
    assert len(seen) == 1 and seen[0][1:] == ([0, 1, 2, 3], 10, "validation")
    assert torch.equal(seen[0][0], weights_of(run.net))


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 2)])
def test_the_heads_of_a_memory_start_ten_times_smaller(heads):
    net = l2l.NTMBFGS(read_heads=heads[0], write_heads=heads[1])
    plain = l2l.CoordinatewiseLSTM(gac_cells=2, extra_inputs=heads[0], num_outputs=1 + heads[0] + 2 * heads[1])
    for each in (net, plain):
        each.reset_parameters(torch.Generator().manual_seed(3))
    for (name, value), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        if name == "weight_out":
            assert torch.equal(value[0], other[0])
            torch.testing.assert_close(value[1:], 0.1 * other[1:])
            assert value[1:].abs().max() > 0
        else:
            assert torch.equal(value, other), name


def test_the_pretrained_optimizers_were_selected_on_other_tasks_than_they_validate_on():
    for name, facts in l2l.list_pretrained().items():
        episodes = (facts["record"] or {}).get("validation", {}).get("episodes", 0)
        assert episodes <= min(running._SELECTION_SEEDS), name
        json.dumps(facts)


def test_the_meta_learning_rate_of_every_episode(tmp_path):
    trainer(lr=0.02, decay_episodes=4, decay_to=0.1, log=tmp_path / "log").fit(6, progress=False)
    logged = [record["lr"] for record in log_of(tmp_path / "log") if record["event"] == "episode"]
    cosine = [math.cos(math.pi * min(k, 4) / 4) for k in range(6)]  # the first episode has the whole rate
    assert logged == pytest.approx([0.02 * (0.1 + 0.45 * (1 + c)) for c in cosine], rel=1e-12)


def test_of_equal_validations_the_first_is_the_best(monkeypatch):
    module = importlib.import_module("l2l_fast.meta.trainer")
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: torch.full((2, 5), 0.5, dtype=torch.float64))
    run = trainer(validate_every=1, patience=2).fit(6, progress=False)
    assert run.counters.best_episode == 1 and run.counters.stopped and run.episode == 3


def test_after_a_loss_that_is_not_finite_all_count_as_infinite():
    for bad in (math.inf, -math.inf, math.nan):
        losses = [torch.tensor(value) for value in (4.0, 2.0, bad, 1.0)]
        assert finite_prefix(losses, 2) == [2.0, 1.0, math.inf, math.inf]
    # In float64: a sum over many problems is not rounded again before it is divided.
    assert finite_prefix([torch.tensor(1.0), torch.tensor(1.0)], 3) == [1 / 3, 1 / 3]


def test_what_a_record_says_of_a_run_that_is_under_way(tmp_path):
    run = trainer(validate_every=2)

    def interrupted():
        raise KeyboardInterrupt

    run.fit(3, progress=False)
    run._meta_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.fit(9, progress=False, checkpoint=tmp_path / "c")
    assert run.counters.planned == 9
    for net in (run.best_net(), l2l.meta.load_best(tmp_path / "c")):
        record = l2l.meta.record_of(net)
        assert (record["episodes"], record["best_episode"]) == (3, 2)
        losses = evaluate(net, run.problem, range(2), 10, split="validation")
        assert record["validation_loss"] == pytest.approx(losses[:, -1].mean().item(), rel=1e-12)


@pytest.mark.parametrize("autograd", [False, True])
def test_the_gradient_that_adam_gets_is_cut_to_the_norm(autograd):
    norms = {}
    for limit in (None, 1e-3):
        run = trainer(clip_norm=limit, autograd=autograd, lr=1e-6)
        seen, step = [], run._adam.step

        def recording(run=run, seen=seen, step=step):
            grads = [parameter.grad.reshape(-1) for parameter in run.net.parameters()]
            seen.append((torch.cat(grads).norm().item(), torch.cat(grads)))
            step()

        run._adam.step = recording
        run.fit(1, progress=False)
        norms[limit] = seen
    assert all(norm > 1e-2 for norm, _ in norms[None])
    assert [norm for norm, _ in norms[1e-3]] == pytest.approx([1e-3] * len(norms[None]), rel=1e-2)
    torch.testing.assert_close(norms[1e-3][0][1] / 1e-3, norms[None][0][1] / norms[None][0][0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_validation_that_is_not_finite_is_never_the_best(bad, monkeypatch, tmp_path):
    module = importlib.import_module("l2l_fast.meta.trainer")
    finals = iter([bad, 0.5, bad, 0.4])
    monkeypatch.setattr(
        module, "evaluate", lambda *args, **kwargs: torch.full((2, 5), next(finals), dtype=torch.float64)
    )
    run = trainer(validate_every=1, log=tmp_path / "log").fit(1, progress=False)
    assert run.counters.best_loss is None and run.counters.best_episode is None and run._best is None
    run.fit(3, progress=False)
    assert (run.counters.best_loss, run.counters.best_episode) == (0.5, 2)
    run.fit(4, progress=False)
    assert (run.counters.best_loss, run.counters.best_episode) == (0.4, 4)
    validations = [record for record in log_of(tmp_path / "log") if record["event"] == "validation"]
    assert [record["best"] for record in validations] == [False, True, False, True]
