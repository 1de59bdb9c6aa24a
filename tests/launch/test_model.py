"""Checkpoints that are damaged, cut short or another model's: one sentence that names the file, never a plan."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from golden_plans import HERE
from hypothesis import strategies
from telling import refused

from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120_launch.checks_checkpoint import checkpoint_checks
from sglang_sm120_launch.model import INDEX, Model, shard_header
from sglang_sm120_reference.write import drafter_of, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_flags")
TWO = str(HERE / "machines" / "2x-rtx-pro-6000.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "small", shard_bytes=1 << 22)


def _checkpoint(change: Callable[[Path], object]) -> Callable[[Path, Path], list[str]]:
    def damaged(checkpoint: Path, folder: Path) -> list[str]:
        copy = folder / "model"
        copy.mkdir()
        for file in checkpoint.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        change(copy)
        return ["--model", str(copy)]

    return damaged


def _edit(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content |= values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _null(folder: Path, key: str) -> None:
    """A key of config.json that is there and null."""
    content = json.loads((folder / "config.json").read_text()) | {key: None}
    (folder / "config.json").write_text(json.dumps(content))


def _cut(folder: Path, count: int) -> None:
    """An index that keeps its first tensors."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(list(places.items())[:count])}))


def _header(folder: Path, change: Callable[[Any], object]) -> None:
    """The first file with another header, which says its own length rightly."""
    data = _shard(folder).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    made = json.dumps(change(json.loads(data[8:size]))).encode()
    _shard(folder).write_bytes(len(made).to_bytes(8, "little") + made + data[size:])


