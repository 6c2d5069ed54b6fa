"""Recipes become settings, mistakes become one line that names setting, value and remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from eagle3.configs import drafting, limits, loader
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that sets little."""
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\n  name: mine\ntrain:\n  epochs: 2\n  clip: 1e-1\n")
    return path


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        loader.load(recipe, overrides)
    return str(refused.value)


def test_defaults_then_recipe_then_command_line(recipe: Path) -> None:
    settings = loader.load(recipe, ["train.epochs=5", "eval.chain=2", "eval.chain=3"])
    expected = Settings()
    assert settings == dataclasses.replace(
        expected,
        run=dataclasses.replace(expected.run, name="mine"),
        train=dataclasses.replace(expected.train, epochs=5, clip=0.1),
        eval=dataclasses.replace(expected.eval, chain=3),
    )


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert loader.load(tmp_path / "empty.yaml") == Settings()
    (tmp_path / "sections.yaml").write_text("train:\neval:\n")
    assert loader.load(tmp_path / "sections.yaml") == Settings()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("draft.fc_norm=true", True),
        ("draft.fc_norm=no", False),
        ("draft.num_heads=8", 8),
        ("draft.num_heads=null", None),
        ("draft.rope_theta=none", None),
        ("run.name=7", "7"),
        ("run.name=true", "true"),
        ("run.name=a: b", "a: b"),
        ("target.revision=1e5", "1e5"),
        ("target.revision=null", None),
        ("target.layers=1,7,12", (1, 7, 12)),
        ("target.layers=[1, 7, 12]", (1, 7, 12)),
        ("target.layers=(1,7)", (1, 7)),
        ("target.layers=null", None),
        ("eval.temperatures=0", (0.0,)),
        ("eval.temperatures=0,1e-1", (0.0, 0.1)),
        ("train.betas=0.9,0.99", (0.9, 0.99)),
        (" train.epochs = 3 ", 3),
        ("eval.beside=chain 7, tree 60/7/10", ("chain 7", "tree 60/7/10")),
        ("eval.beside=[tree 8/2/4]", ("tree 8/2/4",)),
        ("eval.beside=", ()),
    ],
)
def test_overrides_have_the_type_of_their_field(recipe: Path, override: str, value: object) -> None:
    section, key = override.partition("=")[0].strip().split(".")
    found = dataclasses.asdict(loader.load(recipe, [override]))[section][key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "override = train.epochs: it has no value; write section.name=value"),
        ("train.epoch=3", "setting = train.epoch: there is no such setting; did you mean train.epochs?"),
        ("trian.epochs=3", "setting = trian: there is no such section; did you mean train.epochs?"),
        ("epochs=3", "setting = epochs: there is no such section; did you mean train.epochs?"),
        ("draft.learning_rate=3", "there is no such setting; did you mean train.learning_rate?"),
        ("train.xyz=3", "setting = train.xyz: there is no such setting; choose one of ttt_steps, step_decay,"),
        ("train.epochs=true", "train.epochs = true: it is true or false; give a whole number"),
        ("train.epochs=2.0", "train.epochs = 2.0: it is a number; give a whole number"),
        ("train.epochs=null", "train.epochs = null: it is null; give a whole number"),
        ("train.epochs=", "train.epochs = null: it is null; give a whole number"),
        ("train.epochs=[1", "it is a text; give a whole number"),
        ("train.clip=high", "train.clip = high: it is a text; give a number"),
        ("train.clip=false", "train.clip = false: it is true or false; give a number"),
        ("train.clip=nan", "train.clip = nan: it is not finite; give a number"),
        ("train.clip=inf", "train.clip = inf: it is not finite; give a number"),
        ("draft.fc_norm=1", "draft.fc_norm = 1: it is a whole number; give true or false"),
        ("target.layers=a,b", "target.layers = a,b: it is a text; give a whole number"),
        ("train.betas=0.9", "train.betas = 0.9: it has 1 values; give 2"),
    ],
)
def test_overrides_that_cannot_be(recipe: Path, override: str, message: str) -> None:
    assert message in refusal(recipe, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=", 'run.name = "": it is empty'),
        ("run.name=../x", "run.name = ../x: it is no name of a folder"),
        ("run.name=..", "run.name = ..: it is no name of a folder"),
        ("run.seed=-1", "run.seed = -1: -1 makes no sense here; give from 0 to below 2**63"),
        ("target.dtype=float16", "target.dtype = float16: not supported; choose one of float32, bfloat16"),
        ("target.layers=7,1", "target.layers = [7, 1]: layers are named once each, ascending; give [1, 7]"),
        ("target.layers=1,1", "give [1]"),
        ("target.layers=-1,3", "target.layers = [-1, 3]: -1 makes no sense here; give 0 or more"),
        ("target.layers=[]", "target.layers = []: it is empty; give one value or more"),
        ("prepare.train=0", "prepare.train = 0: 0 makes no sense here; give 1 or more"),
        ("regenerate.temperatures=", "regenerate.temperatures = []: it is empty"),
        ("regenerate.temperatures=0,-0.5", "regenerate.temperatures = [0.0, -0.5]: -0.5 makes no sense here"),
        ("eval.temperatures=0,0", "eval.temperatures = [0.0, 0.0]: one stands twice; give each once"),
        ("train.ttt_steps=0", "train.ttt_steps = 0: 0 makes no sense here; give 1 or more"),
        ("train.objective=tv", "train.objective = tv: not supported; choose one of kl, lk"),
        ("train.betas=0.9,1", "train.betas = [0.9, 1.0]: 1.0 makes no sense here; give from 0 to below 1"),
        ("train.warmup=1.5", "give from 0 to 1"),
        ("train.step_decay=0", "give more than 0 and at most 1"),
        ("train.learning_rate=0", "give more than 0"),
        ("eval.chain=0", "eval.chain = 0: 0 makes no sense here; give 1 or more, or auto"),
        ("eval.chain=many", "eval.chain = many: it is a text; give a whole number, or auto"),
        ("eval.chain=2.5", "eval.chain = 2.5: it is a number; give a whole number, or auto"),
        ("eval.chain=null", "eval.chain = null: it is null; give a whole number, or auto"),
        ("train.epochs=auto", "train.epochs = auto: it is a text; give a whole number"),
        ("eval.beside=chain 7, chain 7", "chain 7 stands twice; give each once"),
        ("eval.sampling=beam", "choose one of sampled, greedy"),
        ("eval.engine=vllm", "eval.engine = vllm: not supported; choose one of native, transformers"),
        ("draft.head_dim=7", "draft.head_dim = 7: rotary embeddings turn pairs; give an even number"),
    ],
)
def test_values_that_make_no_sense(recipe: Path, override: str, message: str) -> None:
    assert message in refusal(recipe, override)


