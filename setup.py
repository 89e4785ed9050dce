"""What pyproject.toml has no words for: the recipes of configs/ are a package of realjax, so that a wheel has them."""

from setuptools import find_packages, setup

RECIPES = "realjax.apps.recipes"

setup(packages=[*find_packages(include=["realjax*"]), RECIPES], package_dir={RECIPES: "configs"})