MODEL_MISTAKES: dict[str, tuple[Callable[[Path, Path], list[str]], tuple[str, ...]]] = {
    "another model": (_checkpoint(_edit("config.json", model_type="llama")), ("llama", "deepseek_v4")),
    "a key of config.json missing": (_checkpoint(_edit("config.json", o_groups=None)), ("lacks o_groups",)),
    "no config.json": (_checkpoint(lambda folder: (folder / "config.json").unlink()), ("no config.json",)),
    "config.json is no JSON": (_checkpoint(lambda folder: (folder / "config.json").write_text("{")), ("not JSON",)),
    "a missing shard": (_checkpoint(lambda folder: _shard(folder).unlink()), ("00001-of", "missing")),
    "half a shard": (
        _checkpoint(lambda folder: _shard(folder).write_bytes(_shard(folder).read_bytes()[:100000])),
        ("100000 bytes",),
    ),
    "an empty shard": (_checkpoint(lambda folder: _shard(folder).write_bytes(b"")), ("no readable",)),
    "an index without a map": (_checkpoint(_edit(INDEX, weight_map=None)), ("no weight_map",)),
    "an index that is a list": (
        _checkpoint(lambda folder: (folder / INDEX).write_text("[]")),
        (INDEX, "no JSON object"),
    ),
    "a map that is a list": (_checkpoint(_edit(INDEX, weight_map=["a"])), (INDEX, "no weight_map")),
    "a map of numbers": (_checkpoint(_edit(INDEX, weight_map={"a": 1})), (INDEX, "no weight_map")),
    "an empty map": (_checkpoint(_edit(INDEX, weight_map={})), (INDEX, "no weight_map")),
    "five tensors": (
        _checkpoint(lambda folder: _cut(folder, 5)),
        (INDEX, "does not have", "tensors of the files"),
    ),
    "a tensor fewer": (_checkpoint(lambda folder: _cut(folder, -1)), (INDEX, "1 tensors of the files")),
    "a header that is a list": (_checkpoint(lambda folder: _header(folder, lambda _: [])), ("00001-of", "download")),
    "a header of numbers": (_checkpoint(lambda folder: _header(folder, lambda _: {"a": 1})), ("00001-of", "download")),
    "an entry without offsets": (
        _checkpoint(lambda folder: _header(folder, lambda h: {n: {"dtype": "I8"} for n in h})),
        ("00001-of", "no readable", "download it again"),
    ),
    "offsets that are words": (
        _checkpoint(
            lambda folder: _header(folder, lambda h: {n: e | {"data_offsets": ["0"] * 2} for n, e in h.items()})
        ),
        ("00001-of", "no readable", "download it again"),
    ),
    "a header longer than the file": (
        _checkpoint(lambda folder: _shard(folder).write_bytes(b"\xff" * 64)),
        ("00001-of", "no readable"),
    ),
    "a number as a string": (
        _checkpoint(_edit("config.json", hidden_size="256")),
        ("config.json", "size='256'"),
    ),
    "a switch for a number": (
        _checkpoint(_edit("config.json", vocab_size=True)),
        ("vocab_size=True", "download"),
    ),
    "ratios that are null": (
        _checkpoint(lambda folder: _null(folder, "compress_ratios")),
        ("config.json", "ratios=None", "download"),
    ),
    "rotation that is null": (_checkpoint(lambda folder: _null(folder, "rope_scaling")), ("rope_scaling=None",)),
    "a config in UTF-16": (
        _checkpoint(lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text(), "utf-16")),
        ("config.json", "not JSON", "download it again"),
    ),
    "an index in UTF-16": (
        _checkpoint(lambda folder: (folder / INDEX).write_text((folder / INDEX).read_text(), "utf-16")),
        (INDEX, "not JSON"),
    ),
    "no quantisation": (
        _checkpoint(_edit("config.json", quantization_config=None)),
        ("config None", "fp8"),
    ),
    "another quantisation": (
        _checkpoint(_edit("config.json", quantization_config={"quant_method": "awq"})),
        ("'awq'", "published"),
    ),
    "other experts": (_checkpoint(_edit("config.json", expert_dtype="fp8")), ("expert_dtype='fp8'", "published")),
    "an expert more": (
        _checkpoint(_edit("config.json", n_routed_experts=17)),
        ("differs from its config.json", "nothing, needed F8_E8M0 [256, 8]"),
    ),
    "wider experts": (
        _checkpoint(_edit("config.json", moe_intermediate_size=512)),
        ("differs from its config.json", "experts.0.w1"),
    ),
    "no model": (lambda checkpoint, folder: [], ("--model",)),
    "neither directory nor known": (lambda checkpoint, folder: ["--model", "nobody/nothing"], ("nobody/nothing",)),
    "no name at all": (lambda checkpoint, folder: ["--model", "a b c//"], ("a b c//",)),
}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_in_the_model(mistake: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing is planned for what cannot be served."""
    damage, parts = MODEL_MISTAKES[mistake]
    sentence = refused(["plan", "--machine", TWO, *damage(checkpoint, tmp_path)], capsys)
    assert all(part in sentence for part in parts), sentence
    if (folder := tmp_path / "model").is_dir():
        findings = {finding.name: finding.status for finding in checkpoint_checks(folder)}
        assert "fail" in findings.values(), "doctor --model sees it too"


SAME_BYTES = (
    ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), ("BF16", "F16", "I16", "U16"), ("F32", "I32", "U32"),
)  # fmt: skip
TINY = {
    "hidden_size": 128, "num_hidden_layers": 3, "compress_ratios": (0, 4, 128, 0), "num_hash_layers": 1,
    "n_routed_experts": 6, "moe_intermediate_size": 128, "vocab_size": 512,
}  # fmt: skip
"""With a layer of each kind, and an MTP layer."""


def _same(name: str, dtype: str, other: str) -> bool:
    """Whether a tensor may have another dtype of its size: SGLang copies the bits, or converts."""
    drafts = name.startswith("mtp.")
    return dtype == other or {dtype, other} == {"I8", "U8"} or drafts and {dtype, other} == {"BF16", "F16"}


def _changes(name: str, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A tensor's entry with another dtype, and with another shape, of the same bytes."""
    [kinds] = [kinds for kinds in SAME_BYTES if entry["dtype"] in kinds]
    yield from ({"dtype": other} for other in kinds if not _same(name, entry["dtype"], other))
    shape = entry["shape"]
    if shape[::-1] != shape:
        yield {"shape": shape[::-1]}
    if math.prod(shape) > 1:
        yield {"shape": [1, *shape]}


@contextmanager
def _changed(file: Path, name: str, change: dict[str, Any]) -> Iterator[None]:
    """A file with one tensor's entry changed."""
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header[name] |= change
    made = json.dumps(header).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + data[size:])
    try:
        yield
    finally:
        file.write_bytes(data)