def test_heads_are_shared_evenly(recipe: Path) -> None:
    message = "draft.num_kv_heads = 3: it does not divide draft.num_heads = 8; give a divisor"
    assert message in refusal(recipe, "draft.num_heads=8", "draft.num_kv_heads=3")
    assert loader.load(recipe, ["draft.num_kv_heads=3"]).draft.num_kv_heads == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1", "line 1: not YAML: expected ',' or ']', but got '<stream end>'; correct the line"),
        ("run:\n  name: a\n  name: b\n", "line 3: not YAML: name stands twice; correct the line"),
        ("train: {}\nrun: {}\ntrain: {}\n", "line 3: not YAML: train stands twice; correct the line"),
        ("train:\n\tepochs: 3\n", "line 2: not YAML: found character"),
        ("- train\n", "it has no sections; write sections of settings: run, target,"),
        ("train: 3\n", "train = 3: a section holds settings; write them indented under its name"),
        ("train.epochs: 3\n", "recipe = train.epochs: YAML nests settings; write epochs indented under train"),
        ("trian:\n  epochs: 3\n", "setting = trian: there is no such section; did you mean train?"),
        ("train:\n  epoch: 3\n", "setting = train.epoch: there is no such setting; did you mean train.epochs?"),
        ("run:\n  name: 3\n", "run.name = 3: it is a whole number; give a text, in quotes"),
        ("train:\n  epochs: '3'\n", "it is a text; give a whole number"),
        ("eval:\n  temperatures: 0.7\n", "eval.temperatures = 0.7: it is a number; give a list, such as [0.5]"),
        ("eval:\n  temperatures: [true]\n", "eval.temperatures = [true]: it is true or false; give a number"),
        ("run:\n  name: \xff\n", "give a YAML file in UTF-8"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert message in refusal(path)


def test_recipes_are_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loader.load("tiny").run.name == "tiny"
    (tmp_path / "tiny").write_text("run: {name: local}")
    assert loader.load("tiny").run.name == "local"
    assert "recipe = big: there is no such file; give a YAML file, or a recipe that ships:" in refusal(Path("big"))
    assert "overrides come after the recipe" in refusal(Path("run.name=a"))
    (tmp_path / "run").mkdir()
    assert "recipe = run: it is a folder; give a YAML file" in refusal(Path("run"))
    (tmp_path / "run" / "config.yaml").touch()
    assert "recipe = run: it is a folder; give run/config.yaml" in refusal(Path("run"))


def test_what_is_saved_loads_again_as_the_same(recipe: Path, tmp_path: Path) -> None:
    odd = ["run.name=007", "target.layers=1,2", "train.learning_rate=1e-7", "target.revision=null", "run.root=a b #c"]
    settings = loader.load(recipe, [*odd, "prepare.prompts=données: ü.jsonl"])
    loader.save(settings, tmp_path / "config.yaml")
    assert loader.load(tmp_path / "config.yaml") == settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "recipe.yaml"]
    assert "  layers: [1, 2]\n" in (tmp_path / "config.yaml").read_text()


