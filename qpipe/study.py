"""A study: one typed YAML file from which every run follows.

A study names a corpus, a tokenizer, a ladder of sizes, token budgets, representations and seeds; its runs are the full
product of the four lists, plus what `include` adds, minus what `exclude` removes. Everything else about a run comes
from the ladder's recipe. Settings that do not change a run's result (laws, fit options, W&B) stand beside them and
never enter a run's identity.

Validation reports every mistake at once: unknown keys with the nearest valid one, wrong types, unknown sizes,
recipes and representations, missing corpus files, rules that match nothing.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from qpipe.corpus_config import CorpusConfig, TokenizerConfig, corpus_identity
from qpipe.errors import QpipeError
from qpipe.finetune_config import Finetune, Ground, finetuned_runs
from qpipe.formats import Representation, resolve
from qpipe.identity import digest
from qpipe.ptq_config import Ptq
from qpipe.recipe import Recipe, Rung, get_recipe
from qpipe.runs import Run
from qpipe.study_errors import explain
from qpipe.study_parts import (
    CustomSize,
    FitOptions,
    Ladder,
    Law,
    RepresentationEntry,
    Rule,
    Size,
    Strict,
    Wandb,
)
from qpipe.yaml_files import parse_yaml, read_yaml


class Study(Strict):
    """The whole study file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name of the study: folder, W&B group")
    description: str = Field(default="", description="a sentence for the report")
    corpus: CorpusConfig = Field(description="where the text comes from")
    tokenizer: TokenizerConfig = Field(description="how text becomes tokens")
    ladder: Ladder = Field(description="how sizes become shapes and training policies")
    sizes: list[Size] = Field(min_length=1, description="sizes, by the recipe's names or spelled out")
    tokens_per_parameter: list[float] | None = Field(
        default=None, min_length=1, description="token budgets per nominal parameter; either this or `tokens`"
    )
    tokens: list[int] | None = Field(default=None, min_length=1, description="token budgets as counts")
    representations: list[RepresentationEntry] = Field(
        min_length=1, description="representations: preset names or inline compositions with a `name`"
    )
    default_method: str = Field(default="quest", description="method meant by plain names such as w4 or w4a4")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1, description="seeds")
    include: list[Rule] = Field(default=[], description="further runs: keys left out take the study's values")
    exclude: list[Rule] = Field(default=[], description="runs to leave out")
    finetune: list[Finetune] = Field(
        default=[], description="families of finetuned runs: dense first, compressed later"
    )
    ptq: Ptq | None = Field(default=None, description="dense runs quantized after training")
    laws: list[Law] = Field(default=[Law(law="compression")], description="laws to fit, by name or spelled out")
    fit: FitOptions = Field(default=FitOptions(), description="options of the fits")
    wandb: Wandb = Field(default=Wandb(), description="experiment tracking")

    @field_validator("finetune", mode="before")
    @classmethod
    def _single_family_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value

    @field_validator("laws", mode="before")
    @classmethod
    def _law_names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"law": entry} if isinstance(entry, str) else entry for entry in value]

    @property
    def recipe(self) -> Recipe:
        """The ladder's recipe with this study's changes and further sizes."""
        ladder = self.ladder
        recipe = get_recipe(ladder.recipe, ladder.version)
        changed = {
            key: value
            for key in ("context", "batch_sequences", "precision", "schedule")
            if (value := getattr(ladder, key)) is not None
        }
        custom = {s.name: Rung(**s.model_dump(exclude={"name"})) for s in self.sizes if isinstance(s, CustomSize)}
        return recipe.model_copy(update={**changed, "rungs": {**recipe.rungs, **custom}})

    @property
    def size_names(self) -> list[str]:
        """Labels of the sizes."""
        return [size if isinstance(size, str) else size.name for size in self.sizes]

    def resolved_representations(self) -> dict[str, Representation]:
        """The study's representations by name (error: two names for one composition, one name twice)."""
        resolved = [resolve(entry, default_method=self.default_method) for entry in self.representations]
        return {representation.name: representation for representation in resolved}


def load_study(path: Path) -> Study:
    """Read and check a study file (errors: every problem at once)."""
    return parse_study(read_yaml(path), str(path))


def read_study(text: str, source: str) -> Study:
    """Check a study given as YAML or JSON text."""
    return parse_study(parse_yaml(text, source), source)


