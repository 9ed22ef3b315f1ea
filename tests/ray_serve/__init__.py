from tests import ray_environment  # noqa: F401
