"""What lmms-eval reads of this package: the name `--model dpn_rt`. The model is imported when it is asked for."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The entry of lmms-eval's table of models, a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="dpn_rt", chat_class_path="dpn_rt.integrations.lmms_eval.DpnRt")
