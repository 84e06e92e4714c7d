"""Pictures hold what was computed: their axes are read back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import decisions, plots
from l2l_fast.evaluation.comparison import LEARNED, Comparison
from l2l_fast.evaluation.experiments import config, report
from l2l_fast.problems import MNIST, Quadratic
from tests.test_decisions import made
from tests.test_experiments import small

pytest.importorskip("matplotlib")
LABELS = {LEARNED: "learned LSTM", "sgd": "SGD", "nag": "NAG"}


def skewed(names=(LEARNED, "sgd", "nag"), episodes=7, horizon=5, problem=None) -> Comparison:
    """Curves of which no two statistics agree."""
    generator = torch.Generator().manual_seed(1)
    losses = {
        name: (2 * torch.randn(episodes, horizon + 1, generator=generator, dtype=torch.float64)).exp() for name in names
    }
    rates = {name: rate for name, rate in (("sgd", 0.125), ("nag", 0.5)) if name in names}
    return Comparison(problem or Quadratic(dim=3, batch=4), losses, rates, 4)


def lines(axes):
    """Curves by label; those of the paper, which have none, by the colour of the optimizer's."""
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    others = [line for line in axes.lines if line.get_label().startswith("_")]
    return named, others


def legend_of(figure) -> list[str]:
    """The entries of the one legend, each in a line."""
    (legend,) = figure.legends
    return [text.get_text().replace("\n", " ") for text in legend.get_texts()]


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_curves_are_the_statistic_that_the_legend_names(centre):
    comparison = skewed()
    (axes,) = plots.curves_figure([comparison], centre=centre).axes
    named, others = lines(axes)
    assert set(named) == set(LABELS.values()) and not others
    statistic = {"median": np.median, "mean": np.mean}[centre]
    for name, label in LABELS.items():
        losses = comparison.losses[name].numpy()
        np.testing.assert_allclose(named[label].get_ydata(), statistic(losses, axis=0))
        assert list(named[label].get_xdata()) == list(range(6))
        assert named[label].get_color() == plots.COLOURS[name]
    assert axes.get_legend() is None
    assert legend_of(axes.get_figure()) == [
        LABELS[LEARNED], LABELS["sgd"], LABELS["nag"],
        f"10-90 % of 7 fresh test tasks (the mean of 4 problems each) (line: {centre})",
    ]  # fmt: skip
    assert named[LABELS[LEARNED]].get_zorder() > max(named[LABELS[name]].get_zorder() for name in ("sgd", "nag"))


def test_bands_are_the_10th_and_the_90th_percentile():
    comparison = skewed()
    (axes,) = plots.curves_figure([comparison]).axes
    assert len(axes.collections) == 3
    found = {}
    for band in axes.collections:
        points = band.get_paths()[0].vertices
        columns = [points[np.isclose(points[:, 0], t), 1] for t in range(6)]
        found[tuple(band.get_facecolor()[0][:3])] = [(column.min(), column.max()) for column in columns]
    from matplotlib.colors import to_rgb

    for name, losses in comparison.losses.items():
        expected = np.quantile(losses.numpy(), [0.1, 0.9], axis=0).T
        np.testing.assert_allclose(found[to_rgb(plots.COLOURS[name])], expected)


def test_axes_titles_and_heading():
    mnist = MNIST(data="mnist-10k-embedded", hidden=(3,))
    both = [skewed(), skewed(horizon=9, problem=mnist)]
    figure = plots.curves_figure(both, titles=["first", "second"], heading="A heading")
    assert figure.get_suptitle() == "A heading"
    for axes, comparison, title in zip(figure.axes, both, ("first", "second")):
        assert axes.get_title() == title
        assert axes.get_xlim() == (0, comparison.horizon)
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", "log")
    assert plots.curves_figure(both[:1]).axes[0].get_title() == "quadratic"
    assert len(plots.curves_figure(both * 2, columns=3).axes) == 4
    low, high = figure.axes[0].get_ylim()
    shown = torch.cat(list(both[0].losses.values()))
    assert low <= shown.quantile(0.1, 0).min() and high >= shown.quantile(0.9, 0).max()


