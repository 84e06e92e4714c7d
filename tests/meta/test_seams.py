"""What users' code, files and habits do to a run: losses with gradients of their own, one module for all, old files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast import baselines, meta
from l2l_fast.problems import ModuleProblem


def make(generator):
    return nn.Linear(4, 1)


def loss(module, generator):
    return (module(torch.randn(8, 4, generator=generator)) - 1).square().mean()


def trainer(problem=None, **options):
    options = {"horizon": 4, "unroll": 2, "validate_every": 0, "seed": 0, **options}
    return l2l.MetaTrainer(l2l.CoordinatewiseLSTM(4, 1), problem or ModuleProblem(make, loss), **options)


def penalty(module, generator):
    """As of networks that solve differential equations: of the gradient with respect to the input."""
    x = torch.randn(8, 4, generator=generator).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return (slope - 1).square().mean()


def test_a_loss_that_takes_gradients_of_its_own_is_validated_and_compared():
    problem = ModuleProblem(make, penalty)
    run = trainer(problem, validate_every=2, validation_episodes=2).fit(2, progress=False)
    assert run.counters.best_loss is not None
    with torch.no_grad():
        losses = meta.evaluate(run.net, problem, range(1), 4)
    assert losses.shape[-1] == 5 and not losses.requires_grad
    assert baselines.run(problem, "adam", 1e-2, range(1), 4).isfinite().all()


def test_one_module_for_all_tasks_is_refused():
    module = nn.Linear(4, 1)
    problem = ModuleProblem(lambda generator: module, loss)
    baselines.run(problem, "sgd", 0.1, range(1), 3)
    with pytest.raises(
        ValueError, match=r"make returned a module whose parameter 'weight' \(of a Linear\) it had returned"
    ):
        baselines.run(problem, "sgd", 0.1, range(1), 3)


def test_a_module_that_is_made_anew_in_place_and_frozen_parts_that_are_shared_are_welcome():
    module, frozen = nn.Linear(4, 1), nn.Linear(4, 4).requires_grad_(False)

    def anew(generator):
        module.reset_parameters()
        return module

    def anew_in_data(generator):
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator)
        return module

    def always_the_same(generator):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data.zero_()
        return module

    shared = ModuleProblem(lambda generator: nn.Sequential(frozen, nn.Linear(4, 1)), loss)
    for problem in (*(ModuleProblem(each, loss) for each in (anew, anew_in_data, always_the_same)), shared):
        runs = [baselines.run(problem, "sgd", 0.1, range(2), 3) for _ in range(2)]
        assert torch.equal(*runs)
        first, second = problem.sample(0), problem.sample(0)  # untouched in between
        assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))


def test_modules_stay_as_torch_takes_them():
    """To parameters with weak references torch.utils.swap_tensors would say no."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = ModuleProblem(make, loss).sample(0).module
        assert module.to(torch.float64).weight.dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_log_of_another_run_is_left_alone(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    trainer(log=first).fit(4, progress=False)
    before = first.read_bytes()
    trainer(log=second, seed=3).fit(2, checkpoint=tmp_path / "b.ckpt", progress=False)
    problem = ModuleProblem(make, loss)
    with pytest.raises(ValueError, match=r"a\.jsonl' is that of another run \(other seed\)"):
        l2l.MetaTrainer.from_checkpoint(tmp_path / "b.ckpt", problem, log=first)
    assert first.read_bytes() == before
    going_on = l2l.MetaTrainer.from_checkpoint(tmp_path / "b.ckpt", problem, log=second).fit(3, progress=False)
    assert going_on.episode == 3 and len(second.read_text().splitlines()) == 4


def test_the_log_of_an_earlier_release_goes_on(tmp_path):
    """It knows less; and a log of the user's own class may know more."""
    path = tmp_path / "a.jsonl"
    trainer(log=path).fit(2, checkpoint=tmp_path / "a.ckpt", progress=False)
    first, *others = path.read_text().splitlines()
    settings = json.loads(first)
    del settings["validation"]["patience"]
    path.write_text("\n".join([json.dumps({**settings, "host": "mine"}), *others, ""]))
    run = l2l.MetaTrainer.from_checkpoint(tmp_path / "a.ckpt", ModuleProblem(make, loss), log=path)
    assert run.fit(3, progress=False).episode == 3 and len(path.read_text().splitlines()) == 4


def test_a_checkpoint_that_is_there_is_not_begun_anew(tmp_path):
    (tmp_path / "empty").touch()
    trainer().fit(1, checkpoint=tmp_path / "empty", progress=False)  # as of tempfile
    path = tmp_path / "a.ckpt"
    run = trainer().fit(2, checkpoint=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.ckpt' is there already"):
        trainer(seed=5).fit(1, checkpoint=path, progress=False)
    assert path.read_bytes() == before
    run.fit(3, checkpoint=path, progress=False)
    l2l.MetaTrainer.from_checkpoint(path, ModuleProblem(make, loss)).fit(4, checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [json.dumps({"important": 1}, indent=1), "\nnotes\n", "{\n"])
def test_a_cache_does_not_take_the_place_of_other_files(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds something else than the trials of a search"):
        baselines.search(ModuleProblem(make, loss), "sgd", 4, seeds=range(1), cache=path, schedules=["constant"])
    assert path.read_text() == content


@pytest.mark.parametrize("content", ["", '{"sear'])
def test_a_cache_that_was_torn_in_its_first_line_is_begun_anew(tmp_path, content):
    path = tmp_path / "cache"
    path.write_text(content)
    baselines.search(
        ModuleProblem(make, loss), "sgd", 4, seeds=range(1), cache=path, schedules=["constant"], options={}
    )
    assert path.read_text().startswith('{"search": "sgd"')