def parse_study(raw: Any, source: str) -> Study:
    """Check a study given as plain data; `source` names it in errors."""
    if not isinstance(raw, Mapping):
        raise QpipeError(f"{source}: a study is a mapping of settings, found {type(raw).__name__}")
    problems: list[str] = []
    study: Study | None = None
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        problems += explain(error, Study, raw)
    problems += _problems(raw)
    if study is not None and not problems:
        problems += [*_rule_problems(study), *_finetune_problems(study), *_ptq_problems(study)]
    if problems:
        raise QpipeError([f"{source}: {problem}" for problem in dict.fromkeys(problems)])
    assert study is not None
    return study


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield what types cannot say, from the raw data, so that it is found beside mistakes of structure."""
    given = [key for key in ("tokens_per_parameter", "tokens") if raw.get(key) is not None]
    if len(given) == 2:
        yield "tokens_per_parameter and tokens are both given; keep one of them"
    if not given:
        yield "no token budgets: give tokens_per_parameter (e.g. [20, 50]) or tokens (counts)"
    for key in given:
        budgets = raw[key]
        if isinstance(budgets, list) and any(isinstance(b, int | float) and not b > 0 for b in budgets):
            yield f"{key}: budgets must be above zero, found {budgets}"
    yield from _size_problems(raw)
    yield from _representation_problems(raw)


def _size_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    ladder, sizes = raw.get("ladder"), raw.get("sizes")
    if not isinstance(ladder, Mapping) or not isinstance(ladder.get("recipe"), str):
        return
    try:
        recipe = get_recipe(ladder["recipe"], ladder.get("version"))
    except QpipeError as error:
        yield f"ladder: {error}"
        return
    for size in sizes if isinstance(sizes, list) else []:
        if isinstance(size, str):
            yield from (f"sizes: {problem}" for problem in _message(lambda size=size: recipe.shape(size, 256)))


def _representation_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    entries = raw.get("representations")
    method = raw.get("default_method", "quest")
    found: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        try:
            representation = resolve(entry, default_method=method)
        except QpipeError as error:
            yield from (f"representations: {problem}" for problem in error.problems)
            continue
        composition = digest(representation.canonical(), 16)
        if composition in found:
            yield f"representations: '{representation.name}' and '{found[composition]}' are one composition; keep one"
        elif representation.name in found.values():
            yield f"representations: the name '{representation.name}' stands for two compositions"
        found[composition] = representation.name


def _message(call: Any) -> list[str]:
    try:
        call()
    except QpipeError as error:
        return error.problems
    return []


Key = tuple[str, float, str, int]
"""One run before resolution: size, budget, representation name, seed."""


def _product(study: Study) -> list[Key]:
    budgets = study.tokens_per_parameter or study.tokens or []
    names = list(study.resolved_representations())
    keys = list(itertools.product(study.size_names, map(float, budgets), names, study.seeds))
    for rule in study.include:
        added = rule.tokens_per_parameter if study.tokens is None else rule.tokens
        keys += itertools.product(
            rule.size or study.size_names,
            map(float, added or budgets),
            rule.representation or names,
            rule.seed or study.seeds,
        )
    return list(dict.fromkeys(keys))


def _matches(rule: Rule, key: Key) -> bool:
    size, budget, representation, seed = key
    budgets = rule.tokens if rule.tokens is not None else rule.tokens_per_parameter
    return (
        (rule.size is None or size in rule.size)
        and (budgets is None or any(math.isclose(budget, wanted) for wanted in budgets))
        and (rule.representation is None or representation in rule.representation)
        and (rule.seed is None or seed in rule.seed)
    )


def _rule_problems(study: Study) -> Iterator[str]:
    keys = _product(study)
    wrong = "tokens" if study.tokens is None else "tokens_per_parameter"
    known = {"size": set(study.recipe.rungs), "representation": set(study.resolved_representations())}
    for kind, rules in (("include", study.include), ("exclude", study.exclude)):
        for position, rule in enumerate(rules):
            where = f"{kind}[{position}]"
            if getattr(rule, wrong) is not None:
                yield f"{where}: {wrong} does not fit a study whose budgets are the other kind"
            if rule == Rule():
                yield f"{where}: an empty rule; name at least one of size, representation, seed or a budget"
            for field, names in known.items():
                if unknown := [value for value in getattr(rule, field) or [] if value not in names]:
                    yield f"{where}: {field} {unknown} is not in this study; it has {sorted(names)}"
            if kind == "exclude" and not any(_matches(rule, key) for key in keys):
                yield f"{where}: matches no run of the study"
    if not any(not any(_matches(rule, key) for rule in study.exclude) for key in keys):
        yield "exclude: leaves no run"


def _finetune_problems(study: Study) -> Iterator[str]:
    for position, section in enumerate(study.finetune):
        try:
            found = list(section.problems(study.default_method, set(study.recipe.rungs), study.recipe.precision))
        except QpipeError as error:
            found = error.problems
        yield from (f"finetune[{position}]: {problem}" for problem in found)


def _ptq_problems(study: Study) -> Iterator[str]:
    methods = [] if study.ptq is None else study.ptq.methods
    if study.ptq is not None:
        yield from (f"ptq: {problem}" for problem in study.ptq.problems(study.size_names))
        if not any(resolved.is_dense for resolved in study.resolved_representations().values()):
            yield "ptq: the study has no dense runs to quantize; add dense to representations"
    for law in study.laws:
        if law.ptq is not None and law.law != "precision":
            yield f"laws: {law.law} has no post-training term; ptq goes with law precision"
        elif law.ptq is not None and law.ptq not in methods:
            yield f"laws: precision: '{law.ptq}' is not among the methods of the study's ptq ({', '.join(methods)})"


def plan(study: Study, base: Path | None = None) -> list[Run]:
    """Return the study's runs in a fixed order, parents before children (errors: missing corpus files, ids that clash).

    Parameters
    ----------
    base
        Folder that relative corpus paths start from; the working folder by default.
    """
    corpus = study_corpus(study, base)
    recipe, formats = study.recipe, study.resolved_representations()
    keys = [key for key in _product(study) if not any(_matches(rule, key) for rule in study.exclude)]
    build = functools.partial(_run, study, recipe, formats, corpus)
    runs = [build(*key) for key in keys]
    if len({run.id for run in runs}) != len(runs):
        twice = sorted(_repeated(run.id for run in runs))
        raise QpipeError(
            [f"two runs of the study have the id {run_id}; rename a size or representation" for run_id in twice]
        )
    return list({run.id: run for run in [*runs, *_finetuned(study, recipe, corpus)]}.values())


def _finetuned(study: Study, recipe: Recipe, corpus: str) -> Iterator[Run]:
    """Yield the runs of the study's finetune sections; runs that several of them need come more than once."""
    budgets = study.tokens_per_parameter or study.tokens or []
    for section in study.finetune:
        sizes = section.sizes or study.size_names
        for size, budget, seed in itertools.product(sizes, map(float, budgets), study.seeds):
            shape, training = _policy(recipe, size, study.tokenizer.vocab_size, study.ladder)
            ground = Ground(size, recipe.rungs[size].nominal, shape, training, corpus, seed)
            tokens = budget if study.tokens is not None else budget * ground.nominal
            yield from finetuned_runs(section, ground, tokens, study.default_method)


