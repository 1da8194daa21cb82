"""Which methods, ways to learn prototypes and targets go together: the documentation's table beside the program."""

from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from re import findall

import pytest

from uncollapse.config.facts import arm_keys, mode_name
from uncollapse.config.impossible import meaningless
from uncollapse.config.load import load_config
from uncollapse.config.methods import METHODS, OWN_TARGETS
from uncollapse.config.schema import KINDS, TARGETS, Config, HeadConfig
from uncollapse.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def rows():
    """(methods, keys, modes) of each row of the table of refused pairings."""
    table = DOCS.read_text().split("| method | mode | why |\n")[1].split("\n\n")[0].splitlines()[1:]
    for line in table:
        who, modes, why = line.strip("| ").split(" | ")
        keys = [key for key in findall(r"`([^`]+)`", who) if ":" in key]
        methods = METHODS if who.startswith("any") else findall(r"`(\w+)`", who)
        assert why
        yield set(methods), keys, findall(r"`([^`]+)`", modes)


def refused_by_the_table(method, kind, targets, vmf):
    name = kind if targets is None else f"{kind}-{targets}"
    return any(
        method in methods and bool(keys) <= vmf and any(fnmatch(name, mode) for mode in modes)
        for methods, keys, modes in rows()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_refused_pairings_is_what_is_refused(method):
    for kind, targets, vmf in product(KINDS, [None, *TARGETS], [False, True]):
        config = Config(method=METHODS[method](), head=HeadConfig(normalise=not vmf))
        config = replace(config, prototypes=replace(config.prototypes, kind=kind, targets=targets, vmf=vmf))
        refused = meaningless(config)
        assert bool(refused) == refused_by_the_table(method, kind, targets, vmf), (kind, targets, vmf)
        assert all("\n" not in why and len(why) < 120 for _, why in refused)


def test_the_tables_name_every_way_and_all_targets():
    text = DOCS.read_text()
    ways, targets = (text.split(head)[1].split("\n\n")[0] for head in ("| way (", "| targets ("))
    assert set(KINDS) <= set(findall(r"`([\w-]+)`", ways))
    assert set(TARGETS) <= set(findall(r"`([\w-]+)`", targets))


@pytest.mark.parametrize("recipe", ["demo", "carp-small32", "swav-small32"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_pair_that_means_something_is_a_mode_and_is_named_so(recipe, kind):
    """Where the targets are the way's own, by the way alone."""
    method = load_config(recipe).method.name
    own = {"decoupled": "posterior", "memory": OWN_TARGETS[method].replace("centred", "sinkhorn")}
    for targets in TARGETS:
        if refused_by_the_table(method, kind, targets, False):
            with pytest.raises(ConfigError, match=rf"^{recipe}: prototypes\.targets: [^\n]+$"):
                load_config(recipe, arm_keys(f"{kind}-{targets}"))
            continue
        name = mode_name(load_config(recipe, arm_keys(f"{kind}-{targets}")))
        assert name == (kind if targets == own.get(kind, OWN_TARGETS[method]) else f"{kind}-{targets}")
        assert arm_keys(name)["prototypes.kind"] == kind
