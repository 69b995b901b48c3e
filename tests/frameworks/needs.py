"""The frameworks that tests need: skipped where one is missing, but not where all must be there."""

import os
import warnings
from types import ModuleType

import pytest

from assay.core.errors import MissingExtraError
from assay.core.optional import need


def framework(name: str) -> ModuleType:
    """Import a framework, or skip the whole test file; with ASSAY_FRAMEWORKS=all, fail instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own imports
            return need(name, name)
    except MissingExtraError as e:
        if os.environ.get("ASSAY_FRAMEWORKS") == "all":
            raise
        pytest.skip(f"{name} cannot be used here: {e.found}", allow_module_level=True)
