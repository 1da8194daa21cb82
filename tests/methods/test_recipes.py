"""Every recipe that ships trains, shrunk, each with one way to learn prototypes; `every_recipe.py` tries all pairs."""

import pytest

from every_recipe import outcome
from uncollapse.config.load import recipe_names
from uncollapse.config.schema import KINDS, RIVALS

WAYS = (*KINDS, *RIVALS)


@pytest.mark.parametrize(("number", "recipe"), list(enumerate(recipe_names())))
def test_it_trains_when_tiny(number, recipe):
    assert outcome(recipe, WAYS[number % len(WAYS)]) == "trained"
