"""From what the user asks for to a method and its knobs for each table: --compress, --compress-threshold, --compress-config, --compress-to."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from compression.budget import parse_budget, to_budget, with_spread
from compression.method import PLAIN, Choice
from compression.registry import METHODS, method_named, no_start, num_bytes, upstream_choices
from dlrm_xla.config import MethodConfig
from dlrm_xla.specs import TableSpec, UserError, size_text


@dataclass(frozen=True)
class Asked:
    """A method and those of its knobs that were typed."""

    method: str
    given: dict[str, str]

    def choice(self) -> Choice:
        return PLAIN if self.method == "plain" else Choice(self.method, METHODS[self.method].knob_values(self.given))


def parse_asked(text: str) -> Asked:
    """"tt:rank=16,cores=3" or "plain". UserError for a name, a knob or a value that is none."""
    name, _, rest = (part.strip() for part in text.partition(":"))
    if name == "plain":
        if rest:
            raise UserError(f"{text}: plain tables have no knobs")
        return Asked("plain", {})
    method = method_named(name)
    given: dict[str, str] = {}
    for pair in rest.split(",") if rest else ():
        knob, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not knob or not value:
            names = ", ".join(one.name for one in method.knobs) or "none"
            raise UserError(f"{text}: {pair!r} is not of the form knob=value; {name} has the knobs {names}")
        if knob in given:
            raise UserError(f"{text}: {knob} is there twice")
        given[knob] = value
    method.knob_values(given)  # a wrong one is found before the data is read
    return Asked(name, given)


@dataclass(frozen=True)
class Wish:
    """Everything asked for: default is for tables above `threshold` rows; others for tables by number."""

    default: Asked
    threshold: int
    others: dict[int, Asked]


def parse_wish(config: MethodConfig) -> Wish:
    """The flags and the file, without the tables. UserErrors name the flag, and in the file the line."""
    wish = Wish(Asked("plain", {}), config.threshold, {})
    if config.compress_file:
        wish = read_file(Path(config.compress_file), config.threshold)
    if config.compress and wish.default.method != "plain":
        raise UserError(f"--compress={config.compress}: {config.compress_file} has a default of its own; leave one of them out")
    if config.compress:
        try:
            wish = Wish(parse_asked(config.compress), wish.threshold, wish.others)
        except UserError as error:
            raise UserError(f"--compress={config.compress}: {error}") from None
    if config.compress_to:
        parse_budget(config.compress_to, 1)
        for asked in (wish.default, *wish.others.values()):
            sized_by = METHODS[asked.method].sized_by if asked.method != "plain" else ""
            if sized_by in asked.given:
                given = f"{asked.method}:{sized_by}={asked.given[sized_by]}"
                raise UserError(f"--compress-to={config.compress_to}: sets {sized_by} of {asked.method}, and {given} does too; leave one of them out")
    return wish


def check_wish(config: MethodConfig, optimizer: str, loading: bool) -> None:
    """What can be said before the data is read. loading: the tables' values come from a checkpoint."""
    if config.kind != "compress":
        return
    flag = f"--compress-config={config.compress_file}" if config.compress_file else f"--compress={config.compress}"
    for asked in asked_methods(config):
        method = METHODS[asked.method]
        if method.create is None and not loading:
            raise UserError(f"{flag}: {no_start(method)}")
        if method.optimizers and optimizer not in method.optimizers:
            use = " or ".join(method.optimizers)
            raise UserError(f"{flag}: {method.name} keeps no number for every weight, and --optimizer={optimizer} would; use {use}")


def asked_methods(config: MethodConfig) -> list[Asked]:
    """Every method that is asked for."""
    wish = parse_wish(config)
    return [asked for asked in (wish.default, *wish.others.values()) if asked.method != "plain"]


def wants_counts(config: MethodConfig) -> bool:
    """Does a method that is asked for make use of how often training looks ids up?"""
    return config.kind == "compress" and any(METHODS[asked.method].uses_counts(asked.choice().knobs) for asked in asked_methods(config))


def choices_and_counts(
    specs: list[TableSpec], config: MethodConfig, count: Callable[[], list[np.ndarray]] | None, saved: list[Choice] | None = None
) -> tuple[list[Choice], list[np.ndarray] | None]:
    """The choice for each table, and how often training looks ids up where a method makes use of it.

    count  counts that over the training data; None: the data cannot be counted
    saved  what the tables of a checkpoint were made by: they stay so, and UserError where something else is asked for
    """
    if saved is not None and len(saved) == len(specs):
        _check_saved(config, saved)
        return saved, None
    counts = None
    if wants_counts(config):
        needed = next((asked.method for asked in asked_methods(config) if METHODS[asked.method].needs_counts), None)
        if count is not None:
            counts = count()
        elif needed:
            raise UserError(f"{needed}: goes by how often training looks ids up, which made-up data does not tell; use --data-generation=dataset")
    return choose(specs, config, counts), counts


