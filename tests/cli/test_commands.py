"""The other commands: list, config, sweep, bench, compile, reproduce; help of all."""

import json
import re
import shutil

import pytest
from terminal import ONE, cli, spawn

from dyncomp import config as configs

COMMANDS = (
    "list", "config show", "config check", "run", "eval", "generate", "train-exits", "reproduce", "sweep", "launch",
    "bench", "compile", "report",
)  # fmt: skip
CLAIMS = """
[[claim]]
id = "better"
text = "a is better than b"
paper = "not reported"
metric = "loss"
arm = "a"
against = "b"
relation = "<"
margin = 0.0
kind = "compute"
"""
EXPERIMENT = """
TITLE, ARMS, SEEDS, COMPUTE = "A toy", ["a", "b"], (0, 1, 2), "cost"
METRICS = {"loss": {"text": "loss", "minimize": True}}

def run_seed(seed, quick, workdir):
    assert quick
    return {"a": {"loss": 1.0, "cost": 1.0}, "b": {"loss": 2.0, "cost": 1.0}}
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    found = cli(*name.split(), "--help")
    assert found.code == 0 and found.err == ""
    example = found.out.split("example:\n")[1].strip()
    assert example.startswith("dyncomp ") and name.split()[0] in example


def test_the_commands_are_those_tested_here():
    listed = re.search(r"\{(.*?)\}|COMMAND\n((?:    \w.*\n(?:     .*\n)*)+)", cli("--help").out)
    assert listed is not None
    names = re.findall(r"^    ([\w-]+)", listed[0], re.M)
    assert set(names) == {name.split()[0] for name in COMMANDS}


def test_a_process_says_its_version_and_refuses_wrong_usage():
    assert spawn("--version").out.startswith("dyncomp ")
    wrong = spawn("rum")
    assert wrong.code == 2 and "rum" in wrong.err and "Traceback" not in wrong.err


def test_list():
    found = json.loads(cli("list", "--json").out)
    keys = {"slug", "title", "family", "config", "paper_config", "evidence", "claims_held", "claims_total"}  # fmt: skip
    assert all(set(system) == keys for system in found)
    systems = {system["slug"]: system for system in found}
    assert not any(slug.endswith("_paper") for slug in systems)
    mixture = systems["harder_tasks_more_experts"]
    assert mixture["family"] == "experts" and mixture["claims_total"] > 0
    assert mixture["paper_config"].endswith("harder_tasks_more_experts_paper.gin")
    shown = cli("list").out
    assert all(slug in shown for slug in systems)
    assert max(map(len, shown.splitlines())) <= 80


def test_config_check_of_a_good_and_a_bad_one(config, tmp_path):
    bad = tmp_path / "bad.gin"
    shutil.copy(config.with_name("layer.gin"), tmp_path)
    bad.write_text(config.read_text() + "IDLE = 1\ntraining.AdamW.b1 = 'x'\n")
    number = len(bad.read_text().splitlines())
    found = cli("config", "check", config, bad)
    assert found.code == 1 and found.out == f"{config}: ok\n"
    assert re.fullmatch(
        rf"error: .*bad.gin:{number}: training.AdamW.b1: .*; write float\n", found.err
    )
    (problem,) = json.loads(cli("config", "check", bad, "--json").out)[str(bad)]
    assert problem["line"] == number and problem["fix"] == "write float"
    assert cli("config", "check", config, "--gin.STEPS=7").code == 0
    assert cli("config", "check", config, "--gin.STEPS='7'").code == 1


def test_config_show_resolves_and_lists_overrides(config):
    found = json.loads(cli("config", "show", config, "--gin.STEPS=7", "--json").out)
    assert "training.Run.steps = 7" in found["config"] and "%" not in found["config"]
    (override,) = found["overrides"]
    assert (override["name"], override["value"], override["replaced"]) == ("STEPS", "7", "4")
    assert override["place"] == "command line:1" and "tiny.gin:" in override["replaced_place"]
    assert configs.check(found["config"]) == []
    shown = cli("config", "show", config, "--gin.STEPS=7").out
    assert found["config"].strip() in shown and "Overridden" in shown


def test_a_sweep_with_a_failing_point_goes_on_where_it_stopped(config, tmp_path):
    grid = "training.AdamW.learning_rate=1e-3,1e30"
    words = ("sweep", config, "--grid", grid, "--workdir", tmp_path, ONE, "--json")
    first = cli(*words)
    good, bad = json.loads(first.out)
    assert first.code == 1 and good["status"] == "finished" and bad["status"] == "failed"
    assert good["point"] == {"training.AdamW.learning_rate": "1e-3"}
    assert good["summary"]["step"] == 4 and bad["summary"] is None and bad["exit_code"] == 1
    log = (tmp_path / "training.AdamW.learning_rate=1e30" / "sweep.log").read_text()
    assert "lower the learning rate" in log and "Traceback" not in log
    # Without the bad point nothing is left to do; the table names what was found.
    again = cli("sweep", config, "--grid", grid.replace(",1e30", ""), "--workdir", tmp_path, ONE)
    assert again.code == 0 and "skipped" in again.out and "needed FLOPs" in again.out
    assert json.loads((tmp_path / "sweep.json").read_text())[0]["summary"] == good["summary"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--grid", "STEPS"), "write --grid NAME=A,B"),
        (("--grid", "STEPS=1,1"), "stands twice"),
        (("--grid", "STEPS=1,'x'"), "'x' is no int"),
        (("--grid", "STEPS=1", "--jobs", "0"), "write 1 or more"),
    ],
)
def test_a_sweep_that_makes_no_sense_starts_nothing(config, here, words, message):
    assert message in cli("sweep", config, *words).error
    assert list(here.iterdir()) == []


def test_bench_names():
    assert json.loads(cli("bench", "list", "--json").out)["ledger"]
    assert "did you mean ledger?" in cli("bench", "leger").error


def test_compile_for_a_simulated_machine(config):
    found = cli("compile", config, "--topology", "cpu:1", "--json", ONE)
    assert found.code == 0, found.err
    report = json.loads(found.out)
    assert report["topology"] == "cpu:1" and report["devices"] == 1
    assert report["ledger_flops"] > 0 and report["refused"] == ""


@pytest.mark.parametrize("topology", ["v9:2x2", "cpu:0", "two"])
def test_a_topology_that_does_not_exist(config, topology):
    found = cli("compile", config, "--topology", topology)
    assert topology in found.error and ("such as" in found.error or "use cpu:1" in found.error)


@pytest.fixture
def toy(tmp_path):
    folder = tmp_path / "experiments" / "toy"
    folder.mkdir(parents=True)
    (folder / "claims.toml").write_text(CLAIMS)
    (folder / "experiment.py").write_text(EXPERIMENT)
    return folder


def test_reproduce_quick_writes_nothing(toy):
    before = {path: path.read_bytes() for path in toy.iterdir()}
    found = cli("reproduce", "toy", "--quick", "--root", toy.parent, "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["quick"] is True and result["claims"][0]["id"] == "better"
    assert (
        result["claims"][0]["ours"]["mean"] == -1.0 and result["claims"][0]["holds"] == "unresolved"
    )
    assert {p: p.read_bytes() for p in toy.iterdir() if p.is_file()} == before
    table = cli("reproduce", "toy", "--quick", "--root", toy.parent).out
    assert "a is better than b" in table and "unresolved" in table


def test_reproduce_says_what_is_wrong(toy):
    assert "name a folder" in cli("reproduce", "tox", "--root", toy.parent).error
    assert "write whole numbers" in cli("reproduce", "toy", "--seeds", "0,x").error
    assert "not committed" in cli("reproduce", "toy", "--root", toy.parent).error