def study_corpus(study: Study, base: Path | None = None) -> str:
    """Return the digest of corpus and tokenizer, which names the token store."""
    return digest(corpus_identity(study.corpus, study.tokenizer, base or Path.cwd()), 12)


def _repeated(values: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {value for value in values if value in seen or seen.add(value)}  # type: ignore[func-returns-value]


def _run(
    study: Study,
    recipe: Recipe,
    formats: Mapping[str, Representation],
    corpus: str,
    size: str,
    budget: float,
    name: str,
    seed: int,
) -> Run:
    shape, training = _policy(recipe, size, study.tokenizer.vocab_size, study.ladder)
    nominal = recipe.rungs[size].nominal
    tokens = budget if study.tokens is not None else budget * nominal
    return Run(
        size=size,
        representation_name=name,
        tokens_per_parameter=tokens / nominal,
        shape=shape,
        training=training,
        steps=max(1, int(tokens // (training.batch_sequences * shape.context))),
        representation=formats[name].canonical(),
        corpus=corpus,
        seed=seed,
    )


def _policy(recipe: Recipe, size: str, vocab_size: int, ladder: Ladder) -> tuple[Any, Any]:
    shape, training = recipe.shape(size, vocab_size), recipe.training(size)
    if ladder.tied_embeddings:
        shape = shape.model_copy(update={"tied_embeddings": True})
    if ladder.learning_rate_scale != 1.0:
        rate = training.learning_rate * ladder.learning_rate_scale
        training = training.model_copy(update={"learning_rate": rate})
    return shape, training
