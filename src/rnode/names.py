"""Names of methods, for the library and its configuration; --help needs them without torch."""

ONE_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")
FIXED_GRID = (*ONE_STEP, "explicit_adams", "implicit_adams")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
INTEGRALS = ("system", "simpson", "radau")
GRADIENTS = ("backprop", "checkpoint", "adjoint")
DIVERGENCES = ("gaussian", "rademacher", "exact")
