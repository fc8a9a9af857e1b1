"""`rnode dashboard`: a view of a W&B project with what the paper's figures compare."""

from typing import Any

from omegaconf import DictConfig
from wandb.errors import Error

from rnode.app.runs import LAMBDAS
from rnode.errors import InputError, one_line
from rnode.training.results import MEASURES

BITS, NFE, JACOBIAN = "val/bits_per_dim", "val/nfe_forward", "train/jacobian"


def main(cfg: DictConfig) -> None:
    """Save the view in the project, and print its address."""
    try:
        view = make_view(cfg.wandb.entity, cfg.wandb.project)
        view.save()
    except ModuleNotFoundError:
        raise InputError("wandb-workspaces is missing: pip install 'rnode[loggers]'") from None
    except (Error, OSError) as error:
        where = f"wandb.entity={cfg.wandb.entity} wandb.project={cfg.wandb.project}"
        raise InputError(f"{where}: {one_line(error)}") from error
    print(view.url)


def make_view(entity: str, project: str) -> Any:
    """Return the view: likelihood against cost, NFE against the Jacobian norm, the penalties."""
    from wandb_workspaces import workspaces  # an extra
    from wandb_workspaces.reports import v2 as panels

    def curve(x: str, y: str, x_title: str, y_title: str) -> Any:
        return panels.LinePlot(x=x, y=[y], title_x=x_title, title_y=y_title)

    costs = {"val/seconds_total": "seconds of training", "val/nfe_total": "NFE of training"}
    swept = [panels.Config(key) for key in LAMBDAS]
    measured = [panels.SummaryMetric(name) for name in (BITS, NFE, "train/seconds_total")]
    columns = [panels.ParallelCoordinatesPlotColumn(metric) for metric in (*swept, *measured)]
    across = panels.ScatterPlot(x=panels.SummaryMetric(JACOBIAN), y=panels.SummaryMetric(NFE))
    sections = {
        "Likelihood against cost (Figure 2)": [
            curve(x, BITS, title, f"validation {MEASURES['bits_per_dim']}")
            for x, title in costs.items()
        ],
        "NFE against the Jacobian norm (Figure 3)": [
            curve(JACOBIAN, "train/nfe_forward", MEASURES["jacobian"], MEASURES["nfe_forward"]),
            across,
        ],
        "Penalties, likelihood and cost": [panels.ParallelCoordinatesPlot(columns=columns)],
    }
    shown = [workspaces.Section(name, plots, is_open=True) for name, plots in sections.items()]
    return workspaces.Workspace(entity, project, "RNODE", shown)
