"""State-space models: the theory that Mamba rests on, layer by layer, and the blocks around such layers.

`hippo` has the matrix that remembers a signal, `discretize` turns an equation in time into a recurrence, `convolution` runs that
as a convolution, `s4` and `s4d` are layers that learn such a system, `scans` computes recurrences whose coefficients change, `s6`
is the layer of Mamba, `hyena` a long convolution without a state. `ungated`, `h3` and `mamba` are blocks around any of these
layers, and `network` stacks them. All take (B, L, D): tokens before channels.
"""
