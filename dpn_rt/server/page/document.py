"""The page as one document, put together from its parts, without requests to anywhere but the API."""

from __future__ import annotations

import base64
import importlib.resources

SCRIPTS = ("server", "reduction", "fields", "image", "conversation", "pyramid", "start")
"""In this order one module: what they name at the top level is seen in all of them."""
EXAMPLES = ("scene_1", "scene_2")
"""Pictures to begin with. They travel within the page, so that it needs no path, and no API key, for them."""


def page_text() -> str:
    """The page's HTML with styles, scripts and pictures in it."""
    folder = importlib.resources.files("dpn_rt.server.page")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text("utf-8")

    result = text("page.html").replace("/*page.css*/", f"\n{text('page.css')}")
    result = result.replace("/*scripts*/", "\n" + "\n".join(text(f"{name}.js") for name in SCRIPTS))
    for name in EXAMPLES:
        picture = base64.b64encode(folder.joinpath(f"examples/{name}.png").read_bytes()).decode()
        result = result.replace(f"/*{name}*/", f"data:image/png;base64,{picture}")
    return result
