from tests.cli.conftest import _settings, wire

__all__ = ["_settings", "wire"]
