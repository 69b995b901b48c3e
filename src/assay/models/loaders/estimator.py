"""Estimators that joblib wrote: pickles, read only where they are trusted."""

from assay.core.errors import ModelError
from assay.core.optional import need
from assay.models.bridges.sklearn import bridge
from assay.models.loaded import Loaded
from assay.models.loaders.request import Request


def load(r: Request) -> Loaded:
    """Unpickle a fitted classifier of scikit-learn.

    Raises:
        ModelError: the file is not trusted, or damaged, or holds something else.
        MissingExtraError: scikit-learn is not installed.
    """
    if not r.trust_pickle:
        raise ModelError(
            "a model that can be read without running code from its file",
            f"{r.path}, a pickle of an estimator",
            "Only if you trust the file: --trust-pickle (trust_pickle=True).",
        )
    need("sklearn", "sklearn")
    joblib = need("joblib", "sklearn")
    try:
        model = joblib.load(r.path)
    except Exception as e:  # code of a trusted file may raise anything
        raise ModelError(
            "a file of joblib that can be read here",
            f"{r.path}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}",
            "Save it anew with joblib.dump, with the version of scikit-learn that is installed here.",
        ) from e
    return bridge(model)
