"""guidellm itself measures the server with pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.server.conftest import MODEL, RunningServer
from tests.skips import need_harness

need_harness("guidellm")


def test_a_run_with_pictures(server: RunningServer, engine_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={server.url},model={MODEL}",
        "data": "kind=synthetic_image,width=224,height=224,output_tokens=6",
        "tokenizer": f"kind=hf_auto,model={engine_dir / 'processor'}",
        "profile": "kind=concurrent,streams=2",
        "constraint": "kind=max_requests,count=6",
        "output": f"kind=json,path={report}",
    }
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert report.exists(), done.stdout + done.stderr
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 6 and not requests["errored"]
    for request in requests["successful"]:
        assert request["output_metrics"]["text_tokens"] == 6
        assert request["time_to_first_token_ms"] > 0
