"""The tree of errors is the one its docstring draws, and survives Ray's pickling."""

import pickle

import pytest

from logitlake_shared import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_in_the_tree(name: str) -> None:
    """Each public name is a LogitLakeError, is drawn in the docstring, has no `__init__`, and pickles."""
    cls = getattr(errors, name)
    assert issubclass(cls, errors.LogitLakeError)
    assert name in (errors.__doc__ or "")
    assert "__init__" not in vars(cls)
    copy = pickle.loads(pickle.dumps(cls("what, where")))
    assert type(copy) is cls
    assert str(copy) == "what, where"


def test_all_lists_what_is_there() -> None:
    """No error class is missing from `__all__`."""
    assert set(errors.__all__) == {name for name, value in vars(errors).items() if isinstance(value, type)}
