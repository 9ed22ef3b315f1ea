from __future__ import annotations

from tests.ray_serve.conftest import Service


def test_slice(service: Service) -> None:
    import time
    for _ in range(5):
        t = time.time()
        r = service.post({"model": "tiny", "messages": [{"role": "user", "content": "What color?"}], "max_tokens": 8, "temperature": 0})
        print(r.status_code, r.headers, r.text[:500], time.time() - t)
    for p in ("/health", "/metrics", "/v1/models"):
        r = service.client.get(p)
        print(p, r.status_code, r.text[-600:])
    with service.client.stream("POST", "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "What color?"}], "max_tokens": 8, "temperature": 0, "stream": True}) as r:
        print(list(r.iter_lines()))
    print(service.process_ids())
