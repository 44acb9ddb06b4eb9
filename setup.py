"""What pyproject.toml cannot say: the packages are all that are found under src, and configs/ as one more."""

from setuptools import find_packages, setup

setup(packages=[*find_packages("src"), "deflow.configs"])
