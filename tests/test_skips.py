"""Skipped tests are reported after a run, and with `--strict-skips` most reasons are errors."""

from __future__ import annotations

import pytest

from tests import skips

pytest_plugins = ["pytester"]


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess(*options, plugins=[skips])


def skipped(*reasons: str) -> str:
    tests = [f"def test_{i}():\n    pytest.skip({reason!r})\n" for i, reason in enumerate(reasons)]
    return "import pytest\n" + "\n".join(tests)


def test_reasons_are_counted(pytester: pytest.Pytester) -> None:
    result = run(pytester, skipped(skips.NO_GPU, skips.NO_BROWSER, skips.NO_GPU))
    result.stdout.fnmatch_lines([f"*1 {skips.NO_BROWSER}", f"*2 {skips.NO_GPU}"])
    result.assert_outcomes(skipped=3)
    assert result.ret == pytest.ExitCode.OK, "a machine without a browser is no error for a user"


def test_nothing_is_said_where_nothing_is_skipped(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it(): pass", "--strict-skips")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*= skipped =*")


@pytest.mark.parametrize("reason", sorted(skips.ACCEPTED))
def test_what_a_machine_may_lack_is_accepted(pytester: pytest.Pytester, reason: str) -> None:
    assert run(pytester, skipped(reason), "--strict-skips").ret == pytest.ExitCode.OK


@pytest.mark.parametrize("reason", [skips.NO_BROWSER, skips.NO_CUDA_BUILD, "later"])
def test_other_reasons_are_errors(pytester: pytest.Pytester, reason: str) -> None:
    result = run(pytester, skipped(skips.NO_GPU, reason), "--strict-skips")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*1 {reason} (--strict-skips: an error)"])


MARKED = "import pytest\n@pytest.mark.skipif(True, reason={!r})\ndef test_it(): pass"
WHOLE_MODULE = "import pytest\npytest.importorskip('no_such_module', reason={!r})"


@pytest.mark.parametrize("source", [MARKED, WHOLE_MODULE], ids=["marked", "module"])
def test_all_ways_to_skip_count(pytester: pytest.Pytester, source: str) -> None:
    result = run(pytester, source.format("later"), "--strict-skips")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*1 later (--strict-skips: an error)"])


HARNESS = "from tests.skips import need_harness\nneed_harness('no_such_package')\ndef test_it(): pass"


def test_a_missing_harness_is_accepted_outside_of_its_environment(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPN_RT_HARNESSES", raising=False)
    result = run(pytester, HARNESS + "\n", "--strict-skips")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"*1 {skips.OTHER_ENVIRONMENT}"])


def test_a_missing_harness_is_an_error_in_its_environment(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPN_RT_HARNESSES", "1")
    result = run(pytester, HARNESS)
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(["*no_such_package is missing*"])


def test_a_failure_stays_one(pytester: pytest.Pytester) -> None:
    source = skipped(skips.NO_GPU) + "\ndef test_wrong(): assert False"
    assert run(pytester, source, "--strict-skips").ret == pytest.ExitCode.TESTS_FAILED
