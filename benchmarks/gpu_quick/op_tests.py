"""The kernels' and the runtime's tests on the device, a process for each file; junit.xml has all of them."""

from __future__ import annotations

from benchmarks.gpu_quick.pytest_files import Job, files_under, line_of, run_jobs
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings

SECONDS_TO_TELL = 10
"""What was stopped is still told in the step's time."""


def run(settings: Settings, record: Recorder) -> None:
    jobs = [Job(file, ("-m", settings.marks, file)) for file in files_under(settings.test_files)]
    total = {"passed": 0, "failed": 0, "skipped": 0}
    bad: list[str] = []
    for result in run_jobs(
        jobs, settings.processes, record.seconds_left - SECONDS_TO_TELL, record.folder / "junit.xml"
    ):
        total = {name: count + result.counts.get(name, 0) for name, count in total.items()}
        record.put(files={**record.values.get("files", {}), result.name: [result.status, round(result.seconds, 1)]})
        if not result.is_good:
            bad.append(result.name)
            record.say(line_of(result))
            for failure in result.failures[:3]:
                record.say(f"  {failure}")
            print(result.output[-12000:], flush=True)
            record.put(failures={**record.values.get("failures", {}), result.name: result.failures})
        record.put(total=total, bad=bad)
    record.say(", ".join(f"{count} {name}" for name, count in total.items()) + f", {len(bad)} bad files")
    if bad:
        record.put(tests_error=f"bad files: {', '.join(bad)}")
