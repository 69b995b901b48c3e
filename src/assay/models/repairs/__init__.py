"""Repairs of masked gradients: they stand in while an attack searches, and never when a claim is verified.

A repair is a value. While it is opened, the functions of torch that a network calls are looked at one by one (a
``TorchFunctionMode``, so that modules, lambdas and converted graphs are all reached), and those that hide the gradient
get another backward pass. So a repair can make a search find more; it cannot make a wrong claim.
"""

from assay.models.repairs.bridges import Bridges, Scout
from assay.models.repairs.calls import Repair, opened
from assay.models.repairs.float64 import Float64
from assay.models.repairs.outputs import Plumber, Tapped
from assay.models.repairs.straight_through import StraightThrough

__all__ = ["Bridges", "Float64", "Plumber", "Repair", "Scout", "StraightThrough", "Tapped", "opened"]
