"""Names of methods, for the library and its configuration; --help needs them without torch."""

FIXED_GRID = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE_METHODS = ("auto", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
INTEGRALS = ("system", "simpson", "radau")
GRADIENTS = ("backprop", "checkpoint", "adjoint")
DIVERGENCES = ("gaussian", "rademacher", "exact")
NORMS = ("rows", "batch")