@pytest.fixture(scope="module", params=["MXFP4", "NVFP4", "DSpark"])
def tensors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of a plan, and the file whose tensors it needs."""
    config = ReferenceConfig(**TINY, nvfp4_experts=request.param == "NVFP4")  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("tensors") / "model"
    drafts = request.param == "DSpark"
    write_checkpoint(folder, config, dspark=drafter_of(config, (0, 2)) if drafts else None)
    [file] = (folder / "dspark" if drafts else folder).glob("*.safetensors")
    return ["plan", "--machine", TWO, "--model", str(folder), *(["--dspark"] if drafts else [])], file


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=strategies.data())
def test_a_tensor_of_another_dtype_or_shape(
    tensors: tuple[list[str], Path], data: strategies.DataObject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each has as many bytes as before: refused by its name with what it is and what is needed, and nothing written."""
    words, file = tensors
    header = shard_header(file)
    # Of equal experts one, so that the others are drawn as often.
    names = [name for name in sorted(header) if not re.search(r"\.experts\.[1-9]", name)]
    name = data.draw(strategies.sampled_from(names))
    change = data.draw(strategies.sampled_from(list(_changes(name, header[name]))))
    with _changed(file, name, change):
        sentence = refused([*words, "--write", str(tmp_path / "files"), "--format", "compose"], capsys)
        [finding] = checkpoint_checks(Path(words[4]))
    was, now = (f"{one['dtype']} {one['shape']}" for one in (header[name], header[name] | change))
    assert " in 1 of " in sentence and f"(first {name}: {now}, needed {was}): use the published" in sentence
    assert not (tmp_path / "files").exists()
    assert finding.status == "fail" and finding.do, "doctor --model sees it too"


def test_a_tensor_that_sglang_takes_all_the_same(tensors: tuple[list[str], Path]):
    """Bits under another name, floats of a drafter, one value of any shape."""
    words, file = tensors
    seen = set()
    for name, entry in shard_header(file).items():
        [kinds] = [kinds for kinds in SAME_BYTES if entry["dtype"] in kinds]
        changes: list[dict[str, Any]] = [{"dtype": dtype} for dtype in kinds if _same(name, entry["dtype"], dtype)]
        changes += [{"shape": shape} for shape in ([], [1], [1, 1]) if math.prod(entry["shape"]) == 1]
        for change in changes:
            kind = (name.rpartition(".")[2], *map(str, change.values()))
            if change["dtype" if "dtype" in change else "shape"] not in entry.values() and kind not in seen:
                seen.add(kind)
                with _changed(file, name, change):
                    assert Model.load(words[4]).with_dspark().tensors
    assert seen


def test_tensors_of_a_layer_that_the_config_does_not_have(
    tensors: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
):
    """A config.json of another release, with a layer less: SGLang would leave the last one out and serve the rest."""
    words, _ = tensors
    file = Path(words[4], "config.json")
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}))
    try:
        said = "tensors of layers or experts that its config.json does not have (first layers.2."
        assert said in refused(words, capsys)
        [finding] = checkpoint_checks(Path(words[4]))
    finally:
        file.write_text(text)
    assert finding.status == "fail"


def test_bytes_that_are_not_those_of_the_shape(tensors: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]):
    words, file = tensors
    name, entry = next((name, one) for name, one in shard_header(file).items() if len(one["shape"]) == 2)
    with _changed(file, name, {"shape": [entry["shape"][0], 1]}):
        assert f"no readable safetensors header (the entry of {name}): download it again." in refused(words, capsys)
