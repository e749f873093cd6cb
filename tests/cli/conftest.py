from tests.reconcile.conftest import here

__all__ = ["here"]
