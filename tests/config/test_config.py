"""Loading, checking and showing configs of dummy parts."""

import functools

import pytest

from dyncomp import config
from dyncomp.core.errors import DyncompError


def test_load_builds_scopes_factories_and_overrides(files, parts):
    top, _ = files
    run = config.load(top, ["parts.Root.seed=7"], root=parts.Root)
    assert run.seed == 7 and run.data.name == "digits"
    assert run.model.width == 24  # the top file's macro wins over the included one
    assert run.optimizer == parts.Optimizer(rate=0.5)
    plain, wide = run.model.blocks
    assert isinstance(plain, functools.partial) and plain.func is parts.Block
    assert plain().ffn().hidden == 32
    assert wide().ffn().hidden == 64  # an unscoped reference inherits the scope of who refers to it


def test_two_configs_in_one_process_do_not_mix(files, parts):
    top, _ = files
    first = config.load(top, ["parts.FFN.hidden=5"], root=parts.Root)
    second = config.load(top, ["parts.FFN.hidden=6"], root=parts.Root)
    assert first.model.blocks[0]().ffn().hidden == 5
    assert second.model.blocks[0]().ffn().hidden == 6


def test_operative_text_builds_the_same_object(files, parts):
    top, _ = files
    text = config.operative(top, ["parts.Root.seed=3", "WIDTH=40"], root=parts.Root)
    again, once = (
        config.load(text, root=parts.Root),
        config.load(top, ["parts.Root.seed=3", "WIDTH=40"], root=parts.Root),
    )
    assert again.seed == 3 and again.model.width == 40
    assert again.optimizer == once.optimizer and again.data == once.data
    assert again.model.blocks[1]().ffn().hidden == 64
    assert config.operative(text, root=parts.Root) == text


def test_show_lists_overrides_with_both_places(files, parts):
    top, _ = files
    shown = config.show(top, ["parts.Optimizer.rate=1.0"], root=parts.Root)
    found = {o.name: o for o in shown.overrides}
    assert found["parts.Optimizer.rate"].place == "command line:1"
    assert found["parts.Optimizer.rate"].replaced_place.endswith("base.gin:11")
    assert found["WIDTH"].value == "24" and found["WIDTH"].replaced == "16"


@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("parts.Rot.seed = 1", "nothing called 'Rot'", "Root"),
        ("prts.Root.seed = 1", "unknown name 'prts'", "parts"),
        ("parts.Root.sed = 1", "no parameter 'sed'", "seed"),
        ("parts.FFN.name = 'x'", "no parameter 'name'", "hidden"),
        ("parts.Root.seed = 'one'", "'one' is no int", "write int"),
        ("parts.Root.seed = True", "True is no int", "write int"),
        ("parts.Root.seed = 1.5", "1.5 is no int", "write int"),
        ("parts.Data.shuffle = 1", "1 is no bool", "write bool"),
        ("parts.Data.sizes = [1, 2]", "no tuple", "write tuple"),
        ("parts.Data.sizes = (1, 'b')", "'b' is no int", "write int"),
        ("parts.Data.pair = (1, 'b', 2)", "3 elements are no tuple[int, str]", "write 2 elements"),
        ("parts.Data.pair = (1,)", "1 elements are no", "write 2 elements"),
        ("parts.Data.pair = ('b', 1)", "'b' is no int", "write int"),
        ("parts.Data.table = {'a': [1.0, None, 'x']}", "'x' is no float or None", "write"),
        ("parts.Data.table = {'a': [1.0, True]}", "True is no float or None", "write"),
        ("parts.Data.table = {1: [1.0]}", "1 is no str", "write str"),
        ("parts.Data.table = {'a': 1.0}", "1.0 is no", "write"),
        ("parts.Data.table = {'a': [1.0], 'b': [2.0], 'a': [3.0]}", "'a' stands twice", "remove"),
        ("parts.Root.weights = {'a': {'b': 1, 'b': 2}}", "'b' stands twice", "remove one"),
        ("wide/parts.FFN.kind = 3", "3 is no 'silu' or 'gelu'", "write"),
        ("wide/parts.FFN.hiden = 3", "no parameter 'hiden'", "hidden"),
        ("parts.Root.arms = {'a': @wdie/parts.Data()}", "nothing is bound in scope 'wdie'", "wide"),
        ("parts.Root.arms = {'a': @parts.Optimizer()}", "is no Data", "refer to a Data"),
        ("parts.FFN.kind = 'relu'", "'relu' is no 'silu' or 'gelu'", "write 'silu' or 'gelu'"),
        (
            "parts.Block.norm = @parts.FFN()",
            "a factory is wanted",
            "write @parts.FFN, not @parts.FFN()",
        ),
        ("parts.Block.norm = [@parts.FFN]", "list", "write"),
        ("parts.Root.seed = @parts.FFN()", "is no int", "refer to"),
        ("parts.Root.seed = %WITH", "macro %WITH is not defined", "WIDTH"),
        ("parts.Root.seed = %gin.REQUIRED", "a value is required", "bind it"),
        ("parts.Root.seed = %OTHER\nOTHER = 'x'", "'x' is no int", "write int"),
        ("WIDTH = 3", "WIDTH is bound twice", "remove it"),
        ("parts.Data.name = 'other'", "bound twice", "top.gin:12"),
        ("IDLE = 3", "nothing uses it", "remove it"),
        ("other/parts.Data.name = 'x'", "nothing uses it", "remove it"),
        ("parts.make_optimizer.steps = 3", "nothing uses it", "remove it"),
        ("parts.Root.seed = = 3", "syntax error", "write"),
        ("parts.Root.seed = (3", "syntax error", "close"),
        ("parts.Root.seed = lambda: 3", "syntax error", "write"),
        ("import config_parts as parts", "'parts' is imported twice", "remove one"),
        ("from __gin__ import dynamic_registration", "imported twice", "remove one"),
        ("from __gin__ import registration", "no feature 'registration'", "dynamic_registration"),
        ("include 'base.gin'", "'base.gin' is included twice", "remove one"),
        ("include 'gone.gin'", "'gone.gin' does not exist", "relative"),
        ("include 'top.gin'", "includes itself", "remove"),
        ("import no_such_module", "can't import 'no_such_module'", "import line"),
    ],
)
def test_refused_with_file_line_and_fix(files, parts, line, message, fix):
    top, append = files
    number = append(line + "\n")
    found = config.check(top, root=parts.Root)
    assert any(message in p.message and fix in p.fix for p in found), found
    assert any(p.file == str(top) and p.line >= number for p in found)
    with pytest.raises(config.ConfigError, match="top.gin:"):
        config.load(top, root=parts.Root)


