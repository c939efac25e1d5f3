"""What a check of the gradients against plain autograd found."""

from __future__ import annotations

from tda_lightning.records.display import fact_lines, html_rows


class GradientErrors(dict[str, float]):
    """The largest relative error of each layer, the worst first where it shows itself.

    Example:
        >>> GradientErrors({"head": 2e-7, "body": 1e-6})
        Engine against plain autograd: largest relative error 1.0e-06
          body: 1.0e-06
          head: 2.0e-07
    """

    def _title(self) -> str:
        worst = max(self.values(), default=0.0)
        return f"Engine against plain autograd: largest relative error {worst:.1e}"

    def _sorted(self) -> dict[str, str]:
        ordered = sorted(self.items(), key=lambda item: -item[1])
        return {layer: f"{error:.1e}" for layer, error in ordered}

    def __repr__(self) -> str:
        return fact_lines(self._title(), self._sorted())

    def _repr_html_(self) -> str:
        rows = list(self._sorted().items())
        return html_rows(("layer", "largest relative error"), rows, self._title())
