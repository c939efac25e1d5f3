"""How scores were made, in words for their provenance."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tda_lightning.tasks import AttributionTask


def fisher_of(curvature: str | None, task: AttributionTask) -> str | None:
    """Which Fisher or Gauss-Newton matrix a curvature stands for; None where there is none."""
    if curvature is None or curvature == "identity":
        return None
    if curvature == "exact":
        return "Gauss-Newton matrix, exact"
    if task.can_sample:
        return "true Fisher (sampled: random signs with the covariance of labels from the model)"
    return "empirical Fisher (the task has no sampled_loss, so the gradients of the loss itself)"


def package_versions() -> dict[str, str]:
    """Versions of the packages that made the scores."""
    found = {}
    for package in ("tda-lightning", "torch", "lightning", "h5py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
