"""Estimators that carry something from episode to episode: it is in checkpoints, and undone by an interrupt."""

from __future__ import annotations

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.meta import Protocol, evaluate
from l2l_fast.meta import checkpoint as checkpoints
from l2l_fast.meta.estimators import AutogradBPTT, FusedBPTT
from l2l_fast.problems import Quadratic
from tests.meta.test_trainer import trainer, weights_of


class Momentum(FusedBPTT):
    """Fused back-propagation whose meta-gradients gather over segments and episodes, as a predictor's would."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, torch.Tensor] = {}
        self.fail_in: int | None = None
        self.segments = 0

    def episode(self, task, net, protocol, meta_step, generator=None):
        def gathered() -> None:
            self.segments += 1
            for name, parameter in net.named_parameters():
                old = self.sums.get(name, torch.zeros_like(parameter))
                self.sums[name] = parameter.grad = 0.5 * old + parameter.grad
            if self.segments == self.fail_in:
                raise KeyboardInterrupt
            meta_step()

        return super().episode(task, net, protocol, gathered, generator)

    def state_dict(self):
        return {name: value.clone() for name, value in self.sums.items()}

    def load_state_dict(self, state):
        if any(not value.isfinite().all() for value in state.values()):
            raise ValueError("checkpoint: the estimator's sums are not finite")
        self.sums = dict(state)


def run_of():
    run = trainer()
    run.estimator = Momentum()
    return run


def test_its_state_is_in_checkpoints_and_a_resumed_run_ends_where_it_would_have_ended(tmp_path):
    whole = run_of().fit(4, progress=False)
    run_of().fit(2, progress=False).save(tmp_path / "c")
    assert set(checkpoints.read(tmp_path / "c").part("estimator")) == {name for name, _ in whole.net.named_parameters()}
    resumed = run_of().resume(tmp_path / "c").fit(4, progress=False)
    assert torch.equal(weights_of(whole.net), weights_of(resumed.net))
    assert not torch.equal(weights_of(whole.net), weights_of(trainer().fit(4, progress=False).net))


def test_an_interrupted_episode_leaves_no_trace_in_it():
    whole = run_of().fit(4, progress=False)
    run = run_of()
    run.estimator.fail_in = 2 * whole.estimator.segments // 4 + 2  # within the third episode
    with pytest.raises(KeyboardInterrupt):
        run.fit(4, progress=False)
    assert run.episode == 2
    run.fit(4, progress=False)
    assert torch.equal(weights_of(whole.net), weights_of(run.net))


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    saved = run_of().fit(1, progress=False)
    saved.estimator.sums = {name: value * torch.nan for name, value in saved.estimator.sums.items()}
    saved.save(tmp_path / "bad")
    run = run_of()
    before = weights_of(run.net)
    with pytest.raises(ValueError, match="not finite"):
        run.resume(tmp_path / "bad")
    assert torch.equal(weights_of(run.net), before) and not run._adam.state and run.episode == 0


@pytest.mark.parametrize("estimator", [FusedBPTT(), AutogradBPTT()], ids=lambda e: type(e).__name__)
def test_those_that_carry_nothing_say_so(estimator):
    assert estimator.state_dict() == {}
    estimator.load_state_dict({})
    with pytest.raises(ValueError, match="unknown tensors.*sums"):
        estimator.load_state_dict({"sums": torch.zeros(1)})


@pytest.mark.parametrize("gac_cells", [0, 2])
def test_a_network_with_several_outputs_walks_as_it_is_deployed(gac_cells):
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(8, 1, gac_cells=gac_cells, num_outputs=3)
    problem = Quadratic(dim=5, batch=4)
    steps = []
    losses = AutogradBPTT().episode(problem.sample(0, "test"), net, Protocol.make(6, 3), lambda: steps.append(1))
    assert len(steps) == 2
    deployed = evaluate(net, problem, [0], 6)[0]
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), deployed, rtol=1e-5, atol=1e-6)
