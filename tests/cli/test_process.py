"""The process around a command: its streams, its imports, and how it ends."""

import io
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxkv.cli import answers
from jaxkv.cli import main as cli
from jaxkv.cli.streams import escaped_output
from jaxkv.runtime.devices import check_devices
from jaxkv.text import inference

GENERATE = ["--no-compilation-cache", "generate", "{tiny}", "--prompt=x"]


@pytest.fixture
def run(tiny):
    """Run a short generation in this process, with whatever streams it has."""

    def main(*flags):
        arguments = [part.format(tiny=tiny) for part in GENERATE]
        return cli.main([*arguments, "--max-new-tokens=2", *flags])

    return main


def test_a_closed_stdout_is_told_of_before_anything_is_computed(
    run, monkeypatch, capsys
):
    monkeypatch.setattr(inference, "generate", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert run() == 2
    assert capsys.readouterr().err == (
        "jaxkv: error: standard output is closed; send it to a file, or to /dev/null.\n"
    )


def test_a_closed_stderr_leaves_the_results_alone(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert run("--json") == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_gets_one_line(run, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run() == 2
        # What could not be written is not tried again at the interpreter's end.
        full.flush()
    assert "error: No space left on device\n" in capsys.readouterr().err


def test_a_reader_that_has_gone(run, monkeypatch, capsys):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert run() == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_stdout_lacks_are_escaped_and_told_of_once(
    run, monkeypatch, capsys, encoding
):
    whole = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    texts = ["naïve 東京", "🙂\N{REPLACEMENT CHARACTER}"]
    monkeypatch.setattr(answers, "_texts", lambda _: texts)
    monkeypatch.setattr(sys, "stdout", whole)
    assert run("--prompt=y") == 0
    whole.flush()
    err = capsys.readouterr().err
    written = whole.buffer.getvalue().decode(encoding)
    naive = "na\\xefve" if encoding == "ascii" else "naïve"
    assert written == f"{naive} \\u6771\\u4eac\n\n\\U0001f642\\ufffd\n"
    said = f"jaxkv: standard output is in {encoding}, which lacks some characters"
    assert err.count("standard output") == err.count(said) == 1
    assert whole.errors == "strict"


def test_another_way_with_such_characters_may_be_chosen(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    with escaped_output() as escaped:
        print("é")
        assert not escaped()
    stream.flush()
    assert stream.buffer.getvalue() == b"?\n"


def test_json_needs_no_escapes(run, monkeypatch, capsys, tiny_lm):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("--json", "--temperature=2", "--max-new-tokens=20") == 0
    assert "standard output" not in capsys.readouterr().err


PLATFORMS = {  # what JAX raises, and what is said of it
    "no plug-in": (AssertionError(), "(its plug-in is not installed)"),
    "no library": (RuntimeError("no libtpu.so\n!"), "(no libtpu.so !)"),
}


@pytest.mark.parametrize(("error", "message"), PLATFORMS.values(), ids=PLATFORMS)
@pytest.mark.parametrize("command", ["generate", "eval", "demo"])
def test_no_device(jaxkv_, tiny, monkeypatch, error, message, command):
    def devices(*_):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax, "default_backend", devices)
    flags = ["--prompt=x"] if command == "generate" else []
    said = jaxkv_.error(command, tiny, *flags)
    assert f"JAX finds no device for JAX_PLATFORMS=cpu {message}; unset" in said
    with pytest.raises(ValueError, match=r"JAX finds no device .* pip install"):
        check_devices()


def test_no_device_while_measuring(jaxkv_, monkeypatch):
    """Every command, also where no model is loaded."""

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(cli, "bench_commands", fail)
    with pytest.raises(AssertionError):
        jaxkv_("bench", "decode")  # a device is there: it is our fault
    monkeypatch.setattr(jax, "devices", fail)
    assert "JAX finds no device" in jaxkv_.error("bench", "decode")


def test_input_is_not_blamed_for_what_jax_refuses(jaxkv_, tiny, monkeypatch):
    def promote(*_, **__):
        jnp.ones(2, jnp.int32) + jnp.ones(2, jnp.float32)

    monkeypatch.setattr(inference, "generate", promote)
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(ValueError, match="no available implicit dtype promotion"),
    ):
        jaxkv_("generate", tiny, "--prompt=x")


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,  # in the repository Python would find the folder, not the package
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_as_a_module_of_python(tmp_path):
    done = python("-m", "jaxkv", "--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("jaxkv ")


def test_a_setting_that_jax_cannot_read(tmp_path):
    done = python("-m", "jaxkv", "--version", cwd=tmp_path, JAX_ENABLE_X64="maybe")
    assert done.returncode == 2
    assert done.stderr.startswith("jaxkv: error: ") and done.stderr.count("\n") == 1
    assert "JAX_ENABLE_X64" in done.stderr


@pytest.mark.parametrize("module", ["jaxkv.text.conversation", "jax", "typer"])
def test_an_interrupt_while_modules_are_imported(tmp_path, module):
    program = f"""
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from jaxkv.__main__ import main
sys.exit(main())
"""
    done = python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


SIGNALS = {  # what a module does while it is imported, as modules in C may
    "it lets the interrupt through": "os.kill(os.getpid(), signal.SIGINT)",
    "it makes another error of it": """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
except KeyboardInterrupt:
    raise ImportError("not loaded")
""",
}


@pytest.mark.parametrize("body", SIGNALS.values(), ids=SIGNALS)
def test_ctrl_c_while_modules_are_imported(tmp_path, body):
    (tmp_path / "typer.py").write_text(f"import os, signal, time\n{body}")
    program = "import sys; from jaxkv.__main__ import main; sys.exit(main())"
    done = python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("error", [ImportError("x"), ModuleNotFoundError("x")])
def test_ctrl_c_while_a_command_imports_more(jaxkv_, tiny, monkeypatch, error):
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr(inference, "generate", interrupted)
    assert jaxkv_("generate", tiny, "--prompt=x") == (130, "", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(inference, "generate", fail)
    with pytest.raises(ImportError, match="x"):
        jaxkv_("generate", tiny, "--prompt=x")


def test_a_closed_descriptor_is_taken_by_nothing_else(tmp_path):
    """Not by a file of results, into which XLA would write its warnings."""
    program = """
import os, sys
os.close(2)
from jaxkv.__main__ import _open_standard_streams
_open_standard_streams()
print(os.open(sys.argv[0] or "results", os.O_CREAT | os.O_RDWR) > 2)
"""
    done = python("-c", program, cwd=tmp_path)
    assert done.stdout == "True\n"
