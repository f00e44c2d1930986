"""Finding a checkpoint: a folder here, or a model of the Hub."""

import codecs

import huggingface_hub
import pytest
from hf_checkpoints import raises
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from jaxkv.models.checkpoint import check_adapter, read_json, read_text, resolve


def hub(monkeypatch, answer):
    """Replace the download; return the list of calls."""
    calls = []

    def download(name, **options):
        calls.append((name, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_an_existing_folder_wins(tmp_path, monkeypatch):
    calls = hub(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve("owner/name").samefile(tmp_path / "owner/name")
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"
    assert not calls


def test_hub_id(tmp_path, monkeypatch):
    calls = hub(monkeypatch, tmp_path)
    assert resolve("owner/name", "v1") == tmp_path
    ((name, options),) = calls
    assert (name, options["revision"]) == ("owner/name", "v1")


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("config.json", True),
        ("model.safetensors.index.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("original/consolidated.00.pth", False),
        ("original/params.json", False),
        ("onnx/config.json", False),
        ("model.gguf", False),
    ],
)
def test_what_is_downloaded(tmp_path, monkeypatch, file, wanted):
    calls = hub(monkeypatch, tmp_path)
    resolve("owner/name")
    options = calls[0][1]
    del options["revision"]
    assert list(huggingface_hub.utils.filter_repo_objects([file], **options)) == (
        [file] if wanted else []
    )


def http_error(kind):
    """Make an error of the Hub client without a request."""
    error = kind.__new__(kind)
    Exception.__init__(error, "says the server")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(hub_errors.GatedRepoError), ["gated", "hf auth login"]),
        (http_error(hub_errors.RepositoryNotFoundError), ["no such model"]),
        (http_error(hub_errors.RevisionNotFoundError), ["no revision='v1'"]),
        (hub_errors.LocalEntryNotFoundError("x"), ["not in the Hub cache"]),
        (hub_errors.OfflineModeIsEnabled("x"), ["cannot be reached"]),
        (http_error(hub_errors.HfHubHTTPError), ["HfHubHTTPError: says the server"]),
        (RuntimeError("x"), ["the Hub failed: RuntimeError: x"]),
    ],
)
def test_hub_errors(monkeypatch, error, words):
    hub(monkeypatch, error)
    with raises("'owner/name' is not a folder here", *words):
        resolve("owner/name", "v1")


def test_hub_offline_and_not_cached(tmp_path, monkeypatch):
    """The real client, which conftest takes offline."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with raises("'owner/name'", "not in the Hub cache"):
        resolve("owner/name")


@pytest.mark.parametrize("name", ["./absent", "/absent/x", "a/b/c", "", "a b/c"])
def test_neither_folder_nor_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "":  # not the working folder, which nobody asked for
        with raises("the name of the checkpoint is empty"):
            resolve(name)
        return
    with raises(repr(name), "neither an existing folder nor a Hub id"):
        resolve(name)


def test_resolve_refuses_files_and_revisions_of_folders(tmp_path):
    (tmp_path / "config.json").touch()
    with raises("config.json is a file"):
        resolve(tmp_path / "config.json")
    with raises("revision='v1'", "is a folder"):
        resolve(tmp_path, "v1")


def test_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert read_text(path) == '{"a": 1}'


def test_text_that_cannot_be_read(tmp_path):
    with raises("absent cannot be read", "a checkpoint folder has it"):
        read_text(tmp_path / "absent")
    (tmp_path / "text").write_bytes(b"\xff")
    with raises("text is not UTF-8 text", "fetch the file again"):
        read_text(tmp_path / "text")


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    "files",
    [ADAPTER, (*ADAPTER, "config.json"), (*ADAPTER, "model.safetensors"), ADAPTER[:1]],
)
def test_only_an_adapter(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text('{"base_model_name_or_path": "owner/base"}')
    with raises("holds only an adapter of owner/base", "merge_and_unload"):
        check_adapter(tmp_path)
    (tmp_path / ADAPTER[0]).write_text("{}")
    with raises("holds only an adapter; merge"):
        check_adapter(tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "model-1-of-2.safetensors"])
def test_an_adapter_beside_a_full_checkpoint(tmp_path, caplog, weights):
    for name in ("config.json", weights):
        (tmp_path / name).write_text("{}")
    check_adapter(tmp_path)
    assert not caplog.records
    (tmp_path / ADAPTER[0]).write_text("{}")
    check_adapter(tmp_path)
    assert "the adapter is not applied" in caplog.text
