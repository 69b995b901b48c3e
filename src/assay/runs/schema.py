"""What a run holds: the columns of its table, and what the manifest says."""

from typing import Final, Literal, TypeAlias

import pyarrow as pa

VERSION: Final = 1
"""Of the folder's layout; a run of a later version is refused, not guessed at."""

Status: TypeAlias = Literal["robust", "fooled", "misclassified"]

ROBUST: Final = "robust"
"""Right, and not fooled: proven so where ``certified`` says it."""

UNATTACKED: Final = "none"
"""The effort of a run that attacks nothing: it has proofs, and no robust accuracy."""

LATE: Final = "max-seconds"
"""What bounded a batch that was stored because time was over, before its race was."""

SAMPLES: Final = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("prediction", pa.int64(), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("fooled", pa.bool_(), nullable=False),
        pa.field("adversarial_prediction", pa.int64()),
        pa.field("size", pa.float64(), nullable=False),
        pa.field("broken_by", pa.string()),
        pa.field("certified", pa.bool_()),
        pa.field("lower", pa.float64(), nullable=False),
        pa.field("upper", pa.float64(), nullable=False),
        pa.field("forwards", pa.int64(), nullable=False),
        pa.field("backwards", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)
"""One row a sample.

``margin`` is the label's clean logit minus the largest other; ``size`` the size of the smallest verified perturbation
that fools: 0 for a sample that is wrong as it is, inf where none was found. ``lower <= true <= upper`` is the bracket:
``lower`` is proven, 0 where nothing is. ``certified`` says whether the eps of the run is, null where nobody asked.
"""
