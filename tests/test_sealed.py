"""The sealed test tasks: refused to everybody, whatever the way, but inside their own release's opening."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, comparison
from l2l_fast.evaluation.experiments import measuring
from l2l_fast.evaluation.experiments import running as runs
from l2l_fast.meta import evaluate
from l2l_fast.meta.protocol import episode_seed
from l2l_fast.problems import SPLITS, ModuleProblem, Quadratic, sealed
from l2l_fast.problems.scaled import Scaled
from l2l_fast.problems.sealed import SealedError
from tests.helpers import random_network, recorded_samples
from tests.meta.test_trainer import network, trainer

PROBLEM = Quadratic(dim=2, batch=2)
SEED = sealed.seeds(1)[0]
FIRST = 1 << 64
RELEASE = sealed.RELEASES[-1]


def refused(seed: int = SEED):
    return pytest.raises(SealedError, match=f"seed {seed} is a sealed test task")


def test_ranges(monkeypatch):
    assert issubclass(SealedError, ValueError) and len(set(sealed.RELEASES)) == len(sealed.RELEASES)
    assert sealed.seeds(3) == range(FIRST + 10**6 * sealed.RELEASES.index(RELEASE), SEED + 3)
    monkeypatch.setattr(sealed, "RELEASES", ("0.2", "0.3"))
    assert sealed.seeds(3, "0.2") == range(FIRST, FIRST + 3)
    assert sealed.seeds(10**6, "0.3") == range(FIRST + 10**6, FIRST + 2 * 10**6)
    for seed, release in ((FIRST - 1, None), (FIRST, "0.2"), (FIRST + 10**6 - 1, "0.2"), (FIRST + 10**6, "0.3"),
                          (FIRST + 2 * 10**6, ""), (10**40, ""), (0, None), (-FIRST, None)):  # fmt: skip
        assert sealed.release_of(seed) == release, seed
    for count in (0, -1, 10**6 + 1):
        with pytest.raises(ValueError, match="count: expected 1..1000000 sealed tasks"):
            sealed.seeds(count, "0.2")
    for release in ("0.1", "", None):
        with pytest.raises(ValueError, match="release: expected one of"):
            sealed.seeds(1, release)
        with pytest.raises(ValueError, match="release: expected one of"), sealed.opened(release):
            pytest.fail("it was opened")


INTEGERS = [int, lambda seed: np.array(seed, dtype=object), type("Mine", (int,), {})]


@pytest.mark.parametrize("make", INTEGERS)
@pytest.mark.parametrize("split", SPLITS)
def test_no_problem_samples_them(split, make):
    seed = make(SEED)
    scaled = Scaled(PROBLEM, 1.0, (0.0, 0.0))
    mine = ModuleProblem(lambda generator: pytest.fail("a module was made"), lambda module, generator: None)
    for problem in (PROBLEM, scaled, mine):
        with refused():
            problem.sample(seed, split)
    assert PROBLEM.sample(FIRST - 1, split).num_problems == 2
    with pytest.raises(SealedError):
        PROBLEM.sample(10**40, split)


def test_integers_of_other_types_are_seen_as_what_they_are():
    class Index:
        def __index__(self):
            return SEED

    for seed in (Index(), np.array(SEED, dtype=object)):
        with refused():
            PROBLEM.sample(seed, "test")
    # Numbers that wrap around would be others: the largest that these types have is not sealed.
    for kind in (np.uint64, np.int64, np.int32):
        seed = np.iinfo(kind).max
        assert sealed.release_of(int(seed)) is None
        assert torch.equal(PROBLEM.sample(kind(seed), "test").theta, PROBLEM.sample(int(seed), "test").theta)


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_measures_on_them(split):
    net = network()
    with refused():
        evaluate(net, PROBLEM, [SEED], 2, split=split)
    with refused():
        evaluate(net, PROBLEM, [0, SEED], 2, split=split)
    with refused():
        baselines.run(PROBLEM, "sgd", 0.1, [SEED], 2, split=split)
    with refused():
        baselines.search(PROBLEM, "sgd", 2, seeds=[SEED], split=split)
    with refused():
        baselines.tune(PROBLEM, "sgd", 2, seeds=sealed.seeds(2), split=split)
    with refused():
        baselines.compare(PROBLEM, 2, [SEED], split=split)
    with refused():
        baselines.compare(PROBLEM, 2, [0], tuning_seeds=[SEED], split=split)
    with refused():
        trainer().evaluate(seeds=[SEED], split=split)


def test_what_needs_only_the_last_of_them_is_refused_before_anything_is_computed(monkeypatch):
    calls = recorded_samples(monkeypatch)
    with refused():
        baselines.search(PROBLEM, "sgd", 2, seeds=[*range(10), SEED])
    with refused():
        baselines.compare(PROBLEM, 2, [0], tuning_seeds=[*range(10), SEED])
    with refused():
        baselines.compare(PROBLEM, 2, [0, SEED])
    assert not calls


def test_nothing_is_chosen_on_them_even_where_they_are_open(tmp_path):
    with sealed.opened(RELEASE):
        with pytest.raises(SealedError, match="nothing may be chosen on it"):
            baselines.search(PROBLEM, "sgd", 2, seeds=[SEED], cache=tmp_path / "x")
        with pytest.raises(SealedError, match="nothing may be chosen on it"):
            baselines.compare(PROBLEM, 2, [0], tuning_seeds=[SEED], names=["sgd"])
    assert not list(tmp_path.iterdir())


def test_training_and_choosing_never_come_near():
    drawn = [episode_seed(seed, episode) for seed in (0, 1, -1, 2**62) for episode in range(500)]
    assert 0 <= min(drawn) and max(drawn) < FIRST
    assert {sealed.release_of(seed) for seed in drawn} == {None}
    # 8 bytes of a hash, halved: below 2^63 whatever they are.
    assert {sealed.release_of(seed) for seed in (*runs._SELECTION_SEEDS, measuring.TRAIN_SEEDS + 10**9)} == {None}


def test_they_are_other_tasks_than_all_that_were_ever_looked_at():
    with sealed.opened(RELEASE):
        mine = [PROBLEM.sample(seed, split).W for seed in sealed.seeds(20) for split in SPLITS]
    seen = [PROBLEM.sample(seed, split).W for seed in range(20) for split in SPLITS]
    assert len({tuple(W.flatten().tolist()) for W in mine + seen}) == 120


def test_inside_they_are_tasks_like_any_others():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    with sealed.opened(RELEASE):
        for split in SPLITS:
            assert "theta" in dict(PROBLEM.sample(SEED, split).named_parameters())
        one = evaluate(net, PROBLEM, sealed.seeds(2), 3)
        assert torch.equal(one, evaluate(net, PROBLEM, sealed.seeds(2), 3)) and not torch.equal(one[0], one[1])
        first = baselines.run(PROBLEM, "sgd", 0.1, sealed.seeds(2), 3)[:, 0]
        assert torch.equal(first, one[:, 0])
        with pytest.raises(SealedError):
            PROBLEM.sample(10**40)  # of a release to come
    with refused():
        PROBLEM.sample(SEED)


def test_only_the_release_that_was_opened(monkeypatch):
    monkeypatch.setattr(sealed, "RELEASES", ("0.2", "0.3"))
    old, new = sealed.seeds(1, "0.2")[0], sealed.seeds(1, "0.3")[0]
    for release, inside, outside in (("0.2", old, new), ("0.3", new, old)):
        with sealed.opened(release):
            PROBLEM.sample(inside)
            with refused(outside):
                PROBLEM.sample(outside)
    with sealed.opened("0.2"):
        with sealed.opened("0.3"):
            PROBLEM.sample(new)
            with refused(old):
                PROBLEM.sample(old)
        PROBLEM.sample(old)
        with refused(new):
            PROBLEM.sample(new)


def test_it_closes_after_an_exception():
    with pytest.raises(KeyError), sealed.opened(RELEASE):
        raise KeyError
    with refused():
        PROBLEM.sample(SEED)
    with pytest.raises(KeyboardInterrupt), sealed.opened(RELEASE):
        raise KeyboardInterrupt
    with refused():
        PROBLEM.sample(SEED)


def test_other_threads_do_not_see_it():
    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()  # a thread that was there before
    found = []

    def attempt() -> None:
        try:
            PROBLEM.sample(SEED)
            found.append("sampled")
        except SealedError:
            found.append("refused")

    with sealed.opened(RELEASE):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        pool.submit(attempt).result()
        attempt()
    attempt()
    pool.shutdown()
    assert found == ["refused", "refused", "sampled", "refused"]


def test_the_message_says_what_to_do():
    with pytest.raises(SealedError) as caught:
        PROBLEM.sample(SEED, "validation")
    for part in (f"of release {RELEASE}", "python -m l2l_fast evidence", "'validation' to choose, 'test' to look"):
        assert part in str(caught.value)
    with pytest.raises(TypeError, match="seed must be an integer"):
        PROBLEM.sample(float(SEED))


def test_comparisons_and_trainers_use_seeds_far_below(monkeypatch):
    calls = recorded_samples(monkeypatch)
    trainer(validate_every=1, validation_episodes=2).fit(2, progress=False)
    comparison.compare(network(), PROBLEM, 3, 2, names=["sgd"], tuning_episodes=2)
    assert {sealed.release_of(int(seed)) for seed, _, _ in calls} == {None} and len(calls) > 10
    assert l2l.problems.sealed is sealed
