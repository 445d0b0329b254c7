"""Report, demo and comparison open no port and ask nobody for anything."""

from __future__ import annotations

import socket

import pytest

from benchmarks.fuzz.run_files import sound_file
from gradsplit.cli import main


class Refused(AssertionError):
    """Somebody has reached for the network."""


@pytest.fixture
def no_network(monkeypatch):
    """Any use of an internet socket, or of names and addresses, fails and is remembered."""
    asked = []

    def refuse(name):
        def call(*words, **_):
            asked.append((name, words[1:]))
            raise Refused(f"{name}{words[1:]}")

        return call

    for name in ("bind", "connect", "connect_ex", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(name), raising=True)
    for name in ("create_connection", "create_server", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse(name))
    return asked


def _run(*words):
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert not end.value.code


def test_the_fixture_notices(no_network):
    with pytest.raises(Refused):
        socket.create_connection(("localhost", 9))
    with socket.socket() as made, pytest.raises(Refused):
        made.bind(("", 0))
    assert [name for name, _ in no_network] == ["create_connection", "bind"]


def test_the_report_opens_no_port_and_fetches_nothing(no_network, tmp_path, capsys):
    (tmp_path / "run.db").write_bytes(sound_file())
    _run("report", str(tmp_path / "run.db"))
    assert (tmp_path / "run.html").stat().st_size > 10_000
    assert no_network == [] and "Page:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_opens_no_port_and_fetches_nothing(no_network, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="not run: scikit-learn is not installed, whose digits the demo shows")
    monkeypatch.setenv("COLUMNS", "200")
    _run("demo", "--quick", "--jobs", "1", "--out", str(tmp_path))
    assert (tmp_path / "demo.html").is_file() and "wrote" in capsys.readouterr().out
    # The worker process tells its progress through a pipe of its own machine.
    assert [call for call in no_network if not _is_local(call)] == []


def _is_local(call):
    _, words = call
    return bool(words) and isinstance(words[0], (str, bytes))  # the path of a Unix socket, no address
