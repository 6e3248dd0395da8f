"""Settings files: what they give, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmforge.errors import SettingsError
from llmforge.settings import SECTIONS, BenchSettings, BuildSettings, ConvertSettings, RunSettings
from llmforge.settings_reading import check_target_options, load_yaml, merge

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    project = load_yaml(
        write(
            tmp_path,
            """
            model: some/model
            workdir: work/here
            convert: {dtype: float16}
            build: {tensor_parallel: 2, memory_limit_gb: 3}
            run: {temperature: 1, stop: [a, b], prompt: one, top_k: null}
            bench: {batch_size: [1, 8]}
            """,
        )
    )
    assert project.model == "some/model"
    assert (project.checkpoint, project.engine) == (
        Path("work/here/checkpoint"),
        Path("work/here/engine"),
    )
    sections = project.sections
    assert merge(ConvertSettings, sections["convert"]) == ConvertSettings(dtype="float16")
    build = merge(BuildSettings, sections["build"])
    assert build == BuildSettings(tensor_parallel=2, memory_limit_gb=3.0)
    assert type(build.memory_limit_gb) is float
    run = merge(RunSettings, sections["run"])
    assert run == RunSettings(temperature=1.0, stop=("a", "b"), prompt=("one",))
    assert merge(BenchSettings, sections["bench"]).batch_size == (1, 8)


@pytest.mark.parametrize("text", ["", "# nothing\n", "build:\n"])
def test_everything_may_be_left_out(tmp_path: Path, text: str) -> None:
    project = load_yaml(write(tmp_path, text))
    assert project.model is project.workdir is project.checkpoint is project.engine is None
    assert merge(BuildSettings, project.sections.get("build", {})) == BuildSettings()


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "{model: ~/m, workdir: ~/w, build: {timing_cache: ~/t}, run: {prompt: ~/p, prompts: ~/f}}"
    )
    project = load_yaml(write(tmp_path, text))
    assert (project.model, project.workdir) == ("/home/me/m", "/home/me/w")
    assert project.sections["build"]["timing_cache"] == "/home/me/t"
    assert merge(RunSettings, project.sections["run"]).prompts == "/home/me/f"
    assert project.sections["run"]["prompt"] == ("~/p",), "a text, no path"


def test_random_weights(tmp_path: Path) -> None:
    text = "model: {from_config: c.json, random_weights: true, seed: 3}"
    project = load_yaml(write(tmp_path, text))
    assert (project.model, project.from_config, project.seed) == (None, "c.json", 3)


def test_later_layers_win() -> None:
    merged = merge(
        BuildSettings,
        {"tensor_parallel": 2, "max_batch_size": 4, "overwrite": True},
        {"tensor_parallel": 8, "max_batch_size": None, "overwrite": False},
    )
    assert merged == BuildSettings(tensor_parallel=8, max_batch_size=4, overwrite=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown key modle; did you mean model?"),
        ("biuld: {}", "unknown key biuld; did you mean build?"),
        ("zzz: 1", "unknown key zzz; known: model, workdir, convert, build, run, bench"),
        (
            "build: {tensor_paralel: 2}",
            "unknown key build.tensor_paralel; did you mean build.tensor_parallel?",
        ),
        ("run: {tempature: 2}", "did you mean run.temperature?"),
        ("model: {from_confg: x}", "did you mean model.from_config?"),
        ("build: {1: 2}", "unknown key build.1"),
        (
            "build: {tensor_parallel: 0}",
            "build.tensor_parallel must be a whole number of at least 1, not 0",
        ),
        (
            "build: {tensor_parallel: true}",
            "build.tensor_parallel must be a whole number of at least 1, not True",
        ),
        ("build: {tensor_parallel: 2.0}", "not 2.0"),
        ("build: {tensor_parallel: null}", "not None"),
        ("build: {tensor_parallel: [2]}", "not [2]"),
        ("build: {overwrite: 1}", "build.overwrite must be true or false, not 1"),
        ("run: {top_p: 1.5}", "run.top_p must be a number from 0 to 1, not 1.5"),
        ("run: {temperature: .nan}", "run.temperature must be a number of at least 0, not nan"),
        ("run: {temperature: .inf}", "not inf"),
        ("run: {temperature: warm}", "not 'warm'"),
        ("run: {stop: [a, 1]}", "run.stop must be text, not 1"),
        ("bench: {batch_size: [1, 0]}", "bench.batch_size must be a whole number of at least 1"),
        (
            "convert: {dtype: int8}",
            "convert.dtype must be one of bfloat16, float16, float32, not 'int8'",
        ),
        ("build: 3", "build must hold `key: value` lines, not 3"),
        ("- a", "it must hold `key: value` lines, not ['a']"),
        ("model: 7", "model must be text, not 7"),
        ("workdir: ''", "workdir must be text, not ''"),
        ("model: {from_config: x}", "random_weights: true"),
        ("model: {from_config: x, random_weights: true, seed: -1}", "model.seed must be"),
        ("build: {block_size: 1}\nbuild: {}", "line 2: build is given twice"),
        ("build:\n  block_size: 1\n  block_size: 2", "line 3: block_size is given twice"),
        ("build: {block_size: 1", "not valid YAML"),
        ("? [a]\n: b", "a key must be a word"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_yaml(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read: No such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_yaml(tmp_path / "binary")


def test_options_are_checked_like_files() -> None:
    with pytest.raises(SettingsError, match=r"^--top-p must be a number from 0 to 1, not 2\.0$"):
        merge(RunSettings, {"top_p": 2.0})


def test_lists_may_be_given_in_one_text(tmp_path: Path) -> None:
    expected = ("sm_89", "sm_90", "sm_120")
    given: list[str | tuple[str, ...] | list[str]]
    given = ["sm_89, sm_90,sm_120", ("sm_89,sm_90", "sm_120"), list(expected)]
    for value in given:
        assert merge(BuildSettings, {"arch": value}).arch == expected
    project = load_yaml(write(tmp_path, "build: {arch: 'sm_89,sm_90,sm_120'}"))
    assert project.sections["build"]["arch"] == expected
    assert merge(RunSettings, {"stop": ["a,b"]}).stop == ("a,b",), "a stop text keeps its commas"


def test_an_option_is_for_the_targets_that_read_it() -> None:
    check_target_options(BuildSettings(arch=("sm_90",)), "cuda")
    check_target_options(BuildSettings(), "cpu")
    check_target_options(BuildSettings(primitives=False, arch=()), "cpu")
    for option in ({"arch": ("sm_90",)}, {"workspace_gb": 1.0}, {"primitives": True}):
        with pytest.raises(SettingsError, match=r"^the target cpu has no option --[a-z-]+; it is"):
            check_target_options(BuildSettings(**option), "cpu")
    with pytest.raises(SettingsError, match=r"--block-size; it is for cpu, cuda$"):
        check_target_options(BuildSettings(block_size=32), "tensorrt")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    project = load_yaml(path)
    assert project.workdir is not None
    for name, section in SECTIONS.items():
        merge(section, project.sections.get(name, {}))
    for named in (project.from_config, project.model if "examples" in str(project.model) else None):
        assert named is None or (ROOT / named).exists()


def test_configs_are_shipped() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "example",
        "llama-3.1-8b-tp2",
        "bench-qwen2.5-0.5b",
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As published with the models.
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
    ],
)
def test_shipped_models(name: str, parameters: int) -> None:
    from llmforge.checkpoint.families import read_config
    from llmforge.checkpoint.store import num_parameters

    path = ROOT / "configs" / "models" / f"{name}.json"
    assert path in MODELS and json.loads(path.read_text())
    assert num_parameters(read_config(path)[1]) == parameters