def test_factory_where_an_instance_is_wanted(files, parts):
    top, _ = files
    top.write_text(top.read_text().replace("@parts.Optimizer()", "@parts.Optimizer"))
    (problem,) = config.check(top, root=parts.Root)
    assert problem.line == 9 and problem.fix == "write @parts.Optimizer(), not @parts.Optimizer"


def test_missing_required_value(files, parts):
    top, append = files
    top.write_text(top.read_text().replace("@parts.Optimizer()", "@parts.make_optimizer()"))
    (problem,) = config.check(top, root=parts.Root)
    assert "make_optimizer.rate has no value" in problem.message and problem.line == 9


def test_same_binding_in_two_unrelated_includes(files, parts):
    top, append = files
    other = top.with_name("other.gin")
    other.write_text(
        "from __gin__ import dynamic_registration\nimport config_parts\nconfig_parts.FFN.hidden = 9\n"
    )
    top.write_text(
        top.read_text().replace("include 'base.gin'", "include 'base.gin'\ninclude 'other.gin'")
    )
    (problem,) = config.check(top, root=parts.Root)
    assert problem.file == str(other) and problem.line == 3 and "base.gin:9" in problem.fix


def test_included_files_may_hold_idle_bindings(files, parts):
    top, append = files
    append("parts.Data.shuffle = False\nother/parts.FFN.hidden = 1\nUNUSED = 1\n", "base.gin")
    assert config.check(top, root=parts.Root) == []


def test_bindings_stand_below_includes(files, parts):
    top, append = files
    top.write_text(
        top.read_text().replace("include 'base.gin'", "parts.Root.seed = 1\ninclude 'base.gin'")
    )
    (problem,) = config.check(top, root=parts.Root)
    assert problem.line == 6 and "above all bindings" in problem.fix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parts.Root.seed", "no '='"),
        ("parts.Data.name=digits", "text values need quotes"),
        ("parts.Root.sead=1", "no parameter"),
        ("NEW=1", "nothing uses it"),
    ],
)
def test_bad_overrides_name_the_command_line(files, parts, override, message):
    top, _ = files
    (problem,) = config.check(top, [override], root=parts.Root)
    assert problem.file == "command line" and problem.line == 1 and message in str(problem)


def test_same_override_twice(files, parts):
    top, _ = files
    (problem,) = config.check(top, ["parts.Root.seed=1", "parts.Root.seed=2"], root=parts.Root)
    assert "bound twice" in problem.message and problem.line == 2


def test_values_refused_by_the_object_are_one_line(files, parts):
    (problem,) = config.check(files[0], ["parts.Data.name=''"], root=parts.Root)
    assert "Data: name='': give it a name" in problem.message and "\n" not in problem.message
    with pytest.raises(DyncompError, match="^Data: name='': give it a name$"):
        config.load(files[0], ["parts.Data.name=''"], root=parts.Root)


def test_unknown_name_lists_near_matches():
    with pytest.raises(DyncompError, match="did you mean quickstart"):
        config.find("quickstar")
    with pytest.raises(DyncompError, match="dyncomp list"):
        config.find("zzzz")


def test_circles_are_refused(files, parts):
    top, append = files
    append("parts.Root.seed = %ONE\nONE = %TWO\nTWO = %ONE\n")
    assert any("circle" in p.fix for p in config.check(top, root=parts.Root))


def test_header_is_read_until_the_first_statement(files):
    assert config.header(files[0]) == {"title": "A dummy run", "family": "tests"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_p/models.Block.ffn=@tasks.CodeLM", "top_p: the parts do not fit together"),
        ("top_p/experts.MoE.router=@experts.SwiGLU", "top_p: the parts do not fit together"),
        ("top_2/routers.TopK.k=9", "top_2: TopK.k=9 with num_experts=8: use 1..8"),
        ("top_p/training.Run.sweep={'q': (0.1,)}", "top_p: no control named 'q'"),
        ("training.Run.trainable='nothing/there'", "no parameter path matches 'nothing/there'"),
        ("tasks.LMObjective.aux_weights={'balanc': 0.1}", "aux_weights names 'balanc'"),
        ("training.Run.steps=0", "Run.steps=0: use 1 or more"),
    ],
)
def test_parts_that_do_not_fit_together(override, message):
    found = config.check("quickstart", [override])
    assert any(message in p.message for p in found), found
    assert all("\n" not in str(p) and p.line > 0 and p.fix for p in found)