def _check_saved(config: MethodConfig, saved: list[Choice]) -> None:
    """Flags that say how tables are made must not say something else than the checkpoint."""
    if config.kind != "compress":
        return
    wish = parse_wish(config)
    for number, choice in enumerate(saved):
        asked = wish.others.get(number, wish.default)
        same = choice.method == asked.method and all(
            choice.knobs[name] == asked.choice().knobs[name] for name in asked.given
        )
        if choice.method != "plain" and not same:
            made = f"table {number} of the checkpoint was made by {choice.text()}"
            raise UserError(f"--load-model: {made} and {asked.method} is asked for; leave --compress and --compress-config out to go on with it")


def read_file(path: Path, threshold: int) -> Wish:
    """YAML: `default: METHOD`, `threshold: ROWS`, and under `tables:` lines of the form `3: METHOD`, `5-9: METHOD` or `0,2: METHOD`."""
    flag = f"--compress-config={path}"
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{flag}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{flag}: must be lines of the form `name: value`; the names are default, threshold and tables")
    default, others = Asked("plain", {}), {}
    seen: set[str] = set()
    for key, value in root.value:
        where, name = f"{flag}: line {key.start_mark.line + 1}", str(key.value)
        if name in seen:
            raise UserError(f"{where}: {name} is there twice; keep one of them")
        seen.add(name)
        if name == "default":
            default = _at(where, lambda value=value, where=where: parse_asked(_scalar(value, where)))
        elif name == "threshold":
            threshold = _number(_scalar(value, where), where)
        elif name == "tables" and isinstance(value, yaml.MappingNode):
            for numbers, text in value.value:
                where = f"{flag}: line {numbers.start_mark.line + 1}"
                asked = _at(where, lambda text=text, where=where: parse_asked(_scalar(text, where)))
                for number in _table_numbers(_scalar(numbers, where), where):
                    if number in others:
                        raise UserError(f"{where}: table {number} is there twice; keep one of them")
                    others[number] = asked
        else:
            raise UserError(f"{where}: {name!r} is none of default (a method), threshold (rows) and tables (lines of the form `3: tt:rank=8`)")
    return Wish(default, threshold, others)


def _at(where: str, parse: Callable[[], Asked]) -> Asked:
    try:
        return parse()
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from None


def _scalar(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: must be one value, as tt:rank=8")
    return node.value


def _number(text: str, where: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text):
        raise UserError(f"{where}: {text!r} is not a number of rows")
    return int(text)


def _table_numbers(text: str, where: str) -> list[int]:
    numbers: list[int] = []
    for piece in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", piece)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"{where}: {text!r} does not name tables by number; as 3, 0,2 or 5-9")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def choose(specs: list[TableSpec], config: MethodConfig, counts: list[np.ndarray] | None = None) -> list[Choice]:
    """The choice for each table. UserError where a method does not go with a table, or no knob meets the budget."""
    if config.kind != "compress":
        return upstream_choices(specs, config)
    wish = parse_wish(config)
    unknown = [number for number in wish.others if number >= len(specs)]
    if unknown:
        raise UserError(f"--compress-config={config.compress_file}: table {unknown[0]} is named and there are {len(specs)}, 0 to {len(specs) - 1}")
    asked = [wish.others.get(i, wish.default if spec.num_embeddings > wish.threshold else Asked("plain", {})) for i, spec in enumerate(specs)]
    choices = [one.choice() for one in asked]
    if config.compress_to:
        budget = parse_budget(config.compress_to, sum(num_bytes(spec, PLAIN) for spec in specs))
        choices = to_budget(specs, choices, budget, config, counts)
    else:
        choices = with_spread(specs, choices)
    for spec, choice in zip(specs, choices, strict=True):
        check = METHODS[choice.method].check if choice.method != "plain" else None
        if check is not None:
            check(spec, choice.knobs)
    return choices


def ratio_text(specs: list[TableSpec], choices: list[Choice]) -> str:
    """"20.2 MB -> 0.2 MB (100x): 18 by tt, 8 plain"."""
    full = sum(num_bytes(spec, PLAIN) for spec in specs)
    now = sum(num_bytes(spec, choice) for spec, choice in zip(specs, choices, strict=True))
    counts: dict[str, int] = {}
    for choice in choices:
        counts[choice.method] = counts.get(choice.method, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: pair[0] == "plain")
    kinds = ", ".join(f"{count} {'plain' if name == 'plain' else f'by {name}'}" for name, count in ordered)
    return f"{size_text(full)} -> {size_text(now)} ({full / now:.4g}x): {kinds}"