def test_every_setting_is_explained() -> None:
    described = [setting for section in loader.describe().values() for setting in section]
    assert [setting.name for setting in described] == [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Settings)
        for key in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    ]
    assert all(setting.text.endswith(".") for setting in described)
    warmup = next(setting for setting in described if setting.name == "train.warmup")
    assert warmup == ("train.warmup", "float", "0.03", warmup.text)
    assert warmup.text.startswith("Share of the steps")


def test_every_limit_and_choice_belongs_to_a_setting() -> None:
    names = {setting.name for section in loader.describe().values() for setting in section}
    assert limits.LIMITS.keys() | limits.CHOICES.keys() <= names
    numbers = {
        setting.name
        for section in loader.describe().values()
        for setting in section
        if setting.type.startswith(("int", "float", "tuple[int", "tuple[float"))
    }
    assert numbers == limits.LIMITS.keys()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("tree 60", '[tree 60]: "tree 60" is no drafting; write chain K, or tree TOTAL/DEPTH/TOP_K, such as tree 60/7/10'),
        ("chain 7, forest 9/3/3", '[chain 7, forest 9/3/3]: "forest 9/3/3" is no drafting; write chain K'),
        ("7", "eval.beside = 7: it is a whole number; give a text"),
        ("chain -1", '"chain -1" is no drafting'),
        ("chain 7/2/2", '"chain 7/2/2" is no drafting'),
        ("tree 60/7/10/2", '"tree 60/7/10/2" is no drafting'),
        ("chain 0", '"chain 0" has a 0 in it; write chain K'),
        ("tree 0/0/3", '"tree 0/0/3" has a 0 in it'),
        ("tree 6/3/0", '"tree 6/3/0" has a 0 in it'),
        ("tree 6/7/10", '"tree 6/7/10" verifies fewer nodes than it has levels'),
        ("tree 9/3/3,tree 09/3/3", "tree 9/3/3 stands twice, eval.chain = 5 counted; give each once"),
        ("chain 7,chain 5", "chain 5 stands twice, eval.chain = 5 counted; give each once"),
    ],
)  # fmt: skip
def test_draftings_beside_the_chain(recipe: Path, given: str, complaint: str) -> None:
    said = refusal(recipe, "eval.chain=5", f"eval.beside={given}")
    assert said.startswith("eval.beside = ") and complaint in said
    assert "\n" not in said


