"""Figures of the notebooks, where a number can break them."""

from matplotlib import pyplot as plt

from notebooks import drawing


def test_curves_of_many_runs():
    runs = {str(i): [{"step": 0, "loss": 1.0}] for i in range(5)}
    drawing.curves(runs, {"loss": "loss", "step": "step"})
    assert [len(axis.lines) for axis in plt.gcf().axes] == [5, 5]
    plt.close()


def test_draws_may_be_equal():
    """In float32 the mean of three times 0.45 is not 0.45, and no error bar may be negative."""
    drawing.draws({name: [[0.45] * 3] for name in drawing.NETWORKS}, [1], "labels", "accuracy")
    plt.close()
