"""Recipes: YAML files that name every choice of an experiment, checked as a whole before anything runs.

A recipe may extend one parent, which may not extend another. All problems are reported in one message, each with its
key path. The resolved recipe, with every default written out, is what a run keeps and what is hashed.
"""

from __future__ import annotations

from dgbench.recipe.data import DataSpec
from dgbench.recipe.files import find, recipe_names, resolve
from dgbench.recipe.load import dump, key_paths, load_method, load_recipe, recipe_hash
from dgbench.recipe.method import MethodSpec
from dgbench.recipe.model import EvalSpec, Expectation, Recipe
from dgbench.recipe.training import OptimSpec, TrainSpec

__all__ = [
    "DataSpec",
    "EvalSpec",
    "Expectation",
    "MethodSpec",
    "OptimSpec",
    "Recipe",
    "TrainSpec",
    "dump",
    "find",
    "key_paths",
    "load_method",
    "load_recipe",
    "recipe_hash",
    "recipe_names",
    "resolve",
]