def test_diverged_curves_stop():
    comparison = skewed()
    comparison.losses["sgd"][:, 3:] = math.inf
    (axes,) = plots.curves_figure([comparison], centre="mean").axes
    found = lines(axes)[0][LABELS["sgd"]].get_ydata()
    assert np.isfinite(found[:3]).all() and np.isnan(found[3:]).all()


def test_references_are_dotted_and_the_legend_says_so():
    comparison = skewed()
    curves = {LEARNED: ([0, 2], [3.0, 1.0]), "nag": ([1, 4], [2.0, 0.5]), "adam": ([0, 1], [9.0, 9.0])}
    plain, dotted = plots.curves_figure([comparison] * 2, references=[None, curves]).axes
    assert not lines(plain)[1]
    others = {line.get_color(): line for line in lines(dotted)[1]}
    assert set(others) == {plots.COLOURS[LEARNED], plots.COLOURS["nag"]}  # Adam did not take part here
    for name in (LEARNED, "nag"):
        line = others[plots.COLOURS[name]]
        assert line.get_linestyle() == ":" and (list(line.get_xdata()), list(line.get_ydata())) == curves[name]
    (legend,) = plain.get_figure().legends
    assert legend_of(plain.get_figure())[-1] == "the paper's mean"
    assert legend.legend_handles[-1].get_linestyle() == ":"
    for references in (None, [None, None], [None, {}]):
        assert "the paper's mean" not in legend_of(plots.curves_figure([comparison] * 2, references=references))


def test_networks_trained_alike_are_thin_lines():
    comparison, other = skewed(), skewed(names=("nag",))
    comparison.others.update({f"seed {k}": comparison.losses[LEARNED] * (2.0 + k) for k in range(3)})
    for centre, statistic in (("mean", np.mean), ("median", np.median)):
        figure = plots.curves_figure([comparison, other], centre=centre)
        named, others = lines(figure.axes[0])
        assert len(others) == 3 and not lines(figure.axes[1])[1]
        for line, losses in zip(others, comparison.others.values()):
            np.testing.assert_allclose(line.get_ydata(), statistic(losses.numpy(), axis=0))
            assert line.get_color() == plots.COLOURS[LEARNED] and line.get_linewidth() < 1
            assert line.get_linewidth() < named[LABELS[LEARNED]].get_linewidth() / 2
        assert "trained alike, other seeds" in legend_of(figure)
    assert "trained alike, other seeds" not in legend_of(plots.curves_figure([other]))


def test_the_legend_explains_the_band_and_names_everybody_once():
    both = [skewed(names=("adam", "sgd")), skewed(names=(LEARNED, "sgd", "momentum"), episodes=9)]
    figure = plots.curves_figure(both, centre="mean")
    assert legend_of(figure) == [
        "learned LSTM", "Adam", "SGD", "heavy ball", "10-90 % of the test tasks (line: mean)"
    ]  # fmt: skip
    (legend,) = figure.legends
    band, colours = legend.legend_handles[-1], {}
    for handle, text in zip(legend.legend_handles[:-1], legend.get_texts()):
        colours[text.get_text()] = handle.get_color()
    assert colours["heavy ball"] == plots.COLOURS["momentum"] and colours["Adam"] == plots.COLOURS["adam"]
    assert 0 < band.get_alpha() < 1 and band.get_width() > 0 and not figure.axes[0].get_legend()
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS) == 1 + len(l2l.baselines.RULES)


LONG = "A title of a setting with many words in it, as they stand in the files of experiments, and still some more"


