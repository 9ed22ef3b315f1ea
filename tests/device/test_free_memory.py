"""Free memory of the machine and of the containers around the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpn_rt.device.free_memory import free_memory

MACHINE = 8 << 30


def write(system: Path, files: dict[str, str]) -> None:
    for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {MACHINE >> 10} kB\n", **files}.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(text)


def version_2(path: str, limit: str, used: int, active: int = 0, inactive: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 77\nfile 5\nactive_file {active}\ninactive_file {inactive}\n",
    }


def version_1(path: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_active_file 0\ntotal_inactive_file {inactive}\n",
    }


OF_2, OF_1 = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "5:cpu,memory:/a/b\n1:cpu:/\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({**OF_2, **version_2("/a/b", "1000", 400, active=30, inactive=7)}, 637),
        ({**OF_2, **version_2("/a/b", "max", 400), **version_2("/a", "900", 400)}, 500),
        ({**OF_2, **version_2("/a/b", "1000", 900), **version_2("/a", "900", 400)}, 100),
        ({**OF_2, **version_2("", "800", 100)}, 700),  # a container sees its own group as the root
        ({**OF_2, **version_2("/a/b", "100", 150)}, 0),
        ({**OF_2, **version_2("/a/b", str(MACHINE * 2), 0)}, MACHINE),
        ({**OF_1, **version_1("/a/b", 1000, 400, inactive=50)}, 650),
        ({**OF_1, **version_1("/a/b", 2**63 - 4096, 400)}, MACHINE),
        ({**OF_1, **version_1("", 600, 400)}, 200),
        ({**OF_1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "what\n"}, MACHINE),
        ({**OF_2, **version_2("/a/b", "max", 400), "sys/fs/cgroup/a/b/memory.high": "450\n"}, 50),
        ({"proc/self/cgroup": "nothing\n\n0::/ä:b\n", **version_2("/ä:b", "1000", 400)}, 600),
        ({"proc/self/cgroup": "0::/../x\n", **version_2("", "1000", 400)}, 600),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, files)
    assert free_memory(tmp_path) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 0


def test_this_system() -> None:
    assert 0 < free_memory() < 1 << 50
