"""Fleets: the shapes of cars, trucks, buses and trams that a style's streets have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from dgbench.streets import vehicles
from dgbench.streets.mesh import Template
from dgbench.streets.vehicles import Profile, Truck, Vehicle, car_of

# length of the load, height, texture
PRETRAINING_TRUCKS = ((6.4, 3.1, "siding"), (4.2, 2.5, "roughcast"), (7.8, 3.95, "ashlar"), (5.4, 2.0, "shingles"))
PRETRAINING_BUSES = ((8.4, 2.8, 1), (12.6, 3.15, 3), (9.2, 4.1, 1))  # length, height, doors
PRETRAINING_TRAMS = ((0.6, 1, 3.15), (0.2, 3, 3.6))  # nose, doors, height


@dataclass(frozen=True)
class Fleet:
    """The vehicles of a place, each a function that builds them once."""

    cars: Callable[[], tuple[Vehicle, ...]]
    trucks: Callable[[], tuple[Truck, ...]]
    buses: Callable[[], tuple[Vehicle, ...]]
    tram_sections: Callable[[], tuple[Template, ...]]


@functools.cache
def _pretraining_cars() -> tuple[Vehicle, ...]:
    """Return a boxy car, a low saloon, a pick-up, a tall van, a bubble car and a limousine."""
    specs: tuple[
        tuple[Profile, Profile, float, float, tuple[float, float], float, tuple[float, ...], tuple[float, float]], ...
    ] = (
        (
            ((-1.8, 0.3), (1.85, 0.3), (1.9, 0.6), (1.85, 0.88), (1.2, 1.0), (-1.8, 1.0), (-1.85, 0.65)),
            ((-1.8, 0.98), (1.15, 0.98), (0.95, 1.62), (-1.72, 1.62)),
            0.86,
            0.78,
            (-1.15, 1.2),
            0.34,
            (0.06, 0.5, 0.95),
            (0.68, 0.86),
        ),
        (
            ((-2.45, 0.22), (2.4, 0.22), (2.45, 0.42), (2.3, 0.62), (0.9, 0.82), (-2.3, 0.88), (-2.45, 0.55)),
            ((-2.0, 0.84), (0.8, 0.8), (-0.2, 1.32), (-1.2, 1.34)),
            0.94,
            0.58,
            (-1.45, 1.55),
            0.36,
            (0.14, 0.5, 0.9),
            (0.58, 0.74),
        ),
        (
            ((-2.6, 0.42), (2.3, 0.42), (2.38, 0.7), (2.3, 1.02), (1.3, 1.14), (-2.55, 1.1), (-2.6, 0.8)),
            ((-0.6, 1.1), (1.3, 1.12), (0.75, 1.78), (-0.45, 1.8)),
            0.98,
            0.76,
            (-1.55, 1.5),
            0.42,
            (0.1, 0.5, 0.92),
            (0.82, 1.02),
        ),
        (
            ((-2.3, 0.32), (2.25, 0.32), (2.3, 0.7), (2.2, 1.1), (1.9, 1.25), (-2.25, 1.25), (-2.3, 0.75)),
            ((-2.24, 1.22), (1.88, 1.22), (1.5, 2.3), (-2.2, 2.32)),
            0.96,
            0.9,
            (-1.4, 1.45),
            0.36,
            (0.62, 0.8, 0.95),
            (0.8, 1.08),
        ),
        (
            ((-1.3, 0.26), (1.35, 0.26), (1.45, 0.55), (1.25, 0.82), (0.8, 0.95), (-1.25, 1.0), (-1.4, 0.62)),
            ((-1.25, 0.97), (0.85, 0.93), (0.1, 1.58), (-0.75, 1.58)),
            0.74,
            0.5,
            (-0.85, 0.9),
            0.28,
            (0.16, 0.55, 0.9),
            (0.64, 0.8),
        ),
        (
            ((-2.7, 0.24), (2.7, 0.24), (2.75, 0.5), (2.65, 0.74), (1.4, 0.92), (-2.65, 0.98), (-2.75, 0.62)),
            ((-2.1, 0.95), (1.4, 0.92), (0.7, 1.52), (-1.6, 1.54)),
            0.92,
            0.7,
            (-1.7, 1.8),
            0.35,
            (0.08, 0.28, 0.5, 0.72, 0.94),
            (0.66, 0.9),
        ),
    )
    return tuple(
        (
            car_of(lower, cabin, half, top, axles, radius, posts, light),
            half,
            max(z for z, _ in lower),
            max(y for _, y in cabin),
        )
        for lower, cabin, half, top, axles, radius, posts, light in specs
    )


FLEETS = {
    "usual": Fleet(vehicles.cars, vehicles.trucks, vehicles.buses, vehicles.tram_sections),
    "pretraining": Fleet(
        _pretraining_cars,
        functools.partial(vehicles.trucks, PRETRAINING_TRUCKS),
        functools.partial(vehicles.buses, PRETRAINING_BUSES),
        functools.partial(vehicles.tram_sections, PRETRAINING_TRAMS),
    ),
}