@pytest.mark.parametrize("panels, columns", [(1, None), (2, None), (2, 3), (3, 3), (4, 2), (7, 3)])
def test_no_text_is_cut_off_or_lies_on_another(panels, columns):
    names = (LEARNED, *l2l.baselines.NAMES)
    many = [skewed(names=names, horizon=100, problem=MNIST(data="mnist-10k-embedded")) for _ in range(panels)]
    for comparison in many:
        comparison.others["seed 3"] = comparison.losses[LEARNED] * 2
    references = [{LEARNED: ([0, 1], [1.0, 1.0])}] * panels
    figure = plots.curves_figure(
        many, titles=[LONG] * panels, heading=f"{LONG}: {LONG}", columns=columns, references=references, centre="mean"
    )
    figure.canvas.draw()
    renderer, whole = figure.canvas.get_renderer(), figure.bbox
    assert len(legend_of(figure)) == len(names) + 3
    boxes = {"legend": figure.legends[0].get_window_extent(renderer), "heading": figure._suptitle.get_window_extent()}
    for k, axes in enumerate(figure.axes):
        boxes[f"panel {k}"] = axes.get_tightbbox(renderer)
        assert axes.get_window_extent().height > 100 and axes.get_window_extent().width > 200
    for what, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.width and box.y1 <= whole.height, what
        for other, that in boxes.items():
            if what != other:
                apart = box.x1 <= that.x0 or that.x1 <= box.x0 or box.y1 <= that.y0 or that.y1 <= box.y0
                assert apart, (what, other)
    texts = [text.get_window_extent(renderer) for text in figure.legends[0].get_texts()]
    for k, box in enumerate(texts):
        assert all(
            box.x1 <= that.x0 or that.x1 <= box.x0 or box.y1 <= that.y0 or that.y1 <= box.y0 for that in texts[:k]
        )


@pytest.mark.parametrize("panels", [1, 2])
def test_long_names_make_fewer_columns(panels):
    names = (LEARNED, *(f"an optimizer of the user's own, number {k} of all of them" for k in range(5)))
    figure = plots.curves_figure([skewed(names=names)] * panels)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent(figure.canvas.get_renderer())
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width and len(legend_of(figure)) == 7


def test_resolution_for_a_paper(tmp_path):
    figure = plots.curves_figure([skewed()])
    path = plots.save_figure(figure, tmp_path / "x.png")
    header = path.read_bytes()[16:24]
    assert int.from_bytes(header[:4], "big") == round(150 * figure.get_figwidth())


