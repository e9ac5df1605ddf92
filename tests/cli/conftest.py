"""The commands of these tests are given what the runs of the training tests are given."""

from tests.training.conftest import data, finished

__all__ = ["data", "finished"]