@pytest.mark.parametrize("given", ["auto", "3"])
def test_a_chain_is_a_number_or_chosen(recipe: Path, tmp_path: Path, given: str) -> None:
    settings = loader.load(recipe, [f"eval.chain={given}"])
    assert settings.eval.chain == (given if given == "auto" else 3)
    assert settings.eval.fixed_chain == (5 if given == "auto" else 3)
    loader.save(settings, tmp_path / "saved.yaml")
    assert loader.load(tmp_path / "saved.yaml") == settings
    assert loader.load(recipe, ["eval.chain=auto", "eval.beside=chain 5"]).eval.beside == ("chain 5",)


def test_draftings_beside_a_choice_are_each_there_once() -> None:
    assert [found.name for found in drafting.chosen(3, ["chain 7"])] == ["chain 3", "chain 5", "chain 7"]
    assert [found.name for found in drafting.chosen(5, ["chain 5", "chain 7"])] == ["chain 5", "chain 7"]
    assert [found.name for found in drafting.chosen(7, ["chain 7"])] == ["chain 7", "chain 5"]
    assert [found.name for found in drafting.chosen(0, ["tree 9/3/3"])] == ["none", "chain 5", "tree 9/3/3"]
    for length in range(drafting.LONGEST + 1):
        needed = set(drafting.chosen(length, ["chain 9"])) - {drafting.PLAIN}
        assert needed <= set(drafting.candidates(["chain 9"]))


def test_only_the_native_engine_verifies_trees(recipe: Path) -> None:
    assert loader.load(recipe, ["eval.engine=transformers", "eval.beside=chain 7"]).eval.beside == ("chain 7",)
    assert refusal(recipe, "eval.engine=transformers", "eval.beside=chain 7, tree 60/7/10") == (
        "eval.beside = [chain 7, tree 60/7/10]: transformers (eval.engine) cannot verify a tree 60/7/10; leave trees out, "
        "or set eval.engine=native"
    )


def test_draftings_are_what_their_names_say() -> None:
    assert drafting.named(5, ["chain  7", " tree 60/7/10 "]) == (
        ("chain", 5, None, 1),
        ("chain", 7, None, 1),
        ("tree", 7, 60, 10),
    )
    assert [found.name for found in drafting.named(5, ["tree 060/7/10"])] == ["chain 5", "tree 60/7/10"]
    assert [found.most for found in drafting.named(5, ["tree 60/7/10"])] == [5, 60]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            "node1:8000",
            r'endpoints = \[node1:8000\]: "node1:8000" is no address of a server; give addresses, such as http',
        ),
        ("http://", '"http://" is no address'),
        ("http://node1:8000a/v1", '"http://node1:8000a/v1" is no address'),
        ('"http://node1: 8000"', '"http://node1: 8000" is no address'),
        ("http://a,http://a", r"endpoints = \[http://a, http://a\]: http://a stands twice; give each once"),
    ],
)
@pytest.mark.parametrize("section", ["regenerate", "record"])
def test_endpoints_are_addresses(section: str, given: str, complaint: str) -> None:
    name = f"{section}.endpoints"
    settings = loader.load("tiny", [f'{name}=http://a:1,https://b/v1,"http://[::1]:8000/"'])
    assert dataclasses.asdict(settings)[section]["endpoints"] == ("http://a:1", "https://b/v1", "http://[::1]:8000/")
    assert dataclasses.asdict(loader.load("tiny", [f"{name}="]))[section]["endpoints"] == ()
    with pytest.raises(UserError, match=f"{section}.*{complaint}"):
        loader.load("tiny", [f"{name}={given}"])
