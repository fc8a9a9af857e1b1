"""`rnode dashboard`: a view of a W&B project with what the paper's figures compare."""

from typing import Any

from omegaconf import DictConfig

from rnode.app.runs import LAMBDAS
from rnode.errors import InputError
from rnode.training.results import BITS

NFE, JACOBIAN = "val/nfe_forward", "train/jacobian"


def main(cfg: DictConfig) -> None:
    """Save the view in the project, and print its address."""
    try:
        view = make_view(cfg.wandb.entity, cfg.wandb.project)
    except ModuleNotFoundError:
        raise InputError("wandb-workspaces is missing: pip install -e '.[loggers]'") from None
    view.save()
    print(view.url)


def make_view(entity: str, project: str) -> Any:
    """Return the view: likelihood against cost, NFE against the Jacobian norm, the penalties."""
    from wandb_workspaces import workspaces  # an extra
    from wandb_workspaces.reports import v2 as panels

    costs = ("val/seconds_total", "val/nfe_total")
    x, y = panels.SummaryMetric(JACOBIAN), panels.SummaryMetric(NFE)
    measured = [panels.SummaryMetric(name) for name in (BITS, NFE, "train/seconds_total")]
    axes = [*(panels.Config(key) for key in LAMBDAS), *measured]
    columns = [panels.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    sections = {
        "Likelihood against cost (Figure 2)": [panels.LinePlot(x=x, y=[BITS]) for x in costs],
        "NFE against the Jacobian norm (Figure 3)": [
            panels.LinePlot(x=JACOBIAN, y=["train/nfe_forward"]),
            panels.ScatterPlot(x=x, y=y),
        ],
        "Penalties, likelihood and cost": [panels.ParallelCoordinatesPlot(columns=columns)],
    }
    opened = [workspaces.Section(name, plots, is_open=True) for name, plots in sections.items()]
    return workspaces.Workspace(entity, project, "RNODE", opened)
