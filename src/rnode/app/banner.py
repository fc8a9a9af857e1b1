"""The first lines of a run, printed before torch is imported."""

from collections.abc import Mapping

from omegaconf import DictConfig


def banner(cfg: DictConfig, choices: Mapping[str, str], folder: str) -> str:
    """Say what is trained on what, for how long, where, and how to stop it."""
    model, trainer = cfg.model, cfg.trainer
    sizes = " ".join(
        f"{key}={model[key]}" for key in ("hidden", "layers", "pieces") if key in model
    )
    limits = {"epochs": trainer.max_epochs, "steps": trainer.max_steps, "time": trainer.max_time}
    given = [f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1)]
    return (
        f"{choices['dataset']} by a {choices['model']} flow, {sizes}, solver={choices['solver']}\n"
        f"λ_K={cfg.reg.lambda_k:g} λ_J={cfg.reg.lambda_j:g} lr={cfg.optimizer.lr:g} "
        f"batch={cfg.dataset.batch_size} seed={cfg.seed}, until {', '.join(given) or 'Ctrl-C'}\n"
        f"run folder: {folder} (Ctrl-C stops the run and says how to resume)"
    )