def captured(monkeypatch) -> list:
    """Figures that are going to be written."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    return figures


def test_the_picture_of_an_experiment(tmp_path, monkeypatch):
    names = sorted(json.loads((config._FOLDER / config._PAPER).read_text())["curves"])
    settings = [
        {"name": "b", "title": "With the paper's", "horizon": 5, "paper": names[0]},
        {"name": "a", "title": "Without", "horizon": 5},
    ]
    experiment = small(tmp_path, settings=settings, selection=["a"], about="What it is. More.")
    results = {"a": skewed(), "b": skewed(episodes=4)}
    figures = captured(monkeypatch)
    report.draw(experiment, results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert figure.get_suptitle() == "What it is"
    for axes, setting in zip(figure.axes, experiment.settings):
        assert axes.get_title() == setting.title
        named, others = lines(axes)
        for name, label in LABELS.items():  # the paper's curves are means
            expected = results[setting.name].losses[name].mean(0).numpy()
            np.testing.assert_allclose(named[label].get_ydata(), expected)
        assert len(others) == (3 if setting.name == "b" else 0)
    curves = config.paper_curves(names[0])
    drawn = {line.get_color(): list(line.get_ydata()) for line in lines(figure.axes[0])[1]}
    assert drawn == {plots.COLOURS[name]: curves[name][1] for name in LABELS}


def test_decisions_are_drawn_as_they_were_made():
    _, found = made()
    figure = decisions.decisions_figure(found, "A heading")
    assert figure.get_suptitle() == "A heading" and len(figure.axes) == 2 * 4
    labels = {"learned": "learned LSTM", "adam": "Adam", "sgd": "SGD"}
    for k, (name, index) in enumerate(found.coordinates):
        row = figure.axes[4 * k : 4 * k + 4]
        assert row[0].get_title() == f"updates of {name}[{index}]" and row[0].get_xlabel() == "step"
        by_label = {line.get_label(): line for line in row[0].lines}
        for optimizer, label in labels.items():
            assert list(by_label[label].get_xdata()) == list(range(1, 10))
            np.testing.assert_allclose(by_label[label].get_ydata(), found.updates[optimizer][:, k])
            assert by_label[label].get_color() == plots.COLOURS[optimizer]
        for j, (axes, step) in enumerate(zip(row[1:], found.steps)):
            assert axes.get_title() == f"{name}[{index}], step {step}" and axes.get_xlabel() == "gradient"
            by_label = {line.get_label(): line for line in axes.lines}
            for optimizer, label in labels.items():
                np.testing.assert_allclose(by_label[label].get_xdata(), found.grids[k])
                np.testing.assert_allclose(by_label[label].get_ydata(), found.proposals[optimizer][j, k])
            (dot,) = [line for line in axes.lines if line.get_marker() == "o"]
            point = found.gradients[step - 1, k], found.updates["learned"][step - 1, k]
            np.testing.assert_allclose([*dot.get_xdata(), *dot.get_ydata()], point)


@pytest.mark.parametrize(
    "name, start", [("x.png", b"\x89PNG"), ("x", b"\x89PNG"), ("x.PNG", b"\x89PNG"), ("x.pdf", b"%PDF")]
)
def test_the_ending_is_the_format(tmp_path, name, start):
    path = tmp_path / "new" / name
    assert plots.learning_curves([skewed()], path) == path
    assert path.read_bytes().startswith(start) and [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("path", ["sub/x.txt", "sub/x.pngg", "sub/", ""])
def test_a_picture_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match="path: expected"):
        plots.learning_curves([skewed()], path)
    assert not list(tmp_path.iterdir())


def test_experiments_without_pictures(tmp_path):
    from l2l_fast.evaluation.experiments import pictures

    experiment = small(tmp_path)
    results = {setting.name: skewed() for setting in experiment.settings}
    assert pictures.draw(experiment, results, l2l.CoordinatewiseLSTM(), tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()


def texts(figure):
    """Everything that is written, with the box in which it must lie: the figure's, and of a title its panel's share."""
    whole = figure.bbox.width
    if figure.get_suptitle():
        yield figure._suptitle, 0, whole
    for legend in figure.legends:
        yield legend, 0, whole
    for axes in figure.axes:
        yield axes.title, 0, whole


def check_nothing_is_cut_off(figure):
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    titles = []
    for artist, low, high in texts(figure):
        box = artist.get_window_extent(renderer)
        assert low <= box.x0 and box.x1 <= high and box.y0 >= 0 and box.y1 <= figure.bbox.height, artist
        titles += [box] if artist in [axes.title for axes in figure.axes] else []
    for k, one in enumerate(titles):
        assert not any(one.overlaps(other) for other in titles[k + 1 :])


LONG = "encoder.layers.0.self_attention.in_proj_weight_of_a_module_with_a_long_name"
HEADING = "/a/long/path/to/an/optimizer-of-mine on mnist (mnist-10k-embedded (images: train 3,334, validation 3,333))"


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_titles_of_decisions_are_not_cut_off(steps):
    shape, chosen = (steps, 2), [step for step in (1, 2, 4, 8) if step <= steps]
    names = ("learned", "adam", "sgd")
    found = decisions.Decisions(
        [(LONG, 123456), ("b", 7)],
        torch.randn(shape),
        {name: torch.randn(shape) for name in names},
        chosen,
        torch.linspace(-1, 1, 5).expand(2, 5),
        {name: torch.randn(len(chosen), 2, 5) for name in names},
    )
    figure = decisions.decisions_figure(found, HEADING)
    check_nothing_is_cut_off(figure)
    if steps == 1:  # a line of one point would be nothing to see
        assert all(line.get_marker() == "." for line in figure.axes[0].lines)


@pytest.mark.parametrize("panels", [1, 2, 5])
def test_titles_of_curves_are_not_cut_off(panels):
    problem = Quadratic(dim=3, batch=4, family="ill_conditioned", condition=1234.5)
    comparisons, titles = [skewed(problem=problem)] * panels, [repr(problem) + LONG] * panels
    for columns in (None, 2):
        check_nothing_is_cut_off(plots.curves_figure(comparisons, titles, HEADING, columns=columns))
