"""What the head comment of every shipped config says."""

import pytest

from dyncomp import config

BOTH = ("title", "command", "machine")


@pytest.mark.parametrize("slug", config.slugs())
def test_head_says_what_to_run_where_and_what_to_expect(slug):
    """A config at the paper's scale is compiled, not run: nothing to expect."""
    wanted = BOTH if slug.endswith("_paper") else (*BOTH, "expect")
    head = config.header(config.find(slug))
    missing = [key for key in wanted if not head.get(key)]
    assert not missing, f"{slug}.gin: no {', '.join(missing)} in its head"
    assert slug in head["command"].split()
