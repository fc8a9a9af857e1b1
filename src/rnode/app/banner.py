"""The first lines of a run, printed before torch is imported."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


def banner(cfg: DictConfig) -> str:
    """Say what is trained on what, for how long, where, and how to stop it."""
    hydra, model, trainer = HydraConfig.get(), cfg.model, cfg.trainer
    chosen = hydra.runtime.choices
    sizes = " ".join(
        f"{key}={model[key]}" for key in ("hidden", "layers", "pieces") if key in model
    )
    limits = {"epochs": trainer.max_epochs, "steps": trainer.max_steps, "time": trainer.max_time}
    until = ", ".join(
        f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1)
    )
    return "\n".join(
        [
            f"{chosen['dataset']} by a {chosen['model']} flow, {sizes}, solver={chosen['solver']}",
            f"λ_K={cfg.reg.lambda_k:g} λ_J={cfg.reg.lambda_j:g} lr={cfg.optimizer.lr:g} "
            f"batch={cfg.dataset.batch_size} seed={cfg.seed}, until {until or 'Ctrl-C'}",
            f"run folder: {cfg.folder} (Ctrl-C stops the run and says how to resume)",
        ]
    )
