"""Models from every form that people keep them in."""

from assay.models.loaders.load import load_model

__all__ = ["load_model"]
