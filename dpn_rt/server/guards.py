"""The layers that every request passes before an application sees it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from dpn_rt.server.access import AccessMiddleware
from dpn_rt.server.bodies import BodyLimits
from dpn_rt.server.config import ServerConfig
from dpn_rt.server.uniform import UniformMiddleware


def guards(config: ServerConfig, on_refusal: Callable[[int], None]) -> list[Middleware]:
    """The layers, the innermost first: host, key and size; HEAD and slashes; pages of other origins.

    Args:
        on_refusal: called with the status of each request that is refused there.
    """
    access = Middleware(
        AccessMiddleware,
        hosts=config.hosts,
        api_key=config.api_key,
        bodies=BodyLimits(config.max_body_bytes, config.held_body_bytes),
        on_refusal=on_refusal,
    )
    layers = [access, Middleware(UniformMiddleware)]
    if config.cors.allowed_origins:
        layers.append(Middleware(CORSMiddleware, **config.cors.middleware_options))  # the outermost: it asks for no key
    return layers


def guarded(app: ASGIApp, config: ServerConfig, on_refusal: Callable[[int], None]) -> ASGIApp:
    """An application inside of all layers."""
    for layer in guards(config, on_refusal):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app
