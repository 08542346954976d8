"""How far a backend may be from the fp64 reference: (rtol, atol) of output, gradients, and gradients summed over B and L."""

TOL = {
    "float64": ((1e-10, 1e-10), (1e-9, 1e-9), (1e-8, 1e-8)),
    "float32": ((1e-4, 1e-4), (6e-4, 2e-3), (1e-3, 1e-3)),
    "float16": ((3e-3, 5e-3), (3e-3, 1e-2), (1e-2, 1e-2)),
    "bfloat16": ((3e-2, 5e-2), (3e-2, 5e-2), (5e-2, 5e-2)),
}
