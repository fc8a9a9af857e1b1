"""`rnode dashboard`: a view of a W&B project with what the paper's figures compare."""

from omegaconf import DictConfig
from wandb_workspaces import workspaces  # pip install -e '.[loggers]'
from wandb_workspaces.reports import v2 as panels

from rnode.app.runs import LAMBDAS
from rnode.training.results import BITS


def main(cfg: DictConfig) -> None:
    """Save the view in the project, and print its address.

    It shows likelihood against cost, NFE against the Jacobian norm, and the penalties.
    """
    names = (BITS, "val/nfe_forward", "train/seconds_total")
    measured = [panels.SummaryMetric(name) for name in names]
    axes = [*(panels.Config(key) for key in LAMBDAS), *measured]
    columns = [panels.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    costs = ("val/seconds_total", "val/nfe_total")
    nfe = panels.LinePlot(x="train/jacobian", y=["train/nfe_forward"])
    sections = {
        "Likelihood against cost (Figure 2)": [panels.LinePlot(x=x, y=[BITS]) for x in costs],
        "NFE against the Jacobian norm (Figure 3)": [nfe],
        "Penalties, likelihood and cost": [panels.ParallelCoordinatesPlot(columns=columns)],
    }
    opened = [workspaces.Section(name, plots, is_open=True) for name, plots in sections.items()]
    view = workspaces.Workspace(cfg.entity, cfg.project, "RNODE", opened)
    view.save()
    print(view.url)
